"""What a training would do: data, weights, steps, memory and time, without a step taken."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from sevpeft.data.columns import TURNS
from sevpeft.data.read import load_consultations
from sevpeft.errors import UnknownModelError
from sevpeft.modeling import memory
from sevpeft.modeling.loading import resolve_model
from sevpeft.recipe import Recipe
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.source import EVIDENCE, classify_rows, load_source
from sevpeft.severity.weights import WeightSummary
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import lengths_of, load_splits, prepare, source_index, summary_of, weigh
from sevpeft.training.resolve import is_automatic, memory_plan, resolve_split, with_training


@dataclass(frozen=True)
class Plan:
    """What `train` would do with the recipe.

    Attributes:
        weights: of the training rows.
        data: as the summary of a run's data; `encoding` is empty without a tokenizer.
        steps: optimizer steps on one process; None where packing or curriculum.epochs_per_stage leave them open.
        unknown, memory_unknown: why nothing is known about tokens, and about memory.
        fitting, tokens, epoch_seconds: on a GPU, of the training rows; None where they are not known.
    """

    recipe: Recipe
    weights: WeightSummary
    data: dict[str, Any]
    steps: int | None
    unknown: str | None
    fitting: Fitting | None
    memory_unknown: str | None
    tokens: int | None
    epoch_seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        names = ("data", "steps", "unknown", "memory_unknown", "tokens", "epoch_seconds")
        return {
            **{name: getattr(self, name) for name in names},
            "recipe": self.recipe.model_dump(mode="json"),
            "weights": self.weights.as_dict(),
            "memory": self.fitting and self.fitting.as_dict(),
        }


@dataclass(frozen=True)
class Fitting:
    """What a training holds in memory, and where it fits.

    Attributes:
        origin: where the base model's numbers come from.
        split_for: GB of the GPU that batch and checkpointing were chosen for; None where the recipe sets them.
        vram, changes: GB that were asked about, and what makes it fit there.
        bits: of a quantized base.
    """

    origin: str
    parameters: memory.Parameters
    batch: int
    length: int
    checkpointing: bool
    split_for: float | None
    number_format: str
    budget: memory.Budget
    gpus: list[memory.Gpu]
    vram: float | None
    changes: list[memory.Change]
    bits: int | None

    @property
    def fits(self) -> bool:
        return self.vram is None or self.budget.total <= memory.usable(self.vram)

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        found["parameters"]["base"] = self.parameters.base
        return {**found, "bytes": {**found.pop("budget")["items"], "total": self.budget.total}, "fits": self.fits}


def plan(recipe: Recipe, *, vram: float | None = None) -> Plan:
    """Everything that is known before training.

    `vram`: GB of the GPU that the memory is compared with.

    Raises SevpeftError: whatever `train` would refuse about the data, the severity, the prompt or the adapter.
    """
    found = held = memory_unknown = unknown = base = tokens = seconds = None
    try:
        found, held = fitting(recipe, vram)
    except UnknownModelError as error:
        memory_unknown = str(error)
    recipe = held.recipe if held is not None else resolve_split(recipe, None, 0)
    settings = recipe.training.settings()
    try:
        base = resolve_model(recipe)
    except UnknownModelError as error:
        unknown = str(error)
    if base is None:
        table, splits, severity = load_splits(recipe)
        _, weights = weigh(recipe, severity, source_index(splits.train))
        data, rows = summary_of(table, splits, severity, {}), len(splits.train)
    else:
        with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
            prepared = prepare(recipe, base.prompt, Path(scratch))
            weights, data, rows = prepared.weights, prepared.summary, len(prepared.train)
            tokens = int(lengths_of(prepared.train).sum())
        if held is not None:
            seconds = memory.epoch_seconds(held, tokens, data["encoding"]["train"]["answer_tokens"], rows)
    open_steps = recipe.curriculum.kind != "none" and recipe.curriculum.epochs_per_stage is not None
    steps = None if open_steps or (base is None and settings.get("packing")) else steps_of(rows, settings)
    return Plan(recipe, weights, data, steps, unknown, found, memory_unknown, tokens, seconds)


def whole_lengths(recipe: Recipe) -> np.ndarray:
    """(n,) tokens of the training rows, in ascending order, as they are without training.max_length."""
    recipe = with_training(resolve_split(recipe, None, 0), max_length=None, packing=False)
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        return np.sort(lengths_of(prepare(recipe, resolve_model(recipe).prompt, Path(scratch)).unpacked))


def training_rows(recipe: Recipe, most: int) -> list[dict[str, Any]]:
    """Up to `most` training rows of each severity, critical first, as the trainer sees them.

    `words` are those that the severity was read from, `pieces` the text by whether its tokens carry loss.
    """
    base, by, shown, draw = resolve_model(recipe), recipe.severity, list[dict[str, Any]](), np.random.default_rng(0)
    table, splits, severity = load_splits(recipe)
    if by.source in ("columns", "weight"):  # `sevpeft annotate` writes its reasons beside them
        judges = load_consultations(recipe.data, keep=[EVIDENCE]).rows
    else:
        judges = classify_rows(table.rows, load_source(by.source, by.classifier, text=by.text))
    reasons = judges[EVIDENCE] if EVIDENCE in judges.column_names else []
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        encoded = prepare(recipe, base.prompt, Path(scratch)).unpacked
        strata = np.asarray(encoded["severity"])
        chosen = [at for of in (2, 1, 0, -1) for at in sorted(draw.permutation(np.flatnonzero(strata == of))[:most])]
        rows = list(encoded.select(chosen))
    for one in rows:
        place, pieces = splits.train[one["source_index"]]["source_index"], list[dict[str, Any]]()
        row, known, lost = table.rows[place], severity is not None and one["severity"] >= 0, one["lost_words"]
        for learned, of in groupby(zip(one["input_ids"], one["labels"], strict=True), lambda pair: pair[1] != IGNORED):
            tokens = [token for token, _ in of]
            pieces.append({"text": base.tokenizer.decode(tokens), "tokens": len(tokens), "learned": learned})
        cut = row["question"].split()[-lost:] if lost and not row.get(TURNS) else []
        found = {"row": row["row"], "severity": SEVERITIES[one["severity"]] if known else "unknown"}
        found |= {"probabilities": severity.probabilities[place].tolist() if severity and known else []}
        found |= {"words": reasons[place] if place < len(reasons) else None, "weight": max(one["token_weights"])}
        shown.append({**found, "pieces": pieces, "cut": " ".join(cut), "lost_words": lost})
    return shown


def steps_of(rows: int, settings: dict[str, Any]) -> int:
    """Trainer's own count: batches are cut first, then grouped, and the last group of an epoch may be short."""
    limit = settings.get("max_steps", -1)
    if limit and limit > 0:
        return int(limit)
    rounded = math.floor if settings.get("dataloader_drop_last") else math.ceil
    batches = rounded(rows / settings["per_device_train_batch_size"])
    each = max(1, math.ceil(batches / settings["gradient_accumulation_steps"]))
    return math.ceil(each * settings["num_train_epochs"])


def fitting(recipe: Recipe, vram: float | None = None) -> tuple[Fitting, memory.MemoryPlan]:
    """What the recipe needs on a GPU, and on which GPUs it fits; raises ModelError as `memory.MemoryPlan` does.

    `vram`: GB of a GPU to judge; the batch split is chosen for it, or else for the GPU that the recipe names.
    """
    smallest, origin = memory_plan(recipe)  # of all splits of a step, where the recipe leaves it open
    gb = vram or recipe.about.vram_gib or 24  # GB
    plan = smallest.with_recipe(resolve_split(recipe, smallest, memory.usable(gb)))
    found = Fitting(
        origin=origin,
        parameters=plan.parameters,
        batch=plan.batch,
        length=plan.length,
        checkpointing=plan.checkpointing,
        split_for=gb if is_automatic(recipe) else None,
        number_format=str(plan.dtype).removeprefix("torch."),
        budget=plan.budget(),
        gpus=memory.verdicts(smallest),
        vram=vram,
        changes=[] if vram is None else memory.changes(plan, vram),
        bits=4 if recipe.quantization.load_in_4bit else 8 if recipe.quantization.load_in_8bit else None,
    )
    return found, plan
