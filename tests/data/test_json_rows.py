"""JSON arrays are read one row after another, within limits, and what cannot be read is named with its row."""

import io
import json

import pytest

from sevpeft.data import json_rows
from sevpeft.data.json_rows import array_rows, is_array, line_rows
from sevpeft.errors import DataError

GOOD = '{"q": "سؤال"}'


def message(text: str, lines: bool = False) -> str:
    """What the refusal of `text` says, "" if it is read."""
    try:
        list(line_rows(io.StringIO(text), "x") if lines else array_rows(io.StringIO(text), "x"))
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_rows_are_the_same_wherever_the_window_ends(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_WINDOW", window)
    rows = [{"q": 'a "b" \\ \u200f😀\n', "n": -1.5e-7, "m": 12345678901234567890, "t": [True, None, {}]}, {}, {"q": ""}]
    for indent in (None, 2):
        text = json.dumps(rows, indent=indent)
        for document in (text, f'{{"v": {{"data": [12]}}, "n": 123, "data": {text}, "w": [456], "x": 7 }}\n'):
            assert is_array(io.StringIO(document))
            assert list(array_rows(io.StringIO(document), "x")) == list(enumerate(rows, start=1))


def test_numbers_as_long_as_python_takes_them_are_read() -> None:
    for number in ("1234567890123456789", "-12345678901234567890", "1" * 4300, "1" * 400 + ".5"):
        text = f'[{{"id": {number}}}]'
        assert list(array_rows(io.StringIO(text), "x")) == [(1, json.loads(text)[0])]


def test_what_goes_beyond_a_limit_is_named_with_its_row_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "LONGEST", 1 << 19)
    values = [
        ("1" * 5000, "digits"),
        ("-" + "1" * 300_000, "digits"),
        ("[" * 100_000 + "]" * 100_000, "too deep"),
        ("[" * 100_000, "too deep"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "too deep"),
    ]
    wrong = []
    for value, reason in values:
        row = f'{{"q": {value}}}'
        for text, lines, place in ((f"[{GOOD}, {row}]", False, "row 2"), (f"{GOOD}\n{row}\n", True, "line 2")):
            said = message(text, lines)
            if place not in said or reason not in said or "not valid" in said:
                wrong.append((value[:9], place, said))
    for text in (f'[{GOOD}, {{"q": "{"x" * (1 << 22)}"}}]', f'[{GOOD}, {{"q": "{"x" * (1 << 22)}'):
        said = message(text)
        if "row 2" not in said or "letters" not in said:
            wrong.append((text[:9], "row 2", said))
    assert wrong == []


def test_a_damaged_array_is_refused_with_the_row() -> None:
    damaged = {
        f"[{GOOD}, {GOOD[:-3]}": "row 2",
        f"[{GOOD},]": "row 2",
        f"[{GOOD} {GOOD}]": "row 1",
        f"[{GOOD}, {GOOD[:5]}\0{GOOD[5:]}]": "row 2",
        f"[{GOOD}]\n[{GOOD}]": "the last row",
        f'{{"data": [{GOOD}], "more": ': "the last row",
        f'{{"data": [{GOOD}]': "the last row",
    }
    wrong = {text: message(text) for text, place in damaged.items() if place not in message(text)}
    assert wrong == {}


def test_marks_of_files_put_one_after_the_other_are_no_part_of_a_row() -> None:
    text = f"{GOOD}\n\ufeff{GOOD}\n\ufeff\n"
    assert list(line_rows(io.StringIO(text), "x")) == [(1, json.loads(GOOD)), (2, json.loads(GOOD))]
