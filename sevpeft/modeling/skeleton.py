"""Turns a few numbers of a base model into the model itself, quantised and with its adapter, but without weights.

Everything that memory depends on is then asked of the real modules: which matrices bitsandbytes packs, where PEFT puts
the adapter, what a layer keeps for its gradient. Nothing is downloaded and nothing allocated (PyTorch's meta device).
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from sevpeft.errors import ModelError, UnknownModelError, first_sentence
from sevpeft.modeling.adapters import adapted_on_paper, cast_trained, named_config
from sevpeft.modeling.loading import load_config
from sevpeft.modeling.quantization import check_form
from sevpeft.modeling.sharding import on_paper
from sevpeft.recipe import Recipe

# The name of a layer's parameter: `where` the layers are, the layer's number, and the rest.
_LAYER = re.compile(r"(?P<where>.*?)\.(?P<number>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class BaseConfig:
    """Configuration of a base model and where it comes from: "its config.json" or "the recipe"."""

    config: PretrainedConfig
    origin: str


def base_config(recipe: Recipe) -> BaseConfig:
    """The model's own configuration where it is at hand, else the numbers that the recipe keeps.

    Raises:
        UnknownModelError: neither is there, or they describe no model.
    """
    numbers = recipe.about.config
    try:
        config = load_config(recipe)
    except ModelError as error:
        if numbers is None:
            raise UnknownModelError(str(error)) from error
    else:
        check_form(recipe, config)
        return BaseConfig(config, "its config.json")
    try:
        return BaseConfig(AutoConfig.for_model(**numbers), "the recipe")
    except Exception as error:  # whatever a configuration class raises on numbers that others wrote
        raise UnknownModelError(
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
        ModelError: PEFT refuses the combination, or a module that is named does not exist.
        UnknownModelError: transformers or bitsandbytes cannot make such a model on this machine.
    """
    config = copy.deepcopy(config)
    if layers is not None:
        _keep_layers(config, layers)
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
    except Exception as error:  # whatever the code of a model raises
        raise UnknownModelError(
            f"{recipe.model.name_or_path} cannot be planned with these settings ({first_sentence(error)})."
        ) from error
    model.config.use_cache = False
    adapted = adapted_on_paper(named_config(recipe, model), model)
    cast_trained(adapted)
    return adapted


def layer_count(config: PretrainedConfig) -> int:
    return int(config.get_text_config().num_hidden_layers)


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """One name for each layer, such as full_attention or conv."""
    return list(getattr(config.get_text_config(), "layer_types", None) or ["layer"] * layer_count(config))


def extension(
    config: PretrainedConfig, every_n_layers: int = 1, *, alike: bool = True
) -> tuple[list[int], list[tuple[list[int], float]]]:
    """From which few layers all can be told: its last ones, and some to put before them, with how often these come.

    Layers are told apart by their kind (`layer_types`), and by their place where only every so many are checkpointed.
    The last ones stay, because a step is at its highest in one of them, with what all before it keep. Where those of a
    kind are not `alike`, it is all of them.
    """
    count, kinds = layer_count(config), layer_kinds(config)
    if not alike:
        return list(range(count)), []
    if every_n_layers > 1:
        few = math.lcm(_period(kinds), every_n_layers)
        few = few if 2 * few <= count else count
        return list(range(few)), [(list(range(few)), count / few - 1)] if few < count else []
    last = {kind: layer for layer, kind in enumerate(kinds)}
    start = max(0, min(*last.values(), count - 2))
    return list(range(start, count)), [([kinds.index(kind)], n) for kind, n in Counter(kinds[:start]).items()]


def layers_are_alike(model: PeftModel) -> bool:
    """Whether the adapter is the same in all layers of a kind, so that a few of them can stand for the rest."""
    if model.active_peft_config.layers_to_transform is not None:  # which fewer layers would not have
        return False
    kinds = layer_kinds(model.config)
    trained: dict[tuple[str, int], set[tuple[str, torch.Size]]] = {}
    for name, parameter in model.named_parameters():
        if layer := _LAYER.match(name):
            found = trained.setdefault((layer["where"], int(layer["number"])), set())
            if parameter.requires_grad:
                found.add((layer["rest"], parameter.shape))
    first: dict[tuple[str, str], set[tuple[str, torch.Size]]] = {}
    return all(
        first.setdefault((where, kinds[number] if number < len(kinds) else ""), found) == found
        for (where, number), found in trained.items()
    )


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
