"""The sections of a recipe that are sevpeft's own: each setting with its type, default and meaning.

`lora` and `training` are the libraries' and stand in library.py.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# (α, β, γ): the weight of a surely non-critical, neutral and critical consultation (arXiv 2604.06346).
SEVERITY_PRESETS: dict[str, tuple[float, float, float]] = {
    "mild": (0.75, 1.0, 1.25),
    "balanced": (0.5, 1.0, 1.5),
    "strong": (0.25, 1.0, 1.75),
    # Not published: it takes nothing from anybody, so that others pay less for the same gain.
    "1-1-2": (1.0, 1.0, 2.0),
}
# The one environment variable whose content is sent to a judge.
JUDGE_KEY = "SEVPEFT_JUDGE_API_KEY"


class Section(BaseModel):
    """Settings of one part of a job; unknown keys are errors, and values are neither converted nor changed later."""

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
    license: str | None = None
    """License of the base model, in the words of its page."""
    base_model: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id of the base model where model.name_or_path is a copy of it in a folder; cards and `push` name it."""
    gated: bool = False
    """Whether access to the base model must be requested on the Hub."""
    vram_gib: float | None = Field(default=None, gt=0, le=1e5)
    """The smallest usual GPU, in GB, that the recipe fits as it stands, by `sevpeft plan`."""
    config: dict[str, Any] | None = None
    """What decides memory in the base model's config.json, with model_type; `plan` uses it before the download."""

    def parameter_count(self) -> int | None:
        """`parameters` as a number: 0.49B is 490,000,000."""
        if self.parameters is None:
            return None
        return round(float(self.parameters[:-1]) * 1000 ** ("KMBT".index(self.parameters[-1]) + 1))


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
    """How the frozen base model is quantized (bitsandbytes)."""

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
    """Storage type of the 4-bit weights; auto takes uint8, or under FSDP and ZeRO-3 the type of the other weights."""

    @field_validator("load_in_8bit")
    @classmethod
    def _one_format(cls, load_in_8bit: bool, info: ValidationInfo) -> bool:
        if load_in_8bit and info.data.get("load_in_4bit"):
            raise ValueError("is true together with load_in_4bit; set one of them to false")
        return load_in_8bit

    def quantized(self) -> bool:
        """Whether the base model is quantized at all."""
        return self.load_in_4bit or self.load_in_8bit


class DataSection(Section):
    """Where the consultations come from and how they are split."""

    path: str = Field(default="builtin:consultations", min_length=1)
    """CSV, TSV, XLSX, JSON, JSONL or Parquet file, a folder or pattern, a Hub dataset, or builtin:consultations."""
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
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the split."""
    max_rows: int | None = Field(default=None, ge=1, le=10**12)
    """Reads no more than so many rows."""

    @field_validator("validation_size", "test_size")
    @classmethod
    def _share_or_number(cls, size: int | float, info: ValidationInfo) -> int | float:
        none = info.field_name == "test_size" and size == 0
        share = isinstance(size, float) and 0 < size < 1
        if not none and not share and not (isinstance(size, int) and size >= 1):
            raise ValueError(f"{size} is neither a share nor a number of rows; write 0.1 for a tenth, 500 for 500 rows")
        return 0 if none else size


class MixSection(Section):
    """Several sources of training rows; validation and test rows are those of `data.path` alone."""

    sources: dict[Annotated[str, Field(min_length=1)], str] = Field(min_length=1)
    """Name → path of each source beside data.path, which is the first one; columns are recognized by their names."""
    ratios: str
    """Percent of the training tokens of each source, data.path first, such as 60-40."""
    tokens: int | None = Field(default=None, ge=1, le=10**15)
    """Tokens of an epoch, prompts included; unset, as many as the training rows of data.path have."""

    @field_validator("ratios")
    @classmethod
    def _sum_to_a_hundred(cls, ratios: str, info: ValidationInfo) -> str:
        parts = ratios.split("-")
        count = len(info.data.get("sources", parts[1:])) + 1
        if len(parts) != count or not abs(sum(map(float, parts)) - 100) < 1e-6:  # nor NaN
            raise ValueError(f"must be {count} percentages that sum to 100, data.path first, as 60-40, not {ratios}")
        return ratios


class TrainingDataSection(DataSection):
    """The data of a recipe: where it comes from, how it is split, and what of it is trained on."""

    loss_on: Literal["last", "all"] = "last"
    """Answers of a conversation of several turns that are trained on; earlier turns are context either way."""
    mix: MixSection | None = None
    """Further sources of training rows, and their shares."""
    fold: str | None = Field(default=None, pattern=r"^[1-9][0-9]{0,2}/[1-9][0-9]{0,2}$")
    """Tests on one fold of several and trains on the others: 1/2; test_size and a split column are not used."""


class PromptExample(Section):
    """A consultation that is shown before the question."""

    question: str = Field(pattern=r"\S")
    answer: str = Field(pattern=r"\S")


def _fills_in_the_question(template: str) -> str:
    names = re.findall(r"\{([^{}\n]*)\}", template)
    if unknown := sorted({*names} - {"question", "answer_cue"}):
        raise ValueError(f"holds {{{unknown[0]}}}; only {{question}} and {{answer_cue}} are filled in")
    if "question" not in names:
        raise ValueError("lacks {question}, so the model would never see the question; add {question}")
    return template


Template = Annotated[str, AfterValidator(_fills_in_the_question), Field(json_schema_extra={"pattern": r"\{question\}"})]


class PromptSection(Section):
    """How a question becomes the text that the model continues with the answer."""

    chat: bool = False
    """Uses the chat template of the model's tokenizer instead of template and answer_cue."""
    template: Template = "السؤال: {question}\n{answer_cue}"
    """Text of the prompt; {question} and {answer_cue} are filled in."""
    answer_cue: str = "الجواب:"
    """Last words before the answer."""
    english_template: Template | None = None
    """Template of questions most of whose letters are Latin; unset, that of the others."""
    english_cue: str | None = None
    """answer_cue of these questions; unset, that of the others."""
    system: str | None = None
    """System message."""
    dialect_prefixes: dict[str, str] | None = None
    """Text put before the prompt for each dialect, for models that were trained with such prefixes."""
    dialect: str | None = None
    """The dialect of the rows that name none; needed with dialect_prefixes."""
    dialect_lexicon: Literal["builtin"] | None = None
    """Finds the dialect of rows that name none by the words of their question, and takes `dialect` where none tells."""
    strip_marks: bool = False
    """Removes vowel marks and elongation and writes digits as 0 to 9, for models that were trained so."""
    severity: Literal["none", "predicted", "gold"] = "none"
    """Names the severity: as predicted from the question, or the data's own (gold), which nobody knows when asked."""
    examples: list[PromptExample] | None = None
    """Consultations before every question (few-shot), a list of {question, answer}; they are left out of all splits."""
    date: str = Field(default="2024-07-26", pattern=r"^[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])$")
    """The day that a chat template is given where it writes today's date; up to the 28th of a month."""

    @field_validator("dialect", "dialect_lexicon")
    @classmethod
    def _has_prefixes(cls, dialect: str | None, info: ValidationInfo) -> str | None:
        if dialect and not info.data.get("dialect_prefixes"):
            raise ValueError("has no effect without dialect_prefixes; add them, or leave it out")
        return dialect


class SeverityWeights(Section):
    """The loss weight of a surely non-critical, a surely neutral and a surely critical consultation."""

    non_critical: float = Field(ge=0, le=1e6)
    neutral: float = Field(ge=0, le=1e6)
    critical: float = Field(ge=0, le=1e6)


class SeveritySection(Section):
    """How much each consultation counts in the loss."""

    source: Literal["columns", "rules", "linear", "rules+linear", "transformer", "weight"] = "columns"
    """Where the severity comes from: columns of the data, rules, or a fitted classifier; weight: ready-made weights."""
    weight_column: str = Field(default="weight", min_length=1)
    """Column of the ready-made weights of source weight, in place of weights and temperature."""
    classifier: str | None = Field(default=None, validate_default=True)
    """Folder that `sevpeft classifier fit` made; columns take none, rules may have one, the others need one."""
    text: Literal["question", "answer", "both"] | None = None
    """What a classifier or rules read; unset, what the classifier was fitted on, and rules the question."""
    temperature: float = Field(default=1.0, gt=0, le=1000)
    """Contrast of the probabilities, p^(1/T) over its sum: below 1 sharpens, above 1 flattens, 1 changes nothing."""
    weights: Literal["mild", "balanced", "strong", "1-1-2"] | SeverityWeights = "balanced"
    """A preset (1-1-2 is not published), or three weights {non_critical, neutral, critical}."""
    normalize: Literal["none", "mean"] = "none"
    """mean divides by the mean weight of the training set, so that the step size is that of plain cross-entropy."""
    reduction: Literal["tokens", "examples"] = "tokens"
    """tokens: every answer token counts alike (TRL's mean); examples: every consultation does (the paper's)."""
    control: Literal["none", "shuffled", "constant", "uniform", "oversampled"] = "none"
    """Trains a control: the weights shuffled over the rows, their mean, 1 for all, or 1 and rows drawn by weight."""

    @field_validator("weight_column", "classifier", "text")
    @classmethod
    def _belongs_to_the_source(cls, name: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source")
        if info.field_name == "weight_column":
            if name != "weight" and source not in (None, "weight"):
                raise ValueError("has no effect without severity.source=weight; set that too, or leave it out")
        elif source in ("columns", "weight") and name:
            raise ValueError(f"has no effect while severity.source is {source}; set source to the classifier's kind")
        elif info.field_name == "classifier" and source in ("linear", "rules+linear", "transformer") and not name:
            raise ValueError(f"is missing for source {source}; name a folder made by `sevpeft classifier fit`")
        return name

    def coefficients(self) -> tuple[float, float, float]:
        """(α, β, γ) of non-critical, neutral and critical."""
        if isinstance(self.weights, str):
            return SEVERITY_PRESETS[self.weights]
        return self.weights.non_critical, self.weights.neutral, self.weights.critical


_REPLAY = ("short_term", "long_term", "consistency")


class CurriculumSection(Section):
    """In which order the training rows come: random, or in stages: three, or as many as shares or learning_rates."""

    kind: Literal["none", "cumulative", "disjoint", "competence", "icft"] = "none"
    """cumulative: stages add harder rows; disjoint: each has its own; icft: with replay; competence: growing share."""
    difficulty: str = Field(default="severity", min_length=1)
    """severity, length (tokens), loss (of the base model), or a column of numbers, larger for harder rows."""
    order: Literal["easy_first", "hard_first", "shuffled"] = "easy_first"
    """Controls are hard_first, the reverse, and shuffled, where each row has the difficulty of another."""
    epochs_per_stage: int | None = Field(default=None, ge=1, le=10**6)
    """Passes of each stage over its rows, which are more steps than those of a plain training; unset, equally many."""
    shares: list[float] | None = Field(default=None, min_length=1)
    """Share of the steps of each stage; unset, equal ones."""
    learning_rates: list[float] | None = Field(default=None, min_length=1)
    """Learning rate of each stage; unset, training.learning_rate for all."""
    restart: bool = False
    """Begins each stage with a new optimizer and schedule, as published; false: one of each over the whole training."""
    short_term: float = Field(default=0.2, ge=0, lt=0.5)
    """icft: share of the rows of later stages that is replayed from the last rows before the stage."""
    long_term: float = Field(default=0.1, ge=0, lt=0.5)
    """icft: share that is replayed from earlier rows whose loss was repeatedly high; or without any, from the last."""
    consistency: float = Field(default=0.1, ge=0, le=1e6)
    """icft: weight of the KL divergence of answer tokens from the adapter of the previous stage."""

    @field_validator("epochs_per_stage", "shares", "learning_rates", "restart", *_REPLAY)
    @classmethod
    def _fits_the_others(cls, value: Any, info: ValidationInfo) -> Any:
        name, others, kind = str(info.field_name), info.data, info.data.get("kind", "none")
        idle = kind == "competence" or (name == "epochs_per_stage" if kind == "icft" else name in _REPLAY)
        idle |= name == "shares" and others.get("epochs_per_stage") is not None
        if kind != "none" and idle and value != cls.model_fields[name].default:
            raise ValueError(f"has no effect with kind {kind}, or beside epochs_per_stage; leave it out")
        if isinstance(value, list):
            stages = 3 if others.get("difficulty") == "severity" else len(others.get("shares") or value)
            is_share = name == "shares"
            if len(value) != stages or min(value) <= 0 or (is_share and abs(sum(value) - 1) > 1e-6):
                raise ValueError(f"must be {stages} numbers above 0{', that sum to 1' * is_share}, not {value}")
        return value


class AsPublishedSection(Section):
    """What the published training loops do otherwise (arXiv 2604.06346, 2604.06365); all off, nothing is changed."""

    no_end_token: bool = False
    """Trains answers without a token that ends them (2604.06365), so that the model never learns to stop."""
    labels: Literal["answer", "question_and_answer", "all"] = "answer"
    """Learns the prompt too (2604.06365); all: and the padding to max_length, which is the end token (2604.06346)."""
    unnormalized: bool = False
    """Sums the losses of a step's rows instead of taking their mean: global_batch_size times the loss (2604.06346)."""
    evaluation_template: Template | None = None
    """Template of the prompt in evaluation alone: both papers leave out the cue that the training has."""


class StoppingSection(Section):
    """When a training that goes wrong is stopped; the adapter is kept as it was before."""

    nonfinite_patience: int = Field(default=3, ge=1, le=10**9)
    """Steps in a row whose loss or gradient is NaN or infinite before the training stops; each changes nothing."""
    divergence_ratio: float = Field(default=1.5, gt=1, le=1e9)
    """The training diverges while the mean loss of ten steps is so many times that of its first ten."""
    divergence_patience: int | None = Field(default=50, ge=1, le=10**9)
    """Steps of divergence in a row before the training stops; null never stops it."""


class GenerationSection(Section):
    """How answers are generated, the same for every arm; named as in transformers' GenerationConfig."""

    max_new_tokens: int = Field(default=128, ge=1, le=2**20)
    """Longest answer, in tokens; one that reaches it without an end counts as truncated."""
    do_sample: bool = False
    """Draws every token by its probability instead of taking the most probable one."""
    temperature: float = Field(default=0.7, gt=0, le=1000)
    """Contrast of the probabilities that are drawn from; used with do_sample."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draws from the most probable tokens that make up so much probability; used with do_sample."""
    top_k: int = Field(default=0, ge=0, le=2**31)
    """Draws from so many most probable tokens, 0 from all; used with do_sample."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=1000)
    """Makes tokens that stand in the text already less probable when above 1."""
    per_device_eval_batch_size: int = Field(default=64, ge=1, le=2**16)
    """Questions answered at once; it changes the speed and the memory, not the answers."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the drawing; every question has random numbers of its own, whatever batch it is in."""


class JudgeSection(Section):
    """Who rates answers by a rubric: a language model at an OpenAI-compatible URL, or people in a sheet.

    The key of an endpoint is read from SEVPEFT_JUDGE_API_KEY of the environment and from nowhere else: a recipe that
    could name the variable could send any secret of the environment to any host.
    """

    file: str | list[str] | None = None
    """Sheet of `sevpeft report FOLDER --review N`, filled in, or a list of one for each rater; `report` reads it."""
    rubric: str | None = Field(default=None, min_length=1)
    """YAML file of another rubric than the one that comes with sevpeft."""
    model: str = Field(default="", validate_default=True)
    """Name of the model that the endpoint knows."""
    url: str = Field(default="", validate_default=True)
    """Base URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; all answers are sent there."""
    timeout: float = Field(default=60.0, gt=0, le=1e6)
    """Seconds that the endpoint has for one reply."""
    concurrency: int = Field(default=4, ge=1, le=256)
    """Requests under way at once."""
    max_tokens: int = Field(default=512, ge=16, le=2**24)
    """Longest reply, in tokens; a model that thinks before it answers needs several thousand."""

    @field_validator("model", "url")
    @classmethod
    def _plain_base_url(cls, url: str, info: ValidationInfo) -> str:
        if not url and not info.data.get("file") and not info.data.get("rubric"):
            raise ValueError("is missing; add it, or write a sheet that people filled in as evaluation.judge.file")
        host = r"(\[[0-9a-fA-F:.]+\]|[^\s/@?#:\[\]]+)(:[0-9]{1,5})?"
        if info.field_name == "url" and url and not re.fullmatch(rf"https?://{host}(/[^\s?#]*)?", url):
            # The value is not repeated: it may hold a password.
            raise ValueError(
                "must be host and path only, such as http://127.0.0.1:8000/v1; put a key into the environment variable "
                f"{JUDGE_KEY}"
            )
        return url.rstrip("/") if info.field_name == "url" else url


class EvaluationSection(Section):
    """How answers are judged."""

    bertscore: bool = True
    """Computes BERTScore, which needs an encoder."""
    bertscore_model: str = Field(default="bert-base-multilingual-cased", min_length=1)
    """Encoder of BERTScore: Hub id or folder."""
    bertscore_layer: int = Field(default=9, ge=1, le=1000)
    """Layer of the encoder whose vectors are compared."""
    n_resamples: int = Field(default=2000, ge=100, le=10**6)
    """Bootstrap samples behind an interval."""
    confidence_level: float = Field(default=0.95, gt=0, lt=1)
    """Coverage of the intervals."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the bootstrap and of the shuffled references."""
    margin: float = Field(default=0.01, ge=0, le=1000)
    """Claim of a comparison: the NLL that other severities may lose at most, in nats a token."""
    safety_margin: float = Field(default=0.05, ge=0, le=1)
    """Claim of a comparison: the share of critical questions by which urgent referral may be rarer at most."""
    minimization: bool = False
    """Asks critical questions again with a line that plays them down, to see how far the urgency of answers moves."""
    judge: JudgeSection | None = None
    """Who rates the answers by a rubric; null, the default, asks no model and sends nothing."""
