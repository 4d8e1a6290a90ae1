"""What a memory plan means: on which GPUs a training fits, what to change where it does not, how long an epoch takes.

Changes are tried in the order of what they cost the result: first those that train the same adapter, then those that
round a little more, then those that lose text. Each is planned anew, so that its saving is a figure and no rule of
thumb.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sevpeft.errors import RecipeError
from sevpeft.modeling.memory import GIB, MemoryPlan
from sevpeft.recipe import AUTO, Recipe, recipe_from_values

GPUS = (8, 12, 16, 24, 48, 80)
# A GPU sold as 16 GB shows 14.6 to 16 GiB, and a desktop takes some.
USABLE = 0.95
# Dense bfloat16 peak of an RTX 4090, and the share of a GPU's peak that QLoRA reaches (LLaMA-Factory's published
# 2,295 tokens/s for Llama-2-7B on an A100 are 30 % of 312 TFLOP/s with recomputation counted).
TFLOPS, EFFICIENCY = 165.0, 0.30
_SHORTEST_LENGTH = 128
# In the order of what they cost the result.
_CHANGES = ("checkpointing", "validation", "rows", "optimizer", "quantization", *["length"] * 8)


@dataclass(frozen=True)
class Gpu:
    """A GPU of so many GB: whether the recipe fits as it stands, and the largest batch of its max_length that does."""

    gb: int
    fits: bool
    largest_batch: int


@dataclass(frozen=True)
class Change:
    """Settings (KEY=VALUE) that save memory, what they cost, bytes with them and all earlier ones, whether it fits."""

    settings: tuple[str, ...]
    effect: str
    total: int
    fits: bool


def usable(gb: float) -> int:
    """Bytes that a training may take of a GPU sold as so many GB."""
    return round(gb * USABLE * GIB)


def verdicts(plan: MemoryPlan) -> list[Gpu]:
    total = plan.budget().total
    return [Gpu(gb, total <= usable(gb), plan.largest_batch(usable(gb))) for gb in GPUS]


def changes(plan: MemoryPlan, gb: float) -> list[Change]:
    """What makes a recipe fit that does not, until it does."""
    found: list[Change] = []
    if plan.budget().total > usable(gb):
        for change in savings(plan, gb):
            found.append(change)
            if change.fits:
                break
    return found


def savings(plan: MemoryPlan, gb: float) -> Iterator[Change]:
    """All that saves memory, one after the other; what saves less than a hundredth is left out."""
    available, before = usable(gb), plan.budget().total
    for name in _CHANGES * 2:  # what saved nothing beside something larger may do so once that is smaller
        proposed = _proposal(name, plan, available)
        if proposed is None:
            continue
        settings, effect = proposed
        try:
            tried = plan.with_recipe(changed(plan.recipe, settings))
        except RecipeError:  # such as `orthogonal` in 4 bit
            continue
        total = tried.budget().total
        if total <= 0.99 * before:
            plan, before = tried, total
            yield Change(settings, effect, total, total <= available)


def _proposal(name: str, plan: MemoryPlan, available: int) -> tuple[tuple[str, ...], str] | None:
    """Settings and what they cost; None where the recipe has them already, or they make no sense."""
    settings = plan.recipe.training.settings()
    rows, steps = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    length = settings["max_length"] // 2
    if name == "checkpointing" and settings.get("gradient_checkpointing") is False:
        return ("training.gradient_checkpointing=true",), "the same adapter, about a third slower"
    if name == "validation" and settings["per_device_eval_batch_size"] not in (1, AUTO):
        return ("training.per_device_eval_batch_size=1",), "the same adapter, slower validation"
    if name == "rows" and rows not in (1, AUTO):
        divisors = [count for count in range(1, rows) if rows % count == 0]  # so that a step keeps its rows
        fewer = divisors[max(0, bisect_right(divisors, available, key=plan.total_of_batch) - 1)]
        more = [] if steps == AUTO else [f"training.gradient_accumulation_steps={steps * rows // fewer}"]
        validated = settings["per_device_eval_batch_size"]
        if settings["eval_strategy"] != "no" and validated != AUTO and validated > fewer:  # neither would help alone
            more.append(f"training.per_device_eval_batch_size={fewer}")
        return (f"training.per_device_train_batch_size={fewer}", *more), "the same adapter, slower"
    if name == "optimizer" and settings.get("optim") != "paged_adamw_8bit":
        return ("training.optim=paged_adamw_8bit",), "optimizer state in 8 bit, moved out when memory is short"
    if name == "quantization" and not plan.recipe.quantization.quantised():
        return ("quantization.load_in_4bit=true",), "QLoRA: the frozen base model in 4 bit"
    if name == "length" and length >= _SHORTEST_LENGTH:
        return (f"training.max_length={length}",), "questions are shortened, long answers refused"
    return None


def changed(recipe: Recipe, settings: tuple[str, ...]) -> Recipe:
    """The recipe with these KEY=VALUE settings."""
    values: dict[str, Any] = recipe.model_dump()
    for setting in settings:
        key, value = setting.split("=")
        section, name = key.split(".")
        values[section][name] = {"true": True}.get(value, int(value) if value.isdigit() else value)
    if values["quantization"]["load_in_4bit"]:
        values["quantization"]["load_in_8bit"] = False
    return recipe_from_values(values)


def epoch_seconds(plan: MemoryPlan, tokens: int, labeled: int, rows: int, *, tflops: float, efficiency: float) -> float:
    """Seconds for one pass over so many tokens, of which so many are answers.

    A frozen matrix of n numbers costs 2n operations a token forward and 2n backward (no gradient of its own), 2n more
    where it is run again for checkpointing; an adapter's 6n. The head sees answers only and is run twice. Attention
    over the mean length is added, 4 operations for each pair and hidden number, half of them hidden by the causal mask.
    """
    count, text = plan.parameters, plan.config.get_text_config()
    passes = 3 if plan.setting.checkpointing else 2
    operations = 2.0 * passes * count.blocks * tokens
    operations += 6.0 * count.head * labeled + 6.0 * count.trainable * tokens
    operations += 2.0 * passes * (tokens / max(rows, 1)) * text.hidden_size * text.num_hidden_layers * tokens
    return operations / (tflops * 1e12 * efficiency)
