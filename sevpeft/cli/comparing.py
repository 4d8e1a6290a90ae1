"""The verb `compare`: arms that differ in the severity weights alone, and whether that makes a difference."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from sevpeft.cli.application import app, quiet_libraries
from sevpeft.errors import UsageError


@app.command()
def compare(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE… [KEY=VALUE…]", help="Recipes, settings for all", show_default=False)
    ],
    arms: Annotated[
        str, typer.Option(help="base, ce, mild, balanced, strong, own (the recipe's weights), shuffled, constant.")
    ] = "base,ce,mild,balanced,strong,shuffled,constant",
    seeds: Annotated[str, typer.Option(help="Training seeds; the split stays as data.seed sets it.")] = "0,1,2",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs; by default runs/comparison-NAME", show_default=False)
    ] = None,
    nll_only: Annotated[
        bool, typer.Option("--nll-only", help="Only the likelihood of the references; generates nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content of comparison.json.")] = False,
) -> None:
    """Train a recipe with several severity weights and controls, and judge whether severity helped.

    Finished work is kept: the same command continues where it stopped. Started once on each GPU
    (CUDA_VISIBLE_DEVICES=0, CUDA_VISIBLE_DEVICES=1, …) with the same --output, the commands share the runs.

    Example: sevpeft compare recipes/quickstart.yaml --arms base,ce,balanced,shuffled --seeds 0,1,2 --nll-only
    """
    from sevpeft.console import Screen, print_json

    overrides = [word for word in words if re.match(r"\w+(\.\w+)*=", word)]
    recipes = [Path(word) for word in words if word not in overrides]
    if not recipes:
        raise UsageError("compare needs a recipe, such as recipes/quickstart.yaml.")
    name = recipes[0].stem if len(recipes) == 1 else f"{len(recipes)}-recipes"
    folder = (output or Path("runs") / f"comparison-{name}").expanduser()
    messages = Screen(stderr=True)
    with messages.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.evaluation import compare as comparing
        from sevpeft.evaluation.arms import parse_arms, parse_seeds
        from sevpeft.evaluation.tables import comparison_tables
        from sevpeft.sharing.card import write_card
    settings: dict[str, Any] = {"arms": parse_arms(arms), "seeds": parse_seeds(seeds), "answers": not nll_only}
    content = comparing.compare(recipes, overrides, output=folder, console=messages, on_trained=write_card, **settings)
    if as_json:
        print_json(content)
        return
    console = Screen()
    console.print(comparison_tables(content))
    console.print(f"Comparison: {folder / comparing.COMPARISON}", soft_wrap=True)
    console.print(f"Next: sevpeft report {shlex.quote(str(folder))}", soft_wrap=True)
