"""Cleans texts of artifacts of keyboards, web pages and wrong encodings.

Spelling stays: hamza, teh marbuta and alef maqsura are not folded.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import emoji as emoji_names
import ftfy
import yaml
from ftfy import badness

from sevpeft.data.prepare import Cleaning
from sevpeft.data.text import DIGITS, INVISIBLE, TASHKEEL, TATWEEL, space_words

_FILE = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
WORDS: dict[str, frozenset[str]] = {name: frozenset(words.split()) for name, words in _FILE["words"].items()}

PATTERNS: dict[str, re.Pattern[str]] = {}  # a list becomes alternatives; <NAME> stands for a fragment
for _name, _pattern in _FILE["patterns"].items():
    _joined = _pattern if isinstance(_pattern, str) else "|".join(_pattern)
    for _fragment, _content in _FILE["fragments"].items():
        _joined = _joined.replace(f"<{_fragment}>", _content)
    PATTERNS[_name] = re.compile(_joined)


def clean(text: str, switches: Cleaning) -> tuple[str, tuple[str, ...]]:
    """The cleaned text and the names of the switches that changed it, in order. Cleaning again changes nothing."""
    steps = _steps(switches)
    changed: set[str] = set()
    before = None
    # One step may enable another: an entity hides a tag, an invisible mark separates repeated letters. The loop ends,
    # because each round makes the text shorter.
    while before != text:
        before = text
        for name, step in steps:
            if (after := step(text)) != text:
                changed.add(name)
                text = after
    return text, tuple(name for name, _ in steps if name in changed)


@lru_cache(maxsize=64)
def _steps(switches: Cleaning) -> list[tuple[str, Callable[[str], str]]]:
    return [(name, _EMOJI.get(value) or _STEPS[name]) for name, value in switches if value and value != "keep"]


def _substituted(*pairs: tuple[str, str | Callable[[re.Match[str]], str]], needed: str = "") -> Callable[[str], str]:
    """A step that applies (pattern, replacement) pairs in order, if `needed`, which is faster, matches the text."""
    compiled, quick = [(re.compile(pattern), replacement) for pattern, replacement in pairs], re.compile(needed)

    def step(text: str) -> str:
        if quick.search(text):
            for pattern, replacement in compiled:
                text = pattern.sub(replacement, text)
        return text

    return step


# ftfy recognizes UTF-8 that was read in a western code page. Arabic forums have two more errors: UTF-8 read as
# Windows-1256 ("ط§ظ„ظ…"), and Windows-1256 read as Windows-1252 ("ÇáÓáÇã"). The second leaves no trace of UTF-8: it is
# assumed if most letters are accented, which no French or German text has.
# Each error leaves such characters; a text without them is not examined.
_SUSPECT = r"[\u0080-\u00FF\u0152-\u0192\u02C6-\u02DC\u2018-\u2122]"
_ARABIC = re.compile(r"[\u0620-\u064A]")
_MAYBE_BROKEN = re.compile(_SUSPECT)
# Rests of Arabic UTF-8 that was read in a western code page and then cut or changed.
_REMAINS = re.compile(f"(?:[ØÙ]{_SUSPECT}){{2}}")
# In UTF-8, bytes D8 to DB begin an Arabic letter and bytes 80 to BF end it. In Windows-1256, bytes 80 to BF are no
# letters of Arabic words.
_TRAILING = re.escape(bytes(range(0x80, 0xC0)).decode("cp1256"))
_UTF8_AS_1256 = re.compile(f"(?:[طظعغ][{_TRAILING}])+")
_SURELY_UTF8_AS_1256 = re.compile(f"(?:[طظ][{_TRAILING}]){{3}}")


def repaired(text: str) -> str:
    """The text with the right encoding; unchanged if it is not broken or cannot be repaired."""
    if not _MAYBE_BROKEN.search(text):
        return text
    if badness.is_bad(text):
        text = ftfy.fix_encoding(text)
    if _SURELY_UTF8_AS_1256.search(text):
        text = _UTF8_AS_1256.sub(lambda run: _recoded(run[0], "cp1256", "utf-8"), text)
    if _mostly_accented(text):
        meant = _recoded(text, "sloppy-windows-1252", "cp1256")
        text = meant if len(_ARABIC.findall(meant)) > 0.8 * sum(map(str.isalpha, meant)) else text
    return text


def is_damaged(text: str) -> bool:
    """Whether letters of `text` are lost, or in a code page that `repaired` cannot recognize."""
    if PATTERNS["lost"].search(text):
        return True
    if not _MAYBE_BROKEN.search(text):
        return False
    remains = _SURELY_UTF8_AS_1256.search(text) or _REMAINS.search(text)
    return bool(remains or _mostly_accented(text) or badness.is_bad(text))


def _mostly_accented(text: str) -> bool:
    accented = len(re.findall(r"[\u00C0-\u00FF]", text))
    return accented >= 4 and accented > len(re.findall("[A-Za-z]", text)) and not _ARABIC.search(text)


def _recoded(text: str, read_as: str, meant: str) -> str:
    try:
        return text.encode(read_as).decode(meant)
    except UnicodeError:
        return text


def _in_place_of(tag: re.Match[str]) -> str:
    name = tag[1].lower()
    if name == "sup" and tag[0][1] != "/":
        return "^"  # 10<sup>9</sup> is not 109.
    return "\n" if name in WORDS["breaking_tags"] else " " if name in WORDS["spacing_tags"] else ""


def _plain_letters(text: str) -> str:
    def plain(form: re.Match[str]) -> str:
        # An isolated mark decomposes into a space and the mark, which would split the word.
        return unicodedata.normalize("NFKC", form[0]).strip() or " "

    return unicodedata.normalize("NFC", re.sub(r"[\uFB50-\uFDFF\uFE70-\uFEFC]", plain, text))


def _in_place_of_stretch(match: re.Match[str]) -> str:
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    # "1ـ بنادول" and "3ـ5 أيام" are dashes, "1445هـ" and "مـرض" are not.
    stretches = before.isalpha() or (after.isalpha() and not before.isdigit()) or unicodedata.combining(before or " ")
    return "" if stretches else "-"


_EASTERN_SIGNS = DIGITS | str.maketrans("٫٬٪", ".,%")
_PICTURE = r"[\u2600-\u27BF\u2B00-\u2BFF\uFE0F\U0001F000-\U0001FAFF]"


def _without_emoji(text: str, name: Callable[[str, dict[str, str]], str] | str = " ") -> str:
    return emoji_names.replace_emoji(re.sub("([0-9#*])\ufe0f?\u20e3", r"\1", text), name)  # doses stay: "1️⃣ حبة"


def _named_emoji(text: str) -> str:
    emoji_names.config.load_language("ar")
    return _without_emoji(text, lambda _, about: f" {(about.get('ar') or about['en']).strip(':').replace('_', ' ')} ")


# Characters between a greeting and the text that belong to neither; a minus sign or bracket may belong to the text.
_BETWEEN = r"[\s،,.:؛;!…~*]"
_OPENING = re.compile(rf"(?:{_BETWEEN}*(?:{PATTERNS['greetings'].pattern})(?![\w]){_BETWEEN}*)+", re.IGNORECASE)
_CLOSING = re.compile(rf"(?:(?<![\w])(?:{PATTERNS['thanks'].pattern}){_BETWEEN}*)+\Z", re.IGNORECASE)
_THANKING = re.compile(r"شكر|جزا|تحيات|بارك|thank", re.IGNORECASE)


def without_greetings(text: str) -> str:
    """The text without greetings at its beginning and thanks at its end; unchanged if nothing else is left."""
    opening = _OPENING.match(text)
    start, end = opening.end() if opening else 0, len(text)
    # Thanks are in the last 120 characters and begin at most 30 before their keyword.
    thanks = _THANKING.search(text, max(start, end - 120))
    closing = _CLOSING.search(text, max(start, thanks.start() - 30)) if thanks else None
    rest = text[start : closing.start()].rstrip(" \t\n\r،,؛;:-") if closing else text[start:]
    return rest if any(map(str.isalnum, rest)) else text


_without_invisible = _substituted(
    (rf"((?<={_PICTURE})\u200D(?={_PICTURE}))|[{INVISIBLE}\x00-\x08\x0E-\x1F\x7F-\x84\x86-\x9F]", r"\1")
)
_STEPS: dict[str, Callable[[str], str]] = {
    "mojibake": repaired,
    "html": _substituted(
        (r"(?i)&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,30});|&nbsp\b", lambda entity: html.unescape(entity[0])),
        (r"(?is)<!--(?:(?!<!--).)*?-->|<!doctype[^<>]*>|<(script|style)\b[^<>]*>(?:(?!<\1\b).)*?</\1\s*>", " "),
        # Only known tag names count: "Hb<12" and "العمر > 60" are readings.
        (rf"(?i)</?({'|'.join(sorted(WORDS['html_tags']))})(?:\s[^<>]*|/)?>", _in_place_of),
    ),
    "unicode": _plain_letters,
    "invisible": lambda text: _without_invisible(space_words(text)),
    "tatweel": _substituted((f"{TATWEEL}+", _in_place_of_stretch)),
    "tashkeel": _substituted((f"[{TASHKEEL}]+", "")),
    "digits": _substituted(
        ("[٠-٩۰-۹]+(?:[٫٬][٠-٩۰-۹]+)*٪?|(?<=[0-9])٪", lambda number: number[0].translate(_EASTERN_SIGNS))
    ),
    # Hardly any word has three equal letters in a row (تتتبع), and two leave it readable. A word may begin with a
    # doubled vowel, after "and" (ووجع).
    "repeated_letters": _substituted(
        (r"(?<=[^\W\d_])([اوىيآ])\1{2,}", r"\1"),
        (r"([\u0620-\u064A\u066E-\u06D3])\1{2,}|([a-z])\2{3,}|([\u064B-\u0652])\3+", r"\1\1\2\2\3"),
        needed=r"([^\W\d_])\1\1|([\u064B-\u0652])\2",
    ),
    "repeated_punctuation": _substituted(
        (r"([؟?!،؛;,])\1+|([؟?!]{2})\2+|([*#_=~\-–—ـ●•▪■☆★♡♥|^()\[\]{}<>«»《》])\3{3,}", r"\1\2\3"),
        (r"\.{4,}|[.…]*…[.…]+|\.+…", ".."),
        needed=r"[؟?!،؛;,.…*#_=~\-–—ـ●•▪■☆★♡♥|^()\[\]{}<>«»《》]{2}",
    ),
    "greetings": without_greetings,
    "whitespace": _substituted(
        (r"\r\n|[\r\x0B\x0C\x85\u2028\u2029]", "\n"),
        (r"[^\S\n]{2,}|[^\S\n ]", " "),
        (r" ?\n ?", "\n"),
        (r"\n{3,}", "\n\n"),
        (r"\A\s+|\s+\Z", ""),
        needed=r"\s\s|[^\S\n ]|\A\s|\s\Z",
    ),
}
_EMOJI: dict[str, Callable[[str], str]] = {"remove": _without_emoji, "name": _named_emoji}
