"""Settings that the libraries' types allow, but that would silently change, bypass or lose a training.

Each has its reason and what to write instead. What TRL, PEFT or transformers refuse clearly themselves is left to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str, ...]
Mistake = tuple[KeyPath, str]

# Starts of an adapter that move a part of the base weights into it, or that need a pass over data or weights.
CHANGING_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq", "eva")
# Starts that PEFT's constructor computes, but not with quantized base weights.
_FROM_WHOLE_WEIGHTS = ("orthogonal", "mica")
# Figures of a validation. Transformers takes the least as best for names in -loss only, so loss_critical needs help.
BEST_IS_LEAST = ("loss", "loss_non_critical", "loss_neutral", "loss_critical")

# What sevpeft says of the libraries' settings.
LIBRARY = yaml.safe_load(Path(__file__).with_name("library.yaml").read_text(encoding="utf-8"))
_LEAVE, _PASS = (LIBRARY["phrases"][name] for name in ("leave", "pass"))
# (section, key) → allowed values, reason and remedy.
MANAGED = {
    (section, key): (tuple(LIBRARY["allowed"].get(key, ())), why.format(**LIBRARY["phrases"]))
    for section, reasons in LIBRARY["managed"].items()
    for keys, why in reasons.items()
    for key in keys.split()
}


def settable(section: str, key: str) -> bool:
    """Whether a recipe may hold the key at all, with whatever value."""
    return (section, key) not in MANAGED or bool(MANAGED[section, key][0])


def failed_checks(values: Mapping[str, Any]) -> Iterator[Mistake]:
    """What is wrong with the plain values of a recipe: the key's path, and "reason; remedy".

    It reads plain values, so that it reports also where other values have the wrong type.
    """
    for (section, name), (allowed, why) in MANAGED.items():
        given = _section(values, section)
        if name in given and not any(type(given[name]) is type(right) and given[name] == right for right in allowed):
            yield (section, name), why
    if _section(values, "model").get("name_or_path", "") is None:  # as in base-model.yaml
        yield ("model", "name_or_path"), "names no model; add model.name_or_path=ID_OR_FOLDER to the command"
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
        yield "accelerator_config", "num_steps changes the batch; write gradient_accumulation_steps instead"
    if _section(training, "gradient_checkpointing_kwargs").get("preserve_rng_state", True) is not True:
        yield "gradient_checkpointing_kwargs", f"without preserve_rng_state gradients are wrong; {_LEAVE}"
    if training.get("packing") is True and training.get("max_length", 0) is None:
        yield "max_length", "is null, and packing fills rows up to a length; write one, such as 512"
    metric = training.get("metric_for_best_model")
    name = str(metric).removeprefix("eval_")
    most = name == "mean_token_accuracy"
    if metric is not None and not most and name not in BEST_IS_LEAST:
        # Transformers notices after the first validation.
        known = ", ".join((*BEST_IS_LEAST, "mean_token_accuracy"))
        yield "metric_for_best_model", f"{metric!r} is no figure of the validation; write one of {known}"
    elif metric is not None and training.get("greater_is_better") is (not most):
        yield "greater_is_better", f"would keep the worst checkpoint by {metric}; {_LEAVE}"
    waits = training.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    if waits and most and _section(training, "lr_scheduler_kwargs").get("mode") != "max":
        yield "lr_scheduler_kwargs", f"the learning rate would fall while {metric} rises; write mode: max there"


def _adapter(lora: Mapping[str, Any], quantization: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    eight = quantization.get("load_in_8bit") is True
    start = lora.get("init_lora_weights")
    if isinstance(start, str) and start != "gaussian":
        if start.lower().startswith(CHANGING_THE_BASE):
            yield "init_lora_weights", f"{start} changes the base model or {_PASS}"
        elif start not in _FROM_WHOLE_WEIGHTS:
            yield "init_lora_weights", f"{start!r} is unknown; write true or gaussian"
        elif eight or quantization.get("load_in_4bit") is True:
            yield "init_lora_weights", f"{start} needs an unquantized base model; write true or gaussian"
    for key in ("use_dora", "layer_replication"):
        if eight and lora.get(key):
            yield key, f"fails on an 8-bit base model; use quantization.load_in_4bit, or {_LEAVE}"
    if lora.get("loraplus_lr_embedding") is not None and lora.get("loraplus_lr_ratio") is None:
        yield "loraplus_lr_embedding", f"has no effect without loraplus_lr_ratio; write that too, or {_LEAVE}"
    targets, excluded = lora.get("target_modules"), lora.get("exclude_modules")
    names = targets if isinstance(targets, list) else []
    try:
        # PEFT matches a text as a regular expression with the whole name, a list with the ends of names.
        if isinstance(targets, str) and re.fullmatch(targets, "lm_head"):
            names = ["lm_head"]
    except re.error as error:
        yield "target_modules", f"is no regular expression ({error.msg}); write module names or all-linear"
    head = any(str(name).split(".")[-1] == "lm_head" for name in names)
    if head and "lm_head" not in (excluded if isinstance(excluded, list) else [excluded]):
        # TRL computes the loss from that weight directly, past the adapter.
        yield "target_modules", "names lm_head, where an adapter would not be trained; take lm_head out"


def _curriculum(values: Mapping[str, Any]) -> Iterator[Mistake]:
    curriculum, training, severity = (_section(values, name) for name in ("curriculum", "training", "severity"))
    kind, schedule = curriculum.get("kind", "none"), training.get("lr_scheduler_type")
    if curriculum and "kind" not in curriculum:
        yield ("curriculum", "kind"), "is missing; write cumulative, disjoint, competence or icft"
    if kind == "none":
        return
    if training.get("train_sampling_strategy", "random") != "random":
        yield ("training", "train_sampling_strategy"), f"the curriculum orders the rows; {_LEAVE}"
    if training.get("packing") is True:
        yield ("training", "packing"), f"a block would mix rows of several stages; {_LEAVE}: padding_free is as fast"
    if curriculum.get("epochs_per_stage") is not None and training.get("max_steps", -1) != -1:
        yield ("training", "max_steps"), f"curriculum.epochs_per_stage gives the number of steps; {_LEAVE}"
    by_stage = curriculum.get("restart") or curriculum.get("learning_rates")
    if schedule in ("reduce_lr_on_plateau", "greedy") and by_stage:
        yield ("training", "lr_scheduler_type"), "follows the loss, not the stages; write linear, cosine or constant"
    if kind == "icft" and curriculum.get("consistency") != 0 and severity.get("reduction") == "examples":
        yield ("severity", "reduction"), "the consistency term counts tokens; write curriculum.consistency: 0"


def _as_published(published: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Mistake]:
    training, mixed = _section(values, "training"), _section(values, "data").get("mix")
    by_length = _section(values, "curriculum").get("difficulty") == "length"
    on = {key for key, value in published.items() if value not in (False, None, "answer")} - {"evaluation_template"}
    padded = published.get("labels") == "all"
    for wrong, path, why in (
        (on and training.get("packing") is True, "training.packing", "the published loops pack nothing"),
        (padded and training.get("max_length", 0) is None, "training.max_length", "rows are padded to it"),
        (padded and "no_end_token" in on, "as_published.no_end_token", "the padding is that token"),
        (padded and by_length, "curriculum.difficulty", "padding makes lengths equal"),
        (padded and mixed, "data.mix", "its ratios would count padding"),
    ):
        if wrong:
            yield tuple(path.split(".")), f"does not go with section as_published: {why}; {_LEAVE}"
