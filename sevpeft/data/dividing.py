"""From prepared rows to the side that each one stands on: by a column's values, as the rows say, or at random.

Whichever way it is, no near-duplicate crosses in the end: where a group stands on two sides, test keeps its rows and
train gives way.
"""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from sevpeft.data.cleaning import fold_for_matching
from sevpeft.data.columns import PROBABILITIES, as_text, listed
from sevpeft.data.holdouts import HoldOut, hold_out
from sevpeft.data.sources import Consultations
from sevpeft.data.splits import SIDES, VALIDATION, crossing, dealt_sides, given_sides
from sevpeft.errors import DataError

# More different ones are no labels of severity, and may be somebody's words.
_MOST_LABELS = 20
_LONGEST_LABEL = 40


@dataclass(frozen=True)
class Labels:
    """Severity of the rows, as far as one is needed to divide them evenly.

    Attributes:
        codes: (n,) int64, one for each name, -1 where a row has none. names: as the rows write them; None where
        there are so many or so long ones that they are no labels.
    """

    codes: NDArray[np.int64]
    names: list[str] | None


@dataclass(frozen=True)
class Division:
    """Side (n,) of every row, those included that have to go (`crossed`, (n,) bool), and how it came about."""

    sides: NDArray[np.int8]
    crossed: NDArray[np.bool_]
    by: str
    held: HoldOut | None
    carved: bool
    """Whether the validation was drawn from the training rows although the test was not."""


def severity_labels(rows: datasets.Dataset) -> Labels:
    """Return the severity that the rows name, or else the likeliest by their three probabilities."""
    none = np.full(len(rows), -1, np.int64)
    if "severity" in rows.column_names:
        cells = rows.select_columns(["severity"]).with_format("arrow")[:]["severity"].combine_chunks()
        encoded = pc.fill_null(cells, "").dictionary_encode()
        written = [name.strip() for name in encoded.dictionary.to_pylist()]
        first: dict[str, str] = {}
        for name in written:
            if name:
                first.setdefault(fold_for_matching(name) or name, name)
        code = {folded: index for index, folded in enumerate(first)}
        of_written = np.array([code[fold_for_matching(name) or name] if name else -1 for name in written], np.int64)
        if not first:
            return Labels(none, [])
        few = len(first) <= _MOST_LABELS and all(len(name) <= _LONGEST_LABEL for name in first.values())
        return Labels(of_written[encoded.indices.to_numpy(zero_copy_only=False)], list(first.values()) if few else None)
    if set(PROBABILITIES) <= set(rows.column_names):
        table = rows.select_columns(list(PROBABILITIES)).with_format("arrow")[:]
        probabilities = np.stack([table[name].to_numpy() for name in PROBABILITIES], axis=1)
        whole = np.isfinite(probabilities).all(axis=1)
        none[whole] = probabilities[whole].argmax(axis=1)
        return Labels(none, [name.removeprefix("p_") for name in PROBABILITIES])
    return Labels(none, [])


def column_to_split_by(table: Consultations, wanted: str) -> str:
    """Return the column of `table.rows` that the user's `wanted` means: the input's name first, then ours.

    Raises:
        DataError: there is none, or its values are the consultations themselves.
    """
    own = {column: name for name, column in (table.columns | table.carried).items()}
    name = own.get(wanted) or (wanted if wanted in table.rows.column_names else None)
    if name is None:
        raise DataError(f"There is no column '{wanted}' to split by: there are {listed([*own, 'row'])}.")
    if name in ("question", "answer", "id"):
        raise DataError(f"Column '{wanted}' is the {name}: split by one that says when or where a row comes from.")
    return name


def divide(
    table: Consultations,
    kept: NDArray[np.int64],
    groups: NDArray[np.int64],
    keys: NDArray[np.uint64],
    labels: Labels,
    *,
    split_by: str | None,
    resplit: bool,
    split_named: bool,
    validation_size: float | int,
    test_size: float | int,
    seed: int,
) -> Division:
    """Divide the rows `kept` (m,) of a table; `groups` and `keys` (m,) say which have to stay together.

    `split_named`: the user named the column of the rows' own split, so that it has to be one.

    Raises:
        DataError: it cannot be done as asked, or a side is empty once nothing crosses.
    """
    rows = table.rows.select(kept)
    strata = labels.codes[kept] if labels.names is not None else None
    given, held, by = None, None, "random"
    if split_by is not None:
        name = column_to_split_by(table, split_by)
        cells = rows.select_columns([name])[name][:]
        held = hold_out(
            [as_text(cell, name, "") for cell in cells],
            split_by,
            validation_size=validation_size,
            test_size=test_size,
            seed=seed,
        )
        given, by = held.sides, f"column {split_by}"
    elif not resplit:
        given = given_sides(rows, split_named)
        by = by if given is None else "column split"
    carved = given is not None and not (given == VALIDATION).any()
    sides = dealt_sides(keys, validation_size=validation_size, test_size=test_size, strata=strata, given=given)
    crossed = crossing(sides, groups)
    for side, name in enumerate(SIDES):
        if (sides == side).any() and not (sides[~crossed] == side).any():
            raise DataError(
                f"Each of the {int((sides == side).sum())} {name} rows has a near-duplicate on another side, so that "
                "none is left: raise the similarity from which on rows are near-duplicates, or split another way."
            )
    return Division(sides, crossed, by, held, carved)


def side_counts(sides: NDArray[np.int8]) -> dict[str, int]:
    """Return side -> number of its rows; sides below 0 are none."""
    return {name: int((sides == side).sum()) for side, name in enumerate(SIDES)}


def said_values(values: list[str], ordered: bool) -> str:
    """Say in a few words which values stand on a side: from which to which, or each."""
    if not values:
        return "none"
    if ordered and len(values) > 1 and max(map(len, (values[0], values[-1]))) <= _LONGEST_LABEL:
        return f"{values[0]} to {values[-1]} ({len(values)} values)"
    return listed(values)
