"""What a signal does where nothing is being trained, and in whose hands signals are before and after."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sevpeft.training import callbacks as module
from sevpeft.training.callbacks import SIGNALS, SignalHandler, resume_command


def test_signals_are_heard_inside_only(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    said: list[str] = []
    with SignalHandler(tmp_path, said.append) as leaving:
        ignored = signal.SIG_IGN  # SIGHUP, where the tests themselves run under nohup
        assert all(
            signal.getsignal(number) == leaving._on_signal for number in SIGNALS if before[number] is not ignored
        )
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(said) == 1 and "checkpoint" in said[0]
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_second_ctrl_c_leaves_at_once_and_an_echo_of_the_first_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SignalHandler(tmp_path, lambda sentence: None):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher that passes the signal of the terminal on
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(module, "_SECONDS_TO_INSIST", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_the_user_has_switched_off_stays_off(tmp_path: Path) -> None:
    """`nohup` ignores SIGHUP, so that a training outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler(tmp_path, lambda sentence: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def inside() -> None:
        with SignalHandler(tmp_path, lambda sentence: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_worker_of_the_data_loader_ends_by_the_signal_and_says_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with SignalHandler(tmp_path, said.append) as leaving:
        leaving._process = -1  # as in a worker, which has inherited the handler of another process
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 143 and said == []


def test_the_command_to_go_on_can_be_given_to_a_shell() -> None:
    words = shlex.split(resume_command(Path("runs/my run")))
    assert words == ["sevpeft", "train", "runs/my run/recipe.yaml", "--output", "runs/my run", "--resume"]


LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, "-c", sys.argv[-1]]))
"""
TRAINING = """
import pathlib, sys, time
from sevpeft.training.callbacks import SignalHandler
with SignalHandler(pathlib.Path("."), lambda sentence: pathlib.Path("heard").write_text(sentence)):
    pathlib.Path("begun").touch()
    for _ in range(3000):
        if pathlib.Path("heard").exists():
            break
        time.sleep(0.01)
"""


def test_a_training_hears_of_the_end_of_its_launcher(tmp_path: Path) -> None:
    """accelerate's launcher of one process dies without passing the signal on."""
    (tmp_path / "accelerate").write_text(LAUNCHER, encoding="utf-8")
    words = [sys.executable, str(tmp_path / "accelerate"), "launch", "-c", TRAINING]
    # As `accelerate launch` sets for its processes.
    environment = {
        **os.environ,
        "ACCELERATE_MIXED_PRECISION": "no",
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
    }
    launcher = subprocess.Popen(words, cwd=tmp_path, env=environment)
    wait_until((tmp_path / "begun").exists)
    launcher.terminate()
    launcher.wait()
    wait_until((tmp_path / "heard").exists)


def wait_until(seen: Callable[[], bool]) -> None:
    for _ in range(3000):
        if seen():
            return
        time.sleep(0.02)
    raise AssertionError("nothing came of it")
