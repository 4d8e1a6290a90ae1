"""Turns the `training` section into TRL's SFTConfig for this machine and this run folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from sevpeft.errors import RecipeError, SevpeftError
from sevpeft.modeling.loading import Precision, uses_gpu
from sevpeft.recipe import BEST_IS_LEAST, Recipe


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
    settings["padding_free"] = settings["padding_free"] is True  # auto: as long as the model was not asked
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
        for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
            del os.environ[name]
    with plain_refusals(), _of_the_recipe(precision):
        config = SFTConfig(**settings)
    absent = sorted(set(config.report_to) - set(get_available_reporting_integrations()))
    if absent:
        raise RecipeError(
            f"training.report_to names {', '.join(absent)}, which is not installed: pip install {absent[0]}."
        )
    return config


@contextmanager
def _of_the_recipe(precision: Precision) -> Iterator[None]:
    """Hides from transformers what a launcher says of mixed precision: it obeys that where the settings say no."""
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.get(name)
    os.environ[name] = "bf16" if precision.bf16 else "fp16" if precision.fp16 else "no"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def plain_refusals() -> Iterator[None]:
    """Turns what TRL and transformers raise about settings, in SFTConfig or in the trainer's constructor."""
    try:
        yield
    except SevpeftError:
        raise
    except (ValueError, TypeError, ImportError, KeyError, FileNotFoundError) as error:
        said = " ".join(str(error).split())
        said = f"{said} is not known" if isinstance(error, KeyError) else said
        raise RecipeError(f"The training section is refused: {said}") from error


def refuse_no_batch(args: SFTConfig, rows: int) -> None:
    """Raises RecipeError when `dataloader_drop_last` leaves nothing of so many training rows."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise RecipeError(
            f"training.dataloader_drop_last=true leaves no batch of {batch} of the {rows} training rows; leave it out, "
            "or lower training.per_device_train_batch_size."
        )
