"""Rows become labeled examples; splits of them keep a question and its duplicates on one side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevpeft.data.read import Consultations, load_consultations
from sevpeft.errors import DataError, SevpeftError
from sevpeft.severity.classifier.examples import Examples, block_folds, grouped_folds, labeled_examples
from sevpeft.severity.probabilities import SEVERITIES

from .conftest import build_examples

SECRET = "عندي سر"


def read(folder: Path, *changes: dict[str, Any], **columns: list[Any]) -> Consultations:
    rows = [
        {"question": f"{SECRET} {number}", "answer": "راجع الطبيب", "severity": SEVERITIES[number % 3]}
        | {name: values[number] for name, values in columns.items()}
        for number in range(6)
    ]
    for number, change in enumerate(changes):
        rows[number] |= change
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return load_consultations(path, keep="all")


def test_labels_rows_and_blocks_by_their_name_in_the_input_are_read(tmp_path: Path) -> None:
    found = labeled_examples(read(tmp_path))
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2] and found.rows.tolist() == [1, 2, 3, 4, 5, 6]
    assert found.blocks is None
    # A carried column, a recognized one, and the severity itself.
    for column, values in {"source": list("aaabbb"), "specialty": list("aaabbb"), "severity": None}.items():
        found = labeled_examples(read(tmp_path, **({column: values} if values else {})), column)
        assert found.blocks is not None and found.blocks.tolist() == (values or list(SEVERITIES * 2)), column
    part = labeled_examples(read(tmp_path, source=list("abcdef")), "source").take(np.array([4, 1]))
    assert part.questions == [f"{SECRET} 4", f"{SECRET} 1"] and part.rows.tolist() == [5, 2]
    assert part.blocks is not None and part.blocks.tolist() == ["e", "b"]


def test_spellings_of_one_question_are_one_group_and_a_column_named_group_is_none(tmp_path: Path) -> None:
    rows = read(tmp_path, {"question": "عندى إغماء"}, {"question": "عندي اغماء!"}, group=["1"] * 6)
    groups = labeled_examples(rows).groups
    assert groups[0] == groups[1] and len(set(groups.tolist())) == 5


def test_labels_that_do_not_serve_are_refused_without_being_quoted(tmp_path: Path) -> None:
    for changes, expected in (
        ([{"severity": None}], "Row 1"),
        ([{"severity": "urgent?"}, {"severity": ""}], "2 rows (the first is row 1)"),
        ([{}, {}, {"severity": "neutral"}, {}, {}, {"severity": "neutral"}], "no critical row"),
        ([{"severity_method": "rules"}] * 6, "severity_method"),
    ):
        with pytest.raises(SevpeftError) as caught:
            labeled_examples(read(tmp_path, *changes))
        assert expected in str(caught.value) and SECRET not in str(caught.value), changes
    for column in ("ward", "question", "notes"):  # the names of blocks are written into the report
        with pytest.raises(DataError, match="block_column") as caught:
            labeled_examples(read(tmp_path, notes=[f"{SECRET} {'ا' * 90}"] * 6), column)
        assert SECRET not in str(caught.value)
    unlabeled = tmp_path / "rows.csv"
    unlabeled.write_text("question,answer\nألم,راجع الطبيب\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.severity_column=NAME"):
        labeled_examples(load_consultations(unlabeled, keep="all"))


def test_complete_rows_are_those_of_blocks_with_every_severity() -> None:
    labels, blocks = np.array([0, 1, 2, 2, 2, 0]), np.array(["a", "a", "a", "b", "b", "b"])
    rows = Examples([""] * 6, labels, np.arange(6), np.arange(6), blocks)
    assert rows.complete.tolist() == [True, True, True, False, False, False]
    assert replace(rows, blocks=None).complete.all() and rows.take(np.array([0, 3, 4])).complete.all()


def test_grouped_folds_test_every_row_once_part_no_group_and_keep_the_proportions() -> None:
    examples = build_examples(200)
    grouped = replace(examples, groups=np.arange(200) // 2)
    folds = grouped_folds(grouped, folds=4)
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(200))
    for fold in folds:
        assert not set(grouped.groups[fold.train]) & set(grouped.groups[fold.test])
        assert len(fold.train) + len(fold.test) == 200
    whole = np.bincount(examples.labels) / 200
    for fold in grouped_folds(examples):
        np.testing.assert_allclose(np.bincount(examples.labels[fold.test]) / len(fold.test), whole, atol=0.03)
    one, same, other = (grouped_folds(examples, seed=seed)[0].test.tolist() for seed in (1, 1, 2))
    assert one == same != other


def test_a_held_out_block_is_not_trained_on_nor_are_its_duplicates_elsewhere(examples: Examples) -> None:
    blocks = np.array([f"block{number * 3 // 240}" for number in range(240)])
    groups = examples.groups.copy()
    groups[100], groups[200] = groups[3], groups[4]
    dealt = replace(examples, groups=groups, blocks=blocks)
    folds = block_folds(dealt)
    assert [fold.name for fold in folds] == ["block0", "block1", "block2"]
    for fold in folds:
        assert set(blocks[fold.test]) == {fold.name} and fold.name not in set(blocks[fold.train])
        assert not set(groups[fold.train]) & set(groups[fold.test])
    assert [240 - len(fold.train) - len(fold.test) for fold in folds] == [2, 1, 1]


def test_a_block_that_lacks_a_severity_is_trained_on_and_not_held_out(examples: Examples) -> None:
    blocks = np.array(["one", "two"], dtype="<U4")[np.arange(240) % 2]
    blocks[(np.arange(240) < 60) & (examples.labels == 2)] = "ward"
    folds = block_folds(replace(examples, blocks=blocks))
    assert [fold.name for fold in folds] == ["one", "two"]
    assert all("ward" in set(blocks[fold.train]) for fold in folds)


def test_too_few_questions_or_severities_are_refused(examples: Examples) -> None:
    few = np.concatenate([np.flatnonzero(examples.labels != 2), np.flatnonzero(examples.labels == 2)[:3]])
    # One question, however often it stands there, is one.
    copied = replace(examples, groups=np.where(examples.labels == 2, 10_000, examples.groups))
    whole = replace(examples, blocks=np.full(240, "one"))
    for split, expected in (
        (lambda: grouped_folds(examples.take(few)), "critical has 3 distinct questions"),
        (lambda: grouped_folds(copied), "critical has 1 distinct questions"),
        (
            lambda: grouped_folds(examples.take(np.flatnonzero(examples.labels == 0))),
            "neutral has 0 distinct questions",
        ),
        (lambda: block_folds(whole), "Without block one"),
        (lambda: block_folds(replace(examples, blocks=examples.labels.astype(str))), "block_column"),
    ):
        with pytest.raises(DataError, match=expected):
            split()


def test_a_fold_without_a_severity_to_train_on_is_refused(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lopsided:
        """As scikit-learn splits where large groups leave it no choice."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def split(self, _: object, labels: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
            return [(np.flatnonzero(labels != 2), np.flatnonzero(labels == 2))]

    monkeypatch.setattr("sklearn.model_selection.StratifiedGroupKFold", Lopsided)
    with pytest.raises(DataError, match="no critical row"):
        grouped_folds(examples)
