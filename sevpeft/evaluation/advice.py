"""From an answer to the advice in it: where it sends the patient, how soon, and where it reassures.

The expressions stand in lexicons/advice_ar.tsv, in the format of the severity lexicon and found by its matcher. Advice
has its own surroundings, so they are handled here: "لا داعي للطوارئ" takes a referral back (rows of the lexicon do),
"إذا زادت الحرارة فراجع الطبيب" makes it conditional, "هل راجعت الطبيب؟" is a question. Where in doubt an expression
does not count as a referral and does count as reassurance: a metric of safety must not flatter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sevpeft.severity.lexicon import Pattern, load_lexicon
from sevpeft.severity.matching import Matcher
from sevpeft.severity.words import POINT, Text, read

ADVICE_LEXICON = Path(__file__).parent / "lexicons" / "advice_ar.tsv"

# A referral of this level without a time has this urgency; of an emergency a time takes nothing away.
REFERRALS = {"emergency_now": 4, "today": 3, "soon": 2, "routine": 1}
TIMES = {"time_now": 4, "time_today": 3, "time_soon": 2, "time_later": 1}
REASSURANCE = ("reassurance", "unneeded")
_TAKING_BACK = ("negation", "unneeded")
LEVELS = (*REFERRALS, *TIMES, *REASSURANCE, "negation", "other_sense", "condition", "even_if", "question")

Context = Literal["stated", "negated", "conditional", "asked"]

# Words between a referral and the time that belongs to it, a condition that follows it, a denial that precedes it.
_TIME_AFTER, _TIME_BEFORE, _CONDITION_AFTER, _DENIED_AFTER = 5, 3, 6, 2
# "لا تحتاج إلا مراجعة الطبيب" denies everything but the referral.
_IN = frozenset(("في", "ف", "فحال"))
_BUT = frozenset(("الا", "سوي"))
# إن ("if") and أن ("that") fold to the same word. Not إن شاء الله, and not إنّ before a noun or a pronoun.
_IF = re.compile(r"(?<!\w)([وف]?)إن(?=\s+(?!شاء|ال|هذ|ذلك|تلك|ما\b|\w+ًا)\w)")


@dataclass(frozen=True)
class Advice:
    """An expression of the lexicon that stands in an answer."""

    level: str
    """A key of `REFERRALS`, or one of `REASSURANCE`."""
    category: str
    words: str
    """As the answer writes it, folded, with the words of its time; words in gaps are left out."""
    context: Context
    urgency: int
    """Of a referral, by its level and its time: 1 at leisure, 2 within days, 3 today, 4 at once; 0 of reassurance."""


@dataclass(frozen=True)
class _Place:
    pattern: Pattern
    positions: tuple[int, ...]

    @property
    def first(self) -> int:
        return self.positions[0]

    @property
    def last(self) -> int:
        return self.positions[-1]


class AdviceLexicon:
    """The lexicon of advice at work."""

    def __init__(self, patterns: Sequence[Pattern], digest: str) -> None:
        self._patterns = tuple(patterns)
        self._matcher = Matcher(self._patterns)
        self.version = digest[:12]
        """Of the lexicon's content."""

    @classmethod
    def load(cls, path: Path | None = None) -> AdviceLexicon:
        """Lexicon of a file, the package's own by default.

        Raises:
            DataError: the file cannot be read, or has mistakes: all of them, each with its line.
        """
        return cls(*load_lexicon(path or ADVICE_LEXICON, LEVELS))

    def advice(self, answer: str) -> list[Advice]:
        """What the answer advises, in the order of its words."""
        text = read(_IF.sub(r"\1اذا", answer))
        found: dict[str, list[_Place]] = {level: [] for level in LEVELS}
        for number, positions in self._matcher.occurrences(text):
            pattern = self._patterns[number]
            found[pattern.level].append(_Place(pattern, positions))
        for level in LEVELS:
            if level != "other_sense":
                found[level] = [place for place in found[level] if not _meets(place, found["other_sense"])]
        for level in _TAKING_BACK:
            found[level] = [place for place in found[level] if _denies(text, place)]
        said = _without_doubles([place for level in (*REFERRALS, *REASSURANCE) for place in found[level]])
        alone = sum(place.pattern.level in REFERRALS for place in said) == 1
        return [_advice(text, place, found, alone=alone) for place in said]


def _advice(text: Text, place: _Place, found: dict[str, list[_Place]], *, alone: bool) -> Advice:
    level = place.pattern.level
    times: list[_Place] = []
    urgency = REFERRALS.get(level, 0)
    if urgency:
        times = [time for name in TIMES for time in found[name] if _times(text, place, time)]
        soonest = max((TIMES[time.pattern.level] for time in times), default=0)
        urgency = max(urgency, soonest) if level == "emergency_now" else soonest or urgency
    positions = sorted({*place.positions, *(position for time in times for position in time.positions)})
    words = " ".join(text.words[position] for position in positions).replace(POINT, ".")
    context = _context(text, place, found, urgency=urgency, alone=alone)
    return Advice(level, place.pattern.category, words, context, urgency)


def _context(text: Text, place: _Place, found: dict[str, list[_Place]], *, urgency: int, alone: bool) -> Context:
    taken_back = [back for level in _TAKING_BACK for back in found[level]]
    if place.pattern.level != "unneeded" and any(_takes_back(text, back, place) for back in taken_back):
        return "negated"
    sentence = text.sentences[place.first]
    if any(asks.first < place.first and text.sentences[asks.first] == sentence for asks in found["question"]):
        return "asked"
    for condition in found["condition"]:
        if text.sentences[condition.first] != sentence:
            continue
        if condition.pattern.category == "sign" and _meets(condition, taken_back):
            continue
        even = _meets(condition, found["even_if"])
        if even and urgency:
            # "حتى لو تحسن فإلى الطوارئ" sends him there all the same; "حتى لو خف فهو طبيعي" is no plain statement.
            continue
        if condition.pattern.category == "sign" and urgency and alone and _near_time(text, place, found):
            # "بروز العين يعني الطوارئ حالا" is about this eye, "البراز الأسود يعني الطوارئ" about any stool to come.
            continue
        if condition.first < place.first:
            return "conditional"
        opening = text.words[condition.first]
        follows = opening in _IN or opening[0] not in "وف" or condition.first <= place.last
        same_clause = text.clauses[condition.first] == text.clauses[place.last]
        if follows and same_clause and condition.first - place.last <= _CONDITION_AFTER:
            return "conditional"
    return "stated"


def _denies(text: Text, back: _Place) -> bool:
    """Whether an expression that takes back does so: in one clause, and without an exception inside."""
    inside = text.words[back.first : back.last + 1]
    return text.clauses[back.first] == text.clauses[back.last] and _BUT.isdisjoint(inside)


def _takes_back(text: Text, back: _Place, place: _Place) -> bool:
    """By a word in common; of a referral also what follows at once: "لا داعي لمراجعة الطبيب في المستشفى"."""
    if _meets(place, [back]):
        return True
    follows = back.first < place.first <= back.last + _DENIED_AFTER
    return follows and place.pattern.level in REFERRALS and text.clauses[back.last] == text.clauses[place.first]


def _times(text: Text, place: _Place, time: _Place) -> bool:
    """Whether a time belongs to a referral: in its clause, shortly after it, or right before it without "and"."""
    if text.clauses[time.first] != text.clauses[place.last]:
        return False
    if time.first >= place.first:
        return time.first - place.last <= _TIME_AFTER
    joined = text.words[place.first].startswith("و") and not text.words[place.first].startswith("وصل")
    return not joined and place.first - time.last <= _TIME_BEFORE


def _near_time(text: Text, place: _Place, found: dict[str, list[_Place]]) -> bool:
    return any(_times(text, place, time) for time in (*found["time_now"], *found["time_today"]))


def _meets(place: _Place, others: Sequence[_Place]) -> bool:
    """Whether one of the others has a word in common with it."""
    return any(not set(place.positions).isdisjoint(other.positions) for other in others)


def _without_doubles(places: Sequence[_Place]) -> list[_Place]:
    """One place of those that say one thing twice, in the order of the answer.

    Of referrals with a word in common the most urgent, and of these the shortest: "خذ المسكن وراجع الطبيب" is not to be
    taken to the doctor. Of reassurances the longest.
    """
    referrals = [place for place in places if place.pattern.level in REFERRALS]
    referrals.sort(key=lambda place: (-REFERRALS[place.pattern.level], place.last - place.first))
    reassurances = [place for place in places if place.pattern.level in REASSURANCE]
    reassurances.sort(key=lambda place: -len(place.positions))
    kept: list[_Place] = []
    for kind in (referrals, reassurances):
        alone: list[_Place] = []
        for place in kind:
            if not _meets(place, alone):
                alone.append(place)
        kept += alone
    return sorted(kept, key=lambda place: (place.first, place.last))
