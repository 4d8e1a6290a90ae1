"""From JSON text to its rows: an array, an array under "data", or one object a line.

The parser is Python's own `json`, which has limits: a number of 4,300 digits, and lists as deep as Python calls go.
Of an array it is given one value after another, so that memory holds a row and not the file.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from io import TextIOBase
from typing import Any

from sevpeft.errors import DataError

# Letters of one cell or row. More is a quote or a bracket that is not closed, and would fill the memory.
LONGEST = 1 << 24

_DECODER = json.JSONDecoder()
_WINDOW = 1 << 16
_SPACE = re.compile(r"[ \t\r\n]*")


class _JsonText:
    """Text of which one value after another is taken."""

    def __init__(self, stream: TextIOBase) -> None:
        self._stream = stream
        self._window, self._at = "", 0

    def _more(self) -> bool:
        """Read on, as much again as the value at hand has so far."""
        rest = self._window[self._at :]
        if len(rest) > LONGEST:
            raise json.JSONDecodeError(f"over {LONGEST:,} letters in one value", "", 0)
        read = self._stream.read(max(_WINDOW, len(rest)))
        if read:
            self._window, self._at = rest + read, 0
        return bool(read)

    def peek(self) -> str:
        """Go past white space; return the letter that follows, "" at the end."""
        while True:
            space = _SPACE.match(self._window, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._window) or not self._more():
                return self._window[self._at : self._at + 1]

    def take(self, letters: str) -> str:
        """Go past the next letter, if it is one of `letters`; return it or ""."""
        letter = self.peek()
        if letter not in letters:
            return ""
        self._at += len(letter)
        return letter

    def need(self, letters: str) -> str:
        taken = self.take(letters)
        if not taken:
            raise json.JSONDecodeError(f"Expecting {' or '.join(letters)}", "", 0)
        return taken

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            if end < len(self._window) or not self._more():  # a number at the window's end may go on
                self._at = end
                return value


def is_array(stream: TextIOBase) -> bool:
    """Return whether the rows are an array, at the top or under "data"; otherwise they are one a line."""
    with contextlib.suppress(ValueError, RecursionError):
        return _at_array(_JsonText(stream)) is not None
    return False


def _at_array(text: _JsonText) -> str | None:
    """Go to the first row of the array; return what opened the document, None where there is no such array."""
    opened = text.take("[{")
    while opened == "{":
        name = text.value()
        text.need(":")
        if name == "data" and text.take("["):
            return opened if text.peek() in ("{", "]") else None
        text.value()
        if not text.take(","):
            return None
    return opened or None


def array_rows(stream: TextIOBase, label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of an array with their numbers.

    Raises:
        DataError: the text is no such array; with the number of the row.
    """
    text, number, more = _JsonText(stream), 0, True
    try:
        opened = _at_array(text)
        more = not text.take("]")
        while more:
            number += 1
            cells = text.value()
            if not isinstance(cells, dict):
                raise DataError(f"{label}, row {number} is not a JSON object with named values.")
            yield number, cells
            more = text.need(",]") == ","
        if opened == "{":
            while text.need(",}") == ",":
                text.value()
                text.need(":")
                text.value()
        if text.peek():
            raise json.JSONDecodeError("Extra data", "", 0)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        place = f"{label}, row {number}" if more else f"{label}: what follows the last row"
        raise DataError(f"{place} {_reason(error)}.") from None


def line_rows(lines: Iterable[str], label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the object of every line with the line's number.

    Raises:
        DataError: a line holds none; with its number.
    """
    for number, line in enumerate(lines, start=1):
        line = line.strip(" \t\r\n\ufeff")  # files put one after the other keep their byte order marks
        if not line:
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = _reason(error, ": each line has to hold one object")
            raise DataError(f"{label}, line {number} {reason}.") from None
        if not isinstance(cells, dict):
            hint = ": name a file that is one array .json" if isinstance(cells, list) else ""
            raise DataError(f"{label}, line {number} is not a JSON object with named values{hint}.")
        yield number, cells


def _reason(error: ValueError | RecursionError, remedy: str = "") -> str:
    if isinstance(error, RecursionError):
        return "nests lists or objects too deep: flatten them"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error.msg.removesuffix(' at').removesuffix(' starting')}){remedy}"
    return "holds a number of thousands of digits: put it in quotes"
