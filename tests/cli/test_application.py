"""The command line on screens, in folders and among processes that are not those of a workstation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sevpeft.cli import application, main
from sevpeft.recipe import DataSection, load_recipe
from sevpeft.runs import Run
from sevpeft.training.train import train

QUICKSTART = str(Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml")


def command(*words: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-m", "sevpeft", *words], capture_output=True, env=environment)


def test_a_screen_that_is_not_utf_8_gets_question_marks_and_no_traceback(tmp_path: Path) -> None:
    text = Path(QUICKSTART).read_text(encoding="utf-8").replace("license: apache-2.0", "license: رخصة")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    said = command("recipes", str(tmp_path), "--json", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert said.returncode == 0 and said.stderr == b"" and b"????" in said.stdout


def test_a_scratch_folder_that_is_not_there_is_refused() -> None:
    done = command("recipes", TMPDIR="/no/such/folder")
    assert done.returncode == 2 and done.stderr.startswith(b"TMPDIR=/no/such/folder ")
    assert b"unset TMPDIR" in done.stderr and done.stderr.count(b"\n") == 1


def test_the_hub_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    monkeypatch.setattr(sys, "argv", ["sevpeft", "recipes", str(Path(QUICKSTART).parent), "--json"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_a_process_that_fails_alone_says_so_after_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(application.time, "sleep", waited.append)
    application._print_error("No.")
    monkeypatch.setenv("RANK", "1")
    application._print_error("A stale variable.")
    monkeypatch.setenv("WORLD_SIZE", "2")
    application._print_error("No disk.")
    assert capsys.readouterr().err == "No.\nA stale variable.\nProcess 1: No disk.\n" and len(waited) == 1


def test_help_lists_the_keys_of_a_settings_class() -> None:
    app = typer.Typer()

    @app.command(cls=application.command_with_keys("sevpeft.recipe:Recipe", without=["data.path"]))
    def verb() -> None:
        pass

    shown = CliRunner().invoke(app, ["--help"]).output.splitlines()
    assert "data.encoding=TEXT|null (default: null)" in shown and "data.max_rows=NUMBER|null (default: null)" in shown
    described = shown[shown.index("data.max_rows=NUMBER|null (default: null)") + 1]
    assert described == f"  {DataSection.model_fields['max_rows'].description}"
    assert "quantization.load_in_4bit=true|false (default: false)" in shown
    assert "severity.normalize=none|mean (default: none)" in shown
    assert not [line for line in shown if line.startswith("data.path")]


def test_a_home_folder_is_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = ["training.max_steps=2", "data.max_rows=60", "training.max_length=256", "training.save_strategy=steps"]
    words.append("training.save_total_limit=2")
    run = train(load_recipe(Path(QUICKSTART), [*words, "training.save_steps=1"]), Path("~/run"))
    assert run.folder == tmp_path / "run" and not (tmp_path / "~").exists()
    assert (Run(tmp_path / "run").checkpoints / "checkpoint-2").is_dir()
