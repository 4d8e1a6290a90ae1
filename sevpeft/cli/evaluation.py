"""The verbs evaluate, choices, compare and report: what a training has changed. Heavy imports stand inside."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from sevpeft.cli.application import AsJson, RunFolder, Words, app, check_early, quiet_libraries
from sevpeft.cli.training import RecipeFile
from sevpeft.errors import UsageError

Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only so many rows, at random.", show_default=False)]
NllOnly = Annotated[bool, typer.Option("--nll-only", help="Only the likelihood of the references; generates nothing.")]


@app.command()
def evaluate(
    run: RunFolder,
    overrides: Words = None,
    limit: Limit = None,
    nll_only: NllOnly = False,
    select: Annotated[bool, typer.Option("--select", help="Choose one answer of RUN and further RUNs.")] = False,
    base: Annotated[bool, typer.Option("--base", help="With --select: also of their base models.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a run's test questions, with the adapter and without it, and score the answers.

    An interrupted evaluation goes on where it stopped: run the same command again. Answers are sent nowhere, unless
    evaluation.judge.url and evaluation.judge.model name a language model that is to rate them.

    With --select several runs answer, and one answer to each question is chosen: sevpeft evaluate A B C --select.

    Example: sevpeft evaluate runs/quickstart-20260101-120000 generation.max_new_tokens=64 --limit 100
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.evaluation.arms import opened_recipe
    from sevpeft.runs import Run

    more = [Path(word) for word in overrides or [] if "=" not in word]
    if (not select and (more or base)) or (select and nll_only):
        raise UsageError("Several runs and --base need --select, and that needs answers: add it, or leave them out.")
    settings = [word for word in overrides or [] if "=" in word]
    for one in [run, *more]:  # before anybody waits for torch
        opened_recipe(one, settings, "evaluate", "generation", "evaluation")
    messages = Screen(stderr=True)
    with messages.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.evaluation import selection
        from sevpeft.evaluation.evaluate import EVALUATION, MINIMIZED, PREDICTIONS
        from sevpeft.evaluation.evaluate import evaluate as evaluate_run
        from sevpeft.evaluation.judge import JUDGEMENTS
        from sevpeft.evaluation.tables import evaluation_tables
        from sevpeft.sharing.card import note_figures

    if select:
        found = selection.select([run, *more], settings, base=base, limit=limit, console=messages)
        print_json(found) if as_json else Screen().print(selection.selection_tables(found))
        return
    content = evaluate_run(Run(run), settings, limit=limit, answers=not nll_only, console=messages)
    note_figures(Run(run))  # its card shows them
    if as_json:
        print_json(content)
        return
    texts = {"Answers": PREDICTIONS} if not nll_only else {}
    texts |= {"To questions played down": MINIMIZED} if "minimized_change" in content["metrics"] else {}
    texts |= {"Verdicts": JUDGEMENTS} if "judge" in content else {}
    lines = [f"{label}: {run / name} (holds what patients wrote)" for label, name in texts.items()]
    console = Screen()
    console.print(evaluation_tables(content))
    for line in (f"Scores: {run / EVALUATION}", *lines, f"Next: sevpeft report {shlex.quote(str(run))}"):
        console.print(line, soft_wrap=True)


@app.command()
def choices(
    run: RunFolder,
    tasks: Annotated[str, typer.Option(help="JSONL files or names of published sets, separated by commas.")],
    overrides: Words = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Ask a run's base model and its adapter multiple choice: what has fine-tuning made the model forget?

    A file has lines of question, options, answer_index and perhaps context. Report and model card show the result.

    Example: sevpeft choices runs/quickstart-20260101-120000 --tasks questions.jsonl,mmlu_medical_ar --limit 200
    """
    from rich.markdown import Markdown

    from sevpeft.console import Screen, print_json
    from sevpeft.evaluation.arms import opened_recipe
    from sevpeft.runs import Run

    opened_recipe(run, overrides or [], "choices", "evaluation")
    messages = Screen(stderr=True)
    with messages.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.evaluation.choices import choices as ask
        from sevpeft.sharing.card import choices_text, note_figures

    figures = ask(Run(run), tasks.split(","), overrides or [], limit=limit, console=messages)
    note_figures(Run(run), choices=figures)
    print_json(figures) if as_json else Screen().print(Markdown(choices_text(figures)))


@app.command()
def compare(
    recipe: RecipeFile,
    overrides: Words = None,
    arms: Annotated[
        str,
        typer.Option(help="Also 1-1-2, own (the recipe's weights), shuffled-ARM, ce_extra, prompt and oversampled."),
    ] = "base,ce,mild,balanced,strong,shuffled,constant",
    vary: Annotated[
        str | None, typer.Option(help="KEY=VALUE,VALUE… (the arms, beside base), or ladder.", show_default=False)
    ] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds; the split stays as data.seed sets it.")] = "0,1,2",
    folds: Annotated[int | None, typer.Option(help="Tests all rows, in so many parts.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs; by default runs/comparison-NAME", show_default=False)
    ] = None,
    nll_only: NllOnly = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe with several severity weights and controls, and test whether critical cases gain at no price.

    Finished work is kept: the same command continues where it stopped. Started once on each GPU
    (CUDA_VISIBLE_DEVICES=0, CUDA_VISIBLE_DEVICES=1, …) with the same --output, the commands share the runs.

    --vary compares values of any setting instead, such as training.learning_rate=1e-4,2e-4, with the first of them.
    --vary ladder starts at plain training and adds, one by one, what a recipe of recipes/as-published does otherwise.

    Example: sevpeft compare recipes/quickstart.yaml --arms base,ce,balanced,shuffled --seeds 0,1,2 --nll-only
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.evaluation.arms import check_arms, parse_arms, parse_seeds, parse_vary
    from sevpeft.recipe import load_recipe

    folder = (output or Path("runs") / f"comparison-{recipe.name.removesuffix('.yaml')}").expanduser()
    given, chosen = load_recipe(recipe, overrides or []), parse_arms(arms)
    settings: dict[str, Any] = {"arms": chosen, "seeds": parse_seeds(seeds), "answers": not nll_only}
    if vary:
        parse_vary(vary, recipe, overrides or [])
    check_arms(given, () if vary else chosen, folder)
    check_early(given, "compare")
    messages = Screen(stderr=True)
    with messages.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.evaluation import compare as comparing
        from sevpeft.evaluation.tables import comparison_tables
        from sevpeft.sharing.card import write_card
    settings |= {"output": folder, "console": messages, "on_trained": write_card, "vary": vary, "folds": folds}
    content = comparing.compare(recipe, overrides or [], **settings)
    if as_json:
        print_json(content)
        return
    console = Screen()
    console.print(comparison_tables(content))
    console.print(f"Comparison: {folder / comparing.COMPARISON}", soft_wrap=True)
    console.print(f"Next: sevpeft report {shlex.quote(str(folder))}", soft_wrap=True)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder that train or compare made", show_default=False)
    ],
    overrides: Words = None,
    answers: Annotated[
        int, typer.Option("--answers", min=0, help="Questions shown with their answers; 0 leaves patients' text out.")
    ] = 120,
    csv: Annotated[Path | None, typer.Option(help="New folder: tables and figures.", show_default=False)] = None,
    latex: Annotated[Path | None, typer.Option(help="The same, the tables for LaTeX.", show_default=False)] = None,
    review: Annotated[int | None, typer.Option(min=1, help="Also a blinded sheet of so many pairs to rate.")] = None,
    arms: Annotated[str, typer.Option(help="The two arms of the sheet, as ce,balanced.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """Write one HTML file: verdict, plots, tables, and the answers side by side.

    It needs no network and holds what patients wrote: keep it where the data may be. evaluation.judge.file=FILE reads
    a sheet of --review that people have filled in.

    Example: sevpeft report runs/quickstart-20260101-120000
    """
    from sevpeft.console import Screen, print_json

    with Screen(stderr=True).status("Writing the report"):
        from sevpeft.evaluation.report.export import export
        from sevpeft.evaluation.report.page import write_report
        from sevpeft.evaluation.tables import evaluation_tables

        notes, ratings = export(folder, csv=csv, latex=latex) if csv or latex else [], None
        if review or overrides:
            from sevpeft.evaluation.report.review import read_review, settings_of, write_review

            settings = settings_of(folder, overrides or [])
            notes += write_review(folder, review, arms, settings) if review else []
            ratings = None if review else read_review(folder, settings)
        written = write_report(folder, answers=answers)
    if as_json:
        result = {"report": str(written.path), "questions": written.shown, "missing": list(written.missing)}
        print_json(result | ({"review": ratings} if ratings else {}))
        return
    if ratings:
        Screen().print(evaluation_tables(ratings))
    for line in written.missing:
        Screen().print(line, style="yellow", soft_wrap=True)
    holds = f"holds what patients wrote, {written.shown:,} questions" if written.shown else "holds no text of patients"
    for line in (f"Report: {written.path} ({holds})", *notes):
        Screen().print(line, soft_wrap=True)
