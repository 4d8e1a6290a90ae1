"""From the columns that a file happens to have to the canonical ones, and from its cells to their values.

Public sets of consultations name their columns in a dozen ways, in Arabic and in English. Names are
recognised without regard to case, spelling and punctuation; where two columns could be meant, the user is
asked. Columns that mean nothing here can be carried along, as text.
"""

import base64
import contextlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Literal

import datasets
import pyarrow as pa

from sevpeft.data.cleaning import fold_for_matching
from sevpeft.errors import DataError

PROBABILITIES = ("p_non_critical", "p_neutral", "p_critical")

_NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id", "q_id", "question_id", "qid", "المعرف", "رقم السؤال"),
    "question": (
        *(
            "question",
            "questions",
            "q_body",
            "question_text",
            "question_body",
            "patient_question",
            "query",
            "prompt",
        ),
        *("instruction", "input", "complaint", "السؤال", "سؤال", "السؤال الطبي", "نص السؤال", "سؤال المريض"),
        *("الشكوى", "شكوى", "شكوى المريض", "الاستشارة", "الاستشارة الطبية"),
    ),
    "answer": (
        *("answer", "answers", "a_body", "answer_text", "answer_body", "doctor_answer", "response", "reply"),
        *("completion", "output", "الجواب", "جواب", "الإجابة", "إجابة", "الإجابة الطبية", "نص الإجابة"),
        *("إجابة الطبيب", "جواب الطبيب", "الرد", "رد الطبيب"),
    ),
    "severity": (
        *("severity", "severity_label", "label", "urgency", "triage", "الخطورة", "خطورة", "درجة الخطورة"),
        *("مستوى الخطورة", "الشدة", "شدة الحالة", "درجة الشدة"),
    ),
    "p_non_critical": ("p_non_critical", "p_noncritical", "prob_non_critical", "probability_non_critical"),
    "p_neutral": ("p_neutral", "prob_neutral", "probability_neutral"),
    "p_critical": ("p_critical", "prob_critical", "probability_critical"),
    "specialty": ("specialty", "speciality", "category", "department", "التخصص", "تخصص", "القسم", "التصنيف"),
    "dialect": ("dialect", "اللهجة", "لهجة"),
    "split": ("split",),
}
FIELDS = tuple(_NAMES)
_FOLDED = {field: [fold_for_matching(name) for name in names] for field, names in _NAMES.items()}
_WITH_SETTING = ("id", "question", "answer", "severity", "dialect", "split")

# What spreadsheets and data frames write where there is nothing.
_EMPTY_WORDS = frozenset({"nan", "<na>", "null", "#n/a"})


def listed(names: Iterable[str]) -> str:
    """Name columns for a message; long ones are left out: without a header they are a consultation."""
    names = list(names)
    short = [f"'{name}'" for name in names if len(name) <= 40][:20]
    more = len(names) - len(short)
    return ", ".join(short) + (f"{' and ' if short else ''}{more} more or longer ones" if more else "")


def _named(wanted: str, setting: str, names: Sequence[str], label: str) -> str:
    if wanted in names:
        return wanted
    alike = [name for name in names if fold_for_matching(name) == fold_for_matching(wanted)]
    if len(alike) == 1:
        return alike[0]
    raise DataError(f"{label} has no column '{wanted}', which {setting} asks for: it has {listed(names)}.")


def _guessed(field: str, names: Sequence[str], accepted: Sequence[str], label: str) -> str | None:
    folded = {name: fold_for_matching(name) for name in names}
    found = [name for name in names if folded[name] in accepted]
    if field not in ("question", "answer"):
        # A column with the canonical name is meant; among the others only a setting can choose, if there is
        # one.
        exact = [name for name in found if folded[name] == accepted[0]]
        if field not in _WITH_SETTING:
            exact = exact or sorted(found, key=lambda name: accepted.index(folded[name]))
        found = exact[:1] or found
    if len(found) > 1:
        raise DataError(
            f"{label}: {' and '.join(map(repr, found))} could each be the {field}: "
            f"set data.{field}_column to the right one."
        )
    return found[0] if found else None


def _is_messages(name: str) -> bool:
    return fold_for_matching(name) == "messages"


def map_columns(names: Sequence[str], chosen: Mapping[str, str | None], label: str) -> dict[str, str]:
    """Return canonical field -> column of `names`, the `chosen` ones as told and the rest recognised.

    A column of messages (`[{"role": "user", ...}, {"role": "assistant", ...}]`) is the question and the
    answer at once; both then map to it. `chosen["id"] = "row"` means: number the rows, even where a column of
    ids stands ready.

    Raises:
        DataError: a chosen column does not exist, two columns could be meant, or question or answer is
        missing.
    """
    columns = {
        field: _named(wanted, f"data.{field}_column", names, label)
        for field, wanted in chosen.items()
        if wanted is not None and not (field == "id" and wanted == "row" and "row" not in names)
    }
    numbered = chosen.get("id") == "row" and "id" not in columns
    for field in FIELDS:
        if field in columns or (field == "id" and numbered):
            continue
        if field == "answer" and _is_messages(columns.get("question", "")):
            columns["answer"] = columns["question"]
            continue
        free = [name for name in names if name not in columns.values()]
        accepted = _FOLDED[field]
        if field == "question" and "answer" not in columns:
            accepted = [*accepted, "messages"]
        found = _guessed(field, free, accepted, label)
        if found is not None:
            columns[field] = found

    missing = [field for field in ("question", "answer") if field not in columns]
    if missing:
        settings = " and ".join(f"data.{field}_column" for field in missing)
        raise DataError(
            f"{label} has no column that is named like {' or '.join(f'a {field}' for field in missing)}: "
            f"set {settings} to one of {listed(names)}.".replace("a answer", "an answer")
        )
    twice = [field for field in columns if list(columns.values()).count(columns[field]) > 1]
    if twice and set(twice) != {"question", "answer"}:
        raise DataError(f"{label}: column '{columns[twice[0]]}' is set for {' and '.join(twice)}: give each its own.")
    return columns


def can_map(names: Sequence[str], chosen: Mapping[str, str | None]) -> bool:
    """Return whether `map_columns` finds consultations under these names."""
    try:
        return bool(map_columns(names, chosen, ""))
    except DataError:
        return False


def carried_columns(
    names: Sequence[str],
    columns: Mapping[str, str],
    keep: Literal["mapped", "all"] | Collection[str],
    label: str,
) -> dict[str, str]:
    """Return name in the table -> column of `names` for what is carried beside the canonical `columns`.

    A carried column has its own name, after "original_" where a column of the table is called so already.

    Raises:
        DataError: `keep` names a column that does not exist.
    """
    if keep == "mapped":
        return {}
    if keep == "all":
        wanted = [name for name in names if name not in columns.values()]
    else:
        asked = [keep] if isinstance(keep, str) else keep
        wanted = [_named(name, "keep", names, label) for name in dict.fromkeys(asked)]
        wanted = [name for name in wanted if columns.get(name) != name]
    carried: dict[str, str] = {}
    for column in wanted:
        carried[free_name(column, {*FIELDS, "row", *carried, *(name for name in wanted if name != column)})] = column
    return carried


def free_name(name: str, taken: Collection[str]) -> str:
    """Return `name`, with "original_" before it as often as it takes not to be `taken`."""
    while name in taken:
        name = f"original_{name}"
    return name


def carried_text(cell: Any) -> str:
    """Return a cell of a carried column as text: words as they stand, nested values as JSON, bytes in base64."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list | dict | bytes):
        return _json_of(cell)
    return as_text(cell, "", "") if isinstance(cell, float | date | time | bool | int | Decimal | None) else str(cell)


def as_json_value(cell: Any) -> Any:
    """Return what JSON holds in place of a cell that it has no form for; for `json.dumps(default=...)`."""
    return base64.b64encode(cell).decode() if isinstance(cell, bytes) else str(cell)


def _json_of(cell: Any) -> str:
    return (
        as_json_value(cell) if isinstance(cell, bytes) else json.dumps(cell, ensure_ascii=False, default=as_json_value)
    )


def as_text(cell: Any, column: str, place: str) -> str:
    """Return a cell as text, "" where it is empty; lists, objects and bytes are refused, naming `place`."""
    if isinstance(cell, str):
        return "" if len(cell) <= 4 and cell.strip().lower() in _EMPTY_WORDS else cell.replace("\r\n", "\n")
    if cell is None:
        return ""
    if isinstance(cell, float):
        if math.isnan(cell):
            return ""
        # Spreadsheets and data frames hold whole numbers as floats: the id 12 must not become "12.0".
        return str(int(cell)) if cell.is_integer() else repr(cell)
    if isinstance(cell, datetime | date | time):
        return cell.isoformat()
    if isinstance(cell, bool | int | Decimal):
        return str(cell)
    raise DataError(f"{place}: column '{column}' holds a {type(cell).__name__} where text is needed.")


def as_probability(cell: Any, column: str, place: str) -> float:
    """Return a cell as a float, NaN where it is empty; whether it is a probability, the weighting judges."""
    with contextlib.suppress(ValueError):
        if isinstance(cell, str):
            text = as_text(cell, column, place).strip().replace("٫", ".").replace(",", ".")
            return float(text) if text else math.nan
        if isinstance(cell, int | float | Decimal) and not isinstance(cell, bool):
            return float(cell)
        if cell is None:
            return math.nan
    raise DataError(f"{place}: column '{column}' is not a number.") from None


def as_exchange(cell: Any, column: str, place: str) -> tuple[str, str]:
    """Return (question, answer) of a cell of messages: an optional system one, the user's, the assistant's.

    The cell may also be the JSON text of such a list, as CSV files hold it. An empty cell gives two empty
    texts.

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
    """Return the row under its canonical names, or the reason why it is none ("empty question", ...)."""
    if columns["question"] == columns["answer"]:
        question, answer = as_exchange(cells.get(columns["question"]), columns["question"], place)
    else:
        question, answer = (
            as_text(cells.get(columns[field]), columns[field], place) for field in ("question", "answer")
        )
    row: dict[str, Any] = {"question": question, "answer": answer}
    for field, column in columns.items():
        if field in PROBABILITIES:
            row[field] = as_probability(cells.get(column), column, place)
        elif field not in ("question", "answer"):
            row[field] = as_text(cells.get(column), column, place)
    for name, column in (carried or {}).items():
        row[name] = carried_text(cells.get(column))
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


class LateColumn(Exception):
    """A row of JSON brought a column that changes which column is which: the table has to be begun again."""


def canonical_rows(
    read: Iterable[tuple[int, Mapping[str, Any]]],
    names: list[str],
    columns: dict[str, str],
    chosen: Mapping[str, str | None],
    label: str,
    place: Callable[[int], str],
    refuse: Callable[[str, int, Mapping[str, Any]], None],
    carried: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the consultations among numbered rows of cells, and give the others to `refuse` with the reason.

    `names` grows by the columns that turn up on the way, as they do in JSON; where one of them would have
    been mapped, LateColumn is raised. `place` says of a number where its row stands.
    """
    known = set(names)
    for ordinal, (number, cells) in enumerate(read, start=1):
        if not cells.keys() <= known:
            names.extend(name for name in cells if name not in known)
            known.update(cells)
            if map_columns(names, chosen, label) != columns:
                raise LateColumn
        row = canonical_row(cells, columns, place(number), carried)
        if isinstance(row, str):
            refuse(row, number, cells)
            continue
        row["id"] = row.get("id", "").strip() or f"row-{ordinal:07d}"
        row["row"] = number
        yield row


def schema(columns: Mapping[str, str], carried: Iterable[str] = ()) -> pa.Schema:
    """Return the Arrow schema of the rows of `canonical_rows`, with what `datasets` reads back from it."""
    fields = ["id", "question", "answer", *(field for field in FIELDS if field in columns), *carried, "row"]
    kinds = {"row": "int64", **dict.fromkeys(PROBABILITIES, "float64")}
    return datasets.Features({name: datasets.Value(kinds.get(name, "string")) for name in fields}).arrow_schema
