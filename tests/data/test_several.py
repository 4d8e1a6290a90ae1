"""Several files read as one source, by a folder or by a pattern."""

import gzip
from pathlib import Path

import pytest

from sevpeft.data.sources import load_consultations
from sevpeft.errors import DataError
from sevpeft.severity.classifier.examples import fingerprints

HEADER = "category,q_body,a_body"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def maqa(tmp_path: Path) -> Path:
    """Two files of MAQA's shape, the second with an empty line and a row without an answer."""
    write(tmp_path / "train.csv", "a_body,q_body,category", "answer 2,question 2,eye", "answer 3,question 3,eye")
    write(tmp_path / "test.csv", HEADER, "heart,question 1,answer 1", "", "heart,lost,")
    write(tmp_path / "README.md", "no data")
    return tmp_path


def refusal(path: object) -> str:
    with pytest.raises(DataError) as refused:
        load_consultations(str(path))
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("pattern", ["", "*.csv", "t*.csv", "**/*.csv"])
def test_a_folder_and_a_pattern_are_read_in_sorted_order_as_one_source(maqa: Path, pattern: str) -> None:
    read = load_consultations(f"{maqa}/{pattern}", keep="all")
    assert read.rows["question"][:] == ["question 1", "question 2", "question 3"]
    assert read.rows["answer"][:] == ["answer 1", "answer 2", "answer 3"]
    assert read.rows["file"][:] == ["test.csv", "train.csv", "train.csv"]
    assert len(set(read.rows["id"][:])) == 3 and len(set(read.rows["row"][:])) == 3
    assert read.rejected == {"empty answer": 1}


def test_json_lines_packed_or_not_are_one_format(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"question": "q1", "answer": "a1"}')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"question": "q2", "answer": "a2", "severity": "critical"}\n')
    read = load_consultations(tmp_path)
    assert read.rows["question"][:] == ["q1", "q2"] and read.rows["severity"][:] == ["", "critical"]


def test_the_fingerprint_covers_every_file(maqa: Path) -> None:
    before = load_consultations(maqa)
    assert load_consultations(f"{maqa}/*.csv").fingerprint == before.fingerprint
    write(maqa / "train.csv", HEADER, "eye,question 4,answer 4")
    after = load_consultations(maqa)
    assert after.fingerprint != before.fingerprint and "question 4" in after.rows["question"][:]


def test_a_file_is_known_again_within_the_whole(maqa: Path) -> None:
    """So that a classifier is not judged on a file of those that it was fitted on."""
    assert load_consultations(maqa / "train.csv").fingerprint in fingerprints(load_consultations(maqa))


def test_a_pattern_that_matches_one_file_is_that_file(maqa: Path) -> None:
    assert load_consultations(f"{maqa}/tr*.csv").fingerprint == load_consultations(maqa / "train.csv").fingerprint


def test_errors_name_the_file_and_its_own_line(maqa: Path) -> None:
    write(maqa / "train.csv", HEADER, "eye,q,a", "eye,q,a,more")
    assert "train.csv, line 3: 4 cells" in refusal(maqa)
    for name, number in (("test", "0.5"), ("train", "secret")):
        write(maqa / f"{name}.csv", "question,answer,p_critical", f"q,a,{number}", f"q,a,{number}")
    said = refusal(maqa)
    assert "train.csv, line 2: column 'p_critical' is not a number" in said and "secret" not in said


def test_ids_that_stand_in_two_files_are_refused_with_both_places(maqa: Path) -> None:
    for name in ("test", "train"):
        write(maqa / f"{name}.csv", "id,question,answer", f"{name},q,a", "same,q,a")
    assert "such as test.csv, line 3 and train.csv, line 3" in refusal(maqa)


def test_files_of_other_columns_are_refused(maqa: Path) -> None:
    write(maqa / "train.csv", "question,q_body,a_body", "x,q,a")
    assert "train.csv has not the same columns as test.csv, it lacks 'category' and has 'question' besides" in refusal(
        maqa
    )


def test_files_of_several_formats_are_refused(maqa: Path) -> None:
    write(maqa / "more.jsonl", '{"q_body": "q", "a_body": "a", "category": "c"}')
    assert "several formats (.jsonl, .csv)" in refusal(maqa)


def test_a_pattern_without_a_match_is_refused(maqa: Path) -> None:
    assert "no file matches this pattern" in refusal(f"{maqa}/*.tsv")
