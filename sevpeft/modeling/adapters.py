"""A recipe's `lora` section as a PEFT configuration, checked against the model, and how an adapter is written."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from sevpeft.errors import ModelError, first_sentence
from sevpeft.modeling.compat import on_meta_device
from sevpeft.recipe import Recipe
from sevpeft.runs import write_atomically


def lora_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """LoRA settings of the recipe for a causal language model.

    Raises:
        ModelError: PEFT refuses the combination, alone or with this model, or a module that is named does not exist.
    """
    config = named_config(recipe, model)
    with on_meta_device():  # so that PEFT refuses here and not inside the trainer
        add_empty_adapter(AutoModelForCausalLM.from_config(copy.deepcopy(model.config)), config)
    return config


def named_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """LoRA settings of the recipe, all names of which are in the model; PEFT has not seen the two together yet.

    Raises:
        ModelError: PEFT refuses the settings, or a module that is named does not exist.
    """
    settings = recipe.lora.settings()
    with _peft_errors(model):
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        _check_names(config, model)
    if config.trainable_token_indices and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        raise ModelError(
            f"lora.trainable_token_indices does not work with {model.config.model_type}, whose embedding is its head "
            "too, because TRL reads that matrix directly; train all of it with lora.modules_to_save."
        )
    return config


def add_empty_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """A model without numbers (on the meta device, or of fake tensors) with its adapter, in float32.

    Raises:
        ModelError: PEFT refuses the two together.
    """
    config = copy.deepcopy(config)
    if config.init_lora_weights != "orthogonal":
        config.init_lora_weights = False  # what starts from the base weights would need them
    with _peft_errors(model):
        adapted = get_peft_model(model, config)
    cast_trained(adapted)
    return adapted


@contextmanager
def _peft_errors(model: PreTrainedModel) -> Iterator[None]:
    """Translates what PEFT raises about the `lora` section."""
    try:
        yield
    except (ValueError, TypeError, ImportError, IndexError, KeyError, re.error) as error:
        remedy = "; write lora.exclude_modules=[out_proj,conv1d]" if "Mamba-based" in str(error) else ""
        raise ModelError(
            f"PEFT refuses the lora section for {model.config.model_type}: {first_sentence(error)}{remedy}."
        ) from error


def _check_names(config: LoraConfig, model: PreTrainedModel) -> None:
    """Raises ModelError for a name that the model does not have, with those that it has.

    PEFT passes over such a name: a typo leaves a matrix untrained, or a layer at the common rank, without a word.
    """
    kind = model.config.model_type
    modules = [name for name, _ in model.named_modules()]
    weights = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if hasattr(part, "weight")}
    parameters = [name for name, _ in model.named_parameters()]
    for setting in (
        *("target_modules", "modules_to_save", "exclude_modules"),
        *("rank_pattern", "alpha_pattern", "target_parameters"),
    ):
        wanted = getattr(config, setting)
        if not wanted or wanted == "all-linear":
            continue
        names = parameters if setting == "target_parameters" else modules
        if isinstance(wanted, str):
            absent = [] if any(re.fullmatch(wanted, name) for name in names) else [wanted]
        elif setting.endswith("pattern"):  # matched as PEFT does (0.21, peft.utils.other.get_pattern_key)
            absent = [key for key in wanted if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)]
        else:
            absent = [key for key in wanted if not any(name == key or name.endswith(f".{key}") for name in names)]
        if absent:
            existing = weights if names is modules else {".".join(name.split(".")[-2:]) for name in parameters}
            raise ModelError(
                f"lora.{setting} names {', '.join(sorted(absent))}, which {kind} does not have; "
                f"it has {', '.join(sorted(existing))}{', or use all-linear' if setting == 'target_modules' else ''}."
            )
    layers, count = config.layers_to_transform, model.config.get_text_config().num_hidden_layers
    asked = [] if layers is None else [layers] if isinstance(layers, int) else layers
    if beyond := [str(number) for number in asked if not 0 <= number < count]:
        raise ModelError(
            f"lora.layers_to_transform names {', '.join(beyond)}, and {kind} has the layers 0 to {count - 1}; name "
            "some of them."
        )


def trainable_parameters(model: PeftModel) -> tuple[int, int]:
    """(trainable, all) parameters, counting a 4-bit weight as the numbers it stands for."""
    trainable, total = model.get_nb_trainable_parameters()
    return int(trainable), int(total)


def cast_trained(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Gives what is trained one number format, whatever a library made it in."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def cast_adapter_to_compute_dtype(adapter: Path, config: LoraConfig) -> None:
    """Rounds A and B of a saved adapter that was trained under bfloat16 autocast to bfloat16: half the file.

    Autocast rounds both at every use, so that to the bit nothing changes; float32 is for the updates between steps and
    stays in the checkpoints. What autocast does not round stays whole: magnitudes and norms of DoRA, biases, modules
    that are trained whole.

    Args:
        config: with which it was trained.
    """
    if config.use_dora or config.target_parameters:
        return
    path = adapter / SAFETENSORS_WEIGHTS_NAME
    rounded = {
        name: tensor.bfloat16() if re.search(r"\.lora_[AB]\.weight$", name) else tensor
        for name, tensor in load_file(path).items()
    }
    temporary = path.with_name(f"{path.name}.tmp")
    save_file(rounded, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def sort_target_modules(adapter: Path) -> None:
    """Writes `target_modules` of a saved adapter in alphabetical order.

    PEFT keeps them in a set, whose order changes from process to process, so that two equal runs would differ.
    """
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", shared=True)
