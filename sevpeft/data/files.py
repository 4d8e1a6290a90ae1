"""Reads CSV, TSV, XLSX, JSON, JSON lines and Parquet files (each also gzipped) as rows of named cells.

A damaged file is an error with its line or row. Messages give numbers and column names only, never text of patients.
Only a JSON document is read into memory as a whole; other formats are streamed.
"""

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

from sevpeft.data.columns import CELL_COUNT, FILE_COLUMN, UNFIT, count_known, listed, map_columns
from sevpeft.errors import DataError, WeightError
from sevpeft.recipe import DataSection
from sevpeft.runs import json_lines, json_problem, unique_keys

Row = tuple[int, dict[str, Any]]

# Description and rows in a folder that `sevpeft prepare` made.
PREPARED_ABOUT, PREPARED_ROWS = "dataset.json", "consultations.parquet"

_JSON = (".json", ".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", ".xlsx", *_JSON, ".parquet")
_QUICK = 4_000_000  # bytes that are read within a second
# The first line of a CSV file may declare its separator for Excel.
_SEP = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_MOST_TITLES = 5  # records before the header


@dataclass(frozen=True)
class Part:
    """The rows of one file or sheet."""

    place: str  # prefix of a row's number in messages, such as "x.csv, line"
    names: list[str]
    read: Callable[[Collection[str]], Iterator[Row]]  # (number from 1, cells) with at least the given columns
    file: str = ""  # name of the file, if there are several


@dataclass
class Table:
    """The rows of several parts in order. Numbers continue from part to part."""

    parts: list[Part]
    label: str  # name in messages
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
        """The file or sheet, and the number there, of a row that was read, for messages."""
        at = bisect.bisect_left(self.begins, number) - 1
        return f"{self.parts[at].place} {number - self.begins[at]}"


def file_format(path: Path) -> str | None:
    """The suffix that sets the format of `path` (".csv" of "x.csv.gz"), None for other suffixes."""
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    return suffix if suffix in SUFFIXES else None


def files_of(given: str, path: Path) -> list[Path]:
    """The files of a path, a pattern or a folder, sorted; empty for a Hub id."""
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        matches = [file for file in path.iterdir() if file_format(file) and not file.name.startswith((".", "~$"))]
    elif glob.has_magic(given):
        matches = [Path(name) for name in glob.glob(str(path), recursive=True)]
    elif file_format(path) is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given):
        return []
    else:  # nor a pipe or a device, which may never end
        raise DataError(f"data.path={given}: there is no such file.")
    files = sorted(file for file in matches if file.is_file())
    if not files:
        raise DataError(f"data.path={given}: there is no file in this folder or pattern that can be read.")
    formats = list(dict.fromkeys(file_format(file) or file.suffix for file in files))
    if len(formats) > 1:  # one file may be a copy of another
        raise DataError(f"data.path={given} has files of several formats: name one, such as *{' or *'.join(formats)}.")
    return files


def is_prepared(path: Path) -> bool:
    """Whether `path` is a folder that `sevpeft prepare` made."""
    return os.path.isfile(path / PREPARED_ABOUT) and os.path.isfile(path / PREPARED_ROWS)


def named(data: DataSection) -> dict[str, str | None]:
    """Canonical field -> column that the user named, or None."""
    fields = ("question", "answer", "severity", "id", "dialect", "split")
    return {field: getattr(data, f"{field}_column") for field in fields}


def check_source(data: DataSection, *, needs_severity: bool = False) -> None:
    """Raises DataError if files are missing or lack a column. Loads no heavy library and reads no large file or Hub."""
    path, chosen = Path(data.path).expanduser(), named(data)
    if data.path.startswith("builtin:") or is_prepared(path):
        return
    paths = files_of(data.path, path)
    if paths and (file_format(paths[0]) in (".csv", ".tsv") or sum(file.stat().st_size for file in paths) < _QUICK):
        table = open_files(paths, data.encoding, chosen)
        columns = map_columns(table.names, chosen, table.label) if table.names else {"severity": ""}
        if needs_severity and not any(re.match("severity|p_", field) for field in columns):
            remedy = "set data.severity_column=NAME, severity.source=rules, or severity.control=uniform for no weights"
            raise WeightError(f"{data.path} has no column of severities or probabilities: {remedy}.")


def open_files(paths: Sequence[Path], encoding: str | None, chosen: Mapping[str, str | None]) -> Table:
    """The rows of one file, or of several files with the same columns and an added column `file`.

    `chosen` columns select the sheets of a workbook. Raises DataError, now or while reading, for a file that is
    damaged, has another format than its suffix or has other columns.
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
            raise DataError(f"{path.name} has none of the suffixes {', '.join(SUFFIXES)}, each also with .gz.")
        else:
            codec = _checked_encoding(path, encoding)
            records = partial(_delimited, path, codec, "," if suffix == ".csv" else "\t")
            parts = [_json(path, codec, suffix) if suffix in _JSON else _with_header(path.name, "line", records)]
        for part in parts:
            if repeated := {name: None for name in part.names if part.names.count(name) > 1}:
                raise DataError(f"{path.name} has more than one column named {listed(repeated)}: rename all but one.")
            table.parts.append(replace(part, file=path.name) if several else part)
            # JSON rows may omit names; other formats need the same columns in every part.
            if (only := set(part.names) ^ set(table.parts[0].names)) and suffix not in _JSON:
                either = f"{path.name} or {paths[0].name}"
                raise DataError(f"{either} lacks {listed(sorted(only))}: rename the columns alike.")
    return replace(table, note="; ".join(notes))


@contextlib.contextmanager
def _opened(path: Path, parse: Callable[[Any], Any], problem: str, *, text: bool = False) -> Iterator[Any]:
    """Yields `parse(file)`. Its errors become a DataError that the file has this `problem`."""
    packed, errors = path.suffix.lower() == ".gz", UnicodeError if text else Exception
    with gzip.open(path) if packed else path.open("rb") as stream:
        try:
            # Libraries seek in the file; gzip data can only be read in order, so it is unpacked in memory.
            yield parse(io.BytesIO(stream.read()) if packed and not text else stream)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise DataError(f"{path.name} is not gzip data, or is cut off: copy or download it again.") from None
        except DataError:
            raise
        except errors:  # openpyxl passes on errors of zipfile, the XML parser and missing parts
            raise DataError(f"{path.name} {problem}.") from None


def _text(path: Path, encoding: str) -> contextlib.AbstractContextManager[io.TextIOWrapper]:
    remedy = "save it as UTF-8, set data.encoding=cp1256 for an old Arabic file, or correct its suffix"
    problem = f"is not text in {encoding.removesuffix('-sig')}: {remedy}"
    return _opened(path, partial(io.TextIOWrapper, encoding=encoding, newline=""), problem, text=True)


def _checked_encoding(path: Path, encoding: str | None) -> str:
    """The codec of a text file: the given encoding, UTF-16 for a file with its byte order mark, or UTF-8."""
    with _opened(path, lambda file: file.read(2), "", text=True) as mark:
        encoding = encoding or ("utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8")
    try:
        codec = codecs.lookup(io.TextIOWrapper(io.BytesIO(), encoding).encoding).name
    except (LookupError, ValueError):  # unknown, or a codec of bytes, such as hex
        raise DataError(f"data.encoding={encoding} is not a text encoding: remove it, or set cp1256.") from None
    if codec in ("utf-8", "ascii"):
        return "utf-8-sig"
    letters = ""
    with contextlib.suppress(DataError), _text(path, "utf-8") as text:
        letters = text.read(1 << 16)
    # Every byte is a character in Windows-1256: UTF-8 read as such would be gibberish without an error.
    if not letters.isascii() and not codec.startswith("utf"):
        raise DataError(f"{path.name} is UTF-8, not {encoding}: remove data.encoding.")
    return codec


def _with_header(
    label: str, unit: str, records: Callable[[], Iterator[tuple[int, list[Any]]]], padded: bool = False
) -> Part:
    """The records after the header. Columns without a name, such as a data frame's index, are dropped.

    The header is the first record, or a later one with several known names if all records before it have fewer cells.
    """
    begin = [cells for _, cells in itertools.islice(records(), _MOST_TITLES + 1)] or [[]]
    known, filled = [count_known(cells) for cells in begin], [sum(map(bool, cells)) for cells in begin]
    at = known.index(max(known))
    at = at if known[at] > 1 and filled[at] > max(filled[:at], default=0) else 0
    first = begin[at]
    names = ["" if cell is None else str(cell).strip().strip("\ufeff\u200e\u200f") for cell in first]

    def read(_: Collection[str]) -> Iterator[Row]:
        for number, cells in itertools.islice(records(), at + 1, None):
            if padded:  # empty last cells are missing
                cells = cells + [None] * (len(names) - len(cells))
            if len(cells) != len(names):
                yield number, {UNFIT: CELL_COUNT, "cells": cells}
            elif cells != first:  # not the header of another file that was appended
                yield number, {name: cell for name, cell in zip(names, cells, strict=True) if name}

    return Part(f"{label}, {unit}", list(filter(None, names)), read)


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    """Lines without the byte order marks of concatenated files. Raises DataError for a zero byte."""
    for number, line in enumerate(text, start=1):
        if "\0" in line:
            # In UTF-16 every second byte is zero in ASCII text and 6 in Arabic text.
            utf_16 = 1 / 3 < (line.count("\0") + line.count("\6")) / len(line) < 2 / 3
            place = f"line {number}, byte {len(line.partition(chr(0))[0].encode()) + 1}"
            remedy = "the file seems to be UTF-16: set data.encoding=utf-16" if utf_16 else "remove it"
            raise DataError(f"{path.name}, {place}: a zero byte: {remedy}.")
        yield line.removeprefix("\ufeff")


def _delimiter(header: str, default: str) -> str:
    """The separator that gives the most known names; among equals, the most frequent one."""
    unquoted = re.sub('"[^"]*"', "", header)
    # Excel writes ";" if the comma is the decimal mark, as in many Arab countries.
    return max((default, ",", ";", "\t", "|"), key=lambda mark: (count_known(header.split(mark)), unquoted.count(mark)))


def _delimited(path: Path, encoding: str, default: str) -> Iterator[tuple[int, list[Any]]]:
    csv.field_size_limit(1 << 24)  # characters of a cell; an open quote would fill the memory
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
            cause = "a quote is stray or not closed, or a cell too long: quote cells, and double the quotes inside them"
            raise DataError(f"{path.name}, line {number}: {cause}.") from None


def _workbook(path: Path, chosen: Mapping[str, str | None]) -> tuple[list[Part], str]:
    """The sheets with consultations, and a note that names them and the sheets that were left out."""
    import openpyxl
    from openpyxl.utils.escape import unescape

    parse = partial(openpyxl.load_workbook, read_only=True, data_only=True)
    opened = partial(_opened, path, parse, "is damaged, has a password or is no workbook: save it as .xlsx")

    def records(title: str) -> Iterator[tuple[int, list[Any]]]:
        with opened() as book:
            book[title].reset_dimensions()  # some programs store a wrong size, which would cut the table off
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
        raise DataError(f"{path.name}: the sheets {listed(fitting)} differ in their columns: rename the columns alike.")
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
    """JSON objects, one per line or in one document. A first pass over all of them collects the names."""
    with _text(path, encoding) as text:
        begin = list(itertools.islice(filter(str.strip, text), 2))
    first = begin[0].lstrip(" \t\ufeff") if begin else ""
    lines = suffix != ".json" and first[:1] != "["
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(first)
        lines = isinstance(content, dict) and (len(begin) > 1 or _records(content) is None)

    def read(_: Collection[str]) -> Iterator[Row]:
        with _text(path, encoding) as text:
            if lines:
                yield from json_lines(_lines(path, text), path.name)
                return
            document = re.sub(r"\]\s*\ufeff\s*\[", ",", text.read())  # of concatenated files
        try:
            rows = _records(json.loads(document, object_pairs_hook=unique_keys))
        except (ValueError, RecursionError) as error:
            place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(f"{path.name}{place} {json_problem(error)}.") from None
        if rows is None or not all(isinstance(cells, dict) for cells in rows):
            remedy = "write rows, in pandas with to_json(FILE, orient='records', lines=True)"
            raise DataError(f"{path.name} is not valid JSON: no array of objects, nor one per line: {remedy}.")
        yield from enumerate(rows, start=1)

    names = dict.fromkeys(name for _, cells in read(()) for name in cells)
    return Part(f"{path.name}, {'line' if lines else 'row'}", list(names), read)


def _records(document: Any) -> list[Any] | None:
    """Rows of an array, of an array under "data" or another key, or of a table in any orient of pandas; else None."""
    if not isinstance(document, dict):
        return document if isinstance(document, list) else None
    data, columns, values = document.get("data"), document.get("columns"), list(document.values())
    tables = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    if isinstance(data, list):
        names = [*map(str, columns)] if isinstance(columns, list) else []  # orient="split"
        # A row of another length, or a name given twice, would lose cells.
        if names and all(isinstance(row, list) and len(row) == len(names) == len({*names}) for row in data):
            return [dict(zip(names, row, strict=True)) for row in data]
        return tables if sum(count_known(table[0]) > 1 for table in tables) > 1 else data  # a validation beside it
    if values and all(isinstance(value, dict) for value in values):
        keys = list(dict.fromkeys(key for value in values for key in value))
        # orient="index" if the inner keys are the column names; a table has more rows than columns.
        if (count_known(document), len(keys)) < (count_known(keys), len(document)):
            return values
        return [{name: column.get(key) for name, column in document.items()} for key in keys]
    # Rows under another key, such as "questions"; with several such tables the choice is ambiguous.
    if tables and count_known(document) < max(1, count_known(tables[0][0])):
        return tables[0] if len(tables) == 1 else tables
    flat = all(isinstance(value, list) and not any(isinstance(cell, dict) for cell in value) for value in values)
    if values and flat and len({len(value) for value in values}) == 1:  # one list per column
        return [dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)]
    return None
