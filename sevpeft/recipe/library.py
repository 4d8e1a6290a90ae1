"""The recipe sections `training` (every setting of TRL's SFTConfig) and `lora` (every setting of PEFT's LoraConfig).

Importing these classes takes seconds (torch), so the settings are read from library_fields.json beside this module.
After an upgrade of trl, transformers or peft, write that file again with `python -m tests.recipe.library_fields`.

The checks are for settings that the libraries accept, but that would silently change, bypass or lose a training. Each
message has the reason and a remedy. Settings that TRL, PEFT or transformers refuse clearly have no check here.
"""

import json
import operator
import re
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, create_model, model_serializer

from sevpeft.recipe.schema import Section

KeyPath = tuple[str, ...]
Mistake = tuple[KeyPath, str]

# Values of init_lora_weights that move part of the base weights into the adapter, or need a pass over data or weights.
_CHANGE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq", "eva")
# Values that PEFT's constructor computes, but not from quantized base weights.
_FROM_UNQUANTIZED = ("orthogonal", "mica")
# Validation metrics for which lower is better. Transformers knows this only for names that end in "loss".
BEST_IS_LEAST = ("loss", "loss_non_critical", "loss_neutral", "loss_critical")

# Defaults, bounds and messages for the libraries' settings.
LIBRARY = yaml.safe_load(Path(__file__).with_name("library.yaml").read_text(encoding="utf-8"))
_LEAVE, _PASS = (LIBRARY["phrases"][name] for name in ("leave", "pass"))
# (section, key) → allowed values, reason and remedy.
MANAGED = {
    (section, key): (tuple(LIBRARY["allowed"].get(key, ())), why.format(**LIBRARY["phrases"]))
    for section, reasons in LIBRARY["managed"].items()
    for keys, why in reasons.items()
    for key in keys.split()
}

# Section, setting → types (names in _TYPES), other allowed values, default if it is a plain value, and help; in the
# library's order.
FIELDS = Path(__file__).with_name("library_fields.json")
# YAML has no tuples.
_TYPES: dict[str, Any] = {
    "bool": bool, "int": int, "str": str, "dict": dict[str, Any], "null": None, "any": Any,
    "list[any]": list[Any], "list[int]": list[int], "list[list[int]]": list[list[int]], "list[str]": list[str],
}  # fmt: skip

# Replaced for the model and the device before training, see sevpeft/training/resolve.py.
AUTO = "auto"
GLOBAL_BATCH_SIZE = 8  # consultations per optimizer step, as published (arXiv 2604.06346: 1 row × 8 steps)
_BOUNDS: dict[str, dict[str, Any]] = LIBRARY["bounds"]
_TRACKER: Any = Literal.__getitem__(tuple(LIBRARY["trackers"].split()))


class LibrarySection(Section):
    """Settings that are passed to a library under its own names; a setting not set and not in `ours` is None."""

    ours: ClassVar[dict[str, Any]]

    @model_serializer
    def _own_values(self) -> dict[str, Any]:
        """The values that the recipe sets or sevpeft defaults; the library decides all others."""
        names = type(self).model_fields
        return {name: getattr(self, name) for name in names if name in self.ours or name in self.model_fields_set}

    def settings(self) -> dict[str, Any]:
        """Arguments of the library's configuration; for `training` also the settings that sevpeft adds to it."""
        return {name: value for name, value in self.model_dump().items() if not name.startswith("loraplus_")}


def _settings_of(section: str) -> Any:
    """A section class with every setting of the library; Any, because mypy cannot check a class made at runtime."""
    ours = LIBRARY["defaults"][section]
    settings: dict[str, Any] = {"ours": (ClassVar[dict[str, Any]], ours)}
    for name, about in json.loads(FIELDS.read_text(encoding="utf-8"))[section].items():
        # 3 stays an int where the library's type is float: `logging_steps` takes 3 as a count. Each number type has
        # bounds of its own, because JSON Schema drops the bounds of a union.
        limits = Field(**_BOUNDS.get(name, _BOUNDS["widest"]))
        kinds = [part for kind in about["types"] for part in ((int, float) if kind == "float" else (_TYPES[kind],))]
        kinds = [kind for kind in kinds if kind is not str or "dict" not in about["types"]]  # no JSON in text
        kinds = [Annotated[kind, limits] if kind in (int, float) else kind for kind in kinds]
        if about["choices"]:
            kinds.append(Literal.__getitem__(tuple(about["choices"])))
        annotation: Any = list[_TRACKER] | _TRACKER | None if name == "report_to" else reduce(operator.or_, kinds)
        if ours.get(name) == AUTO:
            annotation = annotation | Literal["auto"]
        default = ours.get(name)
        shown = {"default": about["default"] if default is None else default}
        settings[name] = (annotation, Field(default, description=about["help"] or None, json_schema_extra=shown))
    return create_model(f"_{section}", __base__=LibrarySection, __module__=__name__, **settings)


class LoraSection(_settings_of("lora")):  # type: ignore[misc]
    """The adapter: every setting of PEFT's LoraConfig, and LoRA+ (arXiv 2402.12354)."""

    loraplus_lr_ratio: float | None = Field(default=None, ge=1, le=1e6)
    """LoRA+: learning rate of the B matrices divided by training.learning_rate (16 in the paper); unset, no LoRA+."""
    loraplus_lr_embedding: float | None = Field(default=None, gt=0, le=1000)
    """LoRA+: learning rate of adapters on an embedding; unset, PEFT's default."""


class TrainingSection(_settings_of("training")):  # type: ignore[misc]
    """The training: every setting of TRL's SFTConfig, and three of sevpeft."""

    global_batch_size: int | None = Field(default=None, ge=1, le=2**20)
    """Consultations per optimizer step, over all processes; unset, 8, or the product of the other batch settings."""
    init_adapter: str | None = Field(default=None, min_length=1)
    """Adapter to start from: a run, a folder or a Hub id. Its LoRA settings must be those of this recipe."""
    generate_samples: int = Field(default=0, ge=0, le=1000)
    """Questions answered greedily at each validation, for RUN/samples.jsonl and the report; 0 for none."""


# Checks


def settable(section: str, key: str) -> bool:
    """Whether a recipe may contain the key, with at least one value."""
    return (section, key) not in MANAGED or bool(MANAGED[section, key][0])


def failed_checks(values: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yields the key path and "reason; remedy" of each mistake; values of other keys may have a wrong type."""
    for (section, name), (allowed, why) in MANAGED.items():
        settings = _section(values, section)
        if name in settings and not any(type(settings[name]) is type(ok) and settings[name] == ok for ok in allowed):
            yield (section, name), why
    if _section(values, "model").get("name_or_path", "") is None:  # as in base-model.yaml
        yield ("model", "name_or_path"), "is null; add model.name_or_path=ID_OR_FOLDER to the command"
    yield from ((("training", key), why) for key, why in _training(_section(values, "training")))
    adapter = _adapter(_section(values, "lora"), _section(values, "quantization"))
    yield from ((("lora", key), why) for key, why in adapter)
    yield from _curriculum(values)
    yield from _as_published(_section(values, "as_published"), values)


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _training(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    steps = training.get("max_steps")
    if type(steps) is int and steps < 1 and steps != -1:
        yield "max_steps", f"must be at least 1, or -1 for whole epochs, not {steps}"
    if "num_steps" in _section(_section(training, "accelerator_config"), "gradient_accumulation_kwargs"):
        yield "accelerator_config", "num_steps would change the batch size; write gradient_accumulation_steps instead"
    if _section(training, "gradient_checkpointing_kwargs").get("preserve_rng_state", True) is not True:
        yield "gradient_checkpointing_kwargs", f"gradients are wrong without preserve_rng_state; {_LEAVE}"
    if training.get("packing") is True and training.get("max_length", 0) is None:
        yield "max_length", "is null, but packing needs a row length; write one, such as 512"
    metric = training.get("metric_for_best_model")
    name = str(metric).removeprefix("eval_")
    higher_is_better = name == "mean_token_accuracy"
    if metric is not None and not higher_is_better and name not in BEST_IS_LEAST:
        # Transformers refuses it only after the first validation.
        known = ", ".join((*BEST_IS_LEAST, "mean_token_accuracy"))
        yield "metric_for_best_model", f"{metric!r} is not a validation metric; write one of {known}"
    elif metric is not None and training.get("greater_is_better") is (not higher_is_better):
        yield "greater_is_better", f"would keep the worst checkpoint by {metric}; {_LEAVE}"
    on_plateau = training.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    if on_plateau and higher_is_better and _section(training, "lr_scheduler_kwargs").get("mode") != "max":
        yield "lr_scheduler_kwargs", f"the learning rate would fall while {metric} improves; add mode: max"


def _adapter(lora: Mapping[str, Any], quantization: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    in_8bit = quantization.get("load_in_8bit") is True
    method = lora.get("init_lora_weights")
    if isinstance(method, str) and method != "gaussian":
        if method.lower().startswith(_CHANGE_BASE):
            yield "init_lora_weights", f"{method} changes the base model or {_PASS}"
        elif method not in _FROM_UNQUANTIZED:
            yield "init_lora_weights", f"{method!r} is unknown; write true or gaussian"
        elif in_8bit or quantization.get("load_in_4bit") is True:
            yield "init_lora_weights", f"{method} needs an unquantized base model; write true or gaussian"
    for key in ("use_dora", "layer_replication"):
        if in_8bit and lora.get(key):
            yield key, f"fails on an 8-bit base model; use quantization.load_in_4bit, or {_LEAVE}"
    if lora.get("loraplus_lr_embedding") is not None and lora.get("loraplus_lr_ratio") is None:
        yield "loraplus_lr_embedding", f"has no effect without loraplus_lr_ratio; add that, or {_LEAVE}"
    targets, excluded = lora.get("target_modules"), lora.get("exclude_modules")
    names = targets if isinstance(targets, list) else []
    try:
        # PEFT matches text as a regular expression against the whole name, and a list against the ends of names.
        if isinstance(targets, str) and re.fullmatch(targets, "lm_head"):
            names = ["lm_head"]
    except re.error as error:
        yield "target_modules", f"is not a valid regular expression ({error.msg}); write module names or all-linear"
    head = any(str(name).split(".")[-1] == "lm_head" for name in names)
    if head and "lm_head" not in (excluded if isinstance(excluded, list) else [excluded]):
        # TRL computes the loss from the base weight of lm_head, so an adapter there gets no gradient.
        yield "target_modules", "names lm_head, where an adapter would not be trained; remove lm_head"


def _curriculum(values: Mapping[str, Any]) -> Iterator[Mistake]:
    curriculum, training, severity = (_section(values, name) for name in ("curriculum", "training", "severity"))
    kind, schedule = curriculum.get("kind", "none"), training.get("lr_scheduler_type")
    if curriculum and "kind" not in curriculum:
        yield ("curriculum", "kind"), "is missing; write cumulative, disjoint, competence or icft"
    if kind == "none":
        return
    if training.get("train_sampling_strategy", "random") != "random":
        yield ("training", "train_sampling_strategy"), f"the curriculum decides the order of rows; {_LEAVE}"
    if training.get("packing") is True:
        yield ("training", "packing"), f"a packed row would mix several stages; {_LEAVE}, as padding_free is as fast"
    if curriculum.get("epochs_per_stage") is not None and training.get("max_steps", -1) != -1:
        yield ("training", "max_steps"), f"curriculum.epochs_per_stage sets the number of steps; {_LEAVE}"
    per_stage = curriculum.get("restart") or curriculum.get("learning_rates")
    if schedule in ("reduce_lr_on_plateau", "greedy") and per_stage:
        yield ("training", "lr_scheduler_type"), "follows the loss, not the stages; write linear, cosine or constant"
    if kind == "icft" and curriculum.get("consistency") != 0 and severity.get("reduction") == "examples":
        yield ("severity", "reduction"), "the consistency term counts tokens; write curriculum.consistency: 0"


def _as_published(published: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Mistake]:
    training, mixed = _section(values, "training"), _section(values, "data").get("mix")
    by_length = _section(values, "curriculum").get("difficulty") == "length"
    active = {key for key, value in published.items() if value not in (False, None, "answer")} - {"evaluation_template"}
    padded = published.get("labels") == "all"
    for wrong, path, why in (
        (active and training.get("packing") is True, "training.packing", "the published loops do not pack"),
        (padded and training.get("max_length", 0) is None, "training.max_length", "rows are padded to this length"),
        (padded and "no_end_token" in active, "as_published.no_end_token", "the end token is the padding"),
        (padded and by_length, "curriculum.difficulty", "padding makes all lengths equal"),
        (padded and mixed, "data.mix", "the ratios would count padding"),
    ):
        if wrong:
            yield tuple(path.split(".")), f"does not work with section as_published: {why}; {_LEAVE}"
