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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sevpeft.errors import DataError
from sevpeft.severity.classifier.calibrate import Calibrated, fit_calibrated, fit_of, source_probabilities, uncalibrated
from sevpeft.severity.classifier.examples import Examples, Fold, block_folds, complete_rows, grouped_folds, hold_out
from sevpeft.severity.classifier.settings import EvaluateSettings, FitSettings
from sevpeft.severity.probabilities import SEVERITIES

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


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; NaN where it is not defined (no critical row, or nothing else)."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class Bin:
    """Rows of nearly one p_critical: how many, their mean p_critical, and the share that is critical."""

    rows: int
    said: float
    came: float


@dataclass(frozen=True)
class ClassifierMetrics:
    """Figures of one set of probabilities.

    Attributes:
        rows: how many were scored.
        labels: rows of each severity.
        figures: name (see `FIGURES`) → estimate; Brier is the sum over severities, from 0 to 2 (Brier 1950).
        confusion: rows are the labels, columns the likeliest severity, both in the order of `SEVERITIES`.
        ece_critical_by_chance: ECE of a perfectly calibrated classifier with as many rows.
        reliability: bins of p_critical, the lowest first.
    """

    rows: int
    labels: dict[str, int]
    figures: dict[str, Estimate]
    confusion: list[list[int]]
    ece_critical_by_chance: float
    reliability: list[Bin]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one protocol, always beside baselines: an accuracy alone flatters.

    Attributes:
        calibrated, raw: the classifier after and before calibration.
        baselines: name → metrics.
        blocks: name → metrics of that block's rows alone, where blocks were held out.
        unscored: blocks that lack a severity; None where blocks are not known.
    """

    calibrated: ClassifierMetrics
    raw: ClassifierMetrics
    baselines: dict[str, ClassifierMetrics]
    blocks: dict[str, ClassifierMetrics]
    unscored: list[str] | None


def fit_and_evaluate(
    examples: Examples, settings: FitSettings | EvaluateSettings, progress: Progress = lambda message: None
) -> tuple[Calibrated, dict[str, Evaluation]]:
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
    found = {
        heading: evaluate_folds(
            examples, folds, lambda train: fit_calibrated(train, fit, settings), settings.seed, progress
        )
        for heading, folds in protocols.items()
    }
    return next(iter(found.values()))[1], {heading: evaluation for heading, (evaluation, _) in found.items()}


def evaluate_fitted(classifier: Calibrated, examples: Examples, seed: int = 0) -> Evaluation:
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
) -> tuple[Evaluation, Calibrated]:
    """Fits on the training rows of every fold; returns an evaluation of all test rows, and the last classifier."""
    tests, scored = [], complete_rows(examples.labels, examples.blocks)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("calibrated", "raw", "majority", "row number")}
    for number, fold in enumerate(folds, start=1):
        progress(f"{fold.name} ({number} of {len(folds)})")
        test = fold.test[scored[fold.test]]
        if not len(test):
            continue
        train, held_out = examples.take(fold.train), examples.take(test)
        classifier = fit(train)
        sources = source_probabilities(classifier.classifier, held_out.questions)
        parts["calibrated"].append(classifier.calibration.apply(*sources))
        parts["raw"].append(uncalibrated(sources))
        parts["majority"].append(_majority(train, len(test)))
        parts["row number"].append(_by_row_number(train, held_out))
        tests.append(test)
    if not tests:
        raise DataError("No block has rows of every severity, so none can be evaluated on; name another block_column.")
    rows = examples.take(np.concatenate(tests))
    found = {name: np.concatenate(part) for name, part in parts.items()}

    def metrics(name: str, keep: np.ndarray | slice = slice(None), resamples: int = 0) -> ClassifierMetrics:
        return score(found[name][keep], rows.labels[keep], rows.groups[keep], seed=seed, resamples=resamples)

    blocks = {}
    if rows.blocks is not None:
        for name in [fold.name for fold in folds if fold.name in rows.blocks]:
            blocks[name] = metrics("calibrated", rows.blocks == name, RESAMPLES)
    evaluation = Evaluation(
        calibrated=metrics("calibrated", resamples=RESAMPLES),
        raw=metrics("raw"),
        baselines={name: metrics(name) for name in ("majority", "row number")},
        blocks=blocks,
        unscored=None if examples.blocks is None else sorted(set(examples.blocks[~scored].tolist())),
    )
    return evaluation, classifier


def score(
    probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> ClassifierMetrics:
    """Figures of probabilities (n, 3) for labels (n,), positions in `SEVERITIES`, and groups (n,) of rows.

    Without resamples there are no intervals.
    """
    compute = _figures(probabilities, labels)
    point = compute(np.ones(len(labels)))
    drawn = [compute(weights) for weights in resampled_weights(groups, seed=seed, resamples=resamples)]
    columns = np.array(drawn).reshape(-1, len(point)).T
    confusion = np.zeros((len(SEVERITIES), len(SEVERITIES)), dtype=np.int64)
    np.add.at(confusion, (labels, probabilities.argmax(axis=1)), 1)
    critical, p_critical = labels == CRITICAL, probabilities[:, CRITICAL]
    bins, random = _bins(p_critical), np.random.default_rng(seed)
    count = len(labels)
    by_chance = [_ece(bins, p_critical - (random.random(count) < p_critical), count) for _ in range(200)]
    return ClassifierMetrics(
        rows=count,
        labels=dict(zip(SEVERITIES, np.bincount(labels, minlength=len(SEVERITIES)).tolist(), strict=True)),
        figures={name: _estimate(*both) for name, *both in zip(FIGURES, point.tolist(), columns, strict=True)},
        confusion=confusion.tolist(),
        ece_critical_by_chance=float(np.mean(by_chance)),
        reliability=[
            Bin(int(inside.sum()), float(p_critical[inside].mean()), float(critical[inside].mean()))
            for inside in (bins == number for number in np.unique(bins))
        ],
    )


def resampled_weights(groups: np.ndarray, *, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, (n,), for every resample: groups with replacement, as many as there are."""
    random = np.random.default_rng(seed)
    distinct, index = np.unique(groups, return_inverse=True)
    for _ in range(resamples):
        drawn = random.integers(len(distinct), size=len(distinct))
        yield np.bincount(drawn, minlength=len(distinct))[index]


def _figures(probabilities: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from weights (n,) of the rows to `FIGURES`.

    What does not depend on the weights is computed once, because a bootstrap calls the function a thousand times.
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


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    defined = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(defined):
        return Estimate(value)
    return Estimate(value, *np.percentile(defined, [2.5, 97.5]).tolist())


def _majority(train: Examples, count: int) -> np.ndarray:
    """(count, 3): for every test row, the shares of the training rows that calibrate too."""
    complete = complete_rows(train.labels, train.blocks)
    labels = train.labels[complete] if complete.any() else train.labels
    return np.tile(np.bincount(labels, minlength=len(SEVERITIES)) / len(labels), (count, 1))


def _by_row_number(train: Examples, test: Examples) -> np.ndarray:
    """(n, 3) for the rows of `test`, from a tree on nothing but the number of the row."""
    from sklearn.tree import DecisionTreeClassifier

    # Fewer rows in a leaf would let the tree learn single rows.
    leaf = max(1, min(20, len(train) // 4))
    tree = DecisionTreeClassifier(min_samples_leaf=leaf, random_state=0).fit(train.rows[:, None], train.labels)
    found: np.ndarray = tree.predict_proba(test.rows[:, None])  # the training rows of a fold have every severity
    return found
