"""Calibrates the probabilities of a classifier on labels of rows that it was not fitted on.

Calibrated probabilities are p ∝ Π_s p_s^(w_s) · exp(b) over the sources s of a classifier, with b_0 = 0. With one
source this is temperature scaling (Guo et al. 2017; w = 1/T) with a bias for each severity (Alexandari et al. 2020),
which corrects the overall shares: on 1,063 labeled questions it reduces the ECE of p_critical by rules from .11 to
.015. Two sources, rules and linear, form a logarithmic opinion pool. Its weights are fitted on out-of-fold
probabilities of the linear part (stacking, Wolpert 1992); otherwise the rules would get no weight.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.special import softmax

from sevpeft.severity.classifier.examples import Examples, check_severities, grouped_folds
from sevpeft.severity.classifier.linear import LinearClassifier, fit_linear, fit_student, teacher_scores
from sevpeft.severity.probabilities import Passage, Reads, is_answer, passages_of
from sevpeft.severity.rules import Rules
from sevpeft.severity.settings import ClassifierSettings

# Fits the sources before calibration on training rows: one classifier, or rules and a linear one.
Fit = Callable[[Examples], Sequence[Any]]
# Smallest probability before the logarithm; no classifier here is more certain than one in a billion.
_SMALLEST = 1e-9


@dataclass(frozen=True)
class Calibration:
    """Weights w, one for each source, and biases b, one for each severity."""

    weights: tuple[float, ...] = (1.0,)
    bias: tuple[float, ...] = (0.0, 0.0, 0.0)

    def apply(self, *sources: np.ndarray) -> np.ndarray:
        """(n, 3) probabilities of each source → (n, 3) calibrated ones, each row summing to one."""
        scores = np.array(self.bias)
        for weight, source in zip(self.weights, sources, strict=True):
            scores = scores + weight * np.log(np.maximum(source, _SMALLEST))
        return np.asarray(softmax(scores, axis=1))


def fit_calibration(sources: Sequence[np.ndarray], labels: np.ndarray) -> Calibration:
    """Maximum-likelihood calibration from probabilities (n, 3) of each source for rows that it was not fitted on."""
    from scipy.optimize import minimize

    # The bias of a severity without a row would be the lower bound.
    check_severities(labels, "The calibration data", "add rows of every severity")
    count, each = len(sources), np.arange(len(labels))

    def calibration(parameters: np.ndarray) -> Calibration:
        return Calibration(tuple(parameters[:count].tolist()), (0.0, *parameters[count:].tolist()))

    def loss(parameters: np.ndarray) -> float:
        return float(-np.log(calibration(parameters).apply(*sources)[each, labels]).mean())

    # One of two sources may get no weight.
    weight, bias = (0.05 if count == 1 else 0.0, 20.0), (-10.0, 10.0)
    return calibration(minimize(loss, [1 / count] * count + [0.0, 0.0], bounds=[weight] * count + [bias] * 2).x)


class Calibrated:
    """Sources and their calibration as one classifier; its `twin`, if any, is for rows without an answer."""

    def __init__(
        self, sources: Sequence[Any], calibration: Calibration, reads: Reads = "question", twin: Any = None
    ) -> None:
        self.sources, self.calibration, self.reads, self.twin = tuple(sources), calibration, reads, twin
        self.kind = "+".join(source.kind for source in sources)
        content = ["-".join(source.version for source in sources), asdict(calibration)]
        content += [] if reads == "question" else [reads]
        self.version = f"{self.kind}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"
        self.version += f"-{twin.version[-12:]}" if twin else ""

    def explained(
        self, questions: Sequence[str], answers: Sequence[str | None] | None = None
    ) -> tuple[np.ndarray, list[str] | None]:
        """Probabilities (n, 3) and reasons (n,) of the rules, or None; the twin classifies rows without an answer."""
        answered = [is_answer(answer) for answer in answers or [None] * len(questions)]
        if self.reads == "question" or self.twin is None or all(answered):
            return self._explained(passages_of(self.reads, questions, answers))
        probabilities, reasons = self.twin.explained(questions)
        rows = np.flatnonzero(answered).tolist()
        complete = ([questions[i] for i in rows], [answers[i] for i in rows] if answers else None)
        probabilities[rows], own_reasons = self._explained(passages_of(self.reads, *complete))
        for row, reason in zip(rows, own_reasons or (), strict=False):
            reasons[row] = reason
        return probabilities, reasons

    def _explained(self, passages: Sequence[Passage]) -> tuple[np.ndarray, list[str] | None]:
        reasons, (first, *others) = None, self.sources
        if first.kind == "rules":
            probabilities, reasons = first.explained(passages)
        else:
            probabilities = first.probabilities(passages)
        return self.calibration.apply(probabilities, *(other.probabilities(passages) for other in others)), reasons

    def probabilities(self, questions: Sequence[str], answers: Sequence[str | None] | None = None) -> np.ndarray:
        """(n, 3), each row summing to one, in the order of `SEVERITIES`."""
        return self.explained(questions, answers)[0]


def fit_of(
    settings: ClassifierSettings,
    progress: Callable[[str], None] = lambda message: None,
    unlabeled: Examples | None = None,
) -> Fit:
    """The function that fits the sources of a kind; with unlabeled rows it uses `fit_student`."""
    if settings.kind == "transformer":
        from sevpeft.severity.classifier.transformer import fit_transformer

        return lambda examples: [fit_transformer(examples, settings.encoder, seed=settings.seed, progress=progress)]
    rules = [] if settings.kind == "linear" else [Rules(settings.lexicon)]
    students: dict[bytes, LinearClassifier] = {}  # question classifiers, reused for the classifier of both

    def fit(examples: Examples) -> LinearClassifier:
        if unlabeled is None:
            return fit_linear(examples)
        if not (student := students.pop(key := examples.rows.tobytes(), None)):
            student = fit_student(examples, unlabeled, teacher_scores(replace(examples, reads="both"), unlabeled))
        if examples.reads == "both":
            return fit_linear(examples, student, unlabeled)
        return students.setdefault(key, student)

    return lambda examples: [*rules, *([] if settings.kind == "rules" else [fit(examples)])]


def fit_calibrated(train: Examples, fit: Fit, settings: ClassifierSettings) -> Calibrated:
    """Fits a classifier and calibrates it on out-of-fold probabilities; folds keep groups together.

    Every row is in one of five folds, and the final classifier is fitted on all rows, as in scikit-learn's
    CalibratedClassifierCV(ensemble=False). For a transformer this costs too much, so a fifth of the groups is only
    for calibration. Blocks that lack a severity are not for calibration, because their shares differ.
    """
    once = settings.kind == "transformer"
    folds = grouped_folds(train, seed=settings.seed)[: 1 if once else None]
    parts = []
    for fold in folds:
        fitted = fit(train.take(fold.train))
        parts.append([source.probabilities(train.take(fold.test).passages) for source in fitted])
    held = np.concatenate([fold.test for fold in folds])
    rows = train.complete[held]
    sources = [np.concatenate(source)[rows] for source in zip(*parts, strict=True)]
    return Calibrated(fitted if once else fit(train), fit_calibration(sources, train.labels[held[rows]]), train.reads)
