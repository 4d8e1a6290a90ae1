"""Turns the folder of a run that was stopped into the checkpoint to go on from, or into a refusal.

What goes on must be the same training: recipe and data are compared with those of the start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from sevpeft.errors import RunError
from sevpeft.recipe import AUTO, Recipe, load_recipe
from sevpeft.runs import Run
from sevpeft.training.batch_split import CHOSEN_WITH, with_training
from sevpeft.training.checkpoints import newest_whole, remove_unfinished
from sevpeft.training.progress import say

_MOST_SHOWN = 5


def checkpoint_to_go_on_from(run: Run, console: Console, required: Sequence[str]) -> Path | None:
    """The newest whole checkpoint; None where the training begins again. What was found damaged is told.

    log.jsonl is cut back to what was in it when that checkpoint was written, since the rest happens again.

    Args:
        required: files that a checkpoint must hold.
    """
    checkpoint, damaged = newest_whole(run, required)
    remove_unfinished(run)
    for sentence in damaged:
        say(console, "Checkpoint", sentence, style="yellow")
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


def refuse_other_recipe(recipe: Recipe, run: Run) -> None:
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


def refuse_other_data(fingerprint: str, source: str, run: Run) -> None:
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
