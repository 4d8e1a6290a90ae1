"""Planted effects are found, nulls are not, and the claim holds where a gain has no price, and only there."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sevpeft.errors import RunError
from sevpeft.evaluation import statistics
from sevpeft.evaluation.arms import references_of
from sevpeft.evaluation.compare import check_test_split, choose
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.report.claim import Evidence, can_show, claim_of, verdict_of
from sevpeft.evaluation.scores import CRITICAL, METRICS, methods, summarize
from sevpeft.evaluation.statistics import ALPHA, paired_difference
from sevpeft.evaluation.tables import comparison_tables
from sevpeft.recipe import EvaluationSection

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
    evidence: Evidence
    seeds: int = 3

    def against(self, reference: str, arm: str = "balanced", stratum: str = CRITICAL, metric: str = "nll") -> Any:
        return self.scores[stratum]["metrics"][metric][arm]["against"][reference]

    @cached_property
    def claim(self) -> dict[str, Any]:
        return claim_of(self.evidence, "balanced")

    @cached_property
    def verdict(self) -> str:
        return verdict_of(self.claim, self.seeds)[0]


def compared(rows: EvaluationRows, tokens: np.ndarray, scores: dict[str, Any], seeds: int = 3) -> Found:
    of_arms, pairs = dict.fromkeys(scores, tokens), {arm: references_of(arm) for arm in scores}
    summary = summarize(rows, scores, SETTINGS, tokens=of_arms, pairs=pairs)
    return Found(summary, Evidence(rows, scores, tokens, SETTINGS), seeds)


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


def planted(effects: dict[str, float], *, seeds: int = 3, **about: Any) -> Found:
    return compared(*planted_scores(effects, seeds=seeds, **about), seeds=seeds)


def test_a_planted_effect_is_found_where_it_is_and_nowhere_else() -> None:
    found = planted({"balanced": -0.2, "shuffled": 0.0})
    difference = found.against("shuffled")
    assert difference["low"] < -0.2 < difference["high"] < 0 and difference["outcome"] == "better"
    assert found.against("shuffled", stratum="non_critical")["outcome"] == "not distinguishable"
    assert found.against("ce", "shuffled")["outcome"] == "not distinguishable"
    assert found.against("ce", "base")["outcome"] == "worse"
    assert list(found.scores) == ["critical", "all", "neutral", "non_critical"]
    assert (found.scores["critical"]["rows"], found.scores["critical"]["questions"]) == (40, 40)


def claimed(
    gain: float,
    price: float = 0.0,
    *,
    shuffled: float = 0.0,
    urgent: float | None = None,
    count: int = 300,
    seed: int = 6,
) -> Found:
    """Balanced weights lower the critical NLL by a gain, and raise the non-critical one by a price.

    Args:
        shuffled: gain of the shuffled weights. urgent: by how much urgent referral of critical cases is more frequent.
    """
    random = np.random.default_rng(seed)
    strata, level = np.arange(count) % 3, 4 + random.normal(size=count)
    by_arm: dict[str, dict[str, np.ndarray]] = {}
    for arm, lower in {"ce": 0.0, "balanced": gain, "shuffled": shuffled}.items():
        nll = level - lower * (strata == 2) + price * (arm == "balanced") * (strata == 0)
        by_arm[arm] = {"nll": nll + random.normal(0, 0.01, (3, count))}
        if urgent is not None:
            often = 0.5 + urgent * (arm == "balanced")
            by_arm[arm]["urgent_referral"] = (
                np.broadcast_to(np.arange(count) // 3 % 100 < often * 100, (3, count)) * 1.0
            )
    return Found({}, Evidence(rows_of(strata), by_arm, np.full(count, 20), SETTINGS))


def test_the_claim_holds_where_every_part_does_and_its_outcome_stands_first() -> None:
    table = [
        (claimed(0.1, urgent=0.0), "shown", "Shown: balanced helps critical cases (+11%"),
        (claimed(0.1), "shown", "safety is unknown"),
        (claimed(0.1, 0.05), "price", "but others lose more than the allowed 1.0%"),
        (claimed(0.1, 0.009), "price", "but others may lose more than the allowed 1.0%"),
        (claimed(0.1, shuffled=0.1), "unspecific", "but not more than shuffled weights"),
        (claimed(0.1, urgent=-0.2), "unsafe", "but may send them to urgent care less often"),
        (claimed(0.1, urgent=0.3), "shown", "no less safe"),
        (claimed(0.0), "no difference", "No difference: balanced changes critical cases by less than 1.0%"),
        (claimed(-0.1), "harm", "Not shown: balanced harms critical cases (−9"),
        (planted({"balanced": -0.02, "shuffled": 0.0}, noise=0.2), "open", "unclear"),
        (planted({"balanced": -0.2, "shuffled": 0.0}, count=12), "too few questions", "Too few critical questions (4)"),
    ]
    wrong = [
        (outcome, found.claim["outcome"], found.verdict)
        for found, outcome, words in table
        if (found.claim["outcome"], words in found.verdict) != (outcome, True)
    ]
    assert wrong == []
    # The price stands beside the gain, whatever the outcome.
    assert all("neutral " in found.verdict and "non-critical " in found.verdict for found, _, _ in table)


def test_every_part_is_one_sided_at_five_percent_and_the_largest_p_is_the_claims() -> None:
    found = claimed(0.1, 0.004, urgent=0.0)
    parts = {(part["stratum"], part["metric"], part["reference"]): part for part in found.claim["parts"]}
    assert list(parts) == [
        ("critical", "nll", "ce"), ("critical", "nll", "shuffled"), ("neutral", "nll", "ce"),
        ("non_critical", "nll", "ce"), ("critical", "urgent_referral", "ce"),
    ]  # fmt: skip
    assert found.claim["p"] == max(part["p"] for part in parts.values()) < ALPHA
    # Against the margin, as if the other arm's NLL were higher by it; one side of the two.
    part, at = parts["non_critical", "nll", "ce"], found.evidence.rows.strata == 0
    one, other = (found.evidence.scores[arm]["nll"][:, at] for arm in ("balanced", "ce"))
    groups, tokens = found.evidence.rows.groups[at], found.evidence.tokens[at]
    moved = paired_difference(one, other + SETTINGS.margin, groups, SETTINGS, weights=tokens)
    assert part["p"] == pytest.approx(moved.p / 2) and moved.value < 0
    half = SETTINGS.model_copy(update={"confidence_level": 0.9})
    ends = paired_difference(one, other, groups, half, weights=tokens)
    assert (part["low"], part["high"]) == (ends.low, ends.high) and part["per_seed"] == list(ends.per_seed)
    # What did no harm is tested on the other side: a fall of urgent referral, not a rise.
    assert parts["critical", "urgent_referral", "ce"]["margin"] == SETTINGS.safety_margin
    assert claimed(-0.1).claim["parts"][0]["p"] > 1 - ALPHA
    # Each row alike decides nothing and stands beside.
    rows = paired_difference(one, other, groups, half)
    assert (
        part["by_rows"]["value"] == pytest.approx(rows.value)
        and parts["critical", "urgent_referral", "ce"]["by_rows"] is None
    )


def test_answers_without_a_difference_are_safe_from_sixty_questions_on() -> None:
    for questions, shown in ((57, False), (60, True)):
        part = claimed(0.1, urgent=0.0, count=3 * questions).claim["parts"][-1]
        assert part["value"] == 0 and part["shown"] == shown == (part["p"] < ALPHA), questions


def test_where_there_is_no_gain_the_claim_is_shown_in_five_percent_at_most() -> None:
    """And as rarely where the gain is real and another severity loses exactly the margin."""
    shown = {(gain, price): 0 for gain, price in ((0.0, 0.0), (0.1, SETTINGS.margin))}
    for gain, price in shown:
        for seed in range(25):
            found = claimed(gain, price, count=90, seed=seed)
            shown[gain, price] += found.claim["outcome"] == "shown"
    assert max(shown.values()) <= 4, shown


def test_what_gain_can_be_shown_depends_on_questions_and_seeds() -> None:
    def least(questions: int, seeds: int) -> float:
        text = can_show(np.arange(questions).repeat(2), seeds)
        assert f"{questions} critical questions" in text
        return float(re.search(r"of ([\d.]+)%", text)[1])  # type: ignore[index]

    assert least(40, 3) > least(160, 3) and least(40, 1) > least(40, 3)
    assert least(40, 3) == pytest.approx(100 * (1 - np.exp(-2.54 * 0.0111)), abs=0.2)  # (t.95 + t.80) · SE
    found = claimed(0.1)
    _, more = verdict_of(found.claim, 3)
    assert "100 critical questions" in more and "80% power" in more and "One seed" in verdict_of(found.claim, 1)[1]


def test_the_scores_of_folds_are_joined_and_their_questions_stay_apart() -> None:
    one, other = rows_of(np.array([0, 2]), np.array([0, 1])), rows_of(np.array([1, 2, 2]), np.array([0, 0, 1]))
    rows = EvaluationRows.joined([one, other])
    assert rows.groups.tolist() == [0, 1, 2, 2, 3] and rows.strata.tolist() == [0, 2, 1, 2, 2] and len(rows) == 5


def test_a_dialect_of_few_questions_is_not_named() -> None:
    rows, tokens, scores = planted_scores({"balanced": -0.2})
    evidence = Evidence(rows, scores, tokens, SETTINGS)
    found = evidence.against_ce({"egyptian": np.arange(ROWS) < 60, "what a patient wrote": np.arange(ROWS) == 3})
    assert list(found) == ["egyptian"] and list(found["egyptian"]) == ["balanced"]
    assert found["egyptian"]["balanced"]["questions"] == 60


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


def test_the_weights_are_chosen_by_their_gain_and_by_what_others_lose_over_the_margin() -> None:
    def losses(critical: float, neutral: float) -> dict[str, Any]:
        return {"mean": critical, "others": {"loss_neutral": neutral}}

    plain = losses(3.0, 2.0)
    for mild, strong, chosen in (
        (losses(2.9, 2.0), losses(2.8, 2.0), "strong"),
        (losses(2.9, 2.0), losses(2.8, 2.009), "strong"),
        (losses(2.9, 2.0), losses(2.8, 2.3), "mild"),
    ):
        assert choose({"ce": plain, "mild": mild, "strong": strong}, 0.01) == chosen
    assert choose({"ce": plain, "shuffled": plain}, 0.01) is None


def test_a_test_split_that_can_show_nothing_is_refused() -> None:
    for strata, remedy in (
        ([0, 0, 1, 2], "data.test_size"),
        ([0, 0, 1, 1], "data.test_size"),
        ([-1], "severity.source"),
    ):
        with pytest.raises(RunError, match=remedy):
            check_test_split(rows_of(np.array(strata)))
    check_test_split(rows_of(np.array([0, 0, 2, 2])), 2)
    with pytest.raises(RunError, match="--folds 3"):
        check_test_split(rows_of(np.array([0, 0, 2, 2])), 3)


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
    (verdict, power), claim = verdict_of(found.claim, 3), found.claim
    one = {"model": "tiny", "chosen": "balanced", "controls_of": "balanced", "notes": [], "scores": found.scores}
    one |= {"validation": {"balanced": {"mean": 4.0}}, "verdict": verdict, "power": power, "claim": claim}
    metrics = {name: METRICS[name] for name in ("nll", "chrf")}
    content = {**one, "metrics": metrics, "methods": methods(SETTINGS, "all together", True)}
    content |= {"columns": dict.fromkeys(arms, ""), "primary": {"metric": "nll", "stratum": CRITICAL}}
    texts = {}
    for width in (60, 80, 120):
        console = Console(file=io.StringIO(), width=width)
        console.print(comparison_tables(content))
        texts[width] = text = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, text.splitlines())) <= width and "…" not in text
    text = texts[80]
    assert text.index("Critical cases: 20 rows") < text.index("All cases: 60 rows") and "chrF++" in text
    assert re.search(r"balanced − shuffled +−[\d.]+ \[.*\] .* better", text)
    assert re.search(r"NLL: critical − ce +−[\d.]+ \[.*\] +0 .* yes", text) and "by seed: −" in text
    assert json.loads(json.dumps(content, allow_nan=False)) == content
