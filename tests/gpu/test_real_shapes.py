"""On a CUDA GPU: the plan is what real steps of 0.5B, 8B and 14B shapes take; skipped without one.

SEVPEFT_GPU_TABLE=table.md pytest -n 0 tests/gpu     writes the table that the README shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sevpeft.modeling.loading import choose_precision
from sevpeft.recipe import Recipe, load_recipe
from tests.gpu.measuring import planned_bytes, table_line, train_steps, write_table

RECIPES = Path(__file__).parent.parent.parent / "recipes"
# One split for both trainers and the plan.
FEW = [
    *("training.max_length=512", "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"),
    *("training.gradient_checkpointing=true", "training.padding_free=false", "training.eval_strategy=no"),
    "training.per_device_eval_batch_size=8",
]
SHAPES = {"0.5B": "qwen2.5-0.5b", "8B": "qwen3-8b", "14B": "qwen3-14b"}
ADAPTERS = {
    "QLoRA": ["quantization.load_in_4bit=true"],
    "LoRA": ["quantization.load_in_4bit=false"],
    "QLoRA, no checkpointing": ["quantization.load_in_4bit=true", "training.gradient_checkpointing=false"],
    "QLoRA, selective": [
        "quantization.load_in_4bit=true",
        "training.gradient_checkpointing_kwargs={selective: true}",
    ],
}
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.xdist_group("gpu"),
]


def recipe_of(shape: str, settings: list[str]) -> Recipe:
    return load_recipe(RECIPES / f"{SHAPES[shape]}.yaml", [*FEW, *settings])


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    write_table(torch.cuda.get_device_name(), lines)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_real_steps_take_what_was_planned(shape: str, adapter: str, table: list[str]) -> None:
    recipe = recipe_of(shape, ADAPTERS[adapter])
    planned = planned_bytes(recipe)
    free, _ = torch.cuda.mem_get_info()
    if planned > 0.9 * free:
        pytest.skip(f"needs {planned / 2**30:.0f} GiB of GPU memory and {free / 2**30:.0f} are free")
    precision = choose_precision(recipe)
    ours, stock = (train_steps(recipe, precision, "cuda", stock=stock) for stock in (False, True))
    table.append(table_line(shape, adapter, planned, ours, stock))
    assert all(torch.isfinite(torch.tensor(ours.losses)))
    assert planned == pytest.approx(ours.allocated, rel=0.08)


@pytest.mark.parametrize("shape", ["0.5B", "8B"])
def test_the_recipe_as_shipped_is_faster_than_trl_with_the_same_recipe(shape: str, table: list[str]) -> None:
    """On rows like consultations, where the batch split and padding decide; the ratio is not asserted."""
    recipe = load_recipe(RECIPES / f"{SHAPES[shape]}.yaml", ["quantization.load_in_4bit=true"])
    precision = choose_precision(recipe)
    ours, stock = (train_steps(recipe, precision, "cuda", stock=one, as_shipped=True) for one in (False, True))
    table.append(table_line(shape, "QLoRA as shipped, rows of 90 tokens", 0, ours, stock))
    assert ours.losses[0] == pytest.approx(stock.losses[0], rel=0.02)


def test_an_adapter_of_a_4bit_8b_model_holds_nothing_of_its_base() -> None:
    recipe = recipe_of("8B", ADAPTERS["QLoRA"])
    if planned_bytes(recipe) > 0.9 * torch.cuda.mem_get_info()[0]:
        pytest.skip("needs a GPU with more free memory")
    assert train_steps(recipe, choose_precision(recipe), "cuda").saved < 200e6


def test_float16_trains_with_a_scaler_as_on_a_card_without_bfloat16() -> None:
    recipe = recipe_of("0.5B", [*ADAPTERS["QLoRA"], "model.dtype=float16", "training.fp16=true"])
    taken = train_steps(recipe, choose_precision(recipe), "cuda")
    assert taken.scaled and all(torch.isfinite(torch.tensor(taken.losses)))
    assert taken.losses[-1] != taken.losses[0]
