"""Means and paired differences of row scores, with intervals over questions, p-values and their correction.

The rows of one question are resampled together, because they are one piece of evidence (cluster bootstrap; Field &
Welsh 2007). Each group enters as a pair of its total and its mass. Three corrections are made:

- Percentile intervals are too narrow for few groups. They are widened to the coverage of Student's t (the expanded
  percentile interval; Hesterberg 2015, §5.3).
- Equal values have no spread to resample, and rare ones too little. A share of rows (0 of 47) gets the exact binomial
  interval for its effective sample size (Korn & Graubard 1998). Any other mean of equal values has no interval.
- Three seeds are too few to resample. Their variance, less the part that the rows of one seed explain, is added with
  Student's t (MOVER; Zou & Donner 2008). One seed gives no information about other seeds.

An outcome needs a corrected p below 5 % and an interval without zero. "Not distinguishable" does not mean "equal", so
the smallest detectable difference is reported with it.
"""

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
# Groups × resamples per scipy batch. A bootstrap is fastest in the CPU cache; permutations have a high setup cost.
_DRAWN_AT_ONCE = 300_000
_PERMUTED_AT_ONCE = 4_000_000
_DEFAULT = EvaluationSection()

Floats = NDArray[np.float64]
Direction = Literal["higher", "lower", "neither"]
ARROWS: dict[Direction, str] = {"higher": "↑", "lower": "↓", "neither": ""}


@dataclass(frozen=True)
class Estimate:
    """A mean over rows, or a difference of two means, with its interval.

    Attributes:
        low, high: ends of the interval; NaN for one group, or for equal values that are no shares.
        standard_error: linearized, of a ratio of group totals, and of the seeds.
        rows, groups: the number of rows and groups with a value.
        p: for differences: two-sided, by swapping groups of rows between the arms. With several seeds it is at least
            the p of a t test with their variance. NaN for fewer than two groups.
        p_at_most: whether the number of permutations limits p, so that the exact p may be smaller.
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
        """The form in evaluation.json and comparison.json."""
        return {**{name: or_none(getattr(self, name)) for name in ("value", "low", "high")}, "rows": self.rows}


@dataclass(frozen=True)
class _Groups:
    """Totals of the rows' values per group, (…, groups), and the groups' masses, (groups,)."""

    totals: Floats
    masses: Floats
    rows: int
    count: int

    def mean(self, totals: Floats) -> float:
        return float(totals.sum() / self.masses.sum())

    def all_equal(self, totals: Floats) -> bool:
        return np.allclose(totals, self.mean(totals) * self.masses, rtol=1e-12, atol=0)

    def standard_error(self, totals: Floats) -> float:
        """Standard error of the mean over groups, by linearization; NaN for one group."""
        residuals = totals - self.mean(totals) * self.masses
        scale = self.count / (self.count - 1) if self.count > 1 else np.nan
        return float(np.sqrt(np.sum(residuals**2) * scale) / self.masses.sum())


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
        values: rows with NaN are left out (false reassurance has no value for non-critical questions). An infinite
            value is a DataError.
        weights: mass of each row, such as its tokens for a mean per token; 1 by default.
        share: whether the score is yes or no (1 or 0) by definition, for the Korn–Graubard interval.
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
    """first − second, row by row, with an interval over groups and, with several seeds, over seeds.

    Args:
        first, second: scores (n,) or (seeds, n), rows and seeds in the same order. An arm without seeds, such as the
            base model, is compared with every seed of the other. A row with a NaN in either is left out of both.
        weights, share: as in `interval`.
        null: the difference under the null hypothesis of p.
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
        # All questions have the same difference. Their number limits how many others could differ (Clopper–Pearson
        # interval for 0 of n).
        unseen = float(1 - ((1 - confidence) / 2) ** (1 / data.count))
        low, high = value - unseen, value + unseen
        p = max(p, min(1.0, 2 * (1 - abs(value - null)) ** data.count))
    of_rows, of_seeds = data.standard_error(mean), _seed_error(by_seed, data, per_seed)
    error, freedom = of_rows, float(data.count - 1)
    if of_seeds > 0:
        margin = stats.t.ppf((1 + confidence) / 2, seeds - 1) * of_seeds
        # Rows without variance have no interval of their own.
        low = value - float(np.hypot(np.nan_to_num(value - low), margin))
        high = value + float(np.hypot(np.nan_to_num(high - value), margin))
        error = float(np.hypot(of_rows, of_seeds))
        freedom = float(error**4 / (of_rows**4 / max(data.count - 1, 1) + of_seeds**4 / (seeds - 1)))
        p_of_t = float(2 * stats.t.sf(abs(value - null) / error, freedom))
        p, p_at_most = max(p, p_of_t), p_at_most and p_of_t <= p
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
    resampled = stats.bootstrap(
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
    return float(resampled.confidence_interval.low), float(resampled.confidence_interval.high)


def _share_interval(totals: Floats, data: _Groups, settings: EvaluationSection) -> tuple[float, float]:
    """Clopper–Pearson interval with the effective number of independent rows (Korn & Graubard 1998)."""
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
    """Standard error that the seeds add: their variance, less the part that the rows of one seed explain."""
    seeds, count = by_seed.shape
    if min(seeds, count) < 2:
        return 0.0
    residuals = by_seed - by_seed.mean(axis=0) - (per_seed - per_seed.mean())[:, None] * data.masses
    by_rows = np.sum(residuals**2) * count / (count - 1) / data.masses.sum() ** 2 / (seeds - 1)
    return float(np.sqrt(max(0.0, np.var(per_seed, ddof=1) - by_rows) / seeds))


def _permutation_p(by_group: Floats, seed: int) -> tuple[float, bool]:
    """Two-sided p by flipping the signs of groups' differences, and whether the number of permutations limits it."""
    differing = by_group[by_group != 0]  # a swap changes nothing in a group where the arms are equal
    if len(differing) < 2:  # both signs of one group are equally extreme
        return 1.0 if len(by_group) > 1 else float("nan"), False
    result = stats.permutation_test(
        (differing,),
        lambda differences, axis: differences.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=max(1, _PERMUTED_AT_ONCE // len(differing)),
        rng=np.random.default_rng(seed),
    )
    p = float(result.pvalue)
    return p, 2 ** len(differing) > PERMUTATIONS and p <= 2 / (PERMUTATIONS + 1)


def compare_family(differences: Mapping[Any, Estimate], better: Callable[[Any], Direction]) -> dict[Any, Any]:
    """Comparisons that are corrected together: key → the form in evaluation.json. `better`: key → good direction.

    - p: corrected by Holm; p_at_most: more permutations could give a smaller p.
    - comparisons: how many were corrected together.
    - detectable: for a test at α/2m. The m comparisons share α (Bonferroni, which Holm uses for the smallest p).
    - outcome: better, worse, higher or lower (if neither direction is good), not distinguishable, too few questions
      (even the most extreme answers could not have given a p below α), or no data.
    """
    corrected = holm([difference.p for difference in differences.values()]).tolist()
    family = int(np.isfinite(corrected).sum())
    # Holm can raise a larger p to the corrected value of a limited one, so it is compared by value.
    limited = [p for p, difference in zip(corrected, differences.values(), strict=True) if difference.p_at_most]
    compared = {}
    for (key, difference), p in zip(differences.items(), corrected, strict=True):
        hopeless = not np.isfinite(p) or 2 / min(2**difference.groups, PERMUTATIONS + 1) * family >= ALPHA
        test = (difference.standard_error, difference.degrees_of_freedom, ALPHA / max(family, 1) / 2)
        outcome, good = "too few questions" if hopeless else "not distinguishable", better(key)
        if not difference.rows:
            outcome = "no data"
        elif p < ALPHA and not difference.low <= 0 <= difference.high:
            outcome = "higher" if difference.value > 0 else "lower"
            if good != "neither":
                outcome = "better" if outcome == good else "worse"
        compared[key] = {
            **difference.as_dict(),
            "p": or_none(p),
            "p_at_most": p < 1 and p in limited,
            "comparisons": family,
            "per_seed": [or_none(value) for value in difference.per_seed],
            "detectable": None if hopeless else or_none(detectable(*test)),
            "better": good,
            "outcome": outcome,
        }
    return compared


def detectable(error: float, freedom: float, alpha: float) -> float:
    """Smallest true difference that a one-sided test at α finds with `POWER`: (t_{1−α} + t_power) · SE; or NaN."""
    return float(stats.t.ppf([1 - alpha, POWER], freedom).sum() * error) if error > 0 and freedom >= 1 else float("nan")


def holm(p: ArrayLike) -> Floats:
    """p of several comparisons (n,), corrected by Holm (1979), which scipy lacks; NaN stays and does not count."""
    p = np.asarray(p, dtype=np.float64)
    corrected = np.full(p.shape, np.nan)
    order = np.argsort(p, kind="stable")[: np.isfinite(p).sum()]  # NaN is sorted last
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def estimate_text(estimate: Mapping[str, Any], metric: Mapping[str, Any], *, sign: bool = False) -> str:
    """`5.110 [5.020, 5.200]`, from `Estimate.as_dict` and a score of `METRICS`; without an interval the value alone."""
    figures, times = (4 if metric["unit"] == "nats a token" else 3), metric["shown_times"]
    ends = (estimate[name] for name in ("value", "low", "high"))
    value, low, high = (None if end is None else end * times for end in ends)
    text = number_text(value, figures, sign=sign)
    if low is None or high is None:
        return text
    return f"{text} [{number_text(low, figures)}, {number_text(high, figures)}]"
