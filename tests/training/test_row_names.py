"""Rows are found again by their tokens, and named by number and file only."""

from __future__ import annotations

from datasets import Dataset

from sevpeft.training.data import RowNames

IDS = [[1, 2, 3], [4, 5], [1, 2, 3], [4, 5, 6]]


def test_a_row_has_the_number_that_it_has_in_the_data_and_not_among_the_training_rows() -> None:
    encoded = Dataset.from_dict({"input_ids": IDS[:3], "source_index": [3, 1, 0], "labels": IDS[:3]})
    rows = Dataset.from_dict({"row": [70, 80, 90, 100], "question": ["سر"] * 4})
    names = RowNames(encoded, rows)
    assert names([[4, 5]]) == ["row 80"]
    assert names([[1, 2, 3]]) == ["row 100", "row 70"], "equal rows are all named"
    assert names([[4, 5, 6], []]) == []


def test_where_there_are_several_files_the_name_says_which() -> None:
    encoded = Dataset.from_dict({"input_ids": IDS, "source_index": [0, 1, 2, 3]})
    rows = Dataset.from_dict({"row": [1, 2, 1, 2], "file": ["a.csv", "a.csv", "b.csv", "b.csv"]})
    assert RowNames(encoded, rows)([[4, 5, 6]]) == ["row 2 of b.csv"]
