"""The sections `training` and `lora` take what the installed TRL and PEFT take."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from sevpeft.errors import RecipeError
from sevpeft.recipe import library, recipe_from_values, recipe_schema
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


# Numbers and trackers, in a recipe and in an editor

UNMEANT: list[tuple[str, str, Any, str]] = [
    ("training", "max_steps", 2**63, "1000000000"),
    ("training", "dataloader_num_workers", 5000, "512"),
    ("training", "seed", -1, "0"),
    ("training", "seed", 2**32, "4294967296"),
    ("training", "data_seed", 2**64, "4294967296"),
    ("training", "num_train_epochs", 1e300, "1000000"),
    ("training", "learning_rate", -1, "0"),
    ("training", "gradient_accumulation_steps", 10**9, "1048576"),
    ("training", "save_steps", 1e30, "1000000000"),
    ("training", "report_to", "wandbb", "write wandb"),
    ("training", "report_to", ["tensorbord"], "write tensorboard"),
    ("training", "gradient_checkpointing_kwargs", "abc", "mapping"),
    ("training", "push_to_hub", True, "hf upload"),
    ("training", "output_dir", "x", "--output"),
    ("lora", "r", 10**9, "32768"),
    ("lora", "lora_dropout", 1, "1"),
    ("lora", "arrow_config", {"a": 1}, "leave it out"),
    ("data", "seed", 2**40, "4294967296"),
    ("generation", "max_new_tokens", 10**12, "1048576"),
    ("evaluation", "n_resamples", 10**9, "1000000"),
    ("prompt", "template", "no question", "{question}"),
]


def test_what_no_machine_can_mean_is_refused_by_the_program_and_by_an_editor() -> None:
    schema = pytest.importorskip("jsonschema").Draft202012Validator(recipe_schema())
    schema.check_schema(schema.schema)
    wrong = []
    for section, key, value, remedy in UNMEANT:
        values = {section: {key: value}}
        with pytest.raises(RecipeError) as refused:
            recipe_from_values(values)
        if f"{section}.{key}" not in str(refused.value) or remedy not in str(refused.value) or schema.is_valid(values):
            wrong.append((section, key, str(refused.value)))
    assert wrong == []
    assert not re.search(r'"(ge|gt|le|lt)":', json.dumps(schema.schema))
