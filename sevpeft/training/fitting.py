"""Turns a memory plan into what `plan` shows of it: one bar, a line for every card, what to change, and an hour count.

`train` asks the same plan before anything is downloaded, and refuses a start that cannot end well.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from sevpeft.errors import ModelError, RunError, UnknownModelError
from sevpeft.modeling.compat import weights_are_sharded
from sevpeft.modeling.gpus import EFFICIENCY, TFLOPS, Change, Gpu, changed, changes, savings, usable, verdicts
from sevpeft.modeling.loading import uses_gpu
from sevpeft.modeling.memory import GIB, LARGEST_BATCH, Budget, MemoryPlan, Parameters, base_config
from sevpeft.modeling.packing import check_packing, documents_stay_apart
from sevpeft.recipe import Recipe
from sevpeft.recipe.library_sections import AUTO
from sevpeft.training.batch_split import (
    device_memory,
    is_automatic,
    resolve_split,
    rows_with_least_work,
    with_training,
)
from sevpeft.training.progress import LABEL_WIDTH, say
from sevpeft.training.trainer import CPU_VOCABULARY_TILE

# GB of the GPU that `plan` chooses a split for, where neither --vram nor the recipe names one.
_GPU_OF_PLAN = 24
BAR_WIDTH = 79 - LABEL_WIDTH
_BLOCKS = "█▓▒░▞▚▖▘"
_COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "bright_black", "white")


@dataclass(frozen=True)
class Fitting:
    """What a training holds in memory, and where it fits.

    Attributes:
        origin: where the base model's numbers come from.
        split_for: GB of the GPU that batch and checkpointing were chosen for; None where the recipe sets them.
        vram: GB that were asked about; None for none.
        changes: that make it fit there.
        bits: of a quantized base; None for 16 or 32.
    """

    origin: str
    parameters: Parameters
    batch: int
    length: int
    checkpointing: bool
    split_for: float | None
    number_format: str
    budget: Budget
    cards: list[Gpu]
    vram: float | None
    changes: list[Change]
    bits: int | None

    @property
    def fits(self) -> bool:
        return self.vram is None or self.budget.total <= usable(self.vram)

    def as_dict(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "parameters": {**asdict(self.parameters), "base": self.parameters.base},
            "batch": self.batch,
            "length": self.length,
            "checkpointing": self.checkpointing,
            "split_for": self.split_for,
            "number_format": self.number_format,
            "bytes": {**self.budget.items, "total": self.budget.total},
            "cards": [asdict(card) for card in self.cards],
            "vram": self.vram,
            "fits": self.fits,
            "changes": [asdict(change) for change in self.changes],
        }


def memory_plan(recipe: Recipe, *, on_gpu: bool = True) -> tuple[MemoryPlan, str]:
    """The plan of a recipe on a GPU or a CPU, and where its numbers come from.

    Raises:
        UnknownModelError: neither a config.json nor numbers in the recipe.
    """
    found = base_config(recipe)
    return MemoryPlan(recipe, found.config, on_gpu=on_gpu, vocabulary_tile=CPU_VOCABULARY_TILE), found.origin


def split_here(recipe: Recipe) -> Recipe:
    """The recipe with its batch split chosen for the devices of this launch."""
    on_gpu, plan = uses_gpu(recipe), None
    if is_automatic(recipe) and not weights_are_sharded():
        with suppress(UnknownModelError):
            plan, _ = memory_plan(recipe, on_gpu=on_gpu)
    processes = PartialState().num_processes
    available = device_memory(recipe) // (1 if on_gpu else processes)
    return resolve_split(recipe, plan, available, processes=processes, on_gpu=on_gpu)


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
            return with_training(resolved, padding_free=True)
        asked = with_training(asked, padding_free=False)
        resolved = split_here(asked)
    padded = resolved.training.settings()
    if asked.training.settings()["per_device_eval_batch_size"] != AUTO or padded.get("padding_free"):
        return resolved
    size = rows_with_least_work(validation, padded["per_device_eval_batch_size"], on_gpu=uses_gpu(resolved))
    return with_training(resolved, per_device_eval_batch_size=size)


def fitting(recipe: Recipe, vram: float | None = None) -> tuple[Fitting, MemoryPlan]:
    """What the recipe needs on a GPU, and on which cards it fits.

    Args:
        vram: GB of a GPU to judge; the batch split is chosen for it, or else for the GPU that the recipe names.

    Raises:
        UnknownModelError: neither a config.json nor numbers in the recipe.
        ModelError: PEFT refuses the adapter, or a module that is named does not exist.
    """
    smallest, origin = memory_plan(recipe)  # of all splits of a step, where the recipe leaves it open
    gb = vram or recipe.about.vram_gib or _GPU_OF_PLAN
    resolved = resolve_split(recipe, smallest, usable(gb))
    plan = smallest.with_recipe(resolved)
    return (
        Fitting(
            origin=origin,
            parameters=plan.parameters,
            batch=plan.setting.batch,
            length=plan.setting.length,
            checkpointing=plan.setting.checkpointing,
            split_for=gb if is_automatic(recipe) else None,
            number_format=str(plan.dtype).removeprefix("torch."),
            budget=plan.budget(),
            cards=verdicts(smallest),
            vram=vram,
            changes=[] if vram is None else changes(plan, vram),
            bits=4 if recipe.quantization.load_in_4bit else 8 if recipe.quantization.load_in_8bit else None,
        ),
        plan,
    )


def refuse_what_cannot_fit(recipe: Recipe) -> None:
    """Raises RunError when the plan of this recipe is larger than the whole memory of this machine's GPU.

    Where it is smaller than the memory, the training itself is the judge: the plan takes every row for the longest.
    """
    if not uses_gpu(recipe):
        return
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        plan, _ = memory_plan(recipe)
        least = plan.budget()
    except UnknownModelError:
        return
    held = least.total - least.items.get("activations", 0) - least.items.get("logits tile", 0)
    if weights_are_sharded():
        held //= PartialState().num_processes
    if held <= whole:
        return
    advice = changes(plan, whole / GIB / 0.95)
    remedy = " ".join(setting for change in advice for setting in change.settings)
    raise RunError(
        f"{recipe.model.name_or_path} needs about {held / GIB:.1f} GiB before its first step, and this GPU has "
        f"{whole / GIB:.1f}; "
        + (f"add {remedy}." if advice and advice[-1].fits else "choose a smaller model or a larger GPU.")
    )


def memory_is_full(recipe: Recipe, run: Path) -> RunError:
    """What to say when a step did not fit: what the plan would change first, and whether the run can go on."""
    gpu = uses_gpu(recipe)
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if gpu else 0
    try:
        # A full memory in validation is told by the trainer, with another remedy.
        plan, _ = memory_plan(changed(recipe, ("training.per_device_eval_batch_size=1",)), on_gpu=gpu)
        advice = next(savings(plan, whole / GIB / 0.95), None)
    except ModelError:
        advice = None
    where = f"The GPU's {whole / GIB:.0f} GiB are" if gpu else "This computer's memory is"
    if advice is None:
        return RunError(f"{where} full; close what else uses it, or choose a smaller base model.")
    found = f"{' '.join(advice.settings)} ({advice.effect}; by the plan {advice.total / GIB:.1f} GiB then)"
    return RunError(
        f"{where} full; start another run with {found}. Checkpoints of {run} are kept; "
        "training.auto_find_batch_size=true cuts a batch that does not fit in parts by itself, for the same step."
    )


def announce_fitting(found: Fitting, console: Console) -> None:
    """Prints parameters, the bar, the cards and what to change."""
    count = found.parameters
    share = count.trainable / (count.base + count.trainable)
    say(
        console,
        "Adapter",
        f"{count.trainable:,} trainable parameters beside {count.base:,} frozen ones ({share:.2%}), on "
        + ", ".join(f"{name} ×{times}" for name, times in count.targets.items()),
    )
    say(
        console,
        "GPU memory",
        f"{found.budget.total / GIB:.1f} GiB at {found.batch} × {found.length} tokens in {found.number_format}, "
        f"{'with' if found.checkpointing else 'without'} gradient checkpointing"
        + (f" (split chosen for {found.split_for:g} GB)" if found.split_for else "")
        + f"; all rows as long as that; the model's numbers are from {found.origin}",
    )
    _print_bar(found.budget, console)
    for card in found.cards:
        if card.fits or card.largest_batch:
            rows = f"{card.largest_batch}{' or more' * (card.largest_batch == LARGEST_BATCH)}"
            note = f"fits; largest batch {rows}" if card.fits else f"fits with batch {rows}"
            say(console, f"  {card.gb} GB", f"{note} of {found.length} tokens")
        else:
            say(console, f"  {card.gb} GB", "does not fit", style="yellow")
    if found.bits:
        say(
            console,
            "Sharing",
            f"the adapter belongs to the {found.bits}-bit weights; over the unquantized base, as vLLM serves it, it is "
            "another model. `sevpeft merge` measures by how much, and can merge into the weights that were trained on",
        )
    if found.vram is None:
        return
    if found.fits:
        say(console, "Verdict", f"fits in {found.vram:g} GB", style="green")
        return
    say(console, "Verdict", f"does not fit in {found.vram:g} GB; in the order of least harm:", style="red")
    for change in found.changes:
        for setting in change.settings:
            console.print(Text(f"{'':{LABEL_WIDTH}}{setting}", style="bold"), soft_wrap=True)
        say(console, "", f"{change.total / GIB:.1f} GiB then{': fits' if change.fits else ''}; {change.effect}")
    if not found.changes or not found.changes[-1].fits:
        say(console, "", "That is still too much: choose a smaller base model, or a larger card.")


def announce_time(
    seconds: float, tokens: int, letters: float | None, console: Console, tflops: float, efficiency: float
) -> None:
    """Args: letters: that a token was taken for, where they could not be counted."""
    told = f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(seconds / 60, 1):.0f} min"
    counted = "" if letters is None else f" (not counted: {letters:g} letters assumed for each)"
    card = " (an RTX 4090)" if tflops == TFLOPS else ""
    assumed = " assumed" if efficiency == EFFICIENCY else ""
    say(
        console,
        "Time",
        f"about {told} an epoch of {tokens:,} tokens{counted}, at {efficiency:.0%}{assumed} of {tflops:g} "
        f"TFLOP/s{card}; padding and validation come on top",
    )


def _print_bar(budget: Budget, console: Console) -> None:
    """One block of the bar for each item, the legend below in the same order."""
    bar, legend = Text(" " * LABEL_WIDTH), []
    left, total = BAR_WIDTH, budget.total
    for number, (name, size) in enumerate(budget.items.items()):
        last = number == len(budget.items) - 1
        width = left if last else min(left, max(1, round(BAR_WIDTH * size / total)))
        left -= width
        bar.append(_BLOCKS[number] * width, style=_COLOURS[number])
        legend.append((number, name, size))
    console.print(bar)
    for number, name, size in legend:
        line = Text(" " * LABEL_WIDTH)
        line.append(_BLOCKS[number], style=_COLOURS[number])
        line.append(f" {name:30}{size / GIB:8.2f} GiB")
        console.print(line)
