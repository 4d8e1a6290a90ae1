"""From a question to severity probabilities that follow from the words it says, and to those words.

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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sevpeft.severity.context import Context, Surroundings
from sevpeft.severity.lexicon import Pattern, load_lexicon
from sevpeft.severity.matching import Matcher
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.words import POINT, Text, read

# To be raised when matching, context or the constants below change what comes out for the same lexicon.
CODE_VERSION = 3

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
"""How steeply evidence of each level tells."""

_LEVEL = {name: index for index, name in enumerate(SEVERITIES)}
_WORST_FIRST = {name: index for index, name in enumerate(reversed(SEVERITIES))}
_ORDER = (*_WORST_FIRST, *(context for context in COUNTS if context != "stated"))


@dataclass(frozen=True)
class Match:
    """An expression of the lexicon that stands in a question."""

    term: str
    """As the lexicon writes it."""
    words: str
    """As the question writes it, folded; words in a gap are left out."""
    positions: tuple[int, ...]
    """Of these words in the question, from 0."""
    level: str
    category: str
    strength: str
    context: Context

    @property
    def discounted(self) -> bool:
        """Whether it counts less, or not at all, because of what stands around it."""
        return self.context != "stated"

    @property
    def evidence(self) -> float:
        return STRENGTH[self.strength] * COUNTS[self.context]


class _Found(NamedTuple):
    """A match before it is written out. They sort as they are told: by level, then by place, then by row."""

    rank: int
    positions: tuple[int, ...]
    line: int
    pattern: Pattern
    context: Context


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
        """Rules of a lexicon file, the package's own by default.

        Raises:
            DataError: the file cannot be read, or has mistakes: all of them, each with its line.
        """
        return cls(*load_lexicon(path))

    def matches(self, question: str) -> list[Match]:
        """What the question says, the worst level first, then in the order of its words.

        Of one pattern the occurrence that counts most is given, of several that count the same the first. A match
        whose words all belong to a stated match of a worse level is left out: "حرارة" in "حرارة ٤٠".
        """
        text = read(question)
        return [
            Match(
                found.pattern.term,
                " ".join([text.words[position] for position in found.positions]).replace(POINT, "."),
                found.positions,
                found.pattern.level,
                found.pattern.category,
                found.pattern.strength,
                found.context,
            )
            for found in self._found(text)
        ]

    def _found(self, text: Text) -> list[_Found]:
        occurrences = self._matcher.occurrences(text)
        if not occurrences:
            return []
        surroundings = Surroundings(text)
        best: dict[int, _Found] = {}
        for number, positions in occurrences:
            known = best.get(number)
            if known and known.context == "stated":
                continue
            pattern = self._patterns[number]
            context = surroundings.context(positions, pattern.category, critical=pattern.level == "critical")
            if known is None or COUNTS[context] > COUNTS[known.context]:
                best[number] = _Found(_WORST_FIRST[pattern.level], positions, pattern.line, pattern, context)
        return _without_covered(sorted(best.values()))

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        """Probabilities (n, 3), float64, in the order of `SEVERITIES`; rows sum to one, none is zero."""
        evidence = [_evidence_of(self._found(read(question))) for question in questions]
        return probabilities_of(np.array(evidence, dtype=np.float64).reshape(-1, len(SEVERITIES)))

    def evidence(self, question: str) -> str:
        """The reasons on one line: "critical: ضيق تنفس; neutral: حرارة; negated: نزيف". Empty where nothing matched."""
        text = read(question)
        return _told(text, self._found(text))

    def explained(self, questions: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """`probabilities` and the `evidence` of every question, the matches found once for both."""
        evidence, told = [], []
        for question in questions:
            text = read(question)
            found = self._found(text)
            evidence.append(_evidence_of(found))
            told.append(_told(text, found))
        return probabilities_of(np.array(evidence, dtype=np.float64).reshape(-1, len(SEVERITIES))), told


def _told(text: Text, matches: Sequence[_Found]) -> str:
    told: dict[str, list[str]] = {}
    for _, positions, _, pattern, context in matches:
        words = " ".join([text.words[position] for position in positions]).replace(POINT, ".")
        said = told.setdefault(pattern.level if context == "stated" else context, [])
        if words not in said:
            said.append(words)
    return "; ".join(f"{name}: {', '.join(told[name])}" for name in _ORDER if name in told)


def probabilities_of(evidence: np.ndarray) -> np.ndarray:
    """Probabilities (n, 3) of evidence (n, 3) per level, not negative, by the formula above."""
    mild, moderate, critical = evidence.T
    counted = np.stack([mild / (1 + critical + moderate), moderate / (1 + critical), critical], axis=1)
    odds: np.ndarray = np.array(PRIOR) * (1 + counted) ** np.array(POWER)
    return odds / odds.sum(axis=1, keepdims=True)


def _evidence_of(matches: Sequence[_Found]) -> list[float]:
    strongest: dict[tuple[str, str], float] = {}
    for _, _, _, pattern, context in matches:
        key = (pattern.level, pattern.category)
        evidence = STRENGTH[pattern.strength] * COUNTS[context]
        if evidence > strongest.get(key, 0.0):
            strongest[key] = evidence
    sums = [0.0] * len(SEVERITIES)
    for (level, _), value in strongest.items():
        sums[_LEVEL[level]] += value
    return sums


def _without_covered(matches: list[_Found]) -> list[_Found]:
    """Without what a stated match of a worse level has said already; `matches` has the worst first."""
    if matches[0].rank == matches[-1].rank:
        return matches
    kept: list[_Found] = []
    worse: set[int] = set()
    same: set[int] = set()
    rank = -1
    for match in matches:
        if match.rank != rank:
            rank = match.rank
            worse |= same
            same = set()
        if worse and worse.issuperset(match.positions):
            continue
        kept.append(match)
        if match.context == "stated":
            same.update(match.positions)
    return kept
