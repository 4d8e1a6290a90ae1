"""A base model is read from safetensors or refused in one sentence; no code and no pickle is run on the way."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sevpeft.errors import DataError, ModelError
from sevpeft.modeling import loading
from sevpeft.modeling.loading import (
    Precision,
    check_form,
    check_hopeless_start,
    choose_precision,
    load_config,
    load_for_inference,
    load_model,
    load_tokenizer,
    quantization_config,
    why_no_gpu,
)
from sevpeft.modeling.memory import base_config
from sevpeft.recipe import Recipe, load_recipe, recipe_from_values
from tests.models import ARCHITECTURES, build_model

FLOAT32 = Precision(torch.float32, bf16=False, fp16=False)
SEVEN = {"about": {"parameters": "7.2B"}, "quantization": {"load_in_4bit": True}}


def recipe_for(name: str | Path = "some/model", **sections: dict[str, Any]) -> Recipe:
    model = {"name_or_path": str(name), **sections.pop("model", {})}
    return recipe_from_values({"model": model, **sections})


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500
    return text


@pytest.fixture
def llama(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llama")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What can be read


def test_safetensors_load_to_the_weights_that_were_saved(model_folder: Callable[..., Path]) -> None:
    for architecture in ARCHITECTURES:
        recipe = recipe_for(model_folder(architecture))
        model = load_model(recipe, FLOAT32)
        expected = build_model(architecture).state_dict()
        assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items()), architecture
        assert model.dtype == torch.float32 and model.config.use_cache is False and not model.training
        tokenizer = load_tokenizer(recipe, load_config(recipe))
        assert tokenizer.pad_token == "<|pad|>" and tokenizer.eos_token == "<|endoftext|>"


def test_a_home_folder_is_expanded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.parent))
    assert load_for_inference(recipe_for(f"~/{llama.name}")).config.model_type == "llama"


def test_a_model_that_answers_copies_its_last_states_once(llama: Path) -> None:
    head = load_for_inference(recipe_for(llama)).get_output_embeddings()
    (copied,) = [hook(head, (torch.zeros(2, 3, 4)[:, -1:],))[0] for hook in head._forward_pre_hooks.values()]
    assert copied.is_contiguous()


def test_a_quantized_model_is_never_repacked(llama: Path) -> None:
    for bits in (4, 8):
        model = load_model(recipe_for(llama, quantization={f"load_in_{bits}bit": True}), FLOAT32)
        assert getattr(model, f"is_loaded_in_{bits}bit")
        assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())


# What is refused


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickled_weights_are_not_read(llama: Path, tmp_path: Path) -> None:
    pickled = pickle.dumps(_Touch(tmp_path / "ran"))
    (llama / "pytorch_model.bin").write_bytes(pickled)
    load_model(recipe_for(llama), FLOAT32)  # beside safetensors
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").rename(llama / "adapter_model.safetensors")
    refusal(lambda: load_model(recipe_for(llama), FLOAT32))
    (llama / "adapter_model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (llama / name).write_bytes(pickled)
        text = refusal(lambda: load_model(recipe_for(llama), FLOAT32))
        assert "safetensors" in text and "save_pretrained" in text
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_configuration_is_no_model(llama: Path) -> None:
    (llama / "config.json").unlink()
    for action in (load_config, lambda recipe: load_model(recipe, FLOAT32)):
        assert "config.json" in refusal(lambda act=action: act(recipe_for(llama)))


def test_a_repository_with_base_and_adapter_is_not_loaded_as_one_model(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PeftModel(build_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(llama)
    config = json.loads((llama / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(llama)}
    (llama / "adapter_config.json").write_text(json.dumps(config))
    assert "training.init_adapter" in refusal(lambda: load_config(recipe_for(llama)))
    monkeypatch.setattr(loading, "load_config", lambda _: None)  # it cannot look into a repository of the Hub
    assert "adapter" in refusal(lambda: load_model(recipe_for(llama), FLOAT32))


def test_damaged_weights_are_named_as_such(llama: Path) -> None:
    whole = (llama / "model.safetensors").read_bytes()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", whole[:-1000]):
        (llama / "model.safetensors").write_bytes(content)
        assert "fetch or copy it again" in refusal(lambda: load_model(recipe_for(llama), FLOAT32))


def test_missing_weights_are_not_made_up(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    for quantization in ({}, {"load_in_4bit": True}):
        text = refusal(lambda q=quantization: load_model(recipe_for(llama, quantization=q), FLOAT32))
        assert "lacks 2 " in text and "model.layers.1.mlp.up_proj.weight" in text


def test_weights_of_other_shapes_are_refused(llama: Path) -> None:
    change_config(llama, intermediate_size=128)
    assert "config.json" in refusal(lambda: load_model(recipe_for(llama), FLOAT32))


def test_a_method_of_quantization_that_transformers_would_ignore_is_refused(llama: Path) -> None:
    for own in (
        {"quant_method": "modelopt"},
        {"quant_method": "GPTQ", "bits": 4},  # it knows gptq
        {"quant_method": "bitsandbytes"},  # in neither form
        {"quant_method": "", "bits": 4},
        {"quant_method": ["gptq"]},
    ):
        change_config(llama, quantization_config=own)
        for action in (load_config, lambda recipe: load_model(recipe, FLOAT32), base_config):
            for requested in ({}, {"load_in_4bit": True}):
                text = refusal(lambda act=action, a=requested: act(recipe_for(llama, quantization=a)))
                assert "quantiz" in text, (own, text)
    change_config(llama, quantization_config=None)
    load_config(recipe_for(llama))


def test_a_base_that_bitsandbytes_saved_is_taken_in_its_own_form_or_refused(llama: Path) -> None:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    fp4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    forms = {"nf4": nf4, "fp4": fp4, "int8": {"load_in_8bit": True}}
    found = {}
    for saved, own in forms.items():
        model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=BitsAndBytesConfig(**own))
        model.save_pretrained(llama.parent / saved)
        for form, requested in {"nothing": {}, **forms}.items():
            recipe = recipe_for(llama.parent / saved, quantization=requested)
            try:
                check_form(recipe, load_config(recipe))
                base_config(recipe)
                found[saved, form] = "taken"
            except ModelError as error:
                found[saved, form] = str(error)
    for (saved, form), text in found.items():
        remedy = f"quantization.load_in_{8 if saved == 'int8' else 4}bit=true"
        asked_otherwise = {"nf4", "fp4"} == {saved, form}  # only the form of the 4 bits differs
        assert (text == "taken") == (saved == form), (saved, form, text)
        assert saved == form or (f"bnb_4bit_quant_type={saved}" if asked_otherwise else remedy) in text, (saved, form)


def test_scales_that_no_configuration_describes_are_not_dropped(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    for more, refused in (
        ({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}, True),
        ({"model.layers.1.self_attn.q_proj.input_scale": torch.ones(1)}, True),
        ({"model.layers.1.self_attn.q_proj.scales": torch.ones(1)}, True),
        ({"model.vision.layer_scale": torch.ones(1), "model.rotary_emb.inv_freq": torch.ones(1)}, False),
    ):
        save_file({**weights, **more}, llama / "model.safetensors", metadata={"format": "pt"})
        if refused:
            assert next(iter(more)) in refusal(lambda: load_model(recipe_for(llama), FLOAT32))
        else:
            load_model(recipe_for(llama), FLOAT32)


@pytest.mark.parametrize("model_type", ["llama", "nobody_knows_it"])
def test_code_that_comes_with_a_model_does_not_run(llama: Path, tmp_path: Path, model_type: str) -> None:
    (llama / "theirs.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    change_config(llama, model_type=model_type, auto_map=classes)
    tokenizer = json.loads((llama / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}, "tokenizer_class": "Theirs"}
    (llama / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    recipe = recipe_for(llama)
    actions: dict[str, Callable[[], object]] = {
        "config": lambda: load_config(recipe),
        "tokenizer": lambda: load_tokenizer(recipe, build_model("llama").config),
        "model": lambda: load_model(recipe, FLOAT32),
    }
    for name, action in actions.items():
        if model_type == "nobody_knows_it":
            assert "model.trust_remote_code=true" in refusal(action), name
        elif name != "tokenizer":
            action()
    assert not (tmp_path / "ran").exists()


def test_a_name_that_leads_nowhere_is_one_sentence_offline() -> None:
    for name in ("nobody/nothing", "here/there/nowhere", "no such model"):
        recipe = recipe_for(name)
        for action in (
            lambda r=recipe: load_config(r),
            lambda r=recipe: load_tokenizer(r, build_model("llama").config),
            lambda r=recipe: load_model(r, FLOAT32),
        ):
            text = refusal(action)
            assert name in text and "model.name_or_path" in text


def test_attention_is_that_of_the_recipe_or_refused_by_its_setting(model_folder: Callable[..., Path]) -> None:
    for attention in ("eager", "sdpa"):
        model = load_model(recipe_for(model_folder("llama"), model={"attn_implementation": attention}), FLOAT32)
        assert model.config._attn_implementation == attention
    for attention, architecture in (("sdpa", "bloom"), ("flash_attention_2", "llama"), ("nonsense", "llama")):
        recipe = recipe_for(model_folder(architecture), model={"attn_implementation": attention})
        text = refusal(lambda r=recipe: load_model(r, FLOAT32))
        assert f"model.attn_implementation={attention}" in text and "eager" in text and "https://" not in text


def test_a_configuration_that_is_none_is_one_sentence(llama: Path) -> None:
    for content in ("{", "[]", "{}", '{"model_type": "t5"}', '{"model_type": "nobody_knows_it"}'):
        (llama / "config.json").write_text(content)
        recipe = recipe_for(llama)
        refusal(lambda r=recipe: (load_config(r), load_model(r, FLOAT32)))


def test_a_model_without_a_tokenizer_does_not_get_an_empty_one(model_folder: Callable[..., Path]) -> None:
    for architecture in ("llama", "qwen2", "gpt2"):
        folder = model_folder(architecture)
        for path in folder.glob("token*"):
            path.unlink()
        recipe = recipe_for(folder)
        assert "tokenizer.json" in refusal(lambda r=recipe: load_tokenizer(r, load_config(r))), architecture
    for content in ("", "{", "{}"):
        (folder / "tokenizer.json").write_text(content)
        refusal(lambda: load_tokenizer(recipe, load_config(recipe)))


def test_a_full_gpu_has_its_remedy_and_our_own_refusals_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Callable[..., None]:
        def raising(*_: Any, **__: Any) -> None:
            raise error

        return raising

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", fail(torch.OutOfMemoryError("CUDA out of memory.")))
    assert "quantization.load_in_4bit=true" in refusal(lambda: load_config(recipe_for()))
    missing = RuntimeError("Configured CUDA binary not found at libbitsandbytes_cuda130.so. See bitsandbytes.")
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", fail(missing))
    assert "python -m bitsandbytes" in refusal(lambda: load_config(recipe_for()))
    monkeypatch.setattr(loading, "tiny_model_folder", fail(DataError("The cache is full.")))
    with pytest.raises(DataError, match=r"^The cache is full\.$"):
        load_tokenizer(recipe_for("builtin:tiny"), build_model("llama").config)


# Number formats


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *, bf16: bool) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Pretended GPU")


def precision(training: dict[str, Any], dtype: str = "auto", **sections: Any) -> Precision:
    return choose_precision(recipe_for(model={"dtype": dtype}, training=training, **sections))


def test_a_cpu_computes_in_bfloat16_only_where_it_multiplies_matrices_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bfloat16 = Precision(torch.bfloat16, bf16=True, fp16=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx512_bf16": False, "avx2": True})
    assert precision({}) == FLOAT32
    assert precision({}, "bfloat16") == precision({"bf16": True}) == bfloat16
    assert "training.fp16=true needs a CUDA GPU" in refusal(lambda: precision({"fp16": True}))
    for able in ("amx_bf16", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {able: True})
        assert precision({}) == bfloat16 and precision({}, "float32") == FLOAT32
        assert choose_precision(recipe_for("builtin:tiny")) == FLOAT32, "the toy is the same everywhere"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert precision({}) == FLOAT32


def test_a_resume_computes_as_the_run_did_on_whatever_machine() -> None:
    assert choose_precision(recipe_for(), "bfloat16").dtype == torch.bfloat16
    assert choose_precision(recipe_for(model={"dtype": "float32"}), "bfloat16") == FLOAT32


def test_a_gpu_computes_in_bfloat16_where_it_can_and_else_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, bf16=True)
    assert precision({}) == Precision(torch.bfloat16, bf16=True, fp16=False)
    assert precision({}, "float32") == FLOAT32
    assert precision({"fp16": True}) == Precision(torch.float16, bf16=False, fp16=True)
    assert precision({"bf16": True}, "float32") == Precision(torch.float32, bf16=True, fp16=False)
    assert precision({"bf16": False, "fp16": False}) == Precision(torch.bfloat16, bf16=False, fp16=False)
    assert precision({"use_cpu": True}).fp16 is False
    pretend_gpu(monkeypatch, bf16=False)
    assert precision({}) == Precision(torch.float16, bf16=False, fp16=True)
    compute = {"bnb_4bit_compute_dtype": "bfloat16"}
    assert precision({}, quantization=compute).dtype == torch.float16  # nothing is quantized
    for setting, action in {
        "training.bf16": lambda: precision({"bf16": True}),
        "model.dtype": lambda: precision({}, "bfloat16"),
        "quantization.bnb_4bit_compute_dtype": lambda: precision({}, quantization={"load_in_4bit": True, **compute}),
    }.items():
        text = refusal(action)
        assert setting in text and "Pretended GPU" in text
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert precision({}, "float32") == FLOAT32


def test_quantization_follows_the_recipe_and_computes_in_the_chosen_format() -> None:
    half = Precision(torch.float16, bf16=False, fp16=True)
    assert quantization_config(recipe_for(), half) is None
    four = quantization_config(recipe_for(quantization={"load_in_4bit": True}), half)
    assert four is not None and four.load_in_4bit and not four.load_in_8bit
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.float16
    requested = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16"}
    other = quantization_config(recipe_for(quantization={"load_in_4bit": True, **requested}), half)
    assert other is not None and (other.bnb_4bit_quant_type, other.bnb_4bit_use_double_quant) == ("fp4", False)
    assert other.bnb_4bit_compute_dtype == torch.bfloat16
    eight = quantization_config(recipe_for(quantization={"load_in_8bit": True}), half)
    assert eight is not None and eight.load_in_8bit and not eight.load_in_4bit


# A start that would lead nowhere


def test_each_reason_for_no_gpu_has_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, visible, remedy in (
        (None, None, "built for CPUs"),
        ("13.0", None, "nvidia-smi"),
        ("13.0", "", "unset it"),
        ("13.0", "-1", "unset it"),
    ):
        for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert remedy in refusal(lambda: check_hopeless_start(recipe_for(**SEVEN))), (cuda, visible)
        assert remedy in refusal(lambda: precision({"fp16": True}))
    assert "leave training.use_cpu" in why_no_gpu(recipe_for(training={"use_cpu": True}))


def test_a_large_quantized_model_on_a_cpu_is_refused_by_its_stated_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "load_config", lambda _: pytest.fail("contacted the Hub"))
    assert "model.name_or_path=builtin:tiny" in refusal(lambda: check_hopeless_start(recipe_for(**SEVEN)))
    check_hopeless_start(recipe_for(**{**SEVEN, "about": {"parameters": "0.5B"}}))
    check_hopeless_start(recipe_for(about=SEVEN["about"]))  # not quantized
    pretend_gpu(monkeypatch, bf16=True)
    check_hopeless_start(recipe_for(**SEVEN))


def test_a_model_of_no_stated_size_is_counted(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "tiny_model_folder", lambda: llama)
    check_hopeless_start(recipe_for("builtin:tiny", quantization=SEVEN["quantization"]))
    check_hopeless_start(recipe_for(llama, quantization=SEVEN["quantization"]))
    monkeypatch.setattr(loading, "LARGEST_QUANTIZED_ON_CPU", 1000)
    recipe = recipe_for(llama, quantization={"load_in_8bit": True})
    assert "needs a CUDA GPU" in refusal(lambda: check_hopeless_start(recipe))


def test_another_model_on_the_command_line_does_not_inherit_the_stated_size(tmp_path: Path) -> None:
    path = tmp_path / "seven.yaml"
    path.write_text("about: {parameters: 7.2B}\nmodel: {name_or_path: some/model}\n")
    assert load_recipe(path, ["training.seed=1"]).about.parameter_count() == 7_200_000_000
    assert load_recipe(path, ["model.name_or_path=some/other"]).about.parameter_count() is None
    stated = load_recipe(path, ["model.name_or_path=some/other", "about.parameters=0.5B"])
    assert stated.about.parameter_count() == 500_000_000
