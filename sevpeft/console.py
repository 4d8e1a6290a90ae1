"""Terminal output: one console for all verbs, which escapes control characters and survives a closed pipe.

File names, keys of recipes, rows and answers of models are data of others. Unescaped, they could clear the screen,
change its title or reverse a line; and square brackets in a path are no markup.
"""

from __future__ import annotations

import io
import json
import os
import re
import select
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

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


class ResilientOutput(io.FileIO):
    """Standard output or error that never fails: work must not be lost because a terminal or a pipe is gone.

    Attributes:
        error: the first error of a write; each later write is tried, as a disk may have space again.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written = super().write(left)
                if written is None:  # a terminal that another program has set to non-blocking
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            self.error = self.error or error
        return size


def guard_output() -> None:
    """Puts `ResilientOutput` under stdout and stderr; what was closed from the start becomes /dev/null.

    Else the next file that is opened would take the number of the closed one, and libraries would write into it.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        elif name != "stdin" and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            guarded = io.TextIOWrapper(
                ResilientOutput(stream.fileno(), "w", closefd=False),
                encoding=stream.encoding,
                errors="replace",  # a screen that is not UTF-8 gets a question mark for each bar
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, guarded)


def output_error() -> OSError | None:
    """The first error of writing to stdout; None where everything was written."""
    sys.stdout.flush()
    return getattr(getattr(sys.stdout, "buffer", None), "error", None)


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
