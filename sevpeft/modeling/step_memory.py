"""Turns a model without weights into the memory that one training or validation step of it would take.

The step is run, not estimated: forward, LM head, backward and recomputation go through the real modules of
transformers, PEFT and autograd, on tensors that have shapes and no numbers (PyTorch's FakeTensorMode), while every
storage is counted from its birth to its end. Only two things have no such tensors and are put in place of: the packed
matrices of bitsandbytes and TRL's LM head on a GPU, both with the allocations that their source makes.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE, ChunkedLogProbFunction
from trl.models import enable_selective_activation_checkpointing
from trl.trainer import utils as trl_utils

from sevpeft.errors import UnknownModelError, first_sentence

# PyTorch's CUDA allocator rounds to this.
_SMALLEST_BLOCK = 512


@dataclass(frozen=True)
class Step:
    """What is run.

    Attributes:
        batch, length: rows and tokens of each; every position but the first of a row goes through the LM head.
        checkpointing: gradient checkpointing.
        every_n_layers: how many layers one is checkpointed of (transformers' key of the same kwargs).
        selective: of all but attention, whose outputs are kept (TRL's `gradient_checkpointing_kwargs: {selective}`).
        training: with gradients; else a validation step.
    """

    batch: int
    length: int
    checkpointing: bool
    training: bool = True
    selective: bool = False
    every_n_layers: int = 1

    @property
    def labelled(self) -> int:
        return self.batch * (self.length - 1)


@dataclass(frozen=True)
class Course:
    """Bytes beyond weights and gradients after each allocation of a step, and of the LM head's tile among them."""

    live: torch.Tensor
    tile: int

    @property
    def peak(self) -> int:
        return int(self.live.max())


class Rehearsal:
    """A model of `weightless` on which steps are run; it is used up by it.

    Args:
        autocast: number format of mixed precision; None for none.
        on_gpu: TRL's LM head as it runs there, in tiles of the library's width; else in tiles of `vocabulary_tile`.
    """

    def __init__(self, model: PeftModel, *, autocast: torch.dtype | None, on_gpu: bool, vocabulary_tile: int) -> None:
        self._model, self._autocast, self._on_gpu = model, autocast, on_gpu
        width: int = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
        self._width = width if on_gpu else min(width, vocabulary_tile)
        model.enable_input_require_grads()
        self._fake = FakeTensorMode()
        with self._fake:
            _give_shapes(model, unpacked=model.get_base_model().config.dtype)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)

    def course(self, step: Step) -> Course:
        """Runs a step. Gradients count as already there, as they are from the second batch of accumulation on.

        Raises:
            UnknownModelError: the model asks for numbers, as one with experts may.
        """
        try:
            return self._course(step)
        except Exception as error:  # whatever the code of a model raises that misses its numbers
            kind = self._model.config.model_type
            raise UnknownModelError(
                f"A step of {kind} cannot be run without its numbers ({first_sentence(error)})."
            ) from error

    def _course(self, step: Step) -> Course:
        model = self._model
        model.train(step.training)
        if step.checkpointing and step.training:
            model.get_base_model().gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=_selective_kwargs() if step.selective else {"use_reentrant": False},
                **({"every_n_layers": step.every_n_layers} if step.every_n_layers > 1 else {}),
            )
        else:
            model.gradient_checkpointing_disable()
        parameters = list(model.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        with (
            self._fake,
            LiveBytes([*parameters, *model.buffers(), *gradients]) as counted,
            torch.set_grad_enabled(step.training),
        ):
            with torch.autocast("cpu", self._autocast) if self._autocast else nullcontext():
                loss, tile = self._forward(step)
            if step.training:
                loss.backward()
        return Course(torch.tensor(counted.course), tile)

    def _forward(self, step: Step) -> tuple[torch.Tensor, int]:
        """The loss, and bytes of the head's tile."""
        base = self._model.get_base_model()
        ids = torch.zeros(step.batch, step.length, dtype=torch.long)
        hidden = base.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        head = base.get_output_embeddings()
        scored = torch.zeros(step.labelled, dtype=torch.long)
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, scored)
        if self._on_gpu:
            picked = picked.to(self._autocast or picked.dtype)
            log_probs = _TritonHead.apply(picked, self._width)
        else:
            log_probs = ChunkedLogProbFunction.apply(
                picked, head.weight, head.bias, scored, 1.0, self._width, None, 1.0, ("entropy", "is_top1")
            )[0]
        return log_probs.sum(), min(step.labelled, TOKEN_CHUNK_SIZE) * self._width * picked.element_size()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live; `course` has them after each new one.

    Args:
        held: tensors that are there already and do not count.
    """

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.course = [0]
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
        self.course.append(self.now)


class _TritonHead(torch.autograd.Function):
    """Allocations of TRL's `ChunkedLogProbFunction` (1.16) where its Triton kernels run: one tile, folded in place."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, width: int) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.width = width
        tile = hidden.new_empty(min(len(hidden), TOKEN_CHUNK_SIZE), width)
        statistics = hidden.new_zeros(8, len(hidden), dtype=torch.float32)
        return statistics[0] + tile[0, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        gradient = torch.zeros_like(hidden, dtype=torch.float32)
        tile = hidden.new_empty(min(len(hidden), TOKEN_CHUNK_SIZE), ctx.width)
        gradient[0, 0] += tile[0, 0]
        return gradient.to(hidden.dtype), None


class _Packed(torch.nn.Module):
    """In the place of a quantised matrix: the same bytes held, the same ones made and kept in a step."""

    def __init__(self, replaced: Linear4bit | Linear8bitLt, unpacked: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.four_bit = isinstance(replaced, Linear4bit)
        self.compute_dtype = getattr(replaced, "compute_dtype", None)
        self.bias, self._unpacked = replaced.bias, unpacked

    @property
    def weight(self) -> torch.Tensor:
        """Unpacked: what is no parameter, PEFT's `dequantize_module_weight` hands to DoRA as it is."""
        return torch.empty(self.out_features, self.in_features, dtype=self._unpacked)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x.dtype
        dtype = self.compute_dtype or (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else given)
        out = _PackedProduct.apply(x.to(dtype), self.out_features, self.four_bit)
        out = out if self.bias is None else out + self.bias.to(dtype)
        return out.to(given)


class _PackedProduct(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit and MatMul8bitLt (0.50): nothing is kept; backward unpacks the whole matrix."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: int, four_bit: bool) -> torch.Tensor:
        ctx.shape = (rows, x.shape[-1])
        # 4 bit is unpacked here too where rows are many; 8 bit packs the input instead.
        matrix = x.new_empty(ctx.shape) if four_bit else x.new_empty(x.shape, dtype=torch.int8)
        return x.new_empty(*x.shape[:-1], rows) + matrix.flatten()[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None, None


def _selective_kwargs() -> dict[str, Any]:
    """What TRL hands to `gradient_checkpointing_enable` for selective checkpointing, caught on its way."""
    caught: dict[str, Any] = {}

    def enable(gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        caught.update(gradient_checkpointing_kwargs)

    model = SimpleNamespace(gradient_checkpointing_enable=enable)
    enable_selective_activation_checkpointing(model)
    model.gradient_checkpointing_enable()
    return caught


def _give_shapes(model: torch.nn.Module, unpacked: torch.dtype) -> None:
    """Replaces what is on the meta device by fake tensors of a CPU, so that autocast and kernels choose as they do."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (Linear4bit, Linear8bitLt)) and not hasattr(child, "base_layer"):
                setattr(module, name, _Packed(child, unpacked))
    kept: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in kept:
                    shaped = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    kept[id(parameter)] = torch.nn.Parameter(shaped, requires_grad=parameter.requires_grad)
                module._parameters[name] = kept[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
