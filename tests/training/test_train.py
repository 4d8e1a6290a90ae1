"""A run folder from start to end: complete, repeatable, resumable after a kill, equal on two processes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file

from sevpeft.errors import RecipeError, RunError
from sevpeft.modeling.loading import choose_precision, load_model
from sevpeft.modeling.saved_adapters import attach_adapter
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.card import write_card
from sevpeft.training.checkpoints import as_started
from sevpeft.training.resolve import is_automatic
from sevpeft.training.train import train
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.conftest import SENTENCES
from tests.training.children import exit_codes, said_by, start, train_in_child
from tests.training.test_trainer import make_rows, make_trainer

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


@pytest.fixture
def settings(model_folder: Callable[..., Path]) -> list[str]:
    """A training of about 20 steps on the bundled sample that takes a second or two."""
    return [
        f"model.name_or_path={model_folder('llama')}",
        "data.max_rows=100",
        "training.max_length=160",
        "training.max_steps=12",
        "training.logging_steps=1",
        "training.save_strategy=steps",
        "training.save_steps=4",
        "training.eval_strategy=steps",
        "training.eval_steps=4",
    ]


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def assert_same_bits(one: Run, other: Run) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_run_folder_is_complete_and_says_what_happened(tmp_path: Path, settings: list[str]) -> None:
    recipe = load_recipe(QUICKSTART, settings)
    run = train(recipe, tmp_path / "run")
    write_card(run)
    stored = load_recipe(run.folder / "recipe.yaml")
    assert not is_automatic(stored) and as_started(recipe, run) == stored
    environment = run.environment()
    assert environment["versions"]["trl"] and environment["seed"] == 42 and environment["processes"] == 1
    assert environment["data_fingerprint"].startswith("sha256:")
    metrics = run.metrics()
    assert set(metrics) == {"model", "data", "weights", "training", "before", "after"}
    assert set(metrics["after"]) == {"loss", "loss_non_critical", "loss_neutral", "loss_critical"}
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    refused = metrics["data"]["encoding"]["train"]["refused"]
    assert metrics["weights"]["consultations"] == metrics["data"]["rows"]["train"] - refused
    assert sum(metrics["weights"]["severities"].values()) == metrics["weights"]["consultations"]
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 13))
    assert [entry["step"] for entry in log if "eval_loss_critical" in entry] == [0, 4, 8, 12]
    assert AutoPeftModelForCausalLM.from_pretrained(run.adapter)


def test_neither_card_nor_log_nor_figures_hold_a_word_of_a_consultation_or_a_path(
    tmp_path: Path, settings: list[str]
) -> None:
    data = tmp_path / "patients_of_dr_x.csv"
    rows = [
        f"سؤال فريد رقم {index} {sentence},جواب فريد {index},critical" for index, sentence in enumerate(SENTENCES * 4)
    ]
    data.write_text("question,answer,severity\n" + "\n".join(rows), encoding="utf-8")
    run = train(load_recipe(QUICKSTART, [*settings, f"data.path={data}"]), tmp_path / "run")
    write_card(run)
    published = [run.adapter / "README.md", run.folder / "log.jsonl", run.folder / "environment.json"]
    for path in [*published, run.folder / "metrics.json"]:
        text = path.read_text(encoding="utf-8")
        assert "فريد" not in text, path
    assert str(tmp_path) not in published[0].read_text(encoding="utf-8")


def test_a_run_repeats_to_the_bit(tmp_path: Path, settings: list[str]) -> None:
    runs = [train(load_recipe(QUICKSTART, settings), tmp_path / name) for name in ("one", "two")]
    assert_same_bits(*runs)
    assert (runs[0].adapter / "adapter_config.json").read_bytes() == (
        runs[1].adapter / "adapter_config.json"
    ).read_bytes()


def test_severity_weights_change_the_adapter_and_uniform_ones_do_not_need_severity(
    tmp_path: Path, settings: list[str]
) -> None:
    def run(name: str, *more: str) -> dict[str, torch.Tensor]:
        return weights_of(train(load_recipe(QUICKSTART, [*settings, *more]), tmp_path / name))

    balanced, shuffled = run("balanced"), run("shuffled", "severity.control=shuffled")
    uniform = run("uniform", "severity.control=uniform")
    ones = run("ones", "severity.weights={non_critical: 1, neutral: 1, critical: 1}")
    assert any(not torch.equal(balanced[name], uniform[name]) for name in balanced)
    assert any(not torch.equal(balanced[name], shuffled[name]) for name in balanced)
    assert all(torch.equal(uniform[name], ones[name]) for name in uniform)


@pytest.mark.parametrize(
    "wrong",
    [
        *("training.optim=schedule_free_adamw", "training.lr_scheduler_kwargs={x: 1}"),
        "training.torch_compile_backend=no_such",
    ],
)
def test_what_the_trainer_would_meet_in_its_loop_is_refused_before_there_is_a_run(
    tmp_path: Path, settings: list[str], wrong: str
) -> None:
    with pytest.raises(RecipeError, match="is refused"):
        train(load_recipe(QUICKSTART, [*settings, wrong]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path, settings: list[str]) -> None:
    whole = train(load_recipe(QUICKSTART, settings), tmp_path / "whole")
    killed = Run(tmp_path / "killed")
    killed.folder.mkdir()
    for name in ("recipe.yaml", "environment.json"):
        (killed.folder / name).write_bytes((whole.folder / name).read_bytes())
    killed.write_json(
        "metrics.json", {k: v for k, v in whole.metrics().items() if k not in ("training", "before", "after")}
    )
    assert_same_bits(whole, train(load_recipe(QUICKSTART, settings), killed.folder, resume=True))


def test_a_finished_run_is_not_trained_again(tmp_path: Path, settings: list[str]) -> None:
    recipe = load_recipe(QUICKSTART, settings)
    run = train(recipe, tmp_path / "run")
    before = (run.adapter / "adapter_model.safetensors").stat().st_mtime_ns
    train(recipe, run.folder, resume=True)
    assert (run.adapter / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="--resume"):
        train(recipe, run.folder)


def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path, settings: list[str]) -> None:
    run = train(load_recipe(QUICKSTART, settings), tmp_path / "run")
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"training\.learning_rate"):
        train(load_recipe(QUICKSTART, [*settings, "training.learning_rate=1e-5"]), run.folder, resume=True)


PACKED = ["severity.reduction=examples", "training.packing=true", "training.gradient_checkpointing=true"]


@pytest.mark.parametrize("more", [[], PACKED], ids=["padded", "packed"])
def test_two_processes_train_the_same_adapter_as_one(tmp_path: Path, settings: list[str], more: list[str]) -> None:
    common = [*settings, *more, "lora.lora_dropout=0", "training.learning_rate=1e-3", "data.validation_size=13"]
    common += ["training.global_batch_size=4"]
    one = train(load_recipe(QUICKSTART, [*common, "training.per_device_train_batch_size=4"]), tmp_path / "one")
    two = Run(tmp_path / "two")
    words = [*common, "training.per_device_train_batch_size=2"]
    child = start(train_in_child, QUICKSTART, words, two.folder, None, str(tmp_path / "cache"), processes=2)
    assert exit_codes(child) == [0, 0]
    assert two.environment()["processes"] == 2
    first, second = weights_of(one), weights_of(two)
    for name in first:
        assert float((first[name] - second[name]).abs().max()) <= 1e-5, name
    for moment in ("before", "after"):
        for name, value in one.metrics()[moment].items():
            assert two.metrics()[moment][name] == pytest.approx(value, rel=1e-5), (moment, name)


@pytest.mark.parametrize(
    ("more", "rounded"),
    [
        ([], True),
        (["lora.use_dora=true"], False),
        (["quantization.load_in_4bit=true"], True),
    ],
    ids=["LoRA", "DoRA", "QLoRA"],
)
def test_under_autocast_the_adapter_is_written_as_it_was_computed_with(
    tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str], rounded: bool
) -> None:
    """In half the bytes, and to the bit what validation saw; where that does not hold, in float32."""
    trained: list[Any] = []
    finish = SeveritySFTTrainer.save_model

    def keep(self: SeveritySFTTrainer, *args: Any, **kwargs: Any) -> None:
        trained.append(self.model)
        finish(self, *args, **kwargs)

    monkeypatch.setattr(SeveritySFTTrainer, "save_model", keep)
    words = [*settings, *more, "training.bf16=true", "training.learning_rate=1e-2"]
    recipe = load_recipe(QUICKSTART, words)
    run = train(recipe, tmp_path / "run")
    for name, tensor in weights_of(run).items():
        assert tensor.dtype == (torch.bfloat16 if rounded else torch.float32), name
    kept = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-12" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}, "training goes on from all digits"
    base = load_model(recipe, choose_precision(recipe))
    again = attach_adapter(base, run.adapter, recipe)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = (model.eval()(input_ids=ids).logits for model in (trained[-1], again))
    assert torch.equal(found, expected)


def test_full_memory_is_told_with_the_plan_or_the_batch_is_cut(
    tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = SeveritySFTTrainer.compute_loss

    def crowded(self: SeveritySFTTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.model.training and self.state.global_step == 5 and len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SeveritySFTTrainer, "compute_loss", crowded)
    words = [*settings, "training.per_device_train_batch_size=4", "training.global_batch_size=4"]
    words += ["training.padding_free=false", "lora.lora_dropout=0"]
    with pytest.raises(RunError) as full:
        train(load_recipe(QUICKSTART, words), tmp_path / "full")
    said = str(full.value)
    assert "memory is full; start another run with training.gradient_checkpointing=true" in said
    assert f"Checkpoints of {tmp_path / 'full'} are kept" in said and "auto_find_batch_size=true" in said
    assert (tmp_path / "full" / "checkpoints" / "checkpoint-4" / "manifest.json").is_file()

    console = Console(file=io.StringIO(), width=200)
    cut = train(
        load_recipe(QUICKSTART, [*words, "training.auto_find_batch_size=true"]), tmp_path / "cut", console=console
    )
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "full; continues from step 5 with 2 batches of 2 rows a step" in told
    monkeypatch.undo()
    roomy = train(load_recipe(QUICKSTART, words), tmp_path / "roomy")
    for name, value in weights_of(roomy).items():
        assert float((weights_of(cut)[name] - value).abs().max()) <= 1e-4, name
    assert cut.metrics()["after"]["loss"] == pytest.approx(roomy.metrics()["after"]["loss"], rel=1e-5)


def train_after_evaluation(folder: Path) -> None:
    trainer = make_trainer(folder, make_rows(), eval_dataset=make_rows(4, seed=1))
    trainer.evaluate()
    trainer.train()


def test_two_processes_that_would_train_apart_are_stopped(tmp_path: Path) -> None:
    processes = start(train_after_evaluation, tmp_path, str(tmp_path), processes=2)
    assert exit_codes(processes) == [1, 1]
    assert "without exchanging gradients" in said_by(processes[0], tmp_path)
