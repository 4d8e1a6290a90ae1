"""A path becomes rows with canonical columns, kept on disk for their owner, and never served from a stale table."""

import gzip
import json
import math
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import openpyxl
import pyarrow as pa
import pytest

from sevpeft.data import sources
from sevpeft.data.sources import Consultations, load_consultations
from sevpeft.errors import DataError


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


def refusal(path: object, **settings: object) -> str:
    with pytest.raises(DataError) as refused:
        load_consultations(path, **settings)  # type: ignore[arg-type]
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
    return str(refused.value)


def test_a_file_becomes_rows_with_canonical_columns(tmp_path: Path) -> None:
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


def test_rows_are_memory_mapped_in_a_folder_for_their_owner_alone(tmp_path: Path, cache: Path) -> None:
    loaded = load_consultations(csv_file(tmp_path, "question,answer", "q,a"))
    (mapped,) = loaded.rows.cache_files
    assert Path(mapped["filename"]).is_relative_to(cache)
    if os.name == "posix":
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700


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
    assert load_consultations(file, max_rows=2).rows["question"][:] == ["b", "c"]
    assert len(load_consultations(file).rows) == 3
    assert "data.max_rows=0" in refusal(file, max_rows=0)


def test_a_second_reading_is_answered_from_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a", ",a")
    first = load_consultations(file)
    monkeypatch.setattr(sources, "open_table", lambda *_: pytest.fail("the file was read again"))
    second = load_consultations(file)
    assert second.rows[:] == first.rows[:] and second.rejected == first.rejected == {"empty question": 1}
    assert second.rows._fingerprint == first.rows._fingerprint


def test_what_later_steps_cache_stays_valid_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a")
    first = load_consultations(file)
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / "elsewhere"))
    assert load_consultations(file).rows._fingerprint == first.rows._fingerprint


def test_a_changed_file_is_never_served_from_a_stale_table(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a")
    before = file.stat()
    first = load_consultations(file)
    csv_file(tmp_path, "question,answer", "r,a")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = load_consultations(file)
    assert second.rows["question"][:] == ["r"] and second.fingerprint != first.fingerprint


def test_another_setting_is_another_table(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "question,other,answer", "q,o,a")
    assert load_consultations(file).rows["question"][:] == ["q"]
    assert load_consultations(file, question_column="other").rows["question"][:] == ["o"]


@pytest.mark.parametrize("damage", ["truncated", "fewer rows", "no about", "empty about"])
def test_a_half_written_table_is_made_again(tmp_path: Path, cache: Path, damage: str) -> None:
    file = csv_file(tmp_path, "question,answer", *["q,a"] * 1500)
    load_consultations(file)
    (table,) = cache.iterdir()
    content = (table / "rows.arrow").read_bytes()
    if damage == "truncated":
        (table / "rows.arrow").unlink()
        (table / "rows.arrow").write_bytes(content[:-100])
    elif damage == "fewer rows":  # a stream that ends between two batches is a sound, shorter one
        with pa.ipc.open_stream(content) as stream:
            first = stream.read_next_batch()
        (table / "rows.arrow").unlink()
        with pa.ipc.new_stream(str(table / "rows.arrow"), first.schema) as writer:
            writer.write_batch(first)
    elif damage == "no about":
        (table / "about.json").unlink()
    else:
        (table / "about.json").write_text("")
    assert len(load_consultations(file).rows) == 1500


def test_a_failed_reading_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    refusal(csv_file(tmp_path, "question,answer", *["q,a"] * 3000, "q"))
    assert list(cache.iterdir()) == []


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path, cache: Path) -> None:
    for name, age in (("a.partial-1", 2 * 24 * 3600), ("b.partial-2", 60)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    load_consultations(csv_file(tmp_path, "question,answer", "q,a"))
    assert not (cache / "a.partial-1").exists() and (cache / "b.partial-2").exists()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a")
    opened = sources.open_table

    def grows(*args: object) -> object:
        csv_file(tmp_path, "question,answer", "q,a", "r,b")
        return opened(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(sources, "open_table", grows)
    assert "changed while it was read" in refusal(file)


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
        read = load_consultations(file)
        assert (read.rows["question"][:], read.rows["answer"][:]) == (["q1", "q2"], ["a1", "a2"])
        assert read.rejected == {"empty answer": 1}
        assert "'Jan'" in read.source and "'Feb'" in read.source and "Empty" not in read.source
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
            read = load_consultations(workbook(tmp_path / "x.xlsx", order))
            assert read.rows["question"][:] == ["q"], title
            assert read.source.endswith(f"(sheets 'Data', not '{title}')")


def test_two_sheets_of_consultations_under_different_columns_are_refused_unless_a_setting_chooses(
    tmp_path: Path,
) -> None:
    file = workbook(tmp_path / "x.xlsx", {"A": [QA, ["q1", "a"]], "B": [["body", *QA], ["q2", "t", "a"]]})
    said = refusal(file)
    assert "'A', 'B'" in said and "rename" in said
    assert load_consultations(file, question_column="body").rows["question"][:] == ["q2"]


def test_a_row_of_a_later_sheet_is_named_with_its_sheet(tmp_path: Path) -> None:
    names = ["id", *QA]
    pages: dict[str, list[list[object]]] = {"A": [names, ["1", "q", "a"]], "B": [names, ["2", "q", "a"]]}
    (tmp_path / "many").mkdir()
    workbook(tmp_path / "many" / "a.xlsx", pages)
    again = {"C": [names, ["3", "q", "a"]], "D": [names, ["4", "q", "a"], ["2", "q", "a"]]}
    workbook(tmp_path / "many" / "b{}.xlsx", again)
    said = refusal(tmp_path / "many")
    assert "a.xlsx, sheet 'B', row 2 and b{}.xlsx, sheet 'D', row 3" in said
    pages["B"].append(["3", "q", "a", "more"])
    assert "sheet 'B', row 3: 4 cells" in refusal(workbook(tmp_path / "x.xlsx", pages))


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.csv")
    for path in (tmp_path / "x.csv", Path("/dev/null"), f"{tmp_path}/*.csv", tmp_path):
        assert "data.path=" in refusal(path)


def test_a_column_that_only_late_rows_of_json_have_is_not_lost(tmp_path: Path) -> None:
    rows: list[object] = [{"question": f"q{i}", "answer": "a"} for i in range(2500)]
    rows[2000] = {"question": "q2000", "answer": "a", "noise": 1, "severity": "critical"}
    loaded = load_consultations(jsonl_file(tmp_path, *rows))
    assert len(loaded.rows) == 2500 and loaded.rows[2000]["severity"] == "critical"
    assert loaded.rows[0]["severity"] == ""


def test_duplicate_ids_are_refused_with_their_rows(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "id,question,answer", "u1,q,a", "u2,q,a", "u1,q,a")
    said = refusal(file)
    assert "x.csv, line 2 and x.csv, line 4" in said and "data.id_column=row" in said and "u1" not in said
    assert load_consultations(file, id_column="row").rows["id"][1] == "row-0000002"


def test_errors_name_the_row_and_quote_nothing(tmp_path: Path) -> None:
    said = refusal(jsonl_file(tmp_path, {"question": "q", "answer": "a"}, {"question": ["سر"], "answer": "a"}))
    assert said == "x.jsonl, line 2: column 'question' holds a list where text is needed."


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["question,answer"], "x.csv holds no rows."),
        (
            ["question,answer", ",a", "q,"],
            "no row with both question and answer (1 with empty question, 1 with",
        ),
        (["text,topic", "q,a"], "no column that is named like a question"),
    ],
)
def test_a_file_without_consultations_is_refused(tmp_path: Path, lines: list[str], said: str) -> None:
    assert said in refusal(csv_file(tmp_path, *lines))


def test_json_without_rows_is_refused(tmp_path: Path) -> None:
    assert refusal(csv_file(tmp_path, "[]", name="x.json")) == "x.json holds no rows."


def test_an_absent_file_is_refused_with_the_names_that_are_close(tmp_path: Path) -> None:
    csv_file(tmp_path, "question,answer", name="consultations.csv")
    said = refusal(tmp_path / "consultation.csv")
    assert "there is no such file, but there is" in said and said.endswith("consultations.csv.")


def test_a_folder_without_a_data_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    assert "is a folder without a file that is read here" in refusal(tmp_path)


@pytest.mark.parametrize("path", ["a\0b.csv", "x" * 5000 + ".csv", "no/such/folder/x.csv", "https://host/x.csv?a=b"])
def test_odd_paths_are_refused_plainly(path: str) -> None:
    assert "data.path=" in refusal(path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a")
    file.chmod(0)
    assert "may not be read" in refusal(file)


def test_a_cache_folder_that_cannot_be_made_is_refused_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEVPEFT_CACHE", str(csv_file(tmp_path, "question,answer", "q,a")))
    assert "set SEVPEFT_CACHE" in refusal(tmp_path / "x.csv")


@pytest.mark.parametrize(("setting", "value"), [("name", "ar"), ("revision", "main"), ("split", "test")])
def test_settings_of_the_hub_are_refused_for_a_file(tmp_path: Path, setting: str, value: str) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a")
    assert f"data.{setting}={value} chooses within a Hub data set" in refusal(file, **{setting: value})


def test_the_bundled_sample_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples").mkdir()
    jsonl_file(tmp_path, {"id": "s1", "question": "q", "answer": "a", "reason": "r", "split": "train"}).rename(
        tmp_path / "samples" / "consultations.jsonl"
    )
    monkeypatch.setattr(sources.resources, "files", lambda _: tmp_path)
    loaded = load_consultations("builtin:consultations")
    assert loaded.source == "builtin:consultations" and loaded.rows[0]["split"] == "train"
    assert "the sample is builtin:consultations" in refusal("builtin:other")


def test_a_packed_and_a_plain_file_give_the_same_rows(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "question,answer", "q,a")
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert load_consultations(tmp_path / "x.csv.gz").rows[:] == load_consultations(file).rows[:]


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


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (ConnectionError("x"), "is no file here, and the Hub cannot be reached"),
        (
            datasets.exceptions.DatasetNotFoundError("x"),
            "neither a file here nor a data set that the Hub hands out",
        ),
        (ValueError("Unknown split 'trian'.\nmore"), "(Unknown split 'trian'): look at data.name"),
        (RuntimeError("secret"), "(RuntimeError): look at data.name"),
    ],
)
def test_a_hub_id_that_gives_nothing_is_refused_in_one_sentence(hub: Hub, outcome: Exception, said: str) -> None:
    hub(outcome)
    assert said in refusal("org/name")


def test_without_a_connection_the_hub_is_said_to_be_out_of_reach() -> None:
    assert "data.path=org/name is" in refusal("org/name")


def test_other_columns_are_left_behind_unless_asked_for(tmp_path: Path) -> None:
    file = csv_file(tmp_path, "question,answer,Clinic,year", "q,a,القاهرة,2020")
    assert load_consultations(file).rows.column_names == ["id", "question", "answer", "row"]
    loaded = load_consultations(file, keep="all")
    assert loaded.rows[0] == {
        **{"id": "row-0000001", "question": "q", "answer": "a", "Clinic": "القاهرة", "year": "2020", "row": 2}
    }
    assert loaded.carried == {"Clinic": "Clinic", "year": "year"}
    assert load_consultations(file, keep=("year",)).rows.column_names == ["id", "question", "answer", "year", "row"]
    assert "has no column 'month'" in refusal(file, keep=["month"])


def test_carried_values_are_text_and_lose_nothing(tmp_path: Path) -> None:
    cells = {"n": 3.0, "nothing": None, "list": ["ا", 1], "object": {"k": [True]}, "word": "NaN ", "line": "a\r\nb"}
    row = load_consultations(jsonl_file(tmp_path, {"question": "q", "answer": "a"} | cells), keep="all").rows[0]
    assert {name: row[name] for name in cells} == {
        **{"n": "3", "nothing": "", "list": '["ا", 1]', "object": '{"k": [true]}', "word": "NaN ", "line": "a\r\nb"}
    }


def test_bytes_are_carried_in_base64(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

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


def test_a_carried_column_that_only_the_last_row_has_is_there_from_the_first(tmp_path: Path) -> None:
    rows: list[object] = [{"question": f"q{i}", "answer": "a"} for i in range(2500)]
    rows[2499] = {"question": "q", "answer": "a", "late": "x"}
    loaded = load_consultations(jsonl_file(tmp_path, *rows), keep="all")
    assert loaded.rows["late"][:] == [""] * 2499 + ["x"]


def test_rows_that_are_no_consultation_are_kept_aside_as_they_were_read(tmp_path: Path) -> None:
    file = jsonl_file(
        tmp_path,
        *({"question": "q", "answer": "a", "reason": "r"}, {"question": None, "answer": "a", "n": [1]}),
        {"question": "\ud83d", "answer": "a", "row": 9},
    )
    aside = load_consultations(file, keep="all").rejected_rows
    assert aside is not None
    assert [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()] == [
        {"row": 2, "reason": "empty question", "question": None, "answer": "a", "n": [1]},
        {"row": 3, "reason": "broken characters", "question": "\ud83d", "answer": "a", "original_row": 9},
    ]
    assert load_consultations(file).rejected_rows is None


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    import pyarrow.parquet as pq

    folder = tmp_path / "prepared"
    folder.mkdir()
    columns = {
        **{"id": ["u7", "u9"], "question": ["q", "r"], "answer": ["a", "b"], "prompt": ["x", "y"]},
        **{"original_row": ["1", "2"], "row": [7, 9], "group": [0, 1], "split": ["train", "test"]},
    }
    pq.write_table(pa.table(columns), folder / "consultations.parquet")
    about = {
        "fingerprint": sources.file_fingerprint(folder / "consultations.parquet"),
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
    assert "is not as `sevpeft prepare` wrote it" in refusal(prepared)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"fingerprint": "sha256:0"}'])
def test_a_description_that_is_none_is_refused(prepared: Path, text: str) -> None:
    (prepared / "dataset.json").write_text(text, encoding="utf-8")
    assert "dataset.json cannot be read or is none" in refusal(prepared)


def test_settings_of_the_hub_are_refused_for_a_prepared_folder(prepared: Path) -> None:
    assert "prepared is a folder: remove it" in refusal(prepared, revision="main")


MAQA = ["q_body,a_body,category", '"عندي صداع\nمن امبارح","راجع الطبيب, اليوم",أعصاب']
AHQAD = ["Question, Answer, Category", "عندي صداع, راجع الطبيب, Neurology"]


@pytest.mark.parametrize(("lines", "column"), [(MAQA, "category"), (AHQAD, "Category")])
def test_the_shapes_of_maqa_and_ahqad_are_read(tmp_path: Path, lines: list[str], column: str) -> None:
    loaded = load_consultations(csv_file(tmp_path, *lines))
    (row,) = loaded.rows
    assert row["question"].startswith("عندي صداع") and row["answer"].strip().startswith("راجع الطبيب")
    assert loaded.columns["specialty"] == column


def test_the_workbook_of_maqa_is_read(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    for line in (["q_body", "a_body", "category", None], ["عندي صداع", "راجع الطبيب", "أعصاب"], ["سعال", None, "صدر"]):
        book.active.append(line)
    book.save(tmp_path / "MAQA.xlsx")
    loaded = load_consultations(tmp_path / "MAQA.xlsx", keep="all")
    assert loaded.rows["specialty"][:] == ["أعصاب"] and loaded.rejected == {"empty answer": 1}
