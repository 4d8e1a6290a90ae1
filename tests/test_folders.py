"""A result folder appears as a whole or not at all, and JSON lines are read with their numbers."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.synchronize
import os
import stat
import time
from pathlib import Path

import pytest

from sevpeft.errors import DataError, RunError
from sevpeft.runs import json_lines, whole_folder


def test_a_folder_appears_whole_for_its_owner_alone_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "not" / "yet" / "out"
    with whole_folder(output) as folder:
        (folder / "a").write_text("x")
        assert not output.exists()
    assert [file.name for file in output.iterdir()] == ["a"] and list(output.parent.iterdir()) == [output]
    assert stat.S_IMODE(output.stat().st_mode) == 0o700 and stat.S_IMODE((output / "a").stat().st_mode) == 0o600
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (ValueError("x"), ValueError), (full, RunError)):
        with pytest.raises(raised), whole_folder(tmp_path / "other") as folder:
            (folder / "a").write_text("x")
            raise error
        assert [entry.name for entry in tmp_path.iterdir()] == ["not"]


def test_what_stands_there_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(RunError, match="exists already"), whole_folder(tmp_path / name):
            pytest.fail("the block was entered")
    with pytest.raises(RunError, match="exists already"), whole_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link", "out"]


def _build_for_ever(output: Path, begun: multiprocessing.synchronize.Event) -> None:
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
        assert being_built.exists()
    finally:
        builder.kill()
        builder.join()
    assert being_built.exists()
    (tmp_path / "out").rmdir()
    with whole_folder(tmp_path / "out"):
        assert not being_built.exists()


def test_what_a_kill_left_is_taken_away_whatever_the_name_of_the_output(tmp_path: Path) -> None:
    left = tmp_path / ".run[1].abcd"
    left.mkdir()
    (left / ".building").touch()
    with whole_folder(tmp_path / "run[1]"):
        assert not left.exists()


def test_json_lines_are_numbered_and_what_is_none_is_named_without_its_words() -> None:
    assert list(json_lines(['{"a": 1}\r\n', "\n", '\ufeff{"b": 2}'], "x")) == [(1, {"a": 1}), (3, {"b": 2})]
    for line, reason in (("{secret", "not valid JSON"), ("[secret]", "not valid JSON"), ("[1]", "not a JSON object")):
        with pytest.raises(DataError, match=f"x, line 2 is {reason}") as refused:
            list(json_lines(["{}", line], "x"))
        assert "secret" not in str(refused.value)
