"""Every row is kept or rejected with a reason, no question crosses the split, and results are reproducible."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sevpeft.data.prepare import PrepareSettings
from sevpeft.data.prepare import prepare as preparing
from sevpeft.data.prepare.mask import MASKS
from sevpeft.data.prepare.prepare import prepare
from sevpeft.data.prepare.reject import REASONS
from sevpeft.data.read import load_consultations
from sevpeft.errors import DataError, RunError

ANSWER = "راجع طبيب الأعصاب اليوم ولا تتناول مسكنا قبل الفحص"
WORDS = (
    *("صداع", "حمى", "سعال", "دوخة", "غثيان", "ألم", "حرقة", "حكة", "طفح", "نزيف"),
    *("إسهال", "إمساك", "ضيق", "خفقان", "تعب", "أرق", "تورم", "جرح", "حساسية", "زكام"),
    *("التهاب", "قرحة", "صدري", "بطني", "ظهري", "رأسي", "كتفي", "ركبتي", "عيني", "أذني"),
    *("أنفي", "حلقي", "معدتي", "قدمي", "يدي", "رقبتي", "جلدي", "لثتي", "كبدي", "كليتي"),
)


def question(number: int) -> str:
    """A question that resembles no other one."""
    return "أشكو من " + " ".join(random.Random(number).sample(WORDS, 12)) + f" منذ {number} يوما فما العمل"


def consultations(count: int, **more: Callable[[int], object]) -> list[dict[str, object]]:
    return [
        {"question": question(number), "answer": f"{ANSWER} {number}"} | {key: of(number) for key, of in more.items()}
        for number in range(count)
    ]


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Any]:
    """Prepares rows: (dataset.json, rows kept, rows rejected)."""

    def run(
        rows: list[dict[str, object]], *, name: str = "out", data: dict[str, Any] | None = None, **settings: Any
    ) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {"num_proc": 1, "data": {"path": str(file), **(data or {})}, **settings}
        about = prepare(PrepareSettings.model_validate(settings), tmp_path / name)
        kept = pq.read_table(tmp_path / name / "consultations.parquet").to_pylist()
        rejected = (tmp_path / name / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
        return about, kept, [json.loads(line) for line in rejected]

    return run


def test_every_row_is_kept_or_rejected_with_its_reason_and_all_that_it_held(prepared: Callable[..., Any]) -> None:
    rows = consultations(60, clinic=lambda n: f"c{n}", reason=lambda n: "note", row=lambda n: n * 10)
    rows[3]["answer"] = "نعم"
    rows[5]["question"] = None
    rows[7]["question"] = "\ud83d"
    rows[9] |= {"question": rows[8]["question"], "answer": rows[8]["answer"]}
    about, kept, rejected = prepared(rows)
    assert [(row["row"], row["reason"]) for row in rejected] == [
        *((4, "short_answer"), (6, "empty"), (8, "encoding_damage"), (10, "duplicate"))
    ]
    assert rejected[0] == {
        **{"row": 4, "reason": "short_answer", "question": question(3), "answer": "نعم"},
        **{"clinic": "c3", "original_reason": "note", "original_row": "30"},
    }
    assert sorted([row["row"] for row in kept] + [row["row"] for row in rejected]) == list(range(1, 61))
    assert about["rows"] == {
        **{"read": 60, "kept": 56},
        "rejected": {"duplicate": 1, "empty": 1, "encoding_damage": 1, "short_answer": 1},
    }
    assert set(kept[0]) == {
        *("id", "question", "answer", "clinic", "reason", "original_row", "row", "group", "split"),
    }
    assert (kept[0]["clinic"], kept[0]["original_row"], kept[0]["row"]) == ("c0", "0", 1)
    assert rejected[2]["question"] == "\ud83d"
    assert prepared(rows, name="allowed", allow=["short_answer"])[0]["rows"]["kept"] == 57


def test_texts_are_cleaned_and_masked_and_the_changes_counted(prepared: Callable[..., Any]) -> None:
    rows = consultations(30)
    rows[0]["answer"] = f"{ANSWER} واتصل على 01012345678"
    rows[1]["question"] = question(1).replace("أشكو", "أشكـــو")
    about, kept, _ = prepared(rows)
    assert kept[0]["answer"] == f"{ANSWER} واتصل على {MASKS['phone']}" and kept[1]["question"] == question(1)
    assert about["masked"]["phone"] == {"masks": 1, "rows": 1} and set(about["masked"]) == set(MASKS)
    assert sum(about["cleaned"].values()) >= 1
    about, kept, _ = prepared(rows, name="unmasked", masking={"phone": False})
    assert "01012345678" in kept[0]["answer"] and set(about["masked"]) == set(MASKS) - {"phone"}


def settings_of(path: Path) -> PrepareSettings:
    return PrepareSettings.model_validate({"num_proc": 1, "data": {"path": str(path)}})


def groups_across(kept: list[dict[str, Any]]) -> int:
    sides: dict[int, set[str]] = {}
    for row in kept:
        sides.setdefault(row["group"], set()).add(row["split"])
    return sum(len(side) > 1 for side in sides.values())


def test_near_duplicates_stay_together_and_severities_are_spread_evenly(prepared: Callable[..., Any]) -> None:
    rows = consultations(200, severity=lambda n: ("critical", "neutral", "non_critical")[n % 3 if n < 180 else 0])
    rows += [row | {"question": f"السلام عليكم {row['question']}", "answer": f"{ANSWER} جدا"} for row in rows[::5]]
    about, kept, _ = prepared(rows)
    assert about["duplicates"]["near_questions"] + about["duplicates"]["equal_questions"] == 40
    assert about["duplicates"]["groups"] == 200 and groups_across(kept) == 0
    assert about["splits"]["by"] == "random" and about["splits"]["rows"] == {"train": 192, "validation": 24, "test": 24}
    for counts in about["splits"]["severity"].values():
        assert counts["test"] == pytest.approx(sum(counts.values()) / 10, abs=1)
    assert about["warnings"] == []


def test_the_rows_own_split_is_kept_and_what_would_cross_it_leaves_train(prepared: Callable[..., Any]) -> None:
    rows = consultations(60, split=lambda n: "test" if n % 3 == 0 else "train")
    rows[1]["question"] = str(rows[0]["question"]) + " الآن"
    about, kept, rejected = prepared(rows)
    assert about["splits"]["by"] == "column split" and groups_across(kept) == 0
    assert [(row["row"], row["reason"], row["split"]) for row in rejected] == [(2, "crosses_split", "train")]
    assert about["splits"]["rows"] == {"train": 35, "validation": 4, "test": 20}
    # Of two equal rows the one in the test stays, although it comes later.
    again = [rows[0] | {"split": "train"}, *rows]
    about, kept, rejected = prepared(again, name="again")
    assert about["splits"]["rows"]["test"] == 20 and kept[0]["row"] == 2
    assert [(row["row"], row["reason"]) for row in rejected] == [(1, "duplicate"), (3, "crosses_split")]
    about, kept, _ = prepared(rows, name="resplit", data={"split_column": "split"}, resplit=True)
    assert about["splits"]["by"] == "random" and about["splits"]["rows"]["test"] == 6
    assert kept[0]["original_split"] == "test"


def test_whole_values_are_held_out_and_no_near_duplicate_of_them_is_trained_on(prepared: Callable[..., Any]) -> None:
    rows = consultations(100, year=lambda n: 2010 + n // 10)
    rows[0]["question"] = f"{rows[99]['question']} الآن"
    rows[85]["question"] = f"{rows[98]['question']} الآن"
    about, kept, rejected = prepared(rows, split_by="year")
    assert [(row["row"], row["year"]) for row in rejected] == [(1, "2010"), (86, "2018")]
    assert {row["year"] for row in kept if row["split"] == "test"} == {"2019"} and groups_across(kept) == 0
    assert about["splits"]["rows"] == {"train": 79, "validation": 9, "test": 10} and about["splits"]["crossed"] == 2
    assert about["splits"]["held_out"]["values"] == {
        **{"train": "2010 to 2017 (8 values)", "validation": "'2018'", "test": "'2019'"}
    }


def test_of_two_sources_one_is_the_test_and_the_validation_comes_from_the_other(prepared: Callable[..., Any]) -> None:
    about, kept, _ = prepared(consultations(60, Source=lambda n: "ab"[n % 2]), split_by="Source")
    assert len({row["Source"] for row in kept if row["split"] == "test"}) == 1
    assert about["splits"]["rows"] == {"train": 27, "validation": 3, "test": 30}
    assert "drawn from the training rows" in about["warnings"][0]


def test_the_column_to_split_by_may_be_mapped_or_the_row_number(prepared: Callable[..., Any]) -> None:
    rows = consultations(40, Category=lambda n: "abcd"[n // 10])
    assert prepared(rows, split_by="Category")[0]["splits"]["by"] == "column Category"
    kept = prepared(rows, name="row", split_by="row")[1]
    assert [row["row"] for row in kept if row["split"] == "test"] == [37, 38, 39, 40]


def test_repeated_rows_are_dropped_as_asked(prepared: Callable[..., Any]) -> None:
    rows = consultations(30, severity=lambda n: "neutral")
    rows += [
        *(dict(rows[0]), rows[1] | {"severity": "critical"}, rows[2] | {"answer": f"{ANSWER} فورا وبلا تأخير"}),
        rows[3] | {"question": f"{rows[3]['question']} الآن"},
    ]
    for drop, kept, reasons in (
        ("none", 34, {}),
        ("exact", 33, {"duplicate": 1}),
        ("near", 30, {"near_duplicate": 4}),
    ):
        about = prepared(rows, name=drop, drop_duplicates=drop)[0]
        assert about["rows"]["kept"] == kept and about["rows"]["rejected"] == reasons


def test_conflicting_severities_are_listed_by_row_and_without_text(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    rows = consultations(30, severity=lambda n: "neutral")
    rows += [rows[1] | {"severity": "critical"}, rows[2] | {"question": f"{question(2)} الآن", "severity": "critical"}]
    about, kept, _ = prepared(rows)
    assert about["duplicates"]["conflicting_groups"] == 2
    assert about["duplicates"]["conflicting_equal_questions"] == 1
    lines = (tmp_path / "out" / "conflicts.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        **{"group": kept[1]["group"], "rows": [2, 31], "severities": ["neutral", "critical"]}
    }
    assert len(lines) == 2 and "2 groups of near-duplicates" in about["warnings"][0]


def test_probabilities_are_kept_as_numbers_and_stratify(prepared: Callable[..., Any]) -> None:
    rows = consultations(60, p_non_critical=lambda n: 0.7 if n % 2 else 0.1, p_neutral=lambda n: 0.1)
    rows = [row | {"p_critical": 0.9 - float(str(row["p_non_critical"]))} for row in rows]
    about, kept, _ = prepared(rows)
    assert kept[1]["p_non_critical"] == 0.7 and kept[0]["p_critical"] == 0.8
    assert set(about["splits"]["severity"]) == {"non_critical", "critical"}
    assert about["splits"]["severity"]["critical"] == {"train": 24, "validation": 3, "test": 3}


def test_a_severity_column_of_free_text_is_not_shown_and_does_not_stratify(prepared: Callable[..., Any]) -> None:
    rows = consultations(60, label=lambda n: f"المريض رقم {n}")
    about, _, _ = prepared(rows, data={"severity_column": "label"})
    assert about["splits"]["severity"] == {} and "too many different values" in about["warnings"][0]
    assert "المريض" not in json.dumps(about, ensure_ascii=False)


def test_the_result_is_the_same_for_any_number_of_processes(
    prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "_SMALL", 10)
    rows = consultations(60, severity=lambda n: "critical" if n % 4 else "neutral")
    rows += [row | {"question": f"{row['question']} الآن"} for row in rows[::3]]
    one, two = prepared(rows), prepared(rows, name="two", num_proc=2)
    assert one[0]["fingerprint"] == two[0]["fingerprint"] and one[1] == two[1]


def test_the_folder_its_card_and_its_rows_say_the_same(prepared: Callable[..., Any], tmp_path: Path) -> None:
    rows = consultations(40, severity=lambda n: "critical" if n % 2 else "neutral", year=lambda n: 2000 + n % 5)
    rows[0]["answer"] = "نعم"
    rows.append(rows[1] | {"severity": "neutral"})
    about, kept, _ = prepared(rows, split_by="year")
    folder = tmp_path / "out"
    assert {file.name for file in folder.iterdir()} == {
        *("README.md", "conflicts.jsonl", "consultations.parquet", "dataset.json", "rejected.jsonl"),
    }
    assert json.loads((folder / "dataset.json").read_text(encoding="utf-8")) == json.loads(json.dumps(about))
    assert os.name != "posix" or stat.S_IMODE(folder.stat().st_mode) == 0o700
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlanguage:\n- ar\n") and "data_files: consultations.parquet" in card
    for part in (
        *("| short_answer | 1 | the answer", "| phone | 0 | 0 |", "anonymity", "several severities", "`out.jsonl`"),
        *("By whole values of the column `year`", "- test: '2004'", "| all |", about["fingerprint"]),
    ):
        assert part in card, part
    assert str(tmp_path) not in card and not any(word in card for word in WORDS)
    loaded = load_consultations(folder)
    assert loaded.fingerprint == about["fingerprint"] and loaded.provenance["input"] == about["input"]
    for name in ("split", "severity"):
        assert loaded.rows[name][:] == [row[name] for row in kept]


def test_every_reason_has_its_meaning_on_the_card() -> None:
    card = Path(preparing.__file__).with_name("card.md").read_text(encoding="utf-8")
    others = ("duplicate", "near_duplicate", "crosses_split", *preparing._UNREADABLE.values())
    assert [reason for reason in (*REASONS, *others) if f'"{reason}": "' not in card] == []


def test_a_prepared_folder_can_be_prepared_again(prepared: Callable[..., Any], tmp_path: Path) -> None:
    first, kept, _ = prepared(consultations(60))
    again = prepare(settings_of(tmp_path / "out"), tmp_path / "again")
    rows = pq.read_table(tmp_path / "again" / "consultations.parquet").to_pylist()
    assert [(row["question"], row["split"], row["row"]) for row in rows] == [
        (row["question"], row["split"], row["row"]) for row in kept
    ]
    assert again["input"]["provenance"]["fingerprint"] == first["fingerprint"]


def test_what_cannot_be_prepared_is_refused_in_one_sentence_and_leaves_nothing(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"answer": "نعم"}, {}, r"None of 30 rows is left \(30 short_answer\).*allow=\[short_answer\]"),
        ({"answer": "..."}, {}, r"None of 30 rows is left \(30 empty\)\.$"),
        ({"question": None}, {}, "no row with both question and answer"),
        ({}, {"split_by": "month"}, "no column 'month' to split by: there are 'question', 'answer', 'year', 'row'"),
        ({}, {"split_by": "question"}, "Column 'question' is the question"),
        ({}, {"split_by": "year"}, "has fewer than two values"),
        ({}, {"data": {"validation_size": 0.5, "test_size": 0.5}}, "leave none of 30 rows"),
        ({"question": "سؤال واحد للجميع"}, {"drop_duplicates": "none"}, r"data\.test_size is too small"),
        ({"part": "a"}, {"data": {"split_column": "part"}}, r"data\.split_column"),
    ]
    for change, settings, part in refused:
        with pytest.raises(DataError, match=part) as error:
            prepared([row | change for row in consultations(30, year=lambda n: 2020)], **settings)
        assert "\n" not in str(error.value) and "واحد" not in str(error.value)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.jsonl"]


def test_a_side_that_would_lose_all_its_rows_is_refused(prepared: Callable[..., Any]) -> None:
    rows = consultations(20, split=lambda n: "train" if n < 10 else "test" if n < 15 else "dev")
    for number in range(5):
        rows[15 + number]["question"] = f"{rows[10 + number]['question']} الآن"
    with pytest.raises(DataError, match="All validation rows have a near-duplicate on another side"):
        prepared(rows)


def test_an_output_that_exists_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="exists already"):
        prepare(settings_of(tmp_path / "absent.csv"), tmp_path)


def test_a_full_disk_leaves_neither_a_folder_nor_a_part_of_one(
    prepared: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparing, "_write_rejected", full)
    with pytest.raises(RunError, match="No space is left"):
        prepared(consultations(30))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.jsonl"]
