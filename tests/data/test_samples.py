"""The bundled consultations match their card: balanced, distinct, clean and safe in critical answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from sevpeft.data.read import load_consultations
from sevpeft.data.text import fold_for_matching

FOLDER = Path(__file__).parent.parent.parent / "sevpeft" / "data" / "samples"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
ROWS: list[dict[str, str]] = [
    json.loads(line) for line in (FOLDER / "consultations.jsonl").read_text(encoding="utf-8").splitlines()
]
TEXTS = ("question", "answer")


def where(condition: object) -> list[str]:
    """Ids of the rows for which the condition holds: what a failing test shows."""
    assert callable(condition)
    return [row["id"] for row in ROWS if condition(row)]


def counts(column: str) -> dict[str, int]:
    return dict(Counter(row[column] for row in ROWS))


def test_there_are_as_many_rows_as_the_card_says_and_enough() -> None:
    assert len(ROWS) == int(re.search(r"^(\d+) medical consultations", CARD, re.M)[1]) >= 360
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    columns = re.findall(r"^\| (\w+) \| (?!meaning)", CARD, re.M)
    assert all(list(row) == columns for row in ROWS)
    assert where(lambda row: any(value != value.strip() or not value for value in row.values())) == []


def test_severities_are_equally_frequent_in_every_specialty() -> None:
    assert counts("severity") == dict.fromkeys(("non_critical", "neutral", "critical"), 140)
    specialties = counts("specialty")
    assert len(specialties) >= 15 and set(specialties.values()) == {21}
    assert set(Counter((row["specialty"], row["severity"]) for row in ROWS).values()) == {7}
    assert f"one of {len(specialties)}, 21 consultations each" in CARD


def test_five_dialects_are_there_as_the_card_counts_them() -> None:
    listed = re.search(r"^\| dialect \| of the question: (.*) \|$", CARD, re.M)[1]
    assert counts("dialect") == {name: int(count) for name, count in (part.split() for part in listed.split(", "))}
    assert len(counts("dialect")) == 5 and min(counts("dialect").values()) >= 60
    for severity in ("non_critical", "neutral", "critical"):
        assert len({row["dialect"] for row in ROWS if row["severity"] == severity}) == 5


def test_the_split_is_the_one_of_the_card_within_every_specialty_and_severity() -> None:
    assert counts("split") == {"train": 300, "validation": 60, "test": 60}
    assert "train 300, validation 60, test 60" in CARD
    parts = Counter((row["specialty"], row["severity"], row["split"]) for row in ROWS)
    assert {part[2]: count for part, count in parts.items()} == {"train": 5, "validation": 1, "test": 1}
    assert all(count == (5 if split == "train" else 1) for (_, _, split), count in parts.items())


def test_an_id_says_specialty_and_severity() -> None:
    assert where(lambda row: not re.fullmatch(rf"{row['specialty']}-{row['severity']}-0[1-7]", row["id"])) == []


@pytest.mark.parametrize("column", TEXTS)
def test_no_text_stands_there_twice_in_other_spelling(column: str) -> None:
    folded = Counter(fold_for_matching(row[column]) for row in ROWS)
    assert where(lambda row: folded[fold_for_matching(row[column])] > 1) == []


def test_no_question_is_nearly_that_of_another_split() -> None:
    """No two questions on different sides share more than half of their words."""
    words = [(row["split"], set(fold_for_matching(row["question"]).split())) for row in ROWS]
    near = [
        (ROWS[i]["id"], ROWS[j]["id"])
        for i, (side, one) in enumerate(words)
        for j, (other, two) in enumerate(words[:i])
        if side != other and len(one & two) > 0.5 * len(one | two)
    ]
    assert near == []


@pytest.mark.parametrize("column", TEXTS)
def test_lengths_are_those_of_the_card(column: str) -> None:
    lengths = [len(row[column].split()) for row in ROWS]
    listed = re.search(rf"^\| {column} \| .*?(\d+) to (\d+) words \(median (\d+)\)", CARD, re.M)
    assert [min(lengths), max(lengths), median(lengths)] == [int(number) for number in listed.groups()]


@pytest.mark.parametrize("column", TEXTS)
def test_no_text_could_name_or_reach_a_person(column: str) -> None:
    """No Latin letters (names, addresses, handles), no links, no run of digits as of a telephone or a file."""
    assert where(lambda row: re.search(r"[A-Za-z@#<>{}|\\]|://", row[column])) == []
    assert where(lambda row: re.search(r"\d(?:[\s\-./]*\d){4}", row[column])) == []
    assert where(lambda row: len(re.findall(r"[\u0600-\u06ff]", row[column])) < 20) == []
    assert where(lambda row: re.search(r"[\x00-\x1f\x7f\u200b-\u200f\u202a-\u202e\ufeff\ufffd]", row[column])) == []


PLACES = ("طوارئ", "مستشفي", "اسعاف", "مستعجلات", "استعجالي")
AT_ONCE = (
    "الان",
    "فور",
    "حالا",
    "عاجل",
    "دابا",
    "هلق",
    "هلا",
    "هسه",
    "هسا",
    "دلوقتي",
    "الحين",
    "توا",
    "اليوم",
    "الليله",
)


def urgent(answer: str) -> bool:
    """Whether an answer sends to urgent care: emergency room or ambulance, or a hospital and at once."""
    words = fold_for_matching(answer)
    emergency = any(fold_for_matching(place) in words for place in PLACES if place != "مستشفي")
    return emergency or ("مستشفي" in words and any(moment in words for moment in AT_ONCE))


def test_every_critical_answer_sends_to_urgent_care() -> None:
    assert where(lambda row: row["severity"] == "critical" and not urgent(row["answer"])) == []


def test_the_list_of_urgent_words_tells_answers_apart() -> None:
    assert not urgent("راجع طبيب الجلدية خلال يومين") and not urgent("تحتاج فحصا في المستشفى")
    assert urgent("روح المستشفى دلوقتي") and urgent("اطلب الإسعاف") and urgent("سير للمستعجلات")
    milder = [urgent(row["answer"]) for row in ROWS if row["severity"] == "non_critical"]
    assert sum(milder) < len(milder) / 10


def test_no_answer_gives_a_dose() -> None:
    dose = r"\d+\s*(?:ملغ|مجم|مغ|ملليغرام|مليغرام|جرام|غرام|مل\b|حب[ةه]|قرص|قطر[ةه])|\b(?:ملغ|مجم|ملليغرام|مليغرام)\b"
    assert where(lambda row: re.search(dose, row["answer"])) == []


def test_the_reader_takes_the_sample_whole() -> None:
    read = load_consultations("builtin:consultations")
    assert len(read.rows) == len(ROWS) and sum(read.rejected.values()) == 0
    for column in ("id", "question", "answer", "severity", "dialect", "split"):
        assert read.rows[column][:] == [row[column] for row in ROWS], column
