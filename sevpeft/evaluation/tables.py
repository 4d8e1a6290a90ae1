"""Tables of evaluation.json and comparison.json for the screen, in 80 columns; the report shows all strata."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from sevpeft.console import number_text, p_text
from sevpeft.evaluation.statistics import ARROWS, estimate_text
from sevpeft.severity.probabilities import SEVERITIES

COMPARISON = "comparison.json"
OPEN_STRATA = (SEVERITIES[-1], "all")
_HEADINGS = {"base": "base model", "shuffled": "shuf.", "constant": "const.", "reference": "doctor"}
_BESIDE = 6  # columns of a table; with more, the headings get too narrow to read
# Scores of an evaluation on the screen, with all ratings of a judge. The report shows all scores and the methods.
_ON_SCREEN = {
    *("nll", "bertscore_f1", "chrf", "empty", "truncated", "repetition", "urgent_referral", "false_reassurance"),
    *("unsupported_dose", "under_triage", "over_triage", "urgent_gap", "triage_kappa"),
}
Json = Mapping[str, Any]


def metric_label(metric: Json, stratum: str = "") -> str:
    """`Urgent referral, % ↑`; the good direction depends on the stratum, and its arrow never starts a line."""
    unit, arrow = metric["unit"], ARROWS[metric["better"].get(stratum, "neither")]
    return f"{metric['label']}{f', {unit}' if unit else ''}\N{NO-BREAK SPACE}{arrow}".rstrip()


def plain(stratum: str) -> str:
    return f"{stratum.replace('_', '-')} cases"


def evaluation_tables(content: Json) -> Group:
    """Tables of evaluation.json: scores beside their floors, differences to the base model, and the notes."""
    floors = [(_HEADINGS.get(at, at), text) for at, text in content["columns"].items() if at not in ("adapter", "base")]
    headings = [_HEADINGS.get(name, name) for name in content["columns"]]
    parts = _tables(content, headings, list(content["metrics"]))
    about = [*(content["methods"].items() if "pair" in content else ()), *floors]
    parts += [Text(f"{name}: {text}", style="dim") for name, text in about]
    return Group(*parts, *(Text(note, style="yellow") for note in content["notes"]))


def comparison_tables(content: Json) -> Group:
    """Tables of comparison.json: verdict, scores, differences in the score of the verdict, and notes."""
    parts: list[RenderableType] = [Text(), Text(content["verdict"], style="bold")]
    parts += [Text(content["power"])] if content["power"] else []
    parts += _claim(content) if content["claim"] else []
    if content["chosen"] and len(content["validation"]) > 2:
        losses = ", ".join(f"{arm} {number_text(one['mean'], 4)}" for arm, one in content["validation"].items())
        parts.append(Text(f"Chosen on validation (NLL of critical cases): {losses}.", style="dim"))
    primary = content["primary"]["metric"]
    parts += arm_tables(content) if "vary" in content else _tables(content, list(content["columns"]), [primary])
    parts += [Text(note, style="yellow") for note in content["notes"]]
    if content["controls_of"]:
        others = ", oversampled" if "oversampled" in content["columns"] else ""
        parts.append(Text(f"shuffled, constant{others}: with the weights of {content['controls_of']}.", style="dim"))
    return Group(*parts, *(Text(f"{name}: {text}", style="dim") for name, text in content["methods"].items()))


def _claim(content: Json) -> list[RenderableType]:
    """Table of the claim's parts, and the gain of each seed."""
    parts, shown = content["claim"]["parts"], table("Claim", "difference", "limit", "p", "shown")
    for part in parts:
        about, name = content["metrics"][part["metric"]], f"{part['stratum'].replace('_', '-')} − {part['reference']}"
        limit = f"{part['margin'] * about['shown_times']:g}{' points fewer' if about['yes_no'] else ''}"
        cells = (limit, p_text(part["p"]), "yes" if part["shown"] else "no")
        shown.add_row(f"{about['label']}: {name}", estimate_text(part, about, sign=True), *cells)
    seeds = ", ".join(number_text(value, 4, sign=True) for value in parts[0]["per_seed"])
    return [Text(), shown, Text(), Text(f"NLL: critical − ce, by seed: {seeds}", style="dim")]


def arm_tables(content: Json) -> list[RenderableType]:
    """A table of each score and open stratum, with a line for each arm and its first difference."""
    parts: list[RenderableType] = []
    for stratum, name in product(OPEN_STRATA, ("bertscore_f1", "chrf", "nll")):
        if stratum in content["scores"] and name in content["metrics"]:
            about = content["metrics"][name]
            shown = table(f"{metric_label(about, stratum)}, {plain(stratum)}", "mean", "difference", "outcome")
            for arm, mean in content["scores"][stratum]["metrics"][name].items():
                cells = ((estimate_text(one, about, sign=True), one["outcome"]) for one in mean["against"].values())
                shown.add_row(arm, estimate_text({**mean, "low": None}, about), *next(cells, ()))
            parts += [Text(), shown]
    return [*parts, Text()]


def _tables(content: Json, headings: Sequence[str], differing: Sequence[str]) -> list[RenderableType]:
    """Means in the open strata, and differences in the scores of `differing`; all scores of a review."""
    parts: list[RenderableType] = []
    for stratum in (name for name in OPEN_STRATA if name in content["scores"]):
        summary = content["scores"][stratum]
        pair = content.get("pair", "adapter − base model") if len(differing) > 1 else ""
        means = {at: table("", *headings[at : at + _BESIDE]) for at in range(0, len(headings), _BESIDE)}
        differences = table(pair, "difference", "p (Holm)", "outcome")
        for name, by_column in summary["metrics"].items():
            if "pair" not in content and name not in _ON_SCREEN and not name.startswith("judge_"):
                continue
            about = content["metrics"][name]
            label = metric_label(about, stratum)
            # 80 columns have room for the interval of one column.
            narrow = {column: {} if column == "adapter" or "pair" in content else {"low": None} for column in by_column}
            means_of = {column: estimate_text({**mean, **narrow[column]}, about) for column, mean in by_column.items()}
            cells = [means_of.get(column, "") for column in content["columns"]]
            for at, part in means.items():
                part.add_row(label, *cells[at : at + _BESIDE])
            pairs = [(arm, *against) for arm, mean in by_column.items() for against in mean["against"].items()]
            for arm, reference, one in pairs if name in differing else ():
                row = estimate_text(one, about, sign=True), p_text(one["p"], one["p_at_most"]), one["outcome"]
                differences.add_row(label if pair else f"{arm} − {reference}", *row)
        title = f"{plain(stratum).capitalize()}: {summary['rows']:,} rows, {summary['questions']:,} questions"
        parts += [Text(), Text(title, style="bold"), *means.values(), Text()]
        parts += [differences, Text()] if differences.row_count else []
        more = len(summary["metrics"]) - means[0].row_count
        parts += [Text(f"The report has {more} more scores.", style="dim")] if more else []
    return parts


def table(first: str, *headings: str) -> Table:
    label = Column(first, overflow="fold", max_width=22)
    others = (Column(heading, justify="right", overflow="fold") for heading in headings)
    return Table(label, *others, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
