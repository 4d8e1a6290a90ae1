"""From rows and the columns computed for them to OUTPUT: one file by its ending, or a folder that can be trained on.

Every column of the input is kept, as text and in the rows' order; its names are the canonical ones, so that whatever
reads OUTPUT finds the questions, answers and probabilities without being told. Rows pass through in batches.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import sevpeft
from sevpeft.data.columns import free_name, listed
from sevpeft.data.read import PREPARED_ABOUT, PREPARED_ROWS, Consultations
from sevpeft.errors import DataError, UsageError
from sevpeft.runs import file_hash
from sevpeft.severity.probabilities import PROBABILITY_COLUMNS

# What `annotate` adds; evidence where the classifier gives it.
METHOD, VERSION, EVIDENCE = "severity_method", "severity_version", "severity_evidence"
ADDED = (*PROBABILITY_COLUMNS, "severity", METHOD, VERSION, EVIDENCE)

ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz", ".tsv.gz")
Ending = Literal[".jsonl", ".csv", ".tsv", ".parquet", "folder"]

# Columns as the published code writes them: numbers that do not say which severity they are of.
_UNNAMED = re.compile(r"(class|prob|probability|score)[ _-]?[0-3]", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """What OUTPUT is to be, by its ending."""

    ending: Ending
    packed: bool = False


@dataclass(frozen=True)
class Plan:
    """Columns of OUTPUT.

    Attributes:
        kept: name in OUTPUT → name in the table, in order.
        given: what people gave and is kept under another name: name in OUTPUT → name in the input.
        replaced: columns of the input that an earlier `annotate` wrote and that are not kept.
    """

    kept: dict[str, str]
    given: dict[str, str] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()


def target_of(output: Path) -> Target:
    """What kind of OUTPUT a path names: a file by its ending, a folder where it has none.

    Raises:
        UsageError: the ending is none that is written.
    """
    suffixes = [suffix.lower() for suffix in output.suffixes]
    packed = suffixes[-1:] == [".gz"]
    ending = suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes and not packed else ""
    if not output.suffix:
        return Target("folder")
    if ending in (".jsonl", ".csv", ".tsv") or (ending == ".parquet" and not packed):
        return Target(cast(Ending, ending), packed)
    raise UsageError(
        f"{output.name} has an ending that is not written: end a file in {', '.join(ENDINGS[:4])} (each but the "
        "last also with .gz), or give a folder's name, without an ending."
    )


def plan_columns(consultations: Consultations, *, replace: bool, folder: bool) -> Plan:
    """Columns of OUTPUT, if the input has no severity yet, or it may be replaced.

    Raises:
        DataError: it has, and `replace` is False.
    """
    columns, carried, source = consultations.columns, consultations.carried, consultations.source
    annotated = METHOD in carried.values()
    present = [name for name in ("severity", *PROBABILITY_COLUMNS) if name in columns]
    traces = [name for name, column in carried.items() if column in (METHOD, VERSION, EVIDENCE)]
    if not replace and (present or traces):
        there = listed([columns.get(name, name) for name in (*present, *traces)])
        raise DataError(
            f"{source} has severity already ({there}): add --replace to annotate it anew (what was not given by "
            "annotate is kept, as severity_given), or train on it as it is."
        )
    unnamed = [column for column in carried.values() if _UNNAMED.fullmatch(column)]
    if not replace and len(unnamed) > 1:
        raise DataError(
            f"{source} has the columns {listed(unnamed)}, which may be probabilities and do not say of which severity: "
            f"rename each to one of {', '.join(PROBABILITY_COLUMNS)} and train on them, or add --replace to "
            "annotate the questions and keep them as they are."
        )
    own = {name for name in present if annotated and columns[name] == name} | set(traces)
    own |= {name for name, column in carried.items() if annotated and column in ADDED}
    numbered = folder or "row" in consultations.provenance.get("columns", ())
    taken = {*ADDED, "row"} if numbered else set(ADDED)
    kept: dict[str, str] = {}
    for name in consultations.rows.column_names:
        if name in own or name == "row":
            continue
        wanted = f"{name}_given" if name in present else carried.get(name, name)
        kept[free_name(wanted, {*taken, *kept})] = name
    given = {new: columns[name] for new, name in kept.items() if name in present}
    if numbered:
        kept["row"] = "row"
    replaced = tuple(columns.get(name, name) for name in (*present, *carried) if name in own)
    return Plan(kept, given, replaced)


def write_file(path: Path, target: Target, tables: Iterator[pa.Table]) -> None:
    """Write tables of the same columns, one after the other, to the file `path`; equal ones give equal bytes."""
    with path.open("wb") as raw:
        if target.ending == ".parquet":
            _write_parquet(raw, tables)
        else:
            with contextlib.ExitStack() as stack:
                binary: IO[bytes] = raw
                if target.packed:
                    # Without a name and a time in it, which would make two files of the same rows differ.
                    packed = gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0)
                    binary = cast(IO[bytes], stack.enter_context(packed))
                text = TextIOWrapper(binary, encoding="utf-8", newline="", write_through=False)
                (_write_lines if target.ending == ".jsonl" else _write_delimited)(text, target, tables)
                text.flush()
                text.detach()
        raw.flush()
        os.fsync(raw.fileno())


def _write_parquet(raw: IO[bytes], tables: Iterator[pa.Table]) -> None:
    with contextlib.ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for table in tables:
            writer = writer or stack.enter_context(pq.ParquetWriter(raw, table.schema, compression="zstd"))
            writer.write_table(table)


def _write_lines(text: IO[str], target: Target, tables: Iterator[pa.Table]) -> None:
    encode = json.JSONEncoder(ensure_ascii=False).encode
    for table in tables:
        text.write("".join(f"{encode(row)}\n" for row in table.to_pylist()))


def _write_delimited(text: IO[str], target: Target, tables: Iterator[pa.Table]) -> None:
    # The line ends of RFC 4180: only with them does Python quote a cell that holds a carriage return alone.
    writer = csv.writer(text, delimiter="," if target.ending == ".csv" else "\t", lineterminator="\r\n")
    for number, table in enumerate(tables):
        if number == 0:
            writer.writerow(table.column_names)
        writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))


def joined(consultations: Consultations, plan: Plan, computed: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the kept columns beside the computed ones, for as many rows at a time as `computed` does."""
    rows = consultations.rows.select_columns(list(dict.fromkeys(plan.kept.values()))).with_format("arrow")
    start = 0
    for added in computed:
        read: pa.Table = rows[start : start + len(added)]
        start += len(added)
        columns = {new: _without_nan(read[name]) for new, name in plan.kept.items() if new != "row"}
        columns |= {name: added[name] for name in added.column_names}
        if "row" in plan.kept:
            columns["row"] = read["row"]
        yield pa.table(columns)
    if start != len(rows):
        raise AssertionError(f"{start} of {len(rows)} rows were computed")


def _without_nan(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A given probability that is empty is NaN in the table, which JSON has no word for."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)


def write_folder(
    folder: Path, consultations: Consultations, tables: Iterator[pa.Table], severity: dict[str, Any]
) -> None:
    """Write rows, dataset.json and README.md into an empty folder, with what the input's own folder says of its rows.

    Args:
        severity: how they were annotated, for dataset.json and README.md.
    """
    write_file(folder / PREPARED_ROWS, Target(".parquet"), tables)
    about: dict[str, Any] = dict(consultations.provenance) or {
        "sevpeft": sevpeft.__version__,
        "input": {
            "source": consultations.source,
            "fingerprint": consultations.fingerprint,
            "columns": consultations.columns,
            "carried": consultations.carried,
            "provenance": {},
        },
        "rows": {
            "read": len(consultations.rows) + sum(consultations.rejected.values()),
            "kept": len(consultations.rows),
            "rejected": consultations.rejected,
        },
    }
    if consultations.provenance:
        _copy_aside(Path(consultations.source).expanduser(), folder)
    elif consultations.rejected and consultations.rejected_rows is not None:
        shutil.copyfile(consultations.rejected_rows, folder / "rejected.jsonl")
    about["severity"] = {**severity, "input_fingerprint": consultations.fingerprint}
    about["columns"] = pq.read_schema(folder / PREPARED_ROWS).names
    about["fingerprint"] = file_hash(folder / PREPARED_ROWS)
    (folder / PREPARED_ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(about), encoding="utf-8")


def _copy_aside(source: Path, folder: Path) -> None:
    for name in ("rejected.jsonl", "conflicts.jsonl"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _card(about: dict[str, Any]) -> str:
    """The card of the preparation, where there was one, with a part on the severity."""
    if "splits" in about:
        from sevpeft.data.prepare.prepare import data_card

        before = data_card(about)
    else:
        before = _OWN_CARD.format(rows=about["rows"]["kept"], fingerprint=about["fingerprint"])
    severity = about["severity"]
    lines = "\n".join(
        f"| {name} | {count:,} | {severity['mean'][name]:.3f} |" for name, count in severity["counts"].items()
    )
    sharpened = "" if severity["temperature"] == 1 else f", sharpened with temperature {severity['temperature']:g}"
    return before + _SEVERITY_CARD.format(
        method=severity["method"], version=severity["version"], sharpened=sharpened, lines=lines
    )


_OWN_CARD = """\
---
language: [ar]
tags: [medical, consultations, sevpeft]
configs:
- config_name: default
  data_files: consultations.parquet
---

# Medical consultations, annotated with sevpeft

{rows} rows. They are texts of patients as they were gathered: nothing was cleaned, masked or split (`sevpeft prepare`
does that). Have a person read them before they leave your hands, and keep to the licence of their source.

Not a medical device.

This data set: {fingerprint}
"""

_SEVERITY_CARD = """
## Severity

Given by a classifier, not by people: method `{method}`, version `{version}`{sharpened}. `severity` is the likeliest of
the three; a column `severity_given` holds what people said, where they did.

| severity | rows | mean probability |
|---|---|---|
{lines}
"""
