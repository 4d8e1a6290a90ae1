"""An adapter is put on the base that it was trained on, wherever that now lies; on another one it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sevpeft.errors import ModelError
from sevpeft.modeling.saved_adapters import attach_adapter
from sevpeft.recipe import Recipe, recipe_from_values
from tests.conftest import build_model

IDS = torch.arange(4, 60)[None]


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


def on(base: str) -> Recipe:
    return recipe_from_values({"model": {"name_or_path": base}})


def refusal(folder: Path, base: str = "org/ours", architecture: str = "llama", **shape: int) -> str:
    with pytest.raises(ModelError) as caught:
        attach_adapter(build_model(architecture, **shape), folder, on(base))
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400
    return text


@pytest.mark.parametrize("base", ["org/theirs", "org/ours", "/somewhere/else", "builtin:tiny"])
def test_a_base_that_was_moved_or_renamed_is_the_same_base(tmp_path: Path, base: str) -> None:
    expected = adapter(tmp_path)
    assert torch.equal(logits(attach_adapter(build_model("llama"), tmp_path, on(base))), expected)


def test_a_second_adapter_stands_beside_the_first(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "1"), adapter(tmp_path / "2", r=2, target_modules=["q_proj"])
    model = attach_adapter(build_model("llama"), tmp_path / "1", on("org/theirs"), "first")
    model = attach_adapter(model, tmp_path / "2", on("org/theirs"), "second")
    for name, expected in (("first", first), ("second", second)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("trained", "other", "detail"),
    [
        ("llama", "gpt2", "it has no layers of the names that the adapter was trained on"),
        ("gpt2", "llama", "it has no layers of the names that the adapter was trained on"),
        ("llama", "lfm2", "it has no layers.0.mlp.gate_proj (6 weights)"),
        ("llama", "jais2", "it has no layers.0.mlp.gate_proj (4 weights)"),
    ],
)
def test_an_adapter_of_another_architecture_is_refused_with_both_names(
    tmp_path: Path, trained: str, other: str, detail: str
) -> None:
    adapter(tmp_path, trained, target_modules=["c_attn"] if trained == "gpt2" else ["q_proj", "gate_proj", "out_proj"])
    text = refusal(tmp_path, architecture=other)
    assert f"was trained on org/theirs and does not fit org/ours: {detail}" in text


def test_a_base_of_other_shapes_is_refused_with_the_first_that_differs(tmp_path: Path) -> None:
    adapter(tmp_path, modules_to_save=["lm_head"])
    text = refusal(tmp_path, vocab_size=600)
    assert "does not fit org/ours: lm_head has a weight of [512, 48] for one of [600, 48]; name the base" in text


def test_a_base_that_was_exchanged_under_its_name_is_told(tmp_path: Path) -> None:
    adapter(tmp_path, trained_on="/home/someone/models/mine")
    text = refusal(tmp_path, "elsewhere/../mine", architecture="gpt2")
    assert "/home/someone" not in text and "trained on mine" in text
    adapter(tmp_path / "same", trained_on="org/ours")
    text = refusal(tmp_path / "same", "org/ours", architecture="gpt2")
    assert "was trained on org/ours, but org/ours is another model now" in text


def test_a_base_with_more_layers_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name in [name for name in weights if "layers.1.mlp" in name]:
        del weights[name]
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    text = refusal(tmp_path)
    assert "lacks 6 weights that org/ours needs, the first at layers.1.mlp.down_proj" in text and "org/theirs" in text


def test_a_base_with_fewer_layers_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    more = {
        name.replace("layers.1.", "layers.2."): value.clone() for name, value in weights.items() if "layers.1." in name
    }
    save_file(weights | more, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "does not fit org/ours: it has no layers.2.mlp.down_proj (14 weights)" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 500, -100])
def test_a_damaged_adapter_is_one_sentence(tmp_path: Path, kept: int) -> None:
    adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "is damaged (" in refusal(tmp_path) and "copy it again" in refusal(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "There is no adapter_model.safetensors" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "has no adapter_config.json that can be read" in refusal(tmp_path)


def test_a_start_that_is_not_repeatable_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    assert "was started with pissa_niter_4, whose random part is not saved" in refusal(tmp_path)


def test_a_copied_adapter_folder_is_enough(tmp_path: Path) -> None:
    expected = adapter(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert torch.equal(logits(attach_adapter(build_model("llama"), tmp_path / "elsewhere", on("x"))), expected)
