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
from sevpeft.modeling.memory import DryRun, MemoryPlan, Setting, base_config, extension, state_bytes
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
CONV_LAST = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    training = {"max_length": 64, "per_device_train_batch_size": 2, "eval_strategy": "no"}
    return recipe_from_values({**sections, "training": {**training, **sections.get("training", {})}})


def plan_of(recipe: Recipe, on_gpu: bool = True, **numbers: Any) -> MemoryPlan:
    return MemoryPlan(recipe, AutoConfig.for_model(**{**LLAMA, **numbers}), on_gpu=on_gpu, vocabulary_tile=512)


def run_whole(plan: MemoryPlan, setting: Setting) -> torch.Tensor:
    """Trace of a step through all layers."""
    layers = tuple(range(plan.config.num_hidden_layers))
    return DryRun(plan.recipe, plan.config, plan.dtype, layers, autocast=True).trace(setting)


def _measure(folder: Path) -> None:
    (folder / "found").write_text(json.dumps(measure_here("llama-small")), encoding="utf-8")


def test_real_steps_take_what_was_planned(tmp_path: Path) -> None:
    assert exit_codes(start(_measure, tmp_path, str(tmp_path))) == [0]
    found = json.loads((tmp_path / "found").read_text(encoding="utf-8"))
    assert found["planned"] == pytest.approx(found["real"], rel=0.15)


def test_quantized_weights_take_what_bitsandbytes_keeps(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llama")
    for double in (True, False):
        quantization = {"load_in_4bit": True, "bnb_4bit_use_double_quant": double}
        config = BitsAndBytesConfig(**quantization, bnb_4bit_quant_type="nf4")
        real = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        weights = [module.weight for module in real.modules() if type(module).__name__ == "Linear4bit"]
        held = sum(weight.nbytes + weight.quant_state.absmax.nbytes for weight in weights)
        held += sum(weight.quant_state.state2.absmax.nbytes for weight in weights) if double else 0
        recipe = recipe_of(model={"name_or_path": str(folder)}, quantization=quantization)
        plan = MemoryPlan(recipe, base_config(recipe).config, on_gpu=True, vocabulary_tile=512)
        assert plan.parameters.quantized == 2 * sum(weight.nbytes for weight in weights)
        # Small matrices end in a block that is not full.
        assert plan.budget().items["base model, quantized"] == pytest.approx(held, rel=0.02)


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


def test_tied_embeddings_are_counted_once() -> None:
    one, two = (plan_of(recipe_of(), tie_word_embeddings=tied).parameters for tied in (True, False))
    assert two.base - one.base == one.embedding == one.head and one.blocks == two.blocks


def test_dora_holds_every_dequantized_matrix_unless_layers_are_checkpointed() -> None:
    def activations(checkpointing: bool, dora: bool, bits: int) -> int:
        sections = {"quantization": {"load_in_4bit": bits == 4}, "lora": {"use_dora": dora, "lora_dropout": 0.1}}
        training = {"gradient_checkpointing": checkpointing, "max_length": 16, "per_device_train_batch_size": 1}
        return plan_of(recipe_of(**sections, training=training), intermediate_size=2048).budget().items["activations"]

    matrices = 6 * 2 * (3 * 128 * 2048 + 2 * 128 * 128 + 2 * 128 * 64)
    plain, dora = activations(False, False, 4), activations(False, True, 4)
    assert dora - plain > matrices
    assert activations(True, True, 4) < dora - matrices / 2
    assert activations(False, True, 16) > activations(False, False, 16)


def test_extended_from_few_layers_it_is_what_all_layers_need() -> None:
    lfm2 = {"model_type": "lfm2", "block_auto_adjust_ff_dim": False}
    for checkpointing, numbers in (
        (True, {}),
        (False, {**lfm2, "layer_types": CONV_LAST}),
        (True, {**lfm2, "layer_types": CONV_LAST[::-1]}),
    ):
        plan = plan_of(recipe_of(training={"gradient_checkpointing": checkpointing}), **numbers)
        trace = run_whole(plan, plan.setting)
        assert plan._peak(plan.setting) == max(trace.max(), trace[-1] + plan._head_bytes(plan.setting)[1])
        assert max(map(len, plan._dry_runs)) < plan.config.num_hidden_layers, "it was extended, not run whole"


def test_what_differs_from_layer_to_layer_is_run_whole() -> None:
    for lora in (
        {"target_modules": ["q_proj"], "layers_to_transform": [3]},
        {"target_modules": r".*layers\.[1-3]\..*_proj"},
        {"rank_pattern": {"layers.2.mlp.up_proj": 128}},
    ):
        plan = plan_of(recipe_of(training={"gradient_checkpointing": False}, lora=lora))
        assert plan.parameters.trainable > 0 and {len(layers) for layers in plan._dry_runs} == {6}, lora


def test_checkpointing_shorter_rows_and_fewer_of_them_need_less() -> None:
    plan = plan_of(recipe_of(training={"gradient_checkpointing": False}))

    def total(**changes: Any) -> int:
        return plan.budget(replace(plan.setting, **changes)).total

    assert total(checkpointing=True) < total()
    assert total(batch=1) < total() < total(batch=3)
    assert total(length=32) < total() < total(length=65)
    assert plan.total_of_validation(500) > total()


def test_keeping_more_for_the_backward_pass_needs_more() -> None:
    def activations(**kwargs: Any) -> int:
        return plan_of(recipe_of(training=kwargs)).budget().items["activations"]

    all_layers, none = activations(), activations(gradient_checkpointing=False)
    attention = activations(gradient_checkpointing_kwargs={"selective": True})
    # What attention gives out is a hidden state of 2 × 64 tokens in bfloat16, once for each of the 6 layers.
    assert attention - all_layers == pytest.approx(6 * 2 * 64 * 128 * 2, rel=0.2)
    half = activations(gradient_checkpointing_kwargs={"every_n_layers": 2})
    assert 0.4 * none < half < 0.6 * none + all_layers


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


@pytest.mark.parametrize(
    ("architecture", "checkpointing", "targets"),
    [
        ("llama", True, "all-linear"),
        ("gpt2", False, "all-linear"),
        ("gemma3_text", True, "all-linear"),
        ("falcon_h1", False, ["q_proj", "in_proj"]),
    ],
)
def test_batches_between_two_need_what_lies_between(architecture: str, checkpointing: bool, targets: Any) -> None:
    training = {"gradient_checkpointing": checkpointing}
    recipe = recipe_of(training=training, lora={"target_modules": targets})
    plan = MemoryPlan(recipe, build_model(architecture).config, on_gpu=True, vocabulary_tile=512)
    assert plan.largest_batch(plan.total_of_batch(1) - 1) == 0
    assert plan.largest_batch(10**15) == 1024
    for rows in (40, 700):
        run = plan._dry_run(plan._few_layers).trace(replace(plan.setting, batch=rows))
        between = plan._trace(plan._few_layers, replace(plan.setting, batch=rows))
        assert float(between.max()) == pytest.approx(float(run.max()), rel=0.01)
        # Half-way, because the allocator's blocks of 512 bytes make small allocations grow in steps.
        assert plan.largest_batch((plan.total_of_batch(rows) + plan.total_of_batch(rows + 1)) // 2) == rows
        validation = Setting(rows, 64, False, training=False)
        assert plan._peak(validation) <= plan._peak(replace(plan.setting, batch=rows))


def test_a_cpu_plan_has_no_cuda_and_counts_four_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    gpu, cpu = plan_of(recipe_of()).budget().items, plan_of(recipe_of(), on_gpu=False).budget().items
    assert "CUDA context, fragmentation" in gpu and "CUDA context, fragmentation" not in cpu
    assert cpu["base model, 32 bit"] == 2 * gpu["base model, 16 bit"]
    assert cpu["logits tile"] == 2 * 63 * 512 * 4


def test_optimizers_keep_what_they_are_known_to_keep() -> None:
    expected = {"adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_8bit": 2.03, "sgd": 0, "paged_lion_8bit": 1.02}
    assert {optim: state_bytes(optim) for optim in expected} == expected


def test_all_layers_are_told_from_one_of_each_kind() -> None:
    def kinds(*names: str) -> Any:
        return AutoConfig.for_model(**{**LLAMA, "model_type": "lfm2", "layer_types": list(names)})

    conv, attention = "conv", "full_attention"
    assert extension(AutoConfig.for_model(**LLAMA), alike=True) == ((5,), [((0,), 5)])
    mixed = kinds(conv, conv, attention, conv, attention, conv)
    assert extension(mixed, alike=True) == ((4, 5), [((0,), 3), ((2,), 1)])
    assert extension(kinds(conv, conv, attention, conv, conv, conv), alike=True) == ((2, 3, 4, 5), [((0,), 2)])
    assert extension(mixed, alike=False) == (tuple(range(6)), [])


def test_what_no_plan_can_be_made_of_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for numbers in ({"model_type": "nobody_knows_this"}, {**LLAMA, "hidden_size": "wide"}):
        recipe = recipe_of(model={"name_or_path": "nobody/has-this"}, about={"config": numbers})
        with pytest.raises(UnknownModelError, match=r"about\.config"):
            base_config(recipe)
    with pytest.raises(ModelError, match="nobody/has-this"):
        base_config(recipe_of(model={"name_or_path": "nobody/has-this"}))
    with pytest.raises(UnknownModelError, match=r"training\.max_length"):
        plan_of(recipe_of(training={"max_length": None}))

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * int(hidden.abs().sum() > 0)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    with pytest.raises(UnknownModelError, match="llama"):
        plan_of(recipe_of()).budget()
