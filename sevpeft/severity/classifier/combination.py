"""Rules and linear together: they know different things, what a doctor listens for and what the data says.

The probabilities of the two are pooled by their logarithms, p ∝ p_rules^a · p_linear^b · exp(bias) (a logarithmic
opinion pool). The weights are those of greatest likelihood on the training rows, for which the linear part gives
probabilities out of fold (stacking, Wolpert 1992): on rows that it was fitted on it would look better than it is, and
the rules would get nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sevpeft.errors import DataError
from sevpeft.runs import write_atomically
from sevpeft.severity.classifier.calibration import fit_log_linear, log_linear
from sevpeft.severity.classifier.crossvalidation import Fold, grouped_folds
from sevpeft.severity.classifier.examples import Examples, complete_rows
from sevpeft.severity.classifier.linear import LinearClassifier, fit_linear, read_linear, write_linear
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.rules import Rules

WEIGHTS = "combination.json"


class CombinedClassifier:
    """A lexicon and a fitted linear classifier.

    Attributes:
        rules, linear: the two.
        weights: of the rules and of the linear classifier, not negative.
        bias: added to the logarithms, one for each severity, the first 0.
        version: changes with any of these.
    """

    kind = "rules+linear"

    def __init__(self, rules: Rules, linear: LinearClassifier, weights: Sequence[float], bias: Sequence[float]) -> None:
        self.rules, self.linear = rules, linear
        self.weights, self.bias = tuple(weights), tuple(bias)
        decides = json.dumps([rules.version, linear.version, self.weights, self.bias])
        self.version = hashlib.sha256(decides.encode()).hexdigest()[:12]

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        """(n, 3), each row summing to one."""
        sources = [self.rules.probabilities(questions), self.linear.probabilities(questions)]
        return log_linear(sources, self.weights, self.bias)

    def evidence(self, question: str) -> str:
        """What the rules found."""
        return self.rules.evidence(question)


@dataclass(frozen=True)
class FitCombined:
    """Fits the linear part to all examples, and the weights by its probabilities out of fold.

    Raises:
        DataError: a severity has fewer groups than the five folds.
    """

    rules: Rules

    def __call__(self, examples: Examples, seed: int = 0) -> CombinedClassifier:
        sources, _, rows = self._sources(examples, seed)
        return self._pooled(examples, sources, rows, seed)

    def cross_fitted(self, examples: Examples, seed: int = 0) -> tuple[CombinedClassifier, np.ndarray]:
        """The same, and (n, 3) probabilities of each row by a linear part and weights fitted without its fold.

        The folds are those of the weights, so that six fits do for both. The weights rest on linear parts of other
        folds, most of which saw the row; four numbers carry little of that.
        """
        sources, folds, rows = self._sources(examples, seed)
        unseen = np.empty((len(examples), len(SEVERITIES)))
        for fold in folds:
            others = rows.copy()
            others[fold.test] = False
            found = fit_log_linear([s[others] for s in sources], examples.labels[others])
            unseen[fold.test] = log_linear([s[fold.test] for s in sources], *found)
        return self._pooled(examples, sources, rows, seed), unseen

    def _sources(self, examples: Examples, seed: int) -> tuple[list[np.ndarray], list[Fold], np.ndarray]:
        """Probabilities of the rules and, out of fold, of the linear part; the folds; which rows weigh the two."""
        linear = np.empty((len(examples), len(SEVERITIES)))
        folds = grouped_folds(examples, seed=seed)
        for fold in folds:
            part = fit_linear(examples.take(fold.train), seed)
            linear[fold.test] = part.probabilities([examples.questions[i] for i in fold.test])
        complete = complete_rows(examples.labels, examples.blocks)
        rows = complete if complete.any() else ~complete
        return [self.rules.probabilities(examples.questions), linear], folds, rows

    def _pooled(self, examples: Examples, sources: list[np.ndarray], rows: np.ndarray, seed: int) -> CombinedClassifier:
        weights, bias = fit_log_linear([source[rows] for source in sources], examples.labels[rows])
        return CombinedClassifier(self.rules, fit_linear(examples, seed), weights, bias)


def write_combined(classifier: CombinedClassifier, folder: Path) -> list[Path]:
    """Writes the linear part and the weights, and returns the files; the lexicon is written by whoever knows it."""
    content = {
        "weights": dict(zip(("rules", "linear"), classifier.weights, strict=True)),
        "bias": dict(zip(SEVERITIES, classifier.bias, strict=True)),
    }
    write_atomically(folder / WEIGHTS, json.dumps(content, indent=2) + "\n")
    return [*write_linear(classifier.linear, folder), folder / WEIGHTS]


def read_combined(folder: Path, rules: Rules) -> CombinedClassifier:
    """What `write_combined` wrote, with its rules; raises DataError when it is absent or damaged."""
    try:
        content = json.loads((folder / WEIGHTS).read_text(encoding="utf-8"))
        weights = [float(content["weights"][name]) for name in ("rules", "linear")]
        bias = [float(content["bias"][name]) for name in SEVERITIES]
        if not np.isfinite([*weights, *bias]).all() or min(weights) < 0:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"The combination in {folder} is damaged or incomplete: fit it again.") from None
    return CombinedClassifier(rules, read_linear(folder), weights, bias)
