"""What `plan` says of memory can be read in 80 columns, and `train` asks it before a hopeless start."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from sevpeft.errors import RunError
from sevpeft.modeling.gpus import Change
from sevpeft.modeling.memory import GIB
from sevpeft.recipe import load_recipe
from sevpeft.training import plan as module
from sevpeft.training import resolve, screen
from sevpeft.training.plan import Fitting, fitting
from sevpeft.training.screen import show_fitting, show_time
from tests.modeling.test_gpus import eight_billion as eight_billion_plan

RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.fixture(scope="module")
def eight_billion() -> Fitting:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "memory_plan", lambda recipe: (eight_billion_plan(), "the recipe"))
        return fitting(load_recipe(RECIPES / "llama-3.1-8b.yaml"), 24)[0]


def shown(found: Fitting) -> str:
    console = Console(file=io.StringIO(), width=80)
    show_fitting(found, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_bar_cards_and_verdict_fit_80_columns(eight_billion: Fitting) -> None:
    text = shown(eight_billion)
    assert max(map(len, text.splitlines())) <= 80
    assert "8,030,261,248 frozen" in text and "the recipe" in text and "fits in 24 GB" in text
    assert all(f" {gb} GB" in text for gb in (8, 12, 16, 24, 48, 80))


def test_every_item_has_its_part_of_the_bar(eight_billion: Fitting) -> None:
    lines = shown(eight_billion).splitlines()
    bar = next(line for line in lines if line.strip() and set(line.strip()) <= set("█▓▒░▞▚▖▘"))
    assert len(bar.strip()) == screen.BAR_WIDTH and len(set(bar.strip())) == len(eight_billion.budget.items)


@pytest.mark.parametrize(("gb", "fits"), [(12, True), (4, False)])
def test_what_does_not_fit_is_told_with_what_to_change(gb: int, fits: bool, eight_billion: Fitting) -> None:
    advised = [Change(("quantization.load_in_4bit=true",), "QLoRA", round(7.4 * GIB), fits)]
    text = " ".join(shown(dataclasses.replace(eight_billion, vram=1.0, changes=advised)).split())
    assert "does not fit in 1 GB" in text and "quantization.load_in_4bit=true 7.4 GiB then" in text
    assert (": fits; QLoRA" in text) == fits
    assert ("choose a smaller base model, or a larger GPU" in text) != fits


def test_a_plan_in_4_bit_says_what_the_adapter_belongs_to(eight_billion: Fitting) -> None:
    assert eight_billion.bits == 4 and "sevpeft merge" in shown(eight_billion)
    assert "sevpeft merge" not in shown(dataclasses.replace(eight_billion, bits=None))


def test_the_plan_is_json(eight_billion: Fitting) -> None:
    found = json.loads(json.dumps(eight_billion.as_dict()))
    assert found["bytes"]["total"] == sum(size for name, size in found["bytes"].items() if name != "total")
    assert found["parameters"]["base"] == 8_030_261_248 and found["fits"] and found["vram"] == 24


@pytest.mark.parametrize(("seconds", "told"), [(20, "1 min"), (1800, "30 min"), (7200, "2.0 h")])
def test_time_is_told_with_what_it_assumes(seconds: float, told: str) -> None:
    console = Console(file=io.StringIO(), width=80)
    show_time(seconds, 12_345, None, console, 165.0, 0.3)
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert f"about {told} an epoch of 12,345 tokens" in text and "30% assumed of 165 TFLOP/s (an RTX 4090)" in text


def test_tokens_that_could_not_be_counted_are_said_to() -> None:
    console = Console(file=io.StringIO(), width=80)
    show_time(600, 12_345, 2.2, console, 165.0, 0.3)
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "10 min an epoch of 12,345 tokens (not counted: 2.2 letters assumed for each), at 30%" in text


def test_training_refuses_what_the_whole_gpu_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(total_memory=24 * GIB)
    monkeypatch.setattr(resolve, "uses_gpu", lambda recipe: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(resolve, "memory_plan", lambda recipe, on_gpu: (eight_billion_plan(), "the recipe"))
    recipe = load_recipe(RECIPES / "llama-3.1-8b.yaml")
    assert not resolve.is_automatic(resolve.split_here(recipe, check_fit=True))
    gpu.total_memory = 4 * GIB
    with pytest.raises(RunError, match=r"this GPU has 4\.0; (add|choose)"):
        resolve.split_here(recipe, check_fit=True)
