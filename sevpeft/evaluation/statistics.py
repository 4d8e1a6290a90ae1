"""Means and paired differences of row scores, with intervals over questions, p-values and their correction.

A question that occurs three times in the test split is one piece of evidence, so its rows are drawn together (cluster
bootstrap; Field & Welsh 2007), as pairs of a group's total and mass. Three things are added:

- Percentile intervals are too narrow for few groups. They are widened to the coverage of Student's t (the expanded
  percentile interval; Hesterberg 2015, §5.3).
- Equal values have no spread to draw from, and rare ones too little. A share of rows (0 of 47) gets the exact binomial
  interval for its effective sample size (Korn & Graubard 1998); any other mean of equal values has no interval.
- Seeds are a sample of all seeds, and three are too few to draw from. Their spread, less what the rows of one seed vary
  by themselves, is added with Student's t (MOVER; Zou & Donner 2008). One seed says nothing about others.

A difference counts as one only if its corrected p is below 5 % and its interval leaves out zero. "Not distinguishable"
is never "equal": beside it stands the smallest difference that this test set would have shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sevpeft.console import number_text
from sevpeft.errors import DataError
from sevpeft.recipe import EvaluationSection

PERMUTATIONS = 4999
ALPHA = 0.05
POWER = 0.8
# Groups times draws that scipy holds at once: what fits the cache is drawn fastest, permutations are set up slowly.
_DRAWN_AT_ONCE = 300_000
_PERMUTED_AT_ONCE = 4_000_000
_DEFAULT = EvaluationSection()

Floats = NDArray[np.float64]
Direction = Literal["higher", "lower", "neither"]
ARROWS: dict[Direction, str] = {"higher": "↑", "lower": "↓", "neither": ""}


@dataclass(frozen=True)
class Estimate:
    """A mean over rows, or a difference of two, with its interval, NaN where one group or equal values leave it open.

    Attributes:
        standard_error: the linearized one of a ratio of group totals, with that of seeds.
        rows, groups: those that had a value.
        p: of a difference; two-sided, by swapping groups of rows between the arms, and no smaller than that of a t test
            with the spread of several seeds. NaN for fewer than two groups.
        p_at_most: whether the number of permutations limits p, so that it may be smaller.
        degrees_of_freedom: Satterthwaite's (1946), of groups and seeds.
    """

    value: float
    low: float
    high: float
    standard_error: float
    rows: int
    groups: int
    p: float = float("nan")
    p_at_most: bool = False
    degrees_of_freedom: float = float("nan")
    per_seed: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As evaluation.json and comparison.json hold it."""
        return {**{name: or_none(getattr(self, name)) for name in ("value", "low", "high")}, "rows": self.rows}


@dataclass(frozen=True)
class _Groups:
    """Per group the totals of its rows' values, (…, groups), and its mass, (groups,)."""

    totals: Floats
    masses: Floats
    rows: int
    count: int

    def mean(self, totals: Floats) -> float:
        return float(totals.sum() / self.masses.sum())

    def all_equal(self, totals: Floats) -> bool:
        return np.allclose(totals, self.mean(totals) * self.masses, rtol=1e-12, atol=0)

    def standard_error(self, totals: Floats) -> float:
        """Of the mean over groups, by linearization; NaN for one group."""
        rest = totals - self.mean(totals) * self.masses
        scale = self.count / (self.count - 1) if self.count > 1 else np.nan
        return float(np.sqrt(np.sum(rest**2) * scale) / self.masses.sum())


def interval(
    values: ArrayLike,
    groups: ArrayLike,
    settings: EvaluationSection = _DEFAULT,
    *,
    weights: ArrayLike | None = None,
    share: bool = False,
) -> Estimate:
    """Mean of the values (n,) of rows in groups (n,), Σ weight·value / Σ weight, with its clustered interval.

    Args:
        values: NaN where a row has none (false reassurance of a question that is not critical); such rows are left out.
            An infinite one is a DataError.
        weights: mass of each row, such as its tokens for a mean per token; one each by default.
        share: whether every row says yes or no (1 or 0), for the Korn–Graubard interval. A score that happens to be
            0 everywhere is no share.
    """
    data = _by_group(np.atleast_2d(np.asarray(values, dtype=np.float64)), groups, weights)
    if not data.count:
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, 0)
    totals = data.totals[0]
    low, high = (_share_interval if share else _bootstrap_interval)(totals, data, settings)
    return Estimate(data.mean(totals), low, high, data.standard_error(totals), data.rows, data.count)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: ArrayLike,
    settings: EvaluationSection = _DEFAULT,
    *,
    weights: ArrayLike | None = None,
    share: bool = False,
    null: float = 0.0,
) -> Estimate:
    """first − second, row by row, with an interval over groups and, where there are several, over seeds.

    Args:
        first, second: scores (n,) or (seeds, n), rows and seeds in the same order; an arm without seeds, such as the
            base model, is compared with every seed of the other. A row that lacks a value in any is left out of all.
        weights, share: as in `interval`.
        null: the difference that p is against.
    """
    one, other = np.broadcast_arrays(*(np.atleast_2d(np.asarray(of, dtype=np.float64)) for of in (first, second)))
    seeds, confidence = len(one), settings.confidence_level
    data = _by_group(np.concatenate([one, other]), groups, weights)
    if not data.count:
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, 0, per_seed=(np.nan,) * seeds)
    by_seed = data.totals[:seeds] - data.totals[seeds:]
    mean = by_seed.mean(axis=0)
    per_seed = by_seed.sum(axis=1) / data.masses.sum()
    value = data.mean(mean)
    low, high = _bootstrap_interval(mean, data, settings)
    p, p_at_most = _permutation_p(mean - null * data.masses, settings.seed)
    if share and data.all_equal(mean):
        # Every question shows the same; the questions asked bound how many others could differ (Clopper–Pearson for 0).
        unseen = float(1 - ((1 - confidence) / 2) ** (1 / data.count))
        low, high = value - unseen, value + unseen
        p = max(p, min(1.0, 2 * (1 - abs(value - null)) ** data.count))
    of_rows, of_seeds = data.standard_error(mean), _seed_error(by_seed, data, per_seed)
    error, freedom = of_rows, float(data.count - 1)
    if of_seeds > 0:
        margin = stats.t.ppf((1 + confidence) / 2, seeds - 1) * of_seeds
        # Rows without spread add nothing to that of the seeds.
        low = value - float(np.hypot(np.nan_to_num(value - low), margin))
        high = value + float(np.hypot(np.nan_to_num(high - value), margin))
        error = float(np.hypot(of_rows, of_seeds))
        freedom = float(error**4 / (of_rows**4 / max(data.count - 1, 1) + of_seeds**4 / (seeds - 1)))
        of_t = float(2 * stats.t.sf(abs(value - null) / error, freedom))
        p, p_at_most = max(p, of_t), p_at_most and of_t <= p
    if share:
        low, high = np.clip((low, high), -1, 1).tolist()
    return Estimate(value, low, high, error, data.rows, data.count, p, p_at_most, freedom, tuple(per_seed.tolist()))


def _by_group(values: Floats, groups: ArrayLike, weights: ArrayLike | None) -> _Groups:
    if np.any(np.isinf(values)):  # left out like NaN, it would flatter the mean
        raise DataError("A score is infinite, so there is no mean; look for the row in scores.jsonl.")
    mass = np.ones(values.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    there = np.all(np.isfinite(values), axis=0) & (mass > 0)
    index, mass = np.unique(np.asarray(groups)[there], return_inverse=True)[1], mass[there]
    sums = [np.bincount(index, weights=row * mass) for row in values[:, there]]
    masses: Floats = np.asarray(np.bincount(index, weights=mass), dtype=np.float64)
    return _Groups(np.stack(sums), masses, int(there.sum()), len(masses))


def _bootstrap_interval(totals: Floats, data: _Groups, settings: EvaluationSection) -> tuple[float, float]:
    count = data.count
    if count < 2 or data.all_equal(totals):
        return float("nan"), float("nan")
    student = stats.t.ppf((1 + settings.confidence_level) / 2, count - 1)
    drawn = stats.bootstrap(
        (totals, data.masses),
        lambda total, mass, axis: total.sum(axis=axis) / mass.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=settings.n_resamples,
        batch=max(1, _DRAWN_AT_ONCE // count),
        confidence_level=1 - 2 * stats.norm.cdf(-np.sqrt(count / (count - 1)) * student),
        method="percentile",
        rng=np.random.default_rng(settings.seed),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def _share_interval(totals: Floats, data: _Groups, settings: EvaluationSection) -> tuple[float, float]:
    """Clopper–Pearson for as many independent rows as carry the information of these clustered ones."""
    value, error, count = data.mean(totals), data.standard_error(totals), data.count
    effective, tail = float(count), (1 + settings.confidence_level) / 2
    if 0 < value < 1:
        if not error > 0:  # one question, or all have the same share
            return float("nan"), float("nan")
        few_groups = stats.t.ppf(tail, data.rows - 1) / stats.t.ppf(tail, count - 1)
        effective = min(value * (1 - value) / error**2 * few_groups**2, float(data.rows))
    hits = value * effective
    low = 0.0 if value == 0 else float(stats.beta.ppf(1 - tail, hits, effective - hits + 1))
    high = 1.0 if value == 1 else float(stats.beta.ppf(tail, hits + 1, effective - hits))
    return low, high


def _seed_error(by_seed: Floats, data: _Groups, per_seed: Floats) -> float:
    """Standard error that the choice of seeds adds: their spread less what the rows of one seed vary by themselves."""
    seeds, count = by_seed.shape
    if min(seeds, count) < 2:
        return 0.0
    rest = by_seed - by_seed.mean(axis=0) - (per_seed - per_seed.mean())[:, None] * data.masses
    by_rows = np.sum(rest**2) * count / (count - 1) / data.masses.sum() ** 2 / (seeds - 1)
    return float(np.sqrt(max(0.0, np.var(per_seed, ddof=1) - by_rows) / seeds))


def _permutation_p(by_group: Floats, seed: int) -> tuple[float, bool]:
    """Two-sided p by turning the signs of groups' differences, and whether the number of permutations limits it."""
    differing = by_group[by_group != 0]  # a group in which the arms are equal is the same swapped
    if len(differing) < 2:  # of one group both signs are as extreme
        return 1.0 if len(by_group) > 1 else float("nan"), False
    tested = stats.permutation_test(
        (differing,),
        lambda differences, axis: differences.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=max(1, _PERMUTED_AT_ONCE // len(differing)),
        rng=np.random.default_rng(seed),
    )
    p = float(tested.pvalue)
    return p, 2 ** len(differing) > PERMUTATIONS and p <= 2 / (PERMUTATIONS + 1)


def compare_family(differences: Mapping[Any, Estimate], better: Callable[[Any], Direction]) -> dict[Any, Any]:
    """Comparisons that are corrected together (key → as evaluation.json holds it); better: key → good direction.

    - p: corrected by Holm; p_at_most: more permutations could show that it is smaller.
    - comparisons: how many were corrected together.
    - detectable: of a test at α/2m. The m comparisons share α (Bonferroni, which Holm asks of the smallest p).
    - outcome: better, worse, higher or lower (where neither direction is good), not distinguishable, too few questions
      (even the most extreme answers could not have given a p below α), or no data.
    """
    corrected = holm([found.p for found in differences.values()]).tolist()
    family = int(np.isfinite(corrected).sum())
    # A limited p is the smallest there can be, and Holm passes it on to no larger one than shows the same.
    limited = [p for p, found in zip(corrected, differences.values(), strict=True) if found.p_at_most]
    compared = {}
    for (key, found), p in zip(differences.items(), corrected, strict=True):
        hopeless = not np.isfinite(p) or 2 / min(2**found.groups, PERMUTATIONS + 1) * family >= ALPHA
        test = (found.standard_error, found.degrees_of_freedom, ALPHA / max(family, 1) / 2)
        least = np.nan if hopeless else detectable(*test)
        outcome, good = "too few questions" if hopeless else "not distinguishable", better(key)
        if not found.rows:
            outcome = "no data"
        elif p < ALPHA and not found.low <= 0 <= found.high:
            outcome = "higher" if found.value > 0 else "lower"
            if good != "neither":
                outcome = "better" if outcome == good else "worse"
        compared[key] = {
            **found.as_dict(),
            "p": or_none(p),
            "p_at_most": p < 1 and p in limited,
            "comparisons": family,
            "per_seed": [or_none(value) for value in found.per_seed],
            "detectable": or_none(least),
            "better": good,
            "outcome": outcome,
        }
    return compared


def detectable(error: float, freedom: float, alpha: float) -> float:
    """Smallest true difference that a one-sided test at α finds with `POWER`, (t_{1−α} + t_power) · SE; or NaN."""
    return float(stats.t.ppf([1 - alpha, POWER], freedom).sum() * error) if error > 0 and freedom >= 1 else float("nan")


def holm(p: ArrayLike) -> Floats:
    """p of several comparisons (n,), corrected by Holm (1979), as scipy does not; NaN stays and does not count."""
    given = np.asarray(p, dtype=np.float64)
    corrected = np.full(given.shape, np.nan)
    order = np.argsort(given, kind="stable")[: np.isfinite(given).sum()]  # NaN is sorted last
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(given[order] * np.arange(len(order), 0, -1)))
    return corrected


def or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def estimate_text(found: Mapping[str, Any], metric: Mapping[str, Any], *, sign: bool = False) -> str:
    """`5.110 [5.020, 5.200]` of what `Estimate.as_dict` gives for a score of `METRICS`; the value alone has no ends."""
    figures, times = (4 if metric["unit"] == "nats a token" else 3), metric["shown_times"]
    value, low, high = (None if found[name] is None else found[name] * times for name in ("value", "low", "high"))
    text = number_text(value, figures, sign=sign)
    if low is None or high is None:
        return text
    return f"{text} [{number_text(low, figures)}, {number_text(high, figures)}]"
