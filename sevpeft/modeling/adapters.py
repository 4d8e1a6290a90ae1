"""LoRA adapters: a recipe's `lora` section as a PEFT configuration, how an adapter is saved, and put on a base again.

PEFT ignores names in its settings that match nothing, only warns when weights are missing in a saved adapter, and drops
those that have no place. Here each is an error. So is another base model: an instruct model, a merged one and a newer
revision have the same shapes, so the base's own weights are compared.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sevpeft.data.read import look_for_hub
from sevpeft.errors import ModelError, first_sentence, loading_errors
from sevpeft.modeling.loading import resolved_name
from sevpeft.recipe import Recipe
from sevpeft.runs import Run, file_hash, write_atomically

ADAPTER_CONFIG = "adapter_config.json"
# Numbers of each tensor that are looked at: training moves all of a matrix, so the whole gigabytes need not be read.
_LOOKED_AT = 2048


def lora_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """LoRA settings of the recipe; raises ModelError where PEFT refuses them, or the model lacks a name in them."""
    settings = recipe.lora.settings()
    with _peft_errors(model):
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        _check_names(config, model)
    if config.trainable_token_indices and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        # TRL reads the matrix of the head directly.
        raise ModelError("lora.trainable_token_indices train no embedding that is the head; use lora.modules_to_save.")
    return config


def add_empty_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """A model on the meta device with its adapter, in float32; raises ModelError where PEFT refuses the two."""
    config = copy.deepcopy(config)
    if config.init_lora_weights != "orthogonal":
        config.init_lora_weights = False  # what starts from the base weights would need them
    with _peft_errors(model):
        adapted = get_peft_model(model, config)
    cast_trained(adapted)
    return adapted


@contextmanager
def _peft_errors(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError, IndexError, KeyError, re.error) as error:
        remedy = "; write lora.exclude_modules=[out_proj,conv1d]" if "Mamba-based" in str(error) else ""
        kind = model.config.model_type
        raise ModelError(f"PEFT refuses the lora section for {kind}: {first_sentence(error)}{remedy}.") from error


def _check_names(config: LoraConfig, model: PreTrainedModel) -> None:
    """Raises ModelError for a name that the model does not have, with those that it has: a typo trains less."""
    kind, modules = model.config.model_type, dict(model.named_modules())
    weights = {name.rsplit(".", 1)[-1] for name, part in modules.items() if hasattr(part, "weight")}
    parameters = dict(model.named_parameters())
    named = "target_modules modules_to_save exclude_modules rank_pattern alpha_pattern target_parameters"
    for setting in named.split():
        wanted = getattr(config, setting)
        if not wanted or wanted == "all-linear":
            continue
        names = parameters if setting == "target_parameters" else modules
        # A text must match as a whole, a key of a pattern at its end (PEFT 0.21, get_pattern_key), a name literally.
        whole, pattern = isinstance(wanted, str), setting.endswith("pattern")
        expressions = {key: key if whole or pattern else re.escape(key) for key in ([wanted] if whole else wanted)}
        expressions = {key: text if whole else rf"(.*\.)?({text})" for key, text in expressions.items()}
        absent = [key for key, text in expressions.items() if not any(re.fullmatch(text, name) for name in names)]
        if absent:
            existing = weights if names is modules else {".".join(name.split(".")[-2:]) for name in parameters}
            there = ", ".join(sorted(existing)) + ", or use all-linear" * (setting == "target_modules")
            raise ModelError(f"lora.{setting}: {kind} has no {', '.join(sorted(absent))}; it has {there}.")
    layers, count = config.layers_to_transform, model.config.get_text_config().num_hidden_layers
    numbers = [] if layers is None else [layers] if isinstance(layers, int) else layers
    if beyond := [str(number) for number in numbers if not 0 <= number < count]:
        raise ModelError(f"lora.layers_to_transform names {', '.join(beyond)}; {kind} has layers 0 to {count - 1}.")


def cast_trained(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Gives what is trained one number format, whatever a library made it in."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


# A saved adapter.


def cast_adapter_to_compute_dtype(adapter: Path, config: LoraConfig) -> None:
    """Rounds A and B of a saved adapter that was trained under bfloat16 autocast to bfloat16: half the file.

    Autocast rounds both at every use, so that to the bit nothing changes. What it does not round stays whole: all of
    DoRA, biases, modules that are trained whole.
    """
    if config.use_dora or config.target_parameters:
        return
    path = adapter / SAFETENSORS_WEIGHTS_NAME
    weights = load_file(path)
    weights.update({name: weights[name].bfloat16() for name in weights if re.search(r"\.lora_[AB]\.weight$", name)})
    save_file(weights, path.with_suffix(".tmp"), metadata={"format": "pt"})
    path.with_suffix(".tmp").replace(path)


def sort_target_modules(adapter: Path) -> None:
    """Writes `target_modules` of a saved adapter in alphabetical order.

    PEFT keeps them in a set, whose order changes from process to process, so that two equal runs would differ.
    """
    config = read_adapter_config(adapter)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(adapter / ADAPTER_CONFIG, text, shared=True)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Contents of adapter_config.json; raises ModelError where it is not there or cannot be read."""
    try:
        return dict(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise ModelError(f"{folder} has no readable {ADAPTER_CONFIG}; copy it back, or train again.") from None


def adapter_folder(name: str, setting: str) -> Path:
    """The folder of an adapter, here or after its download; UnknownModelError, which names `setting`."""
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    look_for_hub()
    with loading_errors(name, setting=setting):  # weights and tokenizer: nothing that can run
        return Path(snapshot_download(name, allow_patterns=[SAFETENSORS_WEIGHTS_NAME, "*.json", "*.jinja", "*.model"]))


def attach_adapter(base: PreTrainedModel, folder: Path, recipe: Recipe) -> PeftModel:
    """The base model, changed in place, with a saved adapter on it, in evaluation mode.

    Args:
        folder: of the adapter, in that of its run.
        recipe: that the base model was loaded by.

    Raises ModelError: the adapter is damaged, incomplete, or was trained on another base model.
    """
    config = read_adapter_config(folder)
    trained_on = public_name(config.get("base_model_name_or_path") or "a model that it does not name")
    name = public_name(recipe.model.name_or_path)
    misfit = f"The adapter in {folder} was trained on {trained_on} and does not fit {name}"
    remedy = "copy it again, or name its base model in model.name_or_path"
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            saved = set(file.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is found out below, and is an error here
            model = PeftModel.from_pretrained(base, str(folder))
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    except SafetensorError as error:
        raise ModelError(f"The adapter in {folder} is damaged ({first_sentence(error)}); {remedy}.") from error
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, OSError) as error:
        raise ModelError(f"{misfit} ({first_sentence(error)}); {remedy}.") from error
    without_place = {key for key in saved - wanted.keys() if ".lora_" in key}
    for keys, what in ((without_place, "has no place for"), (wanted.keys() - saved, "needs")):
        if keys:
            raise ModelError(f"{misfit}, which {what} {len(keys):,} weights, such as {min(keys)}; {remedy}.")
    check_base_weights(recipe, Run(folder.parent))
    return model.eval()


# What changes the work of an adapter's matrices but neither their names nor shapes; and the rank, to name it plainly.
_UNSEEN = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def init_adapter(recipe: Recipe, model: PeftModel | None = None) -> str:
    """Checks `training.init_adapter`, puts its weights into a model where one is given, and returns their hash.

    Raises ModelError where it is no adapter, is damaged, or has other LoRA settings or another base model.
    """
    name = str(recipe.training.init_adapter)
    folder = adapter_folder(name, "training.init_adapter")
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    theirs, ours = ({**LoraConfig().to_dict(), **one} for one in (read_adapter_config(folder), recipe.lora.settings()))
    if differing := [f"lora.{key}={theirs[key]}" for key in _UNSEEN if theirs[key] != ours[key]]:
        raise ModelError(f"The adapter in {name} has other LoRA settings; write {' '.join(differing)}.")
    try:
        if model is not None:
            check_base_weights(recipe, Run(folder.parent))
            saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
            if others := sorted(saved.keys() ^ wanted.keys()):
                raise ValueError(f"{len(others):,} other matrices, such as {others[0]}")
            set_peft_model_state_dict(model, saved)
        return file_hash(folder / SAFETENSORS_WEIGHTS_NAME)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        remedy = f"copy it again, or write the settings in its {ADAPTER_CONFIG}"
        raise ModelError(f"The adapter in {name} does not fit ({first_sentence(error)}); {remedy}.") from error


# The base's own weights.


def base_fingerprint(recipe: Recipe) -> str:
    """`sha256:…` of every tensor's name, type, shape and first numbers, however they are spread over files.

    The weights have to be at hand, as they are once the model was loaded.
    """
    folder = _base_folder(recipe)
    files = {SAFE_WEIGHTS_NAME}
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        files = set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values())
    parts = []
    for path in files:
        with safe_open(folder / path, framework="pt") as file:
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
    return None if Path(resolved_name(recipe)).is_dir() else _base_folder(recipe).name


def check_base_weights(recipe: Recipe, run: Run) -> None:
    """Raises ModelError when the recipe's base model is not the one that the run was trained on.

    A folder that is no run keeps no fingerprint, and passes.
    """
    stored = run.metrics().get("model", {})
    if not stored.get("fingerprint") or stored["fingerprint"] == base_fingerprint(recipe):
        return
    theirs, ours = public_name(stored["name_or_path"]), public_name(recipe.model.name_or_path)
    commit, remedy = stored.get("commit"), "name the base model that it was trained on in model.name_or_path"
    if theirs == ours:
        remedy = f"set model.revision to {commit} in its recipe.yaml" if commit else "bring the former back"
    raise ModelError(f"{run.folder} was trained on {theirs}, and {ours} has other weights now; {remedy}.")


def _base_folder(recipe: Recipe) -> Path:
    name, revision = resolved_name(recipe), recipe.model.revision
    return Path(name) if Path(name).is_dir() else Path(hf_hub_download(name, CONFIG_NAME, revision=revision)).parent


def public_name(name: str) -> str:
    """A Hub id as it is; of a folder only its last part: cards are published, errors copied into tickets."""
    return Path(name).name if name.startswith(("/", "~", ".")) or Path(name).exists() else name
