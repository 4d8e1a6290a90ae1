"""Control characters in data are shown on a terminal and never sent to it; JSON keeps its value."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sevpeft.console import Screen, number_text, p_text, print_json, print_text, visible
from tests.conftest import Cli

# Clears the screen, sets its title, rings, overwrites the line, C1's CSI, turns the direction, splits a line.
HOSTILE = ["\x1b[2J", "\x1b]0;owned\x07", "\x07", "\b", "a\rb", "\x7f", "\x9b2J", "\x85", "\u202e", "\u2066", "\u2028"]
MARKUP = ["[/b]", "[red]", "o[/b]ut", "[link=http://x]", ":warning:"]
ARABIC = "عندي صداع\u200f منذ يومين\n\tو\u200cحرارة 🤒 ٣٨"


def sent(text: str) -> list[str]:
    return re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", text)


def test_no_way_of_printing_sends_a_control_character_or_reads_markup() -> None:
    ways = {
        "text": lambda screen, text: screen.print(text, soft_wrap=True),
        "Text": lambda screen, text: screen.print(Text(text)),
        "two": lambda screen, text: screen.print("x", text, style="yellow"),
        "table": lambda screen, text: screen.print(_table(text)),
        "Text in a table": lambda screen, text: screen.print(_table(Text(text))),
        "status": _status,
        "bar": _bar,
        "log": lambda screen, text: screen.log(text),
    }
    wrong = []
    for way, show in ways.items():
        for text in (*HOSTILE, *MARKUP):
            screen = Screen(file=io.StringIO(), width=200)
            try:
                show(screen, text)
            except Exception as error:
                wrong.append((way, text, repr(error)))
                continue
            shown = screen.file.getvalue()
            if sent(shown) or (text in MARKUP and text not in shown):
                wrong.append((way, text, shown))
    assert wrong == []


def _table(cell: str | Text) -> Table:
    table = Table(title=cell)
    table.add_column(cell)
    table.add_row(cell)
    return table


def _status(screen: Screen, text: str) -> None:
    with screen.status(text) as status:
        status.update(text)
        screen.print(status)


def _bar(screen: Screen, text: str) -> None:
    with Progress(TextColumn("{task.description}", markup=False), console=screen) as bar:
        bar.add_task(text)


def test_arabic_and_line_ends_stay() -> None:
    assert visible(ARABIC) == ARABIC
    assert visible("one\r\ntwo") == "one\r\ntwo"
    screen = Screen(file=io.StringIO(), width=80)
    screen.print(ARABIC.replace("\t", ""), soft_wrap=True)
    assert screen.file.getvalue() == ARABIC.replace("\t", "") + "\n"


def test_what_rich_says_to_a_terminal_still_reaches_it() -> None:
    screen = Screen(file=io.StringIO(), force_terminal=True, width=80)
    screen.print("x", style="yellow")
    assert screen.file.getvalue() == "\x1b[33mx\x1b[0m\n"


def test_json_stays_the_same_json(capsys: pytest.CaptureFixture[str]) -> None:
    content = {"".join(HOSTILE): ["\\", *HOSTILE, "\\\x7f", ARABIC, *MARKUP]}
    print_json(content)
    print_text("\x1b[2J", stderr=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == content and not sent(printed.out)
    assert printed.err == "\\u001b[2J\n"


def test_refusals_and_tracebacks_of_the_command_are_escaped(sevpeft_: Cli) -> None:
    for arguments in (
        ["train", "\x1b[2J[/b]\u202e.yaml"],
        ["train", "--\x1b[2J"],
        ["\x9b2J"],
        ["report", "\x1b]0;x\x07"],
    ):
        code, _, message = sevpeft_(*arguments)
        assert code in (1, 2) and message and not sent(message), message
    run = subprocess.run(
        [sys.executable, "-m", "sevpeft", "train", "\x1b[2J.yaml"],
        capture_output=True,
        env={"PYTHONPATH": str(Path(__file__).parent.parent), "SEVPEFT_DEBUG": "1", "PYTHONUTF8": "1"},
    )
    message = run.stderr.decode()
    assert run.returncode == 1 and "Traceback" in message and not sent(message), message


def test_numbers_and_p_have_one_form() -> None:
    numbers = {5.111: "5.11", 61.23: "61.2", 100.0: "100", 9.999: "10.0", 12345.6: "12346", -0.5: "−0.50", None: "–"}
    assert {value: number_text(value) for value in numbers} == numbers
    assert [number_text(0.02, 4, sign=True), number_text(12.3456, 4), number_text(float("nan"))] == [
        "+0.020", "12.35", "–",
    ]  # fmt: skip
    values = {0.0123: ".012", 0.0004: "< .001", 1.0: "1.000", None: "–"}
    assert {p: p_text(p) for p in values} == values
