"""Gives every row its severity probabilities: from columns of the data, or from a classifier."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa

from sevpeft.errors import WeightError
from sevpeft.recipe.schema import SeveritySection
from sevpeft.runs import workers_end_with_this_process
from sevpeft.severity.probabilities import (
    PROBABILITY_COLUMNS,
    SEVERITIES,
    Reads,
    check_answers,
    has_severity,
    severity_probabilities,
    sharpened,
)
from sevpeft.severity.weights import ready_weights

if TYPE_CHECKING:
    from sevpeft.severity.classifier.calibrate import Calibrated
    from sevpeft.severity.rules import Rules

EVIDENCE = "severity_evidence"
ORACLE = "prompt.severity=gold is an oracle: prompts have the true severity, which is unknown when a patient asks."

# Rows per cached part: about a minute of a transformer on two cores, or a few seconds of any other classifier.
_ROWS_OF_PART, _MOST_ROWS = {"transformer": 1024}, 50_000
# With fewer rows per process, its start takes longer than its work.
_ROWS_OF_PROCESS = 2_000


@dataclass(frozen=True)
class Severity:
    """Probabilities (n, 3) of the rows and their origin: source, version and temperature.

    With ready-made `weights` (n,) the probabilities only give the strata, and are NaN if the data has none.
    """

    probabilities: np.ndarray
    origin: dict[str, Any]
    weights: np.ndarray | None = None

    @property
    def strata(self) -> np.ndarray:
        """(n,) position in `SEVERITIES` of the most probable severity of every row; -1 if unknown."""
        known = np.isfinite(self.probabilities).all(axis=1)
        return np.where(known, self.probabilities.argmax(axis=1), -1)


def severity_of(rows: datasets.Dataset, settings: SeveritySection) -> Severity:
    """Severity of every row: of its columns, or by a classifier; `sharpened` at last.

    With ready-made weights, severity columns, if there are any, give the strata.
    """
    origin: dict[str, Any] = {"source": settings.source, "temperature": settings.temperature}
    if settings.source == "weight":
        probabilities = severity_probabilities(rows) if has_severity(rows) else np.full((len(rows), 3), np.nan)
        return Severity(probabilities, origin, ready_weights(rows, settings.weight_column))
    if settings.source != "columns":
        loaded = load_source(settings.source, settings.classifier, text=settings.text)
        check_answers(rows, settings.text or "question")
        origin["version"] = loaded.version
        if loaded.reads != "question":
            origin["text"] = loaded.reads
        rows = classify_rows(rows, loaded)
    return Severity(sharpened(severity_probabilities(rows), settings.temperature), origin)


def prompt_severity(rows: datasets.Dataset, kind: str, classifier: str | None) -> tuple[list[str], dict[str, Any]]:
    """Severities (n,) for the prompts and their origin; `kind` is prompt.severity, "predicted" or "gold".

    "predicted" reads only the question, as at inference: with `severity.classifier`, or with rules.
    """
    origin = {"source": kind}
    if kind == "predicted":
        loaded = load_source(None, classifier, text="question")
        rows, origin = classify_rows(rows, loaded), {"source": loaded.kind, "version": loaded.version}
    elif not has_severity(rows):
        raise WeightError("The data has no severity for prompt.severity=gold; set prompt.severity=predicted.")
    return np.array(SEVERITIES)[severity_probabilities(rows).argmax(axis=1)].tolist(), origin


def load_source(
    kind: str | None, folder: str | None, lexicon: str | None = None, text: Reads | None = None
) -> Calibrated | Rules:
    """Loads a classifier from a folder, or rules with a lexicon; WeightError if its kind or text differs."""
    if folder is None:
        from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
        from sevpeft.severity.rules import Rules

        rules = Rules(lexicon)
        return rules if text in (None, "question") else Calibrated([rules], Calibration(), text, rules)
    from sevpeft.severity.classifier.store import load_classifier

    loaded = load_classifier(Path(folder).expanduser())
    if kind not in (None, loaded.kind):
        raise WeightError(f"{folder} has a {loaded.kind} classifier, not {kind}; write {loaded.kind}.")
    if text not in (None, "question", loaded.reads):
        raise WeightError(f"{folder} was fitted with text={loaded.reads}; fit it with text={text}, or leave text out.")
    return loaded.twin if text == "question" and loaded.reads != "question" else loaded


def classify_rows(
    rows: datasets.Dataset, classifier: Calibrated | Rules, *, rank: int = 0, processes: int = 1
) -> datasets.Dataset:
    """The probability columns of every row, and `EVIDENCE` if the classifier gives its reasons.

    Each part of the rows is cached by its content and the classifier's version, so a killed run resumes at the next
    part. With several processes, process `rank` classifies every `processes`-th part and returns only these rows.
    """
    columns = ["question"] if classifier.reads == "question" else ["question", "answer"]
    texts = rows.select_columns(columns).with_format("arrow")
    # Rules run in Python on one core, so they get worker processes, unless a launch has several already.
    forking = classifier.kind == "rules" and processes == 1 and sys.platform == "linux"
    cores = len(os.sched_getaffinity(0)) if forking else 1
    parts = -(-len(rows) // _ROWS_OF_PART.get(classifier.kind, _MOST_ROWS))
    _classifiers[classifier.version] = classifier
    settings, results = {"fn_kwargs": {"version": classifier.version}, "batched": True, "batch_size": 1024}, []
    with workers_end_with_this_process():
        for number in range(rank, parts, processes):
            part = texts.shard(parts, number, contiguous=True)
            workers = min(cores, len(part) // _ROWS_OF_PROCESS)
            label = f"Severity by {classifier.kind}, part {number + 1} of {parts}"
            results.append(part.map(_classify_batch, desc=label, num_proc=workers if workers > 1 else None, **settings))
    _classifiers.clear()
    return datasets.concatenate_datasets(results).with_format(None) if results else texts.select([])


# Version → classifier, for the forked workers of `map`. As an argument it would be pickled, and all its weights would
# go into the cache key.
_classifiers: dict[str, Any] = {}


def _classify_batch(batch: pa.Table, version: str) -> pa.Table:
    # Probabilities and evidence in one call, because both need the matches, which take most of the time.
    probabilities, evidence = _classifiers[version].explained(*(column.to_pylist() for column in batch.columns))
    columns = {name: pa.array(column) for name, column in zip(PROBABILITY_COLUMNS, probabilities.T, strict=True)}
    if evidence is not None:
        columns[EVIDENCE] = pa.array(evidence, pa.string())
    return pa.table(columns)
