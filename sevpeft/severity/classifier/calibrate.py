"""Calibration: the probabilities of a classifier are fitted to labels of rows that the classifier was not fitted on.

Calibrated probabilities are p ∝ Π_s p_s^(w_s) · exp(b) over the sources s of a classifier, with b_0 = 0.

One source is temperature scaling (Guo et al. 2017, "On Calibration of Modern Neural Networks"; w = 1/T) with a bias for
each severity (Alexandari et al. 2020, "Maximum Likelihood with Bias-Corrected Calibration"). The bias repairs shares
that are off as a whole: rules do not know the shares of the data, and a transformer's loss weights the severities. On
1,063 labeled questions the ECE of p_critical by rules is .11 with a temperature alone and .015 with the bias; for the
linear classifier .049 and .042.

Two sources, rules and linear, form a logarithmic opinion pool. Its weights are fitted on out-of-fold probabilities of
the linear part (stacking, Wolpert 1992), or the rules would get nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sevpeft.severity.classifier.examples import Examples, check_severities, complete_rows, grouped_folds, hold_out
from sevpeft.severity.classifier.linear import LinearClassifier, fit_linear
from sevpeft.severity.classifier.settings import ClassifierSettings
from sevpeft.severity.probabilities import SEVERITIES, SeverityClassifier
from sevpeft.severity.rules import Rules

Fit = Callable[[Examples], SeverityClassifier]
"""From training rows to a classifier that is not calibrated yet."""

# Below this a probability has no logarithm worth scaling: no classifier here knows better than one in a billion.
_SMALLEST = 1e-9
TRANSFORMER_SHARE = 0.2
_WEIGHTS, _BIASES = (0.05, 20.0), (-10.0, 10.0)


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
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        result: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return result


def fit_calibration(sources: Sequence[np.ndarray], labels: np.ndarray) -> Calibration:
    """The calibration of greatest likelihood.

    Args:
        sources: (n, 3) probabilities of each source, for rows that it was not fitted on.
        labels: (n,) positions in `SEVERITIES`.

    Raises:
        DataError: a severity has no row, so that its bias would be as low as it can be.
    """
    from scipy.optimize import minimize

    check_severities(labels, "The part that calibrates", "bring more rows of every severity")
    count, each = len(sources), np.arange(len(labels))

    def calibration(parameters: np.ndarray) -> Calibration:
        return Calibration(tuple(parameters[:count].tolist()), (0.0, *parameters[count:].tolist()))

    def loss(parameters: np.ndarray) -> float:
        return float(-np.log(calibration(parameters).apply(*sources)[each, labels]).mean())

    others = len(SEVERITIES) - 1
    # Of two sources one may be useless, and then gets no weight.
    weights = _WEIGHTS if count == 1 else (0.0, _WEIGHTS[1])
    start = np.concatenate([np.full(count, 1 / count), np.zeros(others)])
    found = minimize(loss, start, bounds=[weights] * count + [_BIASES] * others)
    return calibration(found.x)


class RulesAndLinear:
    """A lexicon and a linear classifier: they know different things, what doctors listen for and what the data says."""

    kind = "rules+linear"

    def __init__(self, rules: Rules, linear: LinearClassifier) -> None:
        self.rules, self.linear = rules, linear
        self.version = f"{rules.version}-{linear.version}"

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        """(n, 3): both with the same weight; the calibration finds better ones."""
        return uncalibrated(source_probabilities(self, questions))

    def evidence(self, question: str) -> str:
        """What the rules found."""
        return self.rules.evidence(question)


class Calibrated:
    """A classifier and its calibration, as one classifier.

    Attributes:
        classifier: the one whose probabilities are calibrated.
        calibration: fitted on rows that the classifier was not fitted on.
        kind: the classifier's.
        version: changes with the classifier and with its calibration.
    """

    def __init__(self, classifier: SeverityClassifier, calibration: Calibration) -> None:
        self.classifier, self.calibration = classifier, calibration
        self.kind = classifier.kind
        decides = json.dumps([classifier.version, asdict(calibration)])
        self.version = f"{self.kind}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        return self.calibration.apply(*source_probabilities(self.classifier, questions))


def source_probabilities(classifier: SeverityClassifier, questions: Sequence[str]) -> list[np.ndarray]:
    """(n, 3) of each source of a classifier: of rules and linear for `RulesAndLinear`, else of the one that it is."""
    sources = (classifier.rules, classifier.linear) if isinstance(classifier, RulesAndLinear) else (classifier,)
    return [source.probabilities(list(questions)) for source in sources]


def uncalibrated(sources: Sequence[np.ndarray]) -> np.ndarray:
    """(n, 3): the sources with the same weight and without a bias."""
    return Calibration((1 / len(sources),) * len(sources)).apply(*sources)


def fit_of(settings: ClassifierSettings, progress: Callable[[str], None] = lambda message: None) -> Fit:
    """The function that fits one classifier of a kind. Rules learn nothing, and their lexicon is read once."""
    if settings.kind == "linear":
        return fit_linear
    if settings.kind == "transformer":
        from sevpeft.severity.classifier.transformer import fit_transformer

        return lambda examples: fit_transformer(examples, settings.encoder, seed=settings.seed, progress=progress)
    rules = Rules.load(Path(settings.lexicon).expanduser() if settings.lexicon else None)
    if settings.kind == "rules":
        return lambda examples: rules
    return lambda examples: RulesAndLinear(rules, fit_linear(examples))


def fit_calibrated(train: Examples, fit: Fit, settings: ClassifierSettings) -> Calibrated:
    """A classifier, calibrated by probabilities of rows from fits that saw neither them nor their groups.

    Every row is in one of five such folds, and the classifier itself is fitted on all rows (scikit-learn's
    CalibratedClassifierCV(ensemble=False)): six fits, and no row is lost to calibration. Six trainings of a transformer
    cost too much; there a share of the groups calibrates and is not trained on.

    Rows of blocks that lack a severity do not calibrate: their shares are not those of other rows.
    """
    out_of_fold = settings.kind != "transformer"
    seed = settings.seed
    folds = grouped_folds(train, seed=seed) if out_of_fold else [hold_out(train, TRANSFORMER_SHARE, seed=seed)]
    parts = []
    for fold in folds:
        classifier = fit(train.take(fold.train))
        parts.append(source_probabilities(classifier, [train.questions[i] for i in fold.test]))
    if out_of_fold:
        classifier = fit(train)
    held = np.concatenate([fold.test for fold in folds])
    complete = complete_rows(train.labels, train.blocks)[held]
    rows = complete if complete.any() else ~complete
    sources = [np.concatenate(source)[rows] for source in zip(*parts, strict=True)]
    return Calibrated(classifier, fit_calibration(sources, train.labels[held[rows]]))
