"""The verb `annotate`. Heavy imports stand inside, so that --help answers at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sevpeft.cli.application import app, is_main_process, quiet_libraries
from sevpeft.cli.reading import (
    AnswerColumn,
    DialectColumn,
    Encoding,
    IdColumn,
    Input,
    MaxRows,
    Name,
    QuestionColumn,
    Revision,
    SeverityColumn,
    Split,
    SplitColumn,
    chosen,
    said_as_options,
)
from sevpeft.errors import DataError, Interrupted, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from sevpeft.data.read import Consultations
    from sevpeft.severity.annotating import Annotation, Job
    from sevpeft.severity.dealing import Processes
    from sevpeft.severity.probabilities import SeverityClassifier

_WIDTH = 79
_SECONDS_BETWEEN_LINES = 15.0


class AnnotationMethod(str, Enum):
    rules = "rules"
    linear = "linear"
    rules_linear = "rules+linear"
    transformer = "transformer"


@app.command()
def annotate(
    context: typer.Context,
    data: Input,
    output: Annotated[
        Path,
        typer.Argument(
            help="Its ending says what: .jsonl, .csv, .tsv (also .gz), .parquet, none for a folder", show_default=False
        ),
    ],
    method: Annotated[
        AnnotationMethod | None,
        typer.Option("--method", help="What judges; left out, the kind of --classifier.", show_default=False),
    ] = None,
    classifier: Annotated[
        Path | None,
        typer.Option(
            "--classifier", help="Folder that `sevpeft classifier fit` made; rules work without.", show_default=False
        ),
    ] = None,
    lexicon: Annotated[
        Path | None, typer.Option("--lexicon", help="Of the rules; by default the package's.", show_default=False)
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Sharpens the probabilities below 1, flattens them above.")
    ] = 1.0,
    replace: Annotated[
        bool, typer.Option("--replace", help="Annotate rows that have severity; people's is kept as severity_given.")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Questions at a time, of the transformer.", show_default=False),
    ] = None,
    question_column: QuestionColumn = None,
    answer_column: AnswerColumn = None,
    severity_column: SeverityColumn = None,
    id_column: IdColumn = None,
    dialect_column: DialectColumn = None,
    split_column: SplitColumn = None,
    encoding: Encoding = None,
    name: Name = None,
    revision: Revision = None,
    split: Split = "train",
    max_rows: MaxRows = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Add to every row p_non_critical, p_neutral, p_critical, the likeliest severity, and where they come from.

    Killed, the same command goes on where it was. Several processes share the work under `accelerate launch`.

    Example: sevpeft annotate consultations.csv annotated.jsonl --method rules
    """
    method = _checked(method, classifier, lexicon, batch_size)
    with _working(as_json) as (console, status):
        from sevpeft.severity.annotated_files import target_of
        from sevpeft.severity.dealing import Processes

        target_of(output)
        processes = Processes.of_launch()
        if any(name.startswith("ACCELERATE_") for name in os.environ):
            from sevpeft.training.distributed import check_processes

            check_processes(processes.count)
        status(f"Reading {data}")
        job = _job(
            data, output, method, classifier, lexicon, temperature, replace, batch_size, chosen(context), processes
        )
    done = _done(job, console)
    processes.leave()
    if done is None:
        return
    if as_json:
        from sevpeft.console import print_json

        print_json(done.as_dict())
        return
    console.print(f"Data: {job.consultations.source}", soft_wrap=True, markup=False)
    _show(done, console)


def _checked(
    method: AnnotationMethod | None, classifier: Path | None, lexicon: Path | None, batch_size: int | None
) -> AnnotationMethod | None:
    """The method, None for that of the classifier; refuses what does not go together."""
    if method is None and classifier is None:
        raise UsageError("Say what judges: --method rules, or --classifier DIR (made by `sevpeft classifier fit`).")
    if classifier is None and method is not AnnotationMethod.rules:
        assert method is not None
        raise UsageError(
            f"--method {method.value} needs --classifier DIR; fit one with `sevpeft classifier fit DATA DIR --kind "
            f"{method.value}`."
        )
    if lexicon is not None and (classifier is not None or method is not AnnotationMethod.rules):
        raise UsageError("--lexicon is for --method rules without --classifier, which has a lexicon of its own.")
    if batch_size is not None and method is AnnotationMethod.rules:
        raise UsageError("--batch-size is for --method transformer.")
    return method


@contextmanager
def _working(as_json: bool) -> Iterator[tuple[Console, Callable[[str], None]]]:
    """A console for what is said (stderr where stdout is for JSON) and a line for what is waited for."""
    from sevpeft.console import Screen

    quiet = not is_main_process()
    with Screen(stderr=True, quiet=quiet).status("Loading the libraries") as status:
        quiet_libraries()
        yield Screen(quiet=quiet, stderr=as_json), status.update


def _job(
    data: str,
    output: Path,
    method: AnnotationMethod | None,
    folder: Path | None,
    lexicon: Path | None,
    temperature: float,
    replace: bool,
    batch_size: int | None,
    source: dict[str, Any],
    processes: Processes,
) -> Job:
    from sevpeft.data.read import load_consultations
    from sevpeft.severity.annotating import Job

    consultations: Consultations | None = None
    # One process makes the table in the cache folder, and the others find it there.
    for mine in (processes.main, not processes.main):
        with processes.together(), said_as_options():
            if mine:
                consultations = load_consultations(data, keep="all", **source)
    assert consultations is not None
    with processes.together():
        judge = _classifier(method, folder, lexicon, batch_size)
    return Job(consultations, judge, output, temperature=temperature, replace=replace, processes=processes)


def _classifier(
    method: AnnotationMethod | None, folder: Path | None, lexicon: Path | None, batch_size: int | None
) -> SeverityClassifier:
    if folder is None:
        from sevpeft.severity.rules import Rules

        return Rules.load(lexicon)
    from sevpeft.severity.classifier.store import load_classifier

    loaded = load_classifier(folder)
    if method is not None and loaded.kind != method.value:
        raise DataError(
            f"{folder} holds a classifier of the kind {loaded.kind}, not {method.value}: give --method {loaded.kind}, "
            "or another --classifier."
        )
    if batch_size is not None:
        if not hasattr(loaded.classifier, "batch_size"):
            raise UsageError(f"--batch-size is for --method transformer, and {folder} holds one of kind {loaded.kind}.")
        loaded.classifier.batch_size = batch_size
    return loaded


def _done(job: Job, console: Console) -> Annotation | None:
    from sevpeft.severity.annotating import annotate as annotate_rows

    try:
        with _progress(job.rows) as progress:
            return annotate_rows(
                job,
                tell=lambda said: console.print(said, soft_wrap=True),
                progress=progress,
            )
    except KeyboardInterrupt as interrupt:
        raise Interrupted("Interrupted; give the same command again to go on where it was.") from interrupt


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line now and then in a log, on the main process."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sevpeft.console import Screen

    screen = Screen(stderr=True, quiet=not is_main_process())
    if screen.is_terminal:
        columns = (TextColumn("Judging rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=screen, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, rows: bar.update(task, completed=done)
        return
    last = time.monotonic()

    def line(done: int, rows: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            screen.print(f"{done:,} of {rows:,} rows are judged")

    yield line


def _show(done: Annotation, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from sevpeft.severity.histogram import advice, effective_sample, histogram_lines

    for reason, count in done.rejected.items():
        console.print(f"Not in {done.output}: {count:,} rows with {reason}.", style="yellow", soft_wrap=True)
    for new, name in done.given.items():
        console.print(f"Kept: column {name} of the input is {new} now.", soft_wrap=True)
    if done.replaced:
        console.print(f"Replaced: {', '.join(done.replaced)}, of an earlier annotation.", soft_wrap=True)
    if done.shortened:
        console.print(
            f"Cut: of {done.shortened:,} questions the end was not read; they are longer than the classifier takes.",
            style="yellow",
            soft_wrap=True,
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("severity")
    table.add_column("likeliest in rows", justify="right")
    table.add_column("mean probability", justify="right")
    for name, count in done.counts.items():
        table.add_row(name, f"{count:,} ({count / done.rows:.0%})", f"{done.mean[name]:.3f}")
    console.print(table)
    console.print(f"Weights (preset balanced): effective sample size {effective_sample(done.weights)}")
    for line in histogram_lines(done.weights.histogram, _WIDTH):
        console.print(line, soft_wrap=True)
    if warning := advice(done.weights):
        console.print(f"Warning: {warning}", style="yellow", soft_wrap=True)
    wrote = f"Wrote {done.rows:,} rows to {done.output} ({done.method}, version {done.version})."
    for said in (wrote, f"Next: sevpeft plan RECIPE data.path={done.output}"):
        console.print(said, soft_wrap=True)
