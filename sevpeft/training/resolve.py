"""Resolves a recipe once, before data is read: device, precision, batch split, model config, tokenizer, prompt.

All checks of settings stand here, in order. `train` begins with `resolve`; nothing after it asks the recipe what is
left to choose, but for the layout of rows, which the loaded model decides (`with_layout`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from sevpeft.errors import RecipeError, RunError, SevpeftError, UnknownModelError, first_sentence
from sevpeft.modeling.compat import requested_engine, weights_are_sharded
from sevpeft.modeling.gpus import changes, usable
from sevpeft.modeling.loading import (
    Precision,
    check_form,
    check_hopeless_start,
    choose_precision,
    load_config,
    load_tokenizer,
    uses_gpu,
)
from sevpeft.modeling.memory import GIB, MemoryPlan, base_config
from sevpeft.modeling.packing import check_packing, documents_stay_apart
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import AUTO, BEST_IS_LEAST, GLOBAL_BATCH_SIZE, Recipe, recipe_from_values
from sevpeft.training.compat import CPU_VOCABULARY_TILE, forget_compilation_of_launcher, mixed_precision_of_recipe
from sevpeft.training.data import prompt_of
from sevpeft.training.distributed import check_sharding
from sevpeft.training.eva import check_eva


@dataclass(frozen=True)
class ResolvedRun:
    """What a training needs to know of its recipe on this machine.

    Attributes:
        recipe: with numbers in place of every `auto` but padding_free. asked: as it was given.
        arguments: TRL's settings, made from the recipe.
    """

    recipe: Recipe
    asked: Recipe
    precision: Precision
    arguments: SFTConfig
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt

    def with_layout(self, model: PreTrainedModel, validation: np.ndarray) -> ResolvedRun:
        """With padding_free chosen by what the model does with packed rows, and validation batches by lengths.

        Args:
            validation: (m,) tokens of the validation rows, longest first.

        Raises:
            ModelError: the recipe asks for packing or padding_free, and the model mixes documents.
        """
        recipe = choose_layout(self.asked, self.recipe, model, validation)
        arguments = sft_config(recipe, self.precision, Path(self.arguments.output_dir))
        check_optimizer(arguments, model)
        return replace(self, recipe=recipe, arguments=arguments)


def resolve(recipe: Recipe, checkpoints: Path, *, dtype_before: str | None = None) -> ResolvedRun:
    """Resolves a recipe for a training on this machine.

    Args:
        checkpoints: folder of the trainer's state. dtype_before: of the run that is resumed.

    Raises:
        SevpeftError: a setting that cannot work here.
    """
    precision = choose_precision(recipe, dtype_before)
    split = split_here(recipe, check_fit=True)
    arguments = sft_config(split, precision, checkpoints)
    check_sharding(split, arguments)
    check_hopeless_start(split)
    check_eva(split)
    with PartialState().main_process_first():
        config = load_config(split)
    check_form(split, config)
    tokenizer = load_tokenizer(split, config)
    return ResolvedRun(split, recipe, precision, arguments, config, tokenizer, prompt_of(split, tokenizer))


def sft_config(recipe: Recipe, precision: Precision, checkpoints: Path) -> SFTConfig:
    """SFTConfig of a recipe.

    Args:
        recipe: its `training` section was checked by name and type; values are checked here, by TRL.
        precision: number formats chosen for the device.
        checkpoints: folder of the trainer's own state.

    Raises:
        RecipeError: a value that TRL or transformers refuse.
    """
    settings = copy.deepcopy(recipe.training.settings())  # transformers writes into accelerator_config
    del settings["global_batch_size"]  # of `resolve_split`, which has made numbers of it
    settings["padding_free"] = settings["padding_free"] is True  # auto: until the model is measured
    settings.update(bf16=precision.bf16, fp16=precision.fp16, output_dir=str(checkpoints))
    settings.setdefault("use_cpu", not uses_gpu(recipe))
    # The filter replaces a NaN loss by the last good one in the log, and nobody notices. The trainer looks itself, and
    # cuts a batch that does not fit in parts: the library's own search makes the step smaller, and so another training.
    settings.setdefault("logging_nan_inf_filter", False)
    settings["auto_find_batch_size"] = False
    settings["disable_tqdm"] = True
    if settings.get("padding_free") and not settings.get("packing"):
        # Rows are cut to max_length while they are encoded; TRL refuses a limit that it would not enforce itself.
        settings["max_length"] = None
    if str(settings.get("metric_for_best_model")).removeprefix("eval_") in BEST_IS_LEAST:
        # transformers looks for "loss" at the end of the name, so that by loss_critical it would keep the worst.
        settings["greater_is_better"] = False
    if recipe.training.settings().get("auto_find_batch_size") and PartialState().num_processes > 1:
        raise RecipeError(
            "training.auto_find_batch_size works on one process only, because the others would wait for the one whose "
            "memory is full; lower training.per_device_train_batch_size, and raise gradient_accumulation_steps for it."
        )
    if settings.get("activation_offloading") and not uses_gpu(recipe):
        raise RecipeError(
            "training.activation_offloading moves activations from a GPU, and this run has none; leave it out."
        )
    if not settings.get("torch_compile"):
        forget_compilation_of_launcher()
    with settings_errors(), mixed_precision_of_recipe(precision.bf16, precision.fp16):
        config = SFTConfig(**settings)
    absent = sorted(set(config.report_to) - set(get_available_reporting_integrations()))
    if absent:
        raise RecipeError(
            f"training.report_to names {', '.join(absent)}, which is not installed: pip install {absent[0]}."
        )
    return config


@contextmanager
def settings_errors() -> Iterator[None]:
    """Turns what TRL and transformers raise about settings, in SFTConfig or in the trainer's constructor."""
    try:
        yield
    except SevpeftError:
        raise
    except (ValueError, TypeError, ImportError, KeyError, FileNotFoundError) as error:
        message = " ".join(str(error).split())
        message = f"{message} is not known" if isinstance(error, KeyError) else message
        raise RecipeError(f"The training section is refused: {message}") from error


def check_one_batch(args: SFTConfig, rows: int) -> None:
    """Raises RecipeError when `dataloader_drop_last` leaves nothing of so many training rows."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise RecipeError(
            f"training.dataloader_drop_last=true leaves no batch of {batch} of the {rows} training rows; leave it out, "
            "or lower training.per_device_train_batch_size."
        )


def loraplus_settings(recipe: Recipe) -> dict[str, float] | None:
    """Arguments of PEFT's `create_loraplus_optimizer` that the recipe sets; None without LoRA+.

    Raises:
        RecipeError: the training is sharded, where the optimizer is not built from these groups.
    """
    names = ("loraplus_lr_ratio", "loraplus_lr_embedding")
    found = {name: getattr(recipe.lora, name) for name in names if getattr(recipe.lora, name) is not None}
    engine = requested_engine()
    if found and engine:
        raise RecipeError(
            f"lora.loraplus_lr_ratio does not reach the optimizer that {engine} builds; leave it out, or train on one "
            "GPU or with several whole copies of the model (accelerate_configs without fsdp or deepspeed)."
        )
    return found or None


def check_optimizer(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Raises RecipeError for an optimizer or a schedule that the trainer could not build.

    Args:
        model: the base model; GaLore and its kin look for their modules in it.
    """
    optim, schedule = (str(getattr(name, "value", name)) for name in (args.optim, args.lr_scheduler_type))
    with _refused(f"training.optim={optim}", "write another one, such as adamw_torch"):
        optimizer_cls, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
    with _refused("training.optim_args or an adam_… setting", "correct it, or leave it out"):
        groups_of_its_own = {"params", "model", "optimizer_dict"} & set(arguments)
        if not groups_of_its_own:
            optimizer_cls([torch.nn.Parameter(torch.zeros(1))], **arguments)
    with _refused(f"training.lr_scheduler_type={schedule}", "correct training.lr_scheduler_kwargs, or write linear"):
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )


@contextmanager
def _refused(setting: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a library raises that is absent, or is given what it does not take
        raise RecipeError(f"{setting} is refused ({first_sentence(error)}); {remedy}.") from error


def loraplus_optimizer(model: PeftModel, args: TrainingArguments, settings: dict[str, float]) -> torch.optim.Optimizer:
    """The optimizer of `args.optim` with LoRA+'s groups; a weight decay of `args` holds for all but biases and norms.

    Args:
        settings: of `loraplus_settings`.
    """
    optimizer_cls, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
    taken: dict[str, Any] = {"loraplus_weight_decay": args.weight_decay, **settings, **arguments}
    optimizer = create_loraplus_optimizer(model, optimizer_cls, **taken)
    # Groups that stay empty (no adapted embedding, say) are of no use, and not every optimizer bears them.
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def memory_plan(recipe: Recipe, *, on_gpu: bool = True) -> tuple[MemoryPlan, str]:
    """The plan of a recipe on a GPU or a CPU, and where its numbers come from.

    Raises:
        UnknownModelError: neither a config.json nor numbers in the recipe.
    """
    found = base_config(recipe)
    return MemoryPlan(recipe, found.config, on_gpu=on_gpu, vocabulary_tile=CPU_VOCABULARY_TILE), found.origin


def split_here(recipe: Recipe, *, check_fit: bool = False) -> Recipe:
    """The recipe with its batch split chosen for the devices of this launch.

    Args:
        check_fit: raise RunError where the plan without activations is larger than the whole memory of the GPU. Where
            it is smaller, the training itself decides, because the plan takes every row for the longest.
    """
    on_gpu, memory = uses_gpu(recipe), None
    if on_gpu or (is_automatic(recipe) and not weights_are_sharded()):
        with suppress(UnknownModelError):
            memory, _ = memory_plan(recipe, on_gpu=on_gpu)
    processes = PartialState().num_processes
    available = device_memory(recipe) // (1 if on_gpu else processes)
    resolved = resolve_split(
        recipe, None if weights_are_sharded() else memory, available, processes=processes, on_gpu=on_gpu
    )
    if check_fit and on_gpu and memory is not None:
        _check_fit(memory.with_recipe(resolved), processes if weights_are_sharded() else 1)
    return resolved


def _check_fit(memory: MemoryPlan, parts: int) -> None:
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    least = memory.budget()
    held = (least.total - least.items.get("activations", 0) - least.items.get("logits tile", 0)) // parts
    if held <= whole:
        return
    advice = changes(memory, whole / GIB / 0.95)
    remedy = " ".join(setting for change in advice for setting in change.settings)
    raise RunError(
        f"{memory.recipe.model.name_or_path} needs about {held / GIB:.1f} GiB before its first step, and this GPU has "
        f"{whole / GIB:.1f}; "
        + (f"add {remedy}." if advice and advice[-1].fits else "choose a smaller model or a larger GPU.")
    )


def choose_layout(asked: Recipe, resolved: Recipe, model: PreTrainedModel, validation: np.ndarray) -> Recipe:
    """The resolved recipe, with padding_free chosen by what the model does with packed rows, and validation by lengths.

    Args:
        asked: the recipe before its split was chosen; where rows must be padded, the split is chosen anew.
        validation: (m,) tokens of the validation rows, longest first.

    Raises:
        ModelError: the recipe asks for packing or padding_free, and the model mixes documents.
    """
    training = resolved.training.settings()
    for setting in ("packing", "padding_free"):
        if training.get(setting) is True:
            check_packing(model, f"training.{setting}")
    if training["padding_free"] == AUTO:
        # Eager attention holds every pair of positions: of 8 rows in one, 8 times as many as of 8 rows apart.
        possible = not training.get("packing") and model.config._attn_implementation != "eager"
        if possible and not weights_are_sharded() and documents_stay_apart(model)[0]:
            resolved = with_training(resolved, padding_free=True)
        else:
            asked = with_training(asked, padding_free=False)
            resolved = split_here(asked)
    if asked.training.settings()["per_device_eval_batch_size"] != AUTO:
        return resolved
    settings = resolved.training.settings()
    most = settings["per_device_eval_batch_size"]
    if settings["padding_free"]:
        # The mask of one long row has a number for each pair of its tokens.
        sizes = (size for size in _EVAL_SIZES if size <= most and size * validation[0] <= _LONGEST_ROW)
        return with_training(resolved, per_device_eval_batch_size=next(sizes, 1))
    size = rows_with_least_work(validation, most, on_gpu=uses_gpu(resolved))
    return with_training(resolved, per_device_eval_batch_size=size)


# A pass costs as much as this many more tokens: small matrices leave a device idle, and 4-bit weights are unpacked for
# each. CPU: 8 rows of 90 tokens in one pass took .7 of 8 passes (Gemma-3-270M, 2 cores). GPU: an assumption.
_PASS_COSTS_TOKENS = {True: 512, False: 40}
# Rows are on average this part of max_length (90 of 512 tokens on Arabic consultations); a batch of many rows that is
# padded to its longest has about 2.5 times as many positions as tokens.
_MEAN_LENGTH, _PADDED = 0.2, 2.5
_CHECKPOINTING_COSTS = 4 / 3
# Of a computer's memory; the rest is for the operating system, other programs and the libraries.
_USABLE_OF_RAM = 0.6
_EVAL_SIZES = (32, 16, 8, 4, 2, 1)
_LONGEST_ROW = 8192
# Set beside the numbers, where the recipe says nothing of them.
CHOSEN_WITH = ("global_batch_size", "auto_find_batch_size")
_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")


def is_automatic(recipe: Recipe) -> bool:
    """Whether the recipe leaves any part of the batch split to `resolve_split`."""
    settings = recipe.training.settings()
    return AUTO in (*(settings.get(key) for key in _KEYS), settings["per_device_eval_batch_size"])


def resolve_split(
    recipe: Recipe, plan: MemoryPlan | None, available: int, *, processes: int = 1, on_gpu: bool = True
) -> Recipe:
    """The recipe with a number in place of each `auto` of the batch split.

    Args:
        plan: of this recipe; None where its memory is not known, or is divided by FSDP or ZeRO-3. The split that needs
            the least memory is taken then.
        available: bytes that a training may take of one device. processes: of the launch.

    Raises:
        RecipeError: the numbers do not make global_batch_size.
    """
    settings = recipe.training.settings()
    rows, checkpointing = settings[_KEYS[0]], settings[_KEYS[2]]
    total, choices = _row_counts(settings, processes)
    ways = (False, True) if checkpointing == AUTO else (checkpointing,)
    padded = settings.get("padding_free") is False or recipe.model.attn_implementation == "eager"
    length = _MEAN_LENGTH * (settings["max_length"] or 512)
    of_each = total // processes

    def cost(option: tuple[int, bool | None]) -> tuple[float, int]:
        count, checkpointed = option
        waste = 1 + (_PADDED - 1) * (count - 1) / max(of_each - 1, 1) if padded else 1
        tokens = of_each // count * (_PASS_COSTS_TOKENS[on_gpu] + count * length * waste)
        return tokens * (_CHECKPOINTING_COSTS if checkpointed is not False else 1), -count

    options = sorted(((count, way) for count in choices for way in ways), key=cost)
    chosen = options[0]
    if len(options) > 1:
        fitting = (one for one in options if plan is not None and plan.total_of_batch(*one) <= available)
        chosen = next(fitting, (min(choices), ways[-1]))
    changes: dict[str, Any] = dict(zip(_KEYS, (chosen[0], of_each // chosen[0], chosen[1]), strict=True))
    if settings["per_device_eval_batch_size"] == AUTO:
        fitting_sizes = (size for size in _EVAL_SIZES if plan and plan.total_of_validation(size) <= available)
        changes["per_device_eval_batch_size"] = next(fitting_sizes, min(chosen[0], 8))
    if rows == AUTO and processes == 1:
        changes["auto_find_batch_size"] = True  # what was chosen here may also be cut where memory runs out
    return with_training(recipe, **changes, global_batch_size=total)


def rows_with_least_work(lengths: np.ndarray, most: int, *, on_gpu: bool) -> int:
    """Rows of a forward pass, at most `most`, with which these rows take the fewest tokens, padding and passes counted.

    Args:
        lengths: (n,) tokens of each row, longest first, as they are taken.
    """

    def tokens(size: int) -> float:
        longest = lengths[::size]
        return float(len(longest) * _PASS_COSTS_TOKENS[on_gpu] + (size * longest).sum())

    return min((size for size in _EVAL_SIZES if size <= most), key=tokens)


def with_training(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other settings of its section `training`."""
    values = recipe.model_dump()
    values["training"].update(changes)
    changed = recipe_from_values(values)
    changed._name = recipe.name
    return changed


def _row_counts(settings: dict[str, Any], processes: int) -> tuple[int, list[int]]:
    """Rows of an optimizer step over all processes, and how many of them a device may take at once."""
    rows, accumulation, total = (settings[key] for key in (*_KEYS[:2], "global_batch_size"))
    if AUTO not in (rows, accumulation):
        found = rows * accumulation * processes
        if total not in (None, found):
            raise RecipeError(
                f"training.global_batch_size is {total}, and {rows} rows × {accumulation} accumulation steps × "
                f"{processes} processes are {found}; write training.global_batch_size={found}, or auto for the others."
            )
        return found, [rows]
    total = total or GLOBAL_BATCH_SIZE
    known = [value for value in (rows, accumulation) if value != AUTO]
    each, rest = divmod(total, processes)
    if rest or (known and each % known[0]):
        parts = [
            *([f"{processes} processes"] if processes > 1 else []),
            *(f"{number} rows or passes" for number in known),
        ]
        raise RecipeError(
            f"training.global_batch_size={total} cannot be divided evenly by {' × '.join(parts)}; write a multiple."
        )
    if rows != AUTO:
        return total, [rows]
    if accumulation != AUTO:
        return total, [each // accumulation]
    return total, [count for count in range(1, each + 1) if each % count == 0]


def device_memory(recipe: Recipe) -> int:
    """Bytes that a training may take of this machine's GPU, or of its main memory where the run uses none."""
    if uses_gpu(recipe):
        return usable(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB)
    whole = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container, which sees the memory of its host
    with suppress(OSError, ValueError):  # no such limit
        whole = min(whole, int(limit.read_text()))
    return round(whole * _USABLE_OF_RAM)
