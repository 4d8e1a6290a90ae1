"""As many processes as were asked for, or an error; and configuration files that accelerate itself accepts."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file

from sevpeft.errors import RunError
from sevpeft.recipe import recipe_from_values
from sevpeft.training import launch
from sevpeft.training.train import train

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
    found = launch.asked_launch(words.split())
    assert (found.processes if found else None) == asked


@pytest.mark.parametrize(
    ("config", "processes", "machines", "engine"),
    [
        ("cpu", 1, 1, None),
        ("cpu_2", 2, 1, None),
        ("single_gpu", 1, 1, None),
        ("multi_gpu", 2, 1, None),
        ("fsdp2", 2, 1, DistributedType.FSDP),
        ("fsdp2_qlora", 2, 1, DistributedType.FSDP),
        ("deepspeed_zero2", 2, 1, DistributedType.DEEPSPEED),
        ("deepspeed_zero3", 2, 1, DistributedType.DEEPSPEED),
        ("multi_node", 8, 2, DistributedType.FSDP),
    ],
)
def test_what_is_asked_for_is_read_from_the_configuration_file(
    config: str, processes: int, machines: int, engine: DistributedType | None
) -> None:
    path = ROOT / "accelerate_configs" / f"{config}.yaml"
    command = ["accelerate", "launch", "--config_file", str(path), "-m", "sevpeft"]
    assert launch.asked_launch(command) == launch.Launch(processes, machines, engine)


def test_the_command_line_goes_before_the_configuration_file() -> None:
    path = ROOT / "accelerate_configs" / "fsdp2.yaml"
    command = ["accelerate", "launch", "--config_file", str(path), "--multi_gpu", "--num_processes", "4"]
    assert launch.asked_launch([*command, "-m", "sevpeft"]) == launch.Launch(4, 1, None)


def test_every_configuration_is_among_them() -> None:
    assert [path.stem for path in CONFIGS] == sorted(
        [
            "cpu",
            "cpu_2",
            "single_gpu",
            "multi_gpu",
            "fsdp2",
            "fsdp2_qlora",
            "deepspeed_zero2",
            "deepspeed_zero3",
            "multi_node",
        ]
    )


class _State:
    """The two things that are looked at of accelerate's PartialState."""

    def __init__(self, kind: DistributedType, processes: int) -> None:
        self.distributed_type, self.num_processes = kind, processes


@pytest.mark.parametrize(
    ("config", "runs", "said"),
    [
        ("fsdp2", DistributedType.MULTI_CPU, r"asked for FSDP, but DDP.*cpu_2\.yaml"),
        ("fsdp2", DistributedType.MULTI_GPU, None),
        ("deepspeed_zero3", DistributedType.MULTI_CPU, r"asked for DeepSpeed, but DDP"),
        ("deepspeed_zero3", DistributedType.MULTI_GPU, r"asked for DeepSpeed, but DDP"),
        ("deepspeed_zero3", DistributedType.DEEPSPEED, None),
        ("multi_gpu", DistributedType.MULTI_GPU, None),
    ],
)
def test_another_engine_than_asked_is_an_error(
    config: str, runs: DistributedType, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ROOT / "accelerate_configs" / f"{config}.yaml"
    monkeypatch.setattr(
        launch, "_ancestors", lambda: [["accelerate", "launch", "--config_file", str(path), "-m", "sevpeft"]]
    )
    refused = pytest.raises(RunError, match=said) if said else nullcontext()
    with refused:
        launch.check_launch(_State(runs, 2))


def test_processes_that_cannot_find_one_another_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def alone(**_: object) -> None:
        raise ValueError("Looks like distributed multinode run but MASTER_ADDR env not set. Set it.")

    monkeypatch.setattr("sevpeft.training.train.PartialState", alone)
    with pytest.raises(RunError, match=r"cannot find one another \(Looks like .* not set\); start it with `accelerate"):
        train(recipe_from_values({}), tmp_path / "run")


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_an_engine_that_only_the_environment_asks_for_counts_too(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch.check_launch(_State(DistributedType.NO, 1))
    monkeypatch.setenv(variable, "true")
    with pytest.raises(RunError, match="a single process would run"):
        launch.check_launch(_State(DistributedType.NO, 1))


def test_fewer_machines_than_asked_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["accelerate", "launch", "--num_machines", "2", "--machine_rank", "0", "-m", "sevpeft", "train", "r.yaml"]
    monkeypatch.setattr(launch, "_ancestors", lambda: [command])
    with pytest.raises(RunError, match=r"asked for 2 machines, but 1 takes part.*multi_node\.yaml"):
        launch.check_processes(1)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    launch.check_processes(2)


def test_deepspeed_that_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: False)
    launch.refuse_absent_deepspeed()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RunError, match=r"not installed: pip install 'sevpeft\[deepspeed\]'"):
        launch.refuse_absent_deepspeed()


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
