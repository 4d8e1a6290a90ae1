"""Two views of a question, each with its say: parts of its words, and stems without the greetings."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from sevpeft.severity.classifier.ngrams import GREETINGS, even, features, stem, views_of


def test_features_are_parts_of_words_stems_and_pairs() -> None:
    found = features("ألم في البطن")
    assert {" ا", "الم ", " الم", "=الم", "=في", "=بطن", "=الم في", "=في بطن", "في ", " البط"} <= set(found)
    assert "م ف" not in found, "a part of a word does not go over its edge"
    assert "=البطن" not in found


@pytest.mark.parametrize(
    ("one", "other"), [("والمعده", "معده"), ("نزيفها", "النزيف"), ("صداع", "بالصداع"), ("حبوب", "وحبوبي")]
)
def test_forms_of_a_word_share_a_stem(one: str, other: str) -> None:
    assert stem(one) == stem(other)


@pytest.mark.parametrize("word", ["دم", "قلب", "الم", "ورم", "بول", "ات", ""])
def test_short_words_are_not_cut(word: str) -> None:
    assert stem(word) == word


def test_greetings_are_no_words_but_keep_their_parts() -> None:
    found = features("السلام عليكم يا دكتور نزيف")
    assert [name for name in found if name.startswith("=")] == ["=نزيف"]
    assert " عل" in found
    assert "نزيف" not in GREETINGS and "" not in GREETINGS


def test_no_part_of_a_word_is_taken_for_a_word() -> None:
    found = features("a=b =نزيف =")
    assert [name for name in found if "=" in name[1:]] == []
    assert views_of(found).sum() == len([name for name in found if name.startswith("=")]) == 5


def test_each_view_of_a_row_has_the_same_length() -> None:
    rows = csr_matrix(np.array([[3.0, 4.0, 5.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    found = even(rows, np.array([0, 0, 1, 1])).toarray()
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[0.6 * half, 0.8 * half, half, 0], [half, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(rows.toarray()[0], [3, 4, 5, 0], err_msg="the rows given are left as they were")
