"""Computes one loss weight (n,) per consultation from severity probabilities (n, 3), and summarizes the weights.

The weight is w = α·p_non_critical + β·p_neutral + γ·p_critical (arXiv 2604.06346, eq. 2). Two controls: shuffled
weights have the same spread without the information, and a constant of the same mean has the same step size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from datasets import Dataset

from sevpeft.data.columns import as_probability
from sevpeft.errors import WeightError
from sevpeft.severity.probabilities import SEVERITIES, check_rows

# Below this coefficient of variation weights have no effect; the published ones, from .93 to 1.03, have about .02.
SMALL_SPREAD = 0.05
# Below this effective share of the consultations, a few rows dominate the training.
SMALL_SAMPLE = 0.5


def severity_weights(
    probabilities: np.ndarray,
    coefficients: tuple[float, ...],
    *,
    normalize: Literal["none", "mean"] = "none",
    control: Literal["none", "shuffled", "constant", "uniform", "oversampled"] = "none",
    seed: int = 0,
) -> np.ndarray:
    """Loss weight of every consultation: (n,), float64, finite, non-negative, not all zero.

    Args:
        probabilities: (n, 3), in the order of `SEVERITIES`, each row summing to one.
        coefficients: (α, β, γ), the weight of a certainly non-critical, neutral and critical consultation. Ready-made
            weights are (n, 1) with the coefficient 1.
        normalize: "mean" divides by the mean over the n consultations, which keeps the step size of cross-entropy.
        control: "shuffled" (permuted with `seed`), "constant" (the mean for all), "uniform" (1: plain cross-entropy),
            or "oversampled" (1, for the rows of `oversample`).

    Raises WeightError if a weight is negative or not finite, or if all are zero.
    """
    weights = np.asarray(probabilities @ np.asarray(coefficients, dtype=np.float64))
    if wrong := int((~(np.isfinite(weights) & (weights >= 0))).sum()):
        raise WeightError(f"{wrong} severity weights are negative or not finite; use coefficients of zero or more.")
    if not weights.any():
        raise WeightError("All severity weights are zero, or there are none, so nothing would be learned.")
    if normalize == "mean":
        weights = weights / weights.mean()
    if control == "shuffled":
        return np.random.default_rng(seed).permutation(weights)
    if control != "none":
        return np.full_like(weights, weights.mean() if control == "constant" else 1.0)
    return weights


def ready_weights(rows: Dataset, column: str) -> np.ndarray:
    """Reads weights (n,) from a column; WeightError for one missing, negative or infinite, DataError for text."""
    if column not in rows.column_names:
        raise WeightError(f"The data has no column '{column}' of weights; name one with severity.weight_column=NAME.")
    numbers = rows["row"] if "row" in rows.column_names else range(1, len(rows) + 1)
    cells = zip(rows[column], numbers, strict=True)
    weights = np.array([as_probability(cell, column, f"Row {number}") for cell, number in cells])
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    check_rows(rows, wrong, f"column '{column}' is empty, negative or infinite; write a weight, or remove the rows.")
    return weights


def oversample(weights: np.ndarray, seed: int) -> np.ndarray:
    """Positions (n,), ascending, of n rows drawn in proportion to their weights (n,).

    Systematic sampling (Madow 1949): a row is drawn floor(n·w/Σw) times or once more; equal weights draw each row once.
    """
    order, places = np.random.default_rng(seed).permutation(len(weights)), np.arange(len(weights))
    # The offset of half a step keeps every row if all weights are equal, despite rounding of the sum.
    drawn = np.searchsorted(np.cumsum(weights[order]) / weights.sum() * len(weights), places + 0.5, side="right")
    return np.sort(order[np.minimum(drawn, len(weights) - 1)])


@dataclass(frozen=True)
class WeightSummary:
    """Statistics of a set of weights."""

    consultations: int
    severities: dict[str, int]  # most probable severity → consultations
    minimum: float
    maximum: float
    mean: float
    coefficient_of_variation: float  # standard deviation over the mean
    effective_sample_size: float  # Kish's (Σw)² / Σw²: equally weighted consultations with as much information
    # (from, to, consultations), with both ends: one bar per weight if there are few, else ten bars of equal width.
    histogram: list[tuple[float, float, int]]

    @classmethod
    def of(cls, weights: np.ndarray, strata: np.ndarray | None) -> WeightSummary:
        """Args: weights (n,); strata (n,), positions in `SEVERITIES`, with -1 or None for an unknown severity."""
        known = strata is not None and (strata >= 0).all()
        counts = np.bincount(np.asarray(strata), minlength=len(SEVERITIES)).tolist() if known else []
        lows, bars = np.unique(np.round(weights, 6), return_counts=True)
        highs = lows
        if len(lows) > 10:
            bars, edges = np.histogram(weights, bins=10)
            lows, highs = edges[:-1], edges[1:]
        return cls(
            consultations=len(weights),
            severities=dict(zip(SEVERITIES, counts, strict=False)),
            minimum=float(weights.min()),
            maximum=float(weights.max()),
            mean=float(weights.mean()),
            coefficient_of_variation=float(weights.std() / weights.mean()),
            effective_sample_size=float(weights.sum() ** 2 / np.square(weights).sum()),
            histogram=list(zip(lows.tolist(), highs.tolist(), bars.tolist(), strict=True)),
        )


def histogram_lines(histogram: list[tuple[float, float, int]], width: int = 60) -> list[str]:
    """Text lines for the (from, to, count) of `WeightSummary.histogram`, also after a round trip through JSON."""
    finest = min((round(high - low, 9) for low, high, _ in histogram if high > low), default=0.01)
    places = 2 if finest >= 0.01 else 3 if finest >= 0.001 else 4
    labels = [" to ".join(f"{end:.{places}f}" for end in sorted({low, high})) for low, high, _ in histogram]
    counts = [count for _, _, count in histogram]
    left, right = max(map(len, labels)), len(f"{max(counts):,}")
    room = max(1, width - left - right - 4)
    # A bar with at least one row has at least one block.
    bars = ["█" * max(round(room * count / max(counts)), min(count, 1)) for count in counts]
    rows = zip(labels, bars, counts, strict=True)
    return [f"{label:>{left}}  {bar:<{room}}  {count:>{right},}" for label, bar, count in rows]


def effective_sample(summary: WeightSummary) -> str:
    """`257 of 300 (86%)`."""
    share = summary.effective_sample_size / summary.consultations
    return f"{summary.effective_sample_size:,.0f} of {summary.consultations:,} ({share:.0%})"


def advice(summary: WeightSummary) -> str | None:
    """A warning with a remedy for weights with no effect, or with too much of it on few rows; None for good weights."""
    if summary.coefficient_of_variation < SMALL_SPREAD:
        spread = f"The weights, {summary.minimum:.4g} to {summary.maximum:.4g}, are too close together to matter"
        return f"{spread}: run sevpeft classifier fit, or set severity.temperature=0.5 or severity.weights=strong."
    if summary.effective_sample_size < SMALL_SAMPLE * summary.consultations:
        few = f"The effective sample size is {effective_sample(summary)}: a few consultations dominate the training"
        return f"{few}. Use coefficients that are closer together, or set severity.temperature=2."
    return None
