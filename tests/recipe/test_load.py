"""A recipe holds what is meant, reports everything wrong at once, and what is written reads back equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import yaml

from sevpeft.errors import RecipeError
from sevpeft.recipe import (
    SEVERITY_PRESETS,
    DataSection,
    Recipe,
    Section,
    load_recipe,
    recipe_schema,
    settings_from,
)
from sevpeft.recipe.load import read_yaml, write_yaml

Reader = Callable[..., Recipe]


@pytest.fixture
def recipe(tmp_path: Path) -> Reader:
    """Reads a recipe from text, with overrides."""

    def read(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "my-recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return read


def lines_of(read: Reader, text: str, *overrides: str) -> list[str]:
    """Lines of the error, without the folder."""
    with pytest.raises(RecipeError) as error:
        read(text, *overrides)
    return [line.rpartition("/")[2] if line.startswith("/") else line for line in str(error.value).splitlines()]


# What a recipe says


def test_everything_unsaid_has_the_published_default(recipe: Reader) -> None:
    read = recipe("about: {title: nothing else}")
    assert read.name == "my-recipe"
    assert read.lora.settings() == {
        "r": 16,
        "target_modules": "all-linear",
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "bias": "none",
    }
    training = read.training.settings()
    assert (training["learning_rate"], training["num_train_epochs"], training["max_length"]) == (2e-4, 3, 512)
    assert "bf16" not in training and read.training.bf16 is None and training["global_batch_size"] is None
    assert read.severity.coefficients() == (0.5, 1.0, 1.5)
    assert (read.model.name_or_path, read.data.path) == ("builtin:tiny", "builtin:consultations")
    for preset, delta in (("mild", 0.25), ("balanced", 0.5), ("strong", 0.75)):
        assert SEVERITY_PRESETS[preset] == (1 - delta, 1.0, 1 + delta)


def test_only_what_is_set_or_ours_goes_to_the_library(recipe: Reader) -> None:
    read = recipe("training: {weight_decay: 0.1, save_total_limit: null}\nlora: {loraplus_lr_ratio: 16}")
    settings = read.training.settings()
    assert settings["weight_decay"] == 0.1
    assert settings["save_total_limit"] is None
    assert "adam_beta1" not in settings
    assert read.lora.loraplus_lr_ratio == 16 and "loraplus_lr_ratio" not in read.lora.settings()


def test_plain_words_are_those_of_yaml_1_2(recipe: Reader) -> None:
    for written in ("1e-4", "1E-4", "0.0001", "1.0e-4"):
        assert recipe(f"training: {{learning_rate: {written}}}").training.learning_rate == 1e-4, written
    read = recipe("training: {eval_strategy: no, report_to: none}\ndata: {id_column: 007, name: 12:30, split: on}")
    assert read.training.eval_strategy == "no"
    assert (read.data.id_column, read.data.name, read.data.split) == ("007", "12:30", "on")
    assert recipe("data: {name: ٣, split: 2024-01-01}").data.model_dump()["name"] == "٣"


def test_a_section_whose_keys_are_commented_out_keeps_its_defaults(recipe: Reader) -> None:
    assert recipe("training:\n  # seed: 3\nlora:\n  r: 4\n").training.seed == 42


def test_sizes_are_numbers(recipe: Reader) -> None:
    for size, value in (("0.2", 0.2), ("500", 500)):
        read = recipe(f"about: {{parameters: 0.49B}}\ndata: {{validation_size: {size}, test_size: 0}}")
        assert (read.data.validation_size, read.data.test_size) == (value, 0)
        assert read.about.parameter_count() == 490_000_000


# Overrides


def test_overrides_replace_and_add_values(recipe: Reader) -> None:
    read = recipe(
        "training: {learning_rate: 1.0e-3}",
        "training.learning_rate=1e-4",
        "lora.target_modules=[q_proj, v_proj]",
        "training.lr_scheduler_kwargs.num_cycles=2",
        "severity.weights={non_critical: .25, neutral: 1, critical: 1.75}",
        "data.name=null",
    )
    assert read.training.learning_rate == 1e-4
    assert read.lora.target_modules == ["q_proj", "v_proj"]
    assert read.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert read.severity.coefficients() == (0.25, 1.0, 1.75)
    assert read.data.name is None


def test_text_is_taken_as_it_was_typed(recipe: Reader) -> None:
    for path in ("my file.csv", "a: b.csv", "file #1.csv", "- x.csv", "2024", "ملف: 1.csv", "[1] x.csv", "*.csv"):
        assert recipe("lora: {r: 4}", f"data.path={path}").data.path == path
    for revision in ("1234567", "12e4567"):
        assert recipe("lora: {r: 4}", f"model.revision={revision}").model.revision == revision
    values = {"1": 1, ".5": 0.5, "true": True, "null": None, "": None, '"a: b"': "a: b", "[1, a]": [1, "a"]}
    values |= {"{a: 1}": {"a": 1}, **{text: text for text in ("a: b", "a #b", "!x", "*x", "no", "{a")}}
    for text, value in values.items():
        read = recipe("lora: {r: 4}", f"training.lr_scheduler_kwargs.x={text}")
        assert read.training.lr_scheduler_kwargs == {"x": value}


def test_one_weight_can_be_overridden_of_a_preset_and_of_a_mapping(recipe: Reader) -> None:
    for text, expected in (
        ("lora: {r: 4}", (0.5, 1.0, 2.0)),
        ("severity: {weights: strong}", (0.25, 1.0, 2.0)),
        ("severity: {weights: {non_critical: 3, neutral: 3, critical: 3}}", (3.0, 3.0, 2.0)),
    ):
        assert recipe(text, "severity.weights.critical=2").severity.coefficients() == expected


def test_facts_about_the_files_base_model_do_not_stay_with_another(recipe: Reader) -> None:
    text = "about: {parameters: 7B}\nmodel: {name_or_path: a/b}"
    assert recipe(text, "model.name_or_path=c/d").about.parameters is None
    assert recipe(text, "model.name_or_path=c/d", "about.parameters=1B").about.parameters == "1B"
    assert recipe(text, "model.revision=v2").about.parameters == "7B"


def test_a_mistake_in_an_override_is_reported_as_one_of_the_command_line(recipe: Reader) -> None:
    wrong = []
    for override, key, remedy in (
        ("training.learning_rate", "training.learning_rate", "training.learning_rate=1e-4"),
        ("=3", "=3", "training.learning_rate=1e-4"),
        ("training={seed: 1}", "training", "training.learning_rate=1e-4"),
        ("learning_rate=1", "learning_rate", "training.learning_rate"),
        ("training.lerning_rate=1", "training.lerning_rate", "training.learning_rate"),
        ("lora.r.x=3", "lora.r", "integer"),
        ("training.seed.x=3", "training.seed.x", "training.seed"),
    ):
        (line,) = lines_of(recipe, "training: {seed: 1}", override)
        if not line.startswith(f"command line: {key}: ") or remedy not in line.removeprefix(f"command line: {key}"):
            wrong.append((override, line))
    assert wrong == []


# Reading back


def test_what_is_written_reads_back_equal_and_writes_the_same(recipe: Reader, tmp_path: Path) -> None:
    first = recipe(
        "prompt: {answer_cue: الجواب, dialect_prefixes: {MSA: '[MSA] '}, dialect: MSA}\n"
        "about: {config: {model_type: gemma3, sliding_window: null, text_config: {layer_types: [a]}}}\n"
        "training: {learning_rate: 1e-5, num_train_epochs: 3, warmup_steps: 0.03, "
        "eval_strategy: no, lr_scheduler_kwargs: {a: 1e-5}}\n"
        "lora: {init_lora_weights: gaussian, rank_pattern: {'^model.layers.0': 4}}\n"
        "severity: {weights: {non_critical: 0, neutral: 1, critical: 2}}\n"
    )
    (tmp_path / "again.yaml").write_text(first.to_yaml(), encoding="utf-8")
    second = load_recipe(tmp_path / "again.yaml")
    assert second == first and second.to_yaml() == first.to_yaml()
    assert second.training.settings() == first.training.settings()
    assert "الجواب" in first.to_yaml() and "my-recipe" not in first.to_yaml()
    assert first != recipe("lora: {r: 8}")


def test_every_value_survives_being_written() -> None:
    texts = [
        *("no", "1e-4", "007", "12:30", "2024-01-01", "<<", "=", "~", "", " lead", "a: b", "a #b", "a\nb", "a\n\n b\n"),
        *("'q'", '"q"', "\u200fالسؤال: {question}\n", "a\tb", "x\u2028y", "x\x85y", "😀", "1_000", ".inf", "null"),
        *("\\n", "- a", "{a}", "&a", "*a", "!a", "٣.٥"),
    ]
    for text in texts:
        written = write_yaml({"a": text})
        assert read_yaml(written, "f") == yaml.safe_load(written) == {"a": text}
    for value in (1e-05, 1e22, 0.1, 3, -2, 1.0, float("inf"), True, None, [1, 2.5], {"b": {"c": []}}):
        assert repr(read_yaml(write_yaml({"a": value}), "f")) == repr({"a": value})


# Mistakes


def test_each_of_five_mistakes_gets_its_line(recipe: Reader) -> None:
    lines = lines_of(
        recipe,
        "lora_alpha: 32\n"
        "lora: {r: sixteen, init_lora_weights: pissa}\n"
        "severity: {weights: balancd}\n"
        "training: {lerning_rate: 1}\n",
    )
    keys = ["lora_alpha", "lora.init_lora_weights", "lora.r", "severity.weights", "training.lerning_rate"]
    assert sorted(line.split(": ")[1] for line in lines) == sorted(keys)
    assert {line.split(": ")[0] for line in lines} == {"my-recipe.yaml"}


def test_a_file_that_is_no_recipe_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    wrong = []
    for content, place in (
        (b"", "training:"),
        (b"# a comment\n", "training:"),
        (b"- a\n", "training:"),
        (b"hello\n", "training:"),
        (b"training:\n\tseed: 1\n", "line 2, column 1: "),
        (b"prompt:\n  template: Q: {question}\n", "line 2, column 14: "),
        (b'a:\n  b: "abc\n', "line 3, column 1: "),
        (b"a: {b: 1\nc: {d: 3}\n", "line 2, column 2: "),
        (b"a: 1\n---\nb: 2\n", "line 2, column 1: "),
        (b"a: !!python/object x\n", "line 1, column 4: "),
        (b"training: {seed: 1, seed: 2}", "line 1, column 21: "),
        (b"a: &a {b: *a}\n", "alias"),
        (b"a: &a {x: 1}\nb: *a\n", "line 2, column 4: "),
        (b"a: 1\nb: \xff", "UTF-8"),
        (b"a: 1\nb: \x01", "#x0001"),
        (b"a: " + b"[" * 3000, "nested"),
        (b"a: " + b"{" * 60 + b"}" * 60, "nested"),
        (b"a: 1\n" + b"#" * 210_000, "bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(RecipeError) as error:
            load_recipe(path)
        message = str(error.value)
        if not message.startswith(f"{path}: ") or place not in message or "\n" in message:
            wrong.append((content[:40], message))
    assert wrong == []
    path.write_bytes("lora: {r: 4}".encode("utf-8-sig"))
    assert load_recipe(path).lora.r == 4


def test_an_absent_recipe_is_answered_with_close_names(tmp_path: Path) -> None:
    (tmp_path / "qwen2.5-0.5b.yaml").touch()
    (tmp_path / "bloomz-560m.yaml").touch()
    for name in ("qwen2.5-05b", "qwen2.5-05b.yaml", "qwen2.5-0.5b.yml"):
        with pytest.raises(RecipeError, match=r"qwen2\.5-0\.5b\.yaml\.$"):
            load_recipe(tmp_path / name)
    for path in (tmp_path / "zzz", tmp_path):
        with pytest.raises(RecipeError, match=r"bloomz-560m\.yaml, qwen2\.5-0\.5b\.yaml\.$"):
            load_recipe(path)
    with pytest.raises(RecipeError, match="sevpeft recipes"):
        load_recipe(tmp_path / "no" / "x.yaml")


# Schema, start, and settings without a recipe


def test_the_schema_describes_every_setting_and_survives_json() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(Recipe.model_fields)
    training = schema["$defs"]["TrainingSection"]["properties"]
    assert training["learning_rate"]["default"] == 2e-4 and training["logging_first_step"]["default"] is False
    assert training["eval_strategy"]["enum"] == ["no", "steps", "epoch"]
    for name, section in schema["$defs"].items():
        assert section["additionalProperties"] is False
        for key, setting in section["properties"].items():
            plain = name in ("SeverityWeights", "SeverityNames", "PromptExample")
            assert setting.get("description") or plain, f"{name}.{key}"


def test_reading_a_recipe_loads_no_heavy_library() -> None:
    code = (
        "import sys, sevpeft.recipe; "
        "print([n for n in ('torch', 'transformers', 'trl', 'peft', 'numpy', 'datasets') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_verb_without_a_recipe_takes_settings_of_its_own() -> None:
    class Cleaning(Section):
        emoji: Literal["keep", "remove"] = "keep"

    class Settings(Section):
        data: DataSection = DataSection()
        cleaning: Cleaning = Cleaning()
        split_by: str | None = None

    words = ["cleaning.emoji=remove", "split_by=2024", "data.max_rows=3"]
    found = settings_from(Settings, words, {"data.path": "x.csv"})
    assert (found.data.path, found.data.max_rows) == ("x.csv", 3)
    assert (found.cleaning.emoji, found.split_by) == ("remove", "2024")
    wrong = {
        "cleaning.emojy=keep": "cleaning.emoji",
        "splitby=year": "split_by",
        "data=3": "data.max_rows=100",
        "data.max_rows=x": "data.max_rows",
        "year": "data.max_rows=100",
        "data.path=y": "given already",
    }
    failed = []
    for word, remedy in wrong.items():
        with pytest.raises(RecipeError) as error:
            settings_from(Settings, [word], {"data.path": "x.csv"})
        if remedy not in str(error.value):
            failed.append((word, str(error.value)))
    assert failed == []


def test_a_recipe_that_may_never_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long.yaml").write_text("#" * 210_000)
    failed = []
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path / "long.yaml"):
        try:
            load_recipe(path)
            failed.append(str(path))
        except RecipeError as error:
            failed += [] if "name a recipe" in str(error) else [str(error)]
    assert failed == []
