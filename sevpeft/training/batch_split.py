"""Chooses how one optimizer step is divided: rows per device, accumulation, gradient checkpointing.

The loss does not depend on the division (tests/training/test_trainer.py); speed and memory do. The memory plan and the
device's total memory decide. Timings and free memory do not: the same command gives the same adapter twice. What was
chosen is written into the run's recipe, so that a resume takes the same.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from sevpeft.errors import RecipeError
from sevpeft.modeling.gpus import usable
from sevpeft.modeling.loading import uses_gpu
from sevpeft.modeling.memory import GIB, MemoryPlan
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.recipe.library_sections import AUTO, GLOBAL_BATCH_SIZE

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
