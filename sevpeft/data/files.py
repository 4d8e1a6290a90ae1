"""Reads CSV, TSV, XLSX, JSON, JSON lines and Parquet files (each also gzipped), recognizes columns, reads cells.

A damaged file is an error with its line or row. Messages name numbers and columns only: a cell is somebody's complaint.
Of all formats but a JSON array no more than a batch of rows is in memory.
"""

from __future__ import annotations

import base64
import bisect
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, time
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.runs import json_lines, json_problem

Row = tuple[int, dict[str, Any]]
Names = Mapping[str, str]

FILE_COLUMN = "file"
TURNS = "turns"  # of a conversation, as `as_conversation` writes them
_JSON = (".json", ".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", ".xlsx", *_JSON, ".parquet")
PROBABILITIES = ("p_non_critical", "p_neutral", "p_critical")
_NAMES = yaml.safe_load(Path(__file__).with_name("columns.yaml").read_text(encoding="utf-8"))
_ACCEPTED = {field: [*map(fold_for_matching, names.split(","))] for field, names in _NAMES.items()}
FIELDS = tuple(_ACCEPTED)
# What spreadsheets and data frames write where there is nothing, or a formula failed.
_EMPTY_WORDS = {"nan", "<na>", "null", "#n/a", "#name?", "#ref!", "#value!", "#div/0!", "#num!", "#null!"}


@dataclass(frozen=True)
class Part:
    """The rows of one file or sheet."""

    place: str  # what a row's number follows in a message, such as "x.csv, line"
    names: list[str]
    read: Callable[[Collection[str]], Iterator[Row]]  # (number from 1, cells); at least the columns asked for
    file: str = ""  # its name, where rows of several files have the column `file`


@dataclass
class Table:
    """The rows of several parts, one part after the other and numbered on."""

    parts: list[Part]
    label: str  # what messages call it
    note: str = ""  # which sheets of a workbook were read
    begins: Sequence[int] = ()  # number of rows before each part

    @property
    def names(self) -> list[str]:
        names = [name for part in self.parts for name in part.names]
        return list(dict.fromkeys(names + [FILE_COLUMN for part in self.parts if part.file]))

    def read(self, columns: Collection[str]) -> Iterator[Row]:
        """Yields (number, cells) of each row, with the `columns` that its part has."""
        self.begins = begins = list[int]()
        last = 0
        for part in self.parts:
            begins.append(last)
            for number, cells in part.read(set(columns) & set(part.names)):
                last = begins[-1] + number
                yield last, {FILE_COLUMN: part.file, **cells} if part.file else cells

    def place(self, number: int) -> str:
        """Where a row that was read stands, for messages."""
        at = bisect.bisect_left(self.begins, number) - 1
        return f"{self.parts[at].place} {number - self.begins[at]}"


def file_format(path: Path) -> str | None:
    """The suffix that decides how `path` is read (".csv" of "x.csv.gz"), None where none does."""
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    return suffix if suffix in SUFFIXES else None


def open_files(paths: Sequence[Path], encoding: str | None, chosen: Mapping[str, str | None]) -> Table:
    """The rows of one file, or of several of the same columns, in whose rows `file` names the file.

    The right sheets of a workbook are found by the columns that are `chosen` for fields. A file that is damaged, not
    what its name says or of other columns is a DataError, now or while reading.
    """
    several = len(paths) > 1
    table = Table([], paths[0].name + (f" and {len(paths) - 1} more" if several else ""))
    notes = []
    for path in paths:
        suffix = file_format(path)
        if suffix == ".xlsx":
            parts, note = _workbook(path, chosen)
            notes += [f"{path.name}: {note}" if several else note] * bool(note)
        elif suffix == ".parquet":
            parts = [_parquet(path)]
        elif suffix is None:
            raise DataError(f"{path.name} has no suffix that is read here: {', '.join(SUFFIXES)}, each also .gz.")
        else:
            codec = _checked_encoding(path, encoding)
            records = partial(_delimited, path, codec, "," if suffix == ".csv" else "\t")
            parts = [_json(path, codec, suffix) if suffix in _JSON else _with_header(path.name, "line", records)]
        for part in parts:
            if twice := {name: None for name in part.names if part.names.count(name) > 1}:
                raise DataError(f"{path.name} has more than one column named {listed(twice)}: rename them apart.")
            table.parts.append(replace(part, file=path.name) if several else part)
            # Rows of JSON bring their own names; in a table, a column that is missing is another table.
            if (only := set(part.names) ^ set(table.parts[0].names)) and suffix not in _JSON:
                either = f"{path.name} or {paths[0].name}"
                raise DataError(f"{either} lacks {listed(sorted(only))}: rename the columns alike.")
    return replace(table, note="; ".join(notes))


@contextlib.contextmanager
def _opened(path: Path, parse: Callable[[Any], Any], problem: str, *, text: bool = False) -> Iterator[Any]:
    """What `parse` makes of a file's bytes, whose errors become one that the file has this problem."""
    packed, errors = path.suffix.lower() == ".gz", UnicodeError if text else Exception
    with gzip.open(path) if packed else path.open("rb") as stream:
        try:
            # Libraries read out of order, which gzip data can only be in memory.
            yield parse(io.BytesIO(stream.read()) if packed and not text else stream)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise DataError(f"{path.name} is no gzip data, or breaks off: copy or download it again.") from None
        except DataError:
            raise
        except errors:  # openpyxl lets through whatever zipfile, its XML parser or a missing part raises
            raise DataError(f"{path.name} {problem}.") from None


def _text(path: Path, encoding: str) -> contextlib.AbstractContextManager[io.TextIOWrapper]:
    remedy = "save it as UTF-8, set data.encoding=cp1256, as of old Arabic files, or correct its suffix"
    problem = f"is no text in {encoding.removesuffix('-sig')}: {remedy}"
    return _opened(path, partial(io.TextIOWrapper, encoding=encoding, newline=""), problem, text=True)


def _checked_encoding(path: Path, encoding: str | None) -> str:
    """The codec to read a text file with, UTF-8 by default."""
    try:
        codec = codecs.lookup(io.TextIOWrapper(io.BytesIO(), encoding or "utf-8").encoding).name
    except (LookupError, ValueError):  # unknown, or a codec of bytes, such as hex
        raise DataError(f"data.encoding={encoding} is no encoding of text: remove it, or write cp1256.") from None
    if codec in ("utf-8", "ascii"):
        return "utf-8-sig"
    letters = ""
    with contextlib.suppress(DataError), _text(path, "utf-8") as text:
        letters = text.read(1 << 16)
    # Every byte is a character in Windows-1256: UTF-8 read as that trains on gibberish without an error.
    if not letters.isascii() and not codec.startswith("utf"):
        raise DataError(f"{path.name} is UTF-8, not {encoding}: remove data.encoding.")
    return codec


def _with_header(label: str, unit: str, records: Callable[[], Iterator[tuple[int, list[Any]]]]) -> Part:
    """The records after the first, which holds the names. Columns without one are left out: a data frame's index."""
    _, first = next(records(), (0, []))
    names = ["" if cell is None else str(cell).strip().strip("\ufeff\u200e\u200f") for cell in first]

    def read(_: Collection[str]) -> Iterator[Row]:
        for number, cells in itertools.islice(records(), 1, None):
            if len(cells) != len(names):
                cause = f"{len(cells)} cells where the header has {len(names)}"
                raise DataError(f"{label}, {unit} {number}: {cause}: quote cells that hold a separator or line break.")
            yield number, {name: cell for name, cell in zip(names, cells, strict=True) if name}

    return Part(f"{label}, {unit}", list(filter(None, names)), read)


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    for number, line in enumerate(text, start=1):
        if "\0" in line:
            place = f"{path.name}, line {number}, character {line.index(chr(0)) + 1}"
            raise DataError(f"{place}: a zero byte: remove it, or set data.encoding=utf-16.")
        yield line


def _delimited(path: Path, encoding: str, default: str) -> Iterator[tuple[int, list[Any]]]:
    csv.field_size_limit(1 << 24)  # letters of a cell; more is a quote that is not closed, and would fill the memory
    with _text(path, encoding) as text:
        lines = _lines(path, text)
        first = next(lines, "")
        # Excel writes ";" where the comma is the decimal mark, as in much of the Arab world.
        delimiter = max((default, ",", ";", "\t", "|"), key=re.sub('"[^"]*"', "", first).count)
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        number = 1
        try:
            for cells in reader:
                if any(map(str.strip, cells)):
                    yield number, cells
                number = reader.line_num + 1
        except csv.Error:
            cause = "a quote is stray or not closed, or a cell too long: put cells in quotes, and double quotes in them"
            raise DataError(f"{path.name}, line {number}: {cause}.") from None


def _workbook(path: Path, chosen: Mapping[str, str | None]) -> tuple[list[Part], str]:
    """The sheets that hold consultations, and a note of their names and of those that were left out."""
    import openpyxl
    from openpyxl.utils.escape import unescape

    parse = partial(openpyxl.load_workbook, read_only=True, data_only=True)
    opened = partial(_opened, path, parse, "is damaged, has a password or is no workbook: save it as .xlsx")

    def records(title: str) -> Iterator[tuple[int, list[Any]]]:
        with opened() as book:
            book[title].reset_dimensions()  # some exporters write a size that would cut the table off
            width = 0
            for number, values in enumerate(book[title].iter_rows(values_only=True), start=1):
                cells = [unescape(cell) if isinstance(cell, str) else cell for cell in values]
                while cells and cells[-1] is None:
                    cells.pop()
                width = width or len(cells)
                if cells:
                    yield number, cells + [None] * (width - len(cells))

    with opened() as book:
        titles = [sheet.title for sheet in book.worksheets]
    sheets = {title: _with_header(f"{path.name}, sheet '{title}'", "row", partial(records, title)) for title in titles}
    headers = {title: sheet.names for title, sheet in sheets.items() if sheet.names}
    fitting = []
    for title, names in headers.items():
        with contextlib.suppress(DataError):
            map_columns(names, chosen, title)
            fitting.append(title)
    if len({frozenset(headers[title]) for title in fitting}) > 1:
        raise DataError(f"{path.name}: the sheets {listed(fitting)} differ in their columns: rename them alike.")
    used = fitting or sorted(headers, key=lambda title: -len(headers[title]))[:1]
    left_out = [title for title in headers if title not in used]
    note = f"sheets {listed(used)}{', not ' * bool(left_out)}{listed(left_out)}" if len(headers) > 1 else ""
    return [sheets[title] for title in used], note


def _parquet(path: Path) -> Part:
    import pyarrow.parquet as pq

    opened = partial(_opened, path, pq.ParquetFile, "is damaged or no Parquet file: write it again")

    def read(columns: Collection[str]) -> Iterator[Row]:
        with opened() as file:
            batches = file.iter_batches(batch_size=1000, columns=sorted(columns))
            yield from enumerate((cells for batch in batches for cells in batch.to_pylist()), start=1)

    with opened() as file:
        return Part(f"{path.name}, row", file.schema_arrow.names, read)


def _json(path: Path, encoding: str, suffix: str) -> Part:
    """Objects, one a line, in an array or in one under "data". All are read once to know the names that they bring."""
    lines = suffix != ".json"
    with _text(path, encoding) as text, contextlib.suppress(ValueError, RecursionError):
        first = next(filter(str.strip, text), "").lstrip()
        lines = lines or (first[:1] == "{" and not isinstance(json.loads(first).get("data"), list))

    def read(_: Collection[str]) -> Iterator[Row]:
        with _text(path, encoding) as text:
            if lines:
                yield from json_lines(_lines(path, text), path.name)
                return
            document = text.read()
        try:  # Python's parser has limits
            rows = json.loads(document)
        except (ValueError, RecursionError) as error:
            place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(f"{path.name}{place} {json_problem(error)}.") from None
        rows = rows.get("data") if isinstance(rows, dict) else rows
        if not isinstance(rows, list) or not all(isinstance(cells, dict) for cells in rows):
            raise DataError(f"{path.name} is not valid JSON data: it has no array of objects, nor one in each line.")
        yield from enumerate(rows, start=1)

    names = dict.fromkeys(name for _, cells in read(()) for name in cells)
    return Part(f"{path.name}, {'line' if lines else 'row'}", list(names), read)


def listed(names: Iterable[str]) -> str:
    """Columns as a message names them; long ones are left out: without a header they are a consultation."""
    names = list(names)
    short = [f"'{name}'" for name in names if len(name) <= 40][:20]
    more = len(names) - len(short)
    return ", ".join(short) + (f"{' and ' if short else ''}{more} more or longer ones" if more else "")


def map_columns(names: Sequence[str], chosen: Mapping[str, str | None], label: str) -> dict[str, str]:
    """Canonical field -> column of `names`: the `chosen` ones, and the rest as recognized.

    A column of messages (`[{"role": "user", ...}, {"role": "assistant", ...}]`) is the question and the answer at
    once; both then map to it. `chosen["id"] = "row"` numbers the rows, even where there is a column of ids. It is an
    error where a chosen column does not exist, two could be meant, or question or answer is missing.
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
        raise DataError(f"{label} has no {' and no '.join(missing)} column: set {settings} to one of {listed(names)}.")
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


def as_conversation(cell: Any, column: str, place: str, loss_on: str = "last") -> tuple[str, str, str]:
    """(question, answer, turns) of a list of messages or its JSON text: maybe a system's, then user's and assistant's.

    The question is all that the user says, the answer the last one that is trained on; what comes after is left out.
    `turns` is "" for one exchange of weight 1, else JSON of [[question, answer, weight], ...] for `trained_turns`.
    Weight 0 makes an answer context; `loss_on` "last" does that to all but the last.
    """
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
        if isinstance(cell, str):
            cell = json.loads(as_text(cell, column, place).strip() or "null")
        if cell is None or cell == [] or (isinstance(cell, float) and math.isnan(cell)):
            return "", "", ""
        messages = cell[1:] if cell[0]["role"] == "system" else cell
        if [message["role"] for message in messages] == ["user", "assistant"] * max(1, len(messages) // 2):
            texts = [as_text(message["content"], column, place) for message in messages]
            given = [message.get("weight") for message in messages[1::2]]
            weights = [1.0 if one is None else as_probability(one, f"{column}.weight", place) for one in given]
            if not all(0 <= weight < math.inf for weight in weights):
                raise DataError(f"{place}: column '{column}' has a weight that is none: correct it, or leave it out.")
            if loss_on == "last":
                weights[:-1] = [0.0] * (len(weights) - 1)
            kept = max((number for number, weight in enumerate(weights, start=1) if weight), default=0)
            asked, answered = texts[: 2 * kept : 2], texts[1 : 2 * kept : 2]
            exchanges = json.dumps(list(zip(asked, answered, weights, strict=False)), ensure_ascii=False)
            question = "\n".join(asked) if all(map(str.strip, asked)) else ""
            answer = answered[-1] if answered and all(map(str.strip, answered)) else ""
            return question, answer, "" if weights == [1.0] else exchanges
    form = "user and assistant in turn, each with role and content, the assistant last"
    raise DataError(f"{place}: column '{column}' is not {form}: correct or remove the conversation.")


def trained_turns(question: str, answer: str, turns: str | None) -> Iterator[tuple[str, str, float, list[list[str]]]]:
    """(question, answer, weight, earlier exchanges as [question, answer]) of each answer that is trained on."""
    exchanges: list[list[Any]] = json.loads(turns) if turns else [[question, answer, 1.0]]
    for number, (asked, answered, weight) in enumerate(exchanges):
        if weight:
            yield asked, answered, weight, [one[:2] for one in exchanges[:number]]


def canonical_row(
    cells: Mapping[str, Any], columns: Names, place: str, carried: Names, loss_on: str | None = None
) -> dict[str, Any] | str:
    """The row under its canonical names, or the reason why it is none ("empty question", ...).

    `loss_on` as in a recipe's `data`; None where conversations of several turns are not read.
    """
    row: dict[str, Any] = {}
    exchange = columns["question"] == columns["answer"]
    for field, column in columns.items():
        if not exchange or field not in ("question", "answer"):
            row[field] = (as_probability if field in PROBABILITIES else as_text)(cells.get(column), column, place)
    if exchange:
        column = columns["question"]
        row["question"], row["answer"], turns = as_conversation(cells.get(column), column, place, loss_on or "last")
        if turns and loss_on is None:
            form = "one message of the user and one of the assistant, without a weight"
            raise DataError(f"{place}: column '{column}' is not {form}: only trainings read more; split it into rows.")
        if turns == "[]":
            return "no answer to train on"
        row |= {} if loss_on is None else {TURNS: turns}
    row |= {name: carried_text(cells.get(column)) for name, column in carried.items()}
    if empty := [field for field in ("question", "answer") if not row[field].strip()]:
        return f"empty {empty[0]}"
    try:
        "".join(value for value in row.values() if isinstance(value, str)).encode()
    except UnicodeEncodeError:  # half an emoji, cut off by whatever wrote the file; Arrow cannot hold it
        return "broken characters"
    return row
