"""What a checkpoint adds to the libraries' own: counts, the order of saving and validating, and smaller batches."""

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
from sevpeft.training.checkpoints import COUNTS, Counts, checkpoint_damage, files_to_resume
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.training.test_trainer import adapter_of, assert_close, assert_equal, losses_of, make_rows, make_trainer

STEPS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}


def full(error: str = "CUDA out of memory. Tried to allocate 20 GiB") -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(error)


class Crowded(SeveritySFTTrainer):
    """A card that holds so many rows of a training batch, and so many of a validation batch; at first, any."""

    train_rows, eval_rows, from_step, at_first = 10**6, 10**6, 0, 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows = len(inputs["input_ids"])
        limit = self.train_rows if self.model.training else self.eval_rows
        if rows > limit and self.state.global_step >= self.from_step:
            self.at_first -= 1
            if self.at_first < 0:
                raise full()
        return super().compute_loss(model, inputs, *args, **kwargs)


def crowded(
    folder: Path,
    *,
    train_rows: int = 10**6,
    eval_rows: int = 10**6,
    from_step: int = 0,
    at_first: int = 0,
    **options: Any,
) -> Any:
    trainer = make_trainer(folder, make_rows(), learning_rate=1e-3, **{**STEPS, **options})
    trainer.__class__ = Crowded
    trainer.train_rows, trainer.eval_rows = train_rows, eval_rows
    trainer.from_step, trainer.at_first = from_step, at_first
    return trainer


@pytest.mark.parametrize(("from_step", "at_first"), [(0, 0), (3, 0), (0, 1), (1, 1)])
def test_a_batch_that_does_not_fit_is_cut_in_parts_of_the_same_step(
    tmp_path: Path, from_step: int, at_first: int
) -> None:
    """Also where the first batch of the step has fitted, and left its loss and its gradient."""
    roomy = crowded(tmp_path / "roomy", eval_dataset=make_rows(5, seed=2))
    roomy.train()
    narrow: dict[str, Any] = {"train_rows": 1, "from_step": from_step, "at_first": at_first}
    trainer = crowded(tmp_path / "full", eval_dataset=make_rows(5, seed=2), **narrow)
    said: list[str] = []
    trainer.split_on_oom, trainer.on_message = True, lambda label, sentence: said.append(sentence)
    trainer.train()
    assert (trainer._train_batch_size, trainer.args.gradient_accumulation_steps) == (1, 8)
    assert ["2 rows" in said[0], "1 rows" in said[1], len(said)] == [True, True, 2]
    assert all(f"step {from_step}" in sentence for sentence in said)
    assert losses_of(trainer) == pytest.approx(losses_of(roomy), rel=1e-5)
    assert_close(adapter_of(trainer), adapter_of(roomy), 1e-5)
    tokens = [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry]
    assert tokens == [entry["num_tokens"] for entry in roomy.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0]


def test_a_resumed_run_begins_with_the_smaller_batches(tmp_path: Path) -> None:
    trainer = crowded(tmp_path, train_rows=2)
    trainer.split_on_oom = True
    trainer.train()
    resumed = crowded(tmp_path)
    resumed.split_on_oom = True
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (resumed._train_batch_size, resumed.args.gradient_accumulation_steps) == (2, 4)
    assert_equal(adapter_of(resumed), adapter_of(trainer))


@pytest.mark.parametrize(("accepts", "rows"), [(False, 2), (True, 0)], ids=["not asked for", "not even one row"])
def test_full_memory_without_a_way_out_is_an_error(tmp_path: Path, accepts: bool, rows: int) -> None:
    trainer = crowded(tmp_path, train_rows=rows)
    trainer.split_on_oom = accepts
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    assert should_reduce_batch_size(caught.value)


def test_validation_that_does_not_fit_is_cut_without_changing_a_figure(tmp_path: Path) -> None:
    validation = make_rows(16, seed=2)
    trainer = crowded(tmp_path, eval_rows=2, eval_dataset=validation, per_device_eval_batch_size=8)
    with pytest.raises(RunError, match=r"per_device_eval_batch_size \(now 8\)"):
        trainer.evaluate()
    trainer.split_on_oom, trainer.at_first = True, 1
    trainer.evaluate()
    found = trainer.state.log_history[-1]
    assert trainer.args.per_device_eval_batch_size == 2
    for rows, figures in ((8, ("loss", "accuracy")), (2, ("loss", "accuracy", "entropy"))):
        roomy = crowded(tmp_path, eval_dataset=validation, per_device_eval_batch_size=rows)
        roomy.evaluate()
        expected = roomy.state.log_history[-1]
        assert "eval_entropy" in expected
        for name in expected:
            if any(figure in name for figure in figures):
                assert found[name] == pytest.approx(expected[name], rel=1e-5), (rows, name)


@pytest.mark.parametrize("eval_steps", [1, 3])
def test_a_validation_draws_no_random_numbers_of_the_training(tmp_path: Path, eval_steps: int) -> None:
    adapters = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": eval_steps, "eval_dataset": make_rows(5, seed=2)}):
        trainer = make_trainer(tmp_path, make_rows(), lora_dropout=0.2, **options)
        trainer.train()
        adapters.append(adapter_of(trainer))
    assert_equal(*adapters)


def validating(folder: Path, **options: Any) -> Any:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 3, "lora_dropout": 0.2}
    return make_trainer(folder, make_rows(), eval_dataset=make_rows(6, seed=2), **{**STEPS, **settings, **options})


def history(trainer: Any) -> list[dict[str, Any]]:
    """What the training told, without what the clock says."""
    clock = ("runtime", "per_second", "total_flos", "train_loss")
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in clock)}
        for entry in trainer.state.log_history
    ]


def test_a_checkpoint_does_not_wait_for_the_validation_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = validating(tmp_path / "whole")
    whole.train()
    killed = validating(tmp_path / "killed")
    validate = killed.evaluate

    def dies(*args: Any, **kwargs: Any) -> Any:
        if killed.state.global_step == 2:
            raise SystemExit
        return validate(*args, **kwargs)

    monkeypatch.setattr(killed, "evaluate", dies)
    with pytest.raises(SystemExit):
        killed.train()
    checkpoint = tmp_path / "killed" / "checkpoint-2"
    assert (
        checkpoint_damage(checkpoint, files_to_resume(killed.accelerator)) is None
        and Counts.read(checkpoint).evaluation_due
    )
    resumed = validating(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(adapter_of(resumed), adapter_of(whole))
    assert history(resumed) == history(whole)
    assert [entry["step"] for entry in resumed.state.log_history if "eval_loss" in entry] == [0, 2, 4]


def test_a_validation_that_is_cut_off_has_its_steps_saved_first(tmp_path: Path) -> None:
    trainer = validating(tmp_path, save_steps=100)
    leaving = SignalHandler(tmp_path, lambda sentence: None)
    predicted = leaving.on_prediction_step

    def heard(args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        leaving._received = 15 if state.global_step == 2 else None
        predicted(args, state, *rest, **kwargs)

    leaving.on_prediction_step = heard  # type: ignore[method-assign]
    trainer.add_callback(leaving)
    with pytest.raises(Interrupted, match="SIGTERM"):
        trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (
        checkpoint_damage(checkpoint, files_to_resume(trainer.accelerator)) is None
        and Counts.read(checkpoint).evaluation_due
    )
    whole = validating(tmp_path / "whole", save_steps=100)
    whole.train()
    resumed = validating(tmp_path, save_steps=100)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(adapter_of(resumed), adapter_of(whole))
    assert history(resumed) == history(whole)


def test_the_best_checkpoint_is_chosen_by_its_validation(tmp_path: Path) -> None:
    """There the validation decides what is saved, so it comes first, as in Trainer."""
    trainer = validating(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss")
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert not Counts.read(trainer.state.best_model_checkpoint).evaluation_due


def test_tokens_and_mean_loss_of_a_resumed_run_are_those_of_the_whole(tmp_path: Path) -> None:
    whole = validating(tmp_path)
    told = whole.train().metrics["train_loss"]
    counts = tmp_path / "checkpoint-2" / COUNTS
    counts.write_text(json.dumps({**json.loads(counts.read_text(encoding="utf-8")), "seconds": 1000}), encoding="utf-8")
    resumed = validating(tmp_path)
    again = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).metrics["train_loss"]
    over = validating(tmp_path)
    nothing = over.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")).metrics["train_loss"]
    assert again == pytest.approx(told, rel=1e-6) and nothing == pytest.approx(told, rel=1e-6)
    last = resumed.state.log_history[-1]
    assert last["train_runtime"] > 1000 and last["train_steps_per_second"] <= 0.004
    assert resumed._total_train_tokens == over._total_train_tokens == whole._total_train_tokens > 0


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_was_killed_after_its_last_step_trains_no_step_more(tmp_path: Path, steps: int) -> None:
    whole, over = (validating(tmp_path, max_steps=steps, save_steps=1) for _ in range(2))
    whole.train()
    over.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert over.state.global_step == steps
    assert_equal(adapter_of(over), adapter_of(whole))


@pytest.mark.parametrize("options", [{}, {"metric_for_best_model": "loss"}, {"eval_strategy": "no"}])
def test_the_last_line_of_a_run_that_was_killed_after_its_last_step_is_that_of_the_whole(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole, over = (validating(tmp_path, save_steps=4, **options) for _ in range(2))
    whole.train()
    over.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert history(over) == history(whole)


def test_as_many_checkpoints_are_kept_as_were_asked_for(tmp_path: Path) -> None:
    validating(tmp_path, save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
def test_rows_come_in_the_order_of_the_whole_also_after_their_first_epoch(tmp_path: Path, strategy: str) -> None:
    options = {"train_sampling_strategy": strategy, "gradient_accumulation_steps": 1, "max_steps": 12}
    options |= {"per_device_train_batch_size": 2, "save_total_limit": None}
    whole = validating(tmp_path, **options)
    whole.train()
    assert whole.state.epoch > 1.2
    again = validating(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
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


def test_the_validation_loss_of_padded_rows_is_that_of_one_long_row(tmp_path: Path) -> None:
    padded = validating(tmp_path, per_device_eval_batch_size=3)
    free = validating(tmp_path, per_device_eval_batch_size=3, padding_free=True, max_length=None)
    assert "attention_mask" not in next(iter(free.get_eval_dataloader()))
    assert free.evaluate()["eval_loss"] == pytest.approx(padded.evaluate()["eval_loss"], rel=1e-6)


def test_dropping_the_last_batch_leaves_no_row_out_of_a_validation(tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_eval_batch_size": 4, "eval_steps": 4}
    whole, dropping = validating(tmp_path, **options), validating(tmp_path, **options, dataloader_drop_last=True)
    assert dropping.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    assert len(dropping.get_eval_dataloader()) == 2 and dropping.args.dataloader_drop_last


def test_no_telemetry_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **told: sent.append(told))
    make_trainer(tmp_path, make_rows(4), stock=True)
    assert len(sent) == 1, "TRL itself sends, by this name"
    make_trainer(tmp_path, make_rows(4))
    assert len(sent) == 1


EPOCHS: dict[str, Any] = {
    **{"eval_strategy": "epoch", "logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3},
    **{"gradient_accumulation_steps": 1, "save_total_limit": None},
}


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_what_belongs_to_the_end_of_an_epoch_is_not_lost_by_a_stop_on_its_last_step(
    tmp_path: Path, schedule: str
) -> None:
    options = {**EPOCHS, "lr_scheduler_type": schedule, "per_device_train_batch_size": 4, "save_steps": 4}
    if schedule != "linear":
        options["lr_scheduler_kwargs"] = {"patience": 0, "factor": 0.1, "threshold": 10.0}
    whole = validating(tmp_path, **options)
    whole.train()
    assert [entry["step"] for entry in whole.state.log_history if "eval_loss" in entry] == [0, 4, 8, 12]
    for step in (4, 8):
        again = validating(tmp_path, **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert history(again) == history(whole)
        assert_equal(adapter_of(again), adapter_of(whole))


@pytest.mark.parametrize("change", ["moved", "gone", "damaged"])
def test_the_best_checkpoint_is_found_where_the_run_is_now_and_only_used_whole(tmp_path: Path, change: str) -> None:
    options: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.5}
    options |= {"eval_steps": 1, "save_steps": 1, "save_total_limit": None}
    whole = validating(tmp_path / "one", **options)
    whole.train()
    best = whole.state.best_global_step
    assert best < whole.state.global_step, "it got worse"
    folder = Path(shutil.move(tmp_path / "one", tmp_path / "two"))
    if change == "gone":
        shutil.rmtree(folder / f"checkpoint-{best}")
    if change == "damaged":
        weights = folder / f"checkpoint-{best}" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-400] + bytes(400))
    again = validating(folder, **options)
    if change == "moved":
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        assert_equal(adapter_of(again), adapter_of(whole))
        return
    with pytest.raises(RunError, match=rf"checkpoint-{best}, the best of this run, (is gone|holds adapter_model)"):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_padding_in_rows_without_padding_is_no_row(tmp_path: Path) -> None:
    options: dict[str, Any] = {"padding_free": True, "per_device_eval_batch_size": 3, "max_length": None}
    padded = validating(tmp_path, **options, pad_to_multiple_of=16).evaluate()
    assert padded["eval_loss"] == pytest.approx(validating(tmp_path, **options).evaluate()["eval_loss"], rel=1e-6)
    assert padded["eval_loss_critical"] > 0
