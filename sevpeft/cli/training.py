"""The verbs train, plan and recipes. Heavy imports stand inside, so that --help answers at once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sevpeft.cli.application import AsJson, Words, app, is_main_process, quiet_libraries
from sevpeft.errors import ModelError, UsageError
from sevpeft.runs import write_atomically

if TYPE_CHECKING:
    from rich.table import Table

RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/quickstart.yaml", show_default=False)]


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Words = None,
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

    loaded = load_recipe(recipe, overrides or [])
    if resume and output is None:
        raise UsageError("--resume needs --output RUN, the folder of the run to continue.")
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
    recipe: RecipeFile,
    overrides: Words = None,
    vram: Annotated[
        float | None,
        typer.Option(min=1, max=1e5, help="GB of your GPU; exit code 1 if too small.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Also shows so many training rows of each severity.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Writes these rows (20) as a page.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a recipe would train on and what it needs, without training: data, weights, steps, memory, time.

    Example: sevpeft plan recipes/llama-2-7b.yaml data.path=consultations.csv severity.source=rules --vram 12
    """
    from sevpeft.console import Screen, print_json, print_text
    from sevpeft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if html and (html.suffix != ".html" or not html.parent.is_dir()):
        raise UsageError(f"--html={html} must be a file that ends in .html, in a folder that exists.")
    with Screen(stderr=True).status(f"Reading {recipe} and its data"):
        quiet_libraries()
        from sevpeft.evaluation.report.page import rows_text
        from sevpeft.training.plan import plan as plan_of
        from sevpeft.training.plan import training_rows
        from sevpeft.training.screen import show_plan

        found = plan_of(loaded, vram=vram)
        shown = training_rows(loaded, rows or 20) if rows or html else []
    if html:
        write_atomically(html, rows_text(shown, "rows.html.jinja", **vars(found)))
    if as_json:
        print_json(found.as_dict() | ({"training_rows": shown} if shown else {}))
    else:
        show_plan(found, Screen())
        print_text(f"Rows: {html} (holds what patients wrote)\n" if html else rows_text(shown), end="")
    if vram is not None and found.fitting is None:
        raise ModelError(
            f"Whether it fits in {vram:g} GB is not known: {found.memory_unknown} The numbers may also "
            "stand in the recipe, as about.config."
        )
    if found.fitting is not None and not found.fitting.fits:
        raise typer.Exit(1)


@app.command()
def recipes(
    folder: Annotated[Path, typer.Argument(help="Folder of recipes")] = Path("recipes"),
    vram: Annotated[
        float | None, typer.Option(min=1, max=1e5, help="Only those that fit a GPU of so many GB.", show_default=False)
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the recipes, or print their JSON Schema for an editor.

    Example: sevpeft recipes --vram 12
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.recipe import recipe_schema

    if schema:
        print_json(recipe_schema())
        return
    found = list_recipes(folder, vram)
    if as_json:
        print_json(found)
    else:
        Screen().print(recipes_table(found))


def list_recipes(folder: Path, vram: float | None = None) -> list[dict[str, Any]]:
    """Every recipe of a folder, or those that fit a GPU of `vram` GB; smallest base model first."""
    from sevpeft.recipe import load_recipe

    loaded = [(path, load_recipe(path)) for path in sorted(folder.glob("*.yaml"))]
    if not loaded:
        raise UsageError(f"There are no recipes in {folder}; run this in the checkout, or name their folder.")
    return [
        {
            "recipe": str(path),
            "model": recipe.model.name_or_path,
            "parameters": recipe.about.parameters,
            "adapter": "QLoRA" if recipe.quantization.quantized() else "LoRA",
            "license": recipe.about.license,
            "gated": recipe.about.gated,
            "vram_gib": recipe.about.vram_gib,
        }
        for path, recipe in sorted(loaded, key=lambda pair: pair[1].about.parameter_count() or 0)
        if vram is None or (recipe.about.vram_gib or 0) <= vram
    ]


def recipes_table(recipes: list[dict[str, Any]]) -> Table:
    """The list as a table that fits 80 columns."""
    from rich.table import Column, Table

    names = ("recipe", "size", "GPU", "license")
    table = Table(*(Column(name, overflow="fold") for name in names), box=None, padding=(0, 2, 0, 0))
    for row in recipes:
        memory = f"{row['vram_gib']:g} GB" if row["vram_gib"] else "CPU"
        terms = f"{row['license'] or 'not stated'}{' (gated)' if row['gated'] else ''}"
        table.add_row(Path(row["recipe"]).name, row["parameters"] or "", memory, terms)
    return table
