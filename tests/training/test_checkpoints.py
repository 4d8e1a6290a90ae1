"""A checkpoint that was cut off or damaged in any file is noticed, and the one before it is used."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator, DistributedType
from rich.console import Console

from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.training.checkpoints import (
    MANIFEST,
    checkpoint_damage,
    files_to_resume,
    latest_valid_checkpoint,
    remove_incomplete,
    seal,
)
from sevpeft.training.train import train

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
REQUIRED = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "trainer_state.json",
    "counts.json",
    "rng_state.pth",
    "scheduler.pt",
    "optimizer.pt",
]
SHORT = ["data.max_rows=60", "training.max_length=160", "training.save_strategy=steps", "training.save_steps=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of four steps with a checkpoint after the second and the fourth."""
    from tests.conftest import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("trained")
    build_model("llama").save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    recipe = load_recipe(QUICKSTART, [f"model.name_or_path={folder / 'base'}", *SHORT, "training.max_steps=4"])
    return train(recipe, folder / "run")


@pytest.fixture
def copied(trained: Run, tmp_path: Path) -> Run:
    shutil.copytree(trained.folder, tmp_path / "run")
    return Run(tmp_path / "run")


def files_of(run: Run) -> list[Path]:
    newest = run.checkpoints / "checkpoint-4"
    return sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


def test_the_training_seals_what_a_resume_needs(trained: Run) -> None:
    assert files_to_resume(Accelerator(cpu=True)) == REQUIRED
    assert {str(name) for name in files_of(trained)} >= {MANIFEST, *REQUIRED}
    newest, said = latest_valid_checkpoint(trained, REQUIRED)
    assert newest is not None and newest.name == "checkpoint-4" and said == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_removed_truncated_or_zeroed_is_noticed(damage: str, copied: Run, trained: Run) -> None:
    for name in files_of(trained):
        DAMAGES[damage](copied.checkpoints / "checkpoint-4" / name)
        newest, said = latest_valid_checkpoint(copied, REQUIRED)
        assert newest is not None and newest.name == "checkpoint-2", name
        assert len(said) == 1 and said[0].startswith("checkpoint-4 ") and said[0].endswith("is used."), name
        if damage != "removed" and str(name) != MANIFEST:
            assert str(name) in said[0]
        shutil.copytree(trained.checkpoints / "checkpoint-4", copied.checkpoints / "checkpoint-4")


def test_a_manifest_that_lists_not_all_that_a_resume_needs_is_damage(copied: Run, trained: Run) -> None:
    newest = copied.checkpoints / "checkpoint-4"
    listed = json.loads((newest / MANIFEST).read_text(encoding="utf-8"))["files"]
    manifests: dict[str, Any] = {
        name: {"files": {other: written for other, written in listed.items() if other != name}} for name in REQUIRED
    }
    manifests |= {"empty": {"files": {}}, "no files": {}, "list": [], "list of files": {"files": [*listed]}}
    manifests |= {
        "number": 1,
        "null": None,
        "files null": {"files": None},
        "no sizes": {"files": dict.fromkeys(listed)},
    }
    noticed = {}
    for name, manifest in manifests.items():
        for remains in (True, False):  # the file itself
            (newest / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            if not remains and name in REQUIRED:
                (newest / name).unlink()
            found, said = latest_valid_checkpoint(copied, REQUIRED)
            noticed[name, remains] = (found and found.name, len(said), name not in REQUIRED or name in said[0])
            shutil.rmtree(newest, ignore_errors=True)
            shutil.copytree(trained.checkpoints / newest.name, newest)
    assert {key: value for key, value in noticed.items() if value != ("checkpoint-2", 1, True)} == {}


def test_each_engine_needs_the_files_that_it_reads() -> None:
    def needed(kind: DistributedType, processes: int, **state: Any) -> set[str]:
        scaler = state.pop("scaler", None)
        accelerator: Any = SimpleNamespace(
            num_processes=processes, distributed_type=kind, scaler=scaler, state=SimpleNamespace(**state)
        )
        return set(files_to_resume(accelerator)) - set(REQUIRED[:4])

    two = {"rng_state_0.pth", "rng_state_1.pth"}
    assert needed(DistributedType.MULTI_GPU, 2) == {*two, "scheduler.pt", "optimizer.pt"}
    assert needed(DistributedType.FSDP, 2) == {*two, "scheduler.pt", "optimizer.bin"}
    assert needed(DistributedType.NO, 1, scaler=object()) == {*REQUIRED[4:], "scaler.pt"}
    zero = needed(DistributedType.DEEPSPEED, 2, deepspeed_plugin=SimpleNamespace(zero_stage=2)) - two
    # As DeepSpeed 0.19.8 writes them, with and without bfloat16.
    for rank, prefix in ((0, ""), (1, "bf16_")):
        name = f"global_step12/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        assert [fnmatch(name, pattern) for pattern in sorted(zero)] == [rank == 0, rank == 1]


def test_a_file_more_does_no_harm(copied: Run) -> None:
    (copied.checkpoints / "checkpoint-4" / "note.txt").write_text("mine", encoding="utf-8")
    assert checkpoint_damage(copied.checkpoints / "checkpoint-4", REQUIRED) is None


def test_where_all_are_damaged_the_training_begins_again_and_says_so(copied: Run) -> None:
    for step in (2, 4):
        (copied.checkpoints / f"checkpoint-{step}" / "optimizer.pt").unlink()
    newest, said = latest_valid_checkpoint(copied, REQUIRED)
    assert newest is None and [sentence.split()[0] for sentence in said] == ["checkpoint-4", "checkpoint-2"]
    assert said[-1].endswith("so the training begins again.")
    assert not list(copied.checkpoints.glob("checkpoint-*")), "they would be written under the same names"


def test_checkpoints_are_ordered_by_their_steps_and_not_by_their_names(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (8, 10, 100, 20):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (run.checkpoints / f"checkpoint-{step}" / "file").write_text("x", encoding="utf-8")
        seal(run.checkpoints / f"checkpoint-{step}")
    (run.checkpoints / "checkpoint-mine").mkdir()
    newest, _ = latest_valid_checkpoint(run, [])
    assert newest is not None and newest.name == "checkpoint-100"


def test_what_has_no_manifest_yet_is_taken_away(copied: Run) -> None:
    (copied.checkpoints / "checkpoint-4" / MANIFEST).unlink()
    remove_incomplete(copied)
    assert [path.name for path in copied.checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_resumed_run_tells_of_the_damage_and_ends_with_the_same_bits(copied: Run, trained: Run) -> None:
    shutil.rmtree(copied.adapter)
    DAMAGES["zeroed"](copied.checkpoints / "checkpoint-4" / "adapter_model.safetensors")
    console = Console(file=io.StringIO(), width=80)
    train(load_recipe(copied.folder / "recipe.yaml"), copied.folder, resume=True, console=console)
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "checkpoint-4 holds adapter_model.safetensors with another content than was written, so the one" in shown
    assert copied.metrics()["training"]["resumed_from"] == "checkpoint-2"
    weights = "adapter_model.safetensors"
    assert (copied.adapter / weights).read_bytes() == (trained.adapter / weights).read_bytes()
