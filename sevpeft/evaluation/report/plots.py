"""Pictures of a report: SVG inside the page, whose text is text and whose colors follow the reader's.

matplotlib draws with fixed colors. Each stands for a variable of the page's style and is exchanged for it, so that one
picture serves a light screen, a dark one and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from sevpeft.evaluation.report.tables import metric_label, plain
from sevpeft.evaluation.statistics import ARROWS
from sevpeft.severity.probabilities import SEVERITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, LINE, CRITICAL, NEUTRAL, MILD = "#101010", "#d0d0d1", "#b3261f", "#b8690f", "#2b7a3e"
_VARIABLES = {INK: "ink", LINE: "line", CRITICAL: "critical", NEUTRAL: "neutral", MILD: "non-critical"}
_OF_SEVERITY = {"all": INK, **dict(zip(SEVERITIES, (MILD, NEUTRAL, CRITICAL), strict=True))}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sevpeft",
    "text.parse_math": False,
    # Only for the width that matplotlib reserves; the page sets its own font.
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    """A picture with its caption; the title also is what a screen reader says."""

    title: str
    caption: str
    svg: Markup


def loss_curves(log: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Validation loss by severity from the entries of log.jsonl, where there are two points or more."""
    curves = {}
    for name in ("all", *reversed(SEVERITIES)):
        key = "eval_loss" if name == "all" else f"eval_loss_{name}"
        # Of a step that a resumed run took twice, the later.
        points = {entry["step"]: entry[key] for entry in log if isinstance(entry.get(key), int | float)}
        if len(points) > 1:
            curves[name] = sorted(points.items())

    def draw(axes: Axes) -> None:
        for name, points in curves.items():
            steps, losses = zip(*points, strict=True)
            label, color = name.replace("_", "-"), _OF_SEVERITY[name]
            axes.plot(steps, losses, color=color, linewidth=1.6, marker="o", markersize=3, label=label)
        axes.set(xlabel="optimizer step", ylabel="nats a token")
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))

    caption = (
        "Validation loss, unweighted, by severity. A lower loss is not a better answer. More points: "
        "training.eval_strategy=steps, training.eval_steps."
    )
    return [Plot("Validation loss", caption, _svg(draw, "Validation loss"))] if curves else []


def forest(title: str, differences: Mapping[str, Any], metric: Mapping[str, Any]) -> list[Plot]:
    """Differences (label → as `Comparison.as_dict` gives it) with their intervals, and the line of no difference."""
    bars = [
        (f"{label} {ARROWS[one['better']]}".rstrip(), one)
        for label, one in differences.items()
        if one and None not in (one["value"], one["low"], one["high"])
    ]

    def draw(axes: Axes) -> None:
        for at, (_, one) in enumerate(bars):
            value, low, high = (one[name] * metric["shown_times"] for name in ("value", "low", "high"))
            color = {"better": MILD, "worse": CRITICAL}.get(one["outcome"], INK)
            axes.plot([low, high], [at, at], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot([value], [at], color=color, marker="o", markersize=5)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)  # more touch each other on a phone
        axes.set_xlabel(metric_label(metric))

    if not bars:
        return []
    caption = "Point and interval; dashed: no difference. ↑ higher, ↓ lower is better there. Colored where p < .05."
    return [Plot(title, caption, _svg(draw, title, height=0.8 + 0.26 * max(3, len(bars))))]


def differences_to_base(content: Mapping[str, Any]) -> list[Plot]:
    """Of an evaluation, a picture a score: the adapter against its base model in every stratum."""
    return [
        plot
        for name, metric in content["metrics"].items()
        for plot in forest(
            f"Adapter − base model: {metric['label']}",
            {plain(of): found["metrics"].get(name, {}).get("difference") for of, found in content["scores"].items()},
            metric,
        )
    ]


def differences_of_arms(recipe: Mapping[str, Any], content: Mapping[str, Any], title: str) -> list[Plot]:
    """Of a comparison's recipe, the score of the verdict: every arm against its references, critical cases and all."""
    primary = content["primary"]["metric"]
    metric = content["metrics"][primary]
    plots = []
    for stratum in (content["primary"]["stratum"], "all"):
        by_arm = recipe["scores"][stratum]["metrics"][primary]
        pairs = {
            f"{arm} − {reference}": one for arm in content["arms"] for reference, one in by_arm[arm]["against"].items()
        }
        plots += forest(f"{title}Differences in {metric['label']}, {plain(stratum)}", pairs, metric)
    return plots


def _svg(draw: Callable[[Axes], None], title: str, height: float = 3.0) -> Markup:
    # No pyplot: it would look for a display and keep every figure alive.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        drawn = io.StringIO()
        canvas.print_svg(drawn, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = drawn.getvalue()
    # The drawing alone, without what only a file of its own needs, its names kept apart from other drawings'.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    own = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'\bid="', f'id="{own}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{own}-", svg)
    svg = re.sub(r'^(<svg [^>]*?)(?:width|height)="[^"]*"([^>]*?)(?:width|height)="[^"]*"', r"\1\2", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))
