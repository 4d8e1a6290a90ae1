"""Whatever severity.source says, the same questions give the same probabilities, and a wrong classifier is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevpeft.data.read import load_consultations
from sevpeft.errors import WeightError
from sevpeft.severity import source
from sevpeft.severity.probabilities import severity_probabilities, sharpened
from sevpeft.severity.source import severity_of


class Judge:
    """Knows one thing: how long a question is."""

    def __init__(self, kind: str = "linear", version: str = "1") -> None:
        self.kind, self.version, self.asked = kind, version, 0

    def probabilities(self, questions: list[str]) -> np.ndarray:
        self.asked += len(questions)
        scores = np.array([[len(question) % 7, len(question) % 5, 1] for question in questions], dtype=float) + 0.5
        return scores / scores.sum(axis=1, keepdims=True)


@pytest.fixture
def rows() -> Any:
    return load_consultations("builtin:consultations").rows


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    found = Judge()
    monkeypatch.setattr(source, "_classifier", lambda kind, folder: found)
    return found


def test_columns_are_read_and_then_sharpened(rows: Any) -> None:
    plain = severity_of(rows)
    np.testing.assert_array_equal(plain.probabilities, severity_probabilities(rows))
    np.testing.assert_array_equal(plain.strata, severity_probabilities(rows).argmax(axis=1))
    assert plain.origin == {"source": "columns", "temperature": 1.0}


def test_a_classifier_is_asked_once_and_its_answers_are_kept(rows: Any, judge: Judge) -> None:
    first = severity_of(rows, source="linear", classifier="somewhere")
    np.testing.assert_array_equal(first.probabilities, judge.probabilities(rows["question"]))
    asked = judge.asked
    again = severity_of(rows, source="linear", classifier="somewhere", temperature=0.5)
    assert judge.asked == asked
    np.testing.assert_array_equal(again.probabilities, sharpened(first.probabilities, 0.5))
    assert again.origin == {"source": "linear", "temperature": 0.5, "version": "1"}


def test_another_version_and_other_rows_are_asked_again(rows: Any, judge: Judge) -> None:
    severity_of(rows, source="linear", classifier="somewhere")
    judge.version, judge.asked = "2", 0
    severity_of(rows, source="linear", classifier="somewhere")
    assert judge.asked == len(rows)
    fewer = load_consultations("builtin:consultations", max_rows=50).rows
    assert severity_of(fewer, source="linear", classifier="somewhere").probabilities.shape == (50, 3)


def test_a_kept_file_that_was_cut_off_is_made_again(
    rows: Any, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path))
    whole = severity_of(rows, source="linear", classifier="somewhere").probabilities
    from sevpeft.runs import cache_folder

    (kept,) = cache_folder("severity").glob("*.npy")
    kept.write_bytes(kept.read_bytes()[:-100])
    np.testing.assert_array_equal(severity_of(rows, source="linear", classifier="somewhere").probabilities, whole)
    kept.write_bytes(b"")
    np.testing.assert_array_equal(severity_of(rows, source="linear", classifier="somewhere").probabilities, whole)
    assert [file.name for file in cache_folder("severity").iterdir()] == [kept.name]


def test_rules_need_no_classifier(rows: Any) -> None:
    found = severity_of(rows, source="rules")
    assert found.probabilities.shape == (len(rows), 3)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-9)
    critical = severity_probabilities(rows)[:, 2] == 1
    assert found.probabilities[critical, 2].mean() > found.probabilities[~critical, 2].mean() + 0.2


def test_a_classifier_of_another_kind_is_refused(rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sevpeft.severity.classifier import store

    monkeypatch.setattr(store, "load_classifier", lambda folder: Judge(kind="transformer"))
    with pytest.raises(WeightError, match=r"set severity\.source=transformer"):
        severity_of(rows, source="linear", classifier=str(tmp_path))
