"""Turns severity probabilities (n, 3) into one loss weight per consultation (n,), and says what the weights amount to.

The weight of a consultation is w = α·p_non_critical + β·p_neutral + γ·p_critical (arXiv 2604.06346, eq. 2). The three
controls exist because a gain over plain cross-entropy proves nothing about severity: the same weights shuffled over
the consultations have the same spread without the information, a constant of the same mean has the same step size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sevpeft.errors import WeightError
from sevpeft.severity.probabilities import SEVERITIES

# Below this coefficient of variation, shuffled and real weights cannot be told apart in practice: the published
# probabilities, whose weights lie between .93 and 1.03, have about .02.
SMALL_SPREAD = 0.05


def severity_weights(
    probabilities: np.ndarray,
    coefficients: tuple[float, float, float],
    *,
    normalize: str = "none",
    control: str = "none",
    seed: int = 0,
) -> np.ndarray:
    """Loss weight of every consultation.

    Args:
        probabilities: (n, 3), in the order of `SEVERITIES`, each row summing to one.
        coefficients: (α, β, γ), the weight of a surely non-critical, neutral and critical consultation.
        normalize: "none", or "mean" to divide by the mean over the n consultations, so that the step size is that
            of plain cross-entropy.
        control: "none"; "shuffled" (the same weights, permuted over the consultations); "constant" (their mean for
            everyone); "uniform" (1 for everyone: plain cross-entropy).
        seed: of the permutation.

    Returns:
        Array (n,), float64, finite, non-negative, not all zero.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] != len(SEVERITIES):
        raise WeightError(f"Severity probabilities must have the shape (n, 3), not {probabilities.shape}.")
    weights = checked_weights(probabilities @ np.asarray(coefficients, dtype=np.float64))
    if normalize == "mean":
        weights = weights / weights.mean()
    elif normalize != "none":
        raise WeightError(f"severity.normalize is {normalize!r}; it can be none or mean.")
    if control == "shuffled":
        return np.random.default_rng(seed).permutation(weights)
    if control == "constant":
        return np.full_like(weights, weights.mean())
    if control == "uniform":
        return np.ones_like(weights)
    if control != "none":
        raise WeightError(f"severity.control is {control!r}; it can be none, shuffled, constant or uniform.")
    return weights


def checked_weights(weights: np.ndarray) -> np.ndarray:
    """The weights as float64, refused when one is missing, not finite or negative, or when all are zero."""
    weights = np.asarray(weights, dtype=np.float64)
    if weights.size == 0:
        raise WeightError("There are no consultations to weight; look at the counts of rejected rows.")
    if not np.isfinite(weights).all():
        raise WeightError(f"{int((~np.isfinite(weights)).sum())} severity weights are missing or not finite.")
    if (weights < 0).any():
        raise WeightError(
            f"{int((weights < 0).sum())} severity weights are negative, which would teach the model to avoid the "
            "answer; use coefficients of zero or more."
        )
    if not weights.any():
        raise WeightError("All severity weights are zero, so nothing would be learnt; raise a coefficient.")
    return weights


@dataclass(frozen=True)
class WeightSummary:
    """What a set of weights amounts to.

    `effective_sample_size` is Kish's (Σw)² / Σw²: how many equally weighted consultations carry as much information.
    `coefficient_of_variation` is the standard deviation over the mean. `severities` counts the most probable severity.
    `histogram` holds (from, to, consultations) with both ends included: one bar for each weight where there are few,
    else bars of equal width.
    """

    consultations: int
    severities: dict[str, int]
    minimum: float
    maximum: float
    mean: float
    coefficient_of_variation: float
    effective_sample_size: float
    quantiles: dict[str, float]
    histogram: list[tuple[float, float, int]]

    @classmethod
    def of(cls, weights: np.ndarray, strata: np.ndarray | None) -> WeightSummary:
        """Args: weights (n,); strata (n,) positions in `SEVERITIES`, or None when severity is not known."""
        levels = (0.05, 0.25, 0.5, 0.75, 0.95)
        counts = {} if strata is None else dict(enumerate(np.bincount(strata, minlength=len(SEVERITIES)).tolist()))
        return cls(
            consultations=len(weights),
            severities={SEVERITIES[index]: count for index, count in counts.items()},
            minimum=float(weights.min()),
            maximum=float(weights.max()),
            mean=float(weights.mean()),
            coefficient_of_variation=float(weights.std() / weights.mean()),
            effective_sample_size=float(weights.sum() ** 2 / np.square(weights).sum()),
            quantiles={f"{level:g}": float(np.quantile(weights, level)) for level in levels},
            histogram=histogram_of(weights),
        )

    @property
    def too_small_to_matter(self) -> bool:
        return self.coefficient_of_variation < SMALL_SPREAD

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def histogram_of(weights: np.ndarray, bars: int = 10) -> list[tuple[float, float, int]]:
    """(from, to, count) of every bar, lowest first; no more than `bars` of them, and no weight is left out."""
    values, counts = np.unique(np.round(weights, 6), return_counts=True)
    if len(values) <= bars:
        return [(float(value), float(value), int(count)) for value, count in zip(values, counts, strict=True)]
    counts, edges = np.histogram(weights, bins=bars)
    return [
        (float(low), float(high), int(count)) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
