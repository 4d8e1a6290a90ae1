"""`sevpeft classifier fit` and `evaluate` at the command line: what they print, write and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevpeft.severity.classifier.store import load_classifier
from sevpeft.severity.probabilities import SEVERITIES
from tests.conftest import Cli

from .conftest import build_examples

Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verb(few_resamples: None, sevpeft_: Cli, monkeypatch: pytest.MonkeyPatch) -> Verb:
    """Runs `sevpeft classifier …` in this process: exit code, stdout, stderr."""
    monkeypatch.delenv("SEVPEFT_DEBUG", raising=False)
    return partial(sevpeft_, "classifier")


def write(folder: Path, count: int = 150, *, seed: int = 0, name: str = "rows.jsonl", **columns: Any) -> Path:
    examples = build_examples(count, seed=seed)
    rows = [
        {"question": q, "answer": "راجع الطبيب", "severity": SEVERITIES[label], "source": f"s{n * 2 // count}"}
        | {key: value(n, int(label)) for key, value in columns.items()}
        for n, (q, label) in enumerate(zip(examples.questions, examples.labels, strict=True))
    ]
    path = folder / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def test_fit_writes_a_classifier_with_its_report_and_prints_it_beside_its_baselines(
    tmp_path: Path, verb: Verb, quick_fits: None
) -> None:
    code, out, err = verb("fit", write(tmp_path, 90), "made", "block_column=source")
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    columns = ("both, 95 %", "question, 95 %", "majority", "row number")
    assert all(word in out for word in (*columns, "auc critical", "log loss", "ece critical", "mean weight"))
    of_each = ["classifier.json", "linear.safetensors", "vocabulary.json"]
    names = sorted(["README.md", "metrics.json", *of_each, *(f"both/{name}" for name in of_each)])
    files = sorted(file for file in Path("made").rglob("*") if file.is_file())
    assert sorted(file.relative_to("made").as_posix() for file in files) == names
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert {folder.stat().st_mode & 0o777 for folder in (Path("made"), Path("made/both"))} == {0o700}
    card = Path("made/README.md").read_text(encoding="utf-8")
    for part in (
        "majority",
        "row number",
        "`sha256:",
        "Not a medical device",
        "Limits",
        "Blocks held out",
        "language: ar",
    ):
        assert part in card
    assert "عندي" not in card and str(tmp_path) not in card
    metrics = json.loads(Path("made/metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["evaluations"]) == ["Test rows", "Blocks held out"]
    assert metrics["evaluations"]["Test rows"]["baselines"].keys() == {"majority", "row number"}
    assert load_classifier(Path("made")).probabilities(["عندي نزيف واغماء"]).argmax() == 2
    assert verb("fit", tmp_path / "rows.jsonl", "again", "block_column=source")[0] == 0
    for name in names:
        assert Path("made", name).read_bytes() == Path("again", name).read_bytes(), name


def test_the_other_kinds_are_fitted_and_come_back(tmp_path: Path, verb: Verb) -> None:
    for kind in ("rules", "rules+linear"):
        assert verb("fit", write(tmp_path, 90), kind, f"kind={kind}")[0] == 0
        loaded = load_classifier(Path(kind))
        assert loaded.kind == kind
        np.testing.assert_allclose(loaded.probabilities(["عندي نزيف", ""]).sum(axis=1), 1)


def test_a_way_of_fitting_is_cross_validated(tmp_path: Path, verb: Verb) -> None:
    data = write(tmp_path)
    code, out, err = verb("evaluate", data, "kind=rules", "block_column=source", "folds=3", "--json")
    assert (code, err) == (0, "")
    evaluations = json.loads(out)["evaluations"]
    assert list(evaluations) == ["Random folds", "Blocks held out"] and list(
        evaluations["Blocks held out"]["blocks"]
    ) == ["s0", "s1"]
    assert 0 < evaluations["Random folds"]["calibrated"]["figures"]["auc_critical"]["value"] <= 1
    assert "block_column" in verb("evaluate", data, "kind=rules")[1], "that no block was held out is said"


def test_a_classifier_is_evaluated_on_other_data_and_not_on_its_own(tmp_path: Path, verb: Verb) -> None:
    data, other = write(tmp_path), write(tmp_path, seed=4, name="other.jsonl")
    assert verb("fit", data, "made", "kind=rules")[0] == 0
    code, out, _ = verb("evaluate", other, "classifier=made")
    assert code == 0 and "Other data" in out and "majority" in out
    code, out, err = verb("evaluate", data, "classifier=made")
    assert (code, out) == (1, "") and "seen_data=true" in err
    assert verb("evaluate", data, "classifier=made", "seen_data=true")[0] == 0


def test_what_is_wrong_is_refused_and_leaves_nothing(tmp_path: Path, verb: Verb) -> None:
    data = write(tmp_path)
    one = write(tmp_path, name="one.jsonl", severity=lambda n, label: "critical")
    few = write(tmp_path, name="few.jsonl", severity=lambda n, label: SEVERITIES[2 if n < 3 else n % 2])
    silent = write(tmp_path, name="silent.jsonl", answer=lambda n, label: "…" if n < 2 else "راجع")
    leaky = write(tmp_path, name="leaky.jsonl", answer=lambda n, label: "رقم")
    bare = tmp_path / "bare.csv"
    bare.write_text("question\nسؤال\n", encoding="utf-8")
    (tmp_path / "full").mkdir()
    before, wrong = sorted(tmp_path.rglob("*")), []
    for words, code, expected in (
        (("fit", data, "made", "lexicon=x.tsv"), 2, "lexicon"),
        (("fit", data, "made", "encoder.max_length=8"), 2, "encoder"),
        (("fit", data, "made", "kind=forest"), 2, "kind"),
        (("fit", data, "made", "test_size=0.9"), 2, "test_size"),
        (("fit", data, "made", "data.test_size=0.2"), 2, "test_size"),
        (("fit", data, "made", "folds=3"), 2, "folds"),
        (("evaluate", data, "kind=linear", "classifier=made"), 2, "kind"),
        (("fit", data, "made", "block_column=ward"), 1, "ward"),
        (("fit", one, "made"), 1, "no non_critical and no neutral row"),
        (("evaluate", few), 1, "critical has 3"),
        (("fit", "nowhere.csv", "made"), 1, "nowhere.csv"),
        (("evaluate", data, "classifier=nowhere"), 1, "nowhere"),
        (("evaluate", data, "text=question", "classifier=made"), 2, "text"),
        (("fit", data, "made", "unlabeled=nowhere.csv"), 1, "nowhere.csv"),
        (("fit", data, "made", f"unlabeled={data}"), 1, "unlabeled="),
        (("fit", data, "made", f"unlabeled={bare}"), 1, "no answer column"),
        (("fit", data, "made", f"unlabeled={data}", "text=question"), 2, "text=both"),
        (("fit", silent, "made", "text=both"), 1, "row 1): text=both needs an answer"),
        (("fit", leaky, "made"), 1, "data.question_column"),
        (("fit", data, "full"), 1, "full"),
        (("fit", data, "made", "kind=rules", "lexicon=nowhere.tsv"), 1, "nowhere.tsv"),
    ):
        got, out, err = verb(*words)
        assert err, words
        if (got, out) != (code, "") or expected not in err or err.count("\n") != 1:
            wrong.append((words, got, err))
    assert wrong == []
    assert sorted(tmp_path.rglob("*")) == before


def test_unlabeled_consultations_are_counted_with_what_they_bring(tmp_path: Path, verb: Verb, quick_fits: None) -> None:
    data, forum = write(tmp_path, 60), write(tmp_path, 40, seed=4, name="forum.jsonl")
    code, out, err = verb("fit", data, "made", f"unlabeled={forum}")
    assert (code, err) == (0, "") and all(len(line) <= 80 for line in out.splitlines())
    assert "unlabeled rows" in out
    metrics = json.loads(Path("made/metrics.json").read_text(encoding="utf-8"))
    curve = metrics["evaluations"]["Test rows"]["by_unlabeled"]
    assert [one["unlabeled"] for one in curve] == [0, 10, 20, 40]
    about = json.loads(Path("made/classifier.json").read_text(encoding="utf-8"))
    assert about["training"]["unlabeled"] == 40 and "40 unlabeled rows" in Path("made/README.md").read_text("utf-8")
    code, _, err = verb("evaluate", forum, "classifier=made")
    assert code == 1 and "seen_data=true" in err, "what it was taught on is not other data"


def test_rows_that_are_left_out_are_counted_and_the_next_command_is_quoted(tmp_path: Path, verb: Verb) -> None:
    gaps = write(tmp_path, answer=lambda n, label: "" if n < 2 else "راجع")
    code, out, err = verb("fit", gaps, "my [1] دليل", "kind=rules")
    assert code == 0 and "2 rows with empty answer" in " ".join(err.split())
    assert "'classifier=my [1] دليل'" in out
    code, out, err = verb("evaluate", gaps, "kind=rules", "--json")
    assert code == 0 and "2 rows with empty answer" in " ".join(err.split()) and json.loads(out)["kind"] == "rules"


def test_help_lists_the_keys(verb: Verb) -> None:
    out = verb("fit", "--help")[1]
    for key in (
        "kind=linear|transformer|rules|rules+linear",
        "encoder.max_length=",
        "test_size=",
        "text=question|answer|both",
        "unlabeled=",
        "data.severity_column=",
    ):
        assert key in out
    assert "data.path=" not in out and "data.test_size=" not in out
