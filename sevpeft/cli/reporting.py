"""The verb `report`: a run or a comparison as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sevpeft.cli.application import app


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder that train or compare made", show_default=False)
    ],
    answers: Annotated[
        int, typer.Option("--answers", min=0, help="Questions shown with their answers; 0 leaves patients' text out.")
    ] = 120,
    as_json: Annotated[bool, typer.Option("--json", help="Print the path of the report as JSON.")] = False,
) -> None:
    """Write one HTML file: verdict, plots, tables, and the answers side by side.

    It needs no network and holds what patients wrote: keep it where the data may be.

    Example: sevpeft report runs/quickstart-20260101-120000
    """
    from sevpeft.console import Screen, print_json

    with Screen(stderr=True).status("Writing the report"):
        from sevpeft.evaluation.report.page import write_report

        written = write_report(folder, answers=answers)
    if as_json:
        print_json({"report": str(written.path), "questions": written.shown, "missing": list(written.missing)})
        return
    for line in written.missing:
        Screen().print(line, style="yellow", soft_wrap=True)
    holds = f"holds what patients wrote, {written.shown:,} questions" if written.shown else "holds no text of patients"
    Screen().print(f"Report: {written.path} ({holds})", soft_wrap=True)
