"""What a recipe may not say although its types allow it: settings that sevpeft manages itself, and settings that the
libraries renamed or dropped. Each with the reason and what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Refused = Callable[[Any], bool]

# The one variable whose content is sent to a judge.
JUDGE_KEY = "SEVPEFT_JUDGE_API_KEY"


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
_ROUNDS = "a validation after the last step would round the adapter itself; leave it out"
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
    "ignore_data_skip": (
        _unless(False),
        "a resumed run would see other rows than one that was left alone; leave it out",
    ),
    "dataloader_persistent_workers": (
        _unless(False),
        "a resumed run would see the rows of its next epochs in another order; leave it out",
    ),
    "dataloader_in_order": (_unless(True), "the rows would come in another order in every run; leave it out"),
    "bf16_full_eval": (_unless(False), _ROUNDS),
    "fp16_full_eval": (_unless(False), _ROUNDS),
    "enable_jit_checkpoint": (_unless(False), "a signal ends a run with a checkpoint anyway; leave it out"),
    "length_column_name": (_unless("length"), f"{_ENCODED_HERE}, and knows their lengths; leave it out"),
    "save_only_model": (_unless(False), "no run could go on from such a checkpoint; leave it out"),
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
_KEY = f"a recipe neither holds nor names a key; take it out, and put the key into the environment variable {JUDGE_KEY}"
GONE: dict[str, str] = {
    "api_key": _KEY,
    "api_key_variable": _KEY,
    "api_key_env": _KEY,
    "openai_api_key": _KEY,
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
