"""A saved adapter on a base model: attached, or refused in one sentence because the two do not belong together.

PEFT only warns when weights of the adapter are missing in its file, and ignores those that it has no place for: the
model would run with untrained matrices in silence. A differing name is no reason to refuse, because models are moved
between folders, the cache and the Hub. What decides is whether every weight of the adapter finds its place, and whether
the base's own weights are those that the run was trained on. Shapes do not tell: an instruct model, a merged one and a
newer revision have the shapes of the model that they come from.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sevpeft.errors import ModelError, first_sentence
from sevpeft.modeling.loading import resolved_name
from sevpeft.recipe import Recipe
from sevpeft.runs import Run

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Numbers of each tensor that are looked at: training moves all of a matrix, so the whole gigabytes need not be read.
_LOOKED_AT = 2048


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
    trained_on = _shown(read_adapter_config(folder).get("base_model_name_or_path") or "a model that it does not name")
    base = _shown(recipe.model.name_or_path)
    saved = _saved_names(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is found out below, and is an error here
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=adapter_name)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name)
            wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, OSError) as error:
        raise ModelError(_misfit(folder, trained_on, base, first_sentence(error))) from error
    if without_place := sorted(name for name in saved - wanted.keys() if ".lora_" in name):
        detail = f"it has no place for {len(without_place):,} weights, such as {without_place[0]}"
        raise ModelError(_misfit(folder, trained_on, base, detail))
    if missing := sorted(wanted.keys() - saved):
        raise ModelError(
            f"The adapter in {folder} lacks {len(missing):,} weights that {base} needs, such as {missing[0]}; "
            f"copy it again, or bring back the base model that it was trained on, {trained_on}."
        )
    check_base_weights(recipe, Run(folder.parent))
    return model.eval()


def _saved_names(folder: Path) -> set[str]:
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return set(file.keys())
    except FileNotFoundError:
        raise ModelError(f"There is no {WEIGHTS} in {folder}; finish its run, or copy the file back.") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"The adapter in {folder} is damaged ({first_sentence(error)}); copy it again, or train its run again."
        ) from error


def _misfit(folder: Path, trained_on: str, base: str, detail: str) -> str:
    return (
        f"The adapter in {folder} was trained on {trained_on} and does not fit {base} as it is now ({detail}); name "
        "the base model that it was trained on in model.name_or_path, or bring it back."
    )


# The base's own weights.


def base_fingerprint(recipe: Recipe) -> str:
    """`sha256:…` of every tensor's name, type, shape and first numbers, however they are spread over files.

    The weights have to be at hand, as they are once the model was loaded.
    """
    parts = []
    for path in _weight_files(_base_folder(recipe)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                lazy = file.get_slice(name)
                shape = lazy.get_shape()
                some = lazy[: 1 if len(shape) > 1 else _LOOKED_AT] if shape else file.get_tensor(name)
                some = some.flatten()[:_LOOKED_AT].contiguous()
                digest = hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).hexdigest()
                parts.append(f"{name} {lazy.get_dtype()} {shape} {digest}")
    return f"sha256:{hashlib.sha256(chr(10).join(sorted(parts)).encode()).hexdigest()}"


def base_commit(recipe: Recipe) -> str | None:
    """The commit on the Hub that the base model was taken from; None for a folder."""
    folder = _base_folder(recipe)
    return folder.name if folder.parent.name == "snapshots" and not Path(resolved_name(recipe)).is_dir() else None


def check_base_weights(recipe: Recipe, run: Run) -> None:
    """Raises ModelError when the recipe's base model is not the one that the run was trained on.

    Runs of an earlier version keep no fingerprint, and pass; so does a folder that is no run.
    """
    stored = run.metrics().get("model", {})
    if not stored.get("fingerprint") or stored["fingerprint"] == base_fingerprint(recipe):
        return
    theirs, ours, commit = _shown(stored["name_or_path"]), _shown(recipe.model.name_or_path), stored.get("commit")
    remedy = (
        "name the base model that it was trained on in model.name_or_path"
        if theirs != ours
        else f"set model.revision to {commit} in {run.folder / 'recipe.yaml'}"
        if commit
        else "bring the former back"
    )
    raise ModelError(
        f"{run.folder} was trained on {theirs}, and {ours} has other weights of the same shapes now; {remedy}."
    )


def _base_folder(recipe: Recipe) -> Path:
    name = resolved_name(recipe)
    if Path(name).is_dir():
        return Path(name)
    return Path(hf_hub_download(name, CONFIG_NAME, revision=recipe.model.revision)).parent


def _weight_files(folder: Path) -> Iterator[Path]:
    """Those that transformers reads: one file, or those of the index."""
    if (folder / SAFE_WEIGHTS_NAME).exists():
        yield folder / SAFE_WEIGHTS_NAME
    elif (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        yield from (folder / name for name in sorted(set(index["weight_map"].values())))
    else:
        yield from sorted(folder.glob("*.safetensors"))


def _shown(name: str) -> str:
    """A Hub id as it is; of a folder only its last part, since an error is copied into tickets."""
    return Path(name).name if name.startswith(("/", "~", ".")) or Path(name).exists() else name
