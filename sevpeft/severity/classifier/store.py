"""A classifier's folder, written whole or not at all; what is read back must have the version that was written.

FOLDER/ holds classifier.json (kind, version, labels by name, calibration, training), the files of its kind
(linear.safetensors and vocabulary.json, lexicon.tsv, transformer/) and the report. Nothing is pickled. The version is a
hash over whatever gives the probabilities, so it also tells whether a file is damaged.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sevpeft import __version__
from sevpeft.data.read import Consultations
from sevpeft.errors import DataError, first_sentence
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration, RulesAndLinear
from sevpeft.severity.classifier.examples import Examples, fingerprints
from sevpeft.severity.classifier.linear import LinearClassifier
from sevpeft.severity.classifier.settings import ClassifierSettings
from sevpeft.severity.lexicon import PACKAGE_LEXICON
from sevpeft.severity.probabilities import SEVERITIES, SeverityClassifier
from sevpeft.severity.rules import Rules

ABOUT, LEXICON, TRANSFORMER = "classifier.json", "lexicon.tsv", "transformer"
# Counts up when a folder's layout changes so that older versions of sevpeft cannot read it.
FORMAT = 2


def write_classifier(
    classifier: Calibrated, folder: Path, training: dict[str, Any], lexicon: str | Path | None = None
) -> dict[str, Any]:
    """Writes a classifier into a folder that `whole_folder` builds; returns its description.

    Args:
        training: what it was fitted on, as `training_record` gives it.
        lexicon: of its rules, when it is not the package's own.
    """
    inner: Any = classifier.classifier
    if inner.kind in ("rules", "rules+linear"):
        shutil.copyfile(Path(lexicon or PACKAGE_LEXICON).expanduser(), folder / LEXICON)
    if inner.kind in ("linear", "rules+linear"):
        getattr(inner, "linear", inner).save(folder)
    if inner.kind == "transformer":
        inner.save(folder / TRANSFORMER)
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
        classifier = Calibrated(_read(about["kind"], folder), calibration)
    except DataError:
        raise
    except Exception as error:  # whatever the libraries raise on files that are absent or cut
        reason = first_sentence(error)
        raise DataError(f"{folder} cannot be loaded ({reason}); copy it again, or fit it again.") from error
    if classifier.version != about.get("version"):
        raise DataError(
            f"{folder} is damaged, or this version of sevpeft gives its probabilities in another way, and its "
            "calibration does not hold for this one; copy it again, or fit it again."
        )
    return classifier


def read_about(folder: Path) -> dict[str, Any]:
    """The description of a classifier; raises DataError where there is none."""
    try:
        return dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except OSError:
        raise DataError(
            f"There is no classifier in {folder} (no {ABOUT}); fit one with `sevpeft classifier fit DATA OUTPUT`."
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


def _read(kind: str, folder: Path) -> SeverityClassifier:
    if kind == "linear":
        return LinearClassifier.load(folder)
    if kind == "transformer":
        from sevpeft.severity.classifier.transformer import TransformerClassifier

        return TransformerClassifier.load(folder / TRANSFORMER)
    if kind not in ("rules", "rules+linear"):
        raise ValueError(kind)
    rules = Rules.load(folder / LEXICON)
    return rules if kind == "rules" else RulesAndLinear(rules, LinearClassifier.load(folder))
