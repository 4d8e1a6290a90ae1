"""Forked workers give what one process gives, in its order, and a worker that is lost is said in a sentence."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from sevpeft.data.read import load_consultations
from sevpeft.errors import DataError, RunError
from sevpeft.severity import annotating
from sevpeft.severity.annotating import Job, annotate
from sevpeft.severity.dealing import Processes, in_workers
from sevpeft.severity.rules import Rules

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")


def test_results_come_in_the_order_of_the_numbers_whoever_made_them() -> None:
    found = list(in_workers(lambda shared, number: (shared[number], os.getpid()), ["a", "b", "c", "d"], [3, 0, 2], 2))
    assert [letter for letter, _ in found] == ["d", "a", "c"]
    assert os.getpid() not in {process for _, process in found}


def test_one_number_or_one_worker_needs_no_other_process() -> None:
    assert list(in_workers(lambda shared, number: os.getpid(), None, [1], 4)) == [os.getpid()]
    assert list(in_workers(lambda shared, number: os.getpid(), None, [1, 2], 1)) == [os.getpid()] * 2


def test_what_a_worker_refuses_is_refused_here() -> None:
    def refuse(shared: None, number: int) -> None:
        raise DataError(f"Row {number} cannot be read.")

    with pytest.raises(DataError, match=r"Row 1 cannot be read\."):
        list(in_workers(refuse, None, [1, 2], 2))


def test_a_worker_that_is_killed_ends_the_work_with_a_sentence() -> None:
    def die(shared: None, number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RunError, match="ended from outside"):
        list(in_workers(die, None, [1, 2], 2))


def test_rules_on_several_cores_write_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotating, "_ROWS_OF_PART", 50)
    rows = load_consultations("builtin:consultations", keep="all")
    written = []
    for cores in (1, 2):
        monkeypatch.setattr(annotating, "available_cores", lambda cores=cores: cores)
        output = tmp_path / f"{cores}.jsonl"
        annotate(Job(rows, Rules.load(), output, replace=True, processes=Processes()))
        written.append(output.read_bytes())
    assert written[0] == written[1] and written[0].count(b"\n") == 420
