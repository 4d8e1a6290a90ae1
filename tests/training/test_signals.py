"""Signal handling before, during and after a training, and at the end of a launcher."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest

from sevpeft.training import callbacks as module
from sevpeft.training.callbacks import SIGNALS, SignalHandler, resume_command
from tests.training.children import exit_codes, start


def test_signals_are_handled_inside_only(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    messages: list[str] = []
    with SignalHandler(tmp_path, messages.append) as handler:
        ignored = signal.SIG_IGN  # SIGHUP, where the tests themselves run under nohup
        assert all(
            signal.getsignal(number) == handler._on_signal for number in SIGNALS if before[number] is not ignored
        )
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(messages) == 1 and "checkpoint" in messages[0]
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
    messages: list[str] = []
    with SignalHandler(tmp_path, messages.append) as handler:
        handler._process = -1  # as in a worker, which has inherited the handler of another process
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 143 and messages == []


def test_the_resume_command_can_be_given_to_a_shell() -> None:
    words = shlex.split(resume_command(Path("runs/my run")))
    assert words == ["sevpeft", "train", "runs/my run/recipe.yaml", "--output", "runs/my run", "--resume"]


def launch(folder: Path) -> None:
    """As accelerate's launcher of one process, which dies of SIGTERM without passing it on."""
    if os.fork():
        signal.pause()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    with SignalHandler(folder, lambda sentence: (folder / "received").touch()):
        (folder / "begun").touch()
        wait_for(folder / "received")
    os._exit(0)


def wait_for(file: Path) -> None:
    for _ in range(3000):
        if file.exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"no {file.name}")


def test_a_training_receives_the_end_of_its_launcher(tmp_path: Path) -> None:
    (launcher,) = start(launch, tmp_path, str(tmp_path))
    wait_for(tmp_path / "begun")
    os.kill(launcher.pid, signal.SIGTERM)
    assert exit_codes([launcher]) == [-signal.SIGTERM]
    wait_for(tmp_path / "received")
