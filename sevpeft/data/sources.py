"""From what `data.path` names to rows in memory-mapped Arrow, with where they come from.

It may name a file, several by a folder or a pattern, a folder that `sevpeft prepare` made, a Hub data set or the
bundled sample. The rows stand in a table of `tables`, whose key holds the SHA-256 of the input's bytes.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import datasets

from sevpeft.data.files import Row, Table, file_format, open_table
from sevpeft.data.hub import look_for_hub
from sevpeft.data.several import files_of, joined
from sevpeft.data.tables import BATCH, Kept, Reading, build_table, cache_folder, finished_table, forget_table, table_key
from sevpeft.errors import DataError

__all__ = ["BUILTIN", "PREPARED_ABOUT", "PREPARED_ROWS", "Consultations", "cache_folder", "load_consultations"]

BUILTIN = "builtin:consultations"
# What a folder that `sevpeft prepare` made holds: its description and its rows.
PREPARED_ABOUT, PREPARED_ROWS = "dataset.json", "consultations.parquet"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Consultations:
    """Consultations as read, before any cleaning.

    Attributes:
        rows: `id`, `question`, `answer` (str), `row` (int, 1-based line or row of the input) and, where the
        input has them, `severity` (as written), `specialty`, `dialect`, `split` (str, "" where empty) and
        `p_non_critical`, `p_neutral`, `p_critical` (float64 as written, NaN where empty). columns: canonical
        name -> name in the input; question and answer share one where it holds messages. rejected: reason ->
        number of rows that are no consultation ("empty question", "empty answer", "broken characters").
        fingerprint: "sha256:..." of the file's bytes, or "hub:..." with the revision. source: where the rows
        come from, for people. carried: name in `rows` -> name in the input of the other columns that were asked
        for. rejected_rows: JSON lines with what was rejected, where others were asked for. provenance: what
        dataset.json says of a prepared folder, empty for anything else. files: name and fingerprint of each file,
        where several were read as one.
    """

    rows: datasets.Dataset
    columns: dict[str, str]
    rejected: dict[str, int]
    fingerprint: str
    source: str
    carried: dict[str, str] = field(default_factory=dict)
    rejected_rows: Path | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    files: list[dict[str, str]] = field(default_factory=list)


def load_consultations(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: str | None = None,
    split: str = "train",
    encoding: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    severity_column: str | None = None,
    id_column: str | None = None,
    dialect_column: str | None = None,
    split_column: str | None = None,
    max_rows: int | None = None,
    keep: Literal["mapped", "all"] | Collection[str] = "mapped",
) -> Consultations:
    """Read the consultations that `path` names: files, a prepared folder, a Hub data set, or the bundled sample.

    A folder that `sevpeft prepare` did not make stands for the data files in it, and a pattern with * for its
    matches: they are read in sorted order as one source. Columns that are None are recognised by their names;
    `id_column="row"` numbers the rows. `name`, `revision` and `split` choose within a Hub data set. `max_rows`
    keeps the first so many consultations. `keep` carries other columns too, as text: "all", or those that it
    names; one that is called like a column of the rows is carried as "original_NAME". The `row` of a prepared
    folder's rows is that of its own input.

    Raises:
        DataError: the input is absent, unreadable or damaged, or has no question and answer; in one sentence.
    """
    if max_rows is not None and max_rows < 1:
        raise DataError(f"data.max_rows={max_rows} keeps no row: give 1 or more, or null for all.")
    chosen = {
        "question": question_column,
        "answer": answer_column,
        "severity": severity_column,
        "id": id_column,
        "dialect": dialect_column,
        "split": split_column,
    }
    reading = Reading(chosen, max_rows, keep)
    given = os.fspath(path)
    if given.startswith("builtin:"):
        if given != BUILTIN:
            raise DataError(f"data.path={given} is not bundled: the sample is {BUILTIN}.")
        sample = resources.files("sevpeft.data").joinpath("samples", "consultations.jsonl")
        with resources.as_file(sample) as file:
            return _from_file(file, given, None, reading)

    file = Path(given).expanduser()
    prepared = _is_prepared(file)
    several = None if prepared else files_of(given)
    if several is None and not prepared and not _is_file(file):
        if file_format(file) is not None or not _HUB_ID.fullmatch(given):
            raise DataError(f"data.path={given}: there is no such file{_alike(file)}.")
        return _from_hub(given, name, revision, split, reading)
    hub_only = {"name": name, "revision": revision, "split": None if split == "train" else split}
    for setting, value in hub_only.items():
        if value is not None:
            kind = "folder" if prepared or file.is_dir() else "pattern of files" if several else "file"
            raise DataError(
                f"data.{setting}={value} chooses within a Hub data set, but {file.name} is a {kind}: remove it."
            )
    if prepared:
        return _from_prepared(file, given, reading)
    if several is not None and len(several) > 1:
        return _from_files(several, given, encoding, reading)
    return _from_file(several[0] if several else file, given, encoding, reading)


def _is_file(file: Path) -> bool:
    try:
        if file.exists() and not file.is_file():
            raise DataError(f"data.path={file} is no regular file: save its content to one.")
        return file.exists()
    except OSError as error:
        raise DataError(f"data.path={file} cannot be read ({error.strerror or type(error).__name__}).") from None


def _alike(file: Path) -> str:
    try:
        here = [entry.name for entry in file.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(file.name, here, n=3, cutoff=0.7)
    return f", but there is {' and '.join(str(file.parent / other) for other in close)}" if close else ""


def _from_file(
    file: Path, source: str, encoding: str | None, reading: Reading, ids: str | None = None
) -> Consultations:
    """Read one file; `ids` is the column that numbers its rows, where they are not to be counted."""
    before = _stat(file)
    fingerprint = file_fingerprint(file)
    key = table_key(reading, fingerprint, file_format(file), encoding, ids)
    finished = finished_table(key)
    if finished is None:
        table = open_table(file, encoding, reading.chosen)
        finished = build_table(key, _numbered_by(ids, table) if ids else table, file.name, reading)
        after = _stat(file)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            forget_table(key)
            raise DataError(f"{file.name} changed while it was read: run this again when nobody writes to it.")
    return _consultations(finished, fingerprint, source)


def _from_files(files: list[Path], source: str, encoding: str | None, reading: Reading) -> Consultations:
    """Read several files as one source, whose fingerprint covers their names, order and bytes."""
    before = [_stat(file) for file in files]
    parts = [{"name": file.name, "fingerprint": file_fingerprint(file)} for file in files]
    fingerprint = f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"
    key = table_key(reading, fingerprint, file_format(files[0]), encoding)
    finished = finished_table(key)
    if finished is None:
        table = joined(files, encoding, reading.chosen)
        finished = build_table(key, table, f"{files[0].name} and {len(files) - 1} more", reading)
        for file, then in zip(files, before, strict=True):
            now = _stat(file)
            if (then.st_size, then.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
                forget_table(key)
                raise DataError(f"{file.name} changed while it was read: run this again when nobody writes to it.")
    return replace(_consultations(finished, fingerprint, source), files=parts)


def file_fingerprint(file: Path) -> str:
    """Return "sha256:..." of a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except PermissionError:
        raise DataError(f"{file.name} may not be read by this user: change its permissions.") from None
    except OSError as error:
        raise DataError(f"{file.name} cannot be read ({error.strerror or type(error).__name__}).") from None
    return f"sha256:{digest.hexdigest()}"


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise DataError(f"{file.name} cannot be read ({error.strerror or type(error).__name__}).") from None


def _consultations(kept: Kept, fingerprint: str, source: str) -> Consultations:
    source += f" ({kept.note})" if kept.note else ""
    return Consultations(kept.rows, kept.columns, kept.rejected, fingerprint, source, kept.carried, kept.rejected_rows)


def _is_prepared(folder: Path) -> bool:
    try:
        return (folder / PREPARED_ABOUT).is_file()
    except (OSError, ValueError):  # what is wrong with the path is said where it is read as a file
        return False


def _from_prepared(folder: Path, source: str, reading: Reading) -> Consultations:
    """Read a folder that `sevpeft prepare` made, if its rows are those that it wrote."""
    try:
        about = json.loads((folder / PREPARED_ABOUT).read_text(encoding="utf-8"))
        recorded, names = about["fingerprint"], about["columns"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{folder / PREPARED_ABOUT} cannot be read or is none that `sevpeft prepare` wrote: prepare the data again."
        ) from None
    file = folder / PREPARED_ROWS
    if file_fingerprint(file) != recorded:
        raise DataError(
            f"{file} is not as `sevpeft prepare` wrote it, so that what {PREPARED_ABOUT} says is no longer true of it: "
            "prepare the data again, or name the Parquet file itself as data.path."
        )
    # A prepared column has the canonical name already; a carried one that is named alike must not be guessed for it.
    own = {name: name for name in reading.chosen if name in names}
    chosen = own | {name: column for name, column in reading.chosen.items() if column is not None}
    read = _from_file(file, source, None, replace(reading, chosen={**reading.chosen, **chosen}), "row")
    return replace(read, provenance=about)


def _numbered_by(column: str, table: Table) -> Table:
    """Return `table` with the numbers that its own column holds."""

    def read(columns: Collection[str]) -> Iterator[Row]:
        for _, cells in table.read({*columns, column}):
            yield cells.pop(column), cells

    return Table([name for name in table.names or () if name != column], table.unit, read)


def _from_hub(
    path: str,
    name: str | None,
    revision: str | None,
    split: str,
    reading: Reading,
) -> Consultations:
    look_for_hub()
    try:
        loaded = datasets.load_dataset(path, name, revision=revision, split=split)
    except ConnectionError:
        raise DataError(
            f"data.path={path} is no file here, and the Hub cannot be reached{_alike(Path(path))}: "
            "correct the name, or check the connection."
        ) from None
    except FileNotFoundError:
        raise DataError(
            f"data.path={path} is neither a file here nor a data set that the Hub hands out "
            f"(unknown, private or gated){_alike(Path(path))}."
        ) from None
    except Exception as error:  # datasets lets through whatever its builders and fsspec raise
        said = str(error).strip().splitlines()[0][:200].rstrip(".") if isinstance(error, ValueError) else ""
        raise DataError(
            f"data.path={path} is no file here, and the Hub's data set could not be loaded "
            f"({said or type(error).__name__}): look at data.name, data.revision and data.split."
        ) from None

    def read(columns: Collection[str]) -> Iterator[Row]:
        wanted = loaded.select_columns([column for column in loaded.column_names if column in columns])
        labels = {column: f.names for column, f in wanted.features.items() if isinstance(f, datasets.ClassLabel)}
        number = 0
        for batch in wanted.iter(batch_size=BATCH):
            for values in zip(*batch.values(), strict=True):
                number += 1
                cells = dict(zip(batch, values, strict=True))
                for column, names in labels.items():
                    index = cells[column]
                    cells[column] = names[index] if index is not None and index >= 0 else None
                yield number, cells

    fingerprint = f"hub:{path}@{revision or 'main'}:{loaded._fingerprint}"
    source = f"{path} ({', '.join(part for part in (name, split, revision) if part)}) on the Hub"
    key = table_key(reading, fingerprint, name, split)
    finished = finished_table(key) or build_table(key, Table(loaded.column_names, "row", read), path, reading)
    return _consultations(finished, fingerprint, source)
