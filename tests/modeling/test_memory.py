"""Memory by the plan is what real modules hold and a real step needs; what is advised where it does not fit, fits."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from sevpeft.errors import ModelError, UnknownModelError
from sevpeft.modeling import compat, memory
from sevpeft.modeling.adapters import lora_config
from sevpeft.modeling.compat import LiveBytes
from sevpeft.modeling.memory import (
    GIB,
    GPUS,
    USABLE,
    MemoryPlan,
    base_config,
    changes,
    epoch_seconds,
    plan_for,
    usable,
    verdicts,
)
from sevpeft.recipe import Recipe, load_recipe, recipe_from_values
from tests.benchmarks.memory import measure_here
from tests.models import build_model
from tests.training.children import exit_codes, start

EIGHT_BILLION = Path(__file__).parent.parent.parent / "recipes" / "llama-3.1-8b.yaml"
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
    training = {"max_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    training |= {"eval_strategy": "no", "per_device_eval_batch_size": 1, "gradient_checkpointing": True}
    training |= sections.get("training", {})
    return recipe_from_values({**sections, "training": training})


def plan_of(recipe: Recipe, on_gpu: bool = True, alone: bool = False, **numbers: Any) -> MemoryPlan:
    """Shares what was run with other tests, if not `alone`."""
    plan, config = MemoryPlan if alone else plan_for, AutoConfig.for_model(**{**LLAMA, **numbers})
    return plan(recipe, config, on_gpu=on_gpu, vocabulary_tile=512)


def _measure(folder: Path) -> None:
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator of the tests has free would be used before more is taken
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
        plan = MemoryPlan(recipe, base_config(recipe)[0], on_gpu=True, vocabulary_tile=512)
        assert plan.parameters.quantized == 2 * sum(weight.nbytes for weight in weights)
        # Small matrices end in a block that is not full.
        assert plan.budget()["base model, quantized"] == pytest.approx(held, rel=0.02)


def test_the_adapter_is_counted_as_peft_makes_it() -> None:
    """Also where the section speaks of layers by their numbers, or the layers are of several kinds."""
    for numbers, lora in (
        ({}, {"modules_to_save": ["embed_tokens"]}),
        ({}, {"target_modules": ["q_proj"], "layers_to_transform": [2]}),
        ({}, {"rank_pattern": {"layers.2.mlp.up_proj": 128}}),
        ({"model_type": "lfm2", "layer_types": CONV_LAST[3:], "block_auto_adjust_ff_dim": False}, {"r": 5}),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4}, {"r": 5}),
    ):
        recipe = recipe_of(lora=lora)
        plan = plan_of(recipe, **{"num_hidden_layers": 3, **numbers})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plan.config)
            adapted = get_peft_model(model, lora_config(recipe, model))
        trainable, total = adapted.get_nb_trainable_parameters()
        assert (plan.parameters.trainable, plan.parameters.base) == (trainable, total - trainable), lora
        assert sum(plan.parameters.targets.values()) == len(adapted.targeted_module_names), lora
        items = plan.budget()
        assert items["adapter"] == items["gradients"] == 4 * trainable
        assert items["optimizer state"] == 8 * trainable


def test_tied_embeddings_are_counted_once() -> None:
    one, two = (plan_of(recipe_of(), tie_word_embeddings=tied).parameters for tied in (True, False))
    assert two.base - one.base == one.embedding == one.head


def test_dora_holds_every_dequantized_matrix_unless_layers_are_checkpointed() -> None:
    def activations(checkpointing: bool, dora: bool, bits: int) -> int:
        sections = {"quantization": {"load_in_4bit": bits == 4}, "lora": {"use_dora": dora, "lora_dropout": 0.1}}
        training = {"gradient_checkpointing": checkpointing, "max_length": 16, "per_device_train_batch_size": 1}
        return plan_of(recipe_of(**sections, training=training), intermediate_size=2048).budget()["activations"]

    matrices = 6 * 2 * (3 * 128 * 2048 + 2 * 128 * 128 + 2 * 128 * 64)
    plain, dora = activations(False, False, 4), activations(False, True, 4)
    assert dora - plain > matrices
    assert activations(True, True, 4) < dora - matrices / 2
    assert activations(False, True, 16) > activations(False, False, 16)


def test_one_layer_of_each_kind_tells_what_all_layers_need() -> None:
    """A section that names every layer by its number is run whole."""
    lfm2 = {"model_type": "lfm2", "block_auto_adjust_ff_dim": False}
    for checkpointing, numbers in (
        (True, {}),
        (False, {}),
        (True, {**lfm2, "layer_types": CONV_LAST[2:]}),
        (False, {"model_type": "gemma2", "head_dim": 32}),
    ):
        training = {"gradient_checkpointing": checkpointing}
        lora = {"target_modules": ["q_proj", "w1"] if "layer_types" in numbers else ["q_proj", "up_proj"]}
        few, whole = (
            plan_of(recipe_of(training=training, lora={**lora, **more}), **{"num_hidden_layers": 4, **numbers})
            for more in ({}, {"layers_to_transform": list(range(4))})
        )
        assert len(few._times) < len(whole._times) == 4
        assert few.parameters == whole.parameters
        for rows in (2, 100):
            assert few.total_of_batch(rows) == pytest.approx(whole.total_of_batch(rows), rel=0.01), numbers


def test_memory_grows_with_the_rows_as_a_run_of_so_many_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture, checkpointing, targets in (
        ("gemma3_text", True, "all-linear"),
        ("lfm2", False, ["q_proj", "in_proj"]),
    ):
        recipe = recipe_of(training={"gradient_checkpointing": checkpointing}, lora={"target_modules": targets})
        config = build_model(architecture).config
        plan = MemoryPlan(recipe, config, on_gpu=True, vocabulary_tile=512)
        with monkeypatch.context() as patch:
            patch.setattr(memory, "_ROWS", 43)  # and what nothing divides below
            patch.setattr(compat, "LiveBytes", lambda held, _, fake: LiveBytes(held, 2**61 - 1, fake))
            direct = MemoryPlan(recipe, config, on_gpu=True, vocabulary_tile=512)
        found = [
            int((each._trace(64, checkpointing, True) @ torch.tensor([1, rows])).max())
            for each, rows in ((plan, 43), (direct, 0))
        ]
        assert found[0] == pytest.approx(found[1], rel=0.02), architecture
        assert plan.largest_batch(plan.total_of_batch(1) - 1) == 0
        assert plan.largest_batch(10**15) == 1024
        for rows in (40, 700):
            assert plan.largest_batch((plan.total_of_batch(rows) + plan.total_of_batch(rows + 1)) // 2) == rows
            assert plan._peak(rows, False, training=False) <= plan._peak(rows, checkpointing)


def test_checkpointing_shorter_rows_and_fewer_of_them_need_less() -> None:
    plan = plan_of(recipe_of(training={"gradient_checkpointing": False}))
    total = sum(plan.budget().values())
    assert sum(plan.budget(checkpointing=True).values()) < total
    assert sum(plan.budget(1).values()) < total < sum(plan.budget(3).values())
    recipes = [recipe_of(training={"gradient_checkpointing": False, "max_length": length}) for length in (32, 65)]
    short, long = (sum(plan.with_recipe(recipe).budget().values()) for recipe in recipes)
    assert short < total < long
    assert plan.total_of_validation(500) > total > plan.total_of_validation(1)


def test_keeping_more_for_the_backward_pass_needs_more() -> None:
    plan = plan_of(recipe_of())

    def activations(**kwargs: Any) -> int:
        return plan.with_recipe(recipe_of(training=kwargs)).budget()["activations"]

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
        assert plan.with_recipe(recipe).budget() == plan_of(recipe, alone=True, num_hidden_layers=2).budget() != first
    assert plan.budget() == first


def test_eager_attention_is_seen_to_grow_with_the_square_of_the_length() -> None:
    for attention, least, most in (("eager", 3, 5), ("sdpa", 1.5, 2.5)):
        recipes = [
            recipe_of(model={"name_or_path": "x", "attn_implementation": attention}, training={"max_length": length})
            for length in (512, 1024)
        ]
        short = plan_of(recipes[0], on_gpu=False)
        growth = short.with_recipe(recipes[1]).budget(1)["activations"] / short.budget(1)["activations"]
        assert least < growth < most


def test_a_cpu_plan_has_no_cuda_and_counts_four_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    gpu, cpu = (plan_of(recipe_of(), on_gpu, alone=True).budget() for on_gpu in (True, False))
    assert "CUDA context, fragmentation" in gpu and "CUDA context, fragmentation" not in cpu
    assert cpu["base model, 32 bit"] == 2 * gpu["base model, 16 bit"]


def test_optimizers_keep_what_they_are_known_to_keep() -> None:
    plan = plan_of(recipe_of())
    sizes = {"adamw_torch_fused": 8, "paged_adamw_8bit": 2.03, "sgd": 0, "paged_lion_8bit": 1.02, "lion_32bit": 4}
    for optim, size in sizes.items():
        items = plan.with_recipe(recipe_of(training={"optim": optim})).budget()
        assert items.get("optimizer state", 0) == pytest.approx(size * plan.parameters.trainable, abs=1), optim


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
        plan_of(recipe_of(), alone=True)  # at once, so that a training can go on without a plan


# What a plan means


@cache  # a plan remembers what it has run
def eight_billion(*settings: str) -> MemoryPlan:
    recipe = load_recipe(EIGHT_BILLION, ["training.gradient_checkpointing=true", *settings])
    config = AutoConfig.for_model(**recipe.about.config)
    return plan_for(recipe, config, on_gpu=True, vocabulary_tile=4096)


def test_an_8b_model_fits_12_gb_in_4_bit_and_wants_more_than_16_in_16() -> None:
    gpus = verdicts(eight_billion())
    assert next(gpu.gb for gpu in gpus if gpu.fits) in (8, 12)
    assert sum(eight_billion("quantization.load_in_4bit=false").budget().values()) > usable(16)
    batches = [gpu.largest_batch for gpu in gpus]
    assert len(batches) == len(GPUS) and batches == sorted(batches) and batches[-1] > 20 * max(batches[0], 1)
    assert changes(eight_billion(), 24) == []


def test_changes_come_in_the_order_of_least_harm_until_it_fits() -> None:
    wasteful = eight_billion(
        "training.gradient_checkpointing=false",
        "training.per_device_train_batch_size=4",
        "training.gradient_accumulation_steps=2",
        "training.optim=adamw_torch",
        "quantization.load_in_4bit=false",
        "training.max_length=2048",
        "training.per_device_eval_batch_size=1",
    )
    advice = changes(wasteful, 12)
    assert [change.fits for change in advice] == [False] * (len(advice) - 1) + [True]
    first = [change.settings[0].split("=")[0].split(".")[1] for change in advice]
    assert first[:2] == ["gradient_checkpointing", "per_device_train_batch_size"]
    assert first.index("load_in_4bit") > first.index("per_device_train_batch_size")
    assert advice[0].settings == ("training.gradient_checkpointing=true",)
    assert advice[1].settings[1] == "training.gradient_accumulation_steps=8", "the same rows a step"
    assert advice[1].settings[0].endswith("_size=1"), "as nothing else would fit yet"
    totals = [sum(wasteful.budget().values()), *(change.total for change in advice)]
    assert totals == sorted(totals, reverse=True) and totals[-1] <= usable(12)


def test_no_more_rows_are_given_up_than_must_be() -> None:
    plan = plan_of(recipe_of())

    def wasteful(checkpointing: bool, batch: int) -> MemoryPlan:
        training = {"gradient_checkpointing": checkpointing, "max_length": 512, "per_device_train_batch_size": batch}
        return plan.with_recipe(recipe_of(training={**training, "gradient_accumulation_steps": 3}))

    for rows, left in ((40, 30), (5, 5)):
        gb = (sum(wasteful(True, rows).budget().values()) + 2**20) / GIB / USABLE
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
    count, speed = plan.parameters, memory.TFLOPS * 1e12 * memory.EFFICIENCY
    blocks = count.base - count.embedding - count.head
    # Rows of length near zero: attention costs nothing, and no token is an answer.
    seconds = epoch_seconds(plan, 1000, 0, 10**9)
    assert seconds == pytest.approx((4 * blocks + 6 * count.trainable) * 1000 / speed, rel=1e-3)
    assert epoch_seconds(plan, 2000, 0, 10**9) == pytest.approx(2 * seconds, rel=1e-3)
    answers = epoch_seconds(plan, 1000, 100, 10**9) - seconds
    assert answers == pytest.approx(6 * count.head * 100 / speed, rel=1e-3)
    again = plan.with_recipe(recipe_of(training={"gradient_checkpointing": True}))
    more = epoch_seconds(again, 1000, 0, 10**9) - seconds
    assert more == pytest.approx(2 * blocks * 1000 / speed, rel=1e-3)


def test_published_speed_lies_near_the_estimate() -> None:
    """LLaMA-Factory: Llama-2-7B in 4 bit, A100, length 1024: 2,295 tokens a second."""
    recipe = load_recipe(EIGHT_BILLION.with_stem("llama-2-7b"), ["training.max_length=1024"])
    plan = plan_for(recipe, AutoConfig.for_model(**recipe.about.config), on_gpu=True, vocabulary_tile=4096)
    seconds = epoch_seconds(plan, 2295 * 100, 2295 * 100, 224)
    assert seconds * memory.TFLOPS / 312 == pytest.approx(100, rel=0.15)
