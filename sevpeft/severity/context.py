"""Whether an expression says that the patient has this now, by the words around it.

"لا أعاني من ضيق تنفس", "كان عندي نزيف من سنة وخف", "والدي توفي بجلطة" and "هل ممكن يسبب جلطة؟" name red flags that
are not there; "لو في خطورة؟" asks for one. Each rule looks at a few words around the expression, in its clause or
sentence. Where a rule is in doubt, the expression counts: an emergency that is taken for a denial costs more than a
denial taken for an emergency. What is handled, and what is not, is listed in lexicons/README.md.

A word that matters here is a cue, or several: "كان" speaks of having and of the past. The cues of each word are in
lexicons/words_ar.tsv.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import Literal

from sevpeft.severity.words import WORD_LISTS, Remembered, Text

Context = Literal["stated", "negated", "other", "past", "hypothetical", "asked"]

# How far a denial reaches: "ما عندي لا حرارة ولا كحة ولا ضيق نفس" and the like.
_DENIAL_REACH = 6


class _Bits(dict[str, int]):
    """Names of cues, with a blank between two → their bits together."""

    def __missing__(self, names: str) -> int:
        self[names] = reduce(or_, map(self.__getitem__, names.split()))
        return self[names]


def _read_cues() -> tuple[_Bits, dict[str, int]]:
    """The bit of every cue, and for every word the bits of its cues."""
    bits, cues = _Bits(), dict[str, int]()
    for name, words in WORD_LISTS.items():
        if name.startswith("cue:"):
            bit = bits.setdefault(name[4:].rstrip("+"), 1 << len(bits))
            forms = [form for word in words for form in (word, *(("و" + word, "ف" + word) if name[-1] == "+" else ()))]
            for form in forms:
                # "ولا" is a cue of its own, and not "and no".
                if form != "ولا" or form in words:
                    cues[form] = cues.get(form, 0) | bit
    return bits, cues


BITS, _CUES = _read_cues()


def _cues_of(word: str) -> int:
    """The cues of a word, as bits. Joined spellings ("ماعندي", "لايوجد") deny as the parted ones do."""
    cues = _CUES.get(word, 0)
    if word.endswith("ش") and len(word) > 3:
        # ما كاينش, ما نخممش: the end of a negation around the verb.
        cues |= _CUES.get(word[:-1], 0)
    stem = word[1:] if word[0] in "وف" else word
    if stem.startswith(("عند", "بعند")):
        cues |= BITS["has"]
    elif stem.startswith(("ما", "لا")) and len(stem) > 4:
        rest = stem[2:]
        if rest.startswith("عند") or (_CUES.get(rest, 0) & BITS["has"] and rest != "لها"):
            cues |= BITS["without"]
    return cues


_CUES_OF = Remembered(_cues_of)


class ContextRules:
    """The rules for one question; made when something has matched, since most words of most questions are no cues."""

    def __init__(self, text: Text) -> None:
        self._words, self._asking = text.words, text.asking
        self._clauses, self._sentences = text.clauses, text.sentences
        self._cues = list(map(_CUES_OF.__getitem__, text.words))
        # What looks for a cue goes through these alone.
        self._cued = [(position, cues) for position, cues in enumerate(self._cues) if cues]
        self._any = reduce(or_, {cues for _, cues in self._cued}, 0)
        self._denials = self._find_denials() if self._any & BITS["not nor without except"] else []
        self._dates = set(self._find_dates() if self._any & BITS["formerly year long"] else ())

    def context(self, positions: Sequence[int], category: str, *, critical: bool = True) -> Context:
        """Whether an expression, by the positions of its words, is stated, and if not, why not."""
        first, last = positions[0], positions[-1]
        if self._denials and self._negated(positions):
            return "negated"
        # "صعوبة في بلع الدواء", "لازم اخد شريط": nothing was swallowed.
        if category == "poisoning_bites" and self._is(first - 1 - self._is(first - 1, "into"), "hard"):
            return "asked"
        if self._any & BITS["died family kin"] and category != "pregnancy" and self._other(first, last):
            return "other"
        past = self._any & BITS["recovered was before event formerly gone_year"]
        if past and (self._is_over(first, last) or self._dated(first, last)):
            return "past"
        # Whoever asks whether there is danger has not said that there is.
        if category == "danger" and self._asks_for_danger(first, last):
            return "asked"
        doubtful = self._any & BITS["fear cause be"] and self._possible(first)
        if critical and self._any & BITS["whether choice"]:
            doubtful = doubtful or self._asks_whether(first, last)
        # Thoughts of suicide are often told as a fear or a possibility; they count all the same.
        if doubtful and category != "suicidal":
            return "asked" if category == "danger" else "hypothetical"
        return "stated"

    def _is(self, position: int, cues: str) -> bool:
        return 0 <= position < len(self._cues) and bool(self._cues[position] & BITS[cues])

    def _near(self, first: int, last: int, cues: str, within: tuple[int, int] | None = None) -> list[int]:
        """Positions from `first` to `last`, those outside `within` left out, with one of the cues."""
        bits = BITS[cues]
        if not self._any & bits:
            return []
        if within:
            first, last = max(first, within[0]), min(last, within[1])
        return [position for position, found in self._cued if found & bits and first <= position <= last]

    # Negation

    def _find_denials(self) -> list[tuple[int, int, int]]:
        """(position, first position denied, last position denied) of every word that denies."""
        found: list[tuple[int, int, int]] = []
        words = ["", *self._words, ""]
        for position in self._near(0, len(self._words), "not nor without except"):
            cues, (before, word, after) = self._cues[position], words[position : position + 3]
            wide = bool(cues & BITS["without"]) or (word == "غير" and self._is(position - 1, "since"))
            denies = wide or bool(cues & BITS["not"])
            if cues & BITS["nor"]:
                denies = self._means_nor(position, [denial for denial, _, _ in found])
            # "كل ما"; "عمري ما شفت زيه": never before, but now; "ماشي على الطريق".
            denies = denies and not (word in ("ما", "وما") and self._is(position - 1, "when"))
            denies = denies and not before.startswith(("عمر", "وعمر"))
            if not denies or (word == "ماشي" and after.startswith("ع")):
                continue
            start = position + 1
            while self._is(start, "filler has feels") or (start > position + 1 and self._is(start, "since")):
                wide = wide or self._is(start, "has feels")
                start += 1
            if wide or not self._is(position + 1, "what"):
                found.append((position, position + 1, self._reach(position, start) if wide else start))
        return found

    def _means_nor(self, position: int, denials: Sequence[int]) -> bool:
        """Whether "ولا" denies: it is "nor" after a denial, and "or" in a question."""
        same_sentence = any(self._sentences[other] == self._sentences[position] for other in denials)
        if same_sentence or self._is(position + 1, "has feels"):
            return True
        # "عندي كتلة ولا ألم فيها" without a denial before; not "هل هي كتلة ولا ألم فيها؟".
        sentence = _extent(self._sentences, position)
        inside = self._is(position + 1, "sign") and self._near(position + 2, position + 3, "inside", sentence)
        having = inside and self._near(sentence[0], position - 1, "has feels")
        return bool(having) and not self._near(*sentence, "asks")

    def _reach(self, denial: int, start: int) -> int:
        last = start
        for position in range(start, min(denial + 1 + _DENIAL_REACH, len(self._words))):
            if self._clauses[position] != self._clauses[denial] and not self._is(position, "or"):
                break
            if self._is(position, "but") or (position > start and self._is(position, "has feels")):
                break
            last = position
            if self._is(position, "all"):
                # "مفيش امراض مزمنه" denies what it names and no complaint that follows without a comma.
                return position + 1
        return last

    def _negated(self, positions: Sequence[int]) -> bool:
        first, last = positions[0], positions[-1]
        for denial, start, end in self._denials:
            if denial in positions:
                continue
            if start <= first <= end and self._sentences[first] == self._sentences[denial]:
                return True
            inside = first < denial < last and any(start <= position <= end for position in positions)
            # In "ما عم يطلع ولا نقطة بول" the denial is the complaint.
            if inside and not any(self._is(position, "not nor without except") for position in positions):
                return True
            # "ضيق نفس ما عندي", "نزيف لا يوجد": the denial comes last and nothing follows it.
            if denial == last + 1 and (self._is(denial + 1, "has") or self._is(denial, "without")):
                after = denial + 1
                while self._is(after, "has filler"):
                    after += 1
                clause = self._clauses[last]
                if self._clauses[denial] == clause and self._clauses[after : after + 1] != [clause]:
                    return True
        # "لا حرارة او كحة": the second thing of a list whose first is denied.
        listed = first > 0 and self._words[first - 1] == "او"
        return listed and any(start <= first - 2 <= end for _, start, end in self._denials)

    # Somebody else, another time, no fact

    def _other(self, first: int, last: int) -> bool:
        sentence, clause = _extent(self._sentences, first), _extent(self._clauses, first)
        kin = self._near(first - 6, first - 1, "kin", sentence)
        # A parent, a partner or a child who has this is the patient; an aunt or a friend who had it is a worry.
        remote = any(self._is(position, "remote") for position in kin) and not self._near(*clause, "now")
        return bool(
            self._near(first - 5, first - 1, "died", sentence)
            or self._near(first - 4, last + 3, "family", sentence)
            or (kin and self._near(last + 1, last + 5, "died", sentence))
            or (remote and (self._had(kin[0], first) or self._near(first - 3, first - 1, "befell", (kin[0], first))))
        )

    def _had(self, begin: int, first: int) -> bool:
        """Whether "كان عندي" and the like stand before the expression; "كنت ماشي" only sets the scene."""
        # "كان في نزيف" there was; "كنت في الشغل" I was at work.
        return any(
            (position + 1 == first or self._is(position + 1, "has feels"))
            and self._words[position : position + 2] != ["كنت", "في"]
            for position in self._near(first - 4, first - 1, "was", (begin, first))
        )

    def _is_over(self, first: int, last: int) -> bool:
        """Whether the patient recovered or it went, and has not come back: "تعافيت من الجلطة", "كان عندي نزيف وخف"."""
        sentence = _extent(self._sentences, first)
        recovered = self._near(first - 3, last + 8, "recovered", sentence)
        # "ضيق تنفس بعد ما تعافيت" began after it.
        ends = [[position for position in recovered if position < first or not self._is(position - 1, "after")]]
        went = self._near(last + 1, last + 8, "went", sentence)
        if went and self._had(sentence[0], first):
            # "خف نص ساعة", "راح المستشفى" are no end of it.
            ends.append([position for position in went if not self._is(position + 1, "not_gone")])
        return any(found and not self._near(found[-1], found[-1] + 4, "again", sentence) for found in ends)

    def _dated(self, first: int, last: int) -> bool:
        """Whether its clause tells of another time: "قبل سنتين", "من سنتين عملت"."""
        before = (self._clauses[first], "before") in self._dates
        if not before and (self._clauses[first], "since") not in self._dates:
            return False
        begin, end = _extent(self._clauses, first)
        # "قبل سنتين عملت عملية وعندي ضيق تنفس": the operation is past.
        having = self._near(begin, first - 1, "has feels")
        another = any(self._words[position][0] == "و" and not self._is(position, "was") for position in having)
        if another or self._near(begin, end, "now"):
            return False
        return before or any(position < last for position in self._near(begin, end, "event"))

    def _find_dates(self) -> Iterator[tuple[int, str]]:
        """The clauses that have a date: "before" for "قبل سنتين" or "العام الماضي", "since" for "من سنتين".

        What was since two years may last until today.
        """
        for position in self._near(0, len(self._words), "formerly gone_year since before"):
            clause = self._clauses[position]
            formerly = self._is(position, "formerly") and not self._is(position - 1, "since")
            if formerly or (self._is(position, "gone_year") and self._near(position - 2, position - 1, "year")):
                yield clause, "before"
            elif self._is(position, "since before"):
                # "من سنتين", "من 3 سنين".
                units = [step for step in (1, 2) if self._is(position + step, "long")]
                if units and self._clauses[position + units[0]] == clause:
                    yield clause, "before" if self._is(position, "before") else "since"

    def _possible(self, first: int) -> bool:
        """Whether it is feared, a possibility or to be prevented: "خايف من الجلطة", "هل ممكن تكون جلطة"."""
        clause = _extent(self._clauses, first)
        fears, being = self._near(first - 5, first - 1, "fear", clause), self._near(first - 3, first - 1, "be", clause)
        return bool(
            (fears and self._near(fears[-1] + 1, first - 1, "of"))
            or self._near(first - 3, first - 1, "cause", clause)
            or (being and self._near(being[-1] - 4, being[-1] - 1, "may", clause))
        )

    def _asks_for_danger(self, first: int, last: int) -> bool:
        """Whether its clause asks for danger: "هل هذا خطر", "لو في خطورة", "خطير ولا لا", "في خطر عليا؟"."""
        clause = _extent(self._clauses, first)
        asking = self._near(first - 4, first - 1, "whether", clause) + self._near(first - 3, first - 1, "if", clause)
        before, after = self._near(first - 3, first - 1, "choice", clause), self._near(last + 1, last + 3, "choice")
        # A question mark asks for the last words before it, not for the whole sentence.
        _, closing = _extent(self._sentences, last)
        short = closing == last or (closing <= last + 2 and self._is(last + 1, "onto"))
        return (
            # "لو سمحت حالته خطيره", "ممكن حد يرد" ask for something else.
            any(not self._is(position + 1, "polite") for position in asking)
            or (clause[0] < first and self._is(first - 1, "degree"))
            or any(first - position < 3 or self._is(position - 1, "plain") for position in before)
            or any(self._is(position + 1, "plain degree not") for position in after)
            # "الكيس دا خطير او خلقي"
            or (last + 1 in after and self._is(first - 1, "this"))
            or (short and self._sentences[last] in self._asking)
        )

    def _asks_whether(self, first: int, last: int) -> bool:
        """Whether it is all that is asked: "هل هذه جلطة", "عندي جلطة ولا لا", "هل ده شد عضلي ولا جلطة"."""
        begin, end = _extent(self._clauses, last)
        chosen = self._is(last + 1, "choice")
        if chosen and self._is(last + 2, "plain"):
            return True
        before = first - 1 - self._is(first - 1, "this has feels")
        # One more word may name its kind: "هل عندي ذبحة صدرية"; in "هل هذا النزيف طبيعي" it is there.
        kind = before == first - 2 and last + 1 == end and not self._is(end, "plain")
        if last != end and not chosen and (not kind or self._words[first].startswith("ال")):
            return False
        if before >= begin and self._is(before, "whether"):
            return True
        asking = self._near(first - 6, first - 2, "whether", (begin, end))
        return self._is(first - 1, "choice") and any(self._is(position + 1, "this") for position in asking)


def _extent(numbers: Sequence[int], position: int) -> tuple[int, int]:
    """First and last position of the clause or sentence of a word, given the number of each word's."""
    number = numbers[position]
    return bisect_left(numbers, number), bisect_right(numbers, number) - 1
