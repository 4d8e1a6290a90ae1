"""Planted effects are found and named, nulls are not, and what shuffled weights do as well is said so."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sevpeft.errors import RunError
from sevpeft.evaluation.comparison import (
    CRITICAL,
    Compared,
    as_dict,
    choose,
    compare_scores,
    refuse_too_small,
    shown,
    verdicts,
)
from sevpeft.evaluation.comparison_table import comparison_tables
from sevpeft.evaluation.metrics import METRICS
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.significance import Outcome, minimal_detectable_difference
from sevpeft.evaluation.statistics import paired_difference
from sevpeft.recipe.evidence import EvaluationSection

SETTINGS = EvaluationSection(n_resamples=100)
ROWS = 240


def rows_of(strata: np.ndarray, groups: np.ndarray | None = None) -> EvaluationRows:
    count = len(strata)
    texts = [f"نص {at}" for at in range(count)]
    return EvaluationRows(
        ids=[str(at) for at in range(count)],
        questions=texts,
        references=texts,
        dialects=None,
        strata=strata,
        groups=np.arange(count) if groups is None else groups,
        source="planted",
        fingerprint="sha256:0",
    )


def planted(
    effects: dict[str, float], *, seeds: int = 3, noise: float = 0.1, count: int = ROWS, groups: int | None = None
) -> Compared:
    """Arms whose critical NLL lies so much above plain CE's, a third of the rows being critical."""
    random = np.random.default_rng(5)
    strata = np.arange(count) % 3
    of = np.arange(count) if groups is None else np.arange(count) // 3 % groups
    rows = rows_of(strata, of)
    tokens = random.integers(5, 40, count)
    level = 4 + random.normal(size=count)
    by_arm: dict[str, dict[str, np.ndarray]] = {"base": {"nll": level[None] + 1}}
    for arm, effect in {"ce": 0.0, **effects}.items():
        values = level + effect * (strata == 2) + random.normal(0, noise, (seeds, count))
        by_arm[arm] = {"nll": values}
    return compare_scores(rows, tokens, by_arm, SETTINGS)


def said(compared: Compared, arm: str | None = "balanced") -> str:
    return verdicts({"one": compared}, {"one": arm})["one"].verdict


def test_a_planted_effect_is_found_where_it_is_and_nowhere_else() -> None:
    compared = planted({"balanced": -0.2, "shuffled": 0.0})
    key = (CRITICAL, "nll", "balanced", "shuffled")
    difference = compared.differences[key]
    assert difference.low < -0.2 < difference.high < 0 and compared.outcome(key) == "better"
    assert compared.outcome(("non_critical", "nll", "balanced", "shuffled")) == "not distinguishable"
    assert compared.outcome((CRITICAL, "nll", "shuffled", "ce")) == "not distinguishable"
    assert compared.outcome((CRITICAL, "nll", "base", "ce")) == "worse"
    assert list(compared.strata) == ["critical", "all", "neutral", "non_critical"]
    assert compared.strata["critical"] == (80, 80)


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        (
            {"balanced": -0.3, "shuffled": 0.0},
            r"lowers .* critical .* against plain CE .* better than both, so knowing",
        ),
        ({"balanced": -0.3, "shuffled": -0.3}, r"better than plain CE, but not distinguishable from shuffled weights"),
        ({"balanced": -0.2, "shuffled": -0.5}, r"and raises by .* better than plain CE, but worse than shuffled"),
        ({"balanced": 0.0, "shuffled": 0.3}, r"better than shuffled weights, but not distinguishable from plain CE\."),
        ({"balanced": 0.0, "shuffled": 0.0}, r"not distinguishable from plain CE, nor from shuffled weights\."),
        ({"balanced": 0.0, "shuffled": -0.3}, r"not distinguishable from plain CE, and worse than shuffled weights\."),
        ({"balanced": 0.3, "shuffled": 0.6}, r"worse than plain CE, though better than shuffled weights\."),
        ({"balanced": 0.3, "shuffled": 0.3}, r"worse than plain CE, and not distinguishable from shuffled weights\."),
        ({"balanced": 0.3, "shuffled": 0.0}, r"raises .* and by .* against shuffled weights .*: worse than both\."),
        ({"balanced": -0.3}, r"better than plain CE, and without the arm shuffled nobody knows whether severity is"),
    ],
)
def test_the_verdict_says_what_the_rows_say(effects: dict[str, float], expected: str) -> None:
    assert re.search(expected, said(planted(effects, noise=0.2))), said(planted(effects, noise=0.2))


def test_the_verdict_is_one_sentence_with_intervals_that_turn_with_the_sign() -> None:
    compared = planted({"balanced": -0.2, "shuffled": 0.0})
    found = compared.differences[CRITICAL, "nll", "balanced", "ce"]
    sentence = said(compared)
    expected = f"balanced lowers the NLL of critical cases by {shown(-found.value)} [{shown(-found.high)}, "
    assert sentence.startswith(expected) and sentence.count(". ") == 0
    assert "one seed says nothing about others" in said(planted({"balanced": -0.2, "shuffled": 0.0}, seeds=1))
    assert said(compared, None) == "No verdict: the arms hold no severity weights."


def test_a_null_gets_no_verdict_of_a_difference() -> None:
    found = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        level = random.normal(size=40)
        scores = {arm: {"nll": level + random.normal(0, 0.2, (3, 40))} for arm in ("ce", "balanced", "shuffled")}
        compared = compare_scores(rows_of(np.full(40, 2)), np.ones(40), scores, SETTINGS)
        found += "not distinguishable from plain CE, nor" not in said(compared)
    assert found <= 2


def test_the_p_of_a_score_are_corrected_for_all_its_comparisons() -> None:
    compared = planted({"balanced": -0.2, "strong": -0.1, "shuffled": 0.0})
    # base and shuffled against ce, two presets against both, in four strata; ce − shuffled is shuffled − ce.
    assert compared.comparisons("nll") == 4 * (2 + 2 * 2)
    smallest = min(compared.differences, key=lambda key: compared.differences[key].p)
    assert compared.corrected[smallest] == pytest.approx(min(1, compared.differences[smallest].p * 24))
    two = {"one": compared, "two": planted({"balanced": 0.0, "shuffled": 0.0})}
    one_p = re.search(r"p (< \.001|= \.\d+)", verdicts({"one": compared}, {"one": "strong"})["one"].verdict)
    assert one_p and verdicts(two, {"one": "strong", "two": "balanced"})["two"].verdict


def test_the_power_line_is_the_detectable_difference_of_the_two_comparisons() -> None:
    compared = planted({"balanced": -0.2, "shuffled": 0.0})
    power = verdicts({"one": compared}, {"one": "balanced"})["one"].power
    primary = compared.primary("balanced", "ce")
    assert primary is not None
    assert "80 critical questions and 3 seeds" in power and "80% power" in power
    assert f"{shown(minimal_detectable_difference(primary, comparisons=2))} against plain CE" in power


def test_the_price_on_the_other_cases_is_told() -> None:
    cost = verdicts({"one": planted({"balanced": -0.2})}, {"one": "balanced"})["one"].cost
    assert cost.startswith("NLL of the others against plain CE: all −.") and "non-critical" in cost


def test_duplicated_questions_are_no_further_evidence() -> None:
    alone, often = (planted({"balanced": -0.1}, noise=0.5, groups=groups) for groups in (None, 10))
    key = (CRITICAL, "nll", "balanced", "ce")
    assert often.differences[key].groups == 10 and alone.differences[key].groups == 80
    assert often.differences[key].degrees_of_freedom < alone.differences[key].degrees_of_freedom


def test_nll_is_a_mean_over_tokens_and_pairs_rows_and_seeds() -> None:
    random = np.random.default_rng(0)
    tokens, first, second = random.integers(1, 30, 30) * 1.0, random.normal(size=(2, 30)), random.normal(size=(2, 30))
    scores = {"ce": {"nll": first}, "balanced": {"nll": second}}
    compared = compare_scores(rows_of(np.full(30, 2)), tokens, scores, SETTINGS)
    mean = np.average(second.mean(axis=0), weights=tokens)
    assert compared.means[CRITICAL, "nll", "balanced"].value == pytest.approx(mean)
    expected = paired_difference(second, first, np.arange(30), weights=tokens, resamples=100)
    assert compared.differences[CRITICAL, "nll", "balanced", "ce"] == expected


def test_a_score_that_one_arm_lacks_is_left_out() -> None:
    some = np.random.default_rng(0).normal(size=(1, 20))
    scores = {"ce": {"nll": some, "chrf": some}, "balanced": {"nll": some + 1}}
    assert compare_scores(rows_of(np.full(20, 2)), np.ones(20), scores, SETTINGS).metrics == ["nll"]


def test_the_weights_are_chosen_by_the_mean_over_seeds() -> None:
    assert choose({"ce": [0.1], "mild": [3.0, 3.0], "strong": [2.0, 3.5]}) == "strong"
    assert choose({"ce": [1.0], "shuffled": [1.0]}) is None


@pytest.mark.parametrize(
    ("strata", "expected"),
    [
        ([0, 0, 1, 1, 2], "has 1 critical question, too few to compare arms on; raise data.test_size"),
        ([0, 0, 1, 1], "has no critical questions, too few"),
        ([0, 1, 1, 2, 2], "has 1 non-critical question, too few"),
        ([-1, -1], "has no severity, so that the arms would have nothing to weight by"),
    ],
)
def test_a_test_split_that_can_show_nothing_is_refused(strata: list[int], expected: str) -> None:
    with pytest.raises(RunError, match=expected):
        refuse_too_small(rows_of(np.array(strata)), "data")
    refuse_too_small(rows_of(np.array([0, 0, 2, 2])), "data")


def content_of(compared: Compared) -> dict[str, Any]:
    told = ("label", "unit", "better", "shown_times")
    verdict = verdicts({"one": compared}, {"one": "balanced"})["one"]
    one = {
        "model": "tiny",
        "chosen": "balanced",
        "controls_of": "balanced",
        "validation": {"balanced": {"mean": 4.0, "per_seed": [4.0]}},
        "comparisons": {name: compared.comparisons(name) for name in compared.metrics},
        "notes": [],
        "scores": as_dict(compared),
        "verdict": verdict.verdict,
        "cost": verdict.cost,
        "power": verdict.power,
    }
    metrics = {name: {key: getattr(METRICS[name], key) for key in told} for name in compared.metrics}
    return {"confidence_level": 0.95, "metrics": metrics, "recipes": {"one": one}}


def test_the_widest_numbers_fit_80_columns_and_stars_stand_by_what_was_found() -> None:
    random = np.random.default_rng(1)
    strata = np.arange(60) % 3
    level = random.normal(12, 9, 60).clip(0)
    arms = {"base": 30.0, "ce": 0.0, "balanced": -6.0, "shuffled": 0.0}
    scores = {
        arm: {"nll": level + up + random.normal(0, 3, (3, 60)), "chrf": 50 - up + random.normal(0, 9, (3, 60))}
        for arm, up in arms.items()
    }
    content = content_of(compare_scores(rows_of(strata), np.ones(60), scores, SETTINGS))
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison_tables(content))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.index("critical: 20 rows") < text.index("all: 60 rows") < text.index("neutral: 20")
    lines = [line for line in text.splitlines() if re.match(r"balanced +[\d.]", line)]
    assert lines[0].count("*") == 2 and "chrF++ ↑" in text
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_outcomes_have_all_their_words() -> None:
    every: tuple[Outcome, ...] = ("better", "worse", "not distinguishable")
    from sevpeft.evaluation.comparison import _judged

    assert len({_judged({"ce": one, "shuffled": other}) for one in every for other in every}) == 9
    assert _judged({"shuffled": "better"}) == "better than shuffled weights; the arm ce was left out"
