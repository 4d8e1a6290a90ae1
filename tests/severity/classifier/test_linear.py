"""The linear classifier reads the words, repeats itself, and is the same after a way through its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sevpeft.errors import DataError
from sevpeft.severity.classifier import linear
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.classifier.linear import ARRAYS, VOCABULARY, LinearClassifier, features, fit_linear, stem

from .conftest import build_examples


@pytest.fixture(scope="module")
def examples() -> Examples:
    return build_examples()


@pytest.fixture(scope="module")
def fitted(examples: Examples) -> LinearClassifier:
    return fit_linear(examples)


def test_it_learns_what_words_say(examples: Examples, fitted: LinearClassifier) -> None:
    found = fitted.probabilities(["عندي نزيف واغماء", "حبوب في البشره", "حراره وكحه منذ يومين"])
    assert found.argmax(axis=1).tolist() == [2, 0, 1]
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    assert (fitted.probabilities(examples.questions).argmax(axis=1) == examples.labels).mean() > 0.75
    one, other = fitted.probabilities(["عندى إغماء وحرارة", "عندي  اغماء, وحَراره!"])
    np.testing.assert_array_equal(one, other, err_msg="spelling that folds away changes nothing")


def test_each_question_is_judged_by_itself(examples: Examples, fitted: LinearClassifier) -> None:
    together = fitted.probabilities(examples.questions[:20])
    alone = np.concatenate([fitted.probabilities([question]) for question in examples.questions[:20]])
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    assert fitted.probabilities([]).shape == (0, 3)


def test_the_same_rows_give_the_same_classifier(examples: Examples, fitted: LinearClassifier) -> None:
    again = fit_linear(examples)
    np.testing.assert_array_equal(again.coef, fitted.coef)
    assert again.version == fitted.version != fit_linear(examples.take(np.arange(1, len(examples)))).version


def test_a_question_without_known_words_gets_what_is_known_without_reading(fitted: LinearClassifier) -> None:
    odds = np.exp(fitted.intercept)
    np.testing.assert_allclose(fitted.probabilities(["", "xyz", "🙂"]), np.tile(odds / odds.sum(), (3, 1)))


def test_saved_and_loaded_it_gives_the_same_probabilities_and_nothing_is_pickled(
    tmp_path: Path, examples: Examples, fitted: LinearClassifier
) -> None:
    fitted.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {ARRAYS, VOCABULARY}
    assert not any(b"sklearn" in file.read_bytes() or b"numpy" in file.read_bytes() for file in tmp_path.iterdir())
    loaded = LinearClassifier.load(tmp_path)
    found, expected = (one.probabilities(examples.questions) for one in (loaded, fitted))
    np.testing.assert_array_equal(found, expected)
    assert loaded.version == fitted.version


def test_what_one_question_alone_says_is_not_stored(tmp_path: Path, examples: Examples) -> None:
    name = "زنقوط"
    # Sent twice, it is still one question.
    questions = [f"{name} {examples.questions[0]}", f"{examples.questions[0]} {name}", *examples.questions[2:]]
    groups = np.maximum(examples.groups, 1)
    fit_linear(replace(examples, questions=questions, groups=groups)).save(tmp_path)
    stored = json.loads((tmp_path / VOCABULARY).read_text(encoding="utf-8"))
    assert len(stored) > 100
    assert [one for one in stored if name in one or name[:4] in one] == []


def test_questions_that_share_nothing_are_refused_without_being_quoted() -> None:
    with pytest.raises(DataError) as caught:
        fit_linear(Examples(["ابج", "دهو", "زحط"], np.arange(3), np.arange(3), np.arange(3)))
    assert "ابج" not in str(caught.value)


def test_an_intercept_for_each_block_keeps_the_place_out_of_the_words() -> None:
    # The second block calls everything one step worse and, by accident, always says "دمشق".
    plain, blocked = [], []
    for seed in range(2):
        examples = build_examples(300, seed=seed, noise=0.3)
        second = np.arange(300) >= 150
        labels = np.where(second, np.minimum(examples.labels + 1, 2), examples.labels)
        labels[150:165] = 0
        questions = [f"{q} دمشق" if there else q for q, there in zip(examples.questions, second, strict=True)]
        shifted = replace(examples, questions=questions, labels=labels)
        asked = ["عندي حبوب دمشق", "عندي حبوب"]
        plain.append(np.subtract(*fit_linear(shifted).probabilities(asked))[0])
        by_block = replace(shifted, blocks=np.where(second, "two", "one"))
        blocked.append(np.subtract(*fit_linear(by_block).probabilities(asked))[0])
    assert np.abs(blocked).mean() < 0.5 * np.abs(plain).mean()


def test_a_block_that_lacks_a_severity_does_not_set_the_shares() -> None:
    examples = build_examples(300)
    # A ward where every row is critical, beside a forum with all three.
    ward = np.arange(300) >= 150
    labels = np.where(ward, 2, examples.labels)
    forum = np.bincount(labels[~ward], minlength=3) / 150
    by_block = replace(examples, labels=labels, blocks=np.where(ward, "ward", "forum"))
    unknown = fit_linear(by_block).probabilities(["؟"])[0]
    naive = fit_linear(replace(examples, labels=labels)).probabilities(["؟"])[0]
    assert abs(unknown[2] - forum[2]) < 0.1 < abs(naive[2] - forum[2])


def test_a_block_that_lacks_a_severity_counts_less(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = build_examples(300, noise=0.0)
    ward = np.arange(300) >= 100
    # The ward calls every cosmetic question neutral, twice as often as the forum calls it what it is.
    labels = np.where(ward & (examples.labels == 0), 1, examples.labels)
    by_block = replace(examples, labels=labels, blocks=np.where(ward, "ward", "forum"))
    question = ["حبوب وشعر في البشره"]
    ours = fit_linear(by_block).probabilities(question)[0]
    monkeypatch.setattr(linear, "INCOMPLETE_WEIGHT", 1.0)
    theirs = fit_linear(by_block).probabilities(question)[0]
    assert ours.argmax() == 0 and ours[0] > theirs[0] + 0.02


def test_features_are_parts_of_words_and_stems() -> None:
    found = features("ألم في البطن")
    assert {" ا", "الم ", " الم", "=الم", "=في", "=بطن", "في ", " البط"} <= set(found)
    assert "م ف" not in found, "a part of a word does not go over its edge"
    assert "=البطن" not in found
    marked = features("a=b =نزيف =")
    assert [name for name in marked if "=" in name[1:]] == []
    assert len([name for name in marked if name.startswith("=")]) == 3


def test_forms_of_a_word_share_a_stem_and_short_words_are_not_cut() -> None:
    for one, other in (("والمعده", "معده"), ("نزيفها", "النزيف"), ("صداع", "بالصداع"), ("حبوب", "وحبوبي")):
        assert stem(one) == stem(other), one
    assert [word for word in ("دم", "قلب", "الم", "ورم", "بول", "ات", "") if stem(word) != word] == []
