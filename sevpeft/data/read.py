"""Reads consultations: files, a folder that `sevpeft prepare` made, a Hub data set, or the bundled sample.

Rows are cached as a memory-mapped Arrow table. A hash of the input's bytes and of the settings is its name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub
import pyarrow as pa
from datasets.utils import tqdm
from huggingface_hub import constants

from sevpeft.console import visible
from sevpeft.data import columns as naming
from sevpeft.data import files
from sevpeft.data.columns import UNFIT, canonical_row, conversation_of
from sevpeft.data.files import PREPARED_ABOUT, PREPARED_ROWS, Part, Row, Table, is_prepared, named, open_files
from sevpeft.errors import DataError, RunError, first_sentence
from sevpeft.recipe import DataSection
from sevpeft.runs import CACHE_REMEDY, cache_folder, file_hash, whole_folder

BUILTIN = "builtin:consultations"
_SAMPLE = Path(__file__).parent / "samples" / "consultations.jsonl"
_TABLE_VERSION = 8  # raise it when the same input gives another table


@dataclass(frozen=True)
class Consultations:
    """Consultations as read, before any cleaning.

    `rows` has `id`, `question`, `answer` (str) and `row` (int, line or row of the input from 1). If the input has them:
    `severity`, `specialty`, `dialect`, `split` (str as written, "" if empty) and `p_non_critical`, `p_neutral`,
    `p_critical` (float64 as written, NaN if empty). For messages of a recipe's data also `turns`.
    """

    rows: datasets.Dataset
    columns: dict[str, str]  # canonical name or INPUT -> name in the input; question and answer share messages
    rejected: dict[str, int]  # "empty question" and other reasons of `canonical_row` -> number of rows
    fingerprint: str  # "sha256:..." of the files' bytes, or "hub:..." with the revision
    source: str  # where the rows come from, for the user
    carried: dict[str, str] = field(default_factory=dict)  # other columns: name in `rows` -> name in the input
    rejected_rows: Path = Path(os.devnull)  # JSON lines with the rejected rows, as read
    provenance: dict[str, Any] = field(default_factory=dict)  # content of a prepared folder's dataset.json
    files: list[dict[str, str]] = field(default_factory=list)  # name and fingerprint of each file, if there are several


Keep = Literal["mapped", "all"] | Collection[str]


def load_consultations(
    data: DataSection | str | os.PathLike[str], *, keep: Keep = "mapped", **settings: Any
) -> Consultations:
    """The consultations of a recipe's section `data`, or of a path and other `settings` of that section.

    The files of a folder or of a pattern with * are read in sorted order as one source. In a folder that `sevpeft
    prepare` made, rows keep the `row` of its input. Columns without a setting are recognized by their names;
    `id_column="row"` numbers the rows.

    `keep`: other columns to carry as text, "all" or their names. One with a canonical name becomes "original_NAME".

    Raises DataError if the input is missing, unreadable or damaged, or has no question and answer.
    """
    if not isinstance(data, DataSection):
        data = DataSection(path=os.fspath(data), **settings)
    path = _SAMPLE if data.path == BUILTIN else Path(data.path).expanduser()
    prepared = is_prepared(path)
    paths = [path / PREPARED_ROWS] if prepared else files.files_of(data.path, path)
    if not paths:
        return _from_hub(data, keep)
    for setting, value in (("name", data.name), ("revision", data.revision), ("split", data.split)):
        if value not in (None, "train"):
            raise DataError(f"data.{setting}={value} chooses within a Hub data set, not within {data.path}: remove it.")
    parts = [{"name": file.name, "fingerprint": file_hash(file)} for file in paths]
    fingerprint, about = parts[0]["fingerprint"], dict[str, Any]()
    if len(paths) > 1:
        fingerprint = f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"
    if prepared:
        try:
            about = json.loads((path / PREPARED_ABOUT).read_text(encoding="utf-8"))
            changed, names = fingerprint != about["fingerprint"], about["columns"]
        except (OSError, ValueError, KeyError, TypeError):
            problem = "was not written by `sevpeft prepare`: prepare the data again"
            raise DataError(f"{path / PREPARED_ABOUT} {problem}.") from None
        if changed:
            raise DataError(f"{path / PREPARED_ROWS} has changed since `sevpeft prepare`: prepare the data again.")
        # Prepared columns have canonical names; a carried column with a similar name must not be guessed for one.
        own = {f"{name}_column": name for name, column in named(data).items() if column is None and name in names}
        data = data.model_copy(update=own)
    shape = [fingerprint, files.file_format(paths[0]), data.encoding, prepared]
    table = _cached(shape, lambda: open_files(paths, data.encoding, named(data)), data, keep, prepared)
    return replace(table, files=parts if len(paths) > 1 else [], provenance=about)


@functools.cache
def look_for_hub() -> None:
    """Switches this process to offline mode if the Hub is unreachable: libraries try each file six times."""
    if not constants.is_offline_mode():
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # the HTTP library, a proxy or a certificate may fail in many ways
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _from_hub(data: DataSection, keep: Keep) -> Consultations:
    look_for_hub()
    try:
        loaded = datasets.load_dataset(data.path, data.name, revision=data.revision, split=data.split)
    except Exception as error:  # datasets passes on errors of its builders and of fsspec
        reason = first_sentence(error) if isinstance(error, OSError | ValueError) else type(error).__name__
        problem = f"is not a file and could not be loaded from the Hub ({reason}): check data.name, revision and split"
        raise DataError(f"data.path={data.path} {problem}.") from None

    def read(columns: Collection[str]) -> Iterator[Row]:
        selected = loaded.select_columns([column for column in loaded.column_names if column in columns])
        labels = {column: f.names for column, f in selected.features.items() if isinstance(f, datasets.ClassLabel)}
        for number, cells in enumerate(selected, start=1):
            for column, names in labels.items():
                index = cells[column]
                cells[column] = names[index] if index is not None and index >= 0 else None
            yield number, cells

    table = Table([Part(f"{data.path}, row", loaded.column_names, read)], data.path)
    # Private in datasets 5.2, which has no public attribute for it.
    fingerprint = f"hub:{data.path}@{data.revision or 'main'}:{loaded._fingerprint}"
    source = f"{data.path} ({', '.join(part for part in (data.name, data.split, data.revision) if part)}) on the Hub"
    return replace(_cached([fingerprint, data.name, data.split], lambda: table, data, keep, False), source=source)


def _cached(shape: list[Any], get: Callable[[], Table], data: DataSection, keep: Keep, numbered: bool) -> Consultations:
    """The table of `shape` (fingerprint first) from the cache, else from `get`. `numbered`: by a column `row`."""
    content = [_TABLE_VERSION, named(data), data.max_rows, keep if isinstance(keep, str) else list(keep), *shape]
    content += [] if (loss_on := getattr(data, "loss_on", None)) is None else [loss_on]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    folder = cache_folder("tables") / key

    def stored() -> tuple[datasets.Dataset, dict[str, Any]]:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
        if len(rows) != about["rows"]:  # a stream that was cut between two batches is valid but shorter
            raise ValueError
        return rows, about

    if folder.exists():  # written as a whole, but a disk error may have damaged it
        try:
            stored()
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder)
    if not folder.exists():
        try:
            with whole_folder(folder, shared=False, **CACHE_REMEDY) as partial:
                _write(partial, get(), data, keep, numbered)
        except RunError:
            if not folder.exists():  # it does if another process has just written the same table
                raise
    rows, about = stored()
    # A fingerprint of the content, not of path and time, keeps the caches of later steps valid.
    rows = datasets.Dataset(rows.data, info=rows.info, fingerprint=key)
    source = f"{data.path} ({about['note']})" if about["note"] else data.path
    rejected = folder / "rejected.jsonl"
    return Consultations(rows, about["columns"], about["rejected"], shape[0], source, about["carried"], rejected)


def _write(folder: Path, table: Table, data: DataSection, keep: Keep, numbered: bool) -> None:
    """Writes rows.arrow, about.json and rejected.jsonl."""
    label, names = table.label, [name for name in table.names if not (numbered and name == "row")]
    if not names:
        raise DataError(f"{label} is empty.")
    columns = naming.map_columns(names, named(data), label)
    requested = () if keep == "mapped" else names if keep == "all" else keep
    others = [name for name in names if name in requested and name not in columns.values()]
    carried = {new: name for name, new in naming.free_names(others, {*naming.FIELDS, naming.TURNS, "row"}).items()}
    rejected = Counter[str]()
    first_rejected = ""
    numbers: dict[int, int] = {}  # hash of an id -> number of its row
    read = table.read({*columns.values(), *carried.values(), *["row"] * numbered})
    begin = list(islice(read, 1000))
    has_messages = any(conversation_of(cells, columns) is not None for _, cells in begin if UNFIT not in cells)
    loss_on = getattr(data, "loss_on", None) if has_messages else None  # recipes only; other verbs read one turn

    def consultations() -> Iterator[dict[str, Any]]:
        nonlocal first_rejected
        progress = tqdm(chain(begin, read), visible(f"Reading {label}"), unit=" rows", disable=None, delay=2)
        for ordinal, (number, cells) in enumerate(progress, start=1):
            number = cells.pop("row") if numbered else number
            row = canonical_row(cells, columns, table.place(number), carried, loss_on)
            if isinstance(row, dict):
                own_id = row.get("id", "").strip() or f"row-{ordinal:07d}"
                if "id" in columns and (first := numbers.setdefault(hash(own_id), number)) != number:
                    both = f"{table.place(first)} and {table.place(number)} have the same '{columns['id']}'"
                    raise DataError(f"{both}: make ids unique, or set data.id_column=row to number the rows.")
                yield row | {"id": own_id, "row": number}
                continue
            rejected[row] += 1
            first_rejected = first_rejected or table.place(number)
            own = {naming.free_name(name, {"row", "reason"}): cell for name, cell in cells.items() if name != UNFIT}
            # ASCII with escapes: half of an emoji, one of the reasons, cannot be written in UTF-8.
            aside.write(json.dumps({"row": number, "reason": row} | own, default=naming.as_json_value) + "\n")

    kinds = {"row": "int64", **dict.fromkeys(naming.PROBABILITIES, "float64")}
    fields = ["id", "question", "answer", *(field for field in naming.FIELDS if field in columns), *carried, "row"]
    fields += [naming.TURNS] * (loss_on is not None)
    schema = datasets.Features({name: datasets.Value(kinds.get(name, "string")) for name in fields}).arrow_schema
    kept = 0
    with (
        (folder / "rejected.jsonl").open("w", encoding="utf-8") as aside,
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        rows = islice(consultations(), data.max_rows)
        while batch := list(islice(rows, 1000)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            kept += len(batch)
    if not kept:
        counts = ", ".join(f"{count} with {reason}" for reason, count in rejected.items())
        counts = f" with both question and answer ({counts}; see {first_rejected})" if counts else "s"
        raise DataError(f"{label} holds no row{counts}.")
    about = {"rows": kept, "columns": columns, "carried": carried, "rejected": rejected, "note": table.note}
    (folder / "about.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
