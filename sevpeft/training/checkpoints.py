"""Turns a folder of checkpoints into the newest one that is whole, so that a resumed training is the same training.

A checkpoint whose optimiser, scheduler or random state is missing, or whose adapter holds zeros, is loaded by the
libraries without a word and goes on as another training. So each gets a manifest with the size and SHA-256 of all its
files, written last: what has none was cut off, and what differs from it was damaged.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from accelerate import Accelerator, DistributedType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from sevpeft.runs import Run, write_atomically

MANIFEST = "manifest.json"
COUNTS = "counts.json"


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
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": _sha256(checkpoint / name)}
        for name in _files(checkpoint)
    }
    write_atomically(checkpoint / MANIFEST, json.dumps({"files": files}, indent=2) + "\n", shared=True)


def damage_of(checkpoint: Path, required: Sequence[str]) -> str | None:
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
            if _sha256(file) != written["sha256"]:
                return f"holds {name} with another content than was written"
    except FileNotFoundError:
        return "was cut off while it was written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"has a damaged {MANIFEST}"
    return None


def newest_whole(run: Run, required: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence about each newer one that is not.

    Those are removed: the training writes them anew, under the same names.
    """
    said: list[str] = []
    for checkpoint in sorted(_checkpoints(run), key=_step, reverse=True):
        damage = damage_of(checkpoint, required)
        if damage is None:
            return checkpoint, said
        said.append(f"{checkpoint.name} {damage}, so the one before it is used.")
        shutil.rmtree(checkpoint, ignore_errors=True)
    if said:
        said[-1] = said[-1].replace("the one before it is used", "the training begins again")
    return None, said


def remove_unfinished(run: Run) -> None:
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


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
