"""What was merged answers as base + adapter did, is proven to, and stands in its folder whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sevpeft.modeling.loading
import sevpeft.sharing.merge
from sevpeft.errors import ModelError, RunError
from sevpeft.modeling.loading import Precision, load_model
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.card import write_card
from sevpeft.sharing.merge import merge, merge_in_place
from tests.models import ARCHITECTURES, CHAT_TEMPLATES
from tests.sharing.conftest import config_of, tensors

MadeRun = Callable[..., Run]
IDS = torch.arange(4, 60)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def base_of(run: Run) -> Path:
    return Path(load_recipe(run.folder / "recipe.yaml").model.name_or_path)


def with_adapter(run: Run, dtype: torch.dtype = torch.float32) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(run), dtype=dtype), run.adapter)


def merged_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def refusal(run: Run, output: Path, **options: Any) -> str:
    before = sorted(output.parent.rglob("*"))
    with pytest.raises((ModelError, RunError)) as caught:
        merge(run, output, **options)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500
    assert sorted(output.parent.rglob("*")) == before
    return text


# The same model


# Of those that are built as Llama is, Qwen3 stands for all.
@pytest.mark.parametrize(
    "architecture", [one for one in ARCHITECTURES if one not in ("llama", "mistral", "qwen2", "jais2")]
)
def test_the_merged_model_answers_as_base_and_adapter(made_run: MadeRun, tmp_path: Path, architecture: str) -> None:
    run = made_run(architecture)
    found = merge(run, tmp_path / "merged")
    expected = logits(with_adapter(run))
    again = merged_model(tmp_path / "merged")
    assert torch.allclose(logits(again), expected, atol=2e-5)
    assert float((logits(AutoModelForCausalLM.from_pretrained(base_of(run))) - expected).abs().max()) > 1e-2
    assert again.config.model_type == architecture and found.dtype == "float32"
    gap = found.gaps["unquantized"]
    assert gap.kl < 1e-9 < 1e-5 < found.effect.kl
    assert gap.equal_next_tokens > 0.99 and gap.tokens > 100


VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    "trained tokens": {"trainable_token_indices": [5, 6]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "biases": {"bias": "all"},
}


def test_every_variant_of_lora_is_merged(made_run: MadeRun, tmp_path: Path) -> None:
    for variant, lora in VARIANTS.items():
        run = made_run("qwen2", name=variant, lora=lora)
        output = tmp_path / f"merged {variant}"
        merge(run, output)
        assert torch.allclose(logits(merged_model(output)), logits(with_adapter(run)), atol=2e-5), variant


def test_variants_are_merged_in_16_bit_too(made_run: MadeRun, tmp_path: Path) -> None:
    for variant in ("dora", "whole head", "biases"):
        output = tmp_path / f"merged {variant}"
        found = merge(made_run("qwen2", name=variant, lora=VARIANTS[variant]), output, dtype="bfloat16")
        assert {value.dtype for value in tensors(output).values()} == {torch.bfloat16}
        assert found.gaps["unquantized"].kl < 0.01 * found.effect.kl, variant


def test_a_bias_of_the_adapter_goes_into_the_bias_of_the_base(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("gpt2", lora={"lora_bias": True, "target_modules": ["c_attn"]})
    merge(run, tmp_path / "merged")
    assert torch.allclose(logits(merged_model(tmp_path / "merged")), logits(with_adapter(run)), atol=2e-5)


def test_a_bias_without_a_place_is_refused(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("llama", lora={"lora_bias": True, "target_modules": ["q_proj"]})
    assert "has no bias" in refusal(run, tmp_path / "merged")


def test_a_head_of_its_own_unties_the_embedding(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("gpt2", lora={"modules_to_save": ["lm_head"]})
    assert config_of(base_of(run))["tie_word_embeddings"]
    merge(run, tmp_path / "merged")
    assert not config_of(tmp_path / "merged")["tie_word_embeddings"]
    again = merged_model(tmp_path / "merged")
    assert not torch.equal(again.get_input_embeddings().weight, again.get_output_embeddings().weight)
    assert torch.allclose(logits(again), logits(with_adapter(run)), atol=2e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_embedding_of_a_tied_base_leaves_the_head_alone(
    made_run: MadeRun, tmp_path: Path, dora: bool
) -> None:
    run = made_run("gpt2", lora={"target_modules": ["c_attn", "wte"], "use_dora": dora})
    merge(run, tmp_path / "merged")
    assert not config_of(tmp_path / "merged")["tie_word_embeddings"]
    assert torch.allclose(logits(merged_model(tmp_path / "merged")), logits(with_adapter(run)), atol=2e-5)


def test_what_the_card_is_written_from_is_looked_at_before_anything_slow(
    made_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run()
    monkeypatch.setattr(sevpeft.sharing.merge, "load_model", None)
    for name in ("metrics.json", "environment.json"):
        whole = (run.folder / name).read_text(encoding="utf-8")
        for content in (None, "{", "{}"):
            (run.folder / name).unlink()
            if content is not None:
                (run.folder / name).write_text(content, encoding="utf-8")
            assert "damaged or incomplete" in refusal(run, tmp_path / "merged"), content
            (run.folder / name).write_text(whole, encoding="utf-8")


# A run in 4 or 8 bit


def quantized_base(run: Run, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    recipe = load_recipe(run.folder / "recipe.yaml")
    return load_model(recipe, Precision(dtype, bf16=False, fp16=False))


def trained_model(run: Run, dtype: torch.dtype = torch.float32) -> PeftModel:
    return PeftModel.from_pretrained(quantized_base(run, dtype), run.adapter)


@pytest.mark.parametrize(("architecture", "bits"), [("llama", 4), ("gpt2", 4), ("gemma3_text", 4), ("gpt2", 8)])
def test_a_quantized_run_is_merged_into_the_weights_that_it_was_trained_on(
    made_run: MadeRun, tmp_path: Path, architecture: str, bits: int
) -> None:
    """GPT-2's matrices lie the other way round, and bitsandbytes turns them."""
    run = made_run(architecture, quantization={f"load_in_{bits}bit": True})
    found = merge(run, tmp_path / "merged")
    again = merged_model(tmp_path / "merged")
    assert "quantization_config" not in config_of(tmp_path / "merged") and not hasattr(again, "hf_quantizer")
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    assert (found.weights, found.bits, list(found.gaps)) == ("dequantized", bits, ["unquantized", "dequantized"])
    # In 8 bit the activations are rounded too, which is no matter of weights.
    assert found.gaps["dequantized"].kl < (1e-9 if bits == 4 else found.gaps["unquantized"].kl)
    assert found.gaps["unquantized"].kl > 1e-7
    if bits == 4:
        assert torch.allclose(logits(again), logits(trained_model(run)), atol=2e-5)


def test_unquantized_weights_are_taken_where_they_come_nearer(
    made_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run("llama", quantization={"load_in_4bit": True})
    dequantize = sevpeft.sharing.merge._dequantize_into

    def badly(model: torch.nn.Module, quantized: torch.nn.Module) -> None:
        dequantize(model, quantized)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight *= -1

    monkeypatch.setattr(sevpeft.sharing.merge, "_dequantize_into", badly)
    found = merge(run, tmp_path / "merged")
    assert found.weights == "unquantized"
    norms = {name: value for name, value in tensors(base_of(run)).items() if "lora" not in name and "norm" in name}
    assert all(torch.equal(tensors(tmp_path / "merged")[name], value) for name, value in norms.items())
    assert torch.allclose(logits(merged_model(tmp_path / "merged")), logits(with_adapter(run)), atol=2e-5)


def test_a_run_is_compared_in_the_precision_that_it_was_trained_in(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("llama", quantization={"load_in_4bit": True})
    metrics = run.metrics()
    run.update_metrics(model={**metrics["model"], "dtype": "bfloat16"})
    merge(run, tmp_path / "merged", dtype="float32")
    name = "model.layers.1.mlp.down_proj"
    delta = with_adapter(run).base_model.model.get_submodule(name).get_delta_weight("default")
    base = dequantize_module_weight(quantized_base(run, torch.bfloat16).get_submodule(name)).float()
    other = dequantize_module_weight(quantized_base(run).get_submodule(name))
    merged = tensors(tmp_path / "merged")[f"{name}.weight"]
    assert torch.allclose(merged, base + delta, atol=1e-6) and not torch.allclose(merged, other + delta, atol=1e-6)


def test_a_base_that_is_stored_quantized_is_merged_too(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("llama", quantization={"load_in_4bit": True})
    model = quantized_base(run)
    expected = logits(trained_model(run))
    for file in base_of(run).glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(base_of(run))
    assert "quantization_config" in config_of(base_of(run))
    found = merge(run, tmp_path / "merged", dtype="float32")
    assert found.gaps.keys() == {"dequantized"} and "quantization_config" not in config_of(tmp_path / "merged")
    assert torch.allclose(logits(merged_model(tmp_path / "merged")), expected, atol=2e-5)


def test_the_cards_and_the_run_say_what_the_unquantized_base_means(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("llama", quantization={"load_in_4bit": True})
    card = write_card(run)
    assert "in 4 bit" in card.read_text(encoding="utf-8") and "not measured" in card.read_text(encoding="utf-8")
    found = merge(run, tmp_path / "merged")
    figure = f"KL {found.gaps['unquantized'].kl:.2g} nats per token"
    assert run.metrics()["unquantized_base"]["effect"]["kl"] == found.effect.kl
    assert figure in card.read_text(encoding="utf-8")
    merged_card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert merged_card.count(figure) == 2  # what was not merged, and what vLLM would serve
    card.write_text("mine", encoding="utf-8")
    merge(run, tmp_path / "again")
    assert card.read_text(encoding="utf-8") == "mine"


def test_the_python_of_the_card_loads_the_model_that_was_trained(
    made_run: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where it is there, bitsandbytes' own kernel refuses matrices as small as the toy's.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    for name, quantization in {"plain": {}, "four": {"load_in_4bit": True}, "eight": {"load_in_8bit": True}}.items():
        run = made_run("llama", name=name, quantization=quantization)
        code = write_card(run).read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
        AutoTokenizer.from_pretrained(base_of(run)).save_pretrained(run.adapter)
        names: dict[str, Any] = {}
        exec(code.replace("ADAPTER", str(run.adapter)), names)
        assert torch.allclose(logits(names["model"]), logits(trained_model(run)), atol=2e-5), name


def test_where_the_data_is_gone_bundled_consultations_are_asked(made_run: MadeRun, tmp_path: Path) -> None:
    assert merge(made_run(), tmp_path / "own").rows == "rows of the run's data"
    run = made_run(name="other", data={"path": str(tmp_path / "gone.csv")})
    found = merge(run, tmp_path / "merged")
    assert found.rows.startswith("bundled consultations") and found.effect.tokens > 100


def test_each_matrix_is_rounded_once(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("llama")
    merge(run, tmp_path / "merged", dtype="bfloat16")
    base, adapter, merged = tensors(base_of(run)), tensors(run.adapter), tensors(tmp_path / "merged")
    name = "model.layers.0.mlp.down_proj"
    delta = adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"] * 2
    exact = base[f"{name}.weight"].bfloat16().float() + delta
    assert torch.equal(merged[f"{name}.weight"], exact.bfloat16())
    twice = base[f"{name}.weight"].bfloat16() + delta.bfloat16()
    assert not torch.equal(merged[f"{name}.weight"], twice)


def test_auto_is_the_precision_that_the_base_is_stored_in(made_run: MadeRun, tmp_path: Path) -> None:
    for stored in (torch.bfloat16, torch.float16):  # float32 is that of every other test
        run = made_run("llama", name=f"of {stored}")
        AutoModelForCausalLM.from_pretrained(base_of(run), dtype=stored).save_pretrained(base_of(run))
        output = tmp_path / f"merged {stored}"
        found = merge(run, output)
        assert {value.dtype for value in tensors(output).values()} == {stored}
        assert f"torch.{found.dtype}" == str(stored) and config_of(output)["dtype"] == found.dtype


def test_without_a_word_in_the_config_the_weights_tell_the_precision(made_run: MadeRun, tmp_path: Path) -> None:
    for quantized in (True, False):
        run = made_run("llama", name=f"run {quantized}", quantization={"load_in_4bit": quantized})
        AutoModelForCausalLM.from_pretrained(base_of(run), dtype=torch.float16).save_pretrained(base_of(run))
        config = config_of(base_of(run))
        config.pop("dtype")
        (base_of(run) / "config.json").write_text(json.dumps(config))
        assert merge(run, tmp_path / f"merged {quantized}").dtype == "float16"


# Refused


def test_an_adapter_that_rounding_takes_away_is_refused(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("llama", size=2e-4)
    text = refusal(run, tmp_path / "merged", dtype="bfloat16")
    assert "in bfloat16" in text and "--dtype float32" in text
    assert merge(run, tmp_path / "merged", dtype="float32").gaps["unquantized"].kl < 1e-9


def test_a_merging_that_went_wrong_is_refused(
    made_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def badly(model: PeftModel) -> tuple[torch.nn.Module, int]:
        merged, count = merge_in_place(model)
        with torch.no_grad():
            merged.lm_head.weight *= -1
        return merged, count

    run = made_run("llama")
    monkeypatch.setattr(sevpeft.sharing.merge, "merge_in_place", badly)
    assert "use it as an adapter" in refusal(run, tmp_path / "merged")


def test_what_was_written_without_a_weight_is_refused(
    made_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sevpeft.sharing.merge._write_model

    def lacking(*arguments: Any) -> None:
        real(*arguments)
        weights = load_file(arguments[3] / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, arguments[3] / "model.safetensors", metadata={"format": "pt"})

    run = made_run("llama")
    monkeypatch.setattr(sevpeft.sharing.merge, "_write_model", lacking)
    assert "model.norm.weight" in refusal(run, tmp_path / "merged")


def test_a_weight_that_is_no_number_is_refused(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("llama")
    for value, dtype, message in (
        (math.nan, "auto", "not finite"),
        (math.inf, "auto", "not finite"),
        (1e6, "float16", "layers.1.self_attn.v_proj"),
    ):
        weights = load_file(run.adapter / "adapter_model.safetensors")
        weights["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][2, 1] = value
        save_file(weights, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        assert message in refusal(run, tmp_path / "merged", dtype=dtype), value


def test_a_run_without_an_adapter_is_refused(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run()
    (run.adapter / "adapter_model.safetensors").unlink()
    assert "There is no adapter in" in refusal(run, tmp_path / "merged")


def test_an_output_that_exists_is_left_alone(
    made_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run()
    monkeypatch.setattr(sevpeft.sharing.merge, "load_model", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        assert "exists already" in refusal(run, tmp_path / name)


# Whole or not at all


@pytest.mark.parametrize("error", [OSError(28, "No space left on device")])
def test_a_failure_while_it_is_written_leaves_nothing(
    made_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    run = made_run()

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sevpeft.sharing.merge, "write_merged_card", failing)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((KeyboardInterrupt, RunError), match=r"No space is left|^$"):
        merge(run, tmp_path / "merged")
    assert sorted(tmp_path.rglob("*")) == before


# The folder


def test_the_folder_holds_all_that_a_server_needs_and_names_no_folder_of_this_machine(
    made_run: MadeRun, tmp_path: Path
) -> None:
    run = made_run("qwen3", chat_template=CHAT_TEMPLATES["chatml"], prompt={"chat": True, "system": "أنت طبيب."})
    (base_of(run) / "LICENSE").write_text("as you like")
    output = tmp_path / "merged"
    found = merge(run, output, max_shard_size="100KB")
    names = {file.name for file in output.iterdir()}
    shards = {name for name in names if name.startswith("model-")}
    assert len(shards) > 1 and "model.safetensors.index.json" in names
    assert names - shards == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("model.safetensors.index.json", "README.md", "Modelfile", "LICENSE"),
    }
    assert found.bytes > sum((output / name).stat().st_size for name in shards)
    os.umask(mask := os.umask(0))
    for file in output.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file.name
        for word in (str(tmp_path), str(Path.home()), os.environ["SEVPEFT_CACHE"]):
            assert word.encode() not in file.read_bytes(), file.name
    assert config_of(output)["use_cache"] is True  # the training switches it off
    tokenizer = AutoTokenizer.from_pretrained(output)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ألم"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nأنت طبيب.<|im_end|>") and text.endswith("<|im_start|>assistant\n")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(output).eos_token_id == [0, end]
    # Asked with the prompt of the training.
    assert (output / "Modelfile").read_text(encoding="utf-8") == (
        'FROM ./model-q4_k_m.gguf\nTEMPLATE """<|im_start|>system\nأنت طبيب.<|im_end|>\n<|im_start|>user\n{{ .Prompt }}'
        '<|im_end|>\n<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n'
        "PARAMETER num_predict 128\nPARAMETER top_p 1\nPARAMETER top_k 0\nPARAMETER repeat_penalty 1\n"
        "PARAMETER repeat_last_n -1\n"
    )
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "transformers" and card.data.license is None
    assert "Not a medical device" in card.text
    assert f"KL {found.effect.kl:.2g} nats per token" in card.text
    assert f"KL {found.gaps['unquantized'].kl:.2g} nats per token" in card.text
    assert "vllm serve BASE --enable-lora --lora-modules severity=RUN/adapter --max-lora-rank 8" in card.text
    assert "python convert_hf_to_gguf.py OUTPUT --outfile OUTPUT/model.gguf --outtype f32" in card.text


def test_the_card_names_a_base_of_the_hub_with_its_license(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("llama", about={"license": "LFM 1.0"}, quantization={"load_in_4bit": True})
    found = merge(run, tmp_path / "merged")
    recipe = load_recipe(run.folder / "recipe.yaml")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": "LiquidAI/LFM2-350M"})})
    figures = asdict(found) | {"base": "LiquidAI/LFM2-350M"}
    sevpeft.sharing.merge.write_merged_card(run, recipe, figures, tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("LiquidAI/LFM2-350M", "finetune")
    assert (card.data.license, card.data.license_name) == ("other", "lfm-1.0")
    assert "the dequantized base" in card.text and "merged into the unquantized base instead" in card.text


def test_the_toy_model_is_merged_too(made_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run("llama")
    toy, text = base_of(run), (run.folder / "recipe.yaml").read_text(encoding="utf-8")
    (run.folder / "recipe.yaml").write_text(text.replace(str(toy), "builtin:tiny"), encoding="utf-8")
    monkeypatch.setattr(sevpeft.modeling.loading, "tiny_model_folder", lambda: toy)
    found = merge(run, tmp_path / "merged")
    assert found.base == "builtin:tiny" and found.matrices == 14
    assert "# builtin:tiny: severity-weighted, merged" in (tmp_path / "merged" / "README.md").read_text(
        encoding="utf-8"
    )


def test_a_merged_model_that_answers_without_numbers_is_refused(made_run: MadeRun, tmp_path: Path) -> None:
    run = made_run("llama")
    weights = tensors(base_of(run))
    weights["model.norm.weight"] *= 1e6
    save_file(weights, base_of(run) / "model.safetensors", metadata={"format": "pt"})
    assert "merge with --dtype float32" in refusal(run, tmp_path / "merged", dtype="float16")
