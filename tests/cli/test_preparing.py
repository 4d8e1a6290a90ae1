"""`sevpeft prepare` on the command line: what it prints, what it refuses, and that every setting has its option."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import psutil
import pytest

from sevpeft.cli import preparing
from sevpeft.data.cleaning import Cleaning
from sevpeft.data.masking import MASKS
from sevpeft.data.preparing import Preparation
from sevpeft.data.sources import load_consultations
from tests.cli.conftest import Cli


def csv(folder: Path, *lines: str) -> Path:
    (folder / "x.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "x.csv"


def test_the_sample_is_prepared_and_the_counts_fit_80_columns(sevpeft_: Cli, tmp_path: Path) -> None:
    code, out, err = sevpeft_("prepare", "builtin:consultations", tmp_path / "out", "--resplit", "--num-proc", "1")
    assert (code, err) == (0, "")
    short = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, short)) <= 80
    assert f"Next: sevpeft train recipes/quickstart.yaml data.path={tmp_path / 'out'}" in out
    figures = {tuple(line.split()) for line in short}
    loaded = load_consultations(tmp_path / "out")
    assert ("read", "420") in figures and ("kept", f"{len(loaded.rows)}") in figures
    assert any(line[:1] == ("critical",) and len(line) == 5 for line in figures)


def test_json_is_what_the_folder_says(sevpeft_: Cli, tmp_path: Path) -> None:
    code, out, err = sevpeft_("prepare", "builtin:consultations", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))


def test_every_setting_has_its_option_with_the_same_default(tmp_path: Path) -> None:
    options = inspect.signature(preparing.prepare).parameters
    for switch in fields(Cleaning):
        default = options[switch.name].default if switch.name in options else not options[f"no_{switch.name}"].default
        assert default == switch.default, switch.name
    assert {name for name in options if name.startswith("no_mask_")} == {f"no_mask_{kind}" for kind in MASKS}
    for setting in get_type_hints(Preparation).keys() - {"cleaning", "masks", "allow"}:
        default = getattr(Preparation(), setting)
        assert options[setting].default in (default, str(default)), setting


def test_switches_and_masks_reach_the_texts(sevpeft_: Cli, tmp_path: Path) -> None:
    answer = "راجع الطبيب اليوم أو اتصل على 01012345678"
    rows = [f"أشكو من صداـــع منذ {n} يوما وعمري {n} سنة فما هي الحالة رقم {n}؟,{answer} {n}" for n in range(20, 50)]
    file = csv(tmp_path, "question,answer", *rows)
    words = ("--no-tatweel", "--no-mask-phone", "--near-duplicates", "1", "--validation-size", "3")
    assert sevpeft_("prepare", file, tmp_path / "left", *words)[0] == 0
    assert sevpeft_("prepare", file, tmp_path / "done", *words[2:])[0] == 0
    left, done = (load_consultations(tmp_path / name).rows[0] for name in ("left", "done"))
    assert "ـ" in left["question"] and "01012345678" in left["answer"]
    assert "ـ" not in done["question"] and MASKS["phone"] in done["answer"]
    about = json.loads((tmp_path / "done" / "dataset.json").read_text(encoding="utf-8"))
    assert about["splits"]["rows"]["validation"] == 3 and about["settings"]["validation_size"] == 3


ROWS = [f"سؤال عن الحالة رقم {n} وعن دوائها,راجع الطبيب اليوم ولا تتأخر {n},2020" for n in range(30)]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 1, "so nothing can be held out by it"),
        (("--split-by", "month"), 1, "There is no column 'month' to split by"),
        (("--allow", "shortanswer"), 2, "There is no reason 'shortanswer'"),
        (("--question-column", "text"), 1, "no column 'text', which --question-column asks for"),
        (("--validation-size", "many"), 2, "--validation-size many is no number; write 0.1"),
        (("--validation-size", "0"), 1, "--validation-size 0 gives no validation rows"),
        (("--near-duplicates", "80"), 1, "A similarity of 80.0 does not make near-duplicates"),
        (("--drop-duplicates", "all"), 2, "--drop-duplicates"),
        (("--revision", "main"), 1, "--revision main chooses within a Hub data set"),
        (("--alow", "x"), 2, "--allow"),
    ],
)
def test_a_slip_is_one_sentence_and_leaves_nothing(
    sevpeft_: Cli, tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    file = csv(tmp_path, "question,answer,year", *ROWS)
    got, _, err = sevpeft_("prepare", file, tmp_path / "out", *(words or ("--split-by", "year")))
    assert (got, err.count("\n")) == (code, 1) and said in err and "data." not in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.csv"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["question,answer"], "x.csv holds no rows."),
        ([], "x.csv is empty."),
        (["question,answer", *(f"عندي صداع رقم {n},نعم" for n in range(9))], "None of 9 rows is left (9 short_answer)"),
        (["text,topic", "أ,ب"], "set --question-column and --answer-column to one of 'text', 'topic'"),
    ],
)
def test_an_input_that_gives_nothing_is_refused(sevpeft_: Cli, tmp_path: Path, lines: list[str], said: str) -> None:
    code, _, err = sevpeft_("prepare", csv(tmp_path, *lines), tmp_path / "out")
    assert code == 1 and said in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused(sevpeft_: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code, _, err = sevpeft_("prepare", "builtin:consultations", tmp_path / "out")
    assert code == 1 and "out exists already; choose an OUTPUT" in err
    assert "absent.csv: there is no such file" in sevpeft_("prepare", "absent.csv", tmp_path / "new")[2]


@pytest.mark.skipif(sys.platform != "linux", reason="a child is told of its parent's death")
def test_a_kill_leaves_no_folder_and_no_process_and_the_next_run_clears_up(sevpeft_: Cli, tmp_path: Path) -> None:
    rows = [f"أشكو من الحالة رقم {n} منذ أيام فما العمل,راجع الطبيب اليوم ولا تتأخر {n}" for n in range(8_000)]
    file = csv(tmp_path, "question,answer", *rows)
    before = file.read_bytes()
    command = [sys.executable, "-m", "sevpeft", "prepare", str(file), str(tmp_path / "out"), "--num-proc", "2"]
    killed = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    begun = time.monotonic()
    while len(workers) < 3 and killed.poll() is None and time.monotonic() - begun < 60:
        time.sleep(0.01)
        workers = killed.children()
    time.sleep(0.2)
    killed.kill()
    killed.wait()
    assert len(workers) == 3 and psutil.wait_procs(workers, timeout=10)[1] == []
    assert list(tmp_path.glob(".out.*")) and not (tmp_path / "out").exists() and file.read_bytes() == before
    csv(tmp_path, "question,answer,year", *ROWS)
    assert sevpeft_("prepare", file, tmp_path / "out", "--near-duplicates", "1")[0] == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "x.csv"]
