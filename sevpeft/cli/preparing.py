"""The verb that turns gathered consultations into a folder to train on: prepare."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sevpeft.cli.application import app
from sevpeft.cli.reading import (
    AnswerColumn,
    DialectColumn,
    Encoding,
    IdColumn,
    Input,
    MaxRows,
    Name,
    QuestionColumn,
    Revision,
    SeverityColumn,
    Split,
    SplitColumn,
    chosen,
    said_as_options,
)
from sevpeft.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

_CLEANING, _MASKING, _DIVIDING = "Cleaning", "Masks and rejections", "Duplicates and splits"


def _option(said: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=said, rich_help_panel=panel, **more)


@app.command()
def prepare(
    context: typer.Context,
    input_: Input,
    output: Annotated[Path, typer.Argument(help="Folder to make; it must not exist", show_default=False)],
    question_column: QuestionColumn = None,
    answer_column: AnswerColumn = None,
    severity_column: SeverityColumn = None,
    id_column: IdColumn = None,
    dialect_column: DialectColumn = None,
    split_column: SplitColumn = None,
    encoding: Encoding = None,
    name: Name = None,
    revision: Revision = None,
    split: Split = "train",
    max_rows: MaxRows = None,
    no_mojibake: Annotated[
        bool, _option("Leave text that was decoded with the wrong code page.", _CLEANING, "--no-mojibake")
    ] = False,
    no_html: Annotated[bool, _option("Leave HTML tags and entities.", _CLEANING, "--no-html")] = False,
    no_unicode: Annotated[
        bool, _option("Leave decomposed letters and presentation forms.", _CLEANING, "--no-unicode")
    ] = False,
    no_invisible: Annotated[
        bool, _option("Leave zero-width, bidi and control characters.", _CLEANING, "--no-invisible")
    ] = False,
    no_tatweel: Annotated[bool, _option("Leave elongation.", _CLEANING, "--no-tatweel")] = False,
    no_digits: Annotated[bool, _option("Leave Arabic-Indic digits.", _CLEANING, "--no-digits")] = False,
    no_repeated_letters: Annotated[
        bool, _option("Leave letters typed three times and more.", _CLEANING, "--no-repeated-letters")
    ] = False,
    no_repeated_punctuation: Annotated[
        bool, _option("Leave repeated punctuation.", _CLEANING, "--no-repeated-punctuation")
    ] = False,
    no_greetings: Annotated[bool, _option("Leave greetings and thanks.", _CLEANING, "--no-greetings")] = False,
    no_whitespace: Annotated[bool, _option("Leave spaces and line breaks.", _CLEANING, "--no-whitespace")] = False,
    tashkeel: Annotated[bool, _option("Take out vowel marks too.", _CLEANING, "--tashkeel")] = False,
    emoji: Annotated[
        Literal["keep", "remove", "name"],
        _option("Emoji: keep, remove, or name (write their names).", _CLEANING, metavar="HOW"),
    ] = "keep",
    no_mask_phone: Annotated[bool, _option("Leave phone numbers.", _MASKING, "--no-mask-phone")] = False,
    no_mask_email: Annotated[bool, _option("Leave e-mail addresses.", _MASKING, "--no-mask-email")] = False,
    no_mask_link: Annotated[bool, _option("Leave links.", _MASKING, "--no-mask-link")] = False,
    no_mask_national_id: Annotated[bool, _option("Leave national ids.", _MASKING, "--no-mask-national-id")] = False,
    no_mask_name: Annotated[bool, _option("Leave names after a title.", _MASKING, "--no-mask-name")] = False,
    allow: Annotated[
        list[str] | None, _option("Reject no row for this REASON; may be repeated.", _MASKING, metavar="REASON")
    ] = None,
    near_duplicates: Annotated[
        float, _option("Similarity (Jaccard) of near-duplicate questions; 1: equal ones only.", _DIVIDING)
    ] = 0.7,
    drop_duplicates: Annotated[
        Literal["none", "exact", "near"],
        _option("Keep the first of equal consultations, or of near-duplicate questions.", _DIVIDING),
    ] = "exact",
    split_by: Annotated[
        str | None,
        _option("Hold out whole values of this COLUMN; numbers and dates: the newest.", _DIVIDING, metavar="COLUMN"),
    ] = None,
    resplit: Annotated[
        bool, _option("Split anew although the rows have a split already.", _DIVIDING, "--resplit")
    ] = False,
    validation_size: Annotated[str, _option("Share or number of rows to validate on.", _DIVIDING)] = "0.1",
    test_size: Annotated[str, _option("Share or number of rows kept for the test; 0: none.", _DIVIDING)] = "0.1",
    seed: Annotated[int, _option("Seed of the split.", _DIVIDING, min=0)] = 0,
    num_proc: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one a core.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what dataset.json says.")] = False,
) -> None:
    """Clean, mask, deduplicate and split consultations; nothing is lost, and all is counted.

    Example: sevpeft prepare consultations.csv data/prepared --split-by year
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.data.folders import refuse_existing

    refuse_existing(output)
    console = Screen(stderr=as_json)
    with console.status("Loading the libraries"):
        import datasets

        from sevpeft.data.cleaning import Cleaning
        from sevpeft.data.preparing import Preparation
        from sevpeft.data.preparing import prepare as prepare_rows
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    left = {
        "phone": no_mask_phone,
        "email": no_mask_email,
        "link": no_mask_link,
        "national_id": no_mask_national_id,
        "name": no_mask_name,
    }
    settings = Preparation(
        cleaning=Cleaning(
            mojibake=not no_mojibake,
            html=not no_html,
            unicode=not no_unicode,
            invisible=not no_invisible,
            tatweel=not no_tatweel,
            tashkeel=tashkeel,
            digits=not no_digits,
            repeated_letters=not no_repeated_letters,
            repeated_punctuation=not no_repeated_punctuation,
            emoji=emoji,
            greetings=not no_greetings,
            whitespace=not no_whitespace,
        ),
        masks=tuple(kind for kind, is_left in left.items() if not is_left),
        allow=tuple(allow or ()),
        near_duplicates=near_duplicates,
        drop_duplicates=drop_duplicates,
        split_by=split_by,
        resplit=resplit,
        validation_size=_size("--validation-size", validation_size),
        test_size=_size("--test-size", test_size),
        seed=seed,
    )
    with said_as_options():
        about = prepare_rows(
            input_,
            output,
            settings,
            num_proc=num_proc,
            **chosen(context),
        )
    if as_json:
        print_json(about)
        return
    console.print(f"Data: {about['input']['source']}", soft_wrap=True, markup=False)
    for part in _tables(about):
        console.print(part)
    for warning in about["warnings"]:
        console.print(f"Warning: {warning}")
    console.print(f"Masking is no guarantee of anonymity. The card is {output / 'README.md'}", soft_wrap=True)
    console.print(f"Next: sevpeft train recipes/quickstart.yaml data.path={output}", soft_wrap=True)


def _size(option: str, written: str) -> float | int:
    """A share as a float and a number of rows as an int, as a recipe tells them apart."""
    try:
        return int(written) if written.strip().lstrip("+-").isdigit() else float(written)
    except ValueError:
        raise UsageError(f"{option} {written} is no number; write 0.1 for a tenth, 500 for 500 rows.") from None


def _tables(about: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What was done, in a few lines that fit a screen."""
    from rich.table import Table

    from sevpeft.data.splits import SIDES

    rows, duplicates, splits = about["rows"], about["duplicates"], about["splits"]
    steps = Table(box=None, pad_edge=False, header_style="none")
    steps.add_column("rows", min_width=34)
    steps.add_column("", justify="right")
    steps.add_row("read", f"{rows['read']:,}")
    for reason, count in rows["rejected"].items():
        steps.add_row(f"  rejected: {reason}", f"-{count:,}")
    steps.add_row("kept", f"{rows['kept']:,}")
    done = {f"  cleaned: {step}": count for step, count in about["cleaned"].items() if count}
    done |= {f"  masked: {kind}": found["rows"] for kind, found in about["masked"].items() if found["rows"]}
    for step, count in done.items():
        steps.add_row(step, f"{count:,}")
    yield steps
    yield ""
    sides = Table(box=None, pad_edge=False, header_style="none")
    sides.add_column(f"split by {splits['by']}", max_width=34, overflow="ellipsis", no_wrap=True)
    for side in (*SIDES, "all"):
        sides.add_column(side, justify="right")
    for severity, counts in [*splits["severity"].items(), ("all", splits["rows"])]:
        sides.add_row(severity, *(f"{counts[side]:,}" for side in SIDES), f"{sum(counts.values()):,}")
    yield sides
    if held := splits.get("held_out"):
        for side in SIDES:
            yield f"  {side}: {held['values'][side]}"
    yield ""
    yield (
        f"{duplicates['groups']:,} groups of questions, the largest of {duplicates['largest_group']:,} rows: "
        f"{duplicates['equal_questions']:,} rows repeat a question, {duplicates['near_questions']:,} nearly do."
    )
