"""What is advised where a recipe does not fit does fit, and costs the result as little as can be."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from sevpeft.modeling.gpus import GPUS, USABLE, changes, epoch_seconds, usable, verdicts
from sevpeft.modeling.memory import GIB, MemoryPlan
from sevpeft.recipe import load_recipe
from tests.modeling.test_memory import plan_of, recipe_of

EIGHT_BILLION = Path(__file__).parent.parent.parent / "recipes" / "llama-3.1-8b.yaml"


pytestmark = pytest.mark.xdist_group("eight_billion")


@cache  # a plan remembers what it has run
def eight_billion(*settings: str) -> MemoryPlan:
    recipe = load_recipe(EIGHT_BILLION, settings)
    config = AutoConfig.for_model(**recipe.about.config)
    return MemoryPlan(recipe, config, on_gpu=True, vocabulary_tile=4096)


def test_an_8b_model_fits_12_gb_in_4_bit_and_wants_more_than_16_in_16() -> None:
    assert next(gpu.gb for gpu in verdicts(eight_billion()) if gpu.fits) in (8, 12)
    assert eight_billion("quantization.load_in_4bit=false").budget().total > usable(16)


def test_larger_gpus_take_larger_batches() -> None:
    batches = [gpu.largest_batch for gpu in verdicts(eight_billion())]
    assert len(batches) == len(GPUS) and batches == sorted(batches) and batches[-1] > 20 * max(batches[0], 1)


def test_what_fits_needs_no_change() -> None:
    assert changes(eight_billion(), 24) == []


def test_changes_come_in_the_order_of_least_harm_until_it_fits() -> None:
    wasteful = eight_billion(
        "training.gradient_checkpointing=false",
        "training.per_device_train_batch_size=4",
        "training.gradient_accumulation_steps=2",
        "training.optim=adamw_torch",
        "quantization.load_in_4bit=false",
        "training.max_length=2048",
    )
    advice = changes(wasteful, 12)
    assert [change.fits for change in advice] == [False] * (len(advice) - 1) + [True]
    first = [change.settings[0].split("=")[0].split(".")[1] for change in advice]
    assert first[:2] == ["gradient_checkpointing", "per_device_train_batch_size"]
    assert first.index("load_in_4bit") > first.index("per_device_train_batch_size")
    assert advice[1].settings[1] == "training.gradient_accumulation_steps=8", "the same rows a step"
    assert advice[1].settings[0].endswith("_size=1"), "as nothing else would fit yet"
    totals = [wasteful.budget().total, *(change.total for change in advice)]
    assert totals == sorted(totals, reverse=True) and totals[-1] <= usable(12)


def test_no_more_rows_are_given_up_than_must_be() -> None:
    plan = plan_of(recipe_of())

    def wasteful(checkpointing: bool, batch: int) -> MemoryPlan:
        training = {"gradient_checkpointing": checkpointing, "max_length": 512, "per_device_train_batch_size": batch}
        return plan.with_recipe(recipe_of(training={**training, "gradient_accumulation_steps": 3}))

    for rows, left in ((40, 30), (5, 5)):
        gb = (wasteful(True, rows).budget().total + 2**20) / GIB / USABLE
        checkpointing, batch = changes(wasteful(False, 60), gb)
        assert checkpointing.settings == ("training.gradient_checkpointing=true",) and batch.fits
        assert batch.settings == (
            f"training.per_device_train_batch_size={left}",
            f"training.gradient_accumulation_steps={180 // left}",
        )


def test_what_the_recipe_does_not_allow_is_not_advised() -> None:
    def advised(**lora: Any) -> list[tuple[str, ...]]:
        recipe = recipe_of(lora=lora, training={"per_device_train_batch_size": 1})
        plan = plan_of(recipe, hidden_size=1024, num_attention_heads=8)
        return [change.settings for change in changes(plan, 0.3)]

    assert ("quantization.load_in_4bit=true",) in advised()
    assert ("quantization.load_in_4bit=true",) not in advised(init_lora_weights="orthogonal")


def test_rows_of_training_and_validation_are_lowered_together() -> None:
    """As long as one of the two is large, the other saves nothing."""
    rows = {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 64}
    recipe = recipe_of(training={"gradient_checkpointing": False, "eval_strategy": "epoch", **rows})
    settings = [setting for change in changes(plan_of(recipe), 0.3) for setting in change.settings]
    assert {"training.per_device_train_batch_size=1", "training.per_device_eval_batch_size=1"} <= set(settings)


def test_what_cannot_fit_is_said_to() -> None:
    advice = changes(plan_of(recipe_of(training={"max_length": 256})), 0.3)  # less than the CUDA context
    assert advice and not any(change.fits for change in advice) and "max_length" in advice[-1].settings[0]


def test_an_epoch_takes_its_operations_at_the_stated_rate() -> None:
    plan = plan_of(recipe_of(training={"gradient_checkpointing": False}), hidden_size=128)
    count = plan.parameters
    # Rows of length near zero: attention costs nothing, and no token is an answer.
    seconds = epoch_seconds(plan, 1000, 0, 10**9, tflops=1e-3, efficiency=0.5)
    assert seconds == pytest.approx((4 * count.blocks + 6 * count.trainable) * 1000 / 0.5e9, rel=1e-3)
    assert epoch_seconds(plan, 2000, 0, 10**9, tflops=1e-3, efficiency=0.5) == pytest.approx(2 * seconds, rel=1e-3)
    answers = epoch_seconds(plan, 1000, 100, 10**9, tflops=1e-3, efficiency=0.5) - seconds
    assert answers == pytest.approx(6 * count.head * 100 / 0.5e9, rel=1e-3)
    again = plan_of(recipe_of(training={"gradient_checkpointing": True}))
    more = epoch_seconds(again, 1000, 0, 10**9, tflops=1e-3, efficiency=0.5) - seconds
    assert more == pytest.approx(2 * count.blocks * 1000 / 0.5e9, rel=1e-3)


def test_published_speed_lies_near_the_estimate() -> None:
    """LLaMA-Factory: Llama-2-7B in 4 bit, A100, length 1024: 2,295 tokens a second."""
    recipe = load_recipe(EIGHT_BILLION.with_stem("llama-2-7b"), ["training.max_length=1024"])
    plan = MemoryPlan(recipe, AutoConfig.for_model(**recipe.about.config), on_gpu=True, vocabulary_tile=4096)
    seconds = epoch_seconds(plan, 2295 * 100, 2295 * 100, 224, tflops=312, efficiency=0.3)
    assert seconds == pytest.approx(100, rel=0.15)
