"""What train and plan print: data, weights, batch, memory plan, summary."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from sevpeft.recipe import Recipe
from sevpeft.runs import Run
from sevpeft.severity.histogram import advice, effective_sample, histogram_lines
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.weighting import WeightSummary
from sevpeft.training.callbacks import LABEL_WIDTH, say

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


def run_summary(run: Run) -> Group:
    """What was trained, on what, with which weights, and what validation loss it reached.

    Everything is read from the run folder, so that the table can be shown again at any time.
    """
    metrics = run.metrics()
    title = Text("Validation loss, nats per answer token, unweighted", style="bold")
    return Group(Text(), _facts(run, metrics), Text(), title, _losses(metrics))


def _facts(run: Run, metrics: dict[str, Any]) -> Table:
    model, data, weights, training = (metrics[name] for name in ("model", "data", "weights", "training"))
    bits = f", {model['bits']} bit" if model["bits"] else ""
    table = Table.grid(padding=0)
    table.add_column(width=LABEL_WIDTH, style="bold")
    table.add_column(overflow="fold")
    table.add_row(
        "Trained",
        f"{model['trainable_parameters']:,} LoRA parameters on {model['name_or_path']} "
        f"({model['model_type']}, {model['parameters']:,} parameters, {model['dtype']}{bits})",
    )
    counts = ", ".join(f"{count:,} {name}" for name, count in reversed(weights["severities"].items()))
    encoding = data["encoding"]["train"]
    table.add_row(
        "Consultations",
        f"{weights['consultations']:,} ({counts or 'severity not known'}), {encoding['answer_tokens']:,} answer tokens",
    )
    effective = weights["effective_sample_size"] / weights["consultations"]
    table.add_row(
        "Severity weights",
        f"{weights['minimum']:.2f} to {weights['maximum']:.2f}, mean {weights['mean']:.2f}, "
        f"effective sample size {weights['effective_sample_size']:,.0f} ({effective:.0%})",
    )
    length = f"{training['steps']:,} steps, {training['epochs']:.3g} epochs"
    table.add_row("Training", f"{length}, {_duration(training['seconds'])}")
    table.add_row("Adapter", str(run.adapter))
    return table


def _losses(metrics: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("severity", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "severity" else "right")
    before, after = metrics["before"], metrics["after"]
    for key, label in [("loss", "all"), *((f"loss_{name}", name) for name in reversed(SEVERITIES))]:
        if key in after:
            table.add_row(label, f"{before[key]:.3f}", f"{after[key]:.3f}", f"{after[key] - before[key]:+.3f}")
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
