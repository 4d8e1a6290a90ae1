"""Turns what preparation found into the lines that `train` and `plan` show before anything is trained."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from sevpeft.recipe import Recipe
from sevpeft.severity.weights import WeightSummary, advice, effective_sample, histogram_lines
from sevpeft.training.progress import LABEL_WIDTH, say

# Lines of a histogram fit a terminal of 80 columns, beside the labels.
HISTOGRAM_WIDTH = 79 - LABEL_WIDTH


def announce_data(summary: dict[str, Any], weights: WeightSummary, recipe: Recipe, console: Console) -> None:
    """Prints what is trained on, what was lost on the way, and what the severity weights amount to.

    Args:
        summary: as `Prepared.summary`; `encoding` may be empty when no tokenizer was at hand.
    """
    columns = ", ".join(f"{found} → {name}" for name, found in summary["columns"].items() if found != name)
    rows = summary["rows"]
    by = "its own split column" if summary["split_by"] == "column split" else "random groups of equal questions"
    say(console, "Data", f"{summary['source']}{f' ({columns})' if columns else ''}")
    say(
        console,
        "Split",
        f"{rows['train']:,} train, {rows['validation']:,} validation, {rows['test']:,} test, by {by}",
    )
    for reason, count in summary["rejected"].items():
        say(console, "Rejected", f"rows with {reason}: {count:,}", style="yellow")
    if summary["questions_in_two_splits"]:
        say(
            console,
            "Leak",
            f"{summary['questions_in_two_splits']:,} questions stand in two of the given splits; "
            "validation and test figures are flattered by them",
            style="yellow",
        )
    limit = recipe.training.settings()["max_length"]
    for name, report in summary["encoding"].items():
        if report["shortened"]:
            say(
                console,
                "Shortened",
                f"{name} questions to fit {limit} tokens: {report['shortened']:,} "
                f"(words lost: {report['lost_words']:,}, at most {report['most_lost_words']} from one)",
                style="yellow",
            )
        if report["refused"]:
            say(
                console,
                "Refused",
                f"{name} rows whose answer leaves no room for a question in {limit} tokens: {report['refused']:,}; "
                "raise training.max_length to keep them",
                style="yellow",
            )
    _announce_weights(summary["severity"], weights, recipe, console)


def announce_batch(recipe: Recipe, console: Console) -> None:
    """Prints how an optimizer step is divided.

    Args:
        recipe: with numbers in place of every `auto`.
    """
    settings = recipe.training.settings()
    rows, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    layout = "packed" if settings.get("packing") else "padding-free" if settings["padding_free"] else "padded"
    checkpointing = "without" if settings["gradient_checkpointing"] is False else "with"
    say(
        console,
        "Batch",
        f"{settings['global_batch_size']} rows a step as {rows} × {accumulation}, {layout}, {checkpointing} gradient "
        f"checkpointing; validation by {settings['per_device_eval_batch_size']}",
    )


def _announce_weights(origin: dict[str, Any] | None, weights: WeightSummary, recipe: Recipe, console: Console) -> None:
    if origin is None or recipe.severity.control == "uniform":
        say(console, "Weights", "1 for every consultation: plain cross-entropy")
        return
    if origin["source"] != "columns":
        say(console, "Severity", f"by {origin['source']}, version {origin['version']}")
    if origin["temperature"] != 1:
        say(console, "Sharpened", f"probabilities to the power of 1/{origin['temperature']:g} (severity.temperature)")
    control = "" if recipe.severity.control == "none" else f", {recipe.severity.control} as a control"
    say(
        console,
        "Weights",
        f"mean {weights.mean:.3f}, effective sample size {effective_sample(weights)}{control}",
    )
    for line in histogram_lines(weights.histogram, HISTOGRAM_WIDTH):
        say(console, "", line)
    warning = advice(weights) if recipe.severity.control in ("none", "shuffled") else None
    if warning:
        say(console, "Warning", warning, style="yellow")
