"""Puts a saved adapter onto a base model, or says in one sentence why the two do not belong together.

PEFT only warns when weights of the adapter are missing in its file, and ignores those that it has no place for: the
model would then speak with untrained matrices. A differing name is no reason to refuse, because models are moved
between folders, the cache and the Hub; what decides is whether every weight of the adapter finds its place, and
whether the base's own weights are those that its run was trained on.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from sevpeft.errors import ModelError, first_sentence
from sevpeft.modeling.base_weights import refuse_other_weights, shown_name
from sevpeft.recipe import Recipe
from sevpeft.runs import Run

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Starts of an adapter that move a part of the base weights into it, so that another base stands below it.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Contents of adapter_config.json.

    Raises:
        ModelError: it is not there or cannot be read.
    """
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise ModelError(
            f"{folder} has no {CONFIG} that can be read; train the run again, or copy the file back."
        ) from None


def start_of(config: dict[str, Any]) -> str:
    """How an adapter was started, in small letters: true, gaussian, pissa, olora …"""
    return str(config.get("init_lora_weights", True)).lower()


def attach_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, recipe: Recipe, adapter_name: str = "default"
) -> PeftModel:
    """The base model with a saved adapter on it, in evaluation mode.

    Args:
        model: base model, or a PeftModel that gets one more adapter; changed in place, also when it is refused.
        folder: of the adapter, in that of its run.
        recipe: that the base model was loaded by.
        adapter_name: under which PEFT keeps it.

    Raises:
        ModelError: the adapter is damaged, incomplete, or was trained on another base model.
    """
    base = recipe.model.name_or_path
    config = read_adapter_config(folder)
    saved = _saved_names(folder)
    if start_of(config).startswith("pissa_niter"):
        # The random decomposition is made anew at every load (peft 0.21, `svd_lowrank` without a seed): measured, the
        # logits of a tiny Llama moved by 0.35 between saving and loading.
        raise ModelError(
            f"The adapter in {folder} was started with {start_of(config)}, whose random part is not saved with it, so "
            "that no base model fits it; train it again with lora.init_lora_weights=pissa, which is exact."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is found out below, and is an error here
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=adapter_name)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name)
            wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, OSError) as error:
        raise ModelError(_misfit(folder, config, base, _detail(error))) from error
    missing = sorted(wanted.keys() - saved)
    without_place = sorted(name for name in saved - wanted.keys() if ".lora_" in name)
    if without_place:
        raise ModelError(
            _misfit(folder, config, base, f"it has no {_place(without_place[0])} ({_weights(without_place)})")
        )
    if missing:
        raise ModelError(
            f"The adapter in {folder} lacks {_weights(missing)} that {base} needs, the first at {_place(missing[0])}; "
            "copy it again, or bring back the base model that it was trained on, "
            f"{_shown(config.get('base_model_name_or_path'))}."
        )
    refuse_other_weights(recipe, Run(folder.parent))
    return model.eval()


def _saved_names(folder: Path) -> set[str]:
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except FileNotFoundError:
        raise ModelError(f"There is no {WEIGHTS} in {folder}; finish its run, or copy the file back.") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"The adapter in {folder} is damaged ({first_sentence(error)}); copy it again, or train its run again."
        ) from error


def _misfit(folder: Path, config: dict[str, Any], base: str, detail: str) -> str:
    theirs = _shown(config.get("base_model_name_or_path"))
    if theirs == _shown(base):
        return (
            f"The adapter in {folder} was trained on {theirs}, but {base} is another model now: {detail}; bring back "
            "the one that it was trained on."
        )
    return (
        f"The adapter in {folder} was trained on {theirs} and does not fit {base}: {detail}; name the base model "
        "that it was trained on in model.name_or_path."
    )


def _detail(error: Exception) -> str:
    """The first thing that does not fit, without PEFT's list of all."""
    said = str(error)
    size = re.search(r"size mismatch for (\S+): .*?(\[[\d, ]*\]).*?(\[[\d, ]*\])", said, re.DOTALL)
    if size:
        name, theirs, ours = size.groups()
        return f"{_place(name)} has a weight of {theirs} for one of {ours}"
    if isinstance(error, KeyError):
        return f"{_place(said.strip(chr(39)))} is not in the file"
    if "not found in the base model" in said:
        return "it has no layers of the names that the adapter was trained on"
    return first_sentence(error)


def _place(name: str) -> str:
    """`layers.0.self_attn.q_proj` of a parameter's long name."""
    return re.sub(r"\.(lora_|weight|bias|modules_to_save|token_adapter|trainable_tokens).*", "", _short(name))


def _short(name: str) -> str:
    return re.sub(r"^(base_model\.)?(model\.)?(model\.)?(base_model\.)?", "", name)


def _weights(names: list[str]) -> str:
    return f"{len(names):,} weight{'s' * (len(names) > 1)}"


def _shown(name: Any) -> str:
    return shown_name(name) if isinstance(name, str) and name else "a model that it does not name"
