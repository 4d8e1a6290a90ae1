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
from sevpeft.severity.words import POINT, REMEMBERED_WORDS, Text

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


# A pattern that is looked for at a word: its number, the number of that word's slot, and all slots that it needs, if
# it has more than this one.
_Anchored = tuple[int, int, frozenset[int] | None]
# The slots that a word fills, and the patterns that are looked for there.
_Known = tuple[frozenset[int], tuple[_Anchored, ...]]


class Matcher:
    """The patterns of a lexicon, turned round so that a question's words lead to them."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._forms: dict[str, list[tuple[str, int]]] = {}
        self._ranges: list[tuple[float, float, bool, int]] = []
        self._gaps = [pattern.gaps for pattern in patterns]
        self._slots: list[tuple[int, ...]] = []
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
            self._slots.append(tuple(slots))
        sharing = Counter(word for pattern in patterns for word in frozenset().union(*pattern.slots))
        # A pattern is looked for where its rarest word stands, not at every "الم" or "ما".
        self._anchored: list[list[_Anchored]] = [[] for _ in numbers]
        for pattern_number, slot_numbers in enumerate(self._slots):
            commonest = [max(sharing[word] for word in slot) for slot in patterns[pattern_number].slots]
            anchor = commonest.index(min(commonest))
            others = frozenset(slot_numbers) if len(slot_numbers) > 1 else None
            self._anchored[slot_numbers[anchor]].append((pattern_number, anchor, others))
        self._seen: dict[str, _Known] = {}

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

    def _look_up(self, words: list[str], position: int) -> _Known:
        word = words[position]
        if _NUMBER.fullmatch(word):
            return self._known(self._slots_of_number(words, position))
        if len(self._seen) >= REMEMBERED_WORDS:
            self._seen.clear()
        known = self._seen[word] = self._known(self._slots_of_word(word))
        return known

    def _known(self, slots: Iterable[int]) -> _Known:
        found = frozenset(slots)
        return found, tuple(anchored for slot in sorted(found) for anchored in self._anchored[slot])

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

    def _slots_of_number(self, words: list[str], position: int) -> Iterator[int]:
        value = float(words[position].replace(POINT, "."))
        counted = position + 1 < len(words) and words[position + 1] in _UNITS
        aged = position > 0 and words[position - 1].startswith(_AGES)
        for low, high, unit_named, slot in self._ranges:
            if low <= value <= high and (unit_named or not (counted or aged)):
                yield slot

    def occurrences(self, text: Text) -> list[Occurrence]:
        """Every place of a pattern's rarest word from which the pattern can be completed, with its nearest words."""
        seen, words = self._seen, text.words
        known = [seen.get(word) or self._look_up(words, position) for position, word in enumerate(words)]
        present = frozenset().union(*[slots for slots, _ in known])
        found = []
        for position, (_, anchored) in enumerate(known):
            for pattern, anchor, needed in anchored:
                if needed is None:
                    found.append(Occurrence(pattern, (position,)))
                elif needed <= present:
                    before = self._onwards(pattern, anchor, -1, position, known, text.sentences)
                    after = before and self._onwards(pattern, anchor, 1, position, known, text.sentences)
                    if before and after:
                        found.append(Occurrence(pattern, (*reversed(before[1:]), *after)))
        return found

    def _onwards(
        self, pattern: int, slot: int, step: int, position: int, known: list[_Known], sentences: list[int]
    ) -> tuple[int, ...] | None:
        """Positions of the slots from `slot` to the pattern's first (step -1) or last (1) one; None without a way."""
        slots = self._slots[pattern]
        following = slot + step
        if not 0 <= following < len(slots):
            return (position,)
        wanted = slots[following]
        farthest = position + step * (self._gaps[pattern][min(slot, following)] + 1)
        for candidate in range(position + step, farthest + step, step):
            if not 0 <= candidate < len(known) or sentences[candidate] != sentences[position]:
                break
            if wanted in known[candidate][0]:
                rest = self._onwards(pattern, following, step, candidate, known, sentences)
                if rest:
                    return (position, *rest)
        return None
