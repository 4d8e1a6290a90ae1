"""Turns the folders of several runs back into one table of scores: arm → metric → seeds by rows, joined by id.

Before anything is compared, the runs are asked whether they were trained on the same rows for the same steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sevpeft.errors import RunError
from sevpeft.evaluation.arms import ADAPTER, BASE, BASE_ARM, Experiment
from sevpeft.evaluation.evaluate import EVALUATION, LIKELIHOOD, SCORES
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import METRICS, Scores
from sevpeft.evaluation.statistics import same_order
from sevpeft.runs import Run, file_hash


@dataclass(frozen=True)
class Unit:
    """One run to train and evaluate; `with_base` if the base model's scores are to stand in it too."""

    experiment: Experiment
    arm: str
    seed: int
    controlled: str
    with_base: bool = False

    @property
    def run(self) -> Run:
        return self.experiment.run_of(self.arm, self.seed, self.controlled)

    @property
    def columns(self) -> tuple[str, ...]:
        return (ADAPTER, BASE) if self.with_base else (ADAPTER,)

    def evaluated(self, rows: EvaluationRows, *, answers: bool) -> bool:
        """Whether the run's evaluation is whole, and of this adapter, these rows and these settings."""
        stored = stored_json(self.run.folder / EVALUATION)
        generation = {**self.experiment.recipe.generation.model_dump(), "backend": "transformers"}
        return (
            stored.get("adapter") == file_hash(self.run.adapter / "adapter_model.safetensors")
            and stored.get("data", {}).get("content") == rows.content_hash()
            and stored["data"].get("evaluated") == len(rows)
            and set(self.columns) <= set(stored.get("columns", ()))
            and (not answers or ("chrf" in stored.get("metrics", ()) and stored.get("generation") == generation))
            and (self.run.folder / SCORES).is_file()
        )


def refuse_unequal(units: Sequence[Unit]) -> None:
    """Raises RunError when runs that are to be compared differ in rows or steps, whatever the settings said."""
    first: tuple[Unit, dict[str, Any]] | None = None
    for unit in units:
        metrics = unit.run.metrics()
        same = {
            "steps": metrics.get("training", {}).get("steps"),
            "training rows": metrics.get("weights", {}).get("consultations"),
            "rows": metrics.get("data", {}).get("rows"),
        }
        first = first or (unit, same)
        if differing := [name for name in same if same[name] != first[1][name]]:
            raise RunError(
                f"{unit.run.folder} was not trained as {first[0].run.folder} was (other {', '.join(differing)}), so "
                "they cannot be compared; move the wrong one away and run this again."
            )


def read_scores(units: Sequence[Unit], rows: EvaluationRows) -> tuple[np.ndarray, dict[str, Scores]]:
    """Tokens (n,) of the references, and arm → metric → (seeds, n), in the order of the rows; joined by id.

    Raises:
        RunError: a file is damaged, or two runs counted other tokens.
        DataError: a run has scores of other rows.
    """
    collected: dict[str, list[Scores]] = {}
    tokens: np.ndarray | None = None
    for unit in units:
        lines = _lines(unit.run.folder / SCORES)
        counted = _column(_lines(unit.run.folder / LIKELIHOOD), "arm", ADAPTER, rows, ["tokens"])["tokens"]
        if tokens is not None and not np.array_equal(tokens, counted):
            raise RunError(f"{unit.run.folder} counted other tokens in the references than the run before it.")
        tokens = counted
        for column, arm in ((ADAPTER, unit.arm), (BASE, BASE_ARM)):
            if column not in unit.columns:
                continue
            first: dict[str, Any] = next((line for line in lines if line.get("column") == column), {})
            metrics = [name for name in METRICS if name in first]
            collected.setdefault(arm, []).append(_column(lines, "column", column, rows, metrics))
    assert tokens is not None
    scores: dict[str, Scores] = {}
    for arm, by_seed in collected.items():
        shared = set.intersection(*(set(one) for one in by_seed))
        scores[arm] = {name: np.stack([one[name] for one in by_seed]) for name in shared}
    return tokens, scores


def _column(
    lines: list[dict[str, Any]], key: str, name: str, rows: EvaluationRows, metrics: Sequence[str]
) -> dict[str, np.ndarray]:
    """Metric → (n,) of the lines of one column or arm, in the order of the rows."""
    wanted = [line for line in lines if line.get(key) == name]
    order = same_order(rows.ids, [str(line["id"]) for line in wanted])
    values = {
        metric: np.array([np.nan if line.get(metric) is None else line[metric] for line in wanted], dtype=np.float64)
        for metric in metrics
    }
    return {metric: found[order] for metric, found in values.items()}


def stored_json(path: Path) -> dict[str, Any]:
    """What stands in a file; empty when it is not there or cannot be read, so that it is made again."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError):
        raise RunError(f"{path} is damaged; move it away and run this again, which makes it anew.") from None
