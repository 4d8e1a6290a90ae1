"""Consultations from what `data.path` names: files, a prepared folder, a Hub data set, or the bundled sample.

The rows are a table in memory-mapped Arrow under the cache folder. Its name is a hash of the input's bytes and of every
setting that shaped it: a changed file is never answered from an old table.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils import tqdm
from huggingface_hub import constants

from sevpeft.console import visible
from sevpeft.data.columns import as_json_value, canonical_row, carried_columns, features, free_name, map_columns
from sevpeft.data.files import Row, Table, file_format, open_files
from sevpeft.errors import DataError, RunError, first_sentence
from sevpeft.recipe import DataSection
from sevpeft.runs import CACHE_REMEDY, cache_folder, file_hash, whole_folder

BUILTIN = "builtin:consultations"
_SAMPLE = Path(__file__).parent / "samples" / "consultations.jsonl"
# What a folder that `sevpeft prepare` made holds: its description and its rows.
PREPARED_ABOUT, PREPARED_ROWS = "dataset.json", "consultations.parquet"

_BATCH = 1000
_TABLE_VERSION = 4  # counts up when the same input gives another table
_HUB_PATIENCE = 10.0  # seconds


@dataclass(frozen=True)
class Consultations:
    """Consultations as read, before any cleaning.

    Attributes:
        rows: `id`, `question`, `answer` (str), `row` (int, 1-based line or row of the input) and, where the
            input has them, `severity` (as written), `specialty`, `dialect`, `split` (str, "" where empty) and
            `p_non_critical`, `p_neutral`, `p_critical` (float64 as written, NaN where empty).
        columns: canonical name -> name in the input; question and answer share one where it holds messages.
        rejected: reason -> number of rows that are no consultation ("empty question", "empty answer", "broken
            characters").
        fingerprint: "sha256:..." of the file's bytes, or "hub:..." with the revision.
        source: where the rows come from, for people.
        carried: name in `rows` -> name in the input of the other columns that were asked for.
        rejected_rows: JSON lines with what was rejected, where others were asked for.
        provenance: what dataset.json says of a prepared folder, empty for anything else.
        files: name and fingerprint of each file, where several were read as one.
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


Keep = Literal["mapped", "all"] | Collection[str]


def load_consultations(
    data: DataSection | str | os.PathLike[str], *, keep: Keep = "mapped", **settings: Any
) -> Consultations:
    """The consultations of a recipe's section `data`, or of a path and `settings` that the section has.

    A folder that `sevpeft prepare` did not make stands for the data files in it, and a pattern with * for its
    matches: they are read in sorted order as one source. Columns that are not named are recognized by their names;
    `id_column="row"` numbers the rows. `max_rows` keeps the first so many consultations. The `row` of a prepared
    folder's rows is that of its own input.

    Args:
        keep: other columns to carry too, as text: "all", or their names; one that is called like a column of the rows
            is carried as "original_NAME".

    Raises:
        DataError: the input is absent, unreadable or damaged, or has no question and answer; in one sentence.
    """
    if not isinstance(data, DataSection):
        data = DataSection(path=os.fspath(data), **settings)
    if data.path == BUILTIN:
        return _from_files([_SAMPLE], data, keep)
    path = Path(data.path).expanduser()
    prepared = os.path.isfile(path / PREPARED_ABOUT)
    files = [path / PREPARED_ROWS] if prepared else _files_of(data.path)
    if not files:
        return _from_hub(data, keep)
    for setting, value in (("name", data.name), ("revision", data.revision), ("split", data.split)):
        if value not in (None, "train"):
            raise DataError(f"data.{setting}={value} chooses within a Hub data set, {path.name} is none: remove it.")
    return _from_prepared(path, data, keep) if prepared else _from_files(files, data, keep)


def _files_of(given: str) -> list[Path]:
    """The files that a path or a pattern names, sorted; none where it can only be a Hub id.

    Of a folder these are the files directly in it with a suffix that is read; of a pattern, all that match.

    Raises:
        DataError: there are none, they are of several formats, or one is no regular file.
    """
    path = Path(given).expanduser()
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = [file for file in path.iterdir() if file_format(file) and not file.name.startswith((".", "~$"))]
    elif os.path.lexists(path):  # a pipe or a device may never end
        raise DataError(f"data.path={given} is no regular file: save its content to one.")
    elif glob.has_magic(given):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    elif file_format(path) is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given):
        return []
    else:
        raise DataError(f"data.path={given}: there is no such file{_alike(path)}.")
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise DataError(f"data.path={given}: there is no file in this folder or pattern that is read here.")
    formats = list(dict.fromkeys(file_format(file) or file.suffix for file in files))
    if len(formats) > 1:
        raise DataError(f"data.path={given} names files of several formats: name one, as *{' or *'.join(formats)}.")
    return files


def _alike(file: Path) -> str:
    try:
        close = difflib.get_close_matches(file.name, os.listdir(file.parent), n=3, cutoff=0.7)
    except (OSError, ValueError):
        return ""
    return f", but there is {' and '.join(str(file.parent / other) for other in close)}" if close else ""


def _from_files(files: list[Path], data: DataSection, keep: Keep, numbers: str | None = None) -> Consultations:
    """The rows of files as one source, whose fingerprint covers their names, order and bytes.

    Args:
        numbers: column that numbers the rows, where they are not to be counted.
    """
    before = [os.stat(file) for file in files]
    parts = [{"name": file.name, "fingerprint": file_hash(file)} for file in files]
    fingerprint = parts[0]["fingerprint"]
    if len(files) > 1:
        fingerprint = f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"

    @contextlib.contextmanager
    def opened() -> Iterator[Table]:
        table = open_files(files, data.encoding, _chosen(data))
        yield _numbered_by(numbers, table) if numbers else table
        for file, then in zip(files, before, strict=True):
            now = os.stat(file)
            if (then.st_size, then.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
                raise DataError(f"{file.name} changed while it was read: run this again when nobody writes to it.")

    label = files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    read = _table([fingerprint, file_format(files[0]), data.encoding, numbers], opened(), label, data, keep)
    source = f"{data.path} ({read.source})" if read.source else data.path
    return replace(read, fingerprint=fingerprint, source=source, files=parts if len(files) > 1 else [])


def _chosen(data: DataSection) -> dict[str, str | None]:
    """Canonical field -> column that the user named."""
    fields = ("question", "answer", "severity", "id", "dialect", "split")
    return {field: getattr(data, f"{field}_column") for field in fields}


def _from_prepared(folder: Path, data: DataSection, keep: Keep) -> Consultations:
    """The rows of a folder that `sevpeft prepare` made, if they are those that it wrote."""
    try:
        about = json.loads((folder / PREPARED_ABOUT).read_text(encoding="utf-8"))
        recorded, names = about["fingerprint"], about["columns"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder / PREPARED_ABOUT} is none that `sevpeft prepare` wrote: prepare it again.") from None
    file = folder / PREPARED_ROWS
    if file_hash(file) != recorded:
        raise DataError(
            f"{file} is not as `sevpeft prepare` wrote it, and {PREPARED_ABOUT} no longer true of it: prepare the data "
            "again, or name the Parquet file itself as data.path."
        )
    # A prepared column has the canonical name already; a carried one that is named alike must not be guessed for it.
    own = {f"{name}_column": name for name, column in _chosen(data).items() if column is None and name in names}
    return replace(_from_files([file], data.model_copy(update=own), keep, "row"), provenance=about)


def _numbered_by(column: str, table: Table) -> Table:
    def read(columns: Collection[str]) -> Iterator[Row]:
        for _, cells in table.read({*columns, column}):
            yield cells.pop(column), cells

    return replace(table, names=[name for name in table.names if name != column], read=read)


@functools.cache
def look_for_hub() -> None:
    """Switches this process to what the cache holds when the Hub cannot be reached, once.

    Without this, each file that a library asks for is tried six times, half a minute of waiting and a screen of
    warnings, on the very machines that are meant to be cut off.
    """
    if constants.is_offline_mode():
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_HUB_PATIENCE)
    except Exception:  # whatever the HTTP library, a proxy or a certificate raises
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def _from_hub(data: DataSection, keep: Keep) -> Consultations:
    look_for_hub()
    try:
        loaded = datasets.load_dataset(data.path, data.name, revision=data.revision, split=data.split)
    except Exception as error:  # datasets lets through whatever its builders and fsspec raise
        reason = type(error).__name__
        if isinstance(error, ConnectionError):
            reason = "the Hub cannot be reached"
        elif isinstance(error, FileNotFoundError):
            reason = "unknown, private or gated"
        elif isinstance(error, ValueError):
            reason = first_sentence(error)
        raise DataError(
            f"data.path={data.path} is no file here{_alike(Path(data.path))}, and no data set of the Hub could be "
            f"loaded ({reason}): correct the name, or look at data.name, data.revision and data.split."
        ) from None

    def read(columns: Collection[str]) -> Iterator[Row]:
        wanted = loaded.select_columns([column for column in loaded.column_names if column in columns])
        labels = {column: f.names for column, f in wanted.features.items() if isinstance(f, datasets.ClassLabel)}
        for number, cells in enumerate(wanted, start=1):
            for column, names in labels.items():
                index = cells[column]
                cells[column] = names[index] if index is not None and index >= 0 else None
            yield number, cells

    fingerprint = f"hub:{data.path}@{data.revision or 'main'}:{loaded._fingerprint}"
    source = f"{data.path} ({', '.join(part for part in (data.name, data.split, data.revision) if part)}) on the Hub"
    table = Table(loaded.column_names, read, lambda number: f"{data.path}, row {number}")
    found = _table([fingerprint, data.name, data.split], contextlib.nullcontext(table), data.path, data, keep)
    return replace(found, fingerprint=fingerprint, source=source)


def _table(
    source: list[Any], opened: contextlib.AbstractContextManager[Table], label: str, data: DataSection, keep: Keep
) -> Consultations:
    """The table of a source in the cache, written first where there is none or the disk has lost a part of it.

    It has no fingerprint yet, and its source is the note of what was opened.
    """
    kept = keep if isinstance(keep, str) else list(keep)
    content = json.dumps([_TABLE_VERSION, _chosen(data), data.max_rows, kept, *source])
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = cache_folder("tables") / key
    if folder.exists() and _finished(folder) is None:  # never half written, but the disk may have lost a part of it
        shutil.rmtree(folder)
    if not folder.exists():
        try:
            with whole_folder(folder, shared=False, **CACHE_REMEDY) as partial, opened as table:
                _write(partial, table, label, data, keep)
        except RunError:
            if not folder.exists():  # it does where another process was quicker with the same table
                raise
    found = _finished(folder)
    if found is None:
        raise DataError(f"The table of {label} is not in {folder} after writing it: look at that disk.")
    rows, about = found
    # From the content, not the path and time: what later steps keep in their caches then stays valid.
    rows = datasets.Dataset(rows.data, info=rows.info, fingerprint=key)
    aside = folder / "rejected.jsonl"
    apart = aside if aside.exists() else None
    return Consultations(rows, about["columns"], about["rejected"], "", about["note"], about["carried"], apart)


def _finished(folder: Path) -> tuple[datasets.Dataset, dict[str, Any]] | None:
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
        # A stream that ends between two batches is a sound, shorter one.
        return (rows, about) if len(rows) == about["rows"] else None
    except (OSError, ValueError, KeyError):
        return None


def _write(folder: Path, table: Table, label: str, data: DataSection, keep: Keep) -> None:
    """Writes rows.arrow, about.json and, where columns are carried, rejected.jsonl with the rows that are none.

    Raises:
        DataError: the columns are not clear, no consultation is in the input, or ids stand twice.
    """
    if not table.names:
        raise DataError(f"{label} holds no rows.")
    columns = map_columns(table.names, _chosen(data), label)
    carried = carried_columns(table.names, columns, keep, label)
    wanted = {*columns.values(), *carried.values()}
    rejected: dict[str, int] = {}

    def consultations(aside: IO[str] | None) -> Iterator[dict[str, Any]]:
        read = tqdm(table.read(wanted), visible(f"Reading {label}"), unit=" rows", disable=None, delay=2)
        for ordinal, (number, cells) in enumerate(read, start=1):
            row = canonical_row(cells, columns, table.place(number), carried)
            if isinstance(row, dict):
                yield row | {"id": row.get("id", "").strip() or f"row-{ordinal:07d}", "row": number}
                continue
            rejected[row] = rejected.get(row, 0) + 1
            if aside:
                own = {free_name(name, {"row", "reason"}): cell for name, cell in cells.items()}
                # Escaped, because half an emoji has no place in UTF-8 and is one of the reasons.
                aside.write(json.dumps({"row": number, "reason": row} | own, default=as_json_value) + "\n")

    kept, schema = 0, features(columns, carried).arrow_schema
    with contextlib.ExitStack() as stack:
        aside = None
        if keep != "mapped":
            aside = stack.enter_context((folder / "rejected.jsonl").open("w", encoding="utf-8"))
        sink = stack.enter_context(pa.OSFile(str(folder / "rows.arrow"), "wb"))
        writer = stack.enter_context(pa.ipc.new_stream(sink, schema))
        rows = islice(consultations(aside), data.max_rows)
        while batch := list(islice(rows, _BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            kept += len(batch)
    if not kept:
        counts = ", ".join(f"{count} with {reason}" for reason, count in rejected.items())
        found = f"no row with both question and answer ({counts})" if counts else "no rows"
        raise DataError(f"{label} holds {found}.")
    if "id" in columns:
        _check_ids(folder / "rows.arrow", columns["id"], table.place)
    about = {"rows": kept, "columns": columns, "carried": carried, "rejected": rejected, "note": table.note}
    (folder / "about.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")


def _check_ids(file: Path, column: str, place: Callable[[int], str]) -> None:
    with pa.memory_map(str(file)) as source:
        written = pa.ipc.open_stream(source).read_all()
        counts = pc.value_counts(written["id"])
        several = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(several):
            same = written["row"].filter(pc.equal(written["id"], several.field("values")[0])).to_pylist()
            raise DataError(
                f"{len(several)} ids of column '{column}' stand on several rows, such as {place(same[0])} and "
                f"{place(same[1])}: make them unique, or set data.id_column=row to number the rows."
            )
