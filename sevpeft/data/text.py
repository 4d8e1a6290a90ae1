"""Normalizes Arabic text for comparison and for models without vowel marks, and recognizes dialects by words."""

import functools
import re
import unicodedata
from pathlib import Path

import yaml

# Presentation forms of vowel marks: NFKC turns an isolated one into a space and a mark, which splits the word.
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
# Persian and Urdu keyboards, common in Iraq and the Gulf, type look-alikes of yeh and kaf.
_FOLD = str.maketrans("أإآٱىةؤئیک", "اااايهوييك") | DIGITS


def space_words(text: str) -> str:
    """The text with a space in place of each zero-width space between words."""
    return _ZERO_WIDTH_SPACE.sub(" ", text) if "\u200b" in text else text


def fold_for_matching(text: str) -> str:
    """Lower-case words with single spaces, for comparison only; no model sees this form.

    Steps: remove invisible and bidi marks, apply NFKC, remove tashkeel and tatweel. Map hamza carriers and teh marbuta
    to plain letters, Arabic-Indic digits to ASCII, and letters to lower case. Replace all other characters by a space.
    """
    text = unicodedata.normalize("NFKC", _BEFORE_NORMALIZING.sub("", space_words(text)))
    return _NOT_WORD.sub(" ", _MARKS.sub("", text).translate(_FOLD).lower()).strip()


def strip_marks(text: str) -> str:
    """The text without tashkeel, tatweel and invisible marks, with ASCII digits, as in AraGPT2's model card."""
    return _MARKS.sub("", _BEFORE_NORMALIZING.sub("", space_words(text))).translate(DIGITS)


@functools.cache
def _dialect_words() -> dict[str, frozenset[str]]:
    lists = yaml.safe_load(Path(__file__).with_name("dialects.yaml").read_text(encoding="utf-8"))
    return {name: frozenset(fold_for_matching(words).split()) for name, words in lists.items()}


def dialect_of(text: str) -> str | None:
    """The dialect in dialects.yaml with the most words of the text; None for a tie or no word."""
    words = fold_for_matching(text).split()
    counts = {name: sum(word in known for word in words) for name, known in _dialect_words().items()}
    likeliest = [name for name, count in counts.items() if count == max(counts.values())]
    return likeliest[0] if len(likeliest) == 1 else None
