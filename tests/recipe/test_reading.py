"""A recipe says what is meant, everything wrong with it is said at once, and what is written reads back equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import ValidationError

from sevpeft.errors import RecipeError
from sevpeft.recipe import SEVERITY_PRESETS, Recipe, load_recipe, recipe_from_values, recipe_schema
from sevpeft.recipe.library_fields import lora_fields, sft_fields
from sevpeft.recipe.reading import settings_from
from sevpeft.recipe.rules import GONE, LORA_MANAGED, RENAMED, TRAINING_MANAGED
from sevpeft.recipe.sections import DataSection, Section
from sevpeft.recipe.yaml_text import read_value, read_yaml, write_yaml


@pytest.fixture
def recipe(tmp_path):
    """Reads a recipe from text, with overrides."""

    def read(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "my-recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return read


@pytest.fixture
def mistakes(recipe, tmp_path):
    """The lines of the error, with the folder taken off."""

    def lines(text: str, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            recipe(text, *overrides)
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return lines


# What a recipe says


def test_everything_unsaid_has_the_published_default(recipe):
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
    assert "bf16" not in training and read.training.bf16 is None and read.training.fp16 is None
    assert read.severity.coefficients() == (0.5, 1.0, 1.5)
    assert (read.model.name_or_path, read.data.path) == ("builtin:tiny", "builtin:consultations")


def test_only_what_is_set_or_ours_goes_to_the_library(recipe):
    settings = recipe("training: {weight_decay: 0.1, save_total_limit: null}").training.settings()
    assert settings["weight_decay"] == 0.1
    assert settings["save_total_limit"] is None
    assert "adam_beta1" not in settings


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_a_float_may_be_written_in_every_usual_way(recipe, written):
    assert recipe(f"training: {{learning_rate: {written}}}").training.learning_rate == 1e-4


def test_a_count_stays_a_count_where_the_library_says_float(recipe):
    assert type(recipe("training: {logging_steps: 5}").training.logging_steps) is int


def test_words_are_not_bent_as_in_yaml_1_1(recipe):
    read = recipe("training: {eval_strategy: no, report_to: none}\ndata: {id_column: 007, name: 12:30, split: on}")
    assert read.training.eval_strategy == "no"
    assert (read.data.id_column, read.data.name, read.data.split) == ("007", "12:30", "on")


def test_a_section_whose_keys_are_commented_out_keeps_its_defaults(recipe):
    assert recipe("training:\n  # seed: 3\nlora:\n  r: 4\n").training.seed == 42


@pytest.mark.parametrize("size", ["0.2", "500"])
def test_split_sizes_are_shares_or_numbers_of_rows(recipe, size):
    read = recipe(f"data: {{validation_size: {size}, test_size: 0}}")
    assert read.data.validation_size == float(size) and read.data.test_size == 0


def test_a_recipe_that_was_read_does_not_change(recipe):
    with pytest.raises(ValidationError):
        recipe("lora: {r: 4}").lora.r = 8


def test_presets_are_one_family():
    for preset, delta in (("mild", 0.25), ("balanced", 0.5), ("strong", 0.75)):
        assert SEVERITY_PRESETS[preset] == (1 - delta, 1.0, 1 + delta)


def test_a_stated_size_is_a_number(recipe):
    assert recipe("about: {parameters: 0.49B}").about.parameter_count() == 490_000_000


def test_the_numbers_of_the_base_model_are_kept_as_they_stand(recipe):
    numbers = {"model_type": "gemma3", "sliding_window": None, "text_config": {"hidden_size": 8, "layer_types": ["a"]}}
    read = recipe(f"about: {{config: {json.dumps(numbers)}}}")
    assert read.about.config == numbers and yaml.safe_load(read.to_yaml())["about"]["config"] == numbers


# Overrides


def test_overrides_replace_and_add_values(recipe):
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


@pytest.mark.parametrize(
    "path", ["my file.csv", "a: b.csv", "file #1.csv", "- x.csv", "2024", "ملف: 1.csv", "[1] x.csv"]
)
def test_a_path_is_taken_as_it_was_typed(recipe, path):
    assert recipe("lora: {r: 4}", f"data.path={path}").data.path == path


def test_a_commit_id_of_digits_needs_no_quotes_in_an_override(recipe):
    assert recipe("lora: {r: 4}", "model.revision=1234567").model.revision == "1234567"
    assert recipe("lora: {r: 4}", "model.revision=12e4567").model.revision == "12e4567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora: {r: 4}", (0.5, 1.0, 2.0)),
        ("severity: {weights: strong}", (0.25, 1.0, 2.0)),
        ("severity: {weights: {non_critical: 3, neutral: 3, critical: 3}}", (3.0, 3.0, 2.0)),
    ],
)
def test_one_weight_can_be_overridden_of_a_preset_and_of_a_mapping(recipe, text, expected):
    assert recipe(text, "severity.weights.critical=2").severity.coefficients() == expected


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.learning_rate", "command line: training.learning_rate: has no =; write it as"),
        ("=3", "command line: =3: names no key before the =; write it as"),
        ("training={seed: 1}", "command line: training: is a whole section; override one of its settings"),
        ("learning_rate=1", "command line: learning_rate: is unknown here; write training.learning_rate."),
        ("training.lerning_rate=1", "command line: training.lerning_rate: is unknown; write training.learning_rate."),
        (
            "lora.r.x=3",
            "command line: lora.r: must be a whole number, not a mapping; leave it out for the default, 16.",
        ),
        ("training.seed.x=3", "command line: training.seed.x: training.seed holds one value and no keys; override it"),
    ],
)
def test_a_mistake_in_an_override_says_that_it_is_there(mistakes, override, said):
    (line,) = mistakes("training: {seed: 1}", override)
    assert line.startswith(said)


# Reading back


def test_what_is_written_reads_back_equal_and_writes_the_same(recipe, tmp_path):
    first = recipe(
        "prompt: {answer_cue: الجواب, dialect_prefixes: {MSA: '[MSA] '}, dialect: MSA}\n"
        "training: {learning_rate: 1e-5, num_train_epochs: 3, warmup_steps: 0.03, "
        "eval_strategy: no, lr_scheduler_kwargs: {a: 1e-5}}\n"
        "lora: {init_lora_weights: olora, rank_pattern: {'^model.layers.0': 4}}\n"
        "severity: {weights: {non_critical: 0, neutral: 1, critical: 2}}\n"
    )
    (tmp_path / "again.yaml").write_text(first.to_yaml(), encoding="utf-8")
    second = load_recipe(tmp_path / "again.yaml")
    assert second == first and second.to_yaml() == first.to_yaml()
    assert second.training.settings() == first.training.settings()
    assert "الجواب" in first.to_yaml() and "my-recipe" not in first.to_yaml()


def test_other_settings_make_another_recipe(recipe):
    assert recipe("lora: {r: 4}") != recipe("lora: {r: 8}")


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "1e-4",
        "007",
        "12:30",
        "2024-01-01",
        "<<",
        "=",
        "~",
        "",
        " lead",
        "a: b",
        "a #b",
        "a\nb",
        "a\n\n b\n",
        "'q'",
        '"q"',
        "\u200fالسؤال: {question}\n",
        "a\tb",
        "x\u2028y",
        "x\x85y",
        "😀",
        "1_000",
        ".inf",
        "null",
        "\\n",
        "- a",
        "{a}",
    ],
)
def test_every_text_survives_being_written(text):
    written = write_yaml({"a": text})
    assert read_yaml(written, "f") == ({"a": text}, [])
    assert yaml.safe_load(written) == {"a": text}


@pytest.mark.parametrize("number", [1e-05, 1e22, 0.1, 3, -2, 1.0, True, None, [1, 2.5], {"b": {"c": []}}])
def test_every_other_value_survives_being_written(number):
    assert repr(read_yaml(write_yaml({"a": number}), "f")[0]) == repr({"a": number})


def test_a_value_on_the_command_line_is_yaml_only_where_it_looks_like_it():
    assert [read_value(text) for text in ("1", ".5", "true", "null", "", '"a: b"', "[1, a]", "{a: 1}")] == [
        1, 0.5, True, None, None, "a: b", [1, "a"], {"a": 1},
    ]  # fmt: skip
    assert [read_value(text) for text in ("a: b", "a #b", "!x", "*x", "no", "{a")] == [
        "a: b",
        "a #b",
        "!x",
        "*x",
        "no",
        "{a",
    ]


# Mistakes


def test_five_mistakes_get_five_lines_in_the_order_of_the_file(mistakes):
    lines = mistakes(
        "lora_alpha: 32\n"
        "lora: {r: sixteen}\n"
        "severity: {weights: balancd}\n"
        "training: {lerning_rate: 1, max_seq_length: 512}\n"
    )
    assert [line.split(": ")[:2] for line in lines] == [
        ["my-recipe.yaml", key]
        for key in ("lora_alpha", "lora.r", "severity.weights", "training.lerning_rate", "training.max_seq_length")
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora_alpha: 32", "lora_alpha: is unknown here; write lora.lora_alpha."),
        ("model: {load_in_4bit: true}", "model.load_in_4bit: is unknown here; write quantization.load_in_4bit."),
        ("trainig: {seed: 1}", "trainig: is unknown; write training."),
        ("lora: {rnk: 3}", "lora.rnk: is unknown; write lora.r."),
        ("seed: 1", "seed: is unknown here; write data.seed or training.seed or generation.seed or evaluation.seed."),
        ("max_new_tokens: 9", "max_new_tokens: is unknown here; write generation.max_new_tokens."),
        ("generation: {temprature: 1.0}", "generation.temprature: is unknown; write generation.temperature."),
        ("revision: abc", "revision: is unknown here; write model.revision or data.revision."),
        ("training: {lora: {r: 3}}", "training.lora: is a section of its own; write lora: at the start of a line."),
        ("nope: 3", "nope: is unknown; a recipe takes about, model, quantization, lora, data,"),
        ("1: 3", "1: is unknown; a recipe takes"),
        (
            "severity: {weights: {non_critical: 1, neutral: 1, critcal: 1, critical: 1}}",
            "severity.weights.critcal: is unknown; write severity.weights.critical.",
        ),
        ("severity: {weights: {non_critical: 1, critical: 1}}", "severity.weights.neutral: is missing; add it."),
        ("training: {max_seq_length: 5}", "training.max_seq_length: is unknown; write training.max_length."),
        (
            "training: {evaluation_strategy: no}",
            "training.evaluation_strategy: is unknown; write training.eval_strategy.",
        ),
        ("training: {no_cuda: true}", "training.no_cuda: is unknown; write training.use_cpu."),
        (
            "training: {group_by_length: true}",
            "training.group_by_length: is not a setting of a recipe: transformers 5 dropped it; write "
            "train_sampling_strategy: group_by_length.",
        ),
        (
            "training: {warmup_ratio: 0.1}",
            "training.warmup_ratio: is not a setting of a recipe: transformers 5 dropped it; use "
            "training.warmup_steps, where 1 or more is a number of steps and 0 or more but less than 1 is a "
            "share of all steps",
        ),
        (
            "training: {overwrite_output_dir: true}",
            "training.overwrite_output_dir: a run is never overwritten; use --resume",
        ),
        (
            "output_dir: x",
            "output_dir: is not a setting of a recipe: the run folder is chosen on the command line; use --output RUN.",
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_right_one(mistakes, text, said):
    (line,) = mistakes(text)
    assert line.startswith(f"my-recipe.yaml: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora: {r: 16.5}", "lora.r: must be a whole number, not 16.5; leave it out for the default, 16."),
        ("lora: {r: true}", "lora.r: must be a whole number, not true;"),
        ("lora: {r: null}", "lora.r: must be a whole number, not null;"),
        ("lora: {target_modules: 5}", "lora.target_modules: must be text or a list, not 5;"),
        ("training: {packing: yes}", "training.packing: must be true or false, not 'yes'; write true."),
        (
            "training: {learning_rate: fast}",
            "training.learning_rate: must be a number, not 'fast'; leave it out for the default, 0.0002.",
        ),
        ("training: {learning_rate: .nan}", "training.learning_rate: must be a finite number, not nan;"),
        ("training: {num_train_epochs: -1}", "training.num_train_epochs: must be more than 0, not -1;"),
        ("training: {lr_scheduler_type: lineer}", "training.lr_scheduler_type: must be one of linear, cosine,"),
        ("training: {optim: adamw_8bits}", "training.optim: must be one of 41 names, such as adamw_8bit,"),
        ("model: {revision: 1234567}", 'model.revision: must be text, not 1234567; put it in quotes: "1234567".'),
        (
            "prompt: {template: {question}}",
            "prompt.template: must be text, not a mapping; put text that begins with { or [ in quotes.",
        ),
        (
            "prompt: {template: 'hello'}",
            "prompt.template: lacks {question}, so the model would never see the question; add {question}.",
        ),
        (
            "prompt: {template: '{question} {name}'}",
            "prompt.template: holds {name}, which nothing fills in; write {question} and {answer_cue} only.",
        ),
        (
            "severity: {weights: balancd}",
            "severity.weights: must be one of mild, balanced, strong or a mapping (key: value), not 'balancd'; "
            "write balanced.",
        ),
        (
            "severity: {weights: {non_critical: -1, neutral: 1, critical: 1}}",
            "severity.weights.non_critical: must be at least 0, not -1;",
        ),
        (
            "severity: {weights: {non_critical: .inf, neutral: 1, critical: 1}}",
            "severity.weights.non_critical: must be a finite number, not inf;",
        ),
        (
            "severity: {weights: {non_critical: 0, neutral: 0, critical: 0}}",
            "severity.weights: all three weights are 0, so nothing would be learnt; raise one.",
        ),
        (
            "data: {validation_size: 1.5}",
            "data.validation_size: 1.5 is neither a share nor a number of rows; write 0.1",
        ),
        ("data: {validation_size: 0}", "data.validation_size: 0 is neither a share nor a number of rows;"),
        (
            "data: {test_size: -3}",
            "data.test_size: -3 is neither a share nor a number of rows; write 0.1 for a tenth, 500 for 500 "
            "rows, or 0 for none.",
        ),
        (
            "data: {test_size: 0.9}",
            "data.test_size: validation_size + test_size is 0.1 + 0.9, which leaves nothing to train on;",
        ),
        ("data: {encoding: utf-99}", "data.encoding: no encoding is called 'utf-99'; try utf-8,"),
        ("data: {path: ''}", "data.path: is empty; leave it out for the default, builtin:consultations."),
        ("about: {parameters: big}", "about.parameters: must look like 0.49B or 135M, not 'big';"),
        (
            "about: {config: {hidden_size: 896}}",
            "about.config: lacks model_type, so no model can be made of the numbers; copy it from config.json.",
        ),
        ("about: {config: {model_type: 3}}", "about.config: lacks model_type,"),
        ("about: {config: qwen2}", "about.config: must be a mapping (key: value), not 'qwen2';"),
        ("training: 3", "training: must be a mapping (key: value), not 3; write its settings below it, indented."),
        ("training: {seed: 1, seed: 2}", "training.seed: stands twice, on lines 1 and 1; keep one of them."),
        (
            "quantization: {load_in_4bit: true, load_in_8bit: true}",
            "quantization.load_in_8bit: is true together with quantization.load_in_4bit,",
        ),
        (
            "training: {metric_for_best_model: rouge}",
            "training.metric_for_best_model: 'rouge' is no figure of the validation; write one of loss, loss_non_cr",
        ),
        (
            "training: {metric_for_best_model: loss_critical, greater_is_better: true}",
            "training.greater_is_better: the worst checkpoint by loss_critical would be kept; write false",
        ),
        (
            "training: {metric_for_best_model: eval_mean_token_accuracy, greater_is_better: false}",
            "training.greater_is_better: the worst checkpoint by eval_mean_token_accuracy would be kept; write true",
        ),
        ("training: {save_strategy: best}", "training.save_strategy: best saves by a figure of the validation, and"),
        (
            "training: {gradient_checkpointing_kwargs: {use_reentrent: false}}",
            "training.gradient_checkpointing_kwargs: use_reentrent is nothing that it takes; write one of selective,",
        ),
        (
            "training: {gradient_checkpointing_kwargs: {preserve_rng_state: false}}",
            "training.gradient_checkpointing_kwargs: without the random state, dropout is drawn anew",
        ),
        (
            "training: {gradient_checkpointing_kwargs: selective}",
            "training.gradient_checkpointing_kwargs: 'selective' is no mapping; write it as {use_reentrant: false}",
        ),
        (
            "training: {dataloader_prefetch_factor: 2}",
            "training.dataloader_prefetch_factor: it is about processes that read rows, and there are none;",
        ),
        (
            "training: {pad_to_multiple_of: 0}",
            "training.pad_to_multiple_of: must be a number from 1 up or auto, not 0;",
        ),
        ("training: {pad_to_multiple_of: eight}", "training.pad_to_multiple_of: must be a number from 1 up or auto,"),
        (
            "training: {max_steps: 0}",
            "training.max_steps: must be a number of steps from 1 up, or -1 for whole epochs,",
        ),
        (
            "training: {accelerator_config: {gradient_accumulation_kwargs: {num_steps: 4}}}",
            "training.accelerator_config: num_steps would replace gradient_accumulation_steps; write training.gradi",
        ),
        (
            "training: {lr_scheduler_type: reduce_lr_on_plateau, metric_for_best_model: mean_token_accuracy}",
            "training.lr_scheduler_kwargs: the rate would fall while mean_token_accuracy rises; write mode: max",
        ),
        ("training: {data_seed: 99999999999}", "training.data_seed: must be at most 4.29497e+09, not 99999999999;"),
        ("training: {bf16: true, fp16: true}", "training.fp16: is true together with training.bf16,"),
        (
            "quantization: {load_in_8bit: true}\nlora: {use_dora: true}",
            "lora.use_dora: DoRA fails on an 8-bit base model;",
        ),
        (
            "quantization: {load_in_4bit: true}\nlora: {init_lora_weights: pissa_niter_4}",
            "lora.init_lora_weights: pissa_niter_4 computes with the base weights themselves,",
        ),
        (
            "quantization: {load_in_8bit: true}\nlora: {init_lora_weights: olora}",
            "lora.init_lora_weights: olora computes with the base weights themselves,",
        ),
        (
            "quantization: {load_in_4bit: true}\nlora: {init_lora_weights: mica}",
            "lora.init_lora_weights: mica computes with the base weights themselves,",
        ),
        (
            "lora: {init_lora_weights: loftq}",
            "lora.init_lora_weights: loftq starts the adapter from the error of a 4-bit base model;",
        ),
        (
            "quantization: {load_in_4bit: true}\nlora: {init_lora_weights: loftq}",
            "lora.lora_alpha: loftq cancels that error only where the adapter counts once; write as much as r",
        ),
        (
            "lora: {init_lora_weights: pissa, use_dora: true}",
            "lora.use_dora: pissa changes the base model, and PEFT cannot undo that in an adapter with use_dora;",
        ),
        (
            "lora: {init_lora_weights: olora, modules_to_save: [embed_tokens]}",
            "lora.modules_to_save: olora changes the base model, and PEFT cannot undo that",
        ),
        (
            "lora: {init_lora_weights: olora, use_rslora: true, rank_pattern: {q_proj: 2}}",
            "lora.use_rslora: olora changes the base model, and PEFT cannot undo that with rank_pattern",
        ),
        (
            "quantization: {load_in_8bit: true}\nlora: {layer_replication: [[0, 2]]}",
            "lora.layer_replication: the copies of an 8-bit layer lose their scales;",
        ),
        (
            "training: {gradient_checkpointing_kwargs: {every_n_layers: 0}}",
            "training.gradient_checkpointing_kwargs: every_n_layers is 0,",
        ),
        ("training: {activation_checkpointing: false}", "training.activation_checkpointing: TRL reads the older name;"),
        (
            "lora: {init_lora_weights: gausian}",
            "lora.init_lora_weights: PEFT knows no initialisation 'gausian'; write true, gaussian,",
        ),
        ("lora: {target_modules: [q_proj, lm_head]}", "lora.target_modules: names lm_head,"),
        ("lora: {target_modules: '.*'}", "lora.target_modules: names lm_head,"),
        ("lora: {target_modules: '('}", "lora.target_modules: '(' is no regular expression"),
        (
            "lora: {layers_to_transform: [0]}",
            "lora.layers_to_transform: it needs the modules by name; write target_modules as a list,",
        ),
    ],
)
def test_a_wrong_value_is_answered_with_what_to_write(mistakes, text, said):
    (line,) = mistakes(text)
    assert line.startswith(f"my-recipe.yaml: {said}")


@pytest.mark.parametrize(
    "text",
    [
        "lora: {init_lora_weights: pissa}",
        "lora: {use_dora: true}\nquantization: {load_in_4bit: true}",
        "lora: {init_lora_weights: eva}\nquantization: {load_in_8bit: true}",
        "lora: {init_lora_weights: loftq, r: 16, lora_alpha: 16}\nquantization: {load_in_4bit: true}",
        "lora: {init_lora_weights: pissa, use_rslora: true}",
        "lora: {target_modules: '.*', exclude_modules: [lm_head]}",
        "lora: {target_modules: '.*_proj'}",
        "training: {loss_type: nll, packing_strategy: bfd, eval_packing: false}",
        "training: {label_smoothing_factor: 0, use_liger_kernel: false}",
        "training: {warmup_steps: 0.03, dataloader_drop_last: true, disable_tqdm: true, completion_only_loss: true}",
        "training: {fsdp: null, tf32: null}",
        "training: {pad_to_multiple_of: auto}",
        "training: {pad_to_multiple_of: 8}",
    ],
)
def test_what_is_harmless_is_accepted(recipe, text):
    recipe(text)


_BYPASSING = {
    "loss_type": "dft",
    "label_smoothing_factor": 0.1,
    "use_liger_kernel": True,
    "packing_strategy": "wrapped",
    "eval_packing": True,
    "average_tokens_across_devices": False,
    "completion_only_loss": False,
    "assistant_only_loss": True,
    "push_to_hub": True,
    "liger_kernel_config": {"rope": True},
    "inference_mode": True,
    "ignore_data_skip": True,
    "save_only_model": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "enable_jit_checkpoint": True,
    "dataloader_persistent_workers": True,
    "dataloader_in_order": False,
}


@pytest.mark.parametrize(
    ("section", "key"),
    [("training", key) for key in (*TRAINING_MANAGED, "hub_model_id", "hub_strategy")]
    + [("lora", key) for key in LORA_MANAGED],
)
def test_what_sevpeft_manages_is_refused_with_a_remedy(section, key):
    with pytest.raises(RecipeError) as caught:
        recipe_from_values({section: {key: _BYPASSING.get(key, "x")}}, "f.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"f.yaml: {section}.{key}: ") and "; " in line


def test_a_token_in_a_recipe_is_not_repeated(mistakes):
    (line,) = mistakes("training: {hub_token: hf_secret}")
    assert "hf_secret" not in line and "hf auth login" in line


def test_the_tables_of_keys_fit_the_installed_libraries():
    fields = {"training": set(sft_fields()), "lora": set(lora_fields())}
    here = {name: set(section.annotation.model_fields) for name, section in Recipe.model_fields.items()}
    everywhere = set().union(*here.values())
    assert not (set(RENAMED) | set(GONE)) & everywhere, "a key came back"
    for old, new in RENAMED.items():
        section, key = new.split(".")
        assert key in here[section], old
    assert set(TRAINING_MANAGED) - fields["training"] == {"logging_dir", "overwrite_output_dir"}
    assert set(LORA_MANAGED) <= fields["lora"]


# Files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the recipe is empty;"),
        (b"# a comment\n", "the recipe is empty;"),
        (b"- a\n", "the recipe is a list;"),
        (b"hello\n", "the recipe is one value;"),
        (b"training:\n\tseed: 1\n", "line 2, column 1: a tab stands here; indent with spaces."),
        (b"prompt:\n  template: Q: {question}\n", "line 2, column 14: a second ': ' stands here,"),
        (b'a:\n  b: "abc\n', "line 3, column 1: a quotation mark is opened and not closed;"),
        (b"a: {b: 1\nc: {d: 3}\n", "line 2, column 2: a { or [ is not closed"),
        (b"a: 1\n---\nb: 2\n", "line 2, column 1: --- starts a second document;"),
        (b"a: !!python/object x\n", "line 1, column 4: a word begins with !,"),
        (b"a: *b\n", "line 1, column 4: a word begins with *,"),
        (b"a: &a {b: *a}\n", "line 1, column 4: an alias stands within what it names;"),
        (b"a: 1\nb: \xff", "line 2 is not UTF-8; save the file as UTF-8."),
        (b"a: 1\nb: \x01", "line 2: a control character stands here; remove it."),
        (b"a: " + b"[" * 3000, "the values are nested too deep or too long;"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_plain_words(tmp_path, content, said):
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes("lora: {r: 4}".encode("utf-8-sig"))
    assert load_recipe(path).lora.r == 4


def test_an_absent_recipe_is_answered_with_close_names(tmp_path):
    (tmp_path / "qwen2.5-0.5b.yaml").touch()
    (tmp_path / "bloomz-560m.yaml").touch()
    for name in ("qwen2.5-0.5b", "qwen2.5-05b.yaml", "qwen2.5-0.5b.yml"):
        with pytest.raises(RecipeError, match=r"no such recipe; did you mean \S*qwen2\.5-0\.5b\.yaml\?$"):
            load_recipe(tmp_path / name)
    with pytest.raises(RecipeError, match=r"holds bloomz-560m\.yaml, qwen2\.5-0\.5b\.yaml\.$"):
        load_recipe(tmp_path / "zzz")
    with pytest.raises(RecipeError, match=r"is a folder; .* holds bloomz"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="there is no folder"):
        load_recipe(tmp_path / "no" / "x.yaml")


def test_every_recipe_of_the_repository_reads_and_reads_back(tmp_path):
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")):
        first = load_recipe(path)
        (tmp_path / path.name).write_text(first.to_yaml(), encoding="utf-8")
        assert load_recipe(tmp_path / path.name) == first


# Schema and start


def test_the_schema_describes_every_setting_and_survives_json():
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(Recipe.model_fields)
    training = schema["$defs"]["TrainingSection"]["properties"]
    assert training["learning_rate"]["default"] == 2e-4 and training["logging_first_step"]["default"] is False
    for name, section in schema["$defs"].items():
        assert section["additionalProperties"] is False
        for key, setting in section["properties"].items():
            assert setting.get("description") or name == "SeverityWeights", f"{name}.{key}"


def test_reading_a_recipe_loads_no_heavy_library():
    code = (
        "import sys, sevpeft.recipe; "
        "print([n for n in ('torch', 'transformers', 'trl', 'peft', 'numpy', 'datasets') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("source", ["linear", "rules+linear", "transformer"])
def test_a_source_that_has_to_be_fitted_needs_its_folder(source: str) -> None:
    with pytest.raises(RecipeError, match=r"sevpeft classifier fit"):
        recipe_from_values({"severity": {"source": source}})
    assert recipe_from_values({"severity": {"source": source, "classifier": "folder"}}).severity.source == source


def test_a_classifier_that_nothing_would_use_is_a_mistake() -> None:
    with pytest.raises(RecipeError, match=r"severity\.source is columns"):
        recipe_from_values({"severity": {"classifier": "folder"}})
    assert recipe_from_values({"severity": {"source": "rules"}}).severity.classifier is None


# What would never end


@pytest.mark.parametrize("kind", ["fifo", "device", "long"])
def test_what_is_no_short_regular_file_is_refused_and_never_waited_for(kind, tmp_path):
    path = tmp_path / "r.yaml"
    if kind == "fifo":
        os.mkfifo(path)
        # A reader would get a recipe, and the test would fail rather than wait.
        threading.Thread(target=lambda: path.write_text("about: {title: x}"), daemon=True).start()
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        path.write_text("about: {title: x}\n" + "#" * 60_000)
    with pytest.raises(RecipeError, match="regular file"):
        load_recipe(path)


def test_aliases_that_multiply_are_refused_at_once_and_a_few_are_read():
    bombs = {
        "lists": ("[{}]", "*a{}", "x"),
        "mappings": ("{{k: {}, l: 1}}", "[*a{0}, *a{0}]", "x"),
        "merged": ("{{<<: [{}], k: 1}}", "*a{}", "{y: 1}"),
    }
    for name, (form, alias, leaf) in bombs.items():
        lines = [f"a0: &a0 {form.format(','.join([leaf] * (1 if name == 'mappings' else 9)))}"]
        for level in range(1, 6 if name != "mappings" else 16):
            inner = ",".join([alias.format(level - 1)] * (1 if name == "mappings" else 9))
            lines.append(f"a{level}: &a{level} {form.format(inner)}")
        with pytest.raises(RecipeError, match="alias"):
            read_yaml("\n".join(lines), "f")
    assert read_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}", "f")[0] == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }


def test_a_verb_without_a_recipe_takes_settings_of_its_own() -> None:
    class Cleaning(Section):
        emoji: Literal["keep", "remove"] = "keep"

    class Settings(Section):
        data: DataSection = DataSection()
        cleaning: Cleaning = Cleaning()
        split_by: str | None = None

    words = ["cleaning.emoji=remove", "split_by=2024", "data.max_rows=3"]
    found = settings_from(Settings, words, {"data.path": "x.csv"})
    assert (found.data.path, found.data.max_rows, found.cleaning.emoji, found.split_by) == (
        "x.csv",
        3,
        "remove",
        "2024",
    )
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
