"""The columns of an input, recognized by their names, and its cells as text and numbers.

Public sets name their columns in a dozen ways, in Arabic and in English; case, spelling and punctuation do not matter.
Where two columns could be meant, it is an error.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

import yaml

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError

PROBABILITIES = ("p_non_critical", "p_neutral", "p_critical")
_FILE = Path(__file__).with_name("columns.yaml").read_text(encoding="utf-8")
_ACCEPTED = {field: [*map(fold_for_matching, names.split(","))] for field, names in yaml.safe_load(_FILE).items()}
FIELDS = tuple(_ACCEPTED)
# What spreadsheets and data frames write where there is nothing, or a formula failed.
_EMPTY_WORDS = {"nan", "<na>", "null", "#n/a", "#name?", "#ref!", "#value!", "#div/0!", "#num!", "#null!"}


def listed(names: Iterable[str]) -> str:
    """Columns as a message names them; long ones are left out: without a header they are a consultation."""
    names = list(names)
    short = [f"'{name}'" for name in names if len(name) <= 40][:20]
    more = len(names) - len(short)
    return ", ".join(short) + (f"{' and ' if short else ''}{more} more or longer ones" if more else "")


def map_columns(names: Sequence[str], chosen: Mapping[str, str | None], label: str) -> dict[str, str]:
    """Canonical field -> column of `names`: the `chosen` ones, and the rest as recognized.

    A column of messages (`[{"role": "user", ...}, {"role": "assistant", ...}]`) is the question and the answer at
    once; both then map to it. `chosen["id"] = "row"` numbers the rows, even where there is a column of ids.

    Raises:
        DataError: a chosen column does not exist, two columns could be meant, or question or answer is missing.
    """
    numbered = chosen.get("id") == "row" and "row" not in names
    columns: dict[str, str] = {}
    for field, wanted in chosen.items():
        if wanted is None or (field == "id" and numbered):
            continue
        alike = [name for name in names if fold_for_matching(name) == fold_for_matching(wanted)]
        if wanted not in names and len(alike) != 1:
            asked = f"data.{field}_column asks for"
            raise DataError(f"{label} has no column '{wanted}', which {asked}: it has {listed(names)}.")
        columns[field] = wanted if wanted in names else alike[0]
    for field, accepted in _ACCEPTED.items():
        if field == "answer" and fold_for_matching(columns.get("question", "")) == "messages":
            columns.setdefault("answer", columns["question"])
        if field in columns or (field == "id" and numbered):
            continue
        if field == "question" and "answer" not in columns:
            accepted = [*accepted, "messages"]
        rank = {name: accepted.index(f) for name in names if (f := fold_for_matching(name)) in accepted}
        found = sorted((name for name in rank if name not in columns.values()), key=rank.__getitem__)
        if found and (field not in chosen or (field not in ("question", "answer") and rank[found[0]] == 0)):
            del found[1:]  # the canonical name is meant; for a field without a setting the likeliest is
        if len(found) > 1:
            could = " and ".join(repr(name) for name in names if name in found)
            raise DataError(f"{label}: {could} could each be the {field}: set data.{field}_column to the right one.")
        if found:
            columns[field] = found[0]
    if missing := [field for field in ("question", "answer") if field not in columns]:
        settings = " and ".join(f"data.{field}_column" for field in missing)
        missed = f"{label} has no column named like the {' or the '.join(missing)}"
        raise DataError(f"{missed}: set {settings} to one of {listed(names)}.")
    twice = [field for field in columns if list(columns.values()).count(columns[field]) > 1]
    if twice and set(twice) != {"question", "answer"}:
        raise DataError(f"{label}: column '{columns[twice[0]]}' is set for {' and '.join(twice)}: give each its own.")
    return columns


def free_name(name: str, taken: Collection[str]) -> str:
    """`name`, with "original_" before it as often as it takes not to be `taken`."""
    while name in taken:
        name = f"original_{name}"
    return name


def free_names(names: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """The `free_name` of each of `names`, not `taken` and not another's."""
    free: dict[str, str] = {}
    for name in names:
        free[name] = free_name(name, {*taken, *free.values(), *(other for other in names if other != name)})
    return free


def as_json_value(cell: Any) -> Any:
    """What JSON holds in place of a cell that it has no form for; for `json.dumps(default=...)`."""
    return base64.b64encode(cell).decode() if isinstance(cell, bytes) else str(cell)


def carried_text(cell: Any) -> str:
    """A cell of a carried column as text: words as they stand, nested values as JSON, bytes in base64."""
    if isinstance(cell, list | dict):
        return json.dumps(cell, ensure_ascii=False, default=as_json_value)
    if isinstance(cell, str | bytes):
        return as_json_value(cell)
    return as_text(cell, "", "")


def as_text(cell: Any, column: str, place: str) -> str:
    """A cell as text, "" where it is empty; lists, objects and bytes are an error that names `place`."""
    if isinstance(cell, str):
        return "" if len(cell) <= 8 and cell.strip().lower() in _EMPTY_WORDS else cell.replace("\r\n", "\n")
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
    try:
        return float(as_text(cell, column, place).strip().replace("٫", ".").replace(",", ".") or "nan")
    except ValueError:
        raise DataError(f"{place}: column '{column}' is not a number.") from None


def as_exchange(cell: Any, column: str, place: str) -> tuple[str, str]:
    """(question, answer) of a cell of messages: an optional system one, the user's, the assistant's.

    The cell may also be the JSON text of such a list, as CSV files hold it. An empty cell gives two empty texts.

    Raises:
        DataError: it is no list of messages, or holds several turns, of which a consultation row has one.
    """
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
        if isinstance(cell, str):
            cell = json.loads(as_text(cell, column, place).strip() or "null")
        if cell is None or cell == [] or (isinstance(cell, float) and math.isnan(cell)):
            return "", ""
        question, answer = cell[1:] if cell[0]["role"] == "system" else cell
        if (question["role"], answer["role"]) == ("user", "assistant"):
            return as_text(question["content"], column, place), as_text(answer["content"], column, place)
    raise DataError(
        f"{place}: column '{column}' is not a list of one message of the user and one of the assistant, each with role "
        "and content: split conversations of several turns into rows."
    )


def canonical_row(
    cells: Mapping[str, Any], columns: Mapping[str, str], place: str, carried: Mapping[str, str] | None = None
) -> dict[str, Any] | str:
    """The row under its canonical names, or the reason why it is none ("empty question", ...)."""
    row: dict[str, Any] = {}
    exchange = columns["question"] == columns["answer"]
    for field, column in columns.items():
        if not exchange or field not in ("question", "answer"):
            row[field] = (as_probability if field in PROBABILITIES else as_text)(cells.get(column), column, place)
    if exchange:
        row["question"], row["answer"] = as_exchange(cells.get(columns["question"]), columns["question"], place)
    row |= {name: carried_text(cells.get(column)) for name, column in (carried or {}).items()}
    for field in ("question", "answer"):
        if not row[field].strip():
            return f"empty {field}"
    try:
        "".join(value for value in row.values() if isinstance(value, str)).encode()
    except UnicodeEncodeError:  # half an emoji, cut off by whatever wrote the file; Arrow cannot hold it
        return "broken characters"
    return row
