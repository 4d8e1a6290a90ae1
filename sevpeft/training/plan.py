"""What a training would do: data, weights, steps, memory and time, without a step taken."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset

from sevpeft.errors import ModelError, RunError, UnknownModelError
from sevpeft.modeling.gpus import (
    EFFICIENCY,
    TFLOPS,
    Change,
    Gpu,
    changed,
    changes,
    epoch_seconds,
    savings,
    usable,
    verdicts,
)
from sevpeft.modeling.loading import load_config, load_tokenizer, uses_gpu
from sevpeft.modeling.memory import GIB, Budget, MemoryPlan, Parameters
from sevpeft.recipe import Recipe
from sevpeft.severity.weights import WeightSummary
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import load_splits, prepare, prompt_of, source_index, summary_of, weigh
from sevpeft.training.resolve import (
    is_automatic,
    memory_plan,
    resolve_split,
)

# Letters of a token where the tokenizer is not at hand, on Arabic text: 2.0 for Qwen3, 2.2 for Command-R7B-Arabic, 2.3
# for Fanar, 2.4 for Gemma 3 (published with almaghrabima/SARFTokenizer); one made for English may have fewer than 1.5.
LETTERS_PER_TOKEN = 2.2


@dataclass(frozen=True)
class Plan:
    """What `train` would do with the recipe.

    Attributes:
        weights: of the training rows.
        data: as the summary of a run's data; `encoding` is empty without a tokenizer.
        steps: optimizer steps on one process; None while packing makes their number unknown.
        unknown: why nothing is known about tokens; None when all is.
        fitting: memory on a GPU; None where nothing is known about the base model.
        memory_unknown: why not; None when it is.
        tokens: of the training rows; without a tokenizer, an estimate from their letters.
        epoch_seconds: on a GPU of `tflops` peak at `efficiency`; None where the model is not known.
    """

    recipe: Recipe
    weights: WeightSummary
    data: dict[str, Any]
    steps: int | None
    unknown: str | None
    fitting: Fitting | None
    tokens: int
    epoch_seconds: float | None
    tflops: float
    efficiency: float
    memory_unknown: str | None

    @property
    def letters_per_token(self) -> float | None:
        """That were assumed, where tokens could not be counted."""
        return None if self.unknown is None else LETTERS_PER_TOKEN

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "data": self.data,
            "weights": self.weights.as_dict(),
            "steps": self.steps,
            "unknown": self.unknown,
            "memory": None if self.fitting is None else self.fitting.as_dict(),
            "memory_unknown": self.memory_unknown,
            "time": {
                "tokens": self.tokens,
                "tokens_estimated": self.unknown is not None,
                "epoch_seconds": self.epoch_seconds,
                "tflops": self.tflops,
                "efficiency": self.efficiency,
            },
        }


def plan(recipe: Recipe, *, vram: float | None = None, tflops: float = TFLOPS, efficiency: float = EFFICIENCY) -> Plan:
    """Everything that is known before training.

    Args:
        vram: GB of the GPU that the memory is compared with.
        tflops: dense peak of the GPU in bfloat16, TFLOP/s. efficiency: share of it that is reached.

    Raises:
        SevpeftError: whatever `train` would refuse about the data, the severity, the prompt or the adapter.
    """
    rate: dict[str, Any] = {"tflops": tflops, "efficiency": efficiency}
    memory_unknown = None
    try:
        found, memory = fitting(recipe, vram)
    except UnknownModelError as error:
        found, memory, memory_unknown = None, None, str(error)
    recipe = memory.recipe if memory is not None else resolve_split(recipe, None, 0)
    settings = recipe.training.settings()
    assumed: dict[str, Any] = {**rate, "memory_unknown": memory_unknown}
    try:
        tokenizer = load_tokenizer(recipe, load_config(recipe))
    except ModelError as error:
        table, splits, severity = load_splits(recipe)
        _, weights = weigh(recipe, severity, source_index(splits.train))
        steps = None if settings.get("packing") else _steps(len(splits.train), settings)
        data = summary_of(table, splits, severity, {})
        tokens, labeled = _estimated_tokens(splits.train, settings["max_length"])
        seconds = epoch_seconds(memory, tokens, labeled, len(splits.train), **rate) if memory else None
        return Plan(recipe, weights, data, steps, str(error), found, tokens, seconds, **assumed)
    prompt = prompt_of(recipe, tokenizer)
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        prepared = prepare(recipe, prompt, Path(scratch))
        tokens, labeled = _tokens(prepared.train)
        seconds = epoch_seconds(memory, tokens, labeled, len(prepared.train), **rate) if memory else None
        steps = _steps(len(prepared.train), settings)
        return Plan(recipe, prepared.weights, prepared.summary, steps, None, found, tokens, seconds, **assumed)


def _tokens(train: Dataset) -> tuple[int, int]:
    """Tokens of the training rows, and how many of them are learned."""
    tokens = labeled = 0
    for table in train.select_columns(["labels"]).with_format("arrow").iter(batch_size=2000):
        labels = pc.list_flatten(table["labels"].combine_chunks())
        tokens += len(labels)
        labeled += pc.sum(pc.not_equal(labels, IGNORED)).as_py() or 0
    return tokens, labeled


def _estimated_tokens(train: Dataset, max_length: int | None) -> tuple[int, int]:
    """Tokens of the training rows, and how many of them are learned, from their letters."""
    tokens = labeled = 0.0
    for table in train.select_columns(["question", "answer"]).with_format("arrow").iter(batch_size=2000):
        question, answer = (pc.utf8_length(table[name]).to_numpy() / LETTERS_PER_TOKEN for name in table.column_names)
        tokens += np.minimum(question + answer, max_length or np.inf).sum()
        labeled += np.minimum(answer, max_length or np.inf).sum()
    return round(tokens), round(labeled)


def _steps(rows: int, settings: dict[str, Any]) -> int:
    """Trainer's own count: batches are cut first, then grouped, and the last group of an epoch may be short."""
    limit = settings.get("max_steps", -1)
    if limit and limit > 0:
        return int(limit)
    batches = math.ceil(rows / settings["per_device_train_batch_size"])
    if settings.get("dataloader_drop_last"):
        batches = rows // settings["per_device_train_batch_size"]
    each = max(1, math.ceil(batches / settings["gradient_accumulation_steps"]))
    return math.ceil(each * settings["num_train_epochs"])


# GB of the GPU that `plan` chooses a split for, where neither --vram nor the recipe names one.
_GPU_OF_PLAN = 24


@dataclass(frozen=True)
class Fitting:
    """What a training holds in memory, and where it fits.

    Attributes:
        origin: where the base model's numbers come from.
        split_for: GB of the GPU that batch and checkpointing were chosen for; None where the recipe sets them.
        vram: GB that were asked about; None for none.
        changes: that make it fit there.
        bits: of a quantized base; None for 16 or 32.
    """

    origin: str
    parameters: Parameters
    batch: int
    length: int
    checkpointing: bool
    split_for: float | None
    number_format: str
    budget: Budget
    cards: list[Gpu]
    vram: float | None
    changes: list[Change]
    bits: int | None

    @property
    def fits(self) -> bool:
        return self.vram is None or self.budget.total <= usable(self.vram)

    def as_dict(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "parameters": {**asdict(self.parameters), "base": self.parameters.base},
            "batch": self.batch,
            "length": self.length,
            "checkpointing": self.checkpointing,
            "split_for": self.split_for,
            "number_format": self.number_format,
            "bytes": {**self.budget.items, "total": self.budget.total},
            "cards": [asdict(card) for card in self.cards],
            "vram": self.vram,
            "fits": self.fits,
            "changes": [asdict(change) for change in self.changes],
        }


def fitting(recipe: Recipe, vram: float | None = None) -> tuple[Fitting, MemoryPlan]:
    """What the recipe needs on a GPU, and on which GPUs it fits.

    Args:
        vram: GB of a GPU to judge; the batch split is chosen for it, or else for the GPU that the recipe names.

    Raises:
        UnknownModelError: neither a config.json nor numbers in the recipe.
        ModelError: PEFT refuses the adapter, or a module that is named does not exist.
    """
    smallest, origin = memory_plan(recipe)  # of all splits of a step, where the recipe leaves it open
    gb = vram or recipe.about.vram_gib or _GPU_OF_PLAN
    resolved = resolve_split(recipe, smallest, usable(gb))
    plan = smallest.with_recipe(resolved)
    return (
        Fitting(
            origin=origin,
            parameters=plan.parameters,
            batch=plan.setting.batch,
            length=plan.setting.length,
            checkpointing=plan.setting.checkpointing,
            split_for=gb if is_automatic(recipe) else None,
            number_format=str(plan.dtype).removeprefix("torch."),
            budget=plan.budget(),
            cards=verdicts(smallest),
            vram=vram,
            changes=[] if vram is None else changes(plan, vram),
            bits=4 if recipe.quantization.load_in_4bit else 8 if recipe.quantization.load_in_8bit else None,
        ),
        plan,
    )


def memory_is_full(recipe: Recipe, run: Path) -> RunError:
    """What to say when a step did not fit: what the plan would change first, and whether the run can go on."""
    gpu = uses_gpu(recipe)
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if gpu else 0
    try:
        # The trainer reports a full memory in validation, with another remedy.
        plan, _ = memory_plan(changed(recipe, ("training.per_device_eval_batch_size=1",)), on_gpu=gpu)
        advice = next(savings(plan, whole / GIB / 0.95), None)
    except ModelError:
        advice = None
    where = f"The GPU's {whole / GIB:.0f} GiB are" if gpu else "This computer's memory is"
    if advice is None:
        return RunError(f"{where} full; close what else uses it, or choose a smaller base model.")
    found = f"{' '.join(advice.settings)} ({advice.effect}; by the plan {advice.total / GIB:.1f} GiB then)"
    return RunError(
        f"{where} full; start another run with {found}. Checkpoints of {run} are kept; "
        "training.auto_find_batch_size=true cuts a batch that does not fit in parts by itself, for the same step."
    )
