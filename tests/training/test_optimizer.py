"""LoRA+ trains the matrices B faster than the matrices A, and at a ratio of 1 changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

from sevpeft.errors import RecipeError
from sevpeft.recipe import recipe_from_values
from sevpeft.training.resolve import check_optimizer, loraplus_settings
from tests.conftest import build_model
from tests.training.test_trainer import adapter_of, assert_close, assert_equal, make_rows, make_trainer

RATIO = {"loraplus_lr_ratio": 16.0}


def trained(folder: Path, ratio: float | None, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    settings = None if ratio is None else {"loraplus_lr_ratio": ratio}
    trainer = make_trainer(folder, make_rows(), loraplus=settings, **options)
    before = adapter_of(trainer)
    trainer.train()
    after = adapter_of(trainer)
    return {name: after[name] - before[name] for name in after}, trainer


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "paged_adamw_8bit", "paged_lion_8bit"])
def test_a_ratio_of_one_trains_the_adapter_of_one_learning_rate(tmp_path: Path, optim: str) -> None:
    options: dict[str, Any] = {"optim": optim, "weight_decay": 0.1, "learning_rate": 1e-3}
    plain, _ = trained(tmp_path, None, **options)
    plus, _ = trained(tmp_path, 1.0, **options)
    assert any(float(change.abs().max()) > 0 for change in plain.values())
    # Clipping sums the gradients group by group, so that the last bit may differ.
    assert_close(plain, plus, 1e-7)


def test_a_ratio_of_sixteen_moves_b_sixteen_times_as_far(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 1e-3}
    plain, _ = trained(tmp_path, None, **options)
    plus, _ = trained(tmp_path, 16.0, **options)
    for name, change in plain.items():
        factor = 16 if "lora_B" in name else 1
        assert torch.allclose(plus[name], factor * change, rtol=1e-4, atol=1e-9), name


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit", "ademamix_8bit"])
def test_both_rates_follow_the_schedule_and_weight_decay_is_the_recipe_s(tmp_path: Path, optim: str) -> None:
    _, trainer = trained(
        tmp_path, 16.0, optim=optim, weight_decay=0.1, max_steps=2, lr_scheduler_type="constant", learning_rate=1e-3
    )
    groups = trainer.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 16e-3])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]
    assert sum(len(group["params"]) for group in groups) == len(adapter_of(trainer))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "optim=galore_adamw is refused .*galore_torch"),
        ({"optim": "schedule_free_adamw"}, "optim=schedule_free_adamw is refused .*schedulefree"),
        ({"optim": "adamw_torch", "adam_beta1": 2.0}, "optim_args or an adam_… setting is refused .*beta"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr is refused .*min_lr"),
        ({"lr_scheduler_kwargs": {"x": 1}}, "lr_scheduler_type=linear is refused .*correct training.lr_scheduler_kw"),
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_built_is_one_sentence(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        check_optimizer(SFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings), build_model("llama"))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "paged_adamw_8bit", "lion_8bit", "ademamix"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "inverse_sqrt", "reduce_lr_on_plateau"])
def test_those_that_can_be_built_are_not_refused(tmp_path: Path, optim: str, schedule: str) -> None:
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, optim=optim, lr_scheduler_type=schedule, eval_strategy="epoch"
    )
    model = build_model("llama")
    state = torch.get_rng_state()
    check_optimizer(args, model)
    assert torch.equal(state, torch.get_rng_state()), "a resumed run would draw other numbers"


def test_a_resumed_training_is_the_same_training(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "a", 16.0, save_strategy="steps", save_steps=2, lora_dropout=0.1)
    trainer = make_trainer(tmp_path / "a", make_rows(), loraplus=RATIO, lora_dropout=0.1)
    before = adapter_of(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    after = adapter_of(trainer)
    assert_equal(whole, {name: after[name] - before[name] for name in after})


def test_the_recipe_s_settings_are_the_library_s() -> None:
    recipe = recipe_from_values({"lora": {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-5}})
    assert loraplus_settings(recipe) == {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-5}
    assert "loraplus_lr_ratio" not in recipe.lora.settings() and "loraplus_lr_ratio: 16.0" in recipe.to_yaml()
    assert loraplus_settings(recipe_from_values({})) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lora": {"loraplus_lr_ratio": 0.5}}, "loraplus_lr_ratio"),
        ({"lora": {"loraplus_weight_decay": 0.1}}, "training.weight_decay"),
    ],
)
def test_what_lora_plus_cannot_do_is_said_by_the_recipe(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said.replace("+", r"\+")):
        recipe_from_values(values)


def test_a_sharded_training_refuses_lora_plus(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from_values({"lora": {"loraplus_lr_ratio": 16.0}})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"lora\.loraplus_lr_ratio does not reach the optimizer that FSDP builds"):
        loraplus_settings(recipe)
