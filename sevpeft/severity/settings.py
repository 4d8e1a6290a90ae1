"""KEY=VALUE settings of `sevpeft annotate`, `translate`, `classifier fit` and `classifier evaluate`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sevpeft.recipe import DataSection, Section


class _ReadingSettings(Section):
    data: DataSection = Field(default_factory=DataSection)
    """The consultations."""

    @field_validator("data")
    @classmethod
    def _is_not_split(cls, data: DataSection) -> DataSection:
        if unused := sorted({"validation_size", "test_size", "seed"} & data.model_fields_set):
            raise ValueError(f"{', '.join(unused)}: has no effect, as this command does not split rows; leave it out")
        return data


class AnnotateSettings(_ReadingSettings):
    """Settings of `sevpeft annotate`."""

    method: Literal["rules", "linear", "rules+linear", "transformer"] | None = None
    """Kind of the classifier; unset, the kind of `classifier`."""
    classifier: str | None = None
    """Folder from `sevpeft classifier fit`; optional for rules."""
    lexicon: str | None = None
    """Lexicon file of the rules; unset, the package's lexicon."""
    text: Literal["question", "answer", "both"] | None = None
    """Text to read; unset, as the classifier was fitted, or the question if a row has no answer."""
    replace: bool | Literal["missing"] = False
    """Annotate data that has severity already: all rows, or rows without one (missing). severity_given keeps labels."""

    @model_validator(mode="after")
    def _has_one_classifier(self) -> AnnotateSettings:
        if self.classifier is None and self.method != "rules":
            raise ValueError("needs method=rules, or classifier=FOLDER (from `sevpeft classifier fit DATA FOLDER`)")
        if self.classifier is not None and self.lexicon is not None:
            raise ValueError("has lexicon and classifier, but a classifier has its own lexicon; remove one")
        return self


class TranslateSettings(_ReadingSettings):
    """Settings of `sevpeft translate`."""

    model: str = ""
    """Instruction model, required: a Hub id or a folder."""
    to: Literal["ar", "en"] = "ar"
    """Language of the translation."""
    load_in_4bit: bool = False
    """The model in 4 bits (NF4), with transformers even if vLLM is installed."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Maximum length of a translated question or answer, in tokens."""


class EncoderSection(Section):
    """Fine-tuning of the encoder of kind=transformer."""

    name_or_path: str = "CAMeL-Lab/bert-base-arabic-camelbert-mix"
    """Hub id or folder of the encoder."""
    num_train_epochs: float = Field(default=4, gt=0)
    """Training epochs."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Learning rate."""
    per_device_train_batch_size: int = Field(default=16, ge=1)
    """Questions per training step and device."""
    max_length: int = Field(default=256, ge=1)
    """Maximum tokens of a question; longer ones are truncated."""


class ClassifierSettings(_ReadingSettings):
    """Settings of both `sevpeft classifier` commands."""

    kind: Literal["linear", "transformer", "rules", "rules+linear"] = "linear"
    """Kind of the classifier."""
    text: Literal["question", "answer", "both"] | None = None
    """Text to read; unset, both, or the question for rules. A question-only twin is always fitted too."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the splits, the fit and the intervals."""
    block_column: str | None = None
    """Column of blocks (source, year) to hold out one at a time."""
    lexicon: str | None = None
    """Lexicon of the rules; unset, the package's lexicon."""
    encoder: EncoderSection = Field(default_factory=EncoderSection)
    """The encoder of kind=transformer."""
    unlabeled: str | None = None
    """Consultations without labels; the question-only twin learns the scores that the classifier of both gives them."""

    @field_validator("lexicon", "encoder", "unlabeled")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        part = {"lexicon": "rules", "encoder": "transformer", "unlabeled": "linear"}[name]
        if value is not None and part not in info.data.get("kind", part):
            also = " and kind=rules+linear" if part != "transformer" else ""
            raise ValueError(f"is for kind={part}{also} only; leave it out")
        if value and name == "unlabeled" and info.data.get("text") in ("question", "answer"):
            raise ValueError("needs text=both, because that classifier labels the rows; leave text out")
        return value

    @property
    def reads(self) -> Literal["question", "answer", "both"]:
        """`text`, or the default of the kind."""
        return self.text or ("question" if self.kind == "rules" else "both")


class FitSettings(ClassifierSettings):
    """Settings of `sevpeft classifier fit`."""

    test_size: float = Field(default=0.2, ge=0.05, le=0.5)
    """Share of the questions to evaluate on, rounded to 1/2, 1/3, 1/4 and so on."""


class EvaluateSettings(ClassifierSettings):
    """Settings of `sevpeft classifier evaluate`."""

    classifier: str | None = None
    """Folder of a fitted classifier to evaluate; unset, these settings are evaluated by cross-validation."""
    folds: int = Field(default=5, ge=2, le=20)
    """Random folds of the cross-validation."""
    seen_data: bool = False
    """Allow evaluation on the data that the classifier was fitted on."""
