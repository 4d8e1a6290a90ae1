"""Terminal output of train and plan: data, weights, batch, memory plan, summary."""

import re
import timeit
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from sevpeft.console import LABEL_WIDTH, print_labeled
from sevpeft.errors import UnknownModelError
from sevpeft.modeling.compat import weights_are_sharded
from sevpeft.modeling.loading import LARGEST_QUANTIZED_ON_CPU, choose_precision, uses_gpu
from sevpeft.modeling.memory import EFFICIENCY, GIB, LARGEST_BATCH, TFLOPS
from sevpeft.recipe import Recipe
from sevpeft.runs import Run
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.source import ORACLE
from sevpeft.severity.weights import WeightSummary, advice, effective_sample, histogram_lines
from sevpeft.training.curriculum import Curriculum
from sevpeft.training.plan import Fitting, Plan
from sevpeft.training.resolve import device_memory, memory_plan, split_here

# Columns of the weight histogram in a terminal of 80, and of the bar of a memory item.
HISTOGRAM_WIDTH, BAR_WIDTH = 79 - LABEL_WIDTH, 15
# Share of a CPU's matrix product that training reached (tests/README.md): .31 in bfloat16, .46 in float32 (AVX2).
CPU_EFFICIENCY = 0.35
_COST = {"tokens_per_second": "tokens/s", "peak_gpu_gib": "GiB of the GPU", "peak_cpu_gib": "GiB at most"}
_COST |= {"gpu_watt_hours": "Wh of the GPU", "cpu_watt_hours": "Wh of the processors"}


def show_data(summary: dict[str, Any], weights: WeightSummary, recipe: Recipe, console: Console) -> None:
    """Prints the training data, what was dropped or shortened, and the severity weights.

    `summary`: as `Prepared.summary`; `encoding` is empty without a tokenizer.
    """

    def warn(label: str, text: str) -> None:
        print_labeled(console, label, text, style="yellow")

    columns = ", ".join(f"{column} → {name}" for name, column in summary["columns"].items() if column != name)
    by = "its own split column" if summary["split_by"] == "column split" else "random groups of equal questions"
    parts = ", ".join(f"{count:,} {name}" for name, count in summary["rows"].items())
    print_labeled(console, "Data", f"{summary['source']}{f' ({columns})' if columns else ''}")
    print_labeled(console, "Split", f"{parts}, by {by}")
    for name, source in summary.get("mix", {}).items():
        rows, distinct = source["rows"], source["distinct_rows"]
        print_labeled(console, "Mix", f"{source['share']:.0%} from {name}: {rows:,} rows, {source['tokens']:,} tokens")
        if distinct < rows:
            times = f"{rows / distinct:.1f} times an epoch"
            warn("Repeats", f"{name} is too small for its share: each of its {distinct:,} rows is used {times}")
    for reason, count in summary["rejected"].items():
        warn("Rejected", f"rows with {reason}: {count:,}")
    if leaks := summary["questions_in_two_splits"]:
        warn("Leak", f"{leaks:,} questions are in two of the given splits; validation and test losses are too low")
    limit = recipe.training.settings()["max_length"]
    for name, report in summary["encoding"].items():
        if report["shortened"]:
            lost = f"words lost: {report['lost_words']:,}, at most {report['most_lost_words']} from one"
            warn("Shortened", f"{name} questions to fit {limit} tokens: {report['shortened']:,} ({lost})")
        if (share := report.get("unknown_token_share", 0)) > 0.005:
            warn("Unknown", f"{share:.1%} of the tokens of {name} rows are letters or words that the tokenizer lacks")
        if report["refused"]:
            what = f"{name} rows whose answer leaves no room for a question in {limit} tokens: {report['refused']:,}"
            warn("Refused", f"{what}; raise training.max_length to keep them")
    if usual := summary.get("pretrained_positions"):  # neither TRL nor transformers says so
        warn("Too long", f"a row exceeds the {usual:,} tokens of the pretraining: set training.max_length={usual}")
    if published := recipe.as_published.model_dump(exclude_defaults=True):
        warn("As published", f"as in the published loops, only for a comparison: {', '.join(published)}")
    if examples := recipe.prompt.examples:
        print_labeled(console, "Examples", f"{len(examples)} before every question; they are left out of all splits")
    if named := summary.get("prompt_severity"):
        text = f"names the severity predicted from the question, by {named['source']}, version {named.get('version')}"
        warn("Prompt", ORACLE) if named["source"] == "gold" else print_labeled(console, "Prompt", text)
    origin, control = summary["severity"], recipe.severity.control
    if origin is None or control == "uniform":
        print_labeled(console, "Weights", "1 for every consultation: plain cross-entropy")
        return
    ready = origin["source"] == "weight"
    if ready:
        print_labeled(console, "Source", f"ready-made weights of column '{recipe.severity.weight_column}'")
    elif origin["source"] != "columns":
        text = f", text={origin['text']}" if "text" in origin else ""
        print_labeled(console, "Severity", f"by {origin['source']}{text}, version {origin['version']}")
    if origin["temperature"] != 1 and not ready:
        power = f"1/{origin['temperature']:g} (severity.temperature)"
        print_labeled(console, "Sharpened", f"probabilities to the power of {power}")
    sample = f"mean {weights.mean:.3f}, effective sample size {effective_sample(weights)}"
    print_labeled(console, "Weights", sample if control == "none" else f"{sample}, {control} as a control")
    for line in histogram_lines(weights.histogram, min(HISTOGRAM_WIDTH, console.width - LABEL_WIDTH - 1)):
        print_labeled(console, "", line)
    if control in ("none", "shuffled") and (warning := advice(weights)):
        # The remedies are settings that have no effect on ready-made weights.
        warn("Warning", re.split("[:;.] ", warning)[0] if ready else warning)


def show_batch(recipe: Recipe, processes: int, console: Console) -> None:
    """Prints the batch split of a resolved recipe."""
    settings = recipe.training.settings()
    layout = "packed" if settings.get("packing") else "padding-free" if settings["padding_free"] else "padded"
    print_labeled(
        console,
        "Batch",
        f"{settings['global_batch_size']} rows a step as {settings['per_device_train_batch_size']} × "
        f"{settings['gradient_accumulation_steps']}{f' on {processes} processes' if processes > 1 else ''}, {layout}, "
        f"{'without' if settings['gradient_checkpointing'] is False else 'with'} gradient checkpointing; validation by "
        f"{settings['per_device_eval_batch_size']}",
    )


def show_machine(recipe: Recipe, console: Console) -> None:
    """Prints the memory that a training needs on this machine, if known, and warns if it is too small or too slow."""
    if console.quiet or weights_are_sharded():
        return
    on_cpu, large = not uses_gpu(recipe), (recipe.about.parameter_count() or 0) > LARGEST_QUANTIZED_ON_CPU
    with suppress(UnknownModelError):
        needed, most = memory_plan(split_here(recipe), on_gpu=not on_cpu)[0].total, device_memory(recipe)
        text = f"{'CPU' if on_cpu else 'GPU'}, {needed / GIB:.1f} GiB of the {most / GIB:.1f} that a training may use"
        text += "; too much: use a smaller model, or a larger machine" * (needed > most)
        text += "; a model of this size needs hours an epoch without a GPU" * (on_cpu and large)
        print_labeled(console, "This machine", text, style="yellow" * (";" in text))


def show_curriculum(curriculum: Curriculum, console: Console) -> None:
    """Prints the stages: rows, steps and learning rate of each."""
    own = curriculum.settings
    budget = "as many as without stages" if own.epochs_per_stage is None else "not the budget of a plain training"
    kind = f"{own.kind} by {own.difficulty}, {own.order}"
    print_labeled(console, "Curriculum", f"{kind}; {curriculum.steps:,} steps, {budget}")
    for number, stage in enumerate(curriculum.stages, start=1):
        steps = f"{len(stage.pool):,} rows, {stage.end - stage.begin:,} steps, learning rate {stage.learning_rate:g}"
        print_labeled(console, f"  Stage {number}", f"{stage.name}: {steps}")


def run_summary(run: Run) -> Group:
    """Summary of a finished run, read from its folder: model, data, weights, cost and validation loss."""
    metrics = run.metrics()
    model, weights, training = metrics["model"], metrics["weights"], metrics["training"]
    counts = ", ".join(f"{count:,} {name}" for name, count in reversed(weights["severities"].items()))
    cost = ", ".join(f"{training[name]:,.1f} {unit}" for name, unit in _COST.items() if name in training)
    bits, effective = f", {model['bits']} bit" if model["bits"] else "", weights["effective_sample_size"]
    facts = Table.grid(Column(width=LABEL_WIDTH, style="bold"), Column(overflow="fold"))
    for label, text in {
        "Trained": f"{model['trainable_parameters']:,} LoRA parameters on {model['name_or_path']} "
        f"({model['model_type']}, {model['parameters']:,} parameters, {model['dtype']}{bits})",
        "Consultations": f"{weights['consultations']:,} ({counts or 'severity not known'}), "
        f"{metrics['data']['encoding']['train']['answer_tokens']:,} answer tokens",
        "Severity weights": f"{weights['minimum']:.2f} to {weights['maximum']:.2f}, mean {weights['mean']:.2f}, "
        f"effective sample size {effective:,.0f} ({effective / weights['consultations']:.0%})",
        "Training": f"{training['steps']:,} steps, {training['epochs']:.3g} epochs, "
        f"{timedelta(seconds=round(training['seconds']))}, {cost}",
        "Adapter": str(run.adapter),
    }.items():
        facts.add_row(label, text)
    numbers = (Column(name, justify="right") for name in ("before", "after", "change"))
    losses = Table("severity", *numbers, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    before, after = metrics["before"], metrics["after"]
    for key, label in [("loss", "all"), *((f"loss_{name}", name) for name in reversed(SEVERITIES))]:
        if key in after:
            losses.add_row(label, f"{before[key]:.3f}", f"{after[key]:.3f}", f"{after[key] - before[key]:+.3f}")
        elif counts:
            losses.add_row(label, "no rows")
    for name, of_stages in metrics.get("curriculum", {}).get("held_out", {}).items():
        facts.add_row("After each stage", f"{name} rows: {' → '.join(f'{loss:.3f}' for loss in of_stages)}")
    return Group(Text(), facts, Text("\nValidation loss, nats per answer token, unweighted", style="bold"), losses)


def show_plan(plan: Plan, console: Console) -> None:
    """Prints a plan, its data as `train` does."""
    recipe, settings = plan.recipe, plan.recipe.training.settings()
    print_labeled(console, "Base model", recipe.model.name_or_path)
    show_data(plan.data, plan.weights, recipe, console)
    if plan.steps is not None:
        batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        print_labeled(console, "Training", f"{plan.steps:,} steps of {batch} rows on one process")
    # Both reasons may be the same; it is then printed once.
    unknown = {plan.memory_unknown: "memory and GPUs", plan.unknown: "time, and how much is shortened and refused"}
    for reason, what in unknown.items():
        if reason is not None:
            print_labeled(console, "Unknown", f"{what}: {reason}", style="yellow")
    if plan.fitting is not None:
        show_fitting(plan.fitting, console)
    if plan.epoch_seconds is not None:
        measured = None if uses_gpu(recipe) else _cpu_tflops(choose_precision(recipe).dtype)
        peaks = [(TFLOPS, EFFICIENCY, "of an RTX 4090")]
        peaks += [(measured, CPU_EFFICIENCY, "that a matrix product reached on this CPU")] if measured else []
        for tflops, share, where in peaks:
            seconds = plan.epoch_seconds * TFLOPS * EFFICIENCY / (tflops * share)
            duration = f"{seconds / 3600:,.1f} h" if seconds >= 5400 else f"{max(seconds / 60, 1):.0f} min"
            speed = f"at {share:.0%} of the {tflops:.3g} TFLOP/s {where}, without padding and validation"
            print_labeled(console, "Time", f"about {duration} an epoch of {plan.tokens:,} tokens, {speed}")


def _cpu_tflops(dtype: torch.dtype) -> float:
    """TFLOP/s of this CPU in a matrix product of this dtype, the best of three."""
    one, other = torch.ones(1024, 2048, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
    seconds = timeit.repeat(lambda: one @ other, number=1, repeat=4)[1:]  # the first one also starts the threads
    return 2 * 1024 * 2048 * 1024 / min(seconds) / 1e12


def show_fitting(need: Fitting, console: Console) -> None:
    """Prints parameters, memory items, GPUs, and the changes that make a training fit."""
    count, total = need.parameters, need.total
    share = count.trainable / (count.base + count.trainable)
    targets = ", ".join(f"{name} ×{times}" for name, times in count.targets.items())
    counts = f"{count.trainable:,} trainable parameters beside {count.base:,} frozen ones ({share:.2%})"
    print_labeled(console, "Adapter", f"{counts}, on {targets}")
    print_labeled(
        console,
        "GPU memory",
        f"{total / GIB:.1f} GiB at {need.batch} × {need.length} tokens in {need.number_format}, "
        f"{'with' if need.checkpointing else 'without'} gradient checkpointing"
        f"{f' (split chosen for {need.split_for:g} GB)' if need.split_for else ''}, if all rows are that long; the "
        f"model's config is from {need.origin}",
    )
    for name, size in need.budget.items():
        row = Text(f"{'':{min(LABEL_WIDTH, console.width - 59)}}{name:30}{size / GIB:8.2f} GiB ")
        row.append("█" * round(BAR_WIDTH * size / total), style="blue")
        console.print(row, no_wrap=True, overflow="crop")
    for gpu in need.gpus:
        rows = f"{gpu.largest_batch}{' or more' * (gpu.largest_batch == LARGEST_BATCH)} of {need.length} tokens"
        note = f"fits; largest batch {rows}" if gpu.fits else f"fits with batch {rows}"
        possible = gpu.fits or gpu.largest_batch
        print_labeled(console, f"  {gpu.gb} GB", note if possible else "does not fit", "" if possible else "yellow")
    if need.bits:
        belongs = f"the adapter belongs to the {need.bits}-bit weights; its outputs differ on the unquantized base"
        print_labeled(console, "Sharing", f"{belongs}. `sevpeft merge` measures by how much")
    if need.vram is None:
        return
    if need.fits:
        print_labeled(console, "Verdict", f"fits in {need.vram:g} GB", style="green")
        return
    print_labeled(console, "Verdict", f"does not fit in {need.vram:g} GB; least harmful changes first:", style="red")
    for change in need.changes:
        for setting in change.settings:
            console.print(Text(f"{'':{LABEL_WIDTH}}{setting}", style="bold"), soft_wrap=True)
        fits = ": fits" if change.fits else ""
        print_labeled(console, "", f"{change.total / GIB:.1f} GiB then{fits}; {change.effect}")
    if not need.changes or not need.changes[-1].fits:
        print_labeled(console, "", "That is still too much: choose a smaller base model, or a larger GPU.")
