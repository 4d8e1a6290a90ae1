"""LoRA adapters: builds the PEFT configuration, saves adapters, and attaches saved adapters to a base model.

PEFT ignores setting names that match no module, only warns about weights that a saved adapter lacks, and drops weights
that the model lacks. Here each is an error. A different base model is an error too. An instruct model, a merged model
and a newer revision have the same shapes, so the base weights themselves are compared.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
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

# Values of each tensor that the fingerprint reads. Training changes a whole matrix, so a part of it is enough.
_SAMPLED = 2048
# Weights that autocast rounds at every use, by their names in a saved adapter and, with the adapter's name, in a model.
_ROUNDED = r"\.lora_[AB](\.\w+)?\.weight$"


def lora_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """The recipe's LoRA settings for PEFT. Raises ModelError if PEFT refuses them or the model lacks a named module."""
    settings = recipe.lora.settings()
    with _peft_errors(model):
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        _check_names(config, model)
    if config.trainable_token_indices and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        # TRL reads the weight of the head directly, without the trained rows.
        raise ModelError("lora.trainable_token_indices cannot train a tied embedding; use lora.modules_to_save.")
    return config


def add_empty_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Adds a float32 adapter to a model on the meta device; raises ModelError if PEFT refuses."""
    config = copy.deepcopy(config)
    if config.init_lora_weights != "orthogonal":
        config.init_lora_weights = False  # other initializations read the base weights
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
    """Raises ModelError for a name that the model lacks and lists the existing names: a typo would train less."""
    kind, modules = model.config.model_type, dict(model.named_modules())
    weights = {name.rsplit(".", 1)[-1] for name, part in modules.items() if hasattr(part, "weight")}
    parameters = dict(model.named_parameters())
    named = "target_modules modules_to_save exclude_modules rank_pattern alpha_pattern target_parameters"
    for setting in named.split():
        wanted = getattr(config, setting)
        if not wanted or wanted == "all-linear":
            continue
        names = parameters if setting == "target_parameters" else modules
        if isinstance(wanted, str):  # a regular expression for the full name
            expressions = {wanted: wanted}
        else:  # the end of a name: literal, or a regular expression (PEFT 0.21, get_pattern_key)
            literal = not setting.endswith("pattern")
            expressions = {key: rf"(.*\.)?({re.escape(key) if literal else key})" for key in wanted}
        absent = [key for key, text in expressions.items() if not any(re.fullmatch(text, name) for name in names)]
        if absent:
            existing = weights if names is modules else {".".join(name.split(".")[-2:]) for name in parameters}
            remedy = ", or use all-linear" if setting == "target_modules" else ""
            problem = f"{kind} has no {', '.join(sorted(absent))}"
            raise ModelError(f"lora.{setting}: {problem}; it has {', '.join(sorted(existing))}{remedy}.")
    layers, count = config.layers_to_transform, model.config.get_text_config().num_hidden_layers
    numbers = [] if layers is None else [layers] if isinstance(layers, int) else layers
    if beyond := [str(number) for number in numbers if not 0 <= number < count]:
        raise ModelError(f"lora.layers_to_transform names {', '.join(beyond)}; {kind} has layers 0 to {count - 1}.")


def cast_trained(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Casts all trainable parameters to one dtype; libraries create them in several."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


class CpuDropout(torch.nn.Dropout):
    """Dropout on a CPU, with `p` rounded to 1/65,536.

    PyTorch (2.13) draws a double for each value, on one core: a sixth of a training step. 16 bits take a fifth of that.
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p:
            return values
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: values.numel()].view(values.shape) >= dropped - 2**15
        return (values * kept).mul_(2**16 / (2**16 - dropped))


def use_cpu_dropout(model: torch.nn.Module) -> None:
    """Gives the adapters of a model on a CPU `CpuDropout`; its masks are others than PyTorch's, of the same kind."""
    for dropouts in [module.lora_dropout for module in model.modules() if isinstance(module, LoraLayer)]:
        for name, dropout in dropouts.items():
            if isinstance(dropout, torch.nn.Dropout):
                dropouts[name] = CpuDropout(dropout.p)


# A saved adapter.


def cast_adapter_to_compute_dtype(adapter: Path, config: LoraConfig) -> None:
    """Rounds A and B of a saved adapter to bfloat16, which halves the file; for training under bfloat16 autocast.

    Autocast rounds both at every use, so results stay bit-identical. It does not round DoRA weights, biases and fully
    trained modules, so these keep their precision.
    """
    if config.use_dora or config.target_parameters:
        return
    path = adapter / SAFETENSORS_WEIGHTS_NAME
    weights = load_file(path)
    weights.update({name: weights[name].bfloat16() for name in weights if re.search(_ROUNDED, name)})
    save_file(weights, path.with_suffix(".tmp"), metadata={"format": "pt"})
    path.with_suffix(".tmp").replace(path)


def sort_target_modules(adapter: Path) -> None:
    """Sorts `target_modules` of a saved adapter: PEFT writes a set, in an order that differs between equal runs."""
    config = read_adapter_config(adapter)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(adapter / ADAPTER_CONFIG, text, shared=True)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Contents of adapter_config.json; raises ModelError if it is absent or unreadable."""
    try:
        return dict(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise ModelError(f"{folder} has no readable {ADAPTER_CONFIG}; copy it back, or train again.") from None


def adapter_folder(name: str, setting: str) -> Path:
    """Folder of a local or downloaded adapter. Raises UnknownModelError, which names `setting`."""
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    look_for_hub()
    with loading_errors(name, setting=setting):  # no code, no pickle
        return Path(snapshot_download(name, allow_patterns=[SAFETENSORS_WEIGHTS_NAME, "*.json", "*.jinja", "*.model"]))


def attach_adapter(base: PreTrainedModel, folder: Path, recipe: Recipe, *, keep_float32: bool = False) -> PeftModel:
    """Attaches a saved adapter to the base model of `recipe`, in place, and returns it in evaluation mode.

    `folder`: of the adapter, inside its run folder. Weights stored in bfloat16 compute in it on a bfloat16 base, as
    autocast did in training and validation, unless `keep_float32`. Raises ModelError if the adapter is damaged or
    incomplete, or was trained on another base model.
    """
    config = read_adapter_config(folder)
    trained_on = public_name(config.get("base_model_name_or_path") or "an unnamed model")
    name = public_name(recipe.model.name_or_path)
    misfit = f"The adapter in {folder} was trained on {trained_on} and does not fit {name}"
    remedy = "copy it again, or name its base model in model.name_or_path"
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            saved = set(file.keys())
            stored = {file.get_slice(key).get_dtype() for key in saved if re.search(_ROUNDED, key)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns about is checked below
            model = PeftModel.from_pretrained(base, str(folder))
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        if stored == {"BF16"} and base.dtype == torch.bfloat16 and not (keep_float32 or config.get("use_dora")):
            for name, weight in model.named_parameters():
                if re.search(_ROUNDED, name):
                    weight.data = weight.data.bfloat16()
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


# Settings that change what an adapter computes but not the names and shapes of its weights. The rank is here as well,
# because "lora.r" is a clearer message than a list of shapes.
_UNSEEN = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "trainable_token_indices")


def init_adapter(recipe: Recipe, model: PeftModel | None = None, warn: Callable[[str], None] | None = None) -> str:
    """Checks the adapter of `training.init_adapter`, loads it into `model` if given, and returns its file hash.

    Raises ModelError if it is no adapter or damaged, or has other LoRA settings or another base model. Without its run,
    only names tell the base model; `warn` is called if they differ.
    """
    name = str(recipe.training.init_adapter)
    folder = adapter_folder(name, "training.init_adapter")
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    theirs, ours = ({**LoraConfig().to_dict(), **one} for one in (read_adapter_config(folder), recipe.lora.settings()))
    if differing := [key for key in _UNSEEN if theirs[key] != ours[key]]:
        remedy = " ".join(shlex.quote(f"lora.{key}={json.dumps(theirs[key])}") for key in differing)
        raise ModelError(f"The adapter in {name} has other LoRA settings; write {remedy}.")
    try:
        if model is not None:
            base, named = Path(resolved_name(recipe)).name, Path(theirs["base_model_name_or_path"] or "none").name
            if not check_base_weights(recipe, Run(folder.parent)) and warn and named.lower() != base.lower():
                warn(f"The adapter in {name} names the base model {named}, not {base}; only its shapes are compared.")
            saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
            if others := sorted(saved.keys() ^ wanted.keys()):
                raise ValueError(f"{len(others):,} other weights, such as {others[0]}")
            set_peft_model_state_dict(model, saved)
        return file_hash(folder / SAFETENSORS_WEIGHTS_NAME)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        remedy = f"copy it again, or use the LoRA settings in its {ADAPTER_CONFIG}"
        raise ModelError(f"The adapter in {name} does not fit ({first_sentence(error)}); {remedy}.") from error


# The base's own weights.


def base_fingerprint(recipe: Recipe) -> str:
    """`sha256:…` of every tensor's name, dtype, shape and first values, in local or cached files of any sharding."""
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
                values = lazy[: 1 if len(shape) > 1 else _SAMPLED] if shape else file.get_tensor(name)
                values = values.flatten()[:_SAMPLED].contiguous()
                digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
                parts.append(f"{name} {lazy.get_dtype()} {shape} {digest}")
    return f"sha256:{hashlib.sha256(chr(10).join(sorted(parts)).encode()).hexdigest()}"


def base_commit(recipe: Recipe) -> str | None:
    """Hub commit of the base model; None for a local folder."""
    return None if Path(resolved_name(recipe)).is_dir() else _base_folder(recipe).name


def check_base_weights(recipe: Recipe, run: Run) -> bool:
    """Raises ModelError if the recipe's base model is not the one that the run was trained on; False if unknown."""
    stored = run.metrics().get("model", {})  # empty for an adapter without its run
    if not stored.get("fingerprint") or stored["fingerprint"] == base_fingerprint(recipe):
        return bool(stored.get("fingerprint"))
    theirs, ours = public_name(stored["name_or_path"]), public_name(recipe.model.name_or_path)
    commit, remedy = stored.get("commit"), "set model.name_or_path to the base model of the training"
    if theirs == ours:
        remedy = f"set model.revision to {commit} in its recipe.yaml" if commit else "restore the former weights"
    raise ModelError(f"{run.folder} was trained on {theirs}, but {ours} has other weights; {remedy}.")


def _base_folder(recipe: Recipe) -> Path:
    name, revision = resolved_name(recipe), recipe.model.revision
    return Path(name) if Path(name).is_dir() else Path(hf_hub_download(name, CONFIG_NAME, revision=revision)).parent


def public_name(name: str) -> str:
    """A Hub id unchanged, and only the last part of any other path: cards are published, errors copied into tickets."""
    return name if re.fullmatch(r"(?a)\w[\w.-]*(/[\w.-]+)?", name) and not Path(name).exists() else Path(name).name
