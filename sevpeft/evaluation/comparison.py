"""Compares the scores of arms, and words the verdict: whether severity weights help critical cases, and their price.

The verdict was fixed before any test row is seen: the weights with the lowest validation NLL on critical cases, on the
test's critical cases, by NLL, against plain CE and against shuffled weights. A comparison has one p, corrected by Holm:
the two of the verdict (two for every recipe) together, and all others of the same score and recipe together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sevpeft.console import number_text, p_text
from sevpeft.errors import RunError
from sevpeft.evaluation.arms import BASE_ARM, CE, WEIGHTED
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import ALL, HEADLINE, METRICS, SAFETY, Scores, strata_of
from sevpeft.evaluation.statistics import (
    ARROWS,
    POWER,
    Difference,
    compare_family,
    estimate_dict,
    estimate_text,
    interval,
    paired_difference,
)
from sevpeft.recipe.evidence import EvaluationSection
from sevpeft.severity.probabilities import SEVERITIES

CRITICAL, PRIMARY = SEVERITIES[-1], "nll"
SHUFFLED_ARM = "shuffled"
# Every arm is compared with these, plain CE first.
REFERENCES = {CE: "plain CE", SHUFFLED_ARM: "shuffled weights"}
# The score of the answers beside NLL on the screen: the published one, or chrF++ where no encoder is.
_OF_ANSWERS = ("bertscore_f1", "chrf")
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Compared:
    """One recipe's arms, before any p is corrected.

    Attributes:
        scores: stratum → rows, questions, and metric → arm → mean, as comparison.json holds them; critical first.
        differences: (stratum, metric, arm, reference) → arm − reference.
        chosen: the arm that validation chose, None where no arm has severity weights.
    """

    scores: dict[str, Any]
    differences: dict[Key, Difference]
    chosen: str | None


def compare_scores(
    rows: EvaluationRows,
    tokens: np.ndarray,
    scores: Mapping[str, Scores],
    settings: EvaluationSection,
    chosen: str | None,
) -> Compared:
    """Means and differences of arms of which every row has a score.

    Args:
        tokens: (n,) of the references; NLL is a mean over tokens, as the loss of the training is.
        scores: arm → metric → (seeds, n) in the order of the rows. A metric that an arm lacks is left out.
        chosen: the arm that validation chose.
    """
    shared = set.intersection(*(set(by_metric) for by_metric in scores.values()))
    parts = strata_of(rows)
    compared = Compared({}, {}, chosen)
    for stratum in sorted(parts, key=lambda name: (name != CRITICAL, name != ALL)):
        part = parts[stratum]
        groups = rows.groups[part]
        by_metric: dict[str, dict[str, Any]] = {}
        for metric in (name for name in HEADLINE if name in shared):
            kind: dict[str, Any] = {
                "confidence": settings.confidence_level,
                "resamples": settings.n_resamples,
                "seed": settings.seed,
                "weights": tokens[part] if metric == PRIMARY else None,
            }
            yes_no = METRICS[metric].yes_no
            values = {arm: np.atleast_2d(of[metric])[:, part] for arm, of in scores.items()}
            by_metric[metric] = {}
            for arm, of in values.items():
                mean = of.mean(axis=0)
                # Seeds that disagree on a row leave no yes or no there.
                share = yes_no and bool(np.isin(mean[np.isfinite(mean)], (0, 1)).all())
                by_metric[metric][arm] = {**estimate_dict(interval(mean, groups, share=share, **kind)), "against": {}}
                # No pair twice: shuffled − CE, and not CE − shuffled.
                against = () if arm == CE else (CE,) if arm in (BASE_ARM, SHUFFLED_ARM) else tuple(REFERENCES)
                for reference in (name for name in against if name in values):
                    pair = paired_difference(of, values[reference], groups, share=yes_no, **kind)
                    compared.differences[stratum, metric, arm, reference] = pair
        questions = len(np.unique(groups))
        compared.scores[stratum] = {"rows": int(part.sum()), "questions": questions, "metrics": by_metric}
    return compared


def add_comparisons(found: Mapping[str, Compared]) -> None:
    """Puts the differences of all recipes into their scores, under "against", each with its corrected p.

    The comparisons of the verdict are one family over all recipes; the others of one score and recipe are one each.
    """
    families: dict[tuple[str, str], dict[tuple[str, Key], Difference]] = {}
    for name, one in found.items():
        for key, difference in one.differences.items():
            stratum, metric, arm, _ = key
            of_verdict = (stratum, metric, arm) == (CRITICAL, PRIMARY, one.chosen)
            families.setdefault(("", "") if of_verdict else (name, metric), {})[name, key] = difference
    for family in families.values():
        compared = compare_family(family, lambda place: METRICS[place[1][1]].direction(place[1][0]))
        for (name, (stratum, metric, arm, reference)), comparison in compared.items():
            found[name].scores[stratum]["metrics"][metric][arm]["against"][reference] = comparison.as_dict()


def choose(validation: Mapping[str, Sequence[float]]) -> str | None:
    """The weights with the lowest validation NLL of critical cases, meaned over seeds; None where there are none.

    Args:
        validation: arm → nats a token, one for each seed.
    """
    candidates = {arm: float(np.mean(losses)) for arm, losses in validation.items() if arm in WEIGHTED}
    return min(candidates, key=candidates.__getitem__, default=None)


def check_test_split(rows: EvaluationRows, name: str) -> None:
    """Raises RunError when the test split cannot show anything about critical cases, before anything is trained."""
    if (rows.strata < 0).all():
        raise RunError(f"The data of {name} has no severity; add severity columns, or set severity.source=rules.")
    questions = len(np.unique(rows.groups[rows.strata == SEVERITIES.index(CRITICAL)]))
    if questions < 2:
        raise RunError(f"The test split of {name} has {questions} critical questions, too few; raise data.test_size.")


def verdict_of(scores: Mapping[str, Any], chosen: str | None, seeds: int) -> tuple[str, str]:
    """The verdict, whose first sentence holds the gain beside its price, and what difference could have been found.

    Args:
        scores: one recipe's, with its comparisons.
        seeds: how many each arm was trained with.
    """
    against = scores[CRITICAL]["metrics"][PRIMARY][chosen]["against"] if chosen else {}
    if not against:
        lacking = "neither plain CE nor shuffled weights" if chosen else "no severity weights"
        return f"No verdict: the arms hold {lacking}.", ""
    first, *others = against
    sentences = [
        f"{chosen} {_change(against[first], 'the NLL of critical cases')} against {REFERENCES[first]}"
        f"{_price(scores, str(chosen), first)}",
        *(f"Against {REFERENCES[other]} it {_change(against[other], 'that NLL')}" for other in others),
        _conclusion({reference: one["outcome"] for reference, one in against.items()})
        + ("; one seed says nothing about others" if seeds == 1 else ""),
    ]
    questions = scores[CRITICAL]["questions"]
    if any(one["outcome"] == "too few questions" for one in against.values()):
        power = f"{questions:,} critical questions are too few to show any difference; raise data.test_size."
    else:
        sizes = (f"{number_text(one['detectable'], 4)} against {REFERENCES[name]}" for name, one in against.items())
        of = f"{questions:,} critical questions and {seeds} seed{'s' * (seeds > 1)}"
        power = f"Smallest true difference that {of} would have shown with {POWER:.0%} power: {', '.join(sizes)}."
    return ". ".join(sentences) + ".", power


def _change(found: Mapping[str, Any], what: str) -> str:
    """`lowers the NLL by 0.051 [0.020, 0.082] (p .004)`; the interval is turned with the sign."""
    falls = found["value"] is not None and found["value"] < 0
    size = {"value": found["value"], "low": found["low"], "high": found["high"]}
    if falls:
        size = {"value": found["value"], "low": found["high"], "high": found["low"]}
        size = {name: None if value is None else -value for name, value in size.items()}
    p = p_text(found["p"])
    return f"{'lowers' if falls else 'raises'} {what} by {estimate_text(size, METRICS[PRIMARY].meaning())} (p {p})"


def _price(scores: Mapping[str, Any], arm: str, reference: str) -> str:
    """The change of the other cases and of the safety of the answers; what got worse stands first."""
    found: dict[str, list[str]] = {
        outcome: [] for outcome in ("worse", "better", "not distinguishable", "too few questions")
    }
    for metric in (PRIMARY, *SAFETY):
        about = METRICS[metric]
        name = about.label if about.label.isupper() else about.label.lower()
        by_stratum = metric == PRIMARY or about.elsewhere is not None or about.of != "all rows"
        for stratum, of in scores.items():
            one = of["metrics"].get(metric, {}).get(arm, {}).get("against", {}).get(reference)
            if one and (stratum == ALL) != by_stratum and (stratum, metric) != (CRITICAL, PRIMARY):
                size = f"{estimate_text(one, about.meaning(), sign=True)}{' points' if about.unit == '%' else ''}"
                found.setdefault(one["outcome"], []).append(f"{name} of {_plain(stratum)} cases {size}")
    found.pop("no data", None)
    price = "".join(f"; {outcome}: {', '.join(items)}" for outcome, items in found.items() if items)
    unknown = not set(SAFETY) & set(scores[CRITICAL]["metrics"])
    return price + ("; no answers were compared, so their safety is unknown" if unknown else "")


def _conclusion(outcomes: Mapping[str, str]) -> str:
    """Args: outcomes: reference → outcome of the chosen arm's difference."""
    words = {"better": "better than", "worse": "worse than", "not distinguishable": "not distinguishable from"}
    if not set(outcomes.values()) <= set(words):
        return "Too few critical questions to tell"
    parts = [f"{words[outcome]} {REFERENCES[reference]}" for reference, outcome in outcomes.items()]
    text = (" and " if len(set(outcomes.values())) == 1 else ", but ").join(parts)
    if SHUFFLED_ARM not in outcomes:
        text += "; without the arm shuffled, the reason may be another than severity"
    elif outcomes.get(CE) == "better":
        text += {
            "better": ", so knowing the severity helped",
            "not distinguishable": ", so severity need not be the reason",
            "worse": ", so severity is not the reason",
        }[outcomes[SHUFFLED_ARM]]
    return text[0].upper() + text[1:]


def comparison_tables(content: Mapping[str, Any]) -> Group:
    """The screen's view of comparison.json in 80 columns: each recipe's verdict, its tables, and the methods."""
    parts: list[RenderableType] = []
    for name, found in content["recipes"].items():
        parts += [Text(), Text(f"{name} ({found['model']})", style="bold"), Text(found["verdict"], style="bold")]
        parts += [Text(found["power"])] if found["power"] else []
        if found["chosen"] and len(found["validation"]) > 1:
            losses = ", ".join(f"{arm} {number_text(one['mean'], 4)}" for arm, one in found["validation"].items())
            parts.append(Text(f"Chosen on validation (NLL of critical cases): {losses}.", style="dim"))
        for stratum, scores in found["scores"].items():
            counts = f"{scores['rows']:,} rows, {scores['questions']:,} questions"
            parts += [Text(), Text(f"{_plain(stratum)}: {counts}", style="bold")]
            of_answers = [metric for metric in _OF_ANSWERS if metric in scores["metrics"]][:1]
            for metric in (PRIMARY, *(of_answers if stratum in (CRITICAL, ALL) else ())):
                parts.append(_table(content["metrics"][metric], stratum, scores["metrics"][metric]))
        parts += [Text(), *(Text(note, style="yellow") for note in found["notes"])]
        if found["controls_of"]:
            parts.append(Text(f"shuffled, constant: of the weights of {found['controls_of']}.", style="dim"))
    explained = ["* p < .05", *(f"{name}: {text}" for name, text in content["methods"].items())]
    return Group(*parts, Text(), *(Text(line, style="dim") for line in explained))


def _table(about: Mapping[str, Any], stratum: str, by_arm: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("arm", no_wrap=True)
    label = f"{about['label']}{' %' if about['unit'] == '%' else ''}"
    table.add_column(f"{label} {ARROWS[about['better'][stratum]]}", justify="right")
    references = [name for name in REFERENCES if name in by_arm]
    for name in references:
        table.add_column(f"− {name} ", justify="right")
    for arm, found in by_arm.items():
        cells = [estimate_text(found, about)]
        for name in references:
            difference = found["against"].get(name)
            star = "*" if difference and difference["outcome"] in ("better", "worse", "higher", "lower") else " "
            cells.append(f"{estimate_text(difference, about, sign=True)}{star}" if difference else "")
        table.add_row(arm, *cells)
    return table


def _plain(stratum: str) -> str:
    return stratum.replace("_", "-")
