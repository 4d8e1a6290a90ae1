"""From a cleaned question and answer to the reason why nothing can be learnt from them, if there is one.

Rows that are thrown away in error cannot teach, and rows that are kept in error teach something wrong: where a rule is
in doubt the row is kept, but for answers to a picture that the model will never see. Judged on cleaned text, because
`clean` repairs what can be repaired and keeps apart what says that a text was cut from how people type.
"""

import re
from collections.abc import Callable, Collection

from sevpeft.data.cleaning import fold_for_matching, without_greetings
from sevpeft.data.encoding_repair import is_damaged
from sevpeft.data.names import words_of

REASONS: dict[str, str] = {
    "encoding_damage": "letters are lost or unreadable: replacement characters, runs of ???, a wrong code page",
    "empty": "question or answer has no letters",
    "short_answer": "the answer has one or two words beside greetings",
    "question_is_answer": "question and answer are the same, or one is the other with little added",
    "wrong_language": "question or answer is not written in Arabic letters; names of drugs and tests are no language",
    "truncated": "question or answer was cut off, as a closing ... at its last word says",
    "absent_picture": "the question shows a picture, a lab sheet or a prescription that is not there",
}
"""Reason -> what it means, in the order in which they are looked for."""


def reject(question: str, answer: str, allowed: Collection[str] = ()) -> str | None:
    """Return the first of `REASONS` that holds and is not `allowed`; None where the row may stay."""
    for reason, holds in _CHECKS.items():
        if reason not in allowed and holds(question, answer):
            return reason
    return None


_WORD = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*")
_MASK = re.compile(r"\[[^\[\]]{2,20}\]")
_FEW_WORDS = 2


def _is_damaged(question: str, answer: str) -> bool:
    return is_damaged(question) or is_damaged(answer)


def _is_empty(question: str, answer: str) -> bool:
    return not (_has_letters(question) and _has_letters(answer))


def _has_letters(text: str) -> bool:
    return any(map(str.isalpha, _MASK.sub("", text) if "[" in text else text))


def _is_short(question: str, answer: str) -> bool:
    # Whoever has many characters has more than two words: only short answers are worth counting.
    return len(answer) < 200 and len(_WORD.findall(_MASK.sub(" ", without_greetings(answer)))) <= _FEW_WORDS


# Of the longer one, what may stand beside the shorter one without being an answer.
_MOST_ADDED = 0.2


def _is_the_same(question: str, answer: str) -> bool:
    # Folding takes time, and texts of very different length are not the same.
    shorter, longer = sorted((question, answer), key=len)
    if len(shorter) < 0.6 * len(longer):
        return False
    one, other = sorted((fold_for_matching(question), fold_for_matching(answer)), key=len)
    return one in other and len(one) >= (1 - _MOST_ADDED) * len(other)


_ARABIC_LETTER = re.compile(r"[\u0620-\u064A\u066E-\u06D3]+")
_LATIN_LETTER = re.compile(r"[A-Za-z\u00C0-\u024F]+")
_OTHER_SCRIPT = re.compile(r"[^\W\d_\u0000-\u024F\u0600-\u06FF]")
_LEAST_ARABIC = 0.3
# What sentences are made of and lists of drugs are not: English, French, and Arabic in Latin letters.
_SENTENCE_WORDS = words_of("""
    the and of is are was were be been to you your yours for with should would could can may might in it its this that
    these those have has had not no do does did if or but as at by from on an what how when which who why they them
    their he she his her we our i my me will also more than then there
    le la les des du de une est sont vous votre avec pour dans ce cette que qui et en ne pas
    ana enta enty howa heya da dy di dah fe fi fel el mn men ala 3ala 3la ya w we law lw mesh msh mish bas 3ndk 3andak
    3ndy 3andi 3ndi lazem lazm tekshf takhod kol yom wa 7aga ely elly aw bel lel
    """)
_LEAST_SENTENCE_WORDS = 0.1
_NAMES_ONLY = 40
# Persian and Urdu use Arabic letters; these words are in every sentence of theirs and in none of ours.
_PERSIAN_OR_URDU = words_of("است می که این برای های شود کنید کرد از را ہے ہیں کے کی کا میں اور سے نہیں کو آپ")
_THEIR_LETTERS = re.compile(r"[یکہےں]")


def _is_foreign(question: str, answer: str) -> bool:
    return (_arabic_share(question) < _LEAST_ARABIC or _is_persian_or_urdu(question)) or (
        (_arabic_share(answer) < _LEAST_ARABIC and not _lists_names(answer)) or _is_persian_or_urdu(answer)
    )


def _arabic_share(text: str) -> float:
    arabic = sum(map(len, _ARABIC_LETTER.findall(text)))
    other = sum(map(len, _LATIN_LETTER.findall(text))) + len(_OTHER_SCRIPT.findall(text))
    return arabic / (arabic + other) if arabic + other else 1.0


def _lists_names(text: str) -> bool:
    """Whether Latin words are a prescription or a list of tests: no sentence, and not long."""
    if _OTHER_SCRIPT.search(text):
        return False
    words = re.findall(r"[a-z0-9]*[a-z][a-z0-9]*", text.lower())
    sentence = sum(word in _SENTENCE_WORDS for word in words)
    return len(words) <= _NAMES_ONLY and sentence <= 1 + _LEAST_SENTENCE_WORDS * len(words)


def _is_persian_or_urdu(text: str) -> bool:
    if not _THEIR_LETTERS.search(text):
        return False
    words = text.split()
    return sum(word in _PERSIAN_OR_URDU for word in words) > 0.1 * len(words)


# Public sets cut a text at a length and put three dots right after its last word. Who types dots does so between
# phrases as well, puts a space before them, or types another number of them, of which `clean` leaves two.
_CUT = re.compile(r"[^\W_](?:\.\.\.|…)\Z")
_TYPED_DOTS = re.compile(r"\.\.|…")
_LEAST_CUT = 60


def _is_truncated(question: str, answer: str) -> bool:
    return _is_cut(question) or _is_cut(answer)


def _is_cut(text: str) -> bool:
    return len(text) >= _LEAST_CUT and _CUT.search(text) is not None and not _TYPED_DOTS.search(text[:-4])


# All folded. A noun of either list may carry a particle; "المرفق" after a feminine noun is the elbow, not "attached".
_PARTICLE = r"(?<!\w)[وف]?(?:ال|بال|فال|عال|لل|ب|ل|ف)?"
_SHEET = (
    "(?:تحليل|تحاليل|تحليلين|اشعه|اشاعه|اشعات|اشاعات|تقرير|تقارير|رنين|سونار|ايكو|روشته|فحص|فحوصات|فحوص|نتيجه|نتايج|"
    "مقطعيه|تراساوند|منظار|مفراس|رسم القلب|رسمه القلب|رسم قلب|تخطيط القلب)"
)
_THIS = "(?:دي|ديه|ده|دا|دول|ذي|هذا|هذه|هذي|هاي|هاد|هادا|هادي|هيدا|هيدي|هاذا|هاذي|هادو|هذول|هدول)"
_PICTURE = "صور(?:ه|تين|تها|ته)?"
_ASKING = (
    r"(?:ممكن|حد|عايزه?|عاوزه?|محتاجه?|اريد|ابي|ابغي|بدي|ارجو|رجاء|يا ?ريت|لو ?سمحت\w*|من فضلك\w*|"
    r"بعد اذن\w*|[ان]عرف\w*|معرفه|[يت]?قرا\w*|يقرء|قراءه|تفسير\w*|[يت]?فسر\w*|[يت]?شرح\w*|"
    r"[يتا]?طمن\w*|اتطمن|[يت]?شوف\w*|راي\w*|افاده|[يت]فيد\w*|[يت]?فهم\w*|[يت]قول\w*|[يت]?وضح\w*|معن[اي]\w*)"
)
_ABSENT_PICTURE = re.compile(
    "|".join(
        (
            # التحاليل المرفقة، بالملف المرفق، مرفق صورة، أرفقت لكم التقرير
            rf"{_PARTICLE}(?:{_SHEET}|{_PICTURE}|ملفات)\s(?:ال)?مرفق(?:ه|ات|ين)(?!\w)",
            r"(?<!\w)\w{0,3}(?:تحليل|تقرير|ملف|فحص|فيديو)\s(?:ال)?مرفق(?!\w)",
            rf"(?<!\w)(?:و)?(?:مرفق(?!ي|ه)\w*|ارفقت|ارفق|سارفق|مرفقه|ارفقنا)\s(?:\w+\s){{0,2}}(?:ال)?(?:{_SHEET}|{_PICTURE})(?!\w)",
            # في الصورة، بالصور، زي الصورة، كما هو في الصورة؛ وليس صورة الدم
            r"(?<!\w)(?:ف|في|فى|زي|مثل|متل|كما|كيما|نفس|بنفس)\s(?:هذه\s|هذي\s|هاي\s|ها)?الصور(?:ه|تين)?(?!\w)(?!\s(?:ال)?دم|\sالنمط|\sالذهن)",
            r"(?<!\w)[وز]?(?:بال|فال|عال|بهال)صور(?:ه|تين)?(?!\w)(?!\s(?:ال)?دم)",
            r"(?<!\w)و?(?:هذه|هذي|هاي|دي|هاذي|ادي)\s(?:ال)?صور(?:ه|تين|تها|ته)?(?!\w)",
            r"(?<!\w)(?:ايه|اي|شو|ايش)\s(?:في|فيها)\sالصور(?:ه|تين)?(?!\w)",
            r"(?<!\w)الصور(?:ه|تين)?\s(?:دي|هذه|هذي|هاي|مش|غير|ما|مو|تحت|فوق|اعلاه|ادناه|بالاعلي|بالاسفل|موضح\w*|واضح\w*|الاولي|التاني\w*)(?!\w)",
            r"(?<!\w)(?:اسفه?|معلش|سوري|عذرا|بعتذر|اعتذر)\s(?:علي|ع|عل|عن)\s(?:ال)?(?:صور(?:ه)?|منظر)(?!\w)",
            rf"(?<!\w){_ASKING}\s(?:لي\s|لنا\s)?(?:ال|بال|ع\s?ال)صور(?:ه|تين)?(?!\w)(?!\s(?:ال)?دم)",
            r"(?<!\w)(?:في|ف|ب|فى)\s?(?:اول\s)?(?:ال)?(?:كومنت\w*|تعليق|تعليقات)(?!\w)",
        )
    )
)
_SHEET_UNSEEN = re.compile(
    "|".join(
        (
            # ممكن أعرف التحاليل دي فيها إيه
            rf"(?<!\w){_ASKING}\s(?:\w+\s){{0,4}}{_PARTICLE}{_SHEET}\s(?:(?!ال)\w+\s)?{_THIS}(?!\w)",
            rf"(?<!\w){_ASKING}\s(?:\w+\s){{0,4}}{_THIS}\s(?:ال)?{_SHEET}(?!\w)",
            rf"{_PARTICLE}{_SHEET}\s{_THIS}\s(?:\w+\s){{0,2}}"
            rf"(?:في|فيها|فيه|فيهم|ايه|اي|كويسه?|طبيعي\w*|سليمه?|معنا\w*|تفسير\w*|اخبار\w*|{_ASKING})(?!\w)",
            # دي تحاليل زوجي
            rf"(?<!\w)و?{_THIS}\s(?!نتيجه){_SHEET}(?!\w)",
            # التقرير فيه إيه، إيه اللي في الأشعة
            rf"{_PARTICLE}{_SHEET}\s(?:ف|في|فيها|فيه|فيهم)\s?(?:ايه|اي|ايش|شو)(?!\w)",
            rf"(?<!\w)(?:ايه|اي|ايش|شو)\s(?:اللي\s|الي\s)?(?:موجود\s|مكتوب\s)?(?:ف|في|فال)\s?(?:نتيجه\s)?(?:ال)?{_SHEET}(?!\w)",
            # ممكن نتيجة التحليل
            rf"(?<!\w)(?:ممكن|شو|ايه|ايش)\s(?:ال)?(?:نتيجه|نتايج)\sال{_SHEET}(?!\w)(?!\s[يت]\w+)",
            # حد يطمني على التحليل
            rf"(?<!\w)(?:[يتا]?طمن\w*|راي\w*|توضيح|افاده|تفاصيل)\s(?:\w+\s)?(?:علي|ع|عل|في|ف|عن|ل)?\s?(?:نتيجه\s|نتايج\s)?"
            rf"{_PARTICLE}{_SHEET}(?!\w)",
            # ممكن أعرف نتيجة التحليل، تفسير الأشعة
            rf"(?<!\w)(?:اعرف|نعرف|معرفه|[يت]?قرا\w*|قراءه|تفسير|[يت]?فسر\w*|[يت]?شرح\w*)\s(?:نتيجه\s|نتايج\s|تقرير\s)?ال{_SHEET}(?!\w)"
            r"(?!\s(?:المطلوب\w*|اللازم\w*|المناسب\w*|بتطلع|تطلع|هتطلع|حتطلع|امتي|متي|بعد كام|بكام))",
        )
    )
)
# Who writes the readings down asks about them, not about the sheet. An age and a few days are no readings.
_NUMBER = re.compile(r"\d+(?:[.,/]\d+)?")
_FEWEST_READINGS = 4
_MAYBE_PICTURE = re.compile("صور|مرفق|رفقت|[سا]رفق|كومنت|تعليق|منظر")
_MAYBE_SHEET = re.compile(
    "حليل|حاليل|[أا]شع[ةهات]|[أا]شاع[ةهات]|تقرير|تقارير|روشت|رنين|سونار|[إا]يكو|رسم|فحص|فحوص|نتيج[ةه]|نتا[ئي]ج|مقطعي|تراسا|منظار|"
    "مفراس|تخطيط"
)


def _points_to_a_picture(question: str, answer: str) -> bool:
    picture, sheet = _MAYBE_PICTURE.search(question), _MAYBE_SHEET.search(question)
    if not (picture or sheet):
        return False
    folded = fold_for_matching(question)
    if picture and _ABSENT_PICTURE.search(folded):
        return True
    return bool(sheet and len(_NUMBER.findall(question)) < _FEWEST_READINGS and _SHEET_UNSEEN.search(folded))


_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "encoding_damage": _is_damaged,
    "empty": _is_empty,
    "short_answer": _is_short,
    "question_is_answer": _is_the_same,
    "wrong_language": _is_foreign,
    "truncated": _is_truncated,
    "absent_picture": _points_to_a_picture,
}
