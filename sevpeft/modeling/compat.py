"""Private and undocumented names of torch, transformers, PEFT, TRL and bitsandbytes that sevpeft.modeling uses.

Each names the version that was read and the upstream issue. `tests/modeling/test_compat.py` fails when one changes.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
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
# dequantize_module_weight: the weights that a bitsandbytes matrix computes with (PEFT 0.21). FakeTensorMode: tensors
# with shapes but no values (PyTorch 2.13). None has a documented counterpart; no issue was found.
__all__ = ["LOGPROB_CHUNK_SIZE", "TOKEN_CHUNK_SIZE", "FakeTensorMode", "dequantize_module_weight"]

# PyTorch's CUDA allocator rounds to this (2.13, kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp).
_SMALLEST_BLOCK = 512

# Settings of `accelerate launch`. It passes them in undocumented environment variables (1.15, none found) and creates
# its engines only inside the trainer. The model is loaded earlier, in a form that the engine can shard.


fsdp_requested, deepspeed_requested, cpu_requested = (
    partial(parse_flag_from_env, f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED", "CPU")
)
zero3 = hf_deepspeed.is_deepspeed_zero3_enabled  # valid after SFTConfig was built, which reads DeepSpeed's config


def requested_engine() -> str | None:
    """The engine that the launcher requests: FSDP, DeepSpeed or None."""
    return "DeepSpeed" if deepspeed_requested() else "FSDP" if fsdp_requested() else None


def weights_are_sharded() -> bool:
    """Whether each process holds only a shard of the base model."""
    return fsdp_requested() or zero3()


# Models without weights.


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Creates modules on PyTorch's meta device: shapes without values, under ZeRO-3 too.

    Under ZeRO-3, transformers 5.24 passes each new model to DeepSpeed, which cannot shard meta tensors. It has no
    switch for a single model: https://github.com/huggingface/transformers/issues/28106
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
    """Whether transformers (5.24) can load this quantization; it ignores the others. None found."""
    try:
        return bool(AutoHfQuantizer.supports_quant_method(dict(quantization)))
    except (ValueError, TypeError):  # the dictionary names no method
        return False


def attention_of(config: PretrainedConfig) -> str:
    """Attention implementation of a loaded model; transformers (5.24) has no public name for it. None found."""
    return str(config._attn_implementation)


def disable_cpu_avx512_repack(model: torch.nn.Module) -> None:
    """Stops bitsandbytes (0.50.2, `Linear4bit.forward`) from repacking 4-bit weights on a CPU with AVX512-BF16.

    The first forward pass without gradients repacks them; later gradients and merges are silently wrong. None found.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (unknown to nn.Module)


def copy_last_states(model: PreTrainedModel) -> None:
    """Stops PyTorch (2.13) from copying a frozen head once per row on a CPU: 10 GB for 31 rows of Gemma-3-270M.

    `matmul` does not detect that the last states of the prompts, a slice of shape (B, 1, H), form one matrix.
    https://github.com/pytorch/pytorch/issues/186148
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


# A training step on fake tensors, for the memory plan.


def move_shapes_to_cpu(model: torch.nn.Module, fake: FakeTensorMode) -> None:
    """Moves a meta model to fake CPU tensors, ten times as fast as `to_empty`."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, one in tensors.items():
                if one is not None:
                    kind = {"requires_grad": one.requires_grad, "_is_param": isinstance(one, torch.nn.Parameter)}
                    tensors[name] = FakeTensor(fake, one.data, "cpu", **kind)


class LiveBytes(TorchDispatchMode):
    """Runs operations on fake CPU tensors and counts the bytes of all live storages that they create.

    PyTorch's own `MemTracker` (2.13, torch.distributed._tools) is private as well and counts modules. None found.

    Args:
        held: existing tensors, which are not counted.
        rows: of the batch, a prime. A storage size that it divides scales with the rows. fake: mode of all tensors.

    Attributes:
        now: bytes that do not depend on the rows, and bytes per row. trace: the same after each new storage.
    """

    def __init__(self, held: list[torch.Tensor], rows: int, fake: FakeTensorMode) -> None:
        super().__init__()
        self.now, self.rows, self.fake = [0, 0], rows, fake
        self.trace, self._on_cpu = [[0, 0]], partial(FakeTensor, fake, device="cpu")
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # the most frequent operation by far
            return args[0].fake_device
        out = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._known:
                self._count(leaf.untyped_storage())
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Calls the meta kernel directly; FakeTensorMode's checks before it take up to a millisecond."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # FakeTensorMode is needed for the values of constants and for the dtype of norm statistics on a device.
        alike = all(type(one) is FakeTensor and one.constant is None for one in tensors)
        if tensors and alike and "norm" not in func.name():
            try:
                with in_kernel_invocation_manager(self.fake):
                    out = func(*args, **({**kwargs, "device": None} if "device" in kwargs else kwargs))
            except NotImplementedError:  # no meta kernel: FakeTensorMode decomposes it
                return func(*args, **kwargs)
            return tree_map_only(lambda one: type(one) is torch.Tensor, self._on_cpu, out)
        return func(*args, **kwargs)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        per_row = int(size % self.rows == 0)
        size = size // self.rows if per_row else -(-size // _SMALLEST_BLOCK) * _SMALLEST_BLOCK

        def freed(_: Any) -> None:
            self.now[per_row] -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now[per_row] += size
        self.trace.append([*self.now])
