"""The engine that was asked for, or an error; and configuration files that accelerate itself accepts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file

from sevpeft.errors import RunError
from sevpeft.recipe import recipe_from_values
from sevpeft.training import distributed
from sevpeft.training.train import train

ROOT = Path(__file__).parent.parent.parent
FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"


def test_another_engine_than_asked_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate replaces FSDP on a CPU, and DeepSpeed beside it, by DDP or one process without a word."""
    kinds = DistributedType
    expected = {
        (None, kinds.NO): "",
        (None, kinds.MULTI_GPU): "",
        (FSDP, kinds.MULTI_CPU): "asked for FSDP, but DDP",
        (FSDP, kinds.NO): "asked for FSDP, but a single process",
        (FSDP, kinds.MULTI_GPU): "",
        (DEEPSPEED, kinds.MULTI_GPU): "asked for DeepSpeed, but DDP",
        (DEEPSPEED, kinds.DEEPSPEED): "",
    }
    wrong = []
    for (variable, kind), message in expected.items():
        with monkeypatch.context() as patch:
            if variable:
                patch.setenv(variable, "true")
            state = SimpleNamespace(distributed_type=kind, num_processes=1 if kind is kinds.NO else 2)
            try:
                distributed.check_engine(state)
                found = ""
            except RunError as error:
                found = str(error)
            if bool(message) != bool(found) or message not in found or (found and "cpu_2.yaml" not in found):
                wrong.append((variable, kind, found))
    assert wrong == []


def test_processes_that_cannot_find_one_another_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def alone(**_: object) -> None:
        raise ValueError("Looks like distributed multinode run but MASTER_ADDR env not set. Set it.")

    monkeypatch.setattr("sevpeft.training.train.PartialState", alone)
    with pytest.raises(RunError, match="`accelerate launch`"):
        train(recipe_from_values({}), tmp_path / "run")


def test_deepspeed_that_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_deepspeed_available", lambda: False)
    distributed.check_deepspeed()
    monkeypatch.setenv(DEEPSPEED, "true")
    with pytest.raises(RunError, match=r"pip install 'sevpeft\[deepspeed\]'"):
        distributed.check_deepspeed()


def test_each_configuration_is_accepted_by_accelerate_and_says_when_to_use_it() -> None:
    configs = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    wrong = []
    for path in configs:
        lines = path.read_text(encoding="utf-8").splitlines()
        header = [line for line in lines if line.startswith("#")]
        command = any(f"--config_file accelerate_configs/{path.name}" in line for line in header)
        if not (load_config_from_file(str(path)).num_processes >= 1 and command and header[0] == lines[0]):
            wrong.append(path.name)
    assert len(configs) == 9 and wrong == []
