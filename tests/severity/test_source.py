"""Whatever severity.source says, the same questions give the same probabilities, and a wrong classifier is refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevpeft.data.read import load_consultations
from sevpeft.errors import WeightError
from sevpeft.recipe.schema import SeveritySection
from sevpeft.severity import source
from sevpeft.severity.probabilities import Reads, severity_probabilities, sharpened
from sevpeft.severity.rules import Rules
from sevpeft.severity.source import EVIDENCE, classify_rows, severity_of


class Judge:
    """Knows one thing: how long a question is."""

    reads: Reads = "question"

    def __init__(self, kind: str = "linear", version: str = "1") -> None:
        self.kind, self.version, self.asked = kind, version, 0

    def explained(self, questions: Sequence[str]) -> tuple[np.ndarray, None]:
        return self.probabilities(questions), None

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        self.asked += len(questions)
        scores = np.array([[len(question) % 7, len(question) % 5, 1] for question in questions], dtype=float) + 0.5
        return scores / scores.sum(axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rows(cache: Path) -> Any:
    return load_consultations("builtin:consultations").rows


def test_columns_are_read_and_then_sharpened(rows: Any) -> None:
    plain = severity_of(rows, SeveritySection())
    np.testing.assert_array_equal(plain.probabilities, severity_probabilities(rows))
    np.testing.assert_array_equal(plain.strata, severity_probabilities(rows).argmax(axis=1))
    assert plain.origin == {"source": "columns", "temperature": 1.0}


def test_a_classifier_is_asked_once_for_all_temperatures(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge()
    monkeypatch.setattr(source, "load_source", lambda kind, folder, text: judge)
    first = severity_of(rows, SeveritySection(source="linear", classifier="somewhere"))
    np.testing.assert_array_equal(first.probabilities, Judge().probabilities(rows["question"]))
    again = severity_of(rows, SeveritySection(source="linear", classifier="somewhere", temperature=0.5))
    assert judge.asked == len(rows)
    np.testing.assert_array_equal(again.probabilities, sharpened(first.probabilities, 0.5))
    assert again.origin == {"source": "linear", "temperature": 0.5, "version": "1"}


def test_another_version_and_other_rows_are_asked_again(rows: Any) -> None:
    fewer = load_consultations("builtin:consultations", max_rows=50).rows
    for table, version in ((rows, "1"), (rows, "2"), (fewer, "2")):
        judge = Judge(version=version)
        assert len(classify_rows(table, judge)) == judge.asked == len(table)


def test_a_killed_run_goes_on_with_the_next_part(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_MOST_ROWS", 105)

    class Killed(Judge):
        def probabilities(self, questions: Sequence[str]) -> np.ndarray:
            if self.asked == 210:
                raise KeyboardInterrupt
            return super().probabilities(questions)

    with pytest.raises(KeyboardInterrupt):
        classify_rows(rows, Killed())
    rest = Judge()
    found = classify_rows(rows, rest)
    assert rest.asked == len(rows) - 210
    np.testing.assert_array_equal(severity_probabilities(found), Judge().probabilities(rows["question"]))


def test_the_processes_of_a_launch_share_the_parts(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_MOST_ROWS", 100)
    asked = []
    for rank in (2, 0, 1):
        judge = Judge()
        classify_rows(rows, judge, rank=rank, processes=3)
        asked.append(judge.asked)
    assert asked == [84, 168, 168]
    main = Judge()
    assert len(classify_rows(rows, main)) == len(rows) and main.asked == 0


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_rules_on_several_cores_give_what_one_gives(rows: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules()
    monkeypatch.setattr(source, "_ROWS_OF_PROCESS", 100)
    monkeypatch.setattr(source.os, "sched_getaffinity", lambda process: {0, 1})
    found = classify_rows(rows, rules)
    assert len(found.cache_files) == 2
    expected, evidence = rules.explained(rows["question"])
    np.testing.assert_allclose(severity_probabilities(found), expected, rtol=1e-15)
    assert found[EVIDENCE][:] == evidence
    critical = severity_probabilities(rows)[:, 2] == 1
    assert expected[critical, 2].mean() > expected[~critical, 2].mean() + 0.2


def test_a_classifier_of_another_kind_is_refused(rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sevpeft.severity.classifier import store

    monkeypatch.setattr(store, "load_classifier", lambda folder: Judge(kind="transformer"))
    with pytest.raises(WeightError, match="transformer"):
        severity_of(rows, SeveritySection(source="linear", classifier=str(tmp_path)))
