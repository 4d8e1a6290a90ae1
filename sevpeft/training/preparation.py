"""Turns a recipe into what the trainer reads: weighted training rows and validation rows with their severity.

This is the whole way of one consultation, read from top to bottom: source → probabilities → split → tokens → weight.
Everything that was lost on it is counted in `Prepared.summary`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sevpeft.data.sources import PREPARED_ABOUT, Consultations, load_consultations
from sevpeft.data.splits import Splits, question_key, split_rows
from sevpeft.data.workers import workers_end_with_this_process
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe
from sevpeft.severity.probabilities import has_severity
from sevpeft.severity.source import Severity, severity_of
from sevpeft.severity.weights import WeightSummary, severity_weights
from sevpeft.training.encoding import add_token_weights, encode_rows, pack_rows
from sevpeft.training.row_names import RowNames

# Below this, progress bars of the single steps flash by and only hide what matters.
ROWS_WORTH_A_BAR = 20_000


@dataclass(frozen=True)
class Prepared:
    """Rows ready for `SeveritySFTTrainer`, the counts of how they came about, and what the training rows are called."""

    train: Dataset
    validation: Dataset
    weights: WeightSummary
    summary: dict[str, Any]
    row_names: RowNames


def load_splits(recipe: Recipe) -> tuple[Consultations, Splits, Severity | None]:
    """Reads the recipe's data and divides it.

    Returns:
        The table, its parts, and the severity of the table's rows, None when there is none and the recipe asks for
        plain cross-entropy.
    """
    data = recipe.data
    table = load_consultations(
        data.path,
        name=data.name,
        revision=data.revision,
        split=data.split,
        encoding=data.encoding,
        question_column=data.question_column,
        answer_column=data.answer_column,
        severity_column=data.severity_column,
        id_column=data.id_column,
        dialect_column=data.dialect_column,
        split_column=data.split_column,
        max_rows=data.max_rows,
        keep=("group",) if (Path(data.path).expanduser() / PREPARED_ABOUT).is_file() else "mapped",
    )
    asked = recipe.severity
    plain = asked.control == "uniform" and asked.source == "columns" and not has_severity(table.rows)
    severity = None
    if not plain:
        severity = severity_of(
            table.rows, source=asked.source, classifier=asked.classifier, temperature=asked.temperature
        )
    rows = table.rows.add_column("source_index", np.arange(len(table.rows)))
    splits = split_rows(
        rows,
        validation_size=data.validation_size,
        test_size=data.test_size,
        seed=data.seed,
        strata=None if severity is None else severity.strata,
        keys=_groups(rows, data.seed),
        named=data.split_column is not None,
    )
    return table, splits, severity


def _groups(rows: Dataset, seed: int) -> np.ndarray | None:
    """(n,) one number for each group of near-duplicate questions, where `sevpeft prepare` has found them.

    Hashed, because what is carved from the train rows is taken in the order of these numbers.
    """
    if "group" not in rows.column_names:
        return None
    return np.asarray([question_key(group, seed) for group in rows["group"]], dtype=np.uint64)


def prompt_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The recipe's prompt for this tokenizer; training and generation both use it."""
    return Prompt.build(tokenizer, **recipe.prompt.model_dump())


def prepare(recipe: Recipe, prompt: Prompt, scratch: Path) -> Prepared:
    """Everything up to the trainer.

    Args:
        prompt: of the base model's tokenizer.
        scratch: folder for memory-mapped Arrow files, to be removed after training.
    """
    table, splits, severity = load_splits(recipe)
    with _bars(len(table.rows)), workers_end_with_this_process():
        return _encode_and_weight(recipe, prompt, scratch, table, splits, severity)


def _encode_and_weight(
    recipe: Recipe,
    prompt: Prompt,
    scratch: Path,
    table: Consultations,
    splits: Splits,
    severity: Severity | None,
) -> Prepared:
    settings = recipe.training.settings()
    max_length, num_proc = settings["max_length"], settings.get("dataset_num_proc")
    encoded, reports = {}, {}
    for name, rows in (("train", splits.train), ("validation", splits.validation)):
        encoded[name], reports[name] = encode_rows(
            rows,
            prompt,
            max_length,
            strata=None if severity is None else severity.strata[source_index(rows)],
            cache_file=scratch / f"{name}.arrow",
            num_proc=num_proc,
        )
    kept = source_index(splits.train)[source_index(encoded["train"])]
    weights, summary = weigh(recipe, severity, kept)
    train = add_token_weights(
        encoded["train"], weights, recipe.severity.reduction, cache_file=scratch / "weighted.arrow"
    )
    train = train.remove_columns(["severity", "source_index"])
    if settings.get("packing"):
        train = pack_rows(train, max_length, cache_file=scratch / "packed.arrow")
    return Prepared(
        train=train,
        validation=_by_length(encoded["validation"]).remove_columns("source_index"),
        weights=summary,
        summary=summary_of(table, splits, severity, {name: report.as_dict() for name, report in reports.items()}),
        row_names=RowNames(encoded["train"], splits.train),
    )


def _by_length(rows: Dataset) -> Dataset:
    """Longest first: batches then need little padding, and too little memory shows at once."""
    return rows.select(np.argsort(-lengths_of(rows), kind="stable"))


def lengths_of(rows: Dataset) -> np.ndarray:
    """(n,) tokens of each encoded row, from Arrow's offsets."""
    tables = rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([pc.list_value_length(table["input_ids"]).to_numpy() for table in tables])


def summary_of(
    table: Consultations, splits: Splits, severity: Severity | None, encoding: dict[str, Any]
) -> dict[str, Any]:
    """What a run's metrics.json says about its data: where it comes from and how many rows went where."""
    return {
        "source": table.source,
        "fingerprint": table.fingerprint,
        "prepared": table.provenance or None,
        "columns": table.columns,
        "rejected": table.rejected,
        "severity": None if severity is None else severity.origin,
        "split_by": splits.by,
        "questions_in_two_splits": splits.leaks,
        "rows": {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        "encoding": encoding,
    }


def weigh(recipe: Recipe, severity: Severity | None, kept: np.ndarray) -> tuple[np.ndarray, WeightSummary]:
    """Weights (n,) of the training rows that were kept, and what they amount to."""
    if severity is None:
        ones = np.ones(len(kept))
        return ones, WeightSummary.of(ones, None)
    asked = recipe.severity
    weights = severity_weights(
        severity.probabilities[kept],
        asked.coefficients(),
        normalize=asked.normalize,
        control=asked.control,
        seed=recipe.training.settings()["seed"],
    )
    return weights, WeightSummary.of(weights, severity.strata[kept])


def source_index(rows: Dataset) -> np.ndarray:
    """(n,) position of every row in the table that it was taken from."""
    return np.asarray(rows.with_format("numpy")["source_index"][:])


@contextmanager
def _bars(rows: int) -> Iterator[None]:
    """Progress bars of `datasets` where a step takes long enough to need one."""
    if rows >= ROWS_WORTH_A_BAR:
        datasets.enable_progress_bars()
    try:
        yield
    finally:
        datasets.disable_progress_bars()
