"""Folding makes different spellings of a word equal and keeps different words apart."""

from __future__ import annotations

from sevpeft.data.text import fold_for_matching, strip_marks


def test_spellings_fold_to_one_form() -> None:
    folded = {
        "أُصِبْتُ بِحُمّى": "اصبت بحمي",
        "إلى آخر الٱسبوع": "الي اخر الاسبوع",
        "معدة مؤلمة، وقيء!": "معده مولمه وقيء",
        "شاطئ": "شاطي",
        "صـــداع": "صداع",
        "\u200fصد\u200cاع\u202c\ufeff": "صداع",
        "منذ ٣ أيام و۴ ليالٍ": "منذ 3 ايام و4 ليال",
        "  Fever\t39.5°C ؟؟ ": "fever 39 5 c",
        "ﻣﺮﻳﺾ": "مريض",
        "مر\ufe76يض": "مريض",
        "کلیه": "كليه",
        "q_body": "q body",
        "؟!…": "",
        "ا\u0654": "ا",
        "أ": "ا",
        "عندي ورم": "عندي ورم",
    }
    assert {written: fold_for_matching(written) for written in folded} == folded
    assert [form for form in folded.values() if fold_for_matching(form) != form] == []


def test_marks_are_stripped_and_letters_stay() -> None:
    assert strip_marks("\u200fأُصِبْتُ بـــحُمّى ٣ أيامٍ") == "أصبت بحمى 3 أيام"
