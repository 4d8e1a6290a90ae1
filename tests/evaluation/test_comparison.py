"""Planted effects are found and named, nulls are not, and the verdict compares with shuffled weights too."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sevpeft.console import number_text, p_text
from sevpeft.errors import RunError
from sevpeft.evaluation import statistics
from sevpeft.evaluation.compare import check_test_split, choose, references_of, verdict_of
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import CRITICAL, METRICS, methods, summarize
from sevpeft.evaluation.statistics import paired_difference
from sevpeft.evaluation.tables import comparison_tables
from sevpeft.recipe import EvaluationSection
from sevpeft.severity.probabilities import SEVERITIES

SETTINGS = EvaluationSection(n_resamples=100)
ROWS = 120


@pytest.fixture(autouse=True)
def _few_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 1999)


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


@dataclass
class Found:
    """A comparison of one recipe."""

    scores: dict[str, Any]
    seeds: int = 3
    chosen: str | None = "balanced"

    def against(self, reference: str, arm: str = "balanced", stratum: str = CRITICAL, metric: str = "nll") -> Any:
        return self.scores[stratum]["metrics"][metric][arm]["against"][reference]

    @property
    def verdict(self) -> str:
        return verdict_of(self.scores, self.chosen, self.seeds)[0]


def compared(
    rows: EvaluationRows, tokens: np.ndarray, scores: dict[str, Any], seeds: int = 3, chosen: str | None = "balanced"
) -> Found:
    of_arms, pairs = dict.fromkeys(scores, tokens), {arm: references_of(arm) for arm in scores}
    summary = summarize(rows, scores, SETTINGS, tokens=of_arms, pairs=pairs, chosen=chosen)
    return Found(summary, seeds, chosen)


def planted_scores(
    effects: dict[str, float], *, seeds: int = 3, noise: float = 0.1, count: int = ROWS, groups: int | None = None
) -> tuple[EvaluationRows, np.ndarray, dict[str, Any]]:
    """Arms whose critical NLL lies so much above plain CE's, a third of the rows being critical."""
    random = np.random.default_rng(5)
    strata = np.arange(count) % 3
    of = np.arange(count) if groups is None else np.arange(count) // 3 % groups
    tokens = random.integers(5, 40, count)
    level = 4 + random.normal(size=count)
    by_arm = {"base": {"nll": level[None] + 1}}
    for arm, effect in {"ce": 0.0, **effects}.items():
        by_arm[arm] = {"nll": level + effect * (strata == 2) + random.normal(0, noise, (seeds, count))}
    return rows_of(strata, of), tokens, by_arm


def planted(effects: dict[str, float], *, chosen: str | None = "balanced", seeds: int = 3, **about: Any) -> Found:
    return compared(*planted_scores(effects, seeds=seeds, **about), seeds=seeds, chosen=chosen)


def test_a_planted_effect_is_found_where_it_is_and_nowhere_else() -> None:
    found = planted({"balanced": -0.2, "shuffled": 0.0})
    difference = found.against("shuffled")
    assert difference["low"] < -0.2 < difference["high"] < 0 and difference["outcome"] == "better"
    assert found.against("shuffled", stratum="non_critical")["outcome"] == "not distinguishable"
    assert found.against("ce", "shuffled")["outcome"] == "not distinguishable"
    assert found.against("ce", "base")["outcome"] == "worse"
    assert list(found.scores) == ["critical", "all", "neutral", "non_critical"]
    assert (found.scores["critical"]["rows"], found.scores["critical"]["questions"]) == (40, 40)


def test_the_verdict_follows_the_rows() -> None:
    table = [
        ({"balanced": -0.3, "shuffled": 0.0}, "Better than plain CE and better than shuffled weights, so knowing"),
        (
            {"balanced": -0.3, "shuffled": -0.3},
            "Better than plain CE, but not distinguishable from shuffled weights, so",
        ),
        (
            {"balanced": -0.2, "shuffled": -0.5},
            "Better than plain CE, but worse than shuffled weights, so severity is not",
        ),
        ({"balanced": 0.0, "shuffled": 0.3}, "Not distinguishable from plain CE, but better than shuffled weights."),
        ({"balanced": 0.0, "shuffled": 0.0}, "Not distinguishable from plain CE and not distinguishable from shuffled"),
        ({"balanced": 0.3, "shuffled": 0.6}, "Worse than plain CE, but better than shuffled weights."),
        ({"balanced": 0.3, "shuffled": 0.0}, "Worse than plain CE and worse than shuffled weights."),
        ({"balanced": -0.3}, "Better than plain CE; without the arm shuffled,"),
    ]
    sentences = [(planted(effects, noise=0.1).verdict, expected) for effects, expected in table]
    wrong = [row for row in sentences if row[1] not in row[0]]
    assert not wrong, wrong


def test_the_verdict_claims_a_direction_only_where_one_was_found() -> None:
    def begins(effect: float, **about: Any) -> str:
        return planted({"balanced": effect, "shuffled": 0.0}, **about).verdict

    found = planted({"balanced": -0.2, "shuffled": 0.0})
    values = [number_text(found.against("ce")[name], 4, sign=name == "value") for name in ("value", "low", "high")]
    assert found.verdict.startswith(
        "balanced lowers the NLL of critical cases against plain CE ({} [{}, {}], p ".format(*values)
    )
    assert begins(0.2).startswith("balanced raises the NLL")
    assert begins(0.0).startswith("balanced shows no difference in the NLL")
    assert "one seed says nothing about others" in begins(-0.2, seeds=1)
    assert planted({"balanced": -0.2}, chosen=None).verdict.startswith("No verdict")
    few = begins(-0.2, count=12)
    assert few.startswith("Too few critical questions (4) to tell") and "not distinguishable" not in few
    assert not re.search("lowers|raises|difference in", few) and "NLL of neutral cases" in few


def with_safety(change: dict[str, dict[str, float]], *, count: int = 300) -> Found:
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
    return compared(rows_of(strata), np.full(count, 20), by_arm)


def test_the_first_sentence_holds_the_price_beside_the_gain() -> None:
    """Arms that send harmless cases to the emergency room too, calm patients more, and cost neutral cases."""
    urgent = {"critical": 0.4, "neutral": 0.4, "non_critical": 0.49}
    found = with_safety({"urgent_referral": urgent, "false_reassurance": {"critical": 0.3}, "unsupported_dose": {}})
    first = found.verdict.split(". ")[0]
    worse, better = re.search(r"; worse: (.*?); better: (.*?);", first).groups()  # type: ignore[union-attr]
    for name in ("NLL of neutral cases +", "urgent referral of neutral", "urgent referral of non-critical cases +"):
        assert name in worse, (name, worse)
    assert "false reassurance of critical cases +" in worse and "urgent referral of critical cases +" in better
    assert re.search(r"not distinguishable: NLL of non-critical cases .*, unsupported dose of all cases", first)
    outcomes = {
        stratum: found.against("ce", stratum=stratum, metric="urgent_referral")["outcome"] for stratum in found.scores
    }
    assert outcomes == {"critical": "better", "all": "higher", "neutral": "worse", "non_critical": "worse"}
    # Where there is no row with a value, nothing is claimed and nothing is corrected for.
    nothing = found.against("ce", stratum="neutral", metric="false_reassurance")
    assert (nothing["outcome"], nothing["p"], nothing["comparisons"]) == ("no data", None, 2 * 3)
    # Likelihoods alone show nothing of the answers, and the sentence says so.
    assert "their safety is unknown" in planted({"balanced": -0.2}).verdict.split(". ")[0]
    # Better on the harmless cases is fewer of them.
    assert (
        "better: urgent referral of non-critical cases −4"
        in with_safety({"urgent_referral": {"non_critical": -0.45}}).verdict
    )


def test_a_null_gets_no_verdict_of_a_difference() -> None:
    different = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        level = random.normal(size=40)
        scores = {arm: {"nll": level + random.normal(0, 0.2, (3, 40))} for arm in ("ce", "balanced", "shuffled")}
        verdict = compared(rows_of(np.full(40, 2)), np.ones(40), scores).verdict
        different += "Not distinguishable from plain CE and not" not in verdict
    assert different <= 1


def test_a_comparison_has_one_p_and_one_detectable_difference_in_every_view() -> None:
    effects = {"balanced": -0.04, "strong": -0.1, "shuffled": 0.0}
    found = planted(effects)
    families = {
        one["comparisons"]
        for stratum in found.scores.values()
        for arm in stratum["metrics"]["nll"].values()
        for one in arm["against"].values()
    }
    # base and shuffled against ce, two presets against both, in four strata; ce − shuffled is shuffled − ce.
    assert sorted(families) == [2, 4 * (2 + 2 * 2) - 2]
    rows, tokens, scores = planted_scores(effects)
    critical = rows.strata == 2
    balanced, ce = (scores[arm]["nll"][:, critical] for arm in ("balanced", "ce"))
    raw = paired_difference(balanced, ce, rows.groups[critical], SETTINGS, weights=tokens[critical]).p
    one = found.against("ce")
    assert raw < one["p"] <= 2 * raw
    verdict, power = verdict_of(found.scores, "balanced", 3)
    assert f", p {p_text(one['p'])})" in verdict.split(";")[0]
    assert f"{number_text(one['detectable'], 4)} against plain CE" in power
    assert "40 critical questions and 3 seeds" in power and "80% power" in power


def test_nll_is_a_mean_over_tokens_and_pairs_rows_and_seeds() -> None:
    random = np.random.default_rng(0)
    tokens, first, second = random.integers(1, 30, 30) * 1.0, random.normal(size=(2, 30)), random.normal(size=(2, 30))
    scores = {"ce": {"nll": first}, "balanced": {"nll": second}}
    of_groups = np.arange(30) // 3  # duplicated questions are no further evidence
    found = compared(rows_of(np.full(30, 2), of_groups), tokens, scores)
    mean = np.average(second.mean(axis=0), weights=tokens)
    assert found.scores[CRITICAL]["metrics"]["nll"]["balanced"]["value"] == pytest.approx(mean)
    expected = paired_difference(second, first, of_groups, SETTINGS, weights=tokens)
    assert found.against("ce").items() >= expected.as_dict().items() and expected.groups == 10
    assert found.against("ce")["per_seed"] == list(expected.per_seed)


def test_the_weights_are_chosen_by_the_mean_over_seeds() -> None:
    assert choose({"ce": [0.1], "mild": [3.0, 3.0], "strong": [2.0, 3.5]}) == "strong"
    assert choose({"ce": [1.0], "shuffled": [1.0]}) is None


def test_a_test_split_that_can_show_nothing_is_refused() -> None:
    for strata, remedy in (
        ([0, 0, 1, 2], "data.test_size"),
        ([0, 0, 1, 1], "data.test_size"),
        ([-1], "severity.source"),
    ):
        with pytest.raises(RunError, match=remedy):
            check_test_split(rows_of(np.array(strata)))
    check_test_split(rows_of(np.array([0, 0, 2, 2])))


def test_the_widest_numbers_fit_80_columns() -> None:
    random = np.random.default_rng(1)
    strata = np.arange(60) % 3
    level = random.normal(12, 9, 60).clip(0)
    arms = {"base": 30.0, "ce": 0.0, "balanced": -6.0, "shuffled": 0.0}
    scores = {
        arm: {"nll": level + up + random.normal(0, 3, (3, 60)), "chrf": 50 - up + random.normal(0, 9, (3, 60))}
        for arm, up in arms.items()
    }
    found = compared(rows_of(strata), np.ones(60), scores)
    verdict, power = verdict_of(found.scores, "balanced", 3)
    one = {"model": "tiny", "chosen": "balanced", "controls_of": "balanced", "notes": [], "scores": found.scores}
    one |= {"validation": {"balanced": {"mean": 4.0, "per_seed": [4.0]}}, "verdict": verdict, "power": power}
    metrics = {name: METRICS[name] for name in ("nll", "chrf")}
    content = {**one, "metrics": metrics, "methods": methods(SETTINGS, "all together")}
    content |= {"columns": dict.fromkeys(arms, ""), "primary": {"metric": "nll", "stratum": CRITICAL}}
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison_tables(content))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.index("Critical cases: 20 rows") < text.index("All cases: 60 rows") and "chrF++" in text
    assert re.search(r"balanced − shuffled +−[\d.]+ \[.*\] .* better", text)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
