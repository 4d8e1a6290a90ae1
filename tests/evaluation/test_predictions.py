"""What was computed is kept line by line: a kill loses a batch, and lines of another origin are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sevpeft.errors import RunError
from sevpeft.evaluation.predictions import RowFile, differences, only_one_at_a_time

ORIGIN = {
    "adapter": "sha256:1",
    "generation": {"max_new_tokens": 8, "temperature": 0.7},
    "prompt": {"template": "س" * 60},
}


def line(number: int, arm: str = "adapter") -> dict[str, object]:
    return {"arm": arm, "id": f"row-{number}", "prediction": f"جواب\n{number}"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "predictions.jsonl"


def test_lines_are_found_by_arm_and_id_in_whatever_order_they_stand(path: Path) -> None:
    file = RowFile(path, ORIGIN)
    file.append([line(2), line(0, "base")])
    file.append([line(1)])
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(reversed(lines)), encoding="utf-8")
    again = RowFile(path, ORIGIN)
    assert again.rows("adapter") == {"row-1": line(1), "row-2": line(2)} == file.rows("adapter")
    assert again.missing("adapter", ["row-0", "row-1", "row-2", "row-3"]) == [0, 3]
    assert again.missing("base", ["row-0"]) == []


def test_only_the_owner_may_read_the_lines(path: Path) -> None:
    RowFile(path, ORIGIN).append([line(1)])
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "cut", [b'{"arm": "adapter", "id": "row-9", "pred', b'{"arm": "adapter", "id": "row-9"}', b"\0\0\0"]
)
def test_a_last_line_that_was_cut_off_is_dropped(path: Path, cut: bytes) -> None:
    RowFile(path, ORIGIN, ["prediction"]).append([line(1), line(2)])
    sound = path.read_bytes()
    path.write_bytes(sound + cut)
    file = RowFile(path, ORIGIN, ["prediction"])
    assert file.missing("adapter", ["row-1", "row-2", "row-9"]) == [2] and path.read_bytes() == sound
    file.append([line(3)])
    assert set(RowFile(path, ORIGIN).rows("adapter")) == {"row-1", "row-2", "row-3"}


@pytest.mark.parametrize("bad", ["{broken", '{"id": "row-7"}', '{"arm": "adapter", "id": "row-7"}'])
def test_a_damaged_line_in_the_middle_is_named(path: Path, bad: str) -> None:
    RowFile(path, ORIGIN).append([line(1), line(2)])
    first, second = path.read_text(encoding="utf-8").splitlines()
    path.write_text(f"{first}\n{bad}\n{second}\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"Line 2 of .*predictions.jsonl cannot be read; take that line out"):
        RowFile(path, ORIGIN, ["prediction"])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"adapter": "sha256:2"}, 'adapter is "sha256:2" and was "sha256:1"'),
        ({"generation": {"max_new_tokens": 9, "temperature": 0.7}}, "generation.max_new_tokens is 9 and was 8"),
        ({"generation": {"max_new_tokens": 8}}, "generation.temperature is null and was 0.7"),
        ({"prompt": {"template": "ص" * 60}}, "prompt.template is another"),
    ],
)
def test_lines_of_another_origin_are_refused_with_what_differs(path: Path, other: dict[str, object], said: str) -> None:
    RowFile(path, ORIGIN).append([line(1)])
    before = path.read_bytes()
    with pytest.raises(RunError) as caught:
        RowFile(path, {**ORIGIN, **other})
    assert said in str(caught.value) and "move predictions.jsonl away" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("about", [None, "{broken"])
def test_lines_that_do_not_say_where_they_come_from_are_refused(path: Path, about: str | None) -> None:
    file = RowFile(path, ORIGIN)
    file.append([line(1)])
    file.about.unlink() if about is None else file.about.write_text(about, encoding="utf-8")
    with pytest.raises(RunError, match="does not say what it was made from"):
        RowFile(path, ORIGIN)


def test_an_empty_file_is_none(path: Path) -> None:
    path.touch()
    RowFile(path, ORIGIN).append([line(1)])
    assert set(RowFile(path, ORIGIN).rows("adapter")) == {"row-1"}


def test_what_differs_is_named_by_its_path() -> None:
    assert list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": 4}})) == [
        "a.c is 3 and was 2",
        "a.d is 4 and was null",
    ]


def test_two_evaluations_of_one_run_do_not_mix_and_a_kill_releases_the_run(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from sevpeft.evaluation.predictions import only_one_at_a_time\n"
        "with only_one_at_a_time(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with pytest.raises(RunError, match="is being evaluated by another process"), only_one_at_a_time(tmp_path):
            raise AssertionError("both are in")
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    time.sleep(0.05)
    with only_one_at_a_time(tmp_path):
        assert json.loads("1") == 1
    assert list(tmp_path.iterdir()) == []
