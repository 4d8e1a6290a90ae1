"""Turns the `lora` section into a PEFT configuration, and says what of a model it will train."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import dora
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sevpeft.errors import ModelError, first_sentence
from sevpeft.modeling.sharding import on_paper
from sevpeft.modeling.targets import refuse_unmatched
from sevpeft.recipe import CHANGING_THE_BASE, Recipe


def lora_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """LoRA settings of the recipe for a causal language model.

    Raises:
        ModelError: PEFT refuses the combination, alone or with this model, or a module that is named does not exist.
    """
    config = named_config(recipe, model)
    with on_paper():
        copied = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    adapted_on_paper(config, copied)  # so that PEFT refuses here and not inside the trainer
    return config


def named_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """LoRA settings of the recipe, whose names were looked up in the model; PEFT has not seen the two together yet.

    Raises:
        ModelError: PEFT refuses the settings, or a module that is named does not exist.
    """
    settings = recipe.lora.settings()
    start = settings.get("init_lora_weights")
    if start in ("corda", "lora_ga"):
        raise ModelError(
            f"lora.init_lora_weights={start} needs a pass over the data before training, which is not made here, so it "
            "would start like plain LoRA; leave it out, or use eva."
        )
    if start == "loftq":
        settings["init_lora_weights"] = True  # what it starts from is put in its place once the adapter is there
    with _plainly(model):
        if start == "eva":
            # It concerns models that are larger on the CPU than the GPU; the trainer puts the adapter on itself.
            warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage")
            settings["eva_config"] = EvaConfig(**(settings.get("eva_config") or {}))
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        if config.trainable_token_indices and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
            raise ModelError(
                f"lora.trainable_token_indices does not work with {model.config.model_type}, whose embedding is "
                "its head too, because TRL reads that matrix directly; train all of it with lora.modules_to_save."
            )
        for setting in ("target_modules", "modules_to_save"):
            _refuse_absent(setting, getattr(config, setting), model)
        refuse_unmatched(config, model)
    return config


def adapted_on_paper(config: LoraConfig, model: PreTrainedModel) -> PeftModel:
    """A model without weights (PyTorch's meta device) with its adapter, in whatever number format PEFT makes it.

    Raises:
        ModelError: PEFT refuses the two together, or would fail at the first step.
    """
    config, start = copy.deepcopy(config), config.init_lora_weights
    config.eva_config = None
    if start != "orthogonal":
        config.init_lora_weights = False  # what starts from the base weights would need them
    with on_paper(), _plainly(model), _packed_norms_on_paper():
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if start == "olora" and any(isinstance(getattr(part, "base_layer", None), Conv1D) for part in adapted.modules()):
        # PEFT 0.21 takes its matrices for a Linear's, which lie the other way round, and the first step fails.
        raise ModelError(
            f"lora.init_lora_weights=olora does not work with {model.config.model_type}, whose matrices lie the other "
            "way round (Conv1D); use pissa or true."
        )
    return adapted


@contextmanager
def _packed_norms_on_paper() -> Iterator[None]:
    """DoRA starts from the norms of the unpacked base weights, and packed ones without numbers cannot be unpacked."""
    unpack = dora.dequantize_module_weight
    dora.dequantize_module_weight = lambda module: torch.empty(module.weight.shape)
    try:
        yield
    finally:
        dora.dequantize_module_weight = unpack


@contextmanager
def _plainly(model: PreTrainedModel) -> Iterator[None]:
    """Turns what PEFT raises about the `lora` section into ModelError."""
    try:
        yield
    except (ValueError, TypeError, ImportError, IndexError, KeyError, re.error) as error:
        remedy = "; write lora.exclude_modules=[out_proj,conv1d]" if "Mamba-based" in str(error) else ""
        raise ModelError(
            f"PEFT refuses the lora section for {model.config.model_type}: {first_sentence(error)}{remedy}."
        ) from error


def _refuse_absent(setting: str, wanted: str | list[str] | set[str] | None, model: PreTrainedModel) -> None:
    """PEFT is content when one of the names exists, so that a slip of the pen trains a part in silence."""
    if wanted is None or wanted == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(wanted, str):  # a regular expression
        absent = [] if any(re.fullmatch(wanted, name) for name in names) else [wanted]
    else:
        absent = sorted(t for t in wanted if not any(name == t or name.endswith(f".{t}") for name in names))
    if absent:
        matrices = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
        existing = sorted({name.rsplit(".", 1)[-1] for name in matrices})
        raise ModelError(
            f"lora.{setting} names {', '.join(absent)}, which {model.config.model_type} does not have; "
            f"it has {', '.join(existing)}{', or use all-linear' if setting == 'target_modules' else ''}."
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


def write_as_computed(adapter: Path, config: LoraConfig) -> None:
    """Writes A and B of an adapter that was trained under bfloat16 autocast in bfloat16, which halves the file.

    Autocast rounds both at every use, so that what is written is, to the bit, what was trained and validated with;
    float32 is for the updates between steps, and stays in the checkpoints. What autocast does not round stays whole:
    magnitudes and norms of DoRA, biases, modules that are trained whole. PiSSA and OLoRA are differences of larger
    numbers, which rounding would move.

    Args:
        config: with which it was trained.
    """
    if config.use_dora or config.target_parameters or str(config.init_lora_weights).startswith(CHANGING_THE_BASE):
        return
    path = adapter / SAFETENSORS_WEIGHTS_NAME
    tensors = load_file(path)
    rounded = {
        name: tensor.bfloat16() if re.search(r"\.lora_[AB]\.weight$", name) else tensor
        for name, tensor in tensors.items()
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
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
