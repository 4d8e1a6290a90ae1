"""Turns the contents of evaluation.json into tables of 80 columns: critical cases first, floors beside scores."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sevpeft.console import p_text
from sevpeft.evaluation.metrics import ALL
from sevpeft.evaluation.scoring import HEADLINE
from sevpeft.severity.probabilities import SEVERITIES

# Column of the table → its heading; the first two are measured, with intervals, the others are for orientation.
_MEASURED = {"adapter": "adapter", "base": "base model"}
_FLOORS = {"shuffled": "shuf.", "constant": "const.", "reference": "doctor"}
ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}


def evaluation_tables(content: dict[str, Any]) -> Group:
    """One table a stratum, what the columns mean, and the notes."""
    parts: list[RenderableType] = []
    for stratum, found in content["scores"].items():
        shown = list(found["metrics"])
        if stratum not in (SEVERITIES[-1], ALL):
            shown = [name for name in shown if name in HEADLINE]
        counts = f"{found['rows']:,} rows, {found['questions']:,} questions"
        parts += [Text(), Text(f"{stratum.replace('_', '-')}: {counts}", style="bold")]
        parts.append(_table(content, stratum, found["metrics"], shown))
        parts += _differences(content, found["metrics"])
    explained = [f"{name}: {text}" for name, text in content["methods"].items()]
    heads = {**_MEASURED, **_FLOORS}
    explained += [f"{heads[name]}: {text}" for name, text in content["columns"].items() if name in _FLOORS]
    parts += [Text(), *(Text(line, style="dim") for line in explained)]
    parts += [Text(note, style="yellow") for note in content["notes"]]
    return Group(*parts)


def _table(content: dict[str, Any], stratum: str, scores: dict[str, Any], shown: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("score", overflow="fold", max_width=19)
    there = content["columns"]
    measured = [name for name in _MEASURED if name in there]
    floors = [name for name in _FLOORS if name in there]
    for name in measured:
        table.add_column(_MEASURED[name], justify="right", no_wrap=True)
    for name in floors:
        table.add_column(_FLOORS[name], justify="right", style="dim", no_wrap=True)
    for metric in shown:
        about = content["metrics"][metric]
        label = f"{about['label']}{' %' if about['unit'] == '%' else ''} {ARROWS[about['better'][stratum]]}".strip()
        times = about["shown_times"]
        cells = [_with_interval(scores[metric].get(name), times) for name in measured]
        cells += [_number((scores[metric].get(name) or {}).get("value"), times) for name in floors]
        table.add_row(label, *cells)
    return table


def _differences(content: dict[str, Any], scores: dict[str, Any]) -> list[Text]:
    told = []
    for metric, by_column in scores.items():
        found = by_column.get("difference")
        if found and found["value"] is not None:
            about = content["metrics"][metric]
            unit = " points" if about["unit"] == "%" else ""
            size = f"{_with_interval(found, about['shown_times'], sign='+')}{unit}"
            told.append(f"{about['label']} {size}, p {p_text(found['p'])} ({found['outcome']})")
    return [Text(f"adapter − base model: {'; '.join(told)}", style="dim")] if told else []


def _with_interval(estimate: dict[str, Any] | None, times: float, sign: str = "") -> str:
    if estimate is None:
        return ""
    low, high = (_number(estimate[name], times, sign) for name in ("low", "high"))
    value = _number(estimate["value"], times, sign)
    return f"{value} [{low}, {high}]" if low and high else value


def _number(value: float | None, times: float, sign: str = "") -> str:
    """Three figures: 5.11, 61.2, 100."""
    if value is None:
        return ""
    shown = value * times
    text = f"{shown:{sign}.{2 if abs(shown) < 9.995 else 1 if abs(shown) < 99.95 else 0}f}"
    return text.replace("-", "−")
