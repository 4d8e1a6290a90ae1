"""From paired differences to what may be said about them: one object for one comparison, which every view reads.

A difference is called one only if its corrected p is below 5 % and its interval leaves out zero. "Not distinguishable"
is never "equal": beside it stands the smallest difference that this test set would have shown in four of five such
experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sevpeft.errors import DataError
from sevpeft.evaluation.statistics import PERMUTATIONS, Difference, Estimate
from sevpeft.recipe import EvaluationSection

ALPHA = 0.05
POWER = 0.8

Direction = Literal["higher", "lower", "neither"]
Outcome = Literal["better", "worse", "higher", "lower", "not distinguishable", "too few questions", "no data"]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Comparison:
    """One arm against another, in one score on the rows of one stratum.

    Attributes:
        difference: first arm − second arm.
        better: the direction of the score that is good on these rows.
        p: corrected by Holm for the comparisons of its family; NaN where it could not be made.
        p_at_most: whether p may be smaller, and only more permutations would show it.
        family: how many comparisons were corrected together.
    """

    difference: Difference
    better: Direction
    p: float
    p_at_most: bool
    family: int

    @property
    def detectable(self) -> float:
        """Smallest true difference that an experiment with this standard error finds with the given power.

        (t_{1−α/2m} + t_power) · SE, with the difference's degrees of freedom; the m comparisons of the family share α
        (Bonferroni, which is what Holm asks of the smallest p). NaN where there is no standard error to go by, or where
        the test has too few questions to find anything.
        """
        difference = self.difference
        if self._hopeless or not difference.standard_error > 0 or difference.degrees_of_freedom < 1:
            return float("nan")
        quantiles = stats.t.ppf([1 - ALPHA / self.family / 2, POWER], difference.degrees_of_freedom)
        return float(quantiles.sum() * difference.standard_error)

    @property
    def outcome(self) -> Outcome:
        """What it says of the first arm; "higher" and "lower" where neither direction is good."""
        found = self.difference
        if not found.rows:
            return "no data"
        if self.p < ALPHA and not found.low <= 0 <= found.high:
            rises = found.value > 0
            if self.better == "neither":
                return "higher" if rises else "lower"
            return "better" if rises == (self.better == "higher") else "worse"
        return "too few questions" if self._hopeless else "not distinguishable"

    @property
    def _hopeless(self) -> bool:
        """Whether even the most extreme answers could not have given a p below α."""
        return not self.difference.smallest_p * self.family < ALPHA or not np.isfinite(self.p)

    def as_dict(self) -> dict[str, Any]:
        """As evaluation.json and comparison.json hold it."""
        return {
            **estimate_dict(self.difference),
            "p": number(self.p),
            "p_at_most": self.p_at_most,
            "comparisons": self.family,
            "per_seed": [number(value) for value in self.difference.per_seed],
            "detectable": number(self.detectable),
            "better": self.better,
            "outcome": self.outcome,
        }


def compare_family(differences: Mapping[K, Difference], better: Callable[[K], Direction]) -> dict[K, Comparison]:
    """Comparisons that are corrected together.

    Args:
        better: key → direction that is good there.
    """
    corrected = holm([found.p for found in differences.values()])
    family = int(np.isfinite(corrected).sum())
    # A limited p is the smallest there can be, and Holm passes it on to no larger one than shows the same.
    limited = [p for p, found in zip(corrected, differences.values(), strict=True) if found.p_at_most]
    return {
        key: Comparison(found, better(key), float(p), bool(p < 1 and p in limited), family)
        for (key, found), p in zip(differences.items(), corrected, strict=True)
    }


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


def methods(settings: EvaluationSection, families: str) -> dict[str, str]:
    """How every interval, p and detectable difference was computed, in words that stand below the tables.

    Args:
        families: which comparisons are corrected together.
    """
    return {
        "Interval": f"{settings.confidence_level:.0%}; percentile bootstrap of questions, {settings.n_resamples:,} "
        "resamples, widened for few questions (expanded percentile). A mean of yes or no: Korn–Graubard (exact "
        "binomial). Differences also over seeds. None where all values are equal.",
        "Test": f"Paired, two-sided permutation test by question, {PERMUTATIONS:,} permutations (all, where there are "
        'fewer). "At most": more permutations could show a smaller p. With several seeds, p is never below that of a t '
        "test with their spread.",
        "Correction": f"Holm, for {families}.",
        "Detectable": f"Smallest true difference found with {POWER:.0%} power at α = {ALPHA:g}, shared by the "
        "comparisons corrected together.",
    }


def shown_p(p: float | None, at_most: bool = False) -> str:
    """`.012`, `at most .010`, `< .001`, and a dash where there is none."""
    if p is None or not np.isfinite(p):
        return "–"
    if p < 0.001:
        return "at most .001" if at_most else "< .001"
    # What is an upper bound is not rounded down.
    rounded = np.ceil(round(p * 1000, 6)) / 1000 if at_most else p
    text = f"{rounded:.3f}".replace("0.", ".", 1)
    return f"at most {text}" if at_most else text


def number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def estimate_dict(found: Estimate) -> dict[str, Any]:
    return {**{name: number(getattr(found, name)) for name in ("value", "low", "high")}, "rows": found.rows}
