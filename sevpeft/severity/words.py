"""Splits a question into folded words, each with the number of its sentence and of its clause.

Letters repeated for emphasis are reduced to one. A negation around its verb ("معنديش") becomes a word ("ما عندي").
"""

import re
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from sevpeft.data.text import fold_for_matching

LEXICONS = Path(__file__).parent / "lexicons"
# Size of the caches for single words, because questions repeat their words.
REMEMBERED = 1 << 16

# Name → words, from lexicons/words_ar.tsv in the order of the file.
WORD_LISTS: dict[str, list[str]] = {}
for _line in (LEXICONS / "words_ar.tsv").read_text(encoding="utf-8").splitlines():
    if not _line.startswith("#"):
        _name, _words = _line.split("\t")
        WORD_LISTS.setdefault(_name, []).extend(_words.split())

# Placeholders for punctuation: letters that Arabic and Latin text does not have and that folding does not change.
_STOP, _ASKING, _COMMA, POINT = "ʘ", "ʖ", "ʗ", "ʞ"
_DECIMAL = re.compile(r"(?<=\d)[.,٫](?=\d)")
_SENTENCE_END = re.compile(r"[.!?؟;؛…]+")
_CLAUSE_END = re.compile(r"[،,:()\[\]\-–—]+")
# "سررررعة" is "سرعة"; digits do not change.
_REPEATED = re.compile(r"([^\W\d])\1\1+")
# معنديش is ما عندي, مبيرضعش is ما بيرضع: in Egyptian and Maghrebi the negation surrounds the verb.
_WRAPPED_NEGATION = re.compile(r"(و|ف)?ما?([^\d\W]{3,})ش")
_JOINED = {word: tuple(parts.split("_")) for word, parts in (pair.split("=") for pair in WORD_LISTS["joined"])}


class Text(NamedTuple):
    """The words of a question, with the numbers of their sentences and clauses."""

    words: list[str]  # folded, three or more equal letters as one
    sentences: list[int]  # sentence number of each word; . ! ? ؛ and line breaks end a sentence
    clauses: list[int]  # clause number of each word; commas, colons, dashes and brackets end a clause too
    asking: set[int]  # numbers of the sentences that end with a question mark


def read(question: str) -> Text:
    """Splits a question into words and numbers its sentences and clauses."""
    text = Text([], [], [], set())
    sentence = clause = 0
    # Word by word with a cache, because folding whole questions takes longer than the rest of the matching.
    for part in chain.from_iterable(map(_folded, f" {_STOP} ".join(question.splitlines()).split())):
        if part == _ASKING:
            text.asking.add(sentence)
        if part in (_STOP, _ASKING, _COMMA):
            clause += 1
            sentence += part != _COMMA
        else:
            text.words.append(part)
            text.sentences.append(sentence)
            text.clauses.append(clause)
    return text


@lru_cache(REMEMBERED)
def _folded(written: str) -> tuple[str, ...]:
    """The words and punctuation placeholders of a text without blanks."""
    marked = _SENTENCE_END.sub(
        lambda end: f" {_ASKING if set(end[0]) & set('?؟') else _STOP} ", _DECIMAL.sub(POINT, written)
    )
    folded = fold_for_matching(_CLAUSE_END.sub(f" {_COMMA} ", marked))
    return tuple(part for word in folded.split() for part in split_word(word))


def split_word(word: str) -> tuple[str, ...]:
    """A folded word without repeated letters; the negation around a verb is split off as a word."""
    word = _REPEATED.sub(r"\1", word)
    wrapped = _WRAPPED_NEGATION.fullmatch(word) if word.endswith("ش") and word not in WORD_LISTS["unwrapped"] else None
    return _JOINED.get(word) or ((f"{wrapped[1] or ''}ما", wrapped[2]) if wrapped else (word,))
