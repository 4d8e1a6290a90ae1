"""The verbs prepare, annotate, translate and classifier. Heavy imports are inside the functions."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import RenderableType
from rich.table import Column, Table

from sevpeft.cli.application import AsJson, Words, app, command_with_keys, is_main_process, quiet_libraries
from sevpeft.console import Screen, print_json
from sevpeft.errors import DataError, UsageError
from sevpeft.runs import check_absent, whole_folder

if TYPE_CHECKING:
    from sevpeft.severity.annotate import Annotation

classifier_verbs = typer.Typer(no_args_is_help=True, help="Fit a severity classifier, or evaluate one.")
app.add_typer(classifier_verbs, name="classifier")

# Keys of `data` that an argument sets, or that only concern the split, which these verbs do not make.
_NO_SPLIT = ("data.path", "data.validation_size", "data.test_size", "data.seed")
_SETTINGS = "sevpeft.severity.settings"

_INPUT = "File, folder or pattern, Hub dataset or builtin:consultations"
Input = Annotated[str, typer.Argument(metavar="INPUT", help=_INPUT)]


def _settings(schema: type[Any], words: list[str] | None, data: str, output: Path | None = None) -> Any:
    """Settings of a verb; data and output are checked before the libraries are loaded."""
    from sevpeft.data.files import check_source
    from sevpeft.recipe import settings_from

    settings = settings_from(schema, words or [], {"data.path": data})
    if output and is_main_process():
        check_absent(output)
    check_source(settings.data)
    return settings


@app.command(cls=command_with_keys("sevpeft.data.prepare:PrepareSettings", without=["data.path"]))
def prepare(
    data: Input,
    output: Annotated[Path, typer.Argument(help="New folder")],
    words: Words = None,
    as_json: AsJson = False,
) -> None:
    """Clean, mask, deduplicate and split consultations; rejected rows are kept, and every change is counted.

    Example: sevpeft prepare consultations.csv data/prepared split_by=year cleaning.emoji=remove
    """
    from sevpeft.data.prepare import PrepareSettings

    settings = _settings(PrepareSettings, words, data, output)
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
    for line in _next_steps(about, output):
        console.print(line, soft_wrap=True)


def _command(verb: str, data: object) -> str:
    """A verb with the quickstart recipe and other data."""
    return shlex.join(["sevpeft", verb, "quickstart", f"data.path={data}"])


def _next_steps(about: Mapping[str, Any], output: Path) -> Iterator[str]:
    """The next command: train, or annotate where a row lacks a known severity, but without losing known ones."""
    from sevpeft.data.columns import PROBABILITIES, listed
    from sevpeft.severity.probabilities import is_severity

    columns, found = about["input"]["columns"], about["splits"]["severity"]
    numbers = [name for name in PROBABILITIES if name in columns]
    known = [name for name in found if name != "none" and is_severity(name)]
    unknown, problem = [name for name in found if name not in ("none", *known)], ""
    if 0 < len(numbers) < len(PROBABILITIES):
        problem = f"There is {listed(numbers)}, but not all of {listed(PROBABILITIES)}: add the others, or rename it"
    elif numbers and "none" in found:
        problem = "Some probabilities are missing or do not sum to 1: divide percentages by 100, or remove these rows"
    elif unknown:
        problem = f"Column {listed([columns['severity']])} holds {listed(unknown[:3])}, which is not a known severity: "
        problem += "write non_critical, neutral, critical (غير حرج, متوسط, حرج), or "
        problem += "empty these cells" if known else "annotate again"
    if problem:
        yield f"Warning: {problem}."
    if problem and (known or len(numbers) == len(PROBABILITIES)):
        yield f"Next: correct this in {about['input']['source']}, and prepare it again"
    elif known and len(known) == len(found):
        yield f"Next: {_command('train', output)}"
    else:
        words = ["sevpeft", "annotate", str(output), f"{output.parent / output.name.replace('.', '-')}-annotated"]
        replace = [f"replace={'missing' if known else 'true'}"] * bool(numbers or "severity" in columns)
        yield f"Next: {shlex.join([*words, 'method=rules', *replace])}"


def _tables(about: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Counts of rows, columns and splits, for one screen."""
    from sevpeft.data.columns import listed

    rows, duplicates, splits = about["rows"], about["duplicates"], about["splits"]
    counts = {"read": rows["read"]} | {f"  rejected: {name}": -count for name, count in rows["rejected"].items()}
    counts |= {"kept": rows["kept"]} | {f"  cleaned: {name}": count for name, count in about["cleaned"].items()}
    counts |= {f"  masked: {kind}": found["rows"] for kind, found in about["masked"].items()}
    steps, sides = (Table(box=None, pad_edge=False, header_style="none") for _ in range(2))
    steps.add_column("rows", min_width=34)
    steps.add_column("", justify="right")
    for name, count in counts.items():
        if count or not name.startswith("  "):
            steps.add_row(name, f"{count:,}")
    sides.add_column(f"split by {splits['by']}", max_width=34, overflow="ellipsis", no_wrap=True)
    for side in (*splits["rows"], "all"):
        sides.add_column(side, justify="right")
    for severity, of_side in [*splits["severity"].items(), ("all", splits["rows"])]:
        sides.add_row(severity, *(f"{count:,}" for count in of_side.values()), f"{sum(of_side.values()):,}")
    for field, column in about["input"]["columns"].items():
        chosen = about["settings"]["data"].get(f"{field}_column")
        yield f"{field:14}  {listed([column])}, by {f'data.{field}_column' if chosen else 'its name'}"
    if others := listed(about["input"]["carried"].values()):
        yield f"left out        {others}; kept in the folder"
    yield from ("", steps, "", sides)
    for side, values in splits.get("held_out", {}).get("values", {}).items():
        yield f"  {side}: {values}"
    yield (
        f"\n{duplicates['groups']:,} groups of questions, the largest of {duplicates['largest_group']:,} rows: "
        f"{duplicates['equal_questions']:,} rows repeat a question, {duplicates['near_questions']:,} nearly do."
    )


@app.command(cls=command_with_keys(f"{_SETTINGS}:AnnotateSettings", without=_NO_SPLIT))
def annotate(
    data: Input,
    output: Annotated[
        Path, typer.Argument(help="New file (.jsonl, .csv, .tsv, .parquet), or a new folder for a prepared one")
    ],
    words: Words = None,
    as_json: AsJson = False,
) -> None:
    """Add the severity of every row: p_non_critical, p_neutral, p_critical, the likeliest one, and what judged it.

    After an interruption, the same command continues. Under `accelerate launch` the processes share the work.

    Example: sevpeft annotate consultations.csv annotated.jsonl method=rules
    """
    from sevpeft.severity.settings import AnnotateSettings

    settings = _settings(AnnotateSettings, words, data, output)
    screen = Screen(stderr=True, quiet=not is_main_process())
    with screen.status("Loading the libraries"):
        import datasets

        from sevpeft.severity.annotate import annotate as annotate_rows

        quiet_libraries(models=False)
    if screen.is_terminal and not screen.quiet:
        datasets.enable_progress_bars()
    done = annotate_rows(settings, output)
    if done is not None and as_json:
        print_json(asdict(done))
    elif done is not None:
        _show_annotation(done, Screen())


def _show_annotation(done: Annotation, console: Screen) -> None:
    from sevpeft.severity.weights import advice, effective_sample, histogram_lines

    for reason, count in done.rejected.items():
        console.print(f"Not in {done.output}: {count:,} rows with {reason}.", style="yellow", soft_wrap=True)
    numbers = (Column(name, justify="right") for name in ("likeliest in rows", "mean probability"))
    table = Table("severity", *numbers, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name, count in done.counts.items():
        table.add_row(name, f"{count:,} ({count / done.rows:.0%})", f"{done.mean[name]:.3f}")
    console.print(table)
    console.print(f"Weights (preset balanced): effective sample size {effective_sample(done.weights)}")
    for line in histogram_lines(done.weights.histogram, 79):
        console.print(line, soft_wrap=True)
    if warning := advice(done.weights):
        console.print(f"Warning: {warning}", style="yellow", soft_wrap=True)
    console.print(f"Wrote {done.rows:,} rows to {done.output} ({done.method}, {done.version}).", soft_wrap=True)
    console.print(f"Next: {_command('plan', done.output)}", soft_wrap=True)


@app.command(cls=command_with_keys(f"{_SETTINGS}:TranslateSettings", without=_NO_SPLIT))
def translate(
    data: Input,
    output: Annotated[Path, typer.Argument(help="New file (.jsonl, .csv, .tsv, .parquet)")],
    words: Words = None,
) -> None:
    """Translate questions and answers with an instruction model, with vLLM where it is installed.

    Rows that fail a check go to NAME.rejected.jsonl. After an interruption, the same command continues.

    Example: sevpeft translate english.csv arabic.jsonl model=Qwen/Qwen2.5-7B-Instruct to=ar
    """
    from sevpeft.severity.settings import TranslateSettings

    settings, screen = _settings(TranslateSettings, words, data), Screen(stderr=True)
    with screen.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.sharing.translate import translate as translate_rows
    done = translate_rows(settings, output, screen)
    for reason, count in done["rejected"].items():
        Screen().print(f"Rejected: {count:,} rows with {reason}.", style="yellow")
    Screen().print(f"Wrote {done['rows']:,} rows ({done['rate']:.0%}) to {output}.", soft_wrap=True)


@classifier_verbs.command(cls=command_with_keys(f"{_SETTINGS}:FitSettings", without=_NO_SPLIT))
def fit(
    data: Input,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder for the classifier")],
    words: Words = None,
    as_json: AsJson = False,
) -> None:
    """Fit a severity classifier, calibrate it, evaluate it on held-out rows and write it with its report.

    Labels often change within a file: block_column=NAME also evaluates it on held-out blocks.

    Example: sevpeft classifier fit builtin:consultations severity-linear kind=linear
    """
    from sevpeft.severity.settings import FitSettings

    settings = _settings(FitSettings, words, data, output)
    with _progress() as progress:
        from sevpeft.severity.classifier import examples, store
        from sevpeft.severity.classifier.evaluate import fit_and_evaluate

        consultations, labeled = examples.load_examples(settings)
        more, unlabeled = examples.load_unlabeled(settings, labeled)
        classifier, evaluations = fit_and_evaluate(labeled, settings, progress, unlabeled)
        with whole_folder(output) as folder:
            record = store.training_record([consultations, *more], labeled, settings, unlabeled)
            about = store.write_classifier(classifier, folder, record)
            store.write_report(folder, about, evaluations)
    following = shlex.join(["sevpeft", "annotate", "DATA", "OUTPUT", f"classifier={output}"])
    wrote = f"Wrote {output} ({classifier.version}).\nNext: {following}"
    _show_classifier([consultations, *more], about, evaluations, as_json, wrote)


@classifier_verbs.command(cls=command_with_keys(f"{_SETTINGS}:EvaluateSettings", without=_NO_SPLIT))
def evaluate(data: Input, words: Words = None, as_json: AsJson = False) -> None:
    """Evaluate a fitted classifier on other data, or cross-validate one kind of it, beside baselines.

    Example: sevpeft classifier evaluate consultations.csv kind=linear block_column=source
    """
    from sevpeft.severity.settings import EvaluateSettings

    settings = _settings(EvaluateSettings, words, data)
    with _progress() as progress:
        from sevpeft.severity.classifier import examples, store
        from sevpeft.severity.classifier.evaluate import evaluate_fitted, fit_and_evaluate

        consultations, labeled = examples.load_examples(settings)
        more, unlabeled = examples.load_unlabeled(settings, labeled)
        about: dict[str, Any] = {"kind": settings.kind, "seed": settings.seed}
        if settings.classifier is None:
            _, evaluations = fit_and_evaluate(labeled, settings, progress, unlabeled)
        else:
            if unused := settings.model_fields_set & {"kind", "text", "unlabeled", "folds", "lexicon", "encoder"}:
                raise UsageError(f"classifier= is evaluated as fitted; leave out {', '.join(sorted(unused))}.")
            folder = Path(settings.classifier).expanduser()
            about = store.read_about(folder)
            seen = set(about.get("training", {}).get("fingerprints", []))
            if seen & examples.fingerprints(consultations) and not settings.seen_data:
                remedy = "which makes it look better; name other data, read its README.md, or add seen_data=true"
                raise DataError(f"{folder} was fitted on {consultations.source} itself, {remedy}.")
            evaluations = {"Other data": evaluate_fitted(store.load_classifier(folder), labeled, settings.seed)}
    _show_classifier([consultations, *more], about, evaluations, as_json)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    with Screen(stderr=True).status("Loading the libraries") as status:
        quiet_libraries(models=False)
        yield lambda message: status.update(f"Severity classifier: {message}")


def _show_classifier(inputs: list[Any], about: dict[str, Any], evaluations: Any, as_json: bool, last: str = "") -> None:
    from rich.markdown import Markdown

    from sevpeft.severity.classifier import store

    for read, reason, count in ((one, *of) for one in inputs for of in one.rejected.items()):
        Screen(stderr=True).print(f"Left out of {read.source}: {count:,} rows with {reason}.", soft_wrap=True)
    if as_json:
        print_json(store.as_json(about, evaluations))
        return
    for heading, evaluation in evaluations.items():
        Screen().print(Markdown(store.markdown(heading, evaluation)))
    Screen().print(last, soft_wrap=True)
