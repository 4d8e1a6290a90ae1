"""From what `data.path` names (a file, a Hub data set, the bundled sample) to rows in memory-mapped Arrow.

Rows go through a batch at a time into a table under the cache folder, so that memory does not grow with the
set. The table's key holds the SHA-256 of the input's bytes and every setting that shaped it: a changed file
is never answered from an old table. A table is built under another name and moved into place whole, and its
folder is for its owner alone, because it holds patient text.
"""

import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils import tqdm

from sevpeft.data.columns import LateColumn, canonical_rows, map_columns, schema
from sevpeft.data.files import Row, Table, file_format, open_table
from sevpeft.data.hub import look_for_hub
from sevpeft.errors import DataError

BUILTIN = "builtin:consultations"

_TABLE_VERSION = 1  # counts up when the same input gives another table
_BATCH = 1000
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
        come from, for people.
    """

    rows: datasets.Dataset
    columns: dict[str, str]
    rejected: dict[str, int]
    fingerprint: str
    source: str


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
) -> Consultations:
    """Read the consultations that `path` names: a file, a Hub data set id, or "builtin:consultations".

    Columns that are None are recognised by their names; `id_column="row"` numbers the rows. `name`,
    `revision` and `split` choose within a Hub data set. `max_rows` keeps the first so many consultations.

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
    given = os.fspath(path)
    if given.startswith("builtin:"):
        if given != BUILTIN:
            raise DataError(f"data.path={given} is not bundled: the sample is {BUILTIN}.")
        sample = resources.files("sevpeft.data").joinpath("samples", "consultations.jsonl")
        with resources.as_file(sample) as file:
            return _from_file(file, given, None, chosen, max_rows)

    file = Path(given).expanduser()
    if not _is_file(file):
        if file_format(file) is not None or not _HUB_ID.fullmatch(given):
            raise DataError(f"data.path={given}: there is no such file{_alike(file)}.")
        return _from_hub(given, name, revision, split, chosen, max_rows)
    hub_only = {"name": name, "revision": revision, "split": None if split == "train" else split}
    for setting, value in hub_only.items():
        if value is not None:
            raise DataError(
                f"data.{setting}={value} chooses within a Hub data set, but {file.name} is a file: remove it."
            )
    return _from_file(file, given, encoding, chosen, max_rows)


def cache_folder(kind: str) -> Path:
    """Return the folder `kind` under SEVPEFT_CACHE (~/.cache/sevpeft), made for its owner alone."""
    folder = Path(os.environ.get("SEVPEFT_CACHE") or "~/.cache/sevpeft").expanduser() / kind
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise DataError(
            f"The cache folder {folder} cannot be made ({error.strerror}): set SEVPEFT_CACHE to another one."
        ) from None
    return folder


def _is_file(file: Path) -> bool:
    try:
        if file.is_dir():
            readable = sorted(entry.name for entry in file.iterdir() if file_format(entry))[:5]
            hint = f", for instance {readable[0]}" if readable else ""
            raise DataError(f"data.path={file} is a folder: name one file in it{hint}.")
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
    file: Path, source: str, encoding: str | None, chosen: Mapping[str, str | None], max_rows: int | None
) -> Consultations:
    try:
        before = file.stat()
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except PermissionError:
        raise DataError(f"{file.name} may not be read by this user: change its permissions.") from None
    except OSError as error:
        raise DataError(f"{file.name} cannot be read ({error.strerror or type(error).__name__}).") from None

    fingerprint = f"sha256:{digest.hexdigest()}"
    key = _key(fingerprint, file_format(file), encoding, chosen, max_rows)
    finished = _finished(key)
    if finished is None:
        finished = _built(key, open_table(file, encoding), file.name, chosen, max_rows)
        after = file.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            shutil.rmtree(cache_folder("tables") / key, ignore_errors=True)
            raise DataError(f"{file.name} changed while it was read: run this again when nobody writes to it.")
    rows, about = finished
    return Consultations(rows, about["columns"], about["rejected"], fingerprint, source)


def _from_hub(
    path: str,
    name: str | None,
    revision: str | None,
    split: str,
    chosen: Mapping[str, str | None],
    max_rows: int | None,
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
        for batch in wanted.iter(batch_size=_BATCH):
            for values in zip(*batch.values(), strict=True):
                number += 1
                cells = dict(zip(batch, values, strict=True))
                for column, names in labels.items():
                    index = cells[column]
                    cells[column] = names[index] if index is not None and index >= 0 else None
                yield number, cells

    fingerprint = f"hub:{path}@{revision or 'main'}:{loaded._fingerprint}"
    source = f"{path} ({', '.join(part for part in (name, split, revision) if part)}) on the Hub"
    key = _key(fingerprint, name, split, chosen, max_rows)
    finished = _finished(key)
    rows, about = finished or _built(key, Table(loaded.column_names, "row", read), path, chosen, max_rows)
    return Consultations(rows, about["columns"], about["rejected"], fingerprint, source)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_TABLE_VERSION, *parts]).encode()).hexdigest()[:32]


def _finished(key: str) -> tuple[datasets.Dataset, dict[str, Any]] | None:
    """Return the table `key`, or None where there is none or the disk has lost a part of it."""
    folder = cache_folder("tables") / key
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if (folder / "rows.arrow").stat().st_size != about["bytes"]:
            return None
        mapped = datasets.Dataset.from_file(str(folder / "rows.arrow"))
        # From the content, not the path and time: what later steps keep in their caches then stays valid.
        return datasets.Dataset(mapped.data, info=mapped.info, fingerprint=key), about
    except (OSError, ValueError, KeyError):
        return None


def _built(
    key: str, table: Table, label: str, chosen: Mapping[str, str | None], max_rows: int | None
) -> tuple[datasets.Dataset, dict[str, Any]]:
    tables = cache_folder("tables")
    for abandoned in tables.glob("*.partial-*"):  # a killed process leaves patient text behind
        with contextlib.suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > 24 * 3600:
                shutil.rmtree(abandoned)
    partial = tables / f"{key}.partial-{uuid.uuid4().hex}"
    try:
        partial.mkdir(mode=0o700)
        about = _write(partial / "rows.arrow", table, label, chosen, max_rows)
        (partial / "about.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        with contextlib.suppress(OSError):  # refused where another process was quicker with the same table
            partial.rename(tables / key)
        if partial.exists() and _finished(key) is None:
            shutil.rmtree(tables / key)
            partial.rename(tables / key)
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"The cache folder {tables} cannot be written ({said}): set SEVPEFT_CACHE to another one."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    finished = _finished(key)
    if finished is None:
        raise DataError(f"The table of {label} is not in {tables} after writing it: look at that disk.")
    return finished


def _write(
    file: Path, table: Table, label: str, chosen: Mapping[str, str | None], max_rows: int | None
) -> dict[str, Any]:
    names = table.names
    if names is None:
        names = list(dict.fromkeys(name for _, cells in islice(table.read(()), _BATCH) for name in cells))
        if not names:
            raise DataError(f"{label} holds no rows.")
    while True:
        columns = map_columns(names, chosen, label)
        rejected: dict[str, int] = {}
        read = tqdm(table.read(set(columns.values())), f"Reading {label}", unit=" rows", disable=None, delay=2)
        rows = canonical_rows(read, names, columns, chosen, label, table.unit, rejected)
        try:
            kept = _write_rows(file, schema(columns), islice(rows, max_rows))
        except LateColumn:
            continue  # `names` has grown by the column, so this ends
        break
    if not kept:
        counts = ", ".join(f"{count} with {reason}" for reason, count in rejected.items())
        raise DataError(
            f"{label} has no row with both question and answer ({counts})." if counts else f"{label} holds no rows."
        )
    if "id" in columns:
        _refuse_same_ids(file, columns["id"], label, table.unit)
    return {"columns": columns, "rejected": rejected, "bytes": file.stat().st_size}


def _write_rows(file: Path, kinds: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    kept = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, kinds) as writer:
        while batch := list(islice(rows, _BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=kinds))
            kept += len(batch)
    return kept


def _refuse_same_ids(file: Path, column: str, label: str, unit: str) -> None:
    with pa.memory_map(str(file)) as source:
        written = pa.ipc.open_stream(source).read_all()
        counts = pc.value_counts(written["id"])
        several = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(several):
            same = written["row"].filter(pc.equal(written["id"], several.field("values")[0])).to_pylist()
            raise DataError(
                f"{label}: {len(several)} ids of column '{column}' stand on several rows, such as {unit}s "
                f"{same[0]} and {same[1]}: make them unique, or set data.id_column=row to number the rows."
            )
