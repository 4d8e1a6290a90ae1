"""The sections of a recipe that are sevpeft's own: every setting with its type, its default and what it means, as
pydantic models. `lora` and `training` are the libraries' (`library_sections`)."""

from __future__ import annotations

import codecs
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

# (α, β, γ): the weight of a surely non-critical, neutral and critical consultation (arXiv 2604.06346).
SEVERITY_PRESETS: dict[str, tuple[float, float, float]] = {
    "mild": (0.75, 1.0, 1.25),
    "balanced": (0.5, 1.0, 1.5),
    "strong": (0.25, 1.0, 1.75),
}
PLACEHOLDERS = ("question", "answer_cue")


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
