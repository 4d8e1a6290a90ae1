"""From a question to folded words, with the punctuation that folding loses kept as clauses and sentences.

Words come out as the lexicon is to write them: letters repeated for stress once, and a negation that dialects wrap
around the verb ("معنديش") as a word of its own ("ما عندي").
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from sevpeft.data.text import fold_for_matching

# Letters that no Arabic or Latin text has and that folding leaves alone, to carry punctuation through it.
_STOP, _ASKING, _COMMA, POINT = "ʘ", "ʖ", "ʗ", "ʞ"
_MARKS = frozenset((_STOP, _ASKING, _COMMA))
_DECIMAL = re.compile(r"(?<=\d)[.,٫](?=\d)")
_SENTENCE_END = re.compile(r"[.!?؟;؛…]+")
_CLAUSE_END = re.compile(r"[،,:()\[\]\-–—]+")
# "سررررعة" is "سرعة"; digits are left alone.
_REPEATED = re.compile(r"([^\W\d])\1\1+")
# معنديش is ما عندي, مبيرضعش is ما بيرضع: Egyptian and Maghrebi wrap the verb in its negation.
_WRAPPED_NEGATION = re.compile(r"(و|ف)?ما?([^\d\W]{3,})ش")
_PLAIN_WORDS = "مدهش مشمش مفتش مرتعش منعش معطش مغشوش مخدوش منكمش منتعش مشوش مهمش موحش منقوش معاش محرش"
_NOT_WRAPPED = frozenset(_PLAIN_WORDS.split())
_SPLIT = {"مفيش": "ما في", "مافيش": "ما في", "مافيهش": "ما فيه", "مفيهش": "ما فيه", "مفهاش": "ما فيها", "ملوش": "ما له"}

_Key = TypeVar("_Key")
_Found = TypeVar("_Found")


class Remembered(dict[_Key, _Found]):
    """What was found out about words, which recur: looked up as in a dict, found at the first time.

    Faster than `functools.lru_cache`, since nothing is noted when a word is met again: all is forgotten at once when
    there are too many.
    """

    most = 1 << 16

    def __init__(self, find: Callable[[_Key], _Found]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, key: _Key) -> _Found:
        found = self._find(key)
        if len(self) >= self.most:
            self.clear()
        self[key] = found
        return found


@dataclass(frozen=True)
class Text:
    """A question in words, and where its sentences and clauses end."""

    words: list[str]
    """Folded, three and more equal letters as one."""
    sentences: list[int]
    """Number of the sentence of each word: parted by . ! ? ؛ and line breaks."""
    clauses: list[int]
    """Number of the clause of each word: parted by commas, colons, dashes and brackets too."""
    asking: set[int]
    """Numbers of the sentences that end with a question mark."""


def read(question: str) -> Text:
    """Words of a question; its punctuation as numbers of sentences and clauses."""
    lines = question.splitlines()
    if len(lines) > 1:
        question = f" {_STOP} ".join(lines)
    words: list[str] = []
    sentences: list[int] = []
    clauses: list[int] = []
    asking: set[int] = set()
    sentence = clause = 0
    for part in chain.from_iterable(map(_FOLDED.__getitem__, question.split())):
        if part in _MARKS:
            if part == _ASKING:
                asking.add(sentence)
            clause += 1
            sentence += part != _COMMA
        else:
            words.append(part)
            sentences.append(sentence)
            clauses.append(clause)
    return Text(words, sentences, clauses, asking)


def _folded(written: str) -> tuple[str, ...]:
    """What is written between two blanks, as words and marks of punctuation.

    Word by word and remembered, because folding whole questions takes longer than all the rest of matching.
    """
    marked = _SENTENCE_END.sub(_mark_of_end, _DECIMAL.sub(POINT, written))
    folded = fold_for_matching(_CLAUSE_END.sub(f" {_COMMA} ", marked))
    return tuple(part for word in folded.split() for part in parts_of(word))


def _mark_of_end(end: re.Match[str]) -> str:
    return f" {_ASKING if set(end[0]) & set('?؟') else _STOP} "


_FOLDED = Remembered(_folded)


def parts_of(word: str) -> tuple[str, ...]:
    """A folded word without repeated letters; its wrapped negation as a word of its own."""
    word = _REPEATED.sub(r"\1", word)
    if word in _SPLIT:
        return tuple(_SPLIT[word].split())
    found = _WRAPPED_NEGATION.fullmatch(word) if word.endswith("ش") else None
    if not found or word in _NOT_WRAPPED:
        return (word,)
    return ((found[1] or "") + "ما", found[2])
