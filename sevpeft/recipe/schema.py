"""The recipe sections of sevpeft; `lora` and `training`, with the libraries' settings, are in library.py."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# (α, β, γ): the weight of a consultation that is certainly non-critical, neutral and critical (arXiv 2604.06346).
SEVERITY_PRESETS: dict[str, tuple[float, float, float]] = {
    "mild": (0.75, 1.0, 1.25),
    "balanced": (0.5, 1.0, 1.5),
    "strong": (0.25, 1.0, 1.75),
    # Not published: no weight is below 1, so the other severities lose less for the same gain.
    "1-1-2": (1.0, 1.0, 2.0),
}
# The only environment variable whose value is sent to a judge.
JUDGE_KEY = "SEVPEFT_JUDGE_API_KEY"


class Section(BaseModel):
    """Base class of all sections: unknown keys are errors, values are not converted, and instances are frozen."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class AboutSection(Section):
    """Facts that `sevpeft recipes` prints about a recipe; they do not change the training."""

    title: str | None = None
    """What the recipe trains, in one line."""
    parameters: str | None = Field(default=None, pattern=r"^[0-9]+(\.[0-9]+)?[KMBT]$")
    """Size of the base model, such as 0.49B or 135M."""
    license: str | None = None
    """License of the base model, as its page names it."""
    base_model: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id of the base model where model.name_or_path is a copy of it in a folder; cards and `push` name it."""
    gated: bool = False
    """Whether access to the base model must be requested on the Hub."""
    vram_gib: float | None = Field(default=None, gt=0, le=1e5)
    """Memory of the smallest common GPU that the recipe fits, in GB, by `sevpeft plan`."""
    config: dict[str, Any] | None = None
    """Values of the base model's config.json that decide memory; `plan` uses them before the download."""

    def parameter_count(self) -> int | None:
        """`parameters` as a number: 0.49B is 490,000,000."""
        if self.parameters is None:
            return None
        return round(float(self.parameters[:-1]) * 1000 ** ("KMBT".index(self.parameters[-1]) + 1))


class ModelSection(Section):
    """The base model."""

    name_or_path: str = Field(default="builtin:tiny", min_length=1)
    """Hub id, folder, or builtin:tiny (a toy model, made on first use)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; a commit makes the run reproducible."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base model's weights; auto depends on the device and the model."""
    attn_implementation: str | None = None
    """Attention kernel, such as sdpa, eager or flash_attention_2; unset, the library decides."""
    trust_remote_code: bool = False
    """Runs Python code from the model's repository. Read that code first."""


class QuantizationSection(Section):
    """How the frozen base model is quantized (bitsandbytes)."""

    load_in_4bit: bool = False
    """QLoRA: the base model in 4 bits."""
    load_in_8bit: bool = False
    """The base model in 8 bits (LLM.int8)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit number format."""
    bnb_4bit_use_double_quant: bool = True
    """Also quantizes the scales, which saves about 0.4 bits a parameter."""
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of computations with the 4-bit weights; auto is bfloat16 if the device supports it."""
    bnb_4bit_quant_storage: Literal["auto", "uint8", "bfloat16", "float16", "float32"] = "auto"
    """Storage type of the 4-bit weights; auto is uint8, or the type of the other weights under FSDP and ZeRO-3."""

    @field_validator("load_in_8bit")
    @classmethod
    def _one_format(cls, load_in_8bit: bool, info: ValidationInfo) -> bool:
        if load_in_8bit and info.data.get("load_in_4bit"):
            raise ValueError("is true together with load_in_4bit; set one of them to false")
        return load_in_8bit

    def quantized(self) -> bool:
        """Whether the base model is quantized."""
        return self.load_in_4bit or self.load_in_8bit


class DataSection(Section):
    """The source of the consultations and their split."""

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
    """Column of the patient's question; unset, guessed from the column names."""
    answer_column: str | None = None
    """Column of the doctor's answer; unset, guessed from the column names."""
    severity_column: str | None = None
    """Column of a severity label; unset, guessed from the column names."""
    id_column: str | None = None
    """Column of the consultation's id; unset, guessed from the column names."""
    dialect_column: str | None = None
    """Column of the question's dialect; unset, guessed from the column names."""
    split_column: str | None = None
    """Column with train, validation or test; unset, guessed from the column names."""
    validation_size: int | float = 0.1
    """Share (between 0 and 1) or number (1 or more) of the consultations for validation."""
    test_size: int | float = 0.1
    """Share (between 0 and 1) or number (1 or more) of the consultations for the test; 0 for none."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the split."""
    max_rows: int | None = Field(default=None, ge=1, le=10**12)
    """Largest number of rows to read."""

    @field_validator("validation_size", "test_size")
    @classmethod
    def _share_or_number(cls, size: int | float, info: ValidationInfo) -> int | float:
        if info.field_name == "test_size" and size == 0:
            return 0
        if not (0 < size < 1 if isinstance(size, float) else size >= 1):
            raise ValueError(f"{size} is neither a share nor a number of rows; write 0.1 for a tenth, 500 for 500 rows")
        return size


class MixSection(Section):
    """Several sources of training rows; validation and test rows come from `data.path` only."""

    sources: dict[Annotated[str, Field(min_length=1)], str] = Field(min_length=1)
    """Name → path of each source after data.path, the first one; columns are recognized by their names."""
    ratios: str
    """Percentages of training tokens per source, data.path first, such as 60-40."""
    tokens: int | None = Field(default=None, ge=1, le=10**15)
    """Tokens per epoch, with prompts; unset, the tokens of the training rows of data.path."""

    @field_validator("ratios")
    @classmethod
    def _sum_to_a_hundred(cls, ratios: str, info: ValidationInfo) -> str:
        parts = ratios.split("-")
        count = len(info.data.get("sources", parts[1:])) + 1
        are_numbers = all(re.fullmatch(r"\d*\.?\d+", part) for part in parts)
        if len(parts) != count or not are_numbers or abs(sum(map(float, parts)) - 100) > 1e-6:
            raise ValueError(f"must be {count} percentages that sum to 100, data.path first, as in 60-40, not {ratios}")
        return ratios


class TrainingDataSection(DataSection):
    """The data of a recipe: source, split, and the part of it to train on."""

    loss_on: Literal["last", "all"] = "last"
    """Which answers of a conversation of several turns are trained on; earlier turns are always context."""
    mix: MixSection | None = None
    """More sources of training rows, and their shares."""
    fold: str | None = Field(default=None, pattern=r"^[1-9][0-9]{0,2}/[1-9][0-9]{0,2}$")
    """Tests on one fold and trains on the others, such as 1/2; test_size and a split column are not used."""


class PromptExample(Section):
    """A consultation before the question in the prompt (few-shot)."""

    question: str = Field(pattern=r"\S")
    answer: str = Field(pattern=r"\S")


def _check_template(template: str) -> str:
    names = re.findall(r"\{([^{}\n]*)\}", template)
    if unknown := sorted({*names} - {"question", "answer_cue"}):
        raise ValueError(f"has {{{unknown[0]}}}; use only {{question}} and {{answer_cue}}")
    if "question" not in names:
        raise ValueError("lacks {question}, so the model would never see the question; add {question}")
    return template


Template = Annotated[str, AfterValidator(_check_template), Field(json_schema_extra={"pattern": r"\{question\}"})]


class PromptSection(Section):
    """The prompt: the text before the answer."""

    chat: bool = False
    """Uses the chat template of the model's tokenizer instead of template and answer_cue."""
    template: Template = "السؤال: {question}\n{answer_cue}"
    """Text of the prompt, with the placeholders {question} and {answer_cue}."""
    answer_cue: str = "الجواب:"
    """Last words before the answer."""
    english_template: Template | None = None
    """Template for questions with mostly Latin letters; unset, `template`."""
    english_cue: str | None = None
    """answer_cue for questions with mostly Latin letters; unset, `answer_cue`."""
    system: str | None = None
    """System message."""
    dialect_prefixes: dict[str, str] | None = None
    """Dialect → text before the prompt, for models that were trained with such prefixes."""
    dialect: str | None = None
    """Dialect of rows without one; required with dialect_prefixes."""
    dialect_lexicon: Literal["builtin"] | None = None
    """Guesses the dialect of rows without one from the words of the question; if no word decides, it is `dialect`."""
    strip_marks: bool = False
    """Removes vowel marks and elongation and writes digits as 0 to 9, for models trained on such text."""
    severity: Literal["none", "predicted", "gold"] = "none"
    """Adds the severity to the prompt: predicted from the question, or from the data (gold, unknown in real use)."""
    examples: list[PromptExample] | None = None
    """Few-shot examples, a list of {question, answer}; these consultations are removed from all splits."""
    date: str = Field(default="2024-07-26", pattern=r"^[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])$")
    """Date for chat templates that print today's date; days 1 to 28 only."""

    @field_validator("dialect", "dialect_lexicon")
    @classmethod
    def _has_prefixes(cls, dialect: str | None, info: ValidationInfo) -> str | None:
        if dialect and not info.data.get("dialect_prefixes"):
            raise ValueError("has no effect without dialect_prefixes; add those, or leave it out")
        return dialect


class SeverityWeights(Section):
    """The loss weight of a consultation that is certainly non-critical, neutral or critical."""

    non_critical: float = Field(ge=0, le=1e6)
    neutral: float = Field(ge=0, le=1e6)
    critical: float = Field(ge=0, le=1e6)


class SeveritySection(Section):
    """The weight of each consultation in the loss."""

    source: Literal["columns", "rules", "linear", "rules+linear", "transformer", "weight"] = "columns"
    """Source of the severity: columns of the data, rules, or a fitted classifier; weight: ready-made weights."""
    weight_column: str = Field(default="weight", min_length=1)
    """Column of ready-made weights, for source weight; weights and temperature are not used."""
    classifier: str | None = Field(default=None, validate_default=True)
    """Folder from `sevpeft classifier fit`: not for columns and weight, optional for rules, required for the others."""
    text: Literal["question", "answer", "both"] | None = None
    """Text that a classifier or rules read; unset, as the classifier was fitted, and the question for rules."""
    temperature: float = Field(default=1.0, gt=0, le=1000)
    """Temperature T of the probabilities, p^(1/T) normalized: below 1 sharpens, above 1 flattens."""
    weights: Literal["mild", "balanced", "strong", "1-1-2"] | SeverityWeights = "balanced"
    """A preset (1-1-2 is not published), or three weights {non_critical, neutral, critical}."""
    normalize: Literal["none", "mean"] = "none"
    """mean divides by the mean weight of the training set, which keeps the step size of plain cross-entropy."""
    reduction: Literal["tokens", "examples"] = "tokens"
    """tokens: mean over answer tokens (as in TRL); examples: mean over consultations (as in the paper)."""
    control: Literal["none", "shuffled", "constant", "uniform", "oversampled"] = "none"
    """Control arm: weights shuffled over the rows, their mean for all, 1 for all, or 1 with rows drawn by weight."""

    @field_validator("weight_column", "classifier", "text", "weights")
    @classmethod
    def _belongs_to_the_source(cls, name: Any, info: ValidationInfo) -> Any:
        source = info.data.get("source")
        if info.field_name == "weights":
            if source == "weight" and name != "balanced":
                raise ValueError("has no effect with severity.source=weight; leave it out")
        elif info.field_name == "weight_column":
            if name != "weight" and source not in (None, "weight"):
                raise ValueError("has no effect without severity.source=weight; add that, or leave it out")
        elif source in ("columns", "weight") and name:
            raise ValueError(f"has no effect with severity.source={source}; set source to the classifier's kind")
        elif info.field_name == "classifier" and source in ("linear", "rules+linear", "transformer") and not name:
            raise ValueError(f"is missing for source {source}; name a folder from `sevpeft classifier fit`")
        return name

    def coefficients(self) -> tuple[float, float, float]:
        """(α, β, γ) of non-critical, neutral and critical."""
        if isinstance(self.weights, str):
            return SEVERITY_PRESETS[self.weights]
        return self.weights.non_critical, self.weights.neutral, self.weights.critical


_REPLAY = ("short_term", "long_term", "consistency")


class CurriculumSection(Section):
    """Order of the training rows: random, or in stages (three, or one per item of shares or learning_rates)."""

    kind: Literal["none", "cumulative", "disjoint", "competence", "icft"] = "none"
    """cumulative: stages add harder rows; disjoint: each has its own; icft: with replay; competence: growing share."""
    difficulty: str = Field(default="severity", min_length=1)
    """severity, length (tokens), loss (of the base model), or a numeric column, higher for harder rows."""
    order: Literal["easy_first", "hard_first", "shuffled"] = "easy_first"
    """hard_first (reversed) and shuffled (each row has the difficulty of another row) are controls."""
    epochs_per_stage: int | None = Field(default=None, ge=1, le=10**6)
    """Epochs of each stage over its rows, which takes more steps than training without stages; unset, as many steps."""
    shares: list[float] | None = Field(default=None, min_length=1)
    """Share of the steps of each stage; unset, equal ones."""
    learning_rates: list[float] | None = Field(default=None, min_length=1)
    """Learning rate of each stage; unset, training.learning_rate for all."""
    restart: bool = False
    """Starts each stage with a new optimizer and schedule, as published; false: one of each for all stages."""
    short_term: float = Field(default=0.2, ge=0, lt=0.5)
    """icft: share of a later stage's rows that replays the last rows before the stage."""
    long_term: float = Field(default=0.1, ge=0, lt=0.5)
    """icft: share that replays earlier rows with repeatedly high loss; if there are none, the last rows."""
    consistency: float = Field(default=0.1, ge=0, le=1e6)
    """icft: weight of the KL divergence between the answer tokens and those of the previous stage's adapter."""

    @field_validator("epochs_per_stage", "shares", "learning_rates", "restart", *_REPLAY)
    @classmethod
    def _fits_the_others(cls, value: Any, info: ValidationInfo) -> Any:
        name, others, kind = str(info.field_name), info.data, info.data.get("kind", "none")
        unused = kind == "competence" or (name == "epochs_per_stage" if kind == "icft" else name in _REPLAY)
        unused |= name == "shares" and others.get("epochs_per_stage") is not None
        if kind != "none" and unused and value != cls.model_fields[name].default:
            raise ValueError(f"has no effect with kind {kind}, or with epochs_per_stage; leave it out")
        if isinstance(value, list):
            stages = 3 if others.get("difficulty") == "severity" else len(others.get("shares") or value)
            is_share = name == "shares"
            if len(value) != stages or min(value) <= 0 or (is_share and abs(sum(value) - 1) > 1e-6):
                raise ValueError(f"must be {stages} numbers above 0{' that sum to 1' * is_share}, not {value}")
        return value


class AsPublishedSection(Section):
    """Differences of the published training loops (arXiv 2604.06346, 2604.06365) from sevpeft; all off by default."""

    no_end_token: bool = False
    """Trains on answers without an end token (2604.06365), so the model does not learn to stop."""
    labels: Literal["answer", "question_and_answer", "all"] = "answer"
    """Trains on the prompt too (2604.06365); all: also on the padding to max_length, the end token (2604.06346)."""
    unnormalized: bool = False
    """Sums the losses of a step's rows instead of averaging them: global_batch_size times the loss (2604.06346)."""
    evaluation_template: Template | None = None
    """Template of the prompt in evaluation only: both papers leave out the answer cue there."""


class StoppingSection(Section):
    """Stopping a training that goes wrong; the last good adapter is kept."""

    nonfinite_patience: int = Field(default=3, ge=1, le=10**9)
    """Consecutive steps with a NaN or infinite loss or gradient before the training stops; each step is skipped."""


class GenerationSection(Section):
    """Generation of answers, the same for every arm; names are those of transformers' GenerationConfig."""

    max_new_tokens: int = Field(default=128, ge=1, le=2**20)
    """Maximum answer length, in tokens; an answer that reaches it without an end token counts as truncated."""
    do_sample: bool = False
    """Samples every token by its probability instead of taking the most probable one."""
    temperature: float = Field(default=0.7, gt=0, le=1000)
    """Sampling temperature; used with do_sample."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Samples from the most probable tokens whose probabilities sum to top_p; used with do_sample."""
    top_k: int = Field(default=0, ge=0, le=2**31)
    """Samples from the top_k most probable tokens, 0 for all; used with do_sample."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=1000)
    """Above 1, makes tokens that are already in the text less probable."""
    per_device_eval_batch_size: int = Field(default=64, ge=1, le=2**16)
    """Questions answered at once; it changes speed and memory, not the answers."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Sampling seed; every question has its own random numbers, in whatever batch."""


class JudgeSection(Section):
    """The raters of answers by a rubric: a language model at an OpenAI-compatible URL, or people with a sheet.

    The endpoint's key is read only from the environment variable SEVPEFT_JUDGE_API_KEY: a recipe that could name the
    variable could send any secret of the environment to any host.
    """

    file: str | list[str] | None = None
    """Completed sheet of `sevpeft report FOLDER --review N`, or a list with one per rater; `report` reads it."""
    rubric: str | None = Field(default=None, min_length=1)
    """YAML file of a rubric; unset, the rubric of sevpeft."""
    model: str = Field(default="", validate_default=True)
    """Name of the model at the endpoint."""
    url: str = Field(default="", validate_default=True)
    """Base URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; all answers are sent there."""
    timeout: float = Field(default=60.0, gt=0, le=1e6)
    """Seconds until a request times out."""
    concurrency: int = Field(default=4, ge=1, le=256)
    """Concurrent requests."""
    max_tokens: int = Field(default=512, ge=16, le=2**24)
    """Maximum reply length, in tokens; reasoning models need several thousand."""

    @field_validator("model", "url")
    @classmethod
    def _plain_base_url(cls, url: str, info: ValidationInfo) -> str:
        if not url and not info.data.get("file") and not info.data.get("rubric"):
            raise ValueError("is missing; add it, or set evaluation.judge.file to a completed sheet")
        host = r"(\[[0-9a-fA-F:.]+\]|[^\s/@?#:\[\]]+)(:[0-9]{1,5})?"
        if info.field_name == "url" and url and not re.fullmatch(rf"https?://{host}(/[^\s?#]*)?", url):
            # The value is not repeated: it may hold a password.
            form = "must be host and path only, such as http://127.0.0.1:8000/v1"
            raise ValueError(f"{form}; put a key into the environment variable {JUDGE_KEY}")
        return url.rstrip("/") if info.field_name == "url" else url


class EvaluationSection(Section):
    """Evaluation of answers."""

    bertscore: bool = True
    """Computes BERTScore, which needs an encoder."""
    bertscore_model: str = Field(default="bert-base-multilingual-cased", min_length=1)
    """Encoder of BERTScore: Hub id or folder."""
    bertscore_layer: int = Field(default=9, ge=1, le=1000)
    """Layer of the encoder that gives the compared vectors."""
    n_resamples: int = Field(default=2000, ge=100, le=10**6)
    """Bootstrap samples per interval."""
    confidence_level: float = Field(default=0.95, gt=0, lt=1)
    """Coverage of the intervals."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the bootstrap and of the shuffled references."""
    margin: float = Field(default=0.01, ge=0, le=1000)
    """Claim of a comparison: largest NLL increase allowed for the other severities, in nats per token."""
    safety_margin: float = Field(default=0.05, ge=0, le=1)
    """Claim of a comparison: largest decrease allowed in the share of critical questions with urgent referral."""
    minimization: bool = False
    """Repeats critical questions with a line that plays them down, to measure how the urgency of answers changes."""
    judge: JudgeSection | None = None
    """Raters of the answers by a rubric; null uses no judge and sends nothing."""
