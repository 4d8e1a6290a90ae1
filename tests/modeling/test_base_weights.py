"""A base model is known by its weights, wherever they lie and however they are spread over files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sevpeft.errors import ModelError
from sevpeft.modeling.base_weights import base_commit, base_fingerprint, refuse_other_weights
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.runs import Run
from tests.conftest import build_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def recipe_of(name: object, **model: object) -> Recipe:
    return recipe_from_values({"model": {"name_or_path": str(name), **model}})


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """Makes a run that was trained on a base model."""

    def make(recipe: Recipe, **more: object) -> Run:
        found = Run(tmp_path / "run")
        found.folder.mkdir(exist_ok=True)
        about = {"name_or_path": recipe.model.name_or_path, "fingerprint": base_fingerprint(recipe), **more}
        found.update_metrics(model=about)
        return found

    return make


def change(folder: Path, name: str = "model.layers.1.mlp.up_proj.weight") -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] + 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_and_places_do_not_change_it(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build_model("llama").to(dtype)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    found = {base_fingerprint(recipe_of(tmp_path / name)) for name in ("one", "many", "moved")}
    assert len(found) == 1 and found.pop().startswith("sha256:")


def test_what_lies_beside_the_weights_does_not_count(model_folder: Callable[..., Path]) -> None:
    folder = model_folder()
    before = base_fingerprint(recipe_of(folder))
    save_file({"x": torch.ones(2)}, folder / "consolidated.safetensors")
    assert base_fingerprint(recipe_of(folder)) == before


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_other_numbers_another_name_or_type_are_another_model(model_folder: Callable[..., Path], name: str) -> None:
    folder = model_folder()
    before = base_fingerprint(recipe_of(folder))
    change(folder, name)
    assert base_fingerprint(recipe_of(folder)) != before
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name].half()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert base_fingerprint(recipe_of(folder)) != before


def test_other_weights_under_the_same_name_are_refused(
    model_folder: Callable[..., Path], run: Callable[..., Run]
) -> None:
    recipe = recipe_of(model_folder())
    trained = run(recipe)
    refuse_other_weights(recipe, trained)
    change(Path(recipe.model.name_or_path))
    with pytest.raises(ModelError, match=r"run was trained on tiny-llama, which has other weights of the same shapes"):
        refuse_other_weights(recipe, trained)


def test_another_model_of_the_same_shapes_is_refused_with_both_names(
    model_folder: Callable[..., Path], tmp_path: Path, run: Callable[..., Run]
) -> None:
    trained = run(recipe_of(model_folder()))
    other = tmp_path / "instruct"
    shutil.copytree(tmp_path / "tiny-llama", other)
    refuse_other_weights(recipe_of(other), trained)  # moved or renamed
    change(other)
    with pytest.raises(ModelError, match=r"was trained on tiny-llama, and instruct has other weights of the same") as e:
        refuse_other_weights(recipe_of(other), trained)
    assert str(tmp_path / "instruct") not in str(e.value)


def test_a_newer_revision_on_the_hub_is_told_with_the_one_to_ask_for(
    model_folder: Callable[..., Path], tmp_path: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--model"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(model_folder(), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    recipe = recipe_of("org/model")
    trained = run(recipe, commit=base_commit(recipe))
    assert base_fingerprint(recipe) == base_fingerprint(recipe_of(snapshot))
    assert base_commit(recipe) == COMMIT and base_commit(recipe_of(tmp_path / "tiny-llama")) is None
    newer = repository / "snapshots" / COMMIT[::-1]
    shutil.copytree(snapshot, newer)
    change(newer)
    (repository / "refs" / "main").write_text(COMMIT[::-1])
    with pytest.raises(ModelError, match=rf"trained on org/model, which .* now; set model\.revision to {COMMIT} in "):
        refuse_other_weights(recipe, trained)
    refuse_other_weights(recipe_of("org/model", revision=COMMIT), trained)


def test_runs_without_a_fingerprint_pass(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    refuse_other_weights(recipe_of(model_folder()), Run(tmp_path / "run"))
    Run(tmp_path / "run").update_metrics(model={"name_or_path": "org/model"})
    refuse_other_weights(recipe_of(model_folder()), Run(tmp_path / "run"))
