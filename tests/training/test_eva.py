"""What is trained is what is saved: every start and every variant of an adapter, on a plain and on a quantised base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import loftq_utils
from safetensors.torch import load_file

from sevpeft.errors import ModelError, RunError
from sevpeft.modeling import loading
from sevpeft.modeling.adapters import lora_config, trainable_parameters
from sevpeft.modeling.loading import Precision, load_model
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.runs import Run
from sevpeft.training import initialisation
from sevpeft.training.eva import make_plain, refuse_start, start_adapter
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
    "PiSSA": {"init_lora_weights": "pissa"},
    "fast PiSSA": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "OLoRA": {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 2}},
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
    run = Run(tmp_path)
    trainer = trainer_of(recipe, tmp_path)
    before = load_model(recipe, FLOAT32)
    start_adapter(trainer, recipe, run)
    if variant not in ("replicated layers", "tokens", "saved embedding"):
        assert torch.allclose(logits(trainer.model), logits(before), atol=1e-5), "it starts as the base model"
    start = adapter_of(trainer)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert any(not torch.equal(start[name], value) for name, value in adapter_of(trainer).items())
    expected = logits(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    make_plain(trainer, run, tmp_path / "adapter")
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


def test_a_start_that_changes_the_base_is_saved_as_a_plain_adapter(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of({"init_lora_weights": "pissa_niter_4"})
    trainer = trainer_of(recipe, tmp_path)
    start_adapter(trainer, recipe, Run(tmp_path))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    make_plain(trainer, Run(tmp_path), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 8, 64)


def test_another_division_of_the_base_is_not_gone_on_with(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, run = recipe_of({"init_lora_weights": "pissa"}), Run(tmp_path)
    start_adapter(trainer_of(recipe, tmp_path), recipe, run)
    again = trainer_of(recipe, tmp_path)
    start_adapter(again, recipe, run, checkpoint="checkpoint-1")
    with torch.no_grad():
        next(p for n, p in again.model.named_parameters() if "lora_B" in n).mul_(1.1)
    with pytest.raises(RunError, match="divided the base weights otherwise; resume it there, or start another run"):
        start_adapter(again, recipe, run, checkpoint="checkpoint-1")


@pytest.mark.parametrize("base", ["whole", "nf4"])
def test_eva_repeats_leaves_the_random_numbers_alone_and_resumes_to_the_bit(
    base: str, recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = recipe_of({"init_lora_weights": "eva", "lora_dropout": 0.1}, base), Run(tmp_path)
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(recipe, tmp_path, **saving)
    state = torch.get_rng_state()
    start_adapter(whole, recipe, run)
    assert torch.equal(state, torch.get_rng_state())
    ranks = whole.model.peft_config["default"].rank_pattern
    assert ranks and max(ranks.values()) <= 8
    start = adapter_of(whole)
    another = trainer_of(recipe, tmp_path)
    start_adapter(another, recipe, run)
    assert_equal(start, adapter_of(another))
    whole.train()
    resumed = trainer_of(recipe, tmp_path, **saving)
    checkpoint = str(tmp_path / "checkpoints" / "checkpoint-2")
    monkeypatch.setattr(initialisation, "_directions", lambda _: pytest.fail("read the rows again"))
    start_adapter(resumed, recipe, run, checkpoint)
    assert resumed.model.peft_config["default"].rank_pattern == ranks
    assert trainable_parameters(resumed.model) == trainable_parameters(whole.model)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_equal(adapter_of(whole), adapter_of(resumed))


def test_eva_starts_in_the_directions_of_the_training_rows(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = recipe_of({"init_lora_weights": "eva", "target_modules": ["q_proj"], "eva_config": {"rho": 1.0}})
    trainer = trainer_of(recipe, tmp_path)
    start_adapter(trainer, recipe, Run(tmp_path))
    a = {n: p for n, p in adapter_of(trainer).items() if "lora_A" in n}
    assert len(a) == 2
    for matrix in a.values():
        assert torch.allclose(matrix @ matrix.T, torch.eye(4), atol=1e-4), "orthonormal"
    rows = trainer.train_dataset
    trainer.train_dataset = make_rows(seed=9)
    start_adapter(trainer, recipe, Run(tmp_path))
    assert any(not torch.allclose(p, a[n]) for n, p in adapter_of(trainer).items() if "lora_A" in n)
    trainer.train_dataset = rows.select(range(1))
    with pytest.raises(ModelError, match=r"answer tokens than the highest rank.*lower lora\.r, or use true"):
        start_adapter(trainer, recipe_of({"init_lora_weights": "eva"}), Run(tmp_path))


def test_eva_that_never_settles_is_stopped(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialisation, "MOST_EVA_BATCHES", 2)
    recipe = recipe_of({"init_lora_weights": "eva", "eva_config": {"tau": 1.0}})
    with pytest.raises(ModelError, match=r"not settled after 2 batches; lower lora\.eva_config\.tau"):
        start_adapter(trainer_of(recipe, tmp_path), recipe, Run(tmp_path))


def test_loftq_starts_nearer_to_the_whole_weights(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT names its device "cuda"; here that is the CPU."""
    to = torch.Tensor.to

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(self, *args, **{k: "cpu" if v == "cuda" else v for k, v in kwargs.items()})

    recipe = recipe_of({"init_lora_weights": "loftq", "r": 16, "lora_alpha": 16}, "nf4")
    trainer = trainer_of(recipe, tmp_path)
    whole = load_model(recipe_of({}), FLOAT32)
    off = float((logits(trainer.model) - logits(whole)).abs().mean())
    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", moved)
        start_adapter(trainer, recipe, Run(tmp_path))
    assert float((logits(trainer.model) - logits(whole)).abs().mean()) < 0.8 * off
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    read = PeftModel.from_pretrained(load_model(recipe, FLOAT32), tmp_path / "adapter")
    assert torch.equal(logits(read), logits(trainer.model))


def test_starts_that_need_a_gpu_or_the_whole_model_say_so(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    loftq = recipe_of({"init_lora_weights": "loftq", "r": 4, "lora_alpha": 4}, "nf4")
    with pytest.raises(ModelError, match="computed by PEFT on a CUDA GPU only, and this run has none; use true"):
        refuse_start(loftq)
    monkeypatch.setattr(loading.torch.cuda, "is_available", lambda: True)
    refuse_start(loftq)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for start in ("eva", "pissa", "olora"):
        with pytest.raises(ModelError, match=rf"init_lora_weights={start} needs the whole model in every process"):
            refuse_start(recipe_of({"init_lora_weights": start}))
    refuse_start(recipe_of({}))


def test_weights_that_loftq_needs_and_does_not_find_are_one_sentence(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of({"init_lora_weights": "loftq", "r": 4, "lora_alpha": 4}, "nf4")
    trainer = trainer_of(recipe, tmp_path)
    (Path(recipe.model.name_or_path) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"loftq does not find the whole weights of .* use true"):
        start_adapter(trainer, recipe, Run(tmp_path))
