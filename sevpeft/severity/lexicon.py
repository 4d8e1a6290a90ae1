"""From a lexicon file to patterns of words, or to one list of everything that is wrong with the file.

A lexicon is a tab-separated text that a physician can read and correct without programming: one expression a row, with
the level that it speaks for. The format is documented beside the package's own, in lexicons/README.md. A row that
cannot be used is never skipped: whoever adds a red flag has to see that it counts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.words import parts_of

PACKAGE_LEXICON = Path(__file__).parent / "lexicons" / "severity_ar.tsv"
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
    dialects: tuple[str, ...]
    strength: str
    note: str
    line: int
    slots: tuple[frozenset[Word], ...]
    """For each word of the pattern the ways to write it."""
    gaps: tuple[int, ...]
    """Most words that may stand between one slot and the next; one number fewer than slots."""


@dataclass
class _Reading:
    """What was understood of a file so far, and what was not."""

    groups: dict[str, frozenset[Word]] = field(default_factory=dict)
    patterns: list[Pattern] = field(default_factory=list)
    mistakes: list[tuple[int, str]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    defined_at: dict[str, int] = field(default_factory=dict)
    levels: tuple[str, ...] = SEVERITIES

    def wrong(self, line: int, text: str) -> None:
        self.mistakes.append((line, text))


def load_lexicon(path: Path | None = None, levels: tuple[str, ...] = SEVERITIES) -> tuple[tuple[Pattern, ...], str]:
    """Patterns of a lexicon in the order of the file, and the SHA-256 of its bytes.

    Args:
        path: tab-separated UTF-8 file; None for the package's own.
        levels: what its expressions may speak for.

    Raises:
        DataError: the file cannot be read, or has mistakes: all of them, each with its line.
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
    """Patterns of a lexicon's text; raises DataError with every mistake and its line, `name` being the file's."""
    reading = _Reading(levels=levels)
    header: int | None = None
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if header is None and line.startswith("@"):
            _read_group(line, number, reading)
        elif header is None:
            header = number
            if tuple(line.split("\t")) != COLUMNS:
                reading.wrong(number, f"the columns must be {', '.join(COLUMNS)}, in this order, parted by tabs")
        else:
            _read_row(line, number, reading)
    if not reading.patterns and not reading.mistakes:
        reading.wrong(1, "there are no patterns; write a header line and at least one row")
    for group in reading.groups.keys() - reading.used:
        reading.wrong(reading.defined_at[group], f"the group {group} is not used; use it or take it out")
    _find_doubles(reading)
    if reading.mistakes:
        lines = [f"  line {number}: {said}" for number, said in sorted(reading.mistakes)]
        count = "a mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise DataError("\n".join([f"The lexicon {name} has {count}; correct and run this again.", *lines]))
    return tuple(reading.patterns)


def _read_group(line: str, number: int, reading: _Reading) -> None:
    found = _GROUP.fullmatch(line.strip())
    if not found:
        reading.wrong(number, "a group is written @name = word|word|…, without blanks inside the words")
        return
    group, alternatives = found.groups()
    if group in reading.groups:
        reading.wrong(number, f"the group {group} is defined twice")
        return
    reading.groups[group] = frozenset(_words(alternatives, number, reading))
    reading.defined_at[group] = number


def _read_row(line: str, number: int, reading: _Reading) -> None:
    cells = [cell.strip() for cell in line.split("\t")]
    if len(cells) != len(COLUMNS):
        reading.wrong(number, f"there are {len(cells)} columns, not {len(COLUMNS)} ({', '.join(COLUMNS)})")
        return
    term, level, category, dialect, strength, note = cells
    dialects = tuple(name for name in re.split(r"[ ,]+", dialect) if name)
    before = len(reading.mistakes)
    if level not in reading.levels:
        reading.wrong(number, f"the level '{level}' is not one of {', '.join(reading.levels)}")
    if strength not in STRENGTHS:
        reading.wrong(number, f"the strength '{strength}' is not one of {', '.join(STRENGTHS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", category):
        reading.wrong(number, f"the category '{category}' is not a name of small letters, digits and _")
    for unknown in sorted(set(dialects) - set(DIALECTS)):
        reading.wrong(number, f"the dialect '{unknown}' is not one of {', '.join(DIALECTS)} (empty: all)")
    slots, gaps = _read_term(term, number, reading)
    if len(reading.mistakes) == before:
        reading.patterns.append(Pattern(term, level, category, dialects, strength, note, number, slots, gaps))


def _read_term(term: str, number: int, reading: _Reading) -> tuple[tuple[frozenset[Word], ...], tuple[int, ...]]:
    slots: list[frozenset[Word]] = []
    gaps: list[int] = []
    gap: int | None = None
    for part in term.split():
        written = _GAP.fullmatch(part)
        if not written:
            if slots:
                gaps.append(gap or 0)
            slots.append(frozenset(_words(part, number, reading)))
            gap = None
        elif not slots or gap is not None:
            reading.wrong(number, "a gap (~) stands between two words, not at the beginning or beside another gap")
        else:
            gap = int(written[1]) if written[1] else DEFAULT_GAP
            if not 1 <= gap <= LONGEST_GAP:
                reading.wrong(number, f"a gap is of 1 to {LONGEST_GAP} words, not of {gap}")
    if gap is not None:
        reading.wrong(number, "a gap (~) at the end has no word after it")
    if not slots:
        reading.wrong(number, "the term is empty")
    elif all(slots) and all(word.kind == "number" for slot in slots for word in slot):
        reading.wrong(number, "a term of numbers alone would match ages and dates; add a word")
    return tuple(slots), tuple(gaps)


def _words(alternatives: str, number: int, reading: _Reading) -> Iterator[Word]:
    for written in alternatives.split("|"):
        if written.startswith("@"):
            if written in reading.groups:
                reading.used.add(written)
                yield from reading.groups[written]
            else:
                reading.wrong(number, f"the group {written} is not defined above")
            continue
        bounds = _RANGE.fullmatch(written)
        if bounds:
            low, high = float(bounds[1]), float(bounds[2])
            if low > high:
                reading.wrong(number, f"the range {written} ends before it begins")
            yield Word("number", low=low, high=high)
            continue
        kind = _KIND_OF.get(written[:1], "plain")
        form = fold_for_matching(written if kind == "plain" else written[1:])
        read = " ".join(parts_of(form)) if form else ""
        if form.isdigit():
            reading.wrong(number, f"the number '{written}' is written as a range, {written}..{written}")
        elif not form or " " in form:
            reading.wrong(number, f"'{written}' is not one word (words are parted by blanks, ways to write one by |)")
        elif " " in read:
            reading.wrong(number, f"'{written}' is read as two words; write '{read}'")
        elif re.search(r"[|~=+@.]", written if kind == "plain" else written[1:]):
            reading.wrong(number, f"'{written}' has a sign inside the word that means something only before it")
        else:
            yield Word(kind, read)


def _find_doubles(reading: _Reading) -> None:
    """Two rows that are written differently and mean the same after folding would count twice, or disagree."""
    seen: dict[tuple[tuple[frozenset[Word], ...], tuple[int, ...]], int] = {}
    for pattern in reading.patterns:
        first = seen.setdefault((pattern.slots, pattern.gaps), pattern.line)
        if first != pattern.line:
            reading.wrong(pattern.line, f"the term is the same as in line {first} once spellings are folded")
