"""Whole runs: the folder is complete, repeatable, resumable and equal on two processes; output on the screen."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, GenerationConfig, TrainerControl, TrainerState

from sevpeft.errors import RecipeError, RunError
from sevpeft.modeling.adapters import attach_adapter
from sevpeft.modeling.loading import choose_precision, load_model, resolve_model
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run, file_hash
from sevpeft.sharing.card import write_card
from sevpeft.training.callbacks import RunProgress, Samples, energy_counters
from sevpeft.training.checkpoints import as_started
from sevpeft.training.resolve import is_automatic, with_training
from sevpeft.training.train import train
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.models import SENTENCES, build_model, build_tokenizer
from tests.training.children import exit_codes, message_of, start, train_in_child
from tests.training.test_trainer import make_config, make_rows, make_trainer

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
PLAIN = ["training.eval_strategy=no", "training.save_strategy=no"]


# A split that is not chosen by the memory plan, which takes longer than these trainings.
SPLIT = [
    *("training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1"),
    *("training.per_device_eval_batch_size=8", "training.gradient_checkpointing=false"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a training of a few steps on a file of patients, of a second or two."""
    folder = tmp_path_factory.mktemp("base")
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    data = folder / "patients_of_dr_x.csv"
    severities = ("critical", "neutral", "non-critical")
    rows = [
        f"سؤال فريد رقم {index} {sentence},جواب فريد {index},{severities[index % 3]}"
        for index, sentence in enumerate(SENTENCES * 6)
    ]
    data.write_text("question,answer,severity\n" + "\n".join(rows), encoding="utf-8")
    return [f"model.name_or_path={folder}", f"data.path={data}", "training.max_length=160", "training.max_steps=4"]


@pytest.fixture(scope="module")
def settings(base: list[str]) -> list[str]:
    """The same with a line of the log each step, checkpoints and validations."""
    steps = [f"training.{kind}_steps=2" for kind in ("save", "eval")] + ["training.logging_steps=1"]
    steps += ["training.save_strategy=steps", "training.eval_strategy=steps", "training.save_total_limit=2"]
    return [*base, *steps]


@pytest.fixture(scope="module")
def trained(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A finished run, and what it showed on a terminal."""
    screen = Console(file=io.StringIO(), width=80, force_terminal=True, force_interactive=True, highlight=False)
    run = train(load_recipe(QUICKSTART, settings), tmp_path_factory.mktemp("trained") / "run", console=screen)
    write_card(run)
    return run, screen.file.getvalue()  # type: ignore[attr-defined]


def test_the_adapter_asks_and_ends_as_it_was_trained(trained: tuple[Run, str]) -> None:
    run, tokenizer = trained[0], AutoTokenizer.from_pretrained(trained[0].adapter)
    prompt_messages = [{"role": "user", "content": "عندي صداع"}]
    prompt = resolve_model(load_recipe(run.folder / "recipe.yaml")).prompt
    ids = tokenizer.apply_chat_template(prompt_messages, add_generation_prompt=True, return_dict=False)
    assert ids == prompt.prompt_ids(["عندي صداع"])[0]
    assert prompt.end_id in GenerationConfig.from_pretrained(run.adapter).eos_token_id


@pytest.fixture
def copied(trained: tuple[Run, str], tmp_path: Path) -> Run:
    shutil.copytree(trained[0].folder, tmp_path / "run")
    return Run(tmp_path / "run")


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def assert_same_bits(one: Run, other: Run) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one.adapter / name).read_bytes() == (other.adapter / name).read_bytes(), name


def test_a_run_folder_is_complete_and_says_what_happened(trained: tuple[Run, str], settings: list[str]) -> None:
    run, screen = trained
    stored = load_recipe(run.folder / "recipe.yaml")
    assert not is_automatic(stored) and as_started(load_recipe(QUICKSTART, settings), run) == stored
    environment, metrics = run.read_json("environment.json"), run.metrics()
    assert environment["versions"]["trl"] and environment["seed"] == 42 and environment["processes"] == 1
    assert environment["data_fingerprint"].startswith("sha256:")
    assert set(metrics) == {"model", "data", "weights", "adapter", "training", "before", "after"}
    assert set(metrics["after"]) == {"loss", "loss_non_critical", "loss_neutral", "loss_critical"}
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    refused = metrics["data"]["encoding"]["train"]["refused"]
    assert metrics["weights"]["consultations"] == metrics["data"]["rows"]["train"] - refused
    assert sum(metrics["weights"]["severities"].values()) == metrics["weights"]["consultations"]
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in log if "eval_loss_critical" in entry] == [0, 2, 4]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert metrics["training"]["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert metrics["adapter"] == file_hash(run.adapter / "adapter_model.safetensors")
    assert any("loss_critical" in entry for entry in log)
    cost = metrics["training"]
    assert 0 < cost["step_seconds"] < cost["seconds"] and 0 < cost["peak_cpu_gib"] < 1000
    assert cost["tokens_per_second"] == pytest.approx(cost["tokens"] / cost["step_seconds"], rel=0.01)
    assert AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    # A fast validation may write over the speed before it is painted.
    assert "4/4" in screen and re.search(r"\d:\d\d:\d\d", screen) and re.search(r"tokens/s.*GiB|validating", screen)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", screen)]
    assert max(map(len, lines)) <= 80


def test_neither_card_nor_log_nor_figures_hold_a_word_of_a_consultation_or_a_path(trained: tuple[Run, str]) -> None:
    run, screen = trained
    published = [run.adapter / "README.md", run.folder / "log.jsonl", run.folder / "environment.json"]
    for path in [*published, run.folder / "metrics.json"]:
        assert "فريد" not in path.read_text(encoding="utf-8"), path
    assert "فريد" not in screen and str(run.folder) not in published[0].read_text(encoding="utf-8")


def test_a_run_killed_before_its_first_checkpoint_starts_again_and_repeats_to_the_bit(
    trained: tuple[Run, str], copied: Run, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sevpeft.training.callbacks.SECONDS_BETWEEN_LINES", 0.0)
    shutil.rmtree(copied.adapter)
    shutil.rmtree(copied.checkpoints)
    parts = copied.metrics()
    copied.write_json("metrics.json", {name: parts[name] for name in ("model", "data", "weights")})
    screen = Console(file=io.StringIO(), width=200)
    train(load_recipe(QUICKSTART, settings), copied.folder, resume=True, console=screen)
    assert_same_bits(trained[0], copied)
    lines = screen.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"step 3/4, \S+ left  loss \d\.\d+  [\d,]+ tokens/s  \d+\.\d GiB", lines), "not on a terminal"


def test_a_resumed_run_reports_damage_and_ends_with_the_same_bits(
    trained: tuple[Run, str], copied: Run, settings: list[str]
) -> None:
    shutil.rmtree(copied.adapter)
    path = copied.checkpoints / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(bytes(path.stat().st_size))
    screen = Console(file=io.StringIO(), width=200)
    train(load_recipe(QUICKSTART, settings), copied.folder, resume=True, console=screen)
    assert re.search(r"checkpoint-4 .*optimizer\.pt", screen.file.getvalue())  # type: ignore[attr-defined]
    assert copied.metrics()["training"]["resumed_from"] == "checkpoint-2"
    assert_same_bits(trained[0], copied)
    assert copied.metrics()["training"]["train_loss"] == pytest.approx(
        trained[0].metrics()["training"]["train_loss"], rel=1e-6
    )


def test_a_finished_run_keeps_the_checkpoints_that_were_asked_for_wherever_a_kill_came(
    trained: tuple[Run, str], copied: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    kept = sorted(path.name for path in trained[0].checkpoints.iterdir())
    assert kept == ["checkpoint-2", "checkpoint-4"]
    assert not list(trained[0].checkpoints.rglob("*token*")), "each would be a copy of all words"
    path, metrics = copied.folder / "recipe.yaml", copied.metrics()
    path.write_text(load_recipe(path, ["training.save_total_limit=auto"]).to_yaml(), encoding="utf-8")
    recipe = load_recipe(path)
    # As a kill leaves it before the figures are written, and another one before the checkpoints are taken away.
    copied.write_json("metrics.json", {name: of for name, of in metrics.items() if name not in ("training", "after")})
    assert not copied.finished
    with monkeypatch.context() as patch:
        patch.setattr("sevpeft.training.checkpoints.remove_of_finished", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, copied.folder, resume=True)
    assert sorted(path.name for path in copied.checkpoints.iterdir()) == kept and copied.finished
    with pytest.raises(RunError, match=r"training\.max_steps is 9 and was 4"):
        train(with_training(recipe, max_steps=9), copied.folder, resume=True)
    screen = Console(file=io.StringIO(), width=200)
    train(recipe, copied.folder, resume=True, console=screen)
    assert "is finished" in screen.file.getvalue() and not list(copied.checkpoints.iterdir())  # type: ignore[attr-defined]
    assert_same_bits(trained[0], copied)
    assert copied.metrics()["after"] == metrics["after"]


def test_samples_are_private_change_no_bit_and_come_once_also_after_a_kill(
    trained: tuple[Run, str], settings: list[str], tmp_path: Path
) -> None:
    recipe = load_recipe(QUICKSTART, [*settings, "training.generate_samples=4", "generation.max_new_tokens=3"])
    run = train(recipe, tmp_path / "run")
    assert_same_bits(trained[0], run)
    path = run.folder / "samples.jsonl"
    text, lines = path.read_text(encoding="utf-8"), [json.loads(line) for line in path.open(encoding="utf-8")]
    assert path.stat().st_mode & 0o077 == 0
    assert [(line["step"], line["number"]) for line in lines] == [(step, at) for step in (0, 2, 4) for at in range(4)]
    assert [line["severity"] for line in lines[:3]] == ["critical", "neutral", "non_critical"]
    assert len({line["prompt"] for line in lines}) == 4 and all("فريد" in line["reference"] for line in lines)
    # The last answers are those of the saved adapter.
    model = attach_adapter(load_model(recipe, choose_precision(recipe)), run.adapter, recipe)
    prompt = torch.tensor([build_tokenizer()(lines[-1]["prompt"])["input_ids"]])
    output = model.eval().generate(input_ids=prompt, max_new_tokens=3, do_sample=False)[0, prompt.shape[1] :]
    assert build_tokenizer().decode(output, skip_special_tokens=True).strip() == lines[-1]["prediction"]
    # Killed after the answers of step 4, and while a line was written that a reader must not trip over.
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    train(recipe, run.folder, resume=True)
    assert path.read_text(encoding="utf-8") == text
    assert_same_bits(trained[0], run)


def test_a_training_goes_on_after_samples_as_it_was(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_rows(), eval_dataset=make_rows(4, seed=2))
    model = trainer.causal_lm()
    model.generation_config.temperature, own = 0.3, model.generation_config
    recipe = load_recipe(QUICKSTART, ["training.generate_samples=9", "generation.max_new_tokens=1000"])
    model.config.max_position_embeddings = 24
    before, prompt = torch.get_rng_state(), Prompt.build(build_tokenizer(), **recipe.prompt.model_dump())
    samples = Samples(trainer, Run(tmp_path), recipe, prompt)
    model.train()
    samples.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert model.training and all(part.training for part in model.modules()) and model.generation_config is own
    assert torch.equal(torch.get_rng_state(), before)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4, "all rows, where there are fewer than asked for"
    assert samples.config.max_new_tokens <= 24 - 3, "a prompt and its answer fit the model's positions"


def test_energy_is_added_up_over_starts_and_no_counter_that_begins_again_takes_any_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, gpu = "cpu_watt_hours", "gpu_watt_hours"
    readings = iter([{cpu: 9.0}, {cpu: 10.0, gpu: 5.0}, {cpu: 1.0, gpu: 7.0}, {cpu: 1.5, gpu: 7.0}])
    monkeypatch.setattr("sevpeft.training.callbacks.energy_counters", lambda args: next(readings))
    progress = RunProgress(Run(tmp_path), Console(quiet=True))
    progress.counts[cpu] = 100.0  # of an earlier start
    args, state = make_config(tmp_path), TrainerState()
    progress.on_train_begin(args, state, TrainerControl())
    for _ in range(2):
        progress.on_step_begin()
        progress.on_step_end(args, state, TrainerControl(should_save=True))
    progress.on_train_end(args)
    assert (progress.cost[cpu], progress.cost[gpu]) == (101.5, 2.0)


def test_a_validation_shows_its_rows_and_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sevpeft.training.callbacks.SECONDS_BETWEEN_LINES", -1)
    console = Console(file=io.StringIO(), width=60)
    progress, loader = RunProgress(Run(tmp_path), console), DataLoader(range(10), batch_size=4)
    progress.on_train_begin(make_config(tmp_path), TrainerState(), TrainerControl())
    measured = DataLoader(range(10), batch_size=2)
    for _ in measured:  # by a curriculum, outside a validation
        progress.on_prediction_step(eval_dataloader=measured)
    for _ in range(2):  # validations
        for _ in loader:
            progress.on_prediction_step(eval_dataloader=loader)
        progress.on_evaluate()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    done = [re.search(r"validating (\d+)/10, 0:0\d:\d\d left", line) for line in lines]
    assert [int(one[1]) for one in done if one] == [2, 4, 6, 8, 10, *[3, 7, 10] * 2]


def test_a_machine_that_counts_no_energy_has_none_and_nvml_counts_millijoules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = make_config(tmp_path)
    assert "gpu_watt_hours" not in energy_counters(args)
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-some-uuid": "handle"}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"handle": 7_200_000}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="some-uuid"))
    assert energy_counters(args)["gpu_watt_hours"] == 2.0


def test_examples_severity_and_drawn_rows_are_those_of_the_start_and_private(
    tmp_path: Path, settings: list[str]
) -> None:
    examples = "prompt.examples=[{question: سؤال فريد, answer: جواب فريد}]"
    more = [examples, "prompt.severity=predicted", "severity.control=oversampled", "training.max_length=320"]
    recipe = load_recipe(QUICKSTART, [*settings, *more])
    screen = Console(file=io.StringIO(), width=200)
    whole = train(recipe, tmp_path / "whole", console=screen)
    assert (whole.folder / "recipe.yaml").stat().st_mode & 0o077 == 0
    assert "فريد" not in write_card(whole).read_text(encoding="utf-8") + screen.file.getvalue()  # type: ignore[attr-defined]
    copy = Run(Path(shutil.copytree(whole.folder, tmp_path / "copy")))
    shutil.rmtree(copy.adapter)
    shutil.rmtree(copy.checkpoints / "checkpoint-4")
    train(recipe, copy.folder, resume=True)
    assert_same_bits(whole, copy)
    with pytest.raises(RunError, match=r"prompt\.examples") as error:
        (copy.adapter / "adapter_model.safetensors").unlink()
        train(load_recipe(QUICKSTART, [*settings, *more[1:]]), copy.folder, resume=True)
    assert "فريد" not in str(error.value)


def test_a_run_is_trained_once_and_resumed_with_its_own_settings_only(copied: Run, settings: list[str]) -> None:
    recipe = load_recipe(QUICKSTART, settings)
    before = (copied.adapter / "adapter_model.safetensors").stat().st_mtime_ns
    train(recipe, copied.folder, resume=True)
    assert (copied.adapter / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="--resume"):
        train(recipe, copied.folder)
    (copied.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"training\.learning_rate"):
        train(load_recipe(QUICKSTART, [*settings, "training.learning_rate=1e-5"]), copied.folder, resume=True)


def test_severity_weights_change_the_adapter_and_uniform_ones_do_not_need_severity(
    tmp_path: Path, base: list[str]
) -> None:
    def run(name: str, *more: str) -> dict[str, torch.Tensor]:
        words = [*base, *SPLIT, *PLAIN, "training.max_steps=2", *more]
        return weights_of(train(load_recipe(QUICKSTART, words), tmp_path / name))

    balanced, shuffled = run("balanced"), run("shuffled", "severity.control=shuffled")
    uniform = run("uniform", "severity.control=uniform")
    ones = run("ones", "severity.weights={non_critical: 1, neutral: 1, critical: 1}")
    assert any(not torch.equal(balanced[name], uniform[name]) for name in balanced)
    assert any(not torch.equal(balanced[name], shuffled[name]) for name in balanced)
    assert all(torch.equal(uniform[name], ones[name]) for name in uniform)


def test_what_the_trainer_would_meet_in_its_loop_is_refused_before_there_is_a_run(
    tmp_path: Path, base: list[str]
) -> None:
    wrong = []
    for setting, word in {
        "training.optim=schedule_free_adamw": "schedulefree",
        "training.adam_beta1=2.0": "beta",
        "training.lr_scheduler_kwargs={x: 1}": "x",
        "training.lr_scheduler_type=cosine_with_min_lr": "min_lr",
        "training.report_to=[comet_ml]": "comet",
    }.items():
        try:
            train(load_recipe(QUICKSTART, [*base, *SPLIT, setting]), tmp_path / "run")
            wrong.append((setting, "trained"))
        except RecipeError as error:
            if word not in str(error) or "\n" in str(error) or (tmp_path / "run").exists():
                wrong.append((setting, str(error)))
    assert wrong == []


PACKED = [
    *("severity.reduction=examples", "training.packing=true", "training.gradient_checkpointing=true"),
    "training.max_steps=2",
]


@pytest.mark.parametrize("more", [[], PACKED], ids=["padded", "packed"])
def test_two_processes_train_the_same_adapter_as_one(tmp_path: Path, base: list[str], more: list[str]) -> None:
    common = [
        *base,
        *SPLIT,
        *PLAIN,
        *more,
        "lora.lora_dropout=0",
        "training.learning_rate=1e-3",
        "data.validation_size=13",
    ]
    common += ["training.global_batch_size=4", "training.logging_steps=2"]
    common += ["training.generate_samples=2", "generation.max_new_tokens=2"]
    two = Run(tmp_path / "two")
    words = [*common, "training.per_device_train_batch_size=2"]
    child = start(train_in_child, QUICKSTART, words, two.folder, None, str(tmp_path / "cache"), processes=2)
    one = train(load_recipe(QUICKSTART, [*common, "training.per_device_train_batch_size=4"]), tmp_path / "one")
    assert exit_codes(child) == [0, 0]
    assert two.read_json("environment.json")["processes"] == 2
    first, second = weights_of(one), weights_of(two)
    for name in first:
        assert float((first[name] - second[name]).abs().max()) <= 1e-5, name
    for moment in ("before", "after"):
        assert two.metrics()[moment] == pytest.approx(one.metrics()[moment], rel=1e-5), moment
    logs = [[json.loads(line) for line in (run.folder / "log.jsonl").open(encoding="utf-8")] for run in (one, two)]
    losses = [{name: of for line in log for name, of in line.items() if name.startswith("loss_")} for log in logs]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    samples = [(run.folder / "samples.jsonl").read_text(encoding="utf-8") for run in (one, two)]
    assert samples[0] == samples[1] and len(samples[0].splitlines()) == 2 * 2


@pytest.mark.parametrize(
    ("more", "rounded"),
    [([], True), (["lora.use_dora=true"], False), (["quantization.load_in_4bit=true"], True)],
    ids=["LoRA", "DoRA", "QLoRA"],
)
def test_under_autocast_the_adapter_is_written_as_it_was_computed_with(
    tmp_path: Path, base: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str], rounded: bool
) -> None:
    """In half the bytes, and to the bit what validation saw; where that does not hold, in float32."""
    trained: list[Any] = []
    finish = SeveritySFTTrainer.save_model

    def keep(self: SeveritySFTTrainer, *args: Any, **kwargs: Any) -> None:
        trained.append(self.model)
        finish(self, *args, **kwargs)

    monkeypatch.setattr(SeveritySFTTrainer, "save_model", keep)
    words = [*base, *SPLIT, *more, "training.eval_strategy=no", "training.max_steps=2", "training.bf16=true"]
    words.append("training.save_total_limit=1")
    recipe = load_recipe(QUICKSTART, [*words, "training.learning_rate=1e-2"])
    run = train(recipe, tmp_path / "run")
    for name, tensor in weights_of(run).items():
        assert tensor.dtype == (torch.bfloat16 if rounded else torch.float32), name
    kept = load_file(run.checkpoints / "checkpoint-2" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}, "training goes on from all digits"
    again = attach_adapter(load_model(recipe, choose_precision(recipe)), run.adapter, recipe)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = (model.eval()(input_ids=ids).logits for model in (trained[-1], again))
    assert torch.equal(found, expected)
    # On a base in bfloat16, an evaluation computes without autocast what a validation computes with it.
    half = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    as_in_validation, alone = (
        attach_adapter(load_model(half, choose_precision(half)), run.adapter, half, keep_float32=kept)
        for kept in (True, False)
    )
    with torch.no_grad():
        found = alone(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            expected = as_in_validation(input_ids=ids).logits
    assert torch.equal(found, expected) or not rounded


def test_full_memory_ends_with_advice_or_the_batch_is_computed_in_parts(
    tmp_path: Path, base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = SeveritySFTTrainer.compute_loss

    def crowded(self: SeveritySFTTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.model.training and self.state.global_step == 2 and len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(self, model, inputs, *args, **kwargs)

    words = [*base, *SPLIT, "training.eval_strategy=no", "training.save_strategy=steps", "training.save_steps=2"]
    words += ["training.per_device_train_batch_size=4", "training.global_batch_size=4", "lora.lora_dropout=0"]
    words += ["training.padding_free=false"]
    roomy = train(load_recipe(QUICKSTART, words), tmp_path / "roomy")
    monkeypatch.setattr(SeveritySFTTrainer, "compute_loss", crowded)
    with pytest.raises(RunError) as full:
        train(load_recipe(QUICKSTART, words), tmp_path / "full")
    message = str(full.value)
    assert "training.gradient_checkpointing=true" in message and "auto_find_batch_size=true" in message
    assert f"Checkpoints of {tmp_path / 'full'} are kept" in message and "sevpeft plan" in message
    assert (tmp_path / "full" / "checkpoints" / "checkpoint-2" / "manifest.json").is_file()
    cut = train(load_recipe(QUICKSTART, [*words, "training.auto_find_batch_size=true"]), tmp_path / "cut")
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
    assert "eval_on_start=True" in message_of(processes[0], tmp_path)
