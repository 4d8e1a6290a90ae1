"""From one column's values to train, validation and test, each value on one side: the honest question of a split.

A model that is to answer next year's patients, or another hospital's, must be tested on a year or a hospital that it
has not seen. Numbers and dates are in order and the newest become the test; other values are drawn by a seeded hash.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sevpeft.data.splits import TEST, TRAIN, VALIDATION, row_count
from sevpeft.errors import DataError

_MONTH = re.compile(r"\d{4}-\d{2}")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")  # no exponent: 1e999999999 would be written out


@dataclass(frozen=True)
class HoldOut:
    """Which side each row stands on, and why.

    Attributes:
        sides: (n,) TRAIN, VALIDATION or TEST. ordered: whether the values were numbers or dates. values: side ->
        its values, in order. empty: rows without a value, which are trained on.
    """

    sides: NDArray[np.int8]
    ordered: bool
    values: dict[int, list[str]]
    empty: int


def hold_out(
    cells: Sequence[str], column: str, *, validation_size: float | int, test_size: float | int, seed: int
) -> HoldOut:
    """Divide rows by their `cells` (n,) of `column`, so that no value stands on two sides.

    Sizes are fractions below 1 or numbers of rows, and are met as nearly as whole values allow; each side that has
    a size above 0 gets one value at least. Of two values one is held out, as the test if there is to be one; there
    is then no validation by value.

    Raises:
        DataError: there are fewer than two values, or a size is none.
    """
    distinct, inverse, counts = np.unique(
        np.array([cell.strip() for cell in cells], object), return_inverse=True, return_counts=True
    )
    wanted = {
        side: row_count(name, size, len(cells))
        for side, name, size in ((TEST, "test", test_size), (VALIDATION, "validation", validation_size))
    }
    values: list[str] = distinct.tolist()
    filled = [index for index, value in enumerate(values) if value]
    if len(filled) < 2:
        held = "one value" if filled else "no value"
        raise DataError(
            f"Column '{column}' has {held} in all {len(cells)} rows, so nothing can be held out by it: "
            "name a column with two values or more, or leave it out to split at random."
        )
    if sum(wanted.values()) >= len(cells):
        raise DataError(
            f"A validation of {validation_size} and a test of {test_size} leave none of {len(cells)} rows to train on: "
            "make them smaller."
        )
    places = _places([values[index] for index in filled])
    if places is None:
        ordered = sorted(filled, key=lambda index: _drawn(values[index], seed))
        dealt = _by_lot(ordered, counts.tolist(), wanted)
    else:
        ordered = [index for _, index in sorted(zip(places, filled, strict=True))]
        dealt = _newest(ordered, counts.tolist(), wanted)
    of_value = np.full(len(values), TRAIN, np.int8)
    for side, indices in dealt.items():
        of_value[indices] = side
    by_side = {side: [values[i] for i in ordered if of_value[i] == side] for side in (TRAIN, VALIDATION, TEST)}
    empty = sum(int(counts[index]) for index, value in enumerate(values) if not value)
    return HoldOut(of_value[inverse], places is not None, by_side, empty)


def _places(values: list[str]) -> list[Fraction] | None:
    """Return where each value stands in the order of numbers or of dates, None where one is neither."""
    for place in (_number, _moment):
        try:
            return [place(value) for value in values]
        except (ValueError, OverflowError):
            continue
    return None


def _number(value: str) -> Fraction:
    if not _NUMBER.fullmatch(plain := value.replace("٫", ".")):
        raise ValueError
    return Fraction(plain)  # exact: two ids of twenty digits are one and the same float


def _moment(value: str) -> Fraction:
    text = f"{value}-01" if _MONTH.fullmatch(value) else re.sub(r"[zZ]$", "+00:00", value)
    moment = datetime.fromisoformat(text)
    return Fraction((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())


def _drawn(value: str, seed: int) -> bytes:
    return hashlib.blake2b(value.encode(), digest_size=8, key=f"sevpeft {seed}".encode()).digest()


def _newest(ordered: list[int], counts: list[int], wanted: dict[int, int]) -> dict[int, list[int]]:
    """Take values from the end, test before validation, as long as that comes nearer to what is wanted."""
    dealt: dict[int, list[int]] = {}
    left = list(ordered)
    for side, rows in wanted.items():
        taken: list[int] = []
        held = 0
        while rows and len(left) > 1 and (not taken or abs(held + counts[left[-1]] - rows) <= abs(held - rows)):
            taken.append(left.pop())
            held += counts[taken[-1]]
        dealt[side] = taken
    return dealt


def _by_lot(ordered: list[int], counts: list[int], wanted: dict[int, int]) -> dict[int, list[int]]:
    """Take values in the order drawn that still fit into what is wanted, or the smallest where none does."""
    dealt: dict[int, list[int]] = {}
    left = dict.fromkeys(ordered)
    for side, rows in wanted.items():
        taken: list[int] = []
        room = rows
        for index in list(left):
            if counts[index] <= room and len(left) > 1:
                taken.append(index)
                del left[index]
                room -= counts[index]
        if rows and not taken and len(left) > 1:
            taken.append(min(left, key=lambda index: counts[index]))
            del left[taken[0]]
        dealt[side] = taken
    return dealt
