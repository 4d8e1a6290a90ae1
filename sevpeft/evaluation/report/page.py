"""From what a folder holds to RUN/report.html: one file that needs nothing else, and says what it cannot say.

Text of patients and models is data of others: Jinja escapes all of it, and the page's own policy forbids any script
but the page's, any picture from elsewhere and any connection.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sevpeft.evaluation.report.cases import HITS, Case, cases, sample
from sevpeft.evaluation.report.pictures import arm_answers, comparison_pictures, run_pictures
from sevpeft.evaluation.report.plots import Plot
from sevpeft.evaluation.report.reading import FINISHED, ComparisonContent, RunContent, read_content
from sevpeft.evaluation.report.tables import (
    Cell,
    Table,
    difference_tables,
    evaluation_tables,
    facts,
    headline_cards,
    metric_label,
    number,
    score_tables,
)
from sevpeft.runs import write_atomically
from sevpeft.severity.probabilities import SEVERITIES

REPORT = "report.html"
_HIDDEN_FACTS = ("path", "resolved", "histogram", "quantiles")
_ARMS = {"adapter": "the adapter", "base": "base model", "reference": "doctor's reference answer"}


@dataclass(frozen=True)
class Report:
    """Where it stands, how many questions it shows, and whether it holds text of patients."""

    path: Path
    shown: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """What belongs to one recipe of a comparison, or to the run: its sentences, tables, pictures and answers."""

    heading: str
    sentences: tuple[str, ...]
    tables: tuple[Table, ...]
    differences: tuple[Table, ...]
    plots: tuple[Plot, ...]
    cases: tuple[Case, ...]
    answered: int
    """Questions of which the cases are a sample."""


def write_report(folder: Path, *, answers: int = 120) -> Report:
    """Writes report.html into a run or comparison folder, for its owner alone.

    Args:
        answers: questions that are shown with their answers, for each recipe; 0 leaves all text of patients out.

    Raises:
        RunError: the folder holds neither, a file of it is damaged, or it cannot be written.
    """
    found = read_content(folder)
    page = _run_page(found, answers) if isinstance(found, RunContent) else _comparison_page(found, answers)
    shown = sum(len(part.cases) for part in page["parts"])
    script, style = _template("page.js"), _template("page.css")
    html = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            **page,
            shown=shown,
            made=time.strftime("%Y-%m-%d %H:%M"),
            arms=_ARMS,
            strata=[*reversed(SEVERITIES), "unknown"],
            style=Markup(style),
            script=Markup(script),
            policy=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    path = folder / REPORT
    write_atomically(path, html)
    return Report(path, shown, tuple(page["missing"]))


def _run_page(run: RunContent, answers: int) -> dict[str, Any]:
    evaluation = run.evaluation
    stratum, cards = headline_cards(evaluation) if evaluation else ("", [])
    part = Part(
        "",
        (),
        tuple(evaluation_tables(evaluation)) if evaluation else (),
        (),
        tuple(run_pictures(run)),
        tuple(cases(run.answers, sample(run.answers, answers))),
        _shared(run.answers),
    )
    model = run.metrics.get("model", {}).get("name_or_path", run.recipe.model.name_or_path)
    return {
        "title": f"Run {run.folder.resolve().name}",
        "subtitle": f"A LoRA adapter for {Path(model).name if Path(model).is_absolute() else model}",
        "verdict": _said_of_a_run(run),
        "stratum": stratum,
        "cards": cards,
        "missing": _missing(run),
        "notes": list(evaluation["notes"]) if evaluation else [],
        "parts": [part],
        "losses": _losses(run.metrics),
        "metrics": _meanings(evaluation or {}, part.cases),
        "methods": dict(evaluation["methods"]) if evaluation else {},
        "columns": dict(evaluation["columns"]) if evaluation else {},
        "facts": _facts(run, evaluation),
    }


def _comparison_page(found: ComparisonContent, answers: int) -> dict[str, Any]:
    content, pictures = found.content, comparison_pictures(found)
    parts, missing = [], []
    for name, recipe in content["recipes"].items():
        said = arm_answers(found.runs.get(name, {}))
        in_order = {arm: said[arm] for arm in content["arms"] if arm in said}
        if not in_order:
            missing.append(f"{name}: the runs hold no answers to show (compared with --nll-only, or moved).")
        # The verdict of a single recipe stands at the top of the page already.
        sentences = [recipe.get(key) for key in ("verdict", "power")]
        sentences = [sentence for sentence in sentences if sentence and sentence != content["verdict"]]
        parts.append(
            Part(
                name,
                (*sentences, *recipe.get("notes", ())),
                tuple(score_tables(recipe, content["metrics"], list(content["arms"]))),
                tuple(difference_tables(recipe, content["metrics"], list(content["arms"]), content["primary"])),
                tuple(pictures[name]),
                tuple(cases(in_order, sample(in_order, answers))),
                _shared(in_order),
            )
        )
    first = next((run for runs in found.runs.values() for run in runs.values()), None)
    about = {name: {key: recipe[key] for key in ("model", "data", "chosen") if key in recipe} for name, recipe in
             content["recipes"].items()}  # fmt: skip
    return {
        "title": f"Comparison {found.folder.resolve().name}",
        "subtitle": f"{len(content['arms'])} arms, seeds {', '.join(str(seed) for seed in content['seeds'])}",
        "verdict": str(content["verdict"]),
        "stratum": "",
        "cards": [],
        "missing": missing,
        "notes": [],
        "parts": parts,
        "losses": None,
        "metrics": _meanings(content, [case for part in parts for case in part.cases]),
        "methods": dict(content["methods"]),
        "columns": dict(content["arms"]),
        "facts": {"Data": facts(about), "Environment": _shown_facts(first.environment) if first else []},
    }


def _said_of_a_run(run: RunContent) -> str:
    if run.evaluation is None:
        return "This run was not evaluated, so that nothing can be said about its answers."
    control = run.recipe.severity.control
    steered = "" if control == "none" else f" It is a control run ({control} weights): severity did not steer it."
    return (
        "Measured on this run's own test questions, beside its base model. One run cannot say whether the severity "
        f"weights are the reason for anything: that takes plain cross-entropy and shuffled weights.{steered}"
    )


def _missing(run: RunContent) -> list[str]:
    folder = run.folder
    lacking = []
    if FINISHED not in run.metrics:
        lacking.append(f"The training is not finished: sevpeft train RECIPE --output {folder} --resume")
    elif run.evaluation is None:
        lacking.append(f"The run was not evaluated: sevpeft evaluate {folder}")
    elif not run.answers:
        lacking.append(f"No answers were generated: sevpeft evaluate {folder} (without --nll-only)")
    if run.evaluation is not None:
        lacking.append(
            "This run is compared with its base model only: sevpeft compare RECIPE --arms base,ce,balanced,shuffled"
        )
    return lacking


def _losses(metrics: Mapping[str, Any]) -> Table | None:
    """Validation loss before and after, as the training ended with."""
    if FINISHED not in metrics or "before" not in metrics:
        return None
    before, after = metrics["before"], metrics[FINISHED]
    rows = []
    for key, label in [(f"loss_{name}", name.replace("_", "-")) for name in reversed(SEVERITIES)] + [("loss", "all")]:
        if key in after and key in before:
            values = (before[key], after[key])
            change = number(after[key] - before[key], sign=True, places=3)
            rows.append((label, (*(Cell(number(value, places=3)) for value in values), Cell(change))))
    return Table("Validation loss, nats a token, unweighted", ("before", "after", "change"), tuple(rows))


def _meanings(content: Mapping[str, Any], shown: Any) -> list[dict[str, str]]:
    """Each score's label, definition, limits, and what its lexicon found in the answers shown."""
    hits = _examples(shown)
    of = {
        "referral": ("referral",),
        "urgent_referral": ("referral",),
        "false_reassurance": ("reassurance",),
        "unsupported_medicine": ("medicine",),
        "unsupported_dose": ("dose",),
    }
    return [
        {
            "label": metric_label(metric),
            "definition": f"{metric.get('definition', '')} {_directions(metric)}".strip(),
            "limits": metric.get("limits", ""),
            "hits": "، ".join(hits[kind] for kind in of.get(name, ()) if kind in hits),
        }
        for name, metric in content.get("metrics", {}).items()
    ]


def _directions(metric: Mapping[str, Any]) -> str:
    """`Higher is better on critical cases, lower on neutral and non-critical cases.`, where it depends on the cases."""
    strata: dict[str, list[str]] = {}
    for stratum, better in metric["better"].items():
        if better != "neither":
            strata.setdefault(better, []).append(stratum.replace("_", "-"))
    if not strata:
        return "Neither higher nor lower is better."
    if len(metric["better"]) == len(next(iter(strata.values()))):
        return f"{next(iter(strata)).capitalize()} is better."
    first, *others = (f"{better} is better on {' and '.join(names)} cases" for better, names in strata.items())
    return f"{', '.join((first.capitalize(), *others))}."


def _examples(shown: Any) -> dict[str, str]:
    """Kind of hit → its commonest words in the answers shown, with how often."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in HITS}
    for case in shown:
        for said in case.answers:
            for kind, _, words in said.hits:
                counts[kind].update(words.split("، "))
    return {
        kind: "، ".join(f"{words} ({count:,})" for words, count in counter.most_common(5))
        for kind, counter in counts.items()
        if counter
    }


def _facts(run: RunContent, evaluation: Mapping[str, Any] | None) -> dict[str, list[tuple[str, str]]]:
    metrics = run.metrics
    data = dict(metrics.get("data", {}))
    data["columns"] = {name: column for name, column in data.get("columns", {}).items() if name != column}
    found = {
        "Data": _shown_facts(data),
        "Severity weights": _shown_facts(metrics.get("weights", {})),
        "Model": _shown_facts(metrics.get("model", {})),
        "Training": _shown_facts(metrics.get("training", {})),
        "Environment": _shown_facts(run.environment),
    }
    if evaluation:
        told = ("data", "generation", "evaluation", "lexicons", "judge")
        kept = {key: evaluation[key] for key in told if key in evaluation}
        found["Evaluation"] = _shown_facts(kept)
    return {name: lines for name, lines in found.items() if lines}


def _shown_facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    return facts({key: value for key, value in content.items() if key not in _HIDDEN_FACTS})


def _shared(answers: Mapping[str, Mapping[str, Any]]) -> int:
    return len(set.intersection(*(set(by_id) for by_id in answers.values()))) if answers else 0


def _template(name: str) -> str:
    return files("sevpeft.evaluation.report").joinpath("templates", name).read_text(encoding="utf-8")


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("sevpeft.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
