"""Severity probabilities (n, 3), read from the columns of a table.

They are the three columns `p_non_critical, p_neutral, p_critical`, or one column of names (`severity`), which becomes
one-hot. Nothing is filled in: a row without a severity would be trained with a weight that nobody chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from scipy.special import softmax

from sevpeft.data.columns import NO_SEVERITY
from sevpeft.data.mix import SOURCE
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import WeightError

SEVERITIES = ("non_critical", "neutral", "critical")
PROBABILITY_COLUMNS = tuple(f"p_{name}" for name in SEVERITIES)

# Rounding to two decimals by a spreadsheet leaves sums of .99 or 1.01; anything wider is another kind of number.
SUM_TOLERANCE = 0.011

_NAMES = (
    "non_critical|noncritical|not_critical|mild|low|غير حرج|غير حرجة|غير خطير|غير خطيرة|بسيط|بسيطة|خفيف|خفيفة",
    "neutral|moderate|medium|محايد|محايدة|متوسط|متوسطة|معتدل|معتدلة",
    "critical|severe|high|emergency|حرج|حرجة|خطير|خطيرة|شديد|شديدة|طارئ|طارئة",
)
_INDEX = {fold_for_matching(name): index for index, names in enumerate(_NAMES) for name in names.split("|")}


# What severity is read from; a passage of "both" is (question, answer).
Reads = Literal["question", "answer", "both"]
Passage = str | tuple[str, str]


class SeverityClassifier(Protocol):
    """Gives severity probabilities for questions; `version` changes when they may."""

    kind: str
    version: str

    def probabilities(self, questions: list[str], /) -> np.ndarray:
        """(n, 3), each row summing to one, in the order of `SEVERITIES`."""


def is_severity(name: str) -> bool:
    """Whether it is one of the three, in English or Arabic."""
    return fold_for_matching(name) in _INDEX


def is_answer(answer: str | None) -> bool:
    """Whether an answer says anything: "…" and an emoji are none."""
    return any(map(str.isalnum, answer or ""))


def passages_of(reads: Reads, questions: Sequence[str], answers: Sequence[str | None] | None) -> list[Passage]:
    """What a classifier reads of rows; WeightError where it reads answers and a row has none."""
    if reads == "question":
        return list(questions)
    given = [answer for answer in answers or () if answer is not None and is_answer(answer)]
    if len(given) != len(questions):
        raise WeightError(f"A classifier with text={reads} was asked without answers; ask its question-only twin.")
    return list(given) if reads == "answer" else list(zip(questions, given, strict=True))


def parts_of(passages: Sequence[Passage]) -> list[list[str]]:
    """The passages, or their questions and their answers."""
    return [list(part) for part in zip(*((one,) if isinstance(one, str) else one for one in passages), strict=True)]


def has_severity(rows: Dataset) -> bool:
    """Whether the table says anything about severity, rightly or wrongly."""
    return any(name in rows.column_names for name in ("severity", *PROBABILITY_COLUMNS))


def severity_probabilities(rows: Dataset) -> np.ndarray:
    """Severity probabilities of every row: (n, 3), float64, each row summing to one, in the order of `SEVERITIES`.

    Raises WeightError, with row numbers and never with the text of a row, where a column or a severity is missing.
    """
    missing = [name for name in PROBABILITY_COLUMNS if name not in rows.column_names]
    if not missing:
        return _from_columns(rows)
    if len(missing) < len(PROBABILITY_COLUMNS):
        raise WeightError(f"The data has no {', '.join(missing)}; add it, or remove the other probabilities.")
    if "severity" in rows.column_names:
        return _from_names(rows)
    raise WeightError(NO_SEVERITY)


def sharpened(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (n, 3) with another contrast: p_k^(1/T) / Σ_j p_j^(1/T), which is softmax(log p / T).

    T < 1 sharpens (T → 0 gives one-hot rows), T > 1 flattens (T → ∞ gives a third each); order and zeros stay.
    """
    if temperature == 1:
        return probabilities
    with np.errstate(divide="ignore"):
        return np.asarray(softmax(np.log(probabilities) / temperature, axis=1))


def _from_columns(rows: Dataset) -> np.ndarray:
    # From Arrow, because the numpy format of `datasets` would round to float32. A missing value becomes NaN.
    table = rows.select_columns(list(PROBABILITY_COLUMNS)).with_format("arrow")[:]
    probabilities = np.stack([table[name].cast("float64").to_numpy() for name in PROBABILITY_COLUMNS], axis=1)
    valid = np.all(np.isfinite(probabilities) & (probabilities >= 0), axis=1)
    check_rows(rows, ~valid, "a severity probability is missing, negative or infinite; remove or annotate these rows.")
    sums: np.ndarray = probabilities.sum(axis=1)
    check_rows(rows, np.abs(sums - 1) > SUM_TOLERANCE, "the probabilities do not sum to 1; divide percentages by 100.")
    return np.asarray(probabilities / sums[:, None])


def _from_names(rows: Dataset) -> np.ndarray:
    # Encoded in Arrow, so that 430,000 names are a handful of strings and an array of numbers.
    column = rows.select_columns(["severity"]).with_format("arrow")[:]["severity"].combine_chunks()
    encoded = pc.fill_null(column, "").dictionary_encode()
    names = encoded.dictionary.to_pylist()
    kinds = np.array([_INDEX.get(fold_for_matching(name), -1) for name in names], dtype=np.int64)
    found = kinds[encoded.indices.to_numpy(zero_copy_only=False)]
    # The names are not shown: a column that was chosen wrongly holds the patients' words.
    check_rows(rows, found < 0, "the severity is not non_critical, neutral or critical (غير حرج, متوسط, حرج).")
    return np.eye(len(SEVERITIES))[found]


def check_answers(rows: Dataset, reads: Reads) -> None:
    """Raises WeightError where severity is to be read from answers and a row has none."""
    if reads != "question":
        silent = np.array([not is_answer(answer) for answer in rows["answer"]], dtype=bool)
        check_rows(rows, silent, f"text={reads} needs an answer; remove these rows, or set text=question.")


def check_rows(rows: Dataset, wrong: np.ndarray, problem: str) -> None:
    """Raises WeightError where rows (n,) are wrong, naming the first one as it is counted in the user's file."""
    if count := int(wrong.sum()):
        first = int(wrong.argmax())
        row = rows[first]
        number = f"{row.get('row', first + 1)}{f' of {source}' if (source := row.get(SOURCE)) else ''}"
        which = f"Row {number}" if count == 1 else f"{count} rows (the first is row {number})"
        raise WeightError(f"{which}: {problem}")
