"""Terminal output: the console of all verbs. It escapes control characters and survives a closed pipe.

File names, recipe keys, rows and model answers come from others. Unescaped, they could clear the screen, change its
title or reverse a line. Square brackets in them are not markup.
"""

import io
import json
import math
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.status import Status
from rich.table import Column, Table
from rich.text import Text

# Width of the labels of `print_labeled`, and seconds between two progress lines in a log.
LABEL_WIDTH = 18
SECONDS_BETWEEN_LINES = 15.0
# C0 except tab and line end, DEL, C1, line separators, and characters that change the text direction.
# The marks U+200E, U+200F and U+061C stay: Arabic text uses them.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f]|\r(?!\n)")


def visible(text: str) -> str:
    """The text with control characters as JSON escapes, such as \\u001b; the value of a JSON text does not change."""
    return _CONTROL.sub(lambda control: json.dumps(control[0])[1:-1], text)


def print_text(text: str, *, stderr: bool = False, end: str = "\n") -> None:
    """Prints lines without wrapping: answers, errors and output for other programs."""
    print(visible(text), end=end, file=sys.stderr if stderr else sys.stdout, flush=True)


def print_json(content: Any) -> None:
    """Prints the output of --json."""
    print_text(json.dumps(content, ensure_ascii=False, indent=2))


class ResilientOutput(io.FileIO):
    """Standard output or error whose writes never fail: a closed terminal or pipe must not end the work.

    Attributes:
        error: the first write error. Later writes are still tried, because a full disk may have space again.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written = super().write(left)
                if written is None:  # another program has set the terminal to non-blocking
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            self.error = self.error or error
        return size


def guard_output() -> None:
    """Puts `ResilientOutput` under stdout and stderr, and opens /dev/null for a stream that was closed at the start.

    Otherwise the next opened file would get the number of the closed stream, and libraries would write into it.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        elif name != "stdin" and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            guarded = io.TextIOWrapper(
                ResilientOutput(stream.fileno(), "w", closefd=False),
                encoding=stream.encoding,
                errors="replace",  # a terminal without UTF-8 shows question marks in place of bars
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, guarded)


def output_error() -> OSError | None:
    """The first write error of stdout, or None."""
    sys.stdout.flush()
    return getattr(getattr(sys.stdout, "buffer", None), "error", None)


class Screen(Console):
    """A console without markup: styles come from `rich.text.Text` and `style=`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        # All output passes here, also tables, bars and `Text`. `control` segments are the console's own commands.
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def status(self, status: RenderableType, **options: Any) -> Status:
        return _PlainStatus(_plain(status), console=self, **options)


class _PlainStatus(Status):
    """rich reads markup in the string of a status, whatever the setting of its console."""

    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        super().update(_plain(status), **options)


def _plain(status: Any) -> Any:
    return Text(visible(status)) if isinstance(status, str) else status


def print_labeled(console: Console, label: str, text: str, style: str = "") -> None:
    """Prints `label  text` in two columns, so that long text stays readable on 80 columns."""
    line = Table.grid(Column(width=LABEL_WIDTH, style="bold"), Column(overflow="fold", style=style))
    line.add_row(label, Text(text))
    console.print(line)


@contextmanager
def row_progress(console: Console, label: str, rows: int) -> Iterator[Callable[[int], None]]:
    """Shows the number of finished rows; yields a function to call with the number of rows of each batch.

    A terminal shows a bar, a log one line every 15 seconds. Both show the speed at the end.
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
    """The number with at most `figures` digits, such as 5.11, 61.2, 100, with a true minus; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    text = ""
    for places in reversed(range(figures)):
        text = f"{value:{'+' if sign else ''}.{places}f}"
        if sum(map(str.isdigit, text)) <= figures:  # after rounding: 9.999 is 10.0
            break
    return text.replace("-", "−")


def p_text(p: float | None, at_most: bool = False) -> str:
    """A p value as `.012`, `at most .010` or `< .001`; a dash for None and NaN."""
    if p is None or not math.isfinite(p):
        return "–"
    if p < 0.001:
        return "at most .001" if at_most else "< .001"
    # An upper bound is not rounded down.
    text = f"{math.ceil(round(p * 1000, 6)) / 1000 if at_most else p:.3f}".replace("0.", ".", 1)
    return f"at most {text}" if at_most else text
