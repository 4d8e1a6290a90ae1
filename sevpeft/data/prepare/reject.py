"""Why nothing can be learned from a cleaned question and answer, if there is a reason.

Rows that are thrown away in error cannot teach, and rows that are kept in error teach something wrong: where a rule is
in doubt the row is kept, but for answers to a picture that the model will never see. Judged on cleaned text, because
`clean` repairs what can be repaired and keeps apart what says that a text was cut from how people type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from sevpeft.data.prepare.clean import is_damaged, without_greetings
from sevpeft.data.prepare.words import PATTERNS, WORDS
from sevpeft.data.text import fold_for_matching

REASONS: dict[str, str] = {
    "encoding_damage": "letters are lost or unreadable: replacement characters, runs of ???, a wrong code page",
    "empty": "question or answer has no letters",
    "short_answer": "the answer has one or two words beside greetings",
    "question_is_answer": "question and answer are the same, or one is the other with little added",
    "wrong_language": "question or answer is not written in Arabic letters; names of drugs and tests are no language",
    "truncated": "question or answer was cut off, as a closing ... at its last word says",
    "absent_picture": "the question shows a picture, a lab sheet or a prescription that is not there",
}
"""Reason -> what it means, in the order in which they are looked for."""


def reject(question: str, answer: str, allowed: Collection[str] = ()) -> str | None:
    """The first of `REASONS` that holds and is not `allowed`; None where the row may stay."""
    return next((name for name, holds in _CHECKS.items() if name not in allowed and holds(question, answer)), None)


_WORD = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*")
_MASK = re.compile(r"\[[^\[\]]{2,20}\]")
_FEW_WORDS = 2


def _has_letters(text: str) -> bool:
    return any(map(str.isalpha, _MASK.sub("", text) if "[" in text else text))


def _is_short(question: str, answer: str) -> bool:
    # Whoever has many characters has more than two words: only short answers are worth counting.
    return len(answer) < 200 and len(_WORD.findall(_MASK.sub(" ", without_greetings(answer)))) <= _FEW_WORDS


# Of the longer one, what may stand beside the shorter one without being an answer.
_MOST_ADDED = 0.2


def _is_the_same(question: str, answer: str) -> bool:
    # Folding takes time, and texts of very different length are not the same.
    shorter, longer = sorted((question, answer), key=len)
    if len(shorter) < 0.6 * len(longer):
        return False
    one, other = sorted((fold_for_matching(question), fold_for_matching(answer)), key=len)
    return one in other and len(one) >= (1 - _MOST_ADDED) * len(other)


_ARABIC_LETTER = re.compile(r"[\u0620-\u064A\u066E-\u06D3]+")
_LATIN_LETTER = re.compile(r"[A-Za-z\u00C0-\u024F]+")
_OTHER_SCRIPT = re.compile(r"[^\W\d_\u0000-\u024F\u0600-\u06FF]")
_LEAST_ARABIC = 0.3
_LEAST_SENTENCE_WORDS = 0.1
_NAMES_ONLY = 40
_THEIR_LETTERS = re.compile(r"[یکہےں]")


def _is_foreign(question: str, answer: str) -> bool:
    if _is_persian_or_urdu(question) or _is_persian_or_urdu(answer) or _arabic_share(question) < _LEAST_ARABIC:
        return True
    return _arabic_share(answer) < _LEAST_ARABIC and not _lists_names(answer)


def _arabic_share(text: str) -> float:
    arabic = sum(map(len, _ARABIC_LETTER.findall(text)))
    other = sum(map(len, _LATIN_LETTER.findall(text))) + len(_OTHER_SCRIPT.findall(text))
    return arabic / (arabic + other) if arabic + other else 1.0


def _lists_names(text: str) -> bool:
    """Whether Latin words are a prescription or a list of tests: no sentence, and not long."""
    if _OTHER_SCRIPT.search(text):
        return False
    words = re.findall(r"[a-z0-9]*[a-z][a-z0-9]*", text.lower())
    sentence = sum(word in WORDS["sentence_words"] for word in words)
    return len(words) <= _NAMES_ONLY and sentence <= 1 + _LEAST_SENTENCE_WORDS * len(words)


def _is_persian_or_urdu(text: str) -> bool:
    if not _THEIR_LETTERS.search(text):
        return False
    words = text.split()
    return sum(word in WORDS["persian_or_urdu"] for word in words) > 0.1 * len(words)


# Public sets cut a text at a length and put three dots right after its last word. Who types dots does so between
# phrases as well, puts a space before them, or types another number of them, of which `clean` leaves two.
_CUT = re.compile(r"[^\W_](?:\.\.\.|…)\Z")
_TYPED_DOTS = re.compile(r"\.\.|…")
_LEAST_CUT = 60


def _is_cut(text: str) -> bool:
    return len(text) >= _LEAST_CUT and _CUT.search(text) is not None and not _TYPED_DOTS.search(text[:-4])


# Who writes the readings down asks about them, not about the sheet. An age and a few days are no readings.
_NUMBER = re.compile(r"\d+(?:[.,/]\d+)?")
_FEWEST_READINGS = 4
_MAYBE_PICTURE = re.compile("صور|مرفق|رفقت|[سا]رفق|كومنت|تعليق|منظر")
_MAYBE_SHEET = re.compile(
    "حليل|حاليل|[أا]شع[ةهات]|[أا]شاع[ةهات]|تقرير|تقارير|روشت|رنين|سونار|[إا]يكو|رسم|فحص|فحوص|نتيج[ةه]|نتا[ئي]ج|مقطعي|تراسا|منظار|"
    "مفراس|تخطيط"
)


def _points_to_a_picture(question: str, answer: str) -> bool:
    picture, sheet = _MAYBE_PICTURE.search(question), _MAYBE_SHEET.search(question)
    if not (picture or sheet):
        return False
    folded = fold_for_matching(question)
    if picture and PATTERNS["pictures"].search(folded):
        return True
    return bool(sheet and len(_NUMBER.findall(question)) < _FEWEST_READINGS and PATTERNS["sheets"].search(folded))


_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "encoding_damage": lambda question, answer: is_damaged(question) or is_damaged(answer),
    "empty": lambda question, answer: not (_has_letters(question) and _has_letters(answer)),
    "short_answer": _is_short,
    "question_is_answer": _is_the_same,
    "wrong_language": _is_foreign,
    "truncated": lambda question, answer: _is_cut(question) or _is_cut(answer),
    "absent_picture": _points_to_a_picture,
}
