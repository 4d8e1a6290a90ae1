"""Every question is on one side, strata are proportional, and the split is reproducible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pytest

from sevpeft.data.split import Splits, hold_out, split_rows
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.recipe import DataSection


def rows(questions: Sequence[str], split: Sequence[str | None] | None = None) -> datasets.Dataset:
    columns: dict[str, Sequence[object]] = {"question": questions, "row": list(range(2, len(questions) + 2))}
    return datasets.Dataset.from_dict(columns | ({"split": split} if split is not None else {}))


def many(count: int) -> datasets.Dataset:
    return rows([f"سؤال رقم {number}" for number in range(count)])


def section(validation: float = 0.1, test: float = 0.1, seed: int = 0, column: str | None = None) -> DataSection:
    return DataSection(validation_size=validation, test_size=test, seed=seed, split_column=column)


def split(
    data: datasets.Dataset,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    column: str | None = None,
    strata: Sequence[int] | None = None,
) -> Splits:
    return split_rows(data, section(validation, test, seed, column), strata=strata)


def sizes(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.validation), len(splits.test)


def questions(part: datasets.Dataset) -> set[str]:
    return {fold_for_matching(question) for question in part["question"]}


def test_sizes_are_fractions_or_numbers_of_rows() -> None:
    for requested, expected in (((0.1, 0.2), (140, 20, 40)), ((7, 13), (180, 7, 13)), ((0.001, 0), (199, 1, 0))):
        splits = split(many(200), *requested)
        assert sizes(splits) == expected
        assert (splits.by, splits.leaks) == ("random", 0)


def test_the_parts_are_all_the_rows_each_once_and_in_order() -> None:
    splits = split(many(200))
    parts = [part["row"][:] for part in (splits.train, splits.validation, splits.test)]
    assert sorted(row for part in parts for row in part) == list(range(2, 202))
    assert all(part == sorted(part) for part in parts)


def test_a_question_asked_again_in_another_spelling_stays_on_its_side() -> None:
    forms = ["عِنْدي أَلَم {}", "عندي الم {}!", "عندي ألم  {}؟"]
    splits = split(rows([form.format(number) for number in range(100) for form in forms]))
    train, validation, test = (questions(part) for part in (splits.train, splits.validation, splits.test))
    assert not (train & validation or train & test or validation & test)
    assert sizes(splits) == (240, 30, 30)


def test_a_group_that_is_too_large_for_a_side_is_trained_on() -> None:
    splits = split(rows(["شائع"] * 50 + [f"نادر {number}" for number in range(50)]))
    assert sizes(splits) == (80, 10, 10)
    assert fold_for_matching("شائع") in questions(splits.train)


def test_every_stratum_is_on_every_side_in_proportion() -> None:
    strata = [0] * 600 + [1] * 300 + [7] * 100
    splits = split(many(1000), 0.1, 0.2, strata=strata)
    of = np.array(strata)
    for part, share in ((splits.validation, 0.1), (splits.test, 0.2)):
        counts = np.bincount(of[np.array(part["row"][:]) - 2])
        assert [counts[0], counts[1], counts[7]] == [600 * share, 300 * share, 100 * share]


def test_what_rounding_leaves_goes_to_the_stratum_that_lost_most() -> None:
    strata = np.repeat([0, 1, 2], [70, 26, 4])
    part = split(many(100), 10, 0, strata=strata.tolist()).validation
    assert np.bincount(strata[np.array(part["row"][:]) - 2], minlength=3).tolist() == [7, 3, 0]


def test_a_group_has_the_stratum_of_its_first_row() -> None:
    data = rows([f"q {number // 2}" for number in range(40)])
    first_counts = split(data, 4, 4, strata=[0, 1] * 20)
    assert first_counts.validation["row"][:] == split(data, 4, 4, strata=[0, 0] * 20).validation["row"][:]


def test_the_same_seed_gives_the_same_split_on_every_machine() -> None:
    assert split(many(20), 3, 3).validation["row"][:] == [5, 14, 20]
    assert split(many(20), 3, 3).test["row"][:] == [3, 10, 17]


def test_another_seed_gives_another_split() -> None:
    assert split(many(200)).test["row"][:] != split(many(200), seed=1).test["row"][:]


def test_the_order_of_the_rows_does_not_change_who_is_tested() -> None:
    data = many(200)
    assert questions(split(data).test) == questions(split(data.select(range(199, -1, -1))).test)


def test_a_selected_and_shuffled_data_set_is_split_by_what_it_shows() -> None:
    data = many(200).shuffle(seed=3).select(range(50))
    splits = split(data)
    assert questions(splits.train) | questions(splits.validation) | questions(splits.test) == questions(data)


def test_a_column_split_is_used_as_it_is() -> None:
    column = ["train", "Training", "val", "DEV", "valid", "validation ", "test", "train"]
    splits = split(rows(list("abcdefgh"), column))
    assert splits.by == "column split" and splits.leaks == 0
    assert [part["question"][:] for part in (splits.train, splits.validation, splits.test)] == [
        *(["a", "b", "h"], ["c", "d", "e", "f"], ["g"])
    ]


def test_a_missing_validation_is_carved_from_train_alone() -> None:
    column = ["train"] * 80 + ["test"] * 20
    splits = split(rows([f"q {number}" for number in range(100)], column))
    assert sizes(splits) == (72, 8, 20)
    assert splits.test["row"][:] == list(range(82, 102))


def test_a_missing_test_is_carved_too_unless_none_is_wanted() -> None:
    data = rows([f"q {number}" for number in range(100)], ["train"] * 80 + ["dev"] * 20)
    assert sizes(split(data)) == (72, 20, 8)
    assert sizes(split(data, test=0.0)) == (80, 20, 0)


def test_questions_on_two_given_sides_are_counted_and_not_carved_into_a_third() -> None:
    column = ["train"] * 10 + ["test"] * 9
    data = rows([f"q {number}" for number in range(10)] + [f"Q {number}!" for number in range(9)], column)
    splits = split(data, 1)
    assert splits.leaks == 9
    assert splits.validation["question"][:] == ["q 9"]


def test_a_column_split_of_something_else_is_not_used_unless_it_was_named() -> None:
    columns: list[list[str | None]] = [["1", "2"] * 50, [""] * 100, [None] * 100, ["تدريب", "اختبار"] * 50]
    for column in columns:
        data = rows([f"q {number}" for number in range(100)], column)
        assert split(data).by == "random"
        with pytest.raises(DataError, match=r"in 100 of 100 rows .*first at 2.*data\.split_column"):
            split(data, column="part")


def test_a_column_split_that_is_filled_in_part_is_refused_with_the_row() -> None:
    with pytest.raises(DataError, match=r"in 2 of 5 rows .*first at 4"):
        split(rows(list("abcde"), ["train", "test", "", "tset", "train"]))


def test_a_column_split_without_train_is_refused() -> None:
    with pytest.raises(DataError, match="none of 0 rows"):
        split(rows(list("ab"), ["test", "dev"]))


def test_sizes_that_cannot_be_met_are_refused() -> None:
    for validation, test, data, part in (
        (0.5, 0.5, many(10), "data.test_size and data.validation_size would leave none of 10 rows"),
        (10, 0, many(10), "leave none of 10 rows"),
        (5, 1, rows(["a"] * 5 + ["b"] * 5), "data.test_size is too small"),
    ):
        with pytest.raises(DataError) as refused:
            split(data, validation, test)
        assert part in str(refused.value)


def held(cells: list[str], validation: float = 0.1, test: float = 0.1, seed: int = 0) -> tuple[str, dict[str, Any]]:
    """A letter for the side of each row, and how it came."""
    found, about = hold_out(cells, "when", section(validation, test, seed))
    assert about["validation_from_train"] == (1 not in found)
    return "".join("-vt"[side] for side in found.tolist()), about


def sides(*words: Any, **more: Any) -> str:
    return held(*words, **more)[0]


def test_the_newest_values_are_the_test_and_those_before_them_the_validation() -> None:
    found, about = held([str(number) for number in (9, 10, 1, 2, 3, 4, 5, 6, 7, 8)], 0.2, 0.1)
    assert found == "vt-------v" and about["ordered"]
    assert about["values"] == {"train": "1 to 7 (7 values)", "validation": "8 to 9 (2 values)", "test": "'10'"}
    for dates in (
        ["2019-05-01", "2021-01-31", "2020-12-01"],
        ["2019-05", "2021-01", "2020-12"],
        ["2019-05-01T10:00:00Z", "2021-01-31T00:00:00+03:00", "2020-12-01 10:00"],
        ["٢٠١٩", "٢٠٢١", "٢٠٢٠"],
        ["٢٠١٩-٠٥", "2021-01", "٢٠٢٠-١٢"],
        ["-3.5", "0", "-1"],
    ):
        assert sides(dates, 1, 1) == "-tv", dates
    for unordered in (["1", "2", "3", "unknown"], ["1e999999999", "2", "3"], ["2019-05", "2020-12", "2021"]):
        assert not held(unordered)[1]["ordered"]


def test_whole_values_come_as_near_to_the_size_as_they_can() -> None:
    years = ["2018"] * 50 + ["2019"] * 30 + ["2020"] * 15 + ["2021"] * 5
    assert Counter(sides(years, 0.3, 0.1)) == {"t": 5, "v": 45, "-": 50}
    assert Counter(sides(years, 0.1, 0.18)) == {"t": 20, "v": 30, "-": 50}
    smallest = held(["a"] * 50 + ["b"] * 30 + ["c"] * 20, 0.01, 0.01)[1]
    assert smallest["values"] == {"train": "'a'", "validation": "'b'", "test": "'c'"}


def test_words_are_drawn_by_the_seed_and_no_value_is_on_two_sides() -> None:
    sources = [f"clinic {number % 20}" for number in range(400)]
    found, about = held(sources, 0.1, 0.2)
    assert not about["ordered"] and Counter(found) == {"-": 280, "v": 40, "t": 80}
    assert len(set(zip(sources, found, strict=True))) == 20
    assert sides(sources, 0.1, 0.2) == found != sides(sources, 0.1, 0.2, seed=1)
    # So many values may be names of people.
    assert held([f"patient {number}" for number in range(40)])[1]["values"]["test"] == "4 values"


def test_of_two_values_one_is_held_out_and_train_always_keeps_one() -> None:
    assert Counter(sides(["a"] * 6 + ["b"] * 4)) == {"-": 6, "t": 4}
    assert Counter(sides(["a"] * 6 + ["b"] * 4, 0.1, 0)) == {"-": 6, "v": 4}
    assert Counter(sides(["1"] * 6 + ["2"] * 4)) == {"-": 6, "t": 4}
    for cells in (["1"] * 90 + ["2"] * 5 + ["3"] * 5, list("abcdefghij"), ["1"] * 5 + ["2"] * 5):
        assert "-" in sides(cells, 0.4, 0.4)


def test_rows_without_a_value_are_trained_on_and_counted() -> None:
    found, about = held(["2020", "", "2021", " ", "2022"], 1, 1)
    assert found == "--v-t" and about["rows_without_value"] == 2 and about["ordered"]


def test_a_column_that_cannot_be_held_out_is_refused() -> None:
    for cells, size, part in (
        (["a"] * 5, 0.1, "fewer than two values"),
        ([""] * 5, 0.1, "fewer than two values"),
        (["a", "", "a"], 0.1, "fewer than two values"),
        (list("abcd"), 0.5, "leave none of 4 rows"),
    ):
        with pytest.raises(DataError, match=part):
            held(cells, size, size)


def test_each_fold_is_the_test_once_with_every_stratum_and_no_question_in_two() -> None:
    texts = [f"سؤال رقم {number % 90}" for number in range(120)]  # thirty occur twice
    strata = [number % 90 % 3 for number in range(120)]
    data = rows(texts, ["test"] * 60 + [None] * 60)  # a split column, which folds ignore
    tests = []
    for number in (1, 2, 3):
        splits = split_rows(data, section(), strata=strata, fold=f"{number}/3")
        assert not questions(splits.test) & (questions(splits.train) | questions(splits.validation))
        by_question = dict(zip(splits.test["question"], (strata[row - 2] for row in splits.test["row"]), strict=True))
        assert Counter(by_question.values()) == {0: 10, 1: 10, 2: 10}
        assert (splits.by, splits.leaks) == ("random", 0) and len(splits.validation) > 0
        tests += splits.test["row"]
    assert sorted(tests) == list(range(2, 122))
    # The order of the rows changes nothing.
    turned = split_rows(data.select(range(119, -1, -1)), section(), strata=strata[::-1], fold="3/3")
    assert questions(turned.test) == questions(splits.test)


def test_a_fold_that_is_none_is_refused() -> None:
    for fold in ("3/2", "1/1", "1/9"):
        with pytest.raises(DataError, match=rf"data\.fold={fold} .*1/2"):
            split_rows(many(8), section(), fold=fold)
