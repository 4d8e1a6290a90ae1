"""Labeled consultations, splits of them that put no question on both sides, and unlabeled ones that repeat none.

Rows that ask the same (near-duplicates too, where `prepare` found them) form one group, and splits are made of groups.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from sevpeft.data.columns import listed
from sevpeft.data.read import Consultations, load_consultations
from sevpeft.data.split import question_keys
from sevpeft.errors import DataError
from sevpeft.severity.probabilities import (
    SEVERITIES,
    Passage,
    Reads,
    check_answers,
    is_answer,
    passages_of,
    severity_probabilities,
)
from sevpeft.severity.settings import ClassifierSettings


@dataclass(frozen=True)
class Examples:
    """Labeled consultations; all of length n, the arrays of int64 but for `blocks`."""

    questions: list[str]
    labels: np.ndarray  # positions in `SEVERITIES`
    groups: np.ndarray  # equal where two rows ask the same
    rows: np.ndarray  # number of the row in the user's file
    blocks: np.ndarray | None = None  # names of the parts of the data (source, time, annotator), where they are known
    answers: list[str] | None = None
    reads: Reads = "question"  # what a classifier is to read of them

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def passages(self) -> list[Passage]:
        """(n,) what a classifier reads of each row."""
        return passages_of(self.reads, self.questions, self.answers)

    @property
    def complete(self) -> np.ndarray:
        """(n,) bool: rows of blocks that have every severity; all rows where blocks are not known or all lack one.

        A block that lacks a severity was labeled under other conditions; its shares say nothing about other rows.
        """
        if self.blocks is None:
            return np.ones(len(self), dtype=bool)
        complete = np.ones(len(self), dtype=bool)
        for label in range(len(SEVERITIES)):
            complete &= np.isin(self.blocks, self.blocks[self.labels == label])
        return complete if complete.any() else ~complete

    def take(self, index: np.ndarray) -> Examples:
        """The rows at these positions, in this order."""
        questions = [self.questions[i] for i in index.tolist()]
        blocks = None if self.blocks is None else self.blocks[index]
        answers = None if self.answers is None else [self.answers[i] for i in index.tolist()]
        arrays = (self.labels[index], self.groups[index], self.rows[index])
        return Examples(questions, *arrays, blocks, answers, self.reads)


class Fold(NamedTuple):
    """Positions of the rows to train on and of the rows to evaluate on."""

    name: str
    train: np.ndarray
    test: np.ndarray


def load_examples(settings: ClassifierSettings) -> tuple[Consultations, Examples]:
    """The consultations that the settings name, and the same as labeled examples; WeightError as `check_answers`."""
    consultations = load_consultations(settings.data, keep="all")
    check_questions(consultations.rows, consultations.source)
    if getattr(settings, "classifier", None) is None:
        check_answers(consultations.rows, settings.reads)
    return consultations, replace(labeled_examples(consultations, settings.block_column), reads=settings.reads)


def check_questions(rows: Dataset, source: str) -> None:
    """Raises DataError where most questions hold their answers: what reads questions alone would read these too."""
    if sum(a.strip() in q for q, a in zip(rows["question"], rows["answer"], strict=True)) > len(rows) / 2:
        raise DataError(f"Most questions of {source} hold their answers; set data.question_column to another column.")


def load_unlabeled(settings: ClassifierSettings, labeled: Examples) -> tuple[list[Consultations], Examples | None]:
    """Consultations with an answer, in random order, each question once and none that is labeled, or nearly.

    So none repeats a question of a test fold. Nothing where the settings name none; DataError where no row is left.
    """
    if settings.unlabeled is None:
        return [], None
    from sevpeft.data.prepare import PrepareSettings
    from sevpeft.data.prepare.duplicates import duplicate_groups

    consultations, seed = load_consultations(path := settings.unlabeled), settings.seed
    check_questions(rows := consultations.rows, path)
    alike = PrepareSettings.model_fields["near_duplicates"].default
    groups = duplicate_groups([*labeled.questions, *rows["question"]], threshold=alike, seed=seed).numbers
    first = np.unique(groups, return_index=True)[1] - len(labeled)
    answers = list(rows["answer"])
    kept = np.array([i for i in first[first >= 0].tolist() if is_answer(answers[i])], dtype=np.int64)
    if not len(kept):
        raise DataError(f"{path} has no answered question that is not labeled already; name other rows for unlabeled=.")
    each = np.arange(len(rows))
    read = Examples(list(rows["question"]), each, each, each, answers=answers, reads=labeled.reads)
    return [consultations], read.take(np.random.default_rng(seed).permutation(kept))


def labeled_examples(consultations: Consultations, block_column: str | None = None) -> Examples:
    """Every row with its severity, of consultations read with `keep="all"`; block_column as the input calls it.

    Raises DataError for a column that is absent, written by a classifier or lacks a severity, and WeightError, with its
    number, for a row without a known severity.
    """
    rows, source = consultations.rows, consultations.source
    if "severity" not in rows.column_names:
        raise DataError(f"{source} has no severity column; name it with data.severity_column=NAME.")
    if "severity_method" in rows.column_names and consultations.columns["severity"] == "severity":
        # Agreement with a classifier is not accuracy.
        given = f"A classifier gave {source} its severities (column severity_method)"
        raise DataError(f"{given}; name a column that people filled with data.severity_column=NAME.")
    labels = severity_probabilities(rows.select_columns(["severity", "row"])).argmax(axis=1).astype(np.int64)
    check_severities(labels, source, "bring rows of every severity")
    # In a file that was not prepared, a column `group` may be an age group.
    grouped = consultations.provenance and "group" in rows.column_names
    keys = np.array(rows["group"]) if grouped else question_keys(rows)
    groups = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    answers = list(rows["answer"])
    found = Examples(list(rows["question"]), labels, groups, np.array(rows["row"], dtype=np.int64), answers=answers)
    if block_column is None:
        return found
    # By its name in the input, whether it was recognized or carried.
    by_input = {name: own for own, name in (consultations.carried | consultations.columns).items()}
    own = by_input.get(block_column, block_column)
    if own not in rows.column_names:
        raise DataError(f"{source} has no column '{block_column}' for block_column; it has {listed(sorted(by_input))}.")
    return replace(found, blocks=np.array(["" if value is None else str(value) for value in rows[own]]))


def fingerprints(consultations: Consultations) -> set[str]:
    """Fingerprints of the data and of whatever they were prepared from."""
    origin = json.dumps([consultations.provenance, consultations.files])
    return {consultations.fingerprint, *re.findall(r'fingerprint": "([^"]+)"', origin)}


def check_severities(labels: np.ndarray, what: str, remedy: str) -> None:
    """Raises DataError where a severity has no row."""
    if missing := [name for i, name in enumerate(SEVERITIES) if not (labels == i).any()]:
        raise DataError(f"{what} has no {' and no '.join(missing)} row; {remedy}.")


def grouped_folds(examples: Examples, folds: int = 5, *, seed: int = 0) -> list[Fold]:
    """Folds of whole groups, the severities in proportion; DataError where a severity has too few groups."""
    from sklearn.model_selection import StratifiedGroupKFold

    for position, name in enumerate(SEVERITIES):
        groups = len(np.unique(examples.groups[examples.labels == position]))
        if groups < folds:
            raise DataError(f"{name} has {groups} distinct questions, too few for {folds} parts; bring more of them.")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = list(splitter.split(np.zeros(len(examples)), examples.labels, examples.groups))
    for train, _ in parts:  # large groups can leave a severity to one part alone
        check_severities(examples.labels[train], "A part to train on", "bring more questions of every severity")
    return [Fold(f"fold {number}", train, test) for number, (train, test) in enumerate(parts, start=1)]


def block_folds(examples: Examples) -> list[Fold]:
    """One fold for each block that has every severity; rows elsewhere that ask what its rows ask are not trained on."""
    assert examples.blocks is not None
    folds, other = [], "name another block_column"
    for name in np.unique(examples.blocks[examples.complete]).tolist():
        inside = examples.blocks == name
        train = np.flatnonzero(~np.isin(examples.groups, examples.groups[inside]))
        check_severities(examples.labels[inside], f"Block {name} (and every other lacks a severity too)", other)
        check_severities(examples.labels[train], f"Without block {name}, the training data", other)
        folds.append(Fold(name, train, np.flatnonzero(inside)))
    return folds
