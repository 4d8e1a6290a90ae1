"""From a word to what it can do to an expression beside it: deny it, date it, give it to somebody else, doubt it.

The lists are of folded words (see sevpeft.severity.words). One word may be several cues: "كان" tells of having and of
the past. What the cues mean together is in sevpeft.severity.context.
"""

from __future__ import annotations

from functools import lru_cache

from sevpeft.severity.words import REMEMBERED_WORDS

# What each word may do; a name may have several lines.
_CUES = """
not: لا ما مش مو موب مب مهو ماهو ماهي مهي ماني مانيش لم لن لست مهوش ماهوش موش مهيش ماشي
nor: ولا
without: بدون بلا دون ليس ليست بغير ماكو مافي مافيه مافيها مافيني ماكاين ماكاينه ماكاش مافماش مافما انعدام
without: خالي خاليه نافيا نفي معيش
has: في فيه فيها فيني فيا فيهم فيي يوجد توجد وجود هناك كان كانت كنت كاين كاينه كاش فما ثمه معي معو معه
has: معها معاي معايا معاه معاها لدي لديه لديها لدينا اعاني يعاني تعاني بعاني بيعاني بتعاني نعاني كنعاني
has: اشكو يشكو تشكو نشكو اشتكي يشتكي تشتكي بشتكي بيشتكي بتشتكي اشتكيت اشتكت نشتكي لاحظت لاحظنا صار حصل
has: حصلت جاني جتني جالي جاله جالها جاتني يجيني يجيه تجيني بيجيلي بيجيني بيجيله يحدث تحدث حدث حدثت تخطر
has: خطرت لي افكر بفكر كنفكر نخمم كنخمم نفكر ظهر ظهرت يظهر تعرضت اتعرض تعرض اصبت اصيب لقيت شفت طلع نزل
has: بها به لها له ليا
feels: احس يحس تحس بحس بيحس بتحس نحس حاسس حاسه حسيت حست احسست كنحس اشعر يشعر تشعر شعرت بشعر
but: لكن لكنه لكنها لكني لاكن بس الا سوي انما بينما غير فقط رغم بل ومع امّا اما
filler: اي حتي ابدا اصلا جدا هو هي ده دي هذا هذه عم راح قد بعد شي حاجه اعراض عندو من ولو ب
except: غير
or: او و ولا
all: امراض مرض ادويه علاج علاجات دوا مشاكل حاجه شي
what: علاج سبب اسباب الحل حل هو هي اسم افضل حكم رايك رايكم نوع تشخيص معني الفرق العلاج السبب
kin: ابي ابوي ابويا والدي الوالد بابا بوي امي والدتي الوالده ماما يما مما اخي اخوي اخويا خوي خويا اختي
kin: جدي جدتي ستي جدو تيته خالي خالتي عمي عمتي عمه خاله ابن بنت عايلتي عيلتي اهلي قريبي قريبتي صديقي
kin: صديقتي صاحبي صاحبتي رفيقي رفيقتي جاري جارتي جارتنا جارنا زميلي زميلتي حماتي حمايا الناس واحد واحده
remote: خالي خالتي عمي عمتي قريبي قريبتي صديقي صديقتي رفيقتي رفيقي جارتي جارتنا جارنا زميلي زميلتي صاحبتي
remote: صاحبي
died: مات ماتت توفي توفت توفيت توفاه توفاها متوفي متوفيه اتوفي اتوفت المرحوم المرحومه يرحمه يرحمها يرحمو
family: وراثه وراثي وراثيه وراثيا الوراثه عايلي عايليه
before: قبل
since: من ومن
long: سنه سنين سنوات سنتين عام عامين اعوام عاما شهر شهرين شهور اشهر شهرا عوام
year: العام السنه الصيف الشتا الشتاء
gone_year: الماضي الماضيه فات فاتت فايت الفايت
formerly: سابقا سابق سابقه سابقاً قديما قديم قديمه زمان
was: كان كانت كنت كانو
event: كان كانت كنت عملت عملنا عمل عملو اجريت اجرت سويت سوي درت دارت صار صارت صارلي حصل حصلت حصلي جاني جتني
event: جاتني جالي جاله جالها جاتله جتله اصبت اصيب اصيبت اصابتني اصابه تعرضت تعرض اتعرضت وقعت وقع شلت شال
event: طحت استاصلت ولدت سقطت
recovered: تعافيت تعافي تعافت شفيت شفي اتشفيت تشافيت تشافي تشافت اتعافيت خفيت بريت
went: خف خفت راح راحت اختفي اختفت زال زالت انتهي انتهت داز دازت طاب طابت برا اتعالج تعالج
befell: جاله جالها جاتله جتله جته صار صارت حصل حصلت اصيب اصيبت اصابته اصابتها
not_gone: شويه شوي نص ساعه قليلا بالمسكن المستشفي للمستشفي مستشفي دكتور لدكتور الدكتور للدكتور عند علي الطواري للطواري
not_gone: العياده وعيه وعيها بصره نظره نفسه نفسها لدكتوره للدكتوره
again: رجع رجعت عاد عادت تاني ثاني مجددا يرجع ترجع تعود يعود
now: الان دلوقتي دلوقت الحين هلق هلا هسه دابا توا الليله اليوم النهارده انهارده النهاردة انهاردا امبارح
now: مبارح البارح البارحه امس لسه لسا مازال مازالت ولازال حاليا حالا الساعه ساعات ساعه ساعتين دقايق
fear: خايف خايفه خوف خوفا خوفي خوفني خوفتني اخاف بخاف نخاف كنخاف يخاف تخاف خفت اخشي تخشي خشيه قلقان قلقانه
fear: قلقي قلق مقلق مقلقه وسواس موسوس موسوسه مرعوب مرعوبه احاتي خوفت نخافو
of: من ان انه انها انو يكون تكون ليكون لتكون يكونو لا يجيني يجيلي يصير تصير اكون علي عليه كل
be: يكون تكون اكون يكونو بتكون ليكون
may: هل ممكن يمكن قد احتمال لعل لعله معقول ياتري واش خايف خايفه ان
cause: يسبب تسبب بيسبب بتسبب يودي تودي بيودي احتمال احتماليه احتمالات يعمل بيعمل تعمل الوقايه اتجنب تجنب
cause: نتجنب امنع يمنع لقاح تطعيم علامات يقي يحمي احمي وقايه ظننت ظننته ظننتها حسبت حسبته افتكرت افتكرته
cause: سمعت قريت قرات الفرق خطر مضاعفات
"""
_WITH_AND = {
    "not",
    "without",
    "has",
    "died",
    "was",
    "event",
    "recovered",
    "went",
    "now",
    "fear",
    "but",
    "kin",
    "again",
    "may",
}


def _table_of_cues() -> tuple[dict[str, int], dict[str, int]]:
    """The bit of every cue, and for every word (with a conjunction where it takes one) the bits of what it may do."""
    bits: dict[str, int] = {}
    table: dict[str, int] = {}
    for line in _CUES.strip().splitlines():
        name, _, words = line.partition(": ")
        bit = bits.setdefault(name, 1 << len(bits))
        for word in words.split():
            for form in (word, "و" + word, "ف" + word) if name in _WITH_AND else (word,):
                # "ولا" is a cue of its own.
                if form != "ولا" or name in ("nor", "or"):
                    table[form] = table.get(form, 0) | bit
    return bits, table


BIT, _TABLE = _table_of_cues()


@lru_cache(maxsize=REMEMBERED_WORDS)
def cue_of(word: str) -> int:
    """What a word can do, as bits. Joined spellings ("ماعندي", "لايوجد") deny as the parted ones do."""
    cue = _TABLE.get(word, 0)
    if word.endswith("ش") and len(word) > 3:
        # ما كاينش, ما نخممش: the end of a negation around the verb.
        cue |= _TABLE.get(word[:-1], 0)
    stem = word[1:] if word[0] in "وف" else word
    if stem.startswith(("عند", "بعند")):
        cue |= BIT["has"]
    elif stem.startswith(("ما", "لا")) and len(stem) > 4:
        rest = stem[2:]
        if rest.startswith("عند") or (_TABLE.get(rest, 0) & BIT["has"] and rest != "لها"):
            cue |= BIT["without"]
    return cue
