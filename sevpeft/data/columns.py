"""Column names and cells of an input, mapped to the canonical columns and their values.

Public sets of consultations name their columns in a dozen ways, in Arabic and in English. Names are recognized
without regard to case, spelling and punctuation. Where two columns could be meant, the user is asked.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, Literal

import datasets

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError

PROBABILITIES = ("p_non_critical", "p_neutral", "p_critical")
_NAMES = {
    "id": "id, q_id, question_id, qid, المعرف, رقم السؤال",
    "question": "question, questions, q_body, question_text, question_body, patient_question, query, prompt, "
    "instruction, input, complaint, السؤال, سؤال, السؤال الطبي, نص السؤال, سؤال المريض, الشكوى, شكوى, شكوى المريض, "
    "الاستشارة, الاستشارة الطبية",
    "answer": "answer, answers, a_body, answer_text, answer_body, doctor_answer, response, reply, completion, output, "
    "الجواب, جواب, الإجابة, إجابة, الإجابة الطبية, نص الإجابة, إجابة الطبيب, جواب الطبيب, الرد, رد الطبيب",
    "severity": "severity, severity_label, label, urgency, triage, الخطورة, خطورة, درجة الخطورة, مستوى الخطورة, الشدة, "
    "شدة الحالة, درجة الشدة",
    "p_non_critical": "p_non_critical, p_noncritical, prob_non_critical, probability_non_critical",
    "p_neutral": "p_neutral, prob_neutral, probability_neutral",
    "p_critical": "p_critical, prob_critical, probability_critical",
    "specialty": "specialty, speciality, category, department, التخصص, تخصص, القسم, التصنيف",
    "dialect": "dialect, اللهجة, لهجة",
    "split": "split",
}
FIELDS = tuple(_NAMES)
_FOLDED = {field: [fold_for_matching(name) for name in names.split(",")] for field, names in _NAMES.items()}
_WITH_SETTING = ("id", "question", "answer", "severity", "dialect", "split")

# What spreadsheets and data frames write where there is nothing.
_EMPTY_WORDS = frozenset({"nan", "<na>", "null", "#n/a"})


def listed(names: Iterable[str]) -> str:
    """Columns as a message names them; long ones are left out: without a header they are a consultation."""
    names = list(names)
    short = [f"'{name}'" for name in names if len(name) <= 40][:20]
    more = len(names) - len(short)
    return ", ".join(short) + (f"{' and ' if short else ''}{more} more or longer ones" if more else "")


def _named(wanted: str, setting: str, names: Sequence[str], label: str) -> str:
    alike = [name for name in names if fold_for_matching(name) == fold_for_matching(wanted)]
    if wanted in names or len(alike) == 1:
        return wanted if wanted in names else alike[0]
    raise DataError(f"{label} has no column '{wanted}', which {setting} asks for: it has {listed(names)}.")


def map_columns(names: Sequence[str], chosen: Mapping[str, str | None], label: str) -> dict[str, str]:
    """Canonical field -> column of `names`: the `chosen` ones, and the rest as recognized.

    A column of messages (`[{"role": "user", ...}, {"role": "assistant", ...}]`) is the question and the answer at
    once; both then map to it. `chosen["id"] = "row"` numbers the rows, even where there is a column of ids.

    Raises:
        DataError: a chosen column does not exist, two columns could be meant, or question or answer is missing.
    """
    columns = {
        field: _named(wanted, f"data.{field}_column", names, label)
        for field, wanted in chosen.items()
        if wanted is not None and not (field == "id" and wanted == "row" and "row" not in names)
    }
    for field, accepted in _FOLDED.items():
        if field == "answer" and fold_for_matching(columns.get("question", "")) == "messages":
            columns.setdefault("answer", columns["question"])
        if field in columns or chosen.get(field) is not None:
            continue
        if field == "question" and "answer" not in columns:
            accepted = [*accepted, "messages"]
        rank = {name: accepted.index(f) for name in names if (f := fold_for_matching(name)) in accepted}
        found = sorted((name for name in rank if name not in columns.values()), key=rank.__getitem__)
        if found and (field not in _WITH_SETTING or (field not in ("question", "answer") and rank[found[0]] == 0)):
            del found[1:]  # the canonical name is meant; for a field without a setting the likeliest is
        if len(found) > 1:
            raise DataError(
                f"{label}: {' and '.join(repr(name) for name in names if name in found)} could each be the {field}: "
                f"set data.{field}_column to the right one."
            )
        if found:
            columns[field] = found[0]
    if missing := [field for field in ("question", "answer") if field not in columns]:
        raise DataError(
            f"{label} has no column that is named like the {' or the '.join(missing)}: "
            f"set {' and '.join(f'data.{field}_column' for field in missing)} to one of {listed(names)}."
        )
    twice = [field for field in columns if list(columns.values()).count(columns[field]) > 1]
    if twice and set(twice) != {"question", "answer"}:
        raise DataError(f"{label}: column '{columns[twice[0]]}' is set for {' and '.join(twice)}: give each its own.")
    return columns


def carried_columns(
    names: Sequence[str], columns: Mapping[str, str], keep: Literal["mapped", "all"] | Collection[str], label: str
) -> dict[str, str]:
    """Name in the table -> column of `names` for what is carried beside the canonical `columns`.

    A carried column has its own name, after "original_" where a column of the table has that name already.

    Raises:
        DataError: `keep` names a column that does not exist.
    """
    if keep == "mapped":
        return {}
    if keep == "all":
        wanted = [name for name in names if name not in columns.values()]
    else:
        wanted = [_named(name, "keep", names, label) for name in dict.fromkeys(keep)]
        wanted = [name for name in wanted if columns.get(name) != name]
    carried: dict[str, str] = {}
    for column in wanted:
        carried[free_name(column, {*FIELDS, "row", *carried, *(name for name in wanted if name != column)})] = column
    return carried


def free_name(name: str, taken: Collection[str]) -> str:
    """`name`, with "original_" before it as often as it takes not to be `taken`."""
    while name in taken:
        name = f"original_{name}"
    return name


def as_json_value(cell: Any) -> Any:
    """What JSON holds in place of a cell that it has no form for; for `json.dumps(default=...)`."""
    return base64.b64encode(cell).decode() if isinstance(cell, bytes) else str(cell)


def carried_text(cell: Any) -> str:
    """A cell of a carried column as text: words as they stand, nested values as JSON, bytes in base64."""
    if isinstance(cell, str | bytes):
        return cell if isinstance(cell, str) else as_json_value(cell)
    if isinstance(cell, list | dict):
        return json.dumps(cell, ensure_ascii=False, default=as_json_value)
    return as_text(cell, "", "")


def as_text(cell: Any, column: str, place: str) -> str:
    """A cell as text, "" where it is empty; lists, objects and bytes are refused, naming `place`."""
    if isinstance(cell, str):
        return "" if len(cell) <= 4 and cell.strip().lower() in _EMPTY_WORDS else cell.replace("\r\n", "\n")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, list | dict | bytes):
        raise DataError(f"{place}: column '{column}' holds a {type(cell).__name__} where text is needed.")
    if isinstance(cell, float):
        # Spreadsheets and data frames hold whole numbers as floats: the id 12 must not become "12.0".
        return str(int(cell)) if cell.is_integer() else repr(cell)
    return cell.isoformat() if isinstance(cell, date | time) else str(cell)


def as_probability(cell: Any, column: str, place: str) -> float:
    """A cell as a float, NaN where it is empty; whether it is a probability, the weighting judges."""
    with contextlib.suppress(ValueError):
        if isinstance(cell, str):
            text = as_text(cell, column, place).strip().replace("٫", ".").replace(",", ".")
            return float(text) if text else math.nan
        if cell is None or (isinstance(cell, int | float | Decimal) and not isinstance(cell, bool)):
            return math.nan if cell is None else float(cell)
    raise DataError(f"{place}: column '{column}' is not a number.") from None


def as_exchange(cell: Any, column: str, place: str) -> tuple[str, str]:
    """(question, answer) of a cell of messages: an optional system one, the user's, the assistant's.

    The cell may also be the JSON text of such a list, as CSV files hold it. An empty cell gives two empty texts.

    Raises:
        DataError: it is no list of messages, or holds several turns, of which a consultation row has one.
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell) if as_text(cell, column, place).strip() else None
        except (ValueError, RecursionError):
            raise DataError(f"{place}: column '{column}' is not a JSON list of messages.") from None
    if cell is None or (isinstance(cell, float) and math.isnan(cell)) or cell == []:
        return "", ""
    if not isinstance(cell, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in cell):
        raise DataError(f"{place}: column '{column}' is not a list of messages with role and content.")
    turns = cell[1:] if cell[0]["role"] == "system" else cell
    if [message["role"] for message in turns] != ["user", "assistant"]:
        raise DataError(
            f"{place}: column '{column}' is not one message of the user and one of the assistant: "
            "split conversations of several turns into rows."
        )
    question, answer = (as_text(message["content"], column, place) for message in turns)
    return question, answer


def canonical_row(
    cells: Mapping[str, Any], columns: Mapping[str, str], place: str, carried: Mapping[str, str] | None = None
) -> dict[str, Any] | str:
    """The row under its canonical names, or the reason why it is none ("empty question", ...)."""
    row: dict[str, Any] = {}
    for field, column in columns.items():
        read = as_probability if field in PROBABILITIES else as_text
        if columns["question"] != columns["answer"] or field not in ("question", "answer"):
            row[field] = read(cells.get(column), column, place)
    if columns["question"] == columns["answer"]:
        row["question"], row["answer"] = as_exchange(cells.get(columns["question"]), columns["question"], place)
    row |= {name: carried_text(cells.get(column)) for name, column in (carried or {}).items()}
    for field in ("question", "answer"):
        if not row[field].strip():
            return f"empty {field}"
    try:
        for value in row.values():
            if isinstance(value, str) and not value.isascii():
                value.encode()
    except UnicodeEncodeError:  # half an emoji, cut off by whatever wrote the file; Arrow cannot hold it
        return "broken characters"
    return row


def features(columns: Mapping[str, str], carried: Iterable[str] = ()) -> datasets.Features:
    """Types of the rows of a table; `row` (int) is the number of a row in its input."""
    fields = ["id", "question", "answer", *(field for field in FIELDS if field in columns), *carried, "row"]
    kinds = {"row": "int64", **dict.fromkeys(PROBABILITIES, "float64")}
    return datasets.Features({name: datasets.Value(kinds.get(name, "string")) for name in fields})
