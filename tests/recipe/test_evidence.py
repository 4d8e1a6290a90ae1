"""No judge is asked unless the recipe says so, and neither a key nor a password gets into a recipe or its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from sevpeft.errors import RecipeError
from sevpeft.recipe import load_recipe, recipe_from_values
from sevpeft.recipe.rules import JUDGE_KEY

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"


def test_the_default_is_no_judge_and_old_recipes_say_the_same() -> None:
    assert recipe_from_values({}).evaluation.judge is None
    assert "judge: null" in recipe_from_values({}).to_yaml()


def test_a_judge_is_given_on_the_command_line_and_read_back_from_the_resolved_recipe(tmp_path: Path) -> None:
    asked = ["evaluation.judge.url=http://127.0.0.1:8000/v1/", "evaluation.judge.model=2024"]
    recipe = load_recipe(QUICKSTART, asked)
    judge = recipe.evaluation.judge
    assert judge is not None and (judge.url, judge.model) == ("http://127.0.0.1:8000/v1", "2024")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert load_recipe(tmp_path / "recipe.yaml", ["evaluation.judge=null"]).evaluation.judge is None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("url=http://user:secret@judge.example/v1", "evaluation.judge.url: holds more than host and path"),
        ("url=https://judge.example/v1?key=secret", "evaluation.judge.url: holds more than host and path"),
        ("url=ftp://secret.example", "evaluation.judge.url: is no URL; write one such as http://127.0.0.1:8000/v1."),
        ("url=http://secret.example:99999/v1", "evaluation.judge.url: is no URL"),
        ("url=secret", "evaluation.judge.url: is no URL"),
        (
            "api_key_variable=MY_SECRET",
            "evaluation.judge.api_key_variable: is not a setting of a recipe",
        ),
        (
            "api_key_variable=null",
            "evaluation.judge.api_key_variable: is not a setting of a recipe",
        ),
        (
            "api_key=sk-secret",
            "evaluation.judge.api_key: is not a setting of a recipe",
        ),
        ("url=http://judge.example/v1", "evaluation.judge: names a url and no model"),
        ("concurrency=2", "evaluation.judge: names no judge"),
        ("timeout=0", "evaluation.judge.timeout: must be more than 0"),
        ("concurrency=0", "evaluation.judge.concurrency: must be at least 1"),
    ],
)
def test_a_wrong_judge_is_refused_without_repeating_what_may_be_secret(setting: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(QUICKSTART, [f"evaluation.judge.{setting}"])
    assert str(caught.value).startswith(f"command line: {said}") and "\n" not in str(caught.value)
    assert "secret" not in str(caught.value).lower()
    assert "api_key" not in setting or JUDGE_KEY in str(caught.value)
