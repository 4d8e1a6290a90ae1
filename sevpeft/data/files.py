"""From one file to a stream of numbered rows: CSV, TSV, XLSX, JSON, JSON lines, Parquet, each also gzipped.

Nothing here holds more than a batch of rows, so that several hundred thousand consultations fit any machine.
A damaged file is refused with the line or row at which it went wrong: quietly reading half of a set would
train on half of it. Messages name numbers and columns only, because a cell is somebody's complaint.
"""

import bisect
import codecs
import contextlib
import csv
import gzip
import itertools
import re
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, cast

from sevpeft.data.columns import can_map, listed
from sevpeft.data.json_rows import LONGEST, array_rows, is_array, line_rows
from sevpeft.errors import DataError

Row = tuple[int, dict[str, Any]]

SUFFIXES = (".csv", ".tsv", ".xlsx", ".json", ".jsonl", ".ndjson", ".parquet")
_HEAD = 1 << 16
_OLD = "is in the old Excel format: open it and save it as .xlsx."


@dataclass(frozen=True)
class Table:
    """A file's rows: `read(columns)` yields (number, cells), the number 1-based in `unit`s ("line" or "row").

    `names` is None where every row brings its own names (JSON); such a table can be read again, the others
    once. `place` says where a number stands, for rows of several files or sheets; None where the unit says it.
    `note` names the sheets of a workbook with several.
    """

    names: list[str] | None
    unit: str
    read: Callable[[Collection[str]], Iterator[Row]]
    place: Callable[[int], str] | None = None
    note: str = ""


def file_format(path: Path) -> str | None:
    """Return the suffix that decides how `path` is read (".csv" of "x.csv.gz"), None where none does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def open_table(path: Path, encoding: str | None = None, chosen: Mapping[str, str | None] | None = None) -> Table:
    """Open `path` by its suffix; `encoding` is for text formats, `chosen` (columns by field) finds a workbook's sheets.

    Raises:
        DataError: now or while reading: the file is unreadable, damaged, or not what its name says.
    """
    suffix = file_format(path)
    if suffix is None:
        unknown = f"has no suffix that is read here: {', '.join(SUFFIXES)}, each also .gz."
        raise DataError(f"{path.name} {_OLD if path.suffix.lower() == '.xls' else unknown}")
    with _plainly(path), _binary(path) as stream:
        head = stream.read(_HEAD)
    if not head.strip(b" \t\r\n\0\xef\xbb\xbf"):
        raise DataError(f"{path.name} is empty.")
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".xlsx":
        return _workbook(path, chosen or {})
    encoding = _checked_encoding(path, head, encoding)
    if suffix in (".csv", ".tsv"):
        return _with_header(path.name, "line", _delimited(path, encoding, "," if suffix == ".csv" else "\t"))
    return _json(path, encoding, suffix)


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
    if not codec.startswith(("utf-16", "utf-32")):
        for wide in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be") if b"\0" in head else ():
            # Read as UTF-16, text in UTF-8 becomes Chinese: its letters are pairs of bytes, none of them zero.
            text = head[: len(head) // 4 * 4].decode(wide, errors="replace")
            letters = text.removeprefix("\ufeff")
            if sum("\0" < letter < "\u0800" for letter in letters) > 0.7 * len(letters):
                named = wide if text == letters else wide[:6]
                raise DataError(f"{path.name} looks like {wide[:6].upper()}: set data.encoding={named}.")
    if codec in ("utf-8", "utf-8-sig", "ascii"):
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


def _with_header(label: str, unit: str, records: Iterator[tuple[int, list[Any]]]) -> Table:
    names = _header(records)
    if not any(names):
        raise DataError(f"{label} is empty.")
    _refuse_twice(label, [name for name in names if name])
    # Data frames leave the index column without a name, spreadsheets the cells right of the table.
    named = [(index, name) for index, name in enumerate(names) if name]

    def read(columns: Collection[str]) -> Iterator[Row]:
        for number, cells in records:
            if len(cells) != len(names):
                raise DataError(
                    f"{label}, {unit} {number}: {len(cells)} cells where the header has {len(names)}: "
                    "quote cells that hold the separator or a line break."
                )
            yield number, {name: cells[index] for index, name in named}

    return Table([name for _, name in named], unit, read)


def _header(records: Iterator[tuple[int, list[Any]]]) -> list[str]:
    _, cells = next(records, (0, []))
    return ["" if cell is None else str(cell).strip().strip("\ufeff\u200e\u200f") for cell in cells]


def _refuse_twice(label: str, names: list[str]) -> None:
    twice = {name: None for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"{label} has more than one column named {listed(twice)}: rename them apart.")


def _lines(path: Path, text: TextIOWrapper) -> Iterator[str]:
    for number, line in enumerate(text, start=1):
        if "\0" in line:
            place = line.index("\0") + 1
            raise DataError(f"{path.name}, line {number}: character {place} is a zero byte: remove it.")
        yield line


def _delimited(path: Path, encoding: str, default: str) -> Iterator[tuple[int, list[Any]]]:
    csv.field_size_limit(LONGEST)
    with _text(path, encoding, newline="") as stream:
        lines = _lines(path, stream)
        before, delimiter, first = 0, None, next(lines, "")
        while first and not first.strip():
            before, first = before + 1, next(lines, "")
        if said := re.fullmatch(r"sep=(.)\s*", first, flags=re.IGNORECASE):  # Excel's own way to say it
            delimiter, before, first = said.group(1), before + 1, next(lines, "")
        if delimiter is None:
            # Excel writes ";" where the comma is the decimal mark, as in much of the Arab world.
            delimiter = max((default, ",", ";", "\t"), key=re.sub('"[^"]*"', "", first).count)
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        while True:
            line = before + reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                long = f", or a cell is over {LONGEST:,} letters long" if "field limit" in str(error) else ""
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

    with _plainly(path), _seekable(path) as stream:
        if stream.read(4) == b"\xd0\xcf\x11\xe0":
            locked = "EncryptedPackage".encode("utf-16-le") in stream.read()
            raise DataError(f"{path.name} {'is protected by a password: save it without one.' if locked else _OLD}")
        stream.seek(0)
        try:
            yield openpyxl.load_workbook(stream, read_only=True, data_only=True)
        except DataError:
            raise
        except Exception:  # openpyxl lets through whatever zipfile, its XML parser or a missing part raises
            raise DataError(f"{path.name} is damaged or no Excel workbook: save it again as .xlsx.") from None


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
    """Open the sheets that hold consultations as one table."""
    with _book(path) as book:
        read_names = {sheet.title: list(filter(None, _header(_sheet(sheet)))) for sheet in book.worksheets}
    headers = {title: names for title, names in read_names.items() if names}
    if not headers:
        raise DataError(f"{path.name} is empty.")
    fitting = [title for title, names in headers.items() if can_map(names, chosen)]
    main = fitting[0] if fitting else max(headers, key=lambda title: len(headers[title]))
    alike = [title for title in headers if set(headers[title]) == set(headers[main])]
    if other := [title for title in fitting if title not in alike]:
        raise DataError(
            f"{path.name} has consultations on the sheets {listed([main, other[0]])}, under different columns: rename "
            "the columns alike, or save one of the sheets as a file of its own."
        )
    left_out = [title for title in headers if title not in alike]
    note = f"sheets {listed(alike)}{', not ' * bool(left_out)}{listed(left_out)}" if len(headers) > 1 else ""
    labels = [f"{path.name}, sheet '{title}'" for title in alike]
    begins: list[int] = []

    def read(columns: Collection[str]) -> Iterator[Row]:
        begins[:], last = [], 0
        with _book(path) as book:
            for title, label in zip(alike, labels, strict=True):
                begins.append(last)
                for number, cells in _with_header(label, "row", _sheet(book[title])).read(columns):
                    last = begins[-1] + number
                    yield last, cells

    def place(number: int) -> str:
        index = bisect.bisect_left(begins, number) - 1
        return f"{labels[index]}, row {number - begins[index]}"

    return Table(headers[main], "row", read, place, note)


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
    _refuse_twice(path.name, names)

    def read(columns: Collection[str]) -> Iterator[Row]:
        with opened() as file:
            batches = file.iter_batches(batch_size=1000, columns=sorted(columns))
            yield from enumerate((cells for batch in batches for cells in batch.to_pylist()), start=1)

    return Table(names, "row", read)


def _json(path: Path, encoding: str, suffix: str) -> Table:
    if suffix == ".json":
        with _text(path, encoding) as text:
            suffix = "array" if is_array(text) else suffix

    def read(columns: Collection[str]) -> Iterator[Row]:
        with _text(path, encoding) as text:
            yield from array_rows(text, path.name) if suffix == "array" else line_rows(_lines(path, text), path.name)

    return Table(None, "row" if suffix == "array" else "line", read)
