"""A lexicon is read whole or refused whole, each line with a mistake named; the package's own is sound."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.severity.lexicon import (
    COLUMNS,
    PACKAGE_LEXICON,
    STRENGTHS,
    Matcher,
    Pattern,
    Word,
    load_lexicon,
    read,
)
from sevpeft.severity.probabilities import SEVERITIES

PATTERNS, DIGEST = load_lexicon(PACKAGE_LEXICON)
MATCHER = Matcher(PATTERNS)
HEADER = "\t".join(COLUMNS)


def lexicon(*rows: str, header: str = HEADER) -> str:
    """A lexicon's text with these rows in lines 2, 3, …"""
    return "\n".join([header, *rows]) + "\n"


def row(term: str, level: str = "critical", category: str = "test", dialect: str = "", strength: str = "H") -> str:
    return "\t".join([term, level, category, dialect, strength, ""])


def parsed(text: str) -> tuple[Pattern, ...]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mine.tsv")
        path.write_text(text, encoding="utf-8")
        return load_lexicon(path)[0]


def mistakes(text: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        parsed(text)
    first, *rest = str(caught.value).splitlines()
    assert "mine.tsv" in first
    return [line.strip() for line in rest]


def matched(term: str, question: str) -> bool:
    return bool(Matcher(parsed(lexicon(row(term)))).occurrences(read(question)))


def found(pattern: Pattern, text: str) -> bool:
    return pattern in {PATTERNS[number] for number, _ in MATCHER.occurrences(read(text))}


# The package's own file


def test_every_level_has_patterns_and_a_category_has_one_level() -> None:
    assert all(count >= 80 for count in Counter(pattern.level for pattern in PATTERNS).values())
    assert {pattern.level for pattern in PATTERNS} == set(SEVERITIES)
    assert {pattern.strength for pattern in PATTERNS} == set(STRENGTHS)
    levels: dict[str, set[str]] = {}
    for pattern in PATTERNS:
        levels.setdefault(pattern.category, set()).add(pattern.level)
    assert {category: found for category, found in levels.items() if len(found) > 1} == {}


def ways(pattern: Pattern) -> list[list[str]]:
    """Of every slot all ways to write it."""
    slots = [sorted(slot, key=lambda word: (word.kind, word.form)) for slot in pattern.slots]
    return [[f"{word.low:g}" if word.kind == "number" else word.form for word in slot] for slot in slots]


def test_every_way_to_write_a_slot_is_matched() -> None:
    texts = [
        (pattern, " ".join(word if at == slot else others[0] for at, others in enumerate(ways(pattern))))
        for pattern in PATTERNS
        for slot, words in enumerate(ways(pattern))
        for word in words
    ]
    assert [(pattern.line, text) for pattern, text in texts if not found(pattern, text)] == []


def test_a_gap_holds_as_many_words_as_it_says_and_no_more() -> None:
    def spread(pattern: Pattern, more: int) -> str:
        first = [words[0] for words in ways(pattern)]
        gaps = [["قلم"] * (gap + more if gap else 0) for gap in (*pattern.gaps, 0)]
        return " ".join(itertools.chain(*([word, *gap] for word, gap in zip(first, gaps, strict=True))))

    gapped = [pattern for pattern in PATTERNS if any(pattern.gaps)]
    assert [pattern.line for pattern in gapped if not found(pattern, spread(pattern, 0))] == []
    assert [pattern.line for pattern in gapped if found(pattern, spread(pattern, 1))] == []


def test_terms_are_written_as_they_are_matched() -> None:
    def sound(word: Word) -> bool:
        # A single letter would be met as a proclitic's remainder.
        return word.kind == "number" or (
            word.form == fold_for_matching(word.form) and (word.kind == "exact" or len(word.form) > 1)
        )

    words = {word for pattern in PATTERNS for slot in pattern.slots for word in slot}
    assert [word for word in words if not sound(word)] == []


def test_it_says_that_it_is_not_clinically_validated() -> None:
    readme = (PACKAGE_LEXICON.parent / "README.md").read_text(encoding="utf-8")
    assert "not clinically validated" in readme.lower()
    assert "Not clinically validated" in PACKAGE_LEXICON.read_text(encoding="utf-8")
    assert [name for name in (*COLUMNS, *{pattern.category for pattern in PATTERNS}) if f"`{name}`" not in readme] == []


def test_the_documented_examples_are_true() -> None:
    readme = (PACKAGE_LEXICON.parent / "README.md").read_text(encoding="utf-8").replace("\\|", "¦")
    examples = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]*) \|$", readme, flags=re.MULTILINE)
    wrong = [
        (term, text)
        for term, *columns in examples
        for meets, texts in zip((True, False), columns, strict=True)
        for text in texts.split("·")
        if text.strip() and matched(term.replace("¦", "|"), text) != meets
    ]
    assert wrong == [] and len(examples) >= 8


# What a term means

MET = """
نزيف · والنزيف
نزيف · بنزيفه
نزيف · عالنزيف
نزيف · فالنزيف
نزيف · نزيفاً
حراره · حرارته
حرارة · وحرارتها
نوبه · النوبات
دم · والدم
دم · بدم
+وجع · بيوجعني
+وجع · كتوجعني
+وجع · هيوجعه
+وجع · ما بتوجعش
+وجع · وجعتني
+تنفس · أتنفس
ضيق ~ نفس · ضيق شديد جدا في النفس
ضيق نفس · ضيق، نفس
ضغط ~ 180..260 · الضغط كان 200
ضغط ~ 180..260 · ضغط ١٨٠
حراره 39.5..42 · حرارة ٣٩٫٥
عمره 1..28 يوم · عمره 9 يوم
=ما ~1 +رضع · مبيرضعش
اغماء|اغمي ~ الان · أُغمي عليه الآن
"""
NOT_MET = """
=دم · الدم
دم · قدم
دم · كدمة
دم · دمه
نزيف · نزيفق
وجع · يوجعني
ضيق نفس · ضيق في نفس
ضيق ~ نفس · ضيق كبير جدا جدا في نفس
ضيق ~ نفس · نفس ضيق
ضيق نفس · ضيق. نفس
سكر ~ 350..900 · سكر 349
سكر ~ 20..50 · سكر من 20 سنة
سكر ~ 20..50 · سكر العمر 45
ضغط ~ 180..260 · للضغط حبة 200 مجم
"""


def test_a_term_meets_what_it_means_and_nothing_else() -> None:
    for rows, meets in ((MET, True), (NOT_MET, False)):
        pairs = [line.split(" · ") for line in rows.strip().splitlines()]
        assert [(term, question) for term, question in pairs if matched(term, question) != meets] == [], meets


def test_groups_stand_for_their_words() -> None:
    text = "@pain = الم|وجع\n" + lexicon(row("@pain|حرقان ~ صدر"))
    matcher = Matcher(parsed(text))
    assert all(matcher.occurrences(read(f"{word} في الصدر")) for word in ("الم", "وجع", "حرقان"))


def test_comments_empty_lines_windows_ends_and_a_byte_order_mark_are_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_bytes(("\ufeff# said\r\n\r\n" + lexicon(row("نزيف")).replace("\n", "\r\n")).encode())
    (pattern,), _ = load_lexicon(path)
    assert (pattern.term, pattern.line) == ("نزيف", 4)


# What is refused

MISTAKES = [
    (row("نزيف", level="severe"), "severe"),
    (row("نزيف", strength="X"), "H, M, L"),
    (row("نزيف", category=""), "category"),
    ("نزيف\tcritical\ttest", "3 columns"),
    (row(""), "gap"),
    (row("~ نزيف"), "gap"),
    (row("نزيف ~ ~ دم"), "gap"),
    (row("نزيف ~"), "gap"),
    (row("نزيف ~12 دم"), "gap"),
    (row("نزيف ~0 دم"), "gap"),
    (row("نزيف||دم"), "''"),
    (row("!"), "'!'"),
    (row("نزيف-دم"), "'نزيف-دم'"),
    (row("==دم"), "'==دم'"),
    (row("معنديش ~ دم"), "'ما عندي'"),
    (row("39 ~ دم"), "39..39"),
    (row("39..41"), "numbers"),
    (row("حراره 41..39"), "41..39"),
    (row("@pain ~ صدر"), "@pain"),
    (row("خَفقان", level="neutral"), "line 2"),  # the same once spellings are folded
]
FRAMES = [
    ("", 1, "no patterns"),
    ("# nothing\n", 1, "no patterns"),
    (lexicon(row("نزيف"), header="term\tlevel"), 1, "term, level, category"),
    ("@a = دم\n@a = قي\n" + lexicon(row("@a")), 2, "@name"),
    ("@a دم\n" + lexicon(row("نزيف")), 1, "@name"),
    ("@a = 39\n" + lexicon(row("@a"), row("@a دم")), 1, "39..39"),
]


def test_a_mistake_is_named_with_its_line() -> None:
    cases = [(lexicon(row("خفقان"), wrong), 3, word) for wrong, word in MISTAKES] + FRAMES
    named = [(mistakes(text), line, word) for text, line, word in cases]
    wrong = [
        (listed, word)
        for listed, line, word in named
        if len(listed) != 1 or not listed[0].startswith(f"line {line}: ") or word not in listed[0]
    ]
    assert wrong == []


def test_every_line_with_a_mistake_is_named_at_once() -> None:
    listed = mistakes(lexicon(row("نزيف", level="a"), row("خفقان"), row("~ دم"), row("نَزيفٌ")))
    assert [line.partition(":")[0] for line in listed] == ["line 2", "line 4"]


def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "latin.tsv").write_bytes("نزيف".encode("cp1256"))
    for path in (tmp_path / "none.tsv", tmp_path, tmp_path / "latin.tsv"):
        with pytest.raises(DataError, match=path.name):
            load_lexicon(path)
