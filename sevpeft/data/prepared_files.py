"""From decisions about rows to the files of a prepared folder: kept rows as Parquet, the others and conflicts as JSON.

Rows are read and written a batch at a time, in the input's order.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sevpeft.data.columns import PROBABILITIES, free_name
from sevpeft.data.duplicates import conflicting_groups
from sevpeft.data.sources import Consultations
from sevpeft.data.splits import SIDES

_BATCH = 10_000


def write_rows(
    file: Path,
    rows: datasets.Dataset,
    refined: datasets.Dataset,
    sides: NDArray[np.int8],
    groups: NDArray[np.int64],
    *,
    split_is_used: bool,
) -> list[str]:
    """Write the rows whose side is 0 or above, with their cleaned texts, `row`, `group` and `split`; name the columns.

    A column of the input that is called like one of the new ones becomes "original_NAME"; so does its own `split`,
    unless it is the one that was used.
    """
    told = [name for name in rows.column_names if name not in ("id", "question", "answer", "row")]
    if split_is_used:
        told = [name for name in told if name != "split"]
    new: dict[str, str] = {}
    for name in told:
        new[name] = free_name(name, {"group", "split", *new.values(), *(other for other in told if other != name)})
    names = ["id", "question", "answer", *new.values(), "row", "group", "split"]
    kinds = {"row": pa.int64(), "group": pa.int64(), **dict.fromkeys(PROBABILITIES, pa.float64())}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for at, read, clean in _batches(rows, refined):
            part = slice(at, at + len(read))
            stay = pa.array(sides[part] >= 0)
            columns = {name: read[old] for old, name in [("id", "id"), *new.items(), ("row", "row")]}
            columns |= {"question": clean["question"], "answer": clean["answer"], "group": pa.array(groups[part])}
            columns["split"] = pa.array([SIDES[side] for side in sides[part]])
            table = pa.table([columns[name] for name in names], schema=schema).filter(stay)
            if len(table):
                writer.write_table(table)
    return names


def write_rejected(
    file: Path, table: Consultations, reasons: NDArray[np.object_], unreadable: Mapping[str, str]
) -> dict[str, int]:
    """Write every row that was rejected, as it was read and under its own names, with `row` and `reason`.

    `reasons` (n,) are those of the table's rows, "" where one is kept. `unreadable` names the reasons of the rows
    that did not become one; how many there are of each is returned.
    """
    counts: dict[str, int] = {}

    def read_apart() -> Iterator[tuple[int, str]]:
        if table.rejected_rows is None:
            return
        with table.rejected_rows.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                row["reason"] = unreadable[row["reason"]]
                counts[row["reason"]] = counts.get(row["reason"], 0) + 1
                yield row["row"], _line(row)

    with file.open("w", encoding="utf-8") as out:
        for _, line in heapq.merge(read_apart(), _rejected_lines(table, reasons), key=lambda pair: pair[0]):
            out.write(line + "\n")
    return counts


def _rejected_lines(table: Consultations, reasons: NDArray[np.object_]) -> Iterator[tuple[int, str]]:
    own = {**{name: column for name, column in table.columns.items()}, **table.carried}
    messages = table.columns["question"] == table.columns["answer"]
    names = {name: free_name(column, {"row", "reason"}) for name, column in own.items()}
    if messages:
        names |= {"question": "question", "answer": "answer"}
    at = 0
    for batch in table.rows.with_format("arrow").iter(batch_size=_BATCH):
        part = reasons[at : at + len(batch)]
        at += len(batch)
        out = part != ""
        for row, reason in zip(batch.filter(pa.array(out)).to_pylist(), part[out], strict=True):
            yield row["row"], _line({"row": row["row"], "reason": reason} | {new: row[n] for n, new in names.items()})


def _line(row: dict[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half an emoji has no place in UTF-8
        return json.dumps(row)
    return line


def write_conflicts(
    file: Path,
    groups: NDArray[np.int64],
    numbers: NDArray[np.int64],
    labels: NDArray[np.int64],
    names: list[str] | None,
) -> int:
    """Write, for each group whose rows have several labels, its number, its row numbers and their labels; count them.

    All arrays are (n,); a label below 0 is none. `names` is None where a label may be a patient's words.
    """
    found = conflicting_groups(groups, labels)
    inside = np.flatnonzero(np.isin(groups, found))
    inside = inside[np.argsort(groups[inside], kind="stable")]
    with file.open("w", encoding="utf-8") as out:
        for members in np.split(inside, np.flatnonzero(np.diff(groups[inside])) + 1) if len(inside) else ():
            said: dict[str, Any] = {"group": int(groups[members[0]]), "rows": numbers[members].tolist()}
            if names is not None:
                said["severities"] = [names[label] if label >= 0 else "" for label in labels[members]]
            out.write(json.dumps(said, ensure_ascii=False) + "\n")
    return len(found)


def _batches(rows: datasets.Dataset, refined: datasets.Dataset) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    at = 0
    pairs = (one.with_format("arrow").iter(batch_size=_BATCH) for one in (rows, refined))
    for read, clean in zip(*pairs, strict=True):
        yield at, read, clean
        at += len(read)
