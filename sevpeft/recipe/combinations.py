"""Refuses settings of a recipe that do not go together, each with the reason and what to write instead.

The rules read the plain values of a recipe, so that they speak also when other values have the wrong type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sevpeft.recipe.library_sections import LORA_DEFAULTS, known_initialisation
from sevpeft.recipe.rules import MANAGED, managed
from sevpeft.recipe.sections import DataSection
from sevpeft.recipe.yaml_text import Mistake

# Optimisers that transformers builds from groups of its own.
_OWN_GROUPS = re.compile("galore|apollo|lomo|adalomo")
# Starts that take a part of the base weights into the adapter, so that it belongs to another base model.
CHANGING_THE_BASE = ("pissa", "olora")
_FROM_WHOLE_WEIGHTS = (*CHANGING_THE_BASE, "orthogonal", "corda", "mica")
# Keyword arguments of PyTorch's `checkpoint` that a recipe can hold, and what TRL and transformers add to them.
_CHECKPOINTING = (
    *("selective", "every_n_layers"),
    *("use_reentrant", "preserve_rng_state", "determinism_check", "early_stop", "debug"),
)
# Figures of a validation: of these the least is best, although transformers takes that for names in -loss only.
BEST_IS_LEAST = ("loss", "loss_non_critical", "loss_neutral", "loss_critical")
_ACCURACY = "mean_token_accuracy"
# What PEFT leaves out when it turns such an adapter into a plain one (`LoraModel.subtract_mutated_init`).
_NOT_PLAIN = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")


def broken_rules(values: Mapping[str, Any]) -> Iterator[Mistake]:
    """Every rule that the plain values of a recipe break, as the key's path and "reason; remedy"."""
    for section in MANAGED:
        for key, value in _section(values, section).items():
            rule = managed(section, str(key))
            if rule and rule[0](value):
                yield (section, str(key)), rule[1]
    yield from _exclusive(values)
    training = _section(values, "training")
    for key, sentence in (*_checkpointing(training), *_best(training)):
        yield ("training", key), sentence
    steps = training.get("max_steps")
    if type(steps) is int and steps < 1 and steps != -1:
        yield ("training", "max_steps"), f"must be a number of steps from 1 up, or -1 for whole epochs, not {steps}"
    given = training.get("accelerator_config")
    if "num_steps" in _section(_section({"of": given}, "of"), "gradient_accumulation_kwargs"):
        why = "num_steps would replace gradient_accumulation_steps"
        yield ("training", "accelerator_config"), f"{why}; write training.gradient_accumulation_steps instead"
    multiple = training.get("pad_to_multiple_of")
    if multiple not in (None, "auto") and (type(multiple) is not int or multiple < 1):
        yield ("training", "pad_to_multiple_of"), f"must be a number from 1 up or auto, not {multiple!r}; write 8"
    for key in ("dataloader_multiprocessing_context", "dataloader_prefetch_factor"):
        if training.get(key) and not training.get("dataloader_num_workers"):
            why = "it is about processes that read rows, and there are none"
            yield ("training", key), f"{why}; write training.dataloader_num_workers too, such as 2, or leave it out"
    if training.get("packing") is True and "max_length" in training and training["max_length"] is None:
        yield ("training", "max_length"), "is null, and packing fills rows up to a length; write one, such as 512"
    prompt = _section(values, "prompt")
    if prompt.get("dialect") and not prompt.get("dialect_prefixes"):
        yield ("prompt", "dialect"), "chooses among dialect_prefixes, and there are none; add them or leave it out"
    severity = _section(values, "severity")
    source = severity.get("source", "columns")
    if source in ("linear", "rules+linear", "transformer") and not severity.get("classifier"):
        why = f"source is {source}, which needs the folder of a fitted classifier"
        yield ("severity", "classifier"), f"{why}; write severity.classifier, made by `sevpeft classifier fit`"
    if source == "columns" and severity.get("classifier"):
        why = "it would not be used, because severity.source is columns"
        yield ("severity", "classifier"), f"{why}; set source to the classifier's kind, or leave it out"
    yield from _splits(_section(values, "data"))
    lora = _section(values, "lora")
    if lora.get("loraplus_lr_ratio") is not None and _OWN_GROUPS.match(str(training.get("optim"))):
        why = f"{training['optim']} sorts the parameters itself, so that LoRA+ would be left out"
        yield (
            ("training", "optim"),
            f"{why}; write paged_adamw_8bit or adamw_torch, or leave lora.loraplus_lr_ratio out",
        )
    for key, sentence in _adapter(lora, _section(values, "quantization")):
        yield ("lora", key), sentence


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _exclusive(values: Mapping[str, Any]) -> Iterator[Mistake]:
    for section, one, other in (
        ("quantization", "load_in_4bit", "load_in_8bit"),
        ("training", "bf16", "fp16"),
        ("training", "bf16_full_eval", "fp16_full_eval"),
    ):
        settings = _section(values, section)
        if settings.get(one) is True and settings.get(other) is True:
            yield ((section, other), f"is true together with {section}.{one}, and only one can be; remove one of them")


def _splits(data: Mapping[str, Any]) -> Iterator[Mistake]:
    sizes = [data.get(name, DataSection.model_fields[name].default) for name in ("validation_size", "test_size")]
    if all(isinstance(size, float) and 0 < size < 1 for size in sizes) and sum(sizes) >= 1:
        key = "test_size" if "test_size" in data else "validation_size"
        both = " + ".join(f"{size:g}" for size in sizes)
        yield (
            ("data", key),
            f"validation_size + test_size is {both}, which leaves nothing to train on; make the sum less than 1",
        )


def _checkpointing(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    given, key = _section(training, "gradient_checkpointing_kwargs"), "gradient_checkpointing_kwargs"
    if isinstance(training.get(key), str):
        yield key, f"{training[key]!r} is no mapping; write it as {{use_reentrant: false}}"
    every = given.get("every_n_layers", 1)
    if type(every) is not int or every < 1:
        why = f"every_n_layers is {every!r}, and of so many layers one is checkpointed"
        yield key, f"{why}; write a number of layers from 1 up"
    if unknown := sorted(set(map(str, given)) - set(_CHECKPOINTING)):
        yield key, f"{', '.join(unknown)} is nothing that it takes; write one of {', '.join(_CHECKPOINTING)}"
    if given.get("preserve_rng_state", True) is not True:
        why = "without the random state, dropout is drawn anew in the backward pass, and the gradients are wrong"
        yield key, f"{why}; leave preserve_rng_state out"


def _best(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What decides which checkpoint is the best one."""
    metric = training.get("metric_for_best_model")
    if metric is None:
        if training.get("save_strategy") == "best":
            why = "best saves by a figure of the validation, and none is named"
            yield "save_strategy", f"{why}; write training.metric_for_best_model too, such as loss or loss_critical"
        return
    known = (*BEST_IS_LEAST, _ACCURACY)
    name = str(metric).removeprefix("eval_")
    waits = training.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    if waits and name == _ACCURACY and _section(training, "lr_scheduler_kwargs").get("mode") != "max":
        why = f"the rate would fall while {metric} rises"
        yield "lr_scheduler_kwargs", f"{why}; write mode: max there, or metric_for_best_model: loss"
    if name not in known:
        yield "metric_for_best_model", f"{metric!r} is no figure of the validation; write one of {', '.join(known)}"
    elif training.get("greater_is_better") is (name in BEST_IS_LEAST):
        right = str(name not in BEST_IS_LEAST).lower()
        yield "greater_is_better", f"the worst checkpoint by {metric} would be kept; write {right} or leave it out"


def _adapter(lora: Mapping[str, Any], quantization: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    eight = quantization.get("load_in_8bit") is True
    quantised = eight or quantization.get("load_in_4bit") is True
    start = lora.get("init_lora_weights", True)
    if not known_initialisation(start):
        names = "true, gaussian, olora, pissa, pissa_niter_4, orthogonal, eva, loftq or mica"
        yield "init_lora_weights", f"PEFT knows no initialisation {start!r}; write {names}"
    elif quantised and isinstance(start, str) and start.startswith(_FROM_WHOLE_WEIGHTS):
        why = f"{start} computes with the base weights themselves, and quantised ones cannot be changed"
        yield "init_lora_weights", f"{why}; use true, gaussian or eva, or leave the quantization out"
    elif start == "loftq" and quantization.get("load_in_4bit") is not True:
        why = "loftq starts the adapter from the error of a 4-bit base model"
        yield "init_lora_weights", f"{why}; write quantization.load_in_4bit: true, or use true"
    elif start == "loftq" and not _scaled_by_one(lora):
        why = "loftq cancels that error only where the adapter counts once"
        yield "lora_alpha", f"{why}; write as much as r (its square root with use_rslora), and no alpha_pattern"
    elif isinstance(start, str) and start.startswith(CHANGING_THE_BASE):
        for key, lost in (("bias", lora.get("bias", "none") != "none"), *((k, bool(lora.get(k))) for k in _NOT_PLAIN)):
            if lost:
                why = f"{start} changes the base model, and PEFT cannot undo that in an adapter with {key}"
                yield key, f"{why}; leave it out, or use init_lora_weights: true"
        if lora.get("use_rslora") is True and (lora.get("rank_pattern") or lora.get("alpha_pattern")):
            why = f"{start} changes the base model, and PEFT cannot undo that with rank_pattern or alpha_pattern beside"
            yield "use_rslora", f"{why} use_rslora; leave one of them out"
    if lora.get("layer_replication") and eight:
        yield "layer_replication", "the copies of an 8-bit layer lose their scales; use load_in_4bit or leave it out"
    if lora.get("loraplus_lr_embedding") is not None and lora.get("loraplus_lr_ratio") is None:
        yield "loraplus_lr_embedding", "only LoRA+ uses it; write loraplus_lr_ratio too, such as 16, or leave it out"
    if lora.get("use_dora") is True and eight:
        yield "use_dora", "DoRA fails on an 8-bit base model; use quantization.load_in_4bit or leave use_dora out"
    yield from _targets(lora)


def _scaled_by_one(lora: Mapping[str, Any]) -> bool:
    r, alpha = (lora.get(name, LORA_DEFAULTS[name]) for name in ("r", "lora_alpha"))
    return not lora.get("alpha_pattern") and alpha == (r**0.5 if lora.get("use_rslora") else r)


def _targets(lora: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    targets = lora.get("target_modules", "all-linear")
    if isinstance(targets, str):
        for key in ("layers_to_transform", "layers_pattern"):
            if lora.get(key) is not None:
                yield key, f"it needs the modules by name; write target_modules as a list, not {targets!r}"
    names = targets if isinstance(targets, list) else []
    head = any(str(name).split(".")[-1] == "lm_head" for name in names)
    if isinstance(targets, str) and targets != "all-linear":
        try:
            head = bool(re.fullmatch(targets, "lm_head"))
        except re.error as error:
            why = f"{targets!r} is no regular expression ({error.msg})"
            yield "target_modules", f"{why}; write a list of module names or all-linear"
    excluded = lora.get("exclude_modules")
    if head and "lm_head" not in (excluded if isinstance(excluded, list) else [excluded]):
        why = "names lm_head, where an adapter would never be trained, because TRL reads that weight directly"
        yield "target_modules", f"{why}; take lm_head out"
