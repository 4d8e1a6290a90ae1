"""From consultations to what a severity classifier learns from and is judged on: questions, labels, groups, blocks.

The label is a person's: a file that `annotate` wrote is refused, because agreement with a classifier is not accuracy.
The group says which rows are one question, so that none is learnt and judged at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sevpeft.data.read import Consultations
from sevpeft.data.split import question_keys
from sevpeft.errors import DataError
from sevpeft.severity.probabilities import SEVERITIES, severity_probabilities

SIDE_COLUMNS = ("answer", "specialty")


@dataclass(frozen=True)
class Examples:
    """Labelled questions.

    Attributes:
        questions: (n,) text.
        labels: (n,) int64, positions in `SEVERITIES`.
        groups: (n,) int64, equal where two rows ask the same.
        rows: (n,) int64, number of the row in the user's file; a baseline is fitted on it.
        blocks: (n,) names of the parts of the data (source, time, annotator), None where it is not known.
        side: name → (n,) text of columns that help to fit and are not asked for later: answer and specialty.
    """

    questions: list[str]
    labels: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    blocks: np.ndarray | None = None
    side: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, index: np.ndarray) -> Examples:
        """The rows at these positions, in this order."""
        return Examples(
            [self.questions[i] for i in index.tolist()],
            self.labels[index],
            self.groups[index],
            self.rows[index],
            None if self.blocks is None else self.blocks[index],
            {name: [column[i] for i in index.tolist()] for name, column in self.side.items()},
        )

    def counts(self) -> dict[str, int]:
        """Rows of each severity, in the order of `SEVERITIES`."""
        numbers = np.bincount(self.labels, minlength=len(SEVERITIES)).tolist()
        return dict(zip(SEVERITIES, numbers, strict=True))


def complete_rows(labels: np.ndarray, blocks: np.ndarray | None) -> np.ndarray:
    """(n,) bool: rows in blocks that have every severity; all rows where blocks are not known.

    A block that lacks a severity was labelled under other conditions; its shares say nothing about other rows.
    """
    if blocks is None:
        return np.ones(len(labels), dtype=bool)
    names, index = np.unique(blocks, return_inverse=True)
    found = np.zeros((len(names), len(SEVERITIES)), dtype=bool)
    found[index, labels] = True
    complete: np.ndarray = np.all(found, axis=1)
    return complete[index]


def labelled_examples(consultations: Consultations, block_column: str | None = None) -> Examples:
    """Every row with its severity.

    Args:
        consultations: read with `keep="all"`, so that a block column and a prepared folder's groups are there.
        block_column: as it is called in the input.

    Raises:
        DataError: there is no severity column, it was written by a classifier, a class has no row, or there is no
            such block column.
        WeightError: a row's severity is missing or not known; it gives the row's number.
    """
    rows, source = consultations.rows, consultations.source
    if "severity" not in rows.column_names:
        raise DataError(
            f"{source} has no severity column, and a classifier needs rows whose severity is known: name it with "
            "--severity-column NAME."
        )
    if "severity_method" in rows.column_names and consultations.columns["severity"] == "severity":
        raise DataError(
            f"The severities of {source} were given by a classifier (it has a column severity_method): name a column "
            "that people filled with --severity-column NAME."
        )
    names = rows.select_columns(["severity", "row"])
    labels = severity_probabilities(names).argmax(axis=1).astype(np.int64)
    missing = [name for i, name in enumerate(SEVERITIES) if not (labels == i).any()]
    if missing:
        raise DataError(
            f"{source} has no {' and no '.join(missing)} row: a severity classifier is fitted and judged on all of "
            f"{', '.join(SEVERITIES)}."
        )
    blocks = None if block_column is None else np.array(_texts(consultations, block_column, "--block-column"))
    side = {name: [text or "" for text in rows[name]] for name in SIDE_COLUMNS if name in rows.column_names}
    groups, numbers = question_groups(consultations), _row_numbers(consultations)
    return Examples(list(rows["question"]), labels, groups, numbers, blocks, side)


def binary_examples(consultations: Consultations, column: str) -> tuple[Examples, np.ndarray]:
    """Every row, its severity unknown (-1), and whether `column` says 1 for it: (n,) bool.

    Raises:
        DataError: there is no such column, it holds other things than 0 and 1, or only one of them.
    """
    texts = _texts(consultations, column, "--positive-column")
    values = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}
    numbers = _row_numbers(consultations)
    known = [values.get(text.strip().lower()) for text in texts]
    if None in known:
        bad = [int(number) for number, value in zip(numbers, known, strict=True) if value is None]
        raise DataError(
            f"Column '{column}' is neither 0 nor 1 in {len(bad)} row{'s' * (len(bad) > 1)} (the first is row "
            f"{bad[0]}): name another with --positive-column, or correct it."
        )
    positive = np.array(known, dtype=bool)
    if positive.all() or not positive.any():
        raise DataError(f"Column '{column}' is {int(positive[0])} in every row: there is nothing to tell apart.")
    unknown = np.full(len(positive), -1, dtype=np.int64)
    questions = list(consultations.rows["question"])
    return Examples(questions, unknown, question_groups(consultations), numbers), positive


def question_groups(consultations: Consultations) -> np.ndarray:
    """(n,) int64: the groups that `prepare` found, near-duplicates included, else one per distinct folded question."""
    rows = consultations.rows
    # In any other file a column `group` may be an age group.
    if consultations.provenance and "group" in rows.column_names:
        return np.unique(np.array(rows["group"]), return_inverse=True)[1].astype(np.int64)
    return np.unique(question_keys(rows), return_inverse=True)[1].astype(np.int64)


def _row_numbers(consultations: Consultations) -> np.ndarray:
    return np.array(consultations.rows["row"], dtype=np.int64)


def _texts(consultations: Consultations, column: str, option: str) -> list[str]:
    """A column by its name in the input, whether it was recognised or carried."""
    by_input = {name: own for own, name in (consultations.carried | consultations.columns).items()}
    own = by_input.get(column, column)
    if own not in consultations.rows.column_names:
        there = ", ".join(sorted(name for name in by_input if len(name) <= 40)[:20])
        raise DataError(f"{consultations.source} has no column '{column}', which {option} asks for: it has {there}.")
    return ["" if value is None else str(value) for value in consultations.rows[own]]
