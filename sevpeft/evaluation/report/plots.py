"""From numbers to pictures that live inside the page: SVG whose text is text and whose colours follow the reader's.

matplotlib draws with fixed colours; those are exchanged for variables of the page's style, so that one picture serves a
light screen, a dark one and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from sevpeft.severity.probabilities import SEVERITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, LINE, PAPER = "#101010", "#d0d0d1", "#fefefe"
CRITICAL, NEUTRAL, MILD = "#b3261f", "#b8690f", "#2b7a3e"
SERIES = ("#1f5fa9", "#c8641c", "#2b7a40", "#7a3fa1", "#0e7f8a", "#b3266b", "#6b6b10")
_VARIABLES = {
    INK: "var(--ink)",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
    CRITICAL: "var(--critical)",
    NEUTRAL: "var(--neutral)",
    MILD: "var(--non-critical)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)},
}
_OF_SEVERITY = dict(zip(SEVERITIES, (MILD, NEUTRAL, CRITICAL), strict=True))
_WIDTH = 4.4
# Only for the width that matplotlib reserves; the page sets its own font.
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sevpeft",
    "text.parse_math": False,
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
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Plot:
    """A picture with its caption, which also is what a screen reader says."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Bar:
    """A difference with its interval, in shown units; an outcome colours it."""

    label: str
    value: float
    low: float
    high: float
    outcome: str = ""


def loss_curves(curves: Mapping[str, Sequence[tuple[float, float]]], title: str, caption: str) -> Plot:
    """Curves of (step, loss) by name; the strata have their colours, other names one of the series."""

    def draw(axes: Axes) -> None:
        others = iter(SERIES * (1 + len(curves) // len(SERIES)))
        for name, points in curves.items():
            colour = _OF_SEVERITY.get(name) or (INK if name == "all" else next(others))
            axes.plot(
                *zip(*points, strict=True), color=colour, linewidth=1.6, marker="o", markersize=3, label=_plain(name)
            )
        axes.set(xlabel="optimizer step", ylabel="nats a token")
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))

    return Plot(title, caption, _svg(draw, title))


def weight_histogram(histogram: Sequence[Sequence[float]], caption: str) -> Plot:
    """Bars of (from, to, consultations), the lowest weight at the top."""
    title = "Severity weights of the training rows"

    def draw(axes: Axes) -> None:
        labels = [f"{low:.2f}" if low == high else f"{low:.2f}–{high:.2f}" for low, high, _ in histogram]
        counts = [count for *_, count in histogram]
        axes.barh(range(len(counts)), counts, color=SERIES[0], height=0.75)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="consultations", ylabel="weight")

    return Plot(title, caption, _svg(draw, title, height=0.9 + 0.24 * max(4, len(histogram))))


def forest(bars: Sequence[Bar], title: str, caption: str, unit: str) -> Plot:
    """Differences with their intervals, one below the other, and the line of no difference."""

    def draw(axes: Axes) -> None:
        colours = {"better": MILD, "worse": CRITICAL}
        for at, bar in enumerate(bars):
            colour = colours.get(bar.outcome, INK)
            axes.plot([bar.low, bar.high], [at, at], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([bar.value], [at], color=colour, marker="o", markersize=5)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(unit)

    return Plot(title, caption, _svg(draw, title, height=0.8 + 0.26 * max(3, len(bars))))


def lengths(words: Mapping[str, Sequence[int]], caption: str, title: str) -> Plot:
    """Who (an arm or the reference) → words of each answer, as the share that is at most so long."""

    def draw(axes: Axes) -> None:
        others = iter(SERIES * (1 + len(words) // len(SERIES)))
        for who, counts in words.items():
            style: dict[str, Any] = {"color": INK, "linestyle": "--"} if who == "reference" else {"color": next(others)}
            axes.ecdf(list(counts), compress=True, label=_plain(who), linewidth=1.6, **style)
        axes.set(xlabel="words", ylabel="share that is at most so long", xlim=(0, None))
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))

    return Plot(title, caption, _svg(draw, title))


def reliability(judged: Mapping[str, Sequence[Mapping[str, float]]], caption: str) -> Plot:
    """Name ("calibrated", "before") → bins {rows, said, came} of p_critical, on rows the classifier was judged on."""
    title = "Reliability of p_critical"

    def draw(axes: Axes) -> None:
        end = min(1.0, 0.02 + max(max(one["said"], one["came"]) for bins in judged.values() for one in bins))
        axes.plot([0, end], [0, end], color=INK, linewidth=0.8, linestyle="--", label="perfect")
        for colour, (name, bins) in zip(SERIES, judged.items(), strict=False):
            said, came = [one["said"] for one in bins], [one["came"] for one in bins]
            axes.plot(said, came, color=colour, marker="o", markersize=4, linewidth=1.4, label=name)
        axes.set(xlabel="mean p_critical of the bin", ylabel="share that is critical", xlim=(0, end), ylim=(0, end))
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))

    return Plot(title, caption, _svg(draw, title))


def _plain(name: str) -> str:
    return name.replace("non_critical", "non-critical")


def _svg(draw: Any, title: str, height: float = 3.0) -> Markup:
    # No pyplot: it would look for a display and keep every figure alive.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        drawn = io.StringIO()
        canvas.print_svg(drawn, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(_inlined(drawn.getvalue(), title))


def _inlined(svg: str, title: str) -> str:
    """The drawing alone, without what only a file of its own needs, its names kept apart from other drawings'."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    own = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'\bid="', f'id="{own}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{own}-", svg)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
