"""What a recipe may not say although its types allow it: settings that sevpeft manages itself, settings that the
libraries renamed or dropped, and settings that do not go together. Each with the reason and what to write instead.

The rules read the plain values of a recipe, so that they speak also when other values have the wrong type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sevpeft.recipe.library_sections import LORA_DEFAULTS, known_initialisation
from sevpeft.recipe.sections import DataSection
from sevpeft.recipe.yaml_text import Mistake

Refused = Callable[[Any], bool]


def _always(_: Any) -> bool:
    return True


def _unless(*allowed: Any) -> Refused:
    return lambda value: not any(value is right or (type(value) is type(right) and value == right) for right in allowed)


_ENCODED_HERE = "sevpeft encodes the consultations itself, with their weights"
_TOKENS_OF_MODEL = "the tokens of the base model's tokenizer are used; leave it out"
_UPLOAD = (
    "a run stays on this machine; leave it out, and upload the adapter afterwards with `hf upload REPO_ID RUN/adapter`"
)
_TOKEN = "a token does not belong in a recipe, which is copied into the run; log in with `hf auth login`"
_VERBS = "the trainer does not read it; leave it out, and set training.eval_strategy for validation during training"
_WHOLE_ANSWER = "sevpeft truncates itself, so that a long question never costs the answer; leave it out"
_ENGINE = (
    "how the weights are spread over GPUs belongs to the launcher, so that a recipe runs on one GPU and on many; leave "
    "it out, and use `accelerate launch --config_file accelerate_configs/FILE.yaml`"
)
_BYPASSES = "so the severity weights would be bypassed"

# Key of `training` → when it is refused → reason; remedy.
TRAINING_MANAGED: dict[str, tuple[Refused, str]] = {
    "output_dir": (_always, "the run folder is chosen on the command line; use --output RUN"),
    "logging_dir": (_always, "the run folder holds the log; use --output RUN"),
    "overwrite_output_dir": (
        _always,
        "a run is never overwritten; use --resume to continue it or another --output RUN",
    ),
    "resume_from_checkpoint": (_always, "a run finds its last sound checkpoint itself; use --resume"),
    "dataset_kwargs": (_always, f"{_ENCODED_HERE}; leave it out"),
    "dataset_text_field": (
        _always,
        f"{_ENCODED_HERE}; name the columns in data.question_column and data.answer_column",
    ),
    "completion_only_loss": (_unless(True), "only the answer is learnt, never the question; leave it out"),
    "assistant_only_loss": (_unless(False), "the answer alone is marked already, by its position; leave it out"),
    "remove_unused_columns": (
        _always,
        "the column of severity weights would be dropped with the unused ones; leave it out",
    ),
    "label_names": (_always, f"{_ENCODED_HERE} and labels; leave it out"),
    "model_init_kwargs": (_always, "the base model is loaded by sevpeft; use the sections model and quantization"),
    "trust_remote_code": (_always, "the base model is loaded by sevpeft; use model.trust_remote_code"),
    "activation_checkpointing": (_always, "TRL reads the older name; write gradient_checkpointing"),
    "activation_checkpointing_kwargs": (_always, "TRL reads the older name; write gradient_checkpointing_kwargs"),
    "chat_template_path": (_always, "generation must use the training prompt; use prompt.template or prompt.chat"),
    "eos_token": (_always, _TOKENS_OF_MODEL),
    "pad_token": (_always, _TOKENS_OF_MODEL),
    "truncation_mode": (_always, _WHOLE_ANSWER),
    "loss_type": (
        _unless("nll"),
        f"only nll is a sum of log-probabilities that weights can multiply, {_BYPASSES}; write nll or leave it out",
    ),
    "label_smoothing_factor": (_unless(0, 0.0), f"TRL smooths labels in another loss, {_BYPASSES}; leave it out"),
    "use_liger_kernel": (
        _unless(False),
        f"Liger replaces the forward pass that hands over the log-probabilities, {_BYPASSES}; leave it out",
    ),
    "liger_kernel_config": (_unless(None), "the Liger kernels are not used here; leave it out"),
    "packing_strategy": (_unless("bfd"), "the other strategies cut answers in two; write bfd or leave it out"),
    "eval_packing": (_unless(None, False), "validation loss is summed row by row to be comparable; leave it out"),
    "average_tokens_across_devices": (
        _unless(True),
        "the loss would change with the number of processes; leave it out",
    ),
    "eval_on_start": (_unless(True), "the loss before training is always measured, to be compared with; leave it out"),
    "push_to_hub": (_unless(False), _UPLOAD),
    "hub_token": (_always, _TOKEN),
    "do_train": (_always, _VERBS),
    "do_eval": (_always, _VERBS),
    "do_predict": (_always, _VERBS),
    "local_rank": (_always, "the launcher sets it; leave it out, and use `accelerate launch` for several processes"),
}
TRAINING_MANAGED |= {
    key: (_unless(None), _ENGINE) for key in ("fsdp", "fsdp_config", "deepspeed", "parallelism_config")
}
LORA_MANAGED: dict[str, tuple[Refused, str]] = {
    "task_type": (_always, "it is always CAUSAL_LM, because answers are generated; leave it out"),
    "peft_type": (_always, "it is always LORA; leave it out"),
    "base_model_name_or_path": (_always, "the adapter names the base model itself; use model.name_or_path"),
    "revision": (_always, "it belongs to the base model; use model.revision"),
    "inference_mode": (_unless(False), "an adapter in inference mode is not trained; leave it out"),
    "auto_mapping": (_always, "PEFT fills it in; leave it out"),
    "peft_version": (_always, "PEFT fills it in; leave it out"),
    "runtime_config": (_always, "PEFT takes it as an object only, which a recipe cannot hold; leave it out"),
    "alora_invocation_tokens": (
        _unless(None),
        "an aLoRA acts behind its invocation tokens only, which the prompts do not hold; leave it out",
    ),
    "use_qalora": (_unless(False), "PEFT has QA-LoRA for GPTQ only, so that it would be plain LoRA; leave it out"),
    "arrow_config": (_unless(None), "it chooses among adapters that are there already; leave it out"),
    "kasa_config": (_unless(None), "KaSA needs terms of the loss that are not added here; leave it out"),
    "monteclora_config": (_unless(None), "MonteCLoRA needs terms of the loss that are not added here; leave it out"),
    "megatron_config": (_unless(None), "it belongs to Megatron-LM, which is not used here; leave it out"),
    "corda_config": (
        _unless(None),
        "CorDA needs a pass over the data that is not made here; use init_lora_weights: eva",
    ),
    "lora_ga_config": (
        _unless(None),
        "LoRA-GA needs a pass over the data that is not made here; use init_lora_weights: eva",
    ),
}
# Optimisers that transformers builds from groups of its own.
_OWN_GROUPS = re.compile("galore|apollo|lomo|adalomo")
# Starts that take a part of the base weights into the adapter, so that it belongs to another base model.
CHANGING_THE_BASE = ("pissa", "olora")
_FROM_WHOLE_WEIGHTS = (*CHANGING_THE_BASE, "orthogonal", "corda", "mica")
# What PEFT leaves out when it turns such an adapter into a plain one (`LoraModel.subtract_mutated_init`).
_NOT_PLAIN = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
MANAGED = {"training": TRAINING_MANAGED, "lora": LORA_MANAGED}

# Key that no section has → its name here (other tools' words, and names that the libraries changed).
RENAMED: dict[str, str] = {
    "max_seq_length": "training.max_length",
    "max_seq_len": "training.max_length",
    "cutoff_len": "training.max_length",
    "evaluation_strategy": "training.eval_strategy",
    "no_cuda": "training.use_cpu",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "include_inputs_for_metrics": "training.include_for_metrics",
    "include_tokens_per_second": "training.include_num_input_tokens_seen",
    "jit_mode_eval": "training.torch_compile",
    "torchdynamo": "training.torch_compile_backend",
    "tpu_metrics_debug": "training.debug",
    "dispatch_batches": "training.accelerator_config",
    "split_batches": "training.accelerator_config",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "lora_target_modules": "lora.target_modules",
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "use_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "val_size": "data.validation_size",
    "loraplus_weight_decay": "training.weight_decay",
}
# Key that no section has and no other replaces as it stands → reason; remedy.
GONE: dict[str, str] = {
    "warmup_ratio": "transformers 5 dropped it; use training.warmup_steps, where 1 or more is a number of steps and "
    "0 or more but less than 1 is a share of all steps (0.03 is 3 %)",
    "group_by_length": "transformers 5 dropped it; write train_sampling_strategy: group_by_length",
    "adafactor": "transformers 5 dropped it; write optim: adafactor",
    "use_mps_device": "transformers finds the device itself; leave it out",
    "save_safetensors": "adapters are always saved as safetensors; leave it out",
    "fp16_backend": "PyTorch's own mixed precision is the only one left; leave it out",
    "half_precision_backend": "PyTorch's own mixed precision is the only one left; leave it out",
    "fp16_opt_level": "it belonged to NVIDIA Apex, which transformers dropped; leave it out",
    "fsdp_min_num_params": _ENGINE,
    "fsdp_transformer_layer_cls_to_wrap": _ENGINE,
    "sharded_ddp": _ENGINE,
    "use_ipex": "transformers 5 dropped it; leave it out",
    "use_legacy_prediction_loop": "transformers 5 dropped it; leave it out",
    "past_index": "transformers 5 dropped it; leave it out",
    "mp_parameters": "transformers 5 dropped it; leave it out",
    "ray_scope": "transformers 5 dropped it; set the environment variable RAY_SCOPE",
    "tpu_num_cores": "transformers 5 dropped it; set the environment variable TPU_NUM_CORES",
    "push_to_hub_token": _TOKEN,
    "push_to_hub_model_id": _UPLOAD,
    "push_to_hub_organization": _UPLOAD,
    "dataset_batch_size": f"{_ENCODED_HERE}; leave it out",
    "formatting_func": "a recipe holds no code; use prompt.template",
}


def managed(section: str, key: str) -> tuple[Refused, str] | None:
    """When and why a setting of the section is refused; None when it is free."""
    if section == "training" and key.startswith("hub_") and key not in TRAINING_MANAGED:
        return _always, _UPLOAD
    return MANAGED.get(section, {}).get(key)


def settable(section: str, key: str) -> bool:
    """Whether a recipe may set it at all, to whatever value."""
    rule = managed(section, key)
    return rule is None or rule[0] is not _always


def broken_rules(values: Mapping[str, Any]) -> Iterator[Mistake]:
    """Every rule that the plain values of a recipe break, as the key's path and "reason; remedy"."""
    for section in MANAGED:
        for key, value in _section(values, section).items():
            rule = managed(section, str(key))
            if rule and rule[0](value):
                yield (section, str(key)), rule[1]
    yield from _exclusive(values)
    training = _section(values, "training")
    if training.get("packing") is True and "max_length" in training and training["max_length"] is None:
        yield ("training", "max_length"), "is null, and packing fills rows up to a length; write one, such as 512"
    every = (_section(training, "gradient_checkpointing_kwargs")).get("every_n_layers", 1)
    if type(every) is not int or every < 1:
        why = f"every_n_layers is {every!r}, and of so many layers one is checkpointed"
        yield ("training", "gradient_checkpointing_kwargs"), f"{why}; write a number of layers from 1 up"
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
