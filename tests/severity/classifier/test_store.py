"""A classifier's folder gives back the classifier that was written, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sevpeft.errors import DataError
from sevpeft.severity import rules
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.classifier.linear import ARRAYS, VOCABULARY, fit_linear
from sevpeft.severity.classifier.store import ABOUT, load_classifier, read_about, write_classifier
from sevpeft.severity.rules import LEXICON, Rules


def edit(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        (folder / ABOUT).write_text(json.dumps(about | changes), encoding="utf-8")

    return change


def flip(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-9] ^= 1
        (folder / name).write_bytes(bytes(content))

    return change


def not_finite(folder: Path) -> None:
    arrays = load_file(folder / ARRAYS)
    arrays["coef"][0, 0] = np.nan
    save_file(arrays, folder / ARRAYS)


BROKEN: dict[str, Callable[[Path], object]] = {
    "labels in another order": edit(labels=["critical", "neutral", "non_critical"]),
    "fewer labels": edit(labels=["non_critical", "critical"]),
    "unknown kind": edit(kind="forest"),
    "another kind": edit(kind="transformer"),
    "newer format": edit(format=99),
    "another version": edit(version="linear-000000000000"),
    "half a calibration": edit(calibration={"weights": [1.0, 1.0], "bias": [0, 0, 0]}),
    "calibration that is none": edit(calibration={"method": "platt"}),
    "another calibration": edit(calibration={"weights": [1.5], "bias": [0, 0, 0]}),
    "cut description": lambda folder: (folder / ABOUT).write_text("{", encoding="utf-8"),
    "empty description": lambda folder: (folder / ABOUT).write_text("{}", encoding="utf-8"),
    "list for a description": lambda folder: (folder / ABOUT).write_text('["linear"]', encoding="utf-8"),
    "cut arrays": lambda folder: (folder / ARRAYS).write_bytes((folder / ARRAYS).read_bytes()[:100]),
    "no arrays": lambda folder: (folder / ARRAYS).unlink(),
    "one bit of an array": flip(ARRAYS),
    "not finite": not_finite,
    "one bit of an n-gram": flip(VOCABULARY),
    "no vocabulary": lambda folder: (folder / VOCABULARY).unlink(),
    "no description": lambda folder: (folder / ABOUT).unlink(),
}


def test_every_kind_comes_back_the_same_with_its_lexicon(tmp_path: Path, examples: Examples, lexicon: Path) -> None:
    linear, own = fit_linear(examples), Rules(lexicon)
    for classifier in (
        Calibrated([linear], Calibration((0.7,))),
        Calibrated([own], Calibration((0.7,), (0.0, 0.3, -1.0))),
        Calibrated([own, linear], Calibration((0.2, 0.9), (0.0, 0.3, -1.0))),
    ):
        folder = tmp_path / classifier.kind
        folder.mkdir()
        write_classifier(classifier, folder, {"rows": 240, "fingerprints": ["sha256:1"]})
        copied = folder / LEXICON
        assert copied.exists() == ("rules" in classifier.kind)
        loaded = load_classifier(folder)
        assert (loaded.kind, loaded.version) == (classifier.kind, classifier.version)
        found, expected = (one.probabilities([*examples.questions, ""]) for one in (loaded, classifier))
        np.testing.assert_array_equal(found, expected)
        assert read_about(folder)["training"] == {"rows": 240, "fingerprints": ["sha256:1"]}


def test_what_is_not_as_it_was_written_is_refused(tmp_path: Path, examples: Examples) -> None:
    classifier, accepted = Calibrated([fit_linear(examples)], Calibration((0.7,))), []
    for name, damage in BROKEN.items():
        folder = tmp_path / name
        folder.mkdir()
        write_classifier(classifier, folder, {})
        damage(folder)
        try:
            load_classifier(folder)
            accepted.append(name)
        except DataError as error:
            assert "\n" not in str(error) and "fit" in str(error), name
    assert accepted == []


def test_a_lexicon_or_rules_that_changed_are_refused(
    tmp_path: Path, lexicon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classifier(Calibrated([Rules(lexicon)], Calibration()), tmp_path, {})
    monkeypatch.setattr(rules, "CODE_VERSION", 99)
    with pytest.raises(DataError):
        load_classifier(tmp_path)
    monkeypatch.undo()
    load_classifier(tmp_path)
    copied = tmp_path / LEXICON
    copied.write_text(copied.read_text(encoding="utf-8") + "\nدوخه\tneutral\tsign\t\tH\t", encoding="utf-8")
    with pytest.raises(DataError):
        load_classifier(tmp_path)
