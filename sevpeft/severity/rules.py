"""Computes severity probabilities of a question from a lexicon's expressions in it, which are also the reasons.

The evidence of a match depends on the strength of its row and on its context. Only the strongest match of each category
counts. E is the sum over the categories of a level, and evidence of worse levels reduces that of milder ones:

    e_critical = E_critical,  e_neutral = E_neutral / (1 + e_critical),
    e_non_critical = E_non_critical / (1 + e_critical + E_neutral)
    p_level ∝ prior_level · (1 + e_level) ^ power_level.

No probability is ever 0 or 1, and one more stated red flag never lowers p_critical. The constants were chosen by hand;
`classifier fit` calibrates these probabilities on labels.

The context of an expression: it is stated, or denied ("لا أعاني من ضيق تنفس"), past ("كان عندي نزيف من سنة وخف"),
about another person ("والدي توفي بجلطة") or a question ("هل ممكن يسبب جلطة؟"). The rules look for cues
(lexicons/words_ar.tsv) in the words around it. In doubt it is stated: a missed emergency costs more than a false alarm.
"""

from __future__ import annotations

import shutil
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, lru_cache, reduce
from operator import or_
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sevpeft.severity.lexicon import PACKAGE_LEXICON, POINT, REMEMBERED, WORD_LISTS, Matcher, Text, load_lexicon, read
from sevpeft.severity.probabilities import SEVERITIES, Passage, Reads

# Increase when a change of matching, contexts, cues or constants changes the probabilities with the same lexicon.
CODE_VERSION = 4
LEXICON = "lexicon.tsv"

Context = Literal["stated", "negated", "other", "past", "hypothetical", "asked"]
# Evidence of one stated match. H: enough alone; M: needs other matches; L: a hint.
STRENGTH = {"H": 4.0, "M": 1.2, "L": 0.5}
# Factor on the evidence of a match in each context.
COUNTS: dict[Context, float] = dict(stated=1.0, past=0.25, hypothetical=0.15, other=0.1, asked=0.0, negated=0.0)
# Probabilities without a match, and the powers of the evidence, in the order of `SEVERITIES`.
PRIOR, POWER = (0.43, 0.39, 0.18), (1.0, 1.0, 1.7)
# Maximum words that a denial covers, as in "ما عندي لا حرارة ولا كحة ولا ضيق نفس".
_DENIAL_REACH = 6
_WORST_FIRST = {name: rank for rank, name in enumerate(reversed(SEVERITIES))}


class Match(NamedTuple):
    """An expression of the lexicon in a question. Matches sort by level (worst first), position and row."""

    rank: int
    positions: tuple[int, ...]  # of its words in the question, from 0
    line: int  # of its row in the lexicon
    level: str
    category: str
    context: Context
    evidence: float  # strength of the row times the factor of the context
    words: str  # the folded words of the question, without those in gaps

    @property
    def discounted(self) -> bool:  # its context lowers its evidence
        return self.context != "stated"


class Rules:
    """A severity classifier without training; its reasons are the expressions of a lexicon."""

    kind = "rules"
    reads: Reads = "question"

    def __init__(self, path: Path | str | None = None) -> None:
        """Rules with a lexicon file, by default the package's; raises DataError as `load_lexicon` does."""
        self._path = Path(path or PACKAGE_LEXICON).expanduser()
        self._patterns, digest = load_lexicon(self._path)
        self._matcher = Matcher(self._patterns)
        self.version = f"{CODE_VERSION}-{digest[:12]}"

    def save(self, folder: Path) -> None:
        shutil.copyfile(self._path, folder / LEXICON)

    def matches(self, question: str) -> list[Match]:
        """The expressions in the question, the worst level first, then by position.

        Each pattern gives its first occurrence with the highest evidence. A match is dropped if all its words belong to
        a stated match of a worse level: "حرارة" in "حرارة ٤٠".
        """
        text = read(question)
        occurrences = self._matcher.occurrences(text)
        rules = ContextRules(text) if occurrences else None
        best: dict[int, Match] = {}
        for number, positions in occurrences:
            previous = best.get(number)
            if rules is None or (previous and previous.context == "stated"):
                continue
            _, level, category, strength, line, *_ = self._patterns[number]
            context = rules.context(positions, category, critical=level == "critical")
            if previous is None or COUNTS[context] > COUNTS[previous.context]:
                words = " ".join([text.words[position] for position in positions]).replace(POINT, ".")
                evidence = STRENGTH[strength] * COUNTS[context]
                best[number] = Match(_WORST_FIRST[level], positions, line, level, category, context, evidence, words)
        matches = sorted(best.values())
        stated = {at: match.rank for match in reversed(matches) if not match.discounted for at in match.positions}
        return [one for one in matches if any(stated.get(at, one.rank) >= one.rank for at in one.positions)]

    def explained(self, passages: Sequence[Passage]) -> tuple[np.ndarray, list[str]]:
        """Probabilities (n, 3) and reasons (n,), such as "critical: ضيق تنفس; negated: نزيف", or "" without a match."""
        matches = [self.matches(text if isinstance(text, str) else "\n".join(text)) for text in passages]
        evidence = np.array(list(map(_by_level, matches)), dtype=np.float64).reshape(-1, len(SEVERITIES))
        return probabilities_of(evidence), list(map(_reasons, matches))

    def probabilities(self, passages: Sequence[Passage]) -> np.ndarray:
        """(n, 3), float64, in the order of `SEVERITIES`; rows sum to one, and no value is zero."""
        return self.explained(passages)[0]


def probabilities_of(evidence: np.ndarray) -> np.ndarray:
    """Probabilities (n, 3) from non-negative evidence (n, 3) per level, by the formula at the top of the module."""
    mild, moderate, critical = evidence.T
    reduced = np.stack([mild / (1 + critical + moderate), moderate / (1 + critical), critical], axis=1)
    odds: np.ndarray = np.array(PRIOR) * (1 + reduced) ** np.array(POWER)
    return odds / odds.sum(axis=1, keepdims=True)


def _by_level(matches: Sequence[Match]) -> list[float]:
    """Evidence for each of `SEVERITIES`: the sum of the strongest match of every category."""
    strongest: dict[tuple[str, str], float] = {}
    for match in matches:
        key = (match.level, match.category)
        if match.evidence > strongest.get(key, 0.0):
            strongest[key] = match.evidence
    return [sum(value for (of, _), value in strongest.items() if of == level) for level in SEVERITIES]


def _reasons(matches: Sequence[Match]) -> str:
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    for match in matches:
        reasons[match.context if match.discounted else match.level][match.words] = None
    return "; ".join(f"{name}: {', '.join(reasons[name])}" for name in (*_WORST_FIRST, *COUNTS) if name in reasons)


# Context

# A set of cues is a bit mask, because Python sets take twice as long.
_BITS: dict[str, int] = {}  # cue → its bit
_CUES: dict[str, int] = defaultdict(int)  # word → bits of its cues
for _name, _words in WORD_LISTS.items():
    if _name.startswith("cue:"):
        _bit = _BITS.setdefault(_name[4:].rstrip("+"), 1 << len(_BITS))
        for _word in _words:
            for _form in (_word, "و" + _word, "ف" + _word) if _name.endswith("+") else (_word,):
                # "ولا" is a separate cue, not "and no".
                if _form != "ولا" or _form in _words:
                    _CUES[_form] |= _bit


@cache
def _bits(cues: str) -> int:
    return sum(_BITS[cue] for cue in cues.split())


@lru_cache(REMEMBERED)
def _cues_of(word: str) -> int:
    """Bits of the cues of a word. Joined spellings ("ماعندي", "لايوجد") deny like separate ones."""
    cues = _CUES.get(word, 0)
    if word.endswith("ش") and len(word) > 3:  # ما كاينش, ما نخممش: the end of a negation around the verb
        cues |= _CUES.get(word[:-1], 0)
    stem = word[1:] if word[0] in "وف" else word
    if stem.startswith(("عند", "بعند")):
        cues |= _bits("has")
    elif stem.startswith(("ما", "لا")) and len(stem) > 4:
        rest = stem[2:]
        if rest.startswith("عند") or (_CUES.get(rest, 0) & _bits("has") and rest != "لها"):
            cues |= _bits("without")
    return cues


class ContextRules:
    """The context of each expression in one question."""

    def __init__(self, text: Text) -> None:
        self._words, self._sentences, self._clauses, self._asking = text
        self._cues = list(map(_cues_of, text.words))
        # Searches for a cue use only these positions, because most words have no cue.
        self._cued = [(position, cues) for position, cues in enumerate(self._cues) if cues]
        self._any = reduce(or_, {cues for _, cues in self._cued}, 0)
        self._denials = self._find_denials()

    def context(self, positions: Sequence[int], category: str, *, critical: bool) -> Context:
        """The context of the expression with words at these positions."""
        first, last = positions[0], positions[-1]
        if self._denials and self._negated(positions):
            return "negated"
        # "صعوبة في بلع الدواء", "لازم اخد شريط": the patient did not swallow anything.
        if category == "poisoning_bites" and self._is(first - 1 - self._is(first - 1, "into"), "hard"):
            return "asked"
        if category != "pregnancy" and self._has("died family kin") and self._other(first, last):
            return "other"
        past = self._has("recovered was before event formerly gone_year")
        if past and (self._is_over(first, last) or self._dated(first, last)):
            return "past"
        # A question about danger does not state danger.
        if category == "danger" and self._asks_for_danger(first, last):
            return "asked"
        # Thoughts of suicide are often expressed as a fear or a possibility, so they always count in full.
        doubtful = self._has("fear cause be") and self._possible(first)
        if critical and self._has("whether choice"):
            doubtful = doubtful or self._asks_whether(first, last)
        if doubtful and category != "suicidal":
            return "asked" if category == "danger" else "hypothetical"
        return "stated"

    def _has(self, cues: str) -> bool:
        return bool(self._any & _bits(cues))

    def _is(self, position: int, cues: str) -> bool:
        return 0 <= position < len(self._cues) and bool(self._cues[position] & _bits(cues))

    def _near(self, first: int, last: int, cues: str, within: tuple[int, int] | None = None) -> list[int]:
        """Positions from `first` to `last`, and inside `within`, of words with one of the cues."""
        if not self._any & (bits := _bits(cues)):
            return []
        if within:
            first, last = max(first, within[0]), min(last, within[1])
        return [position for position, cues_at in self._cued if cues_at & bits and first <= position <= last]

    # Negation

    def _find_denials(self) -> list[tuple[int, int, int]]:
        """(position, first denied position, last denied position) of every word that denies."""
        denials: list[tuple[int, int, int]] = []
        words = ["", *self._words, ""]
        for position in self._near(0, len(self._words), "not nor without except"):
            before, word, after = words[position : position + 3]
            wide = self._is(position, "without") or (word == "غير" and self._is(position - 1, "since"))
            denies = wide or self._is(position, "not")
            if self._is(position, "nor"):
                denies = self._means_nor(position, [denial for denial, _, _ in denials])
            # No denials: "كل ما" (every time), "ماشي على الطريق" (walking), "عمري ما شفت زيه" (never before, but now).
            every_time = word in ("ما", "وما") and self._is(position - 1, "when")
            walks = word == "ماشي" and after.startswith("ع")
            if not denies or every_time or walks or before.startswith(("عمر", "وعمر")):
                continue
            start = position + 1
            while self._is(start, "filler has feels") or (start > position + 1 and self._is(start, "since")):
                wide = wide or self._is(start, "has feels")
                start += 1
            if wide or not self._is(position + 1, "what"):
                denials.append((position, position + 1, self._reach(position, start) if wide else start))
        return denials

    def _means_nor(self, position: int, denials: Sequence[int]) -> bool:
        """Whether "ولا" denies: it means "nor" after a denial, and "or" in a question."""
        sentence = _extent(self._sentences, position)
        if (denials and denials[-1] >= sentence[0]) or self._is(position + 1, "has feels"):
            return True
        # It denies in "عندي كتلة ولا ألم فيها", but not in the question "هل هي كتلة ولا ألم فيها؟".
        inside = self._is(position + 1, "sign") and self._near(position + 2, position + 3, "inside", sentence)
        having = inside and self._near(sentence[0], position - 1, "has feels")
        return bool(having) and not self._near(*sentence, "asks")

    def _reach(self, denial: int, start: int) -> int:
        """Position of the last denied word: the denial ends at a comma, "but" or the next word of having."""
        end = min(denial + 1 + _DENIAL_REACH, len(self._words))
        for position in range(start, end):
            parted = self._clauses[position] != self._clauses[denial] and not self._is(position, "or")
            if parted or self._is(position, "but") or (position > start and self._is(position, "has feels")):
                return max(start, position - 1)
            if self._is(position, "all"):
                # "مفيش امراض مزمنه" denies only this phrase, not a complaint after it without a comma.
                return position + 1
        return max(start, end - 1)

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
            # "ضيق نفس ما عندي", "نزيف لا يوجد": the denial is the end of the clause.
            if denial == last + 1 and (self._is(denial + 1, "has") or self._is(denial, "without")):
                after, clause = denial + 1, self._clauses[last]
                while self._is(after, "has filler"):
                    after += 1
                if self._clauses[denial] == clause and self._clauses[after : after + 1] != [clause]:
                    return True
        # "لا حرارة او كحة": the second item of a list whose first item is denied.
        listed = first > 0 and self._words[first - 1] == "او"
        return listed and any(start <= first - 2 <= end for _, start, end in self._denials)

    # Another person, another time, not a fact

    def _other(self, first: int, last: int) -> bool:
        sentence, clause = _extent(self._sentences, first), _extent(self._clauses, first)
        kin = self._near(first - 6, first - 1, "kin", sentence)
        # A parent, partner or child with this is the patient. An aunt or friend who had it is only a reason to worry.
        remote = any(self._is(position, "remote") for position in kin) and not self._near(*clause, "now")
        return bool(
            self._near(first - 5, first - 1, "died", sentence)
            or self._near(first - 4, last + 3, "family", sentence)
            or (kin and self._near(last + 1, last + 5, "died", sentence))
            or (remote and (self._had(kin[0], first) or self._near(first - 3, first - 1, "befell", (kin[0], first))))
        )

    def _had(self, begin: int, first: int) -> bool:
        """Whether "كان عندي" or "كان في" is before the expression; "كنت ماشي" and "كنت في الشغل" do not count."""
        return any(
            (position + 1 == first or self._is(position + 1, "has feels"))
            and self._words[position : position + 2] != ["كنت", "في"]
            for position in self._near(first - 4, first - 1, "was", (begin, first))
        )

    def _is_over(self, first: int, last: int) -> bool:
        """Whether it is over and has not come back: "تعافيت من الجلطة", "كان عندي نزيف وخف"."""
        sentence = _extent(self._sentences, first)
        recovered = self._near(first - 3, last + 8, "recovered", sentence)
        # "ضيق تنفس بعد ما تعافيت" began after the recovery.
        ends = [[position for position in recovered if position < first or not self._is(position - 1, "after")]]
        went = self._near(last + 1, last + 8, "went", sentence)
        if went and self._had(sentence[0], first):
            # "خف نص ساعة" (better for half an hour) and "راح المستشفى" (went to hospital) do not end it.
            ends.append([position for position in went if not self._is(position + 1, "not_gone")])
        return any(end and not self._near(end[-1], end[-1] + 4, "again", sentence) for end in ends)

    def _dated(self, first: int, last: int) -> bool:
        """Whether its clause has a past date: "قبل سنتين", "العام الماضي", "من سنتين عملت"."""
        begin, end = clause = _extent(self._clauses, first)
        # "قبل سنتين عملت عملية وعندي ضيق تنفس": only the operation is past.
        having = self._near(begin, first - 1, "has feels")
        another = any(self._words[position][0] == "و" and not self._is(position, "was") for position in having)
        if another or self._near(begin, end, "now"):
            return False
        # A complaint "since two years" may continue today, but an event is past.
        events = [position for position in self._near(begin, end, "event") if position < last]
        for position in self._near(begin, end, "formerly gone_year since before"):
            formerly = self._is(position, "formerly") and not self._is(position - 1, "since")
            last_year = self._is(position, "gone_year") and self._near(position - 2, position - 1, "year")
            # "من سنتين", "من 3 سنين"
            ago = self._is(position, "before since" if events else "before")
            if formerly or last_year or (ago and self._near(position + 1, position + 2, "long", clause)):
                return True
        return False

    def _possible(self, first: int) -> bool:
        """Whether it is a fear, a possibility or to be prevented: "خايف من الجلطة", "هل ممكن تكون جلطة"."""
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
        # A question mark applies to the last words before it, not to the whole sentence.
        _, closing = _extent(self._sentences, last)
        short = closing == last or (closing <= last + 2 and self._is(last + 1, "onto"))
        return (
            # "لو سمحت حالته خطيره", "ممكن حد يرد" are polite phrases, not questions about danger.
            any(not self._is(position + 1, "polite") for position in asking)
            or (clause[0] < first and self._is(first - 1, "degree"))
            or any(first - position < 3 or self._is(position - 1, "plain") for position in before)
            or any(self._is(position + 1, "plain degree not") for position in after)
            # "الكيس دا خطير او خلقي"
            or (last + 1 in after and self._is(first - 1, "this"))
            or (short and self._sentences[last] in self._asking)
        )

    def _asks_whether(self, first: int, last: int) -> bool:
        """Whether it is the whole question: "هل هذه جلطة", "عندي جلطة ولا لا", "هل ده شد عضلي ولا جلطة"."""
        begin, end = _extent(self._clauses, last)
        chosen = self._is(last + 1, "choice")
        if chosen and self._is(last + 2, "plain"):
            return True
        before = first - 1 - self._is(first - 1, "this has feels")
        # One more word may be its kind: "هل عندي ذبحة صدرية". But "هل هذا النزيف طبيعي" states the bleeding.
        kind = before == first - 2 and last + 1 == end and not self._is(end, "plain")
        if last != end and not chosen and (not kind or self._words[first].startswith("ال")):
            return False
        if before >= begin and self._is(before, "whether"):
            return True
        asking = self._near(first - 6, first - 2, "whether", (begin, end))
        return self._is(first - 1, "choice") and any(self._is(position + 1, "this") for position in asking)


def _extent(numbers: Sequence[int], position: int) -> tuple[int, int]:
    """First and last position of the clause or sentence of a word, from the clause or sentence numbers of all words."""
    number = numbers[position]
    return bisect_left(numbers, number), bisect_right(numbers, number) - 1
