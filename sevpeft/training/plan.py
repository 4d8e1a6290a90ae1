"""Turns a recipe into what a training would do: data, truncation, weights, steps and memory, without a step taken.

It makes the same table and the same weights as `train`, by the same functions. Where the base model's tokenizer is not
at hand (offline, gated), the plan is made without it and says what is then unknown.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from rich.console import Console

from sevpeft.errors import ModelError, UnknownModelError
from sevpeft.modeling.gpus import EFFICIENCY, TFLOPS, epoch_seconds
from sevpeft.modeling.loading import load_config, load_tokenizer
from sevpeft.recipe import Recipe
from sevpeft.severity.weighting import WeightSummary
from sevpeft.training.announcement import announce_data
from sevpeft.training.batch_split import resolve_split
from sevpeft.training.fitting import Fitting, announce_fitting, announce_time, fitting
from sevpeft.training.preparation import load_splits, prepare, prompt_of, source_index, summary_of, weigh
from sevpeft.training.progress import say
from sevpeft.training.trainer import IGNORED

# Letters of a token where the tokenizer is not at hand, on Arabic text: 2.0 for Qwen3, 2.2 for Command-R7B-Arabic, 2.3
# for Fanar, 2.4 for Gemma 3 (published with almaghrabima/SARFTokenizer); one made for English may have fewer than 1.5.
LETTERS_PER_TOKEN = 2.2


@dataclass(frozen=True)
class Plan:
    """What `train` would do with the recipe.

    Attributes:
        weights: of the training rows.
        data: as the summary of a run's data; `encoding` is empty without a tokenizer.
        steps: optimiser steps on one process; None while packing makes their number unknown.
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
        vram: GB of a card to judge the memory by.
        tflops: dense peak of the card in bfloat16, TFLOP/s. efficiency: share of it that is reached.

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
        tokens, labelled = _estimated_tokens(splits.train, settings["max_length"])
        seconds = epoch_seconds(memory, tokens, labelled, len(splits.train), **rate) if memory else None
        return Plan(recipe, weights, data, steps, str(error), found, tokens, seconds, **assumed)
    prompt = prompt_of(recipe, tokenizer)
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        prepared = prepare(recipe, prompt, Path(scratch))
        tokens, labelled = _tokens(prepared.train)
        seconds = epoch_seconds(memory, tokens, labelled, len(prepared.train), **rate) if memory else None
        steps = _steps(len(prepared.train), settings)
        return Plan(recipe, prepared.weights, prepared.summary, steps, None, found, tokens, seconds, **assumed)


def _tokens(train: Dataset) -> tuple[int, int]:
    """Tokens of the training rows, and how many of them are learnt."""
    tokens = labelled = 0
    for table in train.select_columns(["labels"]).with_format("arrow").iter(batch_size=2000):
        labels = pc.list_flatten(table["labels"].combine_chunks())
        tokens += len(labels)
        labelled += pc.sum(pc.not_equal(labels, IGNORED)).as_py() or 0
    return tokens, labelled


def _estimated_tokens(train: Dataset, max_length: int | None) -> tuple[int, int]:
    """Tokens of the training rows, and how many of them are learnt, from their letters."""
    tokens = labelled = 0.0
    for table in train.select_columns(["question", "answer"]).with_format("arrow").iter(batch_size=2000):
        question, answer = (pc.utf8_length(table[name]).to_numpy() / LETTERS_PER_TOKEN for name in table.column_names)
        tokens += np.minimum(question + answer, max_length or np.inf).sum()
        labelled += np.minimum(answer, max_length or np.inf).sum()
    return round(tokens), round(labelled)


def announce_plan(found: Plan, console: Console) -> None:
    """Prints a plan as `train` prints its beginning."""
    recipe = found.recipe
    say(console, "Base model", recipe.model.name_or_path)
    announce_data(found.data, found.weights, recipe, console)
    settings = recipe.training.settings()
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    if found.steps is not None:
        say(console, "Training", f"{found.steps:,} steps of {batch} rows on one process")
    if found.unknown is not None:
        say(
            console, "Unknown", f"how many questions are shortened and answers refused: {found.unknown}", style="yellow"
        )
    if found.memory_unknown is not None and found.memory_unknown != found.unknown:
        say(console, "Unknown", f"memory and cards: {found.memory_unknown}", style="yellow")
    if found.fitting is not None:
        announce_fitting(found.fitting, console)
    if found.epoch_seconds is not None:
        letters = LETTERS_PER_TOKEN if found.unknown is not None else None
        announce_time(found.epoch_seconds, found.tokens, letters, console, found.tflops, found.efficiency)


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
