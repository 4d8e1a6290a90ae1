"""FSDP2, DeepSpeed and several processes: refuses settings that would silently train wrongly or lose the adapter."""

import dataclasses
import os
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils.dataclasses import get_module_class_from_name
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME
from trl import SFTConfig

from sevpeft.errors import RunError
from sevpeft.modeling.adapters import cast_trained
from sevpeft.modeling.compat import deepspeed_requested, fsdp_requested, requested_engine, weights_are_sharded, zero3
from sevpeft.recipe import Recipe
from sevpeft.training.compat import layer_classes

# PyTorch's own, which work on sharded parameters. Those of bitsandbytes do not support shards (0.50.2), and the others
# need whole rows and columns.
OPTIMIZERS_FOR_PARTS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def check_engine(state: PartialState) -> None:
    """Raises RunError when accelerate has silently replaced the requested FSDP or DeepSpeed by another engine."""
    on_a_cpu = state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    no_deepspeed = deepspeed_requested() and state.distributed_type is not DistributedType.DEEPSPEED
    if no_deepspeed or (fsdp_requested() and on_a_cpu):
        problem = f"accelerate launch was asked for {requested_engine()}, and {engine_of(state)} would run on the CPU"
        raise RunError(f"{problem}; run it where `nvidia-smi` lists GPUs, or use accelerate_configs/cpu_2.yaml.")


def check_sharding(recipe: Recipe, arguments: SFTConfig) -> None:
    """Raises RunError when the requested engine cannot train or save what the recipe sets."""
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    zero = arguments.deepspeed_plugin.deepspeed_config["zero_optimization"] if zero3() else {}
    stages, own_rates = recipe.curriculum, recipe.curriculum.restart or recipe.curriculum.learning_rates
    sharded_state = "FULL" not in os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    wrong = {
        "This fsdp_state_dict_type writes no adapter; write fsdp_state_dict_type: FULL_STATE_DICT, as in "
        "accelerate_configs/fsdp2.yaml.": fsdp_requested() and sharded_state,
        f"training.optim={optim} does not work under FSDP, which shards each parameter of the adapter; write "
        "training.optim=adamw_torch.": fsdp_requested() and optim not in OPTIMIZERS_FOR_PARTS,
        "Without zero3_save_16bit_model ZeRO-3 writes no adapter; write zero3_save_16bit_model: true, as in "
        "accelerate_configs/deepspeed_zero3.yaml.": zero3()
        and zero.get("stage3_gather_16bit_weights_on_model_save") is not True,
        "ZeRO-3 cannot measure whether packed documents stay apart; leave training.packing and training.padding_free "
        "out, or use accelerate_configs/fsdp2.yaml.": zero3() and (arguments.packing or arguments.padding_free),
        "lora.loraplus_lr_ratio does not reach the optimizer of FSDP or DeepSpeed; leave it out, or use "
        "accelerate_configs/multi_gpu.yaml.": requested_engine() and recipe.lora.loraplus_lr_ratio is not None,
        "8-bit weights cannot be sharded; write quantization.load_in_4bit=true instead of "
        "quantization.load_in_8bit=true.": weights_are_sharded() and recipe.quantization.load_in_8bit,
        "curriculum.restart and learning_rates do not reach the optimizer of DeepSpeed; leave them out, or use "
        "accelerate_configs/multi_gpu.yaml.": deepspeed_requested() and own_rates,
        "curriculum.consistency does not work with a sharded adapter; write curriculum.consistency=0, or use "
        "accelerate_configs/multi_gpu.yaml.": requested_engine() and stages.kind == "icft" and stages.consistency,
        "training.generate_samples does not work with sharded weights (FSDP, ZeRO-3); leave it out, or use "
        "accelerate_configs/multi_gpu.yaml.": weights_are_sharded() and recipe.training.generate_samples,
        "training.init_adapter does not work with weights that ZeRO-3 shards; use "
        "accelerate_configs/fsdp2.yaml.": zero3() and recipe.training.init_adapter,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise RunError(message)


def set_up_engine(accelerator: Accelerator, model: Any) -> None:
    """Sets the adapter's dtype and the layers that FSDP wraps, before the engine prepares the model.

    TRL casts QLoRA adapters to bfloat16: at lr 5e-5 two thirds of the updates are then rounded away, a float16
    GradScaler fails, and a resumed run continues in float32. So the adapter is float32, as FSDP2 requires. ZeRO-3
    gathers all parameters into one buffer of one dtype; its optimizer keeps float32 copies.
    """
    cast_trained(model, getattr(model, "dtype", torch.float32) if zero3() else torch.float32)
    if zero3() or not hasattr(accelerator.state, "fsdp_plugin"):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        # accelerate fails on a class that the architecture has and this model lacks, such as Gemma 3's vision tower.
        plugin.transformer_cls_names_to_wrap = [
            name for name in layer_classes(model) if get_module_class_from_name(model, name) is not None
        ]
    if plugin.mixed_precision_policy is not None:
        # accelerate 1.15 also casts the outputs: the loss would sum log-probabilities of eight bits. An adapter's
        # gradients are small enough to be reduced in float32.
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def check_engine_of_model(accelerator: Accelerator, model: Any) -> None:
    """Raises RunError when the model to train is not wrapped by the requested engine."""
    kind = accelerator.distributed_type
    if kind in DDP and not isinstance(model, DistributedDataParallel):
        # accelerate 1.15 skips DDP for a model that evaluate() prepared first (Accelerator.prepare_model).
        why = "because evaluate() was called before train(); set eval_on_start=True instead"
        raise RunError(f"Several processes would train without exchanging gradients, {why}.")
    if fsdp_requested() and not (kind is DistributedType.FSDP and isinstance(model, FSDPModule)):
        problem = f"accelerate launch was asked for FSDP, and {engine_of(accelerator)} would train the model"
        raise RunError(f"{problem}; start it with accelerate_configs/fsdp2.yaml unchanged.")


def check_adapter_is_complete(folder: Path, model: torch.nn.Module) -> None:
    """Raises RunError when a saved adapter has fewer numbers than the model trains: some shards were not gathered."""
    trained = sum(
        prod(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 `shape` is empty
        for parameter in model.parameters()
        if parameter.requires_grad
    )
    path, sizes = folder / ADAPTER_SAFE_WEIGHTS_NAME, [0]
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            sizes = [prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    if 0 in sizes or sum(sizes) < trained:
        what = f"The adapter was written with {sum(sizes):,} of its {trained:,} numbers: its parts were not gathered"
        raise RunError(f"{what}; resume with accelerate_configs/fsdp2.yaml or deepspeed_zero3.yaml unchanged.")


def engine_of(processes: Accelerator | PartialState) -> str:
    """Name of the distributed engine, as written in environment.json."""
    kind = processes.distributed_type
    if kind is DistributedType.FSDP:
        return f"FSDP{processes.state.fsdp_plugin.fsdp_version}"
    if kind is DistributedType.DEEPSPEED:
        return f"ZeRO-{processes.state.deepspeed_plugin.zero_stage}"
    return "one process" if kind is DistributedType.NO else "DDP" if kind in DDP else str(kind).rpartition(".")[2]


def check_same_processes(accelerator: Accelerator, environment: dict[str, Any]) -> None:
    """Raises RunError when a run, with this environment.json, was started with another engine or number of processes.

    Each process saves its own optimizer and random state, in the format of the engine.
    """
    here = f"{accelerator.num_processes} × {engine_of(accelerator)}"
    there = f"{environment['processes']} × {environment['engine']}"
    if here != there:
        remedy = "use the same --config_file and number of processes, or start another run"
        raise RunError(f"The run was started with {there} and cannot be resumed with {here}; {remedy}.")
