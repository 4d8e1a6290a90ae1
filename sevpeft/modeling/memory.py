"""Turns a recipe and its base model's numbers into bytes: what a training holds, item by item.

Weights, adapter, gradients and optimiser state are counted on the real modules (`skeleton`), what a step needs on top
is measured by running it without numbers (`step_memory`), for the worst batch there can be: every row `max_length`
long. Layers that are alike are run once or twice and the rest is extended, which is exact because a step keeps the same
for each; where the adapter differs from layer to layer, all are run. So are batches: every allocation of a step grows
evenly with its rows.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers import PretrainedConfig
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from sevpeft.errors import UnknownModelError
from sevpeft.modeling.hardware import dtype_of_cpu
from sevpeft.modeling.skeleton import extension, layers_are_alike, weightless
from sevpeft.modeling.step_memory import Course, Rehearsal, Step
from sevpeft.recipe import AUTO, Recipe

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
        """What is still `auto` counts as the split that needs the least memory.

        Raises UnknownModelError: the recipe sets no length that a row can have at most.
        """
        settings: dict[str, Any] = {
            name: {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}.get(name, True)
            if value == AUTO
            else value
            for name, value in recipe.training.settings().items()
        }
        if settings["max_length"] is None:
            raise UnknownModelError("training.max_length=null leaves open how long a row is; write a number of tokens.")
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

    @property
    def step(self) -> Step:
        """A training step of it."""
        return Step(
            self.batch,
            self.length,
            self.checkpointing,
            selective=self.selective,
            every_n_layers=self.every_n_layers,
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
class Peak:
    """Bytes that a step needs at its highest: in all, and of the LM head's tile that stands apart."""

    total: int
    tile: int


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
        on_gpu: a CUDA GPU in bfloat16 (float16 needs the same); else a CPU, in the format that it computes in.
        vocabulary_tile: columns of the LM head that a CPU scores at once.
    """

    def __init__(self, recipe: Recipe, config: PretrainedConfig, *, on_gpu: bool, vocabulary_tile: int) -> None:
        self.recipe, self.config, self.on_gpu = recipe, config, on_gpu
        self.vocabulary_tile = vocabulary_tile
        asked = recipe.model.dtype
        self.dtype = getattr(torch, asked) if asked != "auto" else torch.bfloat16 if on_gpu else dtype_of_cpu()
        self.setting = Setting.of(recipe)
        self._rehearsals: dict[tuple[int, ...], Rehearsal] = {}
        self._courses: dict[tuple[tuple[int, ...], Step], Course] = {}

    @cached_property
    def _whole(self) -> PeftModel:
        return weightless(self.recipe, self.config, self.dtype)

    @cached_property
    def parameters(self) -> Parameters:
        model = self._whole
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
        peak = self._extended(setting.step, self._course)
        # With as many rows it would need less: a training step does all that a validation step does, and keeps more.
        if setting.eval_batch > setting.batch:
            validation = Step(setting.eval_batch, setting.length, False, training=False)
            peak = max(peak, self._extended(validation, self._course), key=lambda found: found.total)
        return self._budget(setting, peak)

    def _budget(self, setting: Setting, peak: Peak) -> Budget:
        count = self.parameters
        items = {
            "base model, packed": self._packed_bytes(),
            f"base model, {_bits(self.dtype)} bit": count.unpacked * self.dtype.itemsize,
            "adapter": count.trainable * 4,
            "gradients": count.trainable * 4,
            "optimizer state": round(count.trainable * state_bytes(setting.optim)),
            "activations": peak.total - peak.tile,
            "logits tile": peak.tile,
        }
        if self.on_gpu:
            held = sum(items.values())
            items["CUDA context, fragmentation"] = CUDA_CONTEXT + round(FRAGMENTATION * held)
        return Budget({name: size for name, size in items.items() if size})

    def with_recipe(self, recipe: Recipe) -> MemoryPlan:
        """The same base model and device under another recipe; what was run is shared where the model is the same."""
        if any(getattr(recipe, name) != getattr(self.recipe, name) for name in ("model", "quantization", "lora")):
            return MemoryPlan(recipe, self.config, on_gpu=self.on_gpu, vocabulary_tile=self.vocabulary_tile)
        plan = copy.copy(self)
        plan.recipe, plan.setting = recipe, Setting.of(recipe)
        return plan

    def largest_batch(self, available: int) -> int:
        """The most rows of the recipe's length that fit in so many bytes; 0 when none does, at most 1,024."""
        return bisect_right(range(1, LARGEST_BATCH + 1), available, key=self.total_of_batch)

    def total_of_batch(self, batch: int, checkpointing: bool | None = None) -> int:
        """Bytes with a batch of the recipe's length; validation is taken to have no more rows.

        Args:
            checkpointing: None for the recipe's own.
        """
        way = self.setting.checkpointing if checkpointing is None else checkpointing
        setting = replace(self.setting, batch=batch, eval_batch=0, checkpointing=way)
        return self._budget(setting, self._extended(setting.step, self._course_between)).total

    def total_of_validation(self, batch: int) -> int:
        """Bytes while so many rows of the recipe's length are validated."""
        step = Step(batch, self.setting.length, False, training=False)
        return self._budget(self.setting, self._extended(step, self._course)).total

    def _packed_bytes(self) -> int:
        asked, numbers = self.recipe.quantization, self.parameters.packed
        if not numbers:
            return 0
        if asked.load_in_8bit:
            return round(numbers * (1 + 4 / self.config.get_text_config().hidden_size))
        maxima = numbers / _BLOCK
        scales = maxima * (1 + 4 / _NESTED_BLOCK) if asked.bnb_4bit_use_double_quant else maxima * 4
        return round(numbers / 2 + scales)

    def _extended(self, step: Step, course: Callable[[list[int], Step], Course]) -> Peak:
        """Of the whole model, from a few of its layers.

        A step of n layers needs a + b·n bytes, with a b for each kind of layer.
        """
        few, more = extension(self.config, step.every_n_layers, alike=self._layers_are_alike)
        first = course(few, step)
        total: float = first.peak
        for layers, times in more:
            total += times * (course(layers + few, step).peak - first.peak)
        return Peak(round(total), first.tile)

    @cached_property
    def _layers_are_alike(self) -> bool:
        return layers_are_alike(self._whole)

    def _course(self, layers: list[int], step: Step) -> Course:
        key = (tuple(layers), step)
        if key not in self._courses:
            self._courses[key] = self._rehearsal(layers).course(step)
        return self._courses[key]

    def _course_between(self, layers: list[int], step: Step) -> Course:
        """From two other batches, as each allocation is a + b·rows; but the LM head's tile grows to its full height.

        One row is a case of its own, because PyTorch copies less of it. Where the number of allocations depends on the
        rows, as in the tiles of a CPU, the batch itself is run.
        """
        full = -(-TOKEN_CHUNK_SIZE // (step.length - 1))
        below, above = (full, 2 * full) if step.batch >= full else (2, full - 1)
        if step.batch > 1 and below < above:
            one, two = (self._course(layers, replace(step, batch=batch)) for batch in (below, above))
            if len(one.live) == len(two.live):
                share = (step.batch - below) / (above - below)
                live = one.live + (two.live - one.live) * share
                return Course(live, round(one.tile + (two.tile - one.tile) * share))
        return self._course(layers, step)

    def _rehearsal(self, layers: list[int]) -> Rehearsal:
        key = tuple(layers)
        if key not in self._rehearsals:
            self._rehearsals[key] = Rehearsal(
                weightless(self.recipe, self.config, self.dtype, layers=layers),
                autocast=torch.bfloat16
                if self.dtype == torch.bfloat16 or (self.on_gpu and self.dtype != torch.float32)
                else None,
                on_gpu=self.on_gpu,
                vocabulary_tile=self.vocabulary_tile,
            )
        return self._rehearsals[key]


def state_bytes(optim: str) -> float:
    """Bytes of optimiser state for a trainable number; those of AdamW for one that is not known."""
    return next((size for pattern, size in _STATE_BYTES if re.fullmatch(pattern, optim)), _ADAMW_STATE)


def _bits(dtype: torch.dtype) -> int:
    return dtype.itemsize * 8
