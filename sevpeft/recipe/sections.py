"""The sections of a recipe: every setting with its type, its default and what it means, as pydantic models.

Our own settings are written out here. `lora` and `training` are built from the fields of the installed PEFT and TRL
(`library_fields`), with our defaults; of them a recipe holds what was set and what we default, and leaves the rest
to the library.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from sevpeft.recipe.library_fields import LibraryField, lora_fields, sft_fields

# (α, β, γ): the weight of a surely non-critical, neutral and critical consultation (arXiv 2604.06346).
SEVERITY_PRESETS: dict[str, tuple[float, float, float]] = {
    "mild": (0.75, 1.0, 1.25),
    "balanced": (0.5, 1.0, 1.5),
    "strong": (0.25, 1.0, 1.75),
}
PLACEHOLDERS = ("question", "answer_cue")

# Rank, alpha, dropout, bias and all of `training` down to max_grad_norm are the published ones (arXiv 2604.06346).
LORA_DEFAULTS: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "target_modules": "all-linear",
}
TRAINING_DEFAULTS: dict[str, Any] = {
    "max_length": 512,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "num_train_epochs": 3,
    "max_grad_norm": 1.0,
    "seed": 42,
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}
# Values that the libraries' types allow and that would fail, or train nothing, an hour later.
_BOUNDS: dict[str, dict[str, Any]] = {
    "r": {"ge": 1},
    "lora_alpha": {"ge": 1},
    "lora_dropout": {"ge": 0, "lt": 1},
    "max_length": {"ge": 2},
    "per_device_train_batch_size": {"ge": 1},
    "per_device_eval_batch_size": {"ge": 1},
    "gradient_accumulation_steps": {"ge": 1},
    "learning_rate": {"ge": 0},
    "weight_decay": {"ge": 0},
    "warmup_steps": {"ge": 0},
    "num_train_epochs": {"gt": 0},
    "max_grad_norm": {"ge": 0},
    "seed": {"ge": 0},
    "data_seed": {"ge": 0},
    "logging_steps": {"gt": 0},
    "eval_steps": {"gt": 0},
    "save_steps": {"gt": 0},
    "save_total_limit": {"ge": 1},
    "dataloader_num_workers": {"ge": 0},
}


class Section(BaseModel):
    """Unknown keys are errors, types are meant as written, and a section that was read does not change."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class AboutSection(Section):
    """What `sevpeft recipes` prints about a recipe; nothing of it changes the training."""

    title: str | None = None
    """One line that says what the recipe trains."""
    parameters: str | None = Field(default=None, pattern=r"^[0-9]+(\.[0-9]+)?[KMBT]$")
    """Size of the base model, as 0.49B or 135M."""
    licence: str | None = None
    """Licence of the base model, in the words of its page."""
    gated: bool = False
    """Whether the base model has to be asked for on the Hub."""
    vram_gib: float | None = Field(default=None, gt=0)
    """The smallest usual card, in GB, that the recipe fits as it stands, by `sevpeft plan`."""
    config: dict[str, Any] | None = None
    """The numbers of the base model's config.json that decide its memory, by their names there, model_type among them;
    `plan` counts from them while the model itself is not at hand."""

    @field_validator("config")
    @classmethod
    def _names_its_architecture(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        if config is not None and not (isinstance(config.get("model_type"), str) and config["model_type"]):
            raise ValueError("lacks model_type, so no model can be made of the numbers; copy it from config.json")
        return config

    def parameter_count(self) -> int | None:
        """`parameters` as a number: 0.49B is 490,000,000."""
        if self.parameters is None:
            return None
        units = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
        return round(float(self.parameters[:-1]) * units[self.parameters[-1]])


class ModelSection(Section):
    """The base model."""

    name_or_path: str = Field(default="builtin:tiny", min_length=1)
    """Hub id, folder, or builtin:tiny (a toy that is made on first use)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; a commit makes the run repeatable."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base model's weights; auto lets the device and the model decide."""
    attn_implementation: str | None = None
    """Attention kernel, such as sdpa, eager or flash_attention_2; unset, the library decides."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model. Read that code first."""


class QuantizationSection(Section):
    """How the frozen base model is compressed (bitsandbytes)."""

    load_in_4bit: bool = False
    """QLoRA: the base model in 4 bits."""
    load_in_8bit: bool = False
    """The base model in 8 bits (LLM.int8)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit number format."""
    bnb_4bit_use_double_quant: bool = True
    """Also compresses the scales, which saves about 0.4 bits a parameter."""
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type in which the 4-bit weights are multiplied; auto takes bfloat16 where the device has it."""
    bnb_4bit_quant_storage: Literal["auto", "uint8", "bfloat16", "float16", "float32"] = "auto"
    """Type that the packed 4-bit weights pose as; auto takes uint8, and the type of the other weights where FSDP or
    ZeRO-3 divides them, because these divide nothing else."""

    def quantised(self) -> bool:
        """Whether the base model is compressed at all."""
        return self.load_in_4bit or self.load_in_8bit


class DataSection(Section):
    """Where the consultations come from and how they are split."""

    path: str = Field(default="builtin:consultations", min_length=1)
    """CSV, TSV, XLSX, JSON, JSONL or Parquet file, a Hub dataset id, or builtin:consultations."""
    name: str | None = None
    """Configuration of a Hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset to read."""
    encoding: str | None = None
    """Encoding of a text file, such as windows-1256; unset, UTF-8."""
    question_column: str | None = None
    """Column of the patient's question; unset, it is guessed from the names."""
    answer_column: str | None = None
    """Column of the doctor's answer; unset, it is guessed from the names."""
    severity_column: str | None = None
    """Column of a hard severity label; unset, it is guessed from the names."""
    id_column: str | None = None
    """Column of the consultation's id; unset, it is guessed from the names."""
    dialect_column: str | None = None
    """Column of the question's dialect; unset, it is guessed from the names."""
    split_column: str | None = None
    """Column that says train, validation or test; unset, it is guessed from the names."""
    validation_size: int | float = 0.1
    """Share (between 0 and 1) or number (1 or more) of the consultations to validate on."""
    test_size: int | float = 0.1
    """Share (between 0 and 1) or number (1 or more) of the consultations kept for the test; 0 keeps none."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split."""
    max_rows: int | None = Field(default=None, ge=1)
    """Reads no more than so many rows."""

    @field_validator("validation_size", "test_size")
    @classmethod
    def _share_or_number(cls, size: int | float, info: ValidationInfo) -> int | float:
        if info.field_name == "test_size" and size == 0:
            return 0
        if (isinstance(size, int) and size >= 1) or (isinstance(size, float) and 0 < size < 1):
            return size
        none = ", or 0 for none" if info.field_name == "test_size" else ""
        raise ValueError(
            f"{size} is neither a share nor a number of rows; write 0.1 for a tenth, 500 for 500 rows{none}"
        )

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str | None) -> str | None:
        try:
            codecs.lookup(encoding or "utf-8")
        except (LookupError, ValueError):
            raise ValueError(f"no encoding is called {encoding!r}; try utf-8, utf-16 or windows-1256") from None
        return encoding


class PromptSection(Section):
    """How a question becomes the text that the model continues with the answer."""

    chat: bool = False
    """Uses the chat template of the model's own tokenizer; template and answer_cue are then not used."""
    template: str = "السؤال: {question}\n{answer_cue}"
    """Text of the prompt; {question} and {answer_cue} are filled in."""
    answer_cue: str = "الجواب:"
    """Last words before the answer."""
    system: str | None = None
    """System message."""
    dialect_prefixes: dict[str, str] | None = None
    """Text put before the prompt for each dialect, for models that were trained with such prefixes."""
    dialect: str | None = None
    """The dialect of the rows that name none; needed with dialect_prefixes."""
    strip_marks: bool = False
    """Takes vowel marks and elongation out of questions and answers and writes digits as 0 to 9, for models
    that were trained so."""

    @field_validator("template")
    @classmethod
    def _fills_in_the_question(cls, template: str) -> str:
        allowed = " and ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        found = re.findall(r"\{([^{}\n]*)\}", template)
        for name in found:
            if name not in PLACEHOLDERS:
                raise ValueError(f"holds {{{name}}}, which nothing fills in; write {allowed} only")
        if "question" not in found:
            raise ValueError("lacks {question}, so the model would never see the question; add {question}")
        return template


class SeverityWeights(Section):
    """The loss weight of a surely non-critical, a surely neutral and a surely critical consultation."""

    non_critical: float = Field(ge=0)
    neutral: float = Field(ge=0)
    critical: float = Field(ge=0)

    @model_validator(mode="after")
    def _teaches_something(self) -> SeverityWeights:
        if not (self.non_critical or self.neutral or self.critical):
            raise ValueError("all three weights are 0, so nothing would be learnt; raise one")
        return self


class SeveritySection(Section):
    """How much each consultation counts in the loss."""

    source: Literal["columns", "rules", "linear", "rules+linear", "transformer"] = "columns"
    """Where the severity comes from: columns of the data, the lexicon's rules, or a classifier that was fitted."""
    classifier: str | None = None
    """Folder that `sevpeft classifier fit` made; all but columns and rules need one, rules may have one."""
    temperature: float = Field(default=1.0, gt=0)
    """Contrast of the probabilities, p^(1/T) over its sum: below 1 sharpens, above 1 flattens, 1 changes nothing."""
    weights: Literal["mild", "balanced", "strong"] | SeverityWeights = "balanced"
    """A published preset, or three weights {non_critical, neutral, critical}."""
    normalize: Literal["none", "mean"] = "none"
    """mean divides by the mean weight of the training set, so that the step size is that of plain cross-entropy."""
    reduction: Literal["tokens", "examples"] = "tokens"
    """tokens: every answer token counts alike (TRL's mean); examples: every consultation does (the paper's)."""
    control: Literal["none", "shuffled", "constant", "uniform"] = "none"
    """Trains a control instead: the weights shuffled over the consultations, their mean for all, or 1 for all."""

    def coefficients(self) -> tuple[float, float, float]:
        """(α, β, γ) of non-critical, neutral and critical."""
        if isinstance(self.weights, str):
            return SEVERITY_PRESETS[self.weights]
        return self.weights.non_critical, self.weights.neutral, self.weights.critical


class LibrarySection(Section):
    """Settings that go to a library by their own names; one that is neither set nor defaulted by us is None."""

    @model_serializer
    def settings(self) -> dict[str, Any]:
        """What to hand to the library: what the recipe sets and what we default, in the library's order."""
        ours = TRAINING_DEFAULTS if isinstance(self, TrainingSection) else LORA_DEFAULTS
        set_here = self.model_fields_set
        return {name: getattr(self, name) for name in type(self).model_fields if name in ours or name in set_here}

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def _library_section(name: str, fields: Mapping[str, LibraryField], ours: Mapping[str, Any], about: str) -> Any:
    settings: dict[str, Any] = {
        field.name: (
            field.annotation,
            Field(ours.get(field.name), description=field.help or None, **_BOUNDS.get(field.name, {})),
        )
        for field in fields.values()
    }
    return create_model(name, __base__=LibrarySection, __doc__=about, __module__=__name__, **settings)


if TYPE_CHECKING:

    class LoraSection(LibrarySection): ...

    class TrainingSection(LibrarySection): ...

else:
    LoraSection = _library_section(
        "LoraSection", lora_fields(), LORA_DEFAULTS, "The adapter: every setting of PEFT's LoraConfig."
    )
    TrainingSection = _library_section(
        "TrainingSection", sft_fields(), TRAINING_DEFAULTS, "The training: every setting of TRL's SFTConfig."
    )


def known_initialisation(value: Any) -> bool:
    """Whether `init_lora_weights` is one that PEFT knows; its type is open because of pissa_niter_4 and the like."""
    # "lora_ga" is missing in PEFT's own list (0.21) although the documentation names it.
    listed = lora_fields()["init_lora_weights"].choices
    return not isinstance(value, str) or value in {*listed, "lora_ga"} or bool(re.fullmatch(r"pissa_niter_\d+", value))
