"""Unusable rows are rejected for the right reason, and similar usable rows are kept."""

from __future__ import annotations

from typing import get_args

from sevpeft.data.prepare import Cleaning, Reason
from sevpeft.data.prepare.clean import clean
from sevpeft.data.prepare.reject import REASONS, reject
from sevpeft.data.read import load_consultations

QUESTION = "عندي صداع شديد منذ ثلاثة أيام مع غثيان ولا أعاني من ضيق تنفس فما السبب؟"
ANSWER = "غالبا صداع نصفي، اشرب سوائل وخذ مسكنا، وإذا استمر فراجع طبيب أعصاب."
REJECTED = [
    ("empty", "123 ؟؟", ANSWER),
    ("empty", QUESTION, "... 38.5"),
    ("empty", QUESTION, "[هاتف]"),
    ("short_answer", QUESTION, "نعم"),
    ("short_answer", QUESTION, "راجع طبيبك."),
    ("short_answer", QUESTION, "لبوس قوه 80"),
    ("short_answer", QUESTION, "وعليكم السلام ورحمة الله، راجع طبيبك وشكرا"),
    ("question_is_answer", QUESTION, QUESTION),
    ("question_is_answer", QUESTION, QUESTION.replace("أ", "ا").replace("ة", "ه") + " شكرا لكم"),
    ("wrong_language", "I have had a severe headache for three days, what should I do?", ANSWER),
    ("wrong_language", QUESTION, "It is probably a migraine. You should drink water and see a doctor."),
    ("wrong_language", "3andi waga3 fe batni men embare7 a3mel eh", ANSWER),
    ("wrong_language", QUESTION, "da sodaa3 nesfy, lazem tekshef 3and doctor w terta7 fe el beet"),
    ("wrong_language", "سه روز است که سردرد شدید دارم و می خواهم بدانم برای این درد چه کار کنم", ANSWER),
    ("wrong_language", "У меня сильно болит голова уже три дня", ANSWER),
    ("truncated", "أشعر بألم في الرأس من الجهة اليمنى ودائما يبدأ بعد الاستيقاظ من النوم ولا يهدأ إلا...", ANSWER),
    ("truncated", QUESTION, "ينصح بعمل أشعة مقطعية على الجيوب الأنفية لمعرفة السبب وبالتالي العلاج…"),
    ("encoding_damage", QUESTION, "غالبا صداع \ufffd\ufffd نصفي واشرب سوائل"),
    ("encoding_damage", "?????? ????? ???? ??? ????", ANSWER),
    ("encoding_damage", QUESTION, "خذ ????? ???? ????? مرتين في اليوم"),
    ("encoding_damage", QUESTION, "غالبا صداع \ue000\ue001 نصفي واشرب سوائل"),
    ("encoding_damage", QUESTION, "Ø§Ù„Ø³Ù„Ø§ عليكم اشرب سوائل Ã˜Â§Ã™ ØÙØÙ ØÙØÙ"),
]
POINTING = [
    "في ألم شديد كما هو في الصورة المرفقة فما العلاج",
    "ظهرت بقع بنية زي ما في الصوره عندي 30 سنة",
    "هذه الصورة للإصبع بعد الإصابة بستة أيام",
    "أسف على الصورة الحبوب دي طالعة في كتافي",
    "رجاء تفسير الفحوصات المرفقة المريض يعاني من ألم",
    "أرفقت لكم صورة الأشعة",
    "أسماء الأدوية بالملف المرفق",
    "ممكن اعرف التحاليل دي فيها ايه",
    "لو سمحت يا دكتور ممكن تشوف الأشعة دي",
    "شو نتيجة هاي الفحوصات لو سمحت ممكن حدا يشوف هاي الفحوصات",
    "الروشتة دي كويسة ولا لا",
    "ده تحليل بول ودم لبنت 15 سنة",
    "عايزة اعرف نتيجة التحليل من فضلكم",
    "ممكن حد يطمني على الاشعه",
    "التقرير فيه ايه",
]
SPOKEN_OF = [
    "عملت صورة دم كاملة وطلعت كويسة لكن الصداع مستمر",
    "في الصورة الدموية عندي نقص حديد فما العلاج",
    "في صورة الدم عندي نقص حديد فما العلاج",
    "عملت اشعة وقال الدكتور التهاب فما العلاج",
    "الألم يزداد بصورة كبيرة عند النوم",
    "عملت صورة أشعة على المرفق بعد الوقوع وما زال الألم",
    "عملت تحاليل وكلها سليمة والحمد لله وما زلت أتعب",
    "هل التحاليل دي تتطلب صيام قبلها",
    "ممكن اعرف التحاليل دي كويسة: هيموجلوبين 9.1 صفائح 150 كرات بيضاء 11.5 سكر 140",
    "ايه التحاليل المطلوبة للأنيميا",
    "اخدت علاج ومفيش نتيجة فما الحل",
    "ممكن اعرف الاشعة المطلوبة للركبة",
    "هل ممكن نتيجة تحليل الحمل تكون غلط",
    "عملت أشعة الأيام دي وقالوا سليمة",
]
TYPED_DOTS = [
    "أشعر بألم في الرأس .. ودائما يبدأ بعد الاستيقاظ من النوم ... ولا يهدأ إلا بالمسكن...",
    "أشعر بألم في الرأس من الجهة اليمنى ودائما يبدأ بعد الاستيقاظ من النوم ....",
    "أشعر بألم في الرأس من الجهة اليمنى ودائما يبدأ بعد الاستيقاظ من النوم ولا يهدأ ...",
    "أشعر بألم في الرأس من الجهة اليمنى ودائما يبدأ بعد الاستيقاظ من النوم..",
    "وماذا عن الألم...",
]
ANSWERS = [
    "Augmentin 1g tab\nParacetamol 500 mg\nVentolin syrup",
    "CBC, TSH, Free T4, H pylori stool Ag",
    "Betadine دهان 3 مرات يوميا",
    "لا، هذا غير صحيح",
    "présent في العينة ولا خطورة منه",
]


def judged(question: str = QUESTION, answer: str = ANSWER) -> str | None:
    return reject(clean(question, Cleaning())[0], clean(answer, Cleaning())[0])


def test_every_reason_is_found() -> None:
    rows = [*REJECTED, *(("absent_picture", question, ANSWER) for question in POINTING)]
    found = [judged(question, answer) for _, question, answer in rows]
    assert [(row, reason) for row, reason in zip(rows, found, strict=True) if reason != row[0]] == []
    assert {reason for reason, _, _ in rows} == set(REASONS)
    assert {*get_args(Reason), "empty"} == set(REASONS)


def test_what_only_looks_like_a_reason_is_kept() -> None:
    rows = [
        (QUESTION, ANSWER),
        *((question, ANSWER) for question in [*SPOKEN_OF, *TYPED_DOTS]),
        *((QUESTION, answer) for answer in [*ANSWERS, *TYPED_DOTS]),
        (QUESTION + "????", ANSWER),
        ("ايه الحل ???? وايه سبب الصداع ????? وهل هو خطير ??", ANSWER),
        (QUESTION, f"{QUESTION} {ANSWER}"),
        (QUESTION, f"{QUESTION} غالبا صداع نصفي فاشرب سوائل"),
        ("هل أراجع طبيب أعصاب أم طبيب باطنة لعلاج الصداع", "طبيب أعصاب أولا"),
        *((row["question"], row["answer"]) for row in load_consultations("builtin:consultations").rows),
    ]
    assert [(question, answer) for question, answer in rows if judged(question, answer)] == []


def test_greetings_are_no_words_of_an_answer_even_where_they_were_left_in() -> None:
    assert reject(QUESTION, "وعليكم السلام ورحمة الله، راجع طبيبك وشكرا جزيلا") == "short_answer"


def test_an_allowed_reason_lets_the_next_one_speak() -> None:
    damaged = "????? ???? ?????"
    assert reject(damaged, "نعم") == "encoding_damage"
    assert reject(damaged, "نعم", ["encoding_damage"]) == "empty"
    assert reject(damaged, "نعم", ["encoding_damage", "empty"]) == "short_answer"
    assert reject(damaged, "نعم", tuple(REASONS)) is None
