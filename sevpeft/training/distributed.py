"""FSDP2, DeepSpeed and several processes: what a launcher was asked for, and what it needs of the adapter."""

from __future__ import annotations

import dataclasses
import os
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, is_deepspeed_available
from accelerate.utils.dataclasses import get_module_class_from_name
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME
from trl import SFTConfig

from sevpeft.errors import RunError, first_sentence
from sevpeft.modeling.adapters import cast_trained
from sevpeft.modeling.compat import deepspeed_requested, fsdp_requested, weights_are_sharded, zero3
from sevpeft.recipe import Recipe

# PyTorch's own, which compute on the parts of a parameter. Those of bitsandbytes have no rule for parts (0.50.2), and
# the others look at whole rows and columns.
OPTIMIZERS_FOR_PARTS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def check_sharding(recipe: Recipe, arguments: SFTConfig) -> None:
    """Raises RunError when the engine that the launcher asks for cannot train or save what the recipe says.

    Args:
        arguments: made from the recipe; DeepSpeed's settings are in them.
    """
    if fsdp_requested():
        _check_fsdp(arguments)
    if zero3():
        _check_zero3(arguments)
    if weights_are_sharded() and recipe.quantization.load_in_8bit:
        raise RunError(
            f"quantization.load_in_8bit=true does not work under {'FSDP' if fsdp_requested() else 'ZeRO-3'}, as 8-bit "
            "weights cannot be divided; write quantization.load_in_4bit=true, or use accelerate_configs/multi_gpu.yaml."
        )


def _check_fsdp(arguments: SFTConfig) -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":  # accelerate's default
        raise RunError(
            "accelerate launch was asked for version 1 of FSDP, which joins the adapter and the frozen weights into "
            "one parameter and hides the LM head from the loss; write fsdp_version: 2, as in "
            "accelerate_configs/fsdp2.yaml."
        )
    try:
        plugin = FullyShardedDataParallelPlugin()  # reads what the launcher set
    except (ValueError, KeyError) as error:
        raise RunError(
            f"accelerate refuses the fsdp_config of this launch ({first_sentence(error)}); compare it with "
            "accelerate_configs/fsdp2.yaml."
        ) from error
    if plugin.state_dict_type is not StateDictType.FULL_STATE_DICT:
        raise RunError(
            f"fsdp_state_dict_type is {plugin.state_dict_type.name}, with which no adapter is written; write "
            "fsdp_state_dict_type: FULL_STATE_DICT, as in accelerate_configs/fsdp2.yaml (an adapter is small)."
        )
    if plugin.activation_checkpointing:
        raise RunError(
            "fsdp_activation_checkpointing is true, which is the same as training.gradient_checkpointing; write false "
            "in the accelerate configuration and leave it to the recipe."
        )
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    if optim not in OPTIMIZERS_FOR_PARTS:
        raise RunError(
            f"training.optim={optim} does not work under FSDP, which divides each parameter of the adapter; write "
            "training.optim=adamw_torch, whose memory is divided by the number of GPUs, too."
        )


def _check_zero3(arguments: SFTConfig) -> None:
    zero = arguments.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise RunError(
            "zero3_save_16bit_model is not true, without which ZeRO-3 writes no adapter; write "
            "zero3_save_16bit_model: true, as in accelerate_configs/deepspeed_zero3.yaml."
        )
    for setting in ("packing", "padding_free"):
        if getattr(arguments, setting):
            raise RunError(
                f"training.{setting}=true is refused under ZeRO-3: whether documents stay apart is measured on the "
                "whole model, and no process has it; leave it out, or use accelerate_configs/fsdp2.yaml."
            )


def set_up_engine(accelerator: Accelerator, model: Any) -> None:
    """Number formats of the adapter, and the layers that FSDP wraps, before the engine takes the model.

    TRL casts QLoRA adapters to bfloat16: at lr 5e-5 two thirds of the updates are then rounded away, a float16
    GradScaler fails, and a resumed run goes on in float32. So they are float32, which FSDP2 needs of them all and
    allows beside frozen weights of other types. ZeRO-3 gathers all kinds of parameters into one buffer, so there they
    have the type of the others; no update is lost, because its optimizer keeps float32 copies.
    """
    cast_trained(model, getattr(model, "dtype", torch.float32) if zero3() else torch.float32)
    if zero3() or not hasattr(accelerator.state, "fsdp_plugin"):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        # accelerate fails on a class that the architecture has and this model lacks, as Gemma 3's picture tower.
        plugin.transformer_cls_names_to_wrap = [
            name for name in model._no_split_modules if get_module_class_from_name(model, name) is not None
        ]
    if plugin.mixed_precision_policy is not None:
        # accelerate 1.15 also casts what the model returns, so that the loss would be summed from log-probabilities
        # of eight bits; and gradients of an adapter are small enough to be added up in float32.
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def check_engine_of_model(accelerator: Accelerator, model: Any) -> None:
    """Raises RunError when the model that is about to take a step is not wrapped by the requested engine."""
    kind = accelerator.distributed_type
    if kind in DDP and not isinstance(model, DistributedDataParallel):
        # accelerate 1.15 skips DDP for a model that evaluate() prepared first (Accelerator.prepare_model).
        raise RunError(
            "Several processes would train without exchanging gradients, because evaluate() was called before "
            "train(); set eval_on_start=True instead."
        )
    if fsdp_requested() and not (kind is DistributedType.FSDP and isinstance(model, FSDPModule)):
        raise RunError(
            f"accelerate launch was asked for FSDP, but {_words(kind)} would train the model; "
            "start it with accelerate_configs/fsdp2.yaml as it is."
        )


def check_adapter_is_complete(folder: Path, model: torch.nn.Module) -> None:
    """Raises RunError when a saved adapter lacks numbers that were trained: parts, or tensors that were never gathered.

    Args:
        model: that was trained; its parameters may be divided.
    """
    trained = sum(
        prod(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 the shape is that of nothing
        for parameter in model.parameters()
        if parameter.requires_grad
    )
    path = folder / ADAPTER_SAFE_WEIGHTS_NAME
    sizes: dict[str, int] = {}
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            sizes = {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    empty = [name for name, size in sizes.items() if not size]
    if empty or sum(sizes.values()) < trained:
        raise RunError(
            f"The adapter was written with {sum(sizes.values()):,} of its {trained:,} trained numbers, because its "
            "parts were not gathered; the checkpoints are kept. Go on with --resume under accelerate_configs/fsdp2.yaml"
            " or deepspeed_zero3.yaml as they are."
        )


def engine_of(accelerator: Accelerator) -> str:
    """Name of what holds the processes together, as it stands in environment.json."""
    kind = accelerator.distributed_type
    if kind is DistributedType.FSDP:
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    if kind is DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return _words(kind)


def check_same_processes(accelerator: Accelerator, environment: dict[str, Any]) -> None:
    """Raises RunError when a run was started by other processes than those that resume it.

    Optimizer and random state of a checkpoint are written part by part, in the form of their engine.

    Args:
        environment: environment.json of the run.
    """
    here = (accelerator.num_processes, engine_of(accelerator))
    there = (environment.get("processes", here[0]), environment.get("engine", here[1]))
    if here != there:

        def described(processes: int, engine: str) -> str:
            return "one process" if processes == 1 and engine == "one process" else f"{processes} of {engine}"

        raise RunError(
            f"The run was started with {described(*there)} and would be resumed with {described(*here)}, which cannot "
            "read its checkpoints; resume it with the same --config_file and number of processes, or start another run."
        )


def _words(kind: DistributedType) -> str:
    return "one process" if kind is DistributedType.NO else "DDP" if kind in DDP else str(kind).rpartition(".")[2]


def check_deepspeed() -> None:
    """Raises RunError when DeepSpeed is asked for and not installed; to be called before accelerate looks for it."""
    if deepspeed_requested() and not is_deepspeed_available():
        raise RunError(
            "accelerate launch was asked for DeepSpeed, which is not installed: pip install 'sevpeft[deepspeed]', or "
            "use accelerate_configs/fsdp2.yaml, which needs nothing more."
        )


def check_engine(state: PartialState) -> None:
    """Raises RunError when FSDP or DeepSpeed was asked for and another engine runs; accelerate replaces it silently."""
    on_a_cpu = state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    engines = {
        "FSDP": fsdp_requested() and on_a_cpu,
        "DeepSpeed": deepspeed_requested() and state.distributed_type is not DistributedType.DEEPSPEED,
    }
    for engine in (name for name, is_replaced in engines.items() if is_replaced):
        instead = "DDP, the whole model in each process," if state.num_processes > 1 else "a single process"
        raise RunError(
            f"accelerate launch was asked for {engine}, but {instead} would run, because this run is on the CPU; "
            "run it where `nvidia-smi` lists GPUs, or use accelerate_configs/cpu_2.yaml on a CPU."
        )
