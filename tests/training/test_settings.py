"""From the training section to SFTConfig: every setting arrives, and what cannot work is refused in a sentence."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sevpeft.errors import RecipeError
from sevpeft.modeling.loading import Precision
from sevpeft.recipe import BEST_IS_LEAST, recipe_from_values
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training import resolve
from sevpeft.training.resolve import check_one_batch, resolve_split, sft_config

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


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "loss_critical", "eval_loss_non_critical"])
def test_the_best_checkpoint_is_that_of_the_least_loss(tmp_path: Path, metric: str) -> None:
    """transformers takes the greatest for best where a name does not end with loss."""
    assert config(tmp_path, metric_for_best_model=metric).greater_is_better is False


def test_the_best_checkpoint_by_accuracy_is_that_of_the_greatest(tmp_path: Path) -> None:
    assert config(tmp_path, metric_for_best_model="mean_token_accuracy").greater_is_better is True


def test_a_loss_by_severity_that_can_be_asked_for_is_one_that_is_measured() -> None:
    assert ("loss", *(f"loss_{severity}" for severity in SEVERITIES)) == BEST_IS_LEAST


def test_dropping_the_last_batch_must_leave_one(tmp_path: Path) -> None:
    made = config(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=8)
    check_one_batch(made, 8)
    with pytest.raises(RecipeError, match="leaves no batch of 8 of the 7 training rows"):
        check_one_batch(made, 7)
    check_one_batch(config(tmp_path, per_device_train_batch_size=8), 7)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "training section is refused"),
        ({"accelerator_config": "no-such-file.json"}, "no-such-file"),
        ({"activation_offloading": True}, "activation_offloading"),
        ({"report_to": ["comet_ml"]}, "pip install comet_ml"),
    ],
)
def test_values_that_cannot_work_are_refused_in_one_sentence(tmp_path: Path, training: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        config(tmp_path, **training)
    assert "\n" not in str(caught.value)


def test_several_processes_do_not_look_for_a_batch_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not config(tmp_path, auto_find_batch_size=True).auto_find_batch_size, "the trainer does it, in its own way"
    monkeypatch.setattr(resolve, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(RecipeError, match="auto_find_batch_size works on one process only"):
        config(tmp_path, auto_find_batch_size=True)


@pytest.mark.parametrize("training", [{}, {"bf16": False}])
def test_the_recipe_decides_the_number_format_whatever_the_launcher_says(
    tmp_path: Path, training: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    made = config(tmp_path, **training)
    assert made.mixed_precision == "no" and os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    bfloat16 = Precision(torch.bfloat16, bf16=True, fp16=False)
    assert sft_config(recipe_from_values({}), bfloat16, tmp_path).mixed_precision == "bf16"
