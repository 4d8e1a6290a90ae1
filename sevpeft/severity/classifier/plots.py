"""Two pictures of an evaluation: whether p_critical means what it says, and what catching critical rows costs."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sevpeft.runs import plain_disk_errors
from sevpeft.severity.classifier.crossvalidation import Evaluation
from sevpeft.severity.classifier.judging import Bin, Threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RELIABILITY, TRADEOFF = "reliability.png", "precision_recall.png"
_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c8641b", "#8a8a8a"


def draw(evaluations: Mapping[str, Evaluation], folder: Path) -> None:
    """Writes both pictures into a folder, a panel for each evaluation (heading → evaluation)."""
    figure, panels = _panels(len(evaluations))
    for panel, (heading, evaluation) in zip(panels, evaluations.items(), strict=True):
        _reliability(panel, evaluation)
        panel.set_title(heading, fontsize=10)
    _write(figure, folder / RELIABILITY)
    figure, panels = _panels(len(evaluations))
    for panel, (heading, evaluation) in zip(panels, evaluations.items(), strict=True):
        share = evaluation.calibrated.labels["critical"] / evaluation.calibrated.rows
        _tradeoff(panel, evaluation.calibrated.curve, share, "critical")
        panel.set_title(heading, fontsize=10)
    _write(figure, folder / TRADEOFF)


def draw_tradeoff(curve: Sequence[Threshold], share: float, of: str, folder: Path) -> None:
    """Writes the trade-off alone, for data that has a yes or no instead of severities."""
    figure, panels = _panels(1)
    _tradeoff(panels[0], curve, share, of)
    _write(figure, folder / TRADEOFF)


def _reliability(panel: Axes, evaluation: Evaluation) -> None:
    bins = [*evaluation.calibrated.reliability, *evaluation.raw.reliability]
    end = min(1.0, 0.02 + max(max(one.said, one.came + _standard_error(one)) for one in bins))
    panel.plot([0, end], [0, end], color=_GREY, linewidth=1, label="perfect")
    for label, judgement, colour, marker in (
        ("before", evaluation.raw, _ORANGE, "s"),
        ("calibrated", evaluation.calibrated, _BLUE, "o"),
    ):
        said, came = [one.said for one in judgement.reliability], [one.came for one in judgement.reliability]
        ece = judgement.figures["ece_critical"].value
        errors = [_standard_error(one) for one in judgement.reliability] if label == "calibrated" else None
        panel.errorbar(
            said, came, yerr=errors, color=colour, marker=marker, markersize=4, linewidth=1,
            elinewidth=0.8, capsize=2, label=f"{label}, ECE {ece:.3f}",
        )  # fmt: skip
    panel.set(xlabel="mean p_critical of the bin", ylabel="share that is critical", xlim=(0, end), ylim=(0, end))
    panel.legend(fontsize=8, frameon=False, loc="upper left")


def _standard_error(one: Bin) -> float:
    return math.sqrt(one.came * (1 - one.came) / one.rows)


def _tradeoff(panel: Axes, curve: Sequence[Threshold], share: float, of: str) -> None:
    defined = [point for point in curve if math.isfinite(point.precision.value)]
    recall = [point.recall.value for point in defined]
    panel.fill_between(
        recall,
        [point.precision.low for point in defined],
        [point.precision.high for point in defined],
        color=_BLUE,
        alpha=0.18,
        linewidth=0,
        label="95 % interval",
    )
    panel.plot(recall, [point.precision.value for point in defined], color=_BLUE, linewidth=1.5, label="by p_critical")
    panel.axhline(share, color=_GREY, linewidth=1, linestyle="--", label=f"by chance ({share:.2f})")
    panel.set(xlabel=f"recall of {of}", ylabel=f"precision of {of}", xlim=(0, 1), ylim=(0, 1))
    panel.legend(fontsize=8, frameon=False, loc="upper right")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    # No pyplot: it would look for a display and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * count, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, count, number) for number in range(1, count + 1)]


def _write(figure: Figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130, metadata={"Software": None})
    with plain_disk_errors(path, when_full="free some, then run this again"):
        path.write_bytes(drawn.getvalue())
