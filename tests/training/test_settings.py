"""Settings of a recipe reach SFTConfig and the optimizer; settings that cannot work are refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sevpeft.errors import RecipeError
from sevpeft.modeling.loading import Precision
from sevpeft.recipe import BEST_IS_LEAST, recipe_from_values
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training import resolve
from sevpeft.training.resolve import loraplus_settings, resolve_split, sft_config
from tests.training.test_trainer import adapter_of, assert_close, assert_equal, make_rows, make_trainer

FLOAT32 = Precision(torch.float32, bf16=False, fp16=False)


def config(folder: Path, **training: object):
    return sft_config(resolve_split(recipe_from_values({"training": training}), None, 0), FLOAT32, folder)


def test_settings_arrive_under_their_own_names(tmp_path: Path) -> None:
    made = config(tmp_path, learning_rate=3e-4, max_length=77, weight_decay=0.1, warmup_steps=0.05)
    assert (made.learning_rate, made.max_length, made.weight_decay, made.warmup_steps) == (3e-4, 77, 0.1, 0.05)


def test_the_defaults_are_those_of_the_paper_and_not_of_the_library(tmp_path: Path) -> None:
    made = config(tmp_path)
    assert (made.learning_rate, made.max_length, made.num_train_epochs) == (2e-4, 512, 3)
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (1, 8)
    assert made.lr_scheduler_type == "linear" and made.warmup_steps == 0 and made.max_grad_norm == 1.0


def test_a_cpu_run_computes_in_float32_and_hides_no_nan(tmp_path: Path) -> None:
    made = config(tmp_path)
    assert made.use_cpu and not made.bf16 and not made.fp16
    assert made.logging_nan_inf_filter is False


def test_padding_free_without_packing_leaves_the_length_to_the_encoding(tmp_path: Path) -> None:
    assert config(tmp_path, padding_free=True).max_length is None
    assert config(tmp_path, padding_free=True, packing=True).max_length == 512


def test_the_best_checkpoint_is_that_of_the_least_loss_or_the_greatest_accuracy(tmp_path: Path) -> None:
    """transformers takes the greatest for best where a name does not end with loss."""
    for metric in ("loss", "eval_loss", "loss_critical", "eval_loss_non_critical"):
        assert config(tmp_path, metric_for_best_model=metric).greater_is_better is False, metric
    assert config(tmp_path, metric_for_best_model="mean_token_accuracy").greater_is_better is True


def test_a_loss_by_severity_that_can_be_asked_for_is_one_that_is_measured() -> None:
    assert ("loss", *(f"loss_{severity}" for severity in SEVERITIES)) == BEST_IS_LEAST


def test_values_that_cannot_work_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for training, word in (
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "training section is refused"),
        ({"accelerator_config": "no-such-file.json"}, "no-such-file"),
        ({"activation_offloading": True}, "activation_offloading"),
    ):
        with pytest.raises(RecipeError, match=word) as caught:
            config(tmp_path, **training)
        assert "\n" not in str(caught.value)


def test_several_processes_do_not_look_for_a_batch_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not config(tmp_path, auto_find_batch_size=True).auto_find_batch_size, "the trainer does it, in its own way"
    monkeypatch.setattr(resolve, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(RecipeError, match="per_device_train_batch_size"):
        config(tmp_path, auto_find_batch_size=True)


def test_the_recipe_decides_the_number_format_whatever_the_launcher_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    for training in ({}, {"bf16": False}):
        made = config(tmp_path, **training)
        assert made.mixed_precision == "no" and os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    bfloat16 = Precision(torch.bfloat16, bf16=True, fp16=False)
    assert sft_config(recipe_from_values({}), bfloat16, tmp_path).mixed_precision == "bf16"


# LoRA+


def moved(folder: Path, ratio: float | None, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """How far a training moves each matrix of the adapter."""
    loraplus = None if ratio is None else {"loraplus_lr_ratio": ratio}
    trainer = make_trainer(folder, make_rows(), loraplus=loraplus, **options)
    before = adapter_of(trainer)
    trainer.train()
    after = adapter_of(trainer)
    return {name: after[name] - before[name] for name in after}, trainer


def test_a_ratio_of_one_trains_the_adapter_of_one_learning_rate(tmp_path: Path) -> None:
    for optim in ("adamw_torch", "sgd", "adafactor", "paged_adamw_8bit", "paged_lion_8bit"):
        options: dict[str, Any] = {"optim": optim, "weight_decay": 0.1, "learning_rate": 1e-3, "max_steps": 2}
        plain, _ = moved(tmp_path, None, **options)
        plus, _ = moved(tmp_path, 1.0, **options)
        assert any(float(change.abs().max()) > 0 for change in plain.values()), optim
        # Clipping sums the gradients group by group, so that the last bit may differ.
        assert_close(plain, plus, 1e-7)


def test_a_ratio_of_sixteen_moves_b_sixteen_times_as_far(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 1e-3}
    plain, _ = moved(tmp_path, None, **options)
    plus, _ = moved(tmp_path, 16.0, **options)
    for name, change in plain.items():
        factor = 16 if "lora_B" in name else 1
        assert torch.allclose(plus[name], factor * change, rtol=1e-4, atol=1e-9), name


def test_both_rates_follow_the_schedule_and_weight_decay_is_the_recipe_s_also_after_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"weight_decay": 0.1, "max_steps": 4, "lr_scheduler_type": "constant"}
    options |= {"learning_rate": 1e-3, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2}
    _, trainer = moved(tmp_path, 16.0, optim="paged_adamw_8bit", **options)
    groups = trainer.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 16e-3])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]
    assert sum(len(group["params"]) for group in groups) == len(adapter_of(trainer))
    resumed = make_trainer(
        tmp_path, make_rows(), loraplus={"loraplus_lr_ratio": 16.0}, optim="paged_adamw_8bit", **options
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(adapter_of(resumed), adapter_of(trainer))


def test_the_recipe_s_settings_are_the_library_s() -> None:
    recipe = recipe_from_values({"lora": {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-5}})
    assert loraplus_settings(recipe) == {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-5}
    assert "loraplus_lr_ratio" not in recipe.lora.settings() and "loraplus_lr_ratio: 16.0" in recipe.to_yaml()
    assert loraplus_settings(recipe_from_values({})) == {}
    for values in ({"loraplus_lr_ratio": 0.5}, {"loraplus_weight_decay": 0.1}):
        with pytest.raises(RecipeError):
            recipe_from_values({"lora": values})
