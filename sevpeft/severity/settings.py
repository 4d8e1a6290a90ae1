"""Settings of `sevpeft annotate`, `translate`, `classifier fit` and `classifier evaluate`, given as KEY=VALUE."""

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
            raise ValueError(f"{', '.join(unused)}: splits the rows of a recipe, and no rows here; leave it out")
        return data


class AnnotateSettings(_ReadingSettings):
    """What is annotated, and by what."""

    method: Literal["rules", "linear", "rules+linear", "transformer"] | None = None
    """Kind of the classifier; unset, that of `classifier`."""
    classifier: str | None = None
    """Folder that `sevpeft classifier fit` made; rules work without one."""
    lexicon: str | None = None
    """Lexicon file of the rules, if not the package's own."""
    text: Literal["question", "answer", "both"] | None = None
    """What is read; unset, what the classifier was fitted on, and the question where there is no answer."""
    replace: bool = False
    """Annotate rows that have severity already; what people gave is kept as severity_given."""

    @model_validator(mode="after")
    def _has_one_classifier(self) -> AnnotateSettings:
        if self.classifier is None and self.method != "rules":
            raise ValueError("needs method=rules, or classifier=FOLDER (made by `sevpeft classifier fit DATA FOLDER`)")
        if self.classifier is not None and self.lexicon is not None:
            raise ValueError("has lexicon and classifier, which has a lexicon of its own; remove one")
        return self


class TranslateSettings(_ReadingSettings):
    """What is translated, by which model, and which of its translations are kept."""

    model: str = ""
    """Instruction model, which must be named: a Hub id or a folder."""
    to: Literal["ar", "en"] = "ar"
    """Language of the translation."""
    load_in_4bit: bool = False
    """The model in 4 bits (NF4), by transformers even where vLLM is installed."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest translation of a question or an answer, in tokens."""


class EncoderSection(Section):
    """How the encoder of kind=transformer is fine-tuned."""

    name_or_path: str = "CAMeL-Lab/bert-base-arabic-camelbert-mix"
    """Hub id or folder of the encoder."""
    num_train_epochs: float = Field(default=4, gt=0)
    """Epochs of kind=transformer."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Learning rate of kind=transformer."""
    per_device_train_batch_size: int = Field(default=16, ge=1)
    """Questions of a training step."""
    max_length: int = Field(default=256, ge=1)
    """Tokens of a question; the end of a longer one is not read."""


class ClassifierSettings(_ReadingSettings):
    """What both verbs of `sevpeft classifier` take."""

    kind: Literal["linear", "transformer", "rules", "rules+linear"] = "linear"
    """What is fitted."""
    text: Literal["question", "answer", "both"] | None = None
    """What is read; unset, both, and the question by rules. A twin that reads questions alone comes with it."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the splits, the fit and the intervals."""
    block_column: str | None = None
    """Column of blocks (source, year) to hold out one at a time."""
    lexicon: str | None = None
    """Lexicon of the rules; null is the package's."""
    encoder: EncoderSection = Field(default_factory=EncoderSection)
    """The encoder of kind=transformer."""
    unlabeled: str | None = None
    """Consultations without labels, of which the question-only twin learns what the classifier of both says of them."""

    @field_validator("lexicon", "encoder", "unlabeled")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        part = {"lexicon": "rules", "encoder": "transformer", "unlabeled": "linear"}[name]
        if value is not None and part not in info.data.get("kind", part):
            also = " and kind=rules+linear" if part != "transformer" else ""
            raise ValueError(f"is for kind={part}{also} only; leave it out")
        if value and name == "unlabeled" and info.data.get("text") in ("question", "answer"):
            raise ValueError("needs text=both, which says how severe they are; leave text out")
        return value

    @property
    def reads(self) -> Literal["question", "answer", "both"]:
        """`text`, or its default."""
        return self.text or ("question" if self.kind == "rules" else "both")


class FitSettings(ClassifierSettings):
    """Settings of `sevpeft classifier fit`."""

    test_size: float = Field(default=0.2, ge=0.05, le=0.5)
    """Share of the questions to evaluate on."""


class EvaluateSettings(ClassifierSettings):
    """Settings of `sevpeft classifier evaluate`."""

    classifier: str | None = None
    """Folder of a fitted classifier to evaluate; null evaluates a way of fitting by cross-validation."""
    folds: int = Field(default=5, ge=2, le=20)
    """Random folds of the cross-validation."""
    seen_data: bool = False
    """Evaluates a classifier on the data that it was fitted on all the same."""
