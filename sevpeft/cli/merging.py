"""The verb `merge`: a run's adapter and its base as one model, checked against the two."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sevpeft.cli.application import app, quiet_libraries
from sevpeft.errors import UsageError


class BaseChoice(str, Enum):
    auto = "auto"
    unquantized = "unquantized"
    dequantized = "dequantized"


class DtypeChoice(str, Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model, a new one", show_default=False)],
    base: Annotated[
        BaseChoice, typer.Option("--base", help="Weights to merge a 4- or 8-bit run into; auto: the nearer ones.")
    ] = BaseChoice.auto,
    dtype: Annotated[
        DtypeChoice, typer.Option("--dtype", help="Precision of the weights; auto: as the base model is stored.")
    ] = DtypeChoice.auto,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest weight file, as 5GB.")] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Merge a run's adapter into its base model, for programs that read no adapters.

    A run in 4 or 8 bit is merged into the unquantized base and into the dequantized
    one that it was trained on; both are measured, and the nearer one is written.
    A model that is farther from what was trained than the base alone is not kept.

    Example: sevpeft merge runs/quickstart-20260101-120000 merged
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.runs import Run, check_run

    check_run(run)
    if not _is_size(max_shard_size):
        raise UsageError(f"--max-shard-size {max_shard_size} is no size; write 5GB, or 500MB.")
    messages = Screen(stderr=True)
    with messages.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.sharing.merge import merge as merge_run
        from sevpeft.sharing.merge_report import announce_merged

    merged = merge_run(
        Run(run),
        output,
        base=base.value,
        dtype=dtype.value,
        max_shard_size=max_shard_size.upper(),
        console=messages,
    )
    if as_json:
        print_json({"output": str(output), **merged.as_dict()})
        return
    announce_merged(merged, Run(run), output, Screen())


def _is_size(text: str) -> bool:
    return re.fullmatch("0*[1-9][0-9]*[GMK]B", text.upper()) is not None
