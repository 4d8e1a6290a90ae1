"""What a question says in its dialect is found, and what it denies, remembers, fears or tells of others counts less."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from sevpeft.severity import rules as rules_module
from sevpeft.severity.lexicon import COLUMNS, PACKAGE_LEXICON
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.rules import COUNTS, PRIOR, STRENGTH, Match, Rules, probabilities_of

RULES = Rules()
CRITICAL = SEVERITIES.index("critical")

STATED = [
    # Modern Standard Arabic
    ("أعاني من ألم شديد في الصدر منذ ساعة", "chest_pain"),
    ("أشعر بضغط في منتصف الصدر", "chest_pain"),
    ("والدي أصيب بنوبة قلبية الآن", "chest_pain"),
    ("لدي ضيق في التنفس منذ الصباح", "breathing"),
    ("لا أستطيع التنفس", "breathing"),
    ("طفلي شفتاه زرقاء ويتنفس بصعوبة", "breathing"),
    ("فقدت الوعي لدقيقة وأنا أمشي", "loss_of_consciousness"),
    ("ابني لا يستجيب لنا", "loss_of_consciousness"),
    ("أصيب بإغماء مرتين اليوم", "loss_of_consciousness"),
    ("أتقيأ دما منذ الليل", "bleeding"),
    ("لون البراز أسود كالقطران", "bleeding"),
    ("النزيف لا يتوقف منذ ساعة", "bleeding"),
    ("لا يتوقف النزيف من الجرح", "bleeding"),
    ("أصابه شلل نصفي مفاجئ", "stroke"),
    ("ثقل في اللسان واعوجاج في الفم", "stroke"),
    ("جدتي عندها جلطة في الدماغ", "stroke"),
    ("أصيب بتشنجات مع ارتفاع الحرارة", "convulsions"),
    ("أفكر في الانتحار", "suicidal"),
    ("أتمنى الموت كل ليلة", "suicidal"),
    ("لا أريد الحياة", "suicidal"),
    ("ابتلع طفلي بطارية صغيرة", "choking_foreign_body"),
    ("شرب ابني من مادة الكلور", "poisoning_bites"),
    ("لدغته أفعى في الحقل", "poisoning_bites"),
    ("صداع مفاجئ ورهيب", "neuro_emergency"),
    ("تيبس في الرقبة مع حرارة", "neuro_emergency"),
    ("سقط على رأسه من السرير", "neuro_emergency"),
    ("حادث سيارة قبل ساعة", "trauma_burns"),
    ("عندي حروق من الدرجة الثانية", "trauma_burns"),
    ("أنا حامل ولدي نزيف", "pregnancy"),
    ("حركة الجنين قلت اليوم", "pregnancy"),
    ("رضيعي عمره 12 يوما وحرارته مرتفعة", "fever_infant"),
    ("حرارته 40 منذ الليل", "fever_infant"),
    ("تورم في اللسان والشفاه بعد الدواء", "anaphylaxis"),
    ("احتباس البول منذ أمس", "acute_abdomen_uro"),
    ("التهاب الزائدة الدودية", "acute_abdomen_uro"),
    ("ضغطي 190 على 110", "metabolic_bp"),
    ("السكر عندي 480", "metabolic_bp"),
    ("جلطة في الساق اليسرى", "limb_vascular"),
    ("فقدت البصر في عيني فجأة", "neuro_emergency"),
    ("انفصال في الشبكية", "eye_emergency"),
    # Egyptian
    ("صدري بيوجعني أوي ونفسي مكتوم", "chest_pain"),
    ("عندي وجع في صدري ودراعي الشمال", "chest_pain"),
    ("مش قادر اتنفس الحقوني", "breathing"),
    ("مش عارفة آخد نفسي خالص", "breathing"),
    ("عندي كرشة نفس من امبارح", "breathing"),
    ("مبقدرش اخد نفسي", "breathing"),
    ("امي اغمى عليها من شوية", "loss_of_consciousness"),
    ("بابا وقع من طوله ومش بيرد علينا", "loss_of_consciousness"),
    ("بقه اتعوج وكلامه تقيل", "stroke"),
    ("مش قادر يحرك ايده اليمين", "stroke"),
    ("بيرجع دم من الصبح", "bleeding"),
    ("عايزة أموت نفسي", "suicidal"),
    ("كرهت حياتي ومش عايز اعيش", "suicidal"),
    ("قطة خربشتني في ايدي", "poisoning_bites"),
    ("ابني شرب كلور بالغلط", "poisoning_bites"),
    ("البت خدت شريط برشام كامل", "poisoning_bites"),
    ("ابني بلع عملة معدنية", "choking_foreign_body"),
    ("سخونيته وصلت ٤٠ ومش بتنزل", "fever_infant"),
    ("البيبي مبيرضعش من امبارح", "fever_infant"),
    ("مش عارف اتبول من الصبح", "acute_abdomen_uro"),
    ("حاسة ان حركة البيبي قلت", "pregnancy"),
    ("وقعت على دماغها ورجعت", "neuro_emergency"),
    # Levantine
    ("مو قادر آخد نفس من الصبح", "breathing"),
    ("ضاق نفسي كتير هلق", "breathing"),
    ("صدري عم يوجعني وعم بعرق", "chest_pain"),
    ("غابت عن الوعي من شوي", "loss_of_consciousness"),
    ("ما عم ترد علينا منيح", "loss_of_consciousness"),
    ("ما بدي عيش خلص", "suicidal"),
    ("عضو كلب الجيران", "poisoning_bites"),
    ("ما عم اقدر احكي وتمي مايل", "stroke"),
    ("شفافو انتفخو بعد الاكل", "anaphylaxis"),
    ("حرارتها ٣٩.٥ وما عم تنزل", "fever_infant"),
    ("عم ينزف من خشمو", "bleeding"),
    # Gulf
    ("صدري يعورني من الصبح", "chest_pain"),
    ("ماني قادر اتنفس زين", "breathing"),
    ("احس بكتمة في نفسي", "breathing"),
    ("طاح علينا وغمي عليه", "loss_of_consciousness"),
    ("ابوي ما يستجيب لنا", "loss_of_consciousness"),
    ("ابي اموت ما ابي اعيش", "suicidal"),
    ("لدغته عقرب بالبر", "poisoning_bites"),
    ("خشمه ينزف والدم ما وقف", "bleeding"),
    ("طاح على راسه من الدرج", "neuro_emergency"),
    ("السكر عنده ٥٢٠", "metabolic_bp"),
    # Maghrebi
    ("صدري كيضرني بزاف", "chest_pain"),
    ("قلبي كيضرب بالزربة", "chest_pain"),
    ("ما قدرتش نتنفس", "breathing"),
    ("ما نجمتش ناخذ نفسي", "breathing"),
    ("كيرد الدم من البارح", "bleeding"),
    ("الدم ما بغاش يحبس", "bleeding"),
    ("بغيت نقتل روحي", "suicidal"),
    ("لسعاتو عقرب البارح", "poisoning_bites"),
    ("طاحت على راسها فالدروج", "neuro_emergency"),
    ("السخانة 40 وما بغاتش تنزل", "fever_infant"),
    ("ما يرضعش من الصباح", "fever_infant"),
    # Spelling, elongation, marks, digits
    ("ضـــيـــق تنفــس", "breathing"),
    ("ضِيقُ تَنَفُّسٍ", "breathing"),
    ("نززززيف شديييييد", "bleeding"),
    ("وبضيق التنفس وبالاختناق", "breathing"),
    ("حرارة ٤١٫٥", "fever_infant"),
    # Moderate
    ("عندي حرارة منذ يومين", "fever_infection"),
    ("ابني بيستفرغ واسهال", "gastro"),
    ("وجع بطني من اسبوع", "gastro"),
    ("حرقان في البول", "fever_infection"),
    ("ضرسي وارم وبيوجعني", "pain_persistent"),
    ("كحة بقالها اسبوعين", "test_followup"),
    ("ضغطي عالي ١٥٠ على ٩٥", "heart_bp_sugar"),
    ("كرشي كتوجعني", "gastro"),
    ("عيني حمرا وملزقة", "skin_eye_ent"),
    # Mild
    ("عندي زكام وعطاس", "cold"),
    ("تساقط الشعر عندي كثير", "skin_cosmetic"),
    ("حب الشباب في وجهي", "skin_cosmetic"),
    ("افضل فيتامين للبشرة", "nutrition_weight"),
    ("صداع خفيف", "mild_pain"),
    ("بدي اعمل رجيم", "nutrition_weight"),
    ("تبييض الاسنان", "dental_mild"),
    ("شعري يطيح وايد", "skin_cosmetic"),
]

NEGATED = [
    ("لا أعاني من ضيق تنفس", "breathing"),
    ("لا أعاني من حرارة أو ضيق تنفس", "breathing"),
    ("لا حرارة أو ضيق تنفس", "breathing"),
    ("لا أشكو من ألم في الصدر", "chest_pain"),
    ("ليس عندي ضيق في التنفس", "breathing"),
    ("ليس لدي نزيف", "bleeding"),
    ("لم أفقد الوعي", "loss_of_consciousness"),
    ("لم يحدث لي إغماء", "loss_of_consciousness"),
    ("بدون نزيف", "bleeding"),
    ("بلا ضيق تنفس", "breathing"),
    ("من دون ألم في الصدر", "chest_pain"),
    ("لا توجد تشنجات", "convulsions"),
    ("لا يوجد نزيف ولا إغماء", "loss_of_consciousness"),
    ("لا حرارة ولا كحة ولا ضيق تنفس", "breathing"),
    ("لا حرارة، ولا ضيق تنفس", "breathing"),
    ("صداع دون اغماء", "loss_of_consciousness"),
    ("لا أفكر في الانتحار", "suicidal"),
    ("لا أفكر في إيذاء نفسي", "suicidal"),
    ("مفيش نزيف الحمد لله", "bleeding"),
    ("مفيش ضيق نفس ولا وجع صدر", "chest_pain"),
    ("من غير نزيف", "bleeding"),
    ("معنديش ضيق تنفس", "breathing"),
    ("ماعندوش تشنجات", "convulsions"),
    ("ماكانش فيه نزيف", "bleeding"),
    ("ماكان عندي نزيف", "bleeding"),
    ("مش عندي ضيق تنفس", "breathing"),
    ("محصلش اغماء", "loss_of_consciousness"),
    ("مبينزفش دلوقتي", "bleeding"),
    ("ضيق نفس مفيش", "breathing"),
    ("ما عندي ضيق نفس", "breathing"),
    ("ما في نزيف", "bleeding"),
    ("ما في ضيقة نفس ابدا", "breathing"),
    ("ما معو تشنج", "convulsions"),
    ("مافيني ضيق تنفس", "breathing"),
    ("ما فيه نزيف ولا اغماء", "loss_of_consciousness"),
    ("ماعندي ضيق نفس", "breathing"),
    ("لا فيني كتمة ولا الم بالصدر", "chest_pain"),
    ("عندي كتلة ولا ألم فيها", "pain_persistent"),
    ("يوجد جرح صغير ولا حرارة شديدة فيه", "fever_infection"),
    ("ما عنديش ضيق تنفس", "breathing"),
    ("ما كاينش نزيف", "bleeding"),
    ("ما كاش نزيف", "bleeding"),
    ("ما فماش نزيف", "bleeding"),
    ("لايوجد نزيف", "bleeding"),
    ("ما نخممش نقتل روحي", "suicidal"),
    ("عندي صداع لكن لا يوجد تشنج", "convulsions"),
    ("نزيف لا يوجد", "bleeding"),
]

PAST = [
    ("كان عندي نزيف من سنة وخف", "bleeding"),
    ("كان عندي ضيق تنفس زمان وراح", "breathing"),
    ("أصبت بجلطة قبل سنتين", "stroke"),
    ("قبل ثلاث سنوات أصبت بإغماء", "loss_of_consciousness"),
    ("جالي تشنج من ٥ سنين", "convulsions"),
    ("تعافيت من الجلطة", "stroke"),
    ("أصيب بجلطة وتعافى منها تماما", "stroke"),
    ("العام الماضي دخلت المستشفى بسبب جلطة", "stroke"),
    ("صار معي نزيف قبل سنة", "bleeding"),
    ("جاني ضيق تنفس قبل شهرين", "breathing"),
    ("كان عندي اختناق وزال", "breathing"),
    ("حاولت الانتحار العام الماضي", "suicidal"),
    ("عملت حادث من سنتين", "trauma_burns"),
    ("كنت اعاني من صرع سابقا", "convulsions"),
    ("كان عندي نزيف واختفى", "bleeding"),
    ("جاني تشنج العام اللي فات", "convulsions"),
]

OTHER = [
    ("والدي توفي بجلطة", "stroke"),
    ("ابويا مات بسكتة قلبية", "chest_pain"),
    ("ابوي الله يرحمه توفى بجلطة بالقلب", "chest_pain"),
    ("عندنا تاريخ عائلي للجلطات", "stroke"),
    ("الصرع وراثي في العيلة", "convulsions"),
    ("عمي كان معو جلطة", "stroke"),
    ("خالتي كان عندها صرع", "convulsions"),
    ("رفيقتي صار معها جلطة برجلها", "limb_vascular"),
    ("جدي مات بنزيف في المخ", "stroke"),
    ("جارتنا جالها جلطة", "stroke"),
    ("خويا مات بجلطة", "stroke"),
    ("ابويا اتوفى بجلطه فالمخ", "stroke"),
    ("صديقتي كانت عندها افكار انتحارية", "suicidal"),
]

HYPOTHETICAL = [
    ("هل ممكن يسبب جلطة؟", "stroke"),
    ("هل يسبب هذا الدواء نزيف", "bleeding"),
    ("خايف من الجلطة", "stroke"),
    ("خايفة يكون عندي جلطة", "stroke"),
    ("أخاف أن تكون ذبحة صدرية", "chest_pain"),
    ("قلقي كله أن تكون جلطة", "stroke"),
    ("هل ممكن تكون جلطة", "stroke"),
    ("كيف اتجنب الجلطات", "stroke"),
    ("قريت ان ده بيسبب تشنجات", "convulsions"),
    ("مضاعفات الجلطة", "stroke"),
    ("وسواس من الجلطة", "stroke"),
    ("زوجتي تخشى أن يكون صرعا", "convulsions"),
    ("مرعوب من التسمم", "poisoning_bites"),
    ("ظننته نزيفا", "bleeding"),
]

# Words of denial or of another time and person that take nothing away.
STILL_STATED = [
    ("مش قادر اتنفس", "breathing"),
    ("ما بيتحرك ولا يستجيب", "loss_of_consciousness"),
    ("ما عم يطلع معي ولا نقطة بول", "acute_abdomen_uro"),
    ("حمى ولا ألم؟", "pain_persistent"),
    ("عندي حرارة ولا ألم؟", "pain_persistent"),
    ("هل عندي كتلة ولا ألم فيها؟", "pain_persistent"),
    ("كتلة ولا ألم فيها", "pain_persistent"),
    ("عندي جرح في رجلي ولا ضيق نفس فيها", "breathing"),
    ("لا أعاني من السكري لكن عندي ضيق تنفس", "breathing"),
    ("مفيش سخونية بس عندي ضيق تنفس", "breathing"),
    ("ما عندي حرارة وعندي ضيق تنفس", "breathing"),
    ("مفيش امراض مزمنه وجع في صدري شديد", "chest_pain"),
    ("لا توجد أمراض مزمنة. ألم في الصدر منذ ساعة", "chest_pain"),
    ("لا أشكو إلا من ضيق التنفس", "breathing"),
    ("كل ما اطلع السلم يجيني ضيق تنفس", "breathing"),
    ("بعد ما اكل يجيني ضيق تنفس", "breathing"),
    ("ما سبب ضيق التنفس عندي", "breathing"),
    ("ابني مش قادر ياخد نفسه", "breathing"),
    ("والدتي عندها ضيق تنفس", "breathing"),
    ("زوجتي اغمي عليها اليوم", "loss_of_consciousness"),
    ("كان عندي ضيق تنفس وخف ورجع تاني", "breathing"),
    ("من سنتين وانا عندي ضيق تنفس", "breathing"),
    ("عندي ضيق تنفس من امبارح", "breathing"),
    ("قبل ساعة جاني الم في الصدر", "chest_pain"),
    ("بابا كان بيصلي ووقع من طوله", "loss_of_consciousness"),
    ("امي كان عندها نزيف", "bleeding"),
    ("انا وعايلتي عندنا تسمم", "poisoning_bites"),
    ("كنت في الجيم وفجاه صداع رهيب وخف شويه", "neuro_emergency"),
    ("كنت ماشي وفجاه صداع رهيب واختفى", "neuro_emergency"),
    ("كنت في الشغل وفجاه صداع رهيب واختفى", "neuro_emergency"),
    ("كان عندي الم في الصدر وراح المستشفى", "chest_pain"),
    ("عندي ضيق تنفس بعد ما تعافيت من كورونا", "breathing"),
    ("قبل سنتين عملت عملية وعندي ضيق تنفس", "breathing"),
    ("عندي ضيق تنفس شديد لا...", "breathing"),
    ("خايفة اقتل نفسي", "suicidal"),
    ("أخاف أن أقتل نفسي", "suicidal"),
    ("خايف من الانتحار", "suicidal"),
    ("كل ما يجيني ضيق تنفس اخاف", "breathing"),
    ("عملت عملية من سنتين ودلوقتي عندي نزيف", "bleeding"),
    ("لا حرارة. لكن ضيق التنفس شديد", "breathing"),
    ("عندي نزيف من قبل، سنتين متزوجة", "bleeding"),
    ("صداع عمري ما حسيت زيه ومعه اغماء", "loss_of_consciousness"),
]

# Swallowed what harms, or too much of it: MSA, Egyptian, Levantine, Gulf, Maghrebi.
SWALLOWED = """
ابتلع طفلي دواء الضغط الخاص بجدته
تناولت عشرين حبة من الباراسيتامول
ابتلعت ابنتي مادة منظفة
طفلي شرب من زجاجة المبيد
تناول ابني جرعة مضاعفة من الدواء
شرب الكيروسين بالخطأ
بلعت دواء الضغط
ابني بلع حباية الضغط
البيبي شرب كلور
بنتي بلعت حباية منوم بتاعة تيتة
ابني خد دوا السكر بتاع جدته اعمل ايه؟
خدت شريط كامل
مراتي واخدة شريط برشام كله
شربت كلوريكس بالغلط
اخويا خد حبة الغلة
ابني شرب ازازة الدوا كلها
الواد بلع برشام امه
اديته جرعة زيادة من الدوا
خدت الدوا بالغلط مرتين
شرب مية نار
ابني شرب كاز بالغلط
بنتي بلعت حبوب ستها
اخدت كمشة حبوب
بلع ابني دوا اعصاب
اخذت ظرف كامل
شرب سائل فليت
ولدي شارب كلوركس
بزرتي بلعت حبوب الضغط
اخذت شريط كامل بندول
ماخذة حبوب وايد
بلعت ٣٠ حبة
الجاهل شرب قاز
وليدي شرب جافيل
بنتي كلات الدوا ديال جداتها كامل
خذيت بلاكة كاملة ديال الدوا
كليت فانيد بزاف وبلعت بلاكيت
شربات الماء القاطع والجافيل
وليدي سرط كينة ديال القلب
شربت رهج
ابني بلع بطارية ريموت
بلعت بطارية
طفلتي بلعت حبوب الحديد
بلعت كميات كبيرة من حبوب الاكتئاب
اخذت كل الحبوب اللي في البيت
عملت اوفر دوز
ابني لحس معجون الفئران
خالتي شربت دوا الصراصير
اديت بنتي دوا غلط
بلع مسحوق الغسيل
الدراري كلاو الدوا
حاولت تنتحر وشربت برشام كتير
ابني بلع دوا ولا اعرف كم حبة
ممكن حد يرد ابني شرب كلور
هل اروح الطوارئ ابني بلع حبوب الضغط؟
"""
# The same words in the ways of every day.
EVERYDAY = """
الدكتور كتبلي دواء الضغط
عندي صعوبة في البلع
صعوبة في بلع الدواء
لا أستطيع ابتلاع الحبوب
مش عارف ابلع البرشام
ما بقدر ابلع حبوب الضغط
الم عند بلع الريق
بحس بوجع لما ابلع ريقي
اخدت حباية الضغط الصبح
خدت قرص بنادول
اخذت حبة بروفين وما خف الصداع
باخد دوا السكر بانتظام
والدتي اخدت دوا الضغط المعتاد بتاعها
كم جرعة الدواء في اليوم؟
ايه الجرعة المناسبة لطفل سنتين
ممكن اخد حبتين؟
هل الجرعة زائدة؟
ابني ياخد دوا الكحة
ابني خد الدوا وسخونيته نزلت
خلصت شريط المضاد الحيوي
اخدت شريط المضاد ومفيش تحسن
اخدت ادوية كتير ومفيش فايدة
خدت برشام اسهال ومطهر للمعدة
اشرب قنينة مية كاملة كل يوم
ما هي كمية الماء المناسبة
شربت صبغة قبل الاشعة
تناول حمض الفوليك
باخد 10 مجم من الدوا
نسيت اخد حبة الضغط
بلعت ريقي
بلعت لقمة كبيرة
استخدمت الكلور في تنظيف البيت
بتاكل حبوب الافطار كل يوم
رجيم وبشرب شاي اخضر
ابني بيلعب كورة
بلعوم محتقن
خذيت كينة ديال الراس
شربت الدوا في وقتو
خدت 3 قرص في اليوم
الدواء يوخذ حبة كل 8 ساعات
سابلع الدواء بعد الاكل
شربت بيبسي بالغلط وانا صايم
ابني شرب لبن بالغلط
اخدت 5 سم من الدوا
كيف اخلي طفلي يبلع الحبوب
اخدت علبة كاملة من الدواء ولم اتحسن
دخلت المستشفى وخدت كل الادوية
"""
# Whoever asks whether there is danger has not said that there is.
ASKED = """
هل في خطورة
لو في خطورة ؟
اكشف ايه لو في خطورة
يعني خطير؟
هل هذا خطر
ده خطير ولا لا
ده خطير ولا عادي
هو ده طبيعي ولا في حاجة خطر
في خطر عليا؟
واش خطير
واش هادشي خطير؟
وش خطورته
هل الورم ده خطير
بدي اعرف اذا خطير
ما بعرف اذا الموضوع خطير او لا
حابة اعرف هو خطير او بسيط
ممكن يكون خطير
ما مدى خطورة هذا المرض
ما خطورة ذلك؟
ايه خطورة الكيس ده
شو خطورة الكيس
هل يشكل خطرا على الجنين؟
هل ابني ممكن يموت
ياترى ده خطر
خطير؟
خطير ام لا
شنو خطورة هاد الدوا
متى تكون الدهون خطيرة
هل هذه جلطة
هل ممكن يكون جلطة ؟
عندي جلطة ولا لا
هل ده شد عضلي ولا جلطة
هل هذا شد عضلي أم جلطة؟
هل عندي ذبحة صدرية؟
واش هادي جلطة
حد يفهمني الكيس دا خطير او خلقي
عايز اطمن هو خطير
في خطورة من العملية؟
خطر عليا ولا ايه
"""
# A question beside it takes nothing from what is stated.
BESIDE_A_QUESTION = """
ابني مش بيتنفس اعمل ايه؟
ابني مش بيتنفس، هل ده خطير؟
هل في خطورة؟ عندي الم شديد في الصدر
عندي نزيف شديد هل اروح الطوارئ؟
نزيف شديد؟
لو سمحت مش قادر اتنفس اعمل ايه؟
واش نمشي للمستعجلات صدري كيضرني بزاف؟
هل ضيق التنفس هذا طبيعي؟
هل الم الصدر ده خطير ولا عادي
ما الحل عندي نزيف شديد؟
جاله تشنج ومش بيرد علينا خطير ولا لا
شو اعمل غابت عن الوعي؟
وش الحل ابوي ما يستجيب لنا؟
هل لازم طوارئ ابني شرب كلور؟
"""
# Danger itself, stated.
IN_DANGER = """
حالته خطيرة جدا
لو سمحت حالتها خطيرة
لو سمحتم الوضع خطير
حالته خطيره جدا اعمل ايه؟
ابني بيموت الحقوني
الحقوني ابويا بيموت اعمل ايه؟
حياته في خطر
ممكن حد يرد الحالة خطيرة
الدكتور قال الوضع خطير
"""
LOOK_ALIKES = [
    "كدمة صغيرة في قدمي",
    "عدم انتظام النوم",
    "المهم بقالي فترة كده",
    "ارجو الرد",
    "بقي الوضع كما هو",
    "عندي سكر من 20 سنة",
    "عندي سكر والسن 45",
    "باخد للضغط حبة 200 مجم",
    "في الاسبوع 40 من الحمل",
    "مستشفى الصدر",
    "",
    "؟!…",
    "hello doctor",
]


def of_category(question: str, category: str) -> list[Match]:
    return [match for match in RULES.matches(question) if match.category == category]


def stated(question: str, *categories: str) -> bool:
    return any(not match.discounted and match.category in categories for match in RULES.matches(question))


def reasons(question: str) -> str:
    return RULES.explained([question])[1][0]


def most_probable(question: str) -> str:
    return SEVERITIES[RULES.probabilities([question])[0].argmax()]


def failing(rows: Iterable[tuple[str, ...]], holds: Callable[..., bool]) -> list[str]:
    """The questions of the rows that do not hold, with what the rules say of them."""
    return [f"{row[0]} → {reasons(row[0])}" for row in rows if not holds(*row)]


def own_rules(folder: Path, *rows: str) -> Rules:
    path = folder / "own.tsv"
    path.write_text(
        "\n".join(["\t".join(COLUMNS), *(row.replace(" | ", "\t") + "\t" for row in rows)]), encoding="utf-8"
    )
    return Rules(path)


def test_a_stated_expression_counts_in_full_whatever_stands_beside_it() -> None:
    assert failing(STATED + STILL_STATED, stated) == []


def test_what_is_not_so_now_is_discounted_for_its_reason() -> None:
    tables = (("negated", NEGATED), ("past", PAST), ("other", OTHER), ("hypothetical", HYPOTHETICAL))
    for context, rows in tables:
        wrong = failing(rows, lambda *row, context=context: {match.context for match in of_category(*row)} == {context})
        assert wrong == [], context


def test_swallowed_harm_and_danger_differ_from_every_day_from_questions_and_from_look_alikes() -> None:
    swallowing = ("poisoning_bites", "choking_foreign_body")
    red_flags = {pattern.category for pattern in RULES._patterns if pattern.level == "critical"}

    def swallowed(question: str) -> list[Match]:
        return [match for match in RULES.matches(question) if match.category in swallowing]

    tables: list[tuple[list[str], Callable[[str], bool]]] = [
        (
            SWALLOWED.splitlines(),
            lambda question: stated(question, *swallowing) and most_probable(question) == "critical",
        ),
        (EVERYDAY.splitlines(), lambda question: all(match.evidence <= STRENGTH["L"] for match in swallowed(question))),
        (
            ASKED.splitlines(),
            lambda question: not stated(question, *red_flags) and most_probable(question) != "critical",
        ),
        (
            BESIDE_A_QUESTION.splitlines(),
            lambda question: stated(question, *red_flags - {"danger"}) and most_probable(question) == "critical",
        ),
        (IN_DANGER.splitlines(), lambda question: stated(question, "danger")),
        (LOOK_ALIKES, lambda question: all(match.level != "critical" for match in RULES.matches(question))),
    ]
    wrong = [failing([(question,) for question in rows if question], holds) for rows, holds in tables]
    assert wrong == [[]] * len(tables)


# Probabilities


def test_the_formula_on_numbers_and_where_nothing_matched() -> None:
    # Critical 4, neutral 1.2, mild 0.5: counted 4, 1.2/5, 0.5/6.2.
    odds = np.array([0.43 * (1 + 0.5 / 6.2), 0.39 * 1.24, 0.18 * 5**1.7])
    np.testing.assert_allclose(probabilities_of(np.array([[0.5, 1.2, 4.0]])), [odds / odds.sum()])
    np.testing.assert_allclose(RULES.probabilities(["", "xyz", "؟!…"]), [PRIOR] * 3)
    assert math.isclose(sum(PRIOR), 1) and RULES.probabilities([]).shape == (0, 3)


def test_rows_are_distributions_without_zeros_and_do_not_depend_on_the_company() -> None:
    questions = [question for question, _ in STATED + NEGATED]
    questions += ["، ".join(questions)]
    found = RULES.probabilities(questions)
    assert found.dtype == np.float64 and found.shape == (len(questions), 3)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    assert found.min() > 0 and found.max() < 1
    fresh = Rules()
    np.testing.assert_array_equal(found[:5], np.vstack([fresh.probabilities([question]) for question in questions[:5]]))
    np.testing.assert_array_equal(RULES.probabilities(questions[::-1])[::-1], found)


def test_one_more_stated_red_flag_never_lowers_critical() -> None:
    questions = [question for question, _ in STATED + NEGATED + PAST + OTHER + HYPOTHETICAL]
    less = RULES.probabilities(questions)[:, CRITICAL]
    more = RULES.probabilities([f"{question}. عندي نزيف شديد" for question in questions])[:, CRITICAL]
    assert [question for question, falls in zip(questions, more < less, strict=True) if falls] == []


def test_more_critical_evidence_raises_critical_and_mild_evidence_lowers_it() -> None:
    grid = np.array(
        [[m, n, c] for m in (0, 0.5, 4, 20) for n in (0, 1.2, 8) for c in (0, 0.1, 1.2, 4, 40)], dtype=float
    )
    base = probabilities_of(grid)[:, CRITICAL]
    assert (probabilities_of(grid + np.array([0, 0, 0.7]))[:, CRITICAL] > base).all()
    assert (probabilities_of(grid + np.array([0.7, 0, 0]))[:, CRITICAL] <= base).all()
    ladder = ["عندي زكام وصداع خفيف وحرارة وضيق تنفس", "عندي زكام وحرارة 38.5 والتهاب رئوي", "تساقط الشعر عندي كثير"]
    assert RULES.probabilities(ladder).argmax(axis=1).tolist() == [2, 1, 0]


def test_a_denied_red_flag_is_no_evidence_and_others_are_little() -> None:
    written = ["عندي جلطة", "هل ممكن تكون جلطة", "والدي توفي بجلطة", "ليس عندي جلطة"]
    fact, possible, other, denied = RULES.probabilities(written)[:, CRITICAL]
    assert fact > possible > other > denied == pytest.approx(PRIOR[CRITICAL])
    assert COUNTS["negated"] == 0 and STRENGTH["H"] > STRENGTH["M"] > STRENGTH["L"]


def test_one_complaint_said_twice_counts_once_and_where_one_is_denied_the_stated_one() -> None:
    once, twice, three = RULES.probabilities(
        ["عندي ضيق تنفس", "عندي ضيق تنفس، ضيق في التنفس وضيق نفس", "عندي ضيق تنفس واختناق وكرشة نفس"]
    )
    np.testing.assert_allclose([once, once], [twice, three])
    found = of_category("لا أعاني من ضيق تنفس في الليل. اليوم عندي ضيق تنفس", "breathing")
    assert "stated" in {match.context for match in found}


def test_a_number_is_judged_by_the_words_beside_it() -> None:
    both_ways = ["السكر 45", "سكر من 45 سنة", "السكر 45", "عمري 45 سكر", "السكر 45"]
    assert [bool(of_category(question, "metabolic_bp")) for question in both_ways] == [True, False, True, False, True]


# What it says about itself


def test_the_reasons_name_words_levels_and_discounts_the_worst_first() -> None:
    assert reasons("عندي ضيق تنفس وحرارة. مفيش نزيف") == "critical: ضيق تنفس; neutral: وحراره; negated: نزيف"
    assert reasons("xyz") == ""
    assert "حرارته 39.7" in reasons("حرارته ٣٩٫٧")
    levels = [SEVERITIES.index(match.level) for match in RULES.matches("زكام، حرارة، ضيق تنفس، نزيف")]
    assert levels == sorted(levels, reverse=True) and len(set(levels)) == 3
    # A milder word inside a worse match is left out.
    assert {match.level for match in RULES.matches("حرارته 40")} == {"critical"}
    # "بعد ما تعافيت" began after it; a last word أن is not before a first one.
    matches = RULES.matches("تعافيت من الجلطة وعندي زكام ان")
    assert [match.context for match in matches if match.words == "تعافيت"] == ["past"]


def test_a_match_points_at_its_words_in_ascending_order_wherever_its_rarest_word_stands(tmp_path: Path) -> None:
    matches = RULES.matches("من الصبح عندي الم قوي في الصدر")
    match = next(one for one in matches if one.category == "chest_pain" and len(one.positions) == 2)
    assert match.words == "الم الصدر" and match.positions == (3, 6)
    assert (match.level, match.evidence, match.context) == ("critical", STRENGTH["H"], "stated")
    rows = [f"{term} | neutral | gastro |  | M" for term in ("وجع شديد بطني", "وجع قديم", "شديد جدا")]
    found = own_rules(tmp_path, *rows).matches("عندي وجع شديد بطني")
    assert [match.positions for match in found] == [(1, 2, 3)]


def test_another_lexicon_may_be_brought_and_the_version_follows_the_content(tmp_path: Path) -> None:
    mine = own_rules(tmp_path, "طنين | critical | ear |  | H")
    assert mine.explained(["عندي طنين ونزيف"])[1] == ["critical: طنين"]
    mine.save(tmp_path)
    assert Rules(tmp_path / rules_module.LEXICON).version == mine.version != RULES.version
    same = tmp_path / "same.tsv"
    same.write_bytes(PACKAGE_LEXICON.read_bytes())
    assert Rules(same).version == RULES.version and RULES.kind == "rules"
