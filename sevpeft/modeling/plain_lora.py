"""Turns an adapter that started from the base's own weights (PiSSA, OLoRA) into plain LoRA for the unchanged base.

Such a start moves B₀A₀ out of the base: W = (W − s·B₀A₀) + s·B₀A₀. What is saved afterwards, B and A alone, fits only a
base that was changed in the same way, which PEFT repeats at every load and vLLM, Ollama and others do not. The same
model is W + s·(BA − B₀A₀), and that is a plain adapter of twice the rank, with A' = [A; A₀] and B' = [B, −B₀]
(arXiv 2404.02948, appendix C). Not so for a quantised base: there what was left of the base was quantised anew.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sevpeft.modeling.saved_adapters import CONFIG, WEIGHTS, read_adapter_config, start_of

# LoftQ is not among them: what it leaves below is a rounded base, not W − s·B₀A₀.
_MOVED = ("pissa", "olora", "corda", "lora_ga")


def starting_factors(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """A₀ and B₀ of an adapter before its training, by the names of the saved file.

    Returns:
        None where the start leaves the base as it is, and for a quantised base.
    """
    config = model.peft_config[model.active_adapter].to_dict()
    base = model.get_base_model()
    if not start_of(config).startswith(_MOVED) or getattr(base, "is_quantized", False):
        return None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        name: value.detach().clone().cpu() for name, value in state.items() if ".lora_A." in name or ".lora_B." in name
    }


def make_plain(folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Rewrites a saved adapter as plain LoRA, in place.

    Args:
        start: as `starting_factors` found them before the training.
    """
    config = read_adapter_config(folder)
    weights = load_file(folder / WEIGHTS)
    for name, first in start.items():
        trained = weights[name]
        sign, axis = (1, 0) if ".lora_A." in name else (-1, 1)
        weights[name] = torch.cat([trained, sign * first.to(trained)], dim=axis).contiguous()
    # The scale stays: alpha/r with both doubled, and for rank stabilisation alpha/√r with alpha times √2.
    grown = math.sqrt(2) if config.get("use_rslora") else 2
    config["init_lora_weights"] = True
    config["r"] *= 2
    config["lora_alpha"] *= grown
    config["rank_pattern"] = {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()}
    config["alpha_pattern"] = {key: grown * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()}
    temporary = folder / f"{WEIGHTS}.tmp"
    save_file(weights, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS)
    (folder / CONFIG).write_text(
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
