"""A step that is not finite changes nothing and names its rows; a training that diverges is stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import pack_dataset

from sevpeft.errors import RunError
from sevpeft.recipe import StoppingSection
from sevpeft.training.callbacks import SignalHandler
from sevpeft.training.checkpoints import checkpoint_damage, files_to_resume
from sevpeft.training.data import RowNames
from sevpeft.training.robust_trainer import WINDOW, Divergence
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.conftest import build_model
from tests.training.test_trainer import adapter_of, assert_equal, losses_of, make_rows, make_trainer

POISON = 3  # a token that stands in no row of make_rows


def names_of(rows: Dataset) -> RowNames:
    encoded = Dataset.from_dict({"input_ids": rows["input_ids"][:], "source_index": list(range(len(rows)))})
    return RowNames(encoded, Dataset.from_dict({"row": [10 + index for index in range(len(rows))]}))


def poisoned(rows: Dataset, *positions: int) -> Dataset:
    """The same rows, of which some hold a token whose embedding is NaN."""
    ids = rows["input_ids"][:]
    for position in positions:
        ids[position] = [POISON, *ids[position][1:]]
    return rows.remove_columns("input_ids").add_column("input_ids", ids)


def sick_model() -> torch.nn.Module:
    model = build_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = math.nan
    return model


def guarded(folder: Path, rows: Dataset, *, patience: int = 3, named: Dataset | None = None, **options: Any) -> Any:
    trainer = make_trainer(folder, rows, model=sick_model(), **options)
    trainer.stopping = StoppingSection(nonfinite_patience=patience)
    trainer.name_rows = names_of(rows if named is None else named)
    said: list[str] = []
    trainer.on_message = lambda label, sentence: said.append(sentence)
    trainer.said = said
    return trainer


@pytest.mark.parametrize("layout", ["padded", "padding-free", "packed"])
def test_a_step_that_is_not_finite_changes_nothing_and_names_the_row(tmp_path: Path, layout: str) -> None:
    rows = poisoned(make_rows(), 5)
    options: dict[str, Any] = {"padding_free": True} if layout == "padding-free" else {}
    data = rows
    if layout == "packed":
        options = {"packing": True, "max_length": 64, "per_device_train_batch_size": 1}
        data = pack_dataset(rows.remove_columns("severity"), seq_length=64, strategy="bfd")
        data = data.add_column("severity", [0] * len(data))
    trainer = guarded(tmp_path, data, named=rows, num_train_epochs=1, max_steps=-1, **options)
    trainer.train()
    (sentence,) = trainer.said
    assert "loss is not finite" in sentence and sentence.endswith("it saw row 15.")
    assert all(torch.isfinite(value).all() for value in adapter_of(trainer).values())
    assert trainer.nonfinite_steps == 1
    assert sum(not math.isfinite(loss) for loss in losses_of(trainer)) == 1, "a log line for each step: one says NaN"
    assert any(parameter.abs().max() > 0 for name, parameter in adapter_of(trainer).items() if "lora_B" in name)


def test_the_adapter_and_the_optimiser_are_as_if_the_step_had_not_been(tmp_path: Path) -> None:
    trainer = guarded(tmp_path, poisoned(make_rows(), *range(16)), patience=100, max_steps=3)
    before = adapter_of(trainer)
    with pytest.raises(RunError, match="None of the 3 steps"):
        trainer.train()
    assert_equal(before, adapter_of(trainer))
    assert not trainer.optimizer.state_dict()["state"]


def test_a_first_validation_that_is_not_finite_ends_the_run_with_its_likely_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of steps, and whether or not the training validates later."""
    validation, found = poisoned(make_rows(6, seed=2), 3), {}
    for strategy in ("no", "epoch"):
        trainer = guarded(
            tmp_path / strategy, make_rows(), eval_dataset=validation, eval_strategy=strategy, max_steps=1
        )
        with pytest.raises(RunError) as ended:
            trainer.train()
        found[strategy] = trainer.state.global_step == 0 and "embed_tokens.weight holds NaN" in str(ended.value)
    for setting, model in (("model.dtype", "float16"), ("attn_implementation=eager", "float32")):
        trainer = make_trainer(tmp_path / model, make_rows(), eval_dataset=make_rows(6), max_steps=1)
        trainer.args.fp16 = model == "float16"
        monkeypatch.setattr(trainer, "evaluation_loop", infinite(trainer.evaluation_loop))
        with pytest.raises(RunError) as ended:
            trainer.evaluate()
        found[setting] = setting in str(ended.value)
    assert set(found.values()) == {True}, found


def infinite(loop: Any) -> Any:
    """The evaluation loop of scores that overflowed, of which the weights show nothing."""

    def overflowed(*args: Any, **kwargs: Any) -> Any:
        output = loop(*args, **kwargs)
        output.metrics["eval_loss"] = math.inf
        return output

    return overflowed


def test_means_are_over_the_steps_that_were_taken(tmp_path: Path) -> None:
    rows = poisoned(make_rows(), 5)
    single = guarded(tmp_path / "single", rows, max_steps=4)
    result = single.train()
    finite = [loss for loss in losses_of(single) if math.isfinite(loss)]
    assert len(finite) == 3
    together = guarded(tmp_path / "together", rows, max_steps=4, logging_steps=4)
    again = together.train()
    assert losses_of(together) == [pytest.approx(sum(finite) / 3, rel=1e-6)]
    assert result.metrics["train_loss"] == pytest.approx(sum(finite) / 3, rel=1e-6)
    assert again.metrics["train_loss"] == pytest.approx(sum(finite) / 3, rel=1e-6)
    last = together.state.log_history[-2]
    assert last["nonfinite_steps"] == 1 and math.isfinite(last["entropy"])


def test_after_the_patience_the_training_ends_with_a_checkpoint_of_the_good_adapter(tmp_path: Path) -> None:
    rows = poisoned(make_rows(), *range(16))
    trainer = guarded(tmp_path, rows, patience=2, max_steps=9)
    trainer.signals = SignalHandler(tmp_path, trainer.said.append)
    trainer.add_callback(trainer.signals)
    before = adapter_of(trainer)
    with pytest.raises(RunError, match=r"2 steps in a row had a loss that is not finite.*row 1\d.*checkpoint-2 holds"):
        trainer.train()
    assert_equal(before, adapter_of(trainer))
    assert checkpoint_damage(tmp_path / "checkpoint-2", files_to_resume(trainer.accelerator)) is None


def test_bad_steps_that_do_not_follow_each_other_use_up_no_patience(tmp_path: Path) -> None:
    trainer = guarded(tmp_path, poisoned(make_rows(), 5), patience=2, max_steps=12)
    trainer.train()
    assert trainer.nonfinite_steps == 3, "once in each of three epochs"


def test_a_gradient_that_is_not_finite_counts_although_the_loss_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows()
    trainer = guarded(tmp_path, rows, patience=2)
    step = SeveritySFTTrainer.training_step

    def blown_up(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        next(parameter for parameter in self.model.parameters() if parameter.requires_grad).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(SeveritySFTTrainer, "training_step", blown_up)
    with pytest.raises(RunError, match="gradient that is not finite"):
        trainer.train()
    assert trainer.said[0].count("row ") == 4, "no single row is to blame, so all of the step are named"


def test_a_gradient_that_a_grad_scaler_leaves_out_itself_is_no_bad_step(tmp_path: Path) -> None:
    """float16 begins so: the scale is too high, and is lowered until the gradients are finite."""
    trainer = guarded(tmp_path, make_rows(), patience=1, max_steps=6)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() < 2.0**127, "no gradient was infinite"
    assert (trainer.nonfinite_steps, trainer.said, trainer.state.global_step) == (0, [], 6)


def test_what_was_seen_is_remembered_by_a_checkpoint(tmp_path: Path) -> None:
    rows = poisoned(make_rows(), 5)
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "logging_steps": 5}
    whole = guarded(tmp_path, rows, **options)
    whole.train()
    resumed = guarded(tmp_path, rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.nonfinite_steps == whole.nonfinite_steps > 0
    assert losses_of(resumed) == losses_of(whole)
    assert resumed.divergence.first == whole.divergence.first and resumed.divergence.last == whole.divergence.last


def losses(*parts: tuple[float, int]) -> list[float]:
    return [value for value, times in parts for _ in range(times)]


@pytest.mark.parametrize(
    ("seen", "stops"),
    [
        (losses((4.0, 40), (9.0, 60)), True),
        (losses((4.0, 40), (9.0, 30)), False),  # not for so long
        (losses((4.0, 40), (9.0, 30), (4.0, 20), (9.0, 30)), False),  # not in a row
        (losses((4.0, 20), (0.3, 200), (1.2, 200)), False),  # learnt by heart, and then rows that are new
        (losses((4.0, 20), (5.9, 200)), False),
        (losses((4.0, 20), (6.1, 200)), True),
        (losses((4.0, 20), *[(12.0, 1), (4.0, 5)] * 40), False),  # single hard batches
    ],
)
def test_a_training_diverges_when_it_stays_above_where_it_began(seen: list[float], stops: bool) -> None:
    divergence = Divergence(ratio=1.5, patience=50)
    stopped = False
    for loss in seen:
        divergence.add(loss)
        stopped = stopped or divergence.too_long
    assert stopped == stops


def test_without_patience_nothing_is_too_long() -> None:
    divergence = Divergence(ratio=1.5, patience=None)
    for loss in losses((4.0, 20), (40.0, 1000)):
        divergence.add(loss)
    assert divergence.steps > 900 and not divergence.too_long


def test_a_diverging_training_keeps_the_checkpoints_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 2, "max_steps": 200}
    trainer = make_trainer(tmp_path, make_rows(), **options)
    compute = SeveritySFTTrainer.compute_loss

    def growing(self: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(self, *args, **kwargs) * (1 if self.state.global_step < 33 else 3)

    monkeypatch.setattr(SeveritySFTTrainer, "compute_loss", growing)
    trainer.divergence = Divergence(ratio=1.5, patience=20)
    said: list[str] = []
    trainer.on_message = lambda label, sentence: said.append(sentence)
    trainer.signals = SignalHandler(tmp_path, said.append)
    trainer.add_callback(trainer.signals)
    with pytest.raises(RunError, match=r"for 20 steps its loss .* a lower training\.learning_rate"):
        trainer.train()
    begun = trainer.state.global_step + 1 - 19
    assert 33 < begun < 33 + WINDOW
    kept = sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert kept == [35, begun] and "a checkpoint is kept" in said[0]
