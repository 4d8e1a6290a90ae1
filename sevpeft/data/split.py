"""The split into train, validation and test, with every question on one side only.

Forum questions are posted again and again; a question that stands in train and in test turns the test into one of
memory. So not rows but groups of rows with the same folded question, or with nearly the same one, are drawn, stratum
by stratum, in the order of a seeded hash: the same on every machine, with every version of every library, and in
whatever order the rows come. Whole values of a column, such as years or hospitals, can be held out too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from fractions import Fraction

import datasets
import numpy as np
from numpy.typing import NDArray

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.recipe import DataSection

TRAIN, VALIDATION, TEST = range(3)
SIDES = ("train", "validation", "test")

_SPELLINGS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    "test": TEST,
}


@dataclass(frozen=True)
class Splits:
    """Three parts of the rows, each in the rows' order; `test` may have none.

    Attributes:
        groups: number of distinct questions, by their folded form, or of the groups that were given.
        by: "column split" where the rows say it themselves, else "random".
        leaks: number of those that the rows' own splits have on more than one side.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    groups: int
    by: str
    leaks: int = 0


def split_rows(
    rows: datasets.Dataset,
    data: DataSection,
    *,
    strata: Sequence[int] | NDArray[np.int64] | None = None,
    keys: NDArray[np.uint64] | None = None,
) -> Splits:
    """The rows (with `question`, perhaps `split` and `row`) in three parts, equal questions together.

    A `split` column of train/validation/test is used as it is; what it lacks is drawn from its train rows, unless
    `data.test_size` is 0. Sizes are fractions below 1 (of all rows, or of the train rows that are drawn from) or
    numbers of rows.

    Args:
        strata: (n,) one integer a row; a group has the stratum of its first row.
        keys: (n,) equal where rows have to stay together; by default where the folded questions are.

    Raises:
        DataError: a size cannot be met, validation or train would be empty, or the column has other values too.
    """
    given = given_sides(rows, data)
    keys = question_keys(rows, data.seed) if keys is None else keys
    sides = draw_sides(keys, data, strata=strata, given=given)
    train, validation, test = (rows.select(np.flatnonzero(sides == side)) for side in (TRAIN, VALIDATION, TEST))
    groups, leaks = len(np.unique(keys)), 0 if given is None else len(np.unique(keys[crossing(sides, keys)]))
    return Splits(train, validation, test, groups, "random" if given is None else "column split", leaks)


def draw_sides(
    keys: NDArray[np.uint64],
    data: DataSection,
    *,
    strata: Sequence[int] | NDArray[np.int64] | None = None,
    given: NDArray[np.int8] | None = None,
) -> NDArray[np.int8]:
    """The side (n,) of every row, rows with equal `keys` (n,) together; see `split_rows`.

    `given` (n,) are sides that stay as they are; what they lack is drawn from those that are TRAIN.

    Raises:
        DataError: as `split_rows`.
    """
    sizes = {VALIDATION: data.validation_size, TEST: data.test_size}
    sides = np.full(len(keys), TRAIN, np.int8)
    if given is not None:
        sides = given.copy()
        if not (sides == TRAIN).any():
            raise DataError("The column split has no train rows: name some of its rows train.")
        sizes = {side: size for side, size in sizes.items() if not (sides == side).any()}
    # A question that the rows' own test holds already must not be drawn for the validation as well.
    free = np.flatnonzero((sides == TRAIN) & ~np.isin(keys, keys[sides != TRAIN]))
    pool = int((sides == TRAIN).sum())
    wanted = {side: _row_count(size, pool) for side, size in sizes.items()}
    if sum(wanted.values()) >= pool:
        asked = " and ".join(f"data.{SIDES[side]}_size={size}" for side, size in sizes.items())
        raise DataError(f"{asked} of {pool} rows leave none to train on: make them smaller or bring more rows.")
    layers = np.zeros(len(keys), np.int64) if strata is None else np.asarray(strata, np.int64)
    sides[free] = _drawn(keys[free], layers[free], wanted)
    for side, rows in wanted.items():
        if rows and not (sides == side).any():
            raise DataError(
                f"data.{SIDES[side]}_size={sizes[side]} gives no {SIDES[side]} rows, because each question that may go "
                f"there stands on over {rows} rows: raise it."
            )
    return sides


def _row_count(size: float | int, rows: int) -> int:
    return size if isinstance(size, int) else max(1, round(size * rows)) if size else 0


def _drawn(keys: NDArray[np.uint64], layers: NDArray[np.int64], wanted: dict[int, int]) -> NDArray[np.int8]:
    """The side (n,) of every row: `wanted[side]` rows at most go to a side, each stratum in proportion."""
    _, first, group, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    # np.unique sorts by key, and a seeded hash in order is a random order: groups are taken as they come.
    _, layer = np.unique(layers[first], return_inverse=True)
    rows_in_layer = np.bincount(layer, weights=sizes).astype(np.int64)
    drawn = np.full(len(sizes), TRAIN, np.int8)
    for side, count in sorted(wanted.items(), reverse=True):
        room = _shares(count, rows_in_layer)
        for index in np.flatnonzero(drawn == TRAIN).tolist():
            if sizes[index] <= room[layer[index]]:
                room[layer[index]] -= sizes[index]
                drawn[index] = side
    return drawn[group]


def _shares(total: int, parts: NDArray[np.int64]) -> list[int]:
    """`total` in proportion to `parts`; what rounding leaves goes to the largest remainders."""
    if not parts.sum():
        return [0] * len(parts)
    exact = total * parts / parts.sum()
    shares = np.floor(exact).astype(np.int64)
    largest = np.argsort(shares - exact, kind="stable")
    shares[largest[: total - int(shares.sum())]] += 1
    return shares.tolist()


def crossing(sides: NDArray[np.int8], keys: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Which rows (n,) have to go so that no key stands on two sides: test keeps its rows, train gives way."""
    _, group = np.unique(keys, return_inverse=True)
    strictest = np.zeros(len(keys), np.int8)
    np.maximum.at(strictest, group, sides)
    return np.asarray(sides < strictest[group])


def question_keys(rows: datasets.Dataset, seed: int = 0) -> NDArray[np.uint64]:
    """64 bits for every row, equal where the folded questions are, in an order that `seed` sets."""
    batches = rows.select_columns(["question"]).iter(batch_size=1000)
    folded = (fold_for_matching(question) for batch in batches for question in batch["question"])
    return np.fromiter((question_key(question, seed) for question in folded), np.uint64, len(rows))


def question_key(folded: str, seed: int) -> int:
    """64 bits that stand for a folded question, in an order that `seed` sets."""
    digest = hashlib.blake2b(folded.encode(), digest_size=8, key=f"sevpeft {seed}".encode()).digest()
    return int.from_bytes(digest, "big")


def given_sides(rows: datasets.Dataset, data: DataSection) -> NDArray[np.int8] | None:
    """Every row's side as its column split says it, None where that is absent or says other things.

    Raises:
        DataError: only some rows say it, or none although `data.split_column` names the column for it.
    """
    if "split" not in rows.column_names:
        return None
    cells = rows.select_columns(["split"])[:]["split"]
    sides = np.array([_SPELLINGS.get((cell or "").strip().lower(), -1) for cell in cells], np.int8)
    unknown = np.flatnonzero(sides < 0)
    if len(unknown) == len(rows) and data.split_column is None:
        return None
    if len(unknown):
        first = int(unknown[0])
        raise DataError(
            f"The column split is neither train, validation nor test in {len(unknown)} of {len(rows)} rows, first at "
            f"{rows[first].get('row', first + 1)}: fill it everywhere, set data.split_column to a column that is "
            "filled, or leave it out."
        )
    return sides


@dataclass(frozen=True)
class HoldOut:
    """The side (n,) of each row by the value of a column, and why.

    Attributes:
        ordered: whether the values were numbers or dates. values: side -> its values, in order.
        empty: number of rows without a value, which are trained on.
    """

    sides: NDArray[np.int8]
    ordered: bool
    values: dict[int, list[str]]
    empty: int


def hold_out(cells: Sequence[str], column: str, data: DataSection) -> HoldOut:
    """The rows divided by their `cells` (n,) of `column`, so that no value stands on two sides.

    A model that is to answer next year's patients, or another hospital's, must be tested on a year or a hospital that
    it has not seen. Numbers and dates are in order and the newest become the test; other values are drawn by a seeded
    hash. Sizes are met as nearly as whole values allow; each side that has a size above 0 gets one value at least. Of
    two values one is held out, as the test if there is to be one; there is then no validation by value.

    Raises:
        DataError: there are fewer than two values, or the sizes leave nothing to train on.
    """
    distinct, inverse, counts = np.unique(
        np.array([cell.strip() for cell in cells], object), return_inverse=True, return_counts=True
    )
    values: list[str] = distinct.tolist()
    wanted = {TEST: _row_count(data.test_size, len(cells)), VALIDATION: _row_count(data.validation_size, len(cells))}
    filled = [index for index, value in enumerate(values) if value]
    if len(filled) < 2:
        found = f"{len(filled) or 'no'} value in all {len(cells)} rows"
        raise DataError(f"Column '{column}' has {found}, so nothing can be held out by it: name another one.")
    if sum(wanted.values()) >= len(cells):
        asked = f"data.validation_size={data.validation_size} and data.test_size={data.test_size}"
        raise DataError(f"{asked} leave none of {len(cells)} rows to train on: make them smaller.")
    places = _places([values[index] for index in filled])
    if places is None:
        order = sorted(filled, key=lambda index: question_key(values[index], data.seed))
    else:
        order = [index for _, index in sorted(zip(places, filled, strict=True))]
    of_value = _held(order, counts.tolist(), wanted, newest=places is not None)
    by_side = {side: [values[i] for i in order if of_value[i] == side] for side in (TRAIN, VALIDATION, TEST)}
    empty = len(cells) - int(counts[filled].sum())
    return HoldOut(of_value[inverse], places is not None, by_side, empty)


def _places(values: list[str]) -> list[Fraction] | None:
    """Where each value stands in the order of numbers or of dates, None where one is neither."""
    for place in (_number, _moment):
        try:
            return [place(value) for value in values]
        except (ValueError, OverflowError):
            continue
    return None


def _number(value: str) -> Fraction:
    plain = value.replace("٫", ".")
    if not re.fullmatch(r"[+-]?\d+(\.\d+)?", plain):  # no exponent: 1e999999999 would be written out
        raise ValueError
    return Fraction(plain)  # exact: two ids of twenty digits are one and the same float


def _moment(value: str) -> Fraction:
    text = f"{value}-01" if re.fullmatch(r"\d{4}-\d{2}", value) else re.sub(r"[zZ]$", "+00:00", value)
    moment = datetime.fromisoformat(text)
    return Fraction((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())


def _held(order: list[int], counts: list[int], wanted: dict[int, int], *, newest: bool) -> NDArray[np.int8]:
    """The side of every value: the newest of what is in order, or those drawn first that come nearer to `wanted`.

    Where no value that was drawn comes nearer, the smallest is taken; train always keeps one.
    """
    of_value = np.full(len(counts), TRAIN, np.int8)
    left = order[::-1] if newest else list(order)
    for side, rows in wanted.items():
        held, taken = 0, list[int]()
        for index in left:
            if len(taken) + 1 < len(left) and abs(held + counts[index] - rows) <= abs(held - rows):
                taken.append(index)
                held += counts[index]
            elif newest:
                break
        if rows and not taken and len(left) > 1:
            taken = [left[0] if newest else min(left, key=lambda index: counts[index])]
        of_value[taken] = side
        left = [index for index in left if of_value[index] == TRAIN]
    return of_value
