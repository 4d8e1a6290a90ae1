"""From where an expression stands in a question to whether it says that the patient has this now.

"لا أعاني من ضيق تنفس", "كان عندي نزيف من سنة وخف", "والدي توفي بجلطة" and "هل ممكن يسبب جلطة؟" name red flags that
are not there. Each rule looks at a few words around the expression, in its clause or sentence. Where a rule is
in doubt, the expression counts: an emergency that is taken for a denial costs more than a denial taken for an
emergency. What is handled, and what is not, is listed in lexicons/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from sevpeft.severity.cues import BIT, cue_of
from sevpeft.severity.words import Text

Context = Literal["stated", "negated", "other", "past", "hypothetical"]

# How far a denial reaches: "ما عندي لا حرارة ولا كحة ولا ضيق نفس" and the like.
DENIAL_REACH = 6
# Thoughts of suicide are often told as a fear or a possibility; they count all the same.
NEVER_HYPOTHETICAL = frozenset({"suicidal"})

_NOT, _NOR, _WITHOUT, _HAS = (BIT[name] for name in ("not", "nor", "without", "has"))
_DENIES = _NOT | _NOR | _WITHOUT | BIT["except"]
_OF_THE_PAST = sum(BIT[name] for name in ("before", "was", "event", "recovered", "formerly", "gone_year"))
_OF_OTHERS = sum(BIT[name] for name in ("died", "family", "kin"))
_OF_THE_POSSIBLE = sum(BIT[name] for name in ("fear", "cause", "be"))
# What in "كل ما", "بعد ما", "زي ما" is no negation.
_WHEN = "كل بعد قبل زي مثل متل اول وقت حسب ساعه يوم عند كيف قد ساعات لحد مجرد وبعد وكل عشان"
_AFTER = frozenset(("ما", "بعد", "منذ", "لما", "ان", "من"))
_NO_NEGATION_AFTER = frozenset(_WHEN.split())


class Surroundings:
    """The cues of one question; made when something has matched, since most words of most questions are none."""

    def __init__(self, text: Text) -> None:
        self._words = text.words
        self._clauses = text.clauses
        self._sentences = text.sentences
        self._cues = [cue_of(word) for word in text.words]
        self._any = 0
        for cue in self._cues:
            self._any |= cue
        self._negators = self._find_negators() if self._any & _DENIES else []

    def context(self, positions: Sequence[int], category: str = "") -> Context:
        """Whether an expression, by the positions of its words, is stated, and if not, why not."""
        if self._negated(positions):
            return "negated"
        if self._other(positions, category):
            return "other"
        if self._past(positions):
            return "past"
        if category not in NEVER_HYPOTHETICAL and self._hypothetical(positions[0]):
            return "hypothetical"
        return "stated"

    def _is(self, position: int, cue: int) -> bool:
        return 0 <= position < len(self._cues) and bool(self._cues[position] & cue)

    def _near(self, first: int, last: int, cue: int) -> list[int]:
        """Positions from `first` to `last` with such a cue."""
        if not self._any & cue:
            return []
        cues = self._cues
        return [position for position in range(max(first, 0), min(last, len(cues) - 1) + 1) if cues[position] & cue]

    @cached_property
    def _clause_of(self) -> dict[int, tuple[int, int]]:
        return _extents(self._clauses)

    @cached_property
    def _sentence_of(self) -> dict[int, tuple[int, int]]:
        return _extents(self._sentences)

    # Negation

    def _find_negators(self) -> list[tuple[int, int, int]]:
        """(position, first position denied, last position denied) of every negator."""
        found: list[tuple[int, int, int]] = []
        for position, word in enumerate(self._words):
            cue = self._cues[position]
            if not cue & _DENIES:
                continue
            wide = bool(cue & _WITHOUT) or (word == "غير" and self._is(position - 1, BIT["since"]))
            if cue & _NOR:
                # "ولا" is "nor" after a denial and "or" in a question.
                denied_before = any(self._sentences[other] == self._sentences[position] for other, _, _ in found)
                if not denied_before and not self._is(position + 1, BIT["has"] | BIT["feels"]):
                    continue
            elif not wide and not cue & _NOT:
                continue
            if word in ("ما", "وما") and position and self._words[position - 1] in _NO_NEGATION_AFTER:
                continue
            if position and self._words[position - 1].startswith(("عمر", "وعمر")):
                # "عمري ما شفت زيه": never before, but now.
                continue
            if word == "ماشي" and position + 1 < len(self._words) and self._words[position + 1].startswith("ع"):
                continue
            start = position + 1
            while self._is(start, BIT["filler"] | BIT["has"] | BIT["feels"]) or (
                start > position + 1 and self._is(start, BIT["since"])
            ):
                wide = wide or self._is(start, BIT["has"] | BIT["feels"])
                start += 1
            if not wide and self._is(position + 1, BIT["what"]):
                continue
            found.append((position, position + 1, self._reach(position, start) if wide else start))
        return found

    def _reach(self, negator: int, start: int) -> int:
        last = start
        for position in range(start, min(negator + 1 + DENIAL_REACH, len(self._words))):
            other_clause = self._clauses[position] != self._clauses[negator] and not self._is(position, BIT["or"])
            if (
                other_clause
                or self._is(position, BIT["but"])
                or (position > start and self._is(position, BIT["has"] | BIT["feels"]))
            ):
                break
            last = position
            if self._is(position, BIT["all"]):
                # "مفيش امراض مزمنه" denies what it names and no complaint that follows without a comma.
                return position + 1
        return last

    def _negated(self, positions: Sequence[int]) -> bool:
        if not self._negators:
            return False
        first, last = positions[0], positions[-1]
        # In "ما عم يطلع ولا نقطة بول" the denial is the complaint.
        denies = any(self._cues[position] & _DENIES for position in positions)
        for negator, start, end in self._negators:
            if negator in positions:
                continue
            if start <= first <= end and self._sentences[first] == self._sentences[negator]:
                return True
            if first < negator < last and not denies and any(start <= position <= end for position in positions):
                return True
            # "ضيق نفس ما عندي", "نزيف لا يوجد": the denial comes last and nothing follows it.
            if negator == last + 1 and (self._is(negator + 1, _HAS) or self._is(negator, _WITHOUT)):
                over = negator + 1
                while over < len(self._words) and self._is(over, BIT["has"] | BIT["filler"]):
                    over += 1
                whole = self._clauses[negator] == self._clauses[last]
                if whole and (over == len(self._words) or self._clauses[over] != self._clauses[last]):
                    return True
        return self._in_denied_list(first)

    def _in_denied_list(self, first: int) -> bool:
        """ "لا حرارة او كحة": the second thing of a list whose first is denied."""
        joined = self._words[first - 1] == "او" if first else False
        return joined and any(start <= first - 2 <= end for _, start, end in self._negators)

    # Somebody else, another time, no fact

    def _other(self, positions: Sequence[int], category: str) -> bool:
        if not self._any & _OF_OTHERS or category == "pregnancy":
            return False
        first, last = positions[0], positions[-1]
        begin, end = self._clause_of[self._clauses[first]]
        opening, closing = self._sentence_of[self._sentences[first]]
        if self._near(max(opening, first - 5), first - 1, BIT["died"]):
            return True
        if self._near(max(opening, first - 4), min(closing, last + 3), BIT["family"]):
            return True
        kin = self._near(max(opening, first - 6), first - 1, BIT["kin"])
        if not kin:
            return False
        if self._near(last + 1, min(closing, last + 5), BIT["died"]):
            return True
        # A parent, a partner or a child who has this is the patient; an aunt or a friend who had it is a worry.
        if not any(self._is(position, BIT["remote"]) for position in kin) or self._near(begin, end, BIT["now"]):
            return False
        return bool(self._had(kin[0], first) or self._near(max(kin[0], first - 3), first - 1, BIT["befell"]))

    def _had(self, begin: int, first: int) -> bool:
        """Whether "كان عندي" and the like stand before the expression; "كنت ماشي" only sets the scene."""
        was = self._near(max(begin, first - 4), first - 1, BIT["was"])
        # "كان في نزيف" there was; "كنت في الشغل" I was at work.
        was = [position for position in was if tuple(self._words[position : position + 2]) != ("كنت", "في")]
        return any(position + 1 == first or self._is(position + 1, _HAS | BIT["feels"]) for position in was)

    def _past(self, positions: Sequence[int]) -> bool:
        if not self._any & _OF_THE_PAST:
            return False
        first, last = positions[0], positions[-1]
        begin, end = self._clause_of[self._clauses[first]]
        opening, closing = self._sentence_of[self._sentences[first]]
        recovered = self._near(max(opening, first - 3), min(closing, last + 8), BIT["recovered"])
        # "ضيق تنفس بعد ما تعافيت" began after it.
        recovered = [position for position in recovered if position < first or self._words[position - 1] not in _AFTER]
        if recovered and not self._near(recovered[-1], min(closing, recovered[-1] + 4), BIT["again"]):
            return True
        went = self._near(last + 1, min(closing, last + 8), BIT["went"])
        # "خف نص ساعة", "راح المستشفى" are no end of it.
        went = [position for position in went if not self._is(position + 1, BIT["not_gone"])]
        if (
            went
            and self._had(opening, first)
            and not self._near(went[-1] + 1, min(closing, went[-1] + 4), BIT["again"])
        ):
            return True
        if self._near(begin, end, BIT["now"]):
            return False
        # "قبل سنتين عملت عملية وعندي ضيق تنفس": the operation is past.
        having = self._near(begin, first - 1, _HAS | BIT["feels"])
        if any(self._words[position][0] == "و" and not self._is(position, BIT["was"]) for position in having):
            return False
        long_ago = self._long_ago(begin, end)
        if long_ago == "before":
            return True
        event = self._near(max(opening, begin), end, BIT["event"])
        return long_ago == "since" and any(position < last for position in event)

    def _long_ago(self, begin: int, end: int) -> str:
        """ "before" for "قبل سنتين" or "العام الماضي", "since" for "من سنتين", which may last until today."""
        said = ""
        for position in self._near(begin, end, BIT["formerly"] | BIT["gone_year"] | BIT["before"] | BIT["since"]):
            if self._is(position, BIT["formerly"]) and not self._is(position - 1, BIT["since"]):
                return "before"
            if self._is(position, BIT["gone_year"]) and any(self._is(position - back, BIT["year"]) for back in (1, 2)):
                return "before"
            if self._is(position, BIT["before"] | BIT["since"]):
                # "من سنتين", "من 3 سنين".
                units = [step for step in (1, 2) if self._is(position + step, BIT["long"]) and position + step <= end]
                if units and self._is(position, BIT["before"]):
                    return "before"
                said = "since" if units else said
        return said

    def _hypothetical(self, first: int) -> bool:
        if not self._any & _OF_THE_POSSIBLE:
            return False
        begin, _ = self._clause_of[self._clauses[first]]
        fears = self._near(max(begin, first - 5), first - 1, BIT["fear"])
        if fears and self._near(fears[-1] + 1, first - 1, BIT["of"]):
            return True
        if self._near(max(begin, first - 3), first - 1, BIT["cause"]):
            return True
        being = self._near(max(begin, first - 3), first - 1, BIT["be"])
        return bool(being) and bool(self._near(max(begin, being[-1] - 4), being[-1] - 1, BIT["may"]))


def _extents(numbers: Sequence[int]) -> dict[int, tuple[int, int]]:
    """First and last position of each clause or sentence, by its number."""
    if not numbers or numbers[0] == numbers[-1]:
        return {number: (0, len(numbers) - 1) for number in numbers[:1]}
    extents: dict[int, tuple[int, int]] = {}
    for position, number in enumerate(numbers):
        extents[number] = (extents[number][0] if number in extents else position, position)
    return extents
