"""The folder of a merged model: written and read back, and there whole or not at all.

Everything goes into a hidden folder beside it, which gets its name at the end; what an earlier attempt that was killed
has left there is taken away by the next one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from sevpeft.errors import ModelError, RunError, first_sentence
from sevpeft.modeling.loading import resolved_name
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe
from sevpeft.runs import plain_disk_errors

# What a model's folder may hold beside weights, config and tokenizer, and what others need: llama.cpp the SentencePiece
# file, vLLM the processor of a model that also sees, everybody the licence.
BESIDE = ("tokenizer.model", "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt", "NOTICE")
# Tokenizer, config and card.
SMALL_FILES = 64 * 2**20


def refuse_output(output: Path) -> None:
    """Refuses a folder that cannot be written, before anything slow happens.

    Raises:
        RunError: it is a file, is not empty, or cannot be made.
    """
    with plain_disk_errors(output, remedy="choose another OUTPUT"):
        if output.exists() and not output.is_dir():
            raise RunError(f"{output} is a file; name a folder that does not exist yet.")
        if output.is_dir() and any(output.iterdir()):
            raise RunError(f"{output} exists and is not empty; name a folder that does not exist yet.")
        os.rmdir(tempfile.mkdtemp(dir=_existing(output.resolve().parent), prefix=".sevpeft-"))


def refuse_without_room(
    output: Path, config: PretrainedConfig, parameters: int, dtype: torch.dtype, adapter_bytes: int
) -> None:
    """Refuses what does not fit into the free memory or onto the disk.

    Raises:
        ModelError: with both numbers.
    """
    weights = parameters * dtype.itemsize
    text = config.get_text_config()
    # One matrix is held in float32, as a copy and as what is added to it; the largest is one of the feed-forward part.
    matrix = 3 * 4 * text.hidden_size * max(getattr(text, "intermediate_size", None) or 0, 4 * text.hidden_size)
    # Adapter in float32, with whole modules in it where there are some.
    memory, free_memory = weights + matrix + 2 * adapter_bytes, psutil.virtual_memory().available
    disk, free_disk = weights + adapter_bytes + SMALL_FILES, shutil.disk_usage(_existing(output.resolve())).free
    name = str(dtype).removeprefix("torch.")
    if memory > free_memory:
        narrower = "merge with --dtype bfloat16" if dtype == torch.float32 else "close what else runs"
        raise ModelError(
            f"Merging in {name} needs {_gb(memory)} of memory and {_gb(free_memory)} are free; {narrower}, or merge on "
            "a larger machine."
        )
    if disk > free_disk:
        raise ModelError(
            f"The merged model takes {_gb(disk)} and {_gb(free_disk)} are free at {output}; free some, or choose an "
            "OUTPUT on another disk."
        )


def stored_dtype(recipe: Recipe, config: PretrainedConfig, quantised: bool) -> torch.dtype:
    """Precision in which the base model is stored: by its config, else by its weights.

    Args:
        quantised: whether the run's base was; where nothing else is said, bfloat16 is then meant.
    """
    for said in (config, config.get_text_config()):
        if isinstance(getattr(said, "dtype", None), torch.dtype):
            return said.dtype
    files = sorted(Path(resolved_name(recipe)).glob("*.safetensors"))
    if files:
        with safe_open(files[0], framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                dtype = file.get_tensor(key).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.bfloat16 if quantised or recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)


@contextmanager
def merged_folder(output: Path) -> Iterator[Path]:
    """A hidden folder that becomes `output` when everything in it is written, and is removed when anything fails."""
    output = output.resolve()
    made = [parent for parent in (output, *output.parents) if not parent.exists()]
    with plain_disk_errors(output, when_full="free some, then merge again", remedy="choose another OUTPUT"):
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        folder = output.parent / f".{output.name}.unfinished-{os.getpid()}"
        try:
            folder.mkdir()
            yield folder
            for file in folder.iterdir():
                file.chmod(0o666 & ~_umask())  # safetensors writes for its owner alone, and a server is another user
            folder.replace(output)  # POSIX: also onto an empty folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made[1:]:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            raise


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    recipe: Recipe,
    config: PretrainedConfig,
    folder: Path,
    max_shard_size: str,
) -> None:
    """Weights, config, generation settings, tokenizer, and the base's own small files.

    Args:
        config: of the base model as it is stored.
    """
    # Switched off for training; in a published config it would make generation quadratic.
    model.config.use_cache = getattr(config, "use_cache", True)
    model.generation_config = _generation_config(model.generation_config, prompt)
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"The merged model cannot be written ({first_sentence(error)}).") from error
    name = resolved_name(recipe)
    for beside in BESIDE:
        if not (folder / beside).exists():
            with suppress(OSError):  # the base has no such file
                shutil.copyfile(cached_file(name, beside, revision=recipe.model.revision), folder / beside)


def checksums(model: PreTrainedModel) -> dict[str, int]:
    """CRC-32 of every weight, by its name."""
    return {
        name: zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy())
        for name, value in model.state_dict().items()
    }


def read_back(folder: Path, recipe: Recipe, sums: dict[str, int]) -> PreTrainedModel:
    """The written model, loaded as anyone will load it.

    Args:
        sums: of the model that was written.

    Raises:
        ModelError: it lacks weights, has some that do not belong to it, or others than were written.
    """
    attention = recipe.model.attn_implementation
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=recipe.model.trust_remote_code,
        output_loading_info=True,
        **({"attn_implementation": attention} if attention else {}),
    )
    strange = sorted([*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]])
    if not strange:
        strange = sorted(name for name, found in checksums(model).items() if sums.get(name) != found)
    if strange:
        raise ModelError(
            f"What was written cannot be read back whole ({len(strange)} weights, such as {strange[0]}), so it is not "
            f"kept; please report this for the model type {model.config.model_type}."
        )
    return model.eval()


def _generation_config(theirs: GenerationConfig | None, prompt: Prompt) -> GenerationConfig:
    """The base's settings, with the token that ends a trained answer among those that end generation."""
    config = theirs or GenerationConfig()
    ends = config.eos_token_id
    known = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]
    if prompt.end_id not in known:
        known.append(prompt.end_id)
    config.eos_token_id = known if len(known) > 1 else known[0]
    if config.pad_token_id is None:
        config.pad_token_id = prompt.tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        # Some published settings contradict themselves (a temperature without sampling), and cannot be saved.
        config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
    return config


def _remove_abandoned(output: Path) -> None:
    """Folders of attempts whose process has ended."""
    for folder in output.parent.glob(f".{output.name}.unfinished-*"):
        process = folder.name.rpartition("-")[2]
        if not (process.isdigit() and psutil.pid_exists(int(process))) or int(process) == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.0f} MB"
