"""What would silently change or lose a training is refused, with its key and with what to write instead."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sevpeft.errors import RecipeError
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.recipe.library import MANAGED
from sevpeft.recipe.messages import _RENAMED


def mistakes_of(text: str) -> list[str]:
    """Lines of the error of a recipe, without its name."""
    with pytest.raises(RecipeError) as error:
        recipe_from_values(yaml.safe_load(text), "f")
    return [line.removeprefix("f: ") for line in str(error.value).splitlines()]


def unexpected(rows: tuple[tuple[str, str, str], ...]) -> list[tuple[str, list[str]]]:
    """Rows of (recipe, key, part of the remedy) whose only mistake is another, or has another remedy."""
    found = [(text, key, remedy, mistakes_of(text)) for text, key, remedy in rows]
    return [
        (text, lines)
        for text, key, remedy, lines in found
        if len(lines) != 1 or not lines[0].startswith(f"{key}: ") or remedy not in lines[0]
    ]


def test_an_unknown_key_is_answered_with_the_nearest_right_one() -> None:
    rows = (
        ("lora_alpha: 32", "lora_alpha", "lora.lora_alpha"),
        ("model: {load_in_4bit: true}", "model.load_in_4bit", "quantization.load_in_4bit"),
        ("trainig: {seed: 1}", "trainig", "write training."),
        ("lora: {lora_alfa: 3}", "lora.lora_alfa", "write lora.lora_alpha."),
        ("seed: 1", "seed", "data.seed or training.seed or generation.seed or evaluation.seed"),
        ("max_new_tokens: 9", "max_new_tokens", "generation.max_new_tokens"),
        ("generation: {temprature: 1.0}", "generation.temprature", "generation.temperature"),
        ("revision: abc", "revision", "model.revision or data.revision"),
        ("nope: 3", "nope", "unknown"),
        ("training: {max_seq_length: 5}", "training.max_seq_length", "training.max_length"),
        ("training: {evaluation_strategy: steps}", "training.evaluation_strategy", "training.eval_strategy"),
        ("training: {no_cuda: true}", "training.no_cuda", "training.use_cpu"),
        ("training: {group_by_length: true}", "training.group_by_length", "train_sampling_strategy"),
        ("training: {warmup_ratio: 0.1}", "training.warmup_ratio", "training.warmup_steps"),
        ("model: {torch_dtype: float32}", "model.torch_dtype", "model.dtype"),
        ("model_name_or_path: x", "model_name_or_path", "model.name_or_path"),
        ("output_dir: x", "output_dir", "--output RUN"),
        ("severity: {weights: {non_critical: 1, neutral: 1, critcal: 1, critical: 1}}",
         "severity.weights.critcal", "severity.weights.critical"),
        ("severity: {weights: {non_critical: 1, critical: 1}}", "severity.weights.neutral", "add it"),
    )  # fmt: skip
    assert unexpected(rows) == []


def test_keys_that_were_renamed_have_successors_and_are_no_keys_themselves() -> None:
    known = {
        f"{name}.{key}" for name, section in Recipe.model_fields.items() for key in section.annotation.model_fields
    }
    successors = [new.split(",")[0].split(":")[0] for old, new in _RENAMED.items() if old != "api_key"]
    assert set(successors) <= known
    assert not {name.split(".")[1] for name in known} & set(_RENAMED)


def test_a_wrong_value_is_answered_with_what_to_write() -> None:
    rows = (
        ("lora: {r: 16.5}", "lora.r", "16.5"),
        ("lora: {r: true}", "lora.r", "true"),
        ("lora: {r: null}", "lora.r", "null"),
        ("lora: {target_modules: 5}", "lora.target_modules", "text"),
        ("training: {packing: 'yes'}", "training.packing", "true or false"),
        ("training: {learning_rate: .nan}", "training.learning_rate", "finite"),
        ("training: {num_train_epochs: -1}", "training.num_train_epochs", "greater than 0"),
        ("training: {lr_scheduler_type: lineer}", "training.lr_scheduler_type", "write linear"),
        ("training: {optim: adamw_8bits}", "training.optim", "write adamw_8bit"),
        ("training: {loss_type: nll, max_length: 1}", "training.max_length", "2"),
        ("training: 3", "training", "mapping"),
        ("model: {revision: 1234567}", "model.revision", "quotes"),
        ("prompt: {template: {question}}", "prompt.template", "quotes"),
        ("prompt: {template: 'hello'}", "prompt.template", "add {question}"),
        ("prompt: {template: '{question} {name}'}", "prompt.template", "{answer_cue}"),
        ("prompt: {dialect: MSA}", "prompt.dialect", "dialect_prefixes"),
        ("prompt: {severity: golden}", "prompt.severity", "gold"),
        ("prompt: {examples: [{question: a}]}", "prompt.examples.0.answer", "add it"),
        ("as_published: {evaluation_template: السؤال}", "as_published.evaluation_template", "add {question}"),
        ("as_published: {labels: prompt}", "as_published.labels", "question_and_answer"),
        ("severity: {weights: balancd}", "severity.weights", "write balanced"),
        ("severity: {weights: {non_critical: -1, neutral: 1, critical: 1}}", "severity.weights.non_critical", "0"),
        ("severity: {weights: {non_critical: .inf, neutral: 1, critical: 1}}",
         "severity.weights.non_critical", "finite"),
        ("severity: {source: linear}", "severity.classifier", "sevpeft classifier fit"),
        ("severity: {source: transformer}", "severity.classifier", "sevpeft classifier fit"),
        ("severity: {classifier: folder}", "severity.classifier", "source"),
        ("severity: {text: both}", "severity.text", "source"),
        ("severity: {source: rules, text: all}", "severity.text", "both"),
        ("data: {validation_size: 1.5}", "data.validation_size", "0.1"),
        ("data: {validation_size: 0}", "data.validation_size", "0.1"),
        ("data: {test_size: -3}", "data.test_size", "500"),
        ("data: {path: ''}", "data.path", "leave it out"),
        ("data: {mix: {sources: {a: b}, ratios: a-b}}", "data.mix.ratios", "60-40"),
        ("about: {parameters: big}", "about.parameters", "pattern"),
        ("about: {config: qwen2}", "about.config", "mapping"),
        ("quantization: {load_in_4bit: true, load_in_8bit: true}", "quantization.load_in_8bit", "load_in_4bit"),
    )  # fmt: skip
    assert unexpected(rows) == []


def test_settings_that_would_do_silent_harm_are_refused() -> None:
    rows = (
        *(
            (f"{text}\nas_published: {{labels: all{more}}}", key, "leave it out")
            for text, more, key in (
                ("training: {packing: true}", "", "training.packing"),
                ("training: {max_length: null}", "", "training.max_length"),
                ("curriculum: {kind: disjoint, difficulty: length}", "", "curriculum.difficulty"),
                ("data: {mix: {sources: {a: b}, ratios: 50-50}}", "", "data.mix"),
                ("", ", no_end_token: true", "as_published.no_end_token"),
            )
        ),
        ("training: {max_steps: 0}", "training.max_steps", "-1"),
        ("training: {metric_for_best_model: rouge}", "training.metric_for_best_model", "loss_critical"),
        ("training: {metric_for_best_model: loss_critical, greater_is_better: true}",
         "training.greater_is_better", "leave it out"),
        ("training: {metric_for_best_model: eval_mean_token_accuracy, greater_is_better: false}",
         "training.greater_is_better", "leave it out"),
        ("training: {lr_scheduler_type: reduce_lr_on_plateau, metric_for_best_model: mean_token_accuracy}",
         "training.lr_scheduler_kwargs", "mode: max"),
        ("training: {gradient_checkpointing_kwargs: {preserve_rng_state: false}}",
         "training.gradient_checkpointing_kwargs", "leave it out"),
        ("training: {accelerator_config: {gradient_accumulation_kwargs: {num_steps: 4}}}",
         "training.accelerator_config", "gradient_accumulation_steps"),
        ("training: {packing: true, max_length: null}", "training.max_length", "512"),
        ("lora: {loraplus_lr_embedding: 1.0e-6}", "lora.loraplus_lr_embedding", "loraplus_lr_ratio"),
        ("lora: {target_modules: [q_proj, lm_head]}", "lora.target_modules", "lm_head"),
        ("lora: {target_modules: '.*'}", "lora.target_modules", "lm_head"),
        ("lora: {target_modules: '('}", "lora.target_modules", "all-linear"),
        ("quantization: {load_in_8bit: true}\nlora: {use_dora: true}", "lora.use_dora", "load_in_4bit"),
        ("quantization: {load_in_8bit: true}\nlora: {layer_replication: [[0, 2]]}",
         "lora.layer_replication", "load_in_4bit"),
    )  # fmt: skip
    assert unexpected(rows) == []


def test_a_start_that_changes_the_base_model_or_needs_a_pass_is_refused() -> None:
    starts = ("pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda", "lora_ga", "eva", "gausian")
    rows = tuple((f"lora: {{init_lora_weights: {start}}}", "lora.init_lora_weights", "gaussian") for start in starts)
    assert unexpected(rows) == []
    quantized = "quantization: {load_in_4bit: true}\nlora: {init_lora_weights: %s}"
    rows = tuple((quantized % start, "lora.init_lora_weights", "gaussian") for start in ("orthogonal", "mica"))
    assert unexpected(rows) == []
    for start in ("true", "false", "gaussian", "orthogonal", "mica"):
        recipe_from_values(yaml.safe_load(f"lora: {{init_lora_weights: {start}}}"))


def test_what_sevpeft_manages_is_refused_with_a_remedy_and_never_repeated() -> None:
    harmful: dict[type, Any] = {bool: lambda value: not value, int: lambda _: 0.1, str: lambda _: "secret"}
    rows = []
    for (section, key), (allowed, _) in MANAGED.items():
        value = harmful.get(type(allowed[-1]), lambda _: {"a": 1})(allowed[-1]) if allowed else "secret"
        lines = mistakes_of(yaml.safe_dump({section: {key: value}}))
        if (
            len(lines) != 1
            or not lines[0].startswith(f"{section}.{key}: ")
            or "secret" in lines[0]
            or "; " not in lines[0]
        ):
            rows.append((section, key, lines))
    assert rows == []
    (line,) = mistakes_of("training: {hub_token: hf_secret}")
    assert "hf auth login" in line


def test_what_is_harmless_is_accepted() -> None:
    for text in (
        "lora: {use_dora: true}\nquantization: {load_in_4bit: true}",
        "lora: {init_lora_weights: gaussian}\nquantization: {load_in_8bit: true}",
        "lora: {target_modules: '.*', exclude_modules: [lm_head]}",
        "lora: {target_modules: '.*_proj', loftq_config: {}}",
        "training: {loss_type: nll, packing_strategy: bfd, eval_packing: false}",
        "training: {label_smoothing_factor: 0, use_liger_kernel: false}",
        "training: {warmup_steps: 0.03, dataloader_drop_last: true, disable_tqdm: true, completion_only_loss: true}",
        "training: {fsdp: null, tf32: null}",
        "training: {metric_for_best_model: loss_critical, greater_is_better: false}",
        "training: {pad_to_multiple_of: auto}",
        "training: {pad_to_multiple_of: 8, max_steps: -1}",
        "severity: {source: rules}",
        "severity: {source: rules+linear, classifier: folder}",
    ):
        recipe_from_values(yaml.safe_load(text), text)


def test_every_managed_key_is_one_of_the_libraries() -> None:
    fields = {name: section.annotation.model_fields for name, section in Recipe.model_fields.items()}
    assert [key for section, key in MANAGED if key not in fields[section]] == []
