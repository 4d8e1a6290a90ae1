"""Which pictures a run or a comparison has, each with what a reader has to know to read it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sevpeft.evaluation.report.plots import Bar, Plot, forest, lengths, loss_curves, reliability, weight_histogram
from sevpeft.evaluation.report.reading import ComparisonContent, RunContent
from sevpeft.evaluation.report.tables import ARROWS, metric_label, plain
from sevpeft.severity.probabilities import SEVERITIES

_LOSSES = {"all": "eval_loss", **{name: f"eval_loss_{name}" for name in reversed(SEVERITIES)}}
_INTERVALS = "Point and interval; dashed: no difference. ↑ higher, ↓ lower is better there. Colored where p < .05."


def run_pictures(run: RunContent) -> list[Plot]:
    """Of one run: loss, weights, reliability, differences to the base model, lengths; those there is something for."""
    plots = []
    curves = {name: points for name, key in _LOSSES.items() if len(points := _points(run.log, key)) > 1}
    if curves:
        caption = (
            "Validation loss, unweighted, by severity. A lower loss is not a better answer. More points: "
            "training.eval_strategy=steps, training.eval_steps."
        )
        plots.append(loss_curves(curves, "Validation loss", caption))
    if histogram := run.metrics.get("weights", {}).get("histogram"):
        weights = run.metrics["weights"]
        caption = (
            f"Mean {weights['mean']:.3f}, effective sample size {weights['effective_sample_size']:,.0f} of "
            f"{weights['consultations']:,}. Weights close together would train what plain cross-entropy trains."
        )
        plots.append(weight_histogram(histogram, caption))
    plots += _reliability(run)
    if run.evaluation is not None:
        plots += _differences_to_base(run.evaluation)
    return plots + _lengths(run.answers, "")


def comparison_pictures(found: ComparisonContent) -> dict[str, list[Plot]]:
    """Recipe → its differences, validation loss of critical cases by arm, and lengths."""
    pictures = {}
    several = len(found.content["recipes"]) > 1
    for name, recipe in found.content["recipes"].items():
        title = f"{name}: " if several else ""
        plots = _differences_of_arms(recipe, found.content, title)
        runs = found.runs.get(name, {})
        key = _LOSSES[SEVERITIES[-1]]
        curves = {
            arm: points for arm, run in runs.items() if arm != "base" and len(points := _points(run.log, key)) > 1
        }
        if curves:
            caption = "Validation loss of critical cases, unweighted, of each arm's first seed."
            plots.append(loss_curves(curves, f"{title}Validation loss of critical cases", caption))
        pictures[name] = plots + _lengths(arm_answers(runs), title)
    return pictures


def arm_answers(runs: Mapping[str, RunContent]) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm → id → answer: the base model's from its column, all others from that of their adapter."""
    found = {arm: run.answers.get("base" if arm == "base" else "adapter", {}) for arm, run in runs.items()}
    return {arm: by_id for arm, by_id in found.items() if by_id}


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) in the order of the steps; of a step that a resumed run took twice, the later."""
    found = {entry["step"]: entry[key] for entry in log if isinstance(entry.get(key), int | float)}
    return [(float(step), float(found[step])) for step in sorted(found) if math.isfinite(found[step])]


def _reliability(run: RunContent) -> list[Plot]:
    """Of the classifier that gave the severities, when its folder still holds what it was judged on."""
    folder = run.recipe.severity.classifier
    if run.recipe.severity.source == "columns" or folder is None:
        return []
    try:
        content = json.loads((Path(folder).expanduser() / "metrics.json").read_text(encoding="utf-8"))
        heading, judged = next(iter(content["evaluations"].items()))
        bins = {"calibrated": judged["calibrated"]["reliability"], "before": judged["raw"]["reliability"]}
        rows = judged["calibrated"]["rows"]
    except (OSError, ValueError, KeyError, StopIteration):
        return []
    if not all(bins.values()):
        return []
    caption = f"Of the classifier {run.recipe.severity.source}, on {rows:,} rows ({heading.lower()}) of its own report."
    return [reliability(bins, caption)]


def _differences_to_base(content: Mapping[str, Any]) -> list[Plot]:
    plots = []
    for name, metric in content["metrics"].items():
        bars = [
            bar
            for stratum, found in content["scores"].items()
            if (bar := _bar(plain(stratum), found["metrics"].get(name, {}).get("difference"), metric)) is not None
        ]
        if bars:
            caption = f"Adapter − base model. {_INTERVALS}"
            plots.append(forest(bars, f"Difference: {metric['label']}", caption, metric_label(metric)))
    return plots


def _differences_of_arms(recipe: Mapping[str, Any], content: Mapping[str, Any], title: str) -> list[Plot]:
    primary = content["primary"]["metric"]
    metric = content["metrics"][primary]
    plots = []
    for stratum in dict.fromkeys((content["primary"]["stratum"], "all")):
        by = recipe["scores"].get(stratum, {}).get("metrics", {}).get(primary, {})
        bars = [
            bar
            for arm in content["arms"]
            for reference, difference in by.get(arm, {}).get("against", {}).items()
            if (bar := _bar(f"{arm} − {reference}", difference, metric)) is not None
        ]
        if bars:
            heading = f"{title}Differences in {metric['label']}, {plain(stratum)}"
            plots.append(forest(bars, heading, _INTERVALS, metric_label(metric)))
    return plots


def _bar(label: str, found: Mapping[str, Any] | None, metric: Mapping[str, Any]) -> Bar | None:
    if not found or any(found.get(name) is None for name in ("value", "low", "high")):
        return None
    value, low, high = (found[name] * metric.get("shown_times", 1) for name in ("value", "low", "high"))
    return Bar(f"{label} {ARROWS[found['better']]}".rstrip(), value, low, high, str(found["outcome"]))


def _lengths(answers: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str) -> list[Plot]:
    if not answers:
        return []
    words = {arm: [len(str(row["prediction"]).split()) for row in by_id.values()] for arm, by_id in answers.items()}
    first = next(iter(answers.values()))
    words["reference"] = [len(str(row["reference"]).split()) for row in first.values()]
    told = "; ".join(
        f"{arm} {sum(bool(row.get('truncated')) for row in by_id.values()) / len(by_id):.0%}"
        for arm, by_id in answers.items()
    )
    caption = f"Cut off at the cap on length: {told}."
    return [lengths(words, caption, f"{title}Length of the answers")]
