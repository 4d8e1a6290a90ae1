"""A merged model in llama.cpp: asked with one user message, it answers with the tokens that transformers gives.

Needs `pip install llama-cpp-python gguf` (a build of C++ where there is no wheel); elsewhere it is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sevpeft.modeling.loading import resolve_model
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.merge import merge
from tests.models import CHAT_TEMPLATES
from tests.sharing.conftest import tensors

gguf: Any = pytest.importorskip("gguf")
llama_cpp: Any = pytest.importorskip("llama_cpp")
QUESTION = "عندي صداع شديد"


def write_gguf(folder: Path, file: Path) -> None:
    """What convert_hf_to_gguf.py writes of a Qwen2 whose tokenizer it knows: it refuses one that is trained here."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    unused = [f"[PAD{number}]" for number in range(len(tokens), config["vocab_size"])]
    kinds = dict.fromkeys((token["content"] for token in state["added_tokens"]), gguf.TokenType.CONTROL)
    kinds |= dict.fromkeys(unused, gguf.TokenType.UNUSED)
    writer.add_token_list(tokens + unused)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens + unused])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, value in tensors(folder).items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_cpp_gives_the_first_twenty_tokens_of_the_merged_model(
    made_run: Callable[..., Run], tmp_path: Path
) -> None:
    for name, settings in {
        "plain": {"prompt": {"system": "أنت طبيب.", "strip_marks": True}},
        "chat": {"prompt": {"chat": True, "system": "أنت طبيب."}, "chat_template": CHAT_TEMPLATES["chatml"]},
    }.items():
        run, folder = made_run("qwen2", name=name, size=0.2, **settings), tmp_path / f"merged {name}"
        merge(run, folder, dtype="float32")
        write_gguf(folder, tmp_path / f"{name}.gguf")
        ids = resolve_model(load_recipe(run.folder / "recipe.yaml")).prompt.prompt_ids([QUESTION])[0]
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        made = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
        served = llama_cpp.Llama(str(tmp_path / f"{name}.gguf"), n_ctx=256, logits_all=True, verbose=False)
        served.create_chat_completion([{"role": "user", "content": QUESTION}], temperature=0.0, max_tokens=21)
        assert served.input_ids[: served.n_tokens].tolist() == ids + made and len(made) == 20, name
