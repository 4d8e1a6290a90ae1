"""A classifier's folder: written whole or not at all, and read back only when it is what its description says.

FOLDER/ holds classifier.json (kind, version, label order by name, calibration, checksums), the files of its kind
(linear.safetensors and vocabulary.json; lexicon.tsv; combination.json; transformer/), and what the report wrote.
Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sevpeft import __version__
from sevpeft.errors import DataError, RunError
from sevpeft.runs import keep_private, plain_disk_errors, write_atomically
from sevpeft.severity.classifier.calibration import Calibrated, calibration_from_json
from sevpeft.severity.lexicon import PACKAGE_LEXICON
from sevpeft.severity.probabilities import SEVERITIES, SeverityClassifier

ABOUT = "classifier.json"
LEXICON, TRANSFORMER = "lexicon.tsv", "transformer"
KINDS = ("rules", "linear", "transformer", "rules+linear")
# Counts up when a folder's layout changes so that older versions of sevpeft cannot read it.
FORMAT = 1

_PICKLED = (".pkl", ".pickle", ".joblib", ".sav", ".bin", ".pt", ".pth")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which takes the place of `folder` when the block ends well, and goes otherwise.

    Raises:
        RunError: `folder` exists and is not empty, or cannot be written.
    """
    check_new(folder)
    unfinished = folder.parent / f".{folder.name}.unfinished"
    with plain_disk_errors(folder, when_full="free some, then run this again", remedy="choose another OUTPUT"):
        # What a kill left of an earlier try.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir(mode=0o700)
        try:
            yield unfinished
            keep_private(unfinished)
            unfinished.replace(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def check_new(folder: Path) -> None:
    """Raises RunError when a folder cannot be made here because something is there already."""
    with plain_disk_errors(folder, remedy="choose another OUTPUT"):
        if folder.exists() and not folder.is_dir():
            raise RunError(f"{folder} is a file; give a folder that does not exist yet.")
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} exists and is not empty; choose a folder that does not exist yet.")


def write_classifier(
    classifier: Calibrated, folder: Path, *, training: dict[str, Any], lexicon: Path | None = None
) -> None:
    """Writes a classifier into the folder that `new_folder` gave.

    Args:
        classifier: of one of `KINDS`, calibrated.
        folder: exists; usually has no other files yet.
        training: what it was fitted on, kept in the description: fingerprints, counts, seed.
        lexicon: of the kind rules, when it is not the package's own.
    """
    files = _write_files(classifier.classifier, folder, lexicon)
    about = {
        "format": FORMAT,
        "kind": classifier.kind,
        "version": classifier.version,
        "labels": list(SEVERITIES),
        "calibration": classifier.calibration.to_json(),
        "files": {file.relative_to(folder).as_posix(): _checksum(file) for file in files},
        "training": training,
        "sevpeft": __version__,
    }
    write_atomically(folder / ABOUT, json.dumps(about, ensure_ascii=False, indent=2) + "\n")


def load_classifier(folder: Path) -> Calibrated:
    """The classifier in a folder, calibrated.

    Raises:
        DataError: there is none, or it is damaged, of another format, kind or label order, or only pickled; in one
            sentence.
    """
    about = read_about(folder)
    for name, checksum in about["files"].items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{folder} is incomplete, {name} is not there: copy it again, or fit it again.")
        if _checksum(file) != checksum:
            raise DataError(f"{folder} is damaged, {name} is not as it was written: copy it again, or fit it again.")
    calibrated = Calibrated(_read(about["kind"], folder), calibration_from_json(about["calibration"]))
    if calibrated.version != about["version"]:
        raise DataError(
            f"{folder} was fitted for another version of what gives its probabilities ({about['version']}, here "
            f"{calibrated.version}), and its calibration does not hold for this one: fit it again."
        )
    return calibrated


def read_about(folder: Path) -> dict[str, Any]:
    """The description of a classifier, checked; raises DataError as `load_classifier` does."""
    try:
        text = (folder / ABOUT).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_why_none(folder)) from None
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{folder / ABOUT} cannot be read: check its permissions, or copy the folder again.") from None
    try:
        about: dict[str, Any] = json.loads(text)
        written, kind, labels = about["format"], about["kind"], about["labels"]
        known = isinstance(about["files"], dict) and isinstance(about["version"], str)
        known = known and isinstance(about["training"], dict) and "calibration" in about
        # Names of a description are joined to the folder: none may lead out of it.
        known = known and not any(Path(name).is_absolute() or ".." in Path(name).parts for name in about["files"])
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise DataError(
            f"{folder / ABOUT} is damaged, or none that sevpeft wrote: copy the folder again, or fit it again."
        )
    if written != FORMAT:
        raise DataError(
            f"{folder} was written by sevpeft {about.get('sevpeft', '')} in a format ({written}) that this version "
            f"does not know (it knows {FORMAT}): update sevpeft, or fit the classifier again."
        )
    if kind not in KINDS:
        raise DataError(
            f"{folder} holds a classifier of the kind '{kind}', which is none of {', '.join(KINDS)}: update sevpeft."
        )
    if labels != list(SEVERITIES):
        raise DataError(
            f"{folder} names its labels {labels}, not {list(SEVERITIES)} in this order: probabilities would go to the "
            "wrong severities, so fit it again."
        )
    return about


def _why_none(folder: Path) -> str:
    fit = "fit one with `sevpeft classifier fit DATA OUTPUT`"
    if not folder.is_dir():
        return f"There is no classifier folder {folder}: {fit}."
    names = sorted(file.name for file in folder.iterdir())
    if "config.json" in names:
        return (
            f"{folder} holds a model of transformers, but no severity classifier (no {ABOUT}): fit one with `sevpeft "
            f"classifier fit DATA OUTPUT --kind transformer --encoder {folder}`."
        )
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        return (
            f"{folder} has only a pickled classifier ({pickled[0]}), which could run any code when it is loaded, so it "
            f"is not: {fit}."
        )
    return f"{folder} holds no classifier (no {ABOUT}): {fit}."


def _write_files(classifier: SeverityClassifier, folder: Path, lexicon: Path | None) -> list[Path]:
    if classifier.kind == "linear":
        from sevpeft.severity.classifier.linear import LinearClassifier, write_linear

        if not isinstance(classifier, LinearClassifier):
            raise TypeError(f"a linear classifier, not a {type(classifier).__name__}")
        return write_linear(classifier, folder)
    if classifier.kind == "rules":
        return [_copy_lexicon(lexicon, folder, classifier.version)]
    if classifier.kind == "rules+linear":
        from sevpeft.severity.classifier.combination import CombinedClassifier, write_combined

        if not isinstance(classifier, CombinedClassifier):
            raise TypeError(f"a combination, not a {type(classifier).__name__}")
        return [_copy_lexicon(lexicon, folder, classifier.rules.version), *write_combined(classifier, folder)]
    from sevpeft.severity.classifier.transformer import TransformerClassifier, write_transformer

    if not isinstance(classifier, TransformerClassifier):
        raise TypeError(f"a transformer, not a {type(classifier).__name__}")
    inside = folder / TRANSFORMER
    write_transformer(classifier, inside)
    return sorted(file for file in inside.rglob("*") if file.is_file())


def _read(kind: str, folder: Path) -> SeverityClassifier:
    if kind == "linear":
        from sevpeft.severity.classifier.linear import read_linear

        return read_linear(folder)
    if kind in ("rules", "rules+linear"):
        from sevpeft.severity.classifier.combination import read_combined
        from sevpeft.severity.rules import Rules

        rules = Rules.load(folder / LEXICON)
        return rules if kind == "rules" else read_combined(folder, rules)
    from sevpeft.severity.classifier.transformer import read_transformer

    return read_transformer(folder / TRANSFORMER)


def _copy_lexicon(lexicon: Path | None, folder: Path, version: str) -> Path:
    copy = folder / LEXICON
    shutil.copyfile(lexicon or PACKAGE_LEXICON, copy)
    if _read("rules", folder).version != version:
        raise DataError("The lexicon changed while the classifier was fitted: run this again.")
    return copy


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; check its permissions.") from None
    return f"sha256:{digest.hexdigest()}"
