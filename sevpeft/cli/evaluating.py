"""The verb `evaluate`: answers, scores, floors and intervals of a run on its own test split."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sevpeft.cli.application import app, quiet_libraries


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings of generation and evaluation, as in a recipe", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only so many test rows, at random.", show_default=False)
    ] = None,
    nll_only: Annotated[
        bool, typer.Option("--nll-only", help="Only the likelihood of the references; generates nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is in evaluation.json.")] = False,
) -> None:
    """Answer a run's test questions, with the adapter and without it, and score the answers.

    An interrupted evaluation goes on where it stopped: run the same command again. Answers are sent nowhere, unless
    evaluation.judge.url and evaluation.judge.model name a language model that is to rate them.

    Example: sevpeft evaluate runs/quickstart-20260101-120000 generation.max_new_tokens=64 --limit 100
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.runs import Run, check_run

    check_run(run)
    messages = Screen(stderr=True)
    with messages.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.evaluation.evaluate import EVALUATION, PREDICTIONS
        from sevpeft.evaluation.evaluate import evaluate as evaluate_run
        from sevpeft.evaluation.judge import JUDGEMENTS
        from sevpeft.evaluation.tables import evaluation_tables

    content = evaluate_run(Run(run), overrides or [], limit=limit, answers=not nll_only, console=messages)
    if as_json:
        print_json(content)
        return
    console = Screen()
    console.print(evaluation_tables(content))
    console.print(f"Scores: {run / EVALUATION}", soft_wrap=True)
    if not nll_only:
        console.print(f"Answers: {run / PREDICTIONS} (holds what patients wrote)", soft_wrap=True)
    if "judge" in content:
        console.print(f"Verdicts: {run / JUDGEMENTS}", soft_wrap=True)
    console.print(f"Next: sevpeft report {shlex.quote(str(run))}", soft_wrap=True)
