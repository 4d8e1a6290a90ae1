"""A path becomes rows with canonical columns, cached for the owner only and never from a stale table."""

from __future__ import annotations

import gzip
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path

import datasets
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from sevpeft.data import read
from sevpeft.data.columns import CELL_COUNT
from sevpeft.data.read import Consultations, load_consultations
from sevpeft.errors import DataError, RunError
from sevpeft.recipe import DataSection
from sevpeft.runs import file_hash


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache" / "tables"


def csv_file(folder: Path, *lines: str, name: str = "x.csv") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def jsonl_file(folder: Path, *rows: object) -> Path:
    return csv_file(folder, *(json.dumps(row) for row in rows), name="x.jsonl")


def refusal(path: str | Path, **settings: object) -> str:
    with pytest.raises(DataError) as refused:
        load_consultations(path, **settings)  # type: ignore[arg-type]
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
    return str(refused.value)


def test_a_file_becomes_rows_with_canonical_columns_in_a_folder_of_its_own(tmp_path: Path, cache: Path) -> None:
    file = csv_file(
        tmp_path,
        "ID,السؤال,الإجابة,الخطورة,p_non_critical,p_neutral,p_critical,Category,اللهجة,split,reason",
        "7,صداع,راجع الطبيب,حرجة ,0.1,0.2,,أعصاب,مصري,train,x",
    )
    loaded = load_consultations(file)
    (row,) = loaded.rows
    assert math.isnan(row.pop("p_critical"))
    assert row == {
        **{"id": "7", "question": "صداع", "answer": "راجع الطبيب", "severity": "حرجة ", "row": 2},
        **{
            "p_non_critical": 0.1,
            "p_neutral": 0.2,
            "specialty": "أعصاب",
            "dialect": "مصري",
            "split": "train",
        },
    }
    assert loaded.columns["specialty"] == "Category"
    assert loaded.fingerprint.startswith("sha256:") and loaded.source == str(file)
    assert loaded.rows.features["p_critical"].dtype == "float64"
    (mapped,) = loaded.rows.cache_files
    assert Path(mapped["filename"]).is_relative_to(cache)
    assert os.name != "posix" or stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_ids_are_made_from_the_row_number_where_there_are_none(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a", ",a", "", "r,b")
    loaded = load_consultations(file)
    assert loaded.rows["id"][:] == ["row-0000001", "row-0000003"]
    assert loaded.rows["row"][:] == [2, 5]


def test_rows_without_question_or_answer_are_counted_by_their_reason(tmp_path: Path) -> None:
    file = jsonl_file(
        tmp_path,
        *({"question": "q", "answer": "a"}, {"question": None, "answer": "a"}, {"question": "q"}),
        *({"question": math.nan, "answer": "a"}, {"question": "q", "answer": " \n"}),
        {"question": "\ud83d", "answer": "a"},
    )
    loaded = load_consultations(file)
    assert len(loaded.rows) == 1
    assert loaded.rejected == {"empty question": 2, "empty answer": 2, "broken characters": 1}


def test_max_rows_keeps_the_first_consultations(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "question,answer", "a,", "b,1", "c,1", "d,1")
    section = DataSection(path=str(file), max_rows=2)
    assert load_consultations(section).rows["question"][:] == ["b", "c"]
    assert len(load_consultations(file).rows) == 3


def test_a_second_reading_is_answered_from_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a", ",a")
    first = load_consultations(file)
    opened = read.open_files
    monkeypatch.setattr(read, "open_files", lambda *_: pytest.fail("the file was read again"))
    second = load_consultations(file)
    assert second.rows[:] == first.rows[:] and second.rejected == first.rejected == {"empty question": 1}
    monkeypatch.setattr(read, "open_files", opened)
    # What later steps keep in their caches stays valid, in another folder too.
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / "elsewhere"))
    assert load_consultations(file).rows._fingerprint == first.rows._fingerprint == second.rows._fingerprint
    assert load_consultations(file, question_column="answer", answer_column="question").rows["question"][:] == ["a"]


def test_a_changed_file_is_never_served_from_a_stale_table(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a")
    before = file.stat()
    first = load_consultations(file)
    csv_file(tmp_path, "question,answer", "r,a")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = load_consultations(file)
    assert second.rows["question"][:] == ["r"] and second.fingerprint != first.fingerprint


def test_a_table_that_the_disk_has_lost_a_part_of_is_made_again(tmp_path: Path, cache: Path) -> None:
    file = csv_file(tmp_path, "question,answer", *["q,a"] * 1200)
    load_consultations(file)
    (table,) = cache.iterdir()
    rows, about = table / "rows.arrow", table / "about.json"
    with pa.ipc.open_stream(rows.read_bytes()) as stream:
        first = stream.read_next_batch()
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, first.schema) as writer:  # one that ends between two batches is a sound, shorter one
        writer.write_batch(first)
    for part, content in (
        (rows, rows.read_bytes()[:-100]),
        (rows, buffer.getvalue().to_pybytes()),
        (about, b""),
        (about, b"{}"),
    ):
        part.unlink()  # not written over: it is memory-mapped
        part.write_bytes(content)
        assert len(load_consultations(file).rows) == 1200


def test_a_failed_reading_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    refusal(csv_file(tmp_path, "question,answer", *["q,a"] * 3000, '"q'))
    assert list(cache.iterdir()) == []


# Workbooks


def workbook(file: Path, sheets: dict[str, list[list[object]]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(file)
    return file


QA: list[object] = ["question", "answer"]


def test_all_sheets_with_the_same_columns_are_read_and_named(tmp_path: Path) -> None:
    sheets = {"Jan": [QA, ["q1", "a1"]], "Feb": [[], ["answer", "question"], ["a2", "q2"], ["", "q3"]], "Empty": []}
    file = workbook(tmp_path / "x.xlsx", sheets)
    for _ in range(2):  # the second one comes from the cache
        found = load_consultations(file)
        assert (found.rows["question"][:], found.rows["answer"][:]) == (["q1", "q2"], ["a1", "a2"])
        assert found.rejected == {"empty answer": 1}
        assert "'Jan'" in found.source and "'Feb'" in found.source and "Empty" not in found.source
    alone = workbook(tmp_path / "y.xlsx", {"Jan": sheets["Jan"], "Empty": []})
    assert load_consultations(alone).source == str(alone)


def test_sheets_without_consultations_are_left_out_and_named(tmp_path: Path) -> None:
    data = [QA, ["q", "a"]]
    other: dict[str, list[list[object]]] = {
        "cover": [["Corpus of 2024"], ["v1"]],
        "legend": [["code", "meaning"], [1, "x"]],
        "no header": [["q2", "a2"], ["q3", "a3"]],
    }
    for title, rows in other.items():
        for order in ({title: rows, "Data": data}, {"Data": data, title: rows}):
            found = load_consultations(workbook(tmp_path / "x.xlsx", order))
            assert found.rows["question"][:] == ["q"], title
            assert found.source.endswith(f"(sheets 'Data', not '{title}')")


def test_two_sheets_of_consultations_under_different_columns_are_refused_unless_a_setting_chooses(
    tmp_path: Path,
) -> None:
    file = workbook(tmp_path / "x.xlsx", {"A": [QA, ["q1", "a"]], "B": [["body", *QA], ["q2", "t", "a"]]})
    message = refusal(file)
    assert "'A', 'B'" in message and "rename" in message
    assert load_consultations(file, question_column="body").rows["question"][:] == ["q2"]


def test_a_row_of_a_later_sheet_is_named_with_its_sheet(tmp_path: Path) -> None:
    names = ["id", *QA]
    pages: dict[str, list[list[object]]] = {"A": [names, ["1", "q", "a"]], "B": [names, ["2", "q", "a"]]}
    (tmp_path / "many").mkdir()
    workbook(tmp_path / "many" / "a.xlsx", pages)
    again = {"C": [names, ["3", "q", "a"]], "D": [names, ["4", "q", "a"], ["2", "q", "a"]]}
    workbook(tmp_path / "many" / "b{}.xlsx", again)
    message = refusal(tmp_path / "many")
    assert "a.xlsx, sheet 'B', row 2 and b{}.xlsx, sheet 'D', row 3" in message
    pages["B"].append(["3", "q", "a", "more"])
    assert load_consultations(workbook(tmp_path / "x.xlsx", pages)).rejected == {CELL_COUNT: 1}


def test_what_cannot_be_read_is_refused_plainly_and_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    for path in (tmp_path, f"{tmp_path}/*.tsv"):
        assert "no file in this folder or pattern" in refusal(path)
    os.mkfifo(tmp_path / "x.csv")
    odd = ("a\0b.csv", "x" * 5000 + ".csv", "no/such/folder/x.csv", "https://host/x.csv?a=b", "builtin:other")
    for path in (tmp_path / "x.csv", "/dev/null", f"{tmp_path}/*.csv", tmp_path, *odd):
        assert "data.path=" in refusal(path)


def test_a_column_that_only_late_rows_of_json_have_is_not_lost(tmp_path: Path) -> None:
    rows: list[object] = [{"question": f"q{i}", "answer": "a"} for i in range(1100)]
    rows[1050] = {"question": "q1050", "answer": "a", "late": "x", "severity": "critical"}
    loaded = load_consultations(jsonl_file(tmp_path, *rows), keep="all")
    assert len(loaded.rows) == 1100 and loaded.rows[1050]["severity"] == "critical"
    assert loaded.rows[0]["severity"] == "" and loaded.rows["late"][:] == [""] * 1050 + ["x"] + [""] * 49


def test_duplicate_ids_are_refused_with_their_rows(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "id,question,answer", "u1,q,a", "u2,q,a", "u1,q,a")
    message = refusal(file)
    assert "x.csv, line 2 and x.csv, line 4" in message and "data.id_column=row" in message and "u1" not in message
    assert load_consultations(file, id_column="row").rows["id"][1] == "row-0000002"


def test_errors_name_the_row_and_quote_nothing(tmp_path: Path) -> None:
    message = refusal(jsonl_file(tmp_path, {"question": "q", "answer": ""}, {"question": {"سر": 1}, "answer": "a"}))
    assert "1 with empty answer, 1 with a list, an object" in message and "see x.jsonl, line 1" in message
    assert "سر" not in message


def test_a_file_without_consultations_is_refused(tmp_path: Path) -> None:
    for lines, part in (
        (["question,answer"], "x.csv holds no rows."),
        (["question,answer", ",a", "q,"], "no row with both question and answer (1 with empty question, 1 with"),
        (["text,topic", "q,a"], "set data.question_column and data.answer_column to one of 'text', 'topic'"),
    ):
        assert part in refusal(csv_file(tmp_path, *lines))
    for content, name in (("[]", "x.json"), ("\ufeff\n \n", "x.csv"), ("\n", "x.jsonl")):
        assert refusal(csv_file(tmp_path, content, name=name)) == f"{name} is empty."
    assert refusal(workbook(tmp_path / "x.xlsx", {"Empty": []})) == "x.xlsx is empty."


def test_a_cache_folder_that_cannot_be_made_is_refused_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEVPEFT_CACHE", str(csv_file(tmp_path, "question,answer", "q,a")))
    with pytest.raises(RunError, match="set SEVPEFT_CACHE"):
        load_consultations(tmp_path / "x.csv")


def test_settings_of_the_hub_are_refused_for_a_file(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a")
    for setting, value in (("name", "ar"), ("revision", "main"), ("split", "test")):
        assert f"data.{setting}={value} chooses within a Hub data set" in refusal(file, **{setting: value})


Hub = Callable[[object], None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Let `datasets.load_dataset` give a data set or raise an error, as the Hub would."""

    def answers(outcome: object) -> None:
        def load_dataset(path: str, name: str | None, *, revision: str | None, split: str) -> object:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return answers


def test_a_hub_data_set_is_read_with_the_names_of_its_labels(hub: Hub) -> None:
    features = datasets.Features(
        {
            **{"q_body": datasets.Value("string"), "a_body": datasets.Value("string")},
            "label": datasets.ClassLabel(names=["neutral", "critical"]),
        }
    )
    columns = {"q_body": ["q1", "q2", "q3", "q4"], "a_body": ["a", "b", "c", None], "label": [1, None, 0, 0]}
    hub(datasets.Dataset.from_dict(columns, features=features))
    loaded: Consultations = load_consultations("org/maqa", revision="v1")
    assert loaded.rows["severity"][:] == ["critical", "", "neutral"]
    assert loaded.rejected == {"empty answer": 1}
    assert loaded.fingerprint.startswith("hub:org/maqa@v1:") and "org/maqa" in loaded.source


def test_a_hub_id_that_gives_nothing_is_refused_in_one_sentence(hub: Hub) -> None:
    assert "data.path=org/name is" in refusal("org/name")  # offline
    for outcome, part in (
        (ConnectionError("Couldn't reach 'org/name' on the Hub"), "(Couldn't reach"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist"), "doesn't exist"),
        (ValueError("Unknown split 'trian'.\nmore"), "(Unknown split 'trian')"),
        (RuntimeError("secret"), "(RuntimeError)"),
    ):
        hub(outcome)
        assert part in refusal("org/name")


def test_a_hub_that_does_not_answer_is_asked_once_and_then_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Cut:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(read.huggingface_hub, "get_session", Cut)
    read.look_for_hub.cache_clear()
    try:
        read.look_for_hub()
        read.look_for_hub()
    finally:
        read.look_for_hub.cache_clear()
    assert len(asked) == 1
    assert constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE


def test_other_columns_are_left_behind_unless_asked_for_and_are_text_that_loses_nothing(tmp_path: Path) -> None:
    cells = {"n": 3.0, "nothing": None, "list": ["ا", 1], "object": {"k": [True]}, "word": "NaN ", "line": "a\r\nb"}
    file = jsonl_file(tmp_path, {"question": "q", "answer": "a"} | cells)
    assert load_consultations(file).rows.column_names == ["id", "question", "answer", "row"]
    loaded = load_consultations(file, keep="all")
    assert loaded.carried == {name: name for name in cells}
    assert loaded.rows[0] == {
        **{"id": "row-0000001", "question": "q", "answer": "a", "n": "3", "nothing": "", "list": '["ا", 1]'},
        **{"object": '{"k": [true]}', "word": "NaN ", "line": "a\r\nb", "row": 1},
    }
    names = ["id", "question", "answer", "n", "row"]
    assert load_consultations(file, keep=("n", "absent")).rows.column_names == names
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"], "scan": [b"\xff\x00"]}), tmp_path / "x.parquet")
    assert load_consultations(tmp_path / "x.parquet", keep="all").rows["scan"][:] == ["/wA="]


def test_a_carried_column_that_is_called_like_one_of_ours_gets_another_name(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "question,answer,row,original_row,severity,label", "q,a,77,5,critical,x")
    loaded = load_consultations(file, keep="all", severity_column="label")
    assert loaded.carried == {
        **{"original_original_row": "row", "original_row": "original_row", "original_severity": "severity"}
    }
    assert loaded.rows[0]["row"] == 2 and loaded.rows[0]["original_original_row"] == "77"
    assert loaded.rows[0]["severity"] == "x" and loaded.rows[0]["original_severity"] == "critical"


def test_rows_that_are_no_consultation_are_kept_aside_as_they_were_read(tmp_path: Path) -> None:
    file = jsonl_file(
        tmp_path,
        *({"question": "q", "answer": "a", "reason": "r"}, {"question": None, "answer": "a", "n": [1]}),
        {"question": "\ud83d", "answer": "a", "row": 9},
    )
    aside = load_consultations(file, keep="all").rejected_rows
    assert [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()] == [
        {"row": 2, "reason": "empty question", "question": None, "answer": "a", "n": [1]},
        {"row": 3, "reason": "broken characters", "question": "\ud83d", "answer": "a", "original_row": 9},
    ]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "prepared"
    folder.mkdir()
    columns = {
        **{"id": ["u7", "u9"], "question": ["q", "r"], "answer": ["a", "b"], "prompt": ["x", "y"]},
        **{"original_row": ["1", "2"], "row": [7, 9], "group": [0, 1], "split": ["train", "test"]},
    }
    pq.write_table(pa.table(columns), folder / "consultations.parquet")
    about = {
        "fingerprint": file_hash(folder / "consultations.parquet"),
        **{"columns": list(columns), "input": {"fingerprint": "sha256:0"}},
    }
    (folder / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def test_a_prepared_folder_is_read_with_its_fingerprint_and_what_it_says_of_itself(prepared: Path) -> None:
    loaded = load_consultations(prepared)
    assert loaded.rows.column_names == ["id", "question", "answer", "split", "row"]
    assert loaded.rows["row"][:] == [7, 9] and loaded.rows["split"][:] == ["train", "test"]
    assert loaded.provenance["input"] == {"fingerprint": "sha256:0"}
    assert loaded.fingerprint == loaded.provenance["fingerprint"] and loaded.source == str(prepared)
    assert load_consultations(prepared / "consultations.parquet", question_column="question").provenance == {}


def test_a_prepared_folder_carries_its_groups_and_its_own_names(prepared: Path) -> None:
    loaded = load_consultations(prepared, keep="all")
    assert loaded.rows[1] == {
        **{"id": "u9", "question": "r", "answer": "b", "prompt": "y", "original_row": "2", "group": "1"},
        **{"split": "test", "row": 9},
    }
    assert load_consultations(prepared, question_column="prompt").rows["question"][:] == ["x", "y"]


def test_a_prepared_folder_that_was_changed_is_refused(prepared: Path) -> None:
    with (prepared / "consultations.parquet").open("ab") as file:
        file.write(b"x")
    assert "prepare the data again" in refusal(prepared)


def test_a_description_that_is_none_is_refused(prepared: Path) -> None:
    for text in ("{", "[]", "{}", '{"fingerprint": "sha256:0"}'):
        (prepared / "dataset.json").write_text(text, encoding="utf-8")
        message = refusal(prepared)
        assert "dataset.json" in message and "prepare the data again" in message
    (prepared / "dataset.json").write_text('{"fingerprint": "x", "columns": []}', encoding="utf-8")
    assert "data.revision=main chooses" in refusal(prepared, revision="main")


def test_data_may_be_called_as_the_description_of_a_prepared_folder(tmp_path: Path) -> None:
    csv_file(tmp_path, json.dumps([{"question": "q", "answer": "a"}]), name="dataset.json")
    assert load_consultations(tmp_path).rows["question"][:] == ["q"]


# Several files


@pytest.fixture
def maqa(tmp_path: Path) -> Path:
    """Two files of MAQA's shape, the second with an empty line and a row without an answer."""
    folder = tmp_path / "maqa"
    folder.mkdir()
    csv_file(folder, "a_body,q_body,category", "answer 2,question 2,eye", "answer 3,question 3,eye", name="train.csv")
    csv_file(folder, "category,q_body,a_body", "heart,question 1,answer 1", "", "heart,lost,", name="test.csv")
    (folder / "README.md").write_text("no data")
    return folder


def test_a_folder_and_a_pattern_are_read_in_sorted_order_as_one_source(maqa: Path) -> None:
    whole = load_consultations(maqa)
    for pattern in ("", "*.csv", "t*.csv", "**/*.csv"):
        found = load_consultations(f"{maqa}/{pattern}", keep="all")
        assert found.rows["question"][:] == ["question 1", "question 2", "question 3"]
        assert found.rows["answer"][:] == ["answer 1", "answer 2", "answer 3"]
        assert found.rows["file"][:] == ["test.csv", "train.csv", "train.csv"]
        assert len(set(found.rows["id"][:])) == 3 and len(set(found.rows["row"][:])) == 3
        assert found.rejected == {"empty answer": 1} and found.fingerprint == whole.fingerprint
    alone = load_consultations(maqa / "train.csv")
    assert load_consultations(f"{maqa}/tr*.csv").fingerprint == alone.fingerprint
    # So that a classifier is not judged on a file of those that it was fitted on.
    assert {"name": "train.csv", "fingerprint": alone.fingerprint} in whole.files
    csv_file(maqa, "category,q_body,a_body", "eye,question 4,answer 4", name="train.csv")
    after = load_consultations(maqa)
    assert after.fingerprint != whole.fingerprint and "question 4" in after.rows["question"][:]


def test_json_lines_packed_or_not_are_one_format_and_may_differ_in_columns(tmp_path: Path) -> None:
    jsonl_file(tmp_path, {"question": "q1", "answer": "a1"})
    more = json.dumps({"question": "q2", "answer": "a2", "severity": "critical"})
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(more.encode()))
    found = load_consultations(tmp_path)
    assert found.rows["question"][:] == ["q1", "q2"] and found.rows["severity"][:] == ["", "critical"]


def test_errors_in_several_files_name_the_file_and_its_own_line(maqa: Path) -> None:
    header = "category,q_body,a_body"
    csv_file(maqa, header, "eye,q,a", 'eye,"q,a', name="train.csv")
    assert "train.csv, line 3: a quote" in refusal(maqa)
    csv_file(maqa, "question,q_body,a_body", "x,q,a", name="train.csv")
    assert "train.csv or test.csv lacks 'category', 'question'" in refusal(maqa)
    for name in ("test", "train"):
        csv_file(maqa, "id,question,answer", f"{name},q,a", "same,q,a", name=f"{name}.csv")
    assert "test.csv, line 3 and train.csv, line 3 have the same 'id'" in refusal(maqa)
    jsonl_file(maqa, {"q_body": "q", "a_body": "a", "category": "c"})
    assert "several formats" in refusal(maqa)
