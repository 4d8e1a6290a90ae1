"""A prepared folder is trained on as it was divided, near-duplicates together, and the run says where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sevpeft.data.prepare import PrepareSettings
from sevpeft.data.prepare.prepare import prepare
from sevpeft.errors import DataError
from sevpeft.recipe import recipe_from_values
from sevpeft.training.data import load_splits, summary_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty questions in no more than thirty groups of near-duplicates, without a test part."""
    words = ["قلب", "معدة", "ركبة", "عين", "أذن", "كتف", "ظهر", "رقبة", "جلد", "كبد"]
    rows = []
    for number in range(30):
        said = f"{words[number % 10]} " * 4 + f"{words[number // 3 % 10]} {number} " * 5
        for ending in ("اليوم", "امس"):
            question = f"{said} منذ أسبوعين مع ألم وتعب وقلة نوم وفقدان شهية وأريد معرفة السبب {ending}"
            rows.append({"question": question, "answer": f"راجع الطبيب غدا {number} {ending}", "severity": "neutral"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    settings = {"data": {"path": str(file), "test_size": 0}, "near_duplicates": 0.8, "num_proc": 1}
    prepare(PrepareSettings.model_validate(settings), tmp_path / "prepared")
    return tmp_path / "prepared"


def test_what_is_carved_from_a_prepared_folder_keeps_near_duplicates_together(folder: Path) -> None:
    sides = {}
    for seed in (0, 1):
        recipe = recipe_from_values({"data": {"path": str(folder), "test_size": 0.2, "seed": seed}})
        table, splits, severity = load_splits(recipe)
        parts = [set(part["group"]) for part in (splits.train, splits.validation, splits.test)]
        assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert 6 <= len(splits.test) <= 12 and sum(map(len, parts)) < len(table.rows) == 60
        sides[seed] = parts[2]
        about = summary_of(table, splits, severity, {})
        assert about["fingerprint"].startswith("sha256:")
        assert about["prepared"]["fingerprint"] == about["fingerprint"]
    assert sides[0] != sides[1]


def test_a_file_has_no_history() -> None:
    table, splits, severity = load_splits(recipe_from_values({}))
    assert summary_of(table, splits, severity, {})["prepared"] is None


def test_a_column_that_was_named_for_the_split_and_is_none_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.split_column"):
        load_splits(recipe_from_values({"data": {"split_column": "specialty"}}))
