"""What train and plan print: data, weights, batch, memory plan, summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from sevpeft.console import LABEL_WIDTH, print_labeled
from sevpeft.modeling.gpus import EFFICIENCY, TFLOPS
from sevpeft.modeling.memory import GIB, LARGEST_BATCH, Budget
from sevpeft.recipe import Recipe
from sevpeft.runs import Run
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.weights import WeightSummary, advice, effective_sample, histogram_lines

if TYPE_CHECKING:
    from sevpeft.training.plan import Fitting, Plan

# Lines of a histogram fit a terminal of 80 columns, beside the labels.
HISTOGRAM_WIDTH = 79 - LABEL_WIDTH


def show_data(summary: dict[str, Any], weights: WeightSummary, recipe: Recipe, console: Console) -> None:
    """Prints what is trained on, what was lost on the way, and what the severity weights amount to.

    Args:
        summary: as `Prepared.summary`; `encoding` may be empty when no tokenizer was at hand.
    """
    columns = ", ".join(f"{found} → {name}" for name, found in summary["columns"].items() if found != name)
    rows = summary["rows"]
    by = "its own split column" if summary["split_by"] == "column split" else "random groups of equal questions"
    print_labeled(console, "Data", f"{summary['source']}{f' ({columns})' if columns else ''}")
    print_labeled(
        console,
        "Split",
        f"{rows['train']:,} train, {rows['validation']:,} validation, {rows['test']:,} test, by {by}",
    )
    for reason, count in summary["rejected"].items():
        print_labeled(console, "Rejected", f"rows with {reason}: {count:,}", style="yellow")
    if summary["questions_in_two_splits"]:
        print_labeled(
            console,
            "Leak",
            f"{summary['questions_in_two_splits']:,} questions stand in two of the given splits; "
            "validation and test figures are flattered by them",
            style="yellow",
        )
    limit = recipe.training.settings()["max_length"]
    for name, report in summary["encoding"].items():
        if report["shortened"]:
            print_labeled(
                console,
                "Shortened",
                f"{name} questions to fit {limit} tokens: {report['shortened']:,} "
                f"(words lost: {report['lost_words']:,}, at most {report['most_lost_words']} from one)",
                style="yellow",
            )
        if report["refused"]:
            print_labeled(
                console,
                "Refused",
                f"{name} rows whose answer leaves no room for a question in {limit} tokens: {report['refused']:,}; "
                "raise training.max_length to keep them",
                style="yellow",
            )
    _show_weights(summary["severity"], weights, recipe, console)


def show_batch(recipe: Recipe, processes: int, console: Console) -> None:
    """Prints how an optimizer step is divided.

    Args:
        recipe: with numbers in place of every `auto`.
    """
    settings = recipe.training.settings()
    rows, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    layout = "packed" if settings.get("packing") else "padding-free" if settings["padding_free"] else "padded"
    of_processes = f" on {processes} processes" if processes > 1 else ""
    checkpointing = "without" if settings["gradient_checkpointing"] is False else "with"
    print_labeled(
        console,
        "Batch",
        f"{settings['global_batch_size']} rows a step as {rows} × {accumulation}{of_processes}, {layout}, "
        f"{checkpointing} gradient checkpointing; validation by {settings['per_device_eval_batch_size']}",
    )


def _show_weights(origin: dict[str, Any] | None, weights: WeightSummary, recipe: Recipe, console: Console) -> None:
    if origin is None or recipe.severity.control == "uniform":
        print_labeled(console, "Weights", "1 for every consultation: plain cross-entropy")
        return
    if origin["source"] != "columns":
        print_labeled(console, "Severity", f"by {origin['source']}, version {origin['version']}")
    if origin["temperature"] != 1:
        print_labeled(
            console, "Sharpened", f"probabilities to the power of 1/{origin['temperature']:g} (severity.temperature)"
        )
    control = "" if recipe.severity.control == "none" else f", {recipe.severity.control} as a control"
    print_labeled(
        console,
        "Weights",
        f"mean {weights.mean:.3f}, effective sample size {effective_sample(weights)}{control}",
    )
    for line in histogram_lines(weights.histogram, HISTOGRAM_WIDTH):
        print_labeled(console, "", line)
    warning = advice(weights) if recipe.severity.control in ("none", "shuffled") else None
    if warning:
        print_labeled(console, "Warning", warning, style="yellow")


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


BAR_WIDTH = 79 - LABEL_WIDTH
_BLOCKS = "█▓▒░▞▚▖▘"
_COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "bright_black", "white")


def show_plan(found: Plan, console: Console) -> None:
    """Prints a plan as `train` prints its beginning."""
    recipe = found.recipe
    print_labeled(console, "Base model", recipe.model.name_or_path)
    show_data(found.data, found.weights, recipe, console)
    settings = recipe.training.settings()
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    if found.steps is not None:
        print_labeled(console, "Training", f"{found.steps:,} steps of {batch} rows on one process")
    if found.unknown is not None:
        print_labeled(
            console, "Unknown", f"how many questions are shortened and answers refused: {found.unknown}", style="yellow"
        )
    if found.memory_unknown is not None and found.memory_unknown != found.unknown:
        print_labeled(console, "Unknown", f"memory and GPUs: {found.memory_unknown}", style="yellow")
    if found.fitting is not None:
        show_fitting(found.fitting, console)
    if found.epoch_seconds is not None:
        letters = found.letters_per_token
        show_time(found.epoch_seconds, found.tokens, letters, console, found.tflops, found.efficiency)


def show_fitting(found: Fitting, console: Console) -> None:
    """Prints parameters, the bar, the GPUs and what to change."""
    count = found.parameters
    share = count.trainable / (count.base + count.trainable)
    print_labeled(
        console,
        "Adapter",
        f"{count.trainable:,} trainable parameters beside {count.base:,} frozen ones ({share:.2%}), on "
        + ", ".join(f"{name} ×{times}" for name, times in count.targets.items()),
    )
    print_labeled(
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
            print_labeled(console, f"  {card.gb} GB", f"{note} of {found.length} tokens")
        else:
            print_labeled(console, f"  {card.gb} GB", "does not fit", style="yellow")
    if found.bits:
        print_labeled(
            console,
            "Sharing",
            f"the adapter belongs to the {found.bits}-bit weights; over the unquantized base, as vLLM serves it, it is "
            "another model. `sevpeft merge` measures by how much, and can merge into the weights that were trained on",
        )
    if found.vram is None:
        return
    if found.fits:
        print_labeled(console, "Verdict", f"fits in {found.vram:g} GB", style="green")
        return
    print_labeled(console, "Verdict", f"does not fit in {found.vram:g} GB; in the order of least harm:", style="red")
    for change in found.changes:
        for setting in change.settings:
            console.print(Text(f"{'':{LABEL_WIDTH}}{setting}", style="bold"), soft_wrap=True)
        print_labeled(
            console, "", f"{change.total / GIB:.1f} GiB then{': fits' if change.fits else ''}; {change.effect}"
        )
    if not found.changes or not found.changes[-1].fits:
        print_labeled(console, "", "That is still too much: choose a smaller base model, or a larger GPU.")


def show_time(
    seconds: float, tokens: int, letters: float | None, console: Console, tflops: float, efficiency: float
) -> None:
    """Args: letters: that a token was taken for, where they could not be counted."""
    duration = f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(seconds / 60, 1):.0f} min"
    counted = "" if letters is None else f" (not counted: {letters:g} letters assumed for each)"
    card = " (an RTX 4090)" if tflops == TFLOPS else ""
    assumed = " assumed" if efficiency == EFFICIENCY else ""
    print_labeled(
        console,
        "Time",
        f"about {duration} an epoch of {tokens:,} tokens{counted}, at {efficiency:.0%}{assumed} of {tflops:g} "
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
