"""From probabilities and labels to what a classifier is worth: figures with 95 % intervals, and a trade-off curve.

Intervals come from a bootstrap over groups (duplicates of a question are drawn together), by percentiles; one draw of
the groups serves all figures, so that two classifiers on the same rows can be compared pair by pair.

ECE, the expected calibration error, is the mean over rows of |mean probability − share of hits| of the row's bin, the
bins being 15 of equal mass (rows of one probability stay in one bin; Nguyen & O'Connor 2015). `ece_critical` takes
p_critical against being critical, `ece_top` the largest probability against being right. With few rows a perfectly
calibrated classifier has an ECE above zero too, so `ece_…_if_perfect` gives what it would have here: the mean over
labels drawn from the very probabilities that are judged. Bootstrapped ECE errs upwards for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from sevpeft.severity.probabilities import SEVERITIES

CRITICAL = SEVERITIES.index("critical")
BINS = 15
RESAMPLES = 1000
# Rows times resamples that are held at once: 32 MB a matrix.
_AT_ONCE = 4_000_000

FIGURES = (
    "accuracy",
    "macro_f1",
    "recall_critical",
    "precision_critical",
    "auc_critical",
    "brier",
    "ece_critical",
    "ece_top",
)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; NaN where it is not defined (no critical row, or nothing else)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Rows of nearly one probability: how many, what was said, and how often it was so."""

    rows: int
    said: float
    came: float


@dataclass(frozen=True)
class Threshold:
    """What calling every row critical whose p_critical is at least `threshold` would give."""

    threshold: float
    flagged: float
    """Share of all rows that are called critical."""
    recall: Estimate
    precision: Estimate


@dataclass(frozen=True)
class Judgement:
    """What was found out about one set of probabilities.

    Attributes:
        rows, groups: how many were judged.
        labels: rows of each severity.
        figures: name (see `FIGURES`) → estimate; Brier is the sum over classes, from 0 to 2 (Brier 1950).
        confusion: rows are the labels, columns the likeliest severity, both in the order of `SEVERITIES`.
        ece_critical_if_perfect, ece_top_if_perfect: ECE that chance alone gives with as many rows.
        reliability: bins of p_critical.
        curve: recall and precision of critical over thresholds, the lowest first; empty where it was not asked for.
    """

    rows: int
    groups: int
    labels: dict[str, int]
    figures: dict[str, Estimate]
    confusion: list[list[int]]
    ece_critical_if_perfect: float
    ece_top_if_perfect: float
    reliability: list[Bin] = field(default_factory=list)
    curve: list[Threshold] = field(default_factory=list)


def judge(
    probabilities: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    curve: bool = True,
) -> Judgement:
    """Judge probabilities (n, 3) by labels (n,), positions in `SEVERITIES`; rows of one group (n,) are one draw."""
    statistics = _Statistics(probabilities, labels)
    point = {name: float(value[0]) for name, value in statistics.of(np.ones((1, len(labels)))).items()}
    drawn = bootstrap(probabilities, labels, groups, seed=seed, resamples=resamples)
    predicted = probabilities.argmax(axis=1)
    confusion = np.zeros((len(SEVERITIES), len(SEVERITIES)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    critical = labels == CRITICAL
    counts = np.bincount(labels, minlength=len(SEVERITIES)).tolist()
    random = np.random.default_rng(seed)
    top = probabilities.max(axis=1)
    return Judgement(
        rows=len(labels),
        groups=len(np.unique(groups)),
        labels=dict(zip(SEVERITIES, counts, strict=True)),
        figures={name: _estimate(point[name], drawn[name]) for name in FIGURES},
        confusion=confusion.tolist(),
        ece_critical_if_perfect=_ece_by_chance(probabilities[:, CRITICAL], random),
        ece_top_if_perfect=_ece_by_chance(top, random),
        reliability=reliability_bins(probabilities[:, CRITICAL], critical),
        curve=threshold_curve(probabilities[:, CRITICAL], critical, groups, seed=seed, resamples=resamples)
        if curve
        else [],
    )


def bootstrap(
    probabilities: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, np.ndarray]:
    """Every figure in every resample, (resamples,): the same draws for the same groups and seed."""
    statistics = _Statistics(probabilities, labels)
    parts = [statistics.of(weights) for weights in resampled_weights(groups, seed=seed, resamples=resamples)]
    return {name: np.concatenate([part[name] for part in parts]) for name in FIGURES}


def judge_positive(
    scores: np.ndarray, positive: np.ndarray, groups: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Estimate, list[Threshold]]:
    """AUC of scores (n,) for a yes or no (n,) that is not a severity, and the curve: how far a classifier transfers."""
    statistics = _Ranking(scores, positive)
    point = float(statistics.auc(np.ones((1, len(scores))))[0])
    weights = resampled_weights(groups, seed=seed, resamples=resamples)
    drawn = np.concatenate([statistics.auc(part) for part in weights])
    return _estimate(point, drawn), threshold_curve(scores, positive, groups, seed=seed, resamples=resamples)


def resampled_weights(groups: np.ndarray, *, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, (part of the resamples, n): groups with replacement, as many as there are."""
    random = np.random.default_rng(seed)
    distinct, index = np.unique(groups, return_inverse=True)
    size = max(1, _AT_ONCE // max(1, len(index)))
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        times = np.empty((count, len(distinct)))
        for row in times:
            row[:] = np.bincount(random.integers(len(distinct), size=len(distinct)), minlength=len(distinct))
        yield times[:, index]


def reliability_bins(scores: np.ndarray, hits: np.ndarray) -> list[Bin]:
    """Bins of equal mass of scores (n,) with the share of `hits` (n,) in each, the lowest scores first."""
    index = _bins(scores)
    return [
        Bin(int(inside.sum()), float(scores[inside].mean()), float(hits[inside].mean()))
        for inside in (index == number for number in np.unique(index))
    ]


def threshold_curve(
    scores: np.ndarray,
    positive: np.ndarray,
    groups: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    points: int = 60,
) -> list[Threshold]:
    """Recall and precision where scores (n,) reach a threshold, at up to `points` of the scores, the lowest first.

    The highest threshold still flags a share of 1 / points: the rates of fewer rows are chance.
    """
    thresholds = np.unique(np.quantile(scores, np.linspace(0, 1 - 1 / points, points), method="lower"))
    flagged = (scores[:, None] >= thresholds).astype(float)
    hits = flagged * positive[:, None]

    def rates(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        caught = weights @ hits
        with np.errstate(invalid="ignore", divide="ignore"):
            return caught / (weights @ positive)[:, None], caught / (weights @ flagged)

    recall, precision = (part[0] for part in rates(np.ones((1, len(scores)))))
    drawn = [rates(weights) for weights in resampled_weights(groups, seed=seed, resamples=resamples)]
    recalls, precisions = (np.concatenate([part[i] for part in drawn]) for i in (0, 1))
    return [
        Threshold(
            float(threshold),
            float(flagged[:, i].mean()),
            _estimate(float(recall[i]), recalls[:, i]),
            _estimate(float(precision[i]), precisions[:, i]),
        )
        for i, threshold in enumerate(thresholds)
    ]


class _Ranking:
    """AUC of fixed scores under many weightings of the rows: sorted once, ties counted half (Mann & Whitney 1947)."""

    def __init__(self, scores: np.ndarray, positive: np.ndarray) -> None:
        self._order = np.argsort(scores, kind="stable")
        ordered = scores[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self._positive = positive[self._order].astype(float)

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """(b, n) → (b,); NaN where one side has no weight."""
        ordered = weights[:, self._order]
        yes = np.add.reduceat(ordered * self._positive, self._starts, axis=1)
        no = np.add.reduceat(ordered * (1 - self._positive), self._starts, axis=1)
        below = np.cumsum(no, axis=1) - no / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            result: np.ndarray = (yes * below).sum(axis=1) / (yes.sum(axis=1) * no.sum(axis=1))
        return result


class _Statistics:
    """All figures of fixed probabilities and labels under many weightings of the rows."""

    def __init__(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        classes = len(SEVERITIES)
        predicted = probabilities.argmax(axis=1)
        critical = (labels == CRITICAL).astype(float)
        p_critical, top = probabilities[:, CRITICAL], probabilities.max(axis=1)
        self._cells = np.eye(classes * classes)[labels * classes + predicted]
        self._brier = ((probabilities - np.eye(classes)[labels]) ** 2).sum(axis=1)
        self._gaps_critical = _gaps(p_critical, critical)
        self._gaps_top = _gaps(top, (predicted == labels).astype(float))
        self._ranking = _Ranking(p_critical, critical)

    def of(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """(b, n) → figure → (b,). A class that is neither there nor predicted does not enter the mean of F1."""
        total = weights.sum(axis=1)
        cells = (weights @ self._cells).reshape(len(weights), len(SEVERITIES), len(SEVERITIES))
        hits = np.diagonal(cells, axis1=1, axis2=2)
        there, predicted = cells.sum(axis=2), cells.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = hits[:, CRITICAL] / there[:, CRITICAL]
            # None predicted is a precision of 0, as scikit-learn has it: silence must not look like care.
            precision = np.where(predicted[:, CRITICAL] > 0, hits[:, CRITICAL] / predicted[:, CRITICAL], 0.0)
            f1 = 2 * hits / (there + predicted)
        return {
            "accuracy": hits.sum(axis=1) / total,
            "macro_f1": np.nanmean(f1, axis=1),
            "recall_critical": recall,
            "precision_critical": precision,
            "auc_critical": self._ranking.auc(weights),
            "brier": weights @ self._brier / total,
            "ece_critical": np.abs(weights @ self._gaps_critical).sum(axis=1) / total,
            "ece_top": np.abs(weights @ self._gaps_top).sum(axis=1) / total,
        }


def _bins(scores: np.ndarray) -> np.ndarray:
    """(n,) number of the bin of equal mass that a score belongs to."""
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.searchsorted(edges, scores, side="right")


def _gaps(scores: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """(n, bins): score minus hit, in the column of the row's bin; a weighted column sum is a bin's miscalibration."""
    index = _bins(scores)
    gaps = np.zeros((len(scores), index.max() + 1))
    gaps[np.arange(len(scores)), index] = scores - hits
    return gaps


def _ece_by_chance(scores: np.ndarray, random: np.random.Generator, draws: int = 200) -> float:
    inside = np.eye(_bins(scores).max() + 1)[_bins(scores)]
    errors = [
        np.abs((scores - (random.random(len(scores)) < scores)) @ inside).sum() / len(scores) for _ in range(draws)
    ]
    return float(np.mean(errors))


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    defined = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(defined):
        return Estimate(float("nan"), float("nan"), float("nan"))
    low, high = np.percentile(defined, [2.5, 97.5])
    return Estimate(value, float(low), float(high))
