"""From paired differences to what may be said about them: corrected p, the smallest difference to be seen, a sentence.

A difference is called one only if its corrected p is below 5 % and its interval leaves out zero. "Not distinguishable"
is never "equal": beside it stands the smallest difference that this test set would have shown in four of five such
experiments. Equality is claimed only within a margin that was named beforehand, and only if the whole interval lies
inside it (two one-sided tests, Schuirmann 1987; with a 95 % instead of the usual 90 % interval, so at 2.5 %).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sevpeft.errors import DataError
from sevpeft.evaluation.statistics import Difference

ALPHA = 0.05
POWER = 0.8

Outcome = Literal["better", "worse", "equivalent", "not distinguishable"]


def holm(p: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """p of several comparisons (n,), corrected so that one false finding among all is as rare as α (Holm 1979).

    scipy has corrections of the false discovery rate only (`false_discovery_control`). NaN, a comparison that could
    not be made, stays NaN and does not count.
    """
    given = np.asarray(p, dtype=np.float64)
    corrected = np.full(given.shape, np.nan)
    made = np.flatnonzero(np.isfinite(given))
    if np.any((given[made] < 0) | (given[made] > 1)):
        raise DataError("A p-value is not between 0 and 1, so it cannot be corrected.")
    order = made[np.argsort(given[made], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(given[order] * factors))
    return corrected


def minimal_detectable_difference(
    difference: Difference, *, alpha: float = ALPHA, power: float = POWER, comparisons: int = 1
) -> float:
    """Smallest true difference that an experiment with this standard error finds with the given power (two-sided).

    (t_{1−α/2m} + t_power) · SE, with the difference's degrees of freedom; m comparisons share α (Bonferroni, which is
    what Holm asks of the smallest p). From the observed clustered error, so it says what these rows and seeds can
    show, whatever they showed; NaN where there is no standard error.
    """
    if not np.isfinite(difference.standard_error) or difference.degrees_of_freedom < 1:
        return float("nan")
    quantiles = stats.t.ppf([1 - alpha / comparisons / 2, power], difference.degrees_of_freedom)
    return float(quantiles.sum() * difference.standard_error)


def outcome(
    difference: Difference,
    *,
    better: Literal["higher", "lower"],
    corrected_p: float | None = None,
    alpha: float = ALPHA,
    margin: float | None = None,
) -> Outcome:
    """What the difference (first arm − second) says of the first arm.

    Args:
        better: which direction of the metric is good.
        corrected_p: p after the correction for all comparisons; the difference's own by default.
        margin: largest difference that does not matter, in the metric's unit, named before the results were seen.
    """
    if margin is not None and max(abs(difference.low), abs(difference.high)) < margin:
        # Also where it is surely not zero: it is too small to matter.
        return "equivalent"
    p = difference.p if corrected_p is None else corrected_p
    excludes_zero = difference.low > 0 or difference.high < 0
    if not (p < alpha and excludes_zero):
        return "not distinguishable"
    return "better" if (difference.value > 0) == (better == "higher") else "worse"


def verdict(
    first: str,
    second: str,
    difference: Difference,
    *,
    metric: str,
    rows: str,
    better: Literal["higher", "lower"],
    corrected_p: float | None = None,
    comparisons: int = 1,
    alpha: float = ALPHA,
    margin: float | None = None,
    times: float = 1.0,
    places: int = 2,
) -> str:
    """One sentence in plain words, such as "balanced beats CE on critical cases: BERTScore F1 +0.4 [+0.1, +0.7] (…)."

    Args:
        first, second: names of the arms, the difference being first − second.
        metric: its name, with the unit where it has one.
        rows: which rows, such as "critical cases".
        times: factor for showing (100 for a share in percent).
    """
    if not np.isfinite(difference.low) or not np.isfinite(difference.p):
        return f"{first} and {second} cannot be compared in {metric} on {rows}: there are too few rows."

    def shown(value: float) -> str:
        return f"{value * times:+.{places}f}"

    p = difference.p if corrected_p is None else corrected_p
    said = f"{metric} {shown(difference.value)} [{shown(difference.low)}, {shown(difference.high)}], p {_shown_p(p)}"
    if comparisons > 1:
        said += f" after Holm for {comparisons} comparisons"
    if len(difference.per_seed) == 1:
        said += ", one seed"
    found = outcome(difference, better=better, corrected_p=corrected_p, alpha=alpha, margin=margin)
    if found == "better":
        return f"{first} beats {second} on {rows}: {said}."
    if found == "worse":
        return f"{first} is worse than {second} on {rows}: {said}."
    if found == "equivalent":
        assert margin is not None
        return f"{first} and {second} are equivalent on {rows} within ±{margin * times:.{places}f}: {said}."
    smallest = minimal_detectable_difference(difference, alpha=alpha, comparisons=comparisons)
    size = f"{smallest * times:.{places}f}"
    seen = f"; a true difference of {size} would have been found four times in five" if smallest > 0 else ""
    return f"{first} and {second} are not distinguishable on {rows}: {said}{seen}."


def _shown_p(p: float) -> str:
    return "< .001" if p < 0.001 else f"= {p:.3f}".replace("0.", ".", 1)
