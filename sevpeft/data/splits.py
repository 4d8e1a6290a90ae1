"""From all rows to train, validation and test, with every question on one side only.

Forum questions are posted again and again; a question that stands in train and in test turns the test into
one of memory. So not rows but groups of rows with the same folded question, or with nearly the same one
(`duplicates`), are dealt out, stratum by stratum, in the order of a seeded hash: the same on every machine,
with every version of every library, and in whatever order the rows come.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import datasets
import numpy as np
from numpy.typing import NDArray

from sevpeft.data.cleaning import fold_for_matching
from sevpeft.errors import DataError

TRAIN, VALIDATION, TEST = range(3)
SIDES = ("train", "validation", "test")

_SPELT = {
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
    *,
    validation_size: float | int,
    test_size: float | int,
    seed: int,
    strata: Sequence[int] | NDArray[np.int64] | None = None,
    keys: NDArray[np.uint64] | None = None,
    named: bool = False,
) -> Splits:
    """Split `rows` (with `question`, perhaps `split` and `row`) so that equal questions stay together.

    A `split` column of train/validation/test is used as it is; what it lacks is carved from its train rows,
    unless `test_size` is 0. Sizes are fractions below 1 (of all rows, or of the train rows that are carved)
    or numbers of rows. `strata` gives one integer a row; a group has the stratum of its first row. `keys` (n,)
    are equal where rows have to stay together, by default where the folded questions are. `named`: the user named
    the `split` column, so that other values in it are an error and no reason for a random split.

    Raises:
        DataError: a size cannot be met, validation or train would be empty, or the column has other values
        too.
    """
    given = given_sides(rows, named)
    keys = question_keys(rows, seed) if keys is None else keys
    sides = dealt_sides(keys, validation_size=validation_size, test_size=test_size, strata=strata, given=given)
    train, validation, test = (rows.select(np.flatnonzero(sides == side)) for side in (TRAIN, VALIDATION, TEST))
    groups, leaks = len(np.unique(keys)), 0 if given is None else len(np.unique(keys[crossing(sides, keys)]))
    return Splits(train, validation, test, groups, "random" if given is None else "column split", leaks)


def dealt_sides(
    keys: NDArray[np.uint64],
    *,
    validation_size: float | int,
    test_size: float | int,
    strata: Sequence[int] | NDArray[np.int64] | None = None,
    given: NDArray[np.int8] | None = None,
) -> NDArray[np.int8]:
    """Return the side (n,) of every row, rows with equal `keys` (n,) together; see `split_rows`.

    `given` (n,) are sides that stay as they are; what they lack is carved from those that are TRAIN.

    Raises:
        DataError: as `split_rows`.
    """
    if strata is not None and len(strata) != len(keys):
        raise DataError(f"There are {len(strata)} strata for {len(keys)} rows: give one for every row.")
    layers = np.zeros(len(keys), np.int64) if strata is None else np.asarray(strata, np.int64)
    sizes = {VALIDATION: ("validation", validation_size), TEST: ("test", test_size)}
    sides = np.full(len(keys), TRAIN, np.int8) if given is None else given.copy()
    if given is not None:
        if not (sides == TRAIN).any():
            raise DataError("The column split has no train rows: name some of its rows train.")
        sizes = {side: size for side, size in sizes.items() if not (sides == side).any()}

    # A question that the rows' own test holds already must not be carved into validation as well.
    free = np.flatnonzero((sides == TRAIN) & ~np.isin(keys, keys[sides != TRAIN]))
    pool = int((sides == TRAIN).sum())
    wanted = {side: row_count(name, size, pool) for side, (name, size) in sizes.items()}
    if sum(wanted.values()) >= pool:
        asked = " and ".join(f"data.{name}_size={size}" for name, size in sizes.values())
        raise DataError(f"{asked} of {pool} rows leave none to train on: make them smaller or bring more rows.")
    sides[free] = _dealt(keys[free], layers[free], wanted)

    for side, (name, size) in sizes.items():
        if not (sides == side).any() and (side == VALIDATION or wanted[side]):
            why = (
                "and its size must be above 0"
                if not wanted[side]
                else f"because each question that may go there stands on over {wanted[side]} rows: raise it"
            )
            raise DataError(f"data.{name}_size={size} gives no {name} rows, {why}.")
    return sides


def crossing(sides: NDArray[np.int8], keys: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Return which rows (n,) have to go so that no key stands on two sides: test keeps its rows, train gives way."""
    _, group = np.unique(keys, return_inverse=True)
    strictest = np.zeros(len(keys), np.int8)
    np.maximum.at(strictest, group, sides)
    return np.asarray(sides < strictest[group])


def question_keys(rows: datasets.Dataset, seed: int = 0) -> NDArray[np.uint64]:
    """Return 64 bits for every row, equal where the folded questions are, in an order that `seed` sets."""
    keys = np.empty(len(rows), np.uint64)
    at = 0
    for batch in rows.select_columns(["question"]).with_format("arrow").iter(batch_size=1000):
        for question in batch["question"].to_pylist():
            keys[at] = question_key(fold_for_matching(question), seed)
            at += 1
    return keys


def question_key(folded: str, seed: int) -> int:
    """Return 64 bits that stand for a folded question, in an order that `seed` sets."""
    digest = hashlib.blake2b(folded.encode(), digest_size=8, key=f"sevpeft {seed}".encode()).digest()
    return int.from_bytes(digest, "big")


def given_sides(rows: datasets.Dataset, named: bool = False) -> NDArray[np.int8] | None:
    """Return every row's side as its column split says it, None where that is absent or says other things.

    Raises:
        DataError: only some rows say it, or none although `named`: the user named the column for it.
    """
    if "split" not in rows.column_names:
        return None
    sides = np.empty(len(rows), np.int8)
    at = 0
    for batch in rows.select_columns(["split"]).with_format("arrow").iter(batch_size=1000):
        for value in batch["split"].to_pylist():
            sides[at] = _SPELT.get((value or "").strip().lower(), -1)
            at += 1
    unknown = np.flatnonzero(sides < 0)
    if len(unknown) == len(rows) and not named:
        return None
    if len(unknown):
        first = int(unknown[0])
        where = rows[first]["row"] if "row" in rows.column_names else first + 1
        raise DataError(
            f"The column split is neither train, validation nor test in {len(unknown)} of {len(rows)} rows, "
            f"first at {where}: fill it everywhere, set data.split_column to a column that is filled, or leave "
            "it out."
        )
    return sides


def row_count(name: str, size: float | int, rows: int) -> int:
    if isinstance(size, Integral) and not isinstance(size, bool) and size >= 0:
        return int(size)
    if isinstance(size, float) and 0 <= size < 1:
        return max(1, round(size * rows)) if size else 0
    raise DataError(f"data.{name}_size={size} is neither a fraction below 1 nor a number of rows.")


def _dealt(keys: NDArray[np.uint64], layers: NDArray[np.int64], wanted: dict[int, int]) -> NDArray[np.int8]:
    """Return the side of every row: `wanted[side]` rows at most go to a side, each stratum in proportion."""
    _, first, group, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    # np.unique sorts by key, and a seeded hash in order is a random order: groups are taken as they come.
    _, layer = np.unique(layers[first], return_inverse=True)
    rows_in_layer = np.bincount(layer, weights=sizes).astype(np.int64)
    dealt = np.full(len(sizes), TRAIN, np.int8)
    for side, count in sorted(wanted.items(), reverse=True):
        room = _shares(count, rows_in_layer)
        for index in np.flatnonzero(dealt == TRAIN).tolist():
            if sizes[index] <= room[layer[index]]:
                room[layer[index]] -= sizes[index]
                dealt[index] = side
    return dealt[group]


def _shares(total: int, parts: NDArray[np.int64]) -> list[int]:
    """Divide `total` in proportion to `parts`; what rounding leaves goes to the largest remainders."""
    if not parts.sum():
        return [0] * len(parts)
    exact = total * parts / parts.sum()
    shares = np.floor(exact).astype(np.int64)
    largest = np.argsort(shares - exact, kind="stable")
    shares[largest[: total - int(shares.sum())]] += 1
    return shares.tolist()
