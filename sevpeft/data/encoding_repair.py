"""From text that was decoded with the wrong code page to the text that was meant, where its bytes still tell.

ftfy knows what UTF-8 looks like in the western code pages. Arabic forums have two accidents more: UTF-8 that was read
as Windows-1256 ("ط§ظ„ظ…"), and Windows-1256 that was read as Windows-1252 ("ÇáÓáÇã"). The second has no UTF-8 in it,
so only a text whose letters are mostly accented is taken for it, as no French or German one is.
"""

import re

import ftfy
from ftfy import badness

# What each accident cannot do without; a text that has none of it is not looked at further.
_SUSPECT = re.compile(r"[\u0080-\u00FF\u0152-\u0192\u02C6-\u02DC\u2018-\u2122]")
# Bytes D8 to DB begin an Arabic letter in UTF-8, bytes 80 to BF end it; in Windows-1256 the latter are no letters that
# Arabic words have.
_TRAILING = re.escape(bytes(range(0x80, 0xC0)).decode("cp1256"))
_UTF8_AS_1256 = re.compile(f"(?:[طظعغ][{_TRAILING}])+")
_SURELY_UTF8_AS_1256 = re.compile(f"(?:[طظ][{_TRAILING}]){{3}}")
_ACCENTED = re.compile(r"[\u00C0-\u00FF]")
_LATIN = re.compile(r"[A-Za-z]")
_ARABIC = re.compile(r"[\u0620-\u064A]")
_LOST = re.compile(
    # The replacement character, private use, and what a code page without Arabic leaves of three words.
    r"[\uFFFD\uE000-\uF8FF\U000F0000-\U0010FFFD]|(?<![^\s])\?+[^\S\n]+\?+[^\S\n]+\?+(?![^\s])|\?{3,}[^\W\d_]"
)


# What is left of Arabic in UTF-8 that was read in a western code page and then cut or changed.
_REMAINS = re.compile(r"(?:[ØÙ][\u0080-\u00FF\u0152-\u0192\u02C6-\u02DC\u2018-\u2122]){2}")


def repaired(text: str) -> str:
    """Return `text` as it was meant, or as it is where nothing is broken or nothing can be done."""
    if not _SUSPECT.search(text):
        return text
    if badness.is_bad(text):
        text = ftfy.fix_encoding(text)
    if _SURELY_UTF8_AS_1256.search(text):
        text = _UTF8_AS_1256.sub(lambda run: _recoded(run[0], "cp1256", "utf-8"), text)
    if _mostly_accented(text):
        meant = _recoded(text, "sloppy-windows-1252", "cp1256")
        if len(_ARABIC.findall(meant)) > 0.8 * sum(map(str.isalpha, meant)):
            return meant
    return text


def is_damaged(text: str) -> bool:
    """Whether letters of `text` are lost, or are there in a code page that `repaired` could not make out."""
    if _LOST.search(text):
        return True
    return bool(_SUSPECT.search(text)) and (
        bool(_SURELY_UTF8_AS_1256.search(text) or _REMAINS.search(text))
        or _mostly_accented(text)
        or bool(badness.is_bad(text))
    )


def _mostly_accented(text: str) -> bool:
    accented = len(_ACCENTED.findall(text))
    return accented >= 4 and accented > len(_LATIN.findall(text)) and not _ARABIC.search(text)


def _recoded(text: str, read_as: str, meant: str) -> str:
    try:
        return text.encode(read_as).decode(meant)
    except UnicodeError:
        return text
