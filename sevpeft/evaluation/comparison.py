"""Turns the scores of arms, row by row and seed by seed, into means, paired differences and a sentence of verdict.

Rows are paired by id, questions are drawn as wholes, seeds widen the interval (`statistics`). The verdict was fixed
before any test row is seen: the weights with the lowest validation NLL on critical cases, on the test's critical
cases, by NLL, against plain CE and against shuffled weights. A comparison has one p, corrected by Holm: the two of the
verdict (two for every recipe) together, and all others of the same score and recipe together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sevpeft.errors import RunError
from sevpeft.evaluation.arms import BASE_ARM, CE, WEIGHTED
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import ALL, HEADLINE, METRICS, SAFETY, Metric, Scores, strata_of
from sevpeft.evaluation.significance import (
    POWER,
    Comparison,
    Outcome,
    compare_family,
    estimate_dict,
    number,
    shown_p,
)
from sevpeft.evaluation.statistics import Difference, Estimate, interval, paired_difference
from sevpeft.recipe import EvaluationSection
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
        seeds: how many.
        chosen: the arm that validation chose, None where no arm has severity weights.
        comparisons: the differences with what may be said of them; filled by `correct`.
    """

    arms: tuple[str, ...]
    strata: dict[str, tuple[int, int]]
    means: dict[tuple[str, str, str], Estimate]
    differences: dict[Key, Difference]
    seeds: int
    chosen: str | None
    comparisons: dict[Key, Comparison] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        return [name for name in METRICS if any(key[1] == name for key in self.means)]

    @property
    def primary(self) -> dict[str, Key]:
        """What the verdict stands on: reference → key of the chosen arm's difference."""
        keys = {reference: (CRITICAL, PRIMARY, self.chosen or "", reference) for reference in REFERENCES}
        return {reference: key for reference, key in keys.items() if key in self.differences}


def compare_scores(
    rows: EvaluationRows,
    tokens: np.ndarray,
    scores: Mapping[str, Scores],
    settings: EvaluationSection,
    chosen: str | None,
) -> Compared:
    """Compares arms of which every row has a score.

    Args:
        rows: n rows. tokens: (n,) of the reference answers; NLL is a mean over tokens.
        scores: arm → metric → (seeds, n), the rows in the order of `rows` and the seeds in one order; (1, n) for the
            base model, which has no seeds.
        chosen: the arm that validation chose.
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
            kind = {**asked, "weights": tokens[part] if metric == PRIMARY else None}
            yes_no = METRICS[metric].yes_no
            found = {arm: np.atleast_2d(by_name[metric])[:, part] for arm, by_name in scores.items()}
            for arm, values in found.items():
                mean = values.mean(axis=0)
                # Seeds that disagree on a row leave no yes or no there.
                share = yes_no and bool(np.isin(mean[np.isfinite(mean)], (0, 1)).all())
                means[stratum, metric, arm] = interval(mean, groups, share=share, **kind)
                for reference in _references(arm):
                    if reference in found:
                        first, second = np.broadcast_arrays(values, found[reference])
                        key = (stratum, metric, arm, reference)
                        differences[key] = paired_difference(first, second, groups, share=yes_no, **kind)
    return Compared(tuple(scores), strata, means, differences, seeds, chosen)


def correct(found: Mapping[str, Compared]) -> dict[str, Compared]:
    """The comparisons of all recipes, each in one family, so that it has one p wherever it is shown.

    Those of the verdict are one family over all recipes; the others of one score and recipe are one each.
    """
    verdicts_on = {(name, key): one.differences[key] for name, one in found.items() for key in one.primary.values()}
    primary = compare_family(verdicts_on, lambda place: METRICS[place[1][1]].direction(place[1][0]))
    corrected = {}
    for name, one in found.items():
        comparisons = {key: primary[name, key] for key in one.primary.values()}
        for metric in one.metrics:
            others = {key: of for key, of in one.differences.items() if key[1] == metric and key not in comparisons}
            comparisons |= compare_family(others, lambda key: METRICS[key[1]].direction(key[0]))
        corrected[name] = replace(one, comparisons=comparisons)
    return corrected


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
    """In plain words: whether the chosen weights help critical cases and at what price; what could have been seen."""

    verdict: str
    power: str


def verdict_of(compared: Compared) -> Verdict:
    """The first sentence holds the gain beside its price: the other strata, and the safety of the answers."""
    arm = compared.chosen
    against = {reference: compared.comparisons[key] for reference, key in compared.primary.items()}
    if arm is None or not against:
        lacking = "no severity weights" if arm is None else "neither plain CE nor shuffled weights"
        return Verdict(f"No verdict: the arms hold {lacking}.", "")
    first, *others = against
    sentences = [
        f"{arm} {_change(against[first], ' the NLL of critical cases')} against {REFERENCES[first]}"
        f"{_price(arm, first, compared)}"
    ]
    sentences += [f"Against {REFERENCES[other]} it {_change(against[other], ' that NLL')}" for other in others]
    conclusion = _judged({reference: one.outcome for reference, one in against.items()})
    one_seed = "; one seed says nothing about others" if compared.seeds == 1 else ""
    sentences.append(f"{conclusion[0].upper()}{conclusion[1:]}{one_seed}")
    return Verdict(". ".join(sentences) + ".", _power(against, compared))


def _change(one: Comparison, what: str) -> str:
    """`lowers the NLL by .051 [.020, .082] (p .004)`; the interval turned with the sign."""
    found = one.difference
    values = (found.value, found.low, found.high) if found.value >= 0 else (-found.value, -found.high, -found.low)
    size = number_with_interval(dict(zip(("value", "low", "high"), map(number, values), strict=True)), METRICS[PRIMARY])
    verb = "raises" if found.value >= 0 else "lowers"
    return f"{verb}{what} by {size} (p {shown_p(one.p, one.p_at_most)})"


def _price(arm: str, reference: str, compared: Compared) -> str:
    """What became of the other cases and of the safety of the answers, what got worse first."""
    found: dict[str, list[str]] = {
        outcome: [] for outcome in ("worse", "better", "not distinguishable", "too few questions")
    }
    for metric in (PRIMARY, *SAFETY):
        about = METRICS[metric]
        by_stratum = metric == PRIMARY or about.elsewhere is not None or about.of != "all rows"
        for stratum in compared.strata:
            one = compared.comparisons.get((stratum, metric, arm, reference))
            if one is None or (stratum == ALL) == by_stratum or (metric == PRIMARY and stratum == CRITICAL):
                continue
            unit = " points" if about.unit == "%" else ""
            size = number_with_interval(estimate_dict(one.difference), about, sign=True)
            if one.outcome in found:
                name = about.label if about.label.isupper() else about.label.lower()
                found[one.outcome].append(f"{name} of {stratum.replace('_', '-')} cases {size}{unit}")
    price = "".join(f"; {outcome}: {', '.join(items)}" for outcome, items in found.items() if items)
    silent = not any(metric in compared.metrics for metric in SAFETY)
    return price + ("; no answers were compared, so their safety is unknown" if silent else "")


def _judged(outcomes: Mapping[str, Outcome]) -> str:
    ce, shuffled = outcomes.get(CE), outcomes.get(SHUFFLED_ARM)
    if "too few questions" in outcomes.values():
        return "too few critical questions to tell"
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


def _power(against: Mapping[str, Comparison], compared: Compared) -> str:
    questions = compared.strata[CRITICAL][1]
    sizes = [
        f"{shown(one.detectable, METRICS[PRIMARY])} against {REFERENCES[reference]}"
        for reference, one in against.items()
        if np.isfinite(one.detectable)
    ]
    seeds = f"{compared.seeds} seed{'s' if compared.seeds > 1 else ''}"
    if any(one.outcome == "too few questions" for one in against.values()):
        return f"{questions:,} critical questions are too few to show any difference; raise data.test_size."
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
        by_metric: dict[str, dict[str, Any]] = {
            metric: {
                arm: {**estimate_dict(compared.means[stratum, metric, arm]), "against": {}} for arm in compared.arms
            }
            for metric in compared.metrics
        }
        found[stratum] = {"rows": rows, "questions": questions, "metrics": by_metric}
    for (stratum, metric, arm, reference), one in compared.comparisons.items():
        found[stratum]["metrics"][metric][arm]["against"][reference] = one.as_dict()
    return found


def number_with_interval(found: Mapping[str, Any], metric: Metric, *, sign: bool = False) -> str:
    """`5.110 [5.020, 5.200]` of what stands in comparison.json; the value alone where there is no interval."""
    given = [np.nan if found[name] is None else float(found[name]) for name in ("value", "low", "high")]
    value, low, high = shown(given[0], metric, sign=sign), shown(given[1], metric), shown(given[2], metric)
    return f"{value} [{low}, {high}]" if np.isfinite(given[1]) else value


def shown(value: float, metric: Metric, *, sign: bool = False) -> str:
    """Three decimals of nats and two of points, one less from ten on, without a leading zero; a dash for NaN."""
    if not np.isfinite(value):
        return "–"
    size = value * metric.shown_times
    places = (3 if metric.name == PRIMARY else 2) - (abs(size) >= 9.995)
    text = f"{size:{'+' if sign else ''}.{places}f}"
    return re.sub(r"^([+−]?)0\.", r"\1.", text.replace("-", "−"))


def _references(arm: str) -> tuple[str, ...]:
    """What an arm is compared with; no pair twice."""
    if arm == CE:
        return ()
    return (CE,) if arm in (BASE_ARM, SHUFFLED_ARM) else tuple(REFERENCES)
