"""What makes a resume another training is refused with the difference; the log goes on where the checkpoint was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sevpeft.errors import RunError
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.training.checkpoints import check_same_data, check_same_recipe

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    run.write_text("recipe.yaml", load_recipe(QUICKSTART).to_yaml())
    return run


def test_the_same_recipe_is_no_difference(run: Run) -> None:
    check_same_recipe(load_recipe(QUICKSTART), run)
    check_same_recipe(load_recipe(run.folder / "recipe.yaml"), run)


def test_each_difference_is_shown_as_it_was_and_as_it_is(run: Run) -> None:
    words = ["training.learning_rate=1e-5", "severity.weights={non_critical: 1, neutral: 1, critical: 3}"]
    with pytest.raises(RunError) as refused:
        check_same_recipe(load_recipe(QUICKSTART, words), run)
    said = str(refused.value)
    rate = load_recipe(QUICKSTART).training.learning_rate
    assert f"training.learning_rate ({rate} then, 1e-05 now)" in said
    assert (
        "severity.weights (balanced then, not set now)" in said
        and "severity.weights.critical (not set then, 3.0 now)" in said
    )


def test_many_differences_are_counted(run: Run) -> None:
    words = [
        f"training.{name}=7" for name in ("seed", "save_steps", "eval_steps", "max_steps", "logging_steps", "data_seed")
    ]
    with pytest.raises(RunError, match="and 1 more; resume with the same settings"):
        check_same_recipe(load_recipe(QUICKSTART, words), run)


def test_other_data_is_refused_where_its_content_is_known(run: Run) -> None:
    run.write_text("environment.json", json.dumps({"data_fingerprint": "sha256:one"}))
    check_same_data("sha256:one", "rows.csv", run)
    with pytest.raises(RunError, match=r"rows\.csv is not the data that"):
        check_same_data("sha256:other", "rows.csv", run)
    check_same_data("5f2c", "someone/on-the-hub", run)  # changes with this machine's cache


def test_the_log_is_cut_back_and_stays_json_whatever_is_logged(run: Run) -> None:
    for step in range(4):
        run.append_log({"step": step, "loss": float("nan") if step == 1 else 1.0})
    run.keep_log(2)
    lines = (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": None}]
    run.keep_log(0)
    assert (run.folder / "log.jsonl").read_text(encoding="utf-8") == ""
