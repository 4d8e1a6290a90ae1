"""Every format gives the same rows, and a damaged file is refused with the place where it went wrong."""

import csv
import gzip
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sevpeft.data import files
from sevpeft.data.files import file_format, open_table
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
    table = open_table(file, encoding)
    return [cells for _, cells in table.read(table.names or ())]


def numbers(file: Path) -> list[int]:
    table = open_table(file)
    return [number for number, _ in table.read(table.names or ())]


def refusal(file: Path, encoding: str | None = None) -> str:
    with pytest.raises(DataError) as refused:
        read(file, encoding)
    text = str(refused.value)
    assert file.name in text or "data.encoding" in text
    assert text.endswith(".") and "\n" not in text and SECRET not in text
    return text


@pytest.mark.parametrize("suffix", ["csv", "tsv", "xlsx", "json", "jsonl", "ndjson", "parquet"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, packed: str) -> None:
    assert read(write(tmp_path / f"x.{suffix}{packed}")) == ROWS


def test_the_suffix_decides_without_regard_to_case() -> None:
    assert file_format(Path("a.b.CSV.GZ")) == ".csv"
    assert file_format(Path("org/data-v1.0")) is None
    assert file_format(Path("csv")) is None


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [("csv", [2, 4, 5]), ("jsonl", [1, 2, 3]), ("xlsx", [2, 3, 4]), ("parquet", [1, 2, 3])],
)
def test_rows_are_numbered_as_an_editor_shows_them(tmp_path: Path, suffix: str, expected: list[int]) -> None:
    assert numbers(write(tmp_path / f"x.{suffix}")) == expected


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffq,a\n1,2\n",
        "q,a\r\n1,2\r\n",
        "q;a\n1;2\n",
        "q\ta\n1\t2\n",
        "sep=;\nq;a\n1;2\n",
        '"q";"a"\n1;2\n',
        '"q","a"\n"1",2\n',
        "\n\nq,a\n\n1,2\n\n",
        " q , a ,,\n1,2,,\n",
    ],
)
def test_the_dialects_of_csv_are_read(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(text.encode())
    assert read(file) == [{"q": "1", "a": "2"}]


def test_an_index_column_without_a_name_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(",q,a\n0,1,2\n", encoding="utf-8")
    assert read(tmp_path / "x.csv") == [{"q": "1", "a": "2"}]


@pytest.mark.parametrize(
    "text",
    ['[{"q": 1}, {"q": 2}]', '{"data": [{"q": 1}, {"q": 2}]}', '{"v": {"data": []}, "data": [{"q": 1}, {"q": 2}]}',
     '{"q": 1}\n{"q": 2}\n', '\ufeff [{"q": 1}, {"q": 2}]', '\ufeff{"q": 1}\r\n\r\n{"q": 2}'],
)  # fmt: skip
def test_a_json_file_may_be_an_array_or_under_data_or_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert read(tmp_path / "x.json") == [{"q": 1}, {"q": 2}]


@pytest.mark.parametrize("encoding", ["cp1256", "utf-16", "utf-8", "UTF8", "iso-8859-6"])
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_other_encodings_are_read_when_named(tmp_path: Path, encoding: str, suffix: str) -> None:
    rows = [{"q": "سؤال طويل", "a": "جواب"}]
    file = write(tmp_path / f"x.{suffix}", rows)
    text = json.dumps(rows, ensure_ascii=False) if suffix == "json" else file.read_text(encoding="utf-8")
    file.write_bytes(text.encode(encoding))
    assert read(file, encoding) == rows


@pytest.mark.parametrize(("codec", "name"), [("cp1256", "Windows-1256"), ("iso-8859-6", "ISO-8859-6")])
def test_arabic_that_is_not_utf_8_is_told_its_probable_encoding(tmp_path: Path, codec: str, name: str) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes("q,a\n1,2\nالسؤال هنا يا دكتور,والجواب هو\n".encode(codec))
    assert refusal(file) == (
        f"x.csv is not UTF-8 (byte 0xC7 at line 3); it looks like {name}: set data.encoding={codec}."
    )


def test_a_bad_byte_far_down_is_found_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"q,a\n" + "سؤال,جواب\n".encode() * 20_000 + b"\xff,1\n")
    assert refusal(tmp_path / "x.csv") == (
        "x.csv is not UTF-8 (byte 0xFF at line 20002): save it as UTF-8 or set data.encoding."
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("q,a\n1,2\n".encode("utf-16"), "set data.encoding=utf-16."),
        ("q,a\n1,2\n".encode("utf-16-le"), "set data.encoding=utf-16-le."),
        ("q,a\n1,2\n".encode("utf-16-be"), "set data.encoding=utf-16-be."),
        ("سؤال,جواب\nما هو,راجع\n".encode("utf-16-le"), "set data.encoding=utf-16-le."),
        ("q,a\n1,2\n".encode("utf-32"), "set data.encoding=utf-32."),
        ("q,a\n1,2\n".encode("utf-32-be"), "set data.encoding=utf-32-be."),
        (b"PK\x03\x04....", "is a workbook or packed data"),
        (gzip.compress(b"q,a\n1,2\n", mtime=0), "is a workbook or packed data"),
    ],
)
def test_what_is_no_utf_8_text_at_all_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    assert said in refusal(tmp_path / "x.csv")


def test_stray_zero_bytes_are_named_with_their_line_and_are_no_utf_16(tmp_path: Path) -> None:
    texts = {
        "q,a\nس\0ؤال,1\n": "line 2: character 2",
        "q,a\n" + "1,2\n" * 40_000 + "\0,1\n": "line 40002: character 1",
        "q,a\n1,2\n" + "\0" * 4000: "line 3: character 1",
        "q,a\n1,\0\0\0\0\n": "line 2: character 3",
        "q\0,a\n1,2\n": "line 1: character 2",
    }
    wrong = []
    for text, place in texts.items():
        for name, codec in (("x.csv", None), ("x.tsv", None), ("x.csv", "cp1256")):
            (tmp_path / name).write_bytes(text.encode(codec or "utf-8"))
            said = refusal(tmp_path / name, codec)
            wrong += [] if place in said and "UTF" not in said else [(name, codec, said)]
    assert wrong == []


def test_a_long_cell_is_read_and_one_beyond_the_limit_gets_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.csv"
    file.write_text("q,a\n" + "x" * 200_000 + ",1\n", encoding="utf-8")
    assert [len(row["q"]) for row in read(file)] == [200_000]
    monkeypatch.setattr(files, "LONGEST", 100_000)
    said = refusal(file)
    assert "line 2" in said and "100,000 letters" in said


@pytest.mark.parametrize("encoding", ["utf-9", "hex", "a\0b", "undefined"])
def test_an_unknown_encoding_is_an_error(tmp_path: Path, encoding: str) -> None:
    assert "names no encoding" in refusal(write(tmp_path / "x.csv"), encoding)


def test_utf_8_is_not_read_as_windows_1256(tmp_path: Path) -> None:
    assert "is UTF-8, not cp1256: remove data.encoding" in refusal(write(tmp_path / "x.csv"), "cp1256")


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "xlsx", "parquet"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"x.{suffix}").write_bytes(content)
    assert refusal(tmp_path / f"x.{suffix}") == f"x.{suffix} is empty."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'q,a\n1,2\n"{SECRET},2\n3,4\n', "line 3: a quote is stray or not closed"),
        (f'q,a\n1,2\n\n"{SECRET}"x,2\n', "line 4: a quote is stray or not closed"),
        (f"q,a\n1,2\n{SECRET},2,3\n", "line 3: 3 cells where the header has 2"),
        (f"q,a\n1,2\n{SECRET}\n", "line 3: 1 cells where the header has 2"),
        ("q,a,q\n1,2,3\n", "more than one column named 'q'"),
    ],
)
def test_a_malformed_csv_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    assert said in refusal(tmp_path / "x.csv")


def test_a_quote_that_swallows_the_rest_of_a_long_file_names_where_it_began(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('q,a\n1,2\n"x,2\n' + "3,4\n" * 50_000, encoding="utf-8")
    assert "line 3: a quote" in refusal(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.jsonl", f'{{"q": 1}}\n{{"q": "{SECRET}\n', "line 2 is not valid JSON"),
        ("x.jsonl", '{"q": 1}\n7\n', "line 2 is not a JSON object with named values."),
        ("x.jsonl", '[{"q": 1}]\n', "line 1 is not a JSON object with named values: name a file that is one"),
        ("x.jsonl", "[" * 100_000, "line 1 nests lists"),
        ("x.json", f'[{{"q": 1}}, {{"q": "{SECRET}', "row 2 is not valid JSON"),
        ("x.json", f'[{{"q": 1}}, {{"q": "{SECRET}"}}] {SECRET}', "what follows the last row is not valid JSON"),
        ("x.json", '[{"q": 1}, 7]', "row 2 is not a JSON object"),
        ("x.json", f'{{"q": {SECRET}', "line 1 is not valid JSON"),
        ("x.json", "7", "line 1 is not a JSON object"),
    ],
)  # fmt: skip
def test_malformed_json_is_refused_with_its_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert said in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "xlsx", "parquet"])
def test_gzip_data_that_breaks_off_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = [{"q": os.urandom(20_000).hex(), "a": "1"}]
    file = write(tmp_path / f"x.{suffix}.gz", noise * 2)
    file.write_bytes(file.read_bytes()[:-200])
    assert "breaks off inside its gzip data" in refusal(file)


def test_damaged_gzip_data_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv.gz")
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)
    assert "is damaged gzip data" in refusal(file)


def test_a_name_in_gz_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv.gz").write_text("q,a\n1,2\n")
    assert "is not gzip data" in refusal(tmp_path / "x.csv.gz")


def test_a_workbook_keeps_its_odd_rows(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for cells in (["q", "a", None], [1, 2.5], [], ["x_x000D_y", None], ["z"]):
        book.active.append(cells)
    book.save(tmp_path / "x.xlsx")
    assert read(tmp_path / "x.xlsx") == [{"q": 1, "a": 2.5}, {"q": "x\ry", "a": None}, {"q": "z", "a": None}]
    assert numbers(tmp_path / "x.xlsx") == [2, 4, 5]


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


def test_a_workbook_row_beyond_the_header_is_refused(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for cells in (["q", "a"], [1, 2, 3]):
        book.active.append(cells)
    book.save(tmp_path / "x.xlsx")
    assert "row 2: 3 cells where the header has 2" in refusal(tmp_path / "x.xlsx")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no workbook", "damaged or no Excel workbook"),
        (b"PK\x03\x04" + b"x" * 500, "damaged or no Excel workbook"),
        (
            b"\xd0\xcf\x11\xe0" + b"\0" * 600 + "EncryptedPackage".encode("utf-16-le"),
            "protected by a password",
        ),
        (b"\xd0\xcf\x11\xe0" + b"\0" * 600 + "Workbook".encode("utf-16-le"), "save it as .xlsx"),
    ],
)
def test_what_is_no_open_workbook_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.xlsx").write_bytes(content)
    assert said in refusal(tmp_path / "x.xlsx")


def test_a_workbook_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.xlsx")
    file.write_bytes(file.read_bytes()[:-300])
    assert "damaged or no Excel workbook" in refusal(file)


def test_the_old_excel_format_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "x.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    assert "save it as .xlsx" in refusal(tmp_path / "x.xls")


@pytest.mark.parametrize("place", [6, 60, -6])
def test_damaged_parquet_is_refused(tmp_path: Path, place: int) -> None:
    file = write(tmp_path / "x.parquet", ROWS * 400)
    content = bytearray(file.read_bytes())
    content[place : place + 4 if place + 4 else None] = b"\xff\xff\xff\xff"
    file.write_bytes(content)
    assert "damaged or no Parquet file" in refusal(file)


def test_parquet_reads_only_the_columns_that_are_wanted(tmp_path: Path) -> None:
    table = open_table(write(tmp_path / "x.parquet"))
    assert next(table.read({"id"})) == (1, {"id": "a"})


def test_an_unknown_suffix_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "x.docx").write_text("x")
    assert ".csv, .tsv, .xlsx, .json, .jsonl, .ndjson, .parquet" in refusal(tmp_path / "x.docx")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    file = write(tmp_path / "x.csv")
    monkeypatch.setattr(Path, "open", denied)
    assert "may not be read by this user" in refusal(file)
