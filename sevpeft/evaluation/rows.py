"""Turns a run's recipe into the rows of its own test split: what is asked, what the doctor answered, how severe it is.

Every later table is joined to these rows by id and never by position, because a resumed or limited evaluation has the
rows in another order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from sevpeft.data.read import Consultations, load_consultations
from sevpeft.data.split import question_keys
from sevpeft.errors import RunError
from sevpeft.recipe import Recipe
from sevpeft.runs import Run
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.data import load_splits, source_index


@dataclass(frozen=True)
class EvaluationRows:
    """Rows to evaluate on, n of them.

    Attributes:
        ids: unique. questions, references: texts as in the data. dialects: None where the data names none.
        strata: (n,) int64, position in SEVERITIES of the most probable severity, -1 where it is not known.
        groups: (n,) int64, equal for rows with the same question, which are no independent evidence.
        source, fingerprint: where the rows come from, and what its bytes are.
        leaks: questions that the data's own split has on two sides.
    """

    ids: list[str]
    questions: list[str]
    references: list[str]
    dialects: list[str | None] | None
    strata: np.ndarray
    groups: np.ndarray
    source: str
    fingerprint: str
    leaks: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: Sequence[int] | np.ndarray) -> EvaluationRows:
        """The rows at these positions, in their order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return EvaluationRows(
            ids=[self.ids[i] for i in chosen],
            questions=[self.questions[i] for i in chosen],
            references=[self.references[i] for i in chosen],
            dialects=None if self.dialects is None else [self.dialects[i] for i in chosen],
            strata=self.strata[chosen],
            groups=self.groups[chosen],
            source=self.source,
            fingerprint=self.fingerprint,
            leaks=self.leaks,
        )

    def limited(self, number: int | None, seed: int = 0) -> EvaluationRows:
        """A seeded random sample of at most `number` rows, in the rows' order; a larger one contains a smaller one."""
        if number is None or number >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:number]))

    def severity(self, position: int) -> str | None:
        """Name of a row's severity."""
        stratum = int(self.strata[position])
        return SEVERITIES[stratum] if stratum >= 0 else None

    def content_hash(self) -> str:
        """SHA-256 of what was asked and answered, whatever the order of the rows."""
        rows = sorted(zip(self.ids, self.questions, self.references, self.dialects or [None] * len(self), strict=True))
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    def as_dataset(self, references: list[str] | None = None) -> Dataset:
        """Columns question, answer and, where the data has it, dialect, as training encodes them."""
        columns: dict[str, Any] = {"question": self.questions, "answer": references or self.references}
        return Dataset.from_dict({**columns, **({"dialect": self.dialects} if self.dialects else {})})


def test_rows(recipe: Recipe, split: str = "test") -> EvaluationRows:
    """Rows of the split that a run with this recipe kept for its test.

    Args:
        split: "test", or "validation" for what may still be chosen on.

    Raises:
        RunError: the run kept no test rows.
        SevpeftError: the data cannot be read any more.
    """
    table, splits, severity = load_splits(recipe)
    rows = splits.test if split == "test" else splits.validation
    if len(rows) == 0:
        raise RunError(
            "The run kept no rows for the test (data.test_size=0), and rows that were trained on prove nothing; train "
            "again with data.test_size=0.1, or with a split column that names test rows."
        )
    taken = source_index(rows)
    groups = _groups_of(recipe, table)[taken]
    columns = rows.select_columns([name for name in ("id", "question", "answer", "dialect") if name in rows.features])
    read = columns[:]
    return EvaluationRows(
        ids=[str(identity) for identity in read["id"]],
        questions=list(read["question"]),
        references=list(read["answer"]),
        dialects=[name or None for name in read["dialect"]] if "dialect" in read else None,
        strata=np.full(len(rows), -1) if severity is None else np.asarray(severity.strata[taken], dtype=np.int64),
        groups=np.unique(groups, return_inverse=True)[1].astype(np.int64),
        source=table.source,
        fingerprint=table.fingerprint,
        leaks=splits.leaks,
    )


def training_answers(recipe: Recipe, most: int = 10_000) -> list[str]:
    """A seeded sample of the answers that the run was trained on, for floors that may not see the test."""
    _, splits, _ = load_splits(recipe)
    chosen = np.random.default_rng(0).permutation(len(splits.train))[:most]
    return list(splits.train.select(np.sort(chosen))["answer"])


def check_same_data(rows: EvaluationRows, run: Run) -> None:
    """Raises RunError when the data's content is not that of the training.

    The split would be another one, with rows in it that were trained on.
    """
    stored = run.environment().get("data_fingerprint")
    # The fingerprint of a Hub data set also holds times of this machine's cache, so it may differ without a reason.
    if stored and rows.fingerprint != stored and rows.fingerprint.startswith("sha256:"):
        raise RunError(
            f"{rows.source} is not the data that {run.folder} was trained on: its content has changed, so that the "
            "test rows would be others; bring that content back."
        )


def _groups_of(recipe: Recipe, table: Consultations) -> np.ndarray:
    """(n,) groups of the table's rows: near-duplicates where `sevpeft prepare` found them, else equal questions."""
    if not table.provenance:
        return question_keys(table.rows)
    again = load_consultations(recipe.data.path, max_rows=recipe.data.max_rows, keep=("group",))
    number = dict(zip(again.rows["row"], again.rows["group"], strict=True))
    return np.asarray([int(number[row]) for row in table.rows["row"]], dtype=np.int64)
