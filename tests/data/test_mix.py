"""A mix has the same token budget for all shares, and trains on no held-out question."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sevpeft.data.mix import SOURCE, draw
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError, RecipeError, WeightError
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe, TrainingDataSection, recipe_from_values
from sevpeft.training.data import Prepared, load_splits, prepare

ARABIC = [f"عندي صداع رقم {number} منذ يومين" for number in range(60)]
ENGLISH = [f"I have had a headache number {number} since Monday" for number in range(30)]


def section(ratios: str, tokens: int | None = None, seed: int = 0) -> TrainingDataSection:
    mix = {"sources": {"english": "e.jsonl"}, "ratios": ratios, "tokens": tokens}
    return TrainingDataSection.model_validate({"mix": mix, "seed": seed})


def write(path: Path, questions: list[str], **columns: Any) -> Path:
    rows = [{"question": one, "answer": f"راجع الطبيب {one}", **columns} for one in questions]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """The recipe of a mix of two files; the second one repeats twenty questions of the first."""
    arabic = write(tmp_path / "a.jsonl", ARABIC, severity="critical")
    write(tmp_path / "e.jsonl", [*ENGLISH, *ARABIC[:20]])

    def make(ratios: str | None, **values: Any) -> Recipe:
        mix = {"sources": {"english": str(tmp_path / "e.jsonl")}, "ratios": ratios, **values.pop("mix", {})}
        data = {"path": str(arabic), **({"mix": mix} if ratios else {}), **values.pop("data", {})}
        return recipe_from_values({"data": data, "severity": {"control": "uniform"}, **values})

    return make


@pytest.fixture
def prepared(
    recipe: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., Prepared]:
    def make(ratios: str | None, **values: Any) -> Prepared:
        made = recipe(ratios, **values)
        folder = tmp_path / f"scratch-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return prepare(made, Prompt.build(tokenizer, **made.prompt.model_dump()), folder)

    return make


def test_every_share_has_its_part_of_one_budget() -> None:
    lengths = np.random.default_rng(1).integers(20, 200, 400)
    source = np.array([""] * 300 + ["english"] * 100)
    first = int(lengths[:300].sum())
    held: dict[str, set[int]] = {}
    for ratios in ("100-0", "80-20", "60-40", "50-50", "40-60", "20-80", "0-100"):
        chosen, counts = draw(lengths, source, section(ratios))
        for name, percent in zip(("data.path", "english"), map(int, ratios.split("-")), strict=True):
            assert abs(counts[name]["tokens"] - first * percent / 100) <= 100, (ratios, name)
        assert sum(of["tokens"] for of in counts.values()) == int(lengths[chosen].sum())
        assert len(chosen) == sum(of["rows"] for of in counts.values()) and (np.diff(chosen) >= 0).all()
        assert counts["data.path"]["distinct_rows"] == counts["data.path"]["rows"]
        held[ratios] = {int(at) for at in chosen if at < 300}
    assert held["0-100"] == set() < held["20-80"] < held["60-40"] < held["100-0"] == set(range(300))
    repeated = draw(lengths, source, section("0-100"))[1]["english"]
    assert repeated["distinct_rows"] == 100 and repeated["rows"] > 250
    once = draw(lengths, source, section("50-50", tokens=4000))
    assert abs(int(lengths[once[0]].sum()) - 4000) <= 200
    np.testing.assert_array_equal(once[0], draw(lengths, source, section("50-50", tokens=4000))[0])
    assert not np.array_equal(once[0], draw(lengths, source, section("50-50", tokens=4000, seed=1))[0])


def test_a_share_that_no_row_fits_is_refused() -> None:
    lengths = np.full(4, 50)
    for source, settings in (
        (np.array([""] * 4), section("50-50")),
        (np.array(["", "", "english", "english"]), section("99-1", tokens=100)),
    ):
        with pytest.raises(DataError, match="english"):
            draw(lengths, source, settings)


def test_no_row_of_any_source_asks_what_is_held_out(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    table, splits, _ = load_splits(recipe("50-50"))
    alone, apart, _ = load_splits(recipe(None))
    held = {fold_for_matching(row["question"]) for part in (apart.validation, apart.test) for row in part}
    assert len(held & {fold_for_matching(one) for one in ARABIC[:20]}) > 0
    assert not held & {fold_for_matching(row["question"]) for row in splits.train}
    own = len(apart.train)
    assert splits.train["question"][:own] == apart.train["question"][:]
    for part in ("validation", "test"):
        assert getattr(splits, part)["question"][:] == getattr(apart, part)["question"][:]
    assert splits.train[SOURCE][:] == [""] * own + ["english"] * (len(splits.train) - own)
    assert len(splits.train) > own and table.fingerprint != alone.fingerprint
    write(tmp_path / "e.jsonl", ENGLISH[:20])
    assert load_splits(recipe("50-50"))[0].fingerprint != table.fingerprint, "a resumed run would notice"
    write(tmp_path / "e.jsonl", ENGLISH[:5], split="test")
    with (tmp_path / "e.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"question": "Only this one?", "answer": "Yes.", "split": "train"}) + "\n")
    found = load_splits(recipe("50-50"))[1].train["question"][own:]
    assert found == ["Only this one?"], "its own test rows stay out"


def test_the_first_source_alone_is_the_plain_training_to_the_bit(prepared: Callable[..., Prepared]) -> None:
    plain, mixed = prepared(None), prepared("100-0")
    for part in ("train", "validation"):
        assert getattr(plain, part)[:] == getattr(mixed, part)[:]
    assert mixed.summary["mix"]["english"]["rows"] == 0


def test_the_counts_of_a_mix_are_those_of_its_rows(prepared: Callable[..., Prepared]) -> None:
    plain, mixed = prepared(None), prepared("50-50")
    counts = mixed.summary["mix"]
    assert mixed.summary["rows"]["train"] == len(mixed.train) == sum(of["rows"] for of in counts.values())
    tokens = sum(len(ids) for ids in mixed.train["input_ids"])
    assert tokens == sum(of["tokens"] for of in counts.values())
    assert tokens == pytest.approx(sum(len(ids) for ids in plain.train["input_ids"]), rel=0.1)
    assert mixed.summary["encoding"]["train"]["rows"] == mixed.weights.consultations == len(mixed.train)
    assert "mix" not in plain.summary


def test_a_source_without_a_severity_is_refused_unless_none_is_needed(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(WeightError, match=r"of english"):
        prepared("50-50", severity={})
    found = prepared("50-50", severity={"source": "rules"})
    assert sum(found.weights.severities.values()) == len(found.train)


def test_what_is_no_mix_is_one_sentence_with_its_key(recipe: Callable[..., Recipe]) -> None:
    for ratios, more, part in (
        ("60-30", {}, "data.mix.ratios"),
        ("100", {}, "data.mix.ratios"),
        ("50-30-20", {}, "data.mix.ratios"),
        ("a-b", {}, "data.mix.ratios"),
        ("1.1.1-2", {}, "data.mix.ratios"),
        ("nan-50", {}, "data.mix.ratios"),
        ("50-50", {"sources": {}}, "data.mix.sources"),
        ("50-50", {"sources": {"": "x"}}, "data.mix.sources"),
        ("50-50", {"tokens": 0}, "data.mix.tokens"),
    ):
        with pytest.raises(RecipeError) as refused:
            recipe(ratios, mix=more)
        assert part in str(refused.value) and len(str(refused.value).splitlines()) == 1, ratios
    with pytest.raises(DataError, match=r"data\.mix\.sources\.english"):
        load_splits(recipe("50-50", mix={"sources": {"english": "absent.jsonl"}}))
