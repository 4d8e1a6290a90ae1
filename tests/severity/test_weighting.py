"""Weights follow the published formula, controls take one thing away at a time, and useless weights are told apart."""

from __future__ import annotations

import numpy as np
import pytest

from sevpeft.errors import WeightError
from sevpeft.recipe import SEVERITY_PRESETS, recipe_from_values
from sevpeft.severity.weighting import WeightSummary, checked_weights, severity_weights

BALANCED = SEVERITY_PRESETS["balanced"]


@pytest.fixture
def probabilities() -> np.ndarray:
    return np.random.default_rng(0).dirichlet([1, 1, 1], size=500)


@pytest.mark.parametrize(("preset", "delta"), [("mild", 0.25), ("balanced", 0.5), ("strong", 0.75)])
def test_a_preset_is_one_plus_delta_times_critical_minus_non_critical(
    preset: str, delta: float, probabilities: np.ndarray
) -> None:
    coefficients = recipe_from_values({"severity": {"weights": preset}}).severity.coefficients()
    weights = severity_weights(probabilities, coefficients)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, 1 + delta * (probabilities[:, 2] - probabilities[:, 0]), rtol=1e-12)


def test_the_coefficients_stand_in_the_order_of_the_severities() -> None:
    np.testing.assert_array_equal(severity_weights(np.eye(3), (0.5, 1.0, 4.0)), [0.5, 1, 4])


def test_normalising_divides_by_the_mean_and_keeps_the_ratios(probabilities: np.ndarray) -> None:
    plain = severity_weights(probabilities, (0.5, 1.0, 4.0))
    scaled = severity_weights(probabilities, (0.5, 1.0, 4.0), normalize="mean")
    assert scaled.mean() == pytest.approx(1, abs=1e-12) and plain.mean() > 1.5
    np.testing.assert_allclose(scaled / scaled[0], plain / plain[0])


def test_shuffled_is_the_same_multiset_in_another_order_by_its_seed(probabilities: np.ndarray) -> None:
    real = severity_weights(probabilities, BALANCED)
    one = severity_weights(probabilities, BALANCED, control="shuffled", seed=1)
    np.testing.assert_array_equal(np.sort(one), np.sort(real))
    assert (one != real).mean() > 0.9
    assert abs(np.corrcoef(one, real)[0, 1]) < 0.15
    np.testing.assert_array_equal(one, severity_weights(probabilities, BALANCED, control="shuffled", seed=1))
    assert (one != severity_weights(probabilities, BALANCED, control="shuffled", seed=2)).mean() > 0.9


def test_shuffling_leaves_the_random_numbers_of_everybody_else_alone(probabilities: np.ndarray) -> None:
    before = np.random.get_state()[1].copy()
    severity_weights(probabilities, BALANCED, control="shuffled")
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_constant_has_the_same_mean_and_no_spread(probabilities: np.ndarray) -> None:
    weights = severity_weights(probabilities, (0.5, 1.0, 4.0), control="constant")
    assert len(weights) == 500 and np.ptp(weights) == 0
    assert weights[0] == pytest.approx(severity_weights(probabilities, (0.5, 1.0, 4.0)).mean())


def test_uniform_is_one_for_everyone(probabilities: np.ndarray) -> None:
    np.testing.assert_array_equal(severity_weights(probabilities, (0.5, 1.0, 4.0), control="uniform"), np.ones(500))


@pytest.mark.parametrize("control", ["none", "shuffled", "constant"])
def test_normalised_controls_have_the_same_mean(control: str, probabilities: np.ndarray) -> None:
    weights = severity_weights(probabilities, (0.5, 1.0, 4.0), normalize="mean", control=control)
    assert weights.mean() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("control", ["none", "shuffled", "constant", "uniform"])
@pytest.mark.parametrize(
    ("coefficients", "words"),
    [
        ((0.0, 0.0, 0.0), "all severity weights are zero"),
        ((-1.0, 1.0, 1.0), "1 severity weights are negative"),
        ((float("nan"), 1.0, 1.0), "not finite"),
        ((1.0, float("inf"), 1.0), "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_useless_coefficients_are_refused_whatever_the_control(
    control: str, coefficients: tuple[float, float, float], words: str
) -> None:
    with pytest.raises(WeightError, match=f"(?i){words}"):
        severity_weights(np.eye(3), coefficients, control=control)


def test_a_zero_for_one_severity_is_allowed() -> None:
    np.testing.assert_array_equal(severity_weights(np.eye(3), (0.0, 1.0, 2.0)), [0, 1, 2])


def test_no_consultation_at_all_is_refused() -> None:
    with pytest.raises(WeightError, match="no consultations"):
        severity_weights(np.zeros((0, 3)), BALANCED)
    with pytest.raises(WeightError, match="no consultations"):
        checked_weights(np.array([]))


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 2, 3)])
def test_probabilities_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightError, match="shape"):
        severity_weights(np.full(shape, 0.5), BALANCED)


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(WeightError, match=r"severity\.normalize is 'sum'"):
        severity_weights(np.eye(3), BALANCED, normalize="sum")
    with pytest.raises(WeightError, match=r"severity\.control is 'random'"):
        severity_weights(np.eye(3), BALANCED, control="random")


def summary(*weights: float, strata: list[int] | None = None) -> WeightSummary:
    return WeightSummary.of(np.array(weights), None if strata is None else np.array(strata))


@pytest.mark.parametrize(
    ("weights", "size"),
    [
        ((1, 1, 1, 1), 4.0),
        ((7, 7), 2.0),  # the scale does not matter
        ((1, 0, 0, 0), 1.0),
        ((1, 1, 0, 0), 2.0),
        ((1, 2, 3), 36 / 14),
    ],
)
def test_the_effective_sample_size_is_kishs(weights: tuple[float, ...], size: float) -> None:
    assert summary(*weights).effective_sample_size == pytest.approx(size)


def test_a_summary_says_what_the_weights_amount_to() -> None:
    told = summary(0.5, 1.0, 1.0, 1.5, strata=[0, 1, 1, 2]).as_dict()
    assert told["consultations"] == 4 and told["severities"] == {"non_critical": 1, "neutral": 2, "critical": 1}
    assert (told["minimum"], told["maximum"], told["mean"]) == (0.5, 1.5, 1.0)
    assert told["coefficient_of_variation"] == pytest.approx(np.sqrt(0.125))
    assert told["quantiles"]["0.5"] == 1.0 and told["quantiles"]["0.05"] < 0.6
    assert summary(1.0).severities == {}
    assert summary(1.0, strata=[2]).severities == {"non_critical": 0, "neutral": 0, "critical": 1}


def test_the_published_range_of_weights_is_too_small_to_matter() -> None:
    assert summary(*np.linspace(0.93, 1.03, 1000)).too_small_to_matter
    assert summary(1.0, 1.0).too_small_to_matter
    assert not summary(0.5, 1.0, 1.5).too_small_to_matter
    # The scale does not matter: ten times the published weights are as useless.
    assert summary(*np.linspace(9.3, 10.3, 1000)).too_small_to_matter
