"""Plan of a training, made without a step: data, weights, number of steps, memory and time."""

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
    """What `train` would do with the recipe. None stands for what is not known."""

    recipe: Recipe
    weights: WeightSummary
    data: dict[str, Any]  # section of a run's metrics.json; `encoding` is empty without a tokenizer
    steps: int | None  # on one process; None if packing or curriculum.epochs_per_stage decide
    unknown: str | None  # why `tokens` is None
    fitting: Fitting | None
    memory_unknown: str | None  # why `fitting` is None
    tokens: int | None  # of the training rows
    epoch_seconds: float | None  # on an RTX 4090

    def as_dict(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "fitting"}
        values |= {"recipe": self.recipe.model_dump(mode="json"), "weights": vars(self.weights)}
        return {**values, "memory": self.fitting and self.fitting.as_dict()}


@dataclass(frozen=True)
class Fitting:
    """What a training needs of a GPU's memory, and on which GPUs it fits."""

    origin: str  # source of the base model's config
    parameters: memory.Parameters
    batch: int
    length: int
    checkpointing: bool
    split_for: float | None  # GB of the GPU that batch and checkpointing were chosen for; None if the recipe sets them
    number_format: str
    budget: dict[str, int]  # bytes by item
    gpus: list[memory.Gpu]
    vram: float | None  # GB of the requested GPU
    changes: list[memory.Change]  # that make the training fit there
    bits: int | None  # of a quantized base model

    @property
    def total(self) -> int:
        return sum(self.budget.values())

    @property
    def fits(self) -> bool:
        return self.vram is None or self.total <= memory.usable(self.vram)

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["parameters"]["base"] = self.parameters.base
        return {**values, "bytes": {**values.pop("budget"), "total": self.total}, "fits": self.fits}


def plan(recipe: Recipe, *, vram: float | None = None) -> Plan:
    """The plan of a recipe, compared with a GPU of `vram` GB.

    Raises SevpeftError: what `train` would refuse of the data, the severity, the prompt or the adapter.
    """
    need = memory_of = memory_unknown = unknown = base = tokens = seconds = None
    try:
        need, memory_of = fitting(recipe, vram)
    except UnknownModelError as error:
        memory_unknown = str(error)
    recipe = memory_of.recipe if memory_of is not None else resolve_split(recipe, None, 0)
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
            prepared = prepare(recipe, base.prompt, Path(scratch), base.config)
            weights, data, rows = prepared.weights, prepared.summary, len(prepared.train)
            tokens = int(lengths_of(prepared.train).sum())
        if memory_of is not None:
            seconds = memory.epoch_seconds(memory_of, tokens, data["encoding"]["train"]["answer_tokens"], rows)
    open_steps = recipe.curriculum.kind != "none" and recipe.curriculum.epochs_per_stage is not None
    steps = None if open_steps or (base is None and settings.get("packing")) else steps_of(rows, settings)
    return Plan(recipe, weights, data, steps, unknown, need, memory_unknown, tokens, seconds)


def whole_lengths(recipe: Recipe) -> np.ndarray:
    """(n,) lengths in tokens of the training rows without training.max_length, in ascending order."""
    recipe = with_training(resolve_split(recipe, None, 0), max_length=None, packing=False)
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        return np.sort(lengths_of(prepare(recipe, resolve_model(recipe).prompt, Path(scratch)).unpacked))


def training_rows(recipe: Recipe, most: int) -> list[dict[str, Any]]:
    """Up to `most` training rows of each severity, critical first, as the trainer gets them.

    `words`: those that the severity was read from. `pieces`: the text, divided by whether its tokens carry loss.
    """
    base, by, shown, draw = resolve_model(recipe), recipe.severity, list[dict[str, Any]](), np.random.default_rng(0)
    table, splits, severity = load_splits(recipe)
    if by.source in ("columns", "weight"):  # `sevpeft annotate` writes its evidence beside them
        evidence = load_consultations(recipe.data, keep=[EVIDENCE]).rows
    else:
        evidence = classify_rows(table.rows, load_source(by.source, by.classifier, text=by.text))
    words = evidence[EVIDENCE] if EVIDENCE in evidence.column_names else []
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        encoded = prepare(recipe, base.prompt, Path(scratch), base.config).unpacked
        strata, chosen = np.asarray(encoded["severity"]), list[int]()
        for stratum in (2, 1, 0, -1):
            chosen += sorted(draw.permutation(np.flatnonzero(strata == stratum))[:most])
        rows = list(encoded.select(chosen))
    for row in rows:
        place, pieces = splits.train[row["source_index"]]["source_index"], list[dict[str, Any]]()
        source, known, lost = table.rows[place], severity is not None and row["severity"] >= 0, row["lost_words"]
        labeled = zip(row["input_ids"], row["labels"], strict=True)
        for learned, pairs in groupby(labeled, lambda pair: pair[1] != IGNORED):
            tokens = [token for token, _ in pairs]
            pieces.append({"text": base.tokenizer.decode(tokens), "tokens": len(tokens), "learned": learned})
        weights = row["token_weights"]  # w of each answer token, or w divided by their number
        cut = source["question"].split()[-lost:] if lost and not source.get(TURNS) else []
        shown.append(
            {
                "row": source["row"],
                "severity": SEVERITIES[row["severity"]] if known else "unknown",
                "probabilities": severity.probabilities[place].tolist() if severity and known else [],
                "words": words[place] if place < len(words) else None,
                "weight": sum(weights) if by.reduction == "examples" else max(weights),
                "pieces": pieces,
                "cut": " ".join(cut),
                "lost_words": lost,
            }
        )
    return shown


def steps_of(rows: int, settings: dict[str, Any]) -> int:
    """Optimizer steps as Trainer counts them: rows form batches, batches form steps; an epoch's last may be short."""
    limit = settings.get("max_steps", -1)
    if limit and limit > 0:
        return int(limit)
    rounded = math.floor if settings.get("dataloader_drop_last") else math.ceil
    batches = rounded(rows / settings["per_device_train_batch_size"])
    each = max(1, math.ceil(batches / settings["gradient_accumulation_steps"]))
    return math.ceil(each * settings["num_train_epochs"])


def fitting(recipe: Recipe, vram: float | None = None) -> tuple[Fitting, memory.MemoryPlan]:
    """What the recipe needs on a GPU, and its memory plan; raises ModelError as `memory.MemoryPlan` does.

    `vram`: GB of the requested GPU. The batch split is chosen for it, or else for the GPU that the recipe names.
    """
    smallest, origin = memory_plan(recipe)  # with the smallest batch, if the recipe leaves it open
    gb = vram or recipe.about.vram_gib or 24
    plan = smallest.with_recipe(resolve_split(recipe, smallest, memory.usable(gb)))
    need = Fitting(
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
    return need, plan
