"""Checkpoints of a run: sealed with a manifest, verified before a resume, and locked against a second training."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType
from filelock import FileLock, Timeout
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from sevpeft.console import print_labeled
from sevpeft.errors import RunError
from sevpeft.recipe import AUTO, Recipe, load_recipe
from sevpeft.runs import Run, cache_folder, file_hash, write_atomically
from sevpeft.training.resolve import CHOSEN_WITH, with_training

MANIFEST = "manifest.json"
COUNTS = "counts.json"
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Counts:
    """What a training has counted up to a step.

    Attributes:
        train_tokens: tokens of all batches, prompts included and padding not. loss_sum: of the losses of all steps up
            to `last_logged`, the step of the last line in the log; pending_losses: of those since, of each process.
        metrics: name → values since the last line. seconds: spent on training, by all processes one after the other.
        watched: state of the NaN and divergence checks.
        evaluation_due: whether the validation of this step was still to come.
        cut: rows a batch on each device, and batches a step, where they are no longer the recipe's.
    """

    train_tokens: int = 0
    loss_sum: float = 0.0
    pending_losses: list[float] = field(default_factory=list)
    last_logged: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    watched: dict[str, Any] = field(default_factory=dict)
    evaluation_due: bool = True
    cut: tuple[int, int] | None = None

    @classmethod
    def read(cls, checkpoint: str | Path) -> Counts:
        """Those of a sealed checkpoint."""
        found = json.loads((Path(checkpoint) / COUNTS).read_text(encoding="utf-8"))
        return cls(**{**found, "cut": tuple(found["cut"]) if found["cut"] else None})


def files_to_resume(accelerator: Accelerator) -> list[str]:
    """Names of the files without which a resume would be another training; `*` stands for any text.

    Transformers 5.24 skips the optimizer, the scheduler, the scaler or the random state where its file is absent.
    """
    processes, kind = accelerator.num_processes, accelerator.distributed_type
    ranks = range(processes)
    names = [SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, TRAINER_STATE_NAME, COUNTS]
    names += [f"rng_state_{rank}.pth" for rank in ranks] if processes > 1 else ["rng_state.pth"]
    if kind is DistributedType.DEEPSPEED:
        sharded = accelerator.state.deepspeed_plugin.zero_stage > 0
        return names + [f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks if sharded]
    names += [SCHEDULER_NAME, OPTIMIZER_NAME_BIN if kind is DistributedType.FSDP else OPTIMIZER_NAME]
    return names if accelerator.scaler is None else [*names, SCALER_NAME]


def seal(checkpoint: Path) -> None:
    """Writes the manifest of a checkpoint of which every other file is written."""
    files = {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": file_hash(checkpoint / name)}
        for name in _files(checkpoint)
    }
    write_atomically(checkpoint / MANIFEST, json.dumps({"files": files}, indent=2) + "\n", shared=True)


def checkpoint_damage(checkpoint: Path, required: Sequence[str]) -> str | None:
    """What is wrong with a checkpoint, in words that end a sentence; None where it is as it was written.

    Args:
        required: names that its manifest has to list (`files_to_resume`).
    """
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for pattern in required:
            if not any(fnmatch(name, pattern) for name in listed):
                return f"has no {pattern} in its {MANIFEST}"
        for name, written in listed.items():
            file = checkpoint / name
            if not file.is_file():
                return f"has lost {name}"
            if file.stat().st_size != written["bytes"]:
                return f"holds {name} in another size than was written"
            if file_hash(file) != written["sha256"]:
                return f"holds {name} with another content than was written"
    except FileNotFoundError:
        return "was cut off while it was written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"has a damaged {MANIFEST}"
    return None


def latest_valid_checkpoint(run: Run, required: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence about each newer one that is not.

    Those are removed: the training writes them anew, under the same names.
    """
    messages: list[str] = []
    for checkpoint in sorted(_checkpoints(run), key=_step, reverse=True):
        damage = checkpoint_damage(checkpoint, required)
        if damage is None:
            return checkpoint, messages
        messages.append(f"{checkpoint.name} {damage}, so the one before it is used.")
        shutil.rmtree(checkpoint, ignore_errors=True)
    if messages:
        messages[-1] = messages[-1].replace("the one before it is used", "the training begins again")
    return None, messages


def remove_incomplete(run: Run) -> None:
    """Takes away what a kill or a full disk cut off, because it holds space that may be needed."""
    for checkpoint in _checkpoints(run):
        if not (checkpoint / MANIFEST).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(run.unfinished_adapter, ignore_errors=True)


def _checkpoints(run: Run) -> list[Path]:
    return [path for path in run.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _files(checkpoint: Path) -> list[str]:
    return sorted(
        path.relative_to(checkpoint).as_posix()
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != MANIFEST
    )


def resume_checkpoint(run: Run, console: Console, required: Sequence[str]) -> Path | None:
    """The newest valid checkpoint; None where the training begins again. Damaged ones are reported.

    log.jsonl is cut back to what was in it when that checkpoint was written, since the rest happens again.

    Args:
        required: files that a checkpoint must hold.
    """
    checkpoint, damaged = latest_valid_checkpoint(run, required)
    remove_incomplete(run)
    for sentence in damaged:
        print_labeled(console, "Checkpoint", sentence, style="yellow")
    lines = 0
    if checkpoint is not None:
        lines = len(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history)
    run.keep_log(lines)
    return checkpoint


def as_started(recipe: Recipe, run: Run) -> Recipe:
    """The recipe with what the run chose at its start in place of each `auto`."""
    stored = load_recipe(run.folder / "recipe.yaml").training.settings()
    now = recipe.training.settings()
    open_keys = [key for key, value in now.items() if value == AUTO]
    if not open_keys:
        return recipe
    unsaid = [key for key in CHOSEN_WITH if now.get(key) is None]
    return with_training(recipe, **{key: stored[key] for key in (*open_keys, *unsaid) if key in stored})


def check_same_recipe(recipe: Recipe, run: Run) -> None:
    """Raises RunError with every setting that differs from the run's, as it was and as it is now."""
    stored = load_recipe(run.folder / "recipe.yaml")
    if stored == recipe:
        return
    old, new = _settings(stored.model_dump()), _settings(recipe.model_dump())
    changed = [
        f"{key} ({_shown(old.get(key))} then, {_shown(new.get(key))} now)"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    more = f" and {len(changed) - _MOST_SHOWN} more" if len(changed) > _MOST_SHOWN else ""
    raise RunError(
        f"The recipe differs from the one that {run.folder} was started with, in {', '.join(changed[:_MOST_SHOWN])}"
        f"{more}; resume with the same settings, such as those in {run.folder / 'recipe.yaml'}, or start another run."
    )


def check_same_data(fingerprint: str, source: str, run: Run) -> None:
    """Raises RunError when the data is not what the run was started with."""
    # The fingerprint of a Hub data set also holds times of this machine's cache, so it may differ without a reason.
    if fingerprint != run.environment().get("data_fingerprint") and fingerprint.startswith("sha256:"):
        raise RunError(
            f"{source} is not the data that {run.folder} was started with: its content has "
            "changed; bring that content back, or start another run."
        )


def _settings(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Key's path → value, of the innermost keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = f"{path}.{key}" if path else key
        found |= _settings(value, inner) if isinstance(value, dict) and value else {inner: value}
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a run folder, there already or not, for this process.

    Raises:
        RunError: another training on this machine holds it.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(cache_folder("locks") / f"{digest}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(
            f"{folder} is being written by another training; wait until it ends, or choose another --output."
        ) from None
    try:
        yield
    finally:
        lock.release()
