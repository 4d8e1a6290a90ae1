"""What is trained is what is saved: every start and every variant of an adapter, on a plain and on a quantised base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sevpeft.errors import ModelError
from sevpeft.modeling.adapters import lora_config, trainable_parameters
from sevpeft.modeling.loading import Precision, load_model
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.training import eva
from sevpeft.training.eva import check_eva, initialize_from_rows
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.conftest import build_tokenizer
from tests.training.test_trainer import adapter_of, assert_equal, make_config, make_rows

FLOAT32 = Precision(torch.float32, bf16=False, fp16=False)
IDS = torch.arange(4, 60)[None]
BASES = {"whole": {}, "nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "bias of B": {"lora_bias": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 4}},
    "tokens": {"trainable_token_indices": [5, 7]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved norm": {"modules_to_save": ["norm"]},
    "one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "EVA": {"init_lora_weights": "eva"},
    "EVA without redistribution": {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
}
WHOLE_ONLY: dict[str, dict[str, Any]] = {
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "parameters": {"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_proj"], "lora_dropout": 0.0},
}
NOT_IN_8_BIT = ("DoRA", "replicated layers")


@pytest.fixture
def recipe_of(model_folder: Callable[..., Path]) -> Callable[..., Recipe]:
    folder = model_folder("llama")

    def make(lora: dict[str, Any], base: str = "whole") -> Recipe:
        return recipe_from_values(
            {"model": {"name_or_path": str(folder)}, "quantization": BASES[base], "lora": {"r": 4, **lora}}
        )

    return make


def trainer_of(recipe: Recipe, folder: Path, **options: Any) -> SeveritySFTTrainer:
    model = load_model(recipe, FLOAT32)
    return SeveritySFTTrainer(
        model=model,
        args=make_config(folder / "checkpoints", max_steps=4, learning_rate=1e-3, **options),
        train_dataset=make_rows(),
        processing_class=build_tokenizer(),
        peft_config=lora_config(recipe, model),
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


CASES = [(base, name) for base in BASES for name in VARIANTS if not (base == "int8" and name in NOT_IN_8_BIT)]


@pytest.mark.parametrize(("base", "variant"), [*CASES, *(("whole", name) for name in WHOLE_ONLY)])
def test_a_trained_adapter_gives_the_same_logits_on_a_fresh_base(
    base: str, variant: str, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of({**VARIANTS, **WHOLE_ONLY}[variant], base)
    trainer = trainer_of(recipe, tmp_path)
    before = load_model(recipe, FLOAT32)
    if variant.startswith("EVA"):
        initialize_from_rows(trainer)
    if variant not in ("replicated layers", "tokens", "saved embedding"):
        assert torch.allclose(logits(trainer.model), logits(before), atol=1e-5), "it starts as the base model"
    start = adapter_of(trainer)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert any(not torch.equal(start[name], value) for name, value in adapter_of(trainer).items())
    expected = logits(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    read = PeftModel.from_pretrained(load_model(recipe, FLOAT32), tmp_path / "adapter")
    assert float((expected - logits(before)).abs().max()) > 1e-3
    assert torch.allclose(logits(read), expected, atol=2e-6)
    with read.disable_adapter():
        if variant != "replicated layers":
            assert torch.allclose(logits(read), logits(before), atol=2e-6), "the base below it is the plain one"
    if variant not in ("tokens", "saved embedding"):
        held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert not [name for name in held if "embed" in name or "lm_head" in name]
    assert trainer.model.get_base_model().get_input_embeddings().weight.shape[0] == before.config.vocab_size


@pytest.mark.parametrize("base", ["whole", "nf4"])
def test_eva_repeats_leaves_the_random_numbers_alone_and_resumes_to_the_bit(
    base: str, recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of({"init_lora_weights": "eva", "lora_dropout": 0.1}, base)
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(recipe, tmp_path, **saving)
    state = torch.get_rng_state()
    initialize_from_rows(whole)
    assert torch.equal(state, torch.get_rng_state())
    ranks = whole.model.peft_config["default"].rank_pattern
    assert ranks and max(ranks.values()) <= 8
    start = adapter_of(whole)
    another = trainer_of(recipe, tmp_path)
    initialize_from_rows(another)
    assert_equal(start, adapter_of(another))
    whole.train()
    resumed = trainer_of(recipe, tmp_path, **saving)
    checkpoint = str(tmp_path / "checkpoints" / "checkpoint-2")
    monkeypatch.setattr(eva, "_directions", lambda _: pytest.fail("read the rows again"))
    initialize_from_rows(resumed, checkpoint)
    assert resumed.model.peft_config["default"].rank_pattern == ranks
    assert trainable_parameters(resumed.model) == trainable_parameters(whole.model)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_equal(adapter_of(whole), adapter_of(resumed))


def test_eva_starts_in_the_directions_of_the_training_rows(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = recipe_of({"init_lora_weights": "eva", "target_modules": ["q_proj"], "eva_config": {"rho": 1.0}})
    trainer = trainer_of(recipe, tmp_path)
    initialize_from_rows(trainer)
    a = {n: p for n, p in adapter_of(trainer).items() if "lora_A" in n}
    assert len(a) == 2
    for matrix in a.values():
        assert torch.allclose(matrix @ matrix.T, torch.eye(4), atol=1e-4), "orthonormal"
    rows = trainer.train_dataset
    trainer.train_dataset = make_rows(seed=9)
    initialize_from_rows(trainer)
    assert any(not torch.allclose(p, a[n]) for n, p in adapter_of(trainer).items() if "lora_A" in n)
    trainer.train_dataset = rows.select(range(1))
    with pytest.raises(ModelError, match=r"answer tokens than the highest rank.*lower lora\.r, or use true"):
        initialize_from_rows(trainer)


def test_eva_that_never_settles_is_stopped(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eva, "MOST_EVA_BATCHES", 2)
    recipe = recipe_of({"init_lora_weights": "eva", "eva_config": {"tau": 1.0}})
    with pytest.raises(ModelError, match=r"not settled after 2 batches; lower lora\.eva_config\.tau"):
        initialize_from_rows(trainer_of(recipe, tmp_path))


def test_eva_needs_the_whole_model(recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    check_eva(recipe_of({"init_lora_weights": "eva"}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ModelError, match="use true or gaussian"):
        check_eva(recipe_of({"init_lora_weights": "eva"}))
    check_eva(recipe_of({}))
