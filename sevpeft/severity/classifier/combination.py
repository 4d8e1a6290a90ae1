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
from pathlib import Path

import numpy as np

from sevpeft.errors import DataError
from sevpeft.runs import write_atomically
from sevpeft.severity.classifier.calibration import fit_log_linear, log_linear
from sevpeft.severity.classifier.crossvalidation import grouped_folds
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


def fit_combined(examples: Examples, rules: Rules, seed: int = 0) -> CombinedClassifier:
    """Fits the linear part to all examples, and the weights by its probabilities out of fold.

    Raises:
        DataError: a severity has fewer groups than the five folds.
    """
    out_of_fold = np.empty((len(examples), len(SEVERITIES)))
    for fold in grouped_folds(examples, seed=seed):
        train = examples.take(fold.train)
        part = fit_linear(train, seed)
        out_of_fold[fold.test] = part.probabilities([examples.questions[i] for i in fold.test])
    complete = complete_rows(examples.labels, examples.blocks)
    rows = complete if complete.any() else ~complete
    sources = [rules.probabilities(examples.questions)[rows], out_of_fold[rows]]
    weights, bias = fit_log_linear(sources, examples.labels[rows])
    return CombinedClassifier(rules, fit_linear(examples, seed), weights, bias)


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
