"""Turns a folder of checkpoints into the newest one that is whole, so that a resumed training is the same training.

A checkpoint whose optimiser, scheduler or random state is missing, or whose adapter holds zeros, is loaded by the
libraries without a word and goes on as another training. So each gets a manifest with the size and SHA-256 of all its
files, written last: what has none was cut off, and what differs from it was damaged.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from sevpeft.runs import Run, write_atomically

MANIFEST = "manifest.json"


def seal(checkpoint: Path) -> None:
    """Writes the manifest of a checkpoint of which every other file is written."""
    files = {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": _sha256(checkpoint / name)}
        for name in _files(checkpoint)
    }
    write_atomically(checkpoint / MANIFEST, json.dumps({"files": files}, indent=2) + "\n", shared=True)


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words that end a sentence; None where it is as it was written."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
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


def newest_whole(run: Run) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence about each newer one that is not.

    Those are removed: the training writes them anew, under the same names.
    """
    said: list[str] = []
    for checkpoint in sorted(_checkpoints(run), key=_step, reverse=True):
        damage = damage_of(checkpoint)
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
