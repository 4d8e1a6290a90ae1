"""Cleaning removes noise only, each switch by itself, and a second pass changes nothing."""

from __future__ import annotations

import random
import re

from sevpeft.data.prepare import Cleaning
from sevpeft.data.prepare.clean import clean, without_greetings
from sevpeft.data.read import load_consultations
from sevpeft.data.text import fold_for_matching

SWITCHES = tuple(Cleaning.model_fields)


def switched(default: bool | None = None, **switches: bool | str) -> Cleaning:
    """All switches on or off, or as they are by default, but for those that are named."""
    base = {} if default is None else {name: "keep" if name == "emoji" else default for name in SWITCHES}
    return Cleaning(**{**base, **switches})  # type: ignore[arg-type]


OFF = switched(False)
EACH = [
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
    ("tashkeel", "حُمّى شديدةً", "حمى شديدة"),
    ("digits", "٣٨٫٥ و۴ و١٬٠٠٠ و٥٠٪", "38.5 و4 و1,000 و50%"),
    ("digits", "٣ مرات 5٠٠ مجم ١١١١ و٣٣٣.٣", "3 مرات 500 مجم 1111 و333.3"),
    ("repeated_letters", "جدااااا هههههه كتييير ووووجع sooooo َََ", "جدا هه كتير ووجع soo َ"),
    ("repeated_punctuation", "ليه؟؟؟؟ !!!! ،، ...... ؟!؟!؟! *****", "ليه؟ ! ، .. ؟! *"),
    ("whitespace", "  ألم \u00a0 شديد\r\n\n\n\nمنذ\tيوم \n الآن ", "ألم شديد\n\nمنذ يوم\nالآن"),
    ("greetings", "السلام عليكم ورحمة الله وبركاته، عندي ألم وجزاكم الله خيرا", "عندي ألم"),
    ("greetings", "مساء الخير يا دكتور عندي صداع ولكم جزيل الشكر", "يا دكتور عندي صداع"),
]


def test_each_switch_does_its_own_work_and_names_itself() -> None:
    wrong = [
        (switch, typed, found)
        for switch, typed, expected in EACH
        if (found := clean(typed, switched(False, **{switch: True}))) != (expected, (switch,))
        or clean(typed, OFF) != (typed, ())
    ]
    assert wrong == []


def test_emoji_stay_go_or_get_a_name_and_never_take_a_dose_along() -> None:
    text = "خذ 1️⃣ حبة 💊 👨\u200d👩\u200d👧"
    assert clean(text, Cleaning())[0] == text
    assert clean(text, switched(emoji="remove"))[0] == "خذ 1 حبة"
    named = clean(text, switched(emoji="name"))[0]
    assert named.startswith("خذ 1 حبة ") and not set("💊:_") & set(named) and not re.search("[a-z]", named)


def test_what_carries_meaning_is_left_as_it_is() -> None:
    texts = [
        "أصابتني إغماءة مؤلمة في المرأة الأولى، شاطئ آخر مستشفى وقيء بطيئة",
        "حُمّى شديدةً وحرارة 38.5 وضغط 120/80 والجرعة 5/500mg كل 8 ساعات",
        "Hb<12 و WBC > 11.5 و x<5 و y>3",
        "بروتين ++++ و سكر +++ و كيتون ---",
        "لا أعاني من ضيق تنفس ولم أفقد الوعي وليس عندي نزيف ومش حامل ومفيش حرارة",
        "الله اللهم اللي تتكلم ممكن ببطء سسن",
        "10000 و 111 و 5555 و 0.0005",
        "درجة III و AAA و www.example.org",
        "حرارة .. وسعال .. وبلغم ...",
        "**النصيحة**: - الراحة",
        "السلام عليكم ورحمة الله وبركاته",
        "وعليكم السلام، شكرا لكم",
        "présenté à l'hôpital où il a été opéré",
        "القياس 5 °C ± 0.5 «تقريبا» – جيد’s",
    ]
    assert [text for text in texts if clean(text, Cleaning()) != (text, ())] == []


def test_greetings_go_and_take_nothing_of_the_complaint_along() -> None:
    rest_of = {
        "سلام عليكم\n ابني عنده حرارة": "ابني عنده حرارة",
        "وعليكم السلام ورحمه الله .. اشرب ماء": "اشرب ماء",
        "صباح الخير، السلام عليكم: ألم في الظهر؟ وشكرا جزيلا": "ألم في الظهر؟",
        "السلام عليكم (ألم) - 5 أيام": "(ألم) - 5 أيام",
        "ألم السلام عليكم ألم": "ألم السلام عليكم ألم",
        "ألم وشكرا ثم عاد الألم": "ألم وشكرا ثم عاد الألم",
        "سلامة القلب": "سلامة القلب",
        "مساء الخميس بدأ الألم": "مساء الخميس بدأ الألم",
    }
    assert {text: without_greetings(text) for text in rest_of} == rest_of
    assert clean("\u200fالســـلام  عليكم&nbsp;<br>عندي  ألم", Cleaning())[0] == "عندي ألم"


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


def test_cleaning_again_changes_nothing_whatever_the_text_and_the_switches() -> None:
    escape = re.compile(r"\\(?:u[0-9a-f]{4}|x[0-9a-f]{2}|[tnr])")
    plain = escape.sub(lambda found: found[0].encode().decode("unicode_escape"), PIECES.strip().replace("\n", "|"))
    draw, parts = random.Random(7), plain.split("|")
    for number in range(1500):
        text = "".join(draw.choice(parts) + draw.choice(("", "", " ")) for _ in range(draw.randint(1, 14)))
        chosen: dict[str, bool | str] = {name: draw.random() < 0.6 for name in SWITCHES}
        chosen["emoji"] = draw.choice(("keep", "remove", "name"))
        switches = switched(**chosen) if number % 2 else Cleaning()
        once, changed = clean(text, switches)
        assert changed or once == text
        assert clean(once, switches) == (once, ()), repr(text)


def test_consultations_that_are_clean_are_hardly_touched() -> None:
    rows = load_consultations("builtin:consultations").rows
    kept = switched(digits=False, greetings=False)
    texts = [text for row in rows for text in (row["question"], row["answer"])]
    assert sum(clean(text, kept)[1] != () for text in texts) <= 0.06 * len(texts)
    for text in texts:
        assert len(fold_for_matching(clean(text, kept)[0]).split()) == len(fold_for_matching(text).split())
