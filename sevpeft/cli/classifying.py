"""The verbs `classifier fit` and `classifier evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sevpeft.cli.application import app, command_with_keys, quiet_libraries
from sevpeft.errors import DataError, UsageError

classifier_verbs = typer.Typer(no_args_is_help=True, help="Fit a severity classifier, or evaluate one.")
app.add_typer(classifier_verbs, name="classifier")

_SETTINGS = "sevpeft.severity.settings"
_NO_KEYS = ("data.path", "data.validation_size", "data.test_size", "data.seed")  # INPUT, and a recipe's split

Input = Annotated[str, typer.Argument(metavar="INPUT", help="Labeled consultations: file, folder, Hub data set")]
Words = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


@classifier_verbs.command(cls=command_with_keys(f"{_SETTINGS}:FitSettings", without=_NO_KEYS))
def fit(
    data: Input,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder for the classifier; must not exist")],
    words: Words = None,
    as_json: AsJson = False,
) -> None:
    """Fit a severity classifier, calibrate it, evaluate it on rows of its own and write it with its report.

    Labels often depend on the place in the file: with block_column=NAME it is also evaluated by holding out blocks.

    Example: sevpeft classifier fit builtin:consultations severity-linear kind=linear
    """
    with _progress() as progress:
        from sevpeft.recipe import settings_from
        from sevpeft.runs import check_absent, whole_folder
        from sevpeft.severity.classifier import examples, store
        from sevpeft.severity.classifier.evaluate import fit_and_evaluate
        from sevpeft.severity.settings import FitSettings

        settings = settings_from(FitSettings, words or [], {"data.path": data})
        check_absent(output)
        consultations, labeled = examples.load_examples(settings)
        classifier, evaluations = fit_and_evaluate(labeled, settings, progress)
        with whole_folder(output) as folder:
            record = store.training_record(consultations, labeled, settings)
            about = store.write_classifier(classifier, folder, record)
            store.write_report(folder, about, evaluations)
    wrote = f"Wrote {output} ({classifier.version}).\nNext: sevpeft annotate DATA OUTPUT classifier={output}"
    _show(about, evaluations, as_json, wrote)


@classifier_verbs.command(cls=command_with_keys(f"{_SETTINGS}:EvaluateSettings", without=_NO_KEYS))
def evaluate(data: Input, words: Words = None, as_json: AsJson = False) -> None:
    """Evaluate a fitted classifier on other data, or a way of fitting by cross-validation, beside baselines.

    Example: sevpeft classifier evaluate consultations.csv kind=linear block_column=source
    """
    with _progress() as progress:
        from sevpeft.recipe import settings_from
        from sevpeft.severity.classifier import examples, store
        from sevpeft.severity.classifier.evaluate import evaluate_fitted, fit_and_evaluate
        from sevpeft.severity.settings import EvaluateSettings

        settings = settings_from(EvaluateSettings, words or [], {"data.path": data})
        consultations, labeled = examples.load_examples(settings)
        about: dict[str, Any] = {"kind": settings.kind, "seed": settings.seed}
        if settings.classifier is None:
            _, evaluations = fit_and_evaluate(labeled, settings, progress)
        else:
            if unused := settings.model_fields_set & {"kind", "folds", "lexicon", "encoder"}:
                raise UsageError(f"classifier= is evaluated as it was fitted; leave out {', '.join(sorted(unused))}.")
            folder = Path(settings.classifier).expanduser()
            about = store.read_about(folder)
            seen = set(about.get("training", {}).get("fingerprints", []))
            if seen & examples.fingerprints(consultations) and not settings.seen_data:
                raise DataError(
                    f"{folder} was fitted on {consultations.source} itself, where it looks better than it is; name "
                    "other data, read the figures in its README.md, or insist with seen_data=true."
                )
            evaluations = {"Other data": evaluate_fitted(store.load_classifier(folder), labeled, settings.seed)}
    _show(about, evaluations, as_json)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    from sevpeft.console import Screen

    with Screen(stderr=True).status("Loading the libraries") as status:
        quiet_libraries()
        yield lambda message: status.update(f"Severity classifier: {message}")


def _show(about: dict[str, Any], evaluations: dict[str, Any], as_json: bool, last: str = "") -> None:
    from rich.markdown import Markdown

    from sevpeft.console import Screen, print_json
    from sevpeft.severity.classifier import store

    if as_json:
        print_json(store.as_json(about, evaluations))
    else:
        for heading, evaluation in evaluations.items():
            Screen().print(Markdown(store.markdown(heading, evaluation)))
        Screen().print(last, soft_wrap=True)
