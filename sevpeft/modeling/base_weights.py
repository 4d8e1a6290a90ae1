"""Turns the weights of a base model into a fingerprint, and refuses an adapter that was trained on others.

Shapes tell models apart that were built differently. An instruct model, a merged one and a newer revision have the
shapes of the model that they come from, so that its adapters fit them and are right for none of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from sevpeft.errors import ModelError
from sevpeft.modeling.loading import resolved_name
from sevpeft.recipe import Recipe
from sevpeft.runs import Run

# Numbers of each tensor that are looked at: training moves all of a matrix, so the whole gigabytes need not be read.
_LOOKED_AT = 2048


def base_fingerprint(recipe: Recipe) -> str:
    """`sha256:…` of every tensor's name, type, shape and first numbers, however they are spread over files.

    The weights have to be at hand, as they are once the model was loaded.
    """
    parts = []
    for path in _files(_folder(recipe)):
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
    commit: str | None = extract_commit_hash(str(_folder(recipe) / CONFIG_NAME), None)
    return commit


def refuse_other_weights(recipe: Recipe, run: Run) -> None:
    """Raises ModelError when the recipe's base model is not the one that the run was trained on.

    Runs that keep no fingerprint pass: those of an earlier version, and what is no run at all.
    """
    stored = run.metrics().get("model", {})
    if not stored.get("fingerprint") or stored["fingerprint"] == base_fingerprint(recipe):
        return
    theirs, ours = shown_name(stored["name_or_path"]), shown_name(recipe.model.name_or_path)
    if theirs != ours:
        raise ModelError(
            f"{run.folder} was trained on {theirs}, and {ours} has other weights of the same shapes; name the base "
            "model that it was trained on in model.name_or_path."
        )
    commit = stored.get("commit")
    raise ModelError(
        f"{run.folder} was trained on {theirs}, which has other weights of the same shapes now; "
        + (f"set model.revision to {commit} in {run.folder / 'recipe.yaml'}." if commit else "bring the former back.")
    )


def shown_name(name: str) -> str:
    """A Hub id as it is; of a folder only its last part, since an error is copied into tickets."""
    return Path(name).name if name.startswith(("/", "~", ".")) or Path(name).exists() else name


def _folder(recipe: Recipe) -> Path:
    name = resolved_name(recipe)
    if Path(name).is_dir():
        return Path(name)
    return Path(cached_file(name, CONFIG_NAME, revision=recipe.model.revision or "main")).parent


def _files(folder: Path) -> Iterator[Path]:
    """Those that transformers reads: one file, or those of the index."""
    if (folder / SAFE_WEIGHTS_NAME).exists():
        yield folder / SAFE_WEIGHTS_NAME
    elif (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        yield from (folder / name for name in sorted(set(index["weight_map"].values())))
    else:
        yield from sorted(folder.glob("*.safetensors"))
