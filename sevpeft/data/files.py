"""Reads CSV, TSV, XLSX, JSON, JSON lines and Parquet files (each also gzipped) as rows of cells under their names.

A damaged file is an error with its line or row. Messages name numbers and columns only: a cell is somebody's complaint.
Of all formats but a JSON document no more than a batch of rows is in memory.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sevpeft.data.columns import CELL_COUNT, FILE_COLUMN, NO_SEVERITY, UNFIT, count_known, listed, map_columns
from sevpeft.errors import DataError, WeightError
from sevpeft.recipe import DataSection
from sevpeft.runs import json_lines, json_problem

Row = tuple[int, dict[str, Any]]

PREPARED_ABOUT = "dataset.json"  # describes a folder that `sevpeft prepare` made

_JSON = (".json", ".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", ".xlsx", *_JSON, ".parquet")
_QUICK = 4_000_000  # bytes of files that are read within a second
# A separator that Excel is declared of in a first line of its own.
_SEP = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_MOST_TITLES = 5  # records before the one with the names


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


def files_of(given: str, path: Path) -> list[Path]:
    """The files that a path or a pattern names, or of a folder those that are read; none where it must be a Hub id."""
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = [file for file in path.iterdir() if file_format(file) and not file.name.startswith((".", "~$"))]
    elif glob.has_magic(given):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    elif file_format(path) is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given):
        return []
    else:  # a pipe or a device is none either: it may never end
        raise DataError(f"data.path={given}: there is no such file.")
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise DataError(f"data.path={given}: there is no file in this folder or pattern that is read here.")
    formats = list(dict.fromkeys(file_format(file) or file.suffix for file in files))
    if len(formats) > 1:  # one may hold the rows of another once more
        raise DataError(f"data.path={given} names files of several formats: name one, as *{' or *'.join(formats)}.")
    return files


def named(data: DataSection) -> dict[str, str | None]:
    """Canonical field -> column that the user named."""
    return {of: getattr(data, f"{of}_column") for of in ("question", "answer", "severity", "id", "dialect", "split")}


def check_source(data: DataSection, *, needs_severity: bool = False) -> None:
    """Raises DataError where files are absent or lack a question or an answer, before any library is loaded.

    Nothing is looked up on the Hub. Large files of formats that are read whole are left to `load_consultations`.
    """
    path, chosen = Path(data.path).expanduser(), named(data)
    if data.path.startswith("builtin:") or (path / PREPARED_ABOUT).is_file():
        return
    paths = files_of(data.path, path)
    if paths and (file_format(paths[0]) in (".csv", ".tsv") or sum(one.stat().st_size for one in paths) < _QUICK):
        table = open_files(paths, data.encoding, chosen)
        columns = map_columns(table.names, chosen, table.label) if table.names else {"severity": ""}
        if needs_severity and not any(re.match("severity|p_", field) for field in columns):
            raise WeightError(f"{data.path}: {NO_SEVERITY}")


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
    """The codec to read a text file with, by default UTF-8 or, where it begins with its mark, UTF-16."""
    with _opened(path, lambda file: file.read(2), "", text=True) as mark:
        encoding = encoding or ("utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8")
    try:
        codec = codecs.lookup(io.TextIOWrapper(io.BytesIO(), encoding).encoding).name
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


def _with_header(
    label: str, unit: str, records: Callable[[], Iterator[tuple[int, list[Any]]]], padded: bool = False
) -> Part:
    """The records after the one that holds the names. Columns without one are left out: a data frame's index.

    It is the first one, but for titles: records of fewer cells before one in which several names are recognized.
    """
    begin = [cells for _, cells in itertools.islice(records(), _MOST_TITLES + 1)] or [[]]
    known, filled = [count_known(cells) for cells in begin], [sum(map(bool, cells)) for cells in begin]
    at = known.index(max(known))
    at = at if known[at] > 1 and filled[at] > max(filled[:at], default=0) else 0
    first = begin[at]
    names = ["" if cell is None else str(cell).strip().strip("\ufeff\u200e\u200f") for cell in first]

    def read(_: Collection[str]) -> Iterator[Row]:
        for number, cells in itertools.islice(records(), at + 1, None):
            if padded:  # the last cells of a row that are empty
                cells = cells + [None] * (len(names) - len(cells))
            if len(cells) != len(names):
                yield number, {UNFIT: CELL_COUNT, "cells": cells}
            elif cells != first:  # the header of a file that was put behind another one
                yield number, {name: cell for name, cell in zip(names, cells, strict=True) if name}

    return Part(f"{label}, {unit}", list(filter(None, names)), read)


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    """Lines without the byte order marks that files keep which are put one behind the other."""
    for number, line in enumerate(text, start=1):
        if "\0" in line:
            # In UTF-16 every other byte of ASCII is zero, and of Arabic letters it is 6.
            utf_16 = 1 / 3 < (line.count("\0") + line.count("\6")) / len(line) < 2 / 3
            place = f"line {number}, byte {len(line.partition(chr(0))[0].encode()) + 1}"
            remedy = "the file seems to be UTF-16: set data.encoding=utf-16" if utf_16 else "remove it"
            raise DataError(f"{path.name}, {place}: a zero byte: {remedy}.")
        yield line.removeprefix("\ufeff")


def _delimiter(header: str, default: str) -> str:
    """The separator with which most names are recognized, or else the most frequent one."""
    unquoted = re.sub('"[^"]*"', "", header)
    # Excel writes ";" where the comma is the decimal mark, as in much of the Arab world.
    return max((default, ",", ";", "\t", "|"), key=lambda one: (count_known(header.split(one)), unquoted.count(one)))


def _delimited(path: Path, encoding: str, default: str) -> Iterator[tuple[int, list[Any]]]:
    csv.field_size_limit(1 << 24)  # letters of a cell; more is a quote that is not closed, and would fill the memory
    with _text(path, encoding) as text:
        lines = _lines(path, text)
        first = next(lines, "")
        declared = _SEP.fullmatch(first)
        first = next(lines, "") if declared else first
        delimiter = declared[1] if declared else _delimiter(first, default)
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        number = before = 2 if declared else 1
        try:
            for cells in reader:
                if any(map(str.strip, cells)):
                    yield number, cells
                number = reader.line_num + before
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
            for number, values in enumerate(book[title].iter_rows(values_only=True), start=1):
                cells = [unescape(cell) if isinstance(cell, str) else cell for cell in values]
                while cells and cells[-1] is None:
                    cells.pop()
                if cells:
                    yield number, cells

    with opened() as book:
        titles = [sheet.title for sheet in book.worksheets]
    place = f"{path.name}, sheet"
    sheets = {name: _with_header(f"{place} '{name}'", "row", partial(records, name), padded=True) for name in titles}
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
    """Objects, one a line, or in a document. All are read once to know the names that they bring."""
    with _text(path, encoding) as text:
        several = list(itertools.islice(filter(str.strip, text), 2))
    first = several[0].lstrip(" \t\ufeff") if several else ""
    lines = suffix != ".json" and first[:1] != "["
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(first)
        lines = isinstance(content, dict) and (len(several) > 1 or _records(content) is None)

    def read(_: Collection[str]) -> Iterator[Row]:
        with _text(path, encoding) as text:
            if lines:
                yield from json_lines(_lines(path, text), path.name)
                return
            document = re.sub(r"\]\s*\ufeff\s*\[", ",", text.read())  # of files put one behind the other
        try:  # Python's parser has limits
            rows = _records(json.loads(document))
        except (ValueError, RecursionError) as error:
            place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(f"{path.name}{place} {json_problem(error)}.") from None
        if rows is None or not all(isinstance(cells, dict) for cells in rows):
            remedy = "write rows, as pandas does with to_json(FILE, orient='records', lines=True)"
            raise DataError(f"{path.name} is not valid JSON data: no array of objects, nor one a line: {remedy}.")
        yield from enumerate(rows, start=1)

    names = dict.fromkeys(name for _, cells in read(()) for name in cells)
    return Part(f"{path.name}, {'line' if lines else 'row'}", list(names), read)


def _records(document: Any) -> list[Any] | None:
    """Rows of an array, of one under "data", or of a table as pandas writes it in any orient; None for all else."""
    if not isinstance(document, dict):
        return document if isinstance(document, list) else None
    data, columns, values = document.get("data"), document.get("columns"), list(document.values())
    if isinstance(data, list):
        if isinstance(columns, list) and all(isinstance(row, list) for row in data):  # orient="split"
            return [dict(zip(map(str, columns), row, strict=False)) for row in data]
        return data
    if values and all(isinstance(value, dict) for value in values):
        keys = list(dict.fromkeys(key for value in values for key in value))
        # orient="index" if the names of columns stand inside; a table is longer than it is wide.
        if (count_known(document), len(keys)) < (count_known(keys), len(document)):
            return values
        return [{name: column.get(key) for name, column in document.items()} for key in keys]
    tables = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    # Rows under another name, which may be "questions"; of several such tables, none is meant.
    if tables and count_known(document) < max(1, count_known(tables[0][0])):
        return tables[0] if len(tables) == 1 else tables
    flat = all(isinstance(value, list) and not any(isinstance(one, dict) for one in value) for value in values)
    if values and flat and len({len(value) for value in values}) == 1:  # a column a list
        return [dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)]
    return None
