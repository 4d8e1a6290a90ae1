"""Turns a memory plan into a verdict: on which cards it fits, how long an epoch takes, and what to change.

Changes are tried in the order of what they cost the result: first those that train the same adapter, then those that
round a little more, then those that lose text. Each is planned anew, so that its saving is a figure and no rule of
thumb.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sevpeft.modeling.memory import GIB, MemoryPlan
from sevpeft.recipe import Recipe, recipe_from_values

CARDS = (8, 12, 16, 24, 48, 80)
# A card sold as 16 GB shows 14.6 to 16 GiB, and a desktop takes some.
USABLE = 0.95
# Dense bfloat16 peak of an RTX 4090, and the share of a card's peak that QLoRA reaches (LLaMA-Factory's published
# 2,295 tokens/s for Llama-2-7B on an A100 are 30 % of 312 TFLOP/s with recomputation counted).
TFLOPS, EFFICIENCY = 165.0, 0.30
_SHORTEST_LENGTH = 128


@dataclass(frozen=True)
class Card:
    """A card of so many GB: whether the recipe fits as it stands, and the largest batch of its max_length that does."""

    gb: int
    fits: bool
    largest_batch: int


@dataclass(frozen=True)
class Change:
    """Settings that save memory.

    Attributes:
        settings: KEY=VALUE. effect: what they cost.
        total: bytes with these and all earlier changes. fits: whether that is enough.
    """

    settings: tuple[str, ...]
    effect: str
    total: int
    fits: bool


def usable(gb: float) -> int:
    """Bytes that a training may take of a card sold as so many GB."""
    return round(gb * USABLE * GIB)


def verdicts(plan: MemoryPlan) -> list[Card]:
    total = plan.budget().total
    return [Card(gb, total <= usable(gb), plan.largest_batch(usable(gb))) for gb in CARDS]


def changes(plan: MemoryPlan, gb: float) -> list[Change]:
    """What makes a recipe fit that does not, until it does."""
    found: list[Change] = []
    if plan.budget().total <= usable(gb):
        return found
    for change in savings(plan, gb):
        found.append(change)
        if change.fits:
            break
    return found


def savings(plan: MemoryPlan, gb: float) -> Iterator[Change]:
    """All that saves memory, one after the other; what saves less than a hundredth is left out."""
    before = plan.budget().total
    for settings, effect in _candidates(plan.recipe):
        tried = plan.with_recipe(changed(plan.recipe, settings))
        total = tried.budget().total
        if total <= 0.99 * before:
            plan, before = tried, total
            yield Change(settings, effect, total, total <= usable(gb))


def epoch_seconds(
    plan: MemoryPlan, tokens: int, labelled: int, rows: int, *, tflops: float, efficiency: float
) -> float:
    """Seconds for one pass over so many tokens, of which so many are answers.

    A frozen matrix of n numbers costs 2n operations a token forward and 2n backward (no gradient of its own), 2n more
    where it is run again for checkpointing; an adapter's 6n. The head sees answers only and is run twice. Attention
    over the mean length is added, 4 operations for each pair and hidden number, half of them hidden by the causal mask.
    """
    count, text = plan.parameters, plan.config.get_text_config()
    passes = 3 if plan.setting.checkpointing else 2
    mean_length = tokens / max(rows, 1)
    operations = 2.0 * passes * count.blocks * tokens
    operations += 6.0 * count.head * labelled + 6.0 * count.trainable * tokens
    operations += 2.0 * passes * mean_length * text.hidden_size * text.num_hidden_layers * tokens
    return operations / (tflops * 1e12 * efficiency)


def _candidates(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    settings = recipe.training.settings()
    if settings.get("gradient_checkpointing") is False:
        yield ("training.gradient_checkpointing=true",), "the same adapter, about a third slower"
    batch, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    if settings["per_device_eval_batch_size"] > 1:
        yield ("training.per_device_eval_batch_size=1",), "the same adapter, slower validation"
    if batch > 1:
        yield (
            ("training.per_device_train_batch_size=1", f"training.gradient_accumulation_steps={accumulation * batch}"),
            "the same adapter, slower",
        )
    if settings.get("optim") != "paged_adamw_8bit":
        yield ("training.optim=paged_adamw_8bit",), "optimizer state in 8 bit, moved out when memory is short"
    if not recipe.quantization.quantised():
        yield ("quantization.load_in_4bit=true",), "QLoRA: the frozen base model in 4 bit"
    length = settings["max_length"]
    while length >= 2 * _SHORTEST_LENGTH:
        length //= 2
        yield (f"training.max_length={length}",), "questions are shortened, long answers refused"


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
