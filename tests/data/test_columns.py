"""Columns are recognised by the names that public sets use, and nothing is guessed where two could be meant."""

import json
import math

import pytest

from sevpeft.data.columns import as_probability, as_text, canonical_row, map_columns
from sevpeft.errors import DataError

NOTHING_CHOSEN = dict.fromkeys(("question", "answer", "severity", "id", "dialect", "split"))


def mapped(*names: str, **chosen: str) -> dict[str, str]:
    return map_columns(names, NOTHING_CHOSEN | chosen, "x.csv")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("question", "answer"),
        ("Question", "ANSWER"),
        ("q_body", "a_body"),
        ("prompt", "completion"),
        ("instruction", "output"),
        ("input", "output"),
        ("complaint", "response"),
        ("السؤال", "الجواب"),
        ("السؤال", "الإجابة"),
        ("السؤال الطبي", "الاجابة"),
        ("سؤال", "إجابة"),
    ],
)
def test_question_and_answer_are_recognised(question: str, answer: str) -> None:
    assert mapped("other", answer, question) == {"question": question, "answer": answer}


def test_the_optional_columns_are_recognised() -> None:
    found = mapped("ID", "question", "answer", "درجة الخطورة", "اللهجة", "Split", "P_Critical", "Category")
    assert found == {
        **{"id": "ID", "question": "question", "answer": "answer", "severity": "درجة الخطورة"},
        **{"dialect": "اللهجة", "split": "Split", "p_critical": "P_Critical", "specialty": "Category"},
    }


def test_two_candidates_for_the_question_are_an_error_that_names_both_and_the_setting() -> None:
    with pytest.raises(DataError, match=r"'instruction' and 'input'.*data\.question_column"):
        mapped("instruction", "input", "output")


def test_a_chosen_column_ends_the_ambiguity() -> None:
    assert mapped("instruction", "input", "output", question="input")["question"] == "input"


def test_a_chosen_column_is_not_guessed_for_something_else() -> None:
    assert "severity" not in mapped("question", "answer", "label", dialect="label")


def test_the_canonical_name_wins_over_other_names_of_severity() -> None:
    assert mapped("question", "answer", "label", "severity")["severity"] == "severity"


def test_two_other_names_of_severity_are_an_error() -> None:
    with pytest.raises(DataError, match=r"'label' and 'urgency'.*data\.severity_column"):
        mapped("question", "answer", "label", "urgency")


def test_missing_columns_are_listed_beside_those_that_exist() -> None:
    with pytest.raises(DataError, match=r"a question or an answer.*'text', 'topic'"):
        mapped("text", "topic")


def test_a_chosen_column_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no column 'urgence', which data\.severity_column asks for.*'question'"):
        mapped("question", "answer", severity="urgence")


def test_a_row_taken_for_a_header_is_not_quoted() -> None:
    complaint = "عندي ألم شديد في الصدر منذ يومين ولا أستطيع النوم"
    with pytest.raises(DataError) as refused:
        mapped(complaint, "b")
    assert "ألم" not in str(refused.value)


def test_one_column_for_two_things_is_an_error() -> None:
    with pytest.raises(DataError, match="'answer' is set for answer and severity"):
        mapped("question", "answer", answer="answer", severity="answer")


def test_the_rows_can_be_numbered_although_there_are_ids() -> None:
    assert "id" not in mapped("id", "question", "answer", id="row")


def test_messages_are_question_and_answer_at_once() -> None:
    assert mapped("messages") == {"question": "messages", "answer": "messages"}
    with pytest.raises(DataError, match=r"'messages' and 'prompt'.*data\.question_column"):
        mapped("messages", "prompt", "completion")
    assert mapped("messages", "prompt", "completion", question="prompt")["answer"] == "completion"


MESSAGES = [
    {"role": "system", "content": "طبيب"},
    {"role": "user", "content": "سؤال"},
    {"role": "assistant", "content": "جواب"},
]
CONVERSATION = {"question": "messages", "answer": "messages"}


@pytest.mark.parametrize("cell", [MESSAGES, MESSAGES[1:], json.dumps(MESSAGES)])
def test_one_exchange_is_read_with_or_without_a_system_message(cell: object) -> None:
    assert canonical_row({"messages": cell}, CONVERSATION, "x, row 1") == {
        "question": "سؤال",
        "answer": "جواب",
    }


@pytest.mark.parametrize("cell", [MESSAGES + MESSAGES[1:], MESSAGES[:2], MESSAGES[::-1], "[", '"hm"', 7, [{}]])
def test_any_other_conversation_is_an_error_that_names_the_row(cell: object) -> None:
    with pytest.raises(DataError, match=r"x, row 7: column 'messages' is not"):
        canonical_row({"messages": cell}, CONVERSATION, "x, row 7")


@pytest.mark.parametrize("cell", [None, math.nan, "", "  ", "NaN", [], "null"])
def test_empty_messages_are_no_consultation(cell: object) -> None:
    assert canonical_row({"messages": cell}, CONVERSATION, "x, row 7") == "empty question"


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("نص", "نص"),
        ("a\r\nb", "a\nb"),
        (12, "12"),
        (12.0, "12"),
        (0.5, "0.5"),
        (None, ""),
        (math.nan, ""),
        ("NaN", ""),
        ("None of it", "None of it"),
    ],
)
def test_cells_become_text(cell: object, text: str) -> None:
    assert as_text(cell, "question", "x, row 1") == text


@pytest.mark.parametrize("cell", [["a"], {"a": 1}, b"a"])
def test_lists_and_objects_are_no_text(cell: object) -> None:
    with pytest.raises(DataError, match=r"x, row 4: column 'q' holds a (list|dict|bytes)"):
        as_text(cell, "q", "x, row 4")


@pytest.mark.parametrize("cell", [0.25, "0.25", " 0,25 ", "٠٫٢٥"])
def test_probabilities_are_read_as_spreadsheets_write_them(cell: object) -> None:
    assert as_probability(cell, "p_critical", "x, row 1") == 0.25


@pytest.mark.parametrize("cell", [None, "", "nan", math.nan])
def test_an_empty_probability_is_nan(cell: object) -> None:
    assert math.isnan(as_probability(cell, "p_critical", "x, row 1"))


@pytest.mark.parametrize("cell", ["high", True, [0.5]])
def test_a_probability_that_is_no_number_is_an_error(cell: object) -> None:
    with pytest.raises(DataError, match="x, row 3: column 'p_critical'") as refused:
        as_probability(cell, "p_critical", "x, row 3")
    assert "high" not in str(refused.value)


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [(" ", "a", "empty question"), ("q", None, "empty answer"), ("q \ud83d", "a", "broken characters")],
)
def test_a_row_without_both_texts_is_rejected_with_its_reason(question: str, answer: str, reason: str) -> None:
    columns = {"question": "q", "answer": "a"}
    assert canonical_row({"q": question, "a": answer}, columns, "x, row 1") == reason
