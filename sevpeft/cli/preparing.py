"""The verb prepare: a folder to train on, made of gathered consultations."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sevpeft.cli.application import app, command_with_keys

if TYPE_CHECKING:
    from rich.console import RenderableType


@app.command(cls=command_with_keys("sevpeft.data.prepare:PrepareSettings", without=["data.path"]))
def prepare(
    data: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="File, folder or pattern, Hub data set or builtin:consultations", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to make; it must not exist", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, listed below", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what dataset.json says.")] = False,
) -> None:
    """Clean, mask, deduplicate and split consultations; nothing is lost, and all is counted.

    Example: sevpeft prepare consultations.csv data/prepared split_by=year cleaning.emoji=remove
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.data.prepare import PrepareSettings
    from sevpeft.recipe import settings_from
    from sevpeft.runs import check_absent

    settings = settings_from(PrepareSettings, overrides or [], {"data.path": data})
    check_absent(output)
    console = Screen(stderr=as_json)
    with console.status("Loading the libraries"):
        import datasets

        from sevpeft.data.prepare.prepare import prepare as prepare_rows
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    about = prepare_rows(settings, output)
    if as_json:
        print_json(about)
        return
    console.print(f"Data: {about['input']['source']}", soft_wrap=True)
    for part in _tables(about):
        console.print(part)
    for warning in about["warnings"]:
        console.print(f"Warning: {warning}")
    console.print(f"Masking is no guarantee of anonymity. The card is {output / 'README.md'}", soft_wrap=True)
    console.print(f"Next: sevpeft train recipes/quickstart.yaml data.path={output}", soft_wrap=True)


def _tables(about: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What was done, in a few lines that fit a screen."""
    from rich.table import Table

    rows, duplicates, splits = about["rows"], about["duplicates"], about["splits"]
    counts = {"read": rows["read"]} | {f"  rejected: {name}": -count for name, count in rows["rejected"].items()}
    counts |= {"kept": rows["kept"]} | {
        f"  cleaned: {step}": count for step, count in about["cleaned"].items() if count
    }
    counts |= {f"  masked: {kind}": found["rows"] for kind, found in about["masked"].items() if found["rows"]}
    steps, sides = (Table(box=None, pad_edge=False, header_style="none") for _ in range(2))
    steps.add_column("rows", min_width=34)
    steps.add_column("", justify="right")
    for name, count in counts.items():
        steps.add_row(name, f"{count:,}")
    sides.add_column(f"split by {splits['by']}", max_width=34, overflow="ellipsis", no_wrap=True)
    for side in (*splits["rows"], "all"):
        sides.add_column(side, justify="right")
    for severity, of_side in [*splits["severity"].items(), ("all", splits["rows"])]:
        sides.add_row(severity, *(f"{count:,}" for count in of_side.values()), f"{sum(of_side.values()):,}")
    yield from (steps, "", sides)
    for side, values in splits.get("held_out", {}).get("values", {}).items():
        yield f"  {side}: {values}"
    yield (
        f"\n{duplicates['groups']:,} groups of questions, the largest of {duplicates['largest_group']:,} rows: "
        f"{duplicates['equal_questions']:,} rows repeat a question, {duplicates['near_questions']:,} nearly do."
    )
