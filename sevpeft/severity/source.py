"""Where the severity of rows comes from: their columns, or a classifier that reads their questions."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from sevpeft.errors import WeightError
from sevpeft.runs import workers_end_with_this_process
from sevpeft.severity.probabilities import (
    PROBABILITY_COLUMNS,
    SEVERITIES,
    Reads,
    SeverityClassifier,
    check_answers,
    has_severity,
    severity_probabilities,
    sharpened,
)
from sevpeft.severity.weights import ready_weights

EVIDENCE = "severity_evidence"
ORACLE = "prompt.severity=gold is an oracle: prompts hold the true severity, which nobody knows when a patient asks."

# Rows after which the result is saved: about a minute of a transformer on two cores, a few seconds of anything else.
_ROWS_OF_PART, _MOST_ROWS = {"transformer": 1024}, 50_000
# With fewer rows for each, starting processes takes longer than what they do.
_ROWS_OF_PROCESS = 2_000


@dataclass(frozen=True)
class Severity:
    """Probabilities (n, 3) of the rows, and where they come from: source, version and temperature.

    With ready-made `weights` (n,) the probabilities are for strata alone, and NaN where the data has none.
    """

    probabilities: np.ndarray
    origin: dict[str, Any]
    weights: np.ndarray | None = None

    @property
    def strata(self) -> np.ndarray:
        """(n,) the most probable severity of every row, as its position in `SEVERITIES`; -1 where it is not known."""
        known = np.isfinite(self.probabilities).all(axis=1)
        return np.where(known, self.probabilities.argmax(axis=1), -1)


def severity_of(
    rows: datasets.Dataset,
    *,
    source: str = "columns",
    classifier: str | None = None,
    temperature: float = 1.0,
    weight_column: str = "weight",
    text: Reads | None = None,
) -> Severity:
    """Severity probabilities of every row, as the recipe's section `severity` asks for them.

    `source` is "columns" (those of `severity_probabilities`) or the kind of a classifier, which reads the `text`;
    `classifier` its folder, None for "rules" without calibration; `temperature` that of `sharpened`, applied last.
    With "weight" the weights are those of `weight_column`, and severity columns, if there are any, give the strata.
    """
    origin: dict[str, Any] = {"source": source, "temperature": temperature}
    if source == "weight":
        probabilities = severity_probabilities(rows) if has_severity(rows) else np.full((len(rows), 3), np.nan)
        return Severity(probabilities, origin, ready_weights(rows, weight_column))
    if source != "columns":
        loaded = load_source(source, classifier, text=text)
        check_answers(rows, text or "question")
        origin["version"] = loaded.version
        if (reads := getattr(loaded, "reads", "question")) != "question":
            origin["text"] = reads
        rows = judged(rows, loaded)
    return Severity(sharpened(severity_probabilities(rows), temperature), origin)


def prompt_severity(rows: datasets.Dataset, asked: str, classifier: str | None) -> tuple[list[str], dict[str, Any]]:
    """Severities (n,) that prompts name, where `prompt.severity` is "predicted" or "gold", and where they come from.

    Predicted reads the question alone, as it can be done when a patient asks: by `severity.classifier`, else by rules.
    """
    origin = {"source": asked}
    if asked == "predicted":
        reader = load_source(None, classifier, text="question")
        rows, origin = judged(rows, reader), {"source": reader.kind, "version": reader.version}
    elif not has_severity(rows):
        raise WeightError("The data has no severity for prompt.severity=gold; set prompt.severity=predicted.")
    return np.array(SEVERITIES)[severity_probabilities(rows).argmax(axis=1)].tolist(), origin


def load_source(
    kind: str | None, folder: str | None, lexicon: str | None = None, text: Reads | None = None
) -> SeverityClassifier:
    """The classifier in a folder, or the rules of a lexicon, to read `text`; WeightError for another kind or text."""
    if folder is None:
        from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
        from sevpeft.severity.rules import Rules

        rules = Rules.load(lexicon)
        return rules if text in (None, "question") else Calibrated([rules], Calibration(), text, rules)
    from sevpeft.severity.classifier.store import load_classifier

    loaded = load_classifier(Path(folder).expanduser())
    if kind not in (None, loaded.kind):
        raise WeightError(f"{folder} holds a {loaded.kind} classifier, not {kind}; write {loaded.kind}.")
    if text not in (None, "question", loaded.reads):
        raise WeightError(f"{folder} was fitted with text={loaded.reads}; fit it with text={text}, or leave text out.")
    return loaded.twin if text == "question" != loaded.reads else loaded


def judged(
    rows: datasets.Dataset, classifier: SeverityClassifier, *, rank: int = 0, processes: int = 1
) -> datasets.Dataset:
    """The probability columns of every row, and `EVIDENCE` where the classifier gives its reasons.

    Each part of the rows is cached by their content and the classifier's version: a killed run goes on with the next
    part. Under a launch, process number `rank` judges every `processes`-th part and returns only these.
    """
    reads = getattr(classifier, "reads", "question")
    texts = rows.select_columns(["question", *["answer"] * (reads != "question")]).with_format("arrow")
    # Rules are Python that one core runs; the others have threads of their own. A launch has its processes already.
    forking = classifier.kind == "rules" and processes == 1 and sys.platform == "linux"
    cores = len(os.sched_getaffinity(0)) if forking else 1
    parts = -(-len(rows) // _ROWS_OF_PART.get(classifier.kind, _MOST_ROWS))
    _classifiers[classifier.version] = classifier
    settings, found = {"fn_kwargs": {"version": classifier.version}, "batched": True, "batch_size": 1024}, []
    with workers_end_with_this_process():
        for number in range(rank, parts, processes):
            part = texts.shard(parts, number, contiguous=True)
            workers = min(cores, len(part) // _ROWS_OF_PROCESS)
            label = f"Severity by {classifier.kind}, part {number + 1} of {parts}"
            found.append(part.map(_judge_batch, desc=label, num_proc=workers if workers > 1 else None, **settings))
    _classifiers.clear()
    return datasets.concatenate_datasets(found).with_format(None) if found else texts.select([])


# Version → classifier, where the forked workers of `map` find it. As an argument it would be pickled, and all its
# weights would go into the key of the cache.
_classifiers: dict[str, Any] = {}


def _judge_batch(batch: pa.Table, version: str) -> pa.Table:
    classifier, texts = _classifiers[version], [column.to_pylist() for column in batch.columns]
    # Both at once, because finding the matches is what takes the time.
    explained = getattr(classifier, "explained", None)
    probabilities, evidence = explained(*texts) if explained else (classifier.probabilities(*texts), None)
    columns = {name: pa.array(column) for name, column in zip(PROBABILITY_COLUMNS, probabilities.T, strict=True)}
    if evidence is not None:
        columns[EVIDENCE] = pa.array(evidence, pa.string())
    return pa.table(columns)
