"""Arms differ in the severity weights alone, and what would make them differ in more is refused before any training."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest

from sevpeft.errors import RunError, UsageError
from sevpeft.evaluation.arms import (
    COMPOSED,
    CURRICULA,
    arm_of,
    check_adapter,
    check_arms,
    parse_arms,
    parse_seeds,
    parse_vary,
    routed_questions,
)
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run, differences
from tests.evaluation.conftest import QUICKSTART


def test_a_run_without_an_adapter_is_refused(run: Run) -> None:
    check_adapter(run)
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="--resume"):
        check_adapter(run)


def test_arms_and_seeds_are_read_or_refused() -> None:
    assert parse_arms("ce, balanced,ce") == ("ce", "balanced") and parse_seeds("0, 12") == (0, 12)
    for read, text in (
        (parse_arms, "ce,balance"),
        (parse_arms, "base"),
        (parse_arms, ""),
        (parse_seeds, ""),
        (parse_seeds, "1,1"),
        (parse_seeds, "-1"),
        (parse_seeds, "1.5"),
        (parse_seeds, str(2**32)),
    ):
        with pytest.raises(UsageError):
            print(read(text))


def test_what_would_differ_in_more_than_the_weights_is_refused(tmp_path: Path, run: Run) -> None:
    for settings, output, arms, kind, key in (
        (["severity.control=shuffled"], tmp_path, ["ce"], UsageError, "severity.control"),
        (["training.load_best_model_at_end=true"], tmp_path, ["ce"], UsageError, "training.load_best_model_at_end"),
        (["prompt.severity=gold"], tmp_path, ["ce", "prompt"], UsageError, "prompt.severity"),
        (["training.packing=true"], tmp_path, ["ce", "oversampled"], UsageError, "training.max_steps"),
        # An arm without its control, or a control without its arm.
        ([], tmp_path, ["ce", "balanced"], UsageError, "balanced needs .*shuffled"),
        ([], tmp_path, ["balanced", "shuffled"], UsageError, "balanced needs .*ce"),
        ([], tmp_path, ["ce", "mild", "1-1-2", "shuffled-mild"], UsageError, "1-1-2 needs .*shuffled"),
        ([], tmp_path, ["ce", "shuffled-mild"], UsageError, "shuffled-mild needs .*mild"),
        ([], tmp_path, ["base", "ce_extra"], UsageError, "ce_extra needs .*ce"),
        ([], tmp_path, ["ce", "mild", "shuffled", "routed"], UsageError, "routed needs .*shuffled-routed"),
        ([], tmp_path, ["ce", "routed-gold"], UsageError, "routed-gold needs .*balanced"),
        (
            [],
            tmp_path,
            ["ce", "mild", "shuffled-mild", "shuffled-routed"],
            UsageError,
            "shuffled-routed needs .*shuffled",
        ),
        (["evaluation.judge.file=a.xlsx"], tmp_path, ["ce"], UsageError, "sevpeft report"),
        ([], run.folder, ["ce"], RunError, "--output"),
    ):
        with pytest.raises(kind, match=key):
            check_arms(load_recipe(QUICKSTART, settings), arms, output)


def test_a_twin_is_the_shuffled_control_of_one_arm_and_shares_its_run() -> None:
    twin, name = arm_of(QUICKSTART, [], "shuffled-1-1-2", 1, "")
    assert (twin.severity.weights, twin.severity.control, name) == ("1-1-2", "shuffled", "shuffled-1-1-2-1")
    assert (twin, name) == arm_of(QUICKSTART, [], "shuffled", 1, "1-1-2")
    assert twin.severity.coefficients() == (1, 1, 2)


def test_plain_cross_entropy_can_train_longer_in_steps_or_epochs() -> None:
    for settings, expected in (([], ("num_train_epochs", 3.36)), (["training.max_steps=30"], ("max_steps", 34))):
        extra, name = arm_of(QUICKSTART, settings, "ce_extra", 1, "")
        assert extra.training.settings()[expected[0]] == expected[1] and name == "ce_extra-1"
        same = [*settings, f"training.{expected[0]}={expected[1]}"]
        assert extra == arm_of(QUICKSTART, same, "ce", 1, "")[0]


def test_competitors_use_severity_elsewhere_than_in_the_loss() -> None:
    prompt, name = arm_of(QUICKSTART, [], "prompt", 1, "strong")
    assert (name, prompt.prompt.severity, prompt.severity.control) == ("prompt-1", "predicted", "uniform")
    drawn, name = arm_of(QUICKSTART, [], "oversampled", 1, "strong")
    assert (name, drawn.severity.weights, drawn.severity.control) == ("oversampled-strong-1", "strong", "oversampled")
    assert drawn.prompt.severity == "none"


def test_a_router_picks_a_fifth_of_the_questions_by_what_it_learned_of_others(tmp_path: Path) -> None:
    words = ("فيتامين حبوب شعر", "صداع سعال حرارة", "نزيف جلطة اغماء")
    questions = [f"{words[label]} {number}" for number in range(12) for label in range(3)]
    labels = np.array([0, 1, 2] * 12)
    train = datasets.Dataset.from_dict({"question": [*questions, *[words[0]] * 9]})
    labels = np.concatenate([labels, [-1] * 9])  # rows whose severity is unknown are not learned from
    asked = [words[0], words[2], *[words[1]] * 3, *[words[0]] * 3, words[2], words[1]]
    assert np.flatnonzero(routed_questions(train, labels, asked)).tolist() == [1, 8]
    with pytest.raises(RunError, match="routed"):
        routed_questions(train.select(range(36)), labels[:36] % 2, asked)
    check_arms(load_recipe(QUICKSTART), ["ce", "mild", "shuffled", *COMPOSED], tmp_path)
    with pytest.raises(UsageError):
        parse_arms("routed,base")


def test_arms_of_a_curriculum_have_weight_one_and_the_others_no_curriculum(run: Run, tmp_path: Path) -> None:
    def ways(*overrides: str) -> dict[str, tuple[str, ...]]:
        arms = ("ce", "balanced", *sorted({*CURRICULA} - {"competence"}))  # which takes no shares
        recipes = {arm: arm_of(QUICKSTART, overrides, arm, 0, "balanced")[0] for arm in arms}
        return {arm: (one.curriculum.kind, one.curriculum.order, one.severity.control) for arm, one in recipes.items()}

    found = ways()
    assert found["curriculum"] == ("cumulative", "easy_first", "uniform") and found["ce"][0] == "none"
    assert found["disjoint"] == ("disjoint", "easy_first", "uniform") and found["icft"][0] == "icft"
    own = ways("curriculum.kind=disjoint", "curriculum.shares=[.5, .3, .2]")
    assert own["curriculum_reverse"] == ("disjoint", "hard_first", "uniform")
    assert own["curriculum_shuffled"] == ("disjoint", "shuffled", "uniform")
    assert own["balanced"][0] == own["ce"][0] == "none" and own["balanced"][2] == "none"
    unmatched = load_recipe(QUICKSTART, ["curriculum.kind=disjoint", "curriculum.epochs_per_stage=2"])
    check_arms(unmatched, ["ce", "mild", "shuffled"], tmp_path)
    with pytest.raises(UsageError, match=r"curriculum\.epochs_per_stage"):
        check_arms(unmatched, ["ce", "curriculum"], tmp_path)


def test_a_ladder_does_one_published_difference_after_another() -> None:
    loop = ("no_end_token=true", "labels=question_and_answer", "unnormalized=true", "evaluation_template='{question}'")
    words = [*(f"as_published.{one}" for one in loop), "severity.reduction=examples", "generation.do_sample=true"]
    _, arms = parse_vary("ladder", QUICKSTART, words)
    names = ["severity.reduction", "unnormalized", "no_end_token", "labels", "severity.control", "evaluation_template"]
    assert list(arms) == ["ours", *names, "generation.do_sample"]
    recipes = [load_recipe(QUICKSTART, [*words, *settings]) for settings in arms.values()]
    ours = load_recipe(QUICKSTART, ["severity.control=uniform"])
    assert (recipes[0], recipes[-1]) == (ours, load_recipe(QUICKSTART, words))
    for before, after in pairwise(one.model_dump() for one in recipes):
        assert len(differences(before, after)) == 1
    with pytest.raises(UsageError, match="as_published"):
        parse_vary("ladder", QUICKSTART, ["severity.control=uniform"])


def test_one_small_seed_may_be_a_count_and_is_asked_about() -> None:
    with pytest.raises(UsageError, match=r"Write --seeds 0,1,2, or --seeds 3, "):
        parse_seeds("3")
    assert [parse_seeds(text) for text in ("3,", "0", "1", "1234")] == [(3,), (0,), (1,), (1234,)]
