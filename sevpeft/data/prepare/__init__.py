"""Makes a folder to train on of gathered consultations. Here are its settings, whose docstrings are the --help."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sevpeft.recipe import DataSection, Section


class Cleaning(Section):
    """One switch a step, in the order of the steps. The defaults keep the meaning."""

    mojibake: bool = True
    """Repair text that was decoded with the wrong code page ("Ø§Ù„Ù…", "ط§ظ„ظ…", "ÇáÓáÇã")."""
    html: bool = True
    """Take out HTML tags and comments, break lines at <br> and paragraphs, decode entities; `x < 5` stays."""
    unicode: bool = True
    """Compose letters and marks (NFC) and turn Arabic presentation forms into letters."""
    invisible: bool = True
    """Take out zero-width (between words: a space), bidirectional and control characters; joiners of emoji stay."""
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


class Masking(Section):
    """The kinds of personal data that give way to a mask, in the order in which they are looked for."""

    email: bool = True
    """Mask e-mail addresses."""
    link: bool = True
    """Mask links."""
    national_id: bool = True
    """Mask national ids, known by their form, check digit or the words before them."""
    phone: bool = True
    """Mask phone numbers that a number plan of the region has, or that are written as international ones."""
    name: bool = True
    """Mask names after a title; the title stays."""


Reason = Literal[
    "encoding_damage", "short_answer", "question_is_answer", "wrong_language", "truncated", "absent_picture"
]


class PrepareSettings(Section):
    """What is done to the consultations; `data` says where they come from, and the sizes and seed of the split."""

    data: DataSection = Field(default_factory=DataSection)
    cleaning: Cleaning = Field(default_factory=Cleaning)
    masking: Masking = Field(default_factory=Masking)
    allow: list[Reason] = Field(default_factory=list)
    """Reasons for which no row is rejected, as [truncated, absent_picture]."""
    near_duplicates: float = Field(default=0.7, ge=0.5, le=1)
    """Jaccard similarity of two questions from which on they are near-duplicates; 1 for equal ones only."""
    drop_duplicates: Literal["none", "exact", "near"] = "exact"
    """Keep the first of equal consultations (exact), of near-duplicate questions (near), or all (none)."""
    split_by: str | None = None
    """Column whose values are held out whole, the newest of numbers and dates; unset, as the rows say, or at random."""
    resplit: bool = False
    """Split anew although the rows say train, validation or test themselves."""
    num_proc: int | None = Field(default=None, ge=1)
    """Processes that clean and compare; unset, one a core. The result is the same for any number."""
