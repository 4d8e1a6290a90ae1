"""A review sheet tells nobody which arm wrote what, and its ratings come back to the right arm, or not at all."""

from __future__ import annotations

import csv
import json
import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest

from sevpeft.errors import DataError, RecipeError, RunError, SevpeftError, UsageError
from sevpeft.evaluation import statistics
from sevpeft.evaluation.evaluate import evaluate
from sevpeft.evaluation.report.page import write_report
from sevpeft.evaluation.report.review import read_review, settings_of, write_review
from tests.evaluation.test_report import ATTACK, Page, line, write_comparison, write_lines, write_run

SEVERITIES = ["critical"] * 8 + ["neutral"] * 5 + ["non_critical"] * 5
FORMULA = '=HYPERLINK("http://a.example";"x")'
ARMS = {"ce": "لا تقلق", "balanced": "اذهب إلى الطوارئ"}


@pytest.fixture(autouse=True)
def _few_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 199)


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """Of its arms the answers to 18 questions, one of which is a formula and one markup."""
    folder = write_comparison(tmp_path / "cmp")
    for arm, says in ARMS.items():
        lines = [
            line("adapter", f"patient-{at}", severity=severity, question=f"سؤال {at}", prediction=f"{says} {at}")
            for at, severity in enumerate(SEVERITIES)
        ]
        lines[0] |= {"question": FORMULA, "prediction": f"@{arm[::-1]}\x1b"}
        lines[8] |= {"question": f"-1+{ATTACK}", "prediction": f"+{says} {ATTACK}"}
        write_lines(folder / f"{arm}-0" / "predictions.jsonl", lines)
    return folder


def write(folder: Path, count: int = 9, arms: str = "", *overrides: str) -> Path:
    write_review(folder, count, arms, settings_of(folder, overrides))
    return folder / "review" / "review.xlsx"


def read(folder: Path, *files: Path, confidence: float = 0.9) -> dict[str, Any]:
    named = f"[{','.join(map(str, files))}]" if len(files) > 1 else str(files[0])
    overrides = [f"evaluation.judge.file={named}", f"evaluation.confidence_level={confidence}"]
    return read_review(folder, settings_of(folder, [*overrides, "evaluation.n_resamples=100"]))


def key_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "review-key.json").read_text(encoding="utf-8")))


def fill(sheet: Path, rate: Callable[[str, str], Any], to: Path | None = None, order: int = 1) -> Path:
    """Rates cells by code and column; `order` -1 turns the rows round."""
    book = openpyxl.load_workbook(sheet)
    page = book["review"]
    rows = [list(row) for row in page.iter_rows(values_only=True)]
    header, asked, *pairs = rows
    for row in pairs:
        for at, name in enumerate(header):
            if at > 3 and name != "comment":
                row[at] = rate(row[0], name)
    page.delete_rows(2, page.max_row)
    for row in (asked, *pairs[::order]):
        page.append(row)
    book.save(to or sheet)
    return to or sheet


def rating(folder: Path, favorite: str = "balanced") -> Callable[[str, str], Any]:
    """The favorite gets 5 and no harm, the other 2 and harm."""
    key = key_of(folder)["rows"]

    def rate(code: str, column: str) -> Any:
        if column == "better":
            return "A" if key[code]["A"] == favorite else "B"
        liked = (key[code]["A"] == favorite) == (column[0] == "A")
        return ("no" if liked else "Yes ") if re.search("harm|false", column) else (5 if liked else 2.0)

    return rate


def test_a_sheet_is_blind_balanced_private_and_drawn_by_the_seed(comparison: Path, tmp_path: Path) -> None:
    sheet = write(comparison)
    key, page = key_of(comparison), (comparison / "review" / "review.html").read_text(encoding="utf-8")
    rows = list(openpyxl.load_workbook(sheet)["review"].iter_rows(min_row=3, values_only=True))
    assert (
        sorted(row["severity"] for row in key["rows"].values())
        == ["critical"] * 3 + ["neutral"] * 3 + ["non_critical"] * 3
    )
    assert {row["A"] for row in key["rows"].values()} == set(key["arms"]) == set(ARMS)
    for code, _, a, b, *_ in rows:
        row = key["rows"][code]
        if int(row["id"][8:]) not in (0, 8):
            other = next(arm for arm in ARMS if arm != row["A"])
            assert (a, b) == tuple(f"{ARMS[arm]} {row['id'][8:]}" for arm in (row["A"], other))
    ids = [key["rows"][code]["id"] for code, *_ in rows]
    assert ids != sorted(ids, key=lambda one: int(one[8:]))
    with zipfile.ZipFile(sheet) as parts:
        everything = page + "".join(parts.read(name).decode() for name in parts.namelist())
    assert re.findall(rf"\b(?:{'|'.join(ARMS)}|adapter)\b|(?<!-)critical|neutral|patient-", everything) == []
    for path in (comparison / "review").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((comparison / "review-key.json").stat().st_mode) == 0o600
    again = write_again(comparison, tmp_path)
    assert key_of(comparison) == key and [row[:4] for row in again] == [row[:4] for row in rows]
    write_again(comparison, tmp_path, "evaluation.seed=5")
    assert not set(key_of(comparison)["rows"]) & set(key["rows"])


def write_again(folder: Path, aside: Path, *overrides: str) -> list[tuple[Any, ...]]:
    (folder / "review").rename(aside / f"moved{len(list(aside.iterdir()))}")
    (folder / "review-key.json").unlink()
    sheet = write(folder, 9, "", *overrides)
    return list(openpyxl.load_workbook(sheet)["review"].iter_rows(min_row=3, values_only=True))


def test_a_sheet_is_made_for_raters_and_no_text_in_it_is_a_formula(comparison: Path) -> None:
    sheet = openpyxl.load_workbook(write(comparison, 18))["review"]
    assert sheet.sheet_view.rightToLeft and sheet.freeze_panes == "B2" and sheet.title == "review"
    header = [cell.value for cell in sheet[1]]
    assert "patients' text" in str(sheet["A2"].value)
    assert header[:5] == ["code", "question", "A", "B", "better"] and header[-1] == "comment"
    offered = {str(one.sqref): one.formula1 for one in sheet.data_validations.dataValidation}
    assert len(offered) == len(header) - 5 and set(offered.values()) == {'"1,2,3,4,5"', '"yes,no"', '"A,equal,B"'}
    assert all(place.endswith(str(sheet.max_row)) for place in offered)
    texts = [cell for cells in sheet.iter_rows(min_row=3, max_col=4) for cell in cells]
    assert {cell.data_type for cell in texts} == {"s"} and all(cell.quotePrefix for cell in texts)
    assert FORMULA in [cell.value for cell in texts] and "@ec\\u001b" in [cell.value for cell in texts]
    assert all(cell.alignment.wrap_text for cell in texts)
    page = Page((comparison / "review" / "review.html").read_text(encoding="utf-8"))
    assert page.unbalanced == [] and FORMULA in page.text and "<img src=http" in page.text
    assert sum(name == "script" for name, _ in page.tags) == 1 and not any(name == "img" for name, _ in page.tags)
    names = {about["name"] for name, about in page.tags if name == "input"}
    assert len(names) == 18 * len(header[4:]) and all(name.split("/")[1] in header for name in names if name)


def test_ratings_come_back_to_the_arm_whatever_the_order(comparison: Path, tmp_path: Path) -> None:
    sheet = write(comparison, 18)
    found = read(comparison, fill(sheet, rating(comparison), tmp_path / "turned.xlsx", order=-1))
    assert found["pair"] == "balanced − ce" and list(found["scores"]) == ["critical", "all", "neutral", "non_critical"]
    for stratum, rows in (("critical", 8), ("all", 18)):
        by = found["scores"][stratum]["metrics"]
        assert found["scores"][stratum]["rows"] == rows
        values = {name: [by[name][arm]["value"] for arm in ARMS] for name in by}
        assert values["preferred"] == [0, 1] and values["judge_urgency"] == [2, 5] and values["judge_harm"] == [1, 0]
    harm = found["scores"]["all"]["metrics"]["judge_harm"]["balanced"]["against"]["ce"]
    assert harm["outcome"] == "better" and harm["value"] == -1 and found["agreement"] == {}
    assert json.loads((comparison / "review.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    assert "18 pairs rated, 0 in part, 0 not, 0 rows missing" in found["notes"][0]
    shown = Page(write_report(comparison).path.read_text(encoding="utf-8"))
    assert shown.unbalanced == [] and "balanced − ce" in shown.text and "18 pairs rated" in shown.text


def test_the_csv_of_the_page_is_read_and_what_is_half_filled_is_counted(comparison: Path, tmp_path: Path) -> None:
    sheet = write(comparison, 18)
    header, _, *rows = openpyxl.load_workbook(sheet)["review"].iter_rows(values_only=True)
    rate, names = rating(comparison), [name for name in header[4:] if name != "comment"]
    table = [["code", *names, "comment"]]
    table += [[row[0], *(str(rate(row[0], name)) for name in names), "=1"] for row in rows[:12]]
    table[1][2:] = [""] * len(table[1][2:])  # whom he prefers alone
    table[2][1:] = [""] * len(table[2][1:])
    table.append(["XXXXXXXXXX", *["A"] * len(names), ""])
    path = tmp_path / "review.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(table)
    found = read(comparison, path)
    assert "10 pairs rated, 1 in part, 1 not, 6 rows missing" in found["notes"][0]
    by = found["scores"]["all"]["metrics"]
    assert [by[name]["ce"]["rows"] for name in ("preferred", "judge_harm")] == [11, 10]


def test_ratings_of_an_arabic_keyboard_and_of_check_boxes_are_read(comparison: Path, tmp_path: Path) -> None:
    sheet, rate = write(comparison, 18), rating(comparison)
    expected = read(comparison, fill(sheet, rate, tmp_path / "plain.xlsx"))
    also: dict[Any, Any] = {"no": "لا", "Yes ": "نعم ", 5: "٥", 2.0: "۲"}
    for words in (also, {"no": False, "Yes ": True}):
        also.update(words)
        same = fill(sheet, lambda code, name: also.get(rate(code, name), rate(code, name)), tmp_path / "x.xlsx")
        assert read(comparison, same)["scores"] == expected["scores"], also
    wrong = fill(sheet, lambda code, name: True if name == "A urgency" else rate(code, name), tmp_path / "y.xlsx")
    with pytest.raises(DataError, match="'A urgency' is none of 1, 2, 3, 4, 5"):
        read(comparison, wrong)


def test_two_raters_have_a_weighted_kappa_as_scikit_learn_has_it(comparison: Path, tmp_path: Path) -> None:
    from sklearn.metrics import cohen_kappa_score

    sheet, random, by_name = write(comparison, 18), np.random.default_rng(3), dict[str, list[Any]]()

    def rate(code: str, column: str) -> Any:
        words = (
            ["A", "equal", "B"] if column == "better" else ["yes", "no"] if "_r" in column or "harm" in column else []
        )
        by_name.setdefault(column, []).append(random.choice(words or [1, 2, 3, 4, 5]))
        return by_name[column][-1] if words else int(by_name[column][-1])

    files = [fill(sheet, rate, tmp_path / f"{of}.xlsx") for of in "ab"]
    found = read(comparison, *files)
    for item in ("urgency", "harm", "clarity"):
        first, second = (
            [one for side in "AB" for one in by_name[f"{side} {item}"][part]] for part in (np.s_[:18], np.s_[18:])
        )
        words = sorted({*first, *second})
        expected = cohen_kappa_score([*map(words.index, first)], [*map(words.index, second)], weights="quadratic")
        agreed = found["agreement"][f"judge_{item}"]
        assert agreed["value"] == pytest.approx(expected, abs=1e-9) and agreed["low"] < expected < agreed["high"]
    assert sum("Agreement of the raters" in note for note in found["notes"]) == len(found["metrics"]) == 6
    cells = {row[0]: row for row in openpyxl.load_workbook(files[0])["review"].iter_rows(values_only=True)}
    header = [*cells["code"]]
    turned = fill(files[0], lambda code, name: cells[code][header.index(name)], tmp_path / "c.xlsx", order=-1)
    assert read(comparison, files[0], turned)["agreement"]["judge_harm"]["value"] == 1
    copied = Path(shutil.copyfile(files[0], tmp_path / "of another.xlsx"))
    with pytest.raises(UsageError, match="two raters"):
        read(comparison, files[0], copied)


def test_what_is_no_sheet_of_this_review_is_one_plain_sentence(comparison: Path, tmp_path: Path) -> None:
    other = write_comparison(tmp_path / "other")
    for arm in ARMS:  # as many questions, and other answers
        lines = [line("adapter", f"patient-{at}", severity=of, prediction=arm[0]) for at, of in enumerate(SEVERITIES)]
        write_lines(other / f"{arm}-0" / "predictions.jsonl", lines)
    foreign = fill(write(other), rating(other), tmp_path / "foreign.xlsx")
    sheet, rate = write(comparison), rating(comparison)
    twice = fill(sheet, rate, tmp_path / "twice.xlsx")
    book = openpyxl.load_workbook(twice)
    book["review"].append([cell.value for cell in book["review"][3]])
    book.save(twice)
    book["review"].delete_rows(book["review"].max_row)
    for row, code in zip((3, 4), (book["review"]["A4"].value, book["review"]["A3"].value), strict=True):
        book["review"].cell(row, 1).value = code  # a column that was sorted alone
    book.save(sorted_ := tmp_path / "sorted.xlsx")
    (tmp_path / "columns.csv").write_text("code,better\nBBBBBBBBBB,A\n", encoding="utf-8")
    (tmp_path / "broken.xlsx").write_bytes(sheet.read_bytes()[:999])
    off = fill(sheet, lambda code, name: 6 if name == "A urgency" else rate(code, name), tmp_path / "off.xlsx")
    wrong = []
    for files, kind, words in (
        ([foreign], DataError, "no rating of this review"),
        ([sheet], DataError, "no rating of this review"),
        ([twice], DataError, "two rows"),
        ([sorted_], DataError, "whole rows"),
        ([off], DataError, "'A urgency' is none of 1, 2, 3, 4, 5"),
        ([tmp_path / "columns.csv"], DataError, "A harm"),
        ([tmp_path / "broken.xlsx"], DataError, "broken.xlsx"),
        ([tmp_path / "review.docx"], DataError, "review.docx"),
        ([sheet] * 3, UsageError, "evaluation.judge.file"),
    ):
        with pytest.raises(SevpeftError) as caught:
            read(comparison, *files)
        message = str(caught.value)
        if not isinstance(caught.value, kind) or words not in message or "\n" in message or "سؤال" in message:
            wrong.append((files, message))
    assert wrong == []
    assert not (comparison / "review.json").exists()
    (comparison / "review-key.json").unlink()
    with pytest.raises(RunError, match=r"review-key\.json"):
        read(comparison, off)


def test_a_review_needs_two_arms_with_answers_and_overwrites_nothing(comparison: Path, tmp_path: Path) -> None:
    for arms in ("ce,base", "ce", "ce,ce", "ce,strong"):
        with pytest.raises(RunError, match=r"name two in --arms"):
            write(comparison, 3, arms)
    write(comparison)
    key = key_of(comparison)
    with pytest.raises(RunError, match="has a review already"):
        write(comparison)
    (comparison / "review").rename(tmp_path / "given_away")
    with pytest.raises(RunError, match="has a review already"):
        write(comparison)
    assert key_of(comparison) == key and not (comparison / "review").exists()
    write(write_run(tmp_path / "run"), 2)  # of a run: the adapter and its base model
    assert set(key_of(tmp_path / "run")["arms"]) == {"adapter", "base"}
    with pytest.raises(UsageError, match=r"data\.max_rows"):
        settings_of(comparison, ["data.max_rows=3"])


def test_the_verb_writes_reads_and_shows_a_review(
    comparison: Path, tmp_path: Path, sevpeft_: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = sevpeft_("report", comparison, "--review", "50", "--arms", "balanced,ce")
    assert (
        code == 0 and "18 pairs, as XLSX and HTML; contains patients' text" in out and "keep it from the raters" in out
    ), err
    assert key_of(comparison)["arms"] == ["balanced", "ce"]
    sheet = fill(comparison / "review" / "review.xlsx", rating(comparison, "ce"))
    settings = (f"evaluation.judge.file={sheet}", "evaluation.n_resamples=100")
    code, out, err = sevpeft_("report", comparison, *settings, "--answers", "0")
    assert code == 0 and "ce − balanced" in out and "Preferred" in out and "18 pairs rated" in out, err
    code, out, _ = sevpeft_("report", comparison, *settings, "--json", "--answers", "0")
    assert code == 0 and json.loads(out)["review"]["scores"]["all"]["metrics"]["preferred"]["ce"]["value"] == 1
    code, _, err = sevpeft_("report", comparison, "evaluation.margin=0.1")
    assert code == 2 and "evaluation.judge.file" in err and len(err.strip().splitlines()) == 1


def test_a_rubric_of_ones_own_is_rated_and_kept_with_the_key(comparison: Path, tmp_path: Path) -> None:
    rubric = tmp_path / "mine.yaml"
    items = "{kind: {label: Kind, scale: yes-no, better: higher, asks: Is it kind, definition: Kind.}}"
    rubric.write_text(f"name: mine\ninstructions: Rate.\nitems: {items}\n", encoding="utf-8")
    sheet = write(comparison, 9, "", f"evaluation.judge.rubric={rubric}")
    rubric.unlink()
    found = read(comparison, fill(sheet, lambda _, name: "equal" if name == "better" else "no"))
    assert list(found["metrics"]) == ["preferred", "judge_kind"]
    assert found["scores"]["all"]["metrics"]["preferred"]["ce"]["value"] == 0.5


def test_a_sheet_is_no_endpoint(run: Any) -> None:
    with pytest.raises(UsageError, match=r"sevpeft report FOLDER"):
        evaluate(run, ["evaluation.judge.file=x.xlsx"])
    with pytest.raises(RecipeError, match=r"judge\.url: is missing"):
        settings_of(run.folder, ["evaluation.judge.model=m"])
