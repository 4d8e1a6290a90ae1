"""From consultation text as it was typed to text that a model may read, and to a form for comparing.

`clean` takes away what only the keyboard, the web page or a broken encoding put there. It never folds: hamza, teh
marbuta and alef maqsura stay as they were written, as a reader needs them. `strip_marks` is for models whose training
text had no vowel marks. `fold_for_matching` is for comparing only.

Arabic is typed with and without hamza, vowel marks, elongation and either set of digits; a question that was
posted twice rarely comes out letter for letter the same. The folded form is for comparing only (grouping rows
before a split, recognising column names): it loses distinctions that a reader needs, so no model ever sees it.
"""

import html
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import emoji as emoji_names

from sevpeft.data.encoding_repair import repaired

# Presentation forms of vowel marks: NFKC turns the isolated ones into a space and a mark, cutting words in two.
_PRESENTATION_MARKS = r"\uFC5E-\uFC63\uFCF2-\uFCF4\uFE70-\uFE7F"
_INVISIBLE = r"\u00AD\u061C\u180E\u200B-\u200F\u202A-\u202E\u2060-\u2069\uFEFF"
_TASHKEEL = r"\u0610-\u061A\u064B-\u065F\u0670\u06D6-\u06DC\u06DF-\u06E8\u06EA-\u06ED\u08D3-\u08FF"
_TATWEEL = r"\u0640"

_BEFORE_NORMALISING = re.compile(f"[{_PRESENTATION_MARKS}{_INVISIBLE}]")
_MARKS = re.compile(f"[{_TASHKEEL}{_TATWEEL}]")
_NOT_WORD = re.compile(r"[\W_]+")

# Keyboards for Persian and Urdu, common in Iraq and the Gulf, give look-alikes of yeh and kaf.
_LETTERS = str.maketrans("أإآٱىةؤئیک", "اااايهوييك")
_DIGITS = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹", "0123456789" * 2)
_FOLD = {**_LETTERS, **_DIGITS}


def fold_for_matching(text: str) -> str:
    """Return `text` as lower-case words parted by single spaces, without what varies between spellings.

    In order: invisible and bidi marks out, NFKC, tashkeel and tatweel out, hamza carriers and teh marbuta to
    their plain letters, Arabic-Indic digits to ASCII, lower case, all that is no letter or digit to one space.
    """
    text = unicodedata.normalize("NFKC", _BEFORE_NORMALISING.sub("", text))
    return _NOT_WORD.sub(" ", _MARKS.sub("", text).translate(_FOLD).lower()).strip()


def strip_marks(text: str) -> str:
    """Return `text` without tashkeel, tatweel and invisible marks, its Arabic-Indic digits as ASCII ones.

    Nothing that a reader needs is lost. AraGPT2 was trained on such text (its model card, aubmindlab/aragpt2-base).
    """
    return _MARKS.sub("", _BEFORE_NORMALISING.sub("", text)).translate(_DIGITS)


@dataclass(frozen=True)
class Cleaning:
    """What `clean` does, one switch a step, in the order of the steps. The defaults keep the meaning."""

    mojibake: bool = True
    """Repair text that was decoded with the wrong code page ("Ø§Ù„Ù…", "ط§ظ„ظ…", "ÇáÓáÇã")."""
    html: bool = True
    """Take out HTML tags and comments, break lines at <br> and paragraphs, decode entities; `x < 5` stays."""
    unicode: bool = True
    """Compose letters and marks (NFC) and turn Arabic presentation forms into letters."""
    invisible: bool = True
    """Take out zero-width, bidirectional and control characters; joiners inside an emoji stay."""
    tatweel: bool = True
    """Take out elongation inside words; where it stands alone it becomes the dash that it was typed for."""
    tashkeel: bool = False
    """Take out vowel marks. Off: they tell حَمل from حِمل, and prompts for models without them strip them anyway."""
    digits: bool = True
    """Write Arabic-Indic digits, their decimal and thousands separators and per cent sign as ASCII."""
    repeated_letters: bool = True
    """Shorten three and more of one letter: long vowels inside a word to one, other letters to two; never digits."""
    repeated_punctuation: bool = True
    """Shorten "؟؟؟؟" to "؟"; four and more dots to two, as only three say that a text was cut; "+++" stays."""
    emoji: Literal["keep", "remove", "name"] = "keep"
    """Keep emoji, remove them, or write their Arabic names."""
    greetings: bool = True
    """Take greetings off the beginning and thanks off the end, unless nothing else would be left."""
    whitespace: bool = True
    """One space between words, at most one empty line between paragraphs, nothing at the ends."""


def clean(text: str, switches: Cleaning = Cleaning()) -> tuple[str, tuple[str, ...]]:
    """Return `text` cleaned, and the names of the switches that changed it, in the order of their steps.

    Cleaning what is clean already changes nothing.
    """
    steps = _steps(switches)
    changed: set[str] = set()
    before = None
    # One step can make work for another: an entity hides a tag, an invisible mark parts repeated letters. Texts get
    # shorter with each such round, so there is a last one.
    while before != text:
        before = text
        for name, step in steps:
            after = step(text)
            if after != text:
                changed.add(name)
                text = after
    return text, tuple(name for name, _ in steps if name in changed)


@lru_cache(maxsize=64)
def _steps(switches: Cleaning) -> tuple[tuple[str, Callable[[str], str]], ...]:
    steps = dict(_STEPS) | {"emoji": _EMOJI[switches.emoji]}
    return tuple(
        (name, steps[name])
        for name in (switch.name for switch in fields(Cleaning))
        if getattr(switches, name) and getattr(switches, name) != "keep"
    )


_TAGS = (
    "a abbr acronym address article b big blockquote body br button caption center code col colgroup dd del details "
    "div dl dt em embed fieldset figure font footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe img input ins "
    "label li link main meta nav o:p object ol option p pre s section select small span strike strong sub sup svg "
    "table tbody td textarea tfoot th thead title tr tt u ul video wbr"
)
_BREAKING = (
    "address article blockquote br dd div dl dt footer form h1 h2 h3 h4 h5 h6 header hr li ol p pre section table tr ul"
)
_SPACING = "button img label option select td th"
_NEWLINE_OR_SPACE = dict.fromkeys(_BREAKING.split(), "\n") | dict.fromkeys(_SPACING.split(), " ")
# Only what is named like a tag is one: "Hb<12" and "العمر > 60" are readings.
_TAG = re.compile(rf"</?({'|'.join(_TAGS.split())})(?:\s[^<>]*|/)?>", re.IGNORECASE)
_UNSEEN = re.compile(
    r"<!--(?:(?!<!--).)*?-->|<!doctype[^<>]*>|<(script|style)\b[^<>]*>(?:(?!<\1\b).)*?</\1\s*>", re.I | re.S
)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});|&nbsp\b")


def _without_tag(match: re.Match[str]) -> str:
    tag = match[1].lower()
    if tag == "sup" and match[0][1] != "/":
        return "^"  # 10<sup>9</sup> is not 109.
    return _NEWLINE_OR_SPACE.get(tag, "")


def _plain(text: str) -> str:
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    if "<" in text:
        text = _TAG.sub(_without_tag, _UNSEEN.sub(" ", text))
    return text


_FORMS = re.compile(r"[\uFB50-\uFDFF\uFE70-\uFEFC]+")


def _letters_of(forms: re.Match[str]) -> str:
    # The isolated mark decomposes into a space and the mark, which would part the word.
    return "".join(unicodedata.normalize("NFKC", form).strip() or " " for form in forms[0])


def _composed(text: str) -> str:
    text = _FORMS.sub(_letters_of, text)
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


_PICTURE = r"\u2600-\u27BF\u2B00-\u2BFF\uFE0F\U0001F000-\U0001FAFF"
_UNSEEN_MARKS = re.compile(
    rf"(?<=[{_PICTURE}])\u200D(?=[{_PICTURE}])|([{_INVISIBLE}\x00-\x08\x0E-\x1F\x7F-\x84\x86-\x9F])"
)
_STRETCH = re.compile(f"{_TATWEEL}+")
_TASHKEEL_ONLY = re.compile(f"[{_TASHKEEL}]+")
_EASTERN = re.compile("[٠-٩۰-۹]+(?:[٫٬][٠-٩۰-۹]+)*٪?|(?<=[0-9])٪")
_EASTERN_SIGNS = _DIGITS | str.maketrans("٫٬٪", ".,%")


def _without_unseen(text: str) -> str:
    return _UNSEEN_MARKS.sub(lambda match: "" if match[1] else match[0], text)


def _unstretched(text: str) -> str:
    return _STRETCH.sub(_without_stretch, text) if "ـ" in text else text


def _without_stretch(match: re.Match[str]) -> str:
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    # "1ـ بنادول" and "3ـ5 أيام" are dashes, "1445هـ" and "مـرض" are not.
    stretches = before.isalpha() or (after.isalpha() and not before.isdigit()) or unicodedata.combining(before or " ")
    return "" if stretches else "-"


# Three equal letters are no spelling of any word but a handful (تتتبع), which two leave readable. A doubled vowel may
# begin one, as and-words do (ووجع).
_REPEATED = re.compile(r"([^\W\d_])\1\1|([\u064B-\u0652])\2")
_REPEATED_VOWEL = re.compile(r"(?<=[^\W\d_])([اوىيآ])\1{2,}")
_REPEATED_LETTER = re.compile(r"([\u0620-\u064A\u066E-\u06D3])\1{2,}|([a-z])\2{3,}|([\u064B-\u0652])\3+")


def _shortened(match: re.Match[str]) -> str:
    return match[3] or (match[1] or match[2]) * 2


def _without_repeated_letters(text: str) -> str:
    return _REPEATED_LETTER.sub(_shortened, _REPEATED_VOWEL.sub(r"\1", text)) if _REPEATED.search(text) else text


_REPEATED_MARK = re.compile(
    r"([؟?!،؛;,])\1+|([؟?!]{2})\2+|([*#_=~\-–—ـ●•▪■☆★♡♥|^()\[\]{}<>«»《》])\3{3,}|\.{4,}|[.…]*…[.…]+|\.+…"
)


def _one_mark(match: re.Match[str]) -> str:
    return match[1] or match[2] or match[3] or ".."


_KEYCAP = re.compile("([0-9#*])\ufe0f?\u20e3")
_MAYBE_EMOJI = re.compile(r"[\u00A9\u00AE\u203C-\u3299\U0001F000-\U0001FAFF]")


def _without_emoji(text: str) -> str:
    return emoji_names.replace_emoji(_KEYCAP.sub(r"\1", text), " ") if _MAYBE_EMOJI.search(text) else text


def _named_emoji(text: str) -> str:
    if not _MAYBE_EMOJI.search(text):
        return text

    emoji_names.config.load_language("ar")

    def name(found: str, about: dict[str, str]) -> str:
        return f" {(about.get('ar') or about['en']).strip(':').replace('_', ' ')} "

    return emoji_names.replace_emoji(_KEYCAP.sub(r"\1", text), name)


_GOD = r"(?:الله|اللة)"
_HELLO = "|".join(
    (
        rf"(?:و\s?)?(?:ال)?سلا?م[هةو]?ُ?\s?عليكم(?:[\s،,و]+رحم[ةهت]\s{_GOD})?(?:\s(?:تعالى|تعالي))?(?:[\s،,]+(?:و\s?)?(?:بركات[هةو]?))?",
        rf"و\s?عليكم\sال?سلام(?:[\s،,و]+رحم[ةهت]\s{_GOD})?(?:\s(?:تعالى|تعالي))?(?:[\s،,]+(?:و\s?)?(?:بركات[هةو]?))?",
        r"(?:صباح|مساء|مسا)\s(?:ال)?(?:خير(?:ات)?|نور|ورد)",
        r"مرحب[اًآ]{1,2}(?:\s(?:بكم?|بيكم?|بحضر\w+))?",
        r"[أا]هل[اً]{1,2}(?:\s?و\s?سهل[اً]{1,2})?(?:\s(?:بكم?|بيكم?|بحضر\w+))?",
        r"تحي[ةه]\sطيب[ةه](?:\sو\s?بعد)?",
        r"hello|good\s(?:morning|evening)",
    )
)
_THANKS = "|".join(
    (
        rf"(?:و\s?)?جزاكم?\s{_GOD}\s(?:كل\s)?خير[اً]{{0,2}}(?:\sالجزاء)?(?:\sمقدم[اً]{{1,2}})?",
        r"(?:و\s?)?(?:لكم|لك)\s(?:مني\s)?(?:جزيل\s|كل\s|خالص\s)?الشكر(?:\sو\s?التقدير|\sو\s?الاحترام)?",
        r"(?:و\s?)?(?:الف\s|[اأ]لف\s)?شكر[اً]{1,2}(?:\s(?:جزيل[اً]{0,2}|لكم|لك|ليكم|لحضر\w+|مقدم[اً]{0,2}|كثير[اً]{0,2}|جد[اً]{0,2}))*",
        r"(?:مع\s)?(?:خالص\s)?تحيات[يى](?:\s(?:لكم|لك))?",
        r"(?:و\s?)?بارك\s" + _GOD + r"\sفيكم?",
        r"thanks?(?:\s(?:you|a\slot|in\sadvance))*",
    )
)
# What may stand between a greeting and the text, and belongs to neither; a minus sign or a bracket may be the text's.
_BETWEEN = r"[\s،,.:؛;!…~*]"
_OPENING = re.compile(rf"(?:{_BETWEEN}*(?:{_HELLO})(?![\w]){_BETWEEN}*)+", re.IGNORECASE)
_CLOSING = re.compile(rf"(?:(?<![\w])(?:{_THANKS}){_BETWEEN}*)+\Z", re.IGNORECASE)
_THANKING = re.compile(r"شكر|جزا|تحيات|بارك|thank", re.IGNORECASE)
_LONGEST_CLOSING, _LONGEST_BEFORE_THANKS = 120, 30


def without_greetings(text: str) -> str:
    """Return `text` without greetings at its beginning and thanks at its end; all of it if it is nothing else."""
    opening = _OPENING.match(text)
    start, end = opening.end() if opening else 0, len(text)
    thanks = _THANKING.search(text, max(start, end - _LONGEST_CLOSING))
    closing = _CLOSING.search(text, max(start, thanks.start() - _LONGEST_BEFORE_THANKS)) if thanks else None
    if closing:
        end = closing.start()
    if (start, end) == (0, len(text)):
        return text
    rest = text[start:end]
    if end < len(text):
        rest = rest.rstrip(" \t\n\r،,؛;:-")
    return rest if any(character.isalnum() for character in rest) else text


_UNEVEN = re.compile(r"\s\s|[^\S\n ]")
_BREAKS = re.compile(r"\r\n|[\r\x0B\x0C\x85\u2028\u2029]")
_SPACES = re.compile(r"[^\S\n]{2,}|[^\S\n ]")
_AROUND_BREAKS = re.compile(r" ?\n ?")
_EMPTY_LINES = re.compile(r"\n{3,}")


def _spaced(text: str) -> str:
    if _UNEVEN.search(text):
        text = _SPACES.sub(" ", _BREAKS.sub("\n", text))
        text = _EMPTY_LINES.sub("\n\n", _AROUND_BREAKS.sub("\n", text))
    return text.strip()


_STEPS: dict[str, Callable[[str], str]] = {
    "mojibake": repaired,
    "html": _plain,
    "unicode": _composed,
    "invisible": _without_unseen,
    "tatweel": _unstretched,
    "tashkeel": lambda text: _TASHKEEL_ONLY.sub("", text),
    "digits": lambda text: _EASTERN.sub(lambda match: match[0].translate(_EASTERN_SIGNS), text),
    "repeated_letters": _without_repeated_letters,
    "repeated_punctuation": lambda text: _REPEATED_MARK.sub(_one_mark, text),
    "greetings": without_greetings,
    "whitespace": _spaced,
}
_EMOJI: dict[str, Callable[[str], str]] = {
    "keep": lambda text: text,
    "remove": _without_emoji,
    "name": _named_emoji,
}
