"""The verbs around one training: train, chat, recipes. Heavy imports stand inside, so that --help answers at once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sevpeft.cli.application import app, check_one_process, is_main_process, quiet_libraries
from sevpeft.console import output_error
from sevpeft.errors import ModelError, UsageError


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/quickstart.yaml", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder; by default a new one under runs/", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
) -> None:
    """Train a recipe's adapter.

    Example: sevpeft train recipes/qwen2.5-0.5b.yaml data.path=consultations.csv training.num_train_epochs=1
    """
    from sevpeft.console import Screen
    from sevpeft.recipe import load_recipe
    from sevpeft.runs import check_output

    loaded = load_recipe(recipe, overrides or [])
    if resume and output is None:
        raise UsageError("--resume needs --output RUN, the folder of the run to continue.")
    if output is not None and is_main_process():
        output = output.expanduser()
        check_output(output, resume=resume)
    console = Screen(quiet=not is_main_process())
    with console.status(f"Reading {recipe} and loading the libraries"):
        quiet_libraries()
        from sevpeft.sharing.card import write_card
        from sevpeft.training.train import train as train_recipe
    from sevpeft.training.screen import run_summary

    run = train_recipe(loaded, output, resume=resume, console=console)
    if is_main_process():
        write_card(run)
        console.print(run_summary(run))
        again = shlex.quote(str(run.folder))
        console.print(f"Next: sevpeft evaluate {again}, or sevpeft chat {again}", soft_wrap=True)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/quickstart.yaml", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's", show_default=False),
    ] = None,
    vram: Annotated[
        float | None,
        typer.Option(min=1, max=1e5, help="GB of your GPU; exit code 1 if too small.", show_default=False),
    ] = None,
    tflops: Annotated[
        float,
        typer.Option(min=0.1, max=1e6, help="Dense bfloat16 peak of your GPU; an RTX 4090's by default."),
    ] = 165.0,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of that peak that a training reaches.")
    ] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a recipe would train on and what it needs, without training: data, weights, steps, memory, time.

    Example: sevpeft plan recipes/llama-2-7b.yaml data.path=consultations.csv severity.source=rules --vram 12
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    with Screen(stderr=True).status(f"Reading {recipe} and its data"):
        quiet_libraries()
        from sevpeft.training.plan import plan as plan_of
        from sevpeft.training.screen import show_plan

        found = plan_of(loaded, vram=vram, tflops=tflops, efficiency=efficiency)
    if as_json:
        print_json(found.as_dict())
    else:
        show_plan(found, Screen())
    if vram is not None and found.fitting is None:
        raise ModelError(
            f"Whether it fits in {vram:g} GB is not known: {found.memory_unknown} The numbers may also "
            "stand in the recipe, as about.config."
        )
    if found.fitting is not None and not found.fitting.fits:
        raise typer.Exit(1)


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run", show_default=False)],
    question: Annotated[
        str | None, typer.Option(help="Ask this and leave; else questions are read line by line.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
) -> None:
    """Chat with a trained adapter. Its answers are no medical advice.

    Example: sevpeft chat runs/quickstart-20260101-120000 --question "عندي صداع من امبارح"
    """
    from sevpeft.console import Screen, print_text
    from sevpeft.runs import Run, check_run

    check_one_process("chat")
    check_run(run)
    with Screen(stderr=True).status(f"Loading the adapter of {run}"):
        quiet_libraries()
        from sevpeft.sharing.chat import Chat

        adapter = Chat(Run(run))
    if question is not None:
        print_text(adapter.answer(question, max_new_tokens))
        return
    if sys.stdin.isatty():
        print_text("Every question stands alone; an empty line leaves. Not medical advice.", stderr=True)
    while output_error() is None and (line := _read_line()):
        print_text(adapter.answer(line, max_new_tokens), end="\n\n")


@app.command()
def recipes(
    folder: Annotated[Path, typer.Argument(help="Folder of recipes")] = Path("recipes"),
    vram: Annotated[
        float | None, typer.Option(min=1, max=1e5, help="Only those that fit a GPU of so many GB.", show_default=False)
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the recipes, or print their JSON Schema for an editor.

    Example: sevpeft recipes --vram 12
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.recipe import recipe_schema

    if schema:
        print_json(recipe_schema())
        return
    from sevpeft.recipe.listing import list_recipes, recipes_table

    found = list_recipes(folder, vram)
    if as_json:
        print_json(found)
        return
    Screen().print(recipes_table(found))


def _read_line() -> str:
    """A line from the keyboard or a pipe; empty at its end."""
    try:
        return input("? " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
