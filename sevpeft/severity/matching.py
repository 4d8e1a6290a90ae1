"""From the words of a question to the places where patterns stand in it.

Arabic glues particles, articles and pronouns to its words, and the dialects add their own. Written out, five hundred
patterns would be millions of surface forms. So each form of a word in the lexicon is kept once, the proclitics and
suffixes of a question's word are taken off, and what was found for a word is remembered: questions repeat their words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from sevpeft.severity.lexicon import Pattern, Word
from sevpeft.severity.words import POINT, Remembered, Text

_NUMBER = re.compile(rf"\d+(?:{POINT}\d+)?")
_CONJUNCTIONS = ("", "و", "ف")
_PARTICLES = ("", "ال", "ب", "بال", "ل", "لل", "ك", "كال", "ع", "عال", "فال", "هال", "دال")
_TENSES = "ل ه ح ب س ك غ حا ها"
_PERSONS = "ا ي ت ن بي بت با بن كي كت كن كاي كات هي هت حي حت مت"
_OF_NOUNS = "ي ه ها هم هن هو ك كم نا و ا ات اتي اته اتها ين ون ان يه ني وا"
_OF_VERBS = "ت تي وا و ين ون ن نا ني تني ه ها هم ك ته تها تو لي له لها لو ش تش نيش هاش هوش ا ات تا وني"
_POSSESSIVE = "ي ه ها هم هن هو ك كم نا و ين ان"
PLAIN_SUFFIXES = frozenset(["", *_OF_NOUNS.split()])
VERB_SUFFIXES = frozenset(["", *_OF_VERBS.split()])
_PRONOUNS = frozenset(_POSSESSIVE.split())
_PLAIN_PREFIXES = frozenset(one + two for one in _CONJUNCTIONS for two in _PARTICLES)
_VERB_PREFIXES = frozenset(
    one + two
    for one in _CONJUNCTIONS
    for two in ("", *_TENSES.split(), *_PERSONS.split(), *("ل" + p for p in _PERSONS.split()))
)
# A word of two letters is inside many others: دم in كدمه, حي in حيه.
_SHORT_PREFIXES = frozenset(one + two for one in _CONJUNCTIONS for two in ("", "ال", "ب", "بال", "فال", "لل"))
_LONGEST_PREFIX = max(map(len, _PLAIN_PREFIXES | _VERB_PREFIXES))
_LONGEST_SUFFIX = max(map(len, PLAIN_SUFFIXES | VERB_SUFFIXES))

# A number that counts one of these is a duration, an age or a dose and no reading of an instrument.
_COUNTED = """سنه سنين سنوات عام عاما اعوام شهر شهور اشهر شهرا يوم يوما ايام اسبوع اسابيع ساعه ساعات دقيقه دقايق مره
مرات مج مجم ملي ملجم ملغ جم جرام مل كيلو كجم كغ سم mg ml kg سن حبه حبات قرص حقنه وحده"""
_UNITS = frozenset(_COUNTED.split())
_AGED = ("عمر", "السن", "سني", "بعمر", "العمر", "وزن", "اسبوع", "الاسبوع", "بالاسبوع", "الشهر", "يوم")
_AGES = (*_AGED, *("و" + age for age in _AGED))


class Occurrence(NamedTuple):
    """Where a pattern stands: its number, and one position for each of its slots, ascending."""

    pattern: int
    positions: tuple[int, ...]


# The slots still to be found in one direction, the nearest first: number of the slot, and how far on it may stand.
_Way = tuple[tuple[int, range], ...]
# A pattern that is looked for at a word: its number, the other slots that it needs, and the ways from this word to its
# first and to its last slot.
_Anchored = tuple[int, frozenset[int], _Way, _Way]
# Of the slots that a word fills those of patterns that are looked for at another word, and the patterns that are looked
# for at this one.
_Known = tuple[frozenset[int], tuple[_Anchored, ...]]


class Matcher:
    """The patterns of a lexicon, turned round so that a question's words lead to them."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._forms: dict[str, list[tuple[str, int]]] = {}
        self._ranges: list[tuple[float, float, bool, int]] = []
        slots_of: list[tuple[int, ...]] = []
        numbers: dict[tuple[frozenset[Word], bool], int] = {}
        for pattern in patterns:
            slots = []
            for position, slot in enumerate(pattern.slots):
                # `1..28 يوم` names its unit; `سكر ~ 20..50` must not be met by "سكر من 20 سنة".
                unit_named = position < len(pattern.gaps) and pattern.gaps[position] == 0
                key = (slot, unit_named and any(word.kind == "number" for word in slot))
                if key not in numbers:
                    numbers[key] = len(numbers)
                    for word in slot:
                        self._register(word, numbers[key], unit_named)
                slots.append(numbers[key])
            slots_of.append(tuple(slots))
        sharing = Counter(word for pattern in patterns for word in frozenset().union(*pattern.slots))
        # A pattern is looked for where its rarest word stands, not at every "الم" or "ما".
        self._anchored: list[list[_Anchored]] = [[] for _ in numbers]
        self._others: set[int] = set()
        for number, (pattern, needed) in enumerate(zip(patterns, slots_of, strict=True)):
            commonest = [max(sharing[word] for word in slot) for slot in pattern.slots]
            anchor = commonest.index(min(commonest))
            reaches = [gap + 1 for gap in pattern.gaps]
            before = zip(needed[:anchor], reaches[:anchor], strict=True)
            after = zip(needed[anchor + 1 :], reaches[anchor:], strict=True)
            back = tuple((slot, range(-1, -reach - 1, -1)) for slot, reach in before)[::-1]
            onwards = tuple((slot, range(1, reach + 1)) for slot, reach in after)
            others = frozenset(needed[:anchor] + needed[anchor + 1 :])
            self._others |= others
            self._anchored[needed[anchor]].append((number, others, back, onwards))
        self._known_words = Remembered(self._known_word)
        self._known_numbers = Remembered(self._known_number)

    def _register(self, word: Word, slot: int, unit_named: bool) -> None:
        if word.kind == "number":
            self._ranges.append((word.low, word.high, unit_named, slot))
            return
        forms = [(word.form, word.kind)]
        if word.kind == "plain" and word.form.endswith("ه") and len(word.form) > 3:
            # Teh marbuta opens before a pronoun and gives way to the plural: حراره, حرارته, حرارات.
            forms += [(word.form[:-1] + "ت", "tied"), (word.form[:-1], "plural")]
        for form, kind in forms:
            self._forms.setdefault(form, []).append((kind, slot))

    def _known_word(self, word: str) -> _Known | None:
        """None for a number, which has to be looked at where it stands."""
        return None if _NUMBER.fullmatch(word) else self._known(self._slots_of_word(word))

    def _known_number(self, number: tuple[str, bool, bool]) -> _Known:
        return self._known(self._slots_of_number(*number))

    def _number_at(self, words: list[str], position: int) -> _Known:
        counted = position + 1 < len(words) and words[position + 1] in _UNITS
        aged = position > 0 and words[position - 1].startswith(_AGES)
        return self._known_numbers[words[position], counted, aged]

    def _known(self, slots: Iterable[int]) -> _Known:
        found = frozenset(slots)
        return found & self._others, tuple(anchored for slot in sorted(found) for anchored in self._anchored[slot])

    def _slots_of_word(self, word: str) -> Iterator[int]:
        length = len(word)
        for start in range(min(_LONGEST_PREFIX, length - 1) + 1):
            prefix = word[:start]
            plain, verb = prefix in _PLAIN_PREFIXES, prefix in _VERB_PREFIXES
            if not (plain or verb):
                continue
            for end in range(length, max(length - _LONGEST_SUFFIX, start + 1) - 1, -1):
                for kind, slot in self._forms.get(word[start:end], ()):
                    suffix = word[end:]
                    if kind == "exact":
                        fits = not prefix and not suffix
                    elif kind == "verb":
                        fits = verb and suffix in VERB_SUFFIXES
                    elif end - start < 3:
                        fits = prefix in _SHORT_PREFIXES and not suffix
                    elif kind == "plain":
                        fits = plain and suffix in PLAIN_SUFFIXES
                    else:
                        fits = plain and (suffix in _PRONOUNS if kind == "tied" else suffix.startswith("ات"))
                    if fits:
                        yield slot

    def _slots_of_number(self, word: str, counted: bool, aged: bool) -> Iterator[int]:
        value = float(word.replace(POINT, "."))
        for low, high, unit_named, slot in self._ranges:
            if low <= value <= high and (unit_named or not (counted or aged)):
                yield slot

    def occurrences(self, text: Text) -> list[Occurrence]:
        """Every place of a pattern's rarest word from which the pattern can be completed, with its nearest words."""
        words, sentences = text.words, text.sentences
        known = [
            found or self._number_at(words, position)
            for position, found in enumerate(map(self._known_words.__getitem__, words))
        ]
        present = frozenset().union(*[slots for slots, _ in known])
        found = []
        for position, (_, anchored) in enumerate(known):
            for pattern, others, back, onwards in anchored:
                if not others:
                    found.append(Occurrence(pattern, (position,)))
                elif others <= present:
                    before = _along(back, position, known, sentences) if back else ()
                    after = _along(onwards, position, known, sentences) if onwards and before is not None else ()
                    if before is not None and after is not None:
                        found.append(Occurrence(pattern, (*reversed(before), position, *after)))
        return found


def _along(way: _Way, position: int, known: list[_Known], sentences: list[int]) -> tuple[int, ...] | None:
    """Positions of the slots of a way that begins beside `position`; None where it breaks off."""
    wanted, steps = way[0]
    sentence = sentences[position]
    for step in steps:
        place = position + step
        if not 0 <= place < len(known) or sentences[place] != sentence:
            return None
        if wanted in known[place][0]:
            if len(way) == 1:
                return (place,)
            rest = _along(way[1:], place, known, sentences)
            if rest:
                return (place, *rest)
    return None
