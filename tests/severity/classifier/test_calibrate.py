"""Calibration finds what was planted, by rows that no fit behind it has seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sevpeft.errors import DataError
from sevpeft.severity.classifier import calibrate
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration, fit_calibrated, fit_calibration, fit_of
from sevpeft.severity.classifier.evaluate import score
from sevpeft.severity.classifier.examples import Examples, grouped_folds
from sevpeft.severity.classifier.linear import fit_linear
from sevpeft.severity.lexicon import COLUMNS
from sevpeft.severity.settings import FitSettings

from .conftest import build_examples

LINEAR = FitSettings(kind="linear")


def drawn(count: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are too sharp by `temperature` for the labels, which were drawn from the right ones."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=(count, 3)) * 1.5
    right = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    labels = (random.random((count, 1)) > right.cumsum(axis=1)).sum(axis=1).clip(max=2)
    sharp = np.exp(scores * temperature)
    return sharp / sharp.sum(axis=1, keepdims=True), labels


def ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return score(probabilities, labels, np.arange(len(labels)), resamples=0)["figures"]["ece_critical"]["value"]


def test_a_planted_temperature_is_found() -> None:
    for planted in (0.5, 1.0, 2.0, 4.0):
        probabilities, labels = drawn(20_000, planted)
        assert 1 / fit_calibration([probabilities], labels).weights[0] == pytest.approx(planted, rel=0.04)


def test_calibration_lowers_the_calibration_error_of_other_rows() -> None:
    probabilities, labels = drawn(4_000, 3.0)
    fitted = fit_calibration([probabilities[:2_000]], labels[:2_000])
    rest, held = probabilities[2_000:], labels[2_000:]
    assert ece(fitted.apply(rest), held) < 0.04 < 0.1 < ece(rest, held)


def test_temperature_never_changes_which_severity_is_the_likeliest() -> None:
    probabilities = np.random.default_rng(1).dirichlet([0.5, 0.5, 0.5], 5_000)
    for weight in (0.05, 0.4, 1.0, 20.0):
        scaled = Calibration((weight,)).apply(probabilities)
        np.testing.assert_array_equal(scaled.argmax(axis=1), probabilities.argmax(axis=1))
        np.testing.assert_allclose(scaled.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(Calibration().apply(probabilities), probabilities, atol=1e-8)


def test_a_probability_of_zero_does_not_break_the_fit() -> None:
    probabilities = np.array([[1.0, 0, 0], [0, 1, 0], [0.2, 0.3, 0.5], [0.5, 0.4, 0.1]])
    fitted = fit_calibration([probabilities], np.array([1, 1, 2, 0]))
    assert np.isfinite([*fitted.weights, *fitted.bias]).all()


def test_a_bias_repairs_shares_that_no_temperature_can() -> None:
    probabilities, labels = drawn(20_000, 1.0)
    off = probabilities * [1.0, 2.0, 4.0]
    off /= off.sum(axis=1, keepdims=True)
    fitted = fit_calibration([off], labels)
    assert fitted.weights[0] == pytest.approx(1, rel=0.05)
    np.testing.assert_allclose(fitted.bias, [0, -np.log(2), -np.log(4)], atol=0.08)
    assert ece(fitted.apply(off), labels) < 0.02 < 0.1 < ece(off, labels)
    with pytest.raises(DataError, match="no critical row"):
        fit_calibration([np.full((4, 3), 1 / 3)], np.array([0, 1, 0, 1]))


def test_weights_of_a_pool_that_were_planted_are_found() -> None:
    random = np.random.default_rng(0)
    sources = [random.dirichlet([1, 1, 1], 20_000) for _ in range(3)]
    planted = Calibration((0.8, 0.0, 1.5), (0.0, 0.5, -0.7))
    right = planted.apply(*sources)
    labels = (random.random((20_000, 1)) > right.cumsum(axis=1)).sum(axis=1).clip(max=2)
    found = fit_calibration(sources, labels)
    np.testing.assert_allclose(found.weights, planted.weights, atol=0.05)
    np.testing.assert_allclose(found.bias, planted.bias, atol=0.06)


class Watching:
    """Fits a classifier that gives the same probabilities to all, and remembers the rows of its fits and questions."""

    kind, version = "linear", "watching"

    def __init__(self) -> None:
        self.fitted_on: list[list[str]] = []
        self.asked: list[list[str]] = []

    def __call__(self, examples: Examples) -> list[Watching]:
        self.fitted_on.append(examples.questions)
        return [self]

    def probabilities(self, questions: list[str]) -> np.ndarray:
        self.asked.append(list(questions))
        return np.tile([0.4, 0.35, 0.25], (len(questions), 1))


def paired(count: int = 200) -> Examples:
    """Every question stands there twice."""
    examples = build_examples(count)
    pairs = np.arange(count) // 2
    return replace(examples, questions=[f"سؤال {i}" for i in pairs], groups=pairs)


def test_every_row_calibrates_by_a_fit_that_did_not_see_its_question() -> None:
    grouped, watching = paired(), Watching()
    fit_calibrated(grouped, watching, LINEAR)
    assert len(watching.fitted_on) == len(watching.asked) + 1 == 6
    for fitted_on, asked in zip(watching.fitted_on, watching.asked, strict=False):
        assert not set(fitted_on) & set(asked)
    assert sorted(question for asked in watching.asked for question in asked) == sorted(grouped.questions)
    assert watching.fitted_on[-1] == grouped.questions, "the classifier itself is fitted on every row"


def test_a_transformer_is_trained_once_and_calibrated_on_questions_of_their_own() -> None:
    grouped, watching = paired(), Watching()
    fit_calibrated(grouped, watching, FitSettings(kind="transformer"))
    (fitted_on,), (asked,) = watching.fitted_on, watching.asked
    assert not set(fitted_on) & set(asked)
    assert len(fitted_on) + len(asked) == 200 and len(asked) == pytest.approx(40, abs=6)


def test_the_calibration_is_that_of_the_rows_out_of_fold() -> None:
    examples = build_examples(120)
    unseen = np.empty((len(examples), 3))
    for fold in grouped_folds(examples, seed=4):
        unseen[fold.test] = fit_linear(examples.take(fold.train)).probabilities(examples.take(fold.test).questions)
    found = fit_calibrated(examples, lambda rows: [fit_linear(rows)], FitSettings(seed=4))
    expected = fit_calibration([unseen], examples.labels).apply(unseen)
    np.testing.assert_allclose(found.calibration.apply(unseen), expected, atol=1e-3)
    assert found.sources[0].version == fit_linear(examples).version


def test_rows_of_blocks_that_lack_a_severity_do_not_calibrate() -> None:
    examples = build_examples(300)
    ward = np.arange(300) >= 150
    plain = replace(examples, labels=np.where(ward, 2, examples.labels))
    by_block = replace(plain, blocks=np.where(ward, "ward", "forum"))
    for kind in ("linear", "transformer"):
        settings = FitSettings(kind=kind)
        forum, both = (
            fit_calibrated(rows, Watching(), settings).probabilities(["؟"])[0, 2] for rows in (by_block, plain)
        )
        assert forum == pytest.approx((examples.labels[:150] == 2).mean(), abs=0.06) and both > 0.5, kind


def test_rules_that_know_get_weight_and_rules_that_do_not_get_none(lexicon: Path, tmp_path: Path) -> None:
    unrelated = tmp_path / "unrelated.tsv"
    unrelated.write_text("\t".join(COLUMNS) + "\nدكتور\tcritical\tsign\t\tH\t\n", encoding="utf-8")
    few, rest = build_examples(60), build_examples(300, seed=5)
    found = {}
    for path in (lexicon, unrelated):
        settings = FitSettings(kind="rules+linear", lexicon=str(path))
        found[path] = fit_calibrated(build_examples(120), fit_of(settings), settings).calibration.weights
    assert found[lexicon][0] > 0.3
    assert found[unrelated][0] < 0.2 and found[unrelated][1] > 0.5
    settings = FitSettings(kind="rules+linear", lexicon=str(lexicon))
    both = fit_calibrated(few, fit_of(settings), settings)
    alone = fit_calibrated(few, fit_of(LINEAR), LINEAR)
    right = [one.probabilities(rest.questions)[np.arange(300), rest.labels] for one in (both, alone)]
    assert np.log(right[0]).mean() > np.log(right[1]).mean() + 0.05, "knowing rules help where rows are few"
    probabilities, reasons = both.explained(["عندي نزيف"])
    assert both.kind == "rules+linear" and reasons == ["critical: نزيف"]
    np.testing.assert_array_equal(probabilities, both.probabilities(["عندي نزيف"]))


def test_the_linear_part_is_weighed_by_rows_it_did_not_see(lexicon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(examples: Examples) -> object:
        sizes.append(len(examples))
        return fit_linear(examples)

    monkeypatch.setattr(calibrate, "fit_linear", watched)
    settings = FitSettings(kind="rules+linear", lexicon=str(lexicon))
    fit_calibrated(build_examples(100), fit_of(settings), settings)
    assert sizes == [80, 80, 80, 80, 80, 100]


def test_the_version_changes_with_the_calibration_and_only_with_it() -> None:
    one, same, other = (Calibrated([Watching()], Calibration((weight,))) for weight in (1.5, 1.5, 1.6))
    assert one.version == same.version != other.version
    np.testing.assert_allclose(one.probabilities(["?"]), Calibration((1.5,)).apply(np.array([[0.4, 0.35, 0.25]])))
