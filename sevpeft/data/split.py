"""Splits the rows into train, validation and test, with every question on one side only.

Groups of rows are drawn, stratum by stratum, in the order of a seeded hash: the same on every machine, with every
library, and in whatever order the rows come. Whole values of a column can be held out too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sevpeft.data.columns import listed
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.recipe import DataSection

TRAIN, VALIDATION, TEST = range(3)
Sides = NDArray[np.int8]
Keys = NDArray[np.uint64]
SIDES = ("train", "validation", "test")
_SPELLINGS = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2}


class Splits(NamedTuple):
    """Three parts of the rows, each in the rows' order; `test` may have none."""

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    by: str  # "column split" where the rows say it themselves, else "random"
    leaks: int  # questions (or groups that were given) that the rows' own splits have on several sides
    prompt_severity: dict[str, Any] | None = None  # where the severities that prompts name come from


def split_rows(
    rows: datasets.Dataset,
    data: DataSection,
    *,
    strata: ArrayLike | None = None,
    keys: Keys | None = None,
    fold: str | None = None,
) -> Splits:
    """The rows (with `question`, perhaps `split` and `row`) in three parts, equal questions together.

    A `split` column of train/validation/test is used as it is; what it lacks is drawn from its train rows, unless
    `data.test_size` is 0. Sizes are fractions (of the rows that are drawn from) or numbers of rows.

    `strata` (n,): one integer a row; a group has the stratum of its first row. `keys` (n,): equal where rows have to
    stay together, by default where the folded questions are. `fold`: 1/2 makes the first half the test, in any case.

    Raises DataError where a size cannot be met, a side would be empty, or the column has other values too.
    """
    given = None if fold else given_sides(rows, data)
    keys = question_keys(rows, data.seed) if keys is None else keys
    if fold:
        number, folds = map(int, fold.split("/"))
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        if not number <= folds <= len(first) or folds < 2:
            raise DataError(f"data.fold={fold} names no part of {len(first)} questions; write 1/2 or 2/2, for example.")
        # Dealt out in turn, stratum by stratum; within one by key, which is a random order, as in `_drawn`.
        layers, places = np.zeros(len(keys)) if strata is None else np.asarray(strata), np.arange(len(first)) % folds
        places[np.argsort(layers[first], kind="stable")] = places.copy()
        given = np.where(places[group] == number - 1, TEST, TRAIN).astype(np.int8)
    sides = draw_sides(keys, data, strata=strata, given=given)
    train, validation, test = (rows.select(np.flatnonzero(sides == side)) for side in (TRAIN, VALIDATION, TEST))
    drawn = given is None or fold is not None
    leaks = 0 if drawn else len(np.unique(keys[crossing(sides, keys)]))
    return Splits(train, validation, test, "random" if drawn else "column split", leaks)


def draw_sides(keys: Keys, data: DataSection, *, strata: ArrayLike | None = None, given: Sides | None = None) -> Sides:
    """The side (n,) of every row, rows with equal `keys` (n,) together; see `split_rows`.

    `given` (n,) are sides that stay as they are; what they lack is drawn from those that are TRAIN.
    """
    sides = np.full(len(keys), TRAIN, np.int8) if given is None else given.copy()
    wanted = _wanted(data, int((sides == TRAIN).sum()), set(sides.tolist()))
    # A question that the rows' own test holds already must not be drawn for the validation as well.
    free = np.flatnonzero((sides == TRAIN) & ~np.isin(keys, keys[sides != TRAIN]))
    layers = np.zeros(len(keys), np.int64) if strata is None else np.asarray(strata, np.int64)
    sides[free] = _drawn(keys[free], layers[free], wanted)
    for side, rows in wanted.items():
        if rows and not (sides == side).any():
            why = f"each question of {data.path} that may go there stands on over {rows} rows"
            raise DataError(f"data.{SIDES[side]}_size is too small, because {why}: raise it, or bring other questions.")
    return sides


def _wanted(data: DataSection, rows: int, given: Collection[int] = ()) -> dict[int, int]:
    """Rows of the test and of the validation, out of so many, but for the sides that are `given`."""
    sizes = {TEST: data.test_size, VALIDATION: data.validation_size}
    wanted = {s: n if isinstance(n, int) else max(1, round(n * rows)) for s, n in sizes.items() if s not in given}
    if sum(wanted.values()) >= rows:
        asked = " and ".join(f"data.{SIDES[side]}_size" for side in wanted) or "The column split"
        raise DataError(f"{asked} would leave none of {rows} rows of {data.path} to train on: bring more.")
    return wanted


def _drawn(keys: Keys, layers: NDArray[np.int64], wanted: dict[int, int]) -> Sides:
    """The side (n,) of every row: `wanted[side]` rows at most go to a side, each stratum in proportion."""
    _, first, group, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    # np.unique sorts by key, and a seeded hash in order is a random order: groups are taken as they come.
    _, layer = np.unique(layers[first], return_inverse=True)
    rows_in_layer = np.bincount(layer, weights=sizes).astype(np.int64)
    drawn = np.full(len(sizes), TRAIN, np.int8)
    for side, count in wanted.items():
        # Each stratum's share of the count; what rounding leaves goes to the largest remainders.
        exact = count * rows_in_layer / max(1, rows_in_layer.sum())
        room = np.floor(exact).astype(np.int64)
        room[np.argsort(room - exact, kind="stable")[: count - int(room.sum())]] += 1
        for index in np.flatnonzero(drawn == TRAIN).tolist():
            if sizes[index] <= room[layer[index]]:
                room[layer[index]] -= sizes[index]
                drawn[index] = side
    return drawn[group]


def crossing(sides: Sides, keys: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Which rows (n,) have to go so that no key stands on two sides: test keeps its rows, train gives way."""
    _, group = np.unique(keys, return_inverse=True)
    strictest = np.zeros(len(keys), np.int8)
    np.maximum.at(strictest, group, sides)
    return np.asarray(sides < strictest[group])


def question_keys(rows: datasets.Dataset, seed: int = 0) -> Keys:
    """64 bits for every row, equal where the folded questions are, in an order that `seed` sets."""
    batches = rows.select_columns(["question"]).iter(batch_size=1000)
    folded = (fold_for_matching(question) for batch in batches for question in batch["question"])
    return np.fromiter((question_key(question, seed) for question in folded), np.uint64, len(rows))


def without_questions(rows: datasets.Dataset, keys: Keys) -> datasets.Dataset:
    """The rows whose `question_keys` are none of these."""
    return rows.select(np.flatnonzero(~np.isin(question_keys(rows), keys)))


def question_key(folded: str, seed: int) -> int:
    """64 bits that stand for a folded question, in an order that `seed` sets."""
    digest = hashlib.blake2b(folded.encode(), digest_size=8, key=f"sevpeft {seed}".encode()).digest()
    return int.from_bytes(digest, "big")


def given_sides(rows: datasets.Dataset, data: DataSection) -> Sides | None:
    """Every row's side as its column split says it, None where that is absent or says other things.

    DataError where only some rows say it, or none although `data.split_column` names the column for it.
    """
    if "split" not in rows.column_names:
        return None
    cells = rows.select_columns(["split"])[:]["split"]
    sides = np.array([_SPELLINGS.get((cell or "").strip().lower(), -1) for cell in cells], np.int8)
    unknown = np.flatnonzero(sides < 0)
    if len(unknown) == len(rows) and data.split_column is None:
        return None
    if len(unknown):
        first = rows[int(unknown[0])].get("row", int(unknown[0]) + 1)
        where = f"in {len(unknown)} of {len(rows)} rows of {data.path}, first at {first}"
        raise DataError(f"Column split is no train, validation or test {where}: fill it, or set data.split_column.")
    return sides


def hold_out(cells: Sequence[str], column: str, data: DataSection) -> tuple[Sides, dict[str, Any]]:
    """The side (n,) of the rows by their `cells` (n,) of `column`, so that no value stands on two, and how it came.

    Of numbers and dates the newest become the test; other values are drawn by a seeded hash. Sizes are met as nearly as
    whole values allow, with one value at least; of two values one is held out, and there is then no validation by
    value. Rows without a value are trained on. Fewer than two values are a DataError.
    """
    stripped = np.array([cell.strip() for cell in cells], object)
    values, inverse, counts = np.unique(stripped, return_inverse=True, return_counts=True)
    filled = [index for index, value in enumerate(values) if value]
    if len(filled) < 2:
        raise DataError(f"Column '{column}' of {data.path} has fewer than two values to hold out: name another one.")
    wanted = _wanted(data, len(cells))
    places = _in_order(values[filled].tolist())
    ordered = places is not None
    drawn = places or [question_key(value, data.seed) for value in values[filled]]
    order = [index for _, index in sorted(zip(drawn, filled, strict=True))]
    left = order[::-1] if ordered else order
    of_value = np.full(len(values), TRAIN, np.int8)
    for side, room in wanted.items():
        taken: list[int] = []
        smallest = [left[0] if ordered else min(left, key=counts.__getitem__)] if room and len(left) > 1 else []
        for index in left:
            # A value is taken while it brings the side nearer to its size; train always keeps one.
            if len(taken) + 1 < len(left) and counts[index] <= 2 * room:
                taken.append(index)
                room -= counts[index]
            elif ordered:
                break
        of_value[taken or smallest] = side
        left = [index for index in left if of_value[index] == TRAIN]
    sides, held = of_value[inverse], {}
    for side, name in enumerate(SIDES):
        own = [str(values[index]) for index in order if of_value[index] == side]
        in_short = ordered and len(own) > 1 and max(len(own[0]), len(own[-1])) <= 40
        held[name] = f"{own[0]} to {own[-1]} ({len(own)} values)" if in_short else listed(own) or "none"
    return sides, {
        "ordered": ordered,
        "values": held,
        "rows_without_value": len(cells) - int(counts[filled].sum()),
        "validation_from_train": not (sides == VALIDATION).any(),
    }


def _in_order(values: list[str]) -> list[Any] | None:
    """Something for each value by which they are in order, where all are numbers or all begin with a date."""
    if all(re.match(r"\d{4}-\d{2}(-\d{2}|$)", value) for value in values):
        return values
    # A Decimal is exact: two ids of twenty digits are one float. No exponent: 1e999999999 would be written out.
    plain = [value.replace("٫", ".") for value in values]
    numbers = all(re.fullmatch(r"[+-]?\d+(\.\d+)?", value) for value in plain)
    return [Decimal(value) for value in plain] if numbers else None
