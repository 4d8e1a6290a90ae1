"""Training on a quantized base model: what changes and what does not.

`prepare_model_for_kbit_training`, which PEFT's documentation asks for, would copy norms, embeddings and the head to
float32. TRL 1.16 does not call it. What is needed of it is pinned here: the base frozen, inputs that carry gradients,
checkpointing that is not reentrant; and what is not: one byte of the base model in another format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sevpeft.modeling.adapters import lora_config
from sevpeft.modeling.loading import Precision, load_config, load_model
from sevpeft.modeling.memory import MemoryPlan
from sevpeft.recipe import Recipe, load_recipe, recipe_from_values
from sevpeft.training.resolve import memory_plan
from sevpeft.training.train import train
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.models import build_tokenizer
from tests.training.test_trainer import adapter_of, batch_loss, losses_of, make_config, make_rows, make_trainer

ROOT = Path(__file__).parent.parent.parent
BFLOAT16 = Precision(torch.bfloat16, bf16=True, fp16=False)
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {"gradient_checkpointing": False},
    "default": {"gradient_checkpointing": True},
    "selective": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
    "every second layer": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.fixture
def recipe(model_folder: Callable[..., Path]) -> Recipe:
    return recipe_from_values(
        {
            "model": {"name_or_path": str(model_folder("llama")), "dtype": "bfloat16"},
            "quantization": {"load_in_4bit": True},
            "lora": {"r": 4},
        }
    )


def trainer_of(recipe: Recipe, precision: Precision, folder: Path, **options: Any) -> SeveritySFTTrainer:
    model = load_model(recipe, precision)
    return SeveritySFTTrainer(
        model=model,
        args=make_config(folder, **options),
        train_dataset=make_rows(),
        processing_class=build_tokenizer(),
        peft_config=lora_config(recipe, model),
    )


def base_of(trainer: SeveritySFTTrainer) -> dict[str, torch.Tensor]:
    return {name: p for name, p in trainer.model.named_parameters() if not p.requires_grad}


def test_the_base_keeps_its_formats_and_its_bytes_and_only_the_adapter_moves(recipe: Recipe, tmp_path: Path) -> None:
    loaded = {p.data_ptr(): (p.dtype, p.detach().clone()) for p in load_model(recipe, BFLOAT16).parameters()}
    formats = sorted((str(dtype), value.shape) for dtype, value in loaded.values())
    trainer = trainer_of(recipe, BFLOAT16, tmp_path, gradient_checkpointing=True, bf16=True)
    before = {name: p.detach().clone() for name, p in base_of(trainer).items()}
    assert sorted((str(p.dtype), p.shape) for p in before.values()) == formats
    assert {p.dtype for p in before.values()} == {torch.uint8, torch.bfloat16}
    trainer.train()
    for name, p in base_of(trainer).items():
        assert p.grad is None and p.dtype == before[name].dtype and torch.equal(p, before[name]), name
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {state.dtype for states in trainer.optimizer.state.values() for state in states.values()} == {torch.float32}


def test_the_base_takes_what_the_plan_counts(recipe: Recipe, tmp_path: Path) -> None:
    trainer = trainer_of(recipe, BFLOAT16, tmp_path)
    items = MemoryPlan(recipe, load_config(recipe), on_gpu=True, vocabulary_tile=512).budget()
    packed = sum(p.nbytes for p in base_of(trainer).values() if p.dtype == torch.uint8)
    whole = sum(p.nbytes for p in base_of(trainer).values() if p.dtype != torch.uint8)
    assert items["base model, 16 bit"] == whole
    assert packed < items["base model, quantized"] < 1.1 * packed, "the scales come on top"
    assert items["adapter"] == sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)


def test_checkpointing_is_not_reentrant_unless_asked_to_be(recipe: Recipe, tmp_path: Path) -> None:
    for how, reentrant in (("default", False), ("selective", False), ("reentrant", True)):
        trainer = trainer_of(recipe, BFLOAT16, tmp_path, max_steps=1, bf16=True, **CHECKPOINTING[how])
        trainer.train()
        layers = trainer.model.get_base_model().model.layers
        for layer in layers:
            assert layer.gradient_checkpointing
            assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant
            assert ("context_fn" in layer._gradient_checkpointing_func.keywords) == (how == "selective")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "lfm2"])
def test_however_activations_are_kept_the_training_is_the_same(architecture: str, tmp_path: Path) -> None:
    found = {}
    for how, options in CHECKPOINTING.items():
        trainer = make_trainer(tmp_path, make_rows(), architecture, lora_dropout=0.1, max_steps=2, **options)
        trainer.train()
        found[how] = losses_of(trainer), adapter_of(trainer)
    losses, adapter = found["none"]
    for how, (others, other) in found.items():
        assert others == pytest.approx(losses, rel=1e-6), how
        for name, value in adapter.items():
            assert torch.allclose(value, other[name], atol=1e-5), (how, name)


def test_every_second_layer_is_checkpointed_when_asked(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_rows(), max_steps=1, **CHECKPOINTING["every second layer"])
    trainer.train()
    assert [layer.gradient_checkpointing for layer in trainer.model.get_base_model().model.layers] == [True, False]


def test_float16_with_a_scaler_trains_an_adapter_in_float32(recipe: Recipe, tmp_path: Path) -> None:
    """As on a T4, where accelerate does the same with the scaler of CUDA: it refuses float16 on a CPU."""
    half = Precision(torch.float16, bf16=False, fp16=True)
    chosen = recipe_from_values({**recipe.model_dump(), "model": {**recipe.model.model_dump(), "dtype": "float16"}})
    trainer = trainer_of(chosen, half, tmp_path, gradient_checkpointing=True)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = adapter_of(trainer)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.float16):
            loss = batch_loss(trainer, make_rows(4))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)) > 0
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert scaler.get_scale() == 2.0**10, "no step was left out"
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]
    assert all(not torch.equal(before[name], value) for name, value in adapter_of(trainer).items())
    for parameter in parameters:
        parameter.data = parameter.data.half()
    with torch.autocast("cpu", torch.float16):
        loss = batch_loss(trainer, make_rows(4))
    scaler.scale(loss).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)  # what TRL's own bfloat16 or float16 adapters would run into


# What a checkpoint holds


def test_a_checkpoint_holds_adapter_and_optimizer_and_nothing_of_the_base(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Matrices of fewer than 4,096 numbers have their state in 32 bits in bitsandbytes too: 8 bytes a parameter."""
    folder = model_folder("llama")
    settings = [
        f"model.name_or_path={folder}",
        "quantization.load_in_4bit=true",
        "training.optim=paged_adamw_8bit",
        "training.per_device_train_batch_size=8",
        "training.gradient_accumulation_steps=1",
        "training.per_device_eval_batch_size=8",
        "training.gradient_checkpointing=false",
        "training.eval_strategy=no",
        "training.max_steps=2",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "training.save_total_limit=1",
        "training.max_length=160",
        "data.max_rows=60",
    ]
    run = train(load_recipe(ROOT / "recipes" / "quickstart.yaml", settings), tmp_path / "run")
    trainable = run.metrics()["model"]["trainable_parameters"]
    checkpoint = run.checkpoints / "checkpoint-2"
    tokenizer = sum((folder / name).stat().st_size for name in ("tokenizer.json", "tokenizer_config.json"))
    held = sum(file.stat().st_size for file in checkpoint.iterdir())
    fixed = 150_000  # names, shapes, random states, logs and the card
    assert 12 * trainable < held < 12 * trainable + tokenizer + fixed
    for adapter in (checkpoint, run.adapter):
        with safe_open(adapter / "adapter_model.safetensors", "pt") as opened:
            assert all(".lora_A." in name or ".lora_B." in name for name in opened.keys())  # noqa: SIM118
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) == 4 * trainable  # noqa: SIM118


@pytest.mark.parametrize("name", ["qwen3-8b", "llama-3.1-8b"])
def test_an_adapter_of_an_8b_model_is_a_hundredth_of_its_base(name: str) -> None:
    plan, _ = memory_plan(load_recipe(ROOT / "recipes" / f"{name}.yaml", []))
    saved = 4 * plan.parameters.trainable
    assert saved < 0.012 * 2 * plan.parameters.base
    assert saved < 200e6
