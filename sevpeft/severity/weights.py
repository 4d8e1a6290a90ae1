"""One loss weight (n,) per consultation from severity probabilities (n, 3), and what a set of weights amounts to.

The weight is w = α·p_non_critical + β·p_neutral + γ·p_critical (arXiv 2604.06346, eq. 2). As controls, the same weights
shuffled have the same spread without the information, and a constant of the same mean has the same step size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from sevpeft.data.columns import as_probability
from sevpeft.errors import WeightError
from sevpeft.severity.probabilities import SEVERITIES, check_rows

# Coefficient of variation below which weights do nothing; the published ones, from .93 to 1.03, have about .02.
SMALL_SPREAD = 0.05
# Below this share of effective consultations, a few rows decide what is learned.
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
        coefficients: (α, β, γ), the weight of a surely non-critical, neutral and critical consultation. Ready-made
            weights are (n, 1) with the coefficient 1.
        normalize: "mean" divides by the mean over the n consultations: the step size is that of plain cross-entropy.
        control: "shuffled" (permuted by `seed`), "constant" (their mean for all) or "uniform" (1: plain cross-entropy);
            1 for "oversampled" too, whose rows are those of `oversample`.

    Raises WeightError where a weight is not finite or negative, or all are zero.
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
    """Weights (n,), finite and not negative, that a column holds; raises WeightError, or DataError for text."""
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

    Systematic sampling (Madow 1949): a row comes floor(n·w/Σw) or one more times, so that equal weights draw each once.
    """
    order, places = np.random.default_rng(seed).permutation(len(weights)), np.arange(len(weights))
    # Moved by half a step, so that rounding of the sum leaves no row out where all weights are equal.
    drawn = np.searchsorted(np.cumsum(weights[order]) / weights.sum() * len(weights), places + 0.5, side="right")
    return np.sort(order[np.minimum(drawn, len(weights) - 1)])


@dataclass(frozen=True)
class WeightSummary:
    """What a set of weights amounts to."""

    consultations: int
    severities: dict[str, int]  # the most probable severity → consultations
    minimum: float
    maximum: float
    mean: float
    coefficient_of_variation: float  # standard deviation over the mean
    effective_sample_size: float  # Kish's (Σw)² / Σw²: equally weighted consultations with as much information
    # (from, to, consultations), ends included: one bar for each weight where there are few, else of equal width.
    histogram: list[tuple[float, float, int]]

    @classmethod
    def of(cls, weights: np.ndarray, strata: np.ndarray | None) -> WeightSummary:
        """Args: weights (n,); strata (n,) positions in `SEVERITIES`, -1 or None where severity is not known."""
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def histogram_lines(histogram: list[tuple[float, float, int]], width: int = 60) -> list[str]:
    """Lines for (from, to, count) as `WeightSummary.histogram` holds them, also after a way through JSON."""
    finest = min((round(high - low, 9) for low, high, _ in histogram if high > low), default=0.01)
    places = 2 if finest >= 0.01 else 3 if finest >= 0.001 else 4
    labels = [" to ".join(f"{end:.{places}f}" for end in sorted({low, high})) for low, high, _ in histogram]
    counts = [count for _, _, count in histogram]
    left, right = max(map(len, labels)), len(f"{max(counts):,}")
    room = max(1, width - left - right - 4)
    # A bar that holds anything is never drawn as none.
    bars = ["█" * max(round(room * count / max(counts)), min(count, 1)) for count in counts]
    rows = zip(labels, bars, counts, strict=True)
    return [f"{label:>{left}}  {bar:<{room}}  {count:>{right},}" for label, bar, count in rows]


def effective_sample(summary: WeightSummary) -> str:
    """`257 of 300 (86%)`."""
    share = summary.effective_sample_size / summary.consultations
    return f"{summary.effective_sample_size:,.0f} of {summary.consultations:,} ({share:.0%})"


def advice(summary: WeightSummary) -> str | None:
    """What to do about weights that will not do what they are for; None when they are fit for it."""
    if summary.coefficient_of_variation < SMALL_SPREAD:
        spread = f"The weights, {summary.minimum:.4g} to {summary.maximum:.4g}, are too close together to matter"
        return f"{spread}: run sevpeft classifier fit, or set severity.temperature=0.5 or severity.weights=strong."
    if summary.effective_sample_size < SMALL_SAMPLE * summary.consultations:
        few = f"The effective sample size is {effective_sample(summary)}: a few consultations decide what is learned"
        return f"{few}. Use coefficients that lie closer together, or set severity.temperature=2."
    return None
