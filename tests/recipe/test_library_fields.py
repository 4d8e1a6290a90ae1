"""The settings that are read from the source are those of the imported classes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_args

import pytest
from peft import LoraConfig
from trl import SFTConfig

from sevpeft.errors import SevpeftError
from sevpeft.recipe.library_fields import _fields_of, lora_fields, sft_fields


@pytest.mark.parametrize(("read", "imported"), [(sft_fields, SFTConfig), (lora_fields, LoraConfig)])
def test_names_and_order_are_those_of_the_imported_class(read, imported):
    assert list(read()) == [field.name for field in dataclasses.fields(imported) if field.init]


@pytest.mark.parametrize(("read", "imported"), [(sft_fields, SFTConfig), (lora_fields, LoraConfig)])
def test_defaults_that_are_written_as_literals_are_the_librarys(read, imported):
    for field in dataclasses.fields(imported):
        if field.init and read()[field.name].default is not None and field.default is not dataclasses.MISSING:
            assert read()[field.name].default == field.default, field.name


def test_reading_the_fields_imports_none_of_the_libraries():
    code = (
        "import sys; from sevpeft.recipe.library_fields import sft_fields, lora_fields; sft_fields(); lora_fields(); "
        "print([name for name in ('torch', 'transformers', 'trl', 'peft') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_enumerations_choices_and_literals_become_the_values_they_allow():
    assert get_args(sft_fields()["eval_strategy"].annotation) == ("no", "steps", "epoch")
    assert "adamw_torch" in get_args(sft_fields()["optim"].annotation)
    assert get_args(sft_fields()["loss_type"].annotation) == ("nll", "dft", "chunked_nll")
    assert get_args(lora_fields()["bias"].annotation) == ("none", "all", "lora_only")


def test_a_list_that_holds_a_pattern_stays_open():
    field = lora_fields()["init_lora_weights"]
    assert set(get_args(field.annotation)) == {bool, str}
    assert "olora" in field.choices


def test_help_is_one_line_with_single_percent_signs():
    help_ = sft_fields()["gradient_checkpointing"].help
    assert "~20% slower" in help_ and "\n" not in help_


def test_a_class_that_a_new_version_moved_is_named():
    with pytest.raises(SevpeftError, match=r"trl has no SFTConfig in trainer/elsewhere\.py"):
        _fields_of((("trl", "trainer/elsewhere.py", "SFTConfig"),))


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(SevpeftError, match="no_such_library is not installed"):
        _fields_of((("no_such_library", "a.py", "A"),))
