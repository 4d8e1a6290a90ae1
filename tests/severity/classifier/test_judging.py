"""Figures agree with scikit-learn and with sums done by hand; intervals cover, and follow the groups."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from sevpeft.severity.classifier.judging import (
    FIGURES,
    bootstrap,
    judge,
    judge_positive,
    reliability_bins,
    resampled_weights,
    threshold_curve,
)

LABELS = np.array([0, 0, 1, 1, 2, 2, 0, 1, 2, 0])
PROBABILITIES = np.random.default_rng(0).dirichlet([1, 1, 1], 10)
GROUPS = np.arange(10)


def many(count: int, seed: int = 0, helpful: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.choice(3, count, p=[0.5, 0.35, 0.15])
    probabilities = random.dirichlet([1, 1, 1], count) + helpful * np.eye(3)[labels]
    # Rounded, so that there are ties.
    probabilities = np.round(probabilities / probabilities.sum(axis=1, keepdims=True), 2) + 1e-3
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


def test_figures_are_those_of_scikit_learn() -> None:
    probabilities, labels = many(400)
    predicted, critical = probabilities.argmax(axis=1), labels == 2
    figures = {n: e.value for n, e in judge(probabilities, labels, np.arange(400), resamples=10).figures.items()}
    expected = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "recall_critical": metrics.recall_score(critical, predicted == 2),
        "precision_critical": metrics.precision_score(critical, predicted == 2),
        "auc_critical": metrics.roc_auc_score(critical, probabilities[:, 2]),
        "brier": ((probabilities - np.eye(3)[labels]) ** 2).sum(axis=1).mean(),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-12), name


def test_figures_of_a_resample_are_those_of_rows_written_as_often_as_they_were_drawn() -> None:
    probabilities, labels = many(60)
    groups = np.repeat(np.arange(30), 2)
    drawn = bootstrap(probabilities, labels, groups, seed=3, resamples=5)
    weights = np.concatenate(list(resampled_weights(groups, seed=3, resamples=5)))
    for number, times in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(60), times)
        score = metrics.roc_auc_score(labels[rows] == 2, probabilities[rows, 2])
        assert drawn["auc_critical"][number] == pytest.approx(score, abs=1e-12)
        f1 = metrics.f1_score(labels[rows], probabilities[rows].argmax(1), average="macro")
        assert drawn["macro_f1"][number] == pytest.approx(f1, abs=1e-12)


def test_the_confusion_matrix_has_labels_in_rows() -> None:
    probabilities, labels = many(100)
    found = judge(probabilities, labels, np.arange(100), resamples=5).confusion
    assert found == metrics.confusion_matrix(labels, probabilities.argmax(axis=1)).tolist()


def test_ece_is_the_sum_done_by_hand() -> None:
    # Two values of p_critical, .2 and .6, five rows each: hits 2 of 5 and 2 of 5.
    p = np.array([0.2] * 5 + [0.6] * 5)
    labels = np.array([2, 2, 0, 0, 0, 2, 2, 1, 1, 1])
    probabilities = np.stack([(1 - p) / 2, (1 - p) / 2, p], axis=1)
    figures = judge(probabilities, labels, GROUPS, resamples=5).figures
    assert figures["ece_critical"].value == pytest.approx(0.5 * abs(0.2 - 0.4) + 0.5 * abs(0.6 - 0.4))


def test_one_probability_for_all_is_one_bin() -> None:
    labels = np.random.default_rng(0).choice(3, 300)
    shares = np.bincount(labels) / 300
    judgement = judge(np.tile(shares, (300, 1)), labels, np.arange(300), resamples=5)
    assert judgement.figures["ece_critical"].value == pytest.approx(0, abs=1e-12)
    assert len(judgement.reliability) == 1
    assert judgement.figures["auc_critical"].value == 0.5


def test_ece_of_a_perfect_classifier_is_what_is_said_of_chance() -> None:
    random = np.random.default_rng(5)
    errors, said = [], []
    for _ in range(12):
        probabilities = random.dirichlet([2, 2, 1], 300)
        labels = (random.random((300, 1)) > probabilities.cumsum(axis=1)).sum(axis=1).clip(max=2)
        judgement = judge(probabilities, labels, np.arange(300), resamples=2)
        errors.append(judgement.figures["ece_critical"].value)
        said.append(judgement.ece_critical_if_perfect)
    assert np.mean(errors) == pytest.approx(np.mean(said), rel=0.15)


def test_bins_hold_nearly_equal_numbers_of_rows() -> None:
    scores = np.random.default_rng(6).random(1_500)
    bins = reliability_bins(scores, scores > 0.5)
    assert len(bins) == 15 and {one.rows for one in bins} == {100}
    assert [one.said for one in bins] == sorted(one.said for one in bins)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    covered = 0
    for seed in range(120):
        labels = random.choice(3, 150)
        right = random.random(150) < 0.7
        said = np.where(right, labels, (labels + 1) % 3)
        estimate = judge(np.eye(3)[said], labels, np.arange(150), seed=seed, resamples=200, curve=False).figures
        covered += estimate["accuracy"].low <= 0.7 <= estimate["accuracy"].high
    assert 0.88 <= covered / 120 <= 0.99


def test_rows_of_one_group_are_one_draw() -> None:
    probabilities, labels = many(100)
    alone = judge(probabilities, labels, np.arange(100)).figures["accuracy"]
    # Every row ten times over is not ten times the evidence.
    ten = np.repeat(np.arange(100), 10)
    copied = judge(probabilities[ten], labels[ten], ten).figures["accuracy"]
    blind = judge(probabilities[ten], labels[ten], np.arange(1_000)).figures["accuracy"]
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert blind.high - blind.low < 0.5 * (alone.high - alone.low)


def test_the_same_seed_gives_the_same_judgement() -> None:
    probabilities, labels = many(80)
    one, same, other = (judge(probabilities, labels, np.arange(80), seed=seed) for seed in (1, 1, 2))
    assert one == same != other


def test_parts_of_the_resamples_do_not_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, labels = many(50)
    whole = bootstrap(probabilities, labels, np.arange(50), resamples=30)
    monkeypatch.setattr("sevpeft.severity.classifier.judging._AT_ONCE", 350)
    parts = bootstrap(probabilities, labels, np.arange(50), resamples=30)
    for name in FIGURES:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-12)


def test_a_figure_that_is_not_defined_is_no_number() -> None:
    labels = np.array([0, 1, 0, 1])
    figures = judge(np.full((4, 3), 1 / 3), labels, np.arange(4), resamples=20).figures
    assert np.isnan(figures["auc_critical"].value) and np.isnan(figures["recall_critical"].value)
    assert np.isfinite(figures["accuracy"].value)


def test_the_curve_gives_recall_and_precision_at_its_thresholds() -> None:
    probabilities, labels = many(300)
    scores, positive = probabilities[:, 2], labels == 2
    curve = threshold_curve(scores, positive, np.arange(300), resamples=50)
    assert len(curve) > 20
    assert curve[0].recall.value == 1 and curve[0].flagged == 1
    for point in curve:
        called = scores >= point.threshold
        assert point.recall.value == pytest.approx(metrics.recall_score(positive, called))
        assert point.precision.value == pytest.approx(metrics.precision_score(positive, called))
        assert point.recall.low <= point.recall.value <= point.recall.high


def test_a_yes_or_no_is_judged_by_rank() -> None:
    probabilities, labels = many(300)
    auc, curve = judge_positive(probabilities[:, 2], labels == 2, np.arange(300), resamples=100)
    assert auc.value == pytest.approx(metrics.roc_auc_score(labels == 2, probabilities[:, 2]))
    assert auc.low < auc.value < auc.high and curve
