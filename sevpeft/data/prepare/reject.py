"""Rejects cleaned rows that a model cannot learn from. Doubtful rows are kept, unless the question shows a picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from sevpeft.data.prepare.clean import PATTERNS, WORDS, is_damaged, without_greetings
from sevpeft.data.text import fold_for_matching


def reject(question: str, answer: str, allowed: Collection[str] = ()) -> str | None:
    """The first of `REASONS` that applies and is not `allowed`; None if the row is kept."""
    return next((name for name, applies in REASONS.items() if name not in allowed and applies(question, answer)), None)


def _is_empty(question: str, answer: str) -> bool:
    return not all(any(map(str.isalpha, PATTERNS["a_mask"].sub("", text))) for text in (question, answer))


def _is_short(question: str, answer: str) -> bool:
    if len(answer) >= 200:  # it has more than two words
        return False
    text = PATTERNS["a_mask"].sub(" ", without_greetings(answer))
    return len(PATTERNS["word"].findall(text)) <= 2


def _is_the_same(question: str, answer: str) -> bool:
    # Folding is slow, and texts of very different lengths are not the same.
    if min(len(question), len(answer)) < 0.6 * max(len(question), len(answer)):
        return False
    short, long = sorted((fold_for_matching(question), fold_for_matching(answer)), key=len)
    return short in long and len(short) >= 0.8 * len(long)  # a fifth more text is not an answer


def _is_foreign(question: str, answer: str) -> bool:
    other = _is_persian_or_urdu(question) or _is_persian_or_urdu(answer) or _arabic_share(question) < 0.3
    return other or (_arabic_share(answer) < 0.3 and not _lists_names(answer))


def _arabic_share(text: str) -> float:
    arabic = sum(map(len, PATTERNS["arabic_letters"].findall(text)))
    other = sum(map(len, PATTERNS["latin_letters"].findall(text))) + len(PATTERNS["other_script"].findall(text))
    return arabic / (arabic + other) if arabic + other else 1.0


def _lists_names(text: str) -> bool:
    """Whether Latin words are a prescription or a list of tests: short, and not a sentence."""
    words = re.findall(r"[a-z0-9]*[a-z][a-z0-9]*", text.lower())
    sentence = sum(word in WORDS["sentence_words"] for word in words)
    return not PATTERNS["other_script"].search(text) and len(words) <= 40 and sentence <= 1 + 0.1 * len(words)


def _is_persian_or_urdu(text: str) -> bool:
    words = text.split() if PATTERNS["letters_of_persian_or_urdu"].search(text) else []
    return sum(word in WORDS["persian_or_urdu"] for word in words) > 0.1 * len(words)


# Public data sets cut texts and put three dots right after the last word. People type dots between phrases, too, or
# after a space, or in another number, which `clean` shortens to two.
def _is_cut(text: str) -> bool:
    end = re.search(r"[^\W_](?:\.\.\.|…)\Z", text)
    return len(text) >= 60 and end is not None and not re.search(r"\.\.|…", text[:-4])


def _points_to_a_picture(question: str, answer: str) -> bool:
    picture, sheet = PATTERNS["maybe_picture"].search(question), PATTERNS["maybe_sheet"].search(question)
    # A question with the readings in it does not need the sheet. An age and a few days are not readings.
    if sheet and len(PATTERNS["number"].findall(question)) >= 4:
        sheet = None
    folded = fold_for_matching(question) if picture or sheet else ""
    return bool((picture and PATTERNS["pictures"].search(folded)) or (sheet and PATTERNS["sheets"].search(folded)))


# In the order of the checks; card.md explains each.
REASONS: dict[str, Callable[[str, str], bool]] = {
    "encoding_damage": lambda question, answer: is_damaged(question) or is_damaged(answer),
    "empty": _is_empty,
    "short_answer": _is_short,
    "question_is_answer": _is_the_same,
    "wrong_language": _is_foreign,
    "truncated": lambda question, answer: _is_cut(question) or _is_cut(answer),
    "absent_picture": _points_to_a_picture,
}
