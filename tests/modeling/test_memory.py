"""Memory by the plan is what real modules hold and what a real step needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from sevpeft.errors import ModelError, UnknownModelError
from sevpeft.modeling.adapters import lora_config, trainable_parameters
from sevpeft.modeling.memory import MemoryPlan, state_bytes
from sevpeft.modeling.skeleton import base_config, extension, weightless
from sevpeft.modeling.step_memory import LiveBytes, Rehearsal, Step
from sevpeft.recipe import Recipe, recipe_from_values
from tests.benchmarks.memory import measure_here
from tests.conftest import build_model
from tests.training.children import exit_codes, start

LLAMA = dict(
    model_type="llama",
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
)


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    training = {"max_length": 64, "per_device_train_batch_size": 2, "eval_strategy": "no"}
    return recipe_from_values({**sections, "training": {**training, **sections.get("training", {})}})


def plan_of(recipe: Recipe, on_gpu: bool = True, **numbers: Any) -> MemoryPlan:
    return MemoryPlan(recipe, AutoConfig.for_model(**{**LLAMA, **numbers}), on_gpu=on_gpu, vocabulary_tile=512)


@pytest.mark.parametrize("double", [True, False])
def test_packed_weights_take_what_bitsandbytes_keeps(double: bool, model_folder: Callable[..., Path]) -> None:
    quantised = {"load_in_4bit": True, "bnb_4bit_use_double_quant": double}
    folder = model_folder("llama")
    real = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**quantised, bnb_4bit_quant_type="nf4")
    )
    states = [module.weight for module in real.modules() if type(module).__name__ == "Linear4bit"]
    held = 0
    for weight in states:
        state = weight.quant_state
        held += weight.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    recipe = recipe_of(model={"name_or_path": str(folder)}, quantization=quantised)
    budget = MemoryPlan(recipe, base_config(recipe).config, on_gpu=True, vocabulary_tile=512).budget()
    # Small matrices end in a block that is not full.
    assert budget.items["base model, packed"] == pytest.approx(held, rel=0.02)


def test_the_adapter_is_counted_as_peft_makes_it(model_folder: Callable[..., Path]) -> None:
    recipe = recipe_of(model={"name_or_path": str(model_folder("gpt2"))}, lora={"target_modules": "all-linear", "r": 5})
    config = base_config(recipe).config
    model = AutoModelForCausalLM.from_config(config)
    trainable, total = trainable_parameters(get_peft_model(model, lora_config(recipe, model)))
    plan = MemoryPlan(recipe, config, on_gpu=True, vocabulary_tile=512)
    assert (plan.parameters.trainable, plan.parameters.base) == (trainable, total - trainable)
    items = plan.budget().items
    assert items["adapter"] == items["gradients"] == 4 * trainable
    assert items["optimizer state"] == 8 * trainable


def _measure(folder: Path) -> None:
    (folder / "found").write_text(json.dumps(measure_here("llama-small")), encoding="utf-8")


def test_real_steps_take_what_was_planned(tmp_path: Path) -> None:
    assert exit_codes(start(_measure, tmp_path, str(tmp_path))) == [0]
    found = json.loads((tmp_path / "found").read_text(encoding="utf-8"))
    assert found["planned"] == pytest.approx(found["real"], rel=0.15)


CONV_LAST = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]


def test_dora_unpacks_every_matrix_in_every_pass() -> None:
    """Which stay for the gradient, unless layers are checkpointed: 4 bit then saves next to nothing."""

    def activations(checkpointing: bool, dora: bool, bits: int) -> int:
        sections = {"quantization": {"load_in_4bit": bits == 4}, "lora": {"use_dora": dora, "lora_dropout": 0.1}}
        training = {"gradient_checkpointing": checkpointing, "max_length": 16, "per_device_train_batch_size": 1}
        plan = plan_of(recipe_of(**sections, training=training), intermediate_size=2048)
        items = plan.budget().items
        assert items["adapter"] == 4 * plan.parameters.trainable
        return items["activations"]

    matrices = 6 * 2 * (3 * 128 * 2048 + 2 * 128 * 128 + 2 * 128 * 64)
    plain, dora = activations(False, False, 4), activations(False, True, 4)
    assert dora - plain > matrices
    assert activations(True, True, 4) < dora - matrices / 2
    assert activations(False, True, 16) > plain


def test_a_model_that_asks_for_its_numbers_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * int(hidden.abs().sum() > 0)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    with pytest.raises(UnknownModelError, match=r"A step of llama cannot be run without its numbers \(.*\)\."):
        plan_of(recipe_of()).budget()


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [3]},
        {"target_modules": r".*layers\.[1-3]\..*_proj"},
        {"rank_pattern": {"layers.2.mlp.up_proj": 128}},
        {"target_modules": ["q_proj"], "layers_to_transform": [*range(6)]},
    ],
)
def test_an_adapter_on_some_layers_is_planned_on_all(lora: dict[str, Any]) -> None:
    plan = plan_of(recipe_of(training={"gradient_checkpointing": False}, lora=lora))
    whole = weightless(plan.recipe, plan.config, plan.dtype)
    every = Rehearsal(whole, autocast=torch.bfloat16, on_gpu=True, vocabulary_tile=512).course(Step(2, 64, False))
    items = plan.budget().items
    assert items["activations"] + items["logits tile"] == every.peak


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kinds", [None, CONV_LAST, CONV_LAST[::-1]])
def test_extended_from_few_layers_it_is_what_all_layers_need(checkpointing: bool, kinds: list[str] | None) -> None:
    numbers = {} if kinds is None else {"model_type": "lfm2", "layer_types": kinds, "block_auto_adjust_ff_dim": False}
    plan = plan_of(recipe_of(training={"gradient_checkpointing": checkpointing}), **numbers)
    step = Step(2, 64, checkpointing)
    whole = weightless(plan.recipe, plan.config, plan.dtype)
    every = Rehearsal(whole, autocast=torch.bfloat16, on_gpu=True, vocabulary_tile=512).course(step)
    items = plan.budget().items
    assert items["activations"] + items["logits tile"] == every.peak
    assert max(map(len, plan._rehearsals)) < plan.config.num_hidden_layers, "it was extended, not run whole"


def test_checkpointing_shorter_rows_and_fewer_of_them_need_less() -> None:
    plan = plan_of(recipe_of(training={"gradient_checkpointing": False}))

    def total(**changes: Any) -> int:
        return plan.budget(replace(plan.setting, **changes)).total

    assert total(checkpointing=True) < total()
    assert total(batch=1) < total() < total(batch=3)
    assert total(length=32) < total() < total(length=65)
    assert total(eval_batch=500) > total()


def test_keeping_more_for_the_backward_pass_needs_more() -> None:
    def activations(**kwargs: Any) -> int:
        return plan_of(recipe_of(training=kwargs)).budget().items["activations"]

    all_layers, none = activations(), activations(gradient_checkpointing=False)
    attention = activations(gradient_checkpointing_kwargs={"selective": True})
    # What attention gives out is a hidden state of 2 × 64 tokens in bfloat16, once for each of the 6 layers.
    assert attention - all_layers == pytest.approx(6 * 2 * 64 * 128 * 2, rel=0.2)
    half = activations(gradient_checkpointing_kwargs={"every_n_layers": 2})
    assert 0.4 * none < half < 0.6 * none + all_layers


def test_every_second_layer_is_extended_as_it_would_be_run_whole() -> None:
    plan = plan_of(recipe_of(training={"gradient_checkpointing_kwargs": {"every_n_layers": 2}}))
    whole = Rehearsal(
        weightless(plan.recipe, plan.config, plan.dtype), autocast=torch.bfloat16, on_gpu=True, vocabulary_tile=512
    )
    items = plan.budget().items
    assert items["activations"] + items["logits tile"] == whole.course(Step(2, 64, True, every_n_layers=2)).peak


def test_another_recipe_for_the_same_model_is_planned_as_it_would_be_alone() -> None:
    plan = plan_of(recipe_of(), num_hidden_layers=2)
    first = plan.budget()
    for sections in ({"training": {"gradient_checkpointing": False, "max_length": 32}}, {"lora": {"r": 64}}):
        recipe = recipe_of(**sections)
        assert plan.with_recipe(recipe).budget() == plan_of(recipe, num_hidden_layers=2).budget() != first
    assert plan.budget() == first


def test_eager_attention_is_seen_to_grow_with_the_square_of_the_length() -> None:
    eager = plan_of(recipe_of(model={"name_or_path": "x", "attn_implementation": "eager"}), on_gpu=False)
    fused = plan_of(recipe_of(), on_gpu=False)

    def at(plan: MemoryPlan, length: int) -> int:
        return plan.budget(replace(plan.setting, length=length, batch=1)).items["activations"]

    assert at(fused, 1024) / at(fused, 512) < 2.5
    assert at(eager, 1024) / at(eager, 512) > 3


several = pytest.mark.parametrize(
    ("architecture", "checkpointing", "targets"),
    [
        ("llama", True, "all-linear"),
        ("gpt2", False, "all-linear"),
        ("gemma3_text", True, "all-linear"),
        ("falcon_h1", False, ["q_proj", "in_proj"]),
    ],
)


@several
def test_the_largest_batch_fits_and_one_row_more_does_not(architecture: str, checkpointing: bool, targets: Any) -> None:
    """On both sides of 65 rows, with which the LM head's tile has its full height, told from two others each."""
    training = {"gradient_checkpointing": checkpointing, "eval_strategy": "steps", "per_device_eval_batch_size": 1}
    recipe = recipe_of(training=training, lora={"target_modules": targets})
    plan = MemoryPlan(recipe, build_model(architecture).config, on_gpu=True, vocabulary_tile=512)

    def total(rows: int) -> int:
        return plan.budget(replace(plan.setting, batch=rows, eval_batch=rows)).total

    assert plan.largest_batch(total(1) - 1) == 0
    for rows in (40, 700):
        # Half-way, because the allocator's blocks of 512 bytes make small allocations grow in steps.
        assert plan.largest_batch((total(rows) + total(rows + 1)) // 2) == rows
    assert plan.largest_batch(10**15) == 1024


@several
def test_validation_of_as_many_rows_never_needs_more_than_training(
    architecture: str, checkpointing: bool, targets: Any
) -> None:
    recipe = recipe_of(lora={"target_modules": targets})
    model = weightless(recipe, build_model(architecture).config, torch.bfloat16)
    rehearsal = Rehearsal(model, autocast=torch.bfloat16, on_gpu=True, vocabulary_tile=512)
    for rows in (1, 80):
        validation = rehearsal.course(Step(rows, 64, False, training=False))
        assert validation.peak <= rehearsal.course(Step(rows, 64, checkpointing)).peak


def test_a_cpu_plan_has_no_cuda_and_counts_four_bytes() -> None:
    gpu, cpu = plan_of(recipe_of()).budget().items, plan_of(recipe_of(), on_gpu=False).budget().items
    assert "CUDA context, fragmentation" in gpu and "CUDA context, fragmentation" not in cpu
    assert cpu["base model, 32 bit"] == 2 * gpu["base model, 16 bit"]
    assert cpu["logits tile"] == 2 * 63 * 512 * 4


@pytest.mark.parametrize(
    ("optim", "each"),
    [("adamw_torch", 8), ("adamw_torch_fused", 8), ("paged_adamw_8bit", 2.03), ("sgd", 0), ("paged_lion_8bit", 1.02)],
)
def test_optimizers_keep_what_they_are_known_to_keep(optim: str, each: float) -> None:
    assert state_bytes(optim) == each


def test_all_layers_are_told_from_one_of_each_kind() -> None:
    def kinds(*names: str) -> Any:
        return AutoConfig.for_model(**{**LLAMA, "model_type": "lfm2", "layer_types": list(names)})

    conv, attention = "conv", "full_attention"
    assert extension(AutoConfig.for_model(**LLAMA)) == ([4, 5], [([0], 4)])
    assert extension(kinds(conv, conv, attention, conv, attention, conv)) == ([4, 5], [([0], 3), ([2], 1)])
    assert extension(kinds(conv, conv, attention, conv, conv, conv)) == ([2, 3, 4, 5], [([0], 2)])
    # Where every second is checkpointed, they keep their places.
    assert extension(kinds(*[conv, attention] * 3), 2) == ([0, 1], [([0, 1], 2)])
    assert extension(kinds(*[conv, attention, attention] * 2), 2) == ([*range(6)], [])
    config = kinds(conv, conv, attention, conv, attention, conv)
    model = weightless(recipe_of(), config, torch.float32, layers=[1, 2])
    assert model.config.layer_types == [conv, attention] and len(config.layer_types) == 6


def test_storages_count_while_they_live() -> None:
    held = torch.zeros(1024)
    with LiveBytes([held]) as counted:
        one = torch.ones(1024)  # 4,096 bytes
        two = one + held
        del one
        view = two[:10]
        del two
        assert counted.now == 4096, "a view keeps the whole storage"
        del view
        assert (counted.now, max(counted.course)) == (0, 8192)
        small = torch.ones(1)
        assert counted.now == 512, "the allocator's smallest block"
        del small


@pytest.mark.parametrize("numbers", [{"model_type": "nobody_knows_this"}, {**LLAMA, "hidden_size": "wide"}])
def test_numbers_that_describe_no_model_are_refused_in_a_sentence(numbers: dict[str, Any]) -> None:
    recipe = recipe_of(model={"name_or_path": "nobody/has-this"}, about={"config": numbers})
    with pytest.raises(ModelError, match=r"about\.config of the recipe describes no model"):
        base_config(recipe)


def test_without_numbers_the_reason_is_that_the_model_is_not_there() -> None:
    with pytest.raises(ModelError, match="nobody/has-this"):
        base_config(recipe_of(model={"name_or_path": "nobody/has-this"}))
