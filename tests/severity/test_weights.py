"""Weights follow the published formula, controls take one thing away at a time, and useless weights are noticed."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevpeft.errors import DataError, RecipeError, WeightError
from sevpeft.recipe import SEVERITY_PRESETS, Recipe, recipe_from_values
from sevpeft.severity.weights import (
    WeightSummary,
    advice,
    effective_sample,
    histogram_lines,
    oversample,
    severity_weights,
)
from sevpeft.training.data import load_splits, source_index, weigh

BALANCED, UNEQUAL = SEVERITY_PRESETS["balanced"], (0.5, 1.0, 4.0)


def random_probabilities(concentration: float = 1, count: int = 500) -> np.ndarray:
    """The higher the concentration, the nearer to a third each."""
    return np.random.default_rng(0).dirichlet([concentration] * 3, size=count)


def test_a_preset_is_one_plus_delta_times_critical_minus_non_critical() -> None:
    probabilities = random_probabilities()
    for preset, delta in (("mild", 0.25), ("balanced", 0.5), ("strong", 0.75)):
        coefficients = recipe_from_values({"severity": {"weights": preset}}).severity.coefficients()
        weights = severity_weights(probabilities, coefficients)
        assert weights.dtype == np.float64
        np.testing.assert_allclose(weights, 1 + delta * (probabilities[:, 2] - probabilities[:, 0]), rtol=1e-12)


def test_the_coefficients_stand_in_the_order_of_the_severities() -> None:
    np.testing.assert_array_equal(severity_weights(np.eye(3), UNEQUAL), UNEQUAL)
    np.testing.assert_array_equal(severity_weights(np.eye(3), (0.0, 1.0, 2.0)), [0, 1, 2])


def test_normalizing_divides_by_the_mean_and_keeps_the_ratios() -> None:
    plain = severity_weights(random_probabilities(), UNEQUAL)
    scaled = severity_weights(random_probabilities(), UNEQUAL, normalize="mean")
    assert scaled.mean() == pytest.approx(1, abs=1e-12) and plain.mean() > 1.5
    np.testing.assert_allclose(scaled / scaled[0], plain / plain[0])


def test_shuffled_is_the_same_multiset_in_another_order_by_its_seed() -> None:
    probabilities = random_probabilities()
    real = severity_weights(probabilities, BALANCED)
    state = np.random.get_state()[1].copy()
    one = severity_weights(probabilities, BALANCED, control="shuffled", seed=1)
    np.testing.assert_array_equal(state, np.random.get_state()[1])
    np.testing.assert_array_equal(np.sort(one), np.sort(real))
    assert (one != real).mean() > 0.9 and abs(np.corrcoef(one, real)[0, 1]) < 0.15
    np.testing.assert_array_equal(one, severity_weights(probabilities, BALANCED, control="shuffled", seed=1))
    assert (one != severity_weights(probabilities, BALANCED, control="shuffled", seed=2)).mean() > 0.9


def test_rows_are_drawn_as_often_as_they_weigh_and_each_once_where_all_weigh_the_same() -> None:
    for weight in (0.1, 1.0, 1 / 3):
        np.testing.assert_array_equal(oversample(np.full(997, weight), 3), np.arange(997))
    weights = severity_weights(random_probabilities(), (0.25, 1.0, 4.0))
    counts = [np.bincount(oversample(weights, seed), minlength=500) for seed in range(40)]
    expected = 500 * weights / weights.sum()
    for count in counts:
        assert count.sum() == 500 and (np.abs(count - expected) < 1).all()
    assert np.abs(np.mean(counts, axis=0) - expected).mean() < 0.07 and (counts[0] != counts[1]).any()


def test_constant_is_the_mean_for_everyone_and_uniform_is_one() -> None:
    probabilities = random_probabilities()
    constant = severity_weights(probabilities, UNEQUAL, control="constant")
    assert len(constant) == 500 and np.ptp(constant) == 0
    assert constant[0] == pytest.approx(severity_weights(probabilities, UNEQUAL).mean())
    np.testing.assert_array_equal(severity_weights(probabilities, UNEQUAL, control="uniform"), np.ones(500))
    for control in ("none", "shuffled", "constant"):
        weights = severity_weights(probabilities, UNEQUAL, normalize="mean", control=control)
        assert weights.mean() == pytest.approx(1, abs=1e-12), control


@pytest.mark.filterwarnings("ignore:invalid value")
def test_useless_coefficients_are_refused_whatever_the_control() -> None:
    for control in ("none", "shuffled", "constant", "uniform"):
        for wrong in ((0.0, 0.0, 0.0), (-1.0, 1.0, 1.0), (float("nan"), 1.0, 1.0), (1.0, float("inf"), 1.0)):
            with pytest.raises(WeightError):
                severity_weights(np.eye(3), wrong, control=control)
    with pytest.raises(WeightError):
        severity_weights(np.empty((0, 3)), BALANCED)


def test_a_summary_says_what_the_weights_amount_to() -> None:
    strata = np.array([0, 1, 1, 2])
    figures = asdict(WeightSummary.of(np.array([0.5, 1.0, 1.0, 1.5]), strata))
    assert figures["consultations"] == 4 and figures["severities"] == {"non_critical": 1, "neutral": 2, "critical": 1}
    assert (figures["minimum"], figures["maximum"], figures["mean"]) == (0.5, 1.5, 1.0)
    assert figures["coefficient_of_variation"] == pytest.approx(np.sqrt(0.125))
    assert figures["histogram"] == [(0.5, 0.5, 1), (1.0, 1.0, 2), (1.5, 1.5, 1)]
    assert WeightSummary.of(np.ones(1), None).severities == {}


def test_the_effective_sample_size_is_kishs() -> None:
    rows = [((1, 1, 1, 1), 4), ((7, 7), 2), ((1, 0, 0, 0), 1), ((1, 1, 0, 0), 2), ((1, 2, 3), 36 / 14)]
    for weights, size in rows:
        assert WeightSummary.of(np.array(weights), None).effective_sample_size == pytest.approx(size), weights
    assert effective_sample(WeightSummary.of(np.array([3.0, 1.0]), None)) == "2 of 2 (80%)"


def test_every_consultation_is_in_a_line_of_the_histogram_that_fits() -> None:
    kinds = [severity_weights(random_probabilities(concentration), BALANCED) for concentration in (1, 500, 5000)]
    for weights in (*kinds, np.ones(7), np.array([0.5, 1, 1.5] * 9)):
        stored = json.loads(json.dumps(asdict(WeightSummary.of(weights, None))))["histogram"]
        for width in (30, 60):
            lines = histogram_lines(stored, width)
            assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= width
            assert len({re.split(" {2,}", line.strip())[0] for line in lines}) == len(lines), "labels differ"
            counts = [int(line.split()[-1].replace(",", "")) for line in lines]
            bars = [line.count("█") for line in lines]
            assert sum(counts) == len(weights) and bars[int(np.argmax(counts))] == max(bars)
            assert [bar > 0 for bar in bars] == [count > 0 for count in counts]


def test_many_weights_are_bars_of_equal_width_from_the_lowest_to_the_highest() -> None:
    weights = severity_weights(random_probabilities(), BALANCED)
    bars = WeightSummary.of(weights, None).histogram
    assert len(bars) == 10 and bars[0][0] == weights.min() and bars[-1][1] == weights.max()
    np.testing.assert_allclose(np.diff([low for low, _, _ in bars]), (weights.max() - weights.min()) / 10)


def test_advice_is_given_where_the_weights_do_nothing_or_a_few_decide() -> None:
    rows = [
        (severity_weights(random_probabilities(), BALANCED), ""),
        (np.array([0.5, 1, 1.5] * 9), ""),
        # As the published probabilities give them, and ten times that: the scale does not matter.
        (np.linspace(0.93, 1.03, 1000), "severity.temperature=0.5"),
        (np.linspace(9.3, 10.3, 1000), "severity.temperature=0.5"),
        (np.ones(9), "severity.weights=strong"),
        (np.array([50.0] + [0.1] * 99), "severity.temperature=2"),
    ]
    for weights, remedy in rows:
        given = advice(WeightSummary.of(weights, None)) or ""
        assert remedy in given and bool(remedy) == bool(given), given


def weighted(path: Path, weights: list[Any], column: str = "weight", **severity: Any) -> Recipe:
    rows = [{"question": f"سؤال {n}", "answer": f"جواب {n}", column: one} for n, one in enumerate(weights)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = {"source": "weight", "weight_column": column, **severity}
    return recipe_from_values({"data": {"path": str(path), "test_size": 5}, "severity": section})


def test_ready_made_weights_are_used_as_they_stand_and_controls_work_with_them(tmp_path: Path) -> None:
    given = [0, "0,5", " 2.5 ", 1, "٠٫٧٥", 3] * 10
    numbers = np.array([0, 0.5, 2.5, 1, 0.75, 3] * 10)
    for column in ("weight", "importance"):
        _, splits, severity = load_splits(recipe := weighted(tmp_path / f"{column}.jsonl", given, column))
        kept = source_index(splits.train)
        weights, summary = weigh(recipe, severity, kept)
        np.testing.assert_array_equal(weights, numbers[kept])
        assert severity is not None and (severity.strata == -1).all() and summary.severities == {}
        found = {}
        for control in ("shuffled", "constant", "uniform"):
            recipe = weighted(tmp_path / f"{column}.jsonl", given, column, control=control, normalize="mean")
            found[control] = weigh(recipe, severity, kept)[0]
        np.testing.assert_allclose(np.sort(found["shuffled"]), np.sort(weights / weights.mean()))
        np.testing.assert_allclose(found["constant"], 1)
        np.testing.assert_array_equal(found["uniform"], 1)


def test_severity_columns_beside_ready_made_weights_give_the_strata_alone(tmp_path: Path) -> None:
    recipe = weighted(tmp_path / "x.jsonl", [1, 2, 3, 4, 5] * 8)
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ["critical" if n % 2 else "neutral" for n in range(len(rows))]
    lines = (json.dumps({**row, "severity": name}) for row, name in zip(rows, names, strict=True))
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    _, splits, severity = load_splits(recipe)
    kept = source_index(splits.train)
    weights, summary = weigh(recipe, severity, kept)
    np.testing.assert_array_equal(weights, np.array([1, 2, 3, 4, 5] * 8)[kept])
    assert summary.severities["critical"] == sum(names[at] == "critical" for at in kept)


def test_a_weight_is_never_one_in_silence(tmp_path: Path) -> None:
    fine, path = [1.0] * 40, tmp_path / "x.jsonl"
    wrong = []
    for bad, error, parts in (
        ("heavy", DataError, ("x.jsonl: Row 3", "weight")),
        ("", WeightError, ("x.jsonl: Row 3", "weight")),
        (None, WeightError, ("x.jsonl: Row 3", "weight")),
        ("nan", WeightError, ("x.jsonl: Row 3", "weight")),
        (-1, WeightError, ("x.jsonl: Row 3", "weight")),
        ("inf", WeightError, ("x.jsonl: Row 3", "weight")),
        ([1], (DataError, WeightError), ("x.jsonl: Row 3", "weight")),
    ):
        with pytest.raises(error) as refused:
            load_splits(weighted(path, [*fine[:2], bad, *fine[3:]]))
        text = str(refused.value)
        wrong += [] if all(part in text for part in parts) and "heavy" not in text else [text]
    assert wrong == []
    with pytest.raises(WeightError, match=r"3 rows .*row 2"):
        load_splits(weighted(path, [1, -1, -1, -1, *fine]))
    _, splits, severity = load_splits(recipe := weighted(path, [0] * 40))
    with pytest.raises(WeightError, match="zero"):
        weigh(recipe, severity, source_index(splits.train))
    weighted(path, fine, "importance")
    with pytest.raises(WeightError, match=r"severity\.weight_column"):
        load_splits(recipe)
    ready = {"source": "weight"}
    for section in ({"weight_column": "w"}, {**ready, "classifier": "x"}, {**ready, "weights": "strong"}):
        with pytest.raises(RecipeError, match=r"severity\."):
            recipe_from_values({"severity": section})
