"""Reads labeled and unlabeled consultations and makes folds in which no question is on both sides.

Rows with the same question (also near-duplicates, if `prepare` found them) are a group, and folds keep groups together.
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

# Characters of the name of a block. A longer value is text, maybe of a patient.
LONGEST_BLOCK = 80


@dataclass(frozen=True)
class Examples:
    """Labeled consultations; every field has length n, and arrays are int64 except `blocks`."""

    questions: list[str]
    labels: np.ndarray  # positions in `SEVERITIES`
    groups: np.ndarray  # equal for rows with the same question
    rows: np.ndarray  # number of the row in the user's file
    blocks: np.ndarray | None = None  # names of the parts of the data (source, time, annotator), if known
    answers: list[str] | None = None
    reads: Reads = "question"  # the text that a classifier reads

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def passages(self) -> list[Passage]:
        """(n,) the text that a classifier reads."""
        return passages_of(self.reads, self.questions, self.answers)

    @property
    def complete(self) -> np.ndarray:
        """(n,) bool: rows of blocks with every severity; all rows if blocks are unknown or none has every severity.

        A block that lacks a severity was labeled under other conditions, so its shares do not apply to other rows.
        """
        complete = np.ones(len(self), dtype=bool)
        if self.blocks is None:
            return complete
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
    """Positions of the training rows and the test rows."""

    name: str
    train: np.ndarray
    test: np.ndarray


def load_examples(settings: ClassifierSettings) -> tuple[Consultations, Examples]:
    """Reads the consultations of the settings, also as labeled examples; WeightError as `check_answers`."""
    consultations = load_consultations(settings.data, keep="all")
    check_questions(consultations.rows, consultations.source)
    if getattr(settings, "classifier", None) is None:
        check_answers(consultations.rows, settings.reads)
    return consultations, replace(labeled_examples(consultations, settings.block_column), reads=settings.reads)


def check_questions(rows: Dataset, source: str) -> None:
    """Raises DataError if most questions contain their answers, which a question-only classifier must not read."""
    if sum(a.strip() in q for q, a in zip(rows["question"], rows["answer"], strict=True)) > len(rows) / 2:
        raise DataError(f"Most questions of {source} contain their answers; name another data.question_column.")


def load_unlabeled(settings: ClassifierSettings, labeled: Examples) -> tuple[list[Consultations], Examples | None]:
    """Reads consultations with an answer, in random order, without labeled questions, duplicates or near-duplicates.

    So none repeats a question of a test fold. None without `settings.unlabeled`; DataError if no row is left.
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
        raise DataError(f"{path} has no answered question that is not labeled already; set unlabeled= to other rows.")
    each = np.arange(len(rows))
    read = Examples(list(rows["question"]), each, each, each, answers=answers, reads=labeled.reads)
    return [consultations], read.take(np.random.default_rng(seed).permutation(kept))


def labeled_examples(consultations: Consultations, block_column: str | None = None) -> Examples:
    """Labeled examples of consultations read with `keep="all"`; `block_column` is a column name of the input.

    Raises DataError for a column that is absent, from a classifier, or without one of the severities. Raises
    WeightError, with its number, for a row without a known severity.
    """
    rows, source = consultations.rows, consultations.source
    if "severity" not in rows.column_names:
        raise DataError(f"{source} has no severity column; name it with data.severity_column=NAME.")
    if "severity_method" in rows.column_names and consultations.columns["severity"] == "severity":
        # Agreement with a classifier is not accuracy.
        reason = f"The severities of {source} are from a classifier (column severity_method)"
        raise DataError(f"{reason}; name a column with labels by people with data.severity_column=NAME.")
    labels = severity_probabilities(rows.select_columns(["severity", "row"])).argmax(axis=1).astype(np.int64)
    check_severities(labels, source, "add rows of every severity")
    # Without `prepare`, a column `group` may be an age group.
    grouped = consultations.provenance and "group" in rows.column_names
    keys = np.array(rows["group"]) if grouped else question_keys(rows)
    groups = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    answers = list(rows["answer"])
    examples = Examples(list(rows["question"]), labels, groups, np.array(rows["row"], dtype=np.int64), answers=answers)
    if block_column is None:
        return examples
    # Name in the input → name in the table.
    table_names = {name: own for own, name in (consultations.carried | consultations.columns).items()}
    column = table_names.get(block_column, block_column)
    if column not in rows.column_names:
        raise DataError(f"{source} has no block_column '{block_column}'; it has {listed(sorted(table_names))}.")
    names = ["" if value is None else str(value) for value in rows[column]]
    if column in ("question", "answer") or max(map(len, names)) > LONGEST_BLOCK:
        reason = f"Column '{block_column}' of {source} has text, not names of blocks, which the report would show"
        raise DataError(f"{reason}; name another block_column.")
    return replace(examples, blocks=np.array(names))


def fingerprints(consultations: Consultations) -> set[str]:
    """Fingerprints of the data and of the data that it was prepared from."""
    origin = json.dumps([consultations.provenance, consultations.files])
    return {consultations.fingerprint, *re.findall(r'fingerprint": "([^"]+)"', origin)}


def check_severities(labels: np.ndarray, what: str, remedy: str) -> None:
    """Raises DataError if a severity has no row."""
    if missing := [name for i, name in enumerate(SEVERITIES) if not (labels == i).any()]:
        raise DataError(f"{what} has no {' and no '.join(missing)} row; {remedy}.")


def grouped_folds(examples: Examples, folds: int = 5, *, seed: int = 0) -> list[Fold]:
    """Stratified folds that keep groups together; DataError if a severity has too few groups."""
    from sklearn.model_selection import StratifiedGroupKFold

    for position, name in enumerate(SEVERITIES):
        groups = len(np.unique(examples.groups[examples.labels == position]))
        if groups < folds:
            raise DataError(f"{name} has {groups} distinct questions, too few for {folds} folds; add more of them.")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = list(splitter.split(np.zeros(len(examples)), examples.labels, examples.groups))
    for train, _ in parts:  # with large groups, one fold may have all rows of a severity
        check_severities(examples.labels[train], "A training fold", "add more questions of every severity")
    return [Fold(f"fold {number}", train, test) for number, (train, test) in enumerate(parts, start=1)]


def block_folds(examples: Examples) -> list[Fold]:
    """One fold per block with every severity; rows outside it with a question of the block are not for training."""
    assert examples.blocks is not None
    folds, other = [], "name another block_column"
    for name in np.unique(examples.blocks[examples.complete]).tolist():
        inside = examples.blocks == name
        train = np.flatnonzero(~np.isin(examples.groups, examples.groups[inside]))
        check_severities(examples.labels[inside], f"Block {name} (and every other lacks a severity too)", other)
        check_severities(examples.labels[train], f"Without block {name}, the training data", other)
        folds.append(Fold(name, train, np.flatnonzero(inside)))
    return folds
