"""The claim of a comparison: one test of a gain for critical cases without a loss for other severities or for safety.

Its parts: critical cases have a lower NLL than with plain CE and with shuffled weights; each other severity loses less
than a margin; and if answers were compared, urgent referrals of critical cases drop by less than a margin. The claim
holds if every part holds, one-sided at α: an intersection–union test (Berger 1982), which needs no correction. NLL is a
mean over tokens, like the loss; the mean over rows is reported too, and decides nothing.
"""

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

# Standard deviation of a difference to plain CE, nats a token: between questions, and between seeds. For the README's
# 40 critical questions and 3 seeds they give the standard error of its result, .011. Tiny models vary as much by seed.
PILOT_QUESTIONS, PILOT_SEEDS = 0.06, 0.01


@dataclass(frozen=True)
class Evidence:
    """Scores of all arms on the same rows, arm → score → (seeds, n), and the tokens (n,) of the references."""

    rows: EvaluationRows
    scores: Mapping[str, Scores]
    tokens: np.ndarray
    settings: EvaluationSection

    def difference(
        self, at: np.ndarray, arm: str, reference: str = CE, metric: str = PRIMARY, margin: float | None = None
    ) -> dict[str, Any]:
        """arm − reference on the rows `at` (n,): value, low, high, rows, questions, per_seed.

        With a margin also the one-sided test of a loss below it: p, shown, detectable, by_rows. The interval then has
        the level 1 − 2α.
        """
        about, groups = METRICS[metric], self.rows.groups[at]
        loss = 1 if about["better"][CRITICAL] == "lower" else -1  # the sign of a loss
        level = {} if margin is None else {"confidence_level": 1 - 2 * ALPHA}
        options: dict[str, Any] = {"settings": self.settings.model_copy(update=level), "share": about["yes_no"]}
        one, other = (np.atleast_2d(self.scores[name][metric])[:, at] for name in (arm, reference))
        null, tokens = loss * (margin or 0.0), self.tokens[at] if metric == PRIMARY else None
        change = paired_difference(one, other, groups, weights=tokens, null=null, **options)
        result = {**change.as_dict(), "questions": change.groups, "per_seed": list(change.per_seed)}
        if margin is not None:
            p = change.p / 2 if loss * (change.value - null) < 0 else 1 - change.p / 2
            worst = loss * ((change.high if loss > 0 else change.low) - null)
            least = detectable(change.standard_error, change.degrees_of_freedom, ALPHA)
            result |= {"p": or_none(p), "shown": bool(p < ALPHA and not worst >= 0), "detectable": or_none(least)}
            by_rows = paired_difference(one, other, groups, **options).as_dict() if metric == PRIMARY else None
            result["by_rows"] = by_rows
        return result

    def against_ce(self, parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Name of a part → arm → its NLL difference to plain CE. Parts with few questions are left out."""
        arms = [arm for arm in self.scores if arm not in (BASE, CE)] if CE in self.scores else []
        enough = {name: at for name, at in parts.items() if len(np.unique(self.rows.groups[at])) >= FEW_QUESTIONS}
        return {name: {arm: self.difference(at, arm) for arm in arms} for name, at in enough.items() if arms}


def claim_of(evidence: Evidence, arm: str) -> dict[str, Any]:
    """The claim about an arm: its parts, p (the largest p of a part), and the outcome, a key of `CLAIM`."""
    settings, strata = evidence.settings, evidence.rows.strata
    control = next(name for name in (f"{SHUFFLED}-{arm}", SHUFFLED) if name in evidence.scores)
    tests = [(CRITICAL, PRIMARY, reference, 0.0) for reference in (CE, control)]
    tests += [(name, PRIMARY, CE, settings.margin) for name in reversed(SEVERITIES[:-1])]
    tests += [(CRITICAL, SAFE, CE, settings.safety_margin)] if SAFE in evidence.scores[arm] else []
    parts: list[dict[str, Any]] = [
        {"stratum": stratum, "metric": metric, "reference": reference, "margin": margin}
        | evidence.difference(at, arm, reference, metric, margin)
        for stratum, metric, reference, margin in tests
        if (at := strata == SEVERITIES.index(stratum)).any()
    ]
    gain, specific, *rest = parts
    outcome, ends = "open", (gain["low"], gain["high"])
    if gain["p"] is None or 0.5 ** gain["questions"] >= ALPHA:  # no permutation of so few questions has p < α
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
    """The outcome in words, with its price, and a second text with the control and the power. `seeds`: of each arm."""
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


def can_show(groups: np.ndarray, seeds: int) -> str:
    """The smallest true gain that a claim on critical rows in groups (n,) can show, with the spread of the pilot."""
    questions = len(np.unique(groups))
    error = math.hypot(PILOT_QUESTIONS / math.sqrt(questions), PILOT_SEEDS / math.sqrt(seeds))
    least = _percent(-detectable(error, questions - 1, ALPHA))
    return f"a gain of {least}% or more in {questions:,} critical questions ({POWER:.0%} power; spread as in a pilot)"


def _percent(difference: float | None, *, sign: bool = False) -> str:
    """A difference in nats a token, as the change of a token's probability in percent."""
    return number_text(None if difference is None else 100 * math.expm1(-difference), 2, sign=sign)


def _change(part: Mapping[str, Any]) -> str:
    return f"{_percent(part['value'], sign=True)}% [{_percent(part['high'])}, {_percent(part['low'])}]"
