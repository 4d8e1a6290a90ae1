"""What reaches a terminal: one console for all verbs, which shows control characters instead of sending them.

Names of files, keys of recipes, rows and answers of models are data of others. Sent as they are, they could clear the
screen, change its title or turn the order of a line; and square brackets in a path are no markup.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

# Width of the labels of `print_labeled`, and seconds between two lines of progress where no bar can be drawn.
LABEL_WIDTH = 18
SECONDS_BETWEEN_LINES = 15.0
# C0 without tab and line end, DEL, C1, separators of lines, and what turns the direction of the text that follows.
# The marks U+200E, U+200F and U+061C stay: Arabic is written with them.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f]|\r(?!\n)")


def visible(text: str) -> str:
    """The text with control characters as JSON escapes, such as \\u001b; JSON stays the same JSON."""
    return _CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text)


def print_text(text: str, *, stderr: bool = False, end: str = "\n") -> None:
    """Prints lines as they are, never wrapped, for answers, errors and what other programs read."""
    print(visible(text), end=end, file=sys.stderr if stderr else sys.stdout, flush=True)


def print_json(content: Any) -> None:
    """Prints what --json asks for."""
    print_text(json.dumps(content, ensure_ascii=False, indent=2))


class Screen(Console):
    """A console on which text is text: styles come from `rich.text.Text` and `style=`, never from markup."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        # All output passes here, also that of tables, bars and `Text`; the console's own commands are `control`.
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def status(self, status: RenderableType, **how: Any) -> Status:
        return _PlainStatus(_plain(status), console=self, **how)


class _PlainStatus(Status):
    """rich reads markup in a status whatever its console says."""

    def update(self, status: RenderableType | None = None, **how: Any) -> None:
        super().update(_plain(status), **how)


def _plain(status: Any) -> Any:
    return Text(visible(status)) if isinstance(status, str) else status


def print_labeled(console: Console, label: str, text: str, style: str = "") -> None:
    """Prints `label  text`, the text in a column of its own, so that a long line stays readable in 80 columns."""
    line = Table.grid(padding=0)
    line.add_column(width=LABEL_WIDTH, style="bold")
    line.add_column(overflow="fold", style=style)
    line.add_row(label, Text(text))
    console.print(line)


@contextmanager
def row_progress(console: Console, label: str, rows: int) -> Iterator[Callable[[int], None]]:
    """Shows how many rows are done; yields a function that gets the number of rows after every batch.

    A terminal gets one line that is rewritten, a log a line every 15 seconds, and both the speed at the end.
    """
    started = last_line = time.monotonic()
    done = 0
    columns = (TextColumn(label), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rows", total=rows)

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            bar.update(task, completed=done)
            if bar.disable and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                print_labeled(console, label, f"{done:,} of {rows:,} rows")

        yield advance
    rate = done / max(time.monotonic() - started, 1e-9)
    print_labeled(console, label, f"{done:,} rows, {rate:,.{1 if rate >= 10 else 2}f} a second")


def number_text(value: float | None, figures: int = 3, *, sign: bool = False) -> str:
    """So many figures, at most: 5.11, 61.2, 100, with a true minus; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    text = ""
    for places in reversed(range(figures)):
        text = f"{value:{'+' if sign else ''}.{places}f}"
        if sum(map(str.isdigit, text)) <= figures:  # after rounding: 9.999 is 10.0
            break
    return text.replace("-", "−")


def p_text(p: float | None) -> str:
    """`.012`, `< .001`, and a dash where there is none."""
    if p is None or not math.isfinite(p):
        return "–"
    return "< .001" if p < 0.001 else f"{p:.3f}".replace("0.", ".", 1)
