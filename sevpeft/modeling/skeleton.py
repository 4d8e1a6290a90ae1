"""Turns a few numbers of a base model into the model itself, quantised and with its adapter, but without weights.

Everything that memory depends on is then asked of the real modules: which matrices bitsandbytes packs, where PEFT puts
the adapter, what a layer keeps for its gradient. Nothing is downloaded and nothing allocated (PyTorch's meta device).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from sevpeft.errors import ModelError, first_sentence
from sevpeft.modeling.adapters import cast_trained
from sevpeft.modeling.loading import load_config
from sevpeft.modeling.sharding import on_paper
from sevpeft.recipe import Recipe


@dataclass(frozen=True)
class BaseConfig:
    """Configuration of a base model and where it comes from: "its config.json" or "the recipe"."""

    config: PretrainedConfig
    origin: str


def base_config(recipe: Recipe) -> BaseConfig:
    """The model's own configuration where it is at hand, else the numbers that the recipe keeps.

    Raises:
        ModelError: neither is there.
    """
    numbers = recipe.about.config
    try:
        return BaseConfig(load_config(recipe), "its config.json")
    except ModelError:
        if numbers is None:
            raise
    try:
        return BaseConfig(AutoConfig.for_model(**numbers), "the recipe")
    except Exception as error:  # whatever a configuration class raises on numbers that others wrote
        raise ModelError(
            f"about.config of the recipe describes no model that transformers knows ({first_sentence(error)}); copy "
            "the numbers from the model's config.json."
        ) from error


def weightless(
    recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, *, layers: list[int] | None = None
) -> PeftModel:
    """The recipe's model with its adapter on the meta device; quantised matrices are bitsandbytes' own modules.

    Args:
        dtype: of what is not quantised; adapters are float32, as the trainer keeps them.
        layers: numbers of those that it shall have; all by default.

    Raises:
        ModelError: PEFT or bitsandbytes refuse the combination.
    """
    config = copy.deepcopy(config)
    if layers is not None:
        _keep_layers(config, layers)
    lora = recipe.lora.settings() | {"init_lora_weights": False, "eva_config": None}
    try:
        with on_paper():
            attention = recipe.model.attn_implementation
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, **({"attn_implementation": attention} if attention else {})
            )
            quantisation = _quantisation(recipe, dtype)
            if quantisation is not None:
                model = replace_with_bnb_linear(
                    model, modules_to_not_convert=get_keys_to_not_convert(model), quantization_config=quantisation
                )
            model.config.use_cache = False
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora), autocast_adapter_dtype=False)
    except (ValueError, TypeError, ImportError, IndexError, KeyError) as error:
        raise ModelError(
            f"{recipe.model.name_or_path} cannot be planned with these settings ({first_sentence(error)})."
        ) from error
    cast_trained(adapted)
    return adapted


def layer_count(config: PretrainedConfig) -> int:
    return int(config.get_text_config().num_hidden_layers)


def extension(config: PretrainedConfig, every_n_layers: int = 1) -> tuple[list[int], list[tuple[list[int], float]]]:
    """From which few layers all can be told: its last ones, and some to put before them, with how often these come.

    Layers are told apart by their kind (`layer_types`), and by their place where only every so many are checkpointed.
    The last ones stay, because a step is at its highest in one of them, with what all before it keep.
    """
    count = layer_count(config)
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["layer"] * count
    if every_n_layers > 1:
        few = math.lcm(_period(kinds), every_n_layers)
        few = few if 2 * few <= count else count
        return list(range(few)), [(list(range(few)), count / few - 1)] if few < count else []
    last = {kind: layer for layer, kind in enumerate(kinds)}
    start = max(0, min(*last.values(), count - 2))
    return list(range(start, count)), [([kinds.index(kind)], n) for kind, n in Counter(kinds[:start]).items()]


def _period(kinds: list[str]) -> int:
    """After how many layers their kinds repeat: 1 where all are alike, all of them where there is no pattern."""
    count = len(kinds)
    repeats = (step for step in range(1, count) if all(kinds[i] == kinds[i % step] for i in range(count)))
    return next(repeats, count)


def _keep_layers(config: PretrainedConfig, layers: list[int]) -> None:
    """Leaves a configuration some of its layers only."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = len(layers)
    if kinds and "layer_types" in vars(text):  # Falcon-H1's follow from the number of layers
        text.layer_types = [kinds[layer] for layer in layers]


def _quantisation(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    asked = recipe.quantization
    if asked.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not asked.load_in_4bit:
        return None
    storage = asked.bnb_4bit_quant_storage
    settings: dict[str, Any] = {
        "bnb_4bit_quant_storage": "uint8" if storage == "auto" else storage,  # as many bytes in any type
        "bnb_4bit_quant_type": asked.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": asked.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": dtype,
    }
    return BitsAndBytesConfig(load_in_4bit=True, **settings)
