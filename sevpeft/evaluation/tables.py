"""Tables of evaluation.json, comparison.json and choices.json in 80 columns; the report shows all strata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sevpeft.console import number_text, p_text
from sevpeft.errors import RunError
from sevpeft.evaluation.statistics import ARROWS, estimate_text
from sevpeft.runs import Run, file_hash
from sevpeft.severity.probabilities import SEVERITIES

COMPARISON, CHOICES = "comparison.json", "choices.json"
OPEN_STRATA = (SEVERITIES[-1], "all")
ACCURACY: dict[str, Any] = {"label": "Accuracy", "unit": "%", "shown_times": 100}
_HEADINGS = {"base": "base model", "shuffled": "shuf.", "constant": "const.", "reference": "doctor"}
Json = Mapping[str, Any]


def metric_label(metric: Json, stratum: str = "") -> str:
    """`Urgent referral, % ↑`; the arrow, which depends on the stratum, stays with what stands before it."""
    unit, arrow = metric["unit"], ARROWS[metric["better"].get(stratum, "neither")]
    return f"{metric['label']}{f', {unit}' if unit else ''}\N{NO-BREAK SPACE}{arrow}".rstrip()


def plain(stratum: str) -> str:
    return f"{stratum.replace('_', '-')} cases"


def evaluation_tables(content: Json) -> Group:
    """The contents of evaluation.json: scores beside their floors, differences to the base model, and the notes."""
    floors = [(_HEADINGS[name], text) for name, text in content["columns"].items() if name not in ("adapter", "base")]
    headings = [_HEADINGS.get(name, name) for name in content["columns"]]
    parts = _tables(content, headings, list(content["metrics"]))
    parts += [Text(f"{name}: {text}", style="dim") for name, text in (*content["methods"].items(), *floors)]
    return Group(*parts, *(Text(note, style="yellow") for note in content["notes"]))


def comparison_tables(content: Json) -> Group:
    """The contents of comparison.json: verdict, scores, differences of the verdict's score, and notes."""
    parts: list[RenderableType] = [Text(), Text(content["verdict"], style="bold")]
    parts += [Text(content["power"])] if content["power"] else []
    if content["chosen"] and len(content["validation"]) > 1:
        losses = ", ".join(f"{arm} {number_text(one['mean'], 4)}" for arm, one in content["validation"].items())
        parts.append(Text(f"Chosen on validation (NLL of critical cases): {losses}.", style="dim"))
    primary = content["primary"]["metric"]
    parts += arm_tables(content) if "vary" in content else _tables(content, list(content["columns"]), [primary])
    parts += [Text(note, style="yellow") for note in content["notes"]]
    if content["controls_of"]:
        others = ", oversampled" if "oversampled" in content["columns"] else ""
        parts.append(Text(f"shuffled, constant{others}: of the weights of {content['controls_of']}.", style="dim"))
    return Group(*parts, *(Text(f"{name}: {text}", style="dim") for name, text in content["methods"].items()))


def arm_tables(content: Json) -> list[RenderableType]:
    """A table of each score and open stratum, an arm a line, as they may be many, beside what it is compared with."""
    parts: list[RenderableType] = []
    for stratum, name in product(OPEN_STRATA, ("bertscore_f1", "chrf", "nll")):
        if stratum in content["scores"] and name in content["metrics"]:
            about = content["metrics"][name]
            shown = table(f"{metric_label(about, stratum)}, {plain(stratum)}", "mean", "difference", "outcome")
            for arm, of in content["scores"][stratum]["metrics"][name].items():
                cells = ((estimate_text(one, about, sign=True), one["outcome"]) for one in of["against"].values())
                shown.add_row(arm, estimate_text({**of, "low": None}, about), *next(cells, ()))
            parts += [Text(), shown]
    return [*parts, Text()]


def choices_tables(content: Json) -> Group:
    """The contents of choices.json: accuracy of both arms and their difference, Arabic − English, and the notes."""
    parts: list[RenderableType] = []
    for name, found in content["tasks"].items():
        shown = table("accuracy, %", "base", "adapter", "adapter − base", "p (Holm)", "outcome")
        for score, of in found["scores"].items():
            arms, one = (
                (estimate_text({**of[arm], "low": None}, ACCURACY) for arm in ("base", "adapter")),
                of["difference"],
            )
            p = p_text(one["p"], one["p_at_most"])
            shown.add_row(score, *arms, estimate_text(one, ACCURACY, sign=True), p, one["outcome"])
        title = f"{name}: {found['rows']:,} rows, chance {number_text(100 * found['chance'])} %"
        parts += [Text(), Text(title, style="bold"), shown]
    for pair in content["languages"]:
        shown = table("Arabic − English", "base", "adapter")
        for score, by in pair["scores"].items():
            shown.add_row(score, *(estimate_text(by[arm], ACCURACY, sign=True) for arm in ("base", "adapter")))
        title = f"{pair['arabic']} − {pair['english']}: {pair['rows']:,} rows"
        parts += [Text(), Text(title, style="bold"), shown]
    parts += [Text(), *(Text(note, style="yellow") for note in content["notes"])]
    return Group(*parts, *(Text(f"{name}: {text}", style="dim") for name, text in content["methods"].items()))


def stored_choices(run: Run) -> dict[str, Any]:
    """Content of choices.json; empty where there is none, or where it is of another adapter."""
    path, adapter = run.folder / CHOICES, run.adapter / "adapter_model.safetensors"
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() and adapter.is_file() else {}
    except ValueError:
        raise RunError(f"{path} cannot be read; make it anew with sevpeft choices.") from None
    return content if content and content["adapter"] == file_hash(adapter) else {}


def _tables(content: Json, headings: Sequence[str], differing: Sequence[str]) -> list[RenderableType]:
    """Of the open strata the means, and the differences of the scores in `differing`."""
    parts: list[RenderableType] = []
    for stratum in (name for name in OPEN_STRATA if name in content["scores"]):
        found = content["scores"][stratum]
        alone = "adapter − base model" if len(differing) > 1 else ""
        means, differences = table("", *headings), table(alone, "difference", "p (Holm)", "outcome")
        for name, by in found["metrics"].items():
            about = content["metrics"][name]
            label = metric_label(about, stratum)
            # For want of room one interval; those of differences say more.
            shown = {column: of if column == "adapter" else {**of, "low": None} for column, of in by.items()}
            means.add_row(label, *(estimate_text(shown[at], about) if at in shown else "" for at in content["columns"]))
            pairs = [(arm, *pair) for arm, of in by.items() for pair in of["against"].items()]
            for arm, reference, one in pairs if name in differing else ():
                p = p_text(one["p"], one["p_at_most"])
                differences.add_row(
                    label if alone else f"{arm} − {reference}", estimate_text(one, about, sign=True), p, one["outcome"]
                )
        title = f"{plain(stratum).capitalize()}: {found['rows']:,} rows, {found['questions']:,} questions"
        parts += [Text(), Text(title, style="bold"), means, Text()]
        parts += [differences, Text()] if differences.row_count else []
    return parts


def table(first: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold", max_width=22)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
