"""Severity probabilities of a question by the expressions in it, and these expressions as the reason.

The model is small enough to be read. A match counts by the strength of its row and by its context; of each category
only the strongest match counts, so that five ways to say one complaint are one complaint. With E the sum over the
categories of a level, and what is worse taking room from what is milder,

    e_critical = E_critical,  e_neutral = E_neutral / (1 + e_critical),
    e_non_critical = E_non_critical / (1 + e_critical + E_neutral)
    p_level ∝ prior_level · (1 + e_level) ^ power_level,

log-linear in log(1 + e). Where nothing matched it is the prior. No probability is ever 0 or 1, and one more stated
red flag never lowers p_critical. The constants were chosen by hand, not fitted; `classifier fit` calibrates these
probabilities on labels as it does those of any other classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sevpeft.severity.context import Context, ContextRules
from sevpeft.severity.lexicon import Pattern, load_lexicon
from sevpeft.severity.matching import Matcher
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.words import POINT, read

# To be raised when matching, context (its table of cues too) or the constants below change what comes out for the same
# lexicon.
CODE_VERSION = 4

STRENGTH = {"H": 4.0, "M": 1.2, "L": 0.5}
"""Evidence of one stated match. H: enough by itself; M: needs company; L: a hint."""
COUNTS: dict[Context, float] = {
    "stated": 1.0,
    "past": 0.25,
    "hypothetical": 0.15,
    "other": 0.1,
    "asked": 0.0,
    "negated": 0.0,
}
"""Share of its evidence that a match keeps in each context."""
PRIOR = (0.43, 0.39, 0.18)
"""Probabilities in the order of `SEVERITIES` when nothing matched."""
POWER = (1.0, 1.0, 1.7)
"""How steeply the odds of each level rise with its evidence."""

_WORST_FIRST = {name: rank for rank, name in enumerate(reversed(SEVERITIES))}


class Match(NamedTuple):
    """An expression of the lexicon that stands in a question. Matches sort by level (worst first), place and row."""

    rank: int
    positions: tuple[int, ...]
    """Of its words in the question, from 0."""
    line: int
    """Of its row in the lexicon."""
    level: str
    category: str
    context: Context
    evidence: float
    """Strength of the row, times what the context leaves of it."""
    words: str
    """As the question writes them, folded; words in a gap are left out."""

    @property
    def discounted(self) -> bool:
        """Whether it counts less, or not at all, because of what stands around it."""
        return self.context != "stated"


class Rules:
    """A lexicon at work: a severity classifier that needs no training and shows its reasons."""

    kind = "rules"

    def __init__(self, patterns: Sequence[Pattern], digest: str) -> None:
        self._patterns = tuple(patterns)
        self._matcher = Matcher(self._patterns)
        self.version = f"{CODE_VERSION}-{digest[:12]}"
        """Of this code and of the lexicon's content: the same version gives the same probabilities."""

    @classmethod
    def load(cls, path: Path | None = None) -> Rules:
        """Rules of a lexicon file, the package's own by default; raises DataError as `load_lexicon` does."""
        return cls(*load_lexicon(path))

    def matches(self, question: str) -> list[Match]:
        """What the question says, the worst level first, then in the order of its words.

        Of one pattern the occurrence that counts most is given, of several that count the same the first. A match
        whose words all belong to a stated match of a worse level is left out: "حرارة" in "حرارة ٤٠".
        """
        text = read(question)
        rules: ContextRules | None = None
        best: dict[int, Match] = {}
        for number, positions in self._matcher.occurrences(text):
            known = best.get(number)
            if known and known.context == "stated":
                continue
            pattern = self._patterns[number]
            rules = rules or ContextRules(text)
            context = rules.context(positions, pattern.category, critical=pattern.level == "critical")
            if known is None or COUNTS[context] > COUNTS[known.context]:
                rank, evidence = _WORST_FIRST[pattern.level], STRENGTH[pattern.strength] * COUNTS[context]
                words = " ".join([text.words[position] for position in positions]).replace(POINT, ".")
                best[number] = Match(
                    rank, positions, pattern.line, pattern.level, pattern.category, context, evidence, words
                )
        found = sorted(best.values())
        if not found or found[0].rank == found[-1].rank:
            return found
        kept: list[Match] = []
        worse: set[int] = set()
        for _, same in groupby(found, itemgetter(0)):
            level = [match for match in same if not worse.issuperset(match.positions)]
            kept += level
            worse.update(*[match.positions for match in level if match.context == "stated"])
        return kept

    def explained(self, questions: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Probabilities (n, 3), float64, in the order of `SEVERITIES`, and the `evidence` of every question."""
        matches = list(map(self.matches, questions))
        evidence = np.array(list(map(_by_level, matches)), dtype=np.float64).reshape(-1, len(SEVERITIES))
        return probabilities_of(evidence), list(map(_reasons, matches))

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        """(n, 3), float64, in the order of `SEVERITIES`; rows sum to one, none is zero."""
        return self.explained(questions)[0]

    def evidence(self, question: str) -> str:
        """The reasons on one line: "critical: ضيق تنفس; neutral: حرارة; negated: نزيف". Empty where nothing matched."""
        return _reasons(self.matches(question))


def probabilities_of(evidence: np.ndarray) -> np.ndarray:
    """Probabilities (n, 3) of evidence (n, 3) per level, not negative, by the formula above."""
    mild, moderate, critical = evidence.T
    counted = np.stack([mild / (1 + critical + moderate), moderate / (1 + critical), critical], axis=1)
    odds: np.ndarray = np.array(PRIOR) * (1 + counted) ** np.array(POWER)
    return odds / odds.sum(axis=1, keepdims=True)


def _by_level(matches: Sequence[Match]) -> list[float]:
    """Evidence for each of `SEVERITIES`: of every category its strongest match."""
    strongest: dict[tuple[str, str], float] = {}
    for match in matches:
        key = (match.level, match.category)
        if match.evidence > strongest.get(key, 0.0):
            strongest[key] = match.evidence
    return [sum(value for (of, _), value in strongest.items() if of == level) for level in SEVERITIES]


def _reasons(matches: Sequence[Match]) -> str:
    reasons: dict[str, list[str]] = {}
    for match in matches:
        words = reasons.setdefault(match.level if match.context == "stated" else match.context, [])
        if match.words not in words:
            words.append(match.words)
    return "; ".join(f"{name}: {', '.join(reasons[name])}" for name in (*_WORST_FIRST, *COUNTS) if name in reasons)
