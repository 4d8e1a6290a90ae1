"""No judge is asked unless the recipe names one, and neither a key nor a password gets into a recipe or its errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from sevpeft.errors import RecipeError
from sevpeft.recipe import JUDGE_KEY, load_recipe, recipe_from_values

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"


def test_a_judge_is_absent_unless_named_and_read_back_from_the_resolved_recipe(tmp_path: Path) -> None:
    assert recipe_from_values({}).evaluation.judge is None
    recipe = load_recipe(QUICKSTART, ["evaluation.judge.url=http://127.0.0.1:8000/v1/", "evaluation.judge.model=2024"])
    judge = recipe.evaluation.judge
    assert judge is not None and (judge.url, judge.model) == ("http://127.0.0.1:8000/v1", "2024")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert load_recipe(tmp_path / "recipe.yaml", ["evaluation.judge=null"]).evaluation.judge is None


def test_usual_addresses_of_endpoints_are_accepted() -> None:
    for url in (
        "https://judge.example/v1",
        "http://[::1]:8000/v1",
        "http://h:80",
        "https://a.b/openai/deployments/x@y",
    ):
        assert recipe_from_values({"evaluation": {"judge": {"url": url, "model": "m"}}}).evaluation.judge.url == url


def test_a_wrong_judge_is_refused_without_repeating_what_may_be_secret() -> None:
    wrong = []
    whole = ["evaluation.judge.model=m", "evaluation.judge.url=http://127.0.0.1:8000/v1"]
    with pytest.raises(RecipeError, match=r"judge\.model: is missing"):
        load_recipe(QUICKSTART, whole[1:])
    for setting, key, remedy in (
        ("url=http://user:secret@judge.example/v1", "judge.url", JUDGE_KEY),
        ("url=http://secret@judge.example/v1", "judge.url", JUDGE_KEY),
        ("url=https://judge.example/v1?key=secret", "judge.url", JUDGE_KEY),
        ("url=https://judge.example/v1#secret", "judge.url", JUDGE_KEY),
        ("url=ftp://secret.example", "judge.url", "http://127.0.0.1:8000/v1"),
        ("url=http://secret.example:port/v1", "judge.url", "http://127.0.0.1:8000/v1"),
        ("url=secret", "judge.url", "http://127.0.0.1:8000/v1"),
        ("api_key=sk-secret", "judge.api_key", JUDGE_KEY),
        ("api_key_variable=MY_SECRET", "judge.api_key_variable", "unknown"),
        ("timeout=0", "judge.timeout", "greater than 0"),
        ("concurrency=0", "judge.concurrency", "1"),
    ):
        with pytest.raises(RecipeError) as error:
            load_recipe(QUICKSTART, [*whole, f"evaluation.judge.{setting}"])
        message = str(error.value)
        expected = message.startswith(f"command line: evaluation.{key}: ") and remedy in message
        if not expected or "\n" in message or "secret" in message.lower():
            wrong.append((setting, message))
    assert wrong == []
