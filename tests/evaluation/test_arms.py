"""One base model answers for both arms: the adapter is switched, and the base model stays the base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sevpeft.errors import ModelError, RunError, UsageError
from sevpeft.evaluation import arms as module
from sevpeft.evaluation.arms import (
    ADAPTER,
    BASE,
    AdapterSwitch,
    check_adapter,
    differences,
    experiments,
    parse_arms,
    parse_seeds,
)
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from tests.evaluation.conftest import QUICKSTART

IDS = torch.arange(20)[None]


def logits(switch: AdapterSwitch, arm: str) -> torch.Tensor:
    with switch.activate(arm) as model, torch.no_grad():
        assert not model.training
        return model(input_ids=IDS).logits[0]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that a base model is loaded."""
    counted: list[int] = []
    load = module.load_for_inference
    monkeypatch.setattr(module, "load_for_inference", lambda recipe: counted.append(1) or load(recipe))
    return counted


def test_arms_are_switched_and_never_reloaded(run: Run, loads: list[int]) -> None:
    recipe = load_recipe(run.folder / "recipe.yaml")
    found = {}
    for order in ((ADAPTER, BASE), (BASE, ADAPTER)):
        switch = AdapterSwitch(recipe, run.adapter)
        for arm in (*order, *order):
            assert torch.equal(logits(switch, arm), found.setdefault(arm, logits(switch, arm))), (order, arm)
    assert len(loads) == 2 and not torch.equal(found[ADAPTER], found[BASE])


def test_an_adapter_that_changes_the_base_weights_is_noticed(
    run: Run, loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(run.folder / "recipe.yaml")
    base = logits(AdapterSwitch(recipe, run.adapter), BASE)
    attach = module.attach_adapter

    def altering(model: torch.nn.Module, *rest: object) -> torch.nn.Module:  # as PiSSA and OLoRA do
        attached = attach(model, *rest)
        with torch.no_grad():
            attached.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.mul_(1.01)
        return attached

    monkeypatch.setattr(module, "attach_adapter", altering)
    loads.clear()
    switch = AdapterSwitch(recipe, run.adapter)
    adapter = logits(switch, ADAPTER)
    assert torch.equal(logits(switch, BASE), base) and torch.equal(logits(switch, ADAPTER), adapter)
    assert len(loads) == 2


def test_an_adapter_that_is_damaged_or_absent_is_refused(run: Run) -> None:
    check_adapter(run)
    file = run.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ModelError, match="damaged"):
        logits(AdapterSwitch(load_recipe(run.folder / "recipe.yaml"), run.adapter), ADAPTER)
    file.unlink()
    with pytest.raises(RunError, match="--resume"):
        check_adapter(run)


def test_arms_and_seeds_are_read_or_refused() -> None:
    assert parse_arms("ce, balanced,ce") == ("ce", "balanced") and parse_seeds("0, 12") == (0, 12)
    for read, text in (
        (parse_arms, "ce,balance"),
        (parse_arms, "base"),
        (parse_arms, ""),
        (parse_seeds, ""),
        (parse_seeds, "1,1"),
        (parse_seeds, "-1"),
        (parse_seeds, "1.5"),
        (parse_seeds, str(2**32)),
    ):
        with pytest.raises(UsageError):
            print(read(text))


def test_what_would_differ_in_more_than_the_weights_is_refused(tmp_path: Path, run: Run) -> None:
    for settings, output, arms, kind in (
        (["severity.control=shuffled"], tmp_path, ["ce"], UsageError),
        (["training.load_best_model_at_end=true"], tmp_path, ["ce"], UsageError),
        (["severity.weights=mild"], tmp_path, ["own", "mild"], UsageError),
        ([], run.folder, ["ce"], RunError),
    ):
        with pytest.raises(kind):
            print(experiments([QUICKSTART], settings, arms, output))
    with pytest.raises(UsageError, match="rename"):
        experiments([QUICKSTART, QUICKSTART], [], ["ce"], tmp_path)


def test_what_differs_is_named_by_its_path() -> None:
    stored = {"a": {"b": 1, "c": 2}, "text": "س" * 60}
    now = {"a": {"b": 1, "c": 3, "d": 4}, "text": "ص" * 60}
    assert differences(stored, now) == ["a.c is 3 and was 2", "a.d is 4 and was null", "text is another"]
