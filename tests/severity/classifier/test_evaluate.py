"""Figures agree with scikit-learn and with sums done by hand; nothing of a test row reaches what predicts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics

from sevpeft.errors import DataError
from sevpeft.severity.classifier import evaluate
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration, fit_calibrated
from sevpeft.severity.classifier.evaluate import evaluate_fitted, evaluate_folds, fit_and_evaluate, score
from sevpeft.severity.classifier.examples import Examples, Fold, block_folds, grouped_folds
from sevpeft.severity.classifier.linear import fit_linear
from sevpeft.severity.settings import EvaluateSettings, FitSettings

from .conftest import build_examples
from .test_calibrate import Watching

LINEAR = FitSettings(kind="linear")


def many(count: int, seed: int = 0, helpful: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.choice(3, count, p=[0.5, 0.35, 0.15])
    probabilities = random.dirichlet([1, 1, 1], count) + helpful * np.eye(3)[labels]
    # Rounded, so that there are ties.
    probabilities = np.round(probabilities / probabilities.sum(axis=1, keepdims=True), 2) + 1e-3
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


def by_scikit_learn(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    predicted, critical = probabilities.argmax(axis=1), labels == 2
    return {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "recall_critical": metrics.recall_score(critical, predicted == 2),
        "precision_critical": metrics.precision_score(critical, predicted == 2),
        "auc_non_critical": metrics.roc_auc_score(labels == 0, probabilities[:, 0]),
        "auc_neutral": metrics.roc_auc_score(labels == 1, probabilities[:, 1]),
        "auc_critical": metrics.roc_auc_score(critical, probabilities[:, 2]),
        "brier": ((probabilities - np.eye(3)[labels]) ** 2).sum(axis=1).mean(),
        "log_loss": metrics.log_loss(labels, probabilities),
    }


def test_figures_are_those_of_scikit_learn() -> None:
    probabilities, labels = many(400)
    found = score(probabilities, labels, np.arange(400), resamples=0)
    for name, value in by_scikit_learn(probabilities, labels).items():
        assert found["figures"][name]["value"] == pytest.approx(value, abs=1e-12), name
    assert found["confusion"] == metrics.confusion_matrix(labels, probabilities.argmax(axis=1)).tolist()


def test_intervals_are_those_of_rows_written_as_often_as_they_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, labels = many(60)
    groups, weights = np.repeat(np.arange(30), 2), []
    figures = evaluate._figures

    def watched(*rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        compute = figures(*rows)

        def watch(weights_of_rows: np.ndarray) -> np.ndarray:
            weights.append(weights_of_rows)
            return compute(weights_of_rows)

        return watch

    monkeypatch.setattr(evaluate, "_figures", watched)
    found = score(probabilities, labels, groups, seed=3, resamples=20)["figures"]
    drawn = []
    for drawn_weights in weights[:20]:
        assert (drawn_weights[::2] == drawn_weights[1::2]).all() and drawn_weights.sum() == 60, "groups are drawn whole"
        rows = np.repeat(np.arange(60), drawn_weights)
        drawn.append(by_scikit_learn(probabilities[rows], labels[rows]))
    for name in drawn[0]:
        low, high = np.percentile([one[name] for one in drawn], [2.5, 97.5])
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((low, high), abs=1e-12), name


def test_ece_is_the_sum_done_by_hand() -> None:
    # Two values of p_critical, .2 and .6, five rows each: hits 2 of 5 and 2 of 5.
    p = np.array([0.2] * 5 + [0.6] * 5)
    labels = np.array([2, 2, 0, 0, 0, 2, 2, 1, 1, 1])
    found = score(np.stack([(1 - p) / 2, (1 - p) / 2, p], axis=1), labels, np.arange(10), resamples=0)
    assert found["figures"]["ece_critical"]["value"] == pytest.approx(0.5 * abs(0.2 - 0.4) + 0.5 * abs(0.6 - 0.4))


def test_one_probability_for_all_is_one_bin() -> None:
    labels = np.random.default_rng(0).choice(3, 300)
    found = score(np.tile(np.bincount(labels) / 300, (300, 1)), labels, np.arange(300), resamples=0)
    assert found["figures"]["ece_critical"]["value"] == pytest.approx(0, abs=1e-12)
    assert found["figures"]["auc_critical"]["value"] == 0.5


def test_ece_of_a_perfect_classifier_is_the_one_by_chance() -> None:
    random = np.random.default_rng(5)
    errors, by_chance = [], []
    for _ in range(12):
        probabilities = random.dirichlet([2, 2, 1], 300)
        labels = (random.random((300, 1)) > probabilities.cumsum(axis=1)).sum(axis=1).clip(max=2)
        found = score(probabilities, labels, np.arange(300), resamples=0)
        errors.append(found["figures"]["ece_critical"]["value"])
        by_chance.append(found["ece_critical_by_chance"])
    assert np.mean(errors) == pytest.approx(np.mean(by_chance), rel=0.15)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    covered = 0
    for seed in range(60):
        labels = random.choice(3, 150)
        right = random.random(150) < 0.7
        predicted = np.where(right, labels, (labels + 1) % 3)
        accuracy = score(np.eye(3)[predicted], labels, np.arange(150), seed=seed, resamples=60)["figures"]["accuracy"]
        covered += accuracy["low"] <= 0.7 <= accuracy["high"]
    assert 0.85 <= covered / 60 <= 0.99


def test_rows_of_one_group_are_one_draw() -> None:
    probabilities, labels = many(100)
    # Every row ten times over is not ten times the evidence.
    ten = np.repeat(np.arange(100), 10)
    alone, copied, blind = (
        score(probabilities[rows], labels[rows], groups, resamples=200)["figures"]["accuracy"]
        for rows, groups in ((np.arange(100), np.arange(100)), (ten, ten), (ten, np.arange(1_000)))
    )
    assert copied["high"] - copied["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.15)
    assert blind["high"] - blind["low"] < 0.5 * (alone["high"] - alone["low"])


def test_the_same_seed_gives_the_same_metrics_and_an_undefined_figure_is_no_number() -> None:
    probabilities, labels = many(80)
    one, same, other = (score(probabilities, labels, np.arange(80), seed=seed, resamples=20) for seed in (1, 1, 2))
    assert one == same != other
    figures = score(np.full((4, 3), 1 / 3), np.array([0, 1, 0, 1]), np.arange(4), resamples=20)["figures"]
    assert np.isnan(figures["auc_critical"]["value"]) and np.isnan(figures["recall_critical"]["value"])
    assert np.isfinite(figures["accuracy"]["value"])


def thirds(examples: Examples) -> Examples:
    """In three blocks of equal size, in the order of the rows."""
    names = np.array([f"block{number * 3 // len(examples)}" for number in range(len(examples))])
    return replace(examples, blocks=names)


def linear(train: Examples) -> Calibrated:
    return Calibrated([fit_linear(train)], Calibration())


def test_neither_fit_nor_calibration_sees_what_is_scored(examples: Examples, few_resamples: None) -> None:
    by_block = thirds(examples)
    for fold in (block_folds(by_block)[0], grouped_folds(by_block)[0]):
        watching = Watching()
        evaluate_folds(by_block, [fold], lambda train, fit=watching: fit_calibrated(train, fit, LINEAR))
        *calibrated_on, scored = watching.asked
        assert scored == by_block.take(fold.test).questions
        for seen in (*watching.fitted_on, *calibrated_on):
            assert not set(seen) & set(scored)


def test_text_that_tells_beats_every_baseline_and_shuffled_labels_teach_nothing(
    examples: Examples, few_resamples: None
) -> None:
    evaluation, _ = evaluate_folds(examples, grouped_folds(examples, 3), linear)
    assert set(evaluation["baselines"]) == {"majority", "row number"}
    assert evaluation["blocks"] == {} and evaluation["unscored"] is None
    for baseline in evaluation["baselines"].values():
        assert baseline["figures"]["accuracy"]["value"] < evaluation["calibrated"]["figures"]["accuracy"]["low"]
        assert baseline["figures"]["auc_critical"]["value"] < 0.6
    shuffled = replace(examples, labels=np.random.default_rng(0).permutation(examples.labels))
    chance, _ = evaluate_folds(shuffled, grouped_folds(shuffled, 3), linear)
    auc = chance["calibrated"]["figures"]["auc_critical"]
    assert auc["low"] < 0.5 < auc["high"]


def test_labels_that_follow_the_place_are_found_by_the_row_number_and_not_when_blocks_are_held_out(
    few_resamples: None,
) -> None:
    plain = build_examples(270, noise=1.0)
    examples = replace(plain, labels=np.arange(270) * 9 // 270 % 3, blocks=np.repeat(["a", "b", "c"], 90))
    random, _ = evaluate_folds(examples, grouped_folds(examples, 3), linear)
    held, _ = evaluate_folds(examples, block_folds(examples), linear)
    assert random["baselines"]["row number"]["figures"]["accuracy"]["value"] > 0.75
    assert held["baselines"]["row number"]["figures"]["accuracy"]["value"] < 0.5
    assert random["calibrated"]["figures"]["accuracy"]["value"] < 0.5
    assert set(held["blocks"]) == {"a", "b", "c"}


def test_blocks_that_lack_a_severity_are_neither_scored_nor_counted_by_the_majority(few_resamples: None) -> None:
    examples = build_examples(300)
    ward = np.arange(300) >= 150
    blocks = np.where(ward, "ward", np.where(np.arange(300) < 75, "one", "two"))
    by_block = replace(examples, labels=np.where(ward, 2, examples.labels), blocks=blocks)
    evaluation, _ = evaluate_folds(by_block, block_folds(by_block)[:1], linear)
    assert (
        evaluation["unscored"] == ["ward"]
        and set(evaluation["blocks"]) == {"one"}
        and evaluation["calibrated"]["rows"] == 75
    )
    shares = np.bincount(by_block.labels[75:150], minlength=3) / 75
    expected = score(np.tile(shares, (75, 1)), by_block.labels[:75], np.arange(75), resamples=0)
    assert evaluation["baselines"]["majority"]["figures"]["brier"]["value"] == pytest.approx(
        expected["figures"]["brier"]["value"]
    )
    with pytest.raises(DataError, match="block_column"):
        ward_only = Fold("ward", np.arange(150), np.arange(150, 300))
        evaluate_folds(by_block, [ward_only], linear)


def test_both_ways_of_evaluating_a_fit_hold_out_blocks_where_they_are_known(few_resamples: None) -> None:
    by_block = thirds(build_examples(120))
    _, held_out = fit_and_evaluate(by_block, FitSettings(kind="rules", seed=1))
    _, folds = fit_and_evaluate(by_block, EvaluateSettings(kind="rules", folds=3, seed=1))
    rows = {heading: evaluation["calibrated"]["rows"] for heading, evaluation in {**held_out, **folds}.items()}
    assert rows == {"Test rows": pytest.approx(24, abs=3), "Random folds": 120, "Blocks held out": 120}
    assert list(fit_and_evaluate(build_examples(120), FitSettings(kind="rules"))[1]) == ["Test rows"]


def test_a_fitted_classifier_is_evaluated_on_other_data_beside_baselines_of_those(
    examples: Examples, few_resamples: None
) -> None:
    fitted = linear(examples)
    other = build_examples(150, seed=9)
    evaluation = evaluate_fitted(fitted, other)
    assert set(evaluation["baselines"]) == {"majority", "row number"}
    assert evaluation["calibrated"]["figures"]["auc_critical"]["value"] > 0.8
    order = np.concatenate([fold.test for fold in grouped_folds(other)])
    rows = other.take(order)
    found = score(fitted.probabilities(rows.questions), rows.labels, rows.groups, resamples=20)
    assert evaluation["calibrated"] == found
