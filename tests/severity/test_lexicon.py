"""A lexicon is read whole or refused whole, with every mistake and its line; the package's own is sound."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.severity.lexicon import COLUMNS, DIALECTS, PACKAGE_LEXICON, STRENGTHS, Word, load_lexicon, parse_lexicon
from sevpeft.severity.matching import Matcher
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.rules import Rules
from sevpeft.severity.words import read

PATTERNS, DIGEST = load_lexicon()
MATCHER = Matcher(PATTERNS)
HEADER = "\t".join(COLUMNS)


def lexicon(*rows: str, header: str = HEADER) -> str:
    """A lexicon's text with these rows in lines 2, 3, …"""
    return "\n".join([header, *rows]) + "\n"


def row(term: str, level: str = "critical", category: str = "test", dialect: str = "", strength: str = "H") -> str:
    return "\t".join([term, level, category, dialect, strength, ""])


def mistakes(text: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        parse_lexicon(text, "mine.tsv")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("The lexicon mine.tsv has ")
    return [line.strip() for line in rest]


def matched(term: str, question: str) -> bool:
    return bool(Matcher(parse_lexicon(lexicon(row(term)))).occurrences(read(question)))


# The package's own file


def test_there_are_patterns_enough_of_every_level_and_strength() -> None:
    assert len(PATTERNS) >= 450
    assert all(count >= 80 for count in Counter(pattern.level for pattern in PATTERNS).values())
    assert {pattern.level for pattern in PATTERNS} == set(SEVERITIES)
    assert {pattern.strength for pattern in PATTERNS} == set(STRENGTHS)


def test_a_category_has_one_level() -> None:
    levels: dict[str, set[str]] = {}
    for pattern in PATTERNS:
        levels.setdefault(pattern.category, set()).add(pattern.level)
    assert {category: found for category, found in levels.items() if len(found) > 1} == {}


def written(word: Word) -> str:
    return f"{word.low:g}" if word.kind == "number" else word.form


@pytest.mark.parametrize("number", range(len(PATTERNS)), ids=lambda number: f"line{PATTERNS[number].line}")
def test_every_way_to_write_a_slot_is_matched(number: int) -> None:
    pattern = PATTERNS[number]
    firsts = [sorted(slot, key=lambda word: (word.kind, word.form)) for slot in pattern.slots]
    for slot, words in enumerate(firsts):
        for word in words:
            spelling = [written(word if other == slot else firsts[other][0]) for other in range(len(firsts))]
            text = " ".join(spelling)
            found = {occurrence.pattern for occurrence in MATCHER.occurrences(read(text))}
            assert number in found, text


@pytest.mark.parametrize("number", [n for n, pattern in enumerate(PATTERNS) if any(pattern.gaps)])
def test_a_gap_holds_as_many_words_as_it_says_and_no_more(number: int) -> None:
    pattern = PATTERNS[number]
    words = [written(min(slot, key=lambda word: (word.kind, word.form))) for slot in pattern.slots]

    def spread(more: int) -> str:
        filled = [
            [word, *["قلم"] * (gap + more if gap else 0)] for word, gap in zip(words, (*pattern.gaps, 0), strict=True)
        ]
        return " ".join(itertools.chain(*filled))

    def is_found(text: str) -> bool:
        return number in {occurrence.pattern for occurrence in MATCHER.occurrences(read(text))}

    assert is_found(spread(0))
    assert not is_found(spread(1))


def test_terms_are_written_as_they_are_matched() -> None:
    for pattern in PATTERNS:
        for word in itertools.chain(*pattern.slots):
            assert word.kind == "number" or word.form == fold_for_matching(word.form)
            # A single letter would be met as a proclitic's remainder.
            assert word.kind in ("number", "exact") or len(word.form) > 1


def test_it_loads_in_no_time() -> None:
    start = time.perf_counter()
    Rules.load()
    assert time.perf_counter() - start < 2


def test_it_says_that_it_is_not_clinically_validated() -> None:
    readme = (PACKAGE_LEXICON.parent / "README.md").read_text(encoding="utf-8")
    assert "not clinically validated" in readme.lower()
    assert "Not clinically validated" in PACKAGE_LEXICON.read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in (*COLUMNS, *DIALECTS, *{pattern.category for pattern in PATTERNS}))


def test_the_documented_examples_are_true() -> None:
    readme = (PACKAGE_LEXICON.parent / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]*) \|$", readme.replace("\\|", "¦"), flags=re.MULTILINE)
    assert len(examples) >= 8
    for term, meets, misses in examples:
        for text in filter(None, (text.strip() for text in meets.split("·"))):
            assert matched(term.replace("¦", "|"), text), (term, text)
        for text in filter(None, (text.strip() for text in misses.split("·"))):
            assert not matched(term.replace("¦", "|"), text), (term, text)


# What a term means


@pytest.mark.parametrize(
    ("term", "question"),
    [
        ("نزيف", "والنزيف"),
        ("نزيف", "بنزيفه"),
        ("نزيف", "عالنزيف"),
        ("نزيف", "فالنزيف"),
        ("نزيف", "نزيفاً"),
        ("حراره", "حرارته"),
        ("حرارة", "وحرارتها"),
        ("نوبه", "النوبات"),
        ("دم", "والدم"),
        ("دم", "بدم"),
        ("+وجع", "بيوجعني"),
        ("+وجع", "كتوجعني"),
        ("+وجع", "هيوجعه"),
        ("+وجع", "ما بتوجعش"),
        ("+وجع", "وجعتني"),
        ("+تنفس", "أتنفس"),
        ("ضيق ~ نفس", "ضيق شديد جدا في النفس"),
        ("ضيق نفس", "ضيق، نفس"),
        ("ضغط ~ 180..260", "الضغط كان 200"),
        ("ضغط ~ 180..260", "ضغط ١٨٠"),
        ("حراره 39.5..42", "حرارة ٣٩٫٥"),
        ("عمره 1..28 يوم", "عمره 9 يوم"),
        ("=ما ~1 +رضع", "مبيرضعش"),
        ("اغماء|اغمي ~ الان", "أُغمي عليه الآن"),
    ],
)
def test_these_are_met(term: str, question: str) -> None:
    assert matched(term, question)


@pytest.mark.parametrize(
    ("term", "question"),
    [
        ("=دم", "الدم"),
        ("دم", "قدم"),
        ("دم", "كدمة"),
        ("دم", "دمه"),
        ("نزيف", "نزيفق"),
        ("وجع", "يوجعني"),
        ("ضيق نفس", "ضيق في نفس"),
        ("ضيق ~ نفس", "ضيق كبير جدا جدا في نفس"),
        ("ضيق ~ نفس", "نفس ضيق"),
        ("ضيق نفس", "ضيق. نفس"),
        ("سكر ~ 350..900", "سكر 349"),
        ("سكر ~ 20..50", "سكر من 20 سنة"),
        ("سكر ~ 20..50", "سكر العمر 45"),
        ("ضغط ~ 180..260", "للضغط حبة 200 مجم"),
    ],
)
def test_these_are_not(term: str, question: str) -> None:
    assert not matched(term, question)


def test_groups_stand_for_their_words() -> None:
    text = "@pain = الم|وجع\n" + lexicon(row("@pain|حرقان ~ صدر"))
    matcher = Matcher(parse_lexicon(text))
    assert all(matcher.occurrences(read(f"{word} في الصدر")) for word in ("الم", "وجع", "حرقان"))


def test_comments_empty_lines_windows_ends_and_a_byte_order_mark_are_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_bytes(("\ufeff# said\r\n\r\n" + lexicon(row("نزيف")).replace("\n", "\r\n")).encode())
    (pattern,), _ = load_lexicon(path)
    assert (pattern.term, pattern.line) == ("نزيف", 4)


# What is refused


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (row("نزيف", level="severe"), "the level 'severe' is not one of non_critical, neutral, critical"),
        (row("نزيف", strength="X"), "the strength 'X' is not one of H, M, L"),
        (row("نزيف", category="Chest pain"), "the category 'Chest pain' is not a name"),
        (row("نزيف", dialect="martian"), "the dialect 'martian' is not one of msa, egyptian"),
        ("نزيف\tcritical\ttest", "there are 3 columns, not 6"),
        (row(""), "the term is empty"),
        (row("~ نزيف"), "a gap (~) stands between two words"),
        (row("نزيف ~ ~ دم"), "a gap (~) stands between two words"),
        (row("نزيف ~"), "a gap (~) at the end"),
        (row("نزيف ~12 دم"), "a gap is of 1 to 9 words, not of 12"),
        (row("نزيف||دم"), "'' is not one word"),
        (row("!"), "'!' is not one word"),
        (row("نزيف-دم"), "'نزيف-دم' is not one word"),
        (row("==دم"), "'==دم' has a sign inside"),
        (row("معنديش ~ دم"), "'معنديش' is read as two words; write 'ما عندي'"),
        (row("39 ~ دم"), "the number '39' is written as a range, 39..39"),
        (row("39..41"), "a term of numbers alone"),
        (row("حراره 41..39"), "the range 41..39 ends before it begins"),
        (row("@pain ~ صدر"), "the group @pain is not defined above"),
    ],
)
def test_a_mistake_is_named_with_its_line(wrong: str, said: str) -> None:
    (found,) = mistakes(lexicon(row("خفقان"), wrong))
    assert found.startswith("line 3: ") and said in found


def test_every_mistake_is_told_at_once() -> None:
    found = mistakes(lexicon(row("نزيف", level="a", strength="b"), row("خفقان"), row("~ دم", category="C C")))
    assert [line.partition(":")[0] for line in found] == ["line 2", "line 2", "line 4", "line 4"]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "there are no patterns"),
        ("# nothing\n", 1, "there are no patterns"),
        (lexicon(row("نزيف"), header="term\tlevel"), 1, "the columns must be term, level, category"),
        ("@a = دم\n" + lexicon(row("نزيف")), 1, "the group @a is not used"),
        ("@a = دم\n@a = قي\n" + lexicon(row("@a")), 2, "the group @a is defined twice"),
        ("@a دم\n" + lexicon(row("نزيف")), 1, "a group is written @name = word|word"),
    ],
)
def test_a_mistake_in_the_frame_is_named_too(text: str, line: int, said: str) -> None:
    (found,) = mistakes(text)
    assert found.startswith(f"line {line}: ") and said in found


@pytest.mark.parametrize(
    ("one", "other"),
    [("نزيف", "نَزيف"), ("الم|وجع ~ صدر", "وجع|ألم ~3 صدر"), ("اغماء", "إغماء"), ("نزيف", "نزززيف")],
)
def test_the_same_term_in_another_spelling_is_refused(one: str, other: str) -> None:
    (found,) = mistakes(lexicon(row(one), row("خفقان"), row(other, level="neutral")))
    assert found == "line 4: the term is the same as in line 2 once spellings are folded"


def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: No such file"):
        load_lexicon(tmp_path / "none.tsv")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        load_lexicon(tmp_path)
    (tmp_path / "latin.tsv").write_bytes("نزيف".encode("cp1256"))
    with pytest.raises(DataError, match="is not UTF-8"):
        load_lexicon(tmp_path / "latin.tsv")
