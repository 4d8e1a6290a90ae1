"""Settings of `sevpeft classifier fit` and `sevpeft classifier evaluate`, given as KEY=VALUE."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sevpeft.recipe import DataSection, Section

SPLIT_KEYS = {"validation_size", "test_size", "seed"}


class EncoderSection(Section):
    """How the encoder of kind=transformer is fine-tuned."""

    name_or_path: str = "CAMeL-Lab/bert-base-arabic-camelbert-mix"
    """Hub id or folder of the encoder."""
    lora_r: int | None = Field(default=None, ge=1)
    """Rank of LoRA adapters on all linear layers; null trains all weights."""
    num_train_epochs: float = Field(default=6, gt=0)
    """Epochs, at most."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate; null is 2e-5, or 3e-4 with LoRA."""
    per_device_train_batch_size: int = Field(default=16, ge=1)
    """Questions of a training step."""
    early_stopping_patience: int = Field(default=2, ge=1)
    """Epochs without a better validation loss before the training stops."""
    # Of real questions, fewer than one in a hundred is longer.
    max_length: int = Field(default=256, ge=1)
    """Tokens of a question; the end of a longer one is not read."""


class ClassifierSettings(Section):
    """What both verbs take."""

    data: DataSection = Field(default_factory=DataSection)
    """The labeled consultations."""
    kind: Literal["linear", "transformer", "rules", "rules+linear"] = "linear"
    """What is fitted."""
    seed: int = Field(default=0, ge=0)
    """Seed of the splits, the fit and the intervals."""
    block_column: str | None = None
    """Column of blocks (source, year) to hold out one at a time."""
    lexicon: str | None = None
    """Lexicon of the rules; null is the package's."""
    encoder: EncoderSection = Field(default_factory=EncoderSection)
    """The encoder of kind=transformer."""

    @field_validator("data")
    @classmethod
    def _reads_only(cls, data: DataSection) -> DataSection:
        if unused := sorted(SPLIT_KEYS & data.model_fields_set):
            raise ValueError(f"{', '.join(unused)}: how a recipe splits; write test_size and seed without data")
        return data

    @field_validator("lexicon", "encoder")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = {"lexicon": ("rules", "rules+linear"), "encoder": ("transformer",)}[str(info.field_name)]
        if value is not None and info.data.get("kind") not in (None, *kinds):
            raise ValueError(f"is for kind={' and kind='.join(kinds)} only; leave it out")
        return value


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
