"""The sections `training` and `lora` take what the installed TRL and PEFT take."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sevpeft.errors import RecipeError
from sevpeft.recipe import library, recipe_from_values
from tests.recipe.library_fields import installed_fields

FIELDS = json.loads(library.FIELDS.read_text(encoding="utf-8"))


def test_the_fields_are_those_of_the_installed_libraries() -> None:
    installed = installed_fields()
    differing = [
        f"{section}.{name}"
        for section in ("training", "lora")
        for name in {**FIELDS[section], **installed[section]}
        if FIELDS[section].get(name) != installed[section].get(name)
    ]
    assert differing == [], "write them again: python -m tests.recipe.library_fields"
    assert {section: list(fields) for section, fields in FIELDS.items()} == {
        section: list(fields) for section, fields in installed.items()
    }


def test_types_that_the_libraries_declare_decide_what_a_recipe_may_hold() -> None:
    wrong = []
    rows: list[tuple[str, str, Any, bool]] = [
        ("training", "learning_rate", 1, True),  # a whole number where the library says float
        ("training", "learning_rate", "fast", False),
        ("training", "num_train_epochs", True, False),
        ("training", "eval_strategy", "steps", True),  # an enumeration
        ("training", "eval_strategy", "stepz", False),
        ("training", "optim", "adamw_8bit", True),
        ("training", "report_to", ["tensorboard"], True),
        ("training", "report_to", 3, False),
        ("training", "data_seed", None, True),
        ("training", "save_total_limit", 1.5, False),
        ("training", "per_device_train_batch_size", "auto", True),
        ("training", "per_device_train_batch_size", 0, False),
        ("training", "train_sampling_strategy", "group_by_length", True),
        ("lora", "bias", "lora_only", True),  # a Literal
        ("lora", "bias", "some", False),
        ("lora", "init_lora_weights", False, True),
        ("lora", "init_lora_weights", 1, False),
        ("lora", "target_modules", ["q_proj"], True),
        ("lora", "target_modules", [1], False),
        ("lora", "layer_replication", [[0, 2], [1, 3]], True),  # pairs
        ("lora", "rank_pattern", {"q_proj": 2}, True),
    ]
    for section, key, value, allowed in rows:
        try:
            recipe_from_values({section: {key: value}})
            found = True
        except RecipeError as error:
            found = False
            assert f"{section}.{key}" in str(error) and ": must " in str(error)
        if found != allowed:
            wrong.append((section, key, value))
    assert wrong == []


def test_a_count_stays_a_count_where_the_library_says_float() -> None:
    assert type(recipe_from_values({"training": {"logging_steps": 5}}).training.logging_steps) is int


def test_a_recipe_that_was_read_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe_from_values({}).lora.r = 8
