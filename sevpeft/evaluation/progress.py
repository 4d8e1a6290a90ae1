"""Shows how many rows are done: one line that is rewritten on a terminal, a line now and then in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sevpeft.console import SECONDS_BETWEEN_LINES, print_labeled


class RowProgress:
    """Context that is called with the number of rows after every batch."""

    def __init__(self, console: Console, label: str, rows: int) -> None:
        self.console, self.label, self.rows = console, label, rows
        self.done = 0
        self.bar: Progress | None = None

    def __enter__(self) -> RowProgress:
        self.started = self.last_line = time.monotonic()
        if self.console.is_terminal:
            columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(TextColumn(self.label), *columns, console=self.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("rows", total=self.rows)
        return self

    def __call__(self, rows: int) -> None:
        self.done += rows
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print_labeled(self.console, self.label, f"{self.done:,} of {self.rows:,} rows")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if kind is None:
            rate = self.done / max(time.monotonic() - self.started, 1e-9)
            print_labeled(self.console, self.label, f"{self.done:,} rows, {rate:,.{1 if rate >= 10 else 2}f} a second")
