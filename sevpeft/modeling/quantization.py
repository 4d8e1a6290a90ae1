"""Refuses a base model whose files are quantized in a form that would be ignored, so that bare numbers were trained on.

transformers 5.24 warns of a method that it does not know, on a screen that is quiet here, and loads the model as if it
were not quantized; of two forms of bitsandbytes it takes that of the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.quantizers import AutoHfQuantizer

from sevpeft.errors import ModelError
from sevpeft.recipe import Recipe


def check_method(name: str, config: PretrainedConfig) -> None:
    """Raises ModelError where transformers does not know how the files are quantized."""
    method = _own(config).get("quant_method")
    if method is not None and not AutoHfQuantizer.supports_quant_method({**_own(config)}):
        raise ModelError(
            f"{name} is quantized by {method!r}, which transformers does not know and takes for unquantized; name the "
            "model before it was quantized."
        )


def check_form(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raises ModelError where the files were written by bitsandbytes in another form than the recipe asks for."""
    own, asked = _own(config), recipe.quantization
    keys = ["load_in_4bit", "load_in_8bit"] if own.get("load_in_4bit") or own.get("load_in_8bit") else []
    if own.get("load_in_4bit"):
        keys += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant"]
    other = [f"quantization.{key}={own[key]}" for key in keys if key in own and own[key] != getattr(asked, key)]
    if other:
        raise ModelError(
            f"The files of {recipe.model.name_or_path} are quantized in another form than the recipe asks for; set "
            f"{' '.join(other).lower()}, or name the model before it was quantized."
        )


def check_scales(name: str, model: torch.nn.Module, unexpected: Iterable[str]) -> None:
    """Raises ModelError where the files hold scales of weights, and nothing multiplies the weights by them.

    NVIDIA's ModelOpt describes them in hf_quant_config.json, which transformers does not read.
    """
    weights = {key for key, _ in model.named_parameters()}
    for key in unexpected:
        module, _, last = key.rpartition(".")
        if "scale" in last and f"{module}.weight" in weights:
            raise ModelError(
                f"{name} is quantized, as {key} shows, and its config.json does not say how; name the model before it "
                "was quantized."
            )


def _own(config: PretrainedConfig) -> dict[str, Any]:
    """quantization_config of config.json, where transformers looks for it; empty where it is none."""
    parts = (config, config.get_text_config(decoder=True))
    found = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), None)
    return found if isinstance(found, dict) else {}
