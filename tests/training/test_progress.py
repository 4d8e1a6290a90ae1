"""What a training shows while it runs, and where its trackers write."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sevpeft.recipe import load_recipe
from sevpeft.training.train import train

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
SHORT = ["data.max_rows=60", "training.max_length=160", "training.max_steps=4", "training.logging_steps=1"]


def trained(folder: Path, model: Path, *more: str, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=80, force_terminal=terminal, force_interactive=terminal, highlight=False
    )
    train(load_recipe(QUICKSTART, [f"model.name_or_path={model}", *SHORT, *more]), folder, console=console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_screen_shows_steps_time_left_loss_speed_and_memory(
    tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sevpeft.training.callbacks.SECONDS_BETWEEN_LINES", 0.0)
    lines = trained(tmp_path / "run", model_folder())
    assert re.search(r"step 3/4, \S+ left  loss \d\.\d+  [\d,]+ tokens/s  \d+\.\d GiB", lines), lines
    bar = trained(tmp_path / "terminal", model_folder(), terminal=True)
    assert "4/4" in bar and re.search(r"\d:\d\d:\d\d", bar) and "tokens/s" in bar and "GiB" in bar
    assert max(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)) for line in re.split(r"[\r\n]+", bar)) <= 80


def test_tensorboard_finds_the_losses_in_the_run(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    trained(tmp_path / "run", model_folder(), "training.report_to=tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert len(events.Scalars("eval/loss_critical")) >= 1
