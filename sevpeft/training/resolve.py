"""Resolves a recipe once, before data is read: device, precision, batch split, model config, tokenizer, prompt.

All checks of settings are here, in order. `train` begins with `resolve`. Only the layout of rows is chosen later, by
the loaded model (`with_layout`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel
from trl import SFTConfig

from sevpeft.errors import RecipeError, SevpeftError, UnknownModelError
from sevpeft.modeling.compat import attention_of, weights_are_sharded
from sevpeft.modeling.loading import (
    Precision,
    ResolvedModel,
    check_hopeless_start,
    choose_precision,
    resolve_model,
    uses_gpu,
)
from sevpeft.modeling.memory import GIB, MemoryPlan, base_config, plan_for, usable
from sevpeft.modeling.packing import check_packing, documents_stay_apart
from sevpeft.recipe import AUTO, BEST_IS_LEAST, GLOBAL_BATCH_SIZE, Recipe, recipe_from_values
from sevpeft.runs import Run
from sevpeft.training.compat import CPU_VOCABULARY_TILE, forget_compilation_of_launcher, mixed_precision_of_recipe
from sevpeft.training.distributed import check_sharding


@dataclass(frozen=True)
class ResolvedRun(ResolvedModel):
    """A recipe with everything that a training on this machine derives from it.

    Attributes:
        recipe: with numbers in place of every `auto` but padding_free. given: the original recipe.
        arguments: TRL's settings, made from the recipe.
    """

    given: Recipe
    precision: Precision
    arguments: SFTConfig

    def with_layout(self, model: PreTrainedModel, longest: int) -> ResolvedRun:
        """This run with the layout of rows that the loaded model allows (`choose_layout`)."""
        recipe = choose_layout(self.given, self.recipe, model, longest)
        arguments = sft_config(recipe, self.precision, Path(self.arguments.output_dir))
        return replace(self, recipe=recipe, arguments=arguments)


def resolve(recipe: Recipe, checkpoints: Path, *, resumed: Run | None = None) -> ResolvedRun:
    """Resolves a recipe for a training on this machine.

    `checkpoints`: folder of the trainer's state. `resumed`: the run to resume, whose precision and prompt are used.

    Raises SevpeftError: a setting does not work here.
    """
    precision = choose_precision(recipe, resumed.metrics()["model"]["dtype"] if resumed else None)
    split = split_here(recipe)
    arguments = sft_config(split, precision, checkpoints)
    check_sharding(split, arguments)
    check_hopeless_start(split)
    with PartialState().main_process_first():
        base = resolve_model(split, resumed)
    return ResolvedRun(**vars(base), given=recipe, precision=precision, arguments=arguments)


def sft_config(recipe: Recipe, precision: Precision, checkpoints: Path) -> SFTConfig:
    """SFTConfig of a recipe, with `checkpoints` as output_dir. Raises RecipeError: TRL refuses a value."""
    settings = copy.deepcopy(recipe.training.settings())  # transformers writes into accelerator_config
    if settings.get("auto_find_batch_size") and PartialState().num_processes > 1:
        raise RecipeError("training.auto_find_batch_size needs one process; lower per_device_train_batch_size.")
    if settings.get("activation_offloading") and not uses_gpu(recipe):
        raise RecipeError("training.activation_offloading needs a GPU, and this run has none; leave it out.")
    for key in ("global_batch_size", "init_adapter", "generate_samples"):  # ours, not TRL's
        settings.pop(key, None)
    settings.setdefault("use_cpu", not uses_gpu(recipe))
    settings.update(bf16=precision.bf16, fp16=precision.fp16, output_dir=str(checkpoints), disable_tqdm=True)
    settings["padding_free"] = settings["padding_free"] is True  # auto is False until the model is measured
    if settings["save_total_limit"] == AUTO:  # while it trains; a finished run needs none
        settings["save_total_limit"] = 2
    settings["logging_nan_inf_filter"] = False  # it would hide a NaN loss from StepGuard
    # The trainer computes a batch in parts. The library's own search changes the batch size, and so the training.
    settings["auto_find_batch_size"] = False
    if settings["padding_free"] and not settings.get("packing"):
        # Rows are cut to max_length during encoding. TRL refuses a limit that it does not enforce itself.
        settings["max_length"] = None
    if str(settings.get("metric_for_best_model")).removeprefix("eval_") in BEST_IS_LEAST:
        # transformers takes only names that end in "loss" as better when lower; not so loss_critical.
        settings["greater_is_better"] = False
    if not settings.get("torch_compile"):
        forget_compilation_of_launcher()
    with settings_errors(), mixed_precision_of_recipe(precision.bf16, precision.fp16):
        return SFTConfig(**settings)


@contextmanager
def settings_errors() -> Iterator[None]:
    """Translates errors of TRL and transformers about settings into RecipeError."""
    try:
        yield
    except SevpeftError:
        raise
    except (ValueError, TypeError, ImportError, KeyError, FileNotFoundError, RuntimeError) as error:
        if should_reduce_batch_size(error):
            raise
        message = " ".join(str(error).split())
        message = f"{message} is not known" if isinstance(error, KeyError) else message
        raise RecipeError(f"The training section is refused: {message}") from error


def loraplus_settings(recipe: Recipe) -> dict[str, float]:
    """Arguments of PEFT's `create_loraplus_optimizer` that the recipe sets; empty without LoRA+."""
    names = ("loraplus_lr_ratio", "loraplus_lr_embedding")
    return {name: value for name in names if (value := getattr(recipe.lora, name)) is not None}


def with_training(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with these settings changed in its section `training`."""
    values = recipe.model_dump()
    values["training"].update(changes)
    changed = recipe_from_values(values)
    changed._name = recipe.name
    return changed


# The batch split follows from the memory plan and the device's size, never from a timing or from free memory.

# Fixed cost of a pass in tokens, by whether it runs on a GPU: small matrices leave a device idle, and each pass
# dequantizes 4-bit weights. CPU: 8 rows of 90 tokens took 0.7 of the time of 8 passes (Gemma-3-270M, 2 cores). GPU: an
# assumption.
_PASS_COSTS_TOKENS = {True: 512, False: 40}
# Mean length of a row as a share of max_length (90 of 512 tokens on Arabic consultations), and positions per token in a
# batch of many rows, padded to the longest.
_MEAN_LENGTH, _PADDED = 0.2, 2.5
_CHECKPOINTING_COSTS = 4 / 3
# Share of main memory; the rest is for the operating system, other programs and the libraries.
_USABLE_OF_RAM = 0.6
_EVAL_SIZES = (32, 16, 8, 4, 2, 1)
_LONGEST_ROW = 8192
# Settings that are chosen with the split if the recipe does not set them.
CHOSEN_WITH = ("global_batch_size", "auto_find_batch_size")
_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")


def is_automatic(recipe: Recipe) -> bool:
    """Whether the recipe leaves any part of the batch split to `resolve_split`."""
    settings = recipe.training.settings()
    return AUTO in (*(settings.get(key) for key in _KEYS), settings["per_device_eval_batch_size"])


def split_here(recipe: Recipe) -> Recipe:
    """The recipe with its batch split chosen for the devices of this launch."""
    on_gpu, processes, plan = uses_gpu(recipe), PartialState().num_processes, None
    keys = (_KEYS[0], _KEYS[2], "per_device_eval_batch_size")  # accumulation follows from the rows
    if AUTO in map(recipe.training.settings().get, keys) and not weights_are_sharded():
        with suppress(UnknownModelError):
            plan, _ = memory_plan(recipe, on_gpu=on_gpu)
    available = device_memory(recipe) // (1 if on_gpu else processes)
    return resolve_split(recipe, plan, available, processes=processes, on_gpu=on_gpu)


def resolve_split(
    recipe: Recipe, plan: MemoryPlan | None, available: int, *, processes: int = 1, on_gpu: bool = True
) -> Recipe:
    """The recipe with a number in place of each `auto` of the batch split: the fastest one that fits.

    Args:
        plan: of this recipe. None if its memory is not known, or is sharded by FSDP or ZeRO-3; the split with the least
            memory is then chosen.
        available: bytes that a training may use on one device. processes: of the launch.

    Raises RecipeError: the product of the numbers is not global_batch_size.
    """
    settings = recipe.training.settings()
    rows, accumulation, checkpointing = (settings[key] for key in _KEYS)
    is_open = AUTO in (rows, accumulation)
    product = GLOBAL_BATCH_SIZE if is_open else rows * accumulation * processes
    total = settings["global_batch_size"] or product
    each = total // processes
    divisors = (count for count in range(1, each + 1) if each % count == 0)
    counts = [count for count in divisors if rows in (AUTO, count) and accumulation in (AUTO, each // count)]
    if total % processes or not counts:
        factors = f"{rows} rows × {accumulation} accumulation steps × {processes} processes"
        remedy = "a multiple" if is_open else f"training.global_batch_size={product}"
        raise RecipeError(f"training.global_batch_size={total} is not {factors}; write {remedy}.")
    ways = (False, True) if checkpointing == AUTO else (checkpointing,)
    padded = settings.get("padding_free") is False or recipe.model.attn_implementation == "eager"
    length = _MEAN_LENGTH * (settings["max_length"] or 512)

    def cost(option: tuple[int, bool | None]) -> tuple[float, int]:
        count, checkpointed = option
        waste = 1 + (_PADDED - 1) * (count - 1) / max(each - 1, 1) if padded else 1
        tokens = each // count * (_PASS_COSTS_TOKENS[on_gpu] + count * length * waste)
        return tokens * (_CHECKPOINTING_COSTS if checkpointed is not False else 1), -count

    options = sorted(((count, way) for count in counts for way in ways), key=cost)
    fitting = (option for option in options if plan and plan.total_of_batch(*option) <= available)
    count, way = options[0] if len(options) == 1 else next(fitting, (counts[0], ways[-1]))
    changes: dict[str, Any] = dict(zip(_KEYS, (count, each // count, way), strict=True))
    if settings["per_device_eval_batch_size"] == AUTO:
        sizes = (size for size in _EVAL_SIZES if plan and plan.total_of_validation(size, way) <= available)
        changes["per_device_eval_batch_size"] = next(sizes, min(count, 8))
    if rows == AUTO and processes == 1:
        changes["auto_find_batch_size"] = True  # a chosen batch may be computed in parts if memory runs out
    return with_training(recipe, **changes, global_batch_size=total)


def choose_layout(given: Recipe, resolved: Recipe, model: PreTrainedModel, longest: int) -> Recipe:
    """The resolved recipe, with padding_free chosen by whether the model keeps packed documents apart.

    Args:
        given: the recipe before its split was chosen; if rows must be padded, the split is chosen again.
        longest: tokens of the longest validation row.

    Raises ModelError: the recipe sets packing or padding_free, and the model mixes documents.
    """
    training = resolved.training.settings()
    for setting in ("packing", "padding_free"):
        if training.get(setting) is True:
            check_packing(model, f"training.{setting}")
    if training["padding_free"] == AUTO:
        # Eager attention stores every pair of positions: 8 rows in one have 8 times as many as 8 separate rows.
        possible = not training.get("packing") and attention_of(model.config) != "eager"
        if possible and not weights_are_sharded() and documents_stay_apart(model)[0]:
            resolved = with_training(resolved, padding_free=True)
        else:
            resolved = split_here(with_training(given, padding_free=False))
    if given.training.settings()["per_device_eval_batch_size"] != AUTO:
        return resolved
    settings = resolved.training.settings()
    size = settings["per_device_eval_batch_size"]
    if settings["padding_free"]:
        # The mask of one long row has an entry for each pair of its tokens.
        size = min(size, max(1, _LONGEST_ROW // int(longest)))
    return with_training(resolved, per_device_eval_batch_size=size)


def memory_plan(recipe: Recipe, *, on_gpu: bool = True) -> tuple[MemoryPlan, str]:
    """The memory plan of a recipe on a GPU or a CPU, and the source of its config; raises UnknownModelError."""
    config, origin = base_config(recipe)
    return plan_for(recipe, config, on_gpu=on_gpu, vocabulary_tile=CPU_VOCABULARY_TILE), origin


def device_memory(recipe: Recipe) -> int:
    """Bytes that a training may use of this machine's GPU, or of its main memory if the run uses no GPU."""
    if uses_gpu(recipe):
        return usable(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB)
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container, where psutil shows the memory of the host
    with suppress(OSError, ValueError):  # no such limit
        total = min(total, int(limit.read_text()))
    return round(total * _USABLE_OF_RAM)
