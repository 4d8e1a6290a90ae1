"""The adapter that a recipe asks for is the one that is trained, or PEFT's refusal in one sentence; and what is saved
gives the same logits when it is read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from sevpeft.errors import ModelError
from sevpeft.modeling.adapters import CpuDropout, add_empty_adapter, lora_config, sort_target_modules, use_cpu_dropout
from sevpeft.modeling.compat import on_meta_device
from sevpeft.modeling.loading import Precision, load_model
from sevpeft.recipe import Recipe, recipe_from_values
from tests.models import build_model


def recipe_with(**lora: Any) -> Recipe:
    return recipe_from_values({"lora": lora})


def refusal(model: PreTrainedModel, **lora: Any) -> str:
    with pytest.raises(ModelError) as caught:
        config = lora_config(recipe_with(**lora), model)
        with on_meta_device():
            add_empty_adapter(AutoModelForCausalLM.from_config(model.config), config)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400
    return text


def test_the_settings_of_the_recipe_arrive() -> None:
    config = lora_config(recipe_with(r=4, lora_alpha=8, use_rslora=True, bias="lora_only"), build_model("llama"))
    assert (config.r, config.lora_alpha, config.use_rslora, config.bias) == (4, 8, True, "lora_only")
    assert (config.lora_dropout, config.target_modules, config.task_type) == (0.05, "all-linear", "CAUSAL_LM")


def test_dropout_on_a_cpu_drops_its_share_keeps_the_mean_and_is_drawn_from_the_seed() -> None:
    values = torch.full((401, 1_003), 2.0, requires_grad=True)  # not a multiple of four
    for share in (0.05, 0.5):
        dropout = CpuDropout(share)
        first, again, other = (torch.manual_seed(seed) and dropout(values) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
        dropped = (first == 0).float()
        assert float(dropped.mean()) == pytest.approx(share, abs=0.002)
        assert torch.allclose(first[first != 0], torch.tensor(2 / (1 - share)), rtol=1e-4)
        (gradient,) = torch.autograd.grad(first.sum(), values)
        assert torch.equal(gradient * 2, first)
        # A random number is cut into four: each part drops the same share, and so does each column.
        parts = dropped.flatten()[:400_000].view(-1, 4).mean(0)
        assert float(parts.std()) < 0.01 and float(dropped.mean(0).std()) < 0.03
        assert torch.equal(dropout.eval()(values), values)
    assert torch.isfinite(CpuDropout(0.999_999)(values)).all() and torch.equal(CpuDropout(0)(values), values)


def test_every_dropout_of_an_adapter_is_replaced_and_no_other() -> None:
    model = get_peft_model(build_model("gpt2"), lora_config(recipe_with(r=2), build_model("gpt2")))
    before = sum(isinstance(module, torch.nn.Dropout) for module in model.modules())
    use_cpu_dropout(model)
    found = [name for name, module in model.named_modules() if isinstance(module, CpuDropout)]
    assert len(found) == 8 and all(".lora_dropout." in name for name in found)
    assert sum(isinstance(module, torch.nn.Dropout) for module in model.modules()) == before


LINEAR = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "lfm2": {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
    **{
        name: {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        for name in ("llama", "mistral", "qwen2", "qwen3", "cohere2", "gemma2", "gemma3_text")
    },
    "jais2": {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"},
    # The vision tower, to which fc1, fc2 and out_proj belong, is taken too; so the recipes name the language model.
    "gemma3": {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("fc1", "fc2", "out_proj"),
    },
}


def test_all_linear_takes_every_matrix_but_the_head() -> None:
    found = {}
    for architecture in LINEAR:
        model = build_model(architecture)
        names = [name for name, _ in get_peft_model(model, lora_config(recipe_with(r=2), model)).named_parameters()]
        found[architecture] = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in names if "lora_A" in name}
    assert found == LINEAR


def test_what_peft_cannot_adapt_of_a_mamba_is_named_with_the_way_around_it() -> None:
    model = build_model("falcon_h1")
    text = refusal(model)
    assert "Module 'out_proj' is incompatible with Mamba-based models" in text
    assert text.endswith("write lora.exclude_modules=[out_proj,conv1d].")
    adapter = get_peft_model(model, lora_config(recipe_with(r=2, exclude_modules=["out_proj", "conv1d"]), model))
    assert {name.rsplit(".", 1)[-1] for name in adapter.targeted_module_names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_asking_changes_neither_the_model_nor_the_random_numbers() -> None:
    model = build_model("llama")
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    settings = json.dumps(model.config.to_dict(), default=str)
    lora_config(recipe_with(), model)
    assert torch.equal(state, torch.get_rng_state())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert settings == json.dumps(model.config.to_dict(), default=str)


def test_names_that_match_nothing_are_refused_beside_those_there_are() -> None:
    for setting, wanted, absent in (
        ("target_modules", ["q_proj", "c_attn", "k"], "c_attn, k"),  # k is no part of k_proj
        ("target_modules", r".*\.q_prj", r".*\.q_prj"),
        ("modules_to_save", ["wte", "embed_tokens"], "wte"),
        ("exclude_modules", ["down_proj", "dwn_proj"], "dwn_proj"),
        ("exclude_modules", ".*experts.*", ".*experts.*"),
        ("rank_pattern", {"q_proj": 2, "query": 4}, "query"),
        ("alpha_pattern", {"layers.7.mlp.up_proj": 4}, "layers.7.mlp.up_proj"),
        ("target_parameters", ["mlp.experts.down_proj"], "mlp.experts.down_proj"),
    ):
        more = {"lora_dropout": 0.0} if setting == "target_parameters" else {}
        text = refusal(build_model("llama"), **{setting: wanted}, **more)
        assert (
            text.startswith(f"lora.{setting}: ")
            and f" has no {absent}; " in text
            and "down_proj" in text.split("it has")[1]
        ), text
    for layers in ([1, 9], 2):
        text = refusal(build_model("llama"), target_modules=["q_proj"], layers_to_transform=layers)
        assert text.startswith("lora.layers_to_transform names ") and "0 to 1" in text


def test_targets_may_be_full_names_and_regular_expressions() -> None:
    model = build_model("llama")
    for targets, count in ((["model.layers.0.self_attn.q_proj"], 1), (r".*layers\.1.*\.[qkv]_proj", 3)):
        adapter = get_peft_model(build_model("llama"), lora_config(recipe_with(target_modules=targets), model))
        assert sum("lora_A" in name for name, _ in adapter.named_parameters()) == count


def test_trained_tokens_of_a_head_that_is_the_embedding_are_refused() -> None:
    assert "lora.modules_to_save" in refusal(build_model("gpt2"), trainable_token_indices=[2, 3])
    lora_config(recipe_with(trainable_token_indices=[2, 3]), build_model("llama"))


def test_what_peft_refuses_is_one_sentence() -> None:
    for lora, words in (
        ({"use_dora": True, "lora_bias": True}, "DoRA"),
        ({"target_modules": []}, "No `target_modules` passed"),
        ({"target_modules": ["self_attn"]}, "is not supported"),
        ({"exclude_modules": ".*"}, "All modules were excluded"),
        ({"rank_pattern": {"(": 2}}, "missing ), unterminated subpattern"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even"),
    ):
        text = refusal(build_model("llama"), **lora)
        assert text.startswith("PEFT refuses the lora section for llama: ") and words in text


def test_variants_that_work_are_not_refused() -> None:
    variants: list[dict[str, Any]] = [
        {"exclude_modules": ["layers.0.self_attn.q_proj", "mlp"]},
        {
            "exclude_modules": r".*layers\.1\..*",
            "rank_pattern": {r"layers\.0\..*": 2, "^model.layers.0.mlp.up_proj": 3},
        },
        {"target_parameters": ["mlp.up_proj.weight"], "lora_dropout": 0.0, "target_modules": ["q_proj"]},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian", "use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"trainable_token_indices": [5]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ]
    for lora in variants:
        model = build_model("llama")
        trainable, _ = get_peft_model(model, lora_config(recipe_with(**lora), model)).get_nb_trainable_parameters()
        assert trainable > 0, lora


@pytest.mark.parametrize("quantization", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_quantized_weight_counts_as_the_numbers_it_stands_for(
    model_folder: Callable[..., Path], quantization: dict[str, bool]
) -> None:
    recipe = recipe_from_values(
        {"model": {"name_or_path": str(model_folder("llama"))}, "quantization": quantization, "lora": {"r": 2}}
    )
    model = load_model(recipe, Precision(torch.float32, bf16=False, fp16=False))
    trainable, total = get_peft_model(model, lora_config(recipe, model)).get_nb_trainable_parameters()
    plain = sum(parameter.numel() for parameter in build_model("llama").parameters())
    matrices = [m for n, m in build_model("llama").named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert trainable == sum(2 * (m.in_features + m.out_features) for m in matrices)
    assert total == plain + trainable


# Saved and read again


def test_target_modules_are_written_in_one_order(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    names = ["v_proj", "down_proj", "q_proj", "up_proj"]
    written = []
    for order in (names, names[::-1], names[2:] + names[:2]):
        path.write_text(json.dumps({"target_modules": order, "r": 4, "قلب": "نعم"}), encoding="utf-8")
        sort_target_modules(tmp_path)
        written.append(path.read_bytes())
    assert len(set(written)) == 1
    assert json.loads(written[0]) == {"target_modules": sorted(names), "r": 4, "قلب": "نعم"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter_config.json"]
    path.write_text('{"target_modules": ".*_proj"}')
    sort_target_modules(tmp_path)
    assert json.loads(path.read_text()) == {"target_modules": ".*_proj"}


@pytest.mark.parametrize("quantization", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_saved_adapter_gives_the_same_logits_when_it_is_read_again(
    model_folder: Callable[..., Path], tmp_path: Path, architecture: str, quantization: dict[str, bool]
) -> None:
    recipe = recipe_from_values(
        {
            "model": {"name_or_path": str(model_folder(architecture))},
            "quantization": quantization,
            "lora": {"r": 4, "use_rslora": True},
        }
    )

    def base() -> PreTrainedModel:
        return load_model(recipe, Precision(torch.float32, bf16=False, fp16=False))

    ids = torch.arange(4, 60)[None]
    model = base()
    trained = get_peft_model(model, lora_config(recipe, model))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        expected = trained.eval()(input_ids=ids).logits
        trained.save_pretrained(tmp_path / "adapter")
        sort_target_modules(tmp_path / "adapter")
        read = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()(input_ids=ids).logits
        without = base()(input_ids=ids).logits
    assert torch.equal(read, expected)
    assert float((without - expected).abs().max()) > 1e-2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "adapter").glob("*.bin"))
