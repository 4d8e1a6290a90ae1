"""Splits rows into train, validation and test. All rows of a question go to the same side.

Groups of rows are drawn per stratum in the order of a seeded hash. The result depends neither on the machine, nor on
library versions, nor on the order of the rows. Whole values of a column can be held out, too.
"""

import hashlib
import re
from collections.abc import Collection, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sevpeft.data.columns import listed
from sevpeft.data.text import DIGITS, fold_for_matching
from sevpeft.errors import DataError
from sevpeft.recipe import DataSection

TRAIN, VALIDATION, TEST = range(3)
Sides = NDArray[np.int8]
Keys = NDArray[np.uint64]
SIDES = ("train", "validation", "test")
_SPELLINGS = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2}


class Splits(NamedTuple):
    """Three parts of the rows in their original order; `test` may be empty."""

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    by: str  # "column split" if the rows have their own split, else "random"
    leaks: int  # questions (or given groups) that the rows' own split puts on several sides
    prompt_severity: dict[str, Any] | None = None  # origin of the severities in prompts


def split_rows(
    rows: datasets.Dataset,
    data: DataSection,
    *,
    strata: ArrayLike | None = None,
    keys: Keys | None = None,
    fold: str | None = None,
) -> Splits:
    """Splits rows with the columns `question` and maybe `split` and `row`. Equal questions stay together.

    A `split` column of train/validation/test is used unchanged. A side that it lacks is drawn from its train rows, but
    no test if `data.test_size` is 0. Sizes are fractions of the rows that are drawn from, or numbers of rows.

    `strata` (n,): integers; a group has the stratum of its first row. `keys` (n,): equal for rows that stay together,
    by default rows with equal folded questions. `fold`: "1/2" makes the first of two folds the test, without `split`.

    Raises DataError if a size cannot be met, a side would be empty, or the column has other values.
    """
    given = None if fold else given_sides(rows, data)
    keys = question_keys(rows, data.seed) if keys is None else keys
    if fold:
        number, folds = map(int, fold.split("/"))
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        if not number <= folds <= len(first) or folds < 2:
            raise DataError(f"data.fold={fold} is not a fold of {len(first)} questions; set 1/2 or 2/2, for example.")
        # Fold numbers cycle through each stratum in the order of the keys, which is random, as in `_drawn`.
        layers, places = np.zeros(len(keys)) if strata is None else np.asarray(strata), np.arange(len(first)) % folds
        places[np.argsort(layers[first], kind="stable")] = places.copy()
        given = np.where(places[group] == number - 1, TEST, TRAIN).astype(np.int8)
    sides = draw_sides(keys, data, strata=strata, given=given)
    train, validation, test = (rows.select(np.flatnonzero(sides == side)) for side in (TRAIN, VALIDATION, TEST))
    drawn = given is None or fold is not None
    leaks = 0 if drawn else len(np.unique(keys[crossing(sides, keys)]))
    return Splits(train, validation, test, "random" if drawn else "column split", leaks)


def draw_sides(keys: Keys, data: DataSection, *, strata: ArrayLike | None = None, given: Sides | None = None) -> Sides:
    """The side (n,) of every row, the same for rows with equal `keys` (n,); see `split_rows`.

    `given` (n,) sides stay unchanged; a side that they lack is drawn from their TRAIN rows.
    """
    sides = np.full(len(keys), TRAIN, np.int8) if given is None else given.copy()
    wanted = _wanted(data, int((sides == TRAIN).sum()), set(sides.tolist()))
    # A question of the given test must not be drawn for the validation, too.
    free = np.flatnonzero((sides == TRAIN) & ~np.isin(keys, keys[sides != TRAIN]))
    layers = np.zeros(len(keys), np.int64) if strata is None else np.asarray(strata, np.int64)
    sides[free] = _drawn(keys[free], layers[free], wanted)
    for side, rows in wanted.items():
        if rows and not (sides == side).any():
            reason = f"each available question of {data.path} has over {rows} rows"
            raise DataError(f"data.{SIDES[side]}_size is too small, because {reason}: raise it, or add questions.")
    return sides


def _wanted(data: DataSection, rows: int, given: Collection[int] = ()) -> dict[int, int]:
    """Side -> number of `rows` to draw, for the test and the validation unless `given`."""
    sizes = {TEST: data.test_size, VALIDATION: data.validation_size}
    wanted = {s: n if isinstance(n, int) else max(1, round(n * rows)) for s, n in sizes.items() if s not in given}
    if sum(wanted.values()) >= rows:
        settings = " and ".join(f"data.{SIDES[side]}_size" for side in wanted) or "The column split"
        raise DataError(f"{settings} would leave none of {rows} rows of {data.path} to train on: add more.")
    return wanted


def _drawn(keys: Keys, layers: NDArray[np.int64], wanted: dict[int, int]) -> Sides:
    """The side (n,) of every row: at most `wanted[side]` rows per side, proportional to the strata."""
    _, first, group, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    # np.unique sorts by key. Keys are seeded hashes, so this order of the groups is random.
    _, layer = np.unique(layers[first], return_inverse=True)
    rows_in_layer = np.bincount(layer, weights=sizes).astype(np.int64)
    drawn = np.full(len(sizes), TRAIN, np.int8)
    for side, count in wanted.items():
        # Share of each stratum, rounded by largest remainders.
        exact = count * rows_in_layer / max(1, rows_in_layer.sum())
        room = np.floor(exact).astype(np.int64)
        room[np.argsort(room - exact, kind="stable")[: count - int(room.sum())]] += 1
        for index in np.flatnonzero(drawn == TRAIN).tolist():
            if sizes[index] <= room[layer[index]]:
                room[layer[index]] -= sizes[index]
                drawn[index] = side
    return drawn[group]


def crossing(sides: Sides, keys: NDArray[np.generic]) -> NDArray[np.bool_]:
    """The rows (n,) to drop so that no key is on two sides; test keeps its rows, then validation."""
    _, group = np.unique(keys, return_inverse=True)
    strictest = np.zeros(len(keys), np.int8)
    np.maximum.at(strictest, group, sides)
    return np.asarray(sides < strictest[group])


def question_keys(rows: datasets.Dataset, seed: int = 0) -> Keys:
    """The `question_key` (n,) of every row."""
    batches = rows.select_columns(["question"]).iter(batch_size=1000)
    folded = (fold_for_matching(question) for batch in batches for question in batch["question"])
    return np.fromiter((question_key(question, seed) for question in folded), np.uint64, len(rows))


def without_questions(rows: datasets.Dataset, keys: Keys) -> datasets.Dataset:
    """The rows whose `question_keys` are not in `keys`."""
    return rows.select(np.flatnonzero(~np.isin(question_keys(rows), keys)))


def question_key(folded: str, seed: int) -> int:
    """A 64-bit hash of a folded question; `seed` sets the order of the hashes."""
    digest = hashlib.blake2b(folded.encode(), digest_size=8, key=f"sevpeft {seed}".encode()).digest()
    return int.from_bytes(digest, "big")


def given_sides(rows: datasets.Dataset, data: DataSection) -> Sides | None:
    """The side (n,) of every row by its column split; None if it is missing or has only other values.

    Raises DataError if some rows have another value, or if all have although `data.split_column` names the column.
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
        raise DataError(f"Column split is not train, validation or test {where}: fill it, or set data.split_column.")
    return sides


def hold_out(cells: Sequence[str], column: str, data: DataSection) -> tuple[Sides, dict[str, Any]]:
    """The side (n,) of every row by its value in `cells` (n,) of `column`, each value on one side, and a description.

    The newest numbers or dates become the test; other values are drawn by a seeded hash. Each side gets the number of
    values, at least one, that is closest to its size. With two values, one is held out and there is no validation by
    value. Rows without a value are TRAIN. Raises DataError for fewer than two values.
    """
    stripped = np.array([cell.strip() for cell in cells], object)
    values, inverse, counts = np.unique(stripped, return_inverse=True, return_counts=True)
    filled = [index for index, value in enumerate(values) if value]
    if len(filled) < 2:
        raise DataError(f"Column '{column}' of {data.path} has fewer than two values to hold out: name another column.")
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
            # A value is taken if it brings the side closer to its size; train always keeps one.
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
        # Many different values may be names or patient numbers, which the data card must not hold.
        shown = listed(own) or "none" if len(filled) <= 20 else f"{len(own)} values"
        held[name] = f"{own[0]} to {own[-1]} ({len(own)} values)" if in_short else shown
    return sides, {
        "ordered": ordered,
        "values": held,
        "rows_without_value": len(cells) - int(counts[filled].sum()),
        "validation_from_train": not (sides == VALIDATION).any(),
    }


def _in_order(values: list[str]) -> list[Any] | None:
    """A sort key for each value if all are numbers or all begin with a date, else None."""
    plain = [value.translate(DIGITS).replace("٫", ".") for value in values]
    if all(re.match(r"\d{4}-\d{2}(-\d{2}|$)", value) for value in plain):
        return plain
    # A Decimal is exact; a float would merge ids of twenty digits. No exponent: 1e999999999 would fill the memory.
    numbers = all(re.fullmatch(r"[+-]?\d+(\.\d+)?", value) for value in plain)
    return [Decimal(value) for value in plain] if numbers else None
