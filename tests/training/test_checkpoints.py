"""An incomplete or damaged checkpoint is detected; a resume with other settings or data is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator, DistributedType

from sevpeft.errors import RunError
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.training.checkpoints import (
    MANIFEST,
    check_same_data,
    check_same_recipe,
    checkpoint_damage,
    files_to_resume,
    remove_incomplete,
    resume_checkpoint,
    run_lock,
    seal,
)
from sevpeft.training.train import train

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
REQUIRED = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "trainer_state.json",
    "counts_0.json",
    "rng_state.pth",
    "scheduler.pt",
    "optimizer.pt",
]
DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with sealed checkpoints of two steps, whose files hold their names."""
    run = Run(tmp_path / "run")
    for step in (2, 4):
        checkpoint = run.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in REQUIRED:
            (checkpoint / name).write_text(name, encoding="utf-8")
        (checkpoint / "trainer_state.json").write_text('{"log_history": [{"step": 1}]}', encoding="utf-8")
        seal(checkpoint)
    run.write_text("recipe.yaml", load_recipe(QUICKSTART).to_yaml())
    return run


def found(run: Run) -> tuple[str | None, list[str]]:
    messages: list[str] = []
    checkpoint = resume_checkpoint(run, REQUIRED, messages.append)
    return checkpoint and checkpoint.name, messages


def test_each_file_removed_truncated_or_zeroed_is_noticed(run: Run, tmp_path: Path) -> None:
    newest = run.checkpoints / "checkpoint-4"
    assert found(run) == ("checkpoint-4", [])
    shutil.copytree(newest, tmp_path / "copy")
    wrong = []
    for damage, harm in DAMAGES.items():
        for name in (*REQUIRED, MANIFEST):
            harm(newest / name)
            checkpoint, messages = found(run)
            reported = len(messages) == 1 and messages[0].startswith("checkpoint-4 ")
            if checkpoint != "checkpoint-2" or not reported or (name != MANIFEST and name not in messages[0]):
                wrong.append((damage, name, checkpoint, messages))
            assert not newest.exists(), "it would be written under the same name"
            shutil.copytree(tmp_path / "copy", newest)
    assert wrong == []
    (newest / "note.txt").write_text("mine", encoding="utf-8")
    assert checkpoint_damage(newest, REQUIRED) is None, "a file more does no harm"


def test_a_manifest_that_lists_not_all_that_a_resume_needs_is_damage(run: Run) -> None:
    newest = run.checkpoints / "checkpoint-4"
    listed = json.loads((newest / MANIFEST).read_text(encoding="utf-8"))["files"]
    manifests: list[Any] = [{"files": {k: v for k, v in listed.items() if k != name}} for name in REQUIRED]
    manifests += [{"files": {}}, {}, {"files": [*listed]}, 1, None, {"files": None}, {"files": dict.fromkeys(listed)}]
    missed = []
    for manifest in manifests:
        (newest / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        if checkpoint_damage(newest, REQUIRED) is None:
            missed.append(manifest)
    assert missed == []


def test_each_engine_needs_the_files_that_it_reads() -> None:
    def needed(kind: DistributedType, processes: int, **state: Any) -> set[str]:
        scaler = state.pop("scaler", None)
        accelerator: Any = SimpleNamespace(
            num_processes=processes, distributed_type=kind, scaler=scaler, state=SimpleNamespace(**state)
        )
        return set(files_to_resume(accelerator)) - set(REQUIRED[:4])

    assert files_to_resume(Accelerator(cpu=True)) == REQUIRED
    two = {"rng_state_0.pth", "rng_state_1.pth", "counts_1.json"}
    assert needed(DistributedType.MULTI_GPU, 2) == {*two, "scheduler.pt", "optimizer.pt"}
    assert needed(DistributedType.FSDP, 2) == {*two, "scheduler.pt", "optimizer.bin"}
    assert needed(DistributedType.NO, 1, scaler=object()) == {*REQUIRED[4:], "scaler.pt"}
    zero = needed(DistributedType.DEEPSPEED, 2, deepspeed_plugin=SimpleNamespace(zero_stage=2)) - two
    # As DeepSpeed 0.19.8 writes them, with and without bfloat16.
    for rank, prefix in ((0, ""), (1, "bf16_")):
        name = f"global_step12/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        assert [fnmatch(name, pattern) for pattern in sorted(zero)] == [rank == 0, rank == 1]


def test_where_all_are_damaged_the_training_begins_again_and_the_log_with_it(run: Run) -> None:
    for step in range(3):
        run.append_log({"step": step, "loss": float("nan") if step == 1 else 1.0})
    assert found(run) == ("checkpoint-4", [])
    lines = (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "loss": 1.0}], "as long as when it was written"
    for step in (2, 4):
        (run.checkpoints / f"checkpoint-{step}" / "optimizer.pt").unlink()
    checkpoint, messages = found(run)
    assert checkpoint is None and [message.split()[0] for message in messages] == ["checkpoint-4", "checkpoint-2"]
    assert not list(run.checkpoints.iterdir()) and not (run.folder / "log.jsonl").read_text(encoding="utf-8")


def test_checkpoints_are_ordered_by_their_steps_and_not_by_their_names(run: Run) -> None:
    for step in (8, 10, 100, 20):
        shutil.copytree(run.checkpoints / "checkpoint-4", run.checkpoints / f"checkpoint-{step}")
    (run.checkpoints / "checkpoint-mine").mkdir()
    assert found(run) == ("checkpoint-100", [])


def test_what_has_no_manifest_yet_is_taken_away(run: Run) -> None:
    (run.checkpoints / "checkpoint-4" / MANIFEST).unlink()
    remove_incomplete(run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]


def test_a_recipe_with_other_settings_is_refused_with_each_as_it_was_and_is(run: Run) -> None:
    check_same_recipe(load_recipe(QUICKSTART), run)
    words = ["training.learning_rate=1e-5", "severity.weights={non_critical: 1, neutral: 1, critical: 3}"]
    with pytest.raises(RunError) as refused:
        check_same_recipe(load_recipe(QUICKSTART, words), run)
    rate = load_recipe(QUICKSTART).training.learning_rate
    assert f"training.learning_rate is 1e-05 and was {rate}" in str(refused.value)
    assert "severity.weights is {" in str(refused.value) and '} and was "balanced"' in str(refused.value)


def test_other_data_is_refused_where_its_content_is_known(run: Run) -> None:
    run.write_text("environment.json", json.dumps({"data_fingerprint": "sha256:one"}))
    check_same_data("sha256:one", "rows.csv", run)
    with pytest.raises(RunError, match=r"rows\.csv"):
        check_same_data("sha256:other", "rows.csv", run)
    check_same_data("5f2c", "someone/on-the-hub", run)  # changes with this machine's cache


def test_a_folder_is_held_by_one_training_at_a_time(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(RunError, match="--output"):
                train(load_recipe(QUICKSTART), tmp_path / "x" / ".." / "run", resume=resume)
        with run_lock(tmp_path / "other"):
            pass
    with pytest.raises(ValueError), run_lock(tmp_path / "run"):
        raise ValueError
    with run_lock(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir()), "a run that is refused leaves no trace"
