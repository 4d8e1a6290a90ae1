"""Settings of `sevpeft prepare`; their docstrings are its --help."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sevpeft.recipe import DataSection, Section


class Cleaning(Section):
    """One switch per step, in the order of the steps. The defaults keep the meaning."""

    mojibake: bool = True
    """Repair text that was decoded with a wrong code page ("Ø§Ù„Ù…", "ط§ظ„ظ…", "ÇáÓáÇã")."""
    html: bool = True
    """Remove HTML tags and comments, break lines at <br> and paragraphs, decode entities; `x < 5` stays."""
    unicode: bool = True
    """Compose letters and marks (NFC) and turn Arabic presentation forms into letters."""
    invisible: bool = True
    """Remove zero-width (between words: a space), bidirectional and control characters; joiners of emoji stay."""
    tatweel: bool = True
    """Remove elongation inside words; where it was typed as a dash, it becomes one."""
    tashkeel: bool = False
    """Remove vowel marks. Off: they distinguish حَمل from حِمل, and prompts for models without marks remove them."""
    digits: bool = True
    """Write Arabic-Indic digits, their decimal and thousands separators and percent sign as ASCII."""
    repeated_letters: bool = True
    """Shorten a letter that is repeated three times or more: inner long vowels to one, others to two; never digits."""
    repeated_punctuation: bool = True
    """Shorten "؟؟؟؟" to "؟" and four or more dots to two, as three mark a text that was cut; "+++" stays."""
    emoji: Literal["keep", "remove", "name"] = "keep"
    """Keep emoji, remove them, or write their Arabic names."""
    greetings: bool = True
    """Remove greetings at the beginning and thanks at the end, unless nothing else would be left."""
    whitespace: bool = True
    """Keep one space between words, at most one empty line between paragraphs, none at the ends."""


class Masking(Section):
    """The kinds of personal data to mask, in the order of the search."""

    email: bool = True
    """Mask e-mail addresses."""
    link: bool = True
    """Mask links."""
    national_id: bool = True
    """Mask national ids by their form, check digit or the words before them."""
    phone: bool = True
    """Mask phone numbers of the region's number plans, and numbers in international form."""
    name: bool = True
    """Mask names after a title; the title stays."""


Reason = Literal[
    "encoding_damage", "short_answer", "question_is_answer", "wrong_language", "truncated", "absent_picture"
]


class PrepareSettings(Section):
    """Settings of `sevpeft prepare`; `data` has the input, and the sizes and seed of the split."""

    data: DataSection = Field(default_factory=DataSection)
    cleaning: Cleaning = Field(default_factory=Cleaning)
    masking: Masking = Field(default_factory=Masking)
    allow: list[Reason] = Field(default_factory=list)
    """Reasons that do not reject a row, such as [truncated, absent_picture]."""
    near_duplicates: float = Field(default=0.7, ge=0.5, le=1)
    """Minimum Jaccard similarity of near-duplicate questions; 1 for equal questions only."""
    drop_duplicates: Literal["none", "exact", "near"] = "exact"
    """Keep one of equal consultations (exact), one of near-duplicate questions (near), or all (none)."""
    split_by: str | None = None
    """Column whose values are held out whole, the newest of numbers and dates; unset, by a column split or random."""
    resplit: bool = False
    """Make a new split even if the input has a column split."""
    num_proc: int | None = Field(default=None, ge=1)
    """Processes that clean and compare; unset, one per core. The result does not depend on it."""
