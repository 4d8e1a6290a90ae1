"""Shows a training on the screen and writes it to log.jsonl: steps, loss, tokens per second, time left.

Trainer's own callbacks print dictionaries between two progress bars. Here a terminal gets one line that is rewritten,
and a file or a cluster log gets a line now and then.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from sevpeft.runs import Run

SECONDS_BETWEEN_LINES = 15.0

LABEL_WIDTH = 18


def say(console: Console, label: str, text: str, style: str = "") -> None:
    """Prints `label  text`, the text in a column of its own, so that a long line stays readable in 80 columns."""
    line = Table.grid(padding=0)
    line.add_column(width=LABEL_WIDTH, style="bold")
    line.add_column(overflow="fold", style=style)
    line.add_row(label, Text(text))
    console.print(line)


class RunProgress(TrainerCallback):
    """Callback that reports on the main process only.

    Args:
        run: its log.jsonl gets every entry.
        console: where the screen is.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self.run = run
        self.console = console
        self.bar: Progress | None = None
        self.last_line = 0.0
        self.begun = (0.0, 0)
        self.last_tokens: tuple[float, float] | None = None
        self.text = ""

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, *_: object) -> None:
        # A failure must not leave a live bar on the screen that swallows its message.
        self._close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._close()  # a training that began again with smaller batches
        self.last_line = time.monotonic()
        self.begun = (self.last_line, state.global_step)
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("Training"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, text="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, text=self.text)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            say(
                self.console,
                "Training",
                f"step {state.global_step:,}/{state.max_steps:,}, {self._left(state)} left  {self.text}",
            )

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.task, text="validating")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs:
            return
        if state.is_world_process_zero:
            self.run.append_log({"step": state.global_step, "time": round(time.time(), 1), **logs})
        loss = logs.get("loss")
        if loss is not None:
            self.text = f"loss {loss:.3f}{self._speed(logs)}  {_memory(args.device)}"

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _left(self, state: TrainerState) -> str:
        """Time that the other steps take, at the pace of those since this start."""
        begun, step = self.begun
        seconds = (time.monotonic() - begun) / (state.global_step - step) * (state.max_steps - state.global_step)
        return str(timedelta(seconds=round(seconds)))

    def _speed(self, logs: dict[str, Any]) -> str:
        tokens = logs.get("num_tokens")
        if tokens is None:
            return ""
        now = time.monotonic()
        before, self.last_tokens = self.last_tokens, (now, tokens)
        if before is None or now <= before[0]:
            return ""
        return f"  {(tokens - before[1]) / (now - before[0]):,.0f} tokens/s"


def keep_tensorboard_in(run: Run, callbacks: list[TrainerCallback]) -> None:
    """Has TensorBoard's files written into the run, unless TENSORBOARD_LOGGING_DIR names another folder."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(run.folder / "tensorboard")


def _memory(device: torch.device) -> str:
    """The most that the GPU has held, or what this process holds of the computer's memory now."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
