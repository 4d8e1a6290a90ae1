"""Turns a recipe into what a training would do: data, truncation, severity weights and steps, without a step taken.

It makes the same table and the same weights as `train`, by the same functions. Where the base model's tokenizer is not
at hand (offline, gated), the plan is made without it and says what is then unknown.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sevpeft.errors import ModelError
from sevpeft.modeling.loading import load_config, load_tokenizer
from sevpeft.recipe import Recipe
from sevpeft.severity.weighting import WeightSummary
from sevpeft.training.announcement import announce_data
from sevpeft.training.preparation import load_splits, prepare, prompt_of, source_index, summary_of, weigh
from sevpeft.training.progress import say


@dataclass(frozen=True)
class Plan:
    """What `train` would do with the recipe.

    Attributes:
        weights: of the training rows.
        data: as the summary of a run's data; `encoding` is empty without a tokenizer.
        steps: optimiser steps on one process; None while packing makes their number unknown.
        unknown: why nothing is known about tokens; None when all is.
    """

    recipe: Recipe
    weights: WeightSummary
    data: dict[str, Any]
    steps: int | None
    unknown: str | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "data": self.data,
            "weights": self.weights.as_dict(),
            "steps": self.steps,
            "unknown": self.unknown,
        }


def plan(recipe: Recipe) -> Plan:
    """Everything that is known before training.

    Raises:
        SevpeftError: whatever `train` would refuse about the data or the severity.
    """
    settings = recipe.training.settings()
    try:
        prompt = prompt_of(recipe, load_tokenizer(recipe, load_config(recipe)))
    except ModelError as error:
        table, splits, severity = load_splits(recipe)
        _, weights = weigh(recipe, severity, source_index(splits.train))
        steps = None if settings.get("packing") else _steps(len(splits.train), settings)
        return Plan(recipe, weights, summary_of(table, splits, severity, {}), steps, str(error))
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        prepared = prepare(recipe, prompt, Path(scratch))
        return Plan(recipe, prepared.weights, prepared.summary, _steps(len(prepared.train), settings), None)


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
