"""Writes and loads a classifier's folder and the report of its evaluation.

FOLDER/ has classifier.json (kind, version, labels by name, calibration, training), the files of its kind
(linear.safetensors and vocabulary.json, lexicon.tsv, transformer/), metrics.json and the card README.md. The card has
no row, path or name of a person. The version is a hash of all that decides the probabilities, so it detects damage too.
FOLDER/ itself has the question-only classifier. If that is a twin, both/ or answer/ has the one that reads answers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sevpeft import __version__
from sevpeft.console import number_text
from sevpeft.data.read import Consultations
from sevpeft.errors import DataError, first_sentence
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
from sevpeft.severity.classifier.evaluate import Metrics
from sevpeft.severity.classifier.examples import Examples, fingerprints
from sevpeft.severity.classifier.linear import LinearClassifier
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.rules import LEXICON, Rules
from sevpeft.severity.settings import ClassifierSettings

ABOUT = "classifier.json"
# Increase when older versions of sevpeft cannot read a changed layout of the folder.
FORMAT = 2


def write_classifier(classifier: Calibrated, folder: Path, training: dict[str, Any]) -> dict[str, Any]:
    """Writes a classifier into an existing folder; returns the content of classifier.json, `training` included."""
    whole = {}
    if classifier.twin:
        (folder / classifier.reads).mkdir()
        alone = Calibrated(classifier.sources, classifier.calibration, classifier.reads)
        written = write_classifier(alone, folder / classifier.reads, {})
        whole = {"whole": {name: written[name] for name in ("reads", "version")}}
        classifier = classifier.twin
    for source in classifier.sources:
        source.save(folder)
    about = {
        "format": FORMAT,
        "kind": classifier.kind,
        "reads": classifier.reads,
        **whole,
        "version": classifier.version,
        "labels": list(SEVERITIES),
        "calibration": asdict(classifier.calibration),
        "training": training,
        "sevpeft": __version__,
    }
    (folder / ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return about


def load_classifier(folder: Path) -> Calibrated:
    """Loads a classifier with its twin; DataError if it is missing, damaged or from an incompatible version."""
    about = read_about(folder)
    if about.get("reads", "question") != "question":
        raise DataError(f"{folder} is the part of a classifier that reads answers; name the folder that contains it.")
    twin = _load(folder, about)
    if not (entry := about.get("whole")):
        return twin
    whole = _load(folder / entry["reads"], read_about(folder / entry["reads"]))
    if whole.version != entry["version"]:  # the version also covers `reads`
        raise DataError(f"{folder / entry['reads']} belongs to another classifier than {folder}; fit it again.")
    return Calibrated(whole.sources, whole.calibration, whole.reads, twin)


def _load(folder: Path, about: dict[str, Any]) -> Calibrated:
    if about.get("format") != FORMAT or about.get("labels") != list(SEVERITIES):
        raise DataError(f"{folder} was written by another version of sevpeft ({about.get('sevpeft')}); fit it again.")
    try:
        calibration = Calibration(**{name: tuple(map(float, values)) for name, values in about["calibration"].items()})
        sources = [_source(kind, folder) for kind in about["kind"].split("+")]
        classifier = Calibrated(sources, calibration, about.get("reads", "question"))
    except Exception as error:  # the libraries raise many types for missing or truncated files
        raise DataError(f"{folder} cannot be loaded ({first_sentence(error)}); copy or fit it again.") from error
    if classifier.version != about.get("version"):
        raise DataError(f"{folder} is damaged, or this version of sevpeft computes other probabilities; fit it again.")
    return classifier


def _source(kind: str, folder: Path) -> Any:
    if kind == "rules":
        return Rules(folder / LEXICON)
    if kind == "linear":
        return LinearClassifier.load(folder)
    from sevpeft.severity.classifier.transformer import TransformerClassifier

    return TransformerClassifier.load(folder)


def read_about(folder: Path) -> dict[str, Any]:
    """The content of classifier.json; raises DataError if it is missing or damaged."""
    try:
        return dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        remedy = "fit one with `sevpeft classifier fit DATA OUTPUT`"
        raise DataError(f"{folder} has no classifier, or a damaged {ABOUT}; {remedy}.") from None


def training_record(
    inputs: Sequence[Consultations], examples: Examples, settings: ClassifierSettings, unlabeled: Examples | None = None
) -> dict[str, Any]:
    """The section `training` of classifier.json, without text of rows and without paths."""
    record: dict[str, Any] = {
        "fingerprints": sorted(set().union(*map(fingerprints, inputs))),
        "rows": len(examples),
        "questions": len(np.unique(examples.groups)),
        "unlabeled": 0 if unlabeled is None else len(unlabeled),
        "labels": dict(zip(SEVERITIES, np.bincount(examples.labels).tolist(), strict=True)),
        "seed": settings.seed,
    }
    if settings.kind == "transformer":
        encoder = Path(settings.encoder.name_or_path).expanduser()
        record["encoder"] = encoder.name if encoder.exists() else str(encoder)
    return record


def write_report(folder: Path, about: Mapping[str, Any], evaluations: Mapping[str, Metrics]) -> None:
    """Writes metrics.json and the card; `about` is the content of classifier.json."""
    from huggingface_hub import ModelCard, ModelCardData

    (folder / "metrics.json").write_text(json.dumps(as_json(about, evaluations), indent=2) + "\n", encoding="utf-8")
    tags = ["medical", "arabic", "severity", "sevpeft"]
    data = ModelCardData(language="ar", library_name="sevpeft", pipeline_tag="text-classification", tags=tags)
    sections = "\n\n".join(markdown(heading, evaluation) for heading, evaluation in evaluations.items())
    card = ModelCard.from_template(data, str(Path(__file__).with_name("card.md")), about=about, evaluations=sections)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def as_json(about: Mapping[str, Any], evaluations: Mapping[str, Metrics]) -> dict[str, Any]:
    """The classifier's description with all evaluations; NaN becomes null."""
    return {**about, "evaluations": json.loads(json.dumps(evaluations), parse_constant=lambda constant: None)}


def markdown(heading: str, evaluation: Metrics) -> str:
    """Renders an evaluation with evaluation.md: figures, baselines, blocks and warnings."""
    from jinja2 import Template

    def interval(figure: Mapping[str, float]) -> str:
        """.482 [.451, .509], or .482 without an interval."""
        numbers = (figure[name] for name in ("value", "low", "high"))
        value, low, high = (number_text(x, 3 if x >= 1 else 4).removeprefix("0") for x in numbers)
        return value if low == number_text(None) else f"{value} [{low}, {high}]"

    template = Template(Path(__file__).with_name("evaluation.md").read_text(encoding="utf-8"), trim_blocks=True)
    return template.render(heading=heading, severities=SEVERITIES, interval=interval, **evaluation)
