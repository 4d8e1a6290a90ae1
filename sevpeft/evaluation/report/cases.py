"""Questions with the answers of all arms side by side, and the words marked that severity and safety were judged by.

The marks show what the lexicons found, so that a reader sees what they missed. A page holds a sample, drawn without
looking at any score; the arms are joined by the id of the question, never by position.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice, zip_longest
from typing import Any

from sevpeft.evaluation.safety import safety_findings
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.rules import Match, Rules
from sevpeft.severity.words import read

UNKNOWN = "unknown"
_ARABIC = re.compile(r"[\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff]")
_LATIN = re.compile(r"[A-Za-z]")
# Blanks, words, and the punctuation at the end of a word.
_TOKENS = re.compile(r"\s+|\S+?(?=[.,،؛;:!؟?…)(]*(?:\s|$))|\S+")
_CONTEXTS = {
    "negated": "negated",
    "past": "in the past",
    "hypothetical": "only possible",
    "asked": "only asked about",
    "other": "about another person",
}
# What the safety lexicons found in an answer → how the page words it.
_HITS = {
    "referral": "sends to care",
    "reassurance": "reassures",
    "medicine": "medicine not in the reference",
    "dose": "dose not in the reference",
    "negated": "negated, not counted",
    "conditional": "conditional, not counted",
    "asked": "asked, not counted",
}
# Arm → id → line of predictions.jsonl, in the order in which the arms are shown.
Answers = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Piece:
    """A stretch of a question: its severity mark ("" where there is none), and the text of its tooltip."""

    text: str
    mark: str = ""
    tooltip: str = ""


@dataclass(frozen=True)
class Answer:
    """One answer: hits are (kind, in words, the words that hit); opinion is a judge's, empty where there is none."""

    arm: str
    text: str
    direction: str
    truncated: bool
    hits: tuple[tuple[str, str, str], ...]
    opinion: str


@dataclass(frozen=True)
class Case:
    """A question with the answers of all arms, and the reference as the last."""

    identity: str
    severity: str
    question: tuple[Piece, ...]
    direction: str
    answers: tuple[Answer, ...]


def shared_ids(answers: Answers) -> set[str]:
    """Ids that every arm answered."""
    return set.intersection(*(set(by_id) for by_id in answers.values())) if answers else set()


def sample(answers: Answers, limit: int, seed: int = 0) -> list[str]:
    """At most `limit` ids that every arm answered: the same number of each severity where there are so many.

    Drawn at random, critical first, in the order of the file within a severity.
    """
    shared = shared_ids(answers)
    by_severity: dict[str, list[str]] = {name: [] for name in (*reversed(SEVERITIES), UNKNOWN)}
    for identity, row in next(iter(answers.values()), {}).items():
        if identity in shared:
            by_severity[_severity(row)].append(identity)
    drawing = random.Random(seed)
    drawn = [drawing.sample(ids, len(ids)) for ids in by_severity.values()]
    in_turn = (identity for identity in chain.from_iterable(zip_longest(*drawn)) if identity is not None)
    chosen = set(islice(in_turn, limit))
    return [identity for ids in by_severity.values() for identity in ids if identity in chosen]


def cases(answers: Answers, identities: Sequence[str]) -> list[Case]:
    """The questions of the ids with every arm's answer."""
    if not identities:
        return []
    first = next(iter(answers.values()))
    rows = [first[identity] for identity in identities]
    questions, references = [str(row["question"]) for row in rows], [str(row["reference"]) for row in rows]
    critical = [_severity(row) == SEVERITIES[-1] for row in rows]
    lines: dict[str, list[Mapping[str, Any]]] = {
        arm: [by_id[identity] for identity in identities] for arm, by_id in answers.items()
    }
    lines["reference"] = [{"prediction": text} for text in references]
    by_arm: list[list[Answer]] = []
    for arm, of in lines.items():
        texts = [str(line["prediction"]) for line in of]
        found = safety_findings(texts, references=references, questions=questions, critical=critical)
        by_arm.append(
            [
                Answer(
                    arm,
                    text,
                    direction(text),
                    bool(line.get("truncated")),
                    tuple((kind, _HITS.get(kind, kind), "، ".join(words)) for kind, words in finding.hits.items()),
                    _opinion(line.get("judgement")),
                )
                for text, line, finding in zip(texts, of, found, strict=True)
            ]
        )
    return [
        Case(identity, _severity(row), marked(question), direction(question), of_all)
        for identity, row, question, of_all in zip(identities, rows, questions, zip(*by_arm, strict=True), strict=True)
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
    for found in _rules().matches(question):  # the worst level first
        for position in found.positions:
            if position not in marks or (marks[position].discounted and not found.discounted):
                marks[position] = found
    pieces: list[Piece] = []
    position, between = 0, ""
    before: Match | None = None
    for token in _TOKENS.findall(question):
        # Words are counted as the rules count them: punctuation is none, a wrapped negation is two.
        count = len(read(token).words)
        if not count:
            between += token
            continue
        here = [marks[at] for at in range(position, position + count) if at in marks]
        position += count
        match = min(here, key=lambda one: (one.discounted, -SEVERITIES.index(one.level)), default=None)
        if pieces and match is before:
            pieces[-1] = replace(pieces[-1], text=pieces[-1].text + between + token)
        else:
            pieces += [Piece(between)] if between else []
            pieces.append(_piece(token, match))
        before, between = match, ""
    return (*pieces, *([Piece(between)] if between else []))


def _piece(text: str, match: Match | None) -> Piece:
    if match is None:
        return Piece(text)
    level = match.level.replace("_", "-")
    if match.discounted:
        return Piece(text, "discounted", f"{level}, but {_CONTEXTS[match.context]}")
    return Piece(text, match.level, f"{level}: {match.category}")


def _opinion(judgement: Mapping[str, Any] | None) -> str:
    """A judge's ratings and its reason: `urgency 4, harm no: sends to the emergency room`."""
    if not judgement:
        return ""
    if not judgement["ratings"]:
        return "no readable verdict"
    ratings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in judgement["ratings"].items())
    return f"{ratings}: {judgement['reason']}" if judgement["reason"] else ratings


def _severity(row: Mapping[str, Any]) -> str:
    found = str(row.get("severity"))
    return found if found in SEVERITIES else UNKNOWN


@cache
def _rules() -> Rules:
    return Rules.load()
