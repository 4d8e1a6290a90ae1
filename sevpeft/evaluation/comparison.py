"""Turns the scores of arms, row by row and seed by seed, into means, paired differences and a sentence of verdict.

Rows are paired by id, questions are drawn as wholes, seeds widen the interval (`statistics`). The verdict was fixed
before any test row is seen: the weights with the lowest validation NLL on critical cases, on the test's critical
cases, by NLL, against plain CE and against shuffled weights. Its two p (two for every recipe) are corrected by Holm;
the p of the tables are corrected for all comparisons of the same score and recipe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sevpeft.errors import RunError
from sevpeft.evaluation.arms import BASE_ARM, CE, WEIGHTED
from sevpeft.evaluation.metrics import METRICS, Scores
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.scoring import ALL, HEADLINE, strata_of
from sevpeft.evaluation.significance import POWER, Outcome, holm, minimal_detectable_difference, outcome
from sevpeft.evaluation.statistics import Difference, Estimate, interval, paired_difference
from sevpeft.recipe.evidence import EvaluationSection
from sevpeft.severity.probabilities import SEVERITIES

CRITICAL, PRIMARY = SEVERITIES[-1], "nll"
SHUFFLED_ARM = "shuffled"
# Every arm is compared with these, plain CE first.
REFERENCES = {CE: "plain CE", SHUFFLED_ARM: "shuffled weights"}
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Compared:
    """One recipe's arms.

    Attributes:
        arms: in the order of the table.
        strata: stratum → (rows, questions), critical first.
        means: (stratum, metric, arm) → mean over rows and seeds.
        differences: (stratum, metric, arm, reference) → arm − reference.
        corrected: the same → p after Holm for all of the same metric.
        seeds: how many.
    """

    arms: tuple[str, ...]
    strata: dict[str, tuple[int, int]]
    means: dict[tuple[str, str, str], Estimate]
    differences: dict[Key, Difference]
    corrected: dict[Key, float]
    seeds: int

    @property
    def metrics(self) -> list[str]:
        return [name for name in METRICS if any(key[1] == name for key in self.means)]

    def primary(self, arm: str, reference: str) -> Difference | None:
        """What the verdict stands on."""
        return self.differences.get((CRITICAL, PRIMARY, arm, reference))

    def comparisons(self, metric: str) -> int:
        """How many comparisons its p were corrected for."""
        return sum(key[1] == metric for key in self.corrected)

    def outcome(self, key: Key) -> Outcome:
        better = METRICS[key[1]].better
        assert better != "neither"
        return outcome(self.differences[key], better=better, corrected_p=self.corrected[key])


def compare_scores(
    rows: EvaluationRows, tokens: np.ndarray, scores: Mapping[str, Scores], settings: EvaluationSection
) -> Compared:
    """Compares arms of which every row has a score.

    Args:
        rows: n rows. tokens: (n,) of the reference answers; NLL is a mean over tokens.
        scores: arm → metric → (seeds, n), the rows in the order of `rows` and the seeds in one order; (1, n) for the
            base model, which has no seeds.
    """
    shared = set.intersection(*(set(by_name) for by_name in scores.values()))
    metrics = [name for name in HEADLINE if name in shared]
    seeds = max(len(by_name[PRIMARY]) for by_name in scores.values())
    parts = strata_of(rows)
    order = [CRITICAL, ALL, *(name for name in parts if name not in (CRITICAL, ALL))]
    asked: dict[str, Any] = {
        "confidence": settings.confidence_level,
        "resamples": settings.n_resamples,
        "seed": settings.seed,
    }
    strata, means, differences = {}, {}, {}
    for stratum in (name for name in order if name in parts):
        part = parts[stratum]
        groups = rows.groups[part]
        strata[stratum] = int(part.sum()), len(np.unique(groups))
        for metric in metrics:
            settings_of = {**asked, "weights": tokens[part] if metric == PRIMARY else None}
            found = {arm: np.atleast_2d(by_name[metric])[:, part] for arm, by_name in scores.items()}
            for arm, values in found.items():
                means[stratum, metric, arm] = interval(values.mean(axis=0), groups, **settings_of)
                for reference in _references(arm):
                    if reference in found:
                        first, second = np.broadcast_arrays(values, found[reference])
                        key = (stratum, metric, arm, reference)
                        differences[key] = paired_difference(first, second, groups, **settings_of)
    return Compared(tuple(scores), strata, means, differences, _corrected(differences), seeds)


def choose(validation: Mapping[str, Sequence[float]]) -> str | None:
    """The weights with the lowest validation NLL of critical cases, meaned over seeds; None where there are none.

    Args:
        validation: arm → nats a token, one for each seed.
    """
    candidates = {arm: float(np.mean(losses)) for arm, losses in validation.items() if arm in WEIGHTED}
    return min(candidates, key=candidates.__getitem__, default=None)


def refuse_too_small(rows: EvaluationRows, name: str) -> None:
    """Raises RunError when the test split cannot say anything about critical cases."""
    if (rows.strata < 0).all():
        raise RunError(
            f"The data of {name} has no severity, so that the arms would have nothing to weight by; add severity "
            "columns, or set severity.source=rules."
        )
    for stratum in reversed(SEVERITIES):
        questions = len(np.unique(rows.groups[rows.strata == SEVERITIES.index(stratum)]))
        if questions == 1 or (questions == 0 and stratum == CRITICAL):
            raise RunError(
                f"The test split of {name} has {questions or 'no'} {stratum.replace('_', '-')} "
                f"question{'' if questions == 1 else 's'}, too few to compare arms on; raise data.test_size."
            )


@dataclass(frozen=True)
class Verdict:
    """In plain words: whether the chosen weights help critical cases, what it costs, and what could have been seen."""

    verdict: str
    cost: str
    power: str


def verdicts(found: Mapping[str, Compared], chosen: Mapping[str, str | None]) -> dict[str, Verdict]:
    """Recipe → verdict; the p of all recipes are corrected together.

    Args:
        chosen: recipe → the arm that was chosen on validation.
    """
    asked = [
        (name, reference)
        for name, compared in found.items()
        for reference in REFERENCES
        if compared.primary(chosen[name] or "", reference) is not None
    ]
    tested = [found[name].primary(chosen[name] or "", reference) for name, reference in asked]
    corrected = dict(zip(asked, holm([one.p for one in tested if one is not None]), strict=True))
    return {
        name: _verdict(
            chosen[name],
            {reference: compared.primary(chosen[name] or "", reference) for reference in REFERENCES},
            {reference: float(corrected[name, reference]) for reference in REFERENCES if (name, reference) in asked},
            len(asked),
            compared,
        )
        for name, compared in found.items()
    }


def _verdict(
    arm: str | None,
    against: Mapping[str, Difference | None],
    p: Mapping[str, float],
    comparisons: int,
    compared: Compared,
) -> Verdict:
    there = {reference: found for reference, found in against.items() if found is not None}
    if arm is None or not there:
        lacking = "severity weights" if arm is None else "plain CE nor shuffled weights"
        return Verdict(f"No verdict: the arms hold {'no' if arm is None else 'neither'} {lacking}.", "", "")
    said = [
        f"{_changes(there[reference])} against {REFERENCES[reference]} (p {shown_p(p[reference])})"
        for reference in there
    ]
    if len(said) == 2 and said[0].split()[0] == said[1].split()[0]:
        said[1] = said[1].split(maxsplit=1)[1]
    outcomes = {
        reference: outcome(found, better="lower", corrected_p=p[reference]) for reference, found in there.items()
    }
    sentence = f"{arm} {', and '.join(said).replace(' by ', ' the NLL of critical cases by ', 1)}: {_judged(outcomes)}"
    one_seed = "; one seed says nothing about others" if compared.seeds == 1 else ""
    return Verdict(f"{sentence}{one_seed}.", _cost(arm, compared), _power(there, comparisons, compared))


def _changes(difference: Difference) -> str:
    """`lowers by .051 [.020, .082]`; the interval turned with the sign."""
    value, low, high = difference.value, difference.low, difference.high
    if value < 0:
        return f"lowers by {shown(-value)} [{shown(-high)}, {shown(-low)}]"
    return f"raises by {shown(value)} [{shown(low)}, {shown(high)}]"


def _judged(outcomes: Mapping[str, Outcome]) -> str:
    ce, shuffled = outcomes.get(CE), outcomes.get(SHUFFLED_ARM)
    if shuffled is None:
        gained = {"better": "better than plain CE", "worse": "worse than plain CE"}.get(str(ce), "no difference shown")
        return f"{gained}, and without the arm shuffled nobody knows whether severity is the reason"
    if ce is None:
        told = {"better": "better than shuffled weights", "worse": "worse than shuffled weights"}
        return told.get(shuffled, "not distinguishable from shuffled weights") + "; the arm ce was left out"
    return {
        ("better", "better"): "better than both, so knowing the severity helped",
        ("better", "not distinguishable"): "better than plain CE, but not distinguishable from shuffled weights, so "
        "severity need not be the reason",
        ("better", "worse"): "better than plain CE, but worse than shuffled weights, so severity is not the reason",
        ("not distinguishable", "better"): "better than shuffled weights, but not distinguishable from plain CE",
        ("not distinguishable", "not distinguishable"): "not distinguishable from plain CE, nor from shuffled weights",
        ("not distinguishable", "worse"): "not distinguishable from plain CE, and worse than shuffled weights",
        ("worse", "better"): "worse than plain CE, though better than shuffled weights",
        ("worse", "not distinguishable"): "worse than plain CE, and not distinguishable from shuffled weights",
        ("worse", "worse"): "worse than both",
    }[str(ce), shuffled]


def _cost(arm: str, compared: Compared) -> str:
    """What becomes of the other cases, against plain CE."""
    told = []
    for stratum in compared.strata:
        found = compared.differences.get((stratum, PRIMARY, arm, CE))
        if found is not None and stratum != CRITICAL:
            told.append(f"{stratum.replace('_', '-')} {number_with_interval(_numbers(found), PRIMARY, sign=True)}")
    return f"NLL of the others against plain CE: {', '.join(told)}." if told else ""


def _power(there: Mapping[str, Difference], comparisons: int, compared: Compared) -> str:
    questions = compared.strata[CRITICAL][1]
    sizes = [
        f"{shown(size)} against {REFERENCES[reference]}"
        for reference, found in there.items()
        if np.isfinite(size := minimal_detectable_difference(found, comparisons=comparisons)) and size > 0
    ]
    seeds = f"{compared.seeds} seed{'s' if compared.seeds > 1 else ''}"
    if not sizes:
        return ""
    return (
        f"Smallest true difference that {questions:,} critical questions and {seeds} would have shown with "
        f"{POWER:.0%} power: {', '.join(sizes)}."
    )


def as_dict(compared: Compared) -> dict[str, Any]:
    """Stratum → rows, questions, and metric → arm → mean and differences, as comparison.json holds them."""
    found: dict[str, Any] = {}
    for stratum, (rows, questions) in compared.strata.items():
        by_metric: dict[str, Any] = {}
        for metric in compared.metrics:
            for arm in compared.arms:
                against = {}
                for reference in REFERENCES:
                    key = (stratum, metric, arm, reference)
                    if key in compared.differences:
                        one = compared.differences[key]
                        against[reference] = {
                            **_numbers(one),
                            "p": number(one.p),
                            "p_holm": number(compared.corrected[key]),
                            "per_seed": [number(value) for value in one.per_seed] if arm != BASE_ARM else [],
                            "detectable": number(minimal_detectable_difference(one)),
                            "outcome": compared.outcome(key),
                        }
                mean = _numbers(compared.means[stratum, metric, arm])
                by_metric.setdefault(metric, {})[arm] = {**mean, "against": against}
        found[stratum] = {"rows": rows, "questions": questions, "metrics": by_metric}
    return found


def number_with_interval(found: Mapping[str, Any], metric: str, *, sign: bool = False) -> str:
    """`5.110 [5.020, 5.200]` of what stands in comparison.json; the value alone where there is no interval."""
    given = [np.nan if found[name] is None else float(found[name]) for name in ("value", "low", "high")]
    value, low, high = shown(given[0], metric, sign=sign), shown(given[1], metric), shown(given[2], metric)
    return f"{value} [{low}, {high}]" if np.isfinite(given[1]) else value


def shown(value: float, metric: str = PRIMARY, *, sign: bool = False) -> str:
    """Three decimals of nats and two of points, one less from ten on, without a leading zero; a dash for NaN."""
    if not np.isfinite(value):
        return "–"
    number = value * METRICS[metric].shown_times
    places = (3 if metric == PRIMARY else 2) - (abs(number) >= 9.995)
    text = f"{number:{'+' if sign else ''}.{places}f}"
    return re.sub(r"^([+−]?)0\.", r"\1.", text.replace("-", "−"))


def shown_p(p: float) -> str:
    if not np.isfinite(p):
        return "–"
    return "< .001" if p < 0.001 else f"= {p:.3f}".replace("0.", ".", 1)


def number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def _numbers(found: Estimate) -> dict[str, float | int | None]:
    return {**{name: number(getattr(found, name)) for name in ("value", "low", "high")}, "rows": found.rows}


def _references(arm: str) -> tuple[str, ...]:
    """What an arm is compared with; no pair twice."""
    if arm == CE:
        return ()
    return (CE,) if arm in (BASE_ARM, SHUFFLED_ARM) else tuple(REFERENCES)


def _corrected(differences: Mapping[Key, Difference]) -> dict[Key, float]:
    corrected: dict[Key, float] = {}
    for metric in {key[1] for key in differences}:
        keys = [key for key in differences if key[1] == metric]
        corrected |= dict(zip(keys, map(float, holm([differences[key].p for key in keys])), strict=True))
    return corrected
