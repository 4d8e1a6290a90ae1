"""Pictures of a report: SVG inside the page, whose text is text and whose colors follow the reader's.

matplotlib draws with fixed colors. Each stands for a variable of the page's style and is exchanged for it, so that one
picture serves a light screen, a dark one and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sevpeft.evaluation.statistics import ARROWS
from sevpeft.evaluation.tables import metric_label
from sevpeft.severity.probabilities import SEVERITIES

INK, LINE, CRITICAL, NEUTRAL, MILD = "#101010", "#d0d0d1", "#b3261f", "#b8690f", "#2b7a3e"
_VARIABLES = {INK: "ink", LINE: "line", CRITICAL: "critical", NEUTRAL: "neutral", MILD: "non-critical"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sevpeft",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # for the width that matplotlib reserves; the page sets its own font
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), LINE),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "axes.grid": True,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
}
Plot = dict[str, str]
"""A picture: title (also what a screen reader says), caption and svg."""


def loss_curves(log: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Validation loss by severity from the entries of log.jsonl, where there are two points or more."""
    keys = ("eval_loss", *(f"eval_loss_{name}" for name in SEVERITIES))
    colors = dict(zip(keys, (INK, MILD, NEUTRAL, CRITICAL), strict=True))
    curves = {}
    for key in colors:
        # Of a step that a resumed run took twice, the later.
        points = {entry["step"]: entry[key] for entry in log if isinstance(entry.get(key), int | float)}
        if len(points) > 1:
            curves[key] = sorted(points.items())

    def draw(axes: Axes) -> None:
        for key, points in curves.items():
            label = key.removeprefix("eval_loss").strip("_").replace("_", "-") or "all"
            axes.plot(
                *zip(*points, strict=True), color=colors[key], linewidth=1.6, marker="o", markersize=3, label=label
            )
        axes.set(xlabel="optimizer step", ylabel="nats a token")
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))

    caption = (
        "Validation loss, unweighted, by severity. A lower loss is not a better answer. More points: "
        "training.eval_strategy=steps, training.eval_steps."
    )
    return [_plot("Validation loss", caption, draw)] if curves else []


def forest(title: str, differences: Mapping[str, Any], metric: Mapping[str, Any]) -> list[Plot]:
    """Differences (label → as `compare_family` gives it) with their intervals, and the line of no difference."""
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

    caption = "Point and interval; dashed: no difference. ↑ higher, ↓ lower is better there. Colored where p < .05."
    return [_plot(title, caption, draw, height=0.8 + 0.26 * max(3, len(bars)))] if bars else []


def _plot(title: str, caption: str, draw: Callable[[Axes], None], height: float = 3.0) -> Plot:
    drawn = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        # No pyplot: it would look for a display and keep every figure alive.
        figure = Figure(figsize=(4.4, height), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        canvas.print_svg(drawn, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = drawn.getvalue()
    # The drawing alone, without what only a file of its own needs, its names kept apart from other drawings'.
    svg = re.sub(r'<metadata>.*?</metadata>|\sxmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :], flags=re.DOTALL)
    own = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{own}-", svg)
    svg = re.sub(r'^(<svg [^>]*?)(?:width|height)="[^"]*"([^>]*?)(?:width|height)="[^"]*"', r"\1\2", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return {"title": title, "caption": caption, "svg": Markup(svg)}
