"""Users' files in all published formats are read; a row that does not fit goes to rejected.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sevpeft.data.columns import CELL_COUNT, NO_CONVERSATION, NOT_TEXT, SEVERAL_TURNS, as_text, map_columns
from sevpeft.data.prepare import Cleaning
from sevpeft.data.prepare.clean import clean
from sevpeft.data.read import Consultations, load_consultations
from sevpeft.data.text import fold_for_matching, strip_marks
from sevpeft.errors import DataError, RecipeError
from sevpeft.evaluation.judge import Rubric
from sevpeft.recipe import DataSection, TrainingDataSection, load_recipe
from tests.data.test_read import workbook

Q, A = "عندي صداع شديد", "راجع الطبيب اليوم"
PAIRS = [(f"{Q} {number}", f"{A} {number}") for number in range(3)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / "cache"))


def read(file: Path, content: Any, **settings: Any) -> Consultations:
    """What is read of a file of this content: text, rows of a workbook's sheets, or what becomes JSON."""
    if isinstance(content, dict) and file.suffix == ".xlsx":
        workbook(file, content)
    elif file.suffix == ".jsonl" and isinstance(content, list):
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return load_consultations(DataSection(path=str(file), **settings))


def pairs(found: Consultations) -> list[tuple[str, str]]:
    return list(zip(found.rows["question"], found.rows["answer"], strict=True))


def refusal(file: Path, content: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(file, content)
    text = str(refused.value)
    assert file.name in text and Q not in text and text.endswith(".") and "\n" not in text
    return text


def message(who: str, text: object) -> dict[str, object]:
    return {"role": who, "content": text}


def test_every_published_form_of_one_exchange_is_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "عندي صداع"}, {"type": "text", "text": "شديد"}]
    question_message, answer_message, system = message("user", Q), message("assistant", A), message("system", "طبيب")
    share_gpt = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
    forms: dict[str, tuple[dict[str, Any], str]] = {
        "messages": ({"messages": [system, question_message, answer_message]}, Q),
        "parts": (
            {"messages": [message("user", parts), message("assistant", [parts[0] | {"text": A}])]},
            Q.replace(" ش", "\nش"),
        ),
        "ShareGPT": ({"conversations": share_gpt, "system": "طبيب"}, Q),
        "ShareGPT, other roles": ({"conversation": [{"from": "user", "value": Q}, {"from": "model", "value": A}]}, Q),
        "text of JSON": ({"dialogue": json.dumps([message("patient", Q), message("doctor", A)])}, Q),
        "TRL": ({"prompt": [system, question_message], "completion": [answer_message]}, Q),
        "TRL, half of it": ({"prompt": [question_message], "completion": A}, Q),
        "TRL, other half": ({"prompt": Q, "completion": [answer_message]}, Q),
        "Alpaca": ({"instruction": Q, "input": "عمري أربعون", "output": A}, f"{Q}\nعمري أربعون"),
        "Alpaca without input": ({"instruction": Q, "input": "", "output": A}, Q),
        "Alpaca without instruction": ({"instruction": None, "input": Q, "output": A}, Q),
    }
    wrong = []
    for name, (row, question) in forms.items():
        for rows, suffix in (([row], "jsonl"), ([row, row], "jsonl"), ([row, row], "json")):
            found = pairs(read(tmp_path / f"x.{suffix}", rows))
            wrong += [] if found == [(question, A)] * len(rows) else [(name, suffix, found)]
    assert wrong == []


def test_a_row_that_does_not_fit_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    good = {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}
    twice = {"conversations": good["conversations"] * 2}
    torn = {"conversations": good["conversations"][:1]}
    shown = {"conversations": [message("user", [{"type": "image", "url": "x"}]), message("assistant", A)]}
    for content, suffix, rejected in (
        ([good, twice, torn, shown, good], "jsonl", {SEVERAL_TURNS: 1, NO_CONVERSATION: 2}),
        ([{"question": {"ar": Q}, "answer": A}, *[{"question": Q, "answer": A}] * 2], "json", {NOT_TEXT: 1}),
        ([{"question": Q, "answer": [A, A]}, *[{"question": Q, "answer": A}] * 2], "json", {NOT_TEXT: 1}),
        (f"question,answer\n{Q},{A}\n{Q}, و,{A}\n{Q}\n{Q},{A}\n", "csv", {CELL_COUNT: 2}),
        ({"A": [["question", "answer"], [Q, A], [Q, A, "x"], [Q, A]]}, "xlsx", {CELL_COUNT: 1}),
        (f"question,answer,p_critical\n{Q},{A},0.5\n{Q},{A},high\n{Q},{A},1\n", "csv", None),
    ):
        found = read(tmp_path / f"x.{suffix}", content)
        aside = [json.loads(line) for line in found.rejected_rows.read_text(encoding="utf-8").splitlines()]
        assert pairs(found) == [(Q, A)] * 2 and len(aside) == sum(found.rejected.values()) > 0
        assert rejected is None or found.rejected == rejected
    assert "2 with several turns" in refusal(tmp_path / "x.jsonl", [twice, twice])
    # Nothing of a row is lost, though its cells have no names.
    read(tmp_path / "y.csv", f"question,answer\n{Q},{A}\n{Q}, و,{A}\n")
    aside = load_consultations(tmp_path / "y.csv").rejected_rows.read_text(encoding="utf-8")
    assert json.loads(aside) == {"row": 3, "reason": CELL_COUNT, "cells": [Q, " و", A]}


def test_several_turns_of_trls_form_are_read_by_a_training(tmp_path: Path) -> None:
    prompt = [message("user", "س1"), message("assistant", "ج1"), message("user", "س2")]
    several = {"prompt": prompt, "completion": [message("assistant", "ج2")]}
    read(tmp_path / "x.jsonl", [several, {"prompt": [message("user", Q)], "completion": A}])
    for loss_on in ("last", "all"):  # answers in the prompt are context, as in TRL
        rows = load_consultations(TrainingDataSection(path=str(tmp_path / "x.jsonl"), loss_on=loss_on)).rows
        assert json.loads(rows["turns"][0]) == [["س1", "ج1", 0.0], ["س2", "ج2", 1.0]] and rows["turns"][1] == ""
    # Also behind rows that do not show what the columns hold.
    read(tmp_path / "y.jsonl", [{"prompt": None, "completion": None}, {"prompt": Q, "completion": A}, several])
    found = load_consultations(TrainingDataSection(path=str(tmp_path / "y.jsonl")))
    assert found.rejected == {"empty question": 1} and [bool(turns) for turns in found.rows["turns"]] == [False, True]
    read(tmp_path / "x.csv", f"question,answer\n{Q},{A}\n")
    assert "turns" not in load_consultations(TrainingDataSection(path=str(tmp_path / "x.csv"))).rows.column_names


def test_columns_are_known_by_usual_names_and_a_likelier_name_comes_first() -> None:
    wrong = []
    for question, answer in (
        *(("q", "a"), ("user", "assistant"), ("human", "gpt"), ("patient message", "Doctor_Response")),
        *(("الاستفسار", "الرد"), ("نص الاستشارة", "رد الدكتور"), ("أسئلة", "الأجوبة"), ("وصف الحالة", "النصيحة")),
    ):
        found = map_columns([answer, "note", question], {}, "x")
        wrong += [] if found == {"question": question, "answer": answer} else [found]
    assert wrong == []
    names = ["description", "question", "advice", "answer", "conversations"]
    assert map_columns(names, {}, "x") == {"question": "question", "answer": "answer"}


def test_what_is_missing_is_said_where_there_is_a_question_alone(tmp_path: Path) -> None:
    row = {"prompt": [message("user", Q)], "prompt_id": "1", "rubrics": [{"criterion": "x", "points": 5}]}
    assert "no answer column beside 'prompt'" in (text := refusal(tmp_path / "x.jsonl", [row])) and "or add it" in text
    assert "semicolon" in refusal(tmp_path / "x.csv", f"question~answer\n{Q}~{A}\n")


def test_a_table_as_pandas_writes_it_is_read_in_every_orient(tmp_path: Path) -> None:
    names = ["السؤال", "الجواب", "n"]
    rows = [[*pair, number] for number, pair in enumerate(PAIRS)]
    columns = {name: {str(at): row[place] for at, row in enumerate(rows)} for place, name in enumerate(names)}
    index = {str(at): dict(zip(names, row, strict=True)) for at, row in enumerate(rows)}
    one = {name: {"0": rows[0][place]} for place, name in enumerate(names)}
    documents = {
        "columns": columns,
        "index": index,
        "split": {"columns": names, "index": [0, 1, 2], "data": rows},
        "table": {"schema": {"fields": []}, "data": list(index.values())},
        "records": list(index.values()),
        "rows of an API": {"count": 3, "items": list(index.values())},
        "list": {name: [row[place] for row in rows] for place, name in enumerate(names)},
    }
    wrong = []
    for name, document in documents.items():
        for suffix, indent in (("json", None), ("json", 1), ("jsonl", None)):
            found = pairs(read(tmp_path / f"x.{suffix}", json.dumps(document, indent=indent) + "\n"))
            wrong += [] if found == PAIRS else [(name, suffix, indent, found)]
    assert wrong == [] and pairs(read(tmp_path / "x.json", one)) == PAIRS[:1]
    settings = {"question_column": "x", "answer_column": "y"}
    unknown = {"x": columns["السؤال"], "y": columns["الجواب"]}
    assert pairs(read(tmp_path / "x.json", unknown, **settings)) == PAIRS
    for nothing in (
        rows,
        {"train": documents["records"], "test": documents["records"]},
    ):  # without names, or two tables
        assert "orient='records'" in refusal(tmp_path / "x.json", nothing)


def test_separators_are_recognized_by_the_header(tmp_path: Path) -> None:
    wrong = []
    for header, mark in (
        *(("question{}answer", mark) for mark in ",;\t|"),
        *(("السؤال, الطبي{}الجواب", mark) for mark in ";\t|"),
        *(('sep={0}\n"question"{0}"answer"', mark) for mark in ",;|"),
    ):
        rows = "".join(f"{question}{mark}{answer}\n" for question, answer in PAIRS)
        for suffix in ("csv", "tsv"):
            found = read(tmp_path / f"x.{suffix}", f"{header.format(mark)}\n{rows}")
            wrong += [] if pairs(found) == PAIRS else [(header, mark, suffix)]
    assert wrong == []


def test_files_put_one_behind_the_other_are_read_as_one(tmp_path: Path) -> None:
    lines = [json.dumps({"question": q, "answer": a}) for q, a in PAIRS]
    table = "question,answer\n" + "".join(f'"{q}",{a}\n' for q, a in PAIRS)
    for content, suffix, number in (
        (f"\ufeff{lines[0]}\n\ufeff{lines[1]}\n{lines[2]}", "jsonl", 3),
        (f"\ufeff{lines[0]}\n{lines[1]}\ufeff{lines[2]}\n\ufeff\n", "json", 3),
        (f"\ufeff[{lines[0]}, {lines[1]}]\n\ufeff[{lines[2]}]", "json", 3),
        (f"\ufeff{table}\ufeff{table}{table}", "csv", 9),
        (f"\ufeff{table}\ufeff" + table.partition("\n")[2], "csv", 6),
    ):
        found = read(tmp_path / f"x.{suffix}", content)
        assert pairs(found) == PAIRS * (number // 3) and found.rejected == {}, content


def test_every_sheet_of_the_same_columns_is_read_and_a_sheet_of_others_named(tmp_path: Path) -> None:
    sheets = {f"ورقة {number}": [["السؤال", "الجواب"], pair] for number, pair in enumerate(PAIRS)}
    found = read(tmp_path / "x.xlsx", sheets | {"شرح": [["code", "meaning"], [1, "x"]]})
    assert pairs(found) == PAIRS and "'ورقة 2', not 'شرح'" in found.source


def test_errors_of_spreadsheets_are_empty_in_every_format(tmp_path: Path) -> None:
    failed = ["#NAME?", "#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#SPILL!", " #name? ", "#GETTING_DATA!", "#اسم؟"]
    failed += ["Err:502"]
    assert [cell for cell in failed if as_text(cell, "x", "x")] == []
    kept = ["#1", "# ألم", "#تعب شديد!", "error", "#hash", "#5!"]
    assert [cell for cell in kept if as_text(cell, "x", "x") != cell] == []
    rows = [[Q, cell] for cell in failed] + [[Q, A]]
    objects = [{"question": q, "answer": a} for q, a in rows]
    messages = [{"messages": [message("user", q), message("assistant", a)]} for q, a in rows]
    for suffix, content in (
        ("csv", "question,answer\n" + "".join(f"{q},{a}\n" for q, a in rows)),
        ("xlsx", {"A": [["question", "answer"], *rows]}),
        ("json", objects),
        ("jsonl", messages),
    ):
        found = read(tmp_path / f"x.{suffix}", content)
        assert pairs(found) == [(Q, A)] and found.rejected == {"empty answer": len(failed)}, suffix


def test_integers_of_many_digits_and_cells_of_any_length_are_read_exactly(tmp_path: Path) -> None:
    ids: Iterable[int] = (10**18, 2**63, 2**64 + 1, 12345678901234567890123)
    rows = [{"id": number, "question": Q, "answer": A} for number in ids]
    for suffix in ("json", "jsonl"):
        assert read(tmp_path / f"x.{suffix}", rows).rows["id"][:] == list(map(str, ids))
    long = f"id,question,answer\n{2**70},{'س' * 2_000_000},{A}\n"
    assert read(tmp_path / "x.csv", long).rows["id"][:] == [str(2**70)]


def test_a_few_zero_bytes_are_named_and_only_utf_16_is_called_so(tmp_path: Path) -> None:
    table = f"السؤال,الجواب\n{Q},{A}\n"
    wrong = []
    for content, part in (
        (table.encode().replace(b"\n", b"\0\n", 1), "line 1, byte 26: a zero byte: remove it."),
        (table.encode() + b"\0" * 512, "line 3, byte 1: a zero byte: remove it."),
        (f"{table}{Q}\0,\0\0{A}\n".encode(), f"line 3, byte {len(Q.encode()) + 1}: a zero byte: remove it."),
        (table.encode("utf-16-le"), "data.encoding=utf-16"),
        (table.encode("utf-16-be"), "data.encoding=utf-16"),
    ):
        (tmp_path / "x.csv").write_bytes(content)
        with pytest.raises(DataError) as refused:
            load_consultations(tmp_path / "x.csv")
        wrong += [] if f"{part}" in str(refused.value) and "x.csv" in str(refused.value) else [str(refused.value)]
    assert wrong == []


def test_a_zero_width_space_between_words_becomes_a_space() -> None:
    wrong = []
    for typed, meant in (
        ("قد\u200bيكون\u200bسببه", "قد يكون سببه"),
        ("كلية،\u200bاشرب\u200b\u200bالماء", "كلية، اشرب الماء"),
        ("حادٌّ\u200bجدا منذ\u200b3\u200bأيام", "حادٌّ جدا منذ 3 أيام"),
        ("ألم \u200bشديد\u200b \u200bجدا\u200b.", "ألم شديد جدا."),
        ("صد\u200cاع", "صداع"),
    ):
        found = clean(typed, Cleaning())[0]
        wrong += [] if found == meant and clean(found, Cleaning())[0] == found else [(typed, found)]
        wrong += [] if fold_for_matching(typed) == fold_for_matching(meant) else [(typed, "folded")]
        wrong += [] if strip_marks(typed).split() == strip_marks(meant).split() else [(typed, "stripped")]
    assert wrong == []


def test_aliases_of_aliases_are_refused_at_once_wherever_yaml_is_read(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    (tmp_path / "x.yaml").write_text(bomb, encoding="utf-8")
    with pytest.raises(RecipeError, match="alias"):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(RecipeError, match="training"):
        load_recipe(Path("recipes/quickstart.yaml").resolve(), ["training={a: &a [1], b: [*a, *a]}"])
    with pytest.raises(DataError, match="rubric"):
        Rubric.load(tmp_path / "x.yaml")


def test_titles_above_the_names_and_marks_before_them_are_known(tmp_path: Path) -> None:
    table = [["السؤال", "الجواب", "ملاحظة"], *([*pair, None] for pair in PAIRS)]
    assert pairs(read(tmp_path / "x.xlsx", {"2024": [["استشارات"], [None, "قسم الطوارئ"], *table]})) == PAIRS
    text = "".join(",".join(cell or "" for cell in row) + "\n" for row in table)
    (tmp_path / "x.csv").write_text(text, encoding="utf-16")  # as pandas and Excel write it, with its mark
    assert pairs(load_consultations(str(tmp_path / "x.csv"))) == PAIRS
    assert "question,answer" in refusal(tmp_path / "y.csv", f"{Q * 4},{A * 4}\n" * 2)
    # A row is no title, even if its cells are called as columns are.
    assert "'text'" in refusal(tmp_path / "z.csv", "text,topic\nq,a\n")


def test_rows_of_a_document_may_stand_under_the_name_of_a_column(tmp_path: Path) -> None:
    assert pairs(read(tmp_path / "x.json", {"questions": [{"q": q, "a": a} for q, a in PAIRS]})) == PAIRS
    alone = {"messages": [message("user", Q), message("assistant", A)]}
    assert pairs(read(tmp_path / "y.json", alone)) == [(Q, A)]
    rows = [{"question": q, "answer": a} for q, a in PAIRS]
    assert pairs(read(tmp_path / "z.json", {"data": rows, "authors": [{"name": "A"}]})) == PAIRS
    assert "orient='records'" in refusal(tmp_path / "z.json", {"data": rows, "validation": rows})
