"""Reads severity probabilities (n, 3) from the columns of a table.

The columns are `p_non_critical, p_neutral, p_critical`, or one column of names (`severity`), which becomes one-hot. A
row without a severity is an error, because any default would be a weight that nobody chose.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from scipy.special import softmax

from sevpeft.data.columns import SUM_TOLERANCE
from sevpeft.data.mix import SOURCE
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import WeightError

SEVERITIES = ("non_critical", "neutral", "critical")
PROBABILITY_COLUMNS = tuple(f"p_{name}" for name in SEVERITIES)

_NAMES = (
    "non_critical|noncritical|not_critical|mild|low|غير حرج|غير حرجة|غير خطير|غير خطيرة|بسيط|بسيطة|خفيف|خفيفة",
    "neutral|moderate|medium|محايد|محايدة|متوسط|متوسطة|معتدل|معتدلة",
    "critical|severe|high|emergency|حرج|حرجة|خطير|خطيرة|شديد|شديدة|طارئ|طارئة",
)
_INDEX = {fold_for_matching(name): index for index, names in enumerate(_NAMES) for name in names.split("|")}

# The text that severity is read from; a passage of "both" is (question, answer).
Reads = Literal["question", "answer", "both"]
Passage = str | tuple[str, str]


def is_severity(name: str) -> bool:
    """Whether a name is one of the three severities, in English or Arabic."""
    return fold_for_matching(name) in _INDEX


def is_answer(answer: str | None) -> bool:
    """Whether an answer has a letter or digit: "…" or an emoji is not an answer."""
    return any(map(str.isalnum, answer or ""))


def passages_of(reads: Reads, questions: Sequence[str], answers: Sequence[str | None] | None) -> list[Passage]:
    """The passages that a classifier reads; WeightError if it reads answers and a row has none."""
    if reads == "question":
        return list(questions)
    present = [answer for answer in answers or () if answer is not None and is_answer(answer)]
    if len(present) != len(questions):
        raise WeightError(f"A classifier with text={reads} needs answers; use its question-only twin.")
    return list(present) if reads == "answer" else list(zip(questions, present, strict=True))


def parts_of(passages: Sequence[Passage]) -> list[list[str]]:
    """One list per part: the passages, or the questions and the answers."""
    return [list(part) for part in zip(*((one,) if isinstance(one, str) else one for one in passages), strict=True)]


def has_severity(rows: Dataset) -> bool:
    """Whether the table has any severity column, with valid values or not."""
    return any(name in rows.column_names for name in ("severity", *PROBABILITY_COLUMNS))


def severity_probabilities(rows: Dataset) -> np.ndarray:
    """Severity probabilities (n, 3) of every row, each summing to one; WeightError if a column or value is missing."""
    missing = [name for name in PROBABILITY_COLUMNS if name not in rows.column_names]
    if not missing:
        return _from_columns(rows)
    if len(missing) < len(PROBABILITY_COLUMNS):
        raise WeightError(f"The data has no {', '.join(missing)}; add it, or remove the other probabilities.")
    if "severity" in rows.column_names:
        return np.eye(len(SEVERITIES))[severity_positions(rows)]
    raise WeightError(
        "The data has no severity column, nor p_non_critical, p_neutral and p_critical: name one with "
        "data.severity_column=NAME, set severity.source=rules, or train without severity (severity.control=uniform)."
    )


def sharpened(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (n, 3) at a temperature T: p_k^(1/T) / Σ_j p_j^(1/T), which is softmax(log p / T).

    T < 1 sharpens (T → 0 gives one-hot rows), T > 1 flattens (T → ∞ gives a third each). Order and zeros are kept.
    """
    if temperature == 1:
        return probabilities
    with np.errstate(divide="ignore"):
        return np.asarray(softmax(np.log(probabilities) / temperature, axis=1))


def _from_columns(rows: Dataset) -> np.ndarray:
    # From Arrow, because the numpy format of `datasets` rounds to float32. A missing value becomes NaN.
    table = rows.select_columns(list(PROBABILITY_COLUMNS)).with_format("arrow")[:]
    probabilities = np.stack([table[name].cast("float64").to_numpy() for name in PROBABILITY_COLUMNS], axis=1)
    valid = np.all(np.isfinite(probabilities) & (probabilities >= 0), axis=1)
    check_rows(rows, ~valid, "a severity probability is missing, negative or infinite; remove or annotate these rows.")
    sums: np.ndarray = probabilities.sum(axis=1)
    check_rows(rows, np.abs(sums - 1) > SUM_TOLERANCE, "the probabilities do not sum to 1; divide percentages by 100.")
    return np.asarray(probabilities / sums[:, None])


def severity_positions(rows: Dataset, *, missing: bool = False) -> np.ndarray:
    """Position in SEVERITIES (n,) of every row's name; -1 for an empty one, which is an error unless `missing`."""
    # Encoded in Arrow, so that 430,000 names are a few strings and an array of numbers.
    column = rows.select_columns(["severity"]).with_format("arrow")[:]["severity"].combine_chunks()
    encoded = pc.fill_null(column, "").dictionary_encode()
    names = encoded.dictionary.to_pylist()
    positions = np.array([_INDEX.get(fold_for_matching(name), -1) for name in names], dtype=np.int64)
    allowed = np.array([missing and not name.strip() for name in names], dtype=bool)
    at = encoded.indices.to_numpy(zero_copy_only=False)
    # The names are not shown, because a wrongly chosen column holds patients' text.
    wrong = ((positions < 0) & ~allowed)[at]
    problem = "the severity is not non_critical, neutral or critical (غير حرج, متوسط, حرج)"
    check_rows(rows, wrong, f"{problem}; `sevpeft annotate` with replace=missing fills in empty ones.")
    return np.asarray(positions[at])


def check_answers(rows: Dataset, reads: Reads) -> None:
    """Raises WeightError if severity is read from answers and a row has none."""
    if reads != "question":
        unanswered = np.array([not is_answer(answer) for answer in rows["answer"]], dtype=bool)
        check_rows(rows, unanswered, f"text={reads} needs an answer; remove these rows, or set text=question.")


def check_rows(rows: Dataset, wrong: np.ndarray, problem: str) -> None:
    """Raises WeightError if any of the rows (n,) is wrong, with the number of the first one in the user's file."""
    if count := int(wrong.sum()):
        first = int(wrong.argmax())
        row = rows[first]
        number = f"{row.get('row', first + 1)}{f' of {source}' if (source := row.get(SOURCE)) else ''}"
        which = f"Row {number}" if count == 1 else f"{count} rows (the first is row {number})"
        raise WeightError(f"{which}: {problem}")
