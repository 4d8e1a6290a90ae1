"""The README.md of a classifier's folder: what it was made of, how good it is beside its baselines, and its limits.

A card is published: no row of the data, no path and no name of a person or machine stands in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sevpeft.severity.classifier.crossvalidation import Evaluation
from sevpeft.severity.classifier.judging import FIGURES
from sevpeft.severity.classifier.plots import RELIABILITY, TRADEOFF
from sevpeft.severity.classifier.report import WORDS, chosen_points, interval, remarks

_HEAD = """\
---
language: ar
library_name: sevpeft
pipeline_tag: text-classification
tags: [medical, arabic, severity, sevpeft]
---

# Severity of Arabic medical questions: {kind} classifier

Gives each question the probabilities of being {labels}.
They weight the loss of a training; they were not made to tell a patient anything.

> **Not a medical device.** It misses critical questions (see recall) and raises alarm for others. No person may be sent
> away, or made to wait, because of what it says.
"""

_LIMITS = """\
## Limits

- The labels are those of the data above: what its annotators called critical, with their mistakes.
- Figures hold for questions like the judged ones. Other forums, dialects and years have other shares of severe cases,
  and calibration follows the shares: judge it on your own rows (`sevpeft classifier evaluate DATA --classifier DIR`).
- The n-grams that it knows are words, parts and pairs of words that stand in two training questions or more: where
  those were not masked, some are names of patients. Its files are their owner's alone; mask the names (`sevpeft
  prepare`) and fit it again before you share it.
- Random splits flatter where a file's labels depend on the place in it; the row-number baseline shows by how much, and
  only a block-held-out judgement (`--block-column`) leaves it out.
"""


def card(
    about: Mapping[str, Any], training: Mapping[str, Any], evaluations: Mapping[str, Evaluation], *, version: str
) -> str:
    """Markdown text.

    Args:
        about: kind, labels and calibration, as in classifier.json.
        training: of `training_record`.
        evaluations: heading → evaluation, each with its baselines.
        version: of the classifier.
    """
    labels = about["labels"]
    parts = [
        _HEAD.format(kind=about["kind"], labels=f"{', '.join(labels[:-1])} and {labels[-1]}"),
        _data(training),
        *(_evaluation(heading, evaluation) for heading, evaluation in evaluations.items()),
        f"![Reliability]({RELIABILITY})\n\n![Recall and precision of critical]({TRADEOFF})\n",
        _LIMITS,
        f"## Version\n\n`{version}`; calibration: {_calibration(about['calibration'])}\n",
    ]
    return "\n".join(parts)


def _data(training: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count:,} {name}" for name, count in training["labels"].items())
    lines = [
        "## Data\n",
        f"- {training['rows']:,} rows, {training['questions']:,} distinct questions: {counts}",
        f"- dealt by question into rows to {_parts(training['calibration_on'])}; seed {training['seed']}",
        *(f"- fingerprint `{fingerprint}`" for fingerprint in training["fingerprints"]),
    ]
    if training.get("encoder"):
        lines.append(f"- encoder `{training['encoder']}`")
    return "\n".join(lines) + "\n"


def _parts(calibration_on: str) -> str:
    if calibration_on == "folds":
        return "fit on and to judge on; calibrated on the former, each by a fit that did not see its question"
    return f"fit on, to calibrate on ({calibration_on}) and to judge on"


def _evaluation(heading: str, evaluation: Evaluation) -> str:
    judged = evaluation.calibrated
    names = ["calibrated, 95 % interval", "before calibration", *evaluation.baselines]
    lines = [
        f"## {heading}\n",
        f"{judged.rows:,} rows, {evaluation.protocol}; intervals by bootstrap over questions.\n",
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for figure in FIGURES:
        others = [j.figures[figure].value for j in (evaluation.raw, *evaluation.baselines.values())]
        cells = [interval(judged.figures[figure]), *(f"{value:.3f}" for value in others)]
        lines.append(f"| {WORDS[figure]} | {' | '.join(cells)} |")
    lines += ["", *(f"- {said}" for said in remarks(evaluation)), ""]
    if len(evaluation.blocks) > 1:
        lines += ["| block | rows | AUC critical |", "|---|---|---|"]
        for name, judgement in evaluation.blocks.items():
            lines.append(f"| {name[:40]} | {judgement.rows:,} | {interval(judgement.figures['auc_critical'])} |")
        lines.append("")
    lines += ["| p_critical from | flagged | recall of critical | precision |", "|---|---|---|---|"]
    for point in chosen_points(judged.curve):
        rates = f"{interval(point.recall)} | {interval(point.precision)}"
        lines.append(f"| {point.threshold:.3f} | {point.flagged:.0%} | {rates} |")
    return "\n".join(lines) + "\n"


def _calibration(calibration: Mapping[str, Any]) -> str:
    temperature = f"temperature {calibration['temperature']:.3f}" if "temperature" in calibration else ""
    if "bias" in calibration:
        return f"{temperature}, bias {', '.join(f'{name} {b:+.3f}' for name, b in calibration['bias'].items())}"
    return temperature or str(calibration["method"])
