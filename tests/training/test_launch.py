"""As many processes as were asked for, or an error; and configuration files that accelerate itself accepts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from sevpeft.errors import RunError
from sevpeft.training import launch

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("python -m accelerate.commands.launch --num_processes 2 -m sevpeft train r.yaml", 2),
        ("/bin/python3 /bin/accelerate launch --cpu --num_processes=3 -m sevpeft train r.yaml", 3),
        ("/bin/accelerate-launch --num-processes 4 -m sevpeft train r.yaml", 4),
        ("accelerate launch -m sevpeft train r.yaml --num_processes 7", None),
        ("python -m sevpeft train r.yaml", None),
        ("accelerate config --config_file x.yaml", None),
        ("accelerate launch --no_such_option_at_all", None),
    ],
)
def test_the_number_is_read_from_the_command_line_of_the_launcher(
    words: str, asked: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "absent.yaml"))
    assert launch.asked_processes(words.split()) == asked


@pytest.mark.parametrize(("config", "asked"), [("cpu", 1), ("cpu_2", 2), ("multi_gpu", 2), ("single_gpu", 1)])
def test_the_number_is_read_from_the_configuration_file(config: str, asked: int) -> None:
    path = ROOT / "accelerate_configs" / f"{config}.yaml"
    assert launch.asked_processes(["accelerate", "launch", "--config_file", str(path), "-m", "sevpeft"]) == asked


def test_fewer_processes_than_asked_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "sevpeft", "train", "r.yaml"]
    monkeypatch.setattr(launch, "_ancestors", lambda: [["bash"], command])
    launch.check_processes(2)
    with pytest.raises(RunError, match=r"asked for 2 processes, but 1 runs.*cpu_2\.yaml"):
        launch.check_processes(1)


def test_a_real_launch_that_starts_one_process_in_silence_is_an_error(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "sevpeft",
        "train",
    ]
    done = subprocess.run(
        [*command, str(ROOT / "recipes" / "quickstart.yaml"), "--output", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "asked for 2 processes, but 1 runs" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_accepted_by_accelerate_and_says_when_to_use_it(path: Path) -> None:
    assert load_config_from_file(str(path)).num_processes >= 1
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert any(f"--config_file accelerate_configs/{path.name}" in line for line in header)
    assert header[0] == lines[0] and "accelerate launch" not in header[0]
