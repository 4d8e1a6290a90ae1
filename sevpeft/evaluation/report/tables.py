"""From the figures of evaluation.json and comparison.json to rows of text: headings, numbers with intervals, notes.

Nothing is computed here that was not measured. Definitions, units and directions come with the figures, so that a page
made from an old file says what was meant then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sevpeft.evaluation.significance import shown_p
from sevpeft.severity.probabilities import SEVERITIES

ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}
_UNBROKEN = "\N{NO-BREAK SPACE}"
# What a page of one run begins with, where it was measured.
HEADLINE = ("nll", "bertscore_f1", "chrf", "urgent_referral", "false_reassurance")
COLUMNS = {
    "adapter": "adapter",
    "base": "base model",
    "difference": "adapter − base",
    "shuffled": "floor: shuffled",
    "constant": "floor: constant",
    "reference": "doctors",
}
_FLOORS = ("shuffled", "constant", "reference")
# The others stand folded away: what a fine-tuning is judged by comes first.
OPEN_STRATA = (SEVERITIES[-1], "all")


@dataclass(frozen=True)
class Cell:
    """A number as it is shown, its interval, and an outcome; "better" and "worse" have a color."""

    value: str
    interval: str = ""
    outcome: str = ""


@dataclass(frozen=True)
class Table:
    """A table with its caption; `folded` when a page shows it on demand."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    folded: bool = False


@dataclass(frozen=True)
class Card:
    """One headline figure: what it is, its value with interval, and what it is to be compared with."""

    label: str
    cell: Cell
    beside: str


def number(value: float | None, times: float = 1, *, sign: bool = False, places: int | None = None) -> str:
    """Three figures unless the places are given: 5.11, 61.2, 100; a dash where there is no number."""
    if value is None:
        return "–"
    shown = value * times
    digits = places if places is not None else 2 if abs(shown) < 9.995 else 1 if abs(shown) < 99.95 else 0
    text = f"{shown:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "−")


def cell(found: Mapping[str, Any] | None, metric: Mapping[str, Any], *, sign: bool = False) -> Cell:
    """A figure {value, low, high}, in the metric's unit."""
    if not found or found.get("value") is None:
        return Cell("–" if found else "")
    times, places = metric.get("shown_times", 1), 3 if metric.get("unit") == "nats a token" else None
    low, high = (number(found.get(name), times, sign=sign, places=places) for name in ("low", "high"))
    there = found.get("low") is not None and found.get("high") is not None
    return Cell(number(found["value"], times, sign=sign, places=places), f"[{low}, {high}]" if there else "")


def metric_label(metric: Mapping[str, Any], stratum: str = "") -> str:
    """`Urgent referral, % ↑`; the arrow, which depends on the stratum, stays with what stands before it."""
    unit, arrow = metric.get("unit", ""), ARROWS[metric["better"].get(stratum, "neither")]
    return f"{metric['label']}{f', {unit}' if unit else ''}{_UNBROKEN}{arrow}".rstrip()


def plain(stratum: str) -> str:
    return "all cases" if stratum == "all" else f"{stratum.replace('_', '-')} cases"


def evaluation_tables(content: Mapping[str, Any]) -> list[Table]:
    """One table a stratum: a row a score, the adapter, the base model, their difference and the floors."""
    metrics = content["metrics"]
    there = {column for found in content["scores"].values() for by in found["metrics"].values() for column in by}
    columns = [column for column in COLUMNS if column in there]
    tables = []
    for stratum, found in content["scores"].items():
        rows = tuple(
            (
                metric_label(metrics[name], stratum),
                tuple(
                    difference_cell(by[column], metrics[name], with_p=True)
                    if column == "difference" and column in by
                    else cell(by.get(column), metrics[name])
                    for column in columns
                ),
            )
            for name, by in found["metrics"].items()
        )
        title = f"{plain(stratum).capitalize()}: {found['rows']:,} rows, {found['questions']:,} questions"
        tables.append(Table(title, tuple(COLUMNS[column] for column in columns), rows, stratum not in OPEN_STRATA))
    return tables


def headline_cards(content: Mapping[str, Any]) -> tuple[str, list[Card]]:
    """The figures of the gravest stratum there is: its heading, and a card for each, with the price on the others."""
    stratum, *others = content["scores"]
    cards = []
    for name in HEADLINE:
        by = content["scores"][stratum]["metrics"].get(name, {})
        if "adapter" not in by:
            continue
        metric = content["metrics"][name]
        beside = f"base model {cell(by['base'], metric).value}" if "base" in by else ""
        if "difference" in by:
            difference = difference_cell(by["difference"], metric, with_p=True)
            beside += f"; difference {difference.value} {difference.interval}"
        for other in others:
            there = content["scores"][other]["metrics"].get(name, {}).get("difference")
            if there and there["rows"] and other != "all":
                beside += f"; {plain(other)} {difference_cell(there, metric).value} ({there['outcome']})"
        floors = [f"{COLUMNS[column]} {cell(by[column], metric).value}" for column in _FLOORS if column in by]
        beside = "; ".join(part for part in (beside, *floors) if part)
        cards.append(Card(metric_label(metric, stratum), cell(by["adapter"], metric), beside))
    return plain(stratum), cards


def score_tables(recipe: Mapping[str, Any], metrics: Mapping[str, Any], arms: Sequence[str]) -> list[Table]:
    """Of one recipe of a comparison, one table a stratum: a row an arm, a column a score."""
    tables = []
    for stratum, found in recipe["scores"].items():
        names = list(found["metrics"])
        rows = tuple(
            (_chosen(arm, recipe), tuple(cell(found["metrics"][name].get(arm), metrics[name]) for name in names))
            for arm in arms
            if any(arm in by for by in found["metrics"].values())
        )
        title = f"{plain(stratum).capitalize()}: {found['rows']:,} rows, {found['questions']:,} questions"
        headings = tuple(metric_label(metrics[name], stratum) for name in names)
        tables.append(Table(title, headings, rows, stratum not in OPEN_STRATA))
    return tables


def difference_tables(
    recipe: Mapping[str, Any], metrics: Mapping[str, Any], arms: Sequence[str], primary: Mapping[str, Any]
) -> list[Table]:
    """Of one recipe of a comparison: each arm against plain CE and shuffled weights, the metric of the verdict open."""
    tables = []
    for stratum, found in recipe["scores"].items():
        for name, by in found["metrics"].items():
            rows = tuple(
                (f"{_chosen(arm, recipe)} − {reference}", _difference_cells(difference, metrics[name]))
                for arm in arms
                for reference, difference in by.get(arm, {}).get("against", {}).items()
            )
            if rows:
                headings = ("difference", "p (Holm)", "smallest detectable", "outcome")
                open_ = name == primary.get("metric") and stratum in OPEN_STRATA
                title = f"{plain(stratum).capitalize()}: {metric_label(metrics[name], stratum)}"
                tables.append(Table(title, headings, rows, not open_))
    return tables


def difference_cell(found: Mapping[str, Any], metric: Mapping[str, Any], *, with_p: bool = False) -> Cell:
    """A difference in the color of its outcome; "no data" where no row has a value."""
    if not found["rows"]:
        return Cell("no data")
    shown = cell(found, metric, sign=True)
    p = f"p {shown_p(found['p'], found['p_at_most'])}" if with_p else ""
    return Cell(shown.value, f"{shown.interval} {p}".strip(), str(found["outcome"]))


def _difference_cells(found: Mapping[str, Any], metric: Mapping[str, Any]) -> tuple[Cell, ...]:
    places = 3 if metric.get("unit") == "nats a token" else None
    return (
        difference_cell(found, metric),
        Cell(shown_p(found["p"], found["p_at_most"]), f"of {found['comparisons']}" if found["p"] is not None else ""),
        Cell(number(found["detectable"], metric.get("shown_times", 1), places=places)),
        Cell(found["outcome"], "", found["outcome"]),
    )


def _chosen(arm: str, recipe: Mapping[str, Any]) -> str:
    return f"{arm} (chosen)" if arm == recipe.get("chosen") else arm


def facts(content: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    """A nested object as lines of name and value, in its order; what is empty or absent is left out."""
    lines: list[tuple[str, str]] = []
    for key, value in content.items():
        name = f"{path} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            lines += facts(value, name)
        elif isinstance(value, list | tuple):
            lines += [(name, ", ".join(str(one) for one in value))] if value else []
        elif value is not None and value != "":
            lines.append((name, _plain_value(value)))
    return lines


def _plain_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
