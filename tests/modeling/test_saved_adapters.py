"""An adapter is put on the base that it was trained on, wherever that now lies; on another one it is refused."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sevpeft.errors import ModelError
from sevpeft.modeling.adapters import (
    attach_adapter,
    base_commit,
    base_fingerprint,
    check_base_weights,
    init_adapter,
    public_name,
)
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.runs import Run
from tests.models import build_model

IDS = torch.arange(4, 60)[None]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def adapter(folder: Path, architecture: str = "llama", trained_on: str = "org/theirs", **lora: Any) -> torch.Tensor:
    """Saves an adapter with drawn weights and returns what it answers."""
    torch.manual_seed(1)
    model = get_peft_model(
        build_model(architecture),
        LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora)),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": trained_on}))
    return logits(model)


def on(base: object, **model: object) -> Recipe:
    return recipe_from_values({"model": {"name_or_path": str(base), **model}})


def refusal(folder: Path, base: str = "org/ours", architecture: str = "llama", **shape: int) -> str:
    with pytest.raises(ModelError) as caught:
        attach_adapter(build_model(architecture, **shape), folder, on(base))
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500
    return text


def test_a_base_that_was_moved_or_renamed_is_the_same_base(tmp_path: Path) -> None:
    expected = adapter(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    for base in ("org/theirs", "org/ours", "/somewhere/else", "builtin:tiny"):
        assert torch.equal(logits(attach_adapter(build_model("llama"), tmp_path / "elsewhere", on(base))), expected)


def test_an_adapter_of_another_architecture_is_refused_with_both_names(tmp_path: Path) -> None:
    for trained, other in (("llama", "gpt2"), ("gpt2", "llama"), ("llama", "lfm2"), ("llama", "jais2")):
        targets = ["c_attn"] if trained == "gpt2" else ["q_proj", "gate_proj", "out_proj"]
        adapter(tmp_path / f"{trained}-{other}", trained, target_modules=targets)
        text = refusal(tmp_path / f"{trained}-{other}", architecture=other)
        assert "was trained on org/theirs" in text and "org/ours" in text and "model.name_or_path" in text


def test_a_base_of_other_shapes_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path, modules_to_save=["lm_head"])
    text = refusal(tmp_path, vocab_size=600)
    assert "does not fit org/ours" in text and "model.name_or_path" in text


def test_a_start_that_trains_other_tokens_is_refused_with_the_settings_to_write(tmp_path: Path) -> None:
    adapted = get_peft_model(build_model("llama"), LoraConfig(trainable_token_indices=[3, 4]))
    adapted.save_pretrained(tmp_path)
    init = {"training": {"init_adapter": str(tmp_path)}}
    lora = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "trainable_token_indices": [3, 4]}
    assert init_adapter(recipe_from_values({**init, "lora": lora})).startswith("sha256:")
    with pytest.raises(ModelError) as refused:
        init_adapter(recipe_from_values({**init, "lora": lora | {"trainable_token_indices": [5, 6]}}))
    assert "lora.trainable_token_indices=[3, 4]" in shlex.split(str(refused.value).partition("; ")[2].rstrip(".")[6:])


def test_no_folder_of_another_machine_is_quoted(tmp_path: Path) -> None:
    adapter(tmp_path, trained_on="/home/someone/models/mine")
    text = refusal(tmp_path, "elsewhere/../mine", architecture="gpt2")
    assert "/home/someone" not in text and "trained on mine" in text


def test_a_base_with_more_or_fewer_layers_is_refused(tmp_path: Path) -> None:
    for name, change in {
        "more": lambda found: {key: value for key, value in found.items() if "layers.1.mlp" not in key},
        "fewer": lambda found: found | {k.replace("layers.1.", "layers.2."): v.clone() for k, v in found.items()},
    }.items():
        adapter(tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        text = refusal(tmp_path / name)
        assert ("6 weights" in text and "layers.1.mlp" in text) if name == "more" else "layers.2." in text, text


def test_a_damaged_or_absent_file_is_named(tmp_path: Path) -> None:
    adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    for kept in (0, 5, 500, -100):
        file.write_bytes(whole[:kept])
        assert "is damaged (" in refusal(tmp_path), kept
    file.unlink()
    assert "adapter_model.safetensors" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refusal(tmp_path)


# The base's own weights


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


def test_shards_places_and_what_lies_beside_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        model = build_model("llama").to(dtype)
        model.save_pretrained(folder / "one")
        model.save_pretrained(folder / "many", max_shard_size="60KB")
        shutil.copytree(folder / "one", folder / "moved")
        save_file({"x": torch.ones(2)}, folder / "moved" / "consolidated.safetensors")
        assert len(list((folder / "many").glob("*.safetensors"))) > 2
        found = {base_fingerprint(on(folder / name)) for name in ("one", "many", "moved")}
        assert len(found) == 1 and found.pop().startswith("sha256:")


def test_other_numbers_or_another_type_are_another_model(model_folder: Callable[..., Path]) -> None:
    folder = model_folder()
    found = {base_fingerprint(on(folder))}
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        change(folder, name)
        found.add(base_fingerprint(on(folder)))
        weights = load_file(folder / "model.safetensors")
        weights[name] = weights[name].half()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        found.add(base_fingerprint(on(folder)))
    assert len(found) == 7


def test_other_weights_of_the_same_shapes_are_refused(
    model_folder: Callable[..., Path], tmp_path: Path, run: Callable[..., Run]
) -> None:
    trained = run(on(model_folder()))
    other = tmp_path / "instruct"
    shutil.copytree(tmp_path / "tiny-llama", other)
    check_base_weights(on(other), trained)  # moved or renamed
    change(other)
    with pytest.raises(ModelError, match=r"tiny-llama.* instruct .*model\.name_or_path") as e:
        check_base_weights(on(other), trained)
    assert str(tmp_path / "instruct") not in str(e.value)
    change(tmp_path / "tiny-llama")
    with pytest.raises(ModelError, match="restore"):
        check_base_weights(on(tmp_path / "tiny-llama"), trained)


def test_a_newer_revision_on_the_hub_is_refused_with_the_one_to_ask_for(
    model_folder: Callable[..., Path], tmp_path: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--model"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(model_folder(), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    recipe = on("org/model")
    trained = run(recipe, commit=base_commit(recipe))
    assert base_fingerprint(recipe) == base_fingerprint(on(snapshot))
    assert base_commit(recipe) == COMMIT and base_commit(on(tmp_path / "tiny-llama")) is None
    newer = repository / "snapshots" / COMMIT[::-1]
    shutil.copytree(snapshot, newer)
    change(newer)
    (repository / "refs" / "main").write_text(COMMIT[::-1])
    with pytest.raises(ModelError, match=rf"set model\.revision to {COMMIT} in "):
        check_base_weights(recipe, trained)
    check_base_weights(on("org/model", revision=COMMIT), trained)


def test_runs_without_a_fingerprint_pass(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    check_base_weights(on(model_folder()), Run(tmp_path / "run"))
    Run(tmp_path / "run").update_metrics(model={"name_or_path": "org/model"})
    check_base_weights(on(model_folder()), Run(tmp_path / "run"))


def test_of_a_path_only_the_last_part_is_public() -> None:
    names = {
        "org/model": "org/model",
        "builtin:tiny": "builtin:tiny",
        "gpt2": "gpt2",
        "clinic/ward-7/*.csv": "*.csv",
        "clinic/*.csv": "*.csv",
        "old/models/base": "base",
        "~/clinic/rows.csv": "rows.csv",
    }
    assert {name: public_name(name) for name in names} == names
