"""The rows of an evaluation are those that the training never saw, known by their ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sevpeft.data.prepare.prepare import prepare
from sevpeft.data.prepare.settings import PrepareSettings
from sevpeft.data.read import load_consultations
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import RunError
from sevpeft.evaluation import rows as of_rows
from sevpeft.evaluation.rows import check_same_data, training_answers
from sevpeft.recipe import load_recipe, recipe_from_values
from sevpeft.runs import Run
from sevpeft.training.data import load_splits
from tests.evaluation.conftest import QUICKSTART

SEVERE = ("non_critical", "neutral", "critical")


def table(path: Path, *, copies: int = 1) -> Path:
    lines = [
        {"id": f"q{n}-{c}", "question": f"عندي صداع رقم {n}{'!' * c}", "answer": f"جواب {n}", "severity": SEVERE[n % 3]}
        for n in range(21)
        for c in range(copies)
    ]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


def test_the_rows_are_the_run_s_own_test_split_and_none_was_trained_on(finished_run: Run) -> None:
    recipe = load_recipe(finished_run.folder / "recipe.yaml")
    rows = of_rows.test_rows(recipe)
    _, splits, _ = load_splits(recipe)
    assert rows.ids == list(splits.test["id"]) and len(set(rows.ids)) == len(rows) == 11
    assert rows.references == list(splits.test["answer"])
    learnt = {fold_for_matching(question) for question in splits.train["question"]}
    assert not learnt & {fold_for_matching(question) for question in rows.questions}
    assert set(training_answers(recipe)) == set(splits.train["answer"])
    assert [rows.severity(n) for n in range(11)] == [name.split("-")[-2] for name in rows.ids]


def test_equal_questions_are_one_group(tmp_path: Path) -> None:
    path = table(tmp_path / "data.jsonl", copies=3)
    rows = of_rows.test_rows(
        recipe_from_values({"data": {"path": str(path), "test_size": 0.3, "validation_size": 0.2}})
    )
    assert len(rows) > 3
    by_question = {(group, fold_for_matching(q)) for group, q in zip(rows.groups.tolist(), rows.questions, strict=True)}
    assert len(by_question) == len(set(rows.groups.tolist())) < len(rows)


def test_the_groups_of_a_prepared_folder_are_its_near_duplicates(tmp_path: Path) -> None:
    sample = load_consultations("builtin:consultations", max_rows=40).rows
    lines = [
        {"question": f"{greeting}{row['question']}", "answer": row["answer"], "severity": row["severity"]}
        for row in sample
        for greeting in ("", "يا دكتور ")
    ]
    source = tmp_path / "data.jsonl"
    source.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    settings = PrepareSettings.model_validate({"data": {"path": str(source)}})
    prepare(settings, tmp_path / "prepared")
    data = {"path": str(tmp_path / "prepared")}
    rows = of_rows.test_rows(recipe_from_values({"data": data}))
    assert len(rows) > 2 and len({fold_for_matching(question) for question in rows.questions}) == len(rows)
    pairs = {question.removeprefix("يا دكتور ") for question in rows.questions}
    assert len(np.unique(rows.groups)) == len(pairs) < len(rows)


def test_a_sample_is_seeded_and_part_of_a_larger_one(finished_run: Run) -> None:
    rows = of_rows.test_rows(load_recipe(finished_run.folder / "recipe.yaml"))
    small, large = rows.limited(4), rows.limited(7)
    assert small.ids == rows.limited(4).ids and len(small) == 4
    assert set(small.ids) < set(large.ids) < set(rows.ids)
    assert rows.limited(None) is rows is rows.limited(99)
    at = rows.ids.index(small.ids[1])
    assert (small.questions[1], small.groups[1], small.strata[1]) == (
        rows.questions[at],
        rows.groups[at],
        rows.strata[at],
    )


def test_the_content_hash_knows_no_order(finished_run: Run) -> None:
    rows = of_rows.test_rows(load_recipe(finished_run.folder / "recipe.yaml"))
    assert rows.take(range(10, -1, -1)).content_hash() == rows.content_hash() != rows.limited(10).content_hash()


def test_without_severity_the_stratum_is_unknown(tmp_path: Path) -> None:
    path = table(tmp_path / "data.jsonl")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("severity", "nothing"), encoding="utf-8")
    rows = of_rows.test_rows(recipe_from_values({"data": {"path": str(path)}, "severity": {"control": "uniform"}}))
    assert (rows.strata == -1).all() and rows.severity(0) is None


def test_a_run_without_test_rows_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART, ["data.test_size=0", f"data.path={table(tmp_path / 'data.jsonl')}"])
    with pytest.raises(RunError, match=r"kept no rows for the test \(data.test_size=0\)"):
        of_rows.test_rows(recipe)
    assert len(of_rows.test_rows(recipe, "validation")) == 2


def test_data_that_changed_since_the_training_is_refused(tmp_path: Path, run: Run) -> None:
    path = table(tmp_path / "data.jsonl")
    rows = of_rows.test_rows(recipe_from_values({"data": {"path": str(path)}}))
    with pytest.raises(RunError, match=r"is not the data that .* was trained on"):
        check_same_data(rows, run)
