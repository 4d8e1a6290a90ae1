"""The output of `plan` on memory and time fits 80 columns."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sevpeft.modeling.memory import GIB, Change, usable
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.training import plan as module
from sevpeft.training import screen
from sevpeft.training.plan import Fitting, fitting
from sevpeft.training.resolve import resolve_split
from sevpeft.training.screen import run_summary, show_fitting, show_machine
from tests.modeling.test_memory import eight_billion as eight_billion_plan

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
    assert all(name in text for name in eight_billion.budget)


@pytest.mark.parametrize(("gb", "fits"), [(12, True), (4, False)])
def test_what_does_not_fit_is_told_with_what_to_change(gb: int, fits: bool, eight_billion: Fitting) -> None:
    advised = [Change(("quantization.load_in_4bit=true",), "QLoRA", round(7.4 * GIB), fits)]
    text = " ".join(shown(dataclasses.replace(eight_billion, vram=1.0, changes=advised)).split())
    assert "does not fit in 1 GB" in text and "quantization.load_in_4bit=true 7.4 GiB then" in text
    assert (": fits; QLoRA" in text) == fits
    assert ("a larger GPU" in text) != fits


def test_a_plan_in_4_bit_says_what_the_adapter_belongs_to(eight_billion: Fitting) -> None:
    assert eight_billion.bits == 4 and "sevpeft merge" in shown(eight_billion)
    assert "sevpeft merge" not in shown(dataclasses.replace(eight_billion, bits=None))


def test_the_plan_is_json(eight_billion: Fitting) -> None:
    found = json.loads(json.dumps(eight_billion.as_dict()))
    assert found["bytes"]["total"] == sum(size for name, size in found["bytes"].items() if name != "total")
    assert found["parameters"]["base"] == 8_030_261_248 and found["fits"] and found["vram"] == 24


def test_a_real_plan_chooses_the_split_by_the_size_of_the_gpu(eight_billion: Fitting) -> None:
    plan, recipe = eight_billion_plan(), load_recipe(RECIPES / "llama-3.1-8b.yaml")
    found = {}
    for gb in (12, 24, 80):
        settings = resolve_split(recipe, plan, usable(gb)).training.settings()
        chosen = settings["per_device_train_batch_size"], settings["gradient_checkpointing"]
        assert plan.total_of_batch(*chosen) <= usable(gb)
        found[gb] = chosen
    assert found[12][0] <= found[24][0] <= found[80][0] == 8 and found[12][1] and not found[80][1], found


def test_a_machine_that_is_too_small_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "split_here", lambda recipe: recipe)
    monkeypatch.setattr(screen, "device_memory", lambda recipe: 8 * GIB)

    def printed(needed: int, name: str) -> str:
        console, plan = Console(file=io.StringIO(), width=80), SimpleNamespace(total=needed)
        monkeypatch.setattr(screen, "memory_plan", lambda recipe, on_gpu: (plan, ""))
        show_machine(load_recipe(RECIPES / f"{name}.yaml", ["training.use_cpu=true"]), console)
        return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]

    small, large = printed(1 * GIB, "quickstart"), printed(16 * GIB, "llama-3.1-8b")
    assert "CPU, 1.0 GiB of the 8.0" in small and ";" not in small
    assert "too much" in large and "hours an epoch" in large


def test_a_tokenizer_that_lacks_letters_of_the_data_is_warned_about() -> None:
    def printed(share: float) -> str:
        encoding = {"train": {"shortened": 0, "refused": 0, "unknown_token_share": share}}
        summary = {"source": "x.csv", "columns": {}, "split_by": "random", "rows": {}, "rejected": {}, "severity": None}
        console = Console(file=io.StringIO(), width=80)
        recipe = load_recipe(RECIPES / "quickstart.yaml")
        weights: Any = None
        screen.show_data(summary | {"questions_in_two_splits": 0, "encoding": encoding}, weights, recipe, console)
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    assert "2.0% of the tokens of train rows" in printed(0.02) and "tokenizer" not in printed(0.001)


def test_the_hours_of_an_epoch_are_told_for_a_gpu_and_for_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "show_data", lambda *_: None)
    monkeypatch.setattr(screen, "_cpu_tflops", lambda dtype: 0.5)
    recipe, console = load_recipe(RECIPES / "quickstart.yaml"), Console(file=io.StringIO(), width=80)
    known = {"recipe": recipe, "data": {}, "weights": None, "tokens": 1000, "epoch_seconds": 3600.0}
    plan = SimpleNamespace(**known, steps=None, unknown=None, memory_unknown=None, fitting=None)
    screen.show_plan(plan, console)  # type: ignore[arg-type]
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "about 60 min an epoch of 1,000 tokens, at 30% of the 165 TFLOP/s" in shown
    assert "about 282.9 h an epoch of 1,000 tokens, at 35% of the 0.5 TFLOP/s" in shown  # 3600 · 165 · .3 / (.5 · .35)


def test_a_severity_without_validation_rows_is_said_to_have_none(tmp_path: Path) -> None:
    run, losses = Run(tmp_path), {"loss": 2.0, "loss_neutral": 2.0}
    model = {"name_or_path": "x", "model_type": "llama", "dtype": "float32", "bits": None}
    weights = {"severities": {"critical": 3, "neutral": 4}, "consultations": 7, "effective_sample_size": 7}
    weights |= {"minimum": 1, "maximum": 1, "mean": 1}
    run.update_metrics(
        model=model | {"parameters": 1, "trainable_parameters": 1}, weights=weights, before=losses, after=losses
    )
    run.update_metrics(
        data={"encoding": {"train": {"answer_tokens": 9}}}, training={"steps": 1, "epochs": 1, "seconds": 1}
    )
    console = Console(file=io.StringIO(), width=60)
    console.print(run_summary(run))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"critical +no rows", shown) and not re.search(r"neutral +no rows", shown)
