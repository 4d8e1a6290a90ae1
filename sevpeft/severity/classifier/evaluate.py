"""Evaluation of a classifier on rows that it did not see: random folds of whole questions, or one block at a time.

Within a file, rows that stand together were often written and labeled together, and a classifier that learns the
place looks like one that reads the text. Holding out whole blocks avoids that. Beside every figure stand two baselines
that read no text, the majority and the number of the row. Blocks that lack a severity are trained on and not scored:
their shares are those of other conditions.

The 95 % intervals are percentiles of a bootstrap over groups: rows that ask the same are drawn together.

ECE, the expected calibration error, is the mean over rows of |mean probability − share of hits| of the row's bin, the
bins being 15 of equal mass (Nguyen & O'Connor 2015). `ece_critical` takes p_critical against being critical, `ece_top`
the largest probability against being right. With few rows a perfectly calibrated classifier has an ECE above zero
too: `ece_critical_by_chance` is its mean over labels that are drawn from the very probabilities. For the same reason
its intervals lie too high.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sevpeft.errors import DataError
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration, fit_calibrated, fit_of
from sevpeft.severity.classifier.examples import Examples, Fold, block_folds, grouped_folds, hold_out
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.settings import EvaluateSettings, FitSettings

CRITICAL = SEVERITIES.index("critical")
FIGURES = (
    "accuracy",
    "macro_f1",
    "recall_critical",
    "precision_critical",
    *(f"auc_{name}" for name in SEVERITIES),
    "brier",
    "log_loss",
    "ece_critical",
    "ece_top",
)
BINS, RESAMPLES = 15, 1000

Progress = Callable[[str], None]


Metrics = dict[str, Any]
"""An evaluation as metrics.json has it.

Metrics under `calibrated` and `raw` (before calibration), and by name under `baselines` (an accuracy alone flatters)
and `blocks` (each held-out block alone); `unscored` lists blocks that lack a severity, null where blocks are not known.
Metrics of one set of probabilities are `rows`; `figures`, name → value, low and high of the 95 % interval, NaN where
not defined; `confusion`, rows the labels, columns the likeliest severity; and `ece_critical_by_chance`.
"""


def fit_and_evaluate(
    examples: Examples, settings: FitSettings | EvaluateSettings, progress: Progress = lambda message: None
) -> tuple[Calibrated, dict[str, Metrics]]:
    """Evaluates a way of fitting; returns the first classifier and heading → evaluation.

    With `FitSettings` on a share of whole questions, else on random folds of them; where blocks are known, also by
    holding out each block.
    """
    fit = fit_of(settings, progress)
    if isinstance(settings, FitSettings):
        protocols = {"Test rows": [hold_out(examples, settings.test_size, seed=settings.seed)]}
    else:
        protocols = {"Random folds": grouped_folds(examples, settings.folds, seed=settings.seed)}
    if examples.blocks is not None:
        protocols["Blocks held out"] = block_folds(examples)
    found = {}
    for heading, folds in protocols.items():
        found[heading] = evaluate_folds(
            examples, folds, lambda train: fit_calibrated(train, fit, settings), settings.seed, progress
        )
    return next(iter(found.values()))[1], {heading: evaluation for heading, (evaluation, _) in found.items()}


def evaluate_fitted(classifier: Calibrated, examples: Examples, seed: int = 0) -> Metrics:
    """Evaluates a fitted classifier on data that it was not fitted on; only the baselines are fitted, out of fold."""
    groups = [len(np.unique(examples.groups[examples.labels == k])) for k in range(len(SEVERITIES))]
    folds = grouped_folds(examples, max(2, min(5, *groups)), seed=seed)
    return evaluate_folds(examples, folds, lambda train: classifier, seed)[0]


def evaluate_folds(
    examples: Examples,
    folds: Sequence[Fold],
    fit: Callable[[Examples], Calibrated],
    seed: int = 0,
    progress: Progress = lambda message: None,
) -> tuple[Metrics, Calibrated]:
    """Fits on the training rows of every fold; returns an evaluation of all test rows, and the last classifier."""
    from sklearn.dummy import DummyClassifier
    from sklearn.tree import DecisionTreeClassifier

    scored = examples.complete
    tests, parts = [], []
    for number, fold in enumerate(folds, start=1):
        progress(f"{fold.name} ({number} of {len(folds)})")
        tested = fold.test[scored[fold.test]]
        if not len(tested):
            continue
        train, test = examples.take(fold.train), examples.take(tested)
        classifier = fit(train)
        sources = [source.probabilities(test.questions) for source in classifier.sources]
        part = {
            "calibrated": classifier.calibration.apply(*sources),
            "raw": Calibration((1 / len(sources),) * len(sources)).apply(*sources),
        }
        # Baselines learn from the rows that calibrate. With fewer rows in a leaf the tree would learn single rows.
        known = train.take(np.flatnonzero(train.complete))
        tree = DecisionTreeClassifier(min_samples_leaf=max(1, min(20, len(known) // 4)), random_state=0)
        for name, baseline in (("majority", DummyClassifier(strategy="prior")), ("row number", tree)):
            part[name] = baseline.fit(known.rows[:, None], known.labels).predict_proba(test.rows[:, None])
        tests.append(tested)
        parts.append(part)
    if not parts:
        raise DataError("No row to test on is in a block with every severity; name another block_column.")
    rows = examples.take(np.concatenate(tests))
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def metrics(name: str, keep: np.ndarray | slice = slice(None), resamples: int = 0) -> Metrics:
        return score(found[name][keep], rows.labels[keep], rows.groups[keep], seed=seed, resamples=resamples)

    held_out = [fold.name for fold in folds if rows.blocks is not None and fold.name in rows.blocks]
    evaluation = {
        "calibrated": metrics("calibrated", resamples=RESAMPLES),
        "raw": metrics("raw"),
        "baselines": {name: metrics(name) for name in ("majority", "row number")},
        "blocks": {name: metrics("calibrated", np.asarray(rows.blocks == name), RESAMPLES) for name in held_out},
        "unscored": None if examples.blocks is None else sorted(set(examples.blocks[~scored].tolist())),
    }
    return evaluation, classifier


def score(
    probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Metrics:
    """Figures of probabilities (n, 3) for labels (n,), positions in `SEVERITIES`, and groups (n,) of rows.

    Without resamples there are no intervals.
    """
    compute = _figures(probabilities, labels)
    random = np.random.default_rng(seed)
    # Groups are drawn with replacement, as many as there are; the weight of a row is how often its group was drawn.
    _, index = np.unique(groups, return_inverse=True)
    chance = np.full(index.max() + 1, 1 / (index.max() + 1))
    drawn = [compute(random.multinomial(len(chance), chance)[index]) for _ in range(resamples)]
    columns = np.array(drawn).reshape(-1, len(FIGURES)).T
    count, classes, p_critical = len(labels), len(SEVERITIES), probabilities[:, CRITICAL]
    cells = np.bincount(labels * classes + probabilities.argmax(axis=1), minlength=classes**2)
    bins = _bins(p_critical)
    by_chance = [_ece(bins, p_critical - (random.random(count) < p_critical), count) for _ in range(200)]
    return {
        "rows": count,
        "figures": dict(zip(FIGURES, map(_estimate, compute(np.ones(count)).tolist(), columns), strict=True)),
        "confusion": cells.reshape(classes, classes).tolist(),
        "ece_critical_by_chance": float(np.mean(by_chance)),
    }


def _figures(probabilities: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from weights (n,) of the rows to `FIGURES`.

    What does not depend on the weights is computed once, because a bootstrap calls the function a thousand times; the
    functions of scikit-learn would take a hundred times as long.
    """
    classes, p_critical = len(SEVERITIES), probabilities[:, CRITICAL]
    truth, predicted = np.eye(classes, dtype=bool)[labels], probabilities.argmax(axis=1)
    brier = ((probabilities - truth) ** 2).sum(axis=1)
    log_loss = -np.log(np.maximum(probabilities[truth], 1e-15))
    ranks = [np.unique(column, return_inverse=True)[1] for column in probabilities.T]
    top = probabilities.max(axis=1)
    gaps = [(_bins(p_critical), p_critical - truth[:, CRITICAL]), (_bins(top), top - (predicted == labels))]

    def compute(weights: np.ndarray) -> np.ndarray:
        total = weights.sum()
        cells = np.bincount(labels * classes + predicted, weights, classes**2).reshape(classes, classes)
        hits, actual, called = np.diagonal(cells), cells.sum(axis=1), cells.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            figures = [
                hits.sum() / total,
                # A severity that is neither there nor predicted does not enter the mean.
                np.nanmean(2 * hits / (actual + called)),
                hits[CRITICAL] / actual[CRITICAL],
                # None predicted is a precision of 0, as scikit-learn has it: silence must not look like care.
                hits[CRITICAL] / called[CRITICAL] if called[CRITICAL] else 0.0,
                *(_auc(rank, truth[:, k], weights) for k, rank in enumerate(ranks)),
                weights @ brier / total,
                weights @ log_loss / total,
                *(_ece(bins, weights * gap, total) for bins, gap in gaps),
            ]
        return np.array(figures)

    return compute


def _auc(rank: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half (Mann & Whitney 1947); NaN where one side has no weight."""
    yes, no = np.bincount(rank, weights * positive), np.bincount(rank, weights * ~positive)
    return float(yes @ (np.cumsum(no) - no / 2) / (yes.sum() * no.sum()))


def _bins(scores: np.ndarray) -> np.ndarray:
    """(n,) number of the bin of equal mass that a score belongs to; rows of one score stay in one bin."""
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.searchsorted(edges, scores, side="right")


def _ece(bins: np.ndarray, gaps: np.ndarray, total: float) -> float:
    return float(np.abs(np.bincount(bins, gaps)).sum() / total)


def _estimate(value: float, drawn: np.ndarray) -> dict[str, float]:
    defined = drawn[np.isfinite(drawn)]
    known = np.isfinite(value) and len(defined)
    low, high = np.percentile(defined, [2.5, 97.5]).tolist() if known else (np.nan, np.nan)
    return {"value": value, "low": low, "high": high}
