"""The trained adapter is the saved one: every initialization and variant, on a plain and on a quantized base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sevpeft.modeling.adapters import lora_config
from sevpeft.modeling.loading import Precision, load_model
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.models import build_tokenizer
from tests.training.test_trainer import adapter_of, make_config, make_rows

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
}
WHOLE_ONLY: dict[str, dict[str, Any]] = {
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "parameters": {"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_proj"], "lora_dropout": 0.0},
}
# What treats a quantized matrix otherwise than a whole one.
QUANTIZED = {
    "nf4": ("plain", "DoRA", "bias of B", "tokens", "saved norm", "replicated layers"),
    "int8": ("plain", "bias of B", "saved norm"),
}


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
        args=make_config(folder / "checkpoints", max_steps=2, learning_rate=1e-3, **options),
        train_dataset=make_rows(),
        processing_class=build_tokenizer(),
        peft_config=lora_config(recipe, model),
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


CASES = [("whole", name) for name in (*VARIANTS, *WHOLE_ONLY)]
CASES += [(base, name) for base, names in QUANTIZED.items() for name in names]


@pytest.mark.parametrize(("base", "variant"), CASES)
def test_a_trained_adapter_gives_the_same_logits_on_a_fresh_base(
    base: str, variant: str, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of({**VARIANTS, **WHOLE_ONLY}[variant], base)
    trainer = trainer_of(recipe, tmp_path)
    before = load_model(recipe, FLOAT32)
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
