"""Personal data is masked; doses, readings, dates, specialties and verbs are not."""

from __future__ import annotations

import random

from sevpeft.data.prepare import Masking
from sevpeft.data.prepare.clean import WORDS
from sevpeft.data.prepare.mask import MASKS, mask
from sevpeft.data.read import load_consultations
from sevpeft.data.text import fold_for_matching

PHONE, EMAIL, LINK, ID, NAME = (MASKS[kind] for kind in ("phone", "email", "link", "national_id", "name"))
PHONES = [
    "01001234567",
    "٠١٠٠١٢٣٤٥٦٧",
    "010 0123 4567",
    "010-0123-4567",
    "+20 100 123 4567",
    "00201001234567",
    "201001234567",
    "0501234567",
    "+966 50 123 4567",
    "966501234567",
    "+971 50 123 4567",
    "04 123 4567",
    "0791234567",
    "+962791234567",
    "07901234567",
    "0612345678",
    "+212 6 12 34 56 78",
    "0551234567",
    "05-51-23-45-67",
    "+965 50012345",
    "+44 20 7946 0958",
    "(02) 2345 6789",
]
NO_NUMBERS_OF_PERSONS = [
    "Hb 12.5 و WBC 11.500 و صفائح 150000 - 450000 و 4500000-5500000",
    "ضغط 120/80 ونبض 072 وسكر 0.0012345678",
    "500 mg كل 8 ساعات و 5/500mg و 1000000 وحدة",
    "من 2019 الى 2023 1500000 حيوان منوي و 60000000 و 25000000",
    "01/02/2023 و 12-05-2023 2023/12/01 و 20231201 و 01.02.2023",
    "من 05-06-2022 15 قرصا ومن 01-02-2023 3 حقن",
    "عمري 35 سنة ووزني 70 وطولي 170 منذ 1998",
    "TSH 0.005 FT4 1.2 ferritin 12 500 100 05 20",
    "الساعة 08:30 الى 12:45",
    "0 50 100 150 200 250",
    "رقم الملف 12345678901234",
    "123456789012",
    "1000000000 بكتيريا",
]
IDS = [
    "29001011234567",
    "٢٩٠٠١٠١١٢٣٤٥٦٧",
    "30512310112345",
    "1012345672",
    "784-1990-1234567-1",
    "784199012345671",
    "290010112346",
]
WITH_LINKS = [
    ("a.b-c@mail.example.com", EMAIL),
    ("name (at) gmail.com", EMAIL),
    ("https://example.com/a?b=1#c،", f"{LINK}،"),
    ("(http://x.org)", f"({LINK})"),
    ("www.site.net.", f"{LINK}."),
    ("t.me/abc_1", LINK),
    ("webteb.com/articles/صداع-نصفي-12 ثم", f"{LINK} ثم"),
    ("https://t.co/abcعندي صداع", f"{LINK}عندي صداع"),
    ("chat.example.com", LINK),
]
NO_LINKS = ["انتهى.ثم بدأ", "Vit.D و K.D و 3.5.2", "etc. and so.on", "@", "a @ b", "مرتين/يوم"]
WITH_NAMES = [
    ("د. احمد بهاء الدين", "د. {}"),
    ("د/ محمد حسن شلبي\nعيادة", "د/ {}\nعيادة"),
    ("أ.د. هشام الشافعي قال", "أ.د. {} قال"),
    ("ياريت دكتور مصطفي الديب أو غيره", "ياريت دكتور {} أو غيره"),
    ("الدكتورة فاطمة كتبت لي", "الدكتورة {} كتبت لي"),
    ("مع الدكتور عبد الله العتيبي عن", "مع الدكتور {} عن"),
    ("الأستاذ الدكتور مُحمّد عبد الرحمن الصعيدي قال", "الأستاذ الدكتور {} قال"),
    ("الدكتور علي حسن", "الدكتور {}"),
    ("والدكتور/ خالد طلب أشعة", "والدكتور/ {} طلب أشعة"),
    ("دابراهيم هنداوى مستشار", "د{} مستشار"),
    ("Dr. Ahmed Ali said", "Dr. {} said"),
    ("للدكتورة DrRanda Ahmed", "للدكتورة Dr{}"),
    ("دكتور Ahmed قال", "دكتور {} قال"),
    ("أنا اسمي سارة وعندي صداع", "أنا اسمي {} وعندي صداع"),
    ("اسمي جويرية عمري ٢٠", "اسمي {} عمري ٢٠"),
    ("my name is ahmed and I have", "my name is {} and I have"),
    ("ا. كريم محمود", "ا. {}"),
]
NO_NAMES = [
    "دكتور عيون",
    "دكتور باطنة",
    "دكتورة نسا",
    "يا دكتور انا عندي صداع",
    "الدكتور كتبلي مضاد",
    "وصف لي الدكتور كريم فيوسيدين",
    "يا دكتور عمر ابني ٥ سنين",
    "يا دكتور طلعت النتيجة",
    "يا دكتور رجاء الرد",
    "دكتور صباح الخير",
    "سألت الدكتور علي العملية",
    "د. باطنة أطفال",
    "د. جلديه يشوف",
    "فيتامين د محمد",
    "نقص فيتامين د. وحديد",
    "الطبيب المعالج والطبيب المختص",
    "الدكتور ماهر جدا",
    "بدون ذكر اسمي لو سمحت",
    "متكتبش اسمي وشكرا",
    "سمي وأعراض تسمم",
    "eye dr ops",
    "Dr said and DRPLA disease",
    "دكتوراه في الطب",
    "محمد ابني عنده حرارة",
    "أ- راحة ب- سوائل",
]


def test_phone_numbers_are_masked_however_they_are_written() -> None:
    wrong = []
    for number in PHONES:
        for text in ("كلمني على {} من فضلك", "عمري 25 سنة {}، 3 أيام"):
            found = mask(text.format(number))
            wrong += [] if found == (text.format(PHONE), {"phone": 1}) else [found]
    assert wrong == []
    assert mask("واتس 50012345") == (f"واتس {PHONE}", {"phone": 1})
    assert mask("010 0123 4567 01112345678 / 0501234567") == (f"{PHONE} {PHONE} / {PHONE}", {"phone": 3})


def test_what_identifies_nobody_is_left_as_it_is() -> None:
    texts = [*NO_NUMBERS_OF_PERSONS, *NO_LINKS, *NO_NAMES, "عدد الكريات 50012345"]
    assert [text for text in texts if mask(text) != (text, {})] == []


def test_national_ids_are_known_by_their_form_and_check_digit_or_by_what_they_are_called() -> None:
    assert [n for n in IDS if mask(f"بياناتي {n}.") != (f"بياناتي {ID}.", {"national_id": 1})] == []
    for number in ("1012345673", "290010112345", "29013011234567", "29001019934567"):
        assert mask(f"عينة {number}.", ["national_id"]) == (f"عينة {number}.", {})
        if len(number) != 14:
            assert mask(f"رقم الهوية: {number}.", ["national_id"])[1] == {"national_id": 1}


def test_emails_and_links_are_masked_to_their_last_letter_and_no_further() -> None:
    assert {text: mask(f"راجع {text}")[0] for text, _ in WITH_LINKS} == {
        t: f"راجع {masked}" for t, masked in WITH_LINKS
    }


def test_names_after_titles_are_masked_and_the_title_stays() -> None:
    expected = {text: (masked.format(NAME), {"name": 1}) for text, masked in WITH_NAMES}
    assert {text: mask(text) for text in expected} == expected


def test_the_lists_of_names_agree_with_each_other_and_are_folded() -> None:
    given, ambiguous, family, never = (WORDS[name] for name in ("given", "ambiguous", "family", "never"))
    assert not given & ambiguous and not family & never and not given & never
    assert [word for word in given | ambiguous | family | never if fold_for_matching(word) != word] == []


def test_only_the_kinds_asked_for_are_masked_and_each_has_its_setting() -> None:
    text = "د. أحمد 01001234567 a@b.com"
    assert mask(text, ["phone"]) == (f"د. أحمد {PHONE} a@b.com", {"phone": 1})
    assert mask(text, ()) == (text, {})
    assert mask(text) == (f"د. {NAME} {PHONE} {EMAIL}", {"email": 1, "phone": 1, "name": 1})
    assert list(Masking.model_fields) == list(MASKS)


PIECES = """
0100 123 4567|+966501234567|29001011234567|1012345672|a@b.com|http://x.com/a|t.me/x|www.a.org|د.|دكتور|الدكتور |د|محمد
علي|أحمد|مُحَمَّد|الديب|عبد|الله|عيون|اسمي|my name is|Ali|Dr.|Dr|DR|5|38.5|.|/|-|(|)|:|،| |?|ok|x|ـ|َ|ا|و
"""


def test_masking_again_finds_nothing_and_cuts_no_mask() -> None:
    draw = random.Random(11)
    parts = [*PIECES.strip().replace("\n", "|").split("|"), "\n", *MASKS.values()]
    for _ in range(1500):
        text = "".join(draw.choice(parts) + draw.choice(("", " ")) for _ in range(draw.randint(1, 14)))
        once, counts = mask(text)
        assert mask(once) == (once, {}), repr(text)
        for kind, there in MASKS.items():
            assert once.count(there) == text.count(there) + counts.get(kind, 0), repr(text)


def test_the_bundled_consultations_name_nobody() -> None:
    for row in load_consultations("builtin:consultations").rows:
        for text in (row["question"], row["answer"]):
            assert mask(text) == (text, {})
