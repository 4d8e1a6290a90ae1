"""Every question stands on one side, in every stratum's proportion, and the same rows are split the same everywhere."""

from collections.abc import Sequence

import datasets
import numpy as np
import pytest

from sevpeft.data.cleaning import fold_for_matching
from sevpeft.data.splits import Splits, split_rows
from sevpeft.errors import DataError


def rows(questions: Sequence[str], split: Sequence[str | None] | None = None) -> datasets.Dataset:
    columns: dict[str, Sequence[object]] = {"question": questions, "row": list(range(2, len(questions) + 2))}
    return datasets.Dataset.from_dict(columns | ({"split": split} if split is not None else {}))


def many(count: int) -> datasets.Dataset:
    return rows([f"سؤال رقم {number}" for number in range(count)])


def split(data: datasets.Dataset, validation: float = 0.1, test: float = 0.1, seed: int = 0, **more: object) -> Splits:
    return split_rows(data, validation_size=validation, test_size=test, seed=seed, **more)  # type: ignore[arg-type]


def sizes(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.validation), len(splits.test)


def questions(part: datasets.Dataset) -> set[str]:
    return {fold_for_matching(question) for question in part["question"]}


@pytest.mark.parametrize(
    ("validation", "test", "expected"),
    [(0.1, 0.2, (140, 20, 40)), (7, 13, (180, 7, 13)), (0.001, 0.0, (199, 1, 0)), (5, 0, (195, 5, 0))],
)
def test_sizes_are_fractions_or_numbers_of_rows(validation: float, test: float, expected: tuple[int, ...]) -> None:
    splits = split(many(200), validation, test)
    assert sizes(splits) == expected
    assert (splits.by, splits.groups, splits.leaks) == ("random", 200, 0)


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
    assert splits.groups == 100 and sizes(splits) == (240, 30, 30)


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


@pytest.mark.parametrize("column", [["1", "2"] * 50, [""] * 100, [None] * 100])
def test_a_column_split_of_something_else_is_not_used(column: list[str | None]) -> None:
    assert split(rows([f"q {number}" for number in range(100)], column)).by == "random"


@pytest.mark.parametrize("column", [["1", "2"] * 50, [""] * 100, [None] * 100, ["تدريب", "اختبار"] * 50])
def test_a_column_that_was_named_for_the_split_and_is_none_is_refused(column: list[str | None]) -> None:
    with pytest.raises(DataError, match=r"in 100 of 100 rows, first at 2.*data\.split_column"):
        split(rows([f"q {number}" for number in range(100)], column), named=True)


def test_a_column_split_that_is_filled_in_part_is_refused_with_the_row() -> None:
    with pytest.raises(DataError, match="in 2 of 5 rows, first at 4"):
        split(rows(list("abcde"), ["train", "test", "", "tset", "train"]))


def test_a_column_split_without_train_is_refused() -> None:
    with pytest.raises(DataError, match="no train rows"):
        split(rows(list("ab"), ["test", "dev"]))


@pytest.mark.parametrize(
    ("validation", "test", "said"),
    [
        (0, 0.1, r"data\.validation_size=0 gives no validation rows, and its size must be above 0"),
        (0.5, 0.5, r"data\.validation_size=0\.5 and data\.test_size=0\.5 of 10 rows leave none to train on"),
        (10, 0, "leave none to train on"),
        (1.5, 0, "neither a fraction below 1 nor a number of rows"),
        (-1, 0, "neither a fraction below 1 nor a number of rows"),
        (0.1, -0.1, "neither a fraction below 1 nor a number of rows"),
        (0.1, float("nan"), "neither a fraction below 1 nor a number of rows"),
        (True, 0.1, "neither a fraction below 1 nor a number of rows"),
    ],
)
def test_sizes_that_cannot_be_met_are_refused(validation: float, test: float, said: str) -> None:
    with pytest.raises(DataError, match=said):
        split(many(10), validation, test)


def test_a_side_that_no_group_fits_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"data\.test_size=1 gives no test rows, because each question.*raise it"):
        split(rows(["a"] * 5 + ["b"] * 5), 5, 1)


def test_strata_that_do_not_match_the_rows_are_refused() -> None:
    with pytest.raises(DataError, match="3 strata for 10 rows"):
        split(many(10), strata=[0, 1, 2])
