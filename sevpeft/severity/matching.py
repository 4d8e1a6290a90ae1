"""Where the patterns of a lexicon stand in a question.

Arabic glues particles, articles and pronouns to its words, and the dialects add their own. Written out, five hundred
patterns would be millions of surface forms. So each form of the lexicon is kept once, the proclitics and suffixes of a
question's word are taken off, and what was found for a word is remembered: questions repeat their words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from sevpeft.severity.lexicon import Pattern, Word
from sevpeft.severity.words import POINT, WORD_LISTS, Remembered, Text

_NUMBER = re.compile(rf"\d+(?:{POINT}\d+)?")


def _prefixes(*particles: str) -> frozenset[str]:
    """Nothing and the particles, each alone and after a conjunction."""
    return frozenset(conjunction + particle for conjunction in ("", "و", "ف") for particle in ("", *particles))


_PERSONS = WORD_LISTS["person"]
_PLAIN_PREFIXES = _prefixes(*WORD_LISTS["particle"])
_VERB_PREFIXES = _prefixes(*WORD_LISTS["tense"], *_PERSONS, *("ل" + person for person in _PERSONS))
# A word of two letters is inside many others: دم in كدمه, حي in حيه.
_SHORT_PREFIXES = _prefixes(*WORD_LISTS["short_particle"])
_PRONOUNS = frozenset(WORD_LISTS["pronoun"])
_PLAIN_SUFFIXES = _PRONOUNS.union([""], WORD_LISTS["noun_ending"])
_VERB_SUFFIXES = frozenset(["", *WORD_LISTS["verb_ending"]])
_LONGEST_PREFIX = max(map(len, _PLAIN_PREFIXES | _VERB_PREFIXES))
_LONGEST_SUFFIX = max(map(len, _PLAIN_SUFFIXES | _VERB_SUFFIXES))
_UNITS = frozenset(WORD_LISTS["unit"])
_AGES = tuple(conjunction + age for conjunction in ("", "و") for age in WORD_LISTS["age"])


# The slots still to be found in one direction, the nearest first: number of the slot, and how far on it may stand.
_Path = tuple[tuple[int, range], ...]
# A pattern that is looked for at a word: its number, the other slots that it needs, and the paths from this word to its
# first and to its last slot.
_Anchored = tuple[int, frozenset[int], _Path, _Path]
# Of the slots that a word fills those of patterns that are looked for at another word, and the patterns that are looked
# for at this one.
_Known = tuple[frozenset[int], tuple[_Anchored, ...]]


class Matcher:
    """The patterns of a lexicon, turned round so that a question's words lead to them."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._forms: dict[str, list[tuple[str, int]]] = {}
        self._ranges: list[tuple[float, float, bool, int]] = []
        self._anchored: list[list[_Anchored]] = []
        self._others: set[int] = set()
        numbers: dict[tuple[frozenset[Word], bool], int] = {}
        sharing = Counter(word for pattern in patterns for word in frozenset().union(*pattern.slots))
        for number, pattern in enumerate(patterns):
            slots = []
            for slot, gap in zip(pattern.slots, (*pattern.gaps, None), strict=True):
                # `1..28 يوم` names its unit; `سكر ~ 20..50` must not be met by "سكر من 20 سنة".
                key = (slot, gap == 0 and any(word.kind == "number" for word in slot))
                if key not in numbers:
                    numbers[key] = len(numbers)
                    self._anchored.append([])
                    for word in slot:
                        self._register(word, numbers[key], unit_named=gap == 0)
                slots.append(numbers[key])
            # A pattern is looked for where its rarest word stands, not at every "الم" or "ما".
            commonest = [max(sharing[word] for word in slot) for slot in pattern.slots]
            anchor = commonest.index(min(commonest))
            back = tuple((slots[at], range(-1, -pattern.gaps[at] - 2, -1)) for at in reversed(range(anchor)))
            onwards = tuple((slots[at + 1], range(1, pattern.gaps[at] + 2)) for at in range(anchor, len(slots) - 1))
            others = frozenset(slots[:anchor] + slots[anchor + 1 :])
            self._others |= others
            self._anchored[slots[anchor]].append((number, others, back, onwards))
        self._word = Remembered(self._known_word).__getitem__
        self._number = Remembered(self._known_number).__getitem__

    def _register(self, word: Word, slot: int, *, unit_named: bool) -> None:
        if word.kind == "number":
            self._ranges.append((word.low, word.high, unit_named, slot))
            return
        forms = [(word.form, word.kind)]
        if word.kind == "plain" and word.form.endswith("ه") and len(word.form) > 3:
            # Teh marbuta opens before a pronoun and gives way to the plural: حراره, حرارته, حرارات.
            forms += [(word.form[:-1] + "ت", "tied"), (word.form[:-1], "plural")]
        for form, kind in forms:
            self._forms.setdefault(form, []).append((kind, slot))

    def _known(self, slots: Iterable[int]) -> _Known:
        found = frozenset(slots)
        return found & self._others, tuple(anchored for slot in sorted(found) for anchored in self._anchored[slot])

    def _known_word(self, word: str) -> _Known | None:
        """None for a number, which has to be looked at where it stands."""
        return None if _NUMBER.fullmatch(word) else self._known(self._slots_of(word))

    def _known_number(self, number: tuple[str, bool]) -> _Known:
        word, reading = number
        value = float(word.replace(POINT, "."))
        return self._known(slot for low, high, unit, slot in self._ranges if low <= value <= high and (reading or unit))

    def _number_at(self, words: list[str], position: int) -> _Known:
        """A number that counts a unit or follows a word for age is no reading of an instrument."""
        counts = position + 1 < len(words) and words[position + 1] in _UNITS
        aged = position > 0 and words[position - 1].startswith(_AGES)
        known: _Known = self._number((words[position], not (counts or aged)))
        return known

    def _slots_of(self, word: str) -> Iterator[int]:
        length = len(word)
        for start in range(min(_LONGEST_PREFIX, length - 1) + 1):
            prefix = word[:start]
            plain, verb = prefix in _PLAIN_PREFIXES, prefix in _VERB_PREFIXES
            if not (plain or verb):
                continue
            for end in range(length, max(length - _LONGEST_SUFFIX, start + 1) - 1, -1):
                suffix = word[end:]
                for kind, slot in self._forms.get(word[start:end], ()):
                    if kind == "exact":
                        fits = not prefix and not suffix
                    elif kind == "verb":
                        fits = verb and suffix in _VERB_SUFFIXES
                    elif end - start < 3:
                        fits = prefix in _SHORT_PREFIXES and not suffix
                    elif kind == "plain":
                        fits = plain and suffix in _PLAIN_SUFFIXES
                    else:
                        fits = plain and (suffix in _PRONOUNS if kind == "tied" else suffix.startswith("ات"))
                    if fits:
                        yield slot

    def occurrences(self, text: Text) -> list[tuple[int, tuple[int, ...]]]:
        """(number of a pattern, ascending positions of its slots) of every place where a pattern stands.

        One for each place of its rarest word from which it can be completed, with the nearest words.
        """
        known = [
            found or self._number_at(text.words, position) for position, found in enumerate(map(self._word, text.words))
        ]
        present = frozenset().union(*[slots for slots, _ in known])
        found: list[tuple[int, tuple[int, ...]]] = []
        for position, (_, anchored) in enumerate(known):
            for pattern, others, back, onwards in anchored:
                if not others:
                    found.append((pattern, (position,)))
                elif others <= present:
                    before = _along(back, position, known, text.sentences) if back else ()
                    after = _along(onwards, position, known, text.sentences) if onwards and before is not None else ()
                    if before is not None and after is not None:
                        found.append((pattern, (*reversed(before), position, *after)))
        return found


def _along(path: _Path, position: int, known: list[_Known], sentences: list[int]) -> tuple[int, ...] | None:
    """Positions of the slots of a path that begins beside `position`; None where it breaks off."""
    if not path:
        return ()
    wanted, steps = path[0]
    for step in steps:
        place = position + step
        if not 0 <= place < len(known) or sentences[place] != sentences[position]:
            return None
        if wanted in known[place][0]:
            rest = _along(path[1:], place, known, sentences)
            if rest is not None:
                return (place, *rest)
    return None
