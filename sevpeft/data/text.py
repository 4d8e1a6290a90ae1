"""Plainer forms of Arabic text, for comparing and for models without vowel marks, and the dialect that words tell."""

from __future__ import annotations

import functools
import re
import unicodedata
from pathlib import Path

import yaml

# Presentation forms of vowel marks: NFKC turns the isolated ones into a space and a mark, cutting words in two.
_PRESENTATION_MARKS = r"\uFC5E-\uFC63\uFCF2-\uFCF4\uFE70-\uFE7F"
INVISIBLE = r"\u00AD\u061C\u180E\u200B-\u200F\u202A-\u202E\u2060-\u2069\uFEFF"
TASHKEEL = r"\u0610-\u061A\u064B-\u065F\u0670\u06D6-\u06DC\u06DF-\u06E8\u06EA-\u06ED\u08D3-\u08FF"
TATWEEL = r"\u0640"
ARABIC = re.compile("[\u0600-\u06ff\u0750-\u077f\u0870-\u08ff\ufb50-\ufdff\ufe70-\ufeff]")

_BEFORE_NORMALIZING = re.compile(f"[{_PRESENTATION_MARKS}{INVISIBLE}]")
_ZERO_WIDTH_SPACE = re.compile(rf"(?<=[^\W_]|[{TASHKEEL}،؛؟])\u200B+(?=[^\W_])")
_MARKS = re.compile(f"[{TASHKEEL}{TATWEEL}]")
_NOT_WORD = re.compile(r"[\W_]+")

DIGITS = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹", "0123456789" * 2)
# Keyboards for Persian and Urdu, common in Iraq and the Gulf, give look-alikes of yeh and kaf.
_FOLD = str.maketrans("أإآٱىةؤئیک", "اااايهوييك") | DIGITS


def space_words(text: str) -> str:
    """The text with a space for each zero-width one that parts words."""
    return _ZERO_WIDTH_SPACE.sub(" ", text) if "\u200b" in text else text


def fold_for_matching(text: str) -> str:
    """Lower-case words parted by single spaces, without what varies between spellings. No model ever sees this form.

    In order: invisible and bidi marks out, NFKC, tashkeel and tatweel out, hamza carriers and teh marbuta to
    their plain letters, Arabic-Indic digits to ASCII, lower case, all that is no letter or digit to one space.
    """
    text = unicodedata.normalize("NFKC", _BEFORE_NORMALIZING.sub("", space_words(text)))
    return _NOT_WORD.sub(" ", _MARKS.sub("", text).translate(_FOLD).lower()).strip()


def strip_marks(text: str) -> str:
    """The text without tashkeel, tatweel and invisible marks, with ASCII digits: AraGPT2's own, by its model card."""
    return _MARKS.sub("", _BEFORE_NORMALIZING.sub("", space_words(text))).translate(DIGITS)


@functools.cache
def _dialect_words() -> dict[str, frozenset[str]]:
    written = yaml.safe_load(Path(__file__).with_name("dialects.yaml").read_text(encoding="utf-8"))
    return {name: frozenset(fold_for_matching(words).split()) for name, words in written.items()}


def dialect_of(text: str) -> str | None:
    """The dialect of which dialects.yaml has the most of the text's words; None where none or several have."""
    words = fold_for_matching(text).split()
    counts = {name: sum(word in known for word in words) for name, known in _dialect_words().items()}
    likeliest = [name for name, count in counts.items() if count == max(counts.values())]
    return likeliest[0] if len(likeliest) == 1 else None
