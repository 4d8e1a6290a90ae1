"""Checkpoints: counts that the libraries do not save, saving before validating; and batches in parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size

from sevpeft.errors import Interrupted, RunError
from sevpeft.training.callbacks import SignalHandler
from sevpeft.training.checkpoints import checkpoint_damage, files_to_resume
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.training.test_trainer import (
    LAYOUTS,
    adapter_of,
    assert_close,
    assert_equal,
    laid_out,
    losses_of,
    make_rows,
    make_trainer,
    severity_losses,
)

STEPS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}


class Crowded(SeveritySFTTrainer):
    """A device that holds so many rows of a training batch, and so many of a validation batch; at first, any.

    A failure comes after the forward pass, where a part of the gradient may be there already.
    """

    train_rows, eval_rows, from_step, at_first = 10**6, 10**6, 0, 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        begins = inputs["position_ids"] == 0 if "position_ids" in inputs else inputs["input_ids"][:, :1]
        rows = int(begins.sum()) if "position_ids" in inputs else len(begins)
        limit = self.train_rows if self.model.training else self.eval_rows
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if rows > limit and self.state.global_step >= self.from_step:
            self.at_first -= 1
            if self.at_first < 0:
                if self.model.training:
                    (loss / 2).backward()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return loss


def crowded(folder: Path, rows: Any = None, limits: dict[str, int] | None = None, **options: Any) -> Any:
    settings = {**STEPS, "split_on_oom": True, "learning_rate": 1e-3, **options}
    trainer = make_trainer(folder, make_rows() if rows is None else rows, **settings)
    trainer.__class__ = Crowded
    for name, value in (limits or {}).items():
        setattr(trainer, name, value)
    return trainer


@pytest.mark.parametrize(
    ("layout", "from_step", "at_first"), [("padded", 0, 0), ("padded", 3, 1), ("padding-free", 1, 1), ("packed", 1, 0)]
)
def test_a_batch_that_does_not_fit_is_computed_in_parts_of_the_same_step(
    tmp_path: Path, layout: str, from_step: int, at_first: int
) -> None:
    """Also where the first batch of the step has fitted, and left its loss and its gradient."""
    options = {**LAYOUTS[layout], "per_device_train_batch_size": 2 if layout == "packed" else 4}
    rows = laid_out(make_rows(), layout)
    roomy = crowded(tmp_path / "roomy", rows, **options)
    roomy.train()
    messages: list[str] = []
    limits = {"train_rows": 1, "from_step": from_step, "at_first": at_first}
    full = crowded(tmp_path / "full", rows, limits, on_message=messages.append, **options)
    full.train()
    assert full.parts.most_rows["train"] == 1 and all("the same step continues with" in text for text in messages)
    assert losses_of(full) == pytest.approx(losses_of(roomy), rel=1e-5)
    for line, other in zip(severity_losses(full), severity_losses(roomy), strict=True):
        assert line and line == pytest.approx(other, rel=1e-5)
    assert_close(adapter_of(full), adapter_of(roomy), 1e-5)
    tokens = [entry["num_tokens"] for entry in full.state.log_history if "loss" in entry]
    assert tokens == [entry["num_tokens"] for entry in roomy.state.log_history if "loss" in entry]
    if layout == "padding-free":
        resumed = crowded(tmp_path / "full", rows, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-2"))
        assert resumed.parts.most_rows["train"] == 1
        assert_equal(adapter_of(resumed), adapter_of(full))


def test_full_memory_without_a_way_out_is_an_error(tmp_path: Path) -> None:
    for splits, rows in ((False, 2), (True, 0)):
        trainer = crowded(tmp_path, None, {"train_rows": rows}, split_on_oom=splits)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            trainer.train()
        assert should_reduce_batch_size(caught.value)


def test_validation_that_does_not_fit_is_cut_without_changing_a_figure(tmp_path: Path) -> None:
    validation = make_rows(16, seed=2)
    trainer = crowded(tmp_path, None, {"eval_rows": 2}, eval_dataset=validation, split_on_oom=False)
    expected = crowded(tmp_path, eval_dataset=validation).evaluate()
    with pytest.raises(RunError, match=r"per_device_eval_batch_size \(now 8\)"):
        trainer.evaluate()
    with pytest.raises(RunError, match=r"training\.max_length"):
        crowded(tmp_path, None, {"eval_rows": 0}, eval_dataset=validation, split_on_oom=True).evaluate()
    trainer.parts.enabled, trainer.at_first = True, 1
    found = trainer.evaluate()
    assert trainer.parts.most_rows["eval"] == 2
    for name in expected:
        if "loss" in name:
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def validating(folder: Path, **options: Any) -> Any:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 3, "lora_dropout": 0.2}
    return make_trainer(folder, make_rows(), eval_dataset=make_rows(6, seed=2), **{**STEPS, **settings, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A training with a checkpoint and a validation after the second and the fourth step."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = validating(folder)
    trainer.train()
    return folder, trainer


def history(trainer: Any) -> list[dict[str, Any]]:
    """What the training logged, without times and without the last line, which is about one start."""
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in ("runtime", "per_second"))}
        for entry in trainer.state.log_history
        if "train_loss" not in entry
    ]


def assert_same(one: Any, other: Any) -> None:
    assert_equal(adapter_of(one), adapter_of(other))
    assert history(one) == history(other)
    sums = [trainer.exact_resume.totals()["loss_sum"] for trainer in (one, other)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert one._total_train_tokens == other._total_train_tokens > 0


def counts_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "counts_0.json").read_text(encoding="utf-8"))


def test_a_validation_draws_no_random_numbers_of_the_training(tmp_path: Path, whole: tuple[Path, Any]) -> None:
    alone = make_trainer(tmp_path, make_rows(), **{**STEPS, "logging_steps": 3, "lora_dropout": 0.2})
    alone.train()
    assert_equal(adapter_of(alone), adapter_of(whole[1]))


def test_counts_of_a_resumed_run_are_those_of_the_whole(whole: tuple[Path, Any]) -> None:
    """Also of one that was killed after its last step, which trains no step more."""
    folder, trainer = whole
    for step in (2, 4):
        resumed = validating(folder)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.state.global_step == 4
        assert_same(resumed, trainer)
        assert resumed.exact_resume.totals()["seconds"] >= counts_of(folder / f"checkpoint-{step}")["totals"]["seconds"]


@pytest.mark.parametrize("save_steps", [2, 100])
def test_a_validation_that_is_cut_off_is_made_again_and_no_step_is_lost(
    tmp_path: Path, whole: tuple[Path, Any], save_steps: int
) -> None:
    """A checkpoint does not wait for the validation of its step; where none is due, a signal has one written."""
    signals = SignalHandler(tmp_path, lambda sentence: None)
    stopped = validating(tmp_path, save_steps=save_steps, callbacks=[signals])
    predicted = signals.on_prediction_step

    def receive(args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        signals._received = 15 if state.global_step == 2 else None
        predicted(args, state, *rest, **kwargs)

    signals.on_prediction_step = receive  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="SIGTERM"):
        stopped.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert checkpoint_damage(checkpoint, files_to_resume(stopped.accelerator)) is None
    assert counts_of(checkpoint)["evaluation_due"]
    resumed = validating(tmp_path, save_steps=save_steps)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(resumed, whole[1])
    assert [entry["step"] for entry in resumed.state.log_history if "eval_loss" in entry] == [0, 2, 4]


def test_as_many_checkpoints_are_kept_as_were_asked_for(tmp_path: Path) -> None:
    validating(tmp_path, save_steps=1, save_total_limit=2, max_steps=3).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
def test_rows_come_in_the_order_of_the_whole_also_after_their_first_epoch(tmp_path: Path, strategy: str) -> None:
    options = {"train_sampling_strategy": strategy, "gradient_accumulation_steps": 1, "max_steps": 6, "save_steps": 5}
    options |= {"per_device_train_batch_size": 4, "eval_strategy": "no"}
    whole, again = validating(tmp_path, **options), validating(tmp_path, **options)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal(adapter_of(again), adapter_of(whole))


def test_rows_are_grouped_by_length_and_no_two_epochs_are_alike(tmp_path: Path) -> None:
    trainer = validating(tmp_path, train_sampling_strategy="group_by_length")
    sampler, state = trainer._get_train_sampler(), torch.get_rng_state()
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    trainer.state.epoch = 0.4
    first, again = list(sampler), list(sampler)
    trainer.state.epoch = 1.0
    second = list(sampler)
    assert first == again != second and sorted(first) == sorted(second) == list(range(len(lengths)))
    assert lengths[first[0]] == max(lengths), "the longest comes first, so that it shows at once whether it fits"
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_of_a_step_are_sorted_by_length_and_stay_the_rows_of_that_step(tmp_path: Path, processes: int) -> None:
    trainer = validating(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    loader = trainer.get_train_dataloader()
    trainer.args._n_gpu, trainer.args.distributed_state = 1, SimpleNamespace(num_processes=processes)
    drawn = [list(iter(loader.batch_sampler.sampler)) for _ in range(2)]  # accelerate's own order of two epochs
    trainer.sort_within_steps, size = True, 4 * processes
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    sampler = trainer._get_train_sampler()
    for epoch, order in enumerate(drawn):
        trainer.state.epoch = float(epoch)
        found = list(sampler)
        for start in range(0, len(order), size):
            part = found[start : start + size]
            assert sorted(part) == sorted(order[start : start + size])
            assert [lengths[row] for row in part] == sorted((lengths[row] for row in part), reverse=True)


def test_a_run_with_sorted_steps_trains_the_same_adapter_and_resumes_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 5}
    options["lora_dropout"] = 0.0  # drawn for each row in its turn
    plain, whole, again = (validating(tmp_path, save_total_limit=None, **options) for _ in range(3))
    plain.train()
    whole.sort_within_steps = again.sort_within_steps = True
    whole.train()
    assert_close(adapter_of(whole), adapter_of(plain), 1e-4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal(adapter_of(again), adapter_of(whole))


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_what_belongs_to_the_end_of_an_epoch_is_not_lost_by_a_stop_on_its_last_step(
    tmp_path: Path, schedule: str
) -> None:
    options: dict[str, Any] = {"eval_strategy": "epoch", "logging_strategy": "epoch", "max_steps": -1}
    options |= {"num_train_epochs": 2, "gradient_accumulation_steps": 1, "save_steps": 4, "lr_scheduler_type": schedule}
    if schedule != "linear":
        options["lr_scheduler_kwargs"] = {"patience": 0, "factor": 0.1, "threshold": 10.0}
    whole, again = validating(tmp_path, **options), validating(tmp_path, **options)
    whole.train()
    assert [entry["step"] for entry in whole.state.log_history if "eval_loss" in entry] == [0, 4, 8]
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(again, whole)


def test_the_best_checkpoint_is_found_where_the_run_is_now_and_only_used_whole(tmp_path: Path) -> None:
    # The largest loss counts as the best one: that of the first step, as the loss falls a little with each.
    options: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    options |= {"greater_is_better": True, "learning_rate": 0.003, "eval_steps": 1, "save_steps": 1}
    whole = validating(tmp_path / "one", **options)
    whole.train()
    best = whole.state.best_global_step
    assert 0 < best < whole.state.global_step
    folder = Path(shutil.move(tmp_path / "one", tmp_path / "two"))
    # There the validation decides what is saved, so it comes first, as in Trainer.
    assert not counts_of(folder / f"checkpoint-{best}")["evaluation_due"]
    again = validating(folder, **options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_equal(adapter_of(again), adapter_of(whole))
    weights = folder / f"checkpoint-{best}" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-400] + bytes(400))
    for damage in (r"adapter_model\.safetensors", "is gone"):
        with pytest.raises(RunError, match=rf"checkpoint-{best}, .*{damage}"):
            validating(folder, **options).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        shutil.rmtree(weights.parent, ignore_errors=True)
