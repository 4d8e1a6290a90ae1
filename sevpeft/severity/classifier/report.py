"""Report of an evaluation, as Markdown for the screen and the card, and as JSON for metrics.json.

The card is the README.md of a classifier's folder. It is published: no row of the data, no path and no name of a
person or machine stands in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sevpeft.severity.classifier.evaluate import CRITICAL, FIGURES, ClassifierMetrics, Evaluation
from sevpeft.severity.probabilities import SEVERITIES

_CARD = """\
---
{{ card_data }}
---

# Severity of Arabic medical questions: {{ about.kind }} classifier

Gives each question the probabilities of being non-critical, neutral and critical. They weight the loss of a training;
they were not made to tell a patient anything.

> **Not a medical device.** It misses critical questions (see recall) and raises alarm for others. No person may be sent
> away, or made to wait, because of what it says.

## Data

{{ about.training.rows }} rows, {{ about.training.questions }} distinct questions ({{ labels }});
seed {{ about.training.seed }}.
{%- if about.training.encoder %} Encoder: `{{ about.training.encoder }}`.{% endif %}
{%- for fingerprint in about.training.fingerprints %}
Fingerprint `{{ fingerprint }}`.
{%- endfor %}

{{ evaluations }}

## Limits

- The labels are those of the data above: what its annotators called critical, with their mistakes.
- The figures hold for questions like those of the test rows. Other forums, dialects and years have other shares of
  severe cases, and calibration follows the shares: evaluate it on your own rows
  (`sevpeft classifier evaluate DATA classifier=DIR`).
- A linear classifier stores the words and parts of words that stand in two training questions or more: where those
  were not masked, some are names of patients. Its files are their owner's alone; mask the names (`sevpeft prepare`)
  and fit it again before you share it.
- Random splits flatter where a file's labels depend on the place in it. The row-number baseline shows by how much; only
  an evaluation by block (`block_column=NAME`) leaves it out.

Version `{{ about.version }}`.
"""


def markdown(heading: str, evaluation: Evaluation) -> str:
    """Figures beside those of the baselines, each block alone, and what a reader should not miss."""
    scored, others = evaluation.calibrated, {"before": evaluation.raw, **evaluation.baselines}
    rows = [
        [figure.replace("_", " "), _number(scored, figure), *(_number(other, figure) for other in others.values())]
        for figure in FIGURES
    ]
    parts = [f"## {heading}: {scored.rows:,} rows", _table(["", "calibrated, 95 %", *others], rows)]
    if evaluation.blocks:
        figures = ("accuracy", "auc_critical")
        rows = [
            [name[:20].replace("|", "/"), str(block.rows), *(_number(block, figure) for figure in figures)]
            for name, block in evaluation.blocks.items()
        ]
        parts.append(_table(["block", "rows", "accuracy, 95 %", "auc critical, 95 %"], rows))
    confusion = [[name, *map(str, counts)] for name, counts in zip(SEVERITIES, scored.confusion, strict=True)]
    parts.append(_table(["label ↓ likeliest →", *SEVERITIES], confusion))
    return "\n\n".join([*parts, "\n".join(f"- {remark}" for remark in _remarks(heading, evaluation))])


def write_report(folder: Path, about: Mapping[str, Any], evaluations: Mapping[str, Evaluation]) -> None:
    """Writes metrics.json and the card; `about` is what classifier.json says."""
    from huggingface_hub import ModelCard, ModelCardData

    (folder / "metrics.json").write_text(json.dumps(as_json(about, evaluations), indent=2) + "\n", encoding="utf-8")
    tags = ["medical", "arabic", "severity", "sevpeft"]
    data = ModelCardData(language="ar", library_name="sevpeft", pipeline_tag="text-classification", tags=tags)
    sections = "\n\n".join(markdown(heading, evaluation) for heading, evaluation in evaluations.items())
    labels = ", ".join(f"{count:,} {name}" for name, count in about["training"]["labels"].items())
    card = ModelCard.from_template(data, template_str=_CARD, about=about, labels=labels, evaluations=sections)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def as_json(about: Mapping[str, Any], evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """What is known of the classifier and every figure; what is not a number becomes null."""
    found = json.dumps({heading: asdict(evaluation) for heading, evaluation in evaluations.items()})
    return {**about, "evaluations": json.loads(found, parse_constant=lambda constant: None)}


def _remarks(heading: str, evaluation: Evaluation) -> list[str]:
    scored, baselines = evaluation.calibrated, evaluation.baselines
    remarks = [f"With so many rows, perfect calibration has an ECE (critical) of {scored.ece_critical_by_chance:.3f}."]
    best = max(baselines, key=lambda name: baselines[name].figures["accuracy"].value)
    if scored.figures["accuracy"].low <= baselines[best].figures["accuracy"].value:
        remarks.append(f"The accuracy is not clearly above that of the baseline {best}, which reads no text.")
    if scored.figures["auc_critical"].low <= 0.5:
        remarks.append("It is not clear that critical rows are told from others at all (AUC down to 0.5).")
    if not any(row[CRITICAL] for row in scored.confusion):
        remarks.append("No row's likeliest severity is critical; weight by the probabilities, as training does.")
    if evaluation.unscored is None and heading != "Other data":
        remarks.append(
            "Not evaluated by block. Where rows that stand together were labeled together, these figures flatter; name "
            "the column that tells such parts with block_column=NAME."
        )
    if evaluation.unscored:
        remarks.append(f"Not evaluated on, for lack of a severity: {', '.join(n[:20] for n in evaluation.unscored)}.")
    return remarks


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(metrics: ClassifierMetrics, figure: str) -> str:
    """0.482 [0.451, 0.509], without the interval where none was made, or a dash where there is no such figure."""
    estimate = metrics.figures[figure]
    if not math.isfinite(estimate.value):
        return "–"
    interval = f" [{estimate.low:.3f}, {estimate.high:.3f}]" if math.isfinite(estimate.low) else ""
    return f"{estimate.value:.3f}{interval}"
