"""A question is read as its folded words, each in its clause and sentence."""

from __future__ import annotations

import pytest

from sevpeft.data.text import fold_for_matching
from sevpeft.severity.words import Remembered, parts_of, read


@pytest.mark.parametrize(
    "text",
    [
        "أُصِبْتُ بِحُمّى، وقيء!",
        "  شاطئ\u00a0البحر\tصـــداع \u200fصد\u200cاع ",
        "ﻣﺮﻳﺾ مر\ufe76يض ﷺ",
        "Fever 39 و ٣٨",
        "ورأسي/بطني+ظهري",
        "😀 🤒",
        "",
    ],
)
def test_words_are_those_that_folding_the_whole_gives(text: str) -> None:
    assert " ".join(read(text).words) == fold_for_matching(text)


@pytest.mark.parametrize(
    ("text", "words", "sentences", "clauses"),
    [
        ("حرارة، كحة. صداع", ["حراره", "كحه", "صداع"], [0, 0, 1], [0, 1, 2]),
        ("حرارة\nكحة", ["حراره", "كحه"], [0, 1], [0, 1]),
        ("حرارة\r\n\nكحة\u2028صداع", ["حراره", "كحه", "صداع"], [0, 1, 2], [0, 1, 2]),
        ("حرارة؟كحة", ["حراره", "كحه"], [0, 1], [0, 1]),
        ("٣٩٫٥ و39.5", ["39ʞ5", "و39ʞ5"], [0, 0], [0, 0]),
        ("شديييييد 1000", ["شديد", "1000"], [0, 0], [0, 0]),
        ("معنديش ومبيرضعش مفيش", ["ما", "عندي", "وما", "بيرضع", "ما", "في"], [0] * 6, [0] * 6),
        ("...", [], [], []),
    ],
)
def test_clauses_and_sentences_are_kept(text: str, words: list[str], sentences: list[int], clauses: list[int]) -> None:
    found = read(text)
    assert found.words == words

    def ranks(numbers: list[int]) -> list[int]:
        return [sorted(set(numbers)).index(number) for number in numbers]

    assert (ranks(found.sentences), ranks(found.clauses)) == (sentences, clauses)


@pytest.mark.parametrize("word", ["مشمش", "مرتعش", "مشوش", "عطش", "معاش"])
def test_words_that_only_look_wrapped_stay_whole(word: str) -> None:
    assert parts_of(word) == (word,)


def test_what_is_remembered_is_found_once_and_forgotten_when_it_is_too_much() -> None:
    asked: list[str] = []
    lengths = Remembered(lambda word: asked.append(word) or len(word))
    lengths.most = 2
    assert [lengths[word] for word in ("الم", "دم", "الم", "حراره", "الم")] == [3, 2, 3, 5, 3]
    assert asked == ["الم", "دم", "حراره", "الم"]
    assert len(lengths) <= 2
