"""The batch split follows from the memory plan and the device's memory, never from timings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sevpeft.errors import RecipeError
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.runs import Run
from sevpeft.training import resolve
from sevpeft.training.checkpoints import as_started
from sevpeft.training.resolve import (
    choose_layout,
    device_memory,
    is_automatic,
    resolve_split,
    split_here,
)
from tests.models import build_model


class Plan:
    """Bytes that grow with the rows, more of them without checkpointing; as `MemoryPlan` answers."""

    def total_of_batch(self, rows: int, checkpointing: bool) -> int:
        return 100 + rows * (10 if checkpointing else 40)

    def total_of_validation(self, rows: int, checkpointing: bool) -> int:
        return 100 + rows * 5


PLAN: Any = Plan()


def split(training: dict[str, Any], available: int = 10**9, plan: Any = PLAN, **kwargs: Any) -> dict[str, Any]:
    return resolve_split(recipe_from_values({"training": training}), plan, available, **kwargs).training.settings()


def chosen(found: dict[str, Any]) -> tuple[int, int, bool]:
    return found["per_device_train_batch_size"], found["gradient_accumulation_steps"], found["gradient_checkpointing"]


def test_the_fastest_split_that_fits_is_taken_and_the_batch_never_changes() -> None:
    expected = {
        10**9: (8, 1, False),
        420: (8, 1, False),
        300: (8, 1, True),
        200: (8, 1, True),
        179: (4, 2, True),
        141: (4, 2, True),
        139: (2, 4, True),
        115: (1, 8, True),
        1: (1, 8, True),  # nothing fits: the smallest batch; the training reports the rest
    }
    assert {available: chosen(split({}, available)) for available in expected} == expected


def test_a_cpu_would_rather_make_several_passes_than_compute_twice() -> None:
    assert chosen(split({}, 300, on_gpu=False)) == (4, 2, False)


def test_what_the_recipe_says_stays() -> None:
    rows = [
        ({"per_device_train_batch_size": 2}, (2, 4, False)),
        ({"gradient_accumulation_steps": 4}, (2, 4, False)),
        ({"gradient_checkpointing": True}, (8, 1, True)),
        ({"gradient_checkpointing": False, "per_device_train_batch_size": 1}, (1, 8, False)),
        ({"global_batch_size": 12}, (12, 1, False)),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, (3, 5, False)),
    ]
    assert [(given, chosen(split(given))) for given, _ in rows] == rows


def test_processes_share_the_batch() -> None:
    found = split({}, processes=4)
    assert chosen(found) == (2, 1, False)
    assert found["global_batch_size"] == 8
    assert "auto_find_batch_size" not in found  # works on one process only
    assert split({})["auto_find_batch_size"] is True


def test_numbers_that_do_not_make_the_batch_are_refused_with_one_that_does() -> None:
    rows: list[tuple[dict[str, Any], int, str]] = [
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "global_batch_size": 8}, 1, "=16"),
        ({"per_device_train_batch_size": 3}, 1, "multiple"),
        ({"per_device_train_batch_size": 16}, 1, "multiple"),
        ({"gradient_accumulation_steps": 5}, 1, "multiple"),
        ({"global_batch_size": 8}, 3, "multiple"),
    ]
    wrong = []
    for training, processes, remedy in rows:
        with pytest.raises(RecipeError) as caught:
            split(training, processes=processes)
        if "training.global_batch_size" not in str(caught.value) or remedy not in str(caught.value):
            wrong.append((training, str(caught.value)))
    assert wrong == []


def test_without_numbers_of_the_model_the_smallest_split_is_taken() -> None:
    assert chosen(split({}, plan=None)) == (1, 8, True)


def test_validation_takes_as_many_rows_as_fit_in_one_forward_pass() -> None:
    sizes = {available: split({}, available)["per_device_eval_batch_size"] for available in (10**9, 200, 140, 104)}
    assert sizes == {10**9: 32, 200: 16, 140: 8, 104: 1}


def test_rows_that_must_be_padded_go_in_smaller_batches_on_a_cpu() -> None:
    """Eight random rows padded to the longest of them hold more padding than text."""
    assert chosen(split({"padding_free": False}, on_gpu=False))[0] < chosen(split({}, on_gpu=False))[0] == 8


def test_the_memory_of_this_machine_is_its_whole_memory_not_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from_values({"training": {"use_cpu": True}})
    first = device_memory(recipe)
    whole = psutil.virtual_memory().total
    held = bytearray(50_000_000)
    assert device_memory(recipe) == first <= whole
    del held


def test_a_resume_takes_what_the_run_chose(tmp_path: Any) -> None:
    def run_with(recipe: Recipe) -> Run:
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        return Run(tmp_path)

    given = recipe_from_values({})
    started = resolve_split(given, PLAN, 300)
    assert is_automatic(given) and not is_automatic(started)
    run = run_with(started)
    assert as_started(given, run) == started
    assert as_started(started, run) == started
    other = recipe_from_values({"training": {"learning_rate": 1e-5}})
    assert as_started(other, run) != started


@pytest.mark.parametrize(("architecture", "layout", "rows"), [("llama", True, 8), ("bloom", False, 1)])
def test_rows_are_put_into_one_where_the_model_keeps_them_apart(
    model_folder: Callable[..., Path], architecture: str, layout: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "memory_plan", lambda recipe, on_gpu: (PLAN, "a test"))
    model = {"name_or_path": str(model_folder(architecture))}
    given = recipe_from_values({"model": model, "training": {"use_cpu": True, "gradient_checkpointing": False}})
    resolved = choose_layout(given, split_here(given), build_model(architecture), 100)
    found = resolved.training.settings()
    assert found["padding_free"] is layout
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 8
    assert found["per_device_train_batch_size"] >= rows
    if layout:  # the mask of one long row has a number for each pair of its tokens
        longer = choose_layout(given, split_here(given), build_model(architecture), 5000)
        assert longer.training.settings()["per_device_eval_batch_size"] == 1
