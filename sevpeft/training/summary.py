"""Turns a finished run folder into the short table that ends a training."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sevpeft.runs import Run
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.progress import LABEL_WIDTH


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
