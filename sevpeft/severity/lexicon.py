"""Splits a question into folded words, reads lexicon files, and finds their expressions in the question.

lexicons/README.md documents the files. One error lists every line with a mistake, so that no red flag is lost. Arabic
attaches particles, articles and pronouns to its words, so five hundred patterns have millions of surface forms.
Therefore the matcher removes prefixes and suffixes from the words of a question.

Letters repeated for emphasis are reduced to one. A negation around its verb ("معنديش") becomes a word ("ما عندي").
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.severity.probabilities import SEVERITIES

LEXICONS = Path(__file__).parent / "lexicons"
# Size of the caches for single words, because questions repeat their words.
REMEMBERED = 1 << 16

# Name → words, from lexicons/words_ar.tsv in the order of the file.
WORD_LISTS: dict[str, list[str]] = {}
for _line in (LEXICONS / "words_ar.tsv").read_text(encoding="utf-8").splitlines():
    if not _line.startswith("#"):
        _name, _listed = _line.split("\t")
        WORD_LISTS.setdefault(_name, []).extend(_listed.split())

PACKAGE_LEXICON = LEXICONS / "severity_ar.tsv"
COLUMNS = ("term", "level", "category", "dialect", "strength", "note")
STRENGTHS = ("H", "M", "L")
_TERM = re.compile(r"[^\s~]+(?: (?:~[1-9]? )?[^\s~]+)*")
_RANGE = re.compile(r"(\d+(?:\.\d+)?)\.\.(\d+(?:\.\d+)?)")
_GROUP = re.compile(r"(@\w+)\s*=\s*(\S+)")


class Word(NamedTuple):
    """One spelling of one word of a pattern."""

    kind: str  # "plain" (proclitics and suffixes allowed), "verb" (persons and tenses too), "exact", or "number"
    form: str = ""  # folded; empty for a number
    low: float = 0.0  # bounds of a number, inclusive
    high: float = 0.0


class Pattern(NamedTuple):
    """One row of a lexicon: a sequence of words, and the level and category that it is evidence for."""

    term: str
    level: str
    category: str
    strength: str
    line: int
    slots: tuple[frozenset[Word], ...]  # the spellings of each word of the pattern
    gaps: tuple[int, ...]  # maximum words between a slot and the next; one number fewer than slots


# Words of a question

# Placeholders for punctuation: letters that Arabic and Latin text does not have and that folding does not change.
_STOP, _ASKING, _COMMA, POINT = "ʘ", "ʖ", "ʗ", "ʞ"
_DECIMAL = re.compile(r"(?<=\d)[.,٫](?=\d)")
_SENTENCE_END = re.compile(r"[.!?؟;؛…]+")
_CLAUSE_END = re.compile(r"[،,:()\[\]\-–—]+")
# "سررررعة" is "سرعة"; digits do not change.
_REPEATED = re.compile(r"([^\W\d])\1\1+")
# معنديش is ما عندي, مبيرضعش is ما بيرضع: in Egyptian and Maghrebi the negation surrounds the verb.
_WRAPPED_NEGATION = re.compile(r"(و|ف)?ما?([^\d\W]{3,})ش")
_NUMBER = re.compile(rf"\d+(?:{POINT}\d+)?")
_JOINED = {word: tuple(parts.split("_")) for word, parts in (pair.split("=") for pair in WORD_LISTS["joined"])}


class Text(NamedTuple):
    """The words of a question, with the numbers of their sentences and clauses."""

    words: list[str]  # folded, three or more equal letters as one
    sentences: list[int]  # sentence number of each word; . ! ? ؛ and line breaks end a sentence
    clauses: list[int]  # clause number of each word; commas, colons, dashes and brackets end a clause too
    asking: set[int]  # numbers of the sentences that end with a question mark


def read(question: str) -> Text:
    """Splits a question into words and numbers its sentences and clauses."""
    text = Text([], [], [], set())
    sentence = clause = 0
    # Word by word with a cache, because folding whole questions takes longer than the rest of the matching.
    for part in chain.from_iterable(map(_folded, f" {_STOP} ".join(question.splitlines()).split())):
        if part == _ASKING:
            text.asking.add(sentence)
        if part in (_STOP, _ASKING, _COMMA):
            clause += 1
            sentence += part != _COMMA
        else:
            text.words.append(part)
            text.sentences.append(sentence)
            text.clauses.append(clause)
    return text


@lru_cache(REMEMBERED)
def _folded(written: str) -> tuple[str, ...]:
    """The words and punctuation placeholders of a text without blanks."""
    marked = _SENTENCE_END.sub(
        lambda end: f" {_ASKING if set(end[0]) & set('?؟') else _STOP} ", _DECIMAL.sub(POINT, written)
    )
    folded = fold_for_matching(_CLAUSE_END.sub(f" {_COMMA} ", marked))
    return tuple(part for word in folded.split() for part in split_word(word))


def split_word(word: str) -> tuple[str, ...]:
    """A folded word without repeated letters; the negation around a verb is split off as a word."""
    word = _REPEATED.sub(r"\1", word)
    wrapped = _WRAPPED_NEGATION.fullmatch(word) if word.endswith("ش") and word not in WORD_LISTS["unwrapped"] else None
    return _JOINED.get(word) or ((f"{wrapped[1] or ''}ما", wrapped[2]) if wrapped else (word,))


# Files


def load_lexicon(path: Path, levels: tuple[str, ...] = SEVERITIES) -> tuple[tuple[Pattern, ...], str]:
    """Patterns of a lexicon in the order of the file, and the SHA-256 of its bytes.

    `levels` are the allowed levels. Raises DataError if the file cannot be read, or with every line that has a mistake.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The lexicon {path} cannot be read ({error}); give a TSV file in UTF-8.") from error
    groups: dict[str, frozenset[Word]] = {}
    patterns: dict[Any, Pattern] = {}  # by slots and gaps
    mistakes, has_header = list[str](), False
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            if has_header:
                pattern = _pattern(line, number, groups, levels)
                # Two terms that are the same after folding would count twice, or contradict each other.
                first = patterns.setdefault((pattern.slots, pattern.gaps), pattern)
                if first is not pattern:
                    raise ValueError(f"the term is the same as in line {first.line} once spellings are folded")
            elif line.startswith("@"):
                group = _GROUP.fullmatch(line.strip())
                if not group or group[1] in groups:
                    raise ValueError("a group is defined once, as @name = word|word|…, without blanks in the words")
                # Defined before its words are read, so that a mistake in them is not reported again at each use.
                groups[group[1]] = frozenset()
                groups[group[1]] = _words(group[2], groups)
            else:
                has_header = True
                if tuple(line.split("\t")) != COLUMNS:
                    raise ValueError(f"the columns must be {', '.join(COLUMNS)}, in this order, separated by tabs")
        except ValueError as mistake:
            mistakes.append(f"  line {number}: {mistake}")
    if not patterns or mistakes:
        mistakes = mistakes or ["  line 1: there are no patterns; write a header line and at least one row"]
        raise DataError("\n".join([f"The lexicon {path} has mistakes; correct them and run this again.", *mistakes]))
    return tuple(patterns.values()), hashlib.sha256(content).hexdigest()


def _pattern(line: str, number: int, groups: dict[str, frozenset[Word]], levels: tuple[str, ...]) -> Pattern:
    cells = [cell.strip() for cell in line.split("\t")]
    if len(cells) != len(COLUMNS) or not cells[2]:
        raise ValueError(f"there are {len(cells)} columns, not {len(COLUMNS)}, or the category is empty")
    term, level, category, _, strength, _ = cells
    for column, value, choices in (("level", level, levels), ("strength", strength, STRENGTHS)):
        if value not in choices:
            raise ValueError(f"the {column} '{value}' is not one of {', '.join(choices)}")
    parts = term.split()
    if not _TERM.fullmatch(" ".join(parts)):
        raise ValueError("a term is words, with a gap (~, or ~1 to ~9) only between two words")
    slots = tuple(_words(part, groups) for part in parts if part[0] != "~")
    if all(slots) and all(word.kind == "number" for word in frozenset().union(*slots)):
        raise ValueError("a term with numbers only would match ages and dates; add a word")
    before = [0 if part[0] != "~" else int(part[1:] or 3) for part in parts]
    gaps = tuple(gap for gap, part in zip(before, parts[1:], strict=False) if part[0] != "~")
    return Pattern(term, level, category, strength, number, slots, gaps)


def _words(alternatives: str, groups: dict[str, frozenset[Word]]) -> frozenset[Word]:
    """The words of `a|@group|39..41`."""
    words: set[Word] = set()
    for written in alternatives.split("|"):
        if not written.startswith("@"):
            words.add(_word(written))
        elif written in groups:
            words |= groups[written]
        else:
            raise ValueError(f"the group {written} is not defined above")
    return frozenset(words)


def _word(written: str) -> Word:
    if bounds := _RANGE.fullmatch(written):
        number = Word("number", low=float(bounds[1]), high=float(bounds[2]))
        if number.low > number.high:
            raise ValueError(f"the range {written} ends before it begins")
        return number
    kind = {"=": "exact", "+": "verb"}.get(written[:1], "plain")
    bare = written if kind == "plain" else written[1:]
    words = [part for word in fold_for_matching(bare).split() for part in split_word(word)]
    if len(words) != 1 or words[0].isdigit() or re.search(r"[=+@.]", bare):
        raise ValueError(f"'{written}' is read as '{' '.join(words)}', not as one word (a number is a range: 39..39)")
    return Word(kind, words[0])


# Questions


def _prefixes(*particles: str) -> frozenset[str]:
    """The empty prefix and the particles, each alone and after a conjunction."""
    return frozenset(conjunction + particle for conjunction in ("", "و", "ف") for particle in ("", *particles))


_NOUN_PREFIXES = _prefixes(*WORD_LISTS["particle"])
_VERB_PREFIXES = _prefixes(*WORD_LISTS["tense"], *(to + person for to in ("", "ل") for person in WORD_LISTS["person"]))
# Kind of a form → allowed prefixes and suffixes.
_AFFIXES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "exact": (frozenset([""]), frozenset([""])),
    # A word of two letters is part of many others: دم in كدمه, حي in حيه.
    "short": (_prefixes(*WORD_LISTS["short_particle"]), frozenset([""])),
    "plain": (_NOUN_PREFIXES, frozenset(["", *WORD_LISTS["pronoun"], *WORD_LISTS["noun_ending"]])),
    # Teh marbuta becomes ت before a pronoun, and the plural ات replaces it: حراره, حرارته, حرارات.
    "tied": (_NOUN_PREFIXES, frozenset(WORD_LISTS["pronoun"])),
    "plural": (_NOUN_PREFIXES, frozenset()),
    "verb": (_VERB_PREFIXES, frozenset(["", *WORD_LISTS["verb_ending"]])),
}
_LONGEST_PREFIX, _LONGEST_SUFFIX = (
    max(len(affix) for affixes in _AFFIXES.values() for affix in affixes[side]) for side in (0, 1)
)
_UNITS = frozenset(WORD_LISTS["unit"])
_AGES = tuple(conjunction + age for conjunction in ("", "و") for age in WORD_LISTS["age"])

# Slots to find in one direction, the nearest first: slot number and maximum words before it.
_Path = tuple[tuple[int, int], ...]
# A pattern that is searched from its anchor slot: its number, its other slots, and the paths to its start and end.
_Anchored = tuple[int, frozenset[int], _Path, _Path]
# The slots that a word matches, and the patterns with their anchor at this word.
_Known = tuple[frozenset[int], tuple[_Anchored, ...]]


class Matcher:
    """An index from words to the patterns of a lexicon."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._forms: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self._ranges: list[tuple[float, float, bool, int]] = []
        self._anchored: dict[int, list[_Anchored]] = defaultdict(list)
        numbers: dict[tuple[frozenset[Word], bool], int] = {}
        sharing = Counter(word for pattern in patterns for word in frozenset().union(*pattern.slots))
        for number, pattern in enumerate(patterns):
            slots: list[int] = []
            for slot, gap in zip(pattern.slots, (*pattern.gaps, None), strict=True):
                # `1..28 يوم` names its unit; `سكر ~ 20..50` must not match "سكر من 20 سنة".
                key = (slot, gap == 0 and any(word.kind == "number" for word in slot))
                if key not in numbers:
                    numbers[key] = len(numbers)
                    for word in slot:
                        self._register(word, numbers[key], unit_named=gap == 0)
                slots.append(numbers[key])
            # The search for a pattern starts at its rarest word, not at every "الم" or "ما".
            frequencies = [max(sharing[word] for word in slot) for slot in pattern.slots]
            anchor = frequencies.index(min(frequencies))
            before = tuple(zip(slots[:anchor], pattern.gaps[:anchor], strict=True))[::-1]
            after = tuple(zip(slots[anchor + 1 :], pattern.gaps[anchor:], strict=True))
            others = frozenset(slots[:anchor] + slots[anchor + 1 :])
            self._anchored[slots[anchor]].append((number, others, before, after))
        self._known = lru_cache(REMEMBERED)(self._find)

    def _register(self, word: Word, slot: int, *, unit_named: bool) -> None:
        if word.kind == "number":
            self._ranges.append((word.low, word.high, unit_named, slot))
        else:
            short = word.kind == "plain" and len(word.form) < 3
            self._forms[word.form].append(("short" if short else word.kind, slot))
        if word.kind == "plain" and word.form.endswith("ه") and len(word.form) > 3:
            self._forms[word.form[:-1] + "ت"].append(("tied", slot))
            self._forms[word.form[:-1]].append(("plural", slot))

    def _find(self, word: str, is_reading: bool = True) -> _Known:
        """The slots and patterns of a word; `is_reading`: a number may be the reading of an instrument."""
        slots = set()
        if _NUMBER.fullmatch(word):
            value = float(word.replace(POINT, "."))
            slots = {slot for low, high, unit, slot in self._ranges if low <= value <= high and (is_reading or unit)}
        else:
            for start in range(min(_LONGEST_PREFIX + 1, len(word))):
                for end in range(max(start + 1, len(word) - _LONGEST_SUFFIX), len(word) + 1):
                    for kind, slot in self._forms.get(word[start:end], ()):
                        prefixes, suffixes = _AFFIXES[kind]
                        plural = kind == "plural" and word.startswith("ات", end)
                        if word[:start] in prefixes and (plural or word[end:] in suffixes):
                            slots.add(slot)
        return frozenset(slots), tuple(item for slot in sorted(slots) for item in self._anchored.get(slot, ()))

    def occurrences(self, text: Text) -> list[tuple[int, tuple[int, ...]]]:
        """(pattern number, ascending positions of its slots) of each match, at most one per place of its anchor."""
        words = text.words
        known = list(map(self._known, words))
        for at, word in enumerate(words):
            # A number before a unit or after a word for age is not the reading of an instrument.
            if word[0].isdecimal() and (
                not _UNITS.isdisjoint(words[at + 1 : at + 2]) or (at and words[at - 1].startswith(_AGES))
            ):
                known[at] = self._known(word, False)
        present = frozenset().union(*[slots for slots, _ in known])
        matches: list[tuple[int, tuple[int, ...]]] = []
        for position, (_, anchored) in enumerate(known):
            for pattern, others, before, after in anchored:
                if others <= present:
                    left = _follow(before, position, -1, known, text.sentences)
                    right = None if left is None else _follow(after, position, 1, known, text.sentences)
                    if left is not None and right is not None:
                        matches.append((pattern, (*left[::-1], position, *right)))
        return matches


def _follow(path: _Path, position: int, step: int, known: list[_Known], sentences: list[int]) -> tuple[int, ...] | None:
    """Positions of the slots of a path from `position` on; None if a slot is not found."""
    if not path:
        return ()
    slot, gap = path[0]
    for place in range(position + step, position + step * (gap + 2), step):
        if not 0 <= place < len(known) or sentences[place] != sentences[position]:
            return None
        if slot in known[place][0] and (rest := _follow(path[1:], place, step, known, sentences)) is not None:
            return (place, *rest)
    return None
