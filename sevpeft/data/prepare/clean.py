"""Cleans a text of what only the keyboard, the web page or a broken encoding put there.

Nothing is folded: hamza, teh marbuta and alef maqsura stay as they were written, as a reader needs them.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache, reduce
from pathlib import Path

import emoji as emoji_names
import ftfy
import yaml
from ftfy import badness

from sevpeft.data.prepare import Cleaning
from sevpeft.data.text import DIGITS, INVISIBLE, TASHKEEL, TATWEEL, space_words

_FILE = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
WORDS: dict[str, frozenset[str]] = {name: frozenset(words.split()) for name, words in _FILE["words"].items()}


PATTERNS: dict[str, re.Pattern[str]] = {}  # a list matches where any of it does; <fragments> are filled in
for _name, _written in _FILE["patterns"].items():
    _joined = _written if isinstance(_written, str) else "|".join(_written)
    for _fragment, _meaning in _FILE["fragments"].items():
        _joined = _joined.replace(f"<{_fragment}>", _meaning)
    PATTERNS[_name] = re.compile(_joined)


def clean(text: str, switches: Cleaning) -> tuple[str, tuple[str, ...]]:
    """The text cleaned, and the names of the switches that changed it, in order; cleaning again changes nothing."""
    steps = _steps(switches)
    changed: set[str] = set()
    before = None
    # One step can make work for another: an entity hides a tag, an invisible mark parts repeated letters. Texts get
    # shorter with each such round, so there is a last one.
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
    """A step of pairs of a pattern and what takes its place; where `needed` is not found, neither is any (faster)."""
    compiled, any_ = [(re.compile(pattern), by) for pattern, by in pairs], re.compile(needed)
    return lambda text: reduce(lambda out, pair: pair[0].sub(pair[1], out), compiled if any_.search(text) else (), text)


# ftfy knows what UTF-8 looks like in the western code pages. Arabic forums have two accidents more: UTF-8 that was read
# as Windows-1256 ("ط§ظ„ظ…"), and Windows-1256 that was read as Windows-1252 ("ÇáÓáÇã"). The second has no UTF-8 in it:
# only a text whose letters are mostly accented is taken for it, as no French or German one is.
# What each accident leaves; a text that has none of it is not looked at further.
_SUSPECT = r"[\u0080-\u00FF\u0152-\u0192\u02C6-\u02DC\u2018-\u2122]"
_ARABIC = re.compile(r"[\u0620-\u064A]")
_MAYBE_BROKEN = re.compile(_SUSPECT)
# What is left of Arabic in UTF-8 that was read in a western code page and then cut or changed.
_REMAINS = re.compile(f"(?:[ØÙ]{_SUSPECT}){{2}}")
# Bytes D8 to DB begin an Arabic letter in UTF-8, bytes 80 to BF end it; in Windows-1256 the latter are no letters that
# Arabic words have.
_TRAILING = re.escape(bytes(range(0x80, 0xC0)).decode("cp1256"))
_UTF8_AS_1256 = re.compile(f"(?:[طظعغ][{_TRAILING}])+")
_SURELY_UTF8_AS_1256 = re.compile(f"(?:[طظ][{_TRAILING}]){{3}}")


def repaired(text: str) -> str:
    """The text as it was meant, or as it is where nothing is broken or nothing can be done."""
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
    """Whether letters of `text` are lost, or are there in a code page that `repaired` could not make out."""
    if PATTERNS["lost"].search(text) or not _MAYBE_BROKEN.search(text):
        return PATTERNS["lost"].search(text) is not None
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
        # An isolated mark decomposes into a space and the mark, which would part the word.
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
    return emoji_names.replace_emoji(re.sub("([0-9#*])\ufe0f?\u20e3", r"\1", text), name)  # a dose stays: "1️⃣ حبة"


def _named_emoji(text: str) -> str:
    emoji_names.config.load_language("ar")
    return _without_emoji(text, lambda _, about: f" {(about.get('ar') or about['en']).strip(':').replace('_', ' ')} ")


# What may stand between a greeting and the text, and belongs to neither; a minus sign or a bracket may be the text's.
_BETWEEN = r"[\s،,.:؛;!…~*]"
_OPENING = re.compile(rf"(?:{_BETWEEN}*(?:{PATTERNS['greetings'].pattern})(?![\w]){_BETWEEN}*)+", re.IGNORECASE)
_CLOSING = re.compile(rf"(?:(?<![\w])(?:{PATTERNS['thanks'].pattern}){_BETWEEN}*)+\Z", re.IGNORECASE)
_THANKING = re.compile(r"شكر|جزا|تحيات|بارك|thank", re.IGNORECASE)


def without_greetings(text: str) -> str:
    """The text without greetings at its beginning and thanks at its end; all of it if it is nothing else."""
    opening = _OPENING.match(text)
    start, end = opening.end() if opening else 0, len(text)
    # Thanks stand in the last 120 letters, and no more than 30 before the word that gives them away.
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
        # Only what is named like a tag is one: "Hb<12" and "العمر > 60" are readings.
        (rf"(?i)</?({'|'.join(sorted(WORDS['html_tags']))})(?:\s[^<>]*|/)?>", _in_place_of),
    ),
    "unicode": _plain_letters,
    "invisible": lambda text: _without_invisible(space_words(text)),
    "tatweel": _substituted((f"{TATWEEL}+", _in_place_of_stretch)),
    "tashkeel": _substituted((f"[{TASHKEEL}]+", "")),
    "digits": _substituted(
        ("[٠-٩۰-۹]+(?:[٫٬][٠-٩۰-۹]+)*٪?|(?<=[0-9])٪", lambda number: number[0].translate(_EASTERN_SIGNS))
    ),
    # Three equal letters are no spelling of any word but a handful (تتتبع), which two leave readable. A doubled vowel
    # may begin one, as and-words do (ووجع).
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
