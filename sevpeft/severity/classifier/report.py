"""From evaluations to what people and programs read: tables of at most 80 columns, and the content of metrics.json.

An accuracy never stands without its baselines here: both are columns of one table, and an `Evaluation` without a
baseline cannot be made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sevpeft.severity.classifier.crossvalidation import Evaluation
from sevpeft.severity.classifier.judging import CRITICAL, FIGURES, Estimate, Judgement, Threshold
from sevpeft.severity.probabilities import SEVERITIES

if TYPE_CHECKING:
    from rich.table import Table

WORDS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "recall_critical": "recall critical",
    "precision_critical": "precision crit.",
    "auc_critical": "AUC critical",
    "brier": "Brier score",
    "ece_critical": "ECE critical",
    "ece_top": "ECE likeliest",
}
RECALLS = (0.5, 0.6, 0.7, 0.8, 0.9)


def as_json(content: Any) -> Any:
    """Dataclasses as objects and what is not a number as null, for metrics.json."""
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        content = dataclasses.asdict(content)
    if isinstance(content, dict):
        return {name: as_json(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [as_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def figures_table(evaluation: Evaluation) -> Table:
    """Every figure with its interval, before calibration, and of every baseline."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left", title=title(evaluation))
    table.add_column("")
    table.add_column("calibrated, 95 %", justify="right", no_wrap=True)
    table.add_column("before", justify="right")
    for name in evaluation.baselines:
        table.add_column(name.replace(" ", "\n"), justify="right")
    for name in FIGURES:
        others = [evaluation.raw, *evaluation.baselines.values()]
        table.add_row(WORDS[name], interval(evaluation.calibrated.figures[name]), *(_number(o, name) for o in others))
    return table


def confusion_table(judgement: Judgement) -> Table:
    """Rows that have a severity, by their likeliest one."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left", title="Confusion")
    table.add_column("is")
    for name in SEVERITIES:
        table.add_column(f"likeliest\n{name}", justify="right")
    for name, counts in zip(SEVERITIES, judgement.confusion, strict=True):
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def tradeoff_table(curve: Sequence[Threshold], of: str = "critical") -> Table:
    """What it costs to catch a given share: points of the curve that is drawn in precision_recall.png."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left", title=f"Catching {of}")
    for heading in ("p_critical from", "flagged", "recall, 95 %", "precision, 95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in chosen_points(curve):
        table.add_row(
            f"{point.threshold:.3f}", f"{point.flagged:.0%}", interval(point.recall), interval(point.precision)
        )
    return table


def blocks_table(evaluation: Evaluation) -> Table | None:
    """Each judged block alone: figures pooled over blocks mix what is in a block with which block it is."""
    from rich import box
    from rich.table import Table

    if len(evaluation.blocks) < 2:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left", title="By block")
    for heading in ("block", "rows", "critical", "accuracy, 95 %", "AUC critical, 95 %"):
        table.add_column(heading, justify="left" if heading == "block" else "right", overflow="ellipsis", no_wrap=True)
    for name, judgement in evaluation.blocks.items():
        figures = (interval(judgement.figures[figure]) for figure in ("accuracy", "auc_critical"))
        table.add_row(name[:20], f"{judgement.rows:,}", f"{judgement.labels['critical']:,}", *figures)
    return table


def remarks(evaluation: Evaluation) -> list[str]:
    """What a reader of the table should not miss, one sentence each."""
    judged = evaluation.calibrated
    said = [
        f"With this many rows a perfectly calibrated classifier has an ECE of {judged.ece_critical_if_perfect:.3f} "
        f"(critical) and {judged.ece_top_if_perfect:.3f} (likeliest)."
    ]
    accuracy = judged.figures["accuracy"]
    best = max(evaluation.baselines, key=lambda name: evaluation.baselines[name].figures["accuracy"].value)
    if accuracy.low <= evaluation.baselines[best].figures["accuracy"].value:
        said.append(f"The accuracy is not clearly above what needs no reading (baseline {best}).")
    area = judged.figures["auc_critical"]
    if area.low <= 0.5:
        said.append("It is not clear that it tells critical rows from others at all (AUC down to 0.5).")
    if not any(row[CRITICAL] for row in judged.confusion):
        said.append(
            "No row's likeliest severity is critical: choose a threshold of p_critical from the table, or weight by "
            "the probabilities, as training does."
        )
    if evaluation.dropped:
        said.append(f"{evaluation.dropped:,} rows were not trained on, because judged rows ask the same.")
    return said


def render(evaluation: Evaluation) -> list[Any]:
    """Everything about one evaluation, to be printed one after the other."""
    from rich.text import Text

    parts = [
        figures_table(evaluation),
        *(Text(said, style="dim") for said in remarks(evaluation)),
        "",
        confusion_table(evaluation.calibrated),
        tradeoff_table(evaluation.calibrated.curve),
    ]
    blocks = blocks_table(evaluation)
    return [*parts, blocks] if blocks is not None else parts


def title(evaluation: Evaluation) -> str:
    judged = evaluation.calibrated
    counts = ", ".join(f"{count:,} {name}" for name, count in judged.labels.items())
    return f"Judged on {evaluation.protocol}\n{judged.rows:,} rows, {judged.groups:,} questions: {counts}"


def chosen_points(curve: Sequence[Threshold]) -> list[Threshold]:
    """For each of `RECALLS` the highest threshold that reaches it, each point once."""
    points: list[Threshold] = []
    for recall in RECALLS:
        reaching = [point for point in curve if point.recall.value >= recall]
        if reaching and reaching[-1] not in points:
            points.append(reaching[-1])
    return points


def interval(estimate: Estimate) -> str:
    """0.482 [0.451, 0.509], or a dash where there is no such figure."""
    if not math.isfinite(estimate.value):
        return "–"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _number(judgement: Judgement, figure: str) -> str:
    value = judgement.figures[figure].value
    return f"{value:.3f}" if math.isfinite(value) else "–"
