"""The options with which a verb reads consultations, alike for all verbs, and their names in what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from sevpeft.errors import DataError

_PANEL = "Input"


def _column(what: str) -> Any:
    said = f"Column of the {what}; by default recognised by its name."
    return typer.Option(help=said, show_default=False, rich_help_panel=_PANEL)


def _option(said: str, **more: Any) -> Any:
    return typer.Option(help=said, rich_help_panel=_PANEL, **more)


Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT", help="File, folder or pattern, Hub data set or builtin:consultations", show_default=False
    ),
]
QuestionColumn = Annotated[str | None, _column("question")]
AnswerColumn = Annotated[str | None, _column("answer")]
SeverityColumn = Annotated[str | None, _column("severity")]
IdColumn = Annotated[str | None, _column("id ('row' numbers the rows)")]
DialectColumn = Annotated[str | None, _column("dialect")]
SplitColumn = Annotated[str | None, _column("split")]
Encoding = Annotated[str | None, _option("Encoding of a text file, if not UTF-8.", show_default=False)]
Name = Annotated[str | None, _option("Configuration of a Hub data set.", show_default=False)]
Revision = Annotated[str | None, _option("Branch, tag or commit of a Hub data set.", show_default=False)]
Split = Annotated[str, _option("Split of a Hub data set.")]
MaxRows = Annotated[int | None, _option("Reads no more than so many rows.", min=1, show_default=False)]

_OPTIONS = ("question", "answer", "severity", "id", "dialect", "split")
OPTIONS = (*(f"{field}_column" for field in _OPTIONS), "encoding", "name", "revision", "split", "max_rows")


def chosen(context: typer.Context) -> dict[str, Any]:
    """What the options of this call say, as `load_consultations` takes it."""
    return {name: context.params[name] for name in OPTIONS}


@contextmanager
def said_as_options() -> Iterator[None]:
    """Names a setting as the verbs have it: the rooms below speak of a recipe's."""
    try:
        yield
    except DataError as error:
        said = re.sub(r"\bdata\.path=", "", str(error))
        said = re.sub(r"\bdata\.(\w+)=", lambda found: f"--{found[1].replace('_', '-')} ", said)
        said = re.sub(r"\bdata\.(\w+)", lambda found: f"--{found[1].replace('_', '-')}", said)
        raise DataError(said) from error
