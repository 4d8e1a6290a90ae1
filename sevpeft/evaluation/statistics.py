"""From scores of rows to a mean or a paired difference with an interval that counts questions, not rows.

A question that stands in the test split three times is one piece of evidence, so duplicates are drawn together
(cluster bootstrap; Field & Welsh 2007). A group's total and its mass are drawn as a pair, which makes the mean a ratio
of two sums and lets `scipy.stats.bootstrap` do the work. Three things are not left to it:

- Percentile intervals are too narrow for few groups; they are widened to the coverage of Student's t (the expanded
  percentile interval; Hesterberg 2015, §5.3).
- Equal values have no spread to draw from. A share of rows (0 of 47) gets the exact binomial interval for its effective
  sample size (Korn & Graubard 1998); any other mean has no interval then.
- Seeds are a sample of all seeds, and three are too few to be drawn from. Their spread is added to the interval with
  Student's t for so few (MOVER; Zou & Donner 2008), after what the rows of one seed vary by themselves is taken off.
  With one seed nothing is known about others, and the interval is one for this seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sevpeft.errors import DataError

CONFIDENCE = 0.95
RESAMPLES = 2000
PERMUTATIONS = 4999
# Groups times draws that scipy holds at once: what fits the cache is drawn fastest, permutations are set up slowly.
_DRAWN_AT_ONCE = 300_000
_PERMUTED_AT_ONCE = 4_000_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over rows and its interval; low and high are NaN where one group or equal values leave it open.

    `standard_error` is the linearised one of a ratio of group totals; `rows` and `groups` are those that had a value.
    """

    value: float
    low: float
    high: float
    standard_error: float
    rows: int
    groups: int


@dataclass(frozen=True)
class Difference(Estimate):
    """How much higher the first arm scores on the same rows, meaned over seeds.

    Attributes:
        p: probability of such a difference or a larger one (two-sided) if the arms were the same. Groups of rows are
            swapped between the arms; with several seeds it is no smaller than that of a t test with the seeds' spread.
            NaN for fewer than two groups.
        p_at_most: whether the number of permutations that were drawn limits p, so that it may be smaller.
        smallest_p: what the permutations of all groups could have shown at the least.
        degrees_of_freedom: Satterthwaite's (1946), of groups and seeds; for `minimal_detectable_difference`.
        per_seed: the difference of each seed, in the order given.
    """

    p: float
    p_at_most: bool
    smallest_p: float
    degrees_of_freedom: float
    per_seed: tuple[float, ...]


@dataclass(frozen=True)
class _Clusters:
    """Per group the totals of its rows' values, (…, groups), and its mass, (groups,)."""

    totals: Floats
    masses: Floats
    rows: int

    @property
    def groups(self) -> int:
        return len(self.masses)

    @property
    def mass(self) -> float:
        return float(self.masses.sum())

    def no_spread(self, totals: Floats) -> bool:
        """Whether all groups have the same mean."""
        return np.allclose(totals, totals.sum() / self.mass * self.masses, rtol=1e-12, atol=0)


def interval(
    values: Sequence[float] | Floats,
    groups: Sequence[int] | NDArray[np.int64],
    *,
    weights: Sequence[float] | Floats | None = None,
    share: bool = False,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of the values (n,) of rows in groups (n,), Σ weight·value / Σ weight, with its clustered interval.

    Args:
        values: NaN where a row has none (false reassurance of a question that is not critical); such rows are left out.
        weights: mass of each row, such as its tokens for a mean per token; one each by default.
        share: whether every row says yes or no (1 or 0), for the Korn–Graubard interval. A score that happens to be
            0 everywhere is no share.

    Raises:
        DataError: the arrays differ in length, or a weight is negative or not finite.
    """
    clusters = _clusters(np.atleast_2d(np.asarray(values, dtype=np.float64)), groups, weights)
    if not clusters.groups:
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, 0)
    value = float(clusters.totals[0].sum() / clusters.mass)
    error = _standard_error(clusters.totals[0], clusters.masses)
    if share:
        low, high = _share_interval(value, error, clusters, confidence)
    else:
        low, high = _bootstrap_interval(clusters.totals[0], clusters, confidence, resamples, seed)
    return Estimate(value, low, high, error, clusters.rows, clusters.groups)


def paired_difference(
    first: Sequence[float] | Floats,
    second: Sequence[float] | Floats,
    groups: Sequence[int] | NDArray[np.int64],
    *,
    weights: Sequence[float] | Floats | None = None,
    share: bool = False,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Difference:
    """first − second, row by row, with an interval over groups and, where there are several, over seeds.

    Args:
        first, second: scores (n,) of one seed, or (seeds, n); the rows in the same order (see `same_order`), the
            seeds too. A row that lacks a value in any of them is left out of all.
        share: as in `interval`.

    Raises:
        DataError: the arrays differ in shape, or a weight is negative or not finite.
    """
    one, other = (np.atleast_2d(np.asarray(scores, dtype=np.float64)) for scores in (first, second))
    if one.shape != other.shape:
        raise DataError(
            f"The arms have scores of other shapes ({one.shape[0]} seeds of {one.shape[1]} rows, {other.shape[0]} of "
            f"{other.shape[1]}); compare the same rows and seeds."
        )
    seeds = len(one)
    clusters = _clusters(np.concatenate([one, other]), groups, weights)
    if not clusters.groups:
        nan = np.nan
        return Difference(nan, nan, nan, nan, 0, 0, nan, False, nan, nan, (nan,) * seeds)
    by_seed = clusters.totals[:seeds] - clusters.totals[seeds:]
    mean = by_seed.mean(axis=0)
    per_seed = by_seed.sum(axis=1) / clusters.mass
    value = float(mean.sum() / clusters.mass)
    low, high = _bootstrap_interval(mean, clusters, confidence, resamples, seed)
    if share and clusters.no_spread(mean):
        # Every question says the same; what part of all questions could differ is bounded by how many were asked.
        unseen = _unseen(clusters.groups, confidence)
        low, high = max(-1.0, value - unseen), min(1.0, value + unseen)
    of_rows = _standard_error(mean, clusters.masses)
    of_seeds = _seed_error(by_seed, clusters.masses, per_seed)
    p, p_at_most = _permutation_p(mean, permutations, seed)
    error, freedom = of_rows, float(clusters.groups - 1)
    if of_seeds > 0:
        margin = stats.t.ppf((1 + confidence) / 2, seeds - 1) * of_seeds
        # Rows without spread add nothing to that of the seeds.
        low = value - float(np.hypot(np.nan_to_num(value - low), margin))
        high = value + float(np.hypot(np.nan_to_num(high - value), margin))
        error = float(np.hypot(of_rows, of_seeds))
        freedom = float(error**4 / (of_rows**4 / max(clusters.groups - 1, 1) + of_seeds**4 / (seeds - 1)))
        of_t = float(2 * stats.t.sf(abs(value) / error, freedom))
        p, p_at_most = max(p, of_t), p_at_most and of_t <= p
    smallest_p = 2 / min(2.0**clusters.groups, permutations + 1)
    seeds_values = tuple(float(difference) for difference in per_seed)
    rows, count = clusters.rows, clusters.groups
    return Difference(value, low, high, error, rows, count, p, p_at_most, smallest_p, freedom, seeds_values)


def same_order(ids: Sequence[str], others: Sequence[str]) -> NDArray[np.int64]:
    """Positions in `others` of `ids`, so that `scores[positions]` belong to `ids`: rows pair by id, never by place.

    Raises:
        DataError: an id stands twice, or in one of them only.
    """
    place = {identifier: position for position, identifier in enumerate(others)}
    if len(place) != len(others) or len(set(ids)) != len(ids):
        raise DataError("An id stands twice in the predictions, so rows cannot be paired; give every row its own id.")
    if place.keys() != set(ids):
        absent, more = len(set(ids) - place.keys()), len(place.keys() - set(ids))
        raise DataError(
            f"The predictions to compare are not of the same rows ({absent} ids are missing in one, {more} in the "
            "other); evaluate both on the same test split."
        )
    return np.array([place[identifier] for identifier in ids], dtype=np.int64)


def _clusters(
    values: Floats, groups: Sequence[int] | NDArray[np.int64], weights: Sequence[float] | Floats | None
) -> _Clusters:
    number = np.asarray(groups)
    mass = np.ones(values.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if not values.shape[1] == len(number) == len(mass):
        raise DataError(
            f"There are {values.shape[1]} scores, {len(number)} groups and {len(mass)} weights for one set."
        )
    if not np.all(np.isfinite(mass)) or np.any(mass < 0):
        raise DataError("A weight of a row is negative or not finite; weights are counts, such as tokens.")
    if np.any(np.isinf(values)):
        raise DataError(
            "A score is infinite, so there is no mean; leave the row without a value, or correct the metric."
        )
    there = np.all(np.isfinite(values), axis=0) & (mass > 0)
    kept, mass = values[:, there], mass[there]
    distinct, index = np.unique(number[there], return_inverse=True)
    totals: Floats = np.stack([np.bincount(index, weights=row * mass, minlength=len(distinct)) for row in kept])
    masses: Floats = np.asarray(np.bincount(index, weights=mass, minlength=len(distinct)), dtype=np.float64)
    return _Clusters(totals, masses, int(there.sum()))


def _standard_error(totals: Floats, masses: Floats) -> float:
    """Of Σ totals / Σ masses over groups, by linearisation; NaN for one group."""
    count = len(masses)
    if count < 2:
        return float("nan")
    mean = totals.sum() / masses.sum()
    return float(np.sqrt(np.sum((totals - mean * masses) ** 2) * count / (count - 1)) / masses.sum())


def _bootstrap_interval(
    totals: Floats, clusters: _Clusters, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    count = clusters.groups
    if count < 2 or clusters.no_spread(totals):
        return float("nan"), float("nan")
    expanded = 1 - 2 * stats.norm.cdf(-np.sqrt(count / (count - 1)) * stats.t.ppf((1 + confidence) / 2, count - 1))
    drawn = stats.bootstrap(
        (totals, clusters.masses),
        lambda total, mass, axis: total.sum(axis=axis) / mass.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _DRAWN_AT_ONCE // count),
        confidence_level=expanded,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def _share_interval(value: float, error: float, clusters: _Clusters, confidence: float) -> tuple[float, float]:
    """Clopper–Pearson for as many independent rows as carry the information of these clustered ones."""
    count = clusters.groups
    if error == 0 or not 0 < value < 1:
        effective = float(count)
    elif count < 2:
        return float("nan"), float("nan")
    else:
        tail = (1 + confidence) / 2
        few_groups = stats.t.ppf(tail, max(clusters.rows - 1, 1)) / stats.t.ppf(tail, count - 1)
        effective = min(value * (1 - value) / error**2 * few_groups**2, float(clusters.rows))
    hits, tail = value * effective, (1 - confidence) / 2
    low = 0.0 if value == 0 else float(stats.beta.ppf(tail, hits, effective - hits + 1))
    high = 1.0 if value == 1 else float(stats.beta.ppf(1 - tail, hits + 1, effective - hits))
    return low, high


def _unseen(count: int, confidence: float) -> float:
    """Largest share of which `count` draws may well show none (Clopper–Pearson for 0)."""
    return float(1 - ((1 - confidence) / 2) ** (1 / count))


def _seed_error(by_seed: Floats, masses: Floats, per_seed: Floats) -> float:
    """Standard error that the choice of seeds adds: their spread less what the rows of one seed vary by themselves."""
    seeds, count = by_seed.shape
    if seeds < 2 or count < 2:
        return 0.0
    rest = by_seed - by_seed.mean(axis=0) - (per_seed - per_seed.mean())[:, None] * masses
    by_rows = np.sum(rest**2) * count / (count - 1) / masses.sum() ** 2 / (seeds - 1)
    return float(np.sqrt(max(0.0, np.var(per_seed, ddof=1) - by_rows) / seeds))


def _permutation_p(by_group: Floats, permutations: int, seed: int) -> tuple[float, bool]:
    """p, and whether the number of permutations limits it: every way is tried where there are few, else a draw.

    Groups are swapped between the arms as wholes, which turns the sign of their difference.
    """
    if len(by_group) < 2:
        return float("nan"), False
    # A group in which the arms are equal is the same swapped.
    differing = by_group[by_group != 0]
    if len(differing) < 2:
        return 1.0, False  # of one group both signs are as extreme
    tested = stats.permutation_test(
        (differing,),
        lambda differences, axis: differences.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=permutations,
        batch=max(1, _PERMUTED_AT_ONCE // len(differing)),
        rng=np.random.default_rng(seed),
    )
    p = float(tested.pvalue)
    return p, 2.0 ** len(differing) > permutations and p <= 2 / (permutations + 1)
