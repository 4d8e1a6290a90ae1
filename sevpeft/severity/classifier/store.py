"""A classifier's folder, written whole or not at all, and the report of its evaluation.

FOLDER/ holds classifier.json (kind, version, labels by name, calibration, training), the files of its kind
(linear.safetensors and vocabulary.json, lexicon.tsv, transformer/), metrics.json and the card README.md. Nothing is
pickled. The version is a hash over whatever gives the probabilities, so it also tells whether a file is damaged. The
card (card.md filled in) is published: no row of the data, no path and no name of a person or machine stands in it.
"""

from __future__ import annotations

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
from sevpeft.severity.classifier.evaluate import CRITICAL, FIGURES, Metrics
from sevpeft.severity.classifier.examples import Examples, fingerprints
from sevpeft.severity.classifier.linear import LinearClassifier
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.rules import LEXICON, Rules
from sevpeft.severity.settings import ClassifierSettings

ABOUT = "classifier.json"
# Counts up when a folder's layout changes so that older versions of sevpeft cannot read it.
FORMAT = 2


def write_classifier(classifier: Calibrated, folder: Path, training: dict[str, Any]) -> dict[str, Any]:
    """Writes a classifier into a folder that `whole_folder` builds; returns its description.

    Args:
        training: what it was fitted on, as `training_record` gives it.
    """
    for source in classifier.sources:
        source.save(folder)
    about = {
        "format": FORMAT,
        "kind": classifier.kind,
        "version": classifier.version,
        "labels": list(SEVERITIES),
        "calibration": asdict(classifier.calibration),
        "training": training,
        "sevpeft": __version__,
    }
    (folder / ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return about


def load_classifier(folder: Path) -> Calibrated:
    """The classifier in a folder, calibrated.

    Raises:
        DataError: there is none, or it is damaged, of another format or label order, or gives other probabilities now.
    """
    about = read_about(folder)
    if about.get("format") != FORMAT or about.get("labels") != list(SEVERITIES):
        raise DataError(f"{folder} was written by another version of sevpeft ({about.get('sevpeft')}); fit it again.")
    try:
        calibration = Calibration(**{name: tuple(map(float, values)) for name, values in about["calibration"].items()})
        classifier = Calibrated([_source(kind, folder) for kind in about["kind"].split("+")], calibration)
    except Exception as error:  # whatever the libraries raise on files that are absent or cut
        reason = first_sentence(error)
        raise DataError(f"{folder} cannot be loaded ({reason}); copy it again, or fit it again.") from error
    if classifier.version != about.get("version"):
        raise DataError(f"{folder} is damaged, or its probabilities are others in this version; fit it again.")
    return classifier


def _source(kind: str, folder: Path) -> Any:
    if kind == "transformer":
        from sevpeft.severity.classifier.transformer import TransformerClassifier

        return TransformerClassifier.load(folder)
    return {"rules": lambda: Rules.load(folder / LEXICON), "linear": lambda: LinearClassifier.load(folder)}[kind]()


def read_about(folder: Path) -> dict[str, Any]:
    """The description of a classifier; raises DataError where there is none."""
    try:
        return dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except OSError:
        raise DataError(
            f"There is no classifier in {folder}; fit one with `sevpeft classifier fit DATA OUTPUT`."
        ) from None
    except (ValueError, TypeError):
        raise DataError(f"{folder / ABOUT} is damaged; copy the folder again, or fit it again.") from None


def training_record(consultations: Consultations, examples: Examples, settings: ClassifierSettings) -> dict[str, Any]:
    """What a classifier's folder says of the rows it was made of. No text of a row and no path."""
    record: dict[str, Any] = {
        "fingerprints": sorted(fingerprints(consultations)),
        "rows": len(examples),
        "questions": len(np.unique(examples.groups)),
        "labels": dict(zip(SEVERITIES, np.bincount(examples.labels).tolist(), strict=True)),
        "seed": settings.seed,
    }
    if settings.kind == "transformer":
        encoder = Path(settings.encoder.name_or_path).expanduser()
        record["encoder"] = encoder.name if encoder.exists() else str(encoder)
    return record


def write_report(folder: Path, about: Mapping[str, Any], evaluations: Mapping[str, Metrics]) -> None:
    """Writes metrics.json and the card; `about` is what classifier.json says."""
    from huggingface_hub import ModelCard, ModelCardData

    (folder / "metrics.json").write_text(json.dumps(as_json(about, evaluations), indent=2) + "\n", encoding="utf-8")
    tags = ["medical", "arabic", "severity", "sevpeft"]
    data = ModelCardData(language="ar", library_name="sevpeft", pipeline_tag="text-classification", tags=tags)
    sections = "\n\n".join(markdown(heading, evaluation) for heading, evaluation in evaluations.items())
    template = str(Path(__file__).with_name("card.md"))
    card = ModelCard.from_template(data, template_path=template, about=about, evaluations=sections)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def as_json(about: Mapping[str, Any], evaluations: Mapping[str, Metrics]) -> dict[str, Any]:
    """What is known of the classifier and every figure; what is not a number becomes null."""
    return {**about, "evaluations": json.loads(json.dumps(evaluations), parse_constant=lambda constant: None)}


def markdown(heading: str, evaluation: Metrics) -> str:
    """Figures beside those of the baselines, each block alone, and what a reader should not miss."""
    scored, confusion = evaluation["calibrated"], evaluation["calibrated"]["confusion"]
    columns = {"calibrated, 95 %": scored, "before": evaluation["raw"], **evaluation["baselines"]}
    tables = [
        [["", *columns]]
        + [[name.replace("_", " "), *(_number(one, name) for one in columns.values())] for name in FIGURES],
        [["block", "rows", "accuracy, 95 %", "auc critical, 95 %"]]
        + [
            [
                name[:20].replace("|", "/"),
                str(block["rows"]),
                _number(block, "accuracy"),
                _number(block, "auc_critical"),
            ]
            for name, block in evaluation["blocks"].items()
        ],
        [["label ↓ likeliest →", *SEVERITIES]]
        + [[name, *map(str, counts)] for name, counts in zip(SEVERITIES, confusion, strict=True)],
    ]
    parts = [_table(rows) for rows in tables if len(rows) > 1]
    remarks = [f"- {remark}" for remark in _remarks(heading, evaluation)]
    return "\n\n".join([f"## {heading}: {scored['rows']:,} rows", *parts, "\n".join(remarks)])


def _remarks(heading: str, evaluation: Metrics) -> list[str]:
    figures, unscored = evaluation["calibrated"]["figures"], evaluation["unscored"]
    by_chance = evaluation["calibrated"]["ece_critical_by_chance"]
    remarks = [f"With so many rows, perfect calibration has an ECE (critical) of {by_chance:.3f}."]
    blind = max(one["figures"]["accuracy"]["value"] for one in evaluation["baselines"].values())
    if figures["accuracy"]["low"] <= blind:
        remarks.append("The accuracy is not clearly above that of a baseline that reads no text.")
    if figures["auc_critical"]["low"] <= 0.5:
        remarks.append("It is not clear that critical rows are told from others at all (AUC down to 0.5).")
    if not any(row[CRITICAL] for row in evaluation["calibrated"]["confusion"]):
        remarks.append("No row's likeliest severity is critical; weight by the probabilities, as training does.")
    if unscored is None and heading != "Other data":
        remarks.append(
            "Not evaluated by block. Where rows that stand together were labeled together, these figures flatter; name "
            "the column that tells such parts with block_column=NAME."
        )
    if unscored:
        remarks.append(f"Not evaluated on, for lack of a severity: {', '.join(name[:20] for name in unscored)}.")
    return remarks


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(metrics: Metrics, figure: str) -> str:
    """0.482 [0.451, 0.509], without the interval where none was made, or a dash where there is no such figure."""
    value, low, high = (number_text(metrics["figures"][figure][name], 4) for name in ("value", "low", "high"))
    return value if low == number_text(None) else f"{value} [{low}, {high}]"
