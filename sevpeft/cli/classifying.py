"""The verbs around a severity classifier: `classifier fit` and `classifier evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sevpeft.cli.application import app, quiet_libraries
from sevpeft.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from sevpeft.data.sources import Consultations
    from sevpeft.severity.classifier.calibration import Calibrated
    from sevpeft.severity.classifier.fitting import Way

classifier_verbs = typer.Typer(no_args_is_help=True, help="Fit a severity classifier, or judge one.")
app.add_typer(classifier_verbs, name="classifier")


class Kind(str, Enum):
    linear = "linear"
    transformer = "transformer"
    rules = "rules"
    combined = "rules+linear"


class Method(str, Enum):
    temperature = "temperature"
    bias_corrected = "bias_corrected"
    isotonic = "isotonic"


Data = Annotated[
    str, typer.Argument(help="File, prepared folder, Hub data set or builtin:consultations", show_default=False)
]
QuestionColumn = Annotated[
    str | None, typer.Option("--question-column", help="Column of questions, if not found by name.", show_default=False)
]
AnswerColumn = Annotated[
    str | None, typer.Option("--answer-column", help="Column of answers, if not found by name.", show_default=False)
]
SeverityColumn = Annotated[
    str | None, typer.Option("--severity-column", help="Column of labels, if not found by name.", show_default=False)
]
Calibrate = Annotated[
    Method | None,
    typer.Option(
        "--calibration",
        help="By default temperature for linear and rules+linear, bias_corrected for rules and transformer.",
        show_default=False,
    ),
]
CalibrationSize = Annotated[
    float | None,
    typer.Option(
        "--calibration-size",
        help="Share of the training rows that calibrates and does not train. 0: all calibrate, each by a fit without "
        "it (the default; 0.2 for the transformer, where it takes six trainings).",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the splits, the fit and the intervals.")]
Balance = Annotated[
    str, typer.Option("--balance", help="Of the transformer's severities: weights, resampling or none.")
]
LoraR = Annotated[
    int | None,
    typer.Option("--lora-r", min=1, help="Train LoRA adapters of this rank on the encoder.", show_default=False),
]
Epochs = Annotated[float, typer.Option("--num-train-epochs", min=0.1, help="Of the transformer, at most.")]
Lexicon = Annotated[
    Path | None, typer.Option("--lexicon", help="Of the rules; by default the package's.", show_default=False)
]
Encoder = Annotated[
    str | None,
    typer.Option("--encoder", help="Of the transformer: Hub id or folder; by default CAMeLBERT.", show_default=False),
]
BlockColumn = Annotated[
    str | None,
    typer.Option("--block-column", help="Column of blocks (source, year) to hold out in turn.", show_default=False),
]
JudgeBlocks = Annotated[
    str | None, typer.Option("--judge-blocks", help="Blocks to judge, such as D,F; by default all.", show_default=False)
]
TrainBlocks = Annotated[
    str | None,
    typer.Option("--train-blocks", help="Blocks that may be trained on; by default all.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


@classifier_verbs.command()
def fit(
    data: Data,
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
    as_json: AsJson = False,
) -> None:
    """Fit a severity classifier, calibrate it, judge it on rows of its own and write it with its report.

    With --block-column it is also judged by holding out one block at a time, which is the honest figure where labels
    depend on the place in the file.

    Example: sevpeft classifier fit builtin:consultations severity-linear --kind linear
    """
    options = {"balance": balance, "lora_r": lora_r, "num_train_epochs": num_train_epochs}
    way = _way(kind, calibration, calibration_size, seed, lexicon, encoder, options)
    judge, train = _names(judge_blocks, block_column), _names(train_blocks, block_column)
    with _working(as_json) as (console, progress):
        from sevpeft.runs import write_atomically
        from sevpeft.severity.classifier.card import card
        from sevpeft.severity.classifier.examples import labelled_examples
        from sevpeft.severity.classifier.fitting import cross_validate, fit_and_judge, training_record, within
        from sevpeft.severity.classifier.results import Result
        from sevpeft.severity.classifier.storage import check_new, new_folder, read_about, write_classifier

        check_new(output)
        consultations = _read(data, question_column, answer_column, severity_column)
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
        print(json.dumps(content, ensure_ascii=False, indent=2))
        return
    for part in result.render():
        console.print(part)
    if block_column is None:
        console.print(_NO_BLOCKS)
    console.print(f"Wrote {output} ({classifier.version}).", soft_wrap=True)
    console.print(f"Next: sevpeft annotate DATA OUTPUT --method {way.kind} --classifier {output}", soft_wrap=True)


@classifier_verbs.command()
def evaluate(
    data: Data,
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
    judge, train = _names(judge_blocks, block_column), _names(train_blocks, block_column)
    with _working(as_json) as (console, progress):
        from sevpeft.severity.classifier.examples import binary_examples, labelled_examples
        from sevpeft.severity.classifier.fitting import calibration_on, cross_validate, within
        from sevpeft.severity.classifier.results import Result
        from sevpeft.severity.classifier.storage import check_new, new_folder

        if output is not None:
            check_new(output)
        consultations = _read(data, question_column, answer_column, severity_column)
        fitted = None if classifier is None else _unseen(classifier, consultations, seen_data)
        about: dict[str, Any] = {"data": consultations.fingerprint}
        if fitted is None:
            options = {"balance": balance, "lora_r": lora_r, "num_train_epochs": num_train_epochs}
            way = _way(Kind(kind), calibration, calibration_size, seed, lexicon, encoder, options)
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
        print(json.dumps(content, ensure_ascii=False, indent=2))
        return
    for part in result.render():
        console.print(part)
    if fitted is None and block_column is None:
        console.print(_NO_BLOCKS)
    if output is not None:
        console.print(f"Wrote {output}.", soft_wrap=True)


_NO_BLOCKS = (
    "[yellow]Not judged by block.[/yellow] Where rows that stand together were labelled together, the figures above "
    "flatter: name a column that tells such parts with --block-column."
)


@contextmanager
def _working(as_json: bool) -> Iterator[tuple[Console, Callable[[str], None]]]:
    """A console for the tables, and something to tell what is going on; it goes to stderr, away from --json."""
    from rich.console import Console

    with Console(stderr=True).status("Loading the libraries") as status:
        quiet_libraries()
        yield Console(highlight=False, quiet=as_json), lambda said: status.update(f"Severity classifier: {said}")


def _read(
    data: str, question_column: str | None, answer_column: str | None, severity_column: str | None
) -> Consultations:
    from sevpeft.data.sources import load_consultations

    return load_consultations(
        data,
        question_column=question_column,
        answer_column=answer_column,
        severity_column=severity_column,
        keep="all",
    )


def _way(
    kind: Kind,
    calibration: Method | None,
    calibration_size: float | None,
    seed: int,
    lexicon: Path | None,
    encoder: str | None,
    options: dict[str, Any],
) -> Way:
    from sevpeft.severity.classifier.fitting import Way

    if lexicon is not None and kind not in (Kind.rules, Kind.combined):
        raise UsageError("--lexicon is for --kind rules and rules+linear.")
    if encoder is not None and kind is not Kind.transformer:
        raise UsageError("--encoder is for --kind transformer.")
    if options["balance"] not in ("weights", "resampling", "none"):
        raise UsageError("--balance is weights, resampling or none.")
    if calibration_size and not 0.05 <= calibration_size <= 0.5:
        raise UsageError("--calibration-size is 0, or a share from 0.05 to 0.5.")
    own = options if kind is Kind.transformer else {}
    return Way(kind.value, calibration and calibration.value, calibration_size, seed, lexicon, encoder, own)


def _names(blocks: str | None, block_column: str | None) -> list[str] | None:
    if blocks is None:
        return None
    if block_column is None:
        raise UsageError("--judge-blocks and --train-blocks need --block-column, the column that names the blocks.")
    names = list(dict.fromkeys(name.strip() for name in blocks.split(",") if name.strip()))
    if not names:
        raise UsageError("--judge-blocks and --train-blocks take names of blocks, parted by commas.")
    return names


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
