"""The linear classifier reads the words, repeats itself, and is the same after a way through its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sevpeft.errors import DataError
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.classifier.linear import (
    ARRAYS,
    VOCABULARY,
    LinearClassifier,
    fit_linear,
    read_linear,
    write_linear,
)

from .conftest import build_examples


@pytest.fixture
def fitted(examples: Examples) -> LinearClassifier:
    return fit_linear(examples)


def test_it_learns_what_words_say(examples: Examples, fitted: LinearClassifier) -> None:
    found = fitted.probabilities(["عندي نزيف واغماء", "حبوب في البشره", "حراره وكحه منذ يومين"])
    assert found.argmax(axis=1).tolist() == [2, 0, 1]
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    assert (fitted.probabilities(examples.questions).argmax(axis=1) == examples.labels).mean() > 0.75


def test_spelling_that_folds_away_changes_nothing(fitted: LinearClassifier) -> None:
    one, other = fitted.probabilities(["عندى إغماء وحرارة", "عندي  اغماء, وحَراره!"])
    np.testing.assert_array_equal(one, other)


def test_each_question_is_judged_by_itself(examples: Examples, fitted: LinearClassifier) -> None:
    together = fitted.probabilities(examples.questions[:20])
    alone = np.concatenate([fitted.probabilities([question]) for question in examples.questions[:20]])
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_the_same_rows_give_the_same_classifier(examples: Examples, fitted: LinearClassifier) -> None:
    again = fit_linear(examples)
    np.testing.assert_array_equal(again.coef, fitted.coef)
    assert again.version == fitted.version
    other = fit_linear(examples.take(np.arange(1, len(examples))))
    assert other.version != fitted.version


def test_a_question_without_known_words_gets_what_is_known_without_reading(fitted: LinearClassifier) -> None:
    unknown = fitted.probabilities(["", "xyz", "🙂"])
    odds = np.exp(fitted.intercept)
    np.testing.assert_allclose(unknown, np.tile(odds / odds.sum(), (3, 1)))


def test_no_questions_give_no_rows(fitted: LinearClassifier) -> None:
    assert fitted.probabilities([]).shape == (0, 3)


def test_saved_and_loaded_it_gives_the_same_probabilities(
    tmp_path: Path, examples: Examples, fitted: LinearClassifier
) -> None:
    write_linear(fitted, tmp_path)
    loaded = read_linear(tmp_path)
    np.testing.assert_allclose(
        loaded.probabilities(examples.questions), fitted.probabilities(examples.questions), rtol=0, atol=1e-12
    )
    assert loaded.version == fitted.version


def test_nothing_is_pickled(tmp_path: Path, fitted: LinearClassifier) -> None:
    files = write_linear(fitted, tmp_path)
    assert {file.name for file in files} == {ARRAYS, VOCABULARY} == {file.name for file in tmp_path.iterdir()}
    assert not any(b"sklearn" in file.read_bytes() or b"numpy" in file.read_bytes() for file in files)


def _shorter(folder: Path) -> None:
    content = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
    content["vocabulary"].pop()
    (folder / VOCABULARY).write_text(json.dumps(content), encoding="utf-8")


def _not_finite(folder: Path) -> None:
    arrays = load_file(folder / ARRAYS)
    arrays["coef"][0, 0] = np.nan
    save_file(arrays, folder / ARRAYS)


def _without_weight(folder: Path) -> None:
    arrays = load_file(folder / ARRAYS)
    arrays["idf"][:] = 0
    save_file(arrays, folder / ARRAYS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / ARRAYS).write_bytes((folder / ARRAYS).read_bytes()[:100]),
        lambda folder: (folder / ARRAYS).unlink(),
        lambda folder: (folder / VOCABULARY).write_text("{", encoding="utf-8"),
        lambda folder: (folder / VOCABULARY).unlink(),
        _shorter,
        _not_finite,
        _without_weight,
    ],
)
def test_damage_is_refused(tmp_path: Path, fitted: LinearClassifier, damage: Callable[[Path], None]) -> None:
    write_linear(fitted, tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match="damaged or incomplete"):
        read_linear(tmp_path)


def test_another_way_of_counting_is_refused(
    tmp_path: Path, fitted: LinearClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_linear(fitted, tmp_path)
    monkeypatch.setattr("sevpeft.severity.classifier.linear.FEATURES", 99)
    with pytest.raises(DataError, match="version"):
        read_linear(tmp_path)


def test_questions_that_share_nothing_are_refused_without_being_quoted() -> None:
    with pytest.raises(DataError, match="bring more rows") as caught:
        fit_linear(Examples(["ابج", "دهو", "زحط"], np.arange(3), np.arange(3), np.arange(3)))
    assert "ابج" not in str(caught.value)


def test_the_largest_number_of_features_is_kept(examples: Examples) -> None:
    assert len(fit_linear(examples, max_features=50).vocabulary) == 50


def test_an_intercept_for_each_block_keeps_the_place_out_of_the_words() -> None:
    # The second block calls everything one step worse and, by accident, always says "دمشق".
    plain, blocked = [], []
    for seed in range(3):
        examples = build_examples(300, seed=seed, noise=0.3)
        second = np.arange(300) >= 150
        labels = np.where(second, np.minimum(examples.labels + 1, 2), examples.labels)
        labels[150:165] = 0
        questions = [f"{q} دمشق" if there else q for q, there in zip(examples.questions, second, strict=True)]
        names = np.where(second, "two", "one")
        told = replace(examples, questions=questions, labels=labels)
        say = ["عندي حبوب دمشق", "عندي حبوب"]
        plain.append(np.subtract(*fit_linear(told).probabilities(say))[0])
        blocked.append(np.subtract(*fit_linear(replace(told, blocks=names)).probabilities(say))[0])
    assert np.abs(blocked).mean() < 0.5 * np.abs(plain).mean()


def test_a_block_that_lacks_a_severity_does_not_set_the_shares() -> None:
    examples = build_examples(300)
    # A ward where every row is critical, beside a forum with all three.
    ward = np.arange(300) >= 150
    labels = np.where(ward, 2, examples.labels)
    names = np.where(ward, "ward", "forum")
    forum = np.bincount(labels[~ward], minlength=3) / 150
    unknown = fit_linear(replace(examples, labels=labels, blocks=names)).probabilities(["؟"])[0]
    naive = fit_linear(replace(examples, labels=labels)).probabilities(["؟"])[0]
    assert abs(unknown[2] - forum[2]) < 0.1 < abs(naive[2] - forum[2])


def test_a_block_that_lacks_a_severity_counts_less(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = build_examples(300, noise=0.0)
    ward = np.arange(300) >= 100
    # The ward calls every cosmetic question neutral, twice as often as the forum calls it what it is.
    labels = np.where(ward & (examples.labels == 0), 1, examples.labels)
    told = replace(examples, labels=labels, blocks=np.where(ward, "ward", "forum"))
    question = ["حبوب وشعر في البشره"]
    ours = fit_linear(told).probabilities(question)[0]
    monkeypatch.setattr("sevpeft.severity.classifier.linear.INCOMPLETE_WEIGHT", 1.0)
    theirs = fit_linear(told).probabilities(question)[0]
    assert ours.argmax() == 0 and ours[0] > theirs[0] + 0.02
