"""Private and undocumented names of torch, transformers, PEFT, TRL and bitsandbytes that this room touches.

Each says the version that was read and the upstream issue; `tests/modeling/test_compat.py` fails where one has moved.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.quantizers import AutoHfQuantizer
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.models import enable_selective_activation_checkpointing
from trl.trainer import utils as trl_utils

# TOKEN_CHUNK_SIZE: rows of the LM head that TRL (1.16) scores at once. dequantize_module_weight: the numbers that a
# matrix of bitsandbytes computes with (PEFT 0.21). FakeTensorMode: tensors with shapes and no numbers (PyTorch 2.13).
# None has a documented counterpart; no issue was found.
__all__ = ["TOKEN_CHUNK_SIZE", "FakeTensorMode", "dequantize_module_weight"]

# PyTorch's CUDA allocator rounds to this (2.13, kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp).
_SMALLEST_BLOCK = 512


# What `accelerate launch` asks for. It tells its processes through variables that it does not document (1.15, none
# found), and builds its engines from them only inside the trainer; a model must be loaded in a form that they divide.


def fsdp_requested() -> bool:
    """Whether the launcher asks for FSDP, of any version."""
    return _flag("ACCELERATE_USE_FSDP")


def deepspeed_requested() -> bool:
    """Whether the launcher asks for DeepSpeed, at any ZeRO stage."""
    return _flag("ACCELERATE_USE_DEEPSPEED")


def requested_engine() -> str | None:
    """FSDP or DeepSpeed, where the launcher asks for one of them."""
    return "DeepSpeed" if deepspeed_requested() else "FSDP" if fsdp_requested() else None


def zero3() -> bool:
    """Whether DeepSpeed is at ZeRO-3; known once TRL's settings were made, which read DeepSpeed's."""
    return bool(hf_deepspeed.is_deepspeed_zero3_enabled())


def weights_are_sharded() -> bool:
    """Whether each process holds a part of the base model only."""
    return fsdp_requested() or zero3()


def cpu_requested() -> bool:
    """Whether the launcher asks for the CPU."""
    return _flag("ACCELERATE_USE_CPU")


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


# Models without weights.


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Modules made inside have shapes and no numbers (PyTorch's meta device), under ZeRO-3 too.

    transformers 5.24 gives each new model to DeepSpeed there, which cannot divide what is not there, and has no switch
    for one model: https://github.com/huggingface/transformers/issues/28106
    """
    config = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        with torch.device("meta"):
            yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config


# Loading.


def knows_quantization(quantization: dict[str, Any]) -> bool:
    """Whether transformers (5.24) can load weights that are quantized so; others it ignores. None found."""
    return bool(AutoHfQuantizer.supports_quant_method(dict(quantization)))


def attention_of(config: PretrainedConfig) -> str:
    """Attention kernel that a loaded model uses; transformers (5.24) has no public name for it. None found."""
    return str(config._attn_implementation)


def disable_cpu_avx512_repack(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes (0.50.2, `Linear4bit.forward`) from repacking 4-bit weights on a CPU with AVX512-BF16.

    The first forward without gradients (any evaluation) repacks them, and every later gradient and merge is wrong
    without an error. None found.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (not an attribute of nn.Module)


# A training step without numbers, for the memory plan.


def logprob_chunk_size() -> int:
    """Columns of the LM head that TRL (1.16) scores at once. None found."""
    return int(trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE)


def selective_checkpointing_kwargs() -> dict[str, Any]:
    """What TRL (1.16) hands to `gradient_checkpointing_enable` for selective checkpointing, caught on its way.

    TRL exports the function and documents the recipe's key alone; it wraps a method of a model. None found.
    """
    caught: dict[str, Any] = {}

    def enable(gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        caught.update(gradient_checkpointing_kwargs)

    model = SimpleNamespace(gradient_checkpointing_enable=enable)
    enable_selective_activation_checkpointing(model)
    model.gradient_checkpointing_enable()
    return caught


def make_fake(model: torch.nn.Module) -> None:
    """Replaces, inside a FakeTensorMode, what is on the meta device by fake tensors of a CPU.

    Autocast and attention then choose as they do there. Made of fake tensors at once, a model would not take PEFT's
    adapter, because `Module.to` cannot swap them (PyTorch 2.13); `Module.to_empty` would untie shared parameters. None
    found.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = None if parameter is None else made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live; `trace` has them after each new one.

    PyTorch's own `MemTracker` (2.13, torch.distributed._tools) is private as well and counts modules. None found.

    Args:
        held: tensors that are there already and do not count.
    """

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.trace = [0]
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // _SMALLEST_BLOCK) * _SMALLEST_BLOCK

        def freed(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.trace.append(self.now)
