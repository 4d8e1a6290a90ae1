"""Rows keep all they had and gain their severity; killed, started twice or on a full disk, nothing is lost."""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from sevpeft.data.read import load_consultations
from sevpeft.errors import DataError, ModelError, RunError, UsageError, WeightError
from sevpeft.severity import annotating, dealing
from sevpeft.severity.annotated_files import ADDED, target_of
from sevpeft.severity.annotating import Annotation, Job, annotate
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
from sevpeft.severity.dealing import Processes
from sevpeft.severity.probabilities import severity_probabilities, sharpened
from sevpeft.severity.rules import Rules
from sevpeft.severity.unfinished import Unfinished

ROOT = Path(__file__).parent.parent.parent
PROBABILITIES = ("p_non_critical", "p_neutral", "p_critical")


class Judge:
    """Gives every question probabilities of its own, as a classifier that was fitted does."""

    kind = "linear"
    version = "judge-1"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        self.asked += questions
        digests = [hashlib.sha256(question.encode()).digest() for question in questions]
        raw = np.array([[1 + byte for byte in digest[:3]] for digest in digests], dtype=np.float64)
        return raw / raw.sum(axis=1, keepdims=True)


TRICKY = [
    'قال الطبيب: "خذ قرصين"، فهل هذا صحيح؟',
    "سطر أول\nسطر ثان\n\nسطر رابع",
    "=1+1 عندي صداع",
    "علامة\tجدولة، وفاصلة, وفاصلة منقوطة; ونقطتان:",
    "@SUM(A1) -5 +3 %",
    "رجوع\rوحده",
    "\u200fاتجاه\u200e و\u2028فاصل سطر و😀",
    "NULLIFY 007 1e5 ٣٫٥",
    "مسافات  كثيرة   هنا ",
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


def run(source: Path | str, output: Path, judge: Any = None, **options: Any) -> Annotation:
    reading = options.pop("reading", {})
    calls = {name: options.pop(name) for name in ("tell", "progress") if name in options}
    job = Job(load_consultations(source, keep="all", **reading), judge or Judge(), output, **options)
    done = annotate(job, **calls)
    assert done is not None
    return done


def table(path: Path | str) -> datasets.Dataset:
    return load_consultations(path, keep="all").rows


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotating, "_ROWS_OF_PART", 7)


# What is written


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz", ".tsv.gz", ""])
def test_every_column_row_and_character_comes_back_from_every_kind_of_output(ending: str, tmp_path: Path) -> None:
    output = tmp_path / f"out{ending}"
    done = run(jsonl(tmp_path / "in.jsonl"), output)
    back = table(output)
    assert done.rows == 30 and len(back) == 30
    for name in ("id", "question", "answer", "ملاحظة", "age"):
        assert back[name][:] == [row[name] for row in lines()], name
    expected = Judge().probabilities([row["question"] for row in lines()])
    assert np.array_equal(np.stack([back[name][:] for name in PROBABILITIES], axis=1), expected)
    assert back["severity"][:] == [("non_critical", "neutral", "critical")[i] for i in expected.argmax(axis=1)]
    assert set(back["severity_method"]) == {"linear"} and set(back["severity_version"]) == {"judge-1"}
    assert "severity_evidence" not in back.column_names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.jsonl", output.name])


def test_a_spreadsheet_reads_the_cells_as_they_were(tmp_path: Path) -> None:
    run(jsonl(tmp_path / "in.jsonl"), tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream, strict=True))
    assert [row["question"] for row in read] == [row["question"] for row in lines()]
    assert read[2]["question"].startswith("=1+1")
    assert list(read[0]) == [*lines()[0], *ADDED[:-1]]


def test_the_same_rows_give_the_same_bytes_gzip_too(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl")
    for ending in (".jsonl.gz", ".parquet"):
        run(source, tmp_path / f"a{ending}")
        run(source, tmp_path / f"b{ending}")
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()
    packed = (tmp_path / "a.jsonl.gz").read_bytes()
    assert packed[4:8] == bytes(4), "the time would make two files of the same rows differ"
    assert gzip.decompress(packed).count(b"\n") == 30


def test_rules_tell_their_evidence_also_when_calibrated(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", [{"question": "عندي ضيق تنفس شديد", "answer": "إلى الطوارئ"}] * 3)
    rules = Rules.load()
    run(source, tmp_path / "plain.jsonl", rules)
    run(source, tmp_path / "calibrated.jsonl", Calibrated(rules, Calibration((0.5,))))
    plain, calibrated = (table(tmp_path / f"{name}.jsonl") for name in ("plain", "calibrated"))
    assert plain["severity_evidence"][0] == rules.evidence("عندي ضيق تنفس شديد") != ""
    assert calibrated["severity_evidence"][0] == plain["severity_evidence"][0]
    expected = Calibration((0.5,)).apply(severity_probabilities(plain))
    assert np.abs(severity_probabilities(calibrated) - expected).max() < 1e-15
    assert plain["severity_method"][0] == calibrated["severity_method"][0] == "rules"
    assert plain["severity_version"][0] != calibrated["severity_version"][0]


def test_a_temperature_sharpens_and_is_told(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl")
    run(source, tmp_path / "out.jsonl", temperature=0.5)
    back = table(tmp_path / "out.jsonl")
    expected = sharpened(Judge().probabilities([row["question"] for row in lines()]), 0.5)
    assert np.abs(severity_probabilities(back) - expected).max() < 1e-15
    assert set(back["severity_version"]) == {"judge-1, temperature 0.5"}
    with pytest.raises(WeightError, match="must be a number above 0"):
        run(source, tmp_path / "other.jsonl", temperature=0.0)
    assert not (tmp_path / "other.jsonl").exists()


def test_the_summary_counts_what_stands_in_the_output(tmp_path: Path) -> None:
    rows = [*lines(20), {"id": "e", "question": " ", "answer": "x", "age": "1"}]
    done = run(jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    back = table(tmp_path / "out.jsonl")
    p = severity_probabilities(back)
    assert done.counts == {name: back["severity"][:].count(name) for name in ("non_critical", "neutral", "critical")}
    assert list(done.mean.values()) == pytest.approx(p.mean(axis=0))
    weights = p @ [0.5, 1.0, 1.5]
    assert done.weights.effective_sample_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert done.rejected == {"empty question": 1} and done.rows == 20
    assert Annotation.from_dict(json.loads(json.dumps(done.as_dict()))).counts == done.counts


# Folders


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder as `sevpeft prepare` makes it."""
    from sevpeft.data.prepare.prepare import prepare
    from sevpeft.data.prepare.settings import PrepareSettings

    words = ["صداع", "حرارة", "نزيف", "دوخة", "سعال", "حكة", "ألم", "تعب"]
    rows = []
    for i in range(24):
        question = f"عندي {words[i % 8]} وأيضا {words[(i * 3 + 1) % 8]} منذ {i} أيام"
        rows.append({"question": question, "answer": f"راجع الطبيب رقم {i} غدا", "source": ("forum", "clinic")[i % 2]})
    raw = jsonl(tmp_path / "raw.jsonl", rows)
    settings = {"data": {"path": str(raw)}, "near_duplicates": 1, "num_proc": 1}
    prepare(PrepareSettings.model_validate(settings), tmp_path / "prepared")
    return tmp_path / "prepared"


def test_a_prepared_folder_becomes_one_with_severity_and_keeps_where_it_is_from(prepared: Path, tmp_path: Path) -> None:
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
    assert "## Splits" in card and "## Severity" in card and after.fingerprint in card
    assert "صداع" not in card
    for name in ("rejected.jsonl", "conflicts.jsonl"):
        assert (tmp_path / "annotated" / name).read_bytes() == (prepared / name).read_bytes()
    # And once more, from there.
    run(tmp_path / "annotated", tmp_path / "again", replace=True)
    again = load_consultations(tmp_path / "again", keep="all")
    assert again.rows.column_names == after.rows.column_names and again.rows["row"][:] == before.rows["row"][:]


def test_a_file_becomes_a_folder_with_its_rejected_rows(tmp_path: Path) -> None:
    rows = [*lines(5), {"id": "e", "question": "سؤال", "answer": ""}]
    run(jsonl(tmp_path / "in.jsonl", rows), tmp_path / "folder")
    read = load_consultations(tmp_path / "folder", keep="all")
    assert read.rows["row"][:] == [1, 2, 3, 4, 5] and read.rows["age"][:] == ["0", "1", "2", "3", "4"]
    rejected = (tmp_path / "folder" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rejected) == 1 and json.loads(rejected[0])["row"] == 6
    assert oct((tmp_path / "folder").stat().st_mode)[-3:] == "700"


# What is refused


@pytest.mark.parametrize("column", ["severity", "label", "p_critical", "severity_method", "severity_evidence"])
def test_rows_that_have_severity_are_refused_without_replace(column: str, tmp_path: Path) -> None:
    rows = [{**row, column: "0.5"} for row in lines(3)]
    with pytest.raises(DataError, match=r"has severity already .*--replace"):
        run(jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_people_gave_is_kept_and_what_a_classifier_gave_is_replaced(tmp_path: Path) -> None:
    people = ["critical", "neutral", "non_critical"]
    rows = [{**row, "label": people[i % 3], "p_critical": 0.25} for i, row in enumerate(lines(9))]
    first = run(jsonl(tmp_path / "in.jsonl", rows), tmp_path / "first.csv", replace=True)
    assert first.given == {"severity_given": "label", "p_critical_given": "p_critical"} and first.replaced == []
    once = table(tmp_path / "first.csv")
    assert once["severity_given"][:] == people * 3
    assert list(map(float, once["p_critical_given"])) == [0.25] * 9

    class Other(Judge):
        version = "judge-2"

        def probabilities(self, questions: Sequence[str]) -> np.ndarray:
            return super().probabilities([f"{question}!" for question in questions])

    second = run(tmp_path / "first.csv", tmp_path / "second.parquet", Other(), replace=True)
    assert set(second.replaced) == {"severity", *PROBABILITIES, "severity_method", "severity_version"}
    twice = table(tmp_path / "second.parquet")
    assert sorted(twice.column_names) == sorted(once.column_names)
    assert twice["severity_given"][:] == people * 3 and set(twice["severity_version"]) == {"judge-2"}
    assert twice["p_critical"][:] != once["p_critical"][:]


def test_probabilities_that_do_not_say_of_what_are_refused_with_the_names_they_need(tmp_path: Path) -> None:
    rows = [{**row, "class1": 0.2, "class2": 0.3, "class3": 0.5} for row in lines(3)]
    source = jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(DataError, match=r"'class1', 'class2', 'class3'.* rename each to one of p_non_critical"):
        run(source, tmp_path / "out.jsonl")
    run(source, tmp_path / "out.jsonl", replace=True)
    assert table(tmp_path / "out.jsonl")["class3"][0] == "0.5"


@pytest.mark.parametrize("name", ["out.xlsx", "out.json", "out.txt", "out.parquet.gz", "out.gz", "out.v2"])
def test_an_ending_that_is_not_written_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"end a file in \.jsonl, \.csv, \.tsv, \.parquet"):
        target_of(Path(name))


@pytest.mark.parametrize("name", ["out.jsonl", "folder"])
def test_an_output_that_exists_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    source, judge = jsonl(tmp_path / "in.jsonl"), Judge()
    run(source, tmp_path / name)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(RunError, match="exists already"):
        run(source, tmp_path / name, judge)
    assert judge.asked == [] and sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "wrong", [np.full((1, 2), 0.5), np.array([[np.nan, 0.5, 0.5]]), np.array([[2.0, -0.5, -0.5]]), np.full((1, 3), 0.5)]
)
def test_a_classifier_that_gives_no_probabilities_is_refused(wrong: np.ndarray, tmp_path: Path) -> None:
    class Broken(Judge):
        def probabilities(self, questions: Sequence[str]) -> np.ndarray:
            return np.repeat(wrong, len(questions), axis=0)

    with pytest.raises(ModelError, match="gives no probabilities"):
        run(jsonl(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", Broken())
    assert not (tmp_path / "out.jsonl").exists()


# Killed, full, twice at once


class Stopped(Exception):
    pass


def stopping(after: int) -> Judge:
    """Judges so many parts, then fails."""

    class Stopping(Judge):
        def probabilities(self, questions: Sequence[str]) -> np.ndarray:
            if len(self.asked) >= after * 7:
                raise Stopped
            return super().probabilities(questions)

    return Stopping()


def test_the_next_try_judges_only_what_is_left_and_says_so(tmp_path: Path) -> None:
    source, output = jsonl(tmp_path / "in.jsonl"), tmp_path / "out.csv"
    run(source, tmp_path / "whole.csv")
    with pytest.raises(Stopped):
        run(source, output, stopping(2))
    assert not output.exists()
    damaged = tmp_path / ".out.csv.annotating" / "part-000001.arrow"
    damaged.write_bytes(damaged.read_bytes()[:40])
    judge, said, seen = Judge(), [], []
    done = run(source, output, judge, tell=said.append, progress=lambda rows, of: seen.append((rows, of)))
    assert judge.asked == [row["question"] for row in lines()[7:]]
    assert done.continued == 7 and said == ["Going on where an earlier try ended: 7 of 30 rows are judged."]
    assert seen[-1] == (30, 30)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / ".out.csv.annotating").exists()


def test_parts_of_another_command_are_neither_used_nor_removed(tmp_path: Path) -> None:
    source, output = jsonl(tmp_path / "in.jsonl"), tmp_path / "out.csv"
    with pytest.raises(Stopped):
        run(source, output, stopping(2))
    other = stopping(2)
    other.version = "judge-2"
    kept = sorted((tmp_path / ".out.csv.annotating").iterdir())
    with pytest.raises(RunError, match=r"judged with another classifier; give that command again"):
        run(source, output, other)
    with pytest.raises(RunError, match="judged with another temperature; "):
        run(source, output, temperature=0.5)
    with pytest.raises(RunError, match="another input and another columns of the input and another rows"):
        run(jsonl(tmp_path / "other.jsonl", lines(20)), output)
    assert sorted((tmp_path / ".out.csv.annotating").iterdir()) == kept
    assert run(source, output).continued == 14


def test_two_commands_do_not_write_one_output(tmp_path: Path) -> None:
    source, output = jsonl(tmp_path / "in.jsonl"), tmp_path / "out.csv"
    job = Job(load_consultations(source, keep="all"), Judge(), output)
    with Unfinished(output).opened(job.settings()), pytest.raises(RunError, match="Another command is writing"):
        run(source, output)
    run(source, output)


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "folder"])
@pytest.mark.parametrize("full_at", [1, 2, 4, 7])
def test_a_full_disk_leaves_no_output_and_keeps_what_is_judged(
    name: str, full_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The synced writes are: the state, five parts, OUTPUT."""
    source, output, synced = jsonl(tmp_path / "in.jsonl"), tmp_path / name, []
    sync = os.fsync

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space is left for .*; free some, then"):
        run(source, output)
    monkeypatch.setattr(os, "fsync", sync)
    assert not output.exists()
    left = {path.name for path in (tmp_path / f".{name}.annotating").iterdir()}
    parts = min(max(full_at - 2, 0), 5)
    assert left - {"state.json", ".lock"} == {f"part-{number:06d}.arrow" for number in range(parts)}
    assert run(source, output).continued == min(parts * 7, 30)


# Each kill needs a process of its own; they are forked from one that has the libraries loaded.
_KILLER = """
import json, os, shutil, signal, sys
from pathlib import Path
from tests.severity.test_annotating import Judge
from sevpeft.data.read import load_consultations
from sevpeft.severity import annotating
from sevpeft.severity.annotating import Job, annotate
from sevpeft.severity.unfinished import Unfinished

annotating._ROWS_OF_PART = 7
consultations, folder = load_consultations(sys.argv[1], keep="all"), Path(sys.argv[2])
read = Unfinished.read
Unfinished.read = lambda self, number: (sys.audit("part.read", number), read(self, number))[1]
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "part.read")

def child(output, kill_at):
    process = os.fork()
    if process == 0:
        seen = 0
        def count(event, arguments):
            nonlocal seen
            if event not in EVENTS or (event == "open" and str(folder) not in str(arguments[0])):
                return
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        code = 1
        try:
            annotate(Job(consultations, Judge(), output))
            code = 0
        finally:
            (folder / "events").write_text(str(seen))
            os._exit(code)
    return os.waitpid(process, 0)[1]

def content(output):
    if output.is_file():
        return {"": output.read_bytes()}
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}

for name in ("out.csv", "out"):
    output = folder / name
    assert child(output, None) == 0
    expected, total = content(output), int((folder / "events").read_text())
    kills = 0
    # Until a folder is written, nothing differs from a file.
    for kill_at in range(1 if name == "out.csv" else total - 25, total + 1):
        shutil.rmtree(output) if output.is_dir() else output.unlink()
        status = child(output, kill_at)
        if status == signal.SIGKILL:
            kills += 1
            assert output.exists() is False or content(output) == expected, (name, kill_at, "half an output")
            # After its very last step but one, OUTPUT is there and nothing says any more that it is its own.
            done = output.exists()
            assert child(output, None) == 0 or done, (name, kill_at, "did not go on")
        assert content(output) == expected, (name, kill_at, "another content")
        left = [path.name for path in folder.iterdir() if path.name not in ("events", name)]
        assert left == [], (name, kill_at, left)
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    print(name, kills)
"""


def test_killed_before_any_step_on_the_disk_and_started_again_it_writes_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _KILLER, str(jsonl(tmp_path / "in.jsonl", lines(15))), str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kills = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert kills.keys() == {"out.csv", "out"} and min(kills.values()) >= 25


# Several processes


def test_every_part_is_done_by_one_process() -> None:
    dealt = [part for number in range(3) for part in Processes(number, 3).part_of(10)]
    assert sorted(dealt) == list(range(10))
    assert list(Processes().part_of(4)) == [0, 1, 2, 3]


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], Processes]]:
    """A process that exchanges with another one, which says what it is told to."""

    def make(said: str | None) -> Processes:
        def exchange(self: Processes, own: str | None) -> list[Any]:
            return [own, said]

        monkeypatch.setattr(dealing.Processes, "_exchanged", exchange)
        return Processes(0, 2)

    yield make


def test_a_failure_elsewhere_is_a_failure_here_with_its_sentence(peer: Callable[..., Processes]) -> None:
    with pytest.raises(RunError, match="rows are missing"), peer("rows are missing.").together():
        pass
    with pytest.raises(DataError, match="mine"), peer("theirs").together():
        raise DataError("mine")
    with peer(None).together():
        pass
    # Errors of libraries may quote a row.
    assert "سؤال" not in dealing._sentence(ValueError("سؤال")) and "ValueError" in dealing._sentence(ValueError("x"))


_LAUNCHED = """
import sys
from pathlib import Path
from sevpeft.errors import DataError, RunError
from sevpeft.severity.dealing import Processes
from sevpeft.cli import main

processes = Processes.of_launch()
try:
    with processes.together():
        if processes.number == 1:
            raise DataError("Process 1 has had enough.")
    said = "nothing"
except (DataError, RunError) as error:
    said = f"{type(error).__name__}: {error}"
Path(sys.argv.pop(1), f"said-{processes.number}").write_text(said)
main()
"""


def test_two_processes_write_what_one_writes_and_one_that_fails_fails_both(tmp_path: Path) -> None:
    rows = [{"question": f"عندي نزيف {i}" if i % 3 else f"حكة {i}", "answer": "راجع الطبيب"} for i in range(20_500)]
    source = jsonl(tmp_path / "in.jsonl", rows)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    script = tmp_path / "launched.py"
    script.write_text(_LAUNCHED, encoding="utf-8")
    config = str(ROOT / "accelerate_configs" / "cpu_2.yaml")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", config),
            *(str(script), str(tmp_path), "annotate", str(source), str(two), "--method", "rules"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Wrote 20,500 rows") == 1
    assert (tmp_path / "said-0").read_text() == "RunError: Process 1 has had enough."
    assert (tmp_path / "said-1").read_text() == "DataError: Process 1 has had enough."
    annotating._ROWS_OF_PART = 10_000
    run(source, one, Rules.load())
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*two*")) == ["two.jsonl"]


# The verb


@pytest.fixture
def verb(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    from sevpeft.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sevpeft", "annotate", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err and isinstance(left.value.code, int)
        return left.value.code, out, err

    return call


def test_the_verb_shows_counts_weights_and_the_next_command(verb: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = verb("builtin:consultations", "out.jsonl", "--method", "rules", "--replace")
    assert (code, err) == (0, "")
    for said in ("column severity of the input is severity_given now", "likeliest in rows", "█"):
        assert said in out
    assert "effective sample size" in out and "Next: sevpeft plan RECIPE data.path=out.jsonl" in out
    assert "too close together" not in out
    code, out, err = verb("out.jsonl", "flat.csv", "--method", "rules", "--replace", "--temperature", "50")
    assert code == 0 and "too close together to matter" in " ".join(out.split())


def test_the_verb_prints_json_alone(verb: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = verb("builtin:consultations", "out.parquet", "--method", "rules", "--replace", "--json")
    content = json.loads(out)
    assert code == 0 and content["rows"] == pq.read_metadata("out.parquet").num_rows == 420
    assert sum(content["counts"].values()) == 420 and content["weights"]["effective_sample_size"] > 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["builtin:consultations", "o.jsonl"], 2, "Say what judges: --method rules, or --classifier DIR"),
        (["builtin:consultations", "o.jsonl", "--method", "linear"], 2, "--method linear needs --classifier DIR"),
        (["builtin:consultations", "o.pdf", "--method", "rules"], 2, "end a file in .jsonl"),
        (["builtin:consultations", "o.jsonl", "--method", "rules"], 1, "has severity already ('severity')"),
        (["nope.csv", "o.jsonl", "--method", "rules"], 1, "there is no such file"),
        (["in.jsonl", "o.jsonl", "--classifier", "nowhere"], 1, "There is no classifier in nowhere"),
        (["in.jsonl", "o.jsonl", "--method", "rules", "--batch-size", "4"], 2, "--batch-size is for --method trans"),
        (["in.jsonl", "o.jsonl", "--classifier", "x", "--lexicon", "y"], 2, "--lexicon is for --method rules without"),
        (["in.jsonl", "o.jsonl", "--method", "rules", "--temperature", "-1"], 1, "must be a number above 0"),
        (["in.jsonl", "/proc/o.jsonl", "--method", "rules"], 1, "choose another OUTPUT"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    verb: Callable[..., tuple[int, str, str]], tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    jsonl(tmp_path / "in.jsonl")
    got, out, err = verb(*words)
    assert (got, out) == (code, "") and said in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_fitted_classifier_judges_and_must_be_of_the_kind_that_is_named(
    verb: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    from sevpeft.severity.classifier.examples import Examples
    from sevpeft.severity.classifier.linear import fit_linear
    from sevpeft.severity.classifier.store import write_classifier

    questions = ["نزيف حاد الآن", "صداع خفيف اليوم", "حكة في الجلد"] * 4
    examples = Examples(questions, np.array([2, 1, 0] * 4), np.arange(12), np.arange(12))
    fitted = Calibrated(fit_linear(examples), Calibration((1 / 1.5,)))
    (tmp_path / "fitted").mkdir()
    write_classifier(fitted, tmp_path / "fitted", {})
    source = str(jsonl(tmp_path / "in.jsonl"))
    code, _, err = verb(source, "o.jsonl", "--method", "rules", "--classifier", "fitted")
    assert code == 1 and "of the kind linear, not rules" in err
    code, _, err = verb(source, "o.jsonl", "--classifier", "fitted", "--batch-size", "3")
    assert code == 2 and "--batch-size is for --method transformer" in err
    assert verb(source, "o.jsonl", "--classifier", "fitted")[0] == 0
    back = table(tmp_path / "o.jsonl")
    expected = fitted.probabilities([row["question"] for row in lines()])
    assert np.abs(severity_probabilities(back) - expected).max() < 1e-15
    assert set(back["severity_method"]) == {"linear"} and set(back["severity_version"]) == {fitted.version}
