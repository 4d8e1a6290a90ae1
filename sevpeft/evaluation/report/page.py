"""Writes RUN/report.html: one file that needs nothing else, and names what is missing.

Everything but the recipe may be absent, but a damaged file is an error: a report that silently leaves a table out would
flatter. Text of patients and models is data of others: Jinja escapes all of it, and the page's own policy forbids any
script but the page's, any picture from elsewhere and any connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sevpeft.console import number_text, p_text
from sevpeft.errors import RunError
from sevpeft.evaluation.arms import WEIGHTED
from sevpeft.evaluation.report.cases import UNKNOWN, cases, direction
from sevpeft.evaluation.statistics import estimate_text
from sevpeft.evaluation.tables import COMPARISON, OPEN_STRATA, metric_label, plain
from sevpeft.recipe import load_recipe
from sevpeft.runs import SAMPLES, json_lines, write_atomically
from sevpeft.severity.probabilities import SEVERITIES

TEMPLATES = Path(__file__).parent / "templates"
REPORT, REVIEWED = "report.html", "review.json"
# Heading of the page's facts → section of metrics.json; and the parts of evaluation.json that are facts.
_SECTIONS = {"Data": "data", "Severity weights": "weights", "Model": "model", "Training": "training"}
_EVALUATION = ("data", "generation", "evaluation", "lexicons", "judge")
_ABOUT = ("model", "data", "chosen", "folds")
_NEEDED = ("metrics", "methods", "columns")
COMPARED = ("seeds", "primary", "verdict", "claim", "plane", "dialects", "folds", "runs", "scores", *_NEEDED)


@dataclass(frozen=True)
class Report:
    """Where it stands, how many questions it shows with their answers, and what it lacks."""

    path: Path
    shown: int
    missing: tuple[str, ...]


def write_report(folder: Path | str, *, answers: int = 120) -> Report:
    """Writes report.html into a run or comparison folder, for its owner alone.

    `answers`: questions that are shown with their answers; 0 leaves all text of patients out.

    Raises RunError: the folder holds neither, a file of it is damaged, or it cannot be written.
    """
    folder, page = Path(folder), page_of(Path(folder))
    shown, answered = cases(page["answers"], answers)
    page["samples"] = page.get("samples", {}) if answers else {}
    facts = {"cases": shown, "answered": answered, "scales": _scales(page["scores"]), "open_strata": OPEN_STRATA}
    facts |= {"review": stored_object(folder / REVIEWED, ("pair", "agreement", "scores", "notes", *_NEEDED))}
    facts |= {one.__name__: one for one in (direction, estimate_text, metric_label, number_text, p_text, plain)}
    html = render("page.html.jinja", **page, **facts)
    write_atomically(folder / REPORT, html)
    return Report(folder / REPORT, len(shown) + len(page["samples"]), tuple(page["missing"]))


def rows_text(rows: list[dict[str, Any]], template: str = "rows.txt.jinja", **about: Any) -> str:
    """Rows of `training_rows` for a terminal, where ⟦ and ⟧ stand around what carries loss, or as a page."""
    return render(template, rows=rows, severities=SEVERITIES, direction=direction, **about)


def render(template: str, **facts: Any) -> str:
    """A filled template; a page is escaped, and gets its style and its script, which alone its policy allows."""
    name = template.partition(".")[0]
    name = name if (TEMPLATES / f"{name}.js").is_file() else "page"
    script, style = ((TEMPLATES / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    markup = template.endswith(".html.jinja")
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=markup, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    facts |= {"strata": [*reversed(SEVERITIES), UNKNOWN], "made": time.strftime("%Y-%m-%d %H:%M"), "policy": policy}
    return environment.get_template(template).render(**facts, style=Markup(style), script=Markup(script))


def page_of(folder: Path) -> dict[str, Any]:
    """What the page shows of a run or a comparison; a RunError where the folder holds neither."""
    if (folder / COMPARISON).is_file():
        return _comparison_page(folder)
    if (folder / "recipe.yaml").is_file():
        return _run_page(folder)
    raise RunError(f"There is no run and no comparison in {folder}; name a folder that train or compare made.")


def _run_page(folder: Path) -> dict[str, Any]:
    recipe, metrics = load_recipe(folder / "recipe.yaml"), stored_object(folder / "metrics.json")
    evaluation = stored_object(folder / "evaluation.json", ("scores", "notes", *_NEEDED))
    by_arm, missing, samples = _answers(folder), list[str](), dict[int, list[dict[str, Any]]]()
    for line in stored_lines(folder / SAMPLES):
        samples.setdefault(line["number"], []).append(line)
    if "after" not in metrics:
        missing.append(f"The training is not finished: sevpeft train RECIPE --output {folder} --resume")
    elif not evaluation:
        missing.append(f"The run was not evaluated: sevpeft evaluate {folder}")
    elif not by_arm:
        missing.append(f"No answers were generated: sevpeft evaluate {folder} (without --nll-only)")
    model = metrics.get("model", {}).get("name_or_path", recipe.model.name_or_path)
    return {
        "title": f"Run {folder.resolve().name}",
        "subtitle": f"A LoRA adapter for {Path(model).name if Path(model).is_absolute() else model}",
        "verdict": "",
        "control": recipe.severity.control,
        "missing": missing,
        "sentences": evaluation.get("notes", []),
        "scores": evaluation.get("scores", {}),
        "answers": by_arm,
        "losses": {key: metrics[key] for key in ("before", "after")} if "after" in metrics else {},
        "curriculum": metrics.get("curriculum", {}),
        "curves": _loss_curves(folder),
        "samples": samples,
        "primary": None,
        "choices": metrics.get("choices"),
        **{name: evaluation.get(name, {}) for name in _NEEDED},
        "facts": {
            **{heading: metrics.get(key, {}) for heading, key in _SECTIONS.items()},
            "Environment": stored_object(folder / "environment.json"),
            "Evaluation": {key: evaluation[key] for key in _EVALUATION if key in evaluation},
        },
    }


def _comparison_page(folder: Path) -> dict[str, Any]:
    content = stored_object(folder / COMPARISON, COMPARED)
    by_arm, environment = dict[str, dict[str, Any]](), dict[str, Any]()
    for arm, name in ((arm, name) for arm, names in content["runs"].items() for name in names[: content["folds"]]):
        environment = environment or stored_object(folder / name / "environment.json")
        if answers := _answers(folder / name).get("base" if arm == "base" else "adapter"):
            by_arm.setdefault(arm, {}).update(answers)
    return {
        "title": f"Comparison {folder.resolve().name}",
        "subtitle": f"{len(content['columns'])} arms, seeds {', '.join(map(str, content['seeds']))}",
        **{name: content[name] for name in ("verdict", "claim", "plane")},
        "weighted": [arm for arm in content["columns"] if arm in WEIGHTED],
        "missing": [] if by_arm else ["The runs hold no answers to show (compared with --nll-only, or moved)."],
        "sentences": [sentence for sentence in (content["power"], *content["notes"]) if sentence],
        "scores": content["scores"],
        "answers": by_arm,
        "losses": {},
        "curves": [one for names in content["runs"].values() for name in names for one in _loss_curves(folder / name)],
        "primary": content["primary"]["metric"],
        **{name: content[name] for name in _NEEDED},
        "facts": {"Comparison": {key: content[key] for key in _ABOUT}, "Environment": environment},
    }


def _scales(scores: dict[str, Any]) -> dict[str, float]:
    """Score → largest end of an interval of its differences, so that all bars of a score have one scale."""
    scales: dict[str, float] = {}
    for metric, by in (pair for found in scores.values() for pair in found["metrics"].items()):
        # The base model lies so far off that nothing else could be told apart.
        trained = (one for arm, of in by.items() if arm != "base" for one in of["against"].values())
        ends = [abs(one[end]) for one in trained for end in ("low", "high", "value") if one[end] is not None]
        scales[metric] = max([*ends, scales.get(metric, 1e-12)])
    return scales


def _loss_curves(folder: Path) -> list[dict[str, Any]]:
    """Validation and training losses of a run, each as points in a square of 100 by 100, with the ends of the axes."""
    log, found = stored_lines(folder / "log.jsonl"), list[dict[str, Any]]()
    for kind, prefix in (("Validation", "eval_loss"), ("Training", "loss")):
        curves = {}
        for name in ("all", *reversed(SEVERITIES)):
            # Of a step that a resumed run took twice, the later.
            key = prefix if name == "all" else f"{prefix}_{name}"
            points = {entry["step"]: entry[key] for entry in log if isinstance(entry.get(key), int | float)}
            if len(points) > 1:
                curves[name] = sorted(points.items())
        if kind == "Training" and len(curves) > 1:
            del curves["all"]  # it is weighted
        if not curves:
            continue
        steps, losses = zip(*(point for points in curves.values() for point in points), strict=True)
        first, low, width, height = min(steps), min(losses), max(steps) - min(steps), max(losses) - min(losses) or 1.0
        lines = {
            name: " ".join(f"{100 * (x - first) / width:.1f},{100 - 100 * (y - low) / height:.1f}" for x, y in points)
            for name, points in curves.items()
        }
        ends = {"first": first, "last": max(steps), "low": low, "high": max(losses)}
        found.append({"run": folder.name, "kind": kind, "lines": lines, **ends})
    return found


def _answers(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm → id → line of predictions.jsonl; under "judgement" the line of judgements.jsonl, where there is one."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in stored_lines(folder / "predictions.jsonl"):
        found.setdefault(line["arm"], {}).setdefault(line["id"], line)
    for line in stored_lines(folder / "judgements.jsonl"):
        if answer := found.get(line["arm"], {}).get(line["id"]):
            answer.setdefault("judgement", line)
    return found


def stored_object(path: Path, needed: tuple[str, ...] = ()) -> dict[str, Any]:
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


def stored_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines; empty where there is none. A last line without its end was cut off by a kill."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1].decode(errors="replace")
    return [line for _, line in json_lines(whole.split("\n"), str(path))]
