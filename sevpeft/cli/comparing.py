"""The verb `compare`: arms that differ in the severity weights alone, and whether that is to be seen."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from sevpeft.cli.application import app, quiet_libraries, refuse_several_processes
from sevpeft.errors import UsageError


@app.command()
def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE… [KEY=VALUE…]", help="Recipes, and settings for all of them", show_default=False
        ),
    ],
    arms: Annotated[
        str, typer.Option(help="base, ce, mild, balanced, strong, own (the recipe's weights), shuffled, constant.")
    ] = "base,ce,mild,balanced,strong,shuffled,constant",
    seeds: Annotated[str, typer.Option(help="Training seeds; the split stays as data.seed says.")] = "0,1,2",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs; by default runs/comparison-NAME", show_default=False)
    ] = None,
    controls_of: Annotated[
        str | None,
        typer.Option(help="Arm whose weights are shuffled; by default the one validation chooses", show_default=False),
    ] = None,
    nll_only: Annotated[
        bool, typer.Option("--nll-only", help="Only the likelihood of the references; generates nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is in comparison.json.")] = False,
) -> None:
    """Train a recipe with several severity weights and controls, and say whether severity helped.

    What is done is kept: the same command goes on where it stopped. Started once on each GPU (CUDA_VISIBLE_DEVICES=0,
    CUDA_VISIBLE_DEVICES=1, …) with the same --output, the commands share the runs.

    Example: sevpeft compare recipes/quickstart.yaml --arms base,ce,balanced,shuffled --seeds 0,1,2 --nll-only
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.evaluation.arms import parse_arms, parse_seeds

    refuse_several_processes("compare", "; once on each GPU with the same --output, the commands share the runs")
    asked_arms, asked_seeds = parse_arms(arms), parse_seeds(seeds)
    overrides = [word for word in words if re.match(r"\w+(\.\w+)*=", word)]
    recipes = [Path(word) for word in words if word not in overrides]
    if not recipes:
        raise UsageError("compare needs a recipe, such as recipes/quickstart.yaml.")
    default = f"comparison-{recipes[0].stem if len(recipes) == 1 else f'{len(recipes)}-recipes'}"
    folder = (output or Path("runs") / default).expanduser()
    messages = Screen(stderr=True)
    with messages.status("Reading the recipes and loading the libraries"):
        quiet_libraries()
        from sevpeft.evaluation.compare import COMPARISON, Comparison
        from sevpeft.evaluation.comparison_table import comparison_tables
        from sevpeft.sharing.card import write_card

        comparison = Comparison(
            recipes,
            overrides,
            arms=asked_arms,
            seeds=asked_seeds,
            output=folder,
            controls_of=controls_of,
            answers=not nll_only,
            console=messages,
            on_trained=write_card,
        )
    content = comparison.run()
    messages.print(f"Trained here: {comparison.trained} run{'' if comparison.trained == 1 else 's'}.")
    if as_json:
        print_json(content)
        return
    console = Screen()
    console.print(comparison_tables(content))
    console.print(f"Comparison: {folder / COMPARISON}", soft_wrap=True)
    console.print(f"Next: sevpeft report {shlex.quote(str(folder))}", soft_wrap=True)
