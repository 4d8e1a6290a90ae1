"""From a question to folded words, with the punctuation that folding loses kept as clauses and sentences.

Words come out as the lexicon is to write them: letters repeated for stress once, and a negation that dialects wrap
around the verb ("معنديش") as a word of its own ("ما عندي").
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from sevpeft.data.cleaning import fold_for_matching

# Letters that no Arabic or Latin text has and that folding leaves alone, to carry punctuation through it.
_STOP, _COMMA, POINT = "ʘ", "ʗ", "ʞ"
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

# Words recur: what was found out about one is kept, and forgotten when there are too many.
REMEMBERED_WORDS = 1 << 16


@dataclass(frozen=True)
class Text:
    """A question in words, and where its sentences and clauses end."""

    words: list[str]
    """Folded, three and more equal letters as one."""
    sentences: list[int]
    """Number of the sentence of each word: parted by . ! ? ؛ and line breaks."""
    clauses: list[int]
    """Number of the clause of each word: parted by commas, colons, dashes and brackets too."""


def read(question: str) -> Text:
    """Words of a question; its punctuation as numbers of sentences and clauses."""
    words: list[str] = []
    sentence_ends: list[int] = []
    clause_ends: list[int] = []
    for line in question.splitlines():
        for written in line.split():
            for part in _folded(written):
                if part == _STOP:
                    sentence_ends.append(len(words))
                    clause_ends.append(len(words))
                elif part == _COMMA:
                    clause_ends.append(len(words))
                else:
                    words.append(part)
        sentence_ends.append(len(words))
        clause_ends.append(len(words))
    return Text(words, _numbered(sentence_ends, len(words)), _numbered(clause_ends, len(words)))


@lru_cache(maxsize=REMEMBERED_WORDS)
def _folded(written: str) -> tuple[str, ...]:
    """What is written between two blanks, as words and marks of punctuation.

    Word by word and remembered, because folding whole questions takes longer than all the rest of matching.
    """
    marked = _SENTENCE_END.sub(f" {_STOP} ", _DECIMAL.sub(POINT, written))
    folded = fold_for_matching(_CLAUSE_END.sub(f" {_COMMA} ", marked))
    return tuple(part for word in folded.split() for part in parts_of(word))


def _numbered(ends: list[int], length: int) -> list[int]:
    """For each word the number of its stretch, given where stretches end."""
    numbers: list[int] = []
    for stretch, end in enumerate([*ends, length]):
        numbers += [stretch] * (end - len(numbers))
    return numbers


def parts_of(word: str) -> tuple[str, ...]:
    """A folded word without repeated letters; its wrapped negation as a word of its own."""
    word = _REPEATED.sub(r"\1", word)
    if word in _SPLIT:
        return tuple(_SPLIT[word].split())
    found = _WRAPPED_NEGATION.fullmatch(word) if word.endswith("ش") else None
    if not found or word in _NOT_WRAPPED:
        return (word,)
    return ((found[1] or "") + "ما", found[2])
