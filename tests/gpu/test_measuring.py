"""What the measurements on a GPU are made with, on small shapes and a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sevpeft.modeling.loading import Precision, load_model
from sevpeft.recipe import Recipe, recipe_from_values
from tests.gpu import measuring
from tests.gpu.measuring import Taken, planned_bytes, random_base, table_line, train_steps, write_table
from tests.models import ARCHITECTURES, VOCABULARY

FLOAT32 = Precision(torch.float32, bf16=False, fp16=False)
QUANTISED = [{}, {"load_in_4bit": True}, {"load_in_8bit": True}]


def small(architecture: str, quantization: dict[str, bool]) -> Recipe:
    numbers: dict[str, Any] = {
        **ARCHITECTURES[architecture],
        "vocab_size": VOCABULARY,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    training = {
        "max_length": 32,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "no",
        "learning_rate": 1e-2,
    }
    about = {"config": {"model_type": architecture, "bos_token_id": None, **numbers}}
    return recipe_from_values(
        {"about": about, "quantization": quantization, "training": training, "model": {"name_or_path": "none/here"}}
    )


@pytest.mark.parametrize("quantization", QUANTISED)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_random_model_is_made_of_what_a_loaded_one_is(
    architecture: str, quantization: dict[str, bool], model_folder: Callable[..., Path]
) -> None:
    made = random_base(small(architecture, quantization), FLOAT32, "cpu")
    folder = {"name_or_path": str(model_folder(architecture))}
    loaded = load_model(recipe_from_values({"model": folder, "quantization": quantization}), FLOAT32)

    def parts(model: torch.nn.Module) -> list[tuple[str, str, torch.Size, torch.dtype]]:
        modules = dict(model.named_modules())
        return [
            (name, type(modules[name.rpartition(".")[0]]).__name__, p.shape, p.dtype)
            for name, p in model.named_parameters()
        ]

    assert parts(made) == parts(loaded)
    buffers = dict(made.named_buffers())
    for name, buffer in loaded.named_buffers():
        if "SCB" not in name:
            assert torch.equal(buffers[name], buffer), name
    assert (made.is_loaded_in_4bit, made.is_loaded_in_8bit) == (
        quantization.get("load_in_4bit", False),
        quantization.get("load_in_8bit", False),
    )


@pytest.mark.parametrize("quantization", QUANTISED[:2])
def test_it_trains_by_our_trainer_and_by_trl_s_to_the_same_losses(quantization: dict[str, bool]) -> None:
    recipe = small("llama", quantization)
    found = []
    for stock in (False, True):
        torch.manual_seed(0)
        found.append(train_steps(recipe, FLOAT32, "cpu", stock=stock))
    ours, stock_found = found
    assert len(ours.losses) == measuring.STEPS and min(ours.losses[-2:]) < ours.losses[0]
    assert ours.losses[0] == pytest.approx(stock_found.losses[0], rel=1e-4), "weights of one are plain SFT"
    assert ours.tokens_per_second > 0 and ours.allocated == 0 and not ours.scaled
    assert ours.saved < 4 * planned_bytes(recipe, on_gpu=False)


def test_as_shipped_both_train_on_the_same_rows_whatever_their_split() -> None:
    numbers = small("llama", {}).model_dump()
    numbers["training"] = {"max_length": 32, "eval_strategy": "no"}
    recipe = recipe_from_values(numbers)
    found = []
    for stock in (False, True):
        torch.manual_seed(0)
        found.append(train_steps(recipe, FLOAT32, "cpu", stock=stock, as_shipped=True))
    assert found[0].losses[0] == pytest.approx(found[1].losses[0], rel=1e-4)


def test_the_table_is_markdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [Taken(2**30, speed, [1.0], 1, False) for speed in (90.0, 100.0)]
    line = table_line("8B", "QLoRA", 2**30 + 2**26, *taken)
    assert line == "| 8B | QLoRA | 1.06 | 1.00 | 1.062 | 1.00 | 90 | 0.90 |"
    monkeypatch.setenv(measuring.TABLE, str(tmp_path / "table.md"))
    write_table("a card", [line])
    head, blank, header, rule, row = (tmp_path / "table.md").read_text().splitlines()
    assert (head, blank, header, row) == ("On a card:", "", measuring.HEADER, line)
    assert header.count("|") == rule.count("|") == row.count("|")
