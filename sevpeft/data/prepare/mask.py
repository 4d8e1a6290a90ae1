"""A mask for what identifies a person: phone numbers, e-mails, links, national ids, and names after a title.

The first four have a form that can be checked, by check digits, dates and the number plans of `phonenumbers`; doses,
readings, ages and dates do not pass. Names have none: they are looked for after titles only, and the title stays.
What is masked is gone for good, so doubt leaves the text alone; it is no anonymization.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache

import phonenumbers

from sevpeft.data.prepare.words import PATTERNS, WORDS
from sevpeft.data.text import DIGITS, fold_for_matching

MASKS = {"email": "[بريد]", "link": "[رابط]", "national_id": "[هوية]", "phone": "[هاتف]", "name": "[اسم]"}
"""Kind of find -> what stands in its place, in the order in which they are looked for."""

_Span = tuple[int, int]


def mask(text: str, kinds: Collection[str] = tuple(MASKS)) -> tuple[str, dict[str, int]]:
    """The text with the finds of `kinds` masked, and how many there were of each kind that was found.

    Masking again finds nothing, and never cuts a mask: none holds a digit, a dot or a word outside its brackets.
    """
    counts: dict[str, int] = {}
    before = None
    # What a mask takes away may have stood in the way of another find: a letter before a number, a link after a link.
    while before != text:
        before = text
        for kind in MASKS:
            if kind in kinds:
                text = _masked(text, kind, counts)
    return text, {kind: counts[kind] for kind in MASKS if kind in counts}


def _masked(text: str, kind: str, counts: dict[str, int]) -> str:
    parts, end = [], 0
    for start, stop in _FINDERS[kind](text):
        parts += [text[end:start], MASKS[kind]]
        end = stop
        counts[kind] = counts.get(kind, 0) + 1
    return "".join(parts) + text[end:] if parts else text


def _links(text: str) -> Iterator[_Span]:
    if PATTERNS["maybe_link"].search(text):
        for match in PATTERNS["link"].finditer(text):
            # The sentence's own punctuation is not the link's.
            yield match.start(), match.start() + len(match[0].rstrip(".,;:!?'"))


_MANY_DIGITS = re.compile(r"\d(?:[ \-–‑.()]{0,2}\d){7}")
_KUWAITI_WEIGHTS = (2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_BEFORE_A_NUMBER = 40


def _is_national_id(digits: str) -> bool:
    """Egypt: century, date of birth, governorate. Saudi Arabia: 1 or 2 and a Luhn digit. Kuwait: date, check digit.
    Emirates: 784 and the year of birth, which is form enough."""
    if len(digits) == 14:
        return PATTERNS["egyptian"].fullmatch(digits) is not None
    if len(digits) == 12 and PATTERNS["kuwaiti"].fullmatch(digits):
        weighted = sum(int(digit) * weight for digit, weight in zip(digits, _KUWAITI_WEIGHTS, strict=False))
        return 11 - weighted % 11 == int(digits[-1])
    if len(digits) == 10 and digits[0] in "12":
        return _luhn(digits)
    return len(digits) == 15


def _luhn(digits: str) -> bool:
    doubled = (int(digit) * (1 + index % 2) for index, digit in enumerate(reversed(digits)))
    return sum(digit - 9 if digit > 9 else digit for digit in doubled) % 10 == 0


def _national_ids(text: str) -> Iterator[_Span]:
    if not _MANY_DIGITS.search(text):
        return
    ascii_text = text.translate(DIGITS)
    for match in PATTERNS["national_id"].finditer(ascii_text):
        named = PATTERNS["before_national_id"].search(text, max(0, match.start() - _BEFORE_A_NUMBER), match.start())
        if named or _is_national_id(re.sub(r"\D", "", match[0])):
            yield match.span()


_YEAR = re.compile(r"(?:19|20)\d\d")
_GROUP = re.compile(r"\d+")
# fmt: off
_REGIONS = ("EG", "SA", "AE", "JO", "IQ", "MA", "DZ", "KW", "QA", "BH", "OM", "YE", "LB", "SY", "PS", "TN", "LY", "SD")
# fmt: on
_CODES = tuple(str(phonenumbers.country_code_for_region(region)) for region in _REGIONS)


def _phones(text: str) -> Iterator[_Span]:
    if not _MANY_DIGITS.search(text):
        return
    ascii_text = PATTERNS["date"].sub(lambda date: "/" * len(date[0]), text.translate(DIGITS))
    for run in PATTERNS["digits"].finditer(ascii_text):
        if len(run[0]) < 8:
            continue
        named = PATTERNS["before_phone"].search(text, max(0, run.start() - _BEFORE_A_NUMBER), run.start()) is not None
        groups = [(run.start() + group.start(), run.start() + group.end()) for group in _GROUP.finditer(run[0])]
        first = 0
        while first < len(groups):
            plus = first == 0 and run[0][0] == "+"
            if ascii_text[groups[first][0] - 1 : groups[first][0]] in ("-", "–", "‑"):
                first += 1
                continue
            last = _end_of_phone(ascii_text, groups, first, plus, named)
            if last is not None:
                opening = ascii_text[groups[first][0] - 1 : groups[first][0]] == "("
                start = run.start() if first == 0 else groups[first][0] - opening
                yield start, groups[last][1]
                first = last
            first += 1


def _end_of_phone(text: str, groups: list[_Span], first: int, plus: bool, named: bool) -> int | None:
    """Number of the last group of digits of the phone number that begins with group `first`, the longest first."""
    for last in range(min(len(groups), first + 7) - 1, first - 1, -1):
        digits = "".join(text[start:end] for start, end in groups[first : last + 1])
        width = groups[first][1] - groups[first][0]
        if last > first and ((width == 1 and not plus) or _YEAR.fullmatch(digits[:width])):
            continue
        if 7 <= len(digits) <= 15 and _is_phone(digits, plus, named):
            return last
    return None


@lru_cache(maxsize=4096)
def _is_phone(digits: str, plus: bool, named: bool) -> bool:
    """Whether a number plan has `digits`: abroad's after + or 00, a country's own after 0, any other only where the
    words before it speak of a telephone."""
    if plus:
        return _is_valid(f"+{digits}", None)
    if digits.startswith("00"):
        return _is_valid(f"+{digits[2:]}", None)
    if len(digits) >= 11 and digits.startswith(_CODES) and _is_valid(f"+{digits}", None):
        return True
    if digits.startswith("0"):
        return 9 <= len(digits) <= 11 and any(_is_valid(digits, region) for region in _REGIONS)
    return named and not digits.endswith("0000") and any(_is_valid(digits, region) for region in _REGIONS)


def _is_valid(number: str, region: str | None) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False


_ARABIC_WORD = re.compile(r"[ \u00A0]*([\u0621-\u065F\u0670-\u06D3]+)")
_LATIN_WORD = re.compile(r"[ \u00A0]*([A-Za-z][A-Za-z'\-]*)")
_END = re.compile(r"[ \u00A0]*(?:\Z|[^\w \u00A0])")
_MOST_WORDS = 3
_folded = lru_cache(maxsize=1 << 16)(fold_for_matching)


def _names(text: str) -> Iterator[_Span]:
    if not PATTERNS["maybe_title"].search(text):
        return
    masked = 0
    for title in PATTERNS["title"].finditer(text):
        strength, start = title.lastgroup or "", title.end()
        if title.start() < masked:
            continue
        if title[0][-1] in "در":  # Nothing between the title and what follows: "دابراهيم".
            strength = "glued"
        stop = _end_of_arabic_name(text, start, strength) or _end_of_latin_name(text, start, strength)
        if stop:
            masked = stop
            yield start, stop


def _words(text: str, start: int, form: re.Pattern[str]) -> list[tuple[str, int]]:
    """The next words up to a sign or a line's end, each with where it ends; one more than a compound name needs."""
    words: list[tuple[str, int]] = []
    while len(words) <= 2 * _MOST_WORDS and (match := form.match(text, start)):
        start = match.end()
        words.append((match[1], start))
    return words


def _end_of_arabic_name(text: str, start: int, strength: str) -> int | None:
    found = _words(text, start, _ARABIC_WORD)
    words = [_folded(word) for word, _ in found] + [""]
    ends = [_END.match(text, end) is not None for _, end in found]
    position = 0
    for part in range(_MOST_WORDS):
        if position == len(found):
            break
        width = _width_of_name(words[position], words[position + 1], ends[position], strength, part > 0)
        if not width:
            break
        position += width
    return found[position - 1][1] if position else None


def _width_of_name(word: str, following: str, ends: bool, after: str, begun: bool) -> int:
    """How many words from `word` on are one part of a name: 0 for none, 2 for عبد الله, بهاء الدين, بن علي.

    `ends`: a sign or the end comes next. `after`: a "strong" title, a "weak" one, one that is "glued" to the word, or
    the patient's "own" ("my name is"). `begun`: a part of the name stands before `word`.
    """
    known, ambiguous, named = word in WORDS["given"], word in WORDS["ambiguous"], following in WORDS["given"]
    if (word == "عبد" and following.startswith("ال")) or (following == "الله" and word in WORDS["of_god"]):
        return 2
    if following in WORDS["completions"] and (known or ambiguous):
        return 2
    if known:
        return 1
    if word in WORDS["beginnings"]:
        return 2 if begun and (named or _is_family(following)) else 0
    supported = named or following in WORDS["family"]
    if ambiguous:
        return int(after != "glued" and (supported or after == "own" or (ends and (begun or after != "weak"))))
    if begun and _is_family(word):
        return 1
    if word in WORDS["never"]:
        return 0
    if after == "own" and following in WORDS["after_own_name"]:
        return 1
    if after == "glued" or len(word) < 3 or PATTERNS["inflected"].fullmatch(word):
        return 0
    return int(supported or ends) if after != "weak" else int(named and not begun)


def _is_family(word: str) -> bool:
    """Whether a word after a given name is its family name, by the list or its look: after a place or a tribe."""
    looks = word not in WORDS["never"] and PATTERNS["of_a_place"].fullmatch(word) is not None
    return looks or word in WORDS["family"]


def _end_of_latin_name(text: str, start: int, strength: str) -> int | None:
    stop = None
    for word, end in _words(text, start, _LATIN_WORD)[:_MOST_WORDS]:
        guessed = (stop is not None or strength in ("strong", "own")) and (
            word[0].isupper() or (strength == "own" and stop is None)
        )
        known = word.lower() in WORDS["latin_given"]
        if word.lower() in WORDS["latin_never"] or len(word) < 2 or not (known or guessed):
            break
        stop = end
    return stop


_FINDERS: dict[str, Callable[[str], Iterator[_Span]]] = {
    "email": lambda text: (match.span() for match in PATTERNS["email"].finditer(text)),
    "link": _links,
    "national_id": _national_ids,
    "phone": _phones,
    "name": _names,
}
