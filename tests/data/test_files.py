"""Every format gives the same rows, and a damaged file is refused with its line or row."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sevpeft.data.columns import CELL_COUNT, UNFIT
from sevpeft.data.files import file_format, open_files
from sevpeft.errors import DataError

ROWS = [
    {"id": "a", "السؤال": 'عندي "صداع"، منذ\nيومين', "الجواب": "راجع الطبيب"},
    {"id": "b", "السؤال": "ألم; في المعدة\tقوي", "الجواب": "اشرب الماء, وارتح"},
    {"id": "c", "السؤال": "سعال", "الجواب": "لا بأس"},
]
SECRET = "سر"


def write(file: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write `rows` in the format that the file's name says."""
    plain = file.with_suffix("") if file.suffix == ".gz" else file
    if plain.suffix in (".csv", ".tsv"):
        with plain.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if plain.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif plain.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in [list(rows[0]), *(list(row.values()) for row in rows)]:
            book.active.append(row)
        book.save(plain)
    elif plain.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), plain)
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if plain != file:
        file.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return file


def read(file: Path, encoding: str | None = None) -> list[dict[str, Any]]:
    return [cells for _, cells in numbered(file, encoding)]


def numbered(file: Path, encoding: str | None = None) -> list[tuple[int, dict[str, Any]]]:
    table = open_files([file], encoding, {})
    return list(table.read(table.names))


def refusal(file: Path, content: bytes | str | None = None, encoding: str | None = None) -> str:
    """The error message for a file with this content; it must not quote a row."""
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as refused:
        read(file, encoding)
    text = str(refused.value)
    assert file.name in text and text.endswith(".") and "\n" not in text and SECRET not in text
    return text


def wrong(tmp_path: Path, rows: list[tuple[str, bytes | str, str]]) -> list[tuple[str, str]]:
    """The refusals that lack what they should say, of rows of name, content and that."""
    found = [(part, refusal(tmp_path / name, content)) for name, content, part in rows]
    return [(part, message) for part, message in found if part not in message]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "xlsx", "json", "jsonl", "ndjson", "parquet"])
def test_every_format_gives_the_same_rows_packed_or_not(tmp_path: Path, suffix: str) -> None:
    assert read(write(tmp_path / f"x.{suffix}")) == read(write(tmp_path / f"x.{suffix}.gz")) == ROWS


def test_the_suffix_decides_without_regard_to_case() -> None:
    assert file_format(Path("a.b.CSV.GZ")) == ".csv"
    assert file_format(Path("org/data-v1.0")) is None
    assert file_format(Path("csv")) is None


def test_rows_are_numbered_as_an_editor_shows_them(tmp_path: Path) -> None:
    numbers = {"csv": [2, 4, 5], "jsonl": [1, 2, 3], "json": [1, 2, 3], "xlsx": [2, 3, 4], "parquet": [1, 2, 3]}
    found = {suffix: [number for number, _ in numbered(write(tmp_path / f"x.{suffix}"))] for suffix in numbers}
    assert found == numbers


def test_the_dialects_of_csv_are_read(tmp_path: Path) -> None:
    texts = [
        *("\ufeffq,a\n1,2\n", "q,a\r\n1,2\r\n", "q;a\n1;2\n", "q\ta\n1\t2\n", "q|a\n1|2\n"),
        *('"q";"a"\n1;2\n', '"q","a"\n"1",2\n', "\n\nq,a\n\n1,2\n\n", " q , a ,,\n1,2,,\n", ",q,a\n0,1,2\n"),
    ]
    for text in texts:
        (tmp_path / "x.csv").write_bytes(text.encode())
        assert read(tmp_path / "x.csv") == [{"q": "1", "a": "2"}], text


def test_a_json_file_may_be_an_array_or_under_data_or_lines(tmp_path: Path) -> None:
    rows = [{"q": 'a "b" \\ \u200f😀\n', "n": -1.5e-7, "m": 12345678901234567890, "t": [True, None, {}]}, {}, {"q": ""}]
    lines = "\r\n\n".join(map(json.dumps, rows))
    texts = [lines, f"\ufeff{lines}\n"]
    for indent in (None, 2):
        array = json.dumps(rows, indent=indent)
        texts += [array, f"\ufeff \n{array}\n", f'{{"v": {{"data": [1]}}, "data": {array}, "w": 2}}\n']
    for text in texts:
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        assert read(tmp_path / "x.json") == rows, text
    (tmp_path / "x.json").write_text("[ ]", encoding="utf-8")
    assert read(tmp_path / "x.json") == []


def test_other_encodings_are_read_when_named(tmp_path: Path) -> None:
    rows = [{"q": "سؤال طويل", "a": "جواب"}]
    for encoding in ("cp1256", "utf-16", "utf-8", "UTF8", "iso-8859-6"):
        for suffix in ("csv", "json", "jsonl"):
            file = write(tmp_path / f"x.{suffix}", rows)
            text = json.dumps(rows, ensure_ascii=False) if suffix == "json" else file.read_text(encoding="utf-8")
            file.write_bytes(text.encode(encoding))
            assert read(file, encoding) == rows, (encoding, suffix)


def test_what_is_not_utf_8_is_named_with_its_line_and_its_probable_encoding(tmp_path: Path) -> None:
    rows: list[tuple[str, bytes | str, str]] = [
        ("x.csv", "q,a\n1,2\nالسؤال هنا يا دكتور,والجواب\n".encode("cp1256"), "cp1256"),
        ("x.csv", b"q,a\n" + "سؤال,جواب\n".encode() * 20_000 + b"\xff,1\n", "save it as UTF-8"),
        ("x.csv", "q,a\n1,2\n".encode("utf-16-le"), "data.encoding=utf-16"),
        ("x.csv", "سؤال,جواب\nما هو,راجع\n".encode("utf-16-le"), "data.encoding=utf-16"),
        ("x.csv", gzip.compress(b"q,a\n1,2\n", mtime=0), "correct its suffix"),
        ("x.csv", "q,a\nس\0ؤال,1\n", "line 2, byte 3: a zero byte: remove it."),
        ("x.tsv", "q,a\n" + "1,2\n" * 40_000 + "\0,1,صداع\n", "line 40002, byte 1: a zero byte: remove it."),
        ("x.jsonl", '{"q": "a"}\n{"q": "\0"}\n', "line 2, byte 8: a zero byte: remove it."),
    ]
    assert wrong(tmp_path, rows) == []
    assert "remove data.encoding" in refusal(write(tmp_path / "x.csv"), encoding="cp1256")


def test_what_is_no_encoding_of_text_is_one_sentence(tmp_path: Path) -> None:
    for suffix in ("csv", "json", "jsonl"):
        file = write(tmp_path / f"x.{suffix}")
        for encoding in ("hex", "base64", "rot13", "zlib", "latin-99", "a b", "utf-8\0"):
            with pytest.raises(DataError, match=r"data\.encoding="):
                read(file, encoding)
    for encoding in ("idna", "undefined"):  # their errors are no UnicodeDecodeError
        assert "data.encoding" in refusal(tmp_path / "x.csv", encoding=encoding)


def test_a_damaged_file_is_refused_with_its_line_or_row(tmp_path: Path) -> None:
    good = '{"q": "سؤال"}'
    rows: list[tuple[str, bytes | str, str]] = [
        ("x.csv", f'q,a\n1,2\n"{SECRET},2\n3,4\n', "line 3: a quote is stray or not closed"),
        ("x.csv", f'q,a\n1,2\n\n"{SECRET}"x,2\n', "line 4: a quote is stray or not closed"),
        ("x.csv", 'q,a\n1,2\n"x,2\n' + "3,4\n" * 50_000, "line 3: a quote"),
        ("x.csv", "q,a,q\n1,2,3\n", "more than one column named 'q'"),
        ("x.jsonl", f'{{"q": 1}}\n{{"q": "{SECRET}\n', "line 2 is not valid JSON"),
        ("x.jsonl", '{"q": 1}\n7\n', "line 2 is not a JSON object"),
        ("x.json", f'[{{"q": 1}},\n {{"q": "{SECRET}', "line 2 is not valid JSON"),
        ("x.json", f'[{{"q": 1}},\n {{"q": "{SECRET}"}}] {SECRET}', "line 2 is not valid JSON"),
        ("x.json", '[{"q": 1}, 7]', "no array of objects"),
        ("x.json", f'{{"q": {SECRET}', "is not valid JSON"),
        ("x.json", "7", "is not valid JSON"),
        # The parser keeps the last of several values in silence, also inside of messages.
        ("x.jsonl", f'{{"q": 1}}\n{{"q": "{SECRET}", "a": 1, "q": 2}}\n', "line 2 has an object with the same key"),
        ("x.jsonl", '{}\n{"m": [{"role": "user", "content": 1, "content": 2}]}\n', "line 2 has an"),
        ("x.json", f'[{{"q": 1}}, {{"q": "{SECRET}", "q": 2}}]', "same key"),
        # As `to_json(orient="split")` writes it, but rows have more or fewer cells than names, or a name is repeated.
        ("x.json", f'{{"columns": ["q", "a"], "data": [["{SECRET}", 2], [1, 2, 3]]}}', "orient='records'"),
        ("x.json", f'{{"columns": ["q", "a"], "data": [["{SECRET}"]]}}', "orient='records'"),
        ("x.json", f'{{"columns": ["q", "q"], "data": [["{SECRET}", 2]]}}', "orient='records'"),
        ("x.json", f"[{good},]", "line 1 is not valid JSON"),
        ("x.json", f"[{good} {good}]", "line 1 is not valid JSON"),
        ("x.json", f"[{good}, {good[:5]}\0{good[5:]}]", "line 1 is not valid JSON"),
        ("x.json", f'{{"data": [{good}], "more": ', "is not valid JSON"),
        *((f"x.{suffix}", b"\n", "is damaged") for suffix in ("xlsx", "parquet")),
        ("x.csv.gz", "q,a\n1,2\n", "download it again"),
        ("x.xlsx", b"PK\x03\x04" + b"x" * 500, "no workbook"),
        ("x.xlsx", b"\xd0\xcf\x11\xe0" + b"\0" * 600, "has a password"),
        ("x.docx", "x", ".csv, .tsv, .xlsx, .json, .jsonl, .ndjson, .parquet"),
    ]
    assert wrong(tmp_path, rows) == []


def test_files_that_are_cut_off_or_changed_are_refused(tmp_path: Path) -> None:
    noise = [{"q": os.urandom(20_000).hex(), "a": "1"}] * 2
    for suffix in ("csv", "json", "jsonl", "xlsx", "parquet"):
        file = write(tmp_path / f"x.{suffix}.gz", noise)
        content = file.read_bytes()
        assert "download it again" in refusal(file, content[:-200])
        assert "gzip" in refusal(file, content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
    content = write(tmp_path / "x.xlsx").read_bytes()
    assert "is damaged" in refusal(tmp_path / "x.xlsx", content[:-300])
    content = write(tmp_path / "x.parquet", ROWS * 400).read_bytes()
    for place in (6, 60, len(content) - 6):
        changed = content[:place] + b"\xff" * 4 + content[place + 4 :]
        assert "no Parquet file" in refusal(tmp_path / "x.parquet", changed)


def test_limits_of_json_and_csv_are_named_with_the_row_and_cost_no_memory(
    tmp_path: Path,
) -> None:
    """An integer of 5,000 digits ended the process, and 100,000 lists in one another took 14 GB, in other parsers."""
    rows: list[tuple[str, bytes | str, str]] = []
    for value, reason in (
        ("1" * 5000, "digits"),
        ("[" * 100_000 + "]" * 100_000, "too deep"),
        ("[" * 100_000, "too deep"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "too deep"),
    ):
        rows.append(("x.json", f'[{{}}, {{"q": {value}}}]', reason))
        rows += [("x.jsonl", f'{{}}\n{{"q": {value}}}', part) for part in ("line 2 ", reason)]
    tracemalloc.start()
    assert wrong(tmp_path, rows) == []
    assert tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()
    (tmp_path / "x.csv").write_text("q,a\n" + "x" * 200_000 + ",1\n", encoding="utf-8")
    assert [len(row["q"]) for row in read(tmp_path / "x.csv")] == [200_000]
    assert "line 2" in refusal(tmp_path / "x.csv", 'q,a\n"' + "x" * (1 << 24) + "\n" * 9)


def workbook(file: Path, *rows: list[object]) -> Path:
    book = openpyxl.Workbook()
    for cells in rows:
        book.active.append(cells)
    book.save(file)
    return file


def test_a_workbook_keeps_its_odd_rows_and_what_stands_beside_the_table(tmp_path: Path) -> None:
    file = workbook(tmp_path / "x.xlsx", ["q", "a", None], [1, 2.5], [], ["x_x000D_y", None], ["z"])
    assert numbered(file) == [(2, {"q": 1, "a": 2.5}), (4, {"q": "x\ry", "a": None}), (5, {"q": "z", "a": None})]
    assert numbered(workbook(file, ["q", "a"], [1, 2, 3])) == [(2, {UNFIT: CELL_COUNT, "cells": [1, 2, 3]})]


def test_a_workbook_that_states_a_wrong_size_is_read_whole(tmp_path: Path) -> None:
    file = write(tmp_path / "x.xlsx")
    with zipfile.ZipFile(file) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    sheet = parts["xl/worksheets/sheet1.xml"]
    parts["xl/worksheets/sheet1.xml"] = re.sub(rb'<dimension ref="[^"]*"', b'<dimension ref="A1:A2"', sheet)
    assert parts["xl/worksheets/sheet1.xml"] != sheet
    with zipfile.ZipFile(file, "w") as book:
        for name, content in parts.items():
            book.writestr(name, content)
    assert read(file) == ROWS


def test_parquet_reads_only_the_columns_that_are_wanted(tmp_path: Path) -> None:
    table = open_files([write(tmp_path / "x.parquet")], None, {})
    assert next(table.read({"id"})) == (1, {"id": "a"})
