"""From answers to whether they are answers at all: empty, cut off, repeating themselves, too long, in another script.

A loss that is weighted too steeply, or trained too long, shows here first: the model loops, runs into the cap on
length, or leaves Arabic. None of it says whether the advice is right.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sevpeft.data.text import fold_for_matching

NGRAM = 4
# Arabic, its supplements and presentation forms.
_ARABIC = ((0x0600, 0x06FF), (0x0750, 0x077F), (0x0870, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF))


def length_ratio(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Folded words of the answer by those of the reference (n,); NaN where the reference has none."""
    pairs = zip(predictions, references, strict=True)
    counts = np.array([[len(_words(said)), len(_words(wanted))] for said, wanted in pairs], dtype=np.float64)
    counts = counts.reshape(-1, 2)
    return np.divide(counts[:, 0], counts[:, 1], out=np.full(len(counts), np.nan), where=counts[:, 1] > 0)


def empty(predictions: Sequence[str]) -> NDArray[np.float64]:
    """1 where an answer holds no letter and no digit, else 0 (n,)."""
    return np.array([not fold_for_matching(said) for said in predictions], dtype=np.float64)


def repetition(predictions: Sequence[str]) -> NDArray[np.float64]:
    """1 − distinct / all 4-grams of folded words (n,): 0 where none stands twice; 0 too for fewer than five words."""
    return np.array([_repeated(_words(said)) for said in predictions], dtype=np.float64)


def arabic_rate(predictions: Sequence[str]) -> NDArray[np.float64]:
    """Share of letters that are Arabic (n,); NaN where an answer has no letter."""
    return np.array([_arabic_share(said) for said in predictions], dtype=np.float64)


def _words(text: str) -> list[str]:
    return fold_for_matching(text).split()


def _repeated(words: list[str]) -> float:
    grams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _arabic_share(text: str) -> float:
    letters = [ord(sign) for sign in text if unicodedata.category(sign).startswith("L")]
    if not letters:
        return float("nan")
    return sum(any(low <= letter <= high for low, high in _ARABIC) for letter in letters) / len(letters)
