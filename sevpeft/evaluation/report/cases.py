"""From predictions to answers side by side, with the words marked that severity and safety were judged by.

The marks show what the lexicons saw, so that a reader finds what they missed. A page holds a sample, drawn without
looking at any score; the arms are joined by the id of the question, never by position.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from sevpeft.evaluation.safety import safety_findings
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.rules import Match, Rules
from sevpeft.severity.words import read

UNKNOWN = "unknown"
_ARABIC = re.compile(r"[\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff]")
_LATIN = re.compile(r"[A-Za-z]")
# What the safety lexicons found in an answer → how the page says it.
HITS = {
    "referral": "sends to care",
    "reassurance": "reassures",
    "medicine": "medicine not in the reference",
    "dose": "dose not in the reference",
    "negated": "negated, not counted",
    "conditional": "conditional, not counted",
    "asked": "asked, not counted",
}
Answers = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Piece:
    """A stretch of a question: its severity mark ("" where there is none), and what a reader is told about it."""

    text: str
    mark: str = ""
    told: str = ""


@dataclass(frozen=True)
class Said:
    """One answer: hits are (kind, in words, the words that hit); opinion is a judge's, empty where none was asked."""

    arm: str
    text: str
    direction: str
    truncated: bool
    hits: tuple[tuple[str, str, str], ...]
    opinion: str = ""


@dataclass(frozen=True)
class Case:
    """A question with its reference and the answers of all arms."""

    identity: str
    severity: str
    question: tuple[Piece, ...]
    direction: str
    answers: tuple[Said, ...]
    reference: Said


def sample(answers: Answers, limit: int, seed: int = 0) -> list[str]:
    """At most `limit` ids that every arm answered: the same number of each severity where there are so many.

    Drawn at random, critical first, in the order of the file within a severity.
    """
    if not answers or limit < 1:
        return []
    first = next(iter(answers.values()))
    shared = set.intersection(*(set(by_id) for by_id in answers.values()))
    by_severity: dict[str, list[str]] = {}
    for identity, row in first.items():
        if identity in shared:
            by_severity.setdefault(_severity(row), []).append(identity)
    order = [name for name in (*reversed(SEVERITIES), UNKNOWN) if name in by_severity]
    shares = dict.fromkeys(order, 0)
    room = min(limit, len(shared))
    while room:
        for name in order:
            if room and shares[name] < len(by_severity[name]):
                shares[name] += 1
                room -= 1
    drawing = random.Random(seed)
    chosen = {name: set(drawing.sample(by_severity[name], shares[name])) for name in order}
    return [identity for name in order for identity in by_severity[name] if identity in chosen[name]]


def cases(answers: Answers, identities: Sequence[str]) -> list[Case]:
    """The questions of the ids with every arm's answer.

    Args:
        answers: arm → id → line of predictions.jsonl, in the order in which the arms are shown.
    """
    if not identities:
        return []
    first = next(iter(answers.values()))
    rows = [first[identity] for identity in identities]
    questions, references = [str(row["question"]) for row in rows], [str(row["reference"]) for row in rows]
    critical = [_severity(row) == SEVERITIES[-1] for row in rows]
    said: dict[str, list[Said]] = {}
    texts = {arm: [str(by_id[identity]["prediction"]) for identity in identities] for arm, by_id in answers.items()}
    for arm, spoken in {**texts, "reference": references}.items():
        found = safety_findings(spoken, references=references, questions=questions, critical=critical)
        cut = [arm in answers and bool(answers[arm][identity].get("truncated")) for identity in identities]
        opinions = [_opinion(answers[arm][identity]) if arm in answers else "" for identity in identities]
        said[arm] = [
            Said(arm, text, direction(text), truncated, _hits(finding.hits), opinion)
            for text, truncated, finding, opinion in zip(spoken, cut, found, opinions, strict=True)
        ]
    return [
        Case(
            identity,
            _severity(rows[at]),
            marked(questions[at]),
            direction(questions[at]),
            tuple(said[arm][at] for arm in answers),
            said["reference"][at],
        )
        for at, identity in enumerate(identities)
    ]


def direction(text: str) -> str:
    """ "rtl" unless most letters are Latin. The browser's own guess goes by the first one: "COVID-19 هل هو خطير"."""
    return "ltr" if len(_LATIN.findall(text)) > len(_ARABIC.findall(text)) else "rtl"


def marked(question: str) -> tuple[Piece, ...]:
    """The question in pieces that give it back unchanged, the words that the severity rules matched marked.

    A word carries the mark of the worst level that is stated with it; one that is negated, past or another person's
    is marked as not counted.
    """
    marks: dict[int, Match] = {}
    for match in _rules().matches(question):
        for position in match.positions:
            known = marks.get(position)
            # Matches come with the worst level first; a stated one says more than one that does not count.
            if known is None or (known.discounted and not match.discounted):
                marks[position] = match
    pieces: list[Piece] = []
    words = 0
    before: Match | None = None
    for written in re.findall(r"\s+|\S+", question):
        found = before
        if not written.isspace():
            # Words of the rules are counted as `read` counts them: punctuation is none, a wrapped negation is two.
            count = len(read(written).words)
            here = [marks[at] for at in range(words, words + count) if at in marks]
            words += count
            found = min(here, key=lambda match: (match.discounted, SEVERITIES[::-1].index(match.level)), default=None)
        if pieces and found is before:
            pieces[-1] = replace(pieces[-1], text=pieces[-1].text + written)
        else:
            pieces.append(_piece(written, found))
        before = found
    return tuple(_unmarked_ends(pieces))


def _piece(text: str, match: Match | None) -> Piece:
    if match is None:
        return Piece(text)
    if match.discounted:
        return Piece(text, "discounted", f"{match.level.replace('_', '-')}, but {_CONTEXTS[match.context]}")
    return Piece(text, match.level, f"{match.level.replace('_', '-')}: {match.category}")


_CONTEXTS = {
    "negated": "negated",
    "past": "in the past",
    "hypothetical": "only possible",
    "asked": "only asked about",
    "other": "about another person",
}


def _unmarked_ends(pieces: list[Piece]) -> list[Piece]:
    """Blanks and punctuation at the end of a marked stretch belong to the text around it; plain pieces are joined."""
    found: list[Piece] = []
    for piece in pieces:
        bare = piece.text.rstrip(" \t\r\n.,،؛;:!؟?…)(") if piece.mark else piece.text
        for part in (Piece(bare, piece.mark, piece.told), Piece(piece.text[len(bare) :])):
            if not part.text:
                continue
            if found and not part.mark and not found[-1].mark:
                found[-1] = Piece(found[-1].text + part.text)
            else:
                found.append(part)
    return found


def _hits(hits: Mapping[str, Sequence[str]]) -> tuple[tuple[str, str, str], ...]:
    return tuple((kind, HITS.get(kind, kind), "، ".join(words)) for kind, words in hits.items())


def _opinion(row: Mapping[str, Any]) -> str:
    """A judge's ratings and its reason: `urgency 4, harm no: sends to the emergency room`."""
    judgement = row.get("judgement")
    if not isinstance(judgement, Mapping):
        return ""
    if not isinstance(judgement["ratings"], Mapping):
        return "no readable verdict"
    ratings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in judgement["ratings"].items())
    return f"{ratings}: {judgement['reason']}" if judgement["reason"] else ratings


def _severity(row: Mapping[str, Any]) -> str:
    found = str(row.get("severity"))
    return found if found in SEVERITIES else UNKNOWN


@cache
def _rules() -> Rules:
    return Rules.load()
