"""From the files of a run folder or a comparison folder to what a report can show of them.

Everything but the recipe may be absent, because a report is most wanted when something is unfinished. What is there
but cannot be read is refused by its name: a report that silently leaves a table out would flatter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sevpeft.errors import RunError
from sevpeft.recipe import Recipe, load_recipe

COMPARISON = "comparison.json"
_OF_AN_ANSWER = ("arm", "id", "question", "reference", "prediction")
_OF_A_JUDGEMENT = ("arm", "id", "ratings", "reason")
# What stands in metrics.json once a training is finished.
FINISHED = "after"


@dataclass(frozen=True)
class RunContent:
    """What a run folder holds.

    Attributes:
        log: entries of log.jsonl in their order.
        evaluation: of evaluation.json, None when the run was not evaluated.
        answers: arm → id → line of predictions.jsonl, both in the order of the file; under "judgement" the line of
            judgements.jsonl, where a judge rated the answer.
    """

    folder: Path
    recipe: Recipe
    metrics: dict[str, Any]
    environment: dict[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    answers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparisonContent:
    """What a comparison folder holds.

    Attributes:
        content: of comparison.json.
        runs: recipe → arm → its first run, where the folder still holds it.
    """

    folder: Path
    content: dict[str, Any]
    runs: dict[str, dict[str, RunContent]]


def read_content(folder: Path) -> RunContent | ComparisonContent:
    """What a folder holds.

    Raises:
        RunError: it holds neither a run nor a comparison, or a file of it is damaged.
    """
    if (folder / COMPARISON).is_file():
        return _comparison(folder)
    if (folder / "recipe.yaml").is_file():
        return _run(folder)
    raise RunError(
        f"There is no run and no comparison in {folder}; name a folder that `sevpeft train` or `sevpeft compare` made."
    )


def _comparison(folder: Path) -> ComparisonContent:
    content = _object(folder / COMPARISON, ("arms", "seeds", "primary", "metrics", "methods", "verdict", "recipes"))
    runs: dict[str, dict[str, RunContent]] = {}
    for name, recipe in content["recipes"].items():
        for arm, places in recipe.get("runs", {}).items():
            for place in places[:1]:
                if (folder / place / "recipe.yaml").is_file():
                    runs.setdefault(name, {})[arm] = _run(folder / place)
    return ComparisonContent(folder, content, runs)


def _run(folder: Path) -> RunContent:
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for line in _lines(folder / "predictions.jsonl", _OF_AN_ANSWER):
        answers.setdefault(str(line["arm"]), {}).setdefault(str(line["id"]), line)
    for line in _lines(folder / "judgements.jsonl", _OF_A_JUDGEMENT):
        if answer := answers.get(str(line["arm"]), {}).get(str(line["id"])):
            answer.setdefault("judgement", line)
    return RunContent(
        folder,
        load_recipe(folder / "recipe.yaml"),
        _object(folder / "metrics.json"),
        _object(folder / "environment.json"),
        _lines(folder / "log.jsonl", ("step",)),
        _object(folder / "evaluation.json", ("scores", "metrics", "methods", "columns", "notes")) or None,
        answers,
    )


def _object(path: Path, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or any(name not in found for name in needed):
            raise ValueError("incomplete")
    except (OSError, ValueError):
        raise RunError(f"{path} cannot be read; make it anew with the command that wrote it, then report.") from None
    return found


def _lines(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines; empty where there is none. A cut-off last line is work of a killed process."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        raise RunError(f"{path} cannot be read; see its permissions.") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, Mapping) or any(name not in entry for name in needed):
                raise ValueError("incomplete")
        except ValueError:
            if number == len(lines):
                break
            raise RunError(f"Line {number} of {path} cannot be read; take that line out and run this again.") from None
        found.append(dict(entry))
    return found
