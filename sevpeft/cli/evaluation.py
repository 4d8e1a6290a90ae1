"""The verbs evaluate, choices, compare and report. Heavy imports are inside the functions."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from sevpeft.cli.application import AsJson, RunFolder, Words, app, check_early, quiet_libraries
from sevpeft.cli.training import RecipeFile
from sevpeft.console import Screen, print_json
from sevpeft.errors import UsageError
from sevpeft.runs import Run

Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Number of random rows.")]
NllOnly = Annotated[bool, typer.Option("--nll-only", help="Only the likelihood of the references, no answers.")]


@app.command()
def evaluate(
    run: RunFolder,
    overrides: Words = None,
    limit: Limit = None,
    nll_only: NllOnly = False,
    select: Annotated[bool, typer.Option("--select", help="Choose one answer among RUN and further RUNs.")] = False,
    base: Annotated[bool, typer.Option("--base", help="With --select: their base models answer too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a run's test questions, with the adapter and without it, and score the answers.

    After an interruption, the same command continues. Answers are sent nowhere, unless evaluation.judge.url and
    evaluation.judge.model name a language model to rate them.

    With --select several runs answer, and one answer is chosen for each question: sevpeft evaluate A B C --select.

    Example: sevpeft evaluate runs/quickstart-20260101-120000 generation.max_new_tokens=64 --limit 100
    """
    from sevpeft.evaluation.arms import opened_recipe

    more = [Path(word) for word in overrides or [] if "=" not in word]
    if (not select and (more or base)) or (select and nll_only):
        raise UsageError("Several runs and --base need --select, and that needs answers: add it, or leave them out.")
    settings = [word for word in overrides or [] if "=" in word]
    for one in [run, *more]:  # checked before torch is loaded, which takes seconds
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
    note_figures(Run(run))  # for its model card
    if as_json:
        print_json(content)
        return
    texts = {"Answers": PREDICTIONS} if not nll_only else {}
    texts |= {"To questions played down": MINIMIZED} if "minimized_change" in content["metrics"] else {}
    texts |= {"Verdicts": JUDGEMENTS} if "judge" in content else {}
    lines = [f"{label}: {run / name} (contains patients' text)" for label, name in texts.items()]
    lines = [f"Scores: {run / EVALUATION}", *lines, f"Next: sevpeft report {shlex.quote(str(run))}"]
    Screen().print(evaluation_tables(content))
    Screen().print("\n".join(lines), soft_wrap=True)


@app.command()
def choices(
    run: RunFolder,
    tasks: Annotated[str, typer.Option(help="JSONL files or names of published sets, separated by commas.")],
    overrides: Words = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Test a run's base model and adapter on multiple-choice questions: what did fine-tuning make the model forget?

    A file has lines of question, options, answer_index and optionally context. Report and model card show the result.

    Example: sevpeft choices runs/quickstart-20260101-120000 --tasks questions.jsonl,mmlu_medical_ar --limit 200
    """
    from rich.markdown import Markdown

    from sevpeft.evaluation.arms import opened_recipe

    opened_recipe(run, overrides or [], "choices", "evaluation")
    messages = Screen(stderr=True)
    with messages.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.evaluation.choices import choices as measure_choices
        from sevpeft.sharing.card import choices_text, note_figures

    figures = measure_choices(Run(run), tasks.split(","), overrides or [], limit=limit, console=messages)
    note_figures(Run(run), choices=figures)
    print_json(figures) if as_json else Screen().print(Markdown(choices_text(figures)))


@app.command()
def compare(
    recipe: RecipeFile,
    overrides: Words = None,
    arms: Annotated[
        str,
        typer.Option(help="Also 1-1-2, own, shuffled-ARM, ce_extra, prompt, oversampled, routed, curriculum (README)."),
    ] = "base,ce,mild,balanced,strong,shuffled,constant",
    vary: Annotated[str | None, typer.Option(help="KEY=VALUE,VALUE… (the arms, beside base), or ladder.")] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds; the split stays as data.seed sets it.")] = "0,1,2",
    folds: Annotated[int | None, typer.Option(help="Test all rows by cross-validation.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the runs; by default runs/comparison-NAME")] = None,
    nll_only: NllOnly = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe with several severity weights and controls, and test whether critical cases gain at no cost.

    The same command continues where it stopped. Started on each GPU with the same --output
    (CUDA_VISIBLE_DEVICES=0, CUDA_VISIBLE_DEVICES=1, …), the commands share the runs.

    --vary compares values of any setting with the first, such as training.learning_rate=1e-4,2e-4.
    --vary ladder starts at plain training and adds the differences of recipes/as-published one by one.

    Example: sevpeft compare recipes/quickstart.yaml --arms base,ce,balanced,shuffled --seeds 0,1,2 --nll-only
    """
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
    lines = [f"Comparison: {folder / comparing.COMPARISON}", f"Next: sevpeft report {shlex.quote(str(folder))}"]
    Screen().print(comparison_tables(content))
    Screen().print("\n".join(lines), soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of train or compare")],
    overrides: Words = None,
    answers: Annotated[
        int, typer.Option("--answers", min=0, help="Number of questions shown with answers; 0 shows no patients' text.")
    ] = 120,
    csv: Annotated[Path | None, typer.Option(help="New folder for tables and figures.")] = None,
    latex: Annotated[Path | None, typer.Option(help="The same, with tables for LaTeX.")] = None,
    review: Annotated[int | None, typer.Option(min=1, help="Also a blinded sheet of this many pairs.")] = None,
    arms: Annotated[str, typer.Option(help="The two arms of the sheet, as ce,balanced.")] = "",
    as_json: AsJson = False,
) -> None:
    """Write one HTML file: verdict, plots, tables, and the answers side by side.

    It needs no network. It contains patients' text: keep it where the data may be. evaluation.judge.file=FILE reads a
    sheet of --review that people have filled in.

    Example: sevpeft report runs/quickstart-20260101-120000
    """
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
    if written.missing:
        Screen().print("\n".join(written.missing), style="yellow", soft_wrap=True)
    holds = f"contains patients' text, {written.shown:,} questions" if written.shown else "contains no patients' text"
    Screen().print("\n".join([f"Report: {written.path} ({holds})", *notes]), soft_wrap=True)
