"""No judged row, no duplicate of it, and nothing of its block reaches the fit or the calibration that judge it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sevpeft.errors import DataError
from sevpeft.severity.classifier.calibration import fit_temperature
from sevpeft.severity.classifier.crossvalidation import (
    Evaluation,
    block_folds,
    evaluate_elsewhere,
    evaluated,
    fit_calibrated,
    grouped_folds,
    hold_out,
    out_of_fold,
)
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.classifier.judging import judge
from sevpeft.severity.classifier.linear import fit_linear
from sevpeft.severity.probabilities import SeverityClassifier

from .conftest import build_examples

Deal = Callable[[Examples, int], Examples]


def linear(examples: Examples, seed: int) -> SeverityClassifier:
    return fit_linear(examples)


class Watching:
    """Fits a classifier that says the shares of its training rows, and remembers which rows it and others saw."""

    kind, version = "linear", "watching"

    def __init__(self) -> None:
        self.fitted_on: list[list[str]] = []
        self.asked: list[list[str]] = []

    def __call__(self, examples: Examples, seed: int) -> SeverityClassifier:
        self.fitted_on.append(examples.questions)
        return self

    def probabilities(self, questions: list[str]) -> np.ndarray:
        self.asked.append(list(questions))
        return np.tile([0.4, 0.35, 0.25], (len(questions), 1))


def test_grouped_folds_judge_every_row_once_and_part_no_group() -> None:
    examples = build_examples(200)
    grouped = Examples(examples.questions, examples.labels, np.arange(200) // 2, examples.rows)
    folds = grouped_folds(grouped, folds=4)
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(200))
    for fold in folds:
        assert not set(grouped.groups[fold.train]) & set(grouped.groups[fold.test])
        assert len(fold.train) + len(fold.test) == 200


def test_folds_hold_the_severities_in_proportion(examples: Examples) -> None:
    whole = np.bincount(examples.labels) / len(examples)
    for fold in grouped_folds(examples):
        np.testing.assert_allclose(np.bincount(examples.labels[fold.test]) / len(fold.test), whole, atol=0.03)


def test_folds_follow_the_seed(examples: Examples) -> None:
    one, same, other = (grouped_folds(examples, seed=seed)[0].test.tolist() for seed in (1, 1, 2))
    assert one == same != other


def test_a_held_out_block_is_not_trained_on_nor_are_its_duplicates_elsewhere(examples: Examples, blocks: Deal) -> None:
    dealt = blocks(examples, 3)
    groups = dealt.groups.copy()
    groups[100], groups[200] = groups[3], groups[4]
    dealt = Examples(dealt.questions, dealt.labels, groups, dealt.rows, dealt.blocks)
    assert dealt.blocks is not None
    folds = block_folds(dealt)
    assert [fold.name for fold in folds] == ["block0", "block1", "block2"]
    for fold in folds:
        assert set(dealt.blocks[fold.test]) == {fold.name} and fold.name not in set(dealt.blocks[fold.train])
        assert not set(groups[fold.train]) & set(groups[fold.test])
    assert [fold.dropped for fold in folds] == [2, 1, 1]


@pytest.mark.parametrize("share", [None, 0.2])
def test_neither_fit_nor_calibration_sees_what_is_judged(examples: Examples, blocks: Deal, share: float | None) -> None:
    dealt = blocks(examples, 3)
    for folds in (block_folds(dealt), grouped_folds(dealt)):
        for fold in folds:
            watching = Watching()
            out_of_fold(dealt, [fold], watching, shuffled=False, calibration_share=share)
            *calibrated_on, judged = watching.asked
            assert judged == dealt.take(fold.test).questions
            for seen in (*watching.fitted_on, *calibrated_on):
                assert not set(seen) & set(judged)


def paired(count: int = 200) -> Examples:
    """Every question stands there twice."""
    examples = build_examples(count)
    pairs = np.arange(count) // 2
    return Examples([f"سؤال {i}" for i in pairs], examples.labels, pairs, examples.rows)


def test_by_default_every_row_calibrates_by_a_fit_that_did_not_see_its_question() -> None:
    grouped, watching = paired(), Watching()
    fit_calibrated(grouped, watching)
    assert len(watching.fitted_on) == len(watching.asked) + 1 == 6
    for fitted_on, asked in zip(watching.fitted_on, watching.asked, strict=False):
        assert not set(fitted_on) & set(asked)
    assert sorted(question for asked in watching.asked for question in asked) == sorted(grouped.questions)
    assert watching.fitted_on[-1] == grouped.questions, "the classifier itself is fitted on every row"


def test_the_calibration_is_that_of_the_rows_out_of_fold(examples: Examples) -> None:
    unseen = np.empty((len(examples), 3))
    for fold in grouped_folds(examples, seed=4):
        unseen[fold.test] = fit_linear(examples.take(fold.train)).probabilities(examples.take(fold.test).questions)
    found = fit_calibrated(examples, linear, seed=4)
    assert found.calibration == fit_temperature(unseen, examples.labels)
    assert found.classifier.version == fit_linear(examples).version


def test_a_share_of_its_own_calibrates_and_does_not_train() -> None:
    grouped, watching = paired(), Watching()
    fit_calibrated(grouped, watching, share=0.2)
    (fitted_on,), (asked,) = watching.fitted_on, watching.asked
    assert not set(fitted_on) & set(asked)
    assert len(fitted_on) + len(asked) == 200 and len(asked) == pytest.approx(40, abs=6)


def test_rows_of_blocks_that_lack_a_severity_do_not_calibrate() -> None:
    examples = build_examples(300)
    ward = np.arange(300) >= 150
    plain = replace(examples, labels=np.where(ward, 2, examples.labels))
    dealt = replace(plain, blocks=np.where(ward, "ward", "forum"))
    for share in (None, 0.2):
        shares = [
            fit_calibrated(rows, Watching(), calibration="bias_corrected", share=share) for rows in (dealt, plain)
        ]
        forum, both = (c.probabilities(["؟"])[0, 2] for c in shares)
        assert forum == pytest.approx((examples.labels[:150] == 2).mean(), abs=0.06) and both > 0.5


def test_only_the_blocks_that_are_named_are_judged_and_trained_on(examples: Examples, blocks: Deal) -> None:
    dealt = blocks(examples, 4)
    assert dealt.blocks is not None
    folds = block_folds(dealt, ["block1"], ["block1", "block3"])
    assert len(folds) == 1 and set(dealt.blocks[folds[0].train]) == {"block3"}


def test_a_block_may_be_named_by_an_unmistakable_beginning(examples: Examples, blocks: Deal) -> None:
    names = np.array(["D_all", "F_all", "Dx"])[np.arange(len(examples)) % 3]
    dealt = Examples(examples.questions, examples.labels, examples.groups, examples.rows, names)
    assert [fold.name for fold in block_folds(dealt, ["F"])] == ["F_all"]
    for wanted in ("D", "Q"):
        with pytest.raises(DataError, match="use D_all, Dx, F_all"):
            block_folds(dealt, [wanted])


def test_a_block_that_lacks_a_severity_cannot_be_judged(examples: Examples) -> None:
    names = np.where(examples.labels == 2, "ward", "forum")
    dealt = Examples(examples.questions, examples.labels, examples.groups, examples.rows, names)
    with pytest.raises(DataError, match="Block forum has no critical row"):
        block_folds(dealt, ["forum"])


def test_what_is_left_to_train_on_must_have_every_severity(examples: Examples) -> None:
    names = np.where((np.arange(len(examples)) < 60) | (examples.labels == 2), "one", "two")
    dealt = Examples(examples.questions, examples.labels, examples.groups, examples.rows, names)
    with pytest.raises(DataError, match="Without block one, the training data has no critical row"):
        block_folds(dealt, ["one"])
    whole = Examples(examples.questions, examples.labels, examples.groups, examples.rows, np.full(len(examples), "one"))
    with pytest.raises(DataError, match="nothing to train on"):
        block_folds(whole)


def test_fewer_questions_of_a_severity_than_folds_are_refused(examples: Examples) -> None:
    few = np.concatenate([np.flatnonzero(examples.labels != 2), np.flatnonzero(examples.labels == 2)[:3]])
    with pytest.raises(DataError, match="critical stands on 3 distinct questions, fewer than the 5"):
        grouped_folds(examples.take(few))
    # One question, however often it stands there, is one.
    labels, groups = examples.labels, np.where(examples.labels == 2, 10_000, examples.groups)
    with pytest.raises(DataError, match="critical stands on 1 distinct question, "):
        grouped_folds(Examples(examples.questions, labels, groups, examples.rows))


def test_one_severity_alone_is_refused(examples: Examples) -> None:
    with pytest.raises(DataError, match="no neutral and no critical row"):
        grouped_folds(examples.take(np.flatnonzero(examples.labels == 0)))


def test_text_that_tells_beats_every_baseline(examples: Examples) -> None:
    result = out_of_fold(examples, grouped_folds(examples), linear)
    evaluation = evaluated(result, "folds")
    assert set(evaluation.baselines) == {"majority", "row number", "shuffled"}
    for judgement in evaluation.baselines.values():
        assert judgement.figures["accuracy"].high < evaluation.calibrated.figures["accuracy"].low
        assert judgement.figures["auc_critical"].low < 0.6


def test_labels_that_follow_the_place_are_found_by_the_row_number_and_not_when_blocks_are_held_out() -> None:
    plain = build_examples(270, noise=1.0)
    labels = np.arange(270) * 9 // 270 % 3
    examples = Examples(plain.questions, labels, plain.groups, plain.rows, np.repeat(["a", "b", "c"], 90))
    random = evaluated(out_of_fold(examples, grouped_folds(examples), linear, calibration_share=0.2), "folds")
    held = evaluated(out_of_fold(examples, block_folds(examples), linear, calibration_share=0.2), "blocks")
    assert random.baselines["row number"].figures["accuracy"].value > 0.85
    assert held.baselines["row number"].figures["accuracy"].value < 0.5
    assert random.calibrated.figures["accuracy"].value < 0.5
    assert set(held.blocks) == {"a", "b", "c"}


def test_the_same_seed_gives_the_same_probabilities(examples: Examples) -> None:
    folds = grouped_folds(examples, seed=3)
    one, same = (out_of_fold(examples, folds, linear, seed=3, calibration_share=0.2) for _ in range(2))
    np.testing.assert_array_equal(one.calibrated, same.calibrated)
    np.testing.assert_array_equal(one.baselines["shuffled"], same.baselines["shuffled"])


def test_only_the_rows_that_are_asked_for_are_judged(examples: Examples) -> None:
    wanted = np.arange(len(examples)) % 2 == 0
    result = out_of_fold(examples, grouped_folds(examples), linear, judged=wanted, shuffled=False)
    assert set(result.examples.rows) == set(examples.rows[wanted])


def test_a_finished_classifier_is_judged_elsewhere_beside_baselines_of_the_other_data(examples: Examples) -> None:
    fitted = fit_calibrated(examples, linear)
    other = build_examples(150, seed=9)
    evaluation = evaluate_elsewhere(fitted, other)
    assert set(evaluation.baselines) == {"majority", "row number"}
    assert evaluation.calibrated.figures["auc_critical"].value > 0.8
    expected = judge(fitted.probabilities(other.questions), other.labels, other.groups)
    assert evaluation.calibrated == expected


def test_the_majority_is_that_of_blocks_with_every_severity() -> None:
    examples = build_examples(300)
    ward = np.arange(300) >= 150
    dealt = replace(
        examples,
        labels=np.where(ward, 2, examples.labels),
        blocks=np.where(ward, "ward", np.where(np.arange(300) < 75, "one", "two")),
    )
    result = out_of_fold(dealt, block_folds(dealt, ["one"]), linear, shuffled=False)
    shares = np.bincount(dealt.labels[75:150], minlength=3) / 75
    np.testing.assert_allclose(result.baselines["majority"][0], shares)


def test_there_is_no_evaluation_without_a_baseline(examples: Examples) -> None:
    judgement = judge(np.full((len(examples), 3), 1 / 3), examples.labels, examples.groups, resamples=2)
    with pytest.raises(ValueError, match="without a baseline"):
        Evaluation("nothing", judgement, judgement, {})


def test_about_the_share_that_is_asked_for_is_held_out(examples: Examples) -> None:
    for share in (0.5, 0.2, 0.1):
        fold = hold_out(examples, share)
        assert len(fold.test) / len(examples) == pytest.approx(share, abs=0.05)
