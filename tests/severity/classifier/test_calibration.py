"""Calibration finds what was planted, leaves what it must leave, and comes back from JSON the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sevpeft.errors import DataError
from sevpeft.severity.classifier.calibration import (
    Calibrated,
    Isotonic,
    Temperature,
    calibration_from_json,
    fit_bias_corrected,
    fit_isotonic,
    fit_temperature,
)
from sevpeft.severity.classifier.judging import judge


def drawn(count: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are too sharp by `temperature` for the labels, which were drawn from the right ones."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=(count, 3)) * 1.5
    right = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    labels = (random.random((count, 1)) > right.cumsum(axis=1)).sum(axis=1).clip(max=2)
    sharp = np.exp(scores * temperature)
    return sharp / sharp.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("planted", [0.5, 1.0, 2.0, 4.0])
def test_a_planted_temperature_is_found(planted: float) -> None:
    assert fit_temperature(*drawn(20_000, planted)).temperature == pytest.approx(planted, rel=0.04)


def test_temperature_lowers_the_calibration_error_and_the_brier_score() -> None:
    probabilities, labels = drawn(4_000, 3.0)
    fitted = fit_temperature(probabilities[:2_000], labels[:2_000])
    rest, held, groups = probabilities[2_000:], labels[2_000:], np.arange(2_000)
    before = judge(rest, held, groups, resamples=20).figures
    after = judge(fitted.apply(rest), held, groups, resamples=20).figures
    for figure in ("ece_critical", "ece_top"):
        assert after[figure].value < 0.04 < 0.1 < before[figure].value
    assert after["brier"].value < before["brier"].value


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 2.5, 20.0])
def test_temperature_never_changes_which_severity_is_the_likeliest(temperature: float) -> None:
    probabilities = np.random.default_rng(1).dirichlet([0.5, 0.5, 0.5], 5_000)
    scaled = Temperature(temperature).apply(probabilities)
    np.testing.assert_array_equal(scaled.argmax(axis=1), probabilities.argmax(axis=1))
    np.testing.assert_allclose(scaled.sum(axis=1), 1, rtol=1e-12)


def test_temperature_one_changes_nothing() -> None:
    probabilities = np.random.default_rng(2).dirichlet([1, 1, 1], 10)
    np.testing.assert_array_equal(Temperature().apply(probabilities), probabilities)


def test_a_probability_of_zero_does_not_break_the_fit() -> None:
    probabilities = np.array([[1.0, 0, 0], [0, 1, 0], [0.2, 0.3, 0.5], [0.5, 0.4, 0.1]])
    assert np.isfinite(fit_temperature(probabilities, np.array([1, 1, 2, 0])).temperature)


def test_isotonic_is_monotone_for_each_class_before_the_three_are_made_to_sum_to_one() -> None:
    fitted = fit_isotonic(*drawn(3_000, 3.0))
    for given, become in fitted.thresholds:
        assert np.all(np.diff(given) > 0) and np.all(np.diff(become) >= 0)
    probabilities = np.random.default_rng(3).dirichlet([0.3, 0.3, 0.3], 500)
    mapped = fitted.apply(probabilities)
    np.testing.assert_allclose(mapped.sum(axis=1), 1, rtol=1e-12)
    assert mapped.min() > 0, "a probability of 0 would be certainty out of a handful of rows"


def test_isotonic_straightens_what_no_temperature_can() -> None:
    random = np.random.default_rng(4)
    labels = random.choice(3, 6_000, p=[0.6, 0.3, 0.1])
    # Critical is said three times too often, whatever the row.
    probabilities = np.tile([0.4, 0.3, 0.3], (6_000, 1)) + random.normal(size=(6_000, 3)) * 0.02
    probabilities = np.abs(probabilities) / np.abs(probabilities).sum(axis=1, keepdims=True)
    half, groups = slice(3_000, None), np.arange(3_000)
    error = {}
    for name, fit in (("temperature", fit_temperature), ("isotonic", fit_isotonic)):
        calibrated = fit(probabilities[:3_000], labels[:3_000]).apply(probabilities[half])
        error[name] = judge(calibrated, labels[half], groups, resamples=5).figures["ece_critical"].value
    assert error["isotonic"] < 0.03 < 0.1 < error["temperature"]


@pytest.mark.parametrize("fit", [fit_temperature, fit_bias_corrected, fit_isotonic])
def test_a_calibration_comes_back_from_json_to_the_last_bit(fit: object) -> None:
    assert callable(fit)
    probabilities, labels = drawn(500, 2.0)
    fitted = fit(probabilities, labels)
    again = calibration_from_json(json.loads(json.dumps(fitted.to_json())))
    assert again == fitted
    np.testing.assert_array_equal(again.apply(probabilities), fitted.apply(probabilities))


def test_thresholds_are_stored_by_the_name_of_their_class() -> None:
    fitted = fit_isotonic(*drawn(500, 2.0))
    stored = fitted.to_json()
    stored["thresholds"] = dict(reversed(stored["thresholds"].items()))
    assert calibration_from_json(stored) == fitted


@pytest.mark.parametrize(
    "content",
    [
        {"method": "temperature"},
        {"method": "temperature", "temperature": 0},
        {"method": "temperature", "temperature": "nan"},
        {"method": "bias_corrected", "temperature": 1},
        {"method": "bias_corrected", "temperature": 1, "bias": {"non_critical": 0, "neutral": 99, "critical": 0}},
        {"method": "isotonic", "floor": 0.1, "thresholds": {}},
        {"method": "isotonic", "floor": 0.1, "thresholds": {n: {"given": [0, 1], "become": [1, 0]} for n in
         ("non_critical", "neutral", "critical")}},
        {"method": "platt"},
        None,
        [],
    ],
)  # fmt: skip
def test_a_damaged_calibration_is_refused(content: object) -> None:
    with pytest.raises(DataError, match="calibration"):
        calibration_from_json(content)


def test_isotonic_without_a_class_is_refused() -> None:
    with pytest.raises(DataError, match="no critical row"):
        fit_isotonic(np.full((4, 3), 1 / 3), np.array([0, 1, 0, 1]))


@pytest.mark.parametrize("fit", [fit_temperature, fit_bias_corrected, fit_isotonic])
def test_no_rows_are_refused(fit: object) -> None:
    assert callable(fit)
    with pytest.raises(DataError, match="no rows"):
        fit(np.empty((0, 3)), np.empty(0, dtype=int))


class Constant:
    kind, version = "linear", "1"

    def probabilities(self, questions: list[str]) -> np.ndarray:
        return np.tile([0.5, 0.3, 0.2], (len(questions), 1))


def test_the_version_changes_with_the_calibration_and_only_with_it() -> None:
    one, same, other = (Calibrated(Constant(), Temperature(t)) for t in (1.5, 1.5, 1.6))
    assert one.version == same.version != other.version
    assert one.kind == "linear"
    np.testing.assert_allclose(one.probabilities(["?"]), Temperature(1.5).apply(np.array([[0.5, 0.3, 0.2]])))


def test_an_isotonic_function_is_flat_outside_its_thresholds() -> None:
    thresholds = tuple(((0.2, 0.8), (0.1, 0.6)) for _ in range(3))
    mapped = Isotonic(thresholds, 0.01).apply(np.array([[0.0, 0.0, 1.0]]))
    np.testing.assert_allclose(mapped, [[0.125, 0.125, 0.75]])


def test_a_bias_repairs_shares_that_no_temperature_can() -> None:
    probabilities, labels = drawn(20_000, 1.0)
    off = probabilities * [1.0, 2.0, 4.0]
    off /= off.sum(axis=1, keepdims=True)
    fitted = fit_bias_corrected(off, labels)
    assert fitted.temperature == pytest.approx(1, rel=0.05)
    np.testing.assert_allclose(fitted.bias, [0, -np.log(2), -np.log(4)], atol=0.08)
    groups, held = np.arange(20_000), labels
    repaired = judge(fitted.apply(off), held, groups, resamples=2, curve=False).figures["ece_critical"].value
    scaled = judge(fit_temperature(off, labels).apply(off), held, groups, resamples=2, curve=False)
    assert repaired < 0.02 < 0.1 < scaled.figures["ece_critical"].value


def test_a_bias_for_a_severity_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="no critical row"):
        fit_bias_corrected(np.full((4, 3), 1 / 3), np.array([0, 1, 0, 1]))
