"""Private and undocumented names of torch, transformers, PEFT, TRL and bitsandbytes that this room touches.

Each says the version that was read and the upstream issue; `tests/modeling/test_compat.py` fails where one has moved.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.quantizers import AutoHfQuantizer
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as LOGPROB_CHUNK_SIZE

# TOKEN_CHUNK_SIZE, LOGPROB_CHUNK_SIZE: rows and columns of the LM head that TRL (1.16) scores at once.
# dequantize_module_weight: the numbers that a matrix of bitsandbytes computes with (PEFT 0.21). FakeTensorMode: tensors
# with shapes and no numbers (PyTorch 2.13). None has a documented counterpart; no issue was found.
__all__ = ["LOGPROB_CHUNK_SIZE", "TOKEN_CHUNK_SIZE", "FakeTensorMode", "dequantize_module_weight"]

# PyTorch's CUDA allocator rounds to this (2.13, kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp).
_SMALLEST_BLOCK = 512

# What `accelerate launch` asks for. It tells its processes through variables that it does not document (1.15, none
# found), and builds its engines from them only inside the trainer; a model must be loaded in a form that they divide.


def _requested(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() in ("1", "true", "yes")


fsdp_requested, deepspeed_requested, cpu_requested = (partial(_requested, on) for on in ("FSDP", "DEEPSPEED", "CPU"))
zero3 = hf_deepspeed.is_deepspeed_zero3_enabled  # known once TRL's settings were made, which read DeepSpeed's


def requested_engine() -> str | None:
    """FSDP or DeepSpeed, where the launcher asks for one of them."""
    return "DeepSpeed" if deepspeed_requested() else "FSDP" if fsdp_requested() else None


def weights_are_sharded() -> bool:
    """Whether each process holds a part of the base model only."""
    return fsdp_requested() or zero3()


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
    try:
        return bool(AutoHfQuantizer.supports_quant_method(dict(quantization)))
    except (ValueError, TypeError):  # it finds no method in it
        return False


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


def copy_last_states(model: PreTrainedModel) -> None:
    """Keeps PyTorch (2.13) from copying a frozen head once for each row on a CPU: 10 GB for 31 rows of Gemma-3-270M.

    `matmul` does not see that the last states of prompts, a slice of (B, 1, H), are one matrix.
    https://github.com/pytorch/pytorch/issues/186148
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


# A training step without numbers, for the memory plan.


def move_shapes_to_cpu(model: torch.nn.Module, fake: FakeTensorMode) -> None:
    """As `to_empty` on a model of the meta device, whose two operations for each weight take ten times as long."""
    for tensors in (part for module in model.modules() for part in (module._parameters, module._buffers)):
        for name, one in tensors.items():
            if one is not None:
                kind = {"requires_grad": one.requires_grad, "_is_param": isinstance(one, torch.nn.Parameter)}
                tensors[name] = FakeTensor(fake, one.data, "cpu", **kind)


class LiveBytes(TorchDispatchMode):
    """Runs operations on the CPU's tensors of a FakeTensorMode; counts the bytes of storages made, while they live.

    PyTorch's own `MemTracker` (2.13, torch.distributed._tools) is private as well and counts modules. None found.

    Args:
        held: tensors that are there already and do not count.
        rows: of the batch, a prime. A storage that it divides grows with the rows. fake: of all tensors.

    Attributes:
        now: bytes that do not depend on the rows, and bytes for each row. trace: the same after each new storage.
    """

    def __init__(self, held: list[torch.Tensor], rows: int, fake: FakeTensorMode) -> None:
        super().__init__()
        self.now, self.rows, self.fake = [0, 0], rows, fake
        self.trace, self._on_cpu = [[0, 0]], partial(FakeTensor, fake, device="cpu")
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more often than all else together
            return args[0].fake_device
        out = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._known:
                self._count(leaf.untyped_storage())
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """By the kernel for shapes alone, before which FakeTensorMode looks at many things, for up to a millisecond."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # It keeps the numbers of constants, and knows the format that statistics of norms have on a device.
        alike = all(type(one) is FakeTensor and one.constant is None for one in tensors)
        if tensors and alike and "norm" not in func.name():
            try:
                with in_kernel_invocation_manager(self.fake):
                    out = func(*args, **({**kwargs, "device": None} if "device" in kwargs else kwargs))
            except NotImplementedError:  # an operation without such a kernel, which FakeTensorMode takes apart
                return func(*args, **kwargs)
            return tree_map_only(lambda one: type(one) is torch.Tensor, self._on_cpu, out)
        return func(*args, **kwargs)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        of_rows = int(size % self.rows == 0)
        size = size // self.rows if of_rows else -(-size // _SMALLEST_BLOCK) * _SMALLEST_BLOCK

        def freed(_: Any) -> None:
            self.now[of_rows] -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now[of_rows] += size
        self.trace.append([*self.now])
