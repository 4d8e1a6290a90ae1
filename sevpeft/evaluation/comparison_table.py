"""Turns comparison.json into tables of 80 columns: verdict first, then critical cases, all, and the rest."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sevpeft.evaluation.comparison import CRITICAL, PRIMARY, REFERENCES, number_with_interval
from sevpeft.evaluation.scores import ALL, ARROWS, METRICS

# The score of the answers beside NLL: the published one, or chrF++ where no encoder is.
_OF_ANSWERS = ("bertscore_f1", "chrf")


def comparison_tables(content: dict[str, Any]) -> Group:
    """The verdict of every recipe, its tables, and what the columns mean."""
    parts: list[RenderableType] = []
    for name, found in content["recipes"].items():
        parts += [Text(), Text(f"{name} ({found['model']})", style="bold")]
        parts.append(Text(found["verdict"], style="bold"))
        parts += [Text(found["power"])] if found["power"] else []
        if found["chosen"] and len(found["validation"]) > 1:
            losses = ", ".join(f"{arm} {one['mean']:.3f}" for arm, one in found["validation"].items())
            parts.append(Text(f"Chosen on validation (NLL of critical cases): {losses}.", style="dim"))
        for stratum, scores in found["scores"].items():
            parts += _stratum(content, stratum, scores)
        parts += [Text(), *(Text(note, style="yellow") for note in found["notes"])]
        if found["controls_of"]:
            parts.append(Text(f"shuffled, constant: of the weights of {found['controls_of']}.", style="dim"))
    explained = ["* p < .05", *(f"{name}: {text}" for name, text in content["methods"].items())]
    parts += [Text(), *(Text(line, style="dim") for line in explained)]
    return Group(*parts)


def _stratum(content: dict[str, Any], stratum: str, scores: dict[str, Any]) -> list[RenderableType]:
    counts = f"{scores['rows']:,} rows, {scores['questions']:,} questions"
    parts: list[RenderableType] = [Text(), Text(f"{stratum.replace('_', '-')}: {counts}", style="bold")]
    shown = [PRIMARY]
    if stratum in (CRITICAL, ALL):
        shown += [name for name in _OF_ANSWERS if name in scores["metrics"]][:1]
    for metric in shown:
        parts.append(_table(content, stratum, metric, scores["metrics"][metric]))
    return parts


def _table(content: dict[str, Any], stratum: str, metric: str, by_arm: dict[str, Any]) -> Table:
    about = content["metrics"][metric]
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("arm", no_wrap=True)
    label = f"{about['label']}{' %' if about['unit'] == '%' else ''}"
    table.add_column(f"{label} {ARROWS[about['better'][stratum]]}", justify="right")
    references = [name for name in REFERENCES if name in by_arm]
    for name in references:
        table.add_column(f"− {name} ", justify="right")
    for arm, found in by_arm.items():
        cells = []
        for name in references:
            difference = found["against"].get(name)
            star = "*" if difference and difference["outcome"] in ("better", "worse", "higher", "lower") else " "
            cells.append(f"{number_with_interval(difference, METRICS[metric], sign=True)}{star}" if difference else "")
        table.add_row(arm, number_with_interval(found, METRICS[metric]), *cells)
    return table
