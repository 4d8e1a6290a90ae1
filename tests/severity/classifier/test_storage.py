"""A classifier's folder is there whole or not at all, and a wrong one is refused in one sentence."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sevpeft.runs
from sevpeft.errors import DataError, RunError
from sevpeft.severity.classifier.calibration import Calibrated, Temperature, fit_isotonic
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.classifier.linear import fit_linear
from sevpeft.severity.classifier.storage import ABOUT, load_classifier, new_folder, read_about, write_classifier
from sevpeft.severity.lexicon import COLUMNS
from sevpeft.severity.rules import Rules

LEXICON = "\n".join(
    [
        "\t".join(COLUMNS),
        "نزيف\tcritical\tbleeding\t\tH\t",
        "حراره\tneutral\tfever\t\tM\t",
        "شعر\tnon_critical\thair\t\tM\t",
    ]
)


@pytest.fixture
def classifier(examples: Examples) -> Calibrated:
    return Calibrated(fit_linear(examples), Temperature(0.7))


@pytest.fixture
def folder(tmp_path: Path, classifier: Calibrated) -> Path:
    target = tmp_path / "severity"
    with new_folder(target) as building:
        write_classifier(classifier, building, training={"rows": 240, "fingerprints": ["sha256:1"]})
    return target


def edit(folder: Path, **changes: Any) -> None:
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    (folder / ABOUT).write_text(json.dumps(about | changes), encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_classifier(folder)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_a_linear_classifier_comes_back_the_same(folder: Path, classifier: Calibrated, examples: Examples) -> None:
    loaded = load_classifier(folder)
    np.testing.assert_allclose(
        loaded.probabilities(examples.questions), classifier.probabilities(examples.questions), rtol=0, atol=1e-12
    )
    assert (loaded.kind, loaded.version) == ("linear", classifier.version)
    assert [file.name for file in folder.parent.iterdir()] == ["severity"]


def test_an_isotonic_calibration_comes_back_too(tmp_path: Path, classifier: Calibrated, examples: Examples) -> None:
    raw = classifier.classifier.probabilities(examples.questions)
    isotonic = Calibrated(classifier.classifier, fit_isotonic(raw, examples.labels))
    with new_folder(tmp_path / "c") as building:
        write_classifier(isotonic, building, training={})
    found = load_classifier(tmp_path / "c").probabilities(examples.questions)
    np.testing.assert_array_equal(found, isotonic.probabilities(examples.questions))


def test_rules_carry_their_lexicon_with_them(tmp_path: Path) -> None:
    lexicon = tmp_path / "own.tsv"
    lexicon.write_text(LEXICON, encoding="utf-8")
    rules = Calibrated(Rules.load(lexicon), Temperature(1.4))
    with new_folder(tmp_path / "rules") as building:
        write_classifier(rules, building, training={}, lexicon=lexicon)
    lexicon.unlink()
    loaded = load_classifier(tmp_path / "rules")
    assert (loaded.kind, loaded.version) == ("rules", rules.version)
    np.testing.assert_array_equal(loaded.probabilities(["عندي نزيف"]), rules.probabilities(["عندي نزيف"]))


def test_rules_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lexicon = tmp_path / "own.tsv"
    lexicon.write_text(LEXICON, encoding="utf-8")
    with new_folder(tmp_path / "rules") as building:
        write_classifier(Calibrated(Rules.load(lexicon), Temperature()), building, training={}, lexicon=lexicon)
    monkeypatch.setattr("sevpeft.severity.rules.CODE_VERSION", 99)
    assert "another version" in refusal(tmp_path / "rules")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": ["critical", "neutral", "non_critical"]}, "in this order"),
        ({"labels": ["class1", "class2", "class3"]}, "in this order"),
        ({"labels": ["non_critical", "critical"]}, "in this order"),
        ({"kind": "forest"}, "kind 'forest'"),
        ({"format": 2}, "update sevpeft"),
        ({"version": "linear-000000000000"}, "another version"),
        ({"calibration": {"method": "temperature"}}, "calibration is damaged"),
        ({"files": ["linear.safetensors"]}, "damaged"),
        ({"files": {"../../etc/passwd": "sha256:0"}}, "damaged"),
        ({"files": {"/etc/passwd": "sha256:0"}}, "damaged"),
        ({"training": None}, "damaged"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    edit(folder, **changes)
    assert said in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"linear"'])
def test_a_damaged_description_is_refused(folder: Path, text: str) -> None:
    (folder / ABOUT).write_text(text, encoding="utf-8")
    assert "damaged" in refusal(folder)


@pytest.mark.parametrize("name", ["linear.safetensors", "vocabulary.json"])
def test_damaged_and_missing_files_are_refused(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-9] ^= 1
    (folder / name).write_bytes(bytes(content))
    assert f"{name} is not as it was written" in refusal(folder)
    (folder / name).unlink()
    assert f"{name} is not there" in refusal(folder)


def test_what_is_no_classifier_is_refused_with_what_it_is(tmp_path: Path) -> None:
    assert "There is no classifier folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "There is no classifier folder" in refusal(tmp_path / "file")
    empty, pickled, encoder = (tmp_path / name for name in ("empty", "pickled", "encoder"))
    for folder in (empty, pickled, encoder):
        folder.mkdir()
    (pickled / "model.joblib").write_bytes(b"\x80\x04.")
    (encoder / "config.json").write_text("{}", encoding="utf-8")
    (encoder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "holds no classifier" in refusal(empty)
    assert "only a pickled classifier (model.joblib)" in refusal(pickled)
    assert "--encoder" in refusal(encoder)


def test_nothing_is_written_over(folder: Path, tmp_path: Path) -> None:
    before = (folder / ABOUT).read_text(encoding="utf-8")
    with pytest.raises(RunError, match="not empty"), new_folder(folder):
        pytest.fail("the block ran")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match="is a file"), new_folder(tmp_path / "file"):
        pytest.fail("the block ran")
    assert (folder / ABOUT).read_text(encoding="utf-8") == before


def test_an_empty_folder_may_be_written_into(tmp_path: Path, classifier: Calibrated) -> None:
    (tmp_path / "made").mkdir()
    with new_folder(tmp_path / "made") as building:
        write_classifier(classifier, building, training={})
    assert load_classifier(tmp_path / "made").version == classifier.version


def test_a_full_disk_leaves_nothing(tmp_path: Path, classifier: Calibrated, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("pathlib.Path.write_bytes", "os.fsync", "pathlib.Path.replace"):
        with monkeypatch.context() as broken:
            broken.setattr(target, full)
            with pytest.raises(RunError, match="No space is left"), new_folder(tmp_path / "c") as building:
                write_classifier(classifier, building, training={})
        assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_classifier_and_the_next_try_succeeds(tmp_path: Path, classifier: Calibrated) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from sevpeft.severity.classifier.storage import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'classifier.json').write_text('{')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sevpeft.__file__).parent.parent)}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "c")], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "c").exists() and len(list(tmp_path.iterdir())) == 1
    with new_folder(tmp_path / "c") as building:
        write_classifier(classifier, building, training={})
    assert load_classifier(tmp_path / "c").version == classifier.version
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_what_it_was_trained_on_is_kept(folder: Path) -> None:
    assert read_about(folder)["training"] == {"rows": 240, "fingerprints": ["sha256:1"]}


@pytest.mark.parametrize("break_it", [lambda text: text[: len(text) // 2], lambda text: text.replace("a", "b")])
def test_half_a_description_is_refused(folder: Path, break_it: Callable[[str], str]) -> None:
    (folder / ABOUT).write_text(break_it((folder / ABOUT).read_text(encoding="utf-8")), encoding="utf-8")
    assert "damaged" in refusal(folder)
