"""The vLLM backend hands over the same prompts and ends, against a stand-in with vLLM's interface: vLLM itself is not
installed where these tests run, so its own behaviour is not verified here."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sevpeft.errors import ModelError, RunError
from sevpeft.evaluation import rows as of_rows
from sevpeft.evaluation.evaluate import evaluate
from sevpeft.evaluation.generation import GenerationSettings, generate
from sevpeft.evaluation.switching import AdapterSwitch
from sevpeft.evaluation.vllm_engine import VllmEngine, check_vllm
from sevpeft.recipe import Recipe, load_recipe
from sevpeft.runs import Run

calls: list[dict[str, Any]] = []


class SamplingParams:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings


class LoRARequest:
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
        assert lora_int_id >= 1 and Path(lora_path).is_dir()
        self.lora_name, self.lora_path = lora_name, lora_path


class LLM:
    """Generates with transformers what it is asked for, greedily, and returns outputs shaped like vLLM's."""

    switch: AdapterSwitch

    def __init__(self, **arguments: Any) -> None:
        calls.append(arguments)

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: list[SamplingParams], *, lora_request: Any, use_tqdm: bool
    ) -> list[Any]:
        import torch

        outputs = []
        with LLM.switch.answering("base" if lora_request is None else lora_request.lora_name) as model:
            for prompt, params in zip(prompts, sampling_params, strict=True):
                calls.append(params.settings)
                ids = torch.tensor([prompt["prompt_token_ids"]])
                said: list[int] = []
                while len(said) < params.settings["max_tokens"] and said[-1:] != params.settings["stop_token_ids"]:
                    with torch.no_grad():
                        inputs = torch.cat([ids, torch.tensor([said], dtype=torch.long)], dim=1)
                        said.append(int(model(input_ids=inputs).logits[0, -1].argmax()))
                outputs.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(said))]))
        return outputs


@pytest.fixture
def recipe(run: Run) -> Recipe:
    return load_recipe(run.folder / "recipe.yaml")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, run: Run, recipe: Recipe) -> None:
    calls.clear()
    LLM.switch = AdapterSwitch(recipe, {"adapter": run.adapter})
    package, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.LLM, package.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest  # type: ignore[attr-defined]
    for module in (package, lora, request):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_without_vllm_it_is_refused_in_one_sentence(run: Run) -> None:
    with pytest.raises(RunError, match="vLLM is not installed here; leave --backend vllm out"):
        evaluate(run, backend="vllm")
    assert not (run.folder / "predictions.jsonl").exists()


@pytest.mark.usefixtures("vllm")
def test_it_answers_the_same_prompts_with_the_same_end(run: Run, recipe: Recipe) -> None:
    rows = of_rows.test_rows(recipe)
    settings = GenerationSettings(max_new_tokens=8)
    adapters = {"adapter": run.adapter}
    check_vllm(recipe, adapters)
    engine = VllmEngine(recipe, LLM.switch.prompt, adapters, settings)
    for arm in ("base", "adapter"):
        with LLM.switch.answering(arm) as model:
            expected = {one.id: one for batch in generate(model, LLM.switch.prompt, rows, settings) for one in batch}
        assert {one.id: one for batch in engine.generate(arm, rows) for one in batch} == expected
    assert calls[0]["enable_lora"] and calls[0]["max_lora_rank"] == 16 and calls[0]["generation_config"] == "vllm"
    asked = calls[1]
    assert (asked["temperature"], asked["ignore_eos"], asked["stop_token_ids"]) == (
        0.0,
        True,
        [LLM.switch.prompt.end_id],
    )


@pytest.mark.usefixtures("vllm")
def test_every_row_is_drawn_with_a_seed_of_its_own(run: Run, recipe: Recipe) -> None:
    settings = GenerationSettings(max_new_tokens=2, do_sample=True, top_p=0.9)
    rows = of_rows.test_rows(recipe)
    engine = VllmEngine(recipe, LLM.switch.prompt, {"adapter": run.adapter}, settings)
    list(engine.generate("base", rows))
    asked = calls[1:]
    assert len({one["seed"] for one in asked}) == len(rows) and {one["top_p"] for one in asked} == {0.9}
    assert {(one["temperature"], one["top_k"]) for one in asked} == {(0.7, -1)}


@pytest.mark.usefixtures("vllm")
def test_an_evaluation_with_it_is_not_mixed_with_one_without(run: Run) -> None:
    content = evaluate(run, backend="vllm", limit=4).content
    assert content["generation"]["backend"] == "vllm" and content["scores"]["all"]["rows"] == 4
    with pytest.raises(RunError, match=r'generation.backend is "transformers" and was "vllm"'):
        evaluate(run)


def _with(setting: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.__setitem__(setting, value)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_with("use_dora", True), "uses lora.use_dora, which vLLM does not read"),
        (_with("modules_to_save", ["lm_head"]), "uses lora.modules_to_save"),
        (_with("init_lora_weights", "pissa_niter_4"), "was started with pissa_niter_4"),
    ],
)
def test_an_adapter_that_it_cannot_read_is_refused(
    change: Callable[[dict[str, Any]], None], said: str, run: Run, recipe: Recipe
) -> None:
    file = run.adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config)
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=said):
        check_vllm(recipe, {"adapter": run.adapter})
    quantised = load_recipe(run.folder / "recipe.yaml", ["quantization.load_in_4bit=true"])
    with pytest.raises(ModelError, match="loads the base model unquantised"):
        check_vllm(quantised, {})
