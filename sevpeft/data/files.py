"""From one file to a stream of numbered rows: CSV, TSV, XLSX, JSON, JSON lines, Parquet, each also gzipped.

Nothing here holds more than a batch of rows, so that several hundred thousand consultations fit any machine.
A damaged file is refused with the line or row at which it went wrong: quietly reading half of a set would
train on half of it. Messages name numbers and columns only, because a cell is somebody's complaint.
"""

import codecs
import contextlib
import csv
import gzip
import itertools
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, cast

from sevpeft.data.columns import listed
from sevpeft.errors import DataError

Row = tuple[int, dict[str, Any]]

SUFFIXES = (".csv", ".tsv", ".xlsx", ".json", ".jsonl", ".ndjson", ".parquet")
_HEAD = 1 << 16


@dataclass(frozen=True)
class Table:
    """A file's rows: `read(columns)` yields (number, cells), the number 1-based in `unit`s ("line" or "row").

    `names` is None where every row brings its own names (JSON); such a table can be read again, the others
    once. `place` says where a number stands, for rows of several files; None where the unit says it.
    """

    names: list[str] | None
    unit: str
    read: Callable[[Collection[str]], Iterator[Row]]
    place: Callable[[int], str] | None = None


def file_format(path: Path) -> str | None:
    """Return the suffix that decides how `path` is read (".csv" of "x.csv.gz"), None where none does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def open_table(path: Path, encoding: str | None = None) -> Table:
    """Open `path` by its suffix; `encoding` is for text formats, Parquet and XLSX state their own.

    Raises:
        DataError: now or while reading: the file is unreadable, damaged, or not what its name says.
    """
    suffix = file_format(path)
    if suffix is None:
        if path.suffix.lower() == ".xls":
            raise DataError(f"{path.name} is in the old Excel format: open it and save it as .xlsx.")
        raise DataError(f"{path.name} has no suffix that is read here: {', '.join(SUFFIXES)}, each also .gz.")
    with _plainly(path), _binary(path) as stream:
        head = stream.read(_HEAD)
    if not head.strip(b" \t\r\n\0\xef\xbb\xbf"):
        raise DataError(f"{path.name} is empty.")
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".xlsx":
        return _with_header(path, "row", _sheet(path))
    encoding = _checked_encoding(path, head, encoding)
    if suffix in (".csv", ".tsv"):
        return _with_header(path, "line", _delimited(path, encoding, "," if suffix == ".csv" else "\t"))
    prefix = _array_prefix(path, encoding) if suffix == ".json" else None
    if prefix is not None:
        return Table(None, "row", lambda columns: _json_array(path, encoding, prefix))
    return Table(None, "line", lambda columns: _json_lines(path, encoding))


@contextlib.contextmanager
def _plainly(path: Path) -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise DataError(f"{path.name} breaks off inside its gzip data: copy or download it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        if "Not a gzipped file" in str(error):
            raise DataError(f"{path.name} is not gzip data: take the .gz off its name or compress it.") from None
        raise DataError(f"{path.name} is damaged gzip data: copy or download it again.") from None
    except PermissionError:
        raise DataError(f"{path.name} may not be read by this user: change its permissions.") from None
    except OSError as error:
        raise DataError(f"{path.name} cannot be read ({error.strerror or type(error).__name__}).") from None


def _binary(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that is read out of order; gzip data is unpacked to an unnamed temporary file first."""
    with _binary(path) as stream:
        if path.suffix.lower() != ".gz":
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            while chunk := stream.read(1 << 20):
                unpacked.write(chunk)
            unpacked.seek(0)
            yield cast(IO[bytes], unpacked)


@contextlib.contextmanager
def _text(path: Path, encoding: str, newline: str | None = None) -> Iterator[TextIOWrapper]:
    with _plainly(path), _binary(path) as stream:
        text = TextIOWrapper(stream, encoding=encoding, newline=newline)
        try:
            yield text
        except UnicodeDecodeError:
            raise _undecodable(path, encoding) from None


def _checked_encoding(path: Path, head: bytes, encoding: str | None) -> str:
    """Return the codec to read with, UTF-8 by default, if the file's start does not speak against it."""
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"PAR1", b"\xd0\xcf\x11\xe0")):
        raise DataError(f"{path.name} is a workbook or packed data: give it the suffix of what it is.")
    try:
        "".encode(encoding or "utf-8")
        codec = codecs.lookup(encoding or "utf-8").name
    except (LookupError, ValueError):
        raise DataError(f"data.encoding={encoding} names no encoding: try utf-8, cp1256 or utf-16.") from None
    if codec in ("utf-8", "utf-8-sig", "ascii"):
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path.name} is not UTF-8; it begins like UTF-16: set data.encoding=utf-16.")
        if b"\0" in head:
            wide = "utf-16-be" if head[::2].count(0) > head[1::2].count(0) else "utf-16-le"
            raise DataError(f"{path.name} holds zero bytes; it looks like UTF-16: set data.encoding={wide}.")
        return "utf-8-sig"
    if not codec.startswith("utf"):
        # Every byte is a character in Windows-1256: UTF-8 read as that trains on gibberish without an error.
        with contextlib.suppress(UnicodeDecodeError):
            if not codecs.getincrementaldecoder("utf-8")().decode(head).isascii():
                raise DataError(f"{path.name} is UTF-8, not {encoding}: remove data.encoding.")
    return codec


def _undecodable(path: Path, encoding: str) -> DataError:
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    with _binary(path) as stream:
        while True:
            chunk = stream.read(_HEAD)
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                where = f"byte 0x{error.object[error.start]:02X} at line {line}"
                name = "UTF-8" if encoding.startswith("utf-8") else encoding
                return DataError(f"{path.name} is not {name} ({where}){_likely_encoding(error.object)}.")
            if not chunk:
                return DataError(f"{path.name} changed while it was read.")


def _likely_encoding(sample: bytes) -> str:
    def arabic(encoding: str) -> float:
        foreign = [char for char in sample.decode(encoding, errors="replace") if not char.isascii()]
        return sum("\u0621" <= char <= "\u064a" for char in foreign) / max(len(foreign), 1)

    # Of UTF-8 with one broken spot, half of the bytes are Arabic letters in Windows-1256: that is not enough.
    for codec, name in (("cp1256", "Windows-1256"), ("iso-8859-6", "ISO-8859-6")):
        if arabic(codec) > 0.8:
            return f"; it looks like {name}: set data.encoding={codec}"
    return ": save it as UTF-8 or set data.encoding"


def _with_header(path: Path, unit: str, records: Iterator[tuple[int, list[Any]]]) -> Table:
    _, header = next(records, (0, []))
    names = ["" if cell is None else str(cell).strip().strip("\ufeff\u200e\u200f") for cell in header]
    if not any(names):
        raise DataError(f"{path.name} is empty.")
    _refuse_twice(path, [name for name in names if name])
    # Data frames leave the index column without a name, spreadsheets the cells right of the table.
    named = [(index, name) for index, name in enumerate(names) if name]

    def read(columns: Collection[str]) -> Iterator[Row]:
        for number, cells in records:
            if len(cells) != len(names):
                raise DataError(
                    f"{path.name}, {unit} {number}: {len(cells)} cells where the header has {len(names)}: "
                    "quote cells that hold the separator or a line break."
                )
            yield number, {name: cells[index] for index, name in named}

    return Table([name for _, name in named], unit, read)


def _refuse_twice(path: Path, names: list[str]) -> None:
    twice = {name: None for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"{path.name} has more than one column named {listed(twice)}: rename them apart.")


def _delimited(path: Path, encoding: str, default: str) -> Iterator[tuple[int, list[Any]]]:
    with _text(path, encoding, newline="") as stream:
        before = 0
        first = stream.readline()
        delimiter = None
        while first and not first.strip():
            before, first = before + 1, stream.readline()
        if said := re.fullmatch(r"sep=(.)\s*", first, flags=re.IGNORECASE):  # Excel's own way to say it
            delimiter, before, first = said.group(1), before + 1, stream.readline()
        if delimiter is None:
            # Excel writes ";" where the comma is the decimal mark, as in much of the Arab world.
            delimiter = max((default, ",", ";", "\t"), key=re.sub('"[^"]*"', "", first).count)
        reader = csv.reader(itertools.chain([first], stream), delimiter=delimiter, strict=True)
        while True:
            line = before + reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error:
                raise DataError(
                    f"{path.name}, line {line}: a quote is stray or not closed in the row that begins there: "
                    'put cells in quotes and double the quotes inside them ("").'
                ) from None
            if cells is None:
                return
            if any(cell.strip() for cell in cells):
                yield line, cells


def _sheet(path: Path) -> Iterator[tuple[int, list[Any]]]:
    import openpyxl
    from openpyxl.utils.escape import unescape

    with _plainly(path), _seekable(path) as stream:
        if stream.read(4) == b"\xd0\xcf\x11\xe0":
            locked = "EncryptedPackage".encode("utf-16-le") in stream.read()
            raise DataError(
                f"{path.name} is protected by a password: save it without one."
                if locked
                else f"{path.name} is in the old Excel format: open it and save it as .xlsx."
            )
        stream.seek(0)
        try:
            book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
            sheet = book.worksheets[0]
            sheet.reset_dimensions()  # some exporters write a size that would cut the table off
            width = 0
            for number, values in enumerate(sheet.iter_rows(values_only=True), start=1):
                cells = [unescape(cell) if isinstance(cell, str) else cell for cell in values]
                while cells and cells[-1] is None:
                    cells.pop()
                if not cells:
                    continue
                width = width or len(cells)
                yield number, cells + [None] * (width - len(cells))
        except Exception:  # openpyxl lets through whatever zipfile, its XML parser or a missing part raises
            raise DataError(f"{path.name} is damaged or no Excel workbook: save it again as .xlsx.") from None


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    @contextlib.contextmanager
    def opened() -> Iterator[pq.ParquetFile]:
        with _plainly(path), _seekable(path) as stream:
            try:
                yield pq.ParquetFile(stream)
            except (pa.ArrowException, OSError):  # Arrow's own "unexpected end" is an OSError
                raise DataError(f"{path.name} is damaged or no Parquet file: write it again.") from None

    with opened() as file:
        names = file.schema_arrow.names
    _refuse_twice(path, names)

    def read(columns: Collection[str]) -> Iterator[Row]:
        with opened() as file:
            batches = file.iter_batches(batch_size=1000, columns=sorted(columns))
            yield from enumerate((cells for batch in batches for cells in batch.to_pylist()), start=1)

    return Table(names, "row", read)


class _Utf8:
    """What ijson reads from: UTF-8, whatever the file's own encoding."""

    def __init__(self, text: TextIOWrapper) -> None:
        self._text = text

    def read(self, size: int = -1) -> bytes:
        return self._text.read(size).encode()


def _array_prefix(path: Path, encoding: str) -> str | None:
    """Return where the rows stand in a JSON file, in ijson's notation, None where it is JSON lines."""
    import ijson

    with _text(path, encoding) as text, contextlib.suppress(ijson.JSONError):
        events = ijson.parse(_Utf8(text))
        for prefix, event, _ in events:
            if (prefix, event) == ("", "start_array"):
                return "item"
            if (prefix, event) == ("data", "start_array") and next(events)[1] in ("start_map", "end_array"):
                return "data.item"
            if prefix == "" and event not in ("start_map", "map_key"):
                return None
    return None


def _json_array(path: Path, encoding: str, prefix: str) -> Iterator[Row]:
    import ijson

    with _text(path, encoding) as text:
        number = 0
        try:
            for cells in ijson.items(_Utf8(text), prefix, use_float=True):
                number += 1
                if not isinstance(cells, dict):
                    raise DataError(f"{path.name}, row {number} is not a JSON object with named values.")
                yield number, cells
        except ijson.JSONError:
            raise DataError(
                f"{path.name} is not valid JSON after row {number}: it may be cut off, or have NaN for null."
            ) from None


def _json_lines(path: Path, encoding: str) -> Iterator[Row]:
    with _text(path, encoding) as text:
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(
                    f"{path.name}, line {number} is not valid JSON: each line has to hold one object."
                ) from None
            if not isinstance(cells, dict):
                hint = ": name a file that is one array .json" if isinstance(cells, list) else ""
                raise DataError(f"{path.name}, line {number} is not a JSON object with named values{hint}.")
            yield number, cells
