"""Turns a recipe and its base model's numbers into bytes: what a training holds, item by item.

Weights, adapter, gradients and optimiser state are counted on the real modules (`skeleton`), what a step needs on top
is measured by running it without numbers (`step_memory`), for the worst batch there can be: every row `max_length`
long. Layers that are alike are run once or twice and the rest is extended, which is exact because a step keeps the same
for each.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import PretrainedConfig
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from sevpeft.modeling.skeleton import layer_count, period, weightless
from sevpeft.modeling.step_memory import Peak, Rehearsal, Step
from sevpeft.recipe import Recipe

GIB = 2**30
# Blocks of bitsandbytes: numbers that share an absolute maximum, and maxima that share one when packed twice.
_BLOCK, _NESTED_BLOCK = 64, 256
# What the CUDA runtime, cuBLAS and the loaded kernels take, and what the allocator loses between blocks. Allowances,
# not measurements; `tests/gpu` compares the sum with a real card.
CUDA_CONTEXT = round(0.6 * GIB)
FRAGMENTATION = 0.05
# Bytes of optimiser state for each trainable number, by the name that training.optim gives.
_STATE_BYTES = (
    (r"(paged_)?adamw_8bit|adamw_bnb_8bit", 2.03),
    (r"(paged_)?ademamix_8bit", 3.05),
    (r"(paged_)?(lion|rmsprop_bnb)_8bit|rmsprop_bnb_8bit", 1.02),
    (r"(paged_)?lion(_32bit)?|lion_32bit|rmsprop.*|adagrad|sgd_momentum", 4),
    (r"(paged_)?ademamix(_32bit)?", 12),
    (r"adafactor", 0.1),
    (r"sgd|lomo|adalomo|grokadamw", 0),
)
_ADAMW_STATE = 8.0
LARGEST_BATCH = 1024


@dataclass(frozen=True)
class Setting:
    """What of a recipe decides the memory of a step, so that another can be tried."""

    batch: int
    length: int
    eval_batch: int
    checkpointing: bool
    optim: str
    selective: bool = False
    """Checkpointing that keeps the outputs of attention."""
    every_n_layers: int = 1
    """Of so many layers one is checkpointed."""

    @classmethod
    def of(cls, recipe: Recipe) -> Setting:
        settings = recipe.training.settings()
        checkpointing = settings.get("gradient_checkpointing")
        how = settings.get("gradient_checkpointing_kwargs") or {}
        return cls(
            batch=settings["per_device_train_batch_size"],
            length=settings["max_length"],
            eval_batch=settings["per_device_eval_batch_size"] if settings["eval_strategy"] != "no" else 0,
            checkpointing=True if checkpointing is None else bool(checkpointing),
            optim=str(settings.get("optim") or "adamw_torch"),
            selective=bool(how.get("selective")),
            every_n_layers=int(how.get("every_n_layers", 1)),
        )


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model: of the base (total), packed by bitsandbytes, in full precision, and of the adapter."""

    packed: int
    unpacked: int
    trainable: int
    embedding: int
    """Of the table that tokens are looked up in."""
    head: int
    """Of the matrix that scores the vocabulary; the same numbers as `embedding` where the two are tied."""
    tied: bool
    targets: dict[str, int]
    """Last name of an adapted module → how many there are."""

    @property
    def base(self) -> int:
        return self.packed + self.unpacked

    @property
    def blocks(self) -> int:
        """All but embedding and head: what every token is multiplied with."""
        return self.base - self.embedding - (0 if self.tied else self.head)


@dataclass(frozen=True)
class Budget:
    """Bytes by item, in the order in which they are shown."""

    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())


class MemoryPlan:
    """What a training of the recipe's adapter holds in memory.

    Args:
        config: of the base model.
        on_gpu: a CUDA card in bfloat16 (a float16 card needs the same); else a CPU in float32.
        vocabulary_tile: columns of the LM head that a CPU scores at once.
    """

    def __init__(self, recipe: Recipe, config: PretrainedConfig, *, on_gpu: bool, vocabulary_tile: int) -> None:
        self.recipe, self.config, self.on_gpu = recipe, config, on_gpu
        self.vocabulary_tile = vocabulary_tile
        asked = recipe.model.dtype
        self.dtype = getattr(torch, asked) if asked != "auto" else torch.bfloat16 if on_gpu else torch.float32
        self.setting = Setting.of(recipe)
        self._rehearsals: dict[int, Rehearsal] = {}
        self._peaks: dict[Step, Peak] = {}

    @cached_property
    def parameters(self) -> Parameters:
        model = weightless(self.recipe, self.config, self.dtype)
        packed = unpacked = trainable = 0
        seen: set[int] = set()
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if parameter.requires_grad:
                    trainable += parameter.numel()
                elif isinstance(module, (Linear4bit, Linear8bitLt)) and parameter.ndim == 2:
                    packed += parameter.numel()
                else:
                    unpacked += parameter.numel()
        base = model.get_base_model()
        embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
        targets: dict[str, int] = {}
        for name in model.targeted_module_names:
            last = name.rsplit(".", 1)[-1]
            targets[last] = targets.get(last, 0) + 1
        return Parameters(
            packed=packed,
            unpacked=unpacked,
            trainable=trainable,
            embedding=embedding.numel(),
            head=head.numel(),
            tied=embedding is head,
            targets=dict(sorted(targets.items())),
        )

    def budget(self, setting: Setting | None = None) -> Budget:
        """Bytes of the recipe's own setting, or of another one."""
        setting = setting or self.setting
        count = self.parameters
        step = self._peak(
            Step(
                setting.batch,
                setting.length,
                setting.checkpointing,
                selective=setting.selective,
                every_n_layers=setting.every_n_layers,
            )
        )
        if setting.eval_batch:
            check = self._peak(Step(setting.eval_batch, setting.length, False, training=False))
            step = max(step, check, key=lambda peak: peak.total)
        items = {
            "base model, packed": self._packed_bytes(),
            f"base model, {_bits(self.dtype)} bit": count.unpacked * self.dtype.itemsize,
            "adapter": count.trainable * 4,
            "gradients": count.trainable * 4,
            "optimizer state": round(count.trainable * state_bytes(setting.optim)),
            "activations": step.total - step.tile,
            "logits tile": step.tile,
        }
        if self.on_gpu:
            held = sum(items.values())
            items["CUDA context, fragmentation"] = CUDA_CONTEXT + round(FRAGMENTATION * held)
        return Budget({name: size for name, size in items.items() if size})

    def with_recipe(self, recipe: Recipe) -> MemoryPlan:
        """The same base model and device under another recipe."""
        return MemoryPlan(recipe, self.config, on_gpu=self.on_gpu, vocabulary_tile=self.vocabulary_tile)

    def largest_batch(self, available: int) -> int:
        """The most rows of a batch of the recipe's length that fit in so many bytes, at most 1,024; 0 when none does.

        Powers of two are planned, up to where the LM head's tile has its full height; from there on a row adds about
        the same. What that promises is planned too, and where it is too much, the line between the two is taken.
        """
        if self._total(1) > available:
            return 0
        fits, size = 1, 2
        while self._total(size) <= available and size * self.setting.length < 4 * TOKEN_CHUNK_SIZE:
            fits, size = size, 2 * size
        for _ in range(2):
            each = (self._total(size) - self._total(fits)) / (size - fits)
            size = min(fits + int((available - self._total(fits)) / each), LARGEST_BATCH)
            if size == fits or self._total(size) <= available:
                return size
        return fits

    def _total(self, batch: int) -> int:
        """Of a batch of the recipe's length; validation is taken to have no more rows."""
        eval_batch = min(self.setting.eval_batch, batch)
        return self.budget(replace(self.setting, batch=batch, eval_batch=eval_batch)).total

    def _packed_bytes(self) -> int:
        asked, numbers = self.recipe.quantization, self.parameters.packed
        if not numbers:
            return 0
        if asked.load_in_8bit:
            return round(numbers * (1 + 4 / self.config.get_text_config().hidden_size))
        maxima = numbers / _BLOCK
        scales = maxima * (1 + 4 / _NESTED_BLOCK) if asked.bnb_4bit_use_double_quant else maxima * 4
        return round(numbers / 2 + scales)

    def _peak(self, step: Step) -> Peak:
        """Of the whole model, from its first layers.

        A step of n layers needs a + b·n bytes. Two counts of layers give a and b.
        """
        if step not in self._peaks:
            every, repeated = layer_count(self.config), math.lcm(period(self.config), step.every_n_layers)
            few = max(2, repeated)
            few = few if few + repeated <= every else every
            peak = self._rehearsal(few).peak(step)
            if few < every:
                more = self._rehearsal(few + repeated).peak(step)
                slope = (more.total - peak.total) / repeated
                peak = Peak(round(peak.total + slope * (every - few)), peak.tile)
            self._peaks[step] = peak
        return self._peaks[step]

    def _rehearsal(self, layers: int) -> Rehearsal:
        if layers not in self._rehearsals:
            self._rehearsals[layers] = Rehearsal(
                weightless(self.recipe, self.config, self.dtype, layers=layers),
                autocast=torch.bfloat16 if self.on_gpu and self.dtype != torch.float32 else None,
                on_gpu=self.on_gpu,
                vocabulary_tile=self.vocabulary_tile,
            )
        return self._rehearsals[layers]


def state_bytes(optim: str) -> float:
    """Bytes of optimiser state for a trainable number; those of AdamW for one that is not known."""
    return next((size for pattern, size in _STATE_BYTES if re.fullmatch(pattern, optim)), _ADAMW_STATE)


def _bits(dtype: torch.dtype) -> int:
    return dtype.itemsize * 8
