"""Rows come in the stages that were asked for, in the steps of a plain training, and a resume finds its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from sevpeft.errors import DataError, ModelError, RecipeError
from sevpeft.recipe import CurriculumSection, StoppingSection, load_recipe, recipe_from_values
from sevpeft.runs import Run
from sevpeft.sharing.card import write_card
from sevpeft.training.callbacks import SignalHandler, StepGuard
from sevpeft.training.curriculum import Curriculum
from sevpeft.training.train import train
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.models import SENTENCES, build_model, build_tokenizer
from tests.recipe.test_checks import unexpected
from tests.training.test_exact_resume import STEPS, assert_same, counts_of, history
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
    return Curriculum(section, 16 if numbers is None else len(numbers), numbers, args)


def staged(
    folder: Path, callbacks: Any = (), options: dict[str, Any] | None = None, dropout: float = 0.2, **settings: Any
) -> Any:
    """A trainer whose stages end after the second and the fourth of six steps; an epoch has four."""
    steps = {**STEPS, "per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 1, "logging_steps": 1}
    steps |= {"eval_strategy": "steps", "eval_steps": 100, **(options or {})}
    curriculum = planned(folder, None if settings.get("difficulty") == "loss" else CLASSES, steps, **settings)
    given = {"args": curriculum.args, "curriculum": curriculum, "callbacks": callbacks, "lora_dropout": dropout}
    trainer = make_trainer(folder, make_rows(), eval_dataset=make_rows(6, seed=2), **given)
    trainer.sort_within_steps = dropout > 0
    return trainer


def rows_of_steps(curriculum: Curriculum) -> list[list[int]]:
    """Rows of each step, from the epochs that the sampler gives."""
    found = []
    for epoch in range(-(-curriculum.steps // curriculum.of_epoch)):
        rows = curriculum.epoch(epoch)
        found += [rows[start : start + curriculum.of_step] for start in range(0, len(rows), curriculum.of_step)]
    return found[: curriculum.steps]


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
        ({"difficulty": "length", "stages": 2}, CLASSES > 1, [named[0] | named[1], named[2]]),
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
    assert (plain.order == planned(tmp_path).order).all()
    assert (plain.order != planned(tmp_path, options={"seed": 1}).order).any()
    assert (plain.order != planned(tmp_path, options={"data_seed": 1}).order).any()


def test_competence_grows_with_the_root_of_the_steps_and_draws_from_the_easiest(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).permutation(1000)
    for order, sign in (("easy_first", 1), ("hard_first", -1)):
        curriculum = planned(tmp_path, numbers, {"max_steps": 400}, kind="competence", difficulty="length", order=order)
        ranks = (sign * numbers).argsort().argsort()
        most = [max(ranks[step]) + 1 for step in rows_of_steps(curriculum)]
        allowed = [max(4, 1000 * min(1, (step * (1 - 1e-4) / 200 + 1e-4) ** 0.5)) for step in range(400)]
        assert all(found <= limit + 1 for found, limit in zip(most, allowed, strict=True))
        assert most[0] <= 10 and max(most[150:]) > 900
        assert all(len(set(step)) == 4 for step in rows_of_steps(curriculum))


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
        assert (curriculum.of_epoch, curriculum.steps) == (found[1], found[-1]), options
        again = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
        assert again[0] == found[0] and again[1] == found[1] and again[-1] == found[-1], options
        assert len(curriculum.order) == 16 * found[0]


def test_epochs_per_stage_are_as_many_rows_as_separate_trainings_take(tmp_path: Path) -> None:
    curriculum = planned(tmp_path, kind="cumulative", epochs_per_stage=3)
    taken = [curriculum.rows_until(stage.end) - curriculum.rows_until(stage.begin) for stage in curriculum.stages]
    assert [rows - 3 * len(stage.pool) for rows, stage in zip(taken, curriculum.stages, strict=True)] == [2, 3, 0]
    assert curriculum.steps == curriculum.args.max_steps == 5 + 9 + 12 and curriculum.as_dict()["budget"] != "matched"


def test_the_learning_rate_of_each_step_is_that_of_its_stage(tmp_path: Path) -> None:
    rates = [1e-3, 5e-4, 2e-4]
    for settings, expected in (
        ({"learning_rates": rates}, [rates[step // 2] * (1 - step / 6) for step in range(6)]),
        ({"learning_rates": rates, "restart": True}, [rates[step // 2] * (1 - step % 2 / 2) for step in range(6)]),
        ({"restart": True}, [1e-2 * (1 - step % 2 / 2) for step in range(6)]),
        ({}, [1e-2 * (1 - step / 6) for step in range(6)]),
    ):
        trainer = staged(tmp_path, options={"save_strategy": "no"}, **settings)
        trainer.train()
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [line["learning_rate"] for line in lines] == pytest.approx(expected), settings
        assert [line["stage"] for line in lines] == [1, 1, 2, 2, 3, 3]
        validated = [(entry["step"], entry["stage"]) for entry in trainer.state.log_history if "eval_loss" in entry]
        assert validated == [(0, 1), (2, 1), (4, 2), (6, 3)]


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


def test_the_losses_of_harder_rows_are_no_divergence(tmp_path: Path) -> None:
    signals = SignalHandler(tmp_path, lambda sentence: None)
    for settings, new in (({}, [2, 4]), ({"kind": "competence", "competence_duration": 0.5}, [0, 1, 2])):
        guard = StepGuard(staged(tmp_path, **settings), StoppingSection(), signals, lambda rows: [])
        guard.trainer._tr_loss = torch.zeros(())
        for step in range(6):
            guard.counts.update(first=[1.0], last=[9.0], diverging=3)
            guard.on_step_begin(guard.trainer.args, SimpleNamespace(global_step=step))
            assert (guard.counts["diverging"] == 0) == (guard.counts["last"] == []) == (step in new), (settings, step)


class Killed(TrainerCallback):
    """Ends the training in the validation after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_kill_inside_a_stage_at_its_end_or_in_the_validation_there_changes_no_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"kind": "cumulative", "restart": True, "learning_rates": [1e-2, 5e-3, 1e-2]}
    whole = staged(tmp_path / "whole", options={"save_total_limit": None}, **settings)
    whole.train()
    for step in (1, 2, 6):
        again = staged(tmp_path / "whole", **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(again, whole)
    stopped = staged(tmp_path / "stopped", [Killed(4)], **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    checkpoint = tmp_path / "stopped" / "checkpoint-4"
    assert counts_of(checkpoint)["evaluation_due"]
    again = staged(tmp_path / "stopped", **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same(again, whole)
    assert [entry["step"] for entry in history(again) if "eval_loss" in entry] == [0, 2, 4, 6]


def test_two_processes_have_the_rows_of_one_and_fill_a_short_step_from_itself(tmp_path: Path) -> None:
    one = planned(tmp_path, options={"gradient_accumulation_steps": 3})
    two = planned(tmp_path, options={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3})
    two.args.distributed_state = SimpleNamespace(num_processes=2)
    two = Curriculum(two.settings, 16, CLASSES, two.args)
    assert one.of_step == two.of_step == 12 and one.steps == two.steps
    assert [sorted(step) for step in rows_of_steps(one)] == [sorted(step) for step in rows_of_steps(two)]
    uneven = Curriculum(two.settings, 15, CLASSES[:15], two.args)
    for epoch in range(4):
        rows = uneven.epoch(epoch)
        assert len(rows) == 16 and rows[15] in rows[12:15]


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}], ids=["padded", "padding-free"])
def test_the_measured_difficulty_is_the_loss_of_each_row_alone_and_is_measured_once(
    tmp_path: Path, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = staged(tmp_path, difficulty="loss", options=layout)
    rows = replace_weights(make_rows(), [[1.0] * len(row) for row in make_rows()["labels"]])
    expected = [formula(whole.model, rows.select([row]), "tokens") for row in range(16)]
    whole.train()
    losses = np.array(whole.curriculum.counts["losses"])
    assert losses == pytest.approx(expected, rel=1e-6)
    assert set(whole.curriculum.stages[0].pool) == set(losses.argsort()[:6])
    monkeypatch.setattr(SeveritySFTTrainer, "losses_of_rows", None)  # a resume has them from its checkpoint
    again = staged(tmp_path, difficulty="loss", options=layout)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same(again, whole)


def test_what_a_curriculum_cannot_do_is_refused_with_its_key() -> None:
    rows = (
        ("curriculum: {restart: true}", "curriculum.kind", "cumulative"),
        ("curriculum: {kind: cumulativ}", "curriculum.kind", "write cumulative"),
        ("curriculum: {kind: disjoint, shares: [.5, .6, .1]}", "curriculum.shares", "sum to 1"),
        ("curriculum: {kind: disjoint, shares: [.5, .5]}", "curriculum.shares", "one for each"),
        ("curriculum: {kind: disjoint, shares: [.5, .5, 0]}", "curriculum.shares", "above 0"),
        ("curriculum: {kind: disjoint, learning_rates: [.1]}", "curriculum.learning_rates", "one for each"),
        ("curriculum: {kind: disjoint, shares: [.2, .3, .5], epochs_per_stage: 1}", "curriculum.shares", "leave one"),
        ("curriculum: {kind: competence, restart: true}", "curriculum.restart", "leave it out"),
        ("curriculum: {kind: disjoint, initial_competence: .1}", "curriculum.initial_competence", "leave it out"),
        ("curriculum: {kind: disjoint, stages: 4}", "curriculum.stages", "three"),
        ("curriculum: {kind: disjoint, difficulty: column}", "curriculum.difficulty_column", "both"),
        ("curriculum: {kind: disjoint, difficulty_column: x}", "curriculum.difficulty_column", "both"),
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
    for error, difficulty, settings, remedy in (
        (DataError, CLASSES % 2, {}, "curriculum.difficulty"),
        (DataError, np.zeros(2), {"difficulty": "length"}, "curriculum.stages"),
        (RecipeError, CLASSES, {"shares": [0.98, 0.01, 0.01]}, "curriculum.shares"),
    ):
        with pytest.raises(error, match=remedy):
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
    assert metrics["curriculum"]["budget"] == "matched" and metrics["training"]["steps"] == 6
    stages = metrics["curriculum"]["stages"]
    assert [stage["steps"] for stage in stages] == [2, 2, 2] and metrics["training"]["tokens"] > 0
    assert [stage["name"] for stage in stages[1:]] == ["non_critical to neutral", "non_critical to critical"]
    assert stages[-1]["rows"] == metrics["weights"]["consultations"] > stages[1]["rows"] > stages[0]["rows"]
    assert [stage["learning_rate"] for stage in stages] == [2e-3, 1e-3, 8e-4]
    assert stages[-1]["validation"] == metrics["after"]
    assert len({stage["validation"]["loss_critical"] for stage in stages}) == 3
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["stage"] for line in log if "loss" in line] == [1, 1, 2, 2, 3, 3]


def test_a_column_of_numbers_orders_the_rows_and_one_of_words_is_refused(tmp_path: Path, base: list[str]) -> None:
    words = ["curriculum.kind=competence", "curriculum.difficulty=column"]
    ordered = train(
        load_recipe(QUICKSTART, [*base, *PLAIN, *words, "curriculum.difficulty_column=grade"]), tmp_path / "run"
    )
    assert ordered.metrics()["curriculum"]["stages"][0]["name"] == "competence"
    for column, word in (("answer", "Row 2: "), ("absent", "no column absent")):
        with pytest.raises(DataError, match=word):
            train(load_recipe(QUICKSTART, [*base, *words, f"curriculum.difficulty_column={column}"]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


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
    words += ["training.save_strategy=steps", "training.save_steps=1"]
    third = train(load_recipe(QUICKSTART, words), tmp_path / "three")
    assert all(torch.equal(weights_of(third)[name], value) for name, value in weights_of(started).items())
    shutil.rmtree(third.checkpoints / "checkpoint-2")
    shutil.rmtree(moved)
    (third.adapter / "adapter_model.safetensors").rename(tmp_path / "kept.safetensors")
    train(load_recipe(QUICKSTART, words), third.folder, resume=True)
    assert (third.adapter / "adapter_model.safetensors").read_bytes() == (tmp_path / "kept.safetensors").read_bytes()


def test_another_adapter_is_no_start(tmp_path: Path, base: list[str], run: Run) -> None:
    other = tmp_path / "other"
    build_model("llama", seed=5).save_pretrained(other)
    build_tokenizer().save_pretrained(other)
    damaged = Path(shutil.copytree(run.adapter, tmp_path / "damaged"))
    weights = load_file(damaged / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), damaged / "adapter_model.safetensors")
    wrong = []
    for name, words, remedy in (
        (run.folder, ["lora.r=8"], "lora.r=16"),
        (run.folder, ["lora.lora_alpha=64"], "lora.lora_alpha=32"),
        (run.folder, ["lora.target_modules=[q_proj]"], "adapter_config.json"),
        (run.folder, [f"model.name_or_path={other}"], "model.name_or_path"),
        (damaged, [], "1 matrices"),
        (tmp_path / "absent", [], "training.init_adapter"),
        (other, [], "adapter_config.json"),
    ):
        try:
            train(load_recipe(QUICKSTART, [*base, *words, f"training.init_adapter={name}"]), tmp_path / "run")
            wrong.append((name, words))
        except ModelError as error:
            if remedy not in str(error) or "\n" in str(error) or (tmp_path / "run").exists():
                wrong.append((name, str(error)))
    assert wrong == []
