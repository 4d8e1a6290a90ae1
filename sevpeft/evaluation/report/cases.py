"""Questions with the answers of all arms side by side, and the words marked that severity and safety were judged by.

The marks show what the lexicons found, so that a reader sees what they missed. A page holds a sample, drawn without
looking at any score; the arms are joined by the id of the question, never by position.
"""

from __future__ import annotations

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
    """At most `limit` questions that every arm answered, as the template shows them, and how many there are.

    The same number of each severity where there are so many, drawn at random; critical first, and in the order of the
    file within a severity. The reference is the last answer.
    """
    shared = set.intersection(*(set(by_id) for by_id in answers.values())) if answers else set()
    by_severity: dict[str, list[str]] = {name: [] for name in (*reversed(SEVERITIES), UNKNOWN)}
    for identity, row in next(iter(answers.values()), {}).items():
        if identity in shared:
            by_severity[_severity(row)].append(identity)
    drawing = random.Random(seed)
    in_turn = chain.from_iterable(zip_longest(*(drawing.sample(ids, len(ids)) for ids in by_severity.values())))
    chosen = set(islice((identity for identity in in_turn if identity is not None), limit))
    shown = [_case(answers, identity) for ids in by_severity.values() for identity in ids if identity in chosen]
    return shown, len(shared)


def _case(answers: Answers, identity: str) -> dict[str, Any]:
    row = next(iter(answers.values()))[identity]
    question, reference = str(row["question"]), str(row["reference"])
    lines = {arm: by_id[identity] for arm, by_id in answers.items()} | {"reference": {"prediction": reference}}
    texts = [str(line["prediction"]) for line in lines.values()]
    same = {"references": [reference] * len(texts), "questions": [question] * len(texts)}
    findings = safety_findings(texts, **same, critical=[_severity(row) == SEVERITIES[-1]] * len(texts))
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
    """ "rtl" unless most letters are Latin. The browser's own guess goes by the first one: "COVID-19 هل هو خطير"."""
    return "ltr" if len(_LATIN.findall(text)) > len(ARABIC.findall(text)) else "rtl"


def marked(question: str) -> list[tuple[str, Match | None]]:
    """The question in pieces that give it back unchanged, each with the match of the severity rules that it is part of.

    A word belongs to the worst level that is stated with it; negated, past or another person's comes after that.
    """
    marks: dict[int, Match] = {}
    for found in rules().matches(question):  # the worst level first
        for position in found.positions:
            if position not in marks or (marks[position].discounted and not found.discounted):
                marks[position] = found
    tokens, matches = _TOKENS.findall(question), list[Match | None]()
    position, last = 0, -1
    for at, token in enumerate(tokens):
        # Words are counted as the rules count them: punctuation is none, a wrapped negation is two.
        count = len(read(token).words)
        here = [marks[word] for word in range(position, position + count) if word in marks]
        matches.append(min(here, key=lambda one: (one.discounted, -SEVERITIES.index(one.level)), default=None))
        if count and last >= 0 and matches[last] is matches[at]:  # what stands between belongs to both
            matches[last:at] = [matches[at]] * (at - last)
        position, last = position + count, at if count else last
    stretches = (list(of) for _, of in groupby(zip(tokens, matches, strict=True), key=lambda one: id(one[1])))
    return [("".join(token for token, _ in of), of[0][1]) for of in stretches]


def _severity(row: Mapping[str, Any]) -> str:
    return row["severity"] if row.get("severity") in SEVERITIES else UNKNOWN
