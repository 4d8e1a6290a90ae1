"""Exports a comparison for a paper: tables as CSV or LaTeX (booktabs), figures as SVG and PDF; no text of patients."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pyarrow.csv import write_csv

from sevpeft.console import number_text, p_text
from sevpeft.errors import RunError, UsageError
from sevpeft.evaluation.report.page import COMPARED, TEMPLATES, stored_lines, stored_object
from sevpeft.evaluation.statistics import estimate_text
from sevpeft.evaluation.tables import COMPARISON
from sevpeft.runs import check_absent, whole_folder

# Series of a figure → key of log.jsonl.
_CURVES = {"training-weighted": "loss", "validation": "eval_loss", "validation-critical": "eval_loss_critical"}
_TEX: dict[str, Any] = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {sign: f"${sign}$" for sign in "<>"}
_TEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {"−": "$-$", "α": r"$\alpha$", "κ": r"$\kappa$", "–": "--"}
_Tables = dict[str, list[dict[str, Any]]]  # name → rows, whose keys are the columns


def export(folder: Path | str, *, csv: Path | None = None, latex: Path | None = None) -> list[str]:
    """Writes the comparison in `folder` into new folders; returns lines for the screen.

    A RunError if there is no comparison, or an output exists.
    """
    folder, outputs, notes = Path(folder), [path for path in (csv, latex) if path], list[str]()
    if csv and csv == latex:
        raise UsageError(f"--csv and --latex both name {csv}; name two folders.")
    if not (folder / COMPARISON).is_file():
        raise RunError(f"There is no comparison in {folder}; --csv and --latex need a folder of `sevpeft compare`.")
    content = stored_object(folder / COMPARISON, COMPARED)
    tables = {name: rows for name, rows in _tables(content, folder).items() if rows}
    for output in outputs:
        check_absent(output)
    for output in outputs:
        with whole_folder(output, shared=True) as partial:
            notes = _draw(partial, tables)
            if output == latex:
                _write_latex(partial, tables, content)
            else:
                for name, rows in tables.items():
                    write_csv(pa.Table.from_pylist(rows), partial / f"{name}.csv")
    return [*notes, *(f"Export: {output} (contains no patients' text)" for output in outputs)]


def _tables(content: Mapping[str, Any], folder: Path) -> _Tables:
    means = [
        ({"severity": stratum, "score": metric, "arm": arm}, mean)
        for stratum, summary in content["scores"].items()
        for metric, by_arm in summary["metrics"].items()
        for arm, mean in by_arm.items()
    ]
    pairs = [({**at, "reference": name}, one) for at, mean in means for name, one in mean["against"].items()]
    seeds = [(at, *values) for at, one in pairs for values in zip(content["seeds"], one["per_seed"], strict=True)]
    dialects = [(name, arm, one) for name, by_arm in content["dialects"].items() for arm, one in by_arm.items()]
    return {
        "claim": [_flat(part) for part in (content["claim"] or {"parts": []})["parts"]],
        "scores": [at | _flat(mean) for at, mean in means],
        "differences": [at | _flat(one) for at, one in pairs],
        "per_seed": [{**at, "seed": seed, "value": value} for at, seed, value in seeds],
        "dialects": [{"dialect": name, "arm": arm, **_flat(one)} for name, arm, one in dialects],
        "curves": list(_curves(content, folder)),
    }


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The row without lists; the keys of a nested mapping get its name as a prefix."""
    nested = {f"{name}_{key}": one for name, of in row.items() if isinstance(of, dict) for key, one in of.items()}
    return {name: value for name, value in (row | nested).items() if not isinstance(value, list | dict)}


def _curves(content: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """The mean over an arm's runs at each step that all of them logged."""
    for arm, runs in content["runs"].items():
        logs = [stored_lines(folder / run / "log.jsonl") for run in runs if arm != "base"]
        for series, key in _CURVES.items() if logs else ():
            by_run = [{entry["step"]: entry[key] for entry in log if entry.get(key) is not None} for log in logs]
            for step in sorted(set.intersection(*map(set, by_run))):
                mean = float(np.mean([values[step] for values in by_run]))
                yield {"arm": arm, "series": series, "step": step, "value": mean}


def _write_latex(folder: Path, tables: _Tables, content: Mapping[str, Any]) -> None:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True)
    environment.filters["tex"] = lambda text: str(text).translate(str.maketrans(_TEX))
    functions = {function.__name__: function for function in (estimate_text, number_text, p_text)}
    template = environment.get_template("table.tex.jinja")
    for name in tables.keys() - {"curves"}:
        text = template.render(name=name, rows=tables[name], content=content, **functions)
        (folder / f"{name}.tex").write_text(text, encoding="utf-8")


def _draw(folder: Path, tables: _Tables) -> list[str]:
    """Draws forest plots of differences to plain CE, and loss curves; without matplotlib, returns how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ['Figures need matplotlib: run pip install -e ".[figures]", and export again.']
    figures: dict[str, Any] = {}
    against = [row for row in tables.get("differences", []) if (row["score"], row["reference"]) == ("nll", "ce")]
    for group, rows in {"severity": against, "dialect": tables.get("dialects", [])}.items():
        rows = [row for row in rows if row["arm"] != "base"]  # the base model is too far away for the scale
        groups, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in (group, "arm"))
        if rows:
            figures[f"forest-{group}"] = figure = Figure(layout="constrained")
            figure.set_figheight(1.2 + 0.2 * len(groups) * (len(arms) + 1))
            axes = figure.subplots()
            axes.axvline(0, color="gray", linewidth=1)
            axes.set_yticks(range(len(groups)), [name.replace("_", "-") for name in groups])
            axes.set(ylim=(len(groups) - 0.5, -0.5), xlabel="difference in NLL to plain CE, nats a token (← better)")
        for number, arm in enumerate(arms):
            ends = [[row[end] for end in ("low", "value", "high")] for row in rows if row["arm"] == arm]
            low, value, high = np.array(ends, dtype=np.float64).T  # null becomes NaN, which is not drawn
            at = np.arange(len(groups)) + 0.8 * (number + 0.5) / len(arms) - 0.4
            axes.errorbar(value, at, xerr=(value - low, high - value), fmt="o", label=arm)
    for (arm, series), logged in groupby(tables.get("curves", []), itemgetter("arm", "series")):
        if f"curves-{series}" not in figures:
            figures[f"curves-{series}"] = figure = Figure(layout="constrained")
            figure.subplots().set(xlabel="step", ylabel=f"loss, nats a token: {series.replace('-', ', ')}")
        points = [(row["step"], row["value"]) for row in logged]
        figures[f"curves-{series}"].axes[0].plot(*zip(*points, strict=True), marker=".", label=arm)
    for name, figure in figures.items():
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        for ending, date in (("svg", "Date"), ("pdf", "CreationDate")):
            figure.savefig(folder / f"{name}.{ending}", metadata={date: None})
    return []
