"""Writes report.html of a run or comparison: one self-contained file, which names missing parts.

Every file but the recipe may be absent. A damaged file is an error, because a report without a table could mislead.
Text of patients and models is untrusted: Jinja escapes it, and the page's policy forbids other scripts, pictures from
elsewhere and all connections.
"""

import base64
import hashlib
import json
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sevpeft.console import number_text, p_text
from sevpeft.data.text import ARABIC
from sevpeft.errors import RunError
from sevpeft.evaluation.arms import WEIGHTED
from sevpeft.evaluation.safety import rules, safety_findings
from sevpeft.evaluation.statistics import estimate_text
from sevpeft.evaluation.tables import COMPARISON, OPEN_STRATA, metric_label, plain
from sevpeft.recipe import load_recipe
from sevpeft.runs import SAMPLES, json_lines, write_atomically
from sevpeft.severity.lexicon import read
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.rules import Match

TEMPLATES = Path(__file__).parent / "templates"
REPORT, REVIEWED = "report.html", "review.json"
# Heading of the facts on the page → section of metrics.json; and the facts in evaluation.json and comparison.json.
_SECTIONS = {"Data": "data", "Severity weights": "weights", "Model": "model", "Training": "training"}
_EVALUATION = ("data", "generation", "evaluation", "lexicons", "judge")
_ABOUT = ("model", "data", "chosen", "folds")
_NEEDED = ("metrics", "methods", "columns")
COMPARED = ("seeds", "primary", "verdict", "claim", "plane", "dialects", "folds", "runs", "scores", *_NEEDED)
UNKNOWN = "unknown"
_LATIN = re.compile(r"[A-Za-z]")
# Blanks, words, and the punctuation at the end of a word.
_TOKENS = re.compile(r"\s+|\S+?(?=[.,،؛;:!؟?…)(]*(?:\s|$))|\S+")
# Arm → id → line of predictions.jsonl, in the order in which the arms are shown.
Answers = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Report:
    """Path of a report, the number of questions that it shows with answers, and its missing parts."""

    path: Path
    shown: int
    missing: tuple[str, ...]


def write_report(folder: Path | str, *, answers: int = 120) -> Report:
    """Writes report.html into a run or comparison folder, readable by its owner only.

    `answers`: number of questions with their answers; 0 leaves out all text of patients.

    Raises RunError: the folder is neither a run nor a comparison, a file is damaged, or the report cannot be written.
    """
    folder, page = Path(folder), page_of(Path(folder))
    shown, answered = cases(page["answers"], answers)
    page["samples"] = page.get("samples", {}) if answers else {}
    page |= {"cases": shown, "answered": answered, "scales": _scales(page["scores"]), "open_strata": OPEN_STRATA}
    page["review"] = stored_object(folder / REVIEWED, ("pair", "agreement", "scores", "notes", *_NEEDED))
    functions = (direction, estimate_text, metric_label, number_text, p_text, plain)
    html = render("page.html.jinja", **page, **{function.__name__: function for function in functions})
    write_atomically(folder / REPORT, html)
    return Report(folder / REPORT, len(shown) + len(page["samples"]), tuple(page["missing"]))


def rows_text(rows: list[dict[str, Any]], template: str = "rows.txt.jinja", **about: Any) -> str:
    """Rows of `training_rows` as a page, or for a terminal with ⟦ and ⟧ around tokens that carry loss."""
    return render(template, rows=rows, severities=SEVERITIES, direction=direction, **about)


def render(template: str, **facts: Any) -> str:
    """A filled template. A page is escaped; its policy allows its own style and script only."""
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
    """Variables of the page of a run or a comparison; a RunError if the folder is neither."""
    if (folder / COMPARISON).is_file():
        return _comparison_page(folder)
    if (folder / "recipe.yaml").is_file():
        return _run_page(folder)
    raise RunError(f"There is no run and no comparison in {folder}; name a folder of `sevpeft train` or `compare`.")


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
        "missing": [] if by_arm else ["The runs have no answers (compared with --nll-only, or moved)."],
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
    for metric, by_arm in (pair for summary in scores.values() for pair in summary["metrics"].items()):
        # Without the base model, whose large differences would hide all others.
        trained = (one for arm, mean in by_arm.items() if arm != "base" for one in mean["against"].values())
        ends = [abs(one[end]) for one in trained for end in ("low", "high", "value") if one[end] is not None]
        scales[metric] = max([*ends, scales.get(metric, 1e-12)])
    return scales


def _loss_curves(folder: Path) -> list[dict[str, Any]]:
    """Validation and training losses of a run, as points in a square of 100 by 100, with the ends of the axes."""
    log, plots = stored_lines(folder / "log.jsonl"), list[dict[str, Any]]()
    for kind, prefix in (("Validation", "eval_loss"), ("Training", "loss")):
        curves = {}
        for name in ("all", *reversed(SEVERITIES)):
            # If a resumed run repeated a step, its later loss.
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
        plots.append({"run": folder.name, "kind": kind, "lines": lines, **ends})
    return plots


def _answers(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm → id → line of predictions.jsonl; its key "judgement" is the line of judgements.jsonl, if there is one."""
    by_arm: dict[str, dict[str, dict[str, Any]]] = {}
    for line in stored_lines(folder / "predictions.jsonl"):
        by_arm.setdefault(line["arm"], {}).setdefault(line["id"], line)
    for line in stored_lines(folder / "judgements.jsonl"):
        if answer := by_arm.get(line["arm"], {}).get(line["id"]):
            answer.setdefault("judgement", line)
    return by_arm


def stored_object(path: Path, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object; empty if the file does not exist."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or any(name not in content for name in needed):
            raise ValueError("incomplete")
    except ValueError:
        raise RunError(f"{path} is damaged or incomplete; write it again with its command, then report.") from None
    return content


def stored_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines; empty if it does not exist. An incomplete last line is dropped."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1].decode(errors="replace")
    return [line for _, line in json_lines(whole.split("\n"), str(path))]


# Questions with the answers of all arms side by side. Words that the severity and safety lexicons matched are marked,
# so that a reader sees what the lexicons missed. The sample is drawn without regard to any score, and the arms are
# joined by the id of the question, never by position.


def cases(answers: Answers, limit: int, seed: int = 0) -> tuple[list[dict[str, Any]], int]:
    """At most `limit` questions that every arm answered, in the form of the template, and the number of all of them.

    Drawn at random, the same number of each severity if possible. Critical questions come first; within a severity they
    are in the order of the file. The reference is the last answer.
    """
    shared = set.intersection(*(set(by_id) for by_id in answers.values())) if answers else set()
    by_severity: dict[str, list[str]] = {name: [] for name in (*reversed(SEVERITIES), UNKNOWN)}
    for identity, row in next(iter(answers.values()), {}).items():
        if identity in shared:
            by_severity[_severity(row)].append(identity)
    drawing = random.Random(seed)
    in_turn = chain.from_iterable(zip_longest(*(drawing.sample(ids, len(ids)) for ids in by_severity.values())))
    drawn = set(islice((identity for identity in in_turn if identity is not None), limit))
    shown = [_case(answers, identity) for ids in by_severity.values() for identity in ids if identity in drawn]
    return shown, len(shared)


def _case(answers: Answers, identity: str) -> dict[str, Any]:
    row = next(iter(answers.values()))[identity]
    question, reference = str(row["question"]), str(row["reference"])
    lines = {arm: by_id[identity] for arm, by_id in answers.items()} | {"reference": {"prediction": reference}}
    texts = [str(line["prediction"]) for line in lines.values()]
    repeated = {"references": [reference] * len(texts), "questions": [question] * len(texts)}
    findings = safety_findings(texts, **repeated, critical=[_severity(row) == SEVERITIES[-1]] * len(texts))
    return {
        "identity": identity,
        "severity": _severity(row),
        "question": marked(question),
        "direction": direction(question),
        "answers": [
            {"arm": arm, "text": text, "direction": direction(text), "hits": finding.hits}
            | {name: line.get(name) for name in ("truncated", "judgement")}
            for (arm, line), text, finding in zip(lines.items(), texts, findings, strict=True)
        ],
    }


def direction(text: str) -> str:
    """ "rtl" unless most letters are Latin. A browser decides by the first letter only: "COVID-19 هل هو خطير"."""
    return "ltr" if len(_LATIN.findall(text)) > len(ARABIC.findall(text)) else "rtl"


def marked(question: str) -> list[tuple[str, Match | None]]:
    """Pieces of the question, which joined are the question, each with its match of the severity rules.

    A word in several matches gets the worst stated level, or else the worst negated, past or other person's one.
    """
    marks: dict[int, Match] = {}
    for match in rules().matches(question):  # the worst level first
        for position in match.positions:
            if position not in marks or (marks[position].discounted and not match.discounted):
                marks[position] = match
    tokens, matches = _TOKENS.findall(question), list[Match | None]()
    position, last = 0, -1
    for at, token in enumerate(tokens):
        # Words are counted as by the rules: punctuation is no word, a negation around its verb is two.
        count = len(read(token).words)
        here = [marks[word] for word in range(position, position + count) if word in marks]
        matches.append(min(here, key=lambda match: (match.discounted, -SEVERITIES.index(match.level)), default=None))
        if count and last >= 0 and matches[last] is matches[at]:  # blanks and punctuation between belong to the match
            matches[last:at] = [matches[at]] * (at - last)
        position, last = position + count, at if count else last
    pieces = (list(piece) for _, piece in groupby(zip(tokens, matches, strict=True), key=lambda pair: id(pair[1])))
    return [("".join(token for token, _ in piece), piece[0][1]) for piece in pieces]


def _severity(row: Mapping[str, Any]) -> str:
    return row["severity"] if row.get("severity") in SEVERITIES else UNKNOWN
