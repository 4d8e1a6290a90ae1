"""Cleaning takes away noise and nothing else; the folded form makes words that are written differently equal."""

import random
import re
from dataclasses import fields, replace

import pytest

from sevpeft.data.cleaning import Cleaning, clean, fold_for_matching, without_greetings
from sevpeft.data.sources import load_consultations

SWITCHES = tuple(switch.name for switch in fields(Cleaning))
OFF = Cleaning(**{name: "keep" if name == "emoji" else False for name in SWITCHES})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "folded"),
    [
        ("أُصِبْتُ بِحُمّى", "اصبت بحمي"),
        ("إلى آخر الٱسبوع", "الي اخر الاسبوع"),
        ("معدة مؤلمة، وقيء!", "معده مولمه وقيء"),
        ("شاطئ", "شاطي"),
        ("صـــداع", "صداع"),
        ("\u200fصد\u200cاع\u202c\ufeff", "صداع"),
        ("منذ ٣ أيام و۴ ليالٍ", "منذ 3 ايام و4 ليال"),
        ("  Fever\t39.5°C ؟؟ ", "fever 39 5 c"),
        ("ﻣﺮﻳﺾ", "مريض"),
        ("مر\ufe76يض", "مريض"),
        ("کلیه", "كليه"),
        ("q_body", "q body"),
        ("؟!…", ""),
    ],
)
def test_spellings_fold_to_one_form(written: str, folded: str) -> None:
    assert fold_for_matching(written) == folded
    assert fold_for_matching(folded) == folded


def test_a_composed_and_a_decomposed_hamza_are_equal() -> None:
    assert fold_for_matching("أ") == fold_for_matching("ا\u0654")


def test_different_words_stay_different() -> None:
    assert fold_for_matching("عندي ألم") != fold_for_matching("عندي ورم")
    assert fold_for_matching("حرارة 38") != fold_for_matching("حرارة 39")


def cleaned(text: str, **switches: bool | str) -> str:
    return clean(text, replace(Cleaning(), **switches))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("switch", "typed", "expected"),
    [
        ("mojibake", "Ø¹Ù†Ø¯ÙŠ Ø£Ù„Ù… Ø´Ø¯ÙŠØ¯", "عندي ألم شديد"),
        ("mojibake", "ط¹ظ†ط¯ظٹ ط£ظ„ظ… ط´ط¯ظٹط¯", "عندي ألم شديد"),
        ("mojibake", "ÚäÏí Ãáã ÔÏíÏ", "عندي ألم شديد"),
        ("mojibake", "The doctorâ€™s advice aprÃ¨s", "The doctor’s advice après"),
        ("html", "ألم<br>في<br/>الصدر<p class='x'>منذ <b>يوم</b></p>", "ألم\nفي\nالصدر\nمنذ يوم\n"),
        ("html", "a &lt; b &amp;lt; c &#60; d&nbsp;e", "a < b < c < d\u00a0e"),
        ("html", "10<sup>9</sup><script>var x = 1</script><!-- y -->", "10^9  "),
        ("unicode", "ﻣﺮﻳﺾ ﻻ ا\u0654كل مر\ufe76يض", "مريض لا أكل مرَيض"),
        ("invisible", "\u200fصد\u200cاع\u202c\ufeff\x07", "صداع"),
        ("tatweel", "صـــداع 1ـ بنادول 3ـ5 أيام 1445هـ حرارة ـ سعال", "صداع 1- بنادول 3-5 أيام 1445ه حرارة - سعال"),
        ("digits", "٣٨٫٥ و۴ و١٬٠٠٠ و٥٠٪", "38.5 و4 و1,000 و50%"),
        ("repeated_letters", "جدااااا هههههه كتييير ووووجع sooooo َََ", "جدا هه كتير ووجع soo َ"),
        ("repeated_punctuation", "ليه؟؟؟؟ !!!! ،، ...... ؟!؟!؟! *****", "ليه؟ ! ، .. ؟! *"),
        ("whitespace", "  ألم \u00a0 شديد\r\n\n\n\nمنذ\tيوم \n الآن ", "ألم شديد\n\nمنذ يوم\nالآن"),
        ("greetings", "السلام عليكم ورحمة الله وبركاته، عندي ألم وجزاكم الله خيرا", "عندي ألم"),
        ("greetings", "مساء الخير يا دكتور عندي صداع ولكم جزيل الشكر", "يا دكتور عندي صداع"),
    ],
)
def test_each_switch_does_its_own_work_and_says_so(switch: str, typed: str, expected: str) -> None:
    assert clean(typed, replace(OFF, **{switch: True})) == (expected, (switch,))
    assert clean(typed, OFF) == (typed, ())


def test_vowel_marks_stay_unless_they_are_asked_to_go() -> None:
    assert cleaned("حُمّى شديدةً") == "حُمّى شديدةً"
    assert cleaned("حُمّى شديدةً", tashkeel=True) == "حمى شديدة"


def test_emoji_stay_go_or_get_a_name_and_never_take_a_dose_along() -> None:
    text = "خذ 1️⃣ حبة 💊 👨\u200d👩\u200d👧"
    assert cleaned(text) == text
    assert cleaned(text, emoji="remove") == "خذ 1 حبة"
    named = cleaned(text, emoji="name")
    assert named.startswith("خذ 1 حبة ") and "💊" not in named and ":" not in named and "_" not in named
    assert named.isascii() is False and "pill" not in named


def test_the_text_for_the_model_is_never_folded() -> None:
    text = "أصابتني إغماءة مؤلمة في المرأة الأولى، شاطئ آخر مستشفى وقيء بطيئة"
    assert clean(text) == (text, ())
    assert fold_for_matching(text) != text


@pytest.mark.parametrize(
    "text",
    [
        "حرارة 38.5 وضغط 120/80 والجرعة 5/500mg كل 8 ساعات",
        "Hb<12 و WBC > 11.5 و x<5 و y>3",
        "بروتين ++++ و سكر +++ و كيتون ---",
        "لا أعاني من ضيق تنفس ولم أفقد الوعي وليس عندي نزيف ومش حامل ومفيش حرارة",
        "الله اللهم اللي تتكلم ممكن ببطء سسن",
        "10000 و 111 و 5555 و 0.0005",
        "درجة III و AAA و www.example.org",
        "حرارة .. وسعال .. وبلغم ...",
        "**النصيحة**: - الراحة",
        "شكرا",
        "السلام عليكم ورحمة الله وبركاته",
        "وعليكم السلام، شكرا لكم",
        "présenté à l'hôpital où il a été opéré",
        "القياس 5 °C ± 0.5 «تقريبا» – جيد’s",
    ],
)
def test_what_carries_meaning_is_left_as_it_is(text: str) -> None:
    assert clean(text) == (text, ())


def test_digits_change_their_form_and_never_their_number() -> None:
    assert cleaned("٣ مرات 5٠٠ مجم ١١١١ و٣٣٣.٣") == "3 مرات 500 مجم 1111 و333.3"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("سلام عليكم\n ابني عنده حرارة", "ابني عنده حرارة"),
        ("وعليكم السلام ورحمه الله .. اشرب ماء", "اشرب ماء"),
        ("صباح الخير، السلام عليكم: ألم في الظهر؟ وشكرا جزيلا", "ألم في الظهر؟"),
        ("السلام عليكم (ألم) - 5 أيام", "(ألم) - 5 أيام"),
        ("ألم السلام عليكم ألم", "ألم السلام عليكم ألم"),
        ("ألم وشكرا ثم عاد الألم", "ألم وشكرا ثم عاد الألم"),
        ("سلامة القلب", "سلامة القلب"),
        ("مساء الخميس بدأ الألم", "مساء الخميس بدأ الألم"),
    ],
)
def test_greetings_go_and_take_nothing_of_the_complaint_along(text: str, rest: str) -> None:
    assert without_greetings(text) == rest


def test_a_greeting_is_known_when_marks_spaces_and_entities_hide_it() -> None:
    assert cleaned("\u200fالســـلام  عليكم&nbsp;<br>عندي  ألم") == "عندي ألم"


PIECES = r"""
السلام عليكم|ورحمة الله|شكرا|جزاك الله خيرا|وجع|الله|جدااااا|ههههه|اا|ا|و|ووو|ي|ـ|ــ|مـرض|مُحَمَّد|ً|َ|ّ|٣|٥٠|٫|٬|٪|5
38.5|5/500mg|?|؟|!|..|...|…|.|،|,|-|--|+++|****|(|((((|)|<|<br>|</p>|<b>|<p class='x'>|<script>
</script>|<!--|-->|&|&amp;
lt;|&lt;|&#60;|&#|;|&nbsp;|&nbsp|<sup>|9|\u200f|\u200d|\u200c|\ufeff|😀|👨\u200d👩|1\ufe0f\u20e3
\u20e3|❤\ufe0f|🇪|🇬|©|ﻣ|ﻻ|\ufe76
ﷺ|#|ا\u0654|أ|é|e\u0301|Ø§Ù„|Ø|ط§|ظ„ظ…ط§|ظ£|ÇáÓáÇã|Ç|\x9d|\x85|\x0b|\t|\n|\n\n|\r\n| |  |\u00a0
\u2028|\ufffd|????|ok|soooo|www|*
ه|ة|ى|ک|لا|مش
"""
ESCAPE = re.compile(r"\\(?:u[0-9a-f]{4}|x[0-9a-f]{2}|[tnr])")


def pieces() -> list[str]:
    plain = ESCAPE.sub(lambda escape: escape[0].encode().decode("unicode_escape"), PIECES.strip().replace("\n", "|"))
    return plain.split("|")


def test_cleaning_again_changes_nothing_whatever_the_text_and_the_switches() -> None:
    draw, parts = random.Random(7), pieces()
    for number in range(4000):
        text = "".join(draw.choice(parts) + draw.choice(("", "", " ")) for _ in range(draw.randint(1, 14)))
        chosen = {
            name: draw.choice(("keep", "remove", "name")) if name == "emoji" else draw.random() < 0.6
            for name in SWITCHES
        }
        switches = Cleaning(**chosen) if number % 2 else Cleaning()  # type: ignore[arg-type]
        once, changed = clean(text, switches)
        assert changed or once == text
        assert clean(once, switches) == (once, ()), repr(text)
        assert clean(text, OFF) == (text, ())


def test_consultations_that_are_clean_are_hardly_touched() -> None:
    rows = load_consultations("builtin:consultations").rows
    kept = replace(Cleaning(), digits=False, greetings=False)
    touched = sum(clean(text, kept)[1] != () for row in rows for text in (row["question"], row["answer"]))
    assert touched <= 0.06 * 2 * len(rows)
    for row in rows:
        for text in (row["question"], row["answer"]):
            assert len(fold_for_matching(clean(text, kept)[0]).split()) == len(fold_for_matching(text).split())
