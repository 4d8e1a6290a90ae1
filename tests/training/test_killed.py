"""A run that was killed, however often and wherever, ends with the same bits as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sevpeft.runs import Run
from tests.conftest import build_model, build_tokenizer
from tests.training.children import exit_codes, said_by, start, train_in_child

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
# Epochs of six steps, so that kills fall into different ones; a checkpoint after every second step.
SHORT = [
    "data.max_rows=60",
    "training.max_length=160",
    "training.num_train_epochs=3",
    "training.logging_steps=3",
    "training.save_strategy=steps",
    "training.save_steps=2",
    "training.eval_strategy=steps",
    "training.eval_steps=4",
    "lora.lora_dropout=0.1",
]


@pytest.fixture(scope="module")
def killable(tmp_path_factory: pytest.TempPathFactory) -> Killable:
    folder = tmp_path_factory.mktemp("killable")
    build_model("llama").save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    return Killable(folder)


class Killable:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = [f"model.name_or_path={folder / 'base'}", *SHORT]

    def start(self, name: str, *more: str, kill_at: int | None = None, processes: int = 1) -> list[Any]:
        words = [*self.settings, *more]
        cache = str(self.folder / "cache")
        return start(train_in_child, QUICKSTART, words, self.folder / name, kill_at, cache, processes=processes)

    def whole(self, *more: str, processes: int = 1) -> Run:
        name = "whole-" + "-".join([str(processes), *(word.replace("/", "_") for word in more)])
        if not (self.folder / name).exists():
            assert set(exit_codes(self.start(name, *more, processes=processes))) == {0}
        return Run(self.folder / name)


def assert_the_same_run(one: Run, other: Run) -> None:
    """The adapter to the bit, and everything that is told of the training but for times."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one.adapter / name).read_bytes() == (other.adapter / name).read_bytes(), name
    assert told(one) == told(other)
    first, second = one.metrics(), other.metrics()
    assert first["before"] == second["before"] and first["after"] == second["after"]
    assert first["training"]["train_loss"] == pytest.approx(second["training"]["train_loss"], rel=1e-6)


def told(run: Run) -> list[dict[str, Any]]:
    """log.jsonl without what the clock says; the last mean is a sum that was begun again."""
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    clock = ("time", "runtime", "per_second", "train_loss")
    return [{key: value for key, value in line.items() if not any(part in key for part in clock)} for line in lines]


def test_ten_kills_at_random_writes_change_nothing(killable: Killable) -> None:
    """Also in the middle of a checkpoint, of the log and of the adapter: before each file, a kill may come."""
    chosen = random.Random(5)
    run = Run(killable.folder / "often-killed")
    kills = 0
    while kills < 10:
        code = exit_codes(killable.start(run.folder.name, kill_at=chosen.randint(1, 30)))[0]
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 10, f"the run ended after {kills} kills"
    assert exit_codes(killable.start(run.folder.name)) == [0]
    assert_the_same_run(killable.whole(), run)


def test_with_one_checkpoint_only_a_kill_never_takes_the_last_one(killable: Killable) -> None:
    """The older one goes when the newer one has its seal, and not before."""
    limit = "training.save_total_limit=1"
    name = "one-checkpoint"
    for kill_at in (45, 20, 21, 22):
        code = exit_codes(killable.start(name, limit, kill_at=kill_at))[0]
        assert code == -signal.SIGKILL
        sealed = list((killable.folder / name / "checkpoints").glob("checkpoint-*/manifest.json"))
        assert sealed, kill_at
    assert exit_codes(killable.start(name, limit)) == [0]
    assert_the_same_run(killable.whole(), Run(killable.folder / name))


def test_two_processes_that_were_killed_change_nothing(killable: Killable) -> None:
    run = Run(killable.folder / "two-killed")
    codes = exit_codes(killable.start(run.folder.name, kill_at=40, processes=2))
    assert -signal.SIGKILL in codes and 0 not in codes
    assert exit_codes(killable.start(run.folder.name, processes=2)) == [0, 0]
    assert_the_same_run(killable.whole(processes=2), run)


def wait_for(run: Run, key: str, step: int, process: Any) -> None:
    """Until a line of the log has the key, at that step or later."""
    log = run.folder / "log.jsonl"
    while process.is_alive():
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        if any(key in line and json.loads(line)["step"] >= step for line in lines if line.endswith("}")):
            return
        time.sleep(0.002)
    raise AssertionError("the run ended before it could be stopped")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_in_a_checkpoint_and_the_command_to_go_on(killable: Killable, number: signal.Signals) -> None:
    run = Run(killable.folder / f"stopped-{number.name}")
    (process,) = killable.start(run.folder.name, "training.save_steps=1000")
    wait_for(run, '"loss"', 3, process)
    os.kill(process.pid, number)
    assert exit_codes([process]) == [128 + number]
    said = said_by(process, killable.folder / "cache")
    assert f"sevpeft train {run.folder / 'recipe.yaml'} --output {run.folder} --resume" in said
    (checkpoint,) = run.checkpoints.glob("checkpoint-*")
    assert int(checkpoint.name.partition("-")[2]) < 18 and (checkpoint / "manifest.json").is_file()
    assert exit_codes(killable.start(run.folder.name, "training.save_steps=1000")) == [0]
    assert_the_same_run(killable.whole("training.save_steps=1000"), run)


def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_step(killable: Killable) -> None:
    run = Run(killable.folder / "two-stopped")
    processes = killable.start(run.folder.name, processes=2)
    wait_for(run, '"loss"', 3, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    assert exit_codes(processes) == [143, 143]
    assert exit_codes(killable.start(run.folder.name, processes=2)) == [0, 0]
    assert_the_same_run(killable.whole(processes=2), run)
