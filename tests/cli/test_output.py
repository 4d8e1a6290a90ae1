"""Output that cannot be written ends no work: a terminal, pipe or disk that is gone costs what was printed, no more."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sevpeft.runs import Run
from tests.models import build_model, build_tokenizer
from tests.training.children import command_in_child, exit_codes, start

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SEVPEFT = [sys.executable, "-m", "sevpeft"]
SHORT = ["data.max_rows=60", "training.max_length=160", "training.logging_steps=1", "training.save_strategy=no"]
# All that Python prints with, and what it flushes when it ends.
PRINTING = """
import logging, sys, threading, warnings
from sevpeft.console import guard_output
guard_output()
from rich.console import Console
from tqdm import tqdm
for step in tqdm(range(200), mininterval=0):
    Console().print("step", step)
    logging.getLogger("library").error("error")
    warnings.warn("warning " * 100 + str(step))
    print("x" * 1000, flush=step % 2 == 0)
    print("error", file=sys.stderr)
    sys.stdout.buffer.write(b"bytes")
thread = threading.Thread(target=print, args=("x" * 100_000,))
thread.start()
thread.join()
print("not flushed", end="")
assert sys.stdout.write("four") == 4
"""


def on_full_disk(words: list[str], **options: Any) -> int:
    with open("/dev/full", "w") as full:
        return subprocess.run(words, stdout=full, stderr=full, **options).returncode


def on_closed_pipe(words: list[str], **options: Any) -> int:
    reader, writer = os.pipe()
    os.close(reader)
    code = subprocess.run(words, stdout=writer, stderr=writer, **options).returncode
    os.close(writer)
    return code


def on_closed_files(words: list[str], **options: Any) -> int:
    return subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], **options).returncode


def on_closed_terminal(words: list[str], **options: Any) -> int:
    """Closes the terminal once something was printed; Python itself does not start where it is gone already."""
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.chdir(options.get("cwd", "."))
        os.execv(words[0], words)
    close_terminal(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def close_terminal(terminal: int, until: Callable[[], bool] = lambda: True) -> None:
    """Once something was printed on it and `until` holds."""
    os.set_blocking(terminal, False)
    deadline, printed = time.monotonic() + 120, b""
    while not (printed and until()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        with contextlib.suppress(BlockingIOError):
            printed = os.read(terminal, 1 << 16)
    os.close(terminal)


def in_child(words: list[str], cache: Path, hang_up: Any = None, until: Callable[[], bool] = lambda: True) -> int:
    """Exit code of a command that prints on a full disk or, if `hang_up` says what SIGHUP does, a closed terminal."""
    if hang_up is None:
        return exit_codes(start(command_in_child, words, "/dev/full", signal.SIG_DFL, str(cache)))[0]
    terminal, end = pty.openpty()
    child = start(command_in_child, words, os.ttyname(end), hang_up, str(cache))
    close_terminal(terminal, until)
    os.close(end)
    return exit_codes(child)[0]


def test_whatever_prints_goes_on_where_nothing_can_be_written(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PRINTING]
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent)}
    found = {
        run.__name__ + unbuffered: run([words[0], *filter(None, [unbuffered]), *words[1:]], **options)
        for run, options in (
            (on_full_disk, {"env": environment}),
            (on_closed_pipe, {"env": environment}),
            (on_closed_files, {"env": environment}),
            (on_closed_terminal, {"cwd": RECIPES.parent}),
        )
        for unbuffered in ("", "-u")
    }
    assert set(found.values()) == {0}, found


def test_everything_arrives_where_a_reader_is_slow_and_the_pipe_does_not_block() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    program = "from sevpeft.console import guard_output as g; g(); print('x' * 1_000_000)"
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent)}
    child = subprocess.Popen([sys.executable, "-c", program], stdout=writer, env=environment)
    os.close(writer)
    time.sleep(0.5)
    with os.fdopen(reader) as read:
        assert len(read.read()) == 1_000_001
    assert child.wait() == 0


def test_a_result_that_was_asked_for_on_stdout_and_lost_is_a_failure() -> None:
    """What is in files is there; JSON that ends in the middle must not pass for the whole."""
    words = [*SEVPEFT, "recipes", str(RECIPES), "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "No space left" in done.stderr and done.stderr.count("\n") == 1
    assert on_full_disk(words) == on_closed_pipe(words) == 1


def test_a_training_whose_terminal_closes_keeps_its_steps_and_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    build_model("llama").save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    words = ["train", str(RECIPES / "quickstart.yaml"), f"model.name_or_path={tmp_path / 'base'}", *SHORT]
    words += ["--output", str(run.folder)]
    log = run.folder / "log.jsonl"
    code = in_child(words, tmp_path, signal.SIG_DFL, lambda: log.exists() and '"loss"' in log.read_text())
    assert code == 128 + signal.SIGHUP
    (checkpoint,) = run.checkpoints.glob("checkpoint-*")
    assert (checkpoint / "manifest.json").is_file() and not run.finished
    assert in_child([*words, "--resume"], tmp_path) == 0
    assert run.finished and run.metrics()["training"]["resumed_from"] == checkpoint.name


def test_a_file_is_annotated_whole_where_nobody_reads_what_is_printed(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "ألم في صدري", "answer": "راجع الطبيب"}\n' * 50, encoding="utf-8")
    found = {}
    for name, hang_up in (("full disk", None), ("closed terminal", signal.SIG_IGN)):
        output = tmp_path / f"{name}.jsonl"
        code = in_child(["annotate", str(rows), str(output), "method=rules"], tmp_path, hang_up)
        found[name] = (code, len(output.read_text(encoding="utf-8").splitlines()))
    assert set(found.values()) == {(0, 50)}, found
