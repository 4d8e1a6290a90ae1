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
    correct,
    refuse_too_small,
    shown,
    verdict_of,
)
from sevpeft.evaluation.comparison_table import comparison_tables
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import METRICS
from sevpeft.evaluation.significance import Outcome, methods, shown_p
from sevpeft.evaluation.statistics import paired_difference
from sevpeft.recipe import EvaluationSection
from sevpeft.severity.probabilities import SEVERITIES

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
    effects: dict[str, float],
    *,
    seeds: int = 3,
    noise: float = 0.1,
    count: int = ROWS,
    groups: int | None = None,
    chosen: str | None = "balanced",
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
    return compared_of(rows, tokens, by_arm, chosen)


def compared_of(
    rows: EvaluationRows, tokens: np.ndarray, scores: dict[str, dict[str, np.ndarray]], chosen: str | None = "balanced"
) -> Compared:
    return correct({"one": compare_scores(rows, tokens, scores, SETTINGS, chosen)})["one"]


def said(compared: Compared) -> str:
    return verdict_of(compared).verdict


def test_a_planted_effect_is_found_where_it_is_and_nowhere_else() -> None:
    compared = planted({"balanced": -0.2, "shuffled": 0.0})
    key = (CRITICAL, "nll", "balanced", "shuffled")
    difference = compared.differences[key]
    outcomes = {key: one.outcome for key, one in compared.comparisons.items()}
    assert difference.low < -0.2 < difference.high < 0 and outcomes[key] == "better"
    assert outcomes["non_critical", "nll", "balanced", "shuffled"] == "not distinguishable"
    assert outcomes[CRITICAL, "nll", "shuffled", "ce"] == "not distinguishable"
    assert outcomes[CRITICAL, "nll", "base", "ce"] == "worse"
    assert list(compared.strata) == ["critical", "all", "neutral", "non_critical"]
    assert compared.strata["critical"] == (80, 80)


def test_the_verdict_says_what_the_rows_say() -> None:
    table = [
        (
            {"balanced": -0.3, "shuffled": 0.0},
            r"lowers .* critical .* against plain CE; .*Better than both, so knowing",
        ),
        ({"balanced": -0.3, "shuffled": -0.3}, r"Better than plain CE, but not distinguishable from shuffled weights"),
        ({"balanced": -0.2, "shuffled": -0.5}, r"it raises .*Better than plain CE, but worse than shuffled"),
        ({"balanced": 0.0, "shuffled": 0.3}, r"Better than shuffled weights, but not distinguishable from plain CE\."),
        ({"balanced": 0.0, "shuffled": 0.0}, r"Not distinguishable from plain CE, nor from shuffled weights\."),
        ({"balanced": 0.0, "shuffled": -0.3}, r"Not distinguishable from plain CE, and worse than shuffled weights\."),
        ({"balanced": 0.3, "shuffled": 0.6}, r"Worse than plain CE, though better than shuffled weights\."),
        ({"balanced": 0.3, "shuffled": 0.3}, r"Worse than plain CE, and not distinguishable from shuffled weights\."),
        ({"balanced": 0.3, "shuffled": 0.0}, r"raises .* Against shuffled weights it raises .*Worse than both\."),
        ({"balanced": -0.3}, r"Better than plain CE, and without the arm shuffled nobody knows whether severity is"),
    ]
    sentences = [(said(planted(effects, noise=0.2)), expected) for effects, expected in table]
    wrong = [row for row in sentences if not re.search(row[1], row[0])]
    assert not wrong, wrong


def test_the_verdict_has_intervals_that_turn_with_the_sign() -> None:
    compared = planted({"balanced": -0.2, "shuffled": 0.0})
    found = compared.differences[CRITICAL, "nll", "balanced", "ce"]
    values = [shown(value, METRICS["nll"]) for value in (-found.value, -found.high, -found.low)]
    expected = "balanced lowers the NLL of critical cases by {} [{}, {}] (p at most .001)".format(*values)
    assert said(compared).startswith(expected)
    assert "one seed says nothing about others" in said(planted({"balanced": -0.2, "shuffled": 0.0}, seeds=1))
    assert said(planted({"balanced": -0.2}, chosen=None)) == "No verdict: the arms hold no severity weights."
    few = said(planted({"balanced": -0.2, "shuffled": 0.0}, count=12))
    assert "Too few critical questions to tell." in few and "not distinguishable" not in few


def with_safety(change: dict[str, dict[str, float]], *, count: int = 300) -> Compared:
    """Arms whose share of yes in a safety score lies at .5 and, for the arm balanced, a given step away from it.

    Args:
        change: metric → stratum → step.
    """
    random = np.random.default_rng(6)
    strata = np.arange(count) % 3
    level = 4 + random.normal(size=count)
    by_arm: dict[str, dict[str, np.ndarray]] = {}
    for arm, lower in {"ce": 0.0, "balanced": -0.3, "shuffled": 0.0}.items():
        by_arm[arm] = {"nll": level + lower * (strata == 2) + 0.2 * (arm == "balanced") * (strata == 1)}
        by_arm[arm]["nll"] = by_arm[arm]["nll"] + random.normal(0, 0.1, (3, count))
        for metric, steps in change.items():
            share = np.full(count, 0.5)
            for stratum, step in steps.items():
                share[strata == SEVERITIES.index(stratum)] += step if arm == "balanced" else 0
            values = (random.random((3, count)) < share).astype(float)
            values[:, strata != 2] = np.nan if metric == "false_reassurance" else values[:, strata != 2]
            by_arm[arm][metric] = values
    return compared_of(rows_of(strata), np.full(count, 20), by_arm)


def test_the_first_sentence_tells_the_price_beside_the_gain() -> None:
    """Arms that send harmless cases to the emergency room too, calm patients more, and cost neutral cases."""
    urgent = {"critical": 0.4, "neutral": 0.4, "non_critical": 0.49}
    compared = with_safety({"urgent_referral": urgent, "false_reassurance": {"critical": 0.3}, "unsupported_dose": {}})
    first = said(compared).split(". ")[0]
    worse, better = re.search(r"; worse: (.*?); better: (.*?);", first).groups()  # type: ignore[union-attr]
    for name in ("NLL of neutral cases +.", "urgent referral of neutral", "urgent referral of non-critical cases +"):
        assert name in worse, (name, worse)
    assert "false reassurance of critical cases +" in worse and "urgent referral of critical cases +" in better
    assert re.search(r"not distinguishable: NLL of non-critical cases .*, unsupported dose of all cases", first)
    outcomes = {
        stratum: compared.comparisons[stratum, "urgent_referral", "balanced", "ce"].outcome
        for stratum in compared.strata
    }
    assert outcomes == {"critical": "better", "all": "higher", "neutral": "worse", "non_critical": "worse"}
    # Where there is no row with a value, nothing is run_lock and nothing is corrected for.
    nothing = compared.comparisons["neutral", "false_reassurance", "balanced", "ce"]
    assert nothing.outcome == "no data" and nothing.as_dict()["p"] is None and nothing.family == 2 * 3
    # Likelihoods alone say nothing of the answers, and the sentence says so.
    assert "their safety is unknown" in said(planted({"balanced": -0.2})).split(". ")[0]
    # Better on the harmless cases is fewer of them.
    fewer = with_safety({"urgent_referral": {"non_critical": -0.45}})
    assert "better: urgent referral of non-critical cases −4" in said(fewer)


def test_a_null_gets_no_verdict_of_a_difference() -> None:
    found = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        level = random.normal(size=40)
        scores = {arm: {"nll": level + random.normal(0, 0.2, (3, 40))} for arm in ("ce", "balanced", "shuffled")}
        compared = compared_of(rows_of(np.full(40, 2)), np.ones(40), scores)
        found += "Not distinguishable from plain CE, nor" not in said(compared)
    assert found <= 2


def test_a_comparison_has_one_p_and_one_detectable_difference_in_every_view() -> None:
    compared = planted({"balanced": -0.03, "strong": -0.1, "shuffled": 0.0})
    # base and shuffled against ce, two presets against both, in four strata; ce − shuffled is shuffled − ce.
    assert sorted({one.family for one in compared.comparisons.values()}) == [2, 4 * (2 + 2 * 2) - 2]
    key = (CRITICAL, "nll", "balanced", "ce")
    one, raw = compared.comparisons[key], compared.differences[key].p
    assert one.family == 2 and raw < one.p <= 2 * raw
    verdict = verdict_of(compared)
    assert f"(p {shown_p(one.p, one.p_at_most)})" in verdict.verdict.split(";")[0]
    assert f"{shown(one.detectable, METRICS['nll'])} against plain CE" in verdict.power
    assert "80 critical questions and 3 seeds" in verdict.power and "80% power" in verdict.power
    stored = as_dict(compared)[CRITICAL]["metrics"]["nll"]["balanced"]["against"]["ce"]
    assert (stored["p"], stored["detectable"], stored["comparisons"]) == (one.p, one.detectable, 2)
    assert [name for name in stored if name.startswith("p")] == ["p", "p_at_most", "per_seed"]
    # The verdicts of several recipes are one family.
    two = correct({"one": compared, "two": planted({"balanced": 0.0, "shuffled": 0.0})})
    assert two["one"].comparisons[key].family == two["two"].comparisons[key].family == 4


def test_duplicated_questions_are_no_further_evidence() -> None:
    alone, often = (planted({"balanced": -0.1}, noise=0.5, groups=groups) for groups in (None, 10))
    key = (CRITICAL, "nll", "balanced", "ce")
    assert often.differences[key].groups == 10 and alone.differences[key].groups == 80
    assert often.differences[key].degrees_of_freedom < alone.differences[key].degrees_of_freedom


def test_nll_is_a_mean_over_tokens_and_pairs_rows_and_seeds() -> None:
    random = np.random.default_rng(0)
    tokens, first, second = random.integers(1, 30, 30) * 1.0, random.normal(size=(2, 30)), random.normal(size=(2, 30))
    scores = {"ce": {"nll": first}, "balanced": {"nll": second}}
    compared = compared_of(rows_of(np.full(30, 2)), tokens, scores)
    mean = np.average(second.mean(axis=0), weights=tokens)
    assert compared.means[CRITICAL, "nll", "balanced"].value == pytest.approx(mean)
    expected = paired_difference(second, first, np.arange(30), weights=tokens, resamples=100)
    assert compared.differences[CRITICAL, "nll", "balanced", "ce"] == expected


def test_a_score_that_one_arm_lacks_is_left_out() -> None:
    some = np.random.default_rng(0).normal(size=(1, 20))
    scores = {"ce": {"nll": some, "chrf": some}, "balanced": {"nll": some + 1}}
    assert compared_of(rows_of(np.full(20, 2)), np.ones(20), scores).metrics == ["nll"]


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
    verdict = verdict_of(compared)
    one = {
        "model": "tiny",
        "chosen": "balanced",
        "controls_of": "balanced",
        "validation": {"balanced": {"mean": 4.0, "per_seed": [4.0]}},
        "notes": [],
        "scores": as_dict(compared),
        "verdict": verdict.verdict,
        "power": verdict.power,
    }
    metrics = {name: METRICS[name].meaning() for name in compared.metrics}
    return {"metrics": metrics, "recipes": {"one": one}, "methods": methods(SETTINGS, "all together")}


def test_the_widest_numbers_fit_80_columns_and_stars_stand_by_what_was_found() -> None:
    random = np.random.default_rng(1)
    strata = np.arange(60) % 3
    level = random.normal(12, 9, 60).clip(0)
    arms = {"base": 30.0, "ce": 0.0, "balanced": -6.0, "shuffled": 0.0}
    scores = {
        arm: {"nll": level + up + random.normal(0, 3, (3, 60)), "chrf": 50 - up + random.normal(0, 9, (3, 60))}
        for arm, up in arms.items()
    }
    content = content_of(compared_of(rows_of(strata), np.ones(60), scores))
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

    assert _judged({"ce": "better", "shuffled": "too few questions"}) == "too few critical questions to tell"

    assert len({_judged({"ce": one, "shuffled": other}) for one in every for other in every}) == 9
    assert _judged({"shuffled": "better"}) == "better than shuffled weights; the arm ce was left out"
