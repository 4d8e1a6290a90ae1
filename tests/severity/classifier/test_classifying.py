"""`sevpeft classifier fit` and `evaluate` at the command line: what they print, write and refuse."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sevpeft.runs
from sevpeft.cli import main
from sevpeft.severity.classifier.fitting import CALIBRATIONS, Way
from sevpeft.severity.classifier.storage import load_classifier

from .conftest import build_examples

NAMES = ("non_critical", "neutral", "critical")
Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Verb:
    """Runs `sevpeft classifier …` in this process: exit code, what it printed, what it complained of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("SEVPEFT_DEBUG", raising=False)

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sevpeft", "classifier", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(left.value.code or 0), out, err

    return run


@pytest.fixture
def refusal(verb: Verb, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused in one sentence and leave nothing behind."""

    def run(*words: str | Path, code: int = 1) -> str:
        before = sorted(tmp_path.rglob("*"))
        got, out, err = verb(*words)
        assert (got, out) == (code, ""), err
        assert err.count("\n") == 1 and err.rstrip()[-1] in ".?`", err
        assert sorted(tmp_path.rglob("*")) == before
        return err.strip()

    return run


def write(folder: Path, count: int = 150, *, seed: int = 0, name: str = "rows.jsonl", **columns: Any) -> Path:
    examples = build_examples(count, seed=seed)
    rows = [
        {"question": q, "answer": "راجع الطبيب", "severity": NAMES[label], "source": f"s{n * 2 // count}"}
        | {key: value(n, int(label)) for key, value in columns.items()}
        for n, (q, label) in enumerate(zip(examples.questions, examples.labels, strict=True))
    ]
    path = folder / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def test_fit_writes_a_classifier_with_its_report_and_prints_it_beside_its_baselines(tmp_path: Path, verb: Verb) -> None:
    code, out, err = verb("fit", write(tmp_path), "made", "--block-column", "source")
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    head = out.index("accuracy")
    assert all(word in out[:head] for word in ("majority", "number", "shuffled", "before"))
    assert out.count("AUC critical") >= 2 and "Blocks held out" not in out and "blocks held out" in out
    assert sorted(file.name for file in Path("made").iterdir()) == [
        "README.md",
        "classifier.json",
        "linear.safetensors",
        "metrics.json",
        "precision_recall.png",
        "reliability.png",
        "vocabulary.json",
    ]
    card = Path("made/README.md").read_text(encoding="utf-8")
    metrics = json.loads(Path("made/metrics.json").read_text(encoding="utf-8"))
    for part in ("majority", "row number", "shuffled", "sha256:", "Not a medical device", "Limits", "held out"):
        assert part in card
    assert "عندي" not in card and str(tmp_path) not in card
    assert set(metrics["evaluations"]) == {"Test rows", "Blocks held out"}
    assert metrics["evaluations"]["Test rows"]["baselines"].keys() == {"majority", "row number", "shuffled"}
    found = load_classifier(Path("made")).probabilities(["عندي نزيف واغماء"])
    assert found.argmax() == 2
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in Path("made").glob("*.png"))


def test_the_same_command_gives_the_same_classifier(tmp_path: Path, verb: Verb) -> None:
    data = write(tmp_path)
    for folder in ("one", "two"):
        assert verb("fit", data, folder, "--seed", "3")[0] == 0
    for name in ("classifier.json", "metrics.json", "README.md", "linear.safetensors"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


@pytest.mark.parametrize("kind", ["rules", "rules+linear"])
def test_the_other_kinds_are_fitted_and_come_back(tmp_path: Path, verb: Verb, kind: str) -> None:
    assert verb("fit", write(tmp_path), "made", "--kind", kind, "--calibration", "isotonic")[0] == 0
    loaded = load_classifier(Path("made"))
    assert loaded.kind == kind
    np.testing.assert_allclose(loaded.probabilities(["عندي نزيف", ""]).sum(axis=1), 1)


@pytest.mark.parametrize(
    ("words", "said", "on_card"),
    [
        ([], "folds", "each by a fit that did not see its question"),
        (["--calibration-size", "0"], "folds", "each by a fit that did not see its question"),
        (["--calibration-size", "0.25"], "a share of 0.25", "to calibrate on (a share of 0.25)"),
    ],
)
def test_which_rows_calibrated_is_written_down(
    tmp_path: Path, verb: Verb, words: list[str], said: str, on_card: str
) -> None:
    assert verb("fit", write(tmp_path, 100), "made", *words)[0] == 0
    about = json.loads(Path("made/classifier.json").read_text(encoding="utf-8"))
    assert about["training"]["calibration_on"] == said
    assert on_card in Path("made/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("size", ["0.6", "0.01", "-0.2", "nan"])
def test_a_share_that_leaves_too_little_is_refused(tmp_path: Path, refusal: Callable[..., str], size: str) -> None:
    data = write(tmp_path, 60)
    assert "from 0.05 to 0.5" in refusal("fit", data, "made", "--calibration-size", size, code=2)


def test_only_a_transformer_calibrates_on_a_share_by_default() -> None:
    assert [Way(kind).share for kind in CALIBRATIONS] == [None, None, None, 0.2]
    assert list(CALIBRATIONS)[-1] == "transformer" and Way("transformer", calibration_share=0).share is None


def test_json_is_all_that_is_printed(tmp_path: Path, verb: Verb) -> None:
    code, out, err = verb("evaluate", write(tmp_path), "--kind", "linear", "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)["evaluations"]["Random-grouped"]
    assert 0 < figures["calibrated"]["figures"]["auc_critical"]["value"] <= 1
    assert "accuracy" in figures["baselines"]["majority"]["figures"]


def test_both_protocols_are_judged_and_a_missing_one_is_named(tmp_path: Path, verb: Verb) -> None:
    data = write(tmp_path)
    _, both, _ = verb("evaluate", data, "--kind", "linear", "--block-column", "source", "--output", "judged")
    assert "random folds" in both and "blocks held out one at a time" in both and "Not judged by block" not in both
    assert {file.name for file in Path("judged").iterdir()} == {
        "metrics.json",
        "precision_recall.png",
        "reliability.png",
    }
    assert "Not judged by block" in verb("evaluate", data, "--kind", "rules")[1]


def test_a_classifier_is_judged_on_other_data_and_not_on_its_own(
    tmp_path: Path, verb: Verb, refusal: Callable[..., str]
) -> None:
    data, other = write(tmp_path), write(tmp_path, seed=4, name="other.jsonl")
    assert verb("fit", data, "made")[0] == 0
    code, out, _ = verb("evaluate", other, "--classifier", "made")
    assert code == 0 and "it was not fitted on" in out and "majority" in out
    assert "was fitted on" in refusal("evaluate", data, "--classifier", "made")
    assert verb("evaluate", data, "--classifier", "made", "--seen-data")[0] == 0


def test_p_critical_is_judged_by_a_column_of_yes_and_no(
    tmp_path: Path, verb: Verb, refusal: Callable[..., str]
) -> None:
    assert verb("fit", write(tmp_path), "made")[0] == 0
    other = write(tmp_path, seed=4, name="other.jsonl", urgent=lambda n, label: int(label == 2))
    code, out, _ = verb("evaluate", other, "--classifier", "made", "--positive-column", "urgent", "--output", "judged")
    assert code == 0 and "AUC of the row number alone" in out
    found = json.loads(Path("judged/metrics.json").read_text(encoding="utf-8"))["transfer"]
    assert found["auc"]["value"] > 0.8 > found["auc_row_number"]["value"]
    assert Path("judged/precision_recall.png").is_file()
    assert "asks for" in refusal("evaluate", other, "--classifier", "made", "--positive-column", "nothing")


def test_wrong_usage_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    data = write(tmp_path)
    assert "--classifier DIR" in refusal("evaluate", data, code=2)
    assert "--classifier DIR" in refusal("evaluate", data, "--kind", "linear", "--classifier", "made", code=2)
    assert "need --block-column" in refusal("evaluate", data, "--kind", "linear", "--judge-blocks", "s0", code=2)
    assert "--lexicon is for" in refusal("fit", data, "made", "--lexicon", "x.tsv", code=2)
    assert "--encoder is for" in refusal("fit", data, "made", "--encoder", "x", code=2)
    assert "--positive-column" in refusal("evaluate", data, "--kind", "rules", "--positive-column", "x", code=2)
    refusal("fit", data, "made", "--kind", "forest", code=2)


def test_what_cannot_be_fitted_or_judged_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    data = write(tmp_path)
    assert "no column 'ward'" in refusal("fit", data, "made", "--block-column", "ward")
    one = write(tmp_path, name="one.jsonl", severity=lambda n, label: "critical")
    assert "no non_critical and no neutral row" in refusal("fit", one, "made")
    few = write(tmp_path, name="few.jsonl", severity=lambda n, label: NAMES[2 if n < 3 else n % 2])
    assert "critical stands on 3 distinct questions" in refusal("evaluate", few, "--kind", "linear")
    unknown = write(tmp_path, name="unknown.jsonl", severity=lambda n, label: "class1" if n else None)
    assert "severity is missing or not known" in refusal("fit", unknown, "made")
    assert "no such file" in refusal("fit", "nowhere.csv", "made")
    assert "There is no classifier folder" in refusal("evaluate", data, "--classifier", "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x", encoding="utf-8")
    assert "not empty" in refusal("fit", data, "full")
    assert "lexicon" in refusal("fit", data, "made", "--kind", "rules", "--lexicon", "nowhere.tsv")


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sevpeft.runs.os, "fsync", full)
    assert "No space is left" in refusal("fit", data, "made")
