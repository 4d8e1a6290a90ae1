"""Writes RUN/report.html: one file that needs nothing else, and names what is missing.

Everything but the recipe may be absent, because a report is most wanted when something is unfinished. A file that is
there but damaged is an error: a report that silently leaves a table out would flatter. Text of patients and models is
data of others: Jinja escapes all of it, and the page's own policy forbids any script but the page's, any picture from
elsewhere and any connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sevpeft.data.json_rows import line_rows
from sevpeft.errors import RunError
from sevpeft.evaluation.report.cases import UNKNOWN, Answers, cases, sample, shared_ids
from sevpeft.evaluation.report.plots import differences_of_arms, differences_to_base, loss_curves
from sevpeft.evaluation.report.tables import (
    difference_tables,
    evaluation_tables,
    facts,
    loss_table,
    metric_label,
    score_tables,
)
from sevpeft.recipe import load_recipe
from sevpeft.runs import write_atomically
from sevpeft.severity.probabilities import SEVERITIES

REPORT, COMPARISON = "report.html", "comparison.json"
# Heading of the page's facts → section of metrics.json; and the parts of evaluation.json that are facts.
_SECTIONS = {"Data": "data", "Severity weights": "weights", "Model": "model", "Training": "training"}
_EVALUATION = ("data", "generation", "evaluation", "lexicons", "judge")
_ARMS = {"adapter": "the adapter", "base": "base model", "reference": "doctor's reference answer"}


@dataclass(frozen=True)
class Report:
    """Where it stands, how many questions it shows with their answers, and what it lacks."""

    path: Path
    shown: int
    missing: tuple[str, ...]


def write_report(folder: Path, *, answers: int = 120) -> Report:
    """Writes report.html into a run or comparison folder, for its owner alone.

    Args:
        answers: questions that are shown with their answers, for each recipe; 0 leaves all text of patients out.

    Raises:
        RunError: the folder holds neither, a file of it is damaged, or it cannot be written.
    """
    if (folder / COMPARISON).is_file():
        page = _comparison_page(folder, answers)
    elif (folder / "recipe.yaml").is_file():
        page = _run_page(folder, answers)
    else:
        raise RunError(f"There is no run and no comparison in {folder}; name a folder that train or compare made.")
    shown = sum(len(part["cases"]) for part in page["parts"])
    templates = files("sevpeft.evaluation.report") / "templates"
    script, style = ((templates / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = Environment(
        loader=PackageLoader("sevpeft.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.jinja").render(
        **page,
        shown=shown,
        made=time.strftime("%Y-%m-%d %H:%M"),
        arms=_ARMS,
        metric_label=metric_label,
        strata=[*reversed(SEVERITIES), UNKNOWN],
        style=Markup(style),
        script=Markup(script),
        policy=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_atomically(folder / REPORT, html)
    return Report(folder / REPORT, shown, tuple(page["missing"]))


def _run_page(folder: Path, answers: int) -> dict[str, Any]:
    recipe, metrics = load_recipe(folder / "recipe.yaml"), _object(folder / "metrics.json")
    evaluation = _object(folder / "evaluation.json", ("scores", "metrics", "methods", "columns", "notes"))
    by_arm = _answers(folder)
    verdict = "This run was not evaluated, so nothing is known about its answers."
    if evaluation:
        verdict = (
            "Measured on this run's own test questions, beside its base model. Whether severity is the reason for "
            "anything, one run cannot show: sevpeft compare puts it beside plain cross-entropy and shuffled weights."
        )
        if recipe.severity.control != "none":
            verdict += f" It is a control run ({recipe.severity.control} weights): severity did not steer it."
    missing = []
    if "after" not in metrics:
        missing.append(f"The training is not finished: sevpeft train RECIPE --output {folder} --resume")
    elif not evaluation:
        missing.append(f"The run was not evaluated: sevpeft evaluate {folder}")
    elif not by_arm:
        missing.append(f"No answers were generated: sevpeft evaluate {folder} (without --nll-only)")
    part = _part(
        by_arm,
        answers,
        heading="",
        sentences=evaluation.get("notes", []),
        tables=loss_table(metrics) + (evaluation_tables(evaluation) if evaluation else []),
        differences=[],
        plots=(differences_to_base(evaluation) if evaluation else []) + loss_curves(_lines(folder / "log.jsonl")),
    )
    model = metrics.get("model", {}).get("name_or_path", recipe.model.name_or_path)
    sections = {name: metrics.get(key, {}) for name, key in _SECTIONS.items()}
    sections["Environment"] = _object(folder / "environment.json")
    sections["Evaluation"] = {key: evaluation[key] for key in _EVALUATION if key in evaluation}
    return {
        "title": f"Run {folder.resolve().name}",
        "subtitle": f"A LoRA adapter for {Path(model).name if Path(model).is_absolute() else model}",
        "verdict": verdict,
        "missing": missing,
        "parts": [part],
        "metrics": evaluation.get("metrics", {}),
        "methods": evaluation.get("methods", {}),
        "columns": evaluation.get("columns", {}),
        "facts": {name: facts(section) for name, section in sections.items()},
    }


def _comparison_page(folder: Path, answers: int) -> dict[str, Any]:
    content = _object(folder / COMPARISON, ("arms", "seeds", "primary", "metrics", "methods", "verdict", "recipes"))
    parts, missing = [], []
    environment: dict[str, Any] = {}
    for name, recipe in content["recipes"].items():
        by_arm: dict[str, Any] = {}
        for arm, runs in recipe["runs"].items():
            first = folder / runs[0]
            environment = environment or _object(first / "environment.json")
            by_arm[arm] = _answers(first).get("base" if arm == "base" else "adapter", {})
        by_arm = {arm: by_id for arm, by_id in by_arm.items() if by_id}
        if not by_arm:
            missing.append(f"{name}: the runs hold no answers to show (compared with --nll-only, or moved).")
        # The verdict of a single recipe stands at the top of the page already.
        sentences = [recipe["verdict"]] if recipe["verdict"] != content["verdict"] else []
        sentences += [sentence for sentence in (recipe["power"], *recipe["notes"]) if sentence]
        about = {"heading": name, "sentences": sentences, "tables": score_tables(recipe, content)}
        about["plots"] = differences_of_arms(recipe, content, f"{name}: " if len(content["recipes"]) > 1 else "")
        parts.append(_part(by_arm, answers, differences=difference_tables(recipe, content), **about))
    return {
        "title": f"Comparison {folder.resolve().name}",
        "subtitle": f"{len(content['arms'])} arms, seeds {', '.join(str(seed) for seed in content['seeds'])}",
        "verdict": content["verdict"],
        "missing": missing,
        "parts": parts,
        "metrics": content["metrics"],
        "methods": content["methods"],
        "columns": content["arms"],
        "facts": {
            **{
                name: facts({key: of[key] for key in ("model", "data", "chosen")})
                for name, of in content["recipes"].items()
            },
            "Environment": facts(environment),
        },
    }


def _part(by_arm: Answers, answers: int, **about: Any) -> dict[str, Any]:
    """What belongs to one recipe of a comparison, or to the run: heading, sentences, tables, plots and answers."""
    return {**about, "cases": cases(by_arm, sample(by_arm, answers)), "answered": len(shared_ids(by_arm))}


def _answers(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm → id → line of predictions.jsonl; under "judgement" the line of judgements.jsonl, where there is one."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in _lines(folder / "predictions.jsonl"):
        found.setdefault(line["arm"], {}).setdefault(line["id"], line)
    for line in _lines(folder / "judgements.jsonl"):
        if answer := found.get(line["arm"], {}).get(line["id"]):
            answer.setdefault("judgement", line)
    return found


def _object(path: Path, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or any(name not in found for name in needed):
            raise ValueError("incomplete")
    except ValueError:
        raise RunError(f"{path} cannot be read; make it anew with the command that wrote it, then report.") from None
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines; empty where there is none. A last line without its end was cut off by a kill."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1].decode(errors="replace")
    return [line for _, line in line_rows(whole.split("\n"), str(path))]
