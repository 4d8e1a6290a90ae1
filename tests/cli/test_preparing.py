"""`sevpeft prepare` on the command line: what it prints, what it refuses, and what a kill leaves."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sevpeft.data.read import load_consultations
from tests.conftest import Cli

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def csv(folder: Path, *lines: str) -> Path:
    (folder / "x.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "x.csv"


def test_the_sample_is_prepared_and_the_counts_fit_80_columns(sevpeft_: Cli, tmp_path: Path) -> None:
    code, out, err = sevpeft_("prepare", "builtin:consultations", tmp_path / "out", "resplit=true", "num_proc=1")
    assert (code, err) == (0, "")
    short = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, short)) <= 80
    assert f"Next: sevpeft train quickstart data.path={tmp_path / 'out'}" in out
    figures = {tuple(line.split()) for line in short}
    loaded = load_consultations(tmp_path / "out")
    assert ("read", "420") in figures and ("kept", f"{len(loaded.rows)}") in figures
    assert any(line[:1] == ("critical",) and len(line) == 5 for line in figures)


def test_keys_reach_the_texts_and_json_is_what_the_folder_says(sevpeft_: Cli, tmp_path: Path) -> None:
    answer = "راجع الطبيب اليوم أو اتصل على 01012345678"
    rows = [f"أشكو من صداـــع منذ {n} يوما وعمري {n} سنة فما هي الحالة رقم {n}؟,{answer} {n}" for n in range(20, 50)]
    file = csv(tmp_path, "question,answer", *rows)
    words = ("near_duplicates=1", "data.validation_size=3", "--json")
    assert sevpeft_("prepare", file, tmp_path / "left", "cleaning.tatweel=false", "masking.phone=false", *words)[0] == 0
    code, out, _ = sevpeft_("prepare", file, tmp_path / "done", *words)
    left, done = (load_consultations(tmp_path / name).rows[0] for name in ("left", "done"))
    assert "ـ" in left["question"] and "01012345678" in left["answer"]
    assert "ـ" not in done["question"] and "01012345678" not in done["answer"]
    about = json.loads((tmp_path / "done" / "dataset.json").read_text(encoding="utf-8"))
    assert (code, json.loads(out)) == (0, about) and about["splits"]["rows"]["validation"] == 3


def prepared(
    sevpeft_: Cli, folder: Path, header: str, cells: Callable[[int], str], *words: str
) -> tuple[str, list[str]]:
    """What `prepare` prints of a file of 30 rows, and the words of the command that it recommends, if any."""
    rows = [f"أشكو من الحالة رقم {n} منذ أيام فما العمل,راجع الطبيب اليوم ولا تتأخر {n},{cells(n)}" for n in range(30)]
    for old in folder.glob("my out*"):
        shutil.rmtree(old)
    given = ("near_duplicates=1", "num_proc=1", *words)
    code, out, err = sevpeft_("prepare", csv(folder, header, *rows), folder / "my out", *given)
    assert (code, err) == (0, "")
    said, _, command = out.partition("Next: sevpeft ")
    return " ".join(said.split()), shlex.split(command)


def test_it_says_which_column_it_took_and_the_command_that_it_recommends_works(sevpeft_: Cli, tmp_path: Path) -> None:
    known, french = ("non_critical", "متوسط", "حرجة"), ("Faible", "Moyen", "Élevé", "Inconnu")
    numbers = "p_non_critical,p_neutral,p_critical"

    def right(n: int) -> str:
        return known[n % 3]

    wrong = []
    for names, cells, words, said, verb in (
        ("السؤال,الرد,x", right, ["data.severity_column=x"], "severity 'x', by data.severity_column", "train"),
        ("السؤال,الرد,الشدة", right, [], "question 'السؤال', by its name", "train"),
        ("question,answer,note", right, [], "left out 'note'; kept in the folder", "annotate"),
        ("question,answer,x\x1b[2J", right, [], "left out 'x\\u001b[2J'", "annotate"),
        ("question,answer,label", lambda n: f"{n}" * 9, [], "too many different values", "annotate"),
        ("question,answer,label", lambda n: right(n) if n else "#N/A", [], "1 of the kept rows have no", "annotate"),
        # All known severities would be lost by replace=true, and a training would refuse these data.
        (f"question,answer,{numbers}", lambda n: "20,30,50", [], "not sum to 1", ""),
        (f"question,answer,label,{numbers}", lambda n: f"{right(n)},20,30,50", [], "by 100", ""),
        ("question,answer,label,p_critical", lambda n: f"{right(n)},0.5", [], "There is 'p_critical', but", ""),
        ("question,answer,label", lambda n: right(n) if n else "Moyen", [], "or empty these cells", ""),
        ("question,answer,label", lambda n: french[n % 4], [], "holds 'Faible', 'Moyen', 'Élevé', which", "annotate"),
    ):
        out, command = prepared(sevpeft_, tmp_path, names, cells, *words)
        card = (tmp_path / "my out" / "README.md").read_text(encoding="utf-8")
        if said not in out or command[:1] != [verb] * bool(verb) or "\x1b" in out + card:
            wrong.append((names, out, command))
    assert wrong == []
    # What a plan accepts, a training does too; its data are those that the command before it has written.
    code, out, err = sevpeft_(*command)
    assert code == 0, err
    _, *words = shlex.split(out.rpartition("Next: sevpeft ")[2])
    assert sevpeft_("plan", *words)[0] == 0 and words[1].endswith("my out-annotated")


def test_messages_about_a_file_name_it(sevpeft_: Cli, tmp_path: Path) -> None:
    file = csv(tmp_path, "question,answer,severity", *(f"سؤال {n},جواب {n},Moyen" for n in range(30))).rename(
        "data.csv"
    )
    code, _, err = sevpeft_("plan", QUICKSTART, "data.path=data.csv")
    assert code == 1 and err.startswith("data.csv: 30 rows (the first is row 2)") and "Moyen" not in err
    code, _, err = sevpeft_("plan", QUICKSTART, "data.csv")
    assert code == 2 and "data.path=data.csv" in err
    file.write_text("topic,body\nx,y\n", encoding="utf-8")
    for words in (
        ("plan", QUICKSTART, "data.path=data.csv"),
        ("prepare", file, "a"),
        ("annotate", file, "b.csv", "method=rules"),
    ):
        code, _, err = sevpeft_(*words)
        assert code == 1 and err.startswith("data.csv has no question") and "--csv" not in err


def test_a_rule_that_takes_out_more_than_a_tenth_of_the_rows_is_warned_of(sevpeft_: Cli, tmp_path: Path) -> None:
    said, _ = prepared(sevpeft_, tmp_path, "question,answer,x", lambda n: "x" if n > 2 else "x,y")
    assert "rejected: wrong_cell_count -3" in said and "Warning" not in said
    said, _ = prepared(sevpeft_, tmp_path, "question,answer,x", lambda n: "x" if n > 3 else "x,y")
    assert "Warning: 4 of 30 rows are wrong_cell_count: see rejected.jsonl." in said


def test_help_lists_every_key(sevpeft_: Cli) -> None:
    code, out, _ = sevpeft_("prepare", "--help")
    assert code == 0 and "split_by=year" in out
    for key in ("cleaning.emoji=keep|remove|name", "masking.name=true|false", "data.question_column=", "allow=["):
        assert f"\n{key}" in out
    assert "\ndata.path=" not in out


ROWS = [f"سؤال عن الحالة رقم {n} وعن دوائها,راجع الطبيب اليوم ولا تتأخر {n},2020" for n in range(30)]


def test_a_slip_is_one_sentence_and_leaves_nothing(sevpeft_: Cli, tmp_path: Path) -> None:
    file = csv(tmp_path, "question,answer,year", *ROWS)
    wrong = []
    for word, code, part in (
        ("split_by=year", 1, "has fewer than two values"),
        ("split_by=month", 1, "There is no column 'month' to split by"),
        ("data.question_column=text", 1, "no column 'text' (data.question_column)"),
        ("data.revision=main", 1, "data.revision=main chooses within a Hub data set"),
        ("allow=[shortanswer]", 2, "allow"),
        ("allow=[empty]", 2, "allow"),
        ("data.validation_size=many", 2, "data.validation_size"),
        ("data.validation_size=0", 2, "data.validation_size"),
        ("near_duplicates=80", 2, "near_duplicates"),
        ("drop_duplicates=all", 2, "drop_duplicates"),
        ("alow=x", 2, "allow"),
        ("cleaning.emojis=keep", 2, "cleaning.emoji"),
    ):
        got, _, err = sevpeft_("prepare", file, tmp_path / "out", word)
        if (got, err.count("\n")) != (code, 1) or part not in err:
            wrong.append((word, got, err))
    assert wrong == [] and [entry.name for entry in tmp_path.iterdir()] == ["x.csv"]


def test_an_input_that_gives_nothing_is_refused(sevpeft_: Cli, tmp_path: Path) -> None:
    for lines, part in (
        (["question,answer"], "x.csv holds no rows."),
        ([], "x.csv is empty."),
        (["question,answer", *(f"عندي صداع رقم {n},نعم" for n in range(9))], "None of 9 rows is left (9 short_answer)"),
        (["text,topic", "أ,ب"], "set data.question_column and data.answer_column to one of 'text', 'topic'"),
    ):
        code, _, err = sevpeft_("prepare", csv(tmp_path, *lines), tmp_path / "out")
        assert code == 1 and part in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    code, _, err = sevpeft_("prepare", "absent.csv", tmp_path / "out")
    assert code == 1 and "out exists already; choose an OUTPUT" in err
    assert "absent.csv: there is no such file" in sevpeft_("prepare", "absent.csv", tmp_path / "new")[2]


@pytest.mark.skipif(sys.platform != "linux", reason="a child is told of its parent's death")
def test_a_kill_leaves_no_folder_and_no_process_and_the_next_run_clears_up(sevpeft_: Cli, tmp_path: Path) -> None:
    rows = [f"أشكو من الحالة رقم {n} منذ أيام فما العمل,راجع الطبيب اليوم ولا تتأخر {n}" for n in range(8_000)]
    file = csv(tmp_path, "question,answer", *rows)
    before = file.read_bytes()
    command = [sys.executable, "-m", "sevpeft", "prepare", str(file), str(tmp_path / "out"), "num_proc=2"]
    killed = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    begun = time.monotonic()
    while len(workers) < 3 and killed.poll() is None and time.monotonic() - begun < 60:
        time.sleep(0.05)
        workers = killed.children()
    time.sleep(0.2)
    killed.kill()
    killed.wait()
    assert len(workers) == 3 and psutil.wait_procs(workers, timeout=10)[1] == []
    assert list(tmp_path.glob(".out.*")) and not (tmp_path / "out").exists() and file.read_bytes() == before
    csv(tmp_path, "question,answer,year", *ROWS)
    assert sevpeft_("prepare", file, tmp_path / "out", "near_duplicates=1")[0] == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "x.csv"]
