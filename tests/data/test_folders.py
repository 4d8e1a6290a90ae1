"""A folder of results is there whole, for its owner alone, or it is not there."""

import errno
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from sevpeft.data.folders import whole_folder
from sevpeft.errors import RunError


def test_a_folder_appears_at_the_end_with_all_that_was_written(tmp_path: Path) -> None:
    output = tmp_path / "not" / "yet" / "out"
    with whole_folder(output) as folder:
        (folder / "a").write_text("x")
        assert not output.exists()
    assert [file.name for file in output.iterdir()] == ["a"]
    assert [entry.name for entry in output.parent.iterdir()] == ["out"]
    if os.name == "posix":
        assert stat.S_IMODE(output.stat().st_mode) == 0o700


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_in_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    said = r"No space is left for .*out; free some, then run this again\."
    with pytest.raises(RunError, match=said), whole_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_stands_there_is_never_touched(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    {"folder": output.mkdir, "file": output.touch, "link": lambda: output.symlink_to("nowhere")}[kind]()
    with pytest.raises(RunError, match="exists already"), whole_folder(output):
        pytest.fail("the block was entered")
    assert os.path.lexists(output)


def test_what_came_to_stand_there_meanwhile_is_not_touched_either(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="exists already"), whole_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def _build_for_ever(output: Path, begun: "multiprocessing.synchronize.Event") -> None:
    with whole_folder(output) as folder:
        (folder / "a").write_text("x")
        begun.set()
        time.sleep(60)


def test_what_a_kill_left_is_taken_away_the_next_time_and_what_is_being_built_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    builder = context.Process(target=_build_for_ever, args=(tmp_path / "out", begun))
    builder.start()
    try:
        assert begun.wait(60)
        (being_built,) = tmp_path.iterdir()
        with whole_folder(tmp_path / "out"):
            assert being_built.exists()
        assert being_built.exists() and not (tmp_path / "other").exists()
    finally:
        os.kill(builder.pid, signal.SIGKILL)  # type: ignore[arg-type]
        builder.join()
    assert being_built.exists()
    (tmp_path / "out").rmdir()
    with whole_folder(tmp_path / "out"):
        assert not being_built.exists()
