"""Severity columns become probabilities or an error that says where and what to do; nothing is filled in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from sevpeft.errors import WeightError
from sevpeft.severity.probabilities import (
    PROBABILITY_COLUMNS,
    has_severity,
    severity_index,
    severity_probabilities,
    sharpened,
)

SECRET = "عندي ألم في صدري"
NAMED = re.compile(r"^(Row \d+|\d+ rows \(the first is row \d+\)): ")


def table(rows: Sequence[Sequence[float | None]], **columns: Any) -> Dataset:
    values = {name: [row[i] for row in rows] for i, name in enumerate(PROBABILITY_COLUMNS)}
    return Dataset.from_dict({"question": [SECRET] * len(rows), **values, **columns})


def named(*names: str | None, **columns: Any) -> Dataset:
    return Dataset.from_dict({"question": [SECRET] * len(names), "severity": list(names), **columns})


def refusal(rows: Dataset) -> str:
    with pytest.raises(WeightError) as caught:
        severity_probabilities(rows)
    text = str(caught.value)
    assert "\n" not in text and SECRET not in text
    return text


def test_three_columns_are_read_in_their_order_and_to_the_last_bit() -> None:
    rows = [[0.1, 0.2, 0.7], [0.05, 0.9, 0.05]]
    np.testing.assert_array_equal(
        severity_probabilities(table(rows)), np.array(rows) / np.array(rows).sum(1, keepdims=True)
    )


def test_whole_numbers_and_rounded_probabilities_are_probabilities_too() -> None:
    found = severity_probabilities(table([[0, 0, 1], [1, 0, 0]]))
    np.testing.assert_array_equal(found, [[0, 0, 1], [1, 0, 0]])
    rounded = severity_probabilities(table([[0.33, 0.33, 0.33], [0.5, 0.5, 0.01]]))
    np.testing.assert_allclose(rounded.sum(1), 1, rtol=1e-15)
    np.testing.assert_allclose(rounded[0], 1 / 3)


def test_the_columns_win_over_a_name() -> None:
    found = severity_probabilities(table([[0.2, 0.3, 0.5]], severity=["non_critical"]))
    np.testing.assert_allclose(found, [[0.2, 0.3, 0.5]])


def test_a_subset_of_a_table_is_read_by_its_own_rows() -> None:
    rows = table([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]).select([2, 0])
    np.testing.assert_array_equal(severity_probabilities(rows), [[0, 0, 1], [1, 0, 0]])
    names = named("critical", "neutral", "mild").select([2, 0])
    np.testing.assert_array_equal(severity_probabilities(names), [[1, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([float("nan"), 0.5, 0.5], "missing or not finite"),
        ([None, 0.5, 0.5], "missing or not finite"),
        ([float("inf"), 0.0, 0.0], "missing or not finite"),
        ([-0.1, 0.6, 0.5], "negative"),
        ([0.5, 0.4, 0.2], "is 1.1, not 1"),
        ([50.0, 25.0, 25.0], "is 100, not 1"),
        ([0.0, 0.0, 0.0], "is 0, not 1"),
    ],
)
def test_a_value_that_is_no_probability_is_refused_with_its_row(row: list[float | None], words: str) -> None:
    good = [0.2, 0.3, 0.5]
    text = refusal(table([good, good, row, good]))
    assert text.startswith("Row 3: ") and words in text
    # Rows are counted as in the user's file, where a row may have been rejected before.
    assert refusal(table([good, row, good, row], row=[2, 17, 18, 40])).startswith("2 rows (the first is row 17): ")


def test_the_smallest_sum_that_is_refused_lies_beyond_rounding() -> None:
    severity_probabilities(table([[0.5, 0.25, 0.26]]))
    refusal(table([[0.5, 0.25, 0.27]]))


@pytest.mark.parametrize("present", [["p_critical"], ["p_non_critical", "p_critical"], ["p_neutral"]])
def test_only_some_of_the_three_columns_name_the_missing_ones(present: list[str]) -> None:
    rows = Dataset.from_dict({name: [0.5] for name in present} | {"severity": ["critical"]})
    text = refusal(rows)
    missing = [name for name in PROBABILITY_COLUMNS if name not in present]
    assert f"has {', '.join(present)} but not {', '.join(missing)}" in text


def test_without_a_severity_column_the_error_says_what_to_do() -> None:
    rows = Dataset.from_dict({"question": [SECRET]})
    assert not has_severity(rows)
    text = refusal(rows)
    for word in ("severity.source=columns", "data.severity_column=NAME", "severity.control=uniform", "p_critical"):
        assert word in text


def test_names_that_repeat_are_read_row_by_row() -> None:
    found = severity_probabilities(named("mild", "critical", "mild", "neutral", "critical"))
    assert found.argmax(axis=1).tolist() == [0, 2, 0, 1, 2]
    assert refusal(named("mild", "mild", "critical", "mild", "?", "critical")).startswith("Row 5: ")


def test_half_a_severity_is_not_taken_for_none() -> None:
    assert has_severity(named("critical")) and has_severity(Dataset.from_dict({"p_neutral": [1.0]}))


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("non_critical", 0),
        ("Non-Critical", 0),
        ("  NON CRITICAL ", 0),
        ("noncritical", 0),
        ("mild", 0),
        ("low", 0),
        ("غير حرج", 0),
        ("غير حرجة", 0),
        ("غير  حرجه", 0),
        ("غير خطيرة", 0),
        ("بسيطه", 0),
        ("خفيف", 0),
        ("neutral", 1),
        ("Moderate", 1),
        ("medium", 1),
        ("متوسط", 1),
        ("متوسطة", 1),
        ("متوسطه", 1),
        ("محايد", 1),
        ("معتدلة", 1),
        ("critical", 2),
        ("SEVERE", 2),
        ("high", 2),
        ("emergency", 2),
        ("حرج", 2),
        ("حَرِجَة", 2),
        ("حرجه", 2),
        ("خطـــيرة", 2),
        ("شديدة", 2),
        ("طارئ", 2),
        ("طارئه", 2),
    ],
)
def test_a_name_is_known_however_it_is_spelt(name: str, index: int) -> None:
    assert severity_index(name) == index
    np.testing.assert_array_equal(severity_probabilities(named(name)), np.eye(3)[[index]])


@pytest.mark.parametrize("name", ["", " ", None, "criticall", "2", "غير", "حرج جدا", SECRET])
def test_an_unknown_or_empty_name_is_refused_with_its_row_and_without_its_text(name: str | None) -> None:
    text = refusal(named("critical", name, "mild"))
    assert text.startswith("Row 2: ") and "non_critical, neutral and critical" in text
    assert not (name or "").strip() or not re.search(rf"\b{re.escape(name or '')}\b", text.partition(";")[0][7:])


def test_a_question_column_taken_for_the_severity_shows_no_question() -> None:
    questions = [f"{SECRET} {number}" for number in range(40)]
    text = refusal(named(*questions, row=list(range(2, 42))))
    assert text.startswith("40 rows (the first is row 2): ") and "صدر" not in text


def test_every_refusal_of_a_row_begins_with_its_number() -> None:
    for rows in (table([[2.0, 0, 0]]), table([[-1.0, 1, 1]]), table([[None, 1, 0]]), named("?"), named("?", "!")):
        assert NAMED.match(refusal(rows))


def test_a_refusal_is_a_value_error_too() -> None:
    with pytest.raises(ValueError):
        severity_probabilities(named("?"))


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, [0.2, 0.3, 0.5]),
        (0.5, [0.04 / 0.38, 0.09 / 0.38, 0.25 / 0.38]),
        (2.0, np.sqrt([0.2, 0.3, 0.5]) / np.sqrt([0.2, 0.3, 0.5]).sum()),
    ],
)
def test_sharpening_is_a_power_divided_by_its_sum(temperature: float, expected: list[float]) -> None:
    np.testing.assert_allclose(sharpened(np.array([[0.2, 0.3, 0.5]]), temperature), [expected], rtol=1e-12)


def test_sharpening_keeps_the_order_goes_to_one_hot_and_flattening_to_a_third_each() -> None:
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], size=200)
    for temperature in (0.01, 0.3, 3, 1000):
        changed = sharpened(probabilities, temperature)
        np.testing.assert_allclose(changed.sum(axis=1), 1, rtol=1e-12)
        np.testing.assert_array_equal(changed.argmax(axis=1), probabilities.argmax(axis=1))
    assert np.isfinite(sharpened(probabilities, 1e-4)).all()
    np.testing.assert_allclose(sharpened(probabilities, 1e-4).max(axis=1), 1, atol=0.2)
    np.testing.assert_allclose(sharpened(probabilities, 1e6), 1 / 3, atol=1e-4)


def test_sharpening_twice_is_sharpening_by_the_product() -> None:
    probabilities = np.random.default_rng(1).dirichlet([2, 1, 1], size=50)
    np.testing.assert_allclose(
        sharpened(sharpened(probabilities, 0.5), 0.4), sharpened(probabilities, 0.2), rtol=1e-9, atol=1e-300
    )


def test_human_labels_and_probabilities_of_zero_stay_what_they_are() -> None:
    for temperature in (0.1, 7.0):
        np.testing.assert_array_equal(sharpened(np.eye(3), temperature), np.eye(3))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(WeightError, match="above 0"):
        sharpened(np.eye(3), temperature)


def test_numbered_columns_are_not_taken_for_severities() -> None:
    rows = Dataset.from_dict({"question": [SECRET], "class1": [0.2], "class2": [0.3], "class3": [0.5]})
    assert not has_severity(rows)
    assert "rename them" in refusal(rows)
