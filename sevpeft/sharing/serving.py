"""How a merged model is served: the commands for llama.cpp, Ollama and vLLM, and the prompt that each asks with."""

from __future__ import annotations

import shlex
from typing import Any

from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe

# The ranks that vLLM has kernels for (0.10 and later, `--max-lora-rank`).
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# Stands for the question while the prompt is rendered; no tokenizer has it as a control token.
_QUESTION = "QUESTION-OF-THE-PATIENT"


def modelfile(prompt: Prompt, recipe: Recipe) -> str:
    """Ollama's Modelfile for what `conversion_commands` quantize, which asks with the prompt of the training."""
    # llama.cpp puts the token that begins a text there itself.
    text = prompt.text(_QUESTION).removeprefix(prompt.tokenizer.bos_token or "\0").replace(_QUESTION, "{{ .Prompt }}")
    generation = recipe.generation
    lines = [
        "FROM ./model-q4_k_m.gguf",
        f'TEMPLATE """{text}"""',
        f'PARAMETER stop "{prompt.tokenizer.convert_ids_to_tokens(prompt.end_id)}"',
        f"PARAMETER temperature {generation.temperature if generation.do_sample else 0:g}",
        f"PARAMETER num_predict {generation.max_new_tokens}",
    ]
    return "\n".join(lines) + "\n"


def conversion_commands(folder: str, dtype: str) -> list[str]:
    """Commands that convert the folder for llama.cpp and Ollama, to be run where llama.cpp is.

    Args:
        folder: as the user wrote it, or OUTPUT.
        dtype: of the merged weights.
    """
    here = shlex.quote(folder)
    return [
        f"python convert_hf_to_gguf.py {here} --outfile {here}/model.gguf --outtype {_OUTTYPES[dtype]}",
        f"llama-quantize {here}/model.gguf {here}/model-q4_k_m.gguf Q4_K_M",
        f"ollama create severity -f {here}/Modelfile",
    ]


def adapter_command(base: str, adapter: str, config: dict[str, Any]) -> tuple[str | None, str]:
    """(command, "") that serves the adapter by vLLM, or (None, reason) where vLLM would refuse or misread it.

    Refused: DoRA, modules_to_save, biases, trained tokens. Misread in silence: patterns of rank or alpha, because one
    scale is taken for all layers (vllm/lora/peft_helper.py, lora_weights.py).

    Args:
        base: Hub id or folder.
        adapter: folder of the adapter.
        config: its adapter_config.json.
    """
    settings = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "rank_pattern", "alpha_pattern")
    used = [f"lora.{name}" for name in settings if config.get(name)]
    used += ["lora.bias"] if config.get("bias", "none") != "none" else []
    if used:
        return None, f"vLLM does not read {', '.join(used)} of an adapter: serve the merged model"
    rank = next((known for known in RANKS if known >= config["r"]), None)
    if rank is None:
        return None, f"vLLM reads adapters up to rank {RANKS[-1]}, and this one has {config['r']}: serve the merged one"
    modules = f"severity={shlex.quote(adapter)}"
    return f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules {modules} --max-lora-rank {rank}", ""


def asking(recipe: Recipe) -> str:
    """How a question has to be put to a server, in one sentence."""
    if recipe.prompt.chat:
        system = ", with the system message of the recipe" if recipe.prompt.system else ""
        return (
            f"Ask at /v1/chat/completions{system}; where the chat template knows thinking, send "
            '"chat_template_kwargs": {"enable_thinking": false}.'
        )
    return "Ask at /v1/completions with the prompt of the card, and stop at the token that ends an answer."
