"""Severity columns become probabilities or an error that says where and what to do; nothing is filled in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from sevpeft.errors import WeightError
from sevpeft.severity.probabilities import PROBABILITY_COLUMNS, has_severity, severity_probabilities, sharpened

SECRET = "عندي ألم في صدري"
NAMES = {
    0: "non_critical|Non-Critical|  NON CRITICAL |noncritical|mild|low|غير حرج|غير حرجة|غير  حرجه|غير خطيرة|بسيطه|خفيف",
    1: "neutral|Moderate|medium|متوسط|متوسطة|متوسطه|محايد|معتدلة",
    2: "critical|SEVERE|high|emergency|حرج|حَرِجَة|حرجه|خطـــيرة|شديدة|طارئ|طارئه",
}
NO_PROBABILITIES: list[list[float | None]] = [
    [float("nan"), 0.5, 0.5],
    [None, 0.5, 0.5],
    [float("inf"), 0.0, 0.0],
    [float("inf"), float("-inf"), 0.0],
    [-0.1, 0.6, 0.5],
    [0.5, 0.4, 0.2],
    [50.0, 25.0, 25.0],
    [0.0, 0.0, 0.0],
]


def table(rows: Sequence[Sequence[float | None]], **columns: Any) -> Dataset:
    values = {name: [row[i] for row in rows] for i, name in enumerate(PROBABILITY_COLUMNS)}
    return Dataset.from_dict({"question": [SECRET] * len(rows), **values, **columns})


def named(*names: str | None, **columns: Any) -> Dataset:
    return Dataset.from_dict({"question": [SECRET] * len(names), "severity": list(names), **columns})


def message(rows: Dataset) -> str:
    """Of the error that these rows are."""
    with pytest.raises(WeightError) as caught:
        severity_probabilities(rows)
    text = str(caught.value)
    assert "\n" not in text and "صدر" not in text
    return text


def test_three_columns_are_read_in_their_order_and_to_the_last_bit() -> None:
    rows = [[0.1, 0.2, 0.7], [0.05, 0.9, 0.05]]
    expected = np.array(rows) / np.array(rows).sum(1, keepdims=True)
    np.testing.assert_array_equal(severity_probabilities(table(rows)), expected)
    # They win over a name.
    np.testing.assert_array_equal(severity_probabilities(table(rows, severity=["mild", "mild"])), expected)


def test_whole_numbers_and_rounded_probabilities_are_probabilities_too() -> None:
    found = severity_probabilities(table([[0, 0, 1], [1, 0, 0]]))
    np.testing.assert_array_equal(found, [[0, 0, 1], [1, 0, 0]])
    rounded = severity_probabilities(table([[0.33, 0.33, 0.33], [0.5, 0.25, 0.26]]))
    np.testing.assert_allclose(rounded.sum(1), 1, rtol=1e-15)
    np.testing.assert_allclose(rounded[0], 1 / 3)
    message(table([[0.5, 0.25, 0.27]]))


def test_a_subset_of_a_table_is_read_by_its_own_rows() -> None:
    rows = table([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]).select([2, 0])
    np.testing.assert_array_equal(severity_probabilities(rows), [[0, 0, 1], [1, 0, 0]])
    names = named("critical", "neutral", "mild").select([2, 0])
    np.testing.assert_array_equal(severity_probabilities(names), [[1, 0, 0], [0, 0, 1]])


def test_a_value_that_is_no_probability_is_refused_with_its_row() -> None:
    good = [0.2, 0.3, 0.5]
    for row in NO_PROBABILITIES:
        assert message(table([good, good, row, good])).startswith("Row 3: "), row
        # Rows are counted as in the user's file, where a row may have been rejected before.
        many = message(table([good, row, good, row], row=[2, 17, 18, 40]))
        assert many.startswith("2 rows (the first is row 17): "), row


def test_only_some_of_the_three_columns_name_the_missing_ones() -> None:
    for present in (["p_critical"], ["p_non_critical", "p_critical"], ["p_neutral"]):
        rows = Dataset.from_dict({name: [0.5] for name in present} | {"severity": ["critical"]})
        missing = [name for name in PROBABILITY_COLUMNS if name not in present]
        assert f"no {', '.join(missing)};" in message(rows) and has_severity(rows)


def test_without_a_severity_column_the_error_says_what_to_do() -> None:
    # Numbered columns do not say of which severity they are.
    for columns in ({}, {"class1": [0.2], "class2": [0.3], "class3": [0.5]}):
        rows = Dataset.from_dict({"question": [SECRET], **columns})
        text = message(rows)
        assert not has_severity(rows)
        for word in ("severity.source=rules", "data.severity_column=NAME", "severity.control=uniform", "p_critical"):
            assert word in text


def test_a_name_is_known_however_it_is_spelt() -> None:
    spelt = [(name, index) for index, names in NAMES.items() for name in names.split("|")]
    found = severity_probabilities(named(*(name for name, _ in spelt)))
    np.testing.assert_array_equal(found, np.eye(3)[[index for _, index in spelt]])


def test_an_unknown_or_empty_name_is_refused_with_its_row_and_without_its_text() -> None:
    for name in ("", " ", None, "criticall", "2", "غير", "حرج جدا", SECRET):
        text = message(named("critical", "mild", "critical", name, "mild"))
        assert text.startswith("Row 4: ") and "non_critical" in text
    text = message(named(*(f"{SECRET} {number}" for number in range(40)), row=list(range(2, 42))))
    assert re.match(r"40 rows \(the first is row 2\): ", text)


def test_sharpening_is_a_power_divided_by_its_sum() -> None:
    probabilities = np.array([[0.2, 0.3, 0.5]])
    for temperature in (1.0, 0.5, 2.0):
        powers = probabilities ** (1 / temperature)
        np.testing.assert_allclose(sharpened(probabilities, temperature), powers / powers.sum(), rtol=1e-12)
    for temperature in (0.1, 7.0):
        np.testing.assert_array_equal(sharpened(np.eye(3), temperature), np.eye(3))


def test_sharpening_keeps_the_order_goes_to_one_hot_and_flattening_to_a_third_each() -> None:
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], size=200)
    for temperature in (0.01, 0.3, 3, 1000):
        changed = sharpened(probabilities, temperature)
        np.testing.assert_allclose(changed.sum(axis=1), 1, rtol=1e-12)
        np.testing.assert_array_equal(changed.argmax(axis=1), probabilities.argmax(axis=1))
    assert np.isfinite(sharpened(probabilities, 1e-4)).all()
    np.testing.assert_allclose(sharpened(probabilities, 1e-4).max(axis=1), 1, atol=0.2)
    np.testing.assert_allclose(sharpened(probabilities, 1e6), 1 / 3, atol=1e-4)
    twice = sharpened(sharpened(probabilities, 0.5), 0.4)
    np.testing.assert_allclose(twice, sharpened(probabilities, 0.2), rtol=1e-9, atol=1e-300)
