"""Tables of a report, as text, from metrics.json, evaluation.json and comparison.json.

Definitions, units and directions come with the figures, so that a page made from an old file says what was meant then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sevpeft.console import number_text, p_text
from sevpeft.evaluation.statistics import ARROWS, estimate_text
from sevpeft.severity.probabilities import SEVERITIES

_COLUMNS = {
    "adapter": "adapter",
    "base": "base model",
    "difference": "adapter − base",
    "shuffled": "floor: shuffled",
    "constant": "floor: constant",
    "reference": "doctors",
}
_OF_DIFFERENCES = ("difference", "p (Holm)", "smallest detectable", "outcome")
# The others stand folded away: what a fine-tuning is judged by comes first.
_OPEN_STRATA = (SEVERITIES[-1], "all")
Json = Mapping[str, Any]


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


def cell(found: Json | None, metric: Json) -> Cell:
    """A mean {value, low, high}, in the metric's unit; empty where there is none."""
    return _cell(estimate_text(found, metric)) if found else Cell("")


def difference_cell(found: Json | None, metric: Json) -> Cell:
    """A difference with its p, in the color of its outcome; "no data" where no row has a value."""
    if not found:
        return Cell("")
    if not found["rows"]:
        return Cell("no data")
    return _cell(f"{estimate_text(found, metric, sign=True)} p {p_text(found['p'])}", found["outcome"])


def _cell(text: str, outcome: str = "") -> Cell:
    value, _, interval = text.partition(" ")
    return Cell(value, interval, outcome)


def metric_label(metric: Json, stratum: str = "") -> str:
    """`Urgent referral, % ↑`; the arrow, which depends on the stratum, stays with what stands before it."""
    unit, arrow = metric["unit"], ARROWS[metric["better"].get(stratum, "neither")]
    return f"{metric['label']}{f', {unit}' if unit else ''}\N{NO-BREAK SPACE}{arrow}".rstrip()


def plain(stratum: str) -> str:
    return "all cases" if stratum == "all" else f"{stratum.replace('_', '-')} cases"


def loss_table(metrics: Json) -> list[Table]:
    """Validation loss before and after, as the training ended with; none while it is not finished."""
    if "after" not in metrics:
        return []
    before, after = metrics["before"], metrics["after"]
    rows = []
    for key, label in [(f"loss_{name}", name.replace("_", "-")) for name in reversed(SEVERITIES)] + [("loss", "all")]:
        if key in after:
            change = number_text(after[key] - before[key], 4, sign=True)
            rows.append((label, (Cell(number_text(before[key], 4)), Cell(number_text(after[key], 4)), Cell(change))))
    return [Table("Validation loss, nats a token, unweighted", ("before", "after", "change"), tuple(rows))]


def evaluation_tables(content: Json) -> list[Table]:
    """One table a stratum: a row a score, the adapter, the base model, their difference and the floors."""
    metrics = content["metrics"]
    there = {column for found in content["scores"].values() for by in found["metrics"].values() for column in by}
    columns = [column for column in _COLUMNS if column in there]
    tables = []
    for stratum, found in content["scores"].items():
        rows = tuple(
            (
                metric_label(metrics[name], stratum),
                tuple(
                    (difference_cell if column == "difference" else cell)(by.get(column), metrics[name])
                    for column in columns
                ),
            )
            for name, by in found["metrics"].items()
        )
        headings = tuple(_COLUMNS[column] for column in columns)
        tables.append(Table(_title(stratum, found), headings, rows, stratum not in _OPEN_STRATA))
    return tables


def score_tables(recipe: Json, content: Json) -> list[Table]:
    """Of one recipe of a comparison, one table a stratum: a row an arm, a column a score."""
    tables = []
    for stratum, found in recipe["scores"].items():
        names = list(found["metrics"])
        rows = tuple(
            (_arm(arm, recipe), tuple(cell(found["metrics"][name][arm], content["metrics"][name]) for name in names))
            for arm in content["arms"]
        )
        headings = tuple(metric_label(content["metrics"][name], stratum) for name in names)
        tables.append(Table(_title(stratum, found), headings, rows, stratum not in _OPEN_STRATA))
    return tables


def difference_tables(recipe: Json, content: Json) -> list[Table]:
    """Of one recipe of a comparison: each arm against plain CE and shuffled weights, the metric of the verdict open."""
    tables = []
    for stratum, found in recipe["scores"].items():
        for name, by in found["metrics"].items():
            metric = content["metrics"][name]
            rows = []
            for arm in content["arms"]:
                for reference, one in by[arm]["against"].items():
                    cells = (
                        _cell(estimate_text(one, metric, sign=True), one["outcome"]),
                        Cell(p_text(one["p"]), f"of {one['comparisons']}" if one["p"] is not None else ""),
                        cell({"value": one["detectable"], "low": None, "high": None}, metric),
                        Cell(one["outcome"], "", one["outcome"]),
                    )
                    rows.append((f"{_arm(arm, recipe)} − {reference}", cells))
            title = f"{plain(stratum).capitalize()}: {metric_label(metric, stratum)}"
            folded = name != content["primary"]["metric"] or stratum not in _OPEN_STRATA
            tables += [Table(title, _OF_DIFFERENCES, tuple(rows), folded)] if rows else []
    return tables


def _title(stratum: str, found: Json) -> str:
    return f"{plain(stratum).capitalize()}: {found['rows']:,} rows, {found['questions']:,} questions"


def _arm(arm: str, recipe: Json) -> str:
    return f"{arm} (chosen)" if arm == recipe["chosen"] else arm


def facts(content: Json, path: str = "") -> list[tuple[str, str]]:
    """A nested object as lines of name and value, in its order; what is empty or has no short form is left out."""
    lines: list[tuple[str, str]] = []
    for key, value in content.items():
        if key in ("path", "resolved", "histogram", "quantiles"):
            continue
        name = f"{path} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            lines += facts(value, name)
        elif value not in (None, "", []):
            if isinstance(value, list):
                text = ", ".join(str(one) for one in value)
            elif isinstance(value, bool):
                text = "yes" if value else "no"
            elif isinstance(value, float):
                text = f"{value:.4g}"
            else:
                text = f"{value:,}" if isinstance(value, int) else str(value)
            lines.append((name, text))
    return lines
