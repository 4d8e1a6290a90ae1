"""A step that is not finite changes nothing and is reported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from sevpeft.errors import RunError
from sevpeft.recipe import StoppingSection
from sevpeft.training.callbacks import SignalHandler, StepGuard
from sevpeft.training.checkpoints import checkpoint_damage, files_to_resume
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.models import build_model
from tests.training.test_trainer import (
    LAYOUTS,
    adapter_of,
    assert_equal,
    laid_out,
    losses_of,
    make_rows,
    make_trainer,
    severity_losses,
)

POISON = 3  # a token that stands in no row of make_rows


def poisoned(rows: Dataset, *positions: int) -> Dataset:
    """The same rows, of which some hold a token whose embedding is NaN."""
    ids = rows["input_ids"][:]
    for position in positions:
        ids[position] = [POISON, *ids[position][1:]]
    return rows.remove_columns("input_ids").add_column("input_ids", ids)


def guarded(folder: Path, rows: Dataset, *, patience: int = 3, **options: Any) -> Any:
    """A trainer on a model with a NaN embedding, with its guard; messages are in `trainer.messages`."""
    model = build_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = math.nan
    messages: list[str] = []
    signals = SignalHandler(folder, messages.append)
    trainer = make_trainer(folder, rows, model=model, callbacks=[signals], **options)
    trainer.guard, trainer.messages = StepGuard(trainer, StoppingSection(), signals), messages
    trainer.guard.stopping = StoppingSection(nonfinite_patience=patience)
    trainer.add_callback(trainer.guard)
    return trainer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, layout: str) -> None:
    rows = poisoned(make_rows(), 5)
    options = {**LAYOUTS[layout], "per_device_train_batch_size": 1 if layout == "packed" else 4}
    trainer = guarded(tmp_path, laid_out(rows, layout), num_train_epochs=1, max_steps=-1, **options)
    trainer.train()
    (message,) = trainer.messages
    assert "loss of step" in message and "skipped" in message
    assert all(torch.isfinite(value).all() for value in adapter_of(trainer).values())
    assert trainer.guard.counts["nonfinite"] == 1
    assert len(losses_of(trainer)) == trainer.state.global_step - 1 and all(map(math.isfinite, losses_of(trainer)))
    assert any(parameter.abs().max() > 0 for name, parameter in adapter_of(trainer).items() if "lora_B" in name)


def test_adapter_and_optimizer_are_as_if_the_step_had_not_been(tmp_path: Path) -> None:
    trainer = guarded(tmp_path, poisoned(make_rows(), *range(16)), patience=100, max_steps=3)
    before = adapter_of(trainer)
    with pytest.raises(RunError, match=r"training\.learning_rate"):
        trainer.train()
    assert_equal(before, adapter_of(trainer))
    assert not trainer.optimizer.state_dict()["state"]


def test_a_first_validation_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    """Whether or not the training validates later."""
    for strategy in ("no", "epoch"):
        trainer = guarded(
            tmp_path, make_rows(), eval_dataset=poisoned(make_rows(6, seed=2), 3), eval_strategy=strategy, max_steps=1
        )
        with pytest.raises(RunError, match=r"model\.dtype"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_means_are_over_the_steps_that_were_taken(tmp_path: Path) -> None:
    rows = poisoned(make_rows(), 5)
    single = guarded(tmp_path / "single", rows, max_steps=4)
    single.train()
    finite = losses_of(single)
    assert len(finite) == 3
    together = guarded(tmp_path / "together", rows, max_steps=4, logging_steps=4)
    together.train()
    assert losses_of(together) == [pytest.approx(sum(finite) / 3, rel=1e-6)]
    for trainer in (single, together):
        assert trainer.exact_resume.totals()["loss_sum"] == pytest.approx(sum(finite), rel=1e-6)
        assert 1 in [entry.get("nonfinite_steps") for entry in trainer.state.log_history]
    assert math.isfinite(together.state.log_history[0]["entropy"])
    (of_severities,) = severity_losses(together)
    assert len(of_severities) == 3 and all(map(math.isfinite, of_severities.values()))


def test_after_the_patience_the_training_ends_with_a_checkpoint_of_the_good_adapter(tmp_path: Path) -> None:
    trainer = guarded(tmp_path, poisoned(make_rows(), *range(16)), patience=2, max_steps=9)
    before = adapter_of(trainer)
    with pytest.raises(RunError, match=r"in 2 steps in a row.*checkpoint-2 holds"):
        trainer.train()
    assert_equal(before, adapter_of(trainer))
    assert checkpoint_damage(tmp_path / "checkpoint-2", files_to_resume(trainer.accelerator)) is None


def test_bad_steps_that_do_not_follow_each_other_use_up_no_patience_also_after_a_resume(tmp_path: Path) -> None:
    rows = poisoned(make_rows(), 5)
    options: dict[str, Any] = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "logging_steps": 5}
    whole = guarded(tmp_path, rows, patience=2, **options)
    whole.train()
    assert whole.guard.counts["nonfinite"] >= 2, "once in each epoch"
    resumed = guarded(tmp_path, rows, patience=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(whole) and resumed.guard.counts == whole.guard.counts
    assert_equal(adapter_of(resumed), adapter_of(whole))


def test_a_gradient_that_is_not_finite_counts_although_the_loss_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = guarded(tmp_path, make_rows(), patience=2)
    step = SeveritySFTTrainer.training_step

    def blown_up(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        next(parameter for parameter in self.model.parameters() if parameter.requires_grad).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(SeveritySFTTrainer, "training_step", blown_up)
    before = adapter_of(trainer)
    with pytest.raises(RunError, match="gradient of step"):
        trainer.train()
    assert_equal(before, adapter_of(trainer))


def test_a_gradient_that_a_grad_scaler_leaves_out_itself_is_no_bad_step(tmp_path: Path) -> None:
    """float16 begins so: the scale is too high, and is lowered until the gradients are finite."""
    trainer = guarded(tmp_path, make_rows(), patience=1, max_steps=6)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() < 2.0**127, "no gradient was infinite"
    assert (trainer.guard.counts["nonfinite"], trainer.messages, trainer.state.global_step) == (0, [], 6)
