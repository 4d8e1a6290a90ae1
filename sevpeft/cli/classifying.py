"""The verbs around a severity classifier: `classifier fit` and `classifier evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sevpeft.cli.application import app, quiet_libraries
from sevpeft.cli.classifier_options import (
    Balance,
    BlockColumn,
    Calibrate,
    CalibrationSize,
    Encoder,
    Epochs,
    JudgeBlocks,
    Kind,
    Lexicon,
    LoraR,
    Seed,
    TrainBlocks,
    block_names,
    way_of,
)
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
from sevpeft.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from sevpeft.data.read import Consultations
    from sevpeft.severity.classifier.calibration import Calibrated

classifier_verbs = typer.Typer(no_args_is_help=True, help="Fit a severity classifier, or judge one.")
app.add_typer(classifier_verbs, name="classifier")


AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


@classifier_verbs.command()
def fit(
    context: typer.Context,
    data: Input,
    output: Annotated[Path, typer.Argument(help="Folder for the classifier; must not exist", show_default=False)],
    kind: Annotated[Kind, typer.Option("--kind", help="What to fit.")] = Kind.linear,
    calibration: Calibrate = None,
    test_size: Annotated[float, typer.Option(min=0.05, max=0.5, help="Share of the rows to judge on.")] = 0.2,
    calibration_size: CalibrationSize = None,
    seed: Seed = 0,
    block_column: BlockColumn = None,
    judge_blocks: JudgeBlocks = None,
    train_blocks: TrainBlocks = None,
    lexicon: Lexicon = None,
    encoder: Encoder = None,
    balance: Balance = "weights",
    lora_r: LoraR = None,
    num_train_epochs: Epochs = 6,
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
    as_json: AsJson = False,
) -> None:
    """Fit a severity classifier, calibrate it, judge it on rows of its own and write it with its report.

    With --block-column it is also judged by holding out one block at a time, which is the honest figure where labels
    depend on the place in the file.

    Example: sevpeft classifier fit builtin:consultations severity-linear --kind linear
    """
    options = {"balance": balance, "lora_r": lora_r, "num_train_epochs": num_train_epochs}
    way = way_of(kind, calibration, calibration_size, seed, lexicon, encoder, options)
    judge, train = block_names(judge_blocks, block_column), block_names(train_blocks, block_column)
    with _working(as_json) as (console, progress):
        from sevpeft.console import print_json
        from sevpeft.runs import write_atomically
        from sevpeft.severity.classifier.card import card
        from sevpeft.severity.classifier.examples import labelled_examples
        from sevpeft.severity.classifier.fitting import cross_validate, fit_and_judge, training_record, within
        from sevpeft.severity.classifier.results import Result
        from sevpeft.severity.classifier.storage import check_new, new_folder, read_about, write_classifier

        check_new(output)
        consultations = _read(data, context)
        every = labelled_examples(consultations, block_column)
        examples = within(every, judge, train)
        classifier, judged = fit_and_judge(examples, way, test_share=test_size, judge_blocks=judge, progress=progress)
        evaluations = {"Test rows": judged}
        if block_column is not None:
            found = cross_validate(
                every, way, judge_blocks=judge, train_blocks=train, random_grouped=False, progress=progress
            )
            evaluations["Blocks held out"] = found["block-held-out"]
        progress("writing")
        record = training_record(consultations, examples, way)
        result = Result(evaluations, None)
        about = {"kind": classifier.kind, "version": classifier.version, "training": record}
        content = result.content(about)
        with new_folder(output) as folder:
            write_classifier(classifier, folder, training=record, lexicon=lexicon)
            result.write(folder, content)
            text = card(read_about(folder), record, evaluations, version=classifier.version)
            write_atomically(folder / "README.md", text)
    if as_json:
        print_json(content)
        return
    for part in result.render():
        console.print(part)
    if block_column is None:
        console.print(_NO_BLOCKS, style="yellow")
    console.print(f"Wrote {output} ({classifier.version}).", soft_wrap=True)
    console.print(f"Next: sevpeft annotate DATA OUTPUT --method {way.kind} --classifier {output}", soft_wrap=True)


@classifier_verbs.command()
def evaluate(
    context: typer.Context,
    data: Input,
    classifier: Annotated[
        Path | None, typer.Option("--classifier", help="Judge this fitted classifier on DATA.", show_default=False)
    ] = None,
    kind: Annotated[
        Kind | None, typer.Option("--kind", help="Judge this way of fitting by cross-validation.", show_default=False)
    ] = None,
    calibration: Calibrate = None,
    calibration_size: CalibrationSize = None,
    folds: Annotated[int, typer.Option(min=2, max=20, help="Of the random-grouped cross-validation.")] = 5,
    seed: Seed = 0,
    block_column: BlockColumn = None,
    judge_blocks: JudgeBlocks = None,
    train_blocks: TrainBlocks = None,
    positive_column: Annotated[
        str | None,
        typer.Option(help="Judge p_critical by this column of 0 and 1 instead of severities.", show_default=False),
    ] = None,
    seen_data: Annotated[
        bool, typer.Option("--seen-data", help="Judge on the data it was fitted on all the same.")
    ] = False,
    lexicon: Lexicon = None,
    encoder: Encoder = None,
    balance: Balance = "weights",
    lora_r: LoraR = None,
    num_train_epochs: Epochs = 6,
    output: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json and pictures; must not exist", show_default=False)
    ] = None,
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
    as_json: AsJson = False,
) -> None:
    """Judge a fitted classifier on other data, or a way of fitting by cross-validation, always beside baselines.

    Example: sevpeft classifier evaluate consultations.csv --kind linear --block-column source
    """
    if (classifier is None) == (kind is None):
        raise UsageError("Give --classifier DIR to judge a fitted classifier, or --kind to judge a way of fitting.")
    if positive_column and classifier is None:
        raise UsageError("--positive-column judges a fitted classifier: give --classifier DIR, not --kind.")
    if train_blocks and classifier is not None:
        raise UsageError("--train-blocks is for --kind: a fitted classifier is not trained again.")
    judge, train = block_names(judge_blocks, block_column), block_names(train_blocks, block_column)
    with _working(as_json) as (console, progress):
        from sevpeft.console import print_json
        from sevpeft.severity.classifier.examples import binary_examples, labelled_examples
        from sevpeft.severity.classifier.fitting import calibration_on, cross_validate, within
        from sevpeft.severity.classifier.results import Result
        from sevpeft.severity.classifier.storage import check_new, new_folder

        if output is not None:
            check_new(output)
        consultations = _read(data, context)
        fitted = None if classifier is None else _unseen(classifier, consultations, seen_data)
        about: dict[str, Any] = {"data": consultations.fingerprint}
        if fitted is None:
            options = {"balance": balance, "lora_r": lora_r, "num_train_epochs": num_train_epochs}
            way = way_of(Kind(kind), calibration, calibration_size, seed, lexicon, encoder, options)
            found = cross_validate(
                labelled_examples(consultations, block_column),
                way,
                folds=folds,
                judge_blocks=judge,
                train_blocks=train,
                progress=progress,
            )
            about |= {"kind": way.kind, "calibration": way.method, "seed": seed, "calibration_on": calibration_on(way)}
            result = Result({name.capitalize(): evaluation for name, evaluation in found.items()}, None)
        elif positive_column is None:
            from sevpeft.severity.classifier.crossvalidation import evaluate_elsewhere

            progress("judging")
            examples = within(labelled_examples(consultations, block_column), judge, judge)
            about |= {"kind": fitted.kind, "version": fitted.version}
            result = Result({"Other data": evaluate_elsewhere(fitted, examples, seed=seed)}, None)
        else:
            from sevpeft.severity.classifier.transfer import transfer

            progress("judging")
            about |= {"kind": fitted.kind, "version": fitted.version}
            examples, positive = binary_examples(consultations, positive_column)
            result = Result({}, transfer(fitted, examples, positive, positive_column, seed=seed))
        content = result.content(about)
        if output is not None:
            with new_folder(output) as folder:
                result.write(folder, content)
    if as_json:
        print_json(content)
        return
    for part in result.render():
        console.print(part)
    if fitted is None and block_column is None:
        console.print(_NO_BLOCKS, style="yellow")
    if output is not None:
        console.print(f"Wrote {output}.", soft_wrap=True)


_NO_BLOCKS = (
    "Not judged by block. Where rows that stand together were labelled together, the figures above "
    "flatter: name a column that tells such parts with --block-column."
)


@contextmanager
def _working(as_json: bool) -> Iterator[tuple[Console, Callable[[str], None]]]:
    """A console for the tables, and something to tell what is going on; it goes to stderr, away from --json."""
    from sevpeft.console import Screen

    with Screen(stderr=True).status("Loading the libraries") as status:
        quiet_libraries()
        yield Screen(quiet=as_json), lambda said: status.update(f"Severity classifier: {said}")


def _read(data: str, context: typer.Context) -> Consultations:
    from sevpeft.data.read import load_consultations

    with said_as_options():
        return load_consultations(data, keep="all", **chosen(context))


def _unseen(folder: Path, consultations: Consultations, seen_data: bool) -> Calibrated:
    """The classifier of a folder, if it was not fitted on these data."""
    from sevpeft.severity.classifier.fitting import fingerprints
    from sevpeft.severity.classifier.storage import load_classifier, read_about

    seen = set(read_about(folder)["training"].get("fingerprints", []))
    if seen & fingerprints(consultations) and not seen_data:
        raise DataError(
            f"{folder} was fitted on {consultations.source} itself, where it looks better than it is: judge it on "
            "other data, read the test rows' figures in its README.md, or insist with --seen-data."
        )
    return load_classifier(folder)
