"""The same question in other words is found, other questions are left alone, whatever the order and the processes."""

import random
from itertools import combinations

import datasets
import numpy as np
import pytest

from sevpeft.data.cleaning import fold_for_matching
from sevpeft.data.duplicates import (
    THRESHOLD,
    _met,
    bands_for,
    conflicting_groups,
    duplicate_groups,
    shingles,
)
from sevpeft.data.sources import load_consultations
from sevpeft.errors import DataError

QUESTION = "عندي صداع شديد من امبارح في الجانب الأيمن ومش قادر انام والمسكن مش بيعمل حاجة اعمل ايه"
OTHER = "ابني عمره سنتين وحرارته مرتفعة منذ يومين ولا يأكل فهل أعطيه مضادا حيويا أم أنتظر"


def rows(questions: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"question": questions})


def groups_of(*questions: str, threshold: float = THRESHOLD) -> list[int]:
    return duplicate_groups(rows(list(questions)), threshold=threshold).numbers.tolist()


@pytest.fixture(scope="module")
def sample() -> list[str]:
    return load_consultations("builtin:consultations").rows["question"][:]


@pytest.mark.parametrize(
    "again",
    [
        "عندي صُداع شديد من إمبارح، في الجانب الأيمن ومش قادر أنام!! والمسكن مش بيعمل حاجة، اعمل ايه؟",
        QUESTION.replace("شديد", "فظيع"),
        "السلام عليكم دكتور " + QUESTION,
        QUESTION.replace("صداع", "صدع").replace("المسكن", "المسكنن"),
        QUESTION.replace(" في ", " ").replace(" من ", " "),
        QUESTION + " وشكرا لكم",
    ],
)
def test_the_same_question_in_other_words_is_one_group(again: str) -> None:
    assert groups_of(QUESTION, OTHER, again) == [0, 1, 0]


def test_no_two_of_the_sample_are_taken_for_one(sample: list[str]) -> None:
    assert duplicate_groups(rows(sample)).count == len(sample) == len(set(sample))


def planted(questions: list[str], seed: int) -> tuple[list[str], int]:
    """The questions, and after them as many with one word replaced by one from another question."""
    draw = random.Random(seed)
    long = [question.split() for question in questions if len(question.split()) >= 12]
    for words in long:
        words[draw.randrange(len(words))] = draw.choice(draw.choice(long))
    return questions + [" ".join(words) for words in long], len(long)


def test_nearly_all_questions_with_a_word_replaced_are_found(sample: list[str]) -> None:
    together, count = planted(sample, seed=1)
    found = duplicate_groups(rows(together))
    assert found.exact + found.near >= 0.9 * count
    assert found.largest == 2


def jaccard(left: str, right: str) -> float:
    cut = [{text[at : at + 4] for at in range(len(text) - 3)} for text in map(fold_for_matching, (left, right))]
    return len(cut[0] & cut[1]) / len(cut[0] | cut[1])


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.8, 0.95])
def test_groups_are_those_of_comparing_every_pair(sample: list[str], threshold: float) -> None:
    together = planted(sample[:60], seed=2)[0] + planted(sample[:60], seed=3)[0][60:]
    parent = list(range(len(together)))

    def root(index: int) -> int:
        return index if parent[index] == index else root(parent[index])

    for left, right in combinations(range(len(together)), 2):
        if jaccard(together[left], together[right]) >= threshold:
            parent[root(right)] = root(left)
    expected = [root(index) for index in range(len(together))]
    found = duplicate_groups(rows(together), threshold=threshold).numbers
    # The hash may miss a pair that lies at the threshold; it may not join any that is below.
    assert all(len({expected[i] for i in np.flatnonzero(found == group)}) == 1 for group in set(found.tolist()))
    assert found.max() + 1 <= len(set(expected)) * 1.02


def test_a_pair_that_only_the_hash_likes_is_not_joined() -> None:
    near = QUESTION.replace("شديد", "فظيع")
    similarity = jaccard(QUESTION, near)
    assert groups_of(QUESTION, near, threshold=similarity - 0.01) == [0, 0]
    assert groups_of(QUESTION, near, threshold=similarity + 0.01) == [0, 1]


def test_a_threshold_of_one_joins_equal_questions_only() -> None:
    assert groups_of(QUESTION, QUESTION + "!!", QUESTION + " وشكرا", threshold=1.0) == [0, 0, 1]


def test_the_result_is_the_same_for_any_number_of_processes_and_time(sample: list[str]) -> None:
    many = [f"{question} {number}" for number in range(6) for question in planted(sample, seed=number)[0]]
    once, twice, thrice = (duplicate_groups(rows(many), num_proc=num_proc) for num_proc in (None, 2, 2))
    assert once.numbers.tolist() == twice.numbers.tolist() == thrice.numbers.tolist()
    assert once.keys.tolist() == twice.keys.tolist()


def test_the_order_of_the_rows_does_not_change_groups_or_their_keys(sample: list[str]) -> None:
    together, _ = planted(sample, seed=4)
    there, back = duplicate_groups(rows(together)), duplicate_groups(rows(together[::-1]))
    assert there.keys.tolist() == back.keys[::-1].tolist()
    assert there.numbers[0] == 0 and back.numbers[0] == 0
    assert there.keys.tolist() != duplicate_groups(rows(together), seed=1).keys.tolist()


def test_a_bucket_that_all_rows_share_is_still_one_group_and_counted() -> None:
    mould = [f"{QUESTION} رقم {number}" for number in range(3000)]
    found = duplicate_groups(rows(mould))
    assert (found.count, found.largest, found.near) == (1, 3000, 2999)


def test_equal_questions_are_counted_apart_from_near_ones() -> None:
    found = duplicate_groups(rows([QUESTION, QUESTION, QUESTION + " وشكرا", OTHER]))
    assert (found.exact, found.near, found.count, found.largest) == (1, 1, 2, 3)
    assert found.questions.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("texts", [[], [""], ["!؟", "؟", "a"]])
def test_nothing_is_no_trouble(texts: list[str]) -> None:
    found = duplicate_groups(rows(texts))
    assert found.count == len({fold_for_matching(text) for text in texts})


@pytest.mark.parametrize("threshold", [0, 0.49, 1.01, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(DataError, match=r"give 0\.5 to 1"):
        duplicate_groups(rows([QUESTION]), threshold=threshold)


def test_shingles_are_those_of_each_text_alone() -> None:
    hashed, begins = shingles(["abcdef", "ab", "xabcd"])
    assert begins.tolist() == [0, 3, 4, 6]
    assert hashed[0] == hashed[5] and len(set(hashed.tolist())) == 5


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 0.99])
def test_bands_miss_few_pairs_at_the_threshold(threshold: float) -> None:
    bands, permutations = bands_for(threshold)
    assert (1 - threshold**permutations) ** bands <= 0.02 and bands * permutations <= 512


def test_conflicts_are_groups_with_several_labels_where_none_is_no_label() -> None:
    groups = np.array([0, 0, 1, 1, 2, 2, 2, 3, 3])
    assert conflicting_groups(groups, np.array([0, 1, 1, 1, 2, -1, 0, 1, -1])).tolist() == [0, 2]
    assert conflicting_groups(groups, np.full(9, -1)).tolist() == []


def test_all_pairs_of_a_small_bucket_meet_and_of_a_large_one_so_many_that_work_stays_linear() -> None:
    def met(buckets: list[int]) -> list[tuple[int, int]]:
        pairs = [np.stack(pair, axis=1) for pair in _met(np.array(buckets, np.uint32))]
        return sorted(tuple(sorted(pair)) for pair in np.concatenate(pairs).tolist())

    assert met([5, 7, 5, 9, 5, 7]) == [(0, 2), (0, 4), (1, 5), (2, 4)]
    assert met([3] * 12) == list(combinations(range(12), 2))
    assert 17 * 900 < len(met([3] * 1000)) <= 17 * 1000
    assert met([1, 2, 3]) == []
