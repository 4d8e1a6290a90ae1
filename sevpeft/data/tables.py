"""From a stream of read rows to a table in memory-mapped Arrow under the cache folder, found again by its key.

Rows go through a batch at a time, so that memory does not grow with the set. The key holds the SHA-256 of the
input's bytes and every setting that shaped the table: a changed file is never answered from an old one. A
table is built under another name and moved into place whole, and its folder is for its owner alone, because
it holds patient text.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils import tqdm

from sevpeft.console import visible
from sevpeft.data.columns import (
    LateColumn,
    as_json_value,
    canonical_rows,
    carried_columns,
    free_name,
    map_columns,
    schema,
)
from sevpeft.data.files import Table
from sevpeft.errors import DataError
from sevpeft.runs import keep_private

BATCH = 1000

_TABLE_VERSION = 3  # counts up when the same input gives another table


@dataclass(frozen=True)
class Reading:
    """What is read out of an input: the settings that shape its table."""

    chosen: Mapping[str, str | None]
    """Canonical field -> column that the user named."""
    max_rows: int | None = None
    """Number of consultations after which to stop."""
    keep: Literal["mapped", "all"] | Collection[str] = "mapped"
    """Columns to carry beside the canonical ones; with any, the rows that are no consultation are kept aside."""


@dataclass(frozen=True)
class Kept:
    """A finished table: its rows, and what was found out while it was made."""

    rows: datasets.Dataset
    columns: dict[str, str]
    carried: dict[str, str]
    rejected: dict[str, int]
    rejected_rows: Path | None
    note: str


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


def table_key(reading: Reading, *parts: Any) -> str:
    """Return the name of the table that `reading` makes of the input that `parts` tell apart."""
    keep = reading.keep if isinstance(reading.keep, str) else list(reading.keep)
    told = [_TABLE_VERSION, dict(reading.chosen), reading.max_rows, keep, *parts]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def finished_table(key: str) -> Kept | None:
    """Return the table `key`, or None where there is none or the disk has lost a part of it."""
    folder = cache_folder("tables") / key
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in about["bytes"]}
        if sizes != about["bytes"]:
            return None
        mapped = datasets.Dataset.from_file(str(folder / "rows.arrow"))
        # From the content, not the path and time: what later steps keep in their caches then stays valid.
        rows = datasets.Dataset(mapped.data, info=mapped.info, fingerprint=key)
        aside = folder / "rejected.jsonl"
        apart = aside if aside.name in sizes else None
        return Kept(rows, about["columns"], about["carried"], about["rejected"], apart, about["note"])
    except (OSError, ValueError, KeyError):
        return None


def build_table(key: str, table: Table, label: str, reading: Reading) -> Kept:
    """Read `table` into the cache under `key`; `label` names it in messages.

    Raises:
        DataError: what `table.read` raises, no consultation is in it, ids stand twice, or the disk refuses.
    """
    tables = cache_folder("tables")
    for abandoned in tables.glob("*.partial-*"):  # a killed process leaves patient text behind
        with contextlib.suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > 24 * 3600:
                shutil.rmtree(abandoned)
    partial = tables / f"{key}.partial-{uuid.uuid4().hex}"
    try:
        partial.mkdir(mode=0o700)
        about = _write(partial, table, label, reading)
        (partial / "about.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        keep_private(partial)
        with contextlib.suppress(OSError):  # refused where another process was quicker with the same table
            partial.rename(tables / key)
        if partial.exists() and finished_table(key) is None:
            shutil.rmtree(tables / key)
            partial.rename(tables / key)
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"The cache folder {tables} cannot be written ({said}): set SEVPEFT_CACHE to another one."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    finished = finished_table(key)
    if finished is None:
        raise DataError(f"The table of {label} is not in {tables} after writing it: look at that disk.")
    return finished


def forget_table(key: str) -> None:
    """Remove the table `key`, if it is there."""
    shutil.rmtree(cache_folder("tables") / key, ignore_errors=True)


@dataclass
class _Rejected:
    """Counts the rows that are no consultation and writes them, as they were read, where there is a file."""

    aside: IO[str] | None
    counts: dict[str, int]

    def __call__(self, reason: str, number: int, cells: Mapping[str, Any]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.aside:
            row = {"row": number, "reason": reason}
            row |= {free_name(name, {"row", "reason"}): cell for name, cell in cells.items()}
            # Escaped, because half an emoji has no place in UTF-8 and is one of the reasons.
            self.aside.write(json.dumps(row, default=as_json_value) + "\n")


def _write(folder: Path, table: Table, label: str, reading: Reading) -> dict[str, Any]:
    file, aside = folder / "rows.arrow", folder / "rejected.jsonl"
    place = table.place or (lambda number: f"{label}, {table.unit} {number}")
    names = table.names
    if names is None:
        first = table.read(())
        # A column that is carried must be known before the first row is written, those of the last rows too.
        head = islice(first, BATCH) if reading.keep == "mapped" else first
        names = list(dict.fromkeys(name for _, cells in head for name in cells))
        if not names:
            raise DataError(f"{label} holds no rows.")
    while True:
        columns = map_columns(names, reading.chosen, label)
        carried = carried_columns(names, columns, reading.keep, label)
        wanted = {*columns.values(), *carried.values()}
        read = tqdm(table.read(wanted), visible(f"Reading {label}"), unit=" rows", disable=None, delay=2)
        with contextlib.ExitStack() as stack:
            rejected = _Rejected(None, {})
            if reading.keep != "mapped":
                rejected.aside = stack.enter_context(aside.open("w", encoding="utf-8"))
            rows = canonical_rows(read, names, columns, reading.chosen, label, place, rejected, carried)
            try:
                kept = _write_rows(file, schema(columns, carried), islice(rows, reading.max_rows))
            except LateColumn:
                continue  # `names` has grown by the column, so this ends
        break
    if not kept:
        counts = ", ".join(f"{count} with {reason}" for reason, count in rejected.counts.items())
        raise DataError(
            f"{label} has no row with both question and answer ({counts})." if counts else f"{label} holds no rows."
        )
    if "id" in columns:
        _refuse_same_ids(file, columns["id"], label, place)
    sizes = {part.name: part.stat().st_size for part in (file, aside) if part.exists()}
    return {"columns": columns, "carried": carried, "rejected": rejected.counts, "note": table.note, "bytes": sizes}


def _write_rows(file: Path, kinds: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    kept = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, kinds) as writer:
        while batch := list(islice(rows, BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=kinds))
            kept += len(batch)
    return kept


def _refuse_same_ids(file: Path, column: str, label: str, place: Callable[[int], str]) -> None:
    with pa.memory_map(str(file)) as source:
        written = pa.ipc.open_stream(source).read_all()
        counts = pc.value_counts(written["id"])
        several = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(several):
            same = written["row"].filter(pc.equal(written["id"], several.field("values")[0])).to_pylist()
            raise DataError(
                f"{label}: {len(several)} ids of column '{column}' stand on several rows, such as "
                f"{place(same[0])} and {place(same[1])}: make them unique, or set data.id_column=row to number the "
                "rows."
            )
