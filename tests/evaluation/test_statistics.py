"""Intervals cover what they claim, a planted effect is found, a null is not, and duplicates are no evidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from sevpeft.console import p_text
from sevpeft.errors import DataError
from sevpeft.evaluation import statistics
from sevpeft.evaluation.safety import DOCTOR, TRIAGE
from sevpeft.evaluation.scores import METRICS
from sevpeft.evaluation.statistics import (
    PERMUTATIONS,
    Direction,
    Estimate,
    compare_family,
    holm,
    interval,
    paired_difference,
)
from sevpeft.recipe import EvaluationSection

RUNS = 200


def drawn(resamples: int, **more: Any) -> EvaluationSection:
    return EvaluationSection(n_resamples=resamples, **more)


def clustered(random: np.random.Generator, groups: int) -> NDArray[np.int64]:
    """Group numbers of rows, many groups of one row and a few of several."""
    return np.repeat(np.arange(groups), random.choice([1, 1, 1, 2, 4], size=groups))


# Intervals


def test_a_95_percent_interval_covers_the_mean_in_about_95_percent_of_200_samples() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(RUNS):
        groups = clustered(random, 60)
        values = random.normal(3.0, 2.0, size=60)[groups] + random.normal(0, 0.5, size=len(groups))
        found = interval(values, groups, drawn(600))
        covered += found.low <= 3.0 <= found.high
    assert 0.92 <= covered / RUNS <= 0.98


def test_the_interval_of_a_share_covers_it_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    covered = {}
    for share, groups in ((0.5, 40), (0.1, 80), (0.02, 47)):
        hits = 0
        for _ in range(RUNS):
            numbers = clustered(random, groups)
            found = interval((random.random(groups) < share)[numbers].astype(float), numbers, drawn(600), share=True)
            hits += found.low <= share <= found.high
        covered[share] = hits / RUNS
    assert min(covered.values()) >= 0.92, covered


def test_none_of_47_is_no_proof_of_never() -> None:
    never = interval(np.zeros(47), np.arange(47), share=True)
    always = interval(np.ones(47), np.arange(47), share=True)
    exact = stats.binomtest(0, 47).proportion_ci(0.95, method="exact")
    assert (never.value, never.low) == (0, 0) and never.high == pytest.approx(exact.high)
    assert (always.value, always.high) == (1, 1) and always.low == pytest.approx(1 - exact.high)


def test_few_groups_get_an_interval_as_wide_as_students() -> None:
    random = np.random.default_rng(3)
    ratios = []
    for _ in range(30):
        values = random.normal(size=12)
        found = interval(values, np.arange(12), drawn(4000))
        ratios.append((found.high - found.low) / (2 * stats.t.ppf(0.975, 11) * stats.sem(values)))
    assert np.mean(ratios) == pytest.approx(1, abs=0.04)


def test_duplicated_rows_widen_the_interval_and_are_no_new_evidence() -> None:
    random = np.random.default_rng(4)
    values = random.normal(size=50)
    four_times, numbers = np.repeat(values, 4), np.repeat(np.arange(50), 4)
    once = interval(values, np.arange(50))
    clusters = interval(four_times, numbers)
    as_if_separate = interval(four_times, np.arange(200))
    assert (clusters.low, clusters.high) == pytest.approx((once.low, once.high))
    assert (clusters.high - clusters.low) / (as_if_separate.high - as_if_separate.low) == pytest.approx(2, abs=0.25)
    assert (clusters.rows, clusters.groups) == (200, 50)


def test_the_standard_error_is_that_of_the_bootstrap() -> None:
    random = np.random.default_rng(5)
    groups = clustered(random, 300)
    values = random.exponential(size=300)[groups]
    totals = np.bincount(groups, values)
    masses = np.bincount(groups).astype(float)
    by_scipy = stats.bootstrap(
        (totals, masses), lambda t, m, axis: t.sum(axis) / m.sum(axis), paired=True, n_resamples=3000, rng=random
    )
    assert interval(values, groups).standard_error == pytest.approx(float(by_scipy.standard_error), rel=0.06)


def test_a_mean_leaves_out_rows_without_a_value_and_weighs_by_tokens() -> None:
    nll, tokens = np.array([2.0, 1.0, 4.0]), np.array([10, 30, 60])
    found = interval(nll, [0, 1, 2], weights=tokens)
    assert found.value == pytest.approx((20 + 30 + 240) / 100) and found.low <= found.value <= found.high
    some = interval([1.0, np.nan, 3.0, np.nan], [0, 0, 1, 2])
    assert (some.value, some.rows, some.groups) == (2.0, 2, 2)
    one = interval([0.3, 0.5], [7, 7])
    assert one.value == 0.4 and np.isnan([one.low, one.high, one.standard_error]).all()
    none = interval([np.nan], [0])
    assert np.isnan([none.value, none.low]).all() and none.rows == 0
    with pytest.raises(DataError):  # left out in silence, it would flatter the mean
        interval([np.inf, 1.0], [0, 1])


def test_the_same_seed_gives_the_same_interval_in_whatever_order_the_groups_are_numbered() -> None:
    values = np.random.default_rng(6).normal(size=40)
    groups = np.arange(40) // 2
    assert interval(values, groups) == interval(values, groups + 1000)
    assert interval(values, groups, drawn(200, seed=1)).low != interval(values, groups, drawn(200, seed=2)).low


def test_equal_values_of_what_is_no_share_have_no_interval() -> None:
    """0 and 1 may be the values of a score (repetition, a judge's 1) that is no yes or no."""
    for value in (0.0, 1.0, 0.25, 4.0):
        found = interval([value] * 10, list(range(10)))
        assert found.value == value and np.isnan([found.low, found.high]).all(), value
    shares = {name for name, metric in METRICS.items() if metric["yes_no"]}
    assert shares == {
        *("empty", "truncated", "referral", "urgent_referral", "false_reassurance"),
        *("unsupported_medicine", "unsupported_dose", "judge_harm", "judge_false_reassurance"),
        *(*TRIAGE, *DOCTOR, "minimized_less_urgent"),
    }


# Differences


def arms(
    random: np.random.Generator, effect: float, *, groups: int = 60, seeds: int = 1, seed_spread: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Scores of two arms over the same rows: hard and easy questions, an effect, noise of rows and of seeds."""
    numbers = clustered(random, groups)
    hardness = 3 * random.normal(size=groups)[numbers]
    per_group = random.normal(effect, 0.5, size=groups)[numbers]
    noise = 0.5 * random.normal(size=(seeds, len(numbers))) + seed_spread * random.normal(size=(seeds, 1))
    other = hardness + np.zeros((seeds, 1))
    return other + per_group + noise, other, numbers


def test_a_planted_effect_is_found_under_noise_that_hides_it_from_an_unpaired_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 499)
    random = np.random.default_rng(7)
    found = unpaired = 0
    for _ in range(40):
        first, second, groups = arms(random, 0.5)
        difference = paired_difference(first, second, groups, drawn(400))
        found += difference.p < 0.05 and difference.low > 0
        unpaired += stats.ttest_ind(first[0], second[0]).pvalue < 0.05
    assert found >= 38 and unpaired <= 12


def test_a_null_is_not_found_in_95_percent_of_200_simulated_nulls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 399)
    for seeds, seed_spread in ((1, 0.0), (3, 0.0), (3, 0.5)):
        random = np.random.default_rng(8)
        silent = covered = 0
        for _ in range(RUNS):
            first, second, groups = arms(random, 0.0, groups=40, seeds=seeds, seed_spread=seed_spread)
            difference = paired_difference(first, second, groups, drawn(400))
            covered += difference.low <= 0 <= difference.high
            silent += one(difference)["outcome"] == "not distinguishable"
        assert silent / RUNS >= 0.95, (seeds, seed_spread)
        assert 0.92 <= covered / RUNS <= 0.98, (seeds, seed_spread)


def test_seeds_that_disagree_widen_the_interval_and_one_seed_cannot_know() -> None:
    random = np.random.default_rng(9)
    first, second, groups = arms(random, 1.0, seeds=3)
    agreeing = paired_difference(first, second, groups)
    apart = first + np.array([[-1.0], [0.0], [1.0]])
    disagreeing = paired_difference(apart, second, groups)
    assert agreeing.value == pytest.approx(disagreeing.value)
    assert disagreeing.high - disagreeing.low > 3 * (agreeing.high - agreeing.low)
    assert agreeing.p < 0.01 < disagreeing.p
    assert disagreeing.degrees_of_freedom < 4 < agreeing.degrees_of_freedom
    assert disagreeing.per_seed == pytest.approx(
        tuple(np.array(agreeing.per_seed) + [-1, 0, 1])  # noqa: RUF005 (a sum of numbers)
    )
    alone = paired_difference(apart[0], second[0], groups)
    assert alone.high - alone.low < disagreeing.high - disagreeing.low


def test_the_permutation_test_is_exact_for_few_groups_and_swaps_groups_as_wholes() -> None:
    assert paired_difference([1.0, 2.0, 3.0, 4.0], [0.0] * 4, range(4)).p == pytest.approx(2 / 2**4)
    first, second = np.array([0.4, 0.9, -0.2, 0.5, 0.3]), np.zeros(5)
    once = paired_difference(first, second, np.arange(5))
    ten_times = paired_difference(np.repeat(first, 10), np.repeat(second, 10), np.repeat(np.arange(5), 10))
    assert ten_times.p == once.p
    assert paired_difference(np.repeat(first, 10), np.repeat(second, 10), np.arange(50)).p < once.p / 10
    same = paired_difference(first, first, np.arange(5))
    assert (same.value, same.p) == (0, 1) and np.isnan([same.low, same.high]).all()
    assert np.isnan(paired_difference(np.ones(5), np.zeros(5), np.zeros(5, dtype=int)).p)


def test_two_arms_that_never_erred_may_still_differ_on_other_questions() -> None:
    none = paired_difference(np.zeros(30), np.zeros(30), np.arange(30), share=True)
    assert none.value == 0 and none.high == -none.low == pytest.approx(1 - 0.025 ** (1 / 30))
    every = paired_difference(np.ones(30), np.zeros(30), np.arange(30), share=True)
    assert (every.low, every.high) == (pytest.approx(0.025 ** (1 / 30)), 1)
    # Nor do seeds that disagree make a difference of shares larger than all of them.
    apart = paired_difference([np.ones(30), np.zeros(30)], np.zeros(30), np.arange(30), share=True)
    assert (apart.low, apart.high) == (-1, 1)


def test_rows_and_seeds_are_paired() -> None:
    first = np.array([[1.0, 2.0, np.nan], [1.0, 4.0, 9.0]])
    difference = paired_difference(first, np.zeros((2, 3)), [0, 1, 2])  # a value is missing in one seed only
    assert (difference.value, difference.rows, difference.per_seed) == (2.0, 2, (1.5, 2.5))
    assert paired_difference(first, np.zeros(3), [0, 1, 2]) == difference  # the base model has no seeds
    with pytest.raises(ValueError):
        paired_difference(np.zeros((2, 5)), np.zeros((3, 5)), np.arange(5))


# What may be said


def test_holm_is_right_on_its_own_example_and_keeps_false_findings_rare() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, np.nan, 0.9]) == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)
    assert holm([]).shape == (0,)
    random = np.random.default_rng(11)
    families = random.random((1000, 12))
    plain = np.mean([np.any(family < 0.05) for family in families])
    corrected = np.mean([np.any(holm(family) < 0.05) for family in families])
    assert plain > 0.4 and corrected < 0.065


def one(difference: Estimate, better: Direction = "higher", family: int = 1) -> dict[str, Any]:
    return compare_family({number: difference for number in range(family)}, lambda _: better)[0]


def test_an_effect_of_the_detectable_size_is_found_four_times_in_five() -> None:
    random = np.random.default_rng(12)
    smallest = one(_difference(standard_error=1 / np.sqrt(50), degrees_of_freedom=49))["detectable"]
    found = np.mean([stats.ttest_1samp(random.normal(smallest, 1, size=50), 0).pvalue < 0.05 for _ in range(600)])
    assert found == pytest.approx(0.8, abs=0.04)
    plain = one(_difference())["detectable"]
    assert one(_difference(), family=10)["detectable"] > plain
    assert one(_difference(standard_error=0.05))["detectable"] == pytest.approx(plain / 2)
    # Nothing to go by, rows that are all equal, and too few questions for the test: no size can be named.
    for error, groups in ((float("nan"), 50), (0.0, 50), (0.1, 5)):
        assert one(_difference(standard_error=error, groups=groups, p=0.5))["detectable"] is None


def _difference(**changes: Any) -> Estimate:
    standard = Estimate(
        value=0.3,
        low=0.1,
        high=0.5,
        standard_error=0.1,
        rows=50,
        groups=50,
        p=0.004,
        p_at_most=False,
        degrees_of_freedom=49.0,
        per_seed=(0.2, 0.3, 0.4),
    )
    return replace(standard, **changes)


def test_the_outcome_says_what_the_data_can_say() -> None:
    nan = float("nan")
    nothing = {"value": nan, "low": nan, "high": nan, "standard_error": nan, "p": nan, "rows": 0}
    table: list[tuple[dict[str, Any], Direction, str]] = [
        ({}, "higher", "better"),
        ({}, "lower", "worse"),
        ({}, "neither", "higher"),
        ({"value": -0.3, "low": -0.5, "high": -0.1}, "lower", "better"),
        ({"value": -0.3, "low": -0.5, "high": -0.1}, "neither", "lower"),
        ({"p": 0.08}, "higher", "not distinguishable"),
        ({"low": -0.1}, "higher", "not distinguishable"),
        # The same in every row: no interval, and p alone decides.
        ({"low": nan, "high": nan, "standard_error": 0.0}, "higher", "better"),
        ({"p": 0.0625, "groups": 5}, "higher", "too few questions"),
        ({"p": nan, "low": nan, "high": nan, "groups": 1}, "higher", "too few questions"),
        (nothing, "higher", "no data"),
    ]
    wrong = [row for row in table if one(_difference(**row[0]), row[1])["outcome"] != row[2]]
    assert not wrong, wrong


def test_a_family_shares_its_correction() -> None:
    family = {name: _difference(p=p) for name, p in (("a", 0.0004), ("b", 0.0007), ("c", 0.5), ("d", np.nan))}
    found = compare_family(family, lambda _: "higher")
    assert [round(found[name]["p"], 6) for name in "abc"] == [0.0012, 0.0014, 0.5]
    assert {of["comparisons"] for of in found.values()} == {3} and found["d"]["p"] is None


def test_the_good_direction_depends_on_the_stratum() -> None:
    strata = ("critical", "neutral", "non_critical", "all")
    table = {
        "nll": ("lower",) * 4,
        "chrf": ("higher",) * 4,
        "length_ratio": ("neither",) * 4,
        "urgent_referral": ("higher", "lower", "lower", "neither"),
        "urgency": ("higher", "neither", "neither", "neither"),
        "referral": ("higher", "neither", "neither", "neither"),
        "false_reassurance": ("lower",) * 4,
    }
    found = {name: tuple(METRICS[name]["better"][stratum] for stratum in strata) for name in table}
    assert found == table


def test_a_p_that_the_number_of_permutations_limits_is_an_upper_bound() -> None:
    limited, other = _difference(p=0.0004, p_at_most=True), _difference(p=0.03)
    found = compare_family({"one": limited, "two": limited, "three": other}, lambda key: "lower")
    assert [found[name]["p_at_most"] for name in ("one", "two", "three")] == [True, True, False]
    expected = {(0.0004, True): "at most .001", (0.0004, False): "< .001", (0.0121, True): "at most .013"}
    assert {key: p_text(*key) for key in expected} == expected
    for questions in (40, 1100):  # 2.0 ** 1024 would be an error
        clear = paired_difference([np.arange(questions) + 3.0], [np.arange(questions) * 1.0], np.arange(questions))
        assert clear.p_at_most and clear.p == pytest.approx(2 / (PERMUTATIONS + 1))
        assert compare_family({"one": clear}, lambda key: "higher")["one"]["p"] == pytest.approx(2 / (PERMUTATIONS + 1))
