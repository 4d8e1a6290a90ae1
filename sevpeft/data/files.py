"""Numbered rows of CSV, TSV, XLSX, JSON, JSON lines and Parquet files, each also gzipped.

A damaged file is refused with the line or row at which it went wrong: reading half of a set would train on half of it.
Messages name numbers and columns only, because a cell is somebody's complaint. Of all formats but a JSON array no more
than a batch of rows is in memory.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from sevpeft.data.columns import listed, map_columns
from sevpeft.errors import DataError
from sevpeft.runs import json_lines, json_problem

Row = tuple[int, dict[str, Any]]

FILE_COLUMN = "file"
_JSON = (".json", ".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", ".xlsx", *_JSON, ".parquet")
# Letters of one cell. More is a quote that is not closed, and would fill the memory.
_LONGEST_CELL = 1 << 24


@dataclass(frozen=True)
class Table:
    """Rows of a file, of a sheet, or of several of them.

    Attributes:
        read: yields (number, cells) of each row; the number is 1-based, in lines or rows. Only the columns asked for
            need to be there.
        place: where the row of a number stands, for messages. note: which sheets of a workbook were read.
    """

    names: list[str]
    read: Callable[[Collection[str]], Iterator[Row]]
    place: Callable[[int], str]
    note: str = ""


def file_format(path: Path) -> str | None:
    """The suffix that decides how `path` is read (".csv" of "x.csv.gz"), None where none does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def open_files(paths: Sequence[Path], encoding: str | None, chosen: Mapping[str, str | None]) -> Table:
    """The rows of one file, or of several of the same columns, in whose rows `file` names the file.

    Args:
        encoding: of text files. chosen: columns by field, by which the right sheets of a workbook are found.

    Raises:
        DataError: now or while reading: a file is damaged, not what its name says, or of other columns.
    """
    tables = [_open(path, encoding, chosen) for path in paths]
    if len(tables) == 1:
        return tables[0]
    for path, table in zip(paths, tables, strict=True):
        # Rows of JSON bring their own names; in a table, a column that is missing is another table.
        if (only := set(table.names) ^ set(tables[0].names)) and file_format(path) not in _JSON:
            raise DataError(f"{path.name} or {paths[0].name} lacks {listed(sorted(only))}: rename the columns alike.")
    names = list(dict.fromkeys([*(name for table in tables for name in table.names), FILE_COLUMN]))
    note = "; ".join(f"{path.name}: {table.note}" for path, table in zip(paths, tables, strict=True) if table.note)
    return replace(_joined(tables, [path.name for path in paths]), names=names, note=note)


def _joined(tables: Sequence[Table], files: Sequence[str] | None = None) -> Table:
    """The rows of one table after the other, numbered on, with the name of their file where there are several."""
    begins: list[int] = []

    def read(columns: Collection[str]) -> Iterator[Row]:
        begins.clear()
        last = 0
        for at, table in enumerate(tables):
            begins.append(last)
            for number, cells in table.read(set(columns) & set(table.names)):
                last = begins[-1] + number
                yield last, {FILE_COLUMN: files[at], **cells} if files else cells

    def place(number: int) -> str:
        at = bisect.bisect_left(begins, number) - 1
        return tables[at].place(number - begins[at])

    return Table(tables[0].names, read, place)


def _open(path: Path, encoding: str | None, chosen: Mapping[str, str | None]) -> Table:
    suffix = file_format(path)
    if suffix is None:
        raise DataError(f"{path.name} has no suffix that is read here: {', '.join(SUFFIXES)}, each also .gz.")
    with _binary(path) as stream:
        head = stream.read(1 << 16)
    if not head.strip(b" \t\r\n\0\xef\xbb\xbf"):
        raise DataError(f"{path.name} is empty.")
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".xlsx":
        return _workbook(path, chosen)
    encoding = _checked_encoding(path, head, encoding)
    if suffix in (".csv", ".tsv"):
        return _with_header(path.name, "line", lambda: _delimited(path, encoding, "," if suffix == ".csv" else "\t"))
    return _json(path, encoding, suffix)


@contextlib.contextmanager
def _binary(path: Path) -> Iterator[IO[bytes]]:
    packed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            yield cast(IO[bytes], stream)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path.name} is no gzip data, or breaks off: copy or download it again.") from None


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file that is read out of order, which gzip data can only be in memory."""
    with _binary(path) as stream:
        yield io.BytesIO(stream.read()) if path.suffix.lower() == ".gz" else stream


@contextlib.contextmanager
def _text(path: Path, encoding: str) -> Iterator[io.TextIOWrapper]:
    with _binary(path) as stream:
        try:
            yield io.TextIOWrapper(stream, encoding=encoding, newline="")
        except UnicodeDecodeError:
            remedy = "save it as UTF-8, or set data.encoding=cp1256, as of old Arabic files, or what it is"
            raise DataError(f"{path.name} is not {encoding.removesuffix('-sig')}: {remedy}.") from None


def _checked_encoding(path: Path, head: bytes, encoding: str | None) -> str:
    """The codec to read with, UTF-8 by default, unless the file's start shows that it would read gibberish."""
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"PAR1", b"\xd0\xcf\x11\xe0")):
        raise DataError(f"{path.name} is a workbook or packed data: give it the suffix of what it is.")
    codec = codecs.lookup(encoding or "utf-8").name
    if not codec.startswith("utf"):
        # Every byte is a character in Windows-1256: UTF-8 read as that trains on gibberish without an error.
        with contextlib.suppress(UnicodeDecodeError):
            if not codecs.getincrementaldecoder("utf-8")().decode(head).isascii():
                raise DataError(f"{path.name} is UTF-8, not {encoding}: remove data.encoding.")
    return "utf-8-sig" if codec in ("utf-8", "ascii") else codec


def _with_header(label: str, unit: str, records: Callable[[], Iterator[tuple[int, list[Any]]]]) -> Table:
    """A table whose first record holds the names. Columns without one are left out: the index of a data frame."""
    names = _header(next(records(), (0, []))[1])
    if not any(names):
        raise DataError(f"{label} is empty.")
    _check_names(label, [name for name in names if name])

    def read(columns: Collection[str]) -> Iterator[Row]:
        for number, cells in itertools.islice(records(), 1, None):
            if len(cells) != len(names):
                cause = f"{len(cells)} cells where the header has {len(names)}"
                raise DataError(f"{label}, {unit} {number}: {cause}: quote cells that hold a separator or line break.")
            yield number, {name: cell for name, cell in zip(names, cells, strict=True) if name}

    return Table([name for name in names if name], read, lambda number: f"{label}, {unit} {number}")


def _header(cells: Sequence[Any]) -> list[str]:
    return ["" if cell is None else str(cell).strip().strip("\ufeff\u200e\u200f") for cell in cells]


def _check_names(label: str, names: list[str]) -> None:
    if twice := {name: None for name in names if names.count(name) > 1}:
        raise DataError(f"{label} has more than one column named {listed(twice)}: rename them apart.")


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    for number, line in enumerate(text, start=1):
        if "\0" in line:
            place = line.index("\0") + 1
            remedy = "remove it, or set data.encoding=utf-16"
            raise DataError(f"{path.name}, line {number}, character {place}: a zero byte: {remedy}.")
        yield line


def _delimited(path: Path, encoding: str, default: str) -> Iterator[tuple[int, list[Any]]]:
    csv.field_size_limit(_LONGEST_CELL)
    with _text(path, encoding) as stream:
        lines = _lines(path, stream)
        before, delimiter, first = 0, None, next(lines, "")
        while first and not first.strip():
            before, first = before + 1, next(lines, "")
        if named := re.fullmatch(r"sep=(.)\s*", first, flags=re.IGNORECASE):  # Excel's own way to name it
            delimiter, before, first = named.group(1), before + 1, next(lines, "")
        if delimiter is None:
            # Excel writes ";" where the comma is the decimal mark, as in much of the Arab world.
            delimiter = max((default, ",", ";", "\t"), key=re.sub('"[^"]*"', "", first).count)
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        while True:
            line = before + reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                long = f", or a cell is over {_LONGEST_CELL:,} letters long" if "field limit" in str(error) else ""
                raise DataError(
                    f"{path.name}, line {line}: a quote is stray or not closed in the row that begins there{long}: "
                    'put cells in quotes and double the quotes inside them ("").'
                ) from None
            if cells is None:
                return
            if any(map(str.strip, cells)):
                yield line, cells


@contextlib.contextmanager
def _book(path: Path) -> Iterator[Any]:
    import openpyxl

    with _seekable(path) as stream:
        try:
            yield openpyxl.load_workbook(stream, read_only=True, data_only=True)
        except DataError:
            raise
        except Exception:  # openpyxl lets through whatever zipfile, its XML parser or a missing part raises
            raise DataError(f"{path.name} is damaged, has a password or is no workbook: save it as .xlsx.") from None


def _sheet(sheet: Any) -> Iterator[tuple[int, list[Any]]]:
    from openpyxl.utils.escape import unescape

    sheet.reset_dimensions()  # some exporters write a size that would cut the table off
    width = 0
    for number, values in enumerate(sheet.iter_rows(values_only=True), start=1):
        cells = [unescape(cell) if isinstance(cell, str) else cell for cell in values]
        while cells and cells[-1] is None:
            cells.pop()
        width = width or len(cells)
        if cells:
            yield number, cells + [None] * (width - len(cells))


def _workbook(path: Path, chosen: Mapping[str, str | None]) -> Table:
    """The sheets that hold consultations as one table; the note names them, and those that were left out."""
    with _book(path) as book:
        rows = {sheet.title: _header(next(_sheet(sheet), (0, []))[1]) for sheet in book.worksheets}
    headers = {title: names for title, row in rows.items() if (names := [name for name in row if name])}
    if not headers:
        raise DataError(f"{path.name} is empty.")
    fitting = []
    for title, names in headers.items():
        with contextlib.suppress(DataError):
            map_columns(names, chosen, title)
            fitting.append(title)
    main = fitting[0] if fitting else max(headers, key=lambda title: len(headers[title]))
    alike = [title for title in headers if set(headers[title]) == set(headers[main])]
    if other := [title for title in fitting if title not in alike]:
        sheets = listed([main, other[0]])
        raise DataError(f"{path.name}: the sheets {sheets} have consultations in different columns: rename them alike.")
    left_out = [title for title in headers if title not in alike]
    note = f"sheets {listed(alike)}{', not ' * bool(left_out)}{listed(left_out)}" if len(headers) > 1 else ""

    def table(title: str) -> Table:
        def records() -> Iterator[tuple[int, list[Any]]]:
            with _book(path) as book:
                yield from _sheet(book[title])

        return _with_header(f"{path.name}, sheet '{title}'", "row", records)

    return replace(_joined([table(title) for title in alike]), note=note)


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    @contextlib.contextmanager
    def opened() -> Iterator[pq.ParquetFile]:
        with _seekable(path) as stream:
            try:
                yield pq.ParquetFile(stream)
            except (pa.ArrowException, OSError):  # Arrow's own "unexpected end" is an OSError
                raise DataError(f"{path.name} is damaged or no Parquet file: write it again.") from None

    with opened() as file:
        names = file.schema_arrow.names
    _check_names(path.name, names)

    def read(columns: Collection[str]) -> Iterator[Row]:
        with opened() as file:
            batches = file.iter_batches(batch_size=1000, columns=sorted(columns))
            yield from enumerate((cells for batch in batches for cells in batch.to_pylist()), start=1)

    return Table(names, read, lambda number: f"{path.name}, row {number}")


def _json(path: Path, encoding: str, suffix: str) -> Table:
    """Objects, one a line or in an array. Each brings its own names, so that all are read once to know them."""
    lines = suffix != ".json" or _holds_lines(path, encoding)

    def read(columns: Collection[str]) -> Iterator[Row]:
        with _text(path, encoding) as text:
            yield from json_lines(_lines(path, text), path.name) if lines else _array(text.read(), path.name)

    names = list(dict.fromkeys(name for _, cells in read(()) for name in cells))
    return Table(names, read, lambda number: f"{path.name}, {'line' if lines else 'row'} {number}")


def _holds_lines(path: Path, encoding: str) -> bool:
    with _text(path, encoding) as text, contextlib.suppress(ValueError, RecursionError):
        first = json.loads(next(filter(str.strip, text), ""))
        return isinstance(first, dict) and not isinstance(first.get("data"), list)
    return False


def _array(document: str, label: str) -> Iterator[Row]:
    """The rows of an array, or of the one under "data", by Python's parser, which has limits."""
    number = 0
    try:
        for number, cells in enumerate(_elements(document), start=1):
            if not isinstance(cells, dict):
                raise DataError(f"{label}, row {number} is not a JSON object with named values.")
            yield number, cells
    except (ValueError, RecursionError) as error:
        raise DataError(f"{label}, row {number + 1} or what follows it {json_problem(error)}.") from None


def _elements(document: str) -> Iterator[Any]:
    """One element after the other, so that memory holds the text and not all that it says."""
    mark = re.match(r"\s*\[\s*(\]?)\s*", document)
    if not mark:
        whole = json.loads(document)
        if not isinstance(whole, dict) or not isinstance(whole.get("data"), list):
            raise json.JSONDecodeError("no array of rows, none under data, and no row in each line", document, 0)
        yield from whole["data"]
        return
    decoder, separator = json.JSONDecoder(), re.compile(r"\s*(,|\])\s*")
    while mark and mark[1] != "]":
        element, end = decoder.raw_decode(document, mark.end())
        yield element
        mark = separator.match(document, end)
    if not mark or mark.end() < len(document):
        raise json.JSONDecodeError("expecting , or ] and the end", document, 0)
