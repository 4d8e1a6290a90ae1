"""Maps columns to fields by name, and converts cells to text, probabilities and conversations.

A row that does not fit is rejected with a reason. Messages never quote a cell, because it may be text of a patient.
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
TURNS = "turns"  # column with the turns of a conversation in the format of `as_conversation`
INPUT = "question, 2nd"  # second half of a question in Alpaca format
UNFIT = "\0unfit"  # key with the reason, in a row whose cells do not match the header
PROBABILITIES = ("p_non_critical", "p_neutral", "p_critical")
# A spreadsheet that rounds to two decimals gives sums of .99 or 1.01. A larger error means other numbers.
SUM_TOLERANCE = 0.011
_NAMES = yaml.safe_load(Path(__file__).with_name("columns.yaml").read_text(encoding="utf-8"))
# Field -> [usual names, names that count only if no usual one is present].
_ACCEPTED = {
    field: [[*map(fold_for_matching, part.split(","))] for part in names.split(";")] for field, names in _NAMES.items()
}
_KNOWN = {name for tiers in _ACCEPTED.values() for tier in tiers for name in tier}
_MESSAGES, _CONVERSATIONS = _ACCEPTED.pop("conversation")
FIELDS = tuple(_ACCEPTED)
# Empty cells of data frames, and errors of spreadsheet formulas in several languages.
_EMPTY = re.compile(r"nan|<na>|null|#n/a|#nv|#(?!\d)[\w/]{2,14}[!?؟]|err:\d{3}", re.IGNORECASE)
_ROLES = dict.fromkeys(("human", "patient"), "user") | {"developer": "system"}
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "model", "doctor"), "assistant")
# Reasons to reject a row, beside "empty question", "empty answer" and "no answer to train on".
NOT_TEXT, NO_NUMBER = "a list, an object or bytes in place of text", "a probability or weight that is not a number"
NO_CONVERSATION = "messages that are not text of user and assistant in turn, the assistant last"
SEVERAL_TURNS = "several turns or a weight, which only training reads"
BROKEN, CELL_COUNT = "broken characters", "more or fewer cells than the header (quote cells that hold a separator)"


class UnfitRow(DataError):
    """A cell does not fit its column; `reason` says why the row is rejected."""

    def __init__(self, reason: str, place: str, column: str) -> None:
        super().__init__(f"{place}: column '{column}' holds {reason}.")
        self.reason = reason


def listed(names: Iterable[str]) -> str:
    """Column names for a message, without long ones: in a file without a header they are text of a patient."""
    names = list(names)
    short = [visible(f"'{name}'") for name in names if len(name) <= 40][:20]
    more = len(names) - len(short)
    return ", ".join(short) + (f"{' and ' if short else ''}{more} more or longer ones" if more else "")


def count_known(names: Iterable[Any]) -> int:
    """Number of names that are recognized as column names."""
    return sum(fold_for_matching(str(name)) in _KNOWN for name in names)


def map_columns(names: Sequence[str], chosen: Mapping[str, str | None], label: str) -> dict[str, str]:
    """Canonical field -> column of `names`: the `chosen` columns, and the others by their names.

    Question and answer both map to a column of messages (`[{"role": "user", ...}, {"role": "assistant", ...}]`). With
    Alpaca's `instruction` and `input`, the question maps to the first and INPUT to the second. `chosen["id"] = "row"`
    numbers the rows, even if there is a column of ids. Raises DataError if a chosen column does not exist, a field is
    ambiguous, or question or answer is missing.
    """
    numbered = chosen.get("id") == "row" and "row" not in names
    columns: dict[str, str] = {}
    for field, requested in chosen.items():
        if requested is None or (field == "id" and numbered):
            continue
        similar = [name for name in names if fold_for_matching(name) == fold_for_matching(requested)]
        if requested not in names and len(similar) != 1:
            raise DataError(f"{label} has no column '{requested}' (data.{field}_column): it has {listed(names)}.")
        columns[field] = requested if requested in names else similar[0]
    for field, tiers in _ACCEPTED.items():
        if field == "answer" and fold_for_matching(columns.get("question", "")) in (*_MESSAGES, *_CONVERSATIONS):
            columns.setdefault("answer", columns["question"])
        if field in columns or (field == "id" and numbered):
            continue
        if field == "question" and "answer" not in columns:
            tiers = [[*tiers[0], *_MESSAGES], _CONVERSATIONS, *tiers[1:]]
        for accepted in tiers:
            rank = {name: accepted.index(f) for name in names if (f := fold_for_matching(name)) in accepted}
            matches = sorted((name for name in rank if name not in columns.values()), key=rank.__getitem__)
            if matches:
                break
        if matches and (field not in chosen or (field not in ("question", "answer") and rank[matches[0]] == 0)):
            del matches[1:]  # the canonical name, or the likeliest one of a field without a setting
        if len(matches) > 1 and [*map(fold_for_matching, matches)] != ["instruction", "input"]:
            each = " and ".join(repr(name) for name in names if name in matches)
            raise DataError(f"{label}: {each} could each be the {field}: set data.{field}_column to the right one.")
        columns |= dict(zip((field, INPUT), matches, strict=False))
    if missing := [field for field in ("question", "answer") if field not in columns]:
        settings = " and ".join(f"data.{field}_column" for field in missing)
        rest = [name for name in names if name not in columns.values()]
        remedy = f"set {settings} to one of {listed(rest)}{', or add it' if columns else ''}" if rest else "add it"
        if len(rest) == len(names) and min(map(len, names), default=0) > 40:
            remedy = "its first line seems to be a row; add a line of names above it, such as question,answer"
        if len(names) == 1 and re.search("[ct]sv", label):
            remedy += "; separate cells with a comma, semicolon, bar or tab"
        known = f" beside {listed(columns.values())}" if columns else ""
        raise DataError(f"{label} has no {' and no '.join(missing)} column{known}: {remedy}.")
    shared = [field for field in columns if list(columns.values()).count(columns[field]) > 1]
    if shared and set(shared) != {"question", "answer"}:
        raise DataError(f"{label}: column '{columns[shared[0]]}' is set for {' and '.join(shared)}: give each its own.")
    return columns


def free_name(name: str, taken: Collection[str]) -> str:
    """`name` with as many prefixes "original_" as it needs to be none of `taken`."""
    while name in taken:
        name = f"original_{name}"
    return name


def free_names(names: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """Name -> its `free_name`, each different from the others."""
    free: dict[str, str] = {}
    for name in names:
        free[name] = free_name(name, {*taken, *free.values(), *(other for other in names if other != name)})
    return free


def as_json_value(cell: Any) -> str:
    """For `json.dumps(default=...)`: bytes in base64, anything else as str."""
    return base64.b64encode(cell).decode() if isinstance(cell, bytes) else str(cell)


def carried_text(cell: Any) -> str:
    """A cell of a carried column as text: strings unchanged, nested values as JSON, bytes in base64."""
    if isinstance(cell, list | dict):
        return json.dumps(cell, ensure_ascii=False, default=as_json_value)
    if isinstance(cell, str | bytes):
        return as_json_value(cell)
    return as_text(cell, "", "")


def as_text(cell: Any, column: str, place: str) -> str:
    """A cell as text, "" if it is empty. Raises UnfitRow for lists, objects and bytes."""
    if isinstance(cell, str):
        return "" if len(cell) < 20 and _EMPTY.fullmatch(cell.strip()) else cell.replace("\r\n", "\n")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, list | dict | bytes):
        raise UnfitRow(NOT_TEXT, place, column)
    if isinstance(cell, float):
        # Spreadsheets and data frames store integers as floats: the id 12 must not become "12.0".
        return str(int(cell)) if cell.is_integer() else repr(cell)
    return cell.isoformat() if isinstance(cell, date | time) else str(cell)


def as_probability(cell: Any, column: str, place: str) -> float:
    """A cell as a float, NaN if it is empty. severity.probabilities checks the range."""
    try:
        return float(as_text(cell, column, place).strip().replace("٫", ".").replace(",", ".") or "nan")
    except ValueError:
        raise UnfitRow(NO_NUMBER, place, column) from None


def as_messages(cell: Any) -> list[Any] | None:
    """A list of objects, itself or as a JSON text; None for anything else."""
    with contextlib.suppress(ValueError, RecursionError):
        cell = json.loads(cell) if isinstance(cell, str) and re.match(r"\s*\[\s*\{", cell) else cell
    return cell if isinstance(cell, list) and all(isinstance(message, dict) for message in cell) else None


def _message(message: Mapping[str, Any], column: str, place: str) -> tuple[str, str]:
    """Role and text of a message: `role` and `content` (text or parts), or ShareGPT's `from` and `value`."""
    role, content = message.get("role") or message["from"], message["content" if message.get("role") else "value"]
    if isinstance(content, list):
        if any(part.get("type", "text") != "text" for part in content if not isinstance(part, str)):
            raise UnfitRow(NO_CONVERSATION, place, column)
        content = "\n".join(part if isinstance(part, str) else part["text"] for part in content)
    return _ROLES.get(role, role), as_text(content, column, place)


def as_conversation(cell: Any, column: str, place: str, loss_on: str = "last") -> tuple[str, str, str]:
    """(question, answer, turns) of a list of messages or its JSON text.

    User and assistant alternate; a system message before them is dropped. The question joins all user messages. The
    answer is the last one with a weight above 0; later messages are dropped. `turns` is "" for one exchange of weight
    1, else JSON of [[question, answer, weight], ...]. An answer of weight 0 is context only; `loss_on` "last" gives
    weight 0 to all answers but the last. Raises UnfitRow for anything else.
    """
    messages = as_messages(cell)
    if messages == [] or (messages is None and as_text(cell, column, place).strip() in ("", "[]")):
        return "", "", ""
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        messages = messages or [{}]
        parsed = [_message(message, column, place) for message in messages]
        if parsed[0][0] == "system":
            messages, parsed = messages[1:], parsed[1:]
        if [role for role, _ in parsed] == ["user", "assistant"] * max(1, len(parsed) // 2):
            texts = [text for _, text in parsed]
            cells = [message.get("weight") for message in messages[1::2]]
            weights = [1.0 if cell is None else as_probability(cell, f"{column}.weight", place) for cell in cells]
            if not all(0 <= weight < math.inf for weight in weights):
                raise UnfitRow(NO_NUMBER, place, column)
            if loss_on == "last":
                weights[:-1] = [0.0] * (len(weights) - 1)
            kept = max((number for number, weight in enumerate(weights, start=1) if weight), default=0)
            questions, answers = texts[: 2 * kept : 2], texts[1 : 2 * kept : 2]
            exchanges = json.dumps(list(zip(questions, answers, weights, strict=False)), ensure_ascii=False)
            question = "\n".join(questions) if all(map(str.strip, questions)) else ""
            answer = answers[-1] if answers and all(map(str.strip, answers)) else ""
            return question, answer, "" if weights == [1.0] else exchanges
    raise UnfitRow(NO_CONVERSATION, place, column)


def trained_turns(question: str, answer: str, turns: str | None) -> Iterator[tuple[str, str, float, list[list[str]]]]:
    """Yields (question, answer, weight, earlier [question, answer] pairs) of each answer with a weight above 0."""
    exchanges: list[list[Any]] = json.loads(turns) if turns else [[question, answer, 1.0]]
    for number, (question, answer, weight) in enumerate(exchanges):
        if weight:
            yield question, answer, weight, [exchange[:2] for exchange in exchanges[:number]]


def conversation_of(cells: Mapping[str, Any], columns: Names) -> Any:
    """The messages of a row, from one column or from TRL's prompt and completion; None if both are text."""
    question, answer = cells.get(columns["question"]), cells.get(columns["answer"])
    if columns["question"] == columns["answer"]:
        return question if question is not None else ""
    prompt, completion = as_messages(question), as_messages(answer)
    if prompt is None and completion is None:
        return None
    prompt = [{"role": "user", "content": question}] if prompt is None else prompt
    completion = [{"role": "assistant", "content": answer}] if completion is None else completion
    # Answers in the prompt are context: TRL trains on the completion only.
    return [message | {"weight": 0} for message in prompt] + completion


def canonical_row(
    cells: Mapping[str, Any], columns: Names, place: str, carried: Names, loss_on: str | None = None
) -> dict[str, Any] | str:
    """The row with its canonical names, or the reason to reject it ("empty question", ...).

    `loss_on` is data.loss_on of a recipe, or None to reject conversations of several turns.
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
    except UnicodeEncodeError:  # half of an emoji, which Arrow cannot store
        return BROKEN
    return row
