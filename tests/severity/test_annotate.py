"""Rows keep all they had and gain their severity; killed, launched twice or on a full disk, nothing is lost."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sevpeft.data.read import load_consultations
from sevpeft.errors import DataError, RunError, UsageError, WeightError
from sevpeft.recipe import settings_from
from sevpeft.severity.annotate import ADDED, Annotation, annotate
from sevpeft.severity.probabilities import PROBABILITY_COLUMNS, SEVERITIES, severity_probabilities
from sevpeft.severity.rules import Rules
from sevpeft.severity.settings import AnnotateSettings
from tests.conftest import Cli

RULES = Rules()
TRICKY = [
    'قال الطبيب: "خذ قرصين"، فهل هذا صحيح؟',
    "سطر أول\nسطر ثان\n\nعندي نزيف شديد",
    "=1+1 عندي صداع",
    "علامة\tجدولة، وفاصلة, وفاصلة منقوطة; ونقطتان:",
    "@SUM(A1) -5 +3 %",
    "رجوع\rوحده وضيق تنفس",
    "\u200fاتجاه\u200e و\u2028فاصل سطر و😀",
    "NULLIFY 007 1e5 ٣٫٥",
    "مسافات  كثيرة   هنا / وزكام",
]


def lines(count: int = 30) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{number}",
            "question": f"{TRICKY[number % len(TRICKY)]} {number}",
            "answer": f"{TRICKY[(number + 1) % len(TRICKY)]} ج{number}",
            "ملاحظة": TRICKY[(number + 2) % len(TRICKY)] if number % 4 else "",
            "age": str(number),
        }
        for number in range(count)
    ]


def jsonl(path: Path, rows: Sequence[dict[str, Any]] | None = None) -> Path:
    rows = lines() if rows is None else rows
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(source: Path | str, output: Path, *words: str) -> Annotation:
    done = annotate(settings_from(AnnotateSettings, words or ["method=rules"], {"data.path": str(source)}), output)
    assert done is not None
    return done


def table(path: Path | str) -> datasets.Dataset:
    return load_consultations(path, keep="all").rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And rules that are read once."""
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setattr("sevpeft.severity.rules.Rules", lambda path=None: RULES if path is None else Rules(path))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".cache")


# What is written


def test_every_column_row_and_character_comes_back_from_every_kind_of_output(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl")
    expected, evidence = RULES.explained([row["question"] for row in lines()])
    for ending in (".jsonl", ".csv", ".tsv", ".parquet"):
        output = tmp_path / f"out{ending}"
        assert run(source, output).rows == 30
        back = table(output)
        for name in ("id", "question", "answer", "ملاحظة", "age"):
            assert back[name][:] == [row[name] for row in lines()], (ending, name)
        # The numbers of JSON have 15 decimals.
        found = np.stack([back[name][:] for name in PROBABILITY_COLUMNS], axis=1)
        assert np.abs(found - expected).max() <= (1e-15 if ending == ".jsonl" else 0), ending
        assert back["severity"][:] == [SEVERITIES[i] for i in expected.argmax(axis=1)], ending
        assert back["severity_evidence"][:] == evidence, ending
        assert set(back["severity_method"]) == {"rules"} and set(back["severity_version"]) == {RULES.version}
        assert f"{output.stat().st_mode & 0o777:o}" == "600"
    assert names(tmp_path) == ["in.jsonl", "out.csv", "out.jsonl", "out.parquet", "out.tsv"]
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as stream:  # as a spreadsheet reads it
        read = list(csv.DictReader(stream, strict=True))
    assert [row["question"] for row in read] == [row["question"] for row in lines()]
    assert list(read[0]) == [*lines()[0], *ADDED]


def test_the_figures_count_what_stands_in_the_output(tmp_path: Path) -> None:
    rows = [*lines(20), {"id": "e", "question": " ", "answer": "x", "age": "1"}]
    done = run(jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.csv")
    back = table(tmp_path / "out.csv")
    probabilities = severity_probabilities(back)
    assert done.counts == {name: back["severity"][:].count(name) for name in SEVERITIES}
    assert list(done.mean.values()) == pytest.approx(probabilities.mean(axis=0))
    weights = probabilities @ [0.5, 1.0, 1.5]
    assert done.weights.effective_sample_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert done.rejected == {"empty question": 1} and done.rows == 20


def test_a_prepared_folder_becomes_one_with_severity_and_keeps_where_it_is_from(tmp_path: Path) -> None:
    from sevpeft.data.prepare import PrepareSettings
    from sevpeft.data.prepare.prepare import prepare

    words = ["صداع", "حرارة", "نزيف", "دوخة", "سعال", "حكة", "ألم", "تعب"]
    rows = []
    for i in range(24):
        question = f"عندي {words[i % 8]} وأيضا {words[(i * 3 + 1) % 8]} منذ {i} أيام"
        rows.append({"question": question, "answer": f"راجع الطبيب رقم {i} غدا", "source": ("forum", "clinic")[i % 2]})
    prepared = tmp_path / "prepared"
    raw = {"path": str(jsonl(tmp_path / "raw.jsonl", rows))}
    prepare(PrepareSettings.model_validate({"data": raw, "near_duplicates": 1, "num_proc": 1}), prepared)
    before = load_consultations(prepared, keep="all")
    done = run(prepared, tmp_path / "annotated")
    after = load_consultations(tmp_path / "annotated", keep="all")
    for name in before.rows.column_names:
        assert after.rows[name][:] == before.rows[name][:], name
    about = after.provenance
    assert about["input"] == before.provenance["input"] and about["splits"] == before.provenance["splits"]
    assert about["severity"]["input_fingerprint"] == before.fingerprint == before.provenance["fingerprint"]
    assert about["severity"]["counts"] == done.counts and about["fingerprint"] == after.fingerprint
    card = (tmp_path / "annotated" / "README.md").read_text(encoding="utf-8")
    assert "## Splits" in card and done.version in card and after.fingerprint in card and "صداع" not in card
    assert before.fingerprint not in card
    for name in ("rejected.jsonl", "conflicts.jsonl"):
        assert (tmp_path / "annotated" / name).read_bytes() == (prepared / name).read_bytes()
    # And once more, from there; a file has the numbers of the rows too.
    run(tmp_path / "annotated", tmp_path / "again", "method=rules", "replace=true")
    again = load_consultations(tmp_path / "again", keep="all")
    assert again.rows.column_names == after.rows.column_names and again.rows["row"][:] == before.rows["row"][:]
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8").count("## Severity") == 1
    run(prepared, tmp_path / "flat.csv")
    assert table(tmp_path / "flat.csv")["original_row"][:] == [str(row) for row in before.rows["row"][:]]


# What is refused


def test_rows_that_have_severity_are_refused_without_replace(tmp_path: Path) -> None:
    for column in ("severity", "label", "p_critical", "severity_method", "severity_evidence"):
        source = jsonl(tmp_path / "in.jsonl", [{**row, column: "0.5"} for row in lines(3)])
        with pytest.raises(DataError, match="replace=true") as refused:
            run(source, tmp_path / "out.jsonl")
        # A remedy must not lead to the next error.
        assert ("replace=missing" in str(refused.value)) == (column in ("severity", "label"))
        assert names(tmp_path) == ["in.jsonl"]


def test_missing_severities_are_filled_in_and_those_of_people_stay(tmp_path: Path) -> None:
    questions = ("عندي صداع", "نزيف شديد", "حبوب في الوجه", "سعال")
    rows = [
        {"question": question, "answer": "راجع الطبيب", "severity": severity}
        for question, severity in zip(questions, ("حرج", "", "neutral", None), strict=True)
    ]
    source = jsonl(tmp_path / "in.jsonl", rows)
    run(source, tmp_path / "all.jsonl", "method=rules", "replace=true")
    run(source, tmp_path / "out.jsonl", "method=rules", "replace=missing")
    written = [(tmp_path / name).read_text(encoding="utf-8") for name in ("all.jsonl", "out.jsonl")]
    by_rules, filled = ([json.loads(line) for line in text.splitlines()] for text in written)
    assert [row["severity_method"] for row in filled] == ["given", "rules", "given", "rules"]
    assert [row["p_critical"] for row in filled[::2]] == [1, 0] and filled[2]["p_neutral"] == 1
    assert [row["severity"] for row in filled[::2]] == ["critical", "neutral"] and filled[0]["severity_evidence"] == ""
    assert filled[1::2] == by_rules[1::2] and filled[1]["severity_version"]
    for bad, parts in (([{**rows[0], "severity": "شيء"}, rows[1]], "row 1|Row 1"), (filled, "replace=true")):
        with pytest.raises((DataError, WeightError), match=parts):
            run(jsonl(tmp_path / "in.jsonl", bad), tmp_path / "new.jsonl", "method=rules", "replace=missing")
        assert not (tmp_path / "new.jsonl").exists()


def test_what_people_gave_is_kept_and_what_a_classifier_gave_is_replaced(tmp_path: Path) -> None:
    people = ["critical", "neutral", "non_critical"]
    rows = [{**row, "label": people[i % 3], "p_critical": 0.25 if i else None} for i, row in enumerate(lines(9))]
    run(jsonl(tmp_path / "in.jsonl", rows), tmp_path / "first.jsonl", "method=rules", "replace=true")
    once = table(tmp_path / "first.jsonl")
    assert once["severity_given"][:] == people * 3
    assert once["p_critical_given"][:] == ["", *["0.25"] * 8]
    own = tmp_path / "own.tsv"
    own.write_text("term\tlevel\tcategory\tdialect\tstrength\tnote\nزكام\tcritical\tcold\t\tH\t\n", encoding="utf-8")
    again = ("method=rules", "replace=true", f"lexicon={own}")
    run(tmp_path / "first.jsonl", tmp_path / "second.csv", *again)
    twice = table(tmp_path / "second.csv")
    assert sorted(twice.column_names) == sorted(once.column_names)
    assert twice["severity_given"][:] == people * 3
    assert set(twice["severity_version"]).isdisjoint(once["severity_version"])
    assert twice["p_critical"][:] != once["p_critical"][:]


def test_an_output_that_exists_or_has_another_ending_is_refused_before_the_work(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl")
    for name in ("out.xlsx", "out.json", "out.csv.gz", "out.v2", "folder"):
        with pytest.raises(UsageError, match=r"\.jsonl, \.csv, \.tsv, \.parquet"):
            run(source, tmp_path / name)
    for name in ("there.csv", "there"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(RunError, match="exists"):
            run(source, tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
    assert names(tmp_path) == ["in.jsonl", "there", "there.csv"]


def test_a_full_disk_leaves_no_output_and_what_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = jsonl(tmp_path / "in.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(datasets.Dataset, "to_csv", full)
        with pytest.raises(RunError, match="No space"):
            run(source, tmp_path / "out.csv")
    assert names(tmp_path) == ["in.jsonl"]
    monkeypatch.setattr(Rules, "explained", None)
    assert run(source, tmp_path / "out.csv").rows == 30


# Killed, and in several processes


def test_killed_and_started_again_it_goes_on_and_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, asked = jsonl(tmp_path / "in.jsonl"), tmp_path / "out.csv", []
    explained = Rules.explained
    monkeypatch.setattr("sevpeft.severity.source._MOST_ROWS", 10)

    def explain(rules: Rules, questions: list[str]) -> Any:
        if os.getpid() != parent and len(asked) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        asked.extend(questions)
        return explained(rules, questions)

    parent = os.getpid()
    monkeypatch.setattr(Rules, "explained", explain)
    child = os.fork()
    if not child:
        try:
            run(source, output)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and not output.exists()
    run(source, output)
    assert asked == [row["question"] for row in lines()[20:]]
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / ".cache" / "other"))
    run(source, tmp_path / "whole.csv")
    assert len(asked) == 40 and output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_two_processes_of_a_launch_write_what_one_writes_and_another_finds_what_they_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sevpeft.severity.source._MOST_ROWS", 10)
    source = jsonl(tmp_path / "in.jsonl")
    with monkeypatch.context() as launch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            launch.setenv(name, value)
        child = os.fork()
        if not child:
            settings = settings_from(AnnotateSettings, ["method=rules"], {"data.path": str(source)})
            try:
                os._exit(0 if annotate(settings, tmp_path / "two.csv") is None else 1)
            finally:
                os._exit(2)
        launch.setenv("RANK", "0")
        assert run(source, tmp_path / "two.csv").rows == 30
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Rules, "explained", None)
        run(source, tmp_path / "found.csv")
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / ".cache" / "other"))
    run(source, tmp_path / "one.csv")
    for name in ("found.csv", "one.csv"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "two.csv").read_bytes()


# The verb

Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verb(sevpeft_: Cli) -> Verb:
    return partial(sevpeft_, "annotate")


def test_the_verb_shows_counts_weights_and_the_next_command_or_json_alone_or_its_settings(verb: Verb) -> None:
    code, out, err = verb("builtin:consultations", "out.jsonl", "method=rules", "replace=true")
    assert (code, err) == (0, "") and "█" in out and "critical" in out
    assert "effective sample size" in out and "quickstart data.path=out.jsonl" in out
    code, out, _ = verb("builtin:consultations", "out.parquet", "method=rules", "replace=true", "--json")
    content = json.loads(out)
    assert code == 0 and content["rows"] == len(table("out.parquet")) == 420
    assert sum(content["counts"].values()) == 420 and content["weights"]["effective_sample_size"] > 0
    code, out, _ = verb("--help")
    assert code == 0
    for key in ("method=rules|linear", "replace=true|false|missing", "data.question_column=", "data.max_rows="):
        assert key in out
    assert "data.test_size" not in out and "data.path" not in out


def test_what_cannot_be_done_names_the_remedy(verb: Verb, tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl")
    rows = [
        ("in.jsonl o.jsonl", 2, "method=rules"),
        ("in.jsonl o.jsonl method=linear", 2, "sevpeft classifier fit"),
        ("in.jsonl o.jsonl method=rule", 2, "rules"),
        ("in.jsonl o.jsonl metod=rules", 2, "method"),
        ("in.jsonl o.jsonl classifier=x lexicon=y", 2, "lexicon"),
        ("in.jsonl o.jsonl method=rules data.test_size=5", 2, "data"),
        ("in.jsonl o.jsonl method=rules data.question_colum=q", 2, "data.question_column"),
        ("in.jsonl o.pdf method=rules", 2, ".jsonl"),
        ("builtin:consultations o.jsonl method=rules", 1, "replace=true"),
        ("nope.csv o.jsonl method=rules", 1, "nope.csv"),
        ("in.jsonl o.jsonl classifier=nowhere", 1, "nowhere"),
        ("in.jsonl o.jsonl method=rules lexicon=nowhere.tsv", 1, "nowhere.tsv"),
        ("in.jsonl /proc/o.jsonl method=rules", 1, "OUTPUT"),
    ]
    wrong = []
    for words, code, remedy in rows:
        got, out, err = verb(*words.split())
        if (got, out) != (code, "") or remedy not in err or names(tmp_path) != ["in.jsonl"]:
            wrong.append((words, got, out, err))
    assert wrong == []


def test_a_fitted_classifier_judges_and_must_be_of_the_kind_that_is_named(verb: Verb, tmp_path: Path) -> None:
    from sevpeft.runs import whole_folder
    from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
    from sevpeft.severity.classifier.store import write_classifier

    fitted = Calibrated([RULES], Calibration((1 / 1.5,)))
    with whole_folder(tmp_path / "fitted") as folder:
        write_classifier(fitted, folder, {})
    source = str(jsonl(tmp_path / "in.jsonl"))
    code, _, err = verb(source, "o.csv", "method=linear", "classifier=fitted")
    assert code == 1 and "rules" in err
    assert verb(source, "o.csv", "classifier=fitted")[0] == 0
    back, questions = table(tmp_path / "o.csv"), [row["question"] for row in lines()]
    assert np.abs(severity_probabilities(back) - fitted.probabilities(questions)).max() < 1e-15
    assert set(back["severity_method"]) == {"rules"} and set(back["severity_version"]) == {fitted.version}
    # Calibrated rules give their reasons too.
    assert back["severity_evidence"][:] == RULES.explained(questions)[1]
