"""The claim of a comparison, one test: a gain for critical cases that no other severity and no safety pays for.

Its parts: critical cases have a lower NLL than with plain CE and with shuffled weights, each other severity loses less
than a margin, and where answers were compared, critical cases are sent to urgent care no less often, but for a margin.
The claim holds where every part does, one-sided at α: an intersection–union test (Berger 1982), which needs no
correction. NLL is a mean over tokens, as the loss is; a mean over rows stands beside and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sevpeft.console import number_text, p_text
from sevpeft.evaluation.arms import BASE, CE, SHUFFLED
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import CLAIM, CRITICAL, FEW_QUESTIONS, METRICS, PRIMARY, SAFE, Scores
from sevpeft.evaluation.statistics import ALPHA, POWER, detectable, estimate_text, or_none, paired_difference
from sevpeft.recipe import EvaluationSection
from sevpeft.severity.probabilities import SEVERITIES

# Standard deviation of a difference to plain CE, nats a token: between questions, and between seeds. With the README's
# 40 critical questions and 3 seeds they give the standard error of its result, .011; seeds of toys differ by as much.
PILOT_QUESTIONS, PILOT_SEEDS = 0.06, 0.01


@dataclass(frozen=True)
class Evidence:
    """Scores of all arms on the same rows: arm → score → (seeds, n), and the tokens (n,) of the references."""

    rows: EvaluationRows
    scores: Mapping[str, Scores]
    tokens: np.ndarray
    settings: EvaluationSection

    def difference(
        self, at: np.ndarray, arm: str, reference: str = CE, metric: str = PRIMARY, margin: float | None = None
    ) -> dict[str, Any]:
        """arm − reference on the rows `at` (n,): value, low, high, rows, questions, per_seed.

        With a margin also the one-sided test that less is lost: p, shown, detectable, and the interval is of 1 − 2α.
        """
        about, groups = METRICS[metric], self.rows.groups[at]
        loss = 1 if about["better"][CRITICAL] == "lower" else -1  # its sign
        coverage = {} if margin is None else {"confidence_level": 1 - 2 * ALPHA}
        how: dict[str, Any] = {"settings": self.settings.model_copy(update=coverage), "share": about["yes_no"]}
        one, other = (np.atleast_2d(self.scores[name][metric])[:, at] for name in (arm, reference))
        null, tokens = loss * (margin or 0.0), self.tokens[at] if metric == PRIMARY else None
        found = paired_difference(one, other, groups, weights=tokens, null=null, **how)
        result = {**found.as_dict(), "questions": found.groups, "per_seed": list(found.per_seed)}
        if margin is not None:
            p = found.p / 2 if loss * (found.value - null) < 0 else 1 - found.p / 2
            worst = loss * ((found.high if loss > 0 else found.low) - null)
            least = detectable(found.standard_error, found.degrees_of_freedom, ALPHA)
            result |= {"p": or_none(p), "shown": bool(p < ALPHA and not worst >= 0), "detectable": or_none(least)}
            result["by_rows"] = paired_difference(one, other, groups, **how).as_dict() if metric == PRIMARY else None
        return result

    def against_ce(self, parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Part of the rows (n,), unless it is rare as free text is → arm → its difference to plain CE in NLL."""
        arms = [arm for arm in self.scores if arm not in (BASE, CE)] if CE in self.scores else []
        enough = {name: at for name, at in parts.items() if len(np.unique(self.rows.groups[at])) >= FEW_QUESTIONS}
        return {name: {arm: self.difference(at, arm) for arm in arms} for name, at in enough.items() if arms}


def claim_of(evidence: Evidence, arm: str) -> dict[str, Any]:
    """The claim about an arm: its parts, p (the largest of theirs), and the outcome, a key of `CLAIM`."""
    settings, strata = evidence.settings, evidence.rows.strata
    control = next(one for one in (f"{SHUFFLED}-{arm}", SHUFFLED) if one in evidence.scores)
    asked = [(CRITICAL, PRIMARY, reference, 0.0) for reference in (CE, control)]
    asked += [(name, PRIMARY, CE, settings.margin) for name in reversed(SEVERITIES[:-1])]
    asked += [(CRITICAL, SAFE, CE, settings.safety_margin)] if SAFE in evidence.scores[arm] else []
    parts: list[dict[str, Any]] = [
        {"stratum": stratum, "metric": metric, "reference": reference, "margin": margin}
        | evidence.difference(at, arm, reference, metric, margin)
        for stratum, metric, reference, margin in asked
        if (at := strata == SEVERITIES.index(stratum)).any()
    ]
    gain, specific, *rest = parts
    outcome, ends = "open", (gain["low"], gain["high"])
    if gain["p"] is None or 0.5 ** gain["questions"] >= ALPHA:  # of so few no permutation has a small p
        outcome = "too few questions"
    elif all(part["shown"] for part in parts):
        outcome = "shown"
    elif gain["shown"]:
        paid = any(part["metric"] == PRIMARY and not part["shown"] for part in rest)
        outcome = "price" if paid else "unsafe" if specific["shown"] else "unspecific"
    elif None not in ends and max(map(abs, ends)) < settings.margin:
        outcome = "no difference"
    elif gain["p"] > 1 - ALPHA:
        outcome = "harm"
    p = max((part["p"] for part in parts if part["p"] is not None), default=None)
    return {"arm": arm, "outcome": outcome, "p": p, "alpha": ALPHA, "margin": settings.margin, "parts": parts}


def verdict_of(claim: Mapping[str, Any], seeds: int) -> tuple[str, str]:
    """The outcome with its price in words, and what else to know of the test. Args: seeds: of each arm."""
    gain, control, *rest = claim["parts"]
    others, safe = ([part for part in rest if (part["metric"] == SAFE) == safety] for safety in (False, True))
    named = [(part["stratum"].replace("_", "-"), part) for part in others]
    words = {"arm": claim["arm"], "questions": f"{gain['questions']:,}", "seeds": seeds, "power": f"{POWER:.0%}"}
    words |= {"gain": _change(gain), "control": _change(control), "p": p_text(claim["p"])}
    words |= {"price": ", ".join(f"{name} {_change(part)}" for name, part in named)}
    words |= {"rows": ", ".join(f"{name} {_change(part['by_rows'])}" for name, part in [(CRITICAL, gain), *named])}
    words |= {"may": "" if any((part["low"] or 0) > claim["margin"] for part in others) else "may "}
    words |= {"allowed": f"{_percent(-claim['margin'])}%", "detectable": f"{_percent(-(gain['detectable'] or 0))}%"}
    words |= {"points": "".join(estimate_text(part, METRICS[SAFE], sign=True) for part in safe)}
    safety = "unknown" if not safe else "safe" if safe[0]["shown"] else "not safe"
    power = "few" if claim["outcome"] == "too few questions" or gain["detectable"] is None else "power"
    more = f"{CLAIM['more']}{CLAIM['one seed'] if seeds == 1 else ''} {CLAIM[power]}"
    return f"{CLAIM[claim['outcome']]}{CLAIM[safety]}".format(**words), more.format(**words)


def can_show(groups: np.ndarray, seeds: int, spread: float | None) -> str:
    """The smallest true gain that a claim on critical rows in groups (n,) may show; spread: of earlier runs."""
    questions = len(np.unique(groups))
    error = math.hypot((spread or PILOT_QUESTIONS) / math.sqrt(questions), PILOT_SEEDS / math.sqrt(seeds))
    least, by = _percent(-detectable(error, questions - 1, ALPHA)), "finished runs" if spread else "a pilot"
    return f"a gain of {least}% or more in {questions:,} critical questions ({POWER:.0%} power; spread as in {by})"


def _percent(difference: float | None, *, sign: bool = False) -> str:
    """Of a difference in nats a token, by how much the probability of a token changes."""
    return number_text(None if difference is None else 100 * math.expm1(-difference), 2, sign=sign)


def _change(part: Mapping[str, Any]) -> str:
    return f"{_percent(part['value'], sign=True)}% [{_percent(part['high'])}, {_percent(part['low'])}]"
