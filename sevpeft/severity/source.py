"""From a recipe's `severity.source` and the rows to probabilities (n, 3): read from columns, or judged from questions.

Computed ones are kept in the cache folder, because every process of a launch and every resumed run needs the same. It
holds numbers only; its key is the content of the table and the version of the classifier.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.utils import tqdm

from sevpeft.errors import WeightError
from sevpeft.runs import cache_folder, plain_disk_errors
from sevpeft.severity.probabilities import SEVERITIES, SeverityClassifier, severity_probabilities, sharpened

_BATCH = 1000


@dataclass(frozen=True)
class Severity:
    """Probabilities (n, 3) of the rows, and where they come from: source, version and temperature."""

    probabilities: np.ndarray
    origin: dict[str, Any]

    @property
    def strata(self) -> np.ndarray:
        """(n,) the most probable severity of every row, as its position in `SEVERITIES`."""
        return np.asarray(self.probabilities.argmax(axis=1))


def severity_of(
    rows: Dataset, *, source: str = "columns", classifier: str | None = None, temperature: float = 1.0
) -> Severity:
    """Severity probabilities of every row, as the recipe's section `severity` asks for them.

    Args:
        rows: with `question`, and for the source "columns" with the columns of `severity_probabilities`.
        source: "columns", or the kind of a classifier.
        classifier: its folder; for "rules" None is the lexicon without calibration.
        temperature: of `sharpened`, applied last.

    Raises:
        WeightError: the columns are absent or hold no probabilities, or the classifier is of another kind.
    """
    origin: dict[str, Any] = {"source": source, "temperature": temperature}
    if source == "columns":
        return Severity(sharpened(severity_probabilities(rows), temperature), origin)
    judge = _classifier(source, classifier)
    origin["version"] = judge.version
    return Severity(sharpened(_computed(rows, judge), temperature), origin)


def _classifier(source: str, folder: str | None) -> SeverityClassifier:
    if source == "rules" and folder is None:
        from sevpeft.severity.rules import Rules

        return Rules.load()
    from sevpeft.severity.classifier.store import load_classifier

    loaded: SeverityClassifier = load_classifier(Path(folder or "").expanduser())
    if loaded.kind != source:
        raise WeightError(
            f"severity.source is {source}, but {folder} holds a classifier of the kind {loaded.kind}; "
            f"set severity.source={loaded.kind}, or name another folder."
        )
    return loaded


def _computed(rows: Dataset, judge: SeverityClassifier) -> np.ndarray:
    key = hashlib.sha256(f"{rows._fingerprint} {judge.kind} {judge.version}".encode()).hexdigest()[:32]
    file = cache_folder("severity") / f"{key}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        kept = np.load(file, allow_pickle=False)
        if kept.shape == (len(rows), len(SEVERITIES)):
            return np.asarray(kept)
    probabilities = np.empty((len(rows), len(SEVERITIES)))
    bar = tqdm(total=len(rows), desc=f"Severity by {judge.kind}", unit=" rows", disable=None, delay=2)
    for start in range(0, len(rows), _BATCH):
        questions = rows[start : start + _BATCH]["question"]
        probabilities[start : start + len(questions)] = judge.probabilities(questions)
        bar.update(len(questions))
    bar.close()
    with plain_disk_errors(file, when_full="free some, then run this again", remedy="set SEVPEFT_CACHE to another one"):
        handle, unfinished = tempfile.mkstemp(dir=file.parent, suffix=".npy")
        try:
            with os.fdopen(handle, "wb") as stream:
                np.save(stream, probabilities, allow_pickle=False)
            os.replace(unfinished, file)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
    return probabilities
