"""A run that is killed at any moment, any number of times, ends with the bits of an uninterrupted run."""

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
from tests.models import build_model, build_tokenizer
from tests.training.children import exit_codes, message_of, start, train_in_child

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
# Epochs of four steps, so that kills fall into different ones; a checkpoint after every second step.
SHORT = [
    "data.max_rows=40",
    "training.max_length=160",
    "training.num_train_epochs=3",
    "training.logging_steps=3",
    "training.save_strategy=steps",
    "training.save_steps=2",
    "training.save_total_limit=1",
    "training.eval_strategy=steps",
    "training.eval_steps=4",
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=auto",
    "training.gradient_checkpointing=false",
    "training.per_device_eval_batch_size=8",
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

    def start(self, name: str, *, kill_at: int | None = None, processes: int = 1) -> list[Any]:
        words = [f"model.name_or_path={self.folder / 'base'}", *SHORT]
        cache = str(self.folder / "cache")
        return start(train_in_child, QUICKSTART, words, self.folder / name, kill_at, cache, processes=processes)


def assert_the_same_run(one: Run, other: Run) -> None:
    """The adapter to the bit, and everything that is logged of the training but for times."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one.adapter / name).read_bytes() == (other.adapter / name).read_bytes(), name
    assert logged(one) == logged(other)
    first, second = one.metrics(), other.metrics()
    assert first["before"] == second["before"] and first["after"] == second["after"]
    assert first["training"]["train_loss"] == pytest.approx(second["training"]["train_loss"], rel=1e-6)


def logged(run: Run) -> list[dict[str, Any]]:
    """log.jsonl without times, and without its last line, which is about one start."""
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    clock = ("time", "runtime", "per_second")
    return [
        {key: value for key, value in line.items() if not any(part in key for part in clock)}
        for line in lines
        if "train_loss" not in line
    ]


def wait_for(run: Run, key: str, step: int, process: Any) -> None:
    """Until a line of the log has the key, at that step or later."""
    log = run.folder / "log.jsonl"
    while process.is_alive():
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        if any(key in line and json.loads(line)["step"] >= step for line in lines if line.endswith("}")):
            return
        time.sleep(0.002)
    raise AssertionError("the run ended before it could be stopped")


def test_kills_at_random_writes_and_a_signal_change_nothing(killable: Killable) -> None:
    """In the middle of a checkpoint, of the log and of the adapter; the last checkpoint is never taken away."""
    (whole,) = killable.start("whole")
    chosen = random.Random(5)
    run = Run(killable.folder / "killed")
    for kill in range(4):
        first = kill == 0
        code = exit_codes(killable.start("killed", kill_at=40 if first else chosen.randint(1, 26)))[0]
        assert code == -signal.SIGKILL, f"the run ended after {kill} kills"
        assert list(run.checkpoints.glob("checkpoint-*/manifest.json")), "one checkpoint is always whole"
    (process,) = killable.start("killed")
    wait_for(run, '"loss"', 9, process)
    os.kill(process.pid, signal.SIGTERM)
    assert exit_codes([process]) == [128 + signal.SIGTERM]
    message = message_of(process, killable.folder / "cache")
    assert f"sevpeft train {run.folder / 'recipe.yaml'} --output {run.folder} --resume" in message
    (checkpoint,) = run.checkpoints.glob("checkpoint-*")
    assert 9 <= int(checkpoint.name.partition("-")[2]) < 12 and (checkpoint / "manifest.json").is_file()
    assert exit_codes(killable.start("killed")) == exit_codes([whole]) == [0]
    assert_the_same_run(Run(killable.folder / "whole"), run)


def test_two_processes_of_which_one_is_signaled_or_killed_change_nothing(killable: Killable) -> None:
    whole, run = killable.start("two-whole", processes=2), Run(killable.folder / "two")
    assert exit_codes(whole) == [0, 0]
    processes = killable.start("two", processes=2)
    wait_for(run, '"loss"', 3, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    assert exit_codes(processes) == [143, 143], "both end at the same step"
    codes = exit_codes(killable.start("two", kill_at=25, processes=2))
    assert -signal.SIGKILL in codes and 0 not in codes
    assert exit_codes(killable.start("two", processes=2)) == [0, 0]
    assert_the_same_run(Run(killable.folder / "two-whole"), run)
