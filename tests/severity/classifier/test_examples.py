"""Rows become labelled examples by name, by group and by block, or are refused without being quoted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevpeft.data.read import Consultations, load_consultations
from sevpeft.errors import DataError, SevpeftError
from sevpeft.severity.classifier.examples import binary_examples, complete_rows, labelled_examples, question_groups

SECRET = "عندي سر"
NAMES = ("non_critical", "neutral", "critical")


def read(folder: Path, *changes: dict[str, Any], **columns: list[Any]) -> Consultations:
    rows = [
        {"question": f"{SECRET} {number}", "answer": "راجع الطبيب", "severity": NAMES[number % 3]}
        | {name: values[number] for name, values in columns.items()}
        for number in range(6)
    ]
    for number, change in enumerate(changes):
        rows[number] |= change
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return load_consultations(path, keep="all")


def test_labels_rows_and_what_stands_beside_are_read(tmp_path: Path) -> None:
    found = labelled_examples(read(tmp_path, specialty=["قلب"] * 6))
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2] and found.rows.tolist() == [1, 2, 3, 4, 5, 6]
    assert found.counts() == {"non_critical": 2, "neutral": 2, "critical": 2}
    assert found.side == {"answer": ["راجع الطبيب"] * 6, "specialty": ["قلب"] * 6} and found.blocks is None


def test_spellings_of_one_question_are_one_group(tmp_path: Path) -> None:
    groups = question_groups(read(tmp_path, {"question": "عندى إغماء"}, {"question": "عندي اغماء!"}))
    assert groups[0] == groups[1] and len(set(groups.tolist())) == 5


def test_a_column_named_group_means_nothing_in_a_file_that_was_not_prepared(tmp_path: Path) -> None:
    assert len(set(question_groups(read(tmp_path, group=["1"] * 6)).tolist())) == 6


@pytest.mark.parametrize("column", ["source", "specialty", "severity"])
def test_blocks_are_any_column_by_its_name_in_the_input(tmp_path: Path, column: str) -> None:
    values = ["a", "a", "a", "b", "b", "b"]
    columns = {} if column == "severity" else {column: values}
    found = labelled_examples(read(tmp_path, **columns), column)
    assert found.blocks is not None
    assert found.blocks.tolist() == (values if columns else list(NAMES * 2))


def test_taking_rows_takes_all_that_is_theirs(tmp_path: Path) -> None:
    whole = labelled_examples(read(tmp_path, source=list("abcdef"), specialty=list("uvwxyz")), "source")
    part = whole.take(np.array([4, 1]))
    assert part.questions == [f"{SECRET} 4", f"{SECRET} 1"] and part.rows.tolist() == [5, 2]
    assert part.blocks is not None and part.blocks.tolist() == ["e", "b"] and part.side["specialty"] == ["y", "v"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"severity": None}], "Row 1"),
        ([{"severity": "urgent?"}, {"severity": ""}], "2 rows (the first is row 1)"),
        ([{}, {}, {"severity": "neutral"}, {}, {}, {"severity": "neutral"}], "no critical row"),
        ([{"severity": "critical"}] * 6, "no non_critical and no neutral row"),
    ],
)
def test_labels_that_do_not_serve_are_refused(tmp_path: Path, changes: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(SevpeftError) as caught:
        labelled_examples(read(tmp_path, *changes))
    text = str(caught.value)
    assert said in text and SECRET not in text and "\n" not in text


def test_data_without_labels_and_columns_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nألم,راجع الطبيب\n", encoding="utf-8")
    with pytest.raises(DataError, match="no severity column"):
        labelled_examples(load_consultations(path, keep="all"))
    with pytest.raises(DataError, match="no column 'ward', which --block-column asks for: it has answer, question"):
        labelled_examples(read(tmp_path), "ward")


def test_severities_that_a_classifier_wrote_are_no_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="given by a classifier"):
        labelled_examples(read(tmp_path, severity_method=["rules"] * 6))


def test_a_column_of_yes_and_no_is_read(tmp_path: Path) -> None:
    examples, positive = binary_examples(read(tmp_path, first_aid=[0, 1, "1", "0", True, False]), "first_aid")
    assert positive.tolist() == [False, True, True, False, True, False]
    assert len(examples) == 6


@pytest.mark.parametrize(
    ("values", "said"),
    [([0, 1, 2, 0, 1, ""], "neither 0 nor 1 in 2 rows (the first is row 3)"), ([1] * 6, "is 1 in every row")],
)
def test_a_column_of_other_things_is_refused(tmp_path: Path, values: list[Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        binary_examples(read(tmp_path, first_aid=values), "first_aid")
    assert said in str(caught.value)


def test_complete_rows_are_those_of_blocks_with_every_severity() -> None:
    labels, blocks = np.array([0, 1, 2, 2, 2, 0]), np.array(["a", "a", "a", "b", "b", "b"])
    assert complete_rows(labels, blocks).tolist() == [True, True, True, False, False, False]
    assert complete_rows(labels, None).all()
