"""Near-duplicate questions are grouped, other questions are not, in any order of the rows."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from sevpeft.data.prepare.duplicates import (
    Groups,
    _pairs,
    bands_for,
    conflicting_groups,
    duplicate_groups,
    shingles,
)
from sevpeft.data.read import load_consultations
from sevpeft.data.text import fold_for_matching

QUESTION = "عندي صداع شديد من امبارح في الجانب الأيمن ومش قادر انام والمسكن مش بيعمل حاجة اعمل ايه"
OTHER = "ابني عمره سنتين وحرارته مرتفعة منذ يومين ولا يأكل فهل أعطيه مضادا حيويا أم أنتظر"


def grouped(*questions: str, threshold: float = 0.7, seed: int = 0) -> Groups:
    return duplicate_groups(questions, threshold=threshold, seed=seed)


def count(groups: Groups) -> int:
    return int(groups.numbers.max()) + 1


@pytest.fixture(scope="module")
def sample() -> list[str]:
    return load_consultations("builtin:consultations").rows["question"][:]


def test_the_same_question_in_other_words_is_one_group() -> None:
    again = [
        "عندي صُداع شديد من إمبارح، في الجانب الأيمن ومش قادر أنام!! والمسكن مش بيعمل حاجة، اعمل ايه؟",
        QUESTION.replace("شديد", "فظيع"),
        "السلام عليكم دكتور " + QUESTION,
        QUESTION.replace("صداع", "صدع").replace("المسكن", "المسكنن"),
        QUESTION.replace(" في ", " ").replace(" من ", " "),
        QUESTION + " وشكرا لكم",
    ]
    assert [text for text in again if grouped(QUESTION, OTHER, text).numbers.tolist() != [0, 1, 0]] == []


def test_no_two_of_the_sample_are_taken_for_one(sample: list[str]) -> None:
    assert count(grouped(*sample)) == len(sample) == len(set(sample))


def planted(questions: list[str], seed: int) -> tuple[list[str], int]:
    """The questions, and after them as many with one word replaced by one from another question."""
    draw = random.Random(seed)
    long = [question.split() for question in questions if len(question.split()) >= 12]
    for words in long:
        words[draw.randrange(len(words))] = draw.choice(draw.choice(long))
    return questions + [" ".join(words) for words in long], len(long)


def test_nearly_all_questions_with_a_word_replaced_are_found(sample: list[str]) -> None:
    together, changed = planted(sample, seed=1)
    found = grouped(*together)
    assert len(together) - count(found) >= 0.9 * changed and np.bincount(found.numbers).max() == 2


def test_groups_are_those_of_comparing_every_pair(sample: list[str]) -> None:
    together = planted(sample[:40], seed=2)[0] + planted(sample[:40], seed=3)[0][40:]
    cut = [{folded[at : at + 4] for at in range(len(folded) - 3)} for folded in map(fold_for_matching, together)]
    pairs = [(i, j, len(cut[i] & cut[j]) / len(cut[i] | cut[j])) for i, j in combinations(range(len(cut)), 2)]
    for threshold in (0.5, 0.8):
        edges = np.array([(i, j) for i, j, similarity in pairs if similarity >= threshold])
        graph = sparse.coo_array((np.ones(len(edges)), edges.T), shape=(len(cut), len(cut)))
        expected = connected_components(graph, directed=False)[1]
        found = grouped(*together, threshold=threshold).numbers
        # The hash may miss a pair that lies at the threshold; it may not join any that is below.
        assert all(len(set(expected[found == group])) == 1 for group in set(found.tolist()))
        assert found.max() + 1 <= len(set(expected)) * 1.02


def test_a_pair_that_only_the_hash_likes_is_not_joined() -> None:
    near = QUESTION.replace("شديد", "فظيع")
    one, other = (set(shingles(fold_for_matching(text)).tolist()) for text in (QUESTION, near))
    similarity = len(one & other) / len(one | other)
    assert count(grouped(QUESTION, near, threshold=similarity - 0.01)) == 1
    assert count(grouped(QUESTION, near, threshold=similarity + 0.01)) == 2
    assert grouped(QUESTION, QUESTION + "!!", QUESTION + " وشكرا", threshold=1.0).numbers.tolist() == [0, 0, 1]


def test_the_order_of_the_rows_does_not_change_groups_or_their_keys(sample: list[str]) -> None:
    together, _ = planted(sample[:100], seed=4)
    there, back = grouped(*together), grouped(*together[::-1])
    assert there.keys.tolist() == back.keys[::-1].tolist()
    assert there.numbers[0] == 0 and back.numbers[0] == 0
    assert there.keys.tolist() != grouped(*together, seed=1).keys.tolist()


def test_a_bucket_that_all_rows_share_is_still_one_group_and_counted() -> None:
    assert count(grouped(*(f"{QUESTION} رقم {number}" for number in range(1000)))) == 1
    found = grouped(QUESTION, QUESTION, QUESTION + " وشكرا", OTHER)
    assert (found.numbers.tolist(), found.questions.tolist()) == ([0, 0, 0, 1], [0, 0, 1, 2])


def test_texts_without_letters_are_no_trouble() -> None:
    assert count(grouped("")) == 1 and count(grouped("!؟", "؟", "a")) == 2


def test_shingles_are_a_set_of_four_letters_each() -> None:
    assert len(shingles("abcdef")) == 3 and len(shingles("ab")) == 1 and len(shingles("aaaaaaa")) == 1
    assert set(shingles("xabcd").tolist()) & set(shingles("abcdef").tolist()) == set(shingles("abcd").tolist())


def test_bands_miss_few_pairs_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.9, 0.99):
        bands, permutations = bands_for(threshold)
        assert (1 - threshold**permutations) ** bands <= 0.02 and bands * permutations <= 512


def test_conflicts_are_groups_with_several_labels_where_none_is_no_label() -> None:
    groups = np.array([0, 0, 1, 1, 2, 2, 2, 3, 3])
    assert conflicting_groups(groups, np.array([0, 1, 1, 1, 2, -1, 0, 1, -1])).tolist() == [0, 2]
    assert conflicting_groups(groups, np.full(9, -1)).tolist() == []


def test_all_pairs_of_a_small_bucket_meet_and_of_a_large_one_so_many_that_work_stays_linear() -> None:
    def met(buckets: list[int]) -> list[tuple[int, int]]:
        pairs = [np.stack(pair, axis=1) for pair in _pairs(np.array(buckets, np.uint32))]
        return sorted(tuple(sorted(pair)) for pair in np.concatenate(pairs).tolist())

    assert met([5, 7, 5, 9, 5, 7]) == [(0, 2), (0, 4), (1, 5), (2, 4)]
    assert met([3] * 12) == list(combinations(range(12), 2))
    assert 17 * 900 < len(met([3] * 1000)) <= 17 * 1000
    assert met([1, 2, 3]) == []
