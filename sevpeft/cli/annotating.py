"""The verb annotate. Heavy imports stand inside, so that --help answers at once."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sevpeft.cli.application import app, command_with_keys, is_main_process, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from sevpeft.severity.annotate import Annotation

_UNUSED = ("path", "validation_size", "test_size", "seed")


@app.command(
    cls=command_with_keys("sevpeft.severity.settings:AnnotateSettings", without=[f"data.{name}" for name in _UNUSED])
)
def annotate(
    data: Annotated[
        str, typer.Argument(metavar="INPUT", help="File, folder or pattern, Hub dataset or builtin:consultations")
    ],
    output: Annotated[
        Path, typer.Argument(help="New file (.jsonl, .csv, .tsv, .parquet), or a new folder for a prepared one")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, see below", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Add the severity of every row: p_non_critical, p_neutral, p_critical, the likeliest one, and what judged it.

    The same command goes on after a kill. Under `accelerate launch` the processes share the work.

    Example: sevpeft annotate consultations.csv annotated.jsonl method=rules
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.recipe import settings_from

    screen = Screen(stderr=True, quiet=not is_main_process())
    with screen.status("Loading the libraries"):
        import datasets

        from sevpeft.severity.annotate import annotate as annotate_rows
        from sevpeft.severity.settings import AnnotateSettings

        quiet_libraries()
    if screen.is_terminal and not screen.quiet:
        datasets.enable_progress_bars()
    done = annotate_rows(settings_from(AnnotateSettings, settings or (), {"data.path": data}), output)
    if done is not None and as_json:
        print_json(asdict(done))
    elif done is not None:
        _show(done, Screen())


def _show(done: Annotation, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from sevpeft.severity.weights import advice, effective_sample, histogram_lines

    for reason, count in done.rejected.items():
        console.print(f"Not in {done.output}: {count:,} rows with {reason}.", style="yellow", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("severity")
    table.add_column("likeliest in rows", justify="right")
    table.add_column("mean probability", justify="right")
    for name, count in done.counts.items():
        table.add_row(name, f"{count:,} ({count / done.rows:.0%})", f"{done.mean[name]:.3f}")
    console.print(table)
    console.print(f"Weights (preset balanced): effective sample size {effective_sample(done.weights)}")
    for line in histogram_lines(done.weights.histogram, 79):
        console.print(line, soft_wrap=True)
    if warning := advice(done.weights):
        console.print(f"Warning: {warning}", style="yellow", soft_wrap=True)
    console.print(f"Wrote {done.rows:,} rows to {done.output} ({done.method}, {done.version}).", soft_wrap=True)
    console.print(f"Next: sevpeft plan RECIPE data.path={done.output}", soft_wrap=True)
