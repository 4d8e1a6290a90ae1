"""Questions with the answers of all arms side by side; words that the severity and safety lexicons matched are marked.

The marks let a reader see what the lexicons missed. A page has a sample that is drawn without regard to any score. The
arms are joined by the id of the question, never by position.
"""

import random
import re
from collections.abc import Mapping
from itertools import chain, groupby, islice, zip_longest
from typing import Any

from sevpeft.data.text import ARABIC
from sevpeft.evaluation.safety import rules, safety_findings
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.rules import Match
from sevpeft.severity.words import read

UNKNOWN = "unknown"
_LATIN = re.compile(r"[A-Za-z]")
# Blanks, words, and the punctuation at the end of a word.
_TOKENS = re.compile(r"\s+|\S+?(?=[.,،؛;:!؟?…)(]*(?:\s|$))|\S+")
# Arm → id → line of predictions.jsonl, in the order in which the arms are shown.
Answers = Mapping[str, Mapping[str, Mapping[str, Any]]]


def cases(answers: Answers, limit: int, seed: int = 0) -> tuple[list[dict[str, Any]], int]:
    """At most `limit` questions that every arm answered, in the form of the template, and the number of all of them.

    Drawn at random, the same number of each severity if possible. Critical questions come first; within a severity they
    are in the order of the file. The reference is the last answer.
    """
    shared = set.intersection(*(set(by_id) for by_id in answers.values())) if answers else set()
    by_severity: dict[str, list[str]] = {name: [] for name in (*reversed(SEVERITIES), UNKNOWN)}
    for identity, row in next(iter(answers.values()), {}).items():
        if identity in shared:
            by_severity[_severity(row)].append(identity)
    drawing = random.Random(seed)
    in_turn = chain.from_iterable(zip_longest(*(drawing.sample(ids, len(ids)) for ids in by_severity.values())))
    drawn = set(islice((identity for identity in in_turn if identity is not None), limit))
    shown = [_case(answers, identity) for ids in by_severity.values() for identity in ids if identity in drawn]
    return shown, len(shared)


def _case(answers: Answers, identity: str) -> dict[str, Any]:
    row = next(iter(answers.values()))[identity]
    question, reference = str(row["question"]), str(row["reference"])
    lines = {arm: by_id[identity] for arm, by_id in answers.items()} | {"reference": {"prediction": reference}}
    texts = [str(line["prediction"]) for line in lines.values()]
    repeated = {"references": [reference] * len(texts), "questions": [question] * len(texts)}
    findings = safety_findings(texts, **repeated, critical=[_severity(row) == SEVERITIES[-1]] * len(texts))
    return {
        "identity": identity,
        "severity": _severity(row),
        "question": marked(question),
        "direction": direction(question),
        "answers": [
            {"arm": arm, "text": text, "direction": direction(text), "hits": finding.hits}
            | {name: line.get(name) for name in ("truncated", "judgement")}
            for (arm, line), text, finding in zip(lines.items(), texts, findings, strict=True)
        ],
    }


def direction(text: str) -> str:
    """ "rtl" unless most letters are Latin. A browser decides by the first letter only: "COVID-19 هل هو خطير"."""
    return "ltr" if len(_LATIN.findall(text)) > len(ARABIC.findall(text)) else "rtl"


def marked(question: str) -> list[tuple[str, Match | None]]:
    """Pieces of the question, which joined are the question, each with its match of the severity rules.

    A word in several matches gets the worst stated level, or else the worst negated, past or other person's one.
    """
    marks: dict[int, Match] = {}
    for match in rules().matches(question):  # the worst level first
        for position in match.positions:
            if position not in marks or (marks[position].discounted and not match.discounted):
                marks[position] = match
    tokens, matches = _TOKENS.findall(question), list[Match | None]()
    position, last = 0, -1
    for at, token in enumerate(tokens):
        # Words are counted as by the rules: punctuation is no word, a negation around its verb is two.
        count = len(read(token).words)
        here = [marks[word] for word in range(position, position + count) if word in marks]
        matches.append(min(here, key=lambda match: (match.discounted, -SEVERITIES.index(match.level)), default=None))
        if count and last >= 0 and matches[last] is matches[at]:  # blanks and punctuation between belong to the match
            matches[last:at] = [matches[at]] * (at - last)
        position, last = position + count, at if count else last
    pieces = (list(piece) for _, piece in groupby(zip(tokens, matches, strict=True), key=lambda pair: id(pair[1])))
    return [("".join(token for token, _ in piece), piece[0][1]) for piece in pieces]


def _severity(row: Mapping[str, Any]) -> str:
    return row["severity"] if row.get("severity") in SEVERITIES else UNKNOWN
