"""One base model speaks for every arm: adapters are switched, and the base model stays the base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sevpeft.errors import ModelError, RunError
from sevpeft.evaluation import switching
from sevpeft.evaluation.switching import BASE, AdapterSwitch, check_adapter
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.training.train import train
from tests.evaluation.conftest import QUICKSTART

IDS = torch.arange(20)[None]


def logits(switch: AdapterSwitch, arm: str) -> torch.Tensor:
    with switch.answering(arm) as model, torch.no_grad():
        assert not model.training
        return model(input_ids=IDS).logits[0]


def stronger(run: Run, folder: Path) -> Path:
    """A copy of the run's adapter that says something else."""
    folder.mkdir()
    weights = load_file(run.adapter / "adapter_model.safetensors")
    save_file({name: value + 0.3 for name, value in weights.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((run.adapter / "adapter_config.json").read_bytes())
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that a base model is loaded."""
    counted: list[int] = []
    load = switching._load
    monkeypatch.setattr(switching, "_load", lambda recipe: counted.append(1) or load(recipe))
    return counted


def test_arms_are_switched_and_never_reloaded(run: Run, tmp_path: Path, loads: list[int]) -> None:
    recipe = load_recipe(run.folder / "recipe.yaml")
    other = stronger(run, tmp_path / "other")
    switch = AdapterSwitch(recipe, {"adapter": run.adapter, "other": other})
    found = {arm: logits(switch, arm) for arm in (BASE, "adapter", "other")}
    again = {arm: logits(switch, arm) for arm in ("other", BASE, "adapter")}
    assert all(torch.equal(found[arm], again[arm]) for arm in found) and len(loads) == 1
    assert not torch.equal(found["adapter"], found[BASE]) and not torch.equal(found["adapter"], found["other"])
    alone = AdapterSwitch(recipe, {"other": other})
    assert torch.equal(logits(alone, "other"), found["other"])
    assert torch.equal(logits(AdapterSwitch(recipe, {}), BASE), found[BASE])


@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_an_adapter_that_takes_weights_out_of_the_base_model_is_found_out(
    start: str, run: Run, tmp_path: Path, loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sevpeft.training.train.make_plain", lambda *_: None)  # as other tools save it
    stored = load_recipe(run.folder / "recipe.yaml")
    settings = [
        "data.max_rows=60",
        "training.max_steps=2",
        "training.max_length=256",
        f"lora.init_lora_weights={start}",
    ]
    recipe = load_recipe(QUICKSTART, [f"model.name_or_path={stored.model.name_or_path}", *settings])
    altering = train(recipe, tmp_path / start)
    switch = AdapterSwitch(recipe, {"adapter": run.adapter, "altering": altering.adapter})
    found = {arm: logits(switch, arm) for arm in (BASE, "adapter", "altering")}
    again = {arm: logits(switch, arm) for arm in (BASE, "altering", "adapter")}
    assert len(loads) == 3
    for arm in found:
        assert torch.allclose(found[arm], again[arm], atol=1e-5)
    fresh = AdapterSwitch(stored, {"adapter": run.adapter})
    assert torch.equal(found[BASE], logits(fresh, BASE)) and torch.equal(found["adapter"], logits(fresh, "adapter"))


def test_a_damaged_adapter_is_one_sentence(run: Run) -> None:
    recipe = load_recipe(run.folder / "recipe.yaml")
    file = run.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ModelError, match=r"The adapter in .* is damaged .*; copy it again"):
        logits(AdapterSwitch(recipe, {"adapter": run.adapter}), "adapter")


def test_a_run_without_an_adapter_is_refused(run: Run) -> None:
    check_adapter(run)
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"There is no adapter in .* yet"):
        check_adapter(run)
