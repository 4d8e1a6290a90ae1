"""Recognizes columns by their names, and makes text, probabilities and conversations of cells.

A row that does not fit is none, with a reason; a message never quotes a cell: it is somebody's complaint.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

import yaml

from sevpeft.console import visible
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError

Names = Mapping[str, str]

FILE_COLUMN = "file"
TURNS = "turns"  # of a conversation, as `as_conversation` writes them
INPUT = "question, 2nd"  # half of a question in the form of Alpaca
UNFIT = "\0unfit"  # has the reason in a row of which no cells stand under the names of the header
PROBABILITIES = ("p_non_critical", "p_neutral", "p_critical")
_NAMES = yaml.safe_load(Path(__file__).with_name("columns.yaml").read_text(encoding="utf-8"))
# Field -> its names, the usual ones and those that count where none of these is there.
_ACCEPTED = {
    field: [[*map(fold_for_matching, part.split(","))] for part in names.split(";")] for field, names in _NAMES.items()
}
_KNOWN = {name for tiers in _ACCEPTED.values() for tier in tiers for name in tier}
_MESSAGES, _CONVERSATIONS = _ACCEPTED.pop("conversation")
FIELDS = tuple(_ACCEPTED)
# What data frames write where there is nothing, and spreadsheets in several languages where a formula failed.
_EMPTY = re.compile(r"nan|<na>|null|#n/a|#nv|#(?!\d)[\w/]{2,14}[!?؟]|err:\d{3}", re.IGNORECASE)
_ROLES = dict.fromkeys(("human", "patient"), "user") | {"developer": "system"}
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "model", "doctor"), "assistant")
# Reasons why a row is none, beside "empty question", "empty answer" and "no answer to train on".
NOT_TEXT, NO_NUMBER = "a list, an object or bytes in place of text", "a probability or weight that is no number"
NO_CONVERSATION = "messages that are not of user and assistant in turn, as text, the assistant last"
SEVERAL_TURNS = "several turns or a weight, which only trainings read"
NO_SEVERITY = (
    "The data has no severity column, nor p_non_critical, p_neutral and p_critical: name one with "
    "data.severity_column=NAME, or take severity.source=rules, or severity.control=uniform to do without."
)
BROKEN, CELL_COUNT = "broken characters", "more or fewer cells than the header (quote cells that hold a separator)"


class UnfitRow(DataError):
    """A cell that cannot be what its column is; `reason` is why the row is none."""

    def __init__(self, reason: str, place: str, column: str) -> None:
        super().__init__(f"{place}: column '{column}' holds {reason}.")
        self.reason = reason


def listed(names: Iterable[str]) -> str:
    """Columns as a message names them; long ones are left out: without a header they are a consultation."""
    names = list(names)
    short = [visible(f"'{name}'") for name in names if len(name) <= 40][:20]
    more = len(names) - len(short)
    return ", ".join(short) + (f"{' and ' if short else ''}{more} more or longer ones" if more else "")


def count_known(names: Iterable[Any]) -> int:
    """How many of the names are recognized as those of a column."""
    return sum(fold_for_matching(str(name)) in _KNOWN for name in names)


def map_columns(names: Sequence[str], chosen: Mapping[str, str | None], label: str) -> dict[str, str]:
    """Canonical field -> column of `names`: the `chosen` ones, and the rest as recognized.

    A column of messages (`[{"role": "user", ...}, {"role": "assistant", ...}]`) is the question and the answer at
    once; both then map to it. Of Alpaca's `instruction` and `input`, the question maps to the first, INPUT to the
    second. `chosen["id"] = "row"` numbers the rows, even where there is a column of ids. It is an error where a chosen
    column does not exist, two could be meant, or question or answer is missing.
    """
    numbered = chosen.get("id") == "row" and "row" not in names
    columns: dict[str, str] = {}
    for field, wanted in chosen.items():
        if wanted is None or (field == "id" and numbered):
            continue
        alike = [name for name in names if fold_for_matching(name) == fold_for_matching(wanted)]
        if wanted not in names and len(alike) != 1:
            raise DataError(f"{label} has no column '{wanted}' (data.{field}_column): it has {listed(names)}.")
        columns[field] = wanted if wanted in names else alike[0]
    for field, tiers in _ACCEPTED.items():
        if field == "answer" and fold_for_matching(columns.get("question", "")) in (*_MESSAGES, *_CONVERSATIONS):
            columns.setdefault("answer", columns["question"])
        if field in columns or (field == "id" and numbered):
            continue
        if field == "question" and "answer" not in columns:
            tiers = [[*tiers[0], *_MESSAGES], _CONVERSATIONS, *tiers[1:]]
        for accepted in tiers:
            rank = {name: accepted.index(f) for name in names if (f := fold_for_matching(name)) in accepted}
            found = sorted((name for name in rank if name not in columns.values()), key=rank.__getitem__)
            if found:
                break
        if found and (field not in chosen or (field not in ("question", "answer") and rank[found[0]] == 0)):
            del found[1:]  # the canonical name is meant; for a field without a setting the likeliest is
        if len(found) > 1 and [*map(fold_for_matching, found)] != ["instruction", "input"]:
            could = " and ".join(repr(name) for name in names if name in found)
            raise DataError(f"{label}: {could} could each be the {field}: set data.{field}_column to the right one.")
        columns |= dict(zip((field, INPUT), found, strict=False))
    if missing := [field for field in ("question", "answer") if field not in columns]:
        settings = " and ".join(f"data.{field}_column" for field in missing)
        rest = [name for name in names if name not in columns.values()]
        remedy = f"set {settings} to one of {listed(rest)}{', or add it' if columns else ''}" if rest else "add it"
        if len(rest) == len(names) and min(map(len, names), default=0) > 40:
            remedy = "its first line seems to be a row; write one of names above it, as question,answer"
        if len(names) == 1 and re.search("[ct]sv", label):
            remedy += "; part cells by a comma, semicolon, bar or tab"
        beside = f" beside {listed(columns.values())}" if columns else ""
        raise DataError(f"{label} has no {' and no '.join(missing)} column{beside}: {remedy}.")
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
    """The `free_name` of each of `names`, which is not another's either."""
    free: dict[str, str] = {}
    for name in names:
        free[name] = free_name(name, {*taken, *free.values(), *(other for other in names if other != name)})
    return free


def as_json_value(cell: Any) -> str:
    """For `json.dumps(default=...)`: bytes in base64, anything else as it prints."""
    return base64.b64encode(cell).decode() if isinstance(cell, bytes) else str(cell)


def carried_text(cell: Any) -> str:
    """A cell of a carried column as text: words as they stand, nested values as JSON, bytes in base64."""
    if isinstance(cell, list | dict):
        return json.dumps(cell, ensure_ascii=False, default=as_json_value)
    if isinstance(cell, str | bytes):
        return as_json_value(cell)
    return as_text(cell, "", "")


def as_text(cell: Any, column: str, place: str) -> str:
    """A cell as text, "" where it is empty; UnfitRow for lists, objects and bytes."""
    if isinstance(cell, str):
        return "" if len(cell) < 20 and _EMPTY.fullmatch(cell.strip()) else cell.replace("\r\n", "\n")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, list | dict | bytes):
        raise UnfitRow(NOT_TEXT, place, column)
    if isinstance(cell, float):
        # Spreadsheets and data frames hold whole numbers as floats: the id 12 must not become "12.0".
        return str(int(cell)) if cell.is_integer() else repr(cell)
    return cell.isoformat() if isinstance(cell, date | time) else str(cell)


def as_probability(cell: Any, column: str, place: str) -> float:
    """A cell as a float, NaN where it is empty; whether it is a probability, the weighting judges."""
    try:
        return float(as_text(cell, column, place).strip().replace("٫", ".").replace(",", ".") or "nan")
    except ValueError:
        raise UnfitRow(NO_NUMBER, place, column) from None


def as_messages(cell: Any) -> list[Any] | None:
    """A list, also one of objects that is written as JSON; None for all else."""
    with contextlib.suppress(ValueError, RecursionError):
        cell = json.loads(cell) if isinstance(cell, str) and re.match(r"\s*\[\s*\{", cell) else cell
    return cell if isinstance(cell, list) else None


def _message(message: Mapping[str, Any], column: str, place: str) -> tuple[str, str]:
    """Role and text of a message: `role` and `content`, maybe in parts, or ShareGPT's `from` and `value`."""
    role, content = message.get("role") or message["from"], message["content" if message.get("role") else "value"]
    if isinstance(content, list):
        if any(part.get("type", "text") != "text" for part in content if not isinstance(part, str)):
            raise UnfitRow(NO_CONVERSATION, place, column)
        content = "\n".join(part if isinstance(part, str) else part["text"] for part in content)
    return _ROLES.get(role, role), as_text(content, column, place)


def as_conversation(cell: Any, column: str, place: str, loss_on: str = "last") -> tuple[str, str, str]:
    """(question, answer, turns) of a list of messages or its JSON text: maybe a system's, then user's and assistant's.

    The question is all that the user says, the answer the last one that is trained on; what comes after is left out.
    `turns` is "" for one exchange of weight 1, else JSON of [[question, answer, weight], ...] for `trained_turns`.
    Weight 0 makes an answer context; `loss_on` "last" does that to all but the last. UnfitRow for anything else.
    """
    messages = as_messages(cell)
    if messages == [] or (messages is None and as_text(cell, column, place).strip() in ("", "[]")):
        return "", "", ""
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        messages = messages or [{}]
        read = [_message(message, column, place) for message in messages]
        if read[0][0] == "system":
            messages, read = messages[1:], read[1:]
        if [role for role, _ in read] == ["user", "assistant"] * max(1, len(read) // 2):
            texts = [text for _, text in read]
            given = [message.get("weight") for message in messages[1::2]]
            weights = [1.0 if one is None else as_probability(one, f"{column}.weight", place) for one in given]
            if not all(0 <= weight < math.inf for weight in weights):
                raise UnfitRow(NO_NUMBER, place, column)
            if loss_on == "last":
                weights[:-1] = [0.0] * (len(weights) - 1)
            kept = max((number for number, weight in enumerate(weights, start=1) if weight), default=0)
            asked, answered = texts[: 2 * kept : 2], texts[1 : 2 * kept : 2]
            exchanges = json.dumps(list(zip(asked, answered, weights, strict=False)), ensure_ascii=False)
            question = "\n".join(asked) if all(map(str.strip, asked)) else ""
            answer = answered[-1] if answered and all(map(str.strip, answered)) else ""
            return question, answer, "" if weights == [1.0] else exchanges
    raise UnfitRow(NO_CONVERSATION, place, column)


def trained_turns(question: str, answer: str, turns: str | None) -> Iterator[tuple[str, str, float, list[list[str]]]]:
    """(question, answer, weight, earlier exchanges as [question, answer]) of each answer that is trained on."""
    exchanges: list[list[Any]] = json.loads(turns) if turns else [[question, answer, 1.0]]
    for number, (asked, answered, weight) in enumerate(exchanges):
        if weight:
            yield asked, answered, weight, [one[:2] for one in exchanges[:number]]


def conversation_of(cells: Mapping[str, Any], columns: Names) -> Any:
    """The messages of a row: of one column, or TRL's prompt and completion together; None where both are text."""
    asked, answered = cells.get(columns["question"]), cells.get(columns["answer"])
    if columns["question"] == columns["answer"]:
        return asked if asked is not None else ""
    before, after = as_messages(asked), as_messages(answered)
    if before is None and after is None:
        return None
    before = [{"role": "user", "content": asked}] if before is None else before
    after = [{"role": "assistant", "content": answered}] if after is None else after
    # Answers in the prompt are context: TRL trains on the completion.
    return [message | {"weight": 0} if isinstance(message, dict) else message for message in before] + after


def canonical_row(
    cells: Mapping[str, Any], columns: Names, place: str, carried: Names, loss_on: str | None = None
) -> dict[str, Any] | str:
    """The row under its canonical names, or the reason why it is none ("empty question", ...).

    `loss_on` as in a recipe's `data`; None where conversations of several turns are not read.
    """
    if UNFIT in cells:
        return str(cells[UNFIT])
    row, turns, conversation = dict[str, Any](), "", conversation_of(cells, columns)
    try:
        for field, column in columns.items():
            if conversation is None or field not in ("question", "answer"):
                row[field] = (as_probability if field in PROBABILITIES else as_text)(cells.get(column), column, place)
        if conversation is not None:
            column = columns["question"]
            row["question"], row["answer"], turns = as_conversation(conversation, column, place, loss_on or "last")
            if turns and loss_on is None:
                return SEVERAL_TURNS
            if turns == "[]":
                return "no answer to train on"
    except UnfitRow as unfit:
        return unfit.reason
    row |= {} if loss_on is None else {TURNS: turns}
    if more := row.pop(INPUT, "").strip():
        row["question"] = f"{row['question'].rstrip()}\n{more}".lstrip("\n")
    row |= {name: carried_text(cells.get(column)) for name, column in carried.items()}
    if empty := [field for field in ("question", "answer") if not row[field].strip()]:
        return f"empty {empty[0]}"
    try:
        "".join(value for value in row.values() if isinstance(value, str)).encode()
    except UnicodeEncodeError:  # half an emoji, cut off by whatever wrote the file; Arrow cannot hold it
        return BROKEN
    return row
