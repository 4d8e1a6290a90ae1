"""Whole values are held out: the newest of what is in order, some drawn of what is not."""

from collections import Counter

import pytest

from sevpeft.data.holdouts import HoldOut, hold_out
from sevpeft.data.splits import SIDES, TEST, TRAIN, VALIDATION
from sevpeft.errors import DataError


def held(cells: list[str], validation: float = 0.1, test: float = 0.1, seed: int = 0) -> HoldOut:
    return hold_out(cells, "when", validation_size=validation, test_size=test, seed=seed)


def sides(result: HoldOut) -> str:
    return "".join("-vt"[side] for side in result.sides.tolist())


def test_the_newest_numbers_are_the_test_and_those_before_them_the_validation() -> None:
    result = held([str(number) for number in (9, 10, 1, 2, 3, 4, 5, 6, 7, 8)], 0.2, 0.1)
    assert sides(result) == "vt-------v" and result.ordered
    assert result.values[TEST] == ["10"] and result.values[VALIDATION] == ["8", "9"]


@pytest.mark.parametrize(
    "dates",
    [
        ["2019-05-01", "2021-01-31", "2020-12-01"],
        ["2019-05", "2021-01", "2020-12"],
        ["2019-05-01T10:00:00Z", "2021-01-31T00:00:00+03:00", "2020-12-01 10:00"],
        ["٢٠١٩", "٢٠٢١", "٢٠٢٠"],
        ["-3.5", "0", "-1"],
    ],
)
def test_dates_and_numbers_are_in_order_however_they_are_written(dates: list[str]) -> None:
    assert sides(held(dates, 1, 1)) == "-tv"


def test_whole_values_come_as_near_to_the_size_as_they_can() -> None:
    years = ["2018"] * 50 + ["2019"] * 30 + ["2020"] * 15 + ["2021"] * 5
    assert Counter(sides(held(years, 0.3, 0.1))) == {"t": 5, "v": 45, "-": 50}
    assert Counter(sides(held(years, 0.1, 0.18))) == {"t": 20, "v": 30, "-": 50}


def test_words_are_drawn_by_the_seed_and_no_value_is_on_two_sides() -> None:
    sources = [f"clinic {number % 20}" for number in range(400)]
    result = held(sources, 0.1, 0.2)
    assert not result.ordered and Counter(sides(result)) == {"-": 280, "v": 40, "t": 80}
    assert all(
        len({side for cell, side in zip(sources, result.sides.tolist(), strict=True) if cell == one}) == 1
        for one in sources
    )
    assert sides(held(sources, 0.1, 0.2)) == sides(result) != sides(held(sources, 0.1, 0.2, seed=1))
    assert sum(map(len, result.values.values())) == 20


def test_where_no_value_fits_the_smallest_is_held_out() -> None:
    result = held(["a"] * 50 + ["b"] * 30 + ["c"] * 20, 0.01, 0.01)
    assert result.values == {TRAIN: ["a"], VALIDATION: ["b"], TEST: ["c"]}


def test_of_two_values_one_is_held_out() -> None:
    assert Counter(sides(held(["a"] * 6 + ["b"] * 4))) == {"-": 6, "t": 4}
    assert Counter(sides(held(["a"] * 6 + ["b"] * 4, 0.1, 0))) == {"-": 6, "v": 4}
    assert Counter(sides(held(["1"] * 6 + ["2"] * 4))) == {"-": 6, "t": 4}


def test_rows_without_a_value_are_trained_on_and_counted() -> None:
    result = held(["2020", "", "2021", " ", "2022"], 1, 1)
    assert sides(result) == "--v-t" and result.empty == 2 and result.ordered


def test_a_word_among_numbers_makes_them_names() -> None:
    assert not held(["1", "2", "3", "unknown"]).ordered
    assert not held(["1e999999999", "2", "3"]).ordered


@pytest.mark.parametrize(
    ("cells", "said"),
    [(["a"] * 5, "has one value in all 5 rows"), ([""] * 5, "has no value"), (["a", "", "a"], "has one value")],
)
def test_a_column_with_one_value_is_refused(cells: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        held(cells)


def test_sizes_that_leave_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="leave none of 4 rows to train on"):
        held(list("abcd"), 0.5, 0.5)
    with pytest.raises(DataError, match="neither a fraction"):
        held(list("abcd"), 1.5, 0)


def test_train_always_keeps_a_value() -> None:
    for cells in (["1"] * 90 + ["2"] * 5 + ["3"] * 5, list("abcdefghij"), ["1"] * 5 + ["2"] * 5):
        result = held(cells, 0.4, 0.4)
        assert TRAIN in result.sides.tolist() and len(SIDES) == 3
