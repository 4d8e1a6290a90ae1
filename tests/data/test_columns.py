"""Columns are recognized by the names of public data sets; an ambiguous column is refused."""

from __future__ import annotations

import json
import math
from datetime import date
from typing import Any

import pytest

from sevpeft.data.columns import (
    NO_CONVERSATION,
    NO_NUMBER,
    SEVERAL_TURNS,
    TURNS,
    as_probability,
    as_text,
    canonical_row,
    map_columns,
    trained_turns,
)
from sevpeft.errors import DataError

NOTHING_CHOSEN = dict.fromkeys(("question", "answer", "severity", "id", "dialect", "split"))


def mapped(*names: str, **chosen: str) -> dict[str, str]:
    return map_columns(names, NOTHING_CHOSEN | chosen, "x.csv")


def test_question_and_answer_are_recognized() -> None:
    pairs = [
        *(("question", "answer"), ("Question", "ANSWER"), ("q_body", "a_body"), ("prompt", "completion")),
        *(("instruction", "output"), ("input", "output"), ("complaint", "response"), ("السؤال", "الجواب")),
        *(("السؤال", "الإجابة"), ("السؤال الطبي", "الاجابة"), ("سؤال", "إجابة")),
    ]
    assert [p for p in pairs if mapped("other", p[1], p[0]) != {"question": p[0], "answer": p[1]}] == []


def test_the_optional_columns_are_recognized() -> None:
    found = mapped("ID", "question", "answer", "درجة الخطورة", "اللهجة", "Split", "P_Critical", "Category")
    assert found == {
        **{"id": "ID", "question": "question", "answer": "answer", "severity": "درجة الخطورة"},
        **{"dialect": "اللهجة", "split": "Split", "p_critical": "P_Critical", "specialty": "Category"},
    }
    assert mapped("question", "answer", "label", "severity")["severity"] == "severity"
    assert mapped("question", "answer", "category", "Specialty")["specialty"] == "Specialty"
    assert "id" not in mapped("id", "question", "answer", id="row")


def test_a_chosen_column_ends_the_ambiguity_and_is_not_guessed_for_something_else() -> None:
    assert mapped("instruction", "input", "output", question="input")["question"] == "input"
    assert "severity" not in mapped("question", "answer", "label", dialect="label")
    assert mapped("question", "answer", "Clinic Name", severity="clinic_name")["severity"] == "Clinic Name"


def test_what_is_not_clear_is_refused_with_the_setting_and_without_a_row_that_was_taken_for_a_header() -> None:
    complaint = "عندي ألم شديد في الصدر منذ يومين ولا أستطيع النوم"
    for names, chosen, parts in (
        (("prompt", "input", "output"), {}, ("'prompt' and 'input'", "data.question_column")),
        (("question", "answer", "label", "urgency"), {}, ("'label' and 'urgency'", "data.severity_column")),
        (("messages", "prompt", "completion"), {}, ("'messages' and 'prompt'", "data.question_column")),
        (("text", "topic"), {}, ("data.question_column and data.answer_column", "'text', 'topic'")),
        (("question", "answer"), {"severity": "urgence"}, ("'urgence'", "data.severity_column", "'question'")),
        (("question", "answer"), {"answer": "answer", "severity": "answer"}, ("'answer' is set for answer and",)),
        ((complaint, "b"), {}, ("1 more or longer",)),
    ):
        with pytest.raises(DataError) as refused:
            mapped(*names, **chosen)
        assert all(part in str(refused.value) for part in parts) and "ألم" not in str(refused.value)


MESSAGES = [
    {"role": "system", "content": "طبيب"},
    {"role": "user", "content": "سؤال"},
    {"role": "assistant", "content": "جواب"},
]
CONVERSATION = {"question": "messages", "answer": "messages"}


def test_messages_are_question_and_answer_at_once() -> None:
    assert mapped("messages") == CONVERSATION
    assert mapped("messages", "prompt", "completion", question="prompt")["answer"] == "completion"
    for cell in (MESSAGES, MESSAGES[1:], json.dumps(MESSAGES)):
        assert canonical_row({"messages": cell}, CONVERSATION, "x", {}) == {"question": "سؤال", "answer": "جواب"}
    for cell in (None, math.nan, "", "  ", "NaN", [], "null"):
        assert canonical_row({"messages": cell}, CONVERSATION, "x", {}) == "empty question"


def test_any_other_conversation_is_no_row() -> None:
    assert canonical_row({"messages": MESSAGES + MESSAGES[1:]}, CONVERSATION, "x, row 7", {}) == SEVERAL_TURNS
    for cell in (MESSAGES[:2], MESSAGES[::-1], "[", '"hm"', 7, [{}], "[" * 100_000, "[{" * 100_000):
        assert canonical_row({"messages": cell}, CONVERSATION, "x, row 7", {}) == NO_CONVERSATION, cell


def turns(*exchanges: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Messages of (question, answer) or (question, answer, weight)."""
    found: list[dict[str, Any]] = []
    for question, answer, *weight in exchanges:
        found.append({"role": "user", "content": question})
        found.append({"role": "assistant", "content": answer, **({"weight": weight[0]} if weight else {})})
    return found


def test_a_conversation_of_several_turns_is_trained_on_its_last_answer_or_on_all() -> None:
    cell = turns(("س1", "ج1"), ("س2", "ج2", 0), ("س3", "ج3", 0.5))
    whole = [["س1", "ج1"], ["س2", "ج2"]]
    last, every = ([("س3", "ج3", 0.5, whole)], [("س1", "ج1", 1.0, []), ("س3", "ج3", 0.5, whole)])
    for loss_on, expected in (("last", last), ("all", every)):
        for given in (cell, json.dumps(cell), [MESSAGES[0], *cell]):
            row = canonical_row({"messages": given}, CONVERSATION, "x", {}, loss_on)
            assert isinstance(row, dict) and (row["question"], row["answer"]) == ("س1\nس2\nس3", "ج3")
            assert list(trained_turns(row["question"], row["answer"], row[TURNS])) == expected
    # What comes after the last answer that is trained on is not read by a model either.
    row = canonical_row({"messages": turns(("س1", "ج1"), ("س2", "ج2", 0))}, CONVERSATION, "x", {}, "all")
    assert row == {"question": "س1", "answer": "ج1", TURNS: json.dumps([["س1", "ج1", 1.0]], ensure_ascii=False)}
    row = canonical_row({"messages": MESSAGES}, CONVERSATION, "x", {}, "last")
    assert row == {"question": "سؤال", "answer": "جواب", TURNS: ""}
    for loss_on, cell, reason in (
        ("last", turns(("س1", "ج1"), ("س2", "ج2", 0)), "no answer to train on"),
        ("all", turns(("س1", "ج1", 0), ("س2", "ج2", 0)), "no answer to train on"),
        ("last", turns(("س1", " "), ("س2", "ج2")), "empty answer"),
        ("last", turns(("س1", "ج1"), ("", "ج2")), "empty question"),
    ):
        assert canonical_row({"messages": cell}, CONVERSATION, "x", {}, loss_on) == reason


def test_what_is_no_conversation_is_no_row_and_quotes_nothing() -> None:
    user, assistant = {"role": "user", "content": "سر"}, {"role": "assistant", "content": "جواب"}
    wrong = []
    for cell in (
        [user, assistant, user],
        [user, user, assistant],
        [assistant, user],
        [user, {"role": "سر", "content": "x"}],
        [{"role": "system", "content": "x"}],
        [user, {**assistant, "weight": -1}],
        [user, {**assistant, "weight": "سر"}],
        [user, {**assistant, "weight": float("inf")}],
        [user, {**assistant, "content": [{"type": "image", "url": "سر"}]}],
        [user, {"role": "assistant"}],
    ):
        found = canonical_row({"messages": cell}, CONVERSATION, "x, row 7", {}, "all")
        wrong += [] if found in (NO_CONVERSATION, NO_NUMBER) else [found]
    assert wrong == []
    # A weight is not dropped where only one exchange is read.
    weighted = [user, {**assistant, "weight": 0.5}]
    assert canonical_row({"messages": weighted}, CONVERSATION, "x, row 7", {}) == SEVERAL_TURNS


def test_cells_become_text() -> None:
    texts = [
        *(("نص", "نص"), ("a\r\nb", "a\nb"), (12, "12"), (12.0, "12"), (0.5, "0.5"), (None, ""), (math.nan, "")),
        *(
            ("NaN", ""),
            ("#NAME?", ""),
            ("#DIV/0!", ""),
            ("None of it", "None of it"),
            (date(2024, 5, 1), "2024-05-01"),
            (True, "True"),
        ),
    ]
    assert [(cell, text) for cell, text in texts if as_text(cell, "question", "x") != text] == []
    for cell in (["a"], {"a": 1}, b"a"):
        with pytest.raises(DataError, match=r"x, row 4: column 'q' holds a list"):
            as_text(cell, "q", "x, row 4")


def test_probabilities_are_read_as_spreadsheets_write_them() -> None:
    assert {as_probability(cell, "p_critical", "x") for cell in (0.25, "0.25", " 0,25 ", "٠٫٢٥")} == {0.25}
    assert all(math.isnan(as_probability(cell, "p_critical", "x")) for cell in (None, "", "nan", math.nan))
    for cell in ("high", True, [0.5]):
        with pytest.raises(DataError, match="x, row 3: column 'p_critical'") as refused:
            as_probability(cell, "p_critical", "x, row 3")
        assert "high" not in str(refused.value)


def test_a_row_without_both_texts_is_rejected_with_its_reason() -> None:
    for question, answer, reason in (
        (" ", "a", "empty question"),
        ("q", None, "empty answer"),
        ("q \ud83d", "a", "broken characters"),
    ):
        assert canonical_row({"q": question, "a": answer}, {"question": "q", "answer": "a"}, "x", {}) == reason
