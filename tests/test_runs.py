"""Run folders: nothing is overwritten or written in part, and disk errors are plain sentences."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sevpeft import runs
from sevpeft.errors import RunError
from sevpeft.runs import (
    Run,
    check_output,
    check_run,
    default_output,
    describe_environment,
    differences,
    new_run,
    plain_disk_errors,
    workers_end_with_this_process,
    write_atomically,
)


def make_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text("{}\n", encoding="utf-8")
    return folder


def test_a_new_folder_below_folders_that_do_not_exist_is_accepted(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "run", resume=False)


def test_an_empty_folder_is_accepted(tmp_path: Path) -> None:
    check_output(tmp_path, resume=False)


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with pytest.raises(RunError, match="--resume"):
        check_output(folder, resume=False)
    check_output(folder, resume=True)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("x")
    with pytest.raises(RunError, match="not empty"):
        check_output(tmp_path, resume=False)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("x")
    with pytest.raises(RunError, match="--output"):
        check_output(path, resume=False)


def test_resuming_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run"):
        check_output(tmp_path, resume=True)
    with pytest.raises(RunError, match="no run"):
        check_run(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, mode: int = 0o777) -> None:  # root may write everywhere
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as read_only:
        read_only.setattr(os, "mkdir", refused)
        with pytest.raises(RunError, match="cannot be written: Read-only file system"):
            check_output(tmp_path / "run", resume=False)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space is left"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_parts_of_the_metrics_are_added_and_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.metrics() == {} and not run.finished
    run.update_metrics(data={"rows": 3})
    run.update_metrics(after={"loss": 1.5}, data={"rows": 4})
    assert run.metrics() == {"data": {"rows": 4}, "after": {"loss": 1.5}}


def test_the_log_is_one_json_object_a_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append_log({"step": 1, "loss": 2.5})
    run.append_log({"step": 2, "note": "سطر\nجديد"})
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_the_log_is_cut_back_to_whole_lines(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.append_log({"step": step, "note": "a\u2028b\x85c"})
    run.keep_log(2)
    with (tmp_path / "log.jsonl").open(encoding="utf-8") as lines:
        assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_run_that_fails_before_its_recipe_leaves_no_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(RuntimeError), new_run(run):
        (run.folder / "checkpoints").mkdir()
        raise RuntimeError
    assert not run.folder.exists()


def test_a_run_that_fails_after_its_recipe_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(RuntimeError), new_run(run):
        run.write_text("recipe.yaml", "{}\n")
        raise RuntimeError
    assert (run.folder / "recipe.yaml").exists()


def test_the_environment_names_versions_and_no_person_or_machine() -> None:
    environment = describe_environment()
    assert all(environment["versions"][package] != "not installed" for package in runs.PACKAGES)
    text = json.dumps(environment)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text


def test_the_commit_is_that_of_sevpeft_and_not_of_a_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    installed = tmp_path / ".venv" / "lib" / "sevpeft"
    for package, known in ((tmp_path / "sevpeft", True), (installed, False)):
        package.mkdir(parents=True)
        monkeypatch.setattr(runs, "__file__", str(package / "runs.py"))
        commit = inspect.unwrap(runs._commit)()  # the tests keep what it found
        assert (commit is not None) is known


def test_the_default_output_is_named_after_the_recipe() -> None:
    assert str(default_output("quickstart")).startswith("runs/quickstart-")


def test_a_worker_that_was_killed_is_one_sentence_with_the_remedy() -> None:
    with pytest.raises(RunError, match="lower num_proc"), runs.workers_end_with_this_process():
        raise RuntimeError("One of the subprocesses has abruptly died during map operation.")
    with pytest.raises(RuntimeError, match="other"), runs.workers_end_with_this_process():
        raise RuntimeError("other")


def test_whatever_says_that_the_disk_is_full_is_one_sentence(tmp_path: Path) -> None:
    """A full disk, a quota, and `ulimit -f`, as Python and libraries say it."""
    for error in (
        *(OSError(number, "refused") for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        *(RuntimeError(f"I/O error: {text}") for text in ("Disk quota exceeded", "File too large", "x (os error 27)")),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 875072 vs 874960"),
    ):
        with pytest.raises(RunError, match=r"No space is left for .*; free some"), plain_disk_errors(tmp_path):
            raise error
    with pytest.raises(ValueError), plain_disk_errors(tmp_path):
        raise ValueError("os error 28400")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent has ended")
def test_ctrl_c_is_for_the_parent_of_workers_alone() -> None:
    with workers_end_with_this_process():
        if not (child := os.fork()):
            os._exit(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    with pytest.raises(KeyboardInterrupt), workers_end_with_this_process():
        try:
            raise KeyboardInterrupt
        finally:
            raise TimeoutError  # as the pool of datasets does


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_ends_the_launcher_of_one_process_and_no_other_parent() -> None:
    """At the signal, and not after a library that is being loaded has passed it on: the launcher waits for .25 s."""
    code = """
import os, signal, sys
from contextlib import suppress
from sevpeft.cli import application

def app(**_):
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)

application.app = app
application.main()
"""
    child = [sys.executable, "-c", code]
    parent = [sys.executable, "-c", f"import subprocess, sys; subprocess.run({child}); sys.exit(7)"]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    for word, processes, code in (("launch", "1", -signal.SIGTERM), ("launch", "2", 7), ("other", "1", 7)):
        ended = subprocess.run([*parent, word], env={**environment, "WORLD_SIZE": processes})
        assert ended.returncode == code


def test_what_differs_is_named_by_its_path() -> None:
    stored = {"a": {"b": 1, "c": 2}, "text": "س" * 90}
    now = {"a": {"b": 1, "c": 3, "d": 4}, "text": "ص" * 90}
    stored["prompt"], now["prompt"] = {"examples": [{"question": "ألم"}]}, {"examples": []}
    assert differences(stored, now) == [
        "a.c is 3 and was 2",
        "a.d is 4 and was null",
        "prompt.examples has changed",
        "text has changed",
    ]
