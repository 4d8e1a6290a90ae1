"""From an answer, its reference and its question to the medicines and doses that only the answer has.

A model that has learnt how answers sound names medicines and doses of its own making. One that neither the doctor nor
the patient mentioned is unsupported: not always wrong, and never to be given to a patient unseen. Names come from
lexicons/medicines_ar.tsv, brand and generic names of one substance counting as one; what an answer advises against
("لا تأخذ الأسبرين") is no unsupported medicine. A dose is a number with a unit, 500 mg, ٥٠٠ مجم and 0.5 جرام being one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sevpeft.data.text import fold_for_matching
from sevpeft.severity.lexicon import Pattern, load_lexicon
from sevpeft.severity.matching import Matcher
from sevpeft.severity.words import read

MEDICINE_LEXICON = Path(__file__).parent / "lexicons" / "medicines_ar.tsv"
LEVELS = ("medicine", "against", "advised")

# Words between "do not take" and the last name of the list that it governs.
_AGAINST = 4

# Unit as folded → (unit to compare in, factor). Volumes and units of insulin stay as they are.
_SPELT = {
    (
        "mg",
        1.0,
    ): "mg|مج|مجم|ملجم|ملغ|ملغم|مغ|ملجرام|مليجرام|ملليجرام|ملليغرام|مليغرام|ميليغرام|ميلجرام|ملي جرام|ملي غرام",
    ("mg", 1000.0): "g|gm|gram|جم|غم|جرام|غرام|غ",
    ("mg", 0.001): "mcg|µg|μg|ug|ميكروجرام|ميكروغرام|مكغ|مكجم|مايكروجرام",
    ("ml", 1.0): "ml|cc|مل|مليلتر|ملليلتر|ملل|سي سي",
    ("IU", 1.0): "iu|وحده|وحدات|وحده دوليه",
}
_UNITS = {spelling: unit for unit, spellings in _SPELT.items() for spelling in spellings.split("|")}
_DOSE = re.compile(
    r"(?<![\d.])(\d+(?:\.\d+)?)\s*("
    + "|".join(sorted((re.escape(unit) for unit in _UNITS), key=len, reverse=True))
    + r")(?![^\W\d])(?!\s*/?\s*(?:dl|ديسيلتر|دل|لكل))"
)
# A reading or a drink, and no dose of a medicine.
_DRINK = re.compile(r"\s*(?:من\s+)?(?:ال)?(?:ماء|مياه|ميه|مويه|حليب|لبن|سوايل|سائل|عصير|مي\b)")
_DIGITS = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹٫", "0123456789" * 2 + ".")


class MedicineLexicon:
    """The lexicon of medicines at work."""

    def __init__(self, patterns: Sequence[Pattern], digest: str) -> None:
        self._patterns = tuple(patterns)
        self._matcher = Matcher(self._patterns)
        self.version = digest[:12]
        """Of the lexicon's content."""

    @classmethod
    def load(cls, path: Path | None = None) -> MedicineLexicon:
        """Lexicon of a file, the package's own by default.

        Raises:
            DataError: the file cannot be read, or has mistakes: all of them, each with its line.
        """
        return cls(*load_lexicon(path or MEDICINE_LEXICON, LEVELS))

    def medicines(self, text: str, *, advised_against: bool = True) -> dict[str, str]:
        """Substance → the first word that names it; without those that are advised against unless they are wanted."""
        words = read(text)
        found: dict[str, str] = {}
        against: list[tuple[int, bool]] = []
        refused: set[int] = set()
        advised: list[int] = []
        named: list[tuple[int, int, str]] = []
        for number, positions in self._matcher.occurrences(words):
            pattern = self._patterns[number]
            if pattern.level == "against":
                against.append((positions[-1], pattern.category == "no"))
                refused.update(positions)
            elif pattern.level == "advised":
                advised.append(positions[0])
            else:
                named.append((positions[0], positions[-1], pattern.category))
        for first, last, category in sorted(named):
            denied = any(
                end < first <= end + (1 if near else _AGAINST)
                and words.sentences[end] == words.sentences[first]
                and not any(end < turn < first and turn not in refused for turn in advised)
                for end, near in against
            )
            if advised_against or not denied:
                found.setdefault(category, " ".join(words.words[first : last + 1]))
        return found

    def unsupported_medicines(self, answer: str, *supports: str) -> dict[str, str]:
        """Substance → word of the answer, for those that it advises and no support (reference, question) names."""
        known = {category for support in supports for category in self.medicines(support)}
        advised = self.medicines(answer, advised_against=False)
        return {category: word for category, word in advised.items() if category not in known}


def doses(text: str) -> dict[tuple[float, str], str]:
    """(number, unit) → the first words that give the dose; masses in mg, volumes in ml, else IU."""
    folded = _folded(text)
    found: dict[tuple[float, str], str] = {}
    for dose in _DOSE.finditer(folded):
        unit, factor = _UNITS[dose[2]]
        if unit == "ml" and _DRINK.match(folded, dose.end()):
            continue
        found.setdefault((round(float(dose[1]) * factor, 6), unit), dose[0])
    return found


def unsupported_doses(answer: str, *supports: str) -> dict[tuple[float, str], str]:
    """Doses of the answer that no support (reference, question) gives."""
    known = {dose for support in supports for dose in doses(support)}
    return {dose: words for dose, words in doses(answer).items() if dose not in known}


def _folded(text: str) -> str:
    """Folded word by word, with decimal points and slashes kept."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.translate(_DIGITS))
    plain = re.sub(r"(?<=\d)[,،](?=\d)", ".", plain)
    parts = re.split(r"((?:\d*\.)?\d+|/)", plain)
    return " ".join(part if re.fullmatch(r"(?:\d*\.)?\d+|/", part) else fold_for_matching(part) for part in parts)
