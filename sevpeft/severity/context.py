"""From where an expression stands in a question to whether it says that the patient has this now.

"لا أعاني من ضيق تنفس", "كان عندي نزيف من سنة وخف", "والدي توفي بجلطة" and "هل ممكن يسبب جلطة؟" name red flags that
are not there; "لو في خطورة؟" asks for one. Each rule looks at a few words around the expression, in its clause or
sentence. Where a rule is in doubt, the expression counts: an emergency that is taken for a denial costs more than a
denial taken for an emergency. What is handled, and what is not, is listed in lexicons/README.md.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal

from sevpeft.severity.cues import BIT, CUES
from sevpeft.severity.words import Text

Context = Literal["stated", "negated", "other", "past", "hypothetical", "asked"]

# How far a denial reaches: "ما عندي لا حرارة ولا كحة ولا ضيق نفس" and the like.
DENIAL_REACH = 6
# Thoughts of suicide are often told as a fear or a possibility; they count all the same.
NEVER_HYPOTHETICAL = frozenset({"suicidal"})
# Words that are no complaint: whoever asks whether there is danger has not said that there is.
_DANGER = "danger"
_SWALLOWED = "poisoning_bites"

_NOT, _NOR, _WITHOUT, _HAS = (BIT[name] for name in ("not", "nor", "without", "has"))
_HAVING = _HAS | BIT["feels"]
_BUT, _OR, _ALL = BIT["but"], BIT["or"], BIT["all"]
_DENIES = _NOT | _NOR | _WITHOUT | BIT["except"]
_OF_THE_PAST = sum(BIT[name] for name in ("before", "was", "event", "recovered", "formerly", "gone_year"))
_SINCE = BIT["since"] | BIT["before"]
_DATES = sum(BIT[name] for name in ("formerly", "year", "long"))
_OF_OTHERS = sum(BIT[name] for name in ("died", "family", "kin"))
_OF_THE_POSSIBLE = sum(BIT[name] for name in ("fear", "cause", "be"))
_OF_QUESTIONS = BIT["whether"] | BIT["choice"]
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
        self._asking = text.asking
        self._cues = list(map(CUES.__getitem__, text.words))
        # Most words are no cue: what looks for one goes through these alone.
        self._cued = [(position, cue) for position, cue in enumerate(self._cues) if cue]
        self._any = 0
        for _, cue in self._cued:
            self._any |= cue
        self._negators = self._find_negators() if self._any & _DENIES else []
        self._dates = self._find_dates() if self._any & _DATES else set()

    def context(self, positions: Sequence[int], category: str = "", *, critical: bool = True) -> Context:
        """Whether an expression, by the positions of its words, is stated, and if not, why not."""
        if self._negators and self._negated(positions):
            return "negated"
        # "صعوبة في بلع الدواء", "لازم اخد شريط": nothing was swallowed.
        before = positions[0] - 1 - self._is(positions[0] - 1, BIT["into"])
        if category == _SWALLOWED and self._is(before, BIT["hard"]):
            return "asked"
        if self._any & _OF_OTHERS and self._other(positions, category):
            return "other"
        if self._any & _OF_THE_PAST and self._past(positions):
            return "past"
        if category == _DANGER and self._asked(positions[0], positions[-1]):
            return "asked"
        doubtful = self._any & _OF_THE_POSSIBLE and self._hypothetical(positions[0])
        if critical and self._any & _OF_QUESTIONS:
            doubtful = doubtful or self._asked_if(positions[0], positions[-1])
        if doubtful and category not in NEVER_HYPOTHETICAL:
            return "asked" if category == _DANGER else "hypothetical"
        return "stated"

    def _is(self, position: int, cue: int) -> bool:
        return 0 <= position < len(self._cues) and bool(self._cues[position] & cue)

    def _near(self, first: int, last: int, cue: int) -> list[int]:
        """Positions from `first` to `last` with such a cue."""
        if not self._any & cue:
            return []
        return [position for position, found in self._cued if found & cue and first <= position <= last]

    def _clause_of(self, position: int) -> tuple[int, int]:
        return _extent(self._clauses, position)

    def _sentence_of(self, position: int) -> tuple[int, int]:
        return _extent(self._sentences, position)

    # Negation

    def _find_negators(self) -> list[tuple[int, int, int]]:
        """(position, first position denied, last position denied) of every negator."""
        found: list[tuple[int, int, int]] = []
        for position, cue in self._cued:
            if not cue & _DENIES:
                continue
            word = self._words[position]
            wide = bool(cue & _WITHOUT) or (word == "غير" and self._is(position - 1, BIT["since"]))
            if cue & _NOR:
                if not self._means_nor(position, [negator for negator, _, _ in found]):
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
            while self._is(start, BIT["filler"] | _HAVING) or (start > position + 1 and self._is(start, BIT["since"])):
                wide = wide or self._is(start, _HAVING)
                start += 1
            if not wide and self._is(position + 1, BIT["what"]):
                continue
            found.append((position, position + 1, self._reach(position, start) if wide else start))
        return found

    def _means_nor(self, position: int, negators: Sequence[int]) -> bool:
        """Whether "ولا" denies: it is "nor" after a denial, and "or" in a question."""
        if any(self._sentences[other] == self._sentences[position] for other in negators):
            return True
        if self._is(position + 1, _HAVING):
            return True
        # "عندي كتلة ولا ألم فيها" without a denial before; not "هل هي كتلة ولا ألم فيها؟".
        opening, closing = self._sentence_of(position)
        return (
            self._is(position + 1, BIT["sign"])
            and bool(self._near(position + 2, min(closing, position + 3), BIT["inside"]))
            and bool(self._near(opening, position - 1, _HAVING))
            and not self._near(opening, closing, BIT["asks"])
        )

    def _reach(self, negator: int, start: int) -> int:
        last, clause = start, self._clauses[negator]
        for position in range(start, min(negator + 1 + DENIAL_REACH, len(self._words))):
            cue = self._cues[position]
            if self._clauses[position] != clause and not cue & _OR:
                break
            if cue & _BUT or (position > start and cue & _HAVING):
                break
            last = position
            if cue & _ALL:
                # "مفيش امراض مزمنه" denies what it names and no complaint that follows without a comma.
                return position + 1
        return last

    def _negated(self, positions: Sequence[int]) -> bool:
        first, last = positions[0], positions[-1]
        for negator, start, end in self._negators:
            if negator in positions:
                continue
            if start <= first <= end and self._sentences[first] == self._sentences[negator]:
                return True
            inside = first < negator < last and any(start <= position <= end for position in positions)
            # In "ما عم يطلع ولا نقطة بول" the denial is the complaint.
            if inside and not any(self._cues[position] & _DENIES for position in positions):
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
        first, last = positions[0], positions[-1]
        if category == "pregnancy" or not self._near(first - 6, last + 3, _OF_OTHERS):
            return False
        opening, closing = self._sentence_of(first)
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
        if not any(self._is(position, BIT["remote"]) for position in kin):
            return False
        if self._near(*self._clause_of(first), BIT["now"]):
            return False
        return bool(self._had(kin[0], first) or self._near(max(kin[0], first - 3), first - 1, BIT["befell"]))

    def _had(self, begin: int, first: int) -> bool:
        """Whether "كان عندي" and the like stand before the expression; "كنت ماشي" only sets the scene."""
        was = self._near(max(begin, first - 4), first - 1, BIT["was"])
        # "كان في نزيف" there was; "كنت في الشغل" I was at work.
        was = [position for position in was if tuple(self._words[position : position + 2]) != ("كنت", "في")]
        return any(position + 1 == first or self._is(position + 1, _HAVING) for position in was)

    def _past(self, positions: Sequence[int]) -> bool:
        first, last = positions[0], positions[-1]
        return (
            bool(self._any & BIT["recovered"] and self._recovered(first, last))
            or bool(self._any & BIT["went"] and self._went(first, last))
            or bool(self._dates and self._happened(first, last))
        )

    def _recovered(self, first: int, last: int) -> bool:
        opening, closing = self._sentence_of(first)
        recovered = self._near(max(opening, first - 3), min(closing, last + 8), BIT["recovered"])
        # "ضيق تنفس بعد ما تعافيت" began after it.
        recovered = [position for position in recovered if position < first or self._words[position - 1] not in _AFTER]
        return bool(recovered) and not self._near(recovered[-1], min(closing, recovered[-1] + 4), BIT["again"])

    def _went(self, first: int, last: int) -> bool:
        opening, closing = self._sentence_of(first)
        went = self._near(last + 1, min(closing, last + 8), BIT["went"])
        # "خف نص ساعة", "راح المستشفى" are no end of it.
        went = [position for position in went if not self._is(position + 1, BIT["not_gone"])]
        if not went or not self._had(opening, first):
            return False
        return not self._near(went[-1] + 1, min(closing, went[-1] + 4), BIT["again"])

    def _happened(self, first: int, last: int) -> bool:
        """Whether its clause tells of another time: "قبل سنتين", "من سنتين عملت"."""
        clause = self._clauses[first]
        before = (clause, "before") in self._dates
        if not before and (clause, "since") not in self._dates:
            return False
        begin, end = self._clause_of(first)
        if self._near(begin, end, BIT["now"]):
            return False
        # "قبل سنتين عملت عملية وعندي ضيق تنفس": the operation is past.
        having = self._near(begin, first - 1, _HAVING)
        if any(self._words[position][0] == "و" and not self._is(position, BIT["was"]) for position in having):
            return False
        return before or any(position < last for position in self._near(begin, end, BIT["event"]))

    def _find_dates(self) -> set[tuple[int, str]]:
        """The clauses that have a date: "before" for "قبل سنتين" or "العام الماضي", "since" for "من سنتين".

        What was since two years may last until today.
        """
        found = set()
        for position, cue in self._cued:
            clause = self._clauses[position]
            formerly = cue & BIT["formerly"] and not self._is(position - 1, BIT["since"])
            if formerly or (cue & BIT["gone_year"] and self._near(position - 2, position - 1, BIT["year"])):
                found.add((clause, "before"))
            elif cue & _SINCE:
                # "من سنتين", "من 3 سنين".
                units = [step for step in (1, 2) if self._is(position + step, BIT["long"])]
                if units and self._clauses[position + units[0]] == clause:
                    found.add((clause, "before" if cue & BIT["before"] else "since"))
        return found

    def _hypothetical(self, first: int) -> bool:
        if not self._near(first - 5, first - 1, _OF_THE_POSSIBLE):
            return False
        begin, _ = self._clause_of(first)
        fears = self._near(max(begin, first - 5), first - 1, BIT["fear"])
        if fears and self._near(fears[-1] + 1, first - 1, BIT["of"]):
            return True
        if self._near(max(begin, first - 3), first - 1, BIT["cause"]):
            return True
        being = self._near(max(begin, first - 3), first - 1, BIT["be"])
        return bool(being) and bool(self._near(max(begin, being[-1] - 4), being[-1] - 1, BIT["may"]))

    def _asked(self, first: int, last: int) -> bool:
        """Whether its clause asks for danger: "هل هذا خطر", "لو في خطورة", "خطير ولا لا", "في خطر عليا؟"."""
        begin, _ = self._clause_of(first)
        asking = self._near(max(begin, first - 4), first - 1, BIT["whether"])
        asking += self._near(max(begin, first - 3), first - 1, BIT["if"])
        # "لو سمحت حالته خطيره", "ممكن حد يرد" ask for something else.
        if any(not self._is(position + 1, BIT["polite"]) for position in asking):
            return True
        if begin < first and self._is(first - 1, BIT["degree"]):
            return True
        choices = self._near(max(begin, first - 3), first - 1, BIT["choice"])
        if any(first - position < 3 or self._is(position - 1, BIT["plain"]) for position in choices):
            return True
        choices = self._near(last + 1, last + 3, BIT["choice"])
        if any(self._is(position + 1, BIT["plain"] | BIT["degree"] | _NOT) for position in choices):
            return True
        # "الكيس دا خطير او خلقي"
        if last + 1 in choices and self._is(first - 1, BIT["this"]):
            return True
        # A question mark asks for the last words before it, not for the whole sentence.
        _, closing = self._sentence_of(last)
        short = closing == last or (closing <= last + 2 and self._is(last + 1, BIT["onto"]))
        return short and self._sentences[last] in self._asking

    def _asked_if(self, first: int, last: int) -> bool:
        """Whether it is all that is asked: "هل هذه جلطة", "عندي جلطة ولا لا", "هل ده شد عضلي ولا جلطة"."""
        begin, end = self._clause_of(last)
        chosen = self._is(last + 1, BIT["choice"])
        if chosen and self._is(last + 2, BIT["plain"]):
            return True
        before = first - 1 - self._is(first - 1, BIT["this"] | _HAVING)
        # One more word may name its kind: "هل عندي ذبحة صدرية"; in "هل هذا النزيف طبيعي" it is there.
        kind = before == first - 2 and last + 1 == end and not self._is(end, BIT["plain"])
        if last != end and not chosen and (not kind or self._words[first].startswith("ال")):
            return False
        if before >= begin and self._is(before, BIT["whether"]):
            return True
        asking = self._near(max(begin, first - 6), first - 2, BIT["whether"])
        return self._is(first - 1, BIT["choice"]) and any(self._is(position + 1, BIT["this"]) for position in asking)


def _extent(numbers: Sequence[int], position: int) -> tuple[int, int]:
    """First and last position of the clause or sentence of a word, given the number of each word's."""
    number = numbers[position]
    return bisect_left(numbers, number), bisect_right(numbers, number) - 1
