"""The picture of the weights counts every consultation, fits the screen, and comes with advice where it is needed."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from sevpeft.recipe import SEVERITY_PRESETS
from sevpeft.severity.histogram import advice, effective_sample, histogram_lines
from sevpeft.severity.weighting import WeightSummary, histogram_of, severity_weights


def weights_of(concentration: float, count: int = 1000) -> np.ndarray:
    """Balanced weights of random probabilities; the higher the concentration, the nearer to a third each."""
    probabilities = np.random.default_rng(0).dirichlet([concentration] * 3, size=count)
    return severity_weights(probabilities, SEVERITY_PRESETS["balanced"])


@pytest.mark.parametrize("weights", [weights_of(1), weights_of(500), np.ones(7), np.array([0.5, 1, 1.5] * 9)])
@pytest.mark.parametrize("width", [30, 60])
def test_every_consultation_is_in_a_line_that_fits(weights: np.ndarray, width: int) -> None:
    lines = histogram_lines(histogram_of(weights), width)
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= width
    counts = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert sum(counts) == len(weights)
    bars = [line.count("█") for line in lines]
    assert bars[int(np.argmax(counts))] == max(bars)
    assert all((bar > 0) == (count > 0) for bar, count in zip(bars, counts, strict=True))


def test_a_few_different_weights_are_shown_as_themselves() -> None:
    assert histogram_of(np.array([1.5, 0.5, 1.0, 0.5])) == [(0.5, 0.5, 2), (1.0, 1.0, 1), (1.5, 1.5, 1)]


def test_many_weights_are_bars_of_equal_width_from_the_lowest_to_the_highest() -> None:
    weights = weights_of(1)
    bars = histogram_of(weights)
    assert len(bars) == 10 and bars[0][0] == weights.min() and bars[-1][1] == weights.max()
    np.testing.assert_allclose(np.diff([low for low, _, _ in bars]), (weights.max() - weights.min()) / 10)


def test_bars_that_lie_close_together_have_labels_that_tell_them_apart() -> None:
    labels = [re.split(" {2,}", line.strip())[0] for line in histogram_lines(histogram_of(weights_of(5000)))]
    assert len(set(labels)) == len(labels) == 10


def test_a_summary_from_a_run_folder_gives_the_same_lines() -> None:
    summary = WeightSummary.of(weights_of(1), None)
    stored = json.loads(json.dumps(summary.as_dict()))
    assert histogram_lines(stored["histogram"]) == histogram_lines(histogram_of(weights_of(1)))


def test_the_effective_sample_size_is_that_of_kish() -> None:
    summary = WeightSummary.of(np.array([3.0, 1.0]), None)
    assert summary.effective_sample_size == pytest.approx(16 / 10)
    assert effective_sample(summary) == "2 of 2 (80%)"


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        (weights_of(1), None),
        (np.array([0.5, 1, 1.5] * 9), None),
        (weights_of(2000), "severity.temperature"),
        (np.ones(9), "All weights are 1.00"),
        (np.array([50.0] + [0.1] * 99), "effective sample size"),
    ],
)
def test_advice_is_given_where_the_weights_do_nothing_or_a_few_decide(weights: np.ndarray, word: str | None) -> None:
    said = advice(WeightSummary.of(weights, None))
    assert (said is None) if word is None else (said is not None and word in said)


def test_the_published_spread_is_warned_about() -> None:
    """Weights between .93 and 1.03, as the published example probabilities give (FACTS of arXiv 2604.06346)."""
    assert WeightSummary.of(np.linspace(0.93, 1.03, 100), None).too_small_to_matter
