"""A question is read as its folded words, each in its clause and sentence."""

from __future__ import annotations

from sevpeft.data.text import fold_for_matching
from sevpeft.severity.lexicon import read, split_word

FOLDED_AS_A_WHOLE = [
    "أُصِبْتُ بِحُمّى، وقيء!",
    "  شاطئ\u00a0البحر\tصـــداع \u200fصد\u200cاع ",
    "ﻣﺮﻳﺾ مر\ufe76يض ﷺ",
    "Fever 39 و ٣٨",
    "ورأسي/بطني+ظهري",
    "😀 🤒",
    "",
]
IN_CLAUSES: list[tuple[str, list[str], list[int], list[int]]] = [
    ("حرارة، كحة. صداع", ["حراره", "كحه", "صداع"], [0, 0, 1], [0, 1, 2]),
    ("حرارة\nكحة", ["حراره", "كحه"], [0, 1], [0, 1]),
    ("حرارة\r\n\nكحة\u2028صداع", ["حراره", "كحه", "صداع"], [0, 1, 2], [0, 1, 2]),
    ("حرارة؟كحة", ["حراره", "كحه"], [0, 1], [0, 1]),
    ("٣٩٫٥ و39.5", ["39ʞ5", "و39ʞ5"], [0, 0], [0, 0]),
    ("شديييييد 1000", ["شديد", "1000"], [0, 0], [0, 0]),
    ("معنديش ومبيرضعش مفيش", ["ما", "عندي", "وما", "بيرضع", "ما", "في"], [0] * 6, [0] * 6),
    ("...", [], [], []),
]


def ranks(numbers: list[int]) -> list[int]:
    return [sorted(set(numbers)).index(number) for number in numbers]


def test_words_are_those_that_folding_the_whole_gives() -> None:
    wrong = [text for text in FOLDED_AS_A_WHOLE if " ".join(read(text).words) != fold_for_matching(text)]
    assert wrong == []


def test_clauses_and_sentences_are_kept() -> None:
    found = [(text, read(text)) for text, *_ in IN_CLAUSES]
    assert [(text, one.words, ranks(one.sentences), ranks(one.clauses)) for text, one in found] == IN_CLAUSES


def test_words_that_only_look_wrapped_stay_whole() -> None:
    assert [word for word in ("مشمش", "مرتعش", "مشوش", "عطش", "معاش") if split_word(word) != (word,)] == []
