"""Lexicon files: tab-separated text with one expression a row and the level that it speaks for.

A physician can read and correct one without programming; lexicons/README.md documents the format. A row that cannot be
used is never skipped: whoever adds a red flag has to see that it counts. So one error lists every line with a mistake.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.words import LEXICONS, parts_of

PACKAGE_LEXICON = LEXICONS / "severity_ar.tsv"
COLUMNS = ("term", "level", "category", "dialect", "strength", "note")
DIALECTS = ("msa", "egyptian", "levantine", "gulf", "maghrebi")
STRENGTHS = ("H", "M", "L")
DEFAULT_GAP = 3
LONGEST_GAP = 9

_GAP = re.compile(r"~(\d*)")
_RANGE = re.compile(r"(\d+(?:\.\d+)?)\.\.(\d+(?:\.\d+)?)")
_GROUP = re.compile(r"(@\w+)\s*=\s*(\S+)")
_KIND_OF = {"=": "exact", "+": "verb"}


@dataclass(frozen=True)
class Word:
    """One way in which one word of a pattern may be written."""

    kind: str
    """"plain" (proclitics and suffixes allowed), "verb" (persons and tenses too), "exact", or "number"."""
    form: str = ""
    """Folded; empty for a number."""
    low: float = 0.0
    high: float = 0.0
    """Bounds of a number, both included."""


@dataclass(frozen=True)
class Pattern:
    """One row of a lexicon: what has to stand one after the other, and what that speaks for."""

    term: str
    level: str
    category: str
    strength: str
    line: int
    slots: tuple[frozenset[Word], ...]
    """For each word of the pattern the ways to write it."""
    gaps: tuple[int, ...]
    """Most words that may stand between one slot and the next; one number fewer than slots."""


def load_lexicon(path: Path | None = None, levels: tuple[str, ...] = SEVERITIES) -> tuple[tuple[Pattern, ...], str]:
    """Patterns of a lexicon in the order of the file, and the SHA-256 of its bytes.

    Args:
        path: tab-separated UTF-8 file; None for the package's own.
        levels: what its expressions may speak for.

    Raises:
        DataError: the file cannot be read, or has mistakes: each line that has one is named.
    """
    path = path or PACKAGE_LEXICON
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"The lexicon {path} cannot be read: {error.strerror}; give the path of a TSV file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"The lexicon {path} is not UTF-8 text; save it as UTF-8 and run this again.") from error
    return parse_lexicon(text, str(path), levels), hashlib.sha256(content).hexdigest()


def parse_lexicon(text: str, name: str = "lexicon", levels: tuple[str, ...] = SEVERITIES) -> tuple[Pattern, ...]:
    """Patterns of a lexicon's text; raises DataError with each line that has a mistake, `name` being the file's."""
    reading = _Reading(levels)
    mistakes: list[tuple[int, str]] = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            try:
                reading.line(line, number)
            except ValueError as mistake:
                mistakes.append((number, str(mistake)))
    if not reading.patterns and not mistakes:
        mistakes.append((1, "there are no patterns; write a header line and at least one row"))
    mistakes += [(number, f"the group {group} is not used; remove it") for group, number in reading.unused.items()]
    if mistakes:
        lines = [f"  line {number}: {mistake}" for number, mistake in sorted(mistakes)]
        raise DataError("\n".join([f"The lexicon {name} has mistakes; correct them and run this again.", *lines]))
    return tuple(reading.patterns.values())


class _Reading:
    """What was read so far. A ValueError says what is wrong with a line."""

    def __init__(self, levels: tuple[str, ...]) -> None:
        self.levels, self.header = levels, False
        self.groups: dict[str, frozenset[Word]] = {}
        self.unused: dict[str, int] = {}
        self.patterns: dict[tuple[tuple[frozenset[Word], ...], tuple[int, ...]], Pattern] = {}

    def line(self, line: str, number: int) -> None:
        if self.header:
            pattern = self._pattern(line, number)
            # Written differently and the same after folding, two would count twice, or disagree.
            first = self.patterns.setdefault((pattern.slots, pattern.gaps), pattern)
            if first is not pattern:
                raise ValueError(f"the term is the same as in line {first.line} once spellings are folded")
        elif not line.startswith("@"):
            self.header = True
            if tuple(line.split("\t")) != COLUMNS:
                raise ValueError(f"the columns must be {', '.join(COLUMNS)}, in this order, parted by tabs")
        elif (found := _GROUP.fullmatch(line.strip())) is None:
            raise ValueError("a group is written @name = word|word|…, without blanks inside the words")
        elif found[1] in self.groups:
            raise ValueError(f"the group {found[1]} is defined twice")
        else:
            # Known before its words are read: a mistake in them is named here, and not again wherever it is used.
            self.groups[found[1]], self.unused[found[1]] = frozenset(), number
            self.groups[found[1]] = frozenset(self._words(found[2]))

    def _pattern(self, line: str, number: int) -> Pattern:
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != len(COLUMNS):
            raise ValueError(f"there are {len(cells)} columns, not {len(COLUMNS)} ({', '.join(COLUMNS)})")
        term, level, category, dialects, strength, _ = cells
        known = [("level", level, self.levels), ("strength", strength, STRENGTHS)]
        known += [("dialect", dialect, DIALECTS) for dialect in re.split(r"[ ,]+", dialects) if dialect]
        for column, value, choices in known:
            if value not in choices:
                raise ValueError(f"the {column} '{value}' is not one of {', '.join(choices)}")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", category):
            raise ValueError(f"the category '{category}' is not a name of small letters, digits and _")
        return Pattern(term, level, category, strength, number, *self._slots(term))

    def _slots(self, term: str) -> tuple[tuple[frozenset[Word], ...], tuple[int, ...]]:
        """The slots of a term and the gaps between them."""
        parts = term.split()
        gaps = [_GAP.fullmatch(part) for part in parts]
        if not parts or gaps[0] or gaps[-1] or any(gap and after for gap, after in pairwise(gaps)):
            raise ValueError("a term is words, and a gap (~) stands between two of them")
        widths = [int(gap[1] or DEFAULT_GAP) if gap else 0 for gap in gaps]
        if any(gap and not 1 <= width <= LONGEST_GAP for gap, width in zip(gaps, widths, strict=True)):
            raise ValueError(f"a gap is of 1 to {LONGEST_GAP} words")
        slots = tuple(frozenset(self._words(part)) for part, gap in zip(parts, gaps, strict=True) if not gap)
        if all(slots) and all(word.kind == "number" for slot in slots for word in slot):
            raise ValueError("a term of numbers alone would match ages and dates; add a word")
        return slots, tuple(before for before, gap in zip(widths, gaps[1:], strict=False) if not gap)

    def _words(self, alternatives: str) -> Iterator[Word]:
        """The words of `a|@group|39..41`."""
        for written in alternatives.split("|"):
            if not written.startswith("@"):
                yield _word(written)
            elif written in self.groups:
                self.unused.pop(written, None)
                yield from self.groups[written]
            else:
                raise ValueError(f"the group {written} is not defined above")


def _word(written: str) -> Word:
    if bounds := _RANGE.fullmatch(written):
        low, high = float(bounds[1]), float(bounds[2])
        if low > high:
            raise ValueError(f"the range {written} ends before it begins")
        return Word("number", low=low, high=high)
    kind = _KIND_OF.get(written[:1], "plain")
    bare = written if kind == "plain" else written[1:]
    form = fold_for_matching(bare)
    read = " ".join(parts_of(form)) if form else ""
    if form.isdigit():
        raise ValueError(f"the number '{written}' is written as a range, {written}..{written}")
    if not form or " " in form:
        raise ValueError(f"'{written}' is not one word (words are parted by blanks, ways to write one by |)")
    if " " in read:
        raise ValueError(f"'{written}' is read as two words; write '{read}'")
    if re.search(r"[|~=+@.]", bare):
        raise ValueError(f"'{written}' has a sign inside the word that means something only before it")
    return Word(kind, read)
