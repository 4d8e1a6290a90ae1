"""One loss weight (n,) per consultation from severity probabilities (n, 3), and what a set of weights amounts to.

The weight of a consultation is w = α·p_non_critical + β·p_neutral + γ·p_critical (arXiv 2604.06346, eq. 2). The three
controls exist because a gain over plain cross-entropy proves nothing about severity: the same weights shuffled over
the consultations have the same spread without the information, a constant of the same mean has the same step size.

`train`, `plan` and `annotate` show the same picture of the weights, because the commonest mistake is invisible in a
loss curve: with probabilities near a third each, the training is plain cross-entropy under another name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sevpeft.errors import WeightError
from sevpeft.severity.probabilities import SEVERITIES

# Below this coefficient of variation, shuffled and real weights cannot be told apart in practice: the published
# probabilities, whose weights lie between .93 and 1.03, have about .02.
SMALL_SPREAD = 0.05
# Below this share of effective consultations, a few rows decide what is learnt.
SMALL_SAMPLE = 0.5


def severity_weights(
    probabilities: np.ndarray,
    coefficients: tuple[float, float, float],
    *,
    normalize: Literal["none", "mean"] = "none",
    control: Literal["none", "shuffled", "constant", "uniform"] = "none",
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
    weights = checked_weights(probabilities @ np.asarray(coefficients, dtype=np.float64))
    if normalize == "mean":
        weights = weights / weights.mean()
    if control == "shuffled":
        return np.random.default_rng(seed).permutation(weights)
    if control == "constant":
        return np.full_like(weights, weights.mean())
    if control == "uniform":
        return np.ones_like(weights)
    return weights


def checked_weights(weights: np.ndarray) -> np.ndarray:
    """The weights as float64; an error when one is missing, not finite or negative, or when all are zero."""
    weights = np.asarray(weights, dtype=np.float64)
    if weights.size == 0:
        raise WeightError("There are no consultations to weight; look at the counts of rejected rows.")
    for wrong, problem in (
        (~np.isfinite(weights), "missing or not finite"),
        (weights < 0, "negative, which would teach the model to avoid the answer; use coefficients of zero or more"),
    ):
        if wrong.any():
            raise WeightError(f"{wrong.sum()} severity weights are {problem}.")
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
    histogram: list[tuple[float, float, int]]

    @classmethod
    def of(cls, weights: np.ndarray, strata: np.ndarray | None) -> WeightSummary:
        """Args: weights (n,); strata (n,) positions in `SEVERITIES`, or None when severity is not known."""
        counts = [] if strata is None else np.bincount(strata, minlength=len(SEVERITIES)).tolist()
        return cls(
            consultations=len(weights),
            severities=dict(zip(SEVERITIES, counts, strict=False)),
            minimum=float(weights.min()),
            maximum=float(weights.max()),
            mean=float(weights.mean()),
            coefficient_of_variation=float(weights.std() / weights.mean()),
            effective_sample_size=float(weights.sum() ** 2 / np.square(weights).sum()),
            histogram=_histogram(weights),
        )

    @property
    def too_small_to_matter(self) -> bool:
        return self.coefficient_of_variation < SMALL_SPREAD

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _histogram(weights: np.ndarray, bars: int = 10) -> list[tuple[float, float, int]]:
    values, counts = np.unique(np.round(weights, 6), return_counts=True)
    if len(values) <= bars:
        return list(zip(values.tolist(), values.tolist(), counts.tolist(), strict=True))
    counts, edges = np.histogram(weights, bins=bars)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))


def histogram_lines(histogram: list[tuple[float, float, int]], width: int = 60) -> list[str]:
    """Lines for (from, to, count) as `WeightSummary.histogram` holds them, also after a way through JSON."""
    finest = min((round(high - low, 9) for low, high, _ in histogram if high > low), default=0.01)
    places = 2 if finest >= 0.01 else 3 if finest >= 0.001 else 4
    labels = [" to ".join(f"{end:.{places}f}" for end in sorted({low, high})) for low, high, _ in histogram]
    numbers = [f"{count:,}" for _, _, count in histogram]
    label_width, number_width = max(map(len, labels)), max(map(len, numbers))
    room = max(1, width - label_width - number_width - 4)
    most = max(count for _, _, count in histogram)
    lines = []
    for label, number, (_, _, count) in zip(labels, numbers, histogram, strict=True):
        # A bar that holds anything is never drawn as none.
        bar = "█" * max(round(room * count / most), 1 if count else 0)
        lines.append(f"{label:>{label_width}}  {bar:<{room}}  {number:>{number_width}}")
    return lines


def effective_sample(summary: WeightSummary) -> str:
    """`257 of 300 (86%)`."""
    share = summary.effective_sample_size / summary.consultations
    return f"{summary.effective_sample_size:,.0f} of {summary.consultations:,} ({share:.0%})"


def advice(summary: WeightSummary) -> str | None:
    """What to do about weights that will not do what they are for; None when they are fit for it."""
    if summary.too_small_to_matter:
        places = 2 if summary.maximum - summary.minimum >= 0.01 else 4
        return (
            f"The weights lie in {summary.minimum:.{places}f} to {summary.maximum:.{places}f}, too close together to "
            "matter: shuffled weights would train the same model. Calibrate the classifier (sevpeft classifier fit), "
            "sharpen the probabilities (severity.temperature=0.5), use severity.weights=strong, or gather labels."
        )
    if summary.effective_sample_size < SMALL_SAMPLE * summary.consultations:
        return (
            f"The effective sample size is {effective_sample(summary)}: a few consultations decide what is learnt. "
            "Use coefficients that lie closer together, or flatten the probabilities (severity.temperature=2)."
        )
    return None
