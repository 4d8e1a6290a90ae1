"""A curriculum gives each step rows of its stage, with the steps of a plain training, also after a resume."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from sevpeft.errors import DataError, ModelError, RecipeError, RunError
from sevpeft.evaluation.report.page import write_report
from sevpeft.recipe import CurriculumSection, load_recipe, recipe_from_values
from sevpeft.runs import Run
from sevpeft.sharing.card import write_card
from sevpeft.training.checkpoints import checkpoint_damage, files_to_resume
from sevpeft.training.curriculum import Curriculum
from sevpeft.training.screen import run_summary
from sevpeft.training.train import train
from tests.models import SENTENCES, build_model, build_tokenizer
from tests.recipe.test_checks import unexpected
from tests.training.test_exact_resume import STEPS, assert_same
from tests.training.test_train import PLAIN, QUICKSTART, SPLIT, assert_same_bits, weights_of
from tests.training.test_trainer import (
    adapter_of,
    assert_equal,
    formula,
    make_config,
    make_rows,
    make_trainer,
    replace_weights,
)

CLASSES = np.arange(16) % 3  # of make_rows(): 6 non-critical, 5 neutral, 5 critical


def planned(folder: Path, numbers: Any = CLASSES, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    args = make_config(folder, **{"max_steps": 9, **(options or {})})
    section = CurriculumSection(**{"kind": "disjoint", **settings})
    return Curriculum(section, len(numbers), (numbers, np.arange(6) % 3), args)


def staged(
    folder: Path, callbacks: Any = (), options: dict[str, Any] | None = None, dropout: float = 0.2, **settings: Any
) -> Any:
    """A trainer whose stages end after the second and the fourth of six steps; an epoch has four."""
    steps = {**STEPS, "per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 1, "logging_steps": 1}
    steps |= {"eval_strategy": "steps", "eval_steps": 100, **(options or {})}
    curriculum = planned(folder, np.arange(16) if settings.get("difficulty") == "loss" else CLASSES, steps, **settings)
    given = {"args": curriculum.args, "curriculum": curriculum, "callbacks": callbacks, "lora_dropout": dropout}
    trainer = make_trainer(folder, make_rows(), eval_dataset=make_rows(6, seed=2), **given)
    trainer.sort_within_steps = dropout > 0
    return trainer


class Rows(list):  # type: ignore[type-arg]
    """Rows that are their own numbers, as a dataset."""

    def select(self, rows: Any) -> list[int]:
        return list(rows)


def rows_of_steps(curriculum: Curriculum) -> list[list[int]]:
    """Rows of each step, of the only process."""
    curriculum.held_out, more = (
        np.zeros(0, dtype=int),
        {"optimizer": SimpleNamespace(state={}), "sort_within_steps": False},
    )
    more |= {"model": torch.nn.Linear(1, 1), "data_collator": list, "train_dataset": Rows(range(curriculum.rows))}
    curriculum.trainer = SimpleNamespace(**more)  # type: ignore[assignment]
    return [[row for batch in curriculum.batches(step) for row in batch] for step in range(curriculum.steps)]


def test_each_step_has_rows_of_its_stage_and_a_stage_passes_over_all_of_them(tmp_path: Path) -> None:
    numbers = np.array([7.0, 1, 5, 3, 9, 2, 8, 4, 6, 0])
    order = numbers.argsort()
    thirds = [set(order[:4]), set(order[4:7]), set(order[7:])]
    named = [set(np.flatnonzero(number == CLASSES)) for number in range(3)]
    wrong = []
    for settings, difficulty, pools in (
        ({}, CLASSES, named),
        ({"kind": "cumulative"}, CLASSES, [named[0], named[0] | named[1], set(range(16))]),
        ({"order": "hard_first"}, CLASSES, named[::-1]),
        ({"kind": "cumulative", "order": "hard_first"}, CLASSES, [named[2], named[2] | named[1], set(range(16))]),
        ({"difficulty": "length"}, numbers, thirds),
        ({"difficulty": "length", "order": "hard_first"}, numbers, [set(order[6:]), set(order[3:6]), set(order[:3])]),
        ({"difficulty": "length", "shares": [0.5, 0.5]}, CLASSES > 1, [named[0] | named[1], named[2]]),
    ):
        curriculum = planned(tmp_path, np.asarray(difficulty), **settings)
        steps = rows_of_steps(curriculum)
        for stage, pool in zip(curriculum.stages, pools, strict=True):
            drawn = [row for step in steps[stage.begin : stage.end] for row in step]
            counts = np.bincount(drawn, minlength=16)[sorted(pool)]
            # Every row once before any comes again.
            if set(stage.pool) != pool or set(drawn) - pool or counts.max() - counts.min() > 1:
                wrong.append((settings, stage.name))
    assert wrong == []


def test_the_controls_have_the_same_stages_with_other_rows_and_other_seeds_another_order(tmp_path: Path) -> None:
    plain, shuffled = planned(tmp_path), planned(tmp_path, order="shuffled")
    assert [len(stage.pool) for stage in plain.stages] == [len(stage.pool) for stage in shuffled.stages] == [6, 5, 5]
    assert any(set(one.pool) != set(two.pool) for one, two in zip(plain.stages, shuffled.stages, strict=True))
    assert rows_of_steps(plain) == rows_of_steps(planned(tmp_path))
    assert all(
        rows_of_steps(plain) != rows_of_steps(planned(tmp_path, options={key: 1})) for key in ("seed", "data_seed")
    )


def test_competence_grows_with_the_root_of_the_steps_and_draws_from_the_easiest(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).permutation(1000)
    for order, sign in (("easy_first", 1), ("hard_first", -1)):
        curriculum = planned(tmp_path, numbers, {"max_steps": 400}, kind="competence", difficulty="length", order=order)
        ranks, steps = (sign * numbers).argsort().argsort(), rows_of_steps(curriculum)
        most = [max(ranks[step]) + 1 for step in steps]
        allowed = [max(4, 1000 * min(1, (step * (1 - 1e-4) / 200 + 1e-4) ** 0.5)) for step in range(400)]
        assert all(found <= limit + 1 for found, limit in zip(most, allowed, strict=True))
        assert most[0] <= 10 and max(most[150:]) > 900
        assert all(len(set(step)) == 4 for step in steps)


def test_a_matched_budget_has_the_steps_and_the_rows_of_a_plain_training(tmp_path: Path) -> None:
    for options in (
        {"num_train_epochs": 3},
        {"num_train_epochs": 2.5, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"num_train_epochs": 3, "per_device_train_batch_size": 3, "dataloader_drop_last": True},
        {"max_steps": 7, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2},
    ):
        options = {"max_steps": -1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, **options}
        plain = make_trainer(tmp_path, make_rows(), **options)
        found = plain.set_initial_training_values(plain.args, plain.get_train_dataloader())
        trainer = staged(tmp_path, options=options)
        curriculum = trainer.curriculum
        assert (curriculum.steps_of_epoch, curriculum.steps) == (found[1], found[-1]), options
        sizes = [len(batch["input_ids"]) for epoch in range(found[0]) for batch in plain.get_train_dataloader()]
        steps = range(curriculum.steps)
        own = [len(batch["input_ids"]) for step in steps for batch in curriculum.batches(step)]
        assert own == sizes[: len(own)] and len(sizes) - len(own) < plain.args.gradient_accumulation_steps * found[1]
        again = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
        assert again[0] == found[0] and again[1] == found[1] and again[-1] == found[-1], options


def test_epochs_per_stage_are_as_many_rows_as_separate_trainings_take(tmp_path: Path) -> None:
    curriculum = planned(tmp_path, kind="cumulative", epochs_per_stage=3)
    taken = [curriculum.rows_until(stage.end) - curriculum.rows_until(stage.begin) for stage in curriculum.stages]
    assert [rows - 3 * len(stage.pool) for rows, stage in zip(taken, curriculum.stages, strict=True)] == [2, 3, 0]
    assert curriculum.steps == curriculum.args.max_steps == 5 + 9 + 12


def test_equal_measured_losses_change_no_number_of_steps(tmp_path: Path) -> None:
    curriculum = planned(tmp_path, np.arange(16), difficulty="loss", epochs_per_stage=1)
    ends = [stage.end for stage in curriculum.stages]
    curriculum.counts["losses"] = [np.repeat([1.0, 2.0, 3.0], [10, 3, 3]).tolist(), []]
    assert all(rows_of_steps(curriculum)) and [stage.end for stage in curriculum.stages] == ends
    assert [len(stage.pool) for stage in curriculum.stages] == [10, 3, 3]


def test_the_learning_rate_of_each_step_is_that_of_its_stage(tmp_path: Path) -> None:
    rates = [1e-3, 5e-4, 2e-4]
    for settings, expected in (
        ({"learning_rates": rates}, [rates[step // 2] * (1 - step / 6) for step in range(6)]),
        ({"learning_rates": rates, "restart": True}, [rates[step // 2] * (1 - step % 2 / 2) for step in range(6)]),
        ({"restart": True}, [1e-2 * (1 - step % 2 / 2) for step in range(6)]),
    ):
        trainer = staged(tmp_path, options={"save_strategy": "no", "eval_strategy": "no"}, **settings)
        trainer.train()
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [line["learning_rate"] for line in lines] == pytest.approx(expected), settings


def test_a_stage_with_a_new_optimizer_is_a_training_that_begins_with_the_adapter_of_the_last_one(
    tmp_path: Path,
) -> None:
    options = {"lr_scheduler_type": "constant", "save_total_limit": None}
    whole = staged(tmp_path, dropout=0.0, restart=True, options=options)
    whole.train()
    assert {state["step"].item() for state in whole.optimizer.state.values()} == {2}
    rows = make_rows().select([row for step in rows_of_steps(whole.curriculum)[4:] for row in step])
    options |= {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    alone = make_trainer(tmp_path / "alone", rows, train_sampling_strategy="sequential", **options)
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    for name, parameter in alone.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(saved[name.replace(".default", "")])
    alone.train()
    assert_equal(adapter_of(alone), adapter_of(whole))


class Killed(TrainerCallback):
    """Ends the training where something is measured after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


ICFT = {"kind": "icft", "short_term": 0.25, "long_term": 0.25, "consistency": 1.0}
KINDS = {"cumulative": ({"kind": "cumulative"}, {}), "icft": (ICFT, {}), "padding-free": (ICFT, {"padding_free": True})}


@pytest.mark.parametrize(("kind", "layout"), KINDS.values(), ids=KINDS)
def test_a_kill_inside_a_stage_at_its_end_or_in_what_is_measured_there_changes_no_bit(
    tmp_path: Path, kind: dict[str, Any], layout: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {**kind, "restart": True, "learning_rates": [1e-2, 5e-3, 1e-2]}
    whole = staged(tmp_path / "whole", options={"save_total_limit": None, **layout}, **settings)
    whole.train()
    stopped = staged(tmp_path / "stopped", [Killed(4)], options=layout, **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    for folder, step in ((tmp_path / "stopped", 4), (tmp_path / "whole", 5 if layout else 1)):
        again = staged(folder, options=layout, **settings)
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_same(again, whole)
        assert again.curriculum.counts == whole.curriculum.counts
    ended = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    for name, weight in whole.curriculum.frozen.items():
        assert torch.equal(weight, ended[name.replace(".default", "")])
    assert len(whole.curriculum.frozen) == (len(ended) if kind == ICFT else 0)


def test_a_kill_in_what_is_measured_after_a_stage_loses_no_step(tmp_path: Path) -> None:
    for step in (2, 6):  # the ends of the first and of the last stage
        stopped = staged(tmp_path / str(step), [Killed(step)], options={"save_steps": 100})
        with pytest.raises(KeyboardInterrupt):
            stopped.train()
        checkpoint = tmp_path / str(step) / f"checkpoint-{step}"
        assert checkpoint_damage(checkpoint, files_to_resume(stopped.accelerator)) is None, step


def test_each_step_replays_its_share_of_the_last_rows_and_of_those_whose_loss_stays_high(tmp_path: Path) -> None:
    options = {"max_steps": 150, "per_device_train_batch_size": 8}
    curriculum, hard = planned(tmp_path, np.arange(600) % 3, options, **ICFT), {0, 3, 1, 4}
    measured: list[list[int]] = []

    def measure(rows: list[int]) -> np.ndarray:
        measured.append(sorted(rows))
        losses = np.random.default_rng(len(measured)).random(600)
        losses[list(hard)] = 2
        return np.stack([losses[rows], np.ones(len(rows))])

    curriculum._measure = measure  # type: ignore[method-assign]
    steps = rows_of_steps(curriculum)
    assert measured == [list(range(600)), list(range(0, 600, 3)), [row for row in range(600) if row % 3 < 2]]
    assert all(row % 3 == 0 for step in steps[:50] for row in step)
    for number, known in ((1, {0, 3}), (2, hard)):
        high = set(curriculum.counts["long_term"][number])
        recent = set(np.concatenate(curriculum.drawn[:number])[-128:].tolist())
        assert known <= high and len(high) < 200 and all(row % 3 < number for row in high)
        replayed = [[row for row in step if row % 3 != number] for step in steps[50 * number : 50 * number + 50]]
        assert all(3 <= len(rows) <= 5 and set(rows) <= high | recent for rows in replayed)
        counts = np.bincount([row for rows in replayed for row in rows], minlength=600)
        assert counts.sum() == pytest.approx(200, abs=3) and all(counts[row] >= 1 for row in known)
        assert counts[list(high)].sum() >= 98


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}], ids=["padded", "padding-free"])
def test_the_consistency_term_is_the_divergence_from_the_adapter_of_the_previous_stage(
    tmp_path: Path, layout: dict[str, Any]
) -> None:
    """KL(previous ‖ now), a mean over answer tokens, by the formula; the adapter is the same afterwards."""
    trainer = staged(tmp_path, options={"gradient_accumulation_steps": 1, **layout}, dropout=0.0, **ICFT)
    trainer.curriculum.drawn = [np.arange(16)]
    batch, generator = next(trainer.curriculum.batches(0)), torch.Generator().manual_seed(0)
    adapter = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    def moved() -> dict[str, torch.Tensor]:
        for weight in adapter.values():
            weight.data = weight.data + torch.randn(weight.shape, generator=generator) * 0.1
        return adapter_of(trainer)

    def scores() -> torch.Tensor:
        found = []
        for row in make_rows().select(range(2)):
            with torch.no_grad():
                logits = trainer.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            found.append(logits.double().log_softmax(-1)[[label != -100 for label in row["labels"][1:]]])
        return torch.cat(found)

    before, old = moved(), scores()
    now, new = moved(), scores()
    losses = [float(trainer.compute_loss(trainer.model.train(), dict(batch)))]
    modes: list[bool] = []
    trainer.causal_lm().base_model.register_forward_hook(lambda module, *_: modes.append(module.training))
    for frozen in (now, before):
        trainer.curriculum.frozen = {name: weight.clone() for name, weight in frozen.items()}
        losses.append(float(trainer.compute_loss(trainer.model.train(), dict(batch))))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    divergence = float((old.exp() * (old - new)).sum(-1).mean())
    assert divergence > 0.01 and losses[2] - losses[0] == pytest.approx(divergence, rel=1e-4)
    assert_equal(adapter_of(trainer), now)
    assert modes == [True, False, True] * 2 and trainer.model.training  # no dropout in the previous adapter


def test_two_processes_have_the_rows_of_one_and_fill_a_short_step_from_itself(tmp_path: Path) -> None:
    def of_process(rank: int, rows: int, **options: Any) -> list[list[list[int]]]:
        curriculum = planned(tmp_path, CLASSES[:rows], {"gradient_accumulation_steps": 3, **options})
        if "per_device_train_batch_size" in options:
            curriculum.args.distributed_state = SimpleNamespace(num_processes=2, process_index=rank)
            held_out = (CLASSES[:rows], np.arange(6) % 3)
            curriculum = Curriculum(curriculum.settings, rows, held_out, curriculum.args)
        return rows_of_steps(curriculum)

    one = of_process(0, 16)
    two = [of_process(rank, 16, per_device_train_batch_size=2) for rank in range(2)]
    assert [sorted(step) for step in one] == [sorted(first + second) for first, second in zip(*two, strict=True)]
    two = [of_process(rank, 15, per_device_train_batch_size=2) for rank in range(2)]
    for step, (first, second) in enumerate(zip(*two, strict=True)):
        assert len(first) == len(second) == (2 if step % 2 else 6)
        assert len({row % 3 for row in first + second}) == 1 and len({*first, *second}) == (3 if step % 2 else 5), step


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}], ids=["padded", "padding-free"])
def test_the_measured_difficulty_is_the_loss_of_each_row_alone_and_is_measured_once(
    tmp_path: Path, layout: dict[str, Any]
) -> None:
    whole = staged(tmp_path, difficulty="loss", options=layout)
    rows = replace_weights(make_rows(), [[1.0] * len(row) for row in make_rows()["labels"]])
    expected = [formula(whole.model, rows.select([row]), "tokens") for row in range(16)]
    whole.train()
    losses = np.array(whole.curriculum.counts["losses"][0])
    assert losses == pytest.approx(expected, rel=1e-6)
    assert set(whole.curriculum.stages[0].pool) == set(losses.argsort()[:6])
    again = staged(tmp_path, difficulty="loss", options=layout)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same(again, whole)  # by the losses of the checkpoint; its adapter has others
    held_out = make_rows(6, seed=2)
    losses = [
        formula(
            build_model("llama"),
            replace_weights(held_out, [[1.0] * len(row) for row in held_out["labels"]]).select([row]),
            "tokens",
        )
        for row in range(6)
    ]
    assert whole.curriculum.counts["losses"][1] == pytest.approx(losses, rel=1e-6)


def test_what_a_curriculum_cannot_do_is_refused_with_its_key() -> None:
    rows = (
        ("curriculum: {restart: true}", "curriculum.kind", "cumulative"),
        ("curriculum: {kind: cumulativ}", "curriculum.kind", "write cumulative"),
        ("curriculum: {kind: disjoint, shares: [.5, .6, .1]}", "curriculum.shares", "sum to 1"),
        ("curriculum: {kind: disjoint, shares: [.5, .5]}", "curriculum.shares", "3 numbers"),
        ("curriculum: {kind: disjoint, shares: [.5, .5, 0]}", "curriculum.shares", "above 0"),
        ("curriculum: {kind: disjoint, learning_rates: [.1]}", "curriculum.learning_rates", "3 numbers"),
        ("curriculum: {kind: disjoint, shares: [.2, .3, .5], epochs_per_stage: 1}", "curriculum.shares", "it out"),
        ("curriculum: {kind: competence, restart: true}", "curriculum.restart", "leave it out"),
        ("curriculum: {kind: disjoint, consistency: .5}", "curriculum.consistency", "leave it out"),
        ("curriculum: {kind: icft, epochs_per_stage: 1}", "curriculum.epochs_per_stage", "leave it out"),
        ("curriculum: {kind: icft, short_term: .5}", "curriculum.short_term", "less than 0.5"),
        ("{curriculum: {kind: icft}, severity: {reduction: examples}}", "severity.reduction", "consistency: 0"),
        ("curriculum: {kind: disjoint, shares: [.2, .3, .3, .2]}", "curriculum.shares", "3 numbers"),
        ("curriculum: {kind: disjoint, difficulty: x, shares: [.5, .5], learning_rates: [1.0]}",
         "curriculum.learning_rates", "2 numbers"),
        ("curriculum: {kind: disjoint, learning_rates: []}", "curriculum.learning_rates", "at least 1"),
        ("{curriculum: {kind: disjoint}, training: {packing: true}}", "training.packing", "padding_free"),
        ("{curriculum: {kind: disjoint, restart: true}, training: {lr_scheduler_type: reduce_lr_on_plateau}}",
         "training.lr_scheduler_type", "linear"),
        ("{curriculum: {kind: disjoint}, training: {train_sampling_strategy: sequential}}",
         "training.train_sampling_strategy", "leave it out"),
        ("{curriculum: {kind: disjoint, epochs_per_stage: 1}, training: {max_steps: 9}}", "training.max_steps", "it"),
    )  # fmt: skip
    assert unexpected(rows) == []
    off = recipe_from_values({"curriculum": {"kind": "none", "shares": [0.2, 0.3, 0.5], "restart": True}})
    assert recipe_from_values(off.model_dump()) == off


def test_a_stage_without_rows_or_steps_is_refused(tmp_path: Path) -> None:
    for difficulty, settings, remedy in (
        (CLASSES % 2, {}, "curriculum.difficulty"),
        (np.zeros(2), {"difficulty": "length"}, "curriculum.difficulty"),
        (CLASSES, {"shares": [0.98, 0.01, 0.01]}, "curriculum.shares"),
    ):
        with pytest.raises(RecipeError, match=remedy):
            planned(tmp_path, np.asarray(difficulty), **settings)


# Whole runs.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("base")
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    names = ("critical", "neutral", "non-critical")
    rows = [f"سؤال {n} {text},جواب {n},{names[n % 3]},{n % 7 + 0.5}" for n, text in enumerate(SENTENCES * 6)]
    (folder / "rows.csv").write_text("question,answer,severity,grade\n" + "\n".join(rows), encoding="utf-8")
    data = [f"model.name_or_path={folder}", f"data.path={folder / 'rows.csv'}", "training.max_length=160"]
    return [*data, *SPLIT, "training.max_steps=6", "training.eval_strategy=no", "training.logging_steps=1"]


@pytest.fixture(scope="module")
def run(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    words = ["curriculum.kind=cumulative", "curriculum.restart=true", "curriculum.learning_rates=[2e-3, 1e-3, 8e-4]"]
    return train(load_recipe(QUICKSTART, [*base, *words]), tmp_path_factory.mktemp("run") / "run")


def test_a_run_keeps_its_stages_with_the_losses_after_each(run: Run) -> None:
    metrics = run.metrics()
    assert metrics["training"]["steps"] == 6
    stages = metrics["curriculum"]["stages"]
    assert [stage["steps"] for stage in stages] == [2, 2, 2] and metrics["training"]["tokens"] > 0
    assert [stage["name"] for stage in stages[1:]] == ["non_critical to neutral", "non_critical to critical"]
    assert stages[-1]["rows"] == metrics["weights"]["consultations"] > stages[1]["rows"] > stages[0]["rows"]
    assert [stage["learning_rate"] for stage in stages] == [2e-3, 1e-3, 8e-4]
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len([line for line in log if "loss" in line]) == 6
    forgotten = metrics["curriculum"]["held_out"]
    assert list(forgotten) == ["non_critical", "neutral", "critical"]
    for name, losses in forgotten.items():
        assert len(set(losses)) == 3 and losses[-1] == pytest.approx(metrics["after"][f"loss_{name}"], rel=1e-6)
    console = Console(width=80, file=io.StringIO())
    console.print(run_summary(run))
    assert "After each stage" in console.file.getvalue() and f"{forgotten['neutral'][1]:.3f}" in console.file.getvalue()
    page = write_report(run.folder).path.read_text(encoding="utf-8")
    assert "non-critical to neutral" in page and "rises again" in page


def test_a_column_of_numbers_orders_the_rows_and_one_of_words_is_refused(tmp_path: Path, base: list[str]) -> None:
    words = ["curriculum.kind=competence"]
    ordered = train(load_recipe(QUICKSTART, [*base, *PLAIN, *words, "curriculum.difficulty=grade"]), tmp_path / "run")
    assert ordered.metrics()["curriculum"]["stages"][0]["name"] == "competence"
    for column, word in (("answer", "row 2;"), ("absent", "no column")):
        with pytest.raises(DataError, match=word):
            train(load_recipe(QUICKSTART, [*base, *words, f"curriculum.difficulty={column}"]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_rows_without_a_severity_are_not_ordered_by_it(tmp_path: Path) -> None:
    path, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    rows = [{"question": f"سؤال رقم {n}", "answer": "راجع الطبيب", "weight": 1} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    other.write_text("\n".join(json.dumps({**row, "severity": "critical"}) for row in rows), encoding="utf-8")
    uniform, wrong = "severity.control=uniform", []
    for words in (
        [f"data.path={path}", uniform],
        [f"data.path={path}", "severity.source=weight"],
        [f"data.path={other}", f"data.mix.sources.more={path}", "data.mix.ratios=50-50", uniform],
    ):
        recipe = load_recipe(QUICKSTART, [*PLAIN, *words, "curriculum.kind=competence", "training.max_steps=2"])
        try:
            train(recipe, tmp_path / "run")
            wrong.append(words)
        except DataError as error:
            wrong += [] if "curriculum.difficulty=length" in str(error) else [str(error)]
    assert wrong == []


def test_a_training_starts_from_an_adapter_and_repeats_that_after_a_kill(
    tmp_path: Path, base: list[str], run: Run
) -> None:
    words = [*base, "training.max_steps=2", f"training.init_adapter={run.folder}"]
    started = train(load_recipe(QUICKSTART, words), tmp_path / "one")
    assert started.metrics()["before"] == pytest.approx(run.metrics()["after"], rel=1e-6)
    assert started.metrics()["model"]["init_adapter"].startswith("sha256:")
    write_card(started)
    card = (started.adapter / "README.md").read_text(encoding="utf-8")
    assert f"init_adapter: {run.folder.name}" in card and str(run.folder) not in card
    killed = Run(Path(shutil.copytree(started.folder, tmp_path / "two")))
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.checkpoints)
    train(load_recipe(QUICKSTART, words), killed.folder, resume=True)
    assert_same_bits(killed, started)
    # What a checkpoint has is not overwritten, and the adapter need not be there any more.
    moved = Path(shutil.copytree(run.folder, tmp_path / "moved"))
    words[-1] = f"training.init_adapter={moved / 'adapter'}"
    words += ["training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=2"]
    third = train(load_recipe(QUICKSTART, words), tmp_path / "three")
    assert all(torch.equal(weights_of(third)[name], value) for name, value in weights_of(started).items())
    shutil.rmtree(third.checkpoints / "checkpoint-2")
    shutil.rmtree(moved)
    (third.adapter / "adapter_model.safetensors").rename(tmp_path / "kept.safetensors")
    train(load_recipe(QUICKSTART, words), third.folder, resume=True)
    assert (third.adapter / "adapter_model.safetensors").read_bytes() == (tmp_path / "kept.safetensors").read_bytes()
    # Without a checkpoint it has to be there, and the same.
    shutil.move(third.adapter, moved / "adapter")
    shutil.rmtree(third.checkpoints)
    with pytest.raises(RunError, match="restore it"):
        train(load_recipe(QUICKSTART, words), third.folder, resume=True)


def test_an_adapter_without_its_run_names_its_base_model(tmp_path: Path, base: list[str], run: Run) -> None:
    alone = Path(shutil.copytree(run.adapter, tmp_path / "copied" / "adapter"))
    own = Path(json.loads((alone / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    build_model("llama", seed=5).save_pretrained(other := tmp_path / "other-base")
    build_tokenizer().save_pretrained(other)
    wrong = []
    for model, warned in ((own, False), (other, True)):
        words = [*base, "training.max_steps=1", f"training.init_adapter={alone}", f"model.name_or_path={model}"]
        train(load_recipe(QUICKSTART, words), tmp_path / f"{warned}", console=Console(file=(screen := io.StringIO())))
        wrong += [] if ("other-base" in screen.getvalue().partition("Warning")[2]) == warned else [screen.getvalue()]
    assert wrong == []


def test_another_adapter_is_no_start(tmp_path: Path, base: list[str], run: Run) -> None:
    other = tmp_path / "other"
    build_model("llama", seed=5).save_pretrained(other)
    build_tokenizer().save_pretrained(other)
    damaged = Path(shutil.copytree(run.adapter, tmp_path / "damaged"))
    weights = load_file(damaged / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), damaged / "adapter_model.safetensors")
    empty = Path(shutil.copytree(run.adapter, tmp_path / "empty"))
    (empty / "adapter_model.safetensors").unlink()
    wrong = []
    for name, words, remedy in (
        (run.folder, ["lora.r=8"], "lora.r=16"),
        (run.folder, ["lora.lora_alpha=64"], "lora.lora_alpha=32"),
        (run.folder, ["lora.target_modules=[q_proj]"], "adapter_config.json"),
        (run.folder, [f"model.name_or_path={other}"], "model.name_or_path"),
        (damaged, [], "1 other"),
        (tmp_path / "absent", [], "training.init_adapter"),
        (other, [], "adapter_config.json"),
        (empty, [], "copy it again"),
    ):
        try:
            train(load_recipe(QUICKSTART, [*base, *words, f"training.init_adapter={name}"]), tmp_path / "run")
            wrong.append((name, words))
        except ModelError as error:
            if remedy not in str(error) or "\n" in str(error) or (tmp_path / "run").exists():
                wrong.append((name, str(error)))
    assert wrong == []
