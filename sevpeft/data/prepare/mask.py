"""Masks personal data: phone numbers, e-mails, links, national ids and names after a title.

The first four are checked by form, check digits, dates and the number plans of `phonenumbers`; names are found after
titles only. A mask cannot be undone, so doubtful text stays. This is not anonymization.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from operator import mul

import phonenumbers

from sevpeft.data.prepare.clean import PATTERNS, WORDS
from sevpeft.data.text import DIGITS, fold_for_matching

# Kind → mask, in the order of the search.
MASKS = {"email": "[بريد]", "link": "[رابط]", "national_id": "[هوية]", "phone": "[هاتف]", "name": "[اسم]"}

_Span = tuple[int, int]
_BEFORE_A_NUMBER = 40  # characters before a number that may describe it
_CODES = tuple(str(phonenumbers.country_code_for_region(region)) for region in WORDS["regions"])
_MOST_WORDS = 3
_folded = lru_cache(maxsize=1 << 16)(fold_for_matching)


def mask(text: str, kinds: Collection[str] = tuple(MASKS)) -> tuple[str, dict[str, int]]:
    """The text with the personal data of `kinds` masked, and the number of masks of each kind.

    Masking again changes nothing: a mask has no digit, no dot and no word outside its brackets.
    """
    counts = Counter[str]()
    before = None
    # A mask may uncover another find: a letter before a number, a link after a link.
    while before != text:
        before = text
        for kind, (needed, find) in _FINDERS.items():
            spans = list(find(text)) if kind in kinds and PATTERNS[needed].search(text) else []
            for start, stop in reversed(spans):
                text = text[:start] + MASKS[kind] + text[stop:]
            counts[kind] += len(spans)
    return text, {kind: count for kind, count in counts.items() if count}


def _links(text: str) -> Iterator[_Span]:
    for match in PATTERNS["link"].finditer(text):
        # Punctuation at the end belongs to the sentence.
        yield match.start(), match.start() + len(match[0].rstrip(".,;:!?'"))


def _national_ids(text: str) -> Iterator[_Span]:
    for match in PATTERNS["national_id"].finditer(text.translate(DIGITS)):
        named = PATTERNS["before_national_id"].search(text, max(0, match.start() - _BEFORE_A_NUMBER), match.start())
        if named or _is_national_id(re.sub(r"\D", "", match[0])):
            yield match.span()


def _is_national_id(digits: str) -> bool:
    """Egypt: date of birth, governorate. Saudi Arabia: Luhn digit. Kuwait: date, check digit. Emirates: its form."""
    if len(digits) == 14:
        return PATTERNS["egyptian"].fullmatch(digits) is not None
    if len(digits) == 12 and PATTERNS["kuwaiti"].fullmatch(digits):
        weighted = sum(map(mul, map(int, digits), (2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)))
        return 11 - weighted % 11 == int(digits[-1])
    if len(digits) == 10 and digits[0] in "12":
        doubled = (str(int(digit) * (1 + index % 2)) for index, digit in enumerate(reversed(digits)))
        return sum(map(int, "".join(doubled))) % 10 == 0
    return len(digits) == 15


def _phones(text: str) -> Iterator[_Span]:
    plain = PATTERNS["date"].sub(lambda date: "/" * len(date[0]), text.translate(DIGITS))
    for run in PATTERNS["digits"].finditer(plain):
        if len(run[0]) < 8:
            continue
        named = PATTERNS["before_phone"].search(text, max(0, run.start() - _BEFORE_A_NUMBER), run.start()) is not None
        groups = [group.span() for group in re.compile(r"\d+").finditer(plain, *run.span())]
        first = 0
        while first < len(groups):
            begin, after = groups[first]
            before = plain[begin - 1 : begin]
            plus = first == 0 and run[0][0] == "+"
            # Search the longest number from this group of digits on; a year or single digit begins none.
            alone = re.fullmatch(r"(?:19|20)\d\d", plain[begin:after]) or (after - begin == 1 and not plus)
            longest = 0 if before and before in "-–‑" else 1 if alone else 7
            for last in range(min(len(groups), first + longest) - 1, first - 1, -1):
                digits = "".join(plain[start:stop] for start, stop in groups[first : last + 1])
                if 7 <= len(digits) <= 15 and _is_phone(digits, plus, named):
                    yield run.start() if first == 0 else begin - (before == "("), groups[last][1]
                    first = last
                    break
            first += 1


@lru_cache(maxsize=4096)
def _is_phone(digits: str, plus: bool, named: bool) -> bool:
    """Whether `digits` are valid in a number plan: international after + or 00, national after 0, any other only if
    `named` by words about telephones before it."""
    if plus or digits.startswith("00"):
        return _is_valid(f"+{digits if plus else digits[2:]}")
    if len(digits) >= 11 and digits.startswith(_CODES) and _is_valid(f"+{digits}"):
        return True
    likely = 9 <= len(digits) <= 11 if digits.startswith("0") else named and not digits.endswith("0000")
    return likely and any(_is_valid(digits, region) for region in WORDS["regions"])


def _is_valid(number: str, region: str | None = None) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False


def _names(text: str) -> Iterator[_Span]:
    masked = 0
    for title in PATTERNS["title"].finditer(text):
        # No space between title and name: "دابراهيم".
        after = "glued" if title[0][-1] in "در" else title.lastgroup or ""
        if title.start() < masked:
            continue
        if stop := _end_of_arabic_name(text, title.end(), after) or _end_of_latin_name(text, title.end(), after):
            masked = stop
            yield title.end(), stop


def _words(text: str, start: int, form: re.Pattern[str]) -> list[tuple[str, int]]:
    """The next words and their ends, up to a sign or the end of the line, one more than the longest name has."""
    words: list[tuple[str, int]] = []
    while len(words) <= 2 * _MOST_WORDS and (match := form.match(text, words[-1][1] if words else start)):
        words.append((match[1], match.end()))
    return words


def _end_of_arabic_name(text: str, start: int, after: str) -> int | None:
    matches = _words(text, start, PATTERNS["arabic_word"])
    words = [_folded(word) for word, _ in matches] + [""]
    position = parts = 0
    while position < len(matches) and parts < _MOST_WORDS:
        ends = PATTERNS["end_of_words"].match(text, matches[position][1]) is not None
        width = _width_of_name(words[position], words[position + 1], ends, after, parts > 0)
        if not width:
            break
        position, parts = position + width, parts + 1
    return matches[position - 1][1] if position else None


def _width_of_name(word: str, following: str, ends: bool, after: str, begun: bool) -> int:
    """Number of words from `word` on that are one part of a name: 0, 1, or 2 for عبد الله, بهاء الدين, بن علي.

    `ends`: a sign or the end follows. `after`: a "strong", "weak" or "glued" title, or "own" (my name is).
    `begun`: `word` follows another part of the name.
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
    """Whether a word after a given name is a family name: in the list, or formed like one of a place or tribe."""
    looks = word not in WORDS["never"] and PATTERNS["of_a_place"].fullmatch(word) is not None
    return looks or word in WORDS["family"]


def _end_of_latin_name(text: str, start: int, after: str) -> int | None:
    stop = None
    for word, end in _words(text, start, PATTERNS["latin_word"])[:_MOST_WORDS]:
        own = after == "own" and stop is None
        guessed = own or (word[0].isupper() and (stop is not None or after in ("strong", "own")))
        known = word.lower() in WORDS["latin_given"]
        if word.lower() in WORDS["latin_never"] or len(word) < 2 or not (known or guessed):
            break
        stop = end
    return stop


# In the order of MASKS: a quick pattern that every find needs, and the search.
_FINDERS: dict[str, tuple[str, Callable[[str], Iterator[_Span]]]] = {
    "email": ("email", lambda text: (match.span() for match in PATTERNS["email"].finditer(text))),
    "link": ("maybe_link", _links),
    "national_id": ("many_digits", _national_ids),
    "phone": ("many_digits", _phones),
    "name": ("maybe_title", _names),
}
