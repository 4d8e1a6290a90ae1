"""From a question to the n-grams that the linear classifier weighs, and from their counts to rows of even length.

There are two views of the folded text. Parts of words, edges included, see through spelling, clitics and dialect
endings. Words and pairs of them keep what a question says; they are cut to light stems (after Larkey et al. 2002,
"Improving Stemming for Arabic Information Retrieval"), because a few hundred rows hold most words in one form only, and
greetings are left out, which most questions open and close with. Each view has the same length, or the parts of words,
being many more, would drown the words.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sevpeft.data.text import fold_for_matching

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# Counts up when `features` or `even` change: the same arrays would then mean something else.
FEATURES = 2
CHARACTERS = (2, 3, 4, 5)
GREETINGS = frozenset(
    fold_for_matching(
        """السلام سلام عليكم وعليكم ورحمة رحمة الله وبركاته مساء صباح الخير النور خير الف مرحبا اهلا لو سمحت سمحتم
        سمحتوا سمحتي يا دكتور دكتورة الادمن بدون اسم سؤال استشارة حد ممكن يفيدني ارجو الرد رد ضروري من فضلك فضلكم بعد
        اذن اذنك اذنكم شكرا وشكرا جزيلا مقدما جزاكم خيرا"""
    ).split()
)

_PROCLITIC = re.compile("^(?:وال|فال|بال|كال|لل|ال|و(?=...)|[فبل](?=....))")
_SUFFIX = re.compile("(?:هما|كم|هم|ها|نا|ني|ين|ون|ات|ان|يه|ه|ي|ك|ت)$")
_SHORTEST_STEM = 3
# What starts a name of the second view: folded text has no such sign, so that no part of a word is taken for it.
_WORD = "="


def features(question: str) -> list[str]:
    """The n-grams of a question: parts of its words, then stems and pairs of stems, marked with `=`."""
    words = fold_for_matching(question).split()
    found: list[str] = []
    for word in words:
        found += _characters(word)
    stems = [stem(word) for word in words if word not in GREETINGS]
    found += [_WORD + one for one in stems]
    found += [f"{_WORD}{one} {two}" for one, two in itertools.pairwise(stems)]
    return found


def views_of(vocabulary: Sequence[str]) -> np.ndarray:
    """(features,) int64: 1 for stems and their pairs, 0 for parts of words."""
    return np.fromiter((name.startswith(_WORD) for name in vocabulary), dtype=np.int64, count=len(vocabulary))


def even(rows: csr_matrix, views: np.ndarray) -> csr_matrix:
    """Weighted counts (n, features), none negative, each view of a row scaled to the length √½: both make 1."""
    place = 2 * np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr)) + views[rows.indices]
    squares = np.bincount(place, weights=rows.data**2, minlength=2 * rows.shape[0])
    result = rows.copy()
    result.data = rows.data / np.sqrt(2 * squares)[place]
    return result


# Few words make up most of a language; cutting them anew each time takes half of the time of a prediction.
@functools.lru_cache(maxsize=1 << 15)
def _characters(word: str) -> tuple[str, ...]:
    edged = f" {word} "
    return tuple(edged[start : start + size] for size in CHARACTERS for start in range(max(1, len(edged) - size + 1)))


@functools.lru_cache(maxsize=1 << 15)
def stem(word: str) -> str:
    """A word without one proclitic and one suffix, where three letters remain."""
    for affix in (_PROCLITIC, _SUFFIX):
        cut = affix.sub("", word) if len(word) > _SHORTEST_STEM else word
        word = cut if len(cut) >= _SHORTEST_STEM else word
    return word
