"""init writes a recipe that trains: for the model's own layers, its tokenizer, the data's lengths and the memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from sevpeft.modeling.memory import text_targets
from sevpeft.recipe import load_recipe
from sevpeft.training import resolve
from tests.conftest import Cli
from tests.models import ARCHITECTURES, CHAT_TEMPLATES, VOCABULARY, build_tokenizer

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)


def config_folder(folder: Path, architecture: str, chat_template: str | None = None, **numbers: Any) -> Path:
    """A model without weights, which init does not read, and its tokenizer."""
    AutoConfig.for_model(architecture, **numbers).save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def rows_file(folder: Path, *columns: str) -> Path:
    """Twenty consultations, of which one has a question of 40 times the length."""
    texts = {"question": "عندي صداع رقم", "answer": "راجع الطبيب", "severity": "critical"}
    rows = [{"question": texts["question"] + f" {n}" * (200 if n == 7 else 5)} for n in range(200)]
    lines = [json.dumps({name: (texts | row)[name] for name in columns}, ensure_ascii=False) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"


def test_the_recipe_is_for_this_model_data_and_machine_and_says_why(
    sevpeft_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SHAPE | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 5, "vocab_size": VOCABULARY}
    model = config_folder(tmp_path / "m", "llama", CHAT_TEMPLATES["chatml"], **shape)
    data = rows_file(tmp_path, "question", "answer")
    (tmp_path / "recipe.schema.json").touch()
    code, out, err = sevpeft_("init", "--model", model, "--data", data, "--vram", "1.2", "lora.r=4")
    assert (code, err) == (0, "")
    file = tmp_path / "mine.yaml"
    file.write_text(out, encoding="utf-8")
    recipe, (what, needs, command, schema, *_) = load_recipe(file), out.splitlines()
    assert "QLoRA" in what and needs.startswith("# Needs one GPU of 1.2 GB") and "sevpeft train" in command
    assert schema == "# yaml-language-server: $schema=recipe.schema.json" and len(out.splitlines()) < 30
    assert (recipe.model.name_or_path, recipe.data.path) == (str(model), str(data))
    assert recipe.prompt.chat and recipe.severity.source == "rules" and recipe.about.vram_gib == 1.2
    assert recipe.quantization.load_in_4bit and "load_in_4bit: true  # so that it fits" in out
    training, lora = recipe.training.settings(), recipe.lora.settings()
    assert (lora["r"], lora["target_modules"], training["learning_rate"]) == (4, "all-linear", 2e-4)
    # 99 of 100 rows fit; the long one is the exception, and nothing of any row is in the recipe.
    assert training["max_length"] == 128 and "1 questions are shortened" in out
    assert not re.search("[\u0600-\u06ff]", out)
    # On a CPU nothing is quantized, so that it is refused.
    monkeypatch.setattr(resolve, "device_memory", lambda recipe: 10**9)
    code, out, err = sevpeft_("init", "--model", model, "--data", data)
    assert code == 1 and out == "" and "--vram" in err and err.count("\n") == 1


def test_what_is_no_model_no_data_or_no_size_is_refused_in_a_sentence_with_its_remedy(
    sevpeft_: Cli, tmp_path: Path
) -> None:
    small = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, vocab_size=VOCABULARY)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    rows_file(tmp_path, "question")
    for name, numbers in {"t5": {"vocab_size": VOCABULARY}, "bert": small, "vit": {}, "llama": small}.items():
        config_folder(tmp_path / name, name, **numbers)
    wrong, fine = [], "builtin:consultations"
    for model, data, vram, said, left in (
        ("t5", fine, "8", "name a causal model", 1),
        ("bert", fine, "8", "name a causal model", 1),
        ("vit", fine, "8", "name a causal model", 1),
        ("adapter", fine, "8", "training.init_adapter=adapter", 1),
        ("empty", fine, "8", "name one that does", 1),
        ("llama", "rows.jsonl", "8", "has no answer column", 1),
        ("llama", "absent.csv", "8", "no such file", 1),
        ("llama", fine, "much", "--vram", 2),
        ("llama", fine, "nan", "--vram", 2),
    ):
        code, out, err = sevpeft_("init", "--model", model, "--data", data, "--vram", vram)
        if (code, out, err.count("\n")) != (left, "", 1) or said not in err:
            wrong.append((model, data, vram, code, err))
    assert wrong == []


def test_adapters_belong_on_the_matrices_of_the_text_alone() -> None:
    shape = SHAPE | {"vocab_size": VOCABULARY}
    attention, dense = ["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"]
    pictures = r"model\.language_model\..*\.(" + "|".join(sorted(dense + attention)) + ")"
    more = {"phimoe": shape | {"num_local_experts": 2}, "bamba": shape | {"mamba_n_heads": 2, "mamba_d_head": 32}}
    expected: dict[str, Any] = {"phimoe": attention, "gemma3": pictures, "gpt2": "all-linear", "lfm2": "all-linear"}
    expected |= dict.fromkeys(("falcon_h1", "bamba"), sorted([*dense, "in_proj", *attention]))
    more["bamba"] |= {"attn_layer_indices": [1]}
    for name, targets in expected.items():
        config = AutoConfig.for_model(name, **(ARCHITECTURES | more)[name])
        assert text_targets(name, config) == targets, name
