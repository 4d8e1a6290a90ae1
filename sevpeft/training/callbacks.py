"""Callbacks: progress on the screen and in log.jsonl, and signals that end a run after a checkpoint."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from sevpeft.console import SECONDS_BETWEEN_LINES, print_labeled
from sevpeft.errors import Interrupted, SevpeftError
from sevpeft.runs import Run


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
            print_labeled(
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


# SIGHUP comes when a terminal closes, SIGUSR1 from `sbatch --signal=USR1@120`; Windows has neither.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
_PR_SET_PDEATHSIG = 1
# A launcher passes on the signal that its process has had already; only a second wish after that is meant as one.
_SECONDS_TO_INSIST = 2.0


def resume_command(run: Path) -> str:
    """The words that continue a run, for a shell."""
    folder = shlex.quote(str(run))
    return f"sevpeft train {shlex.quote(str(run / 'recipe.yaml'))} --output {folder} --resume"


class SignalHandler(TrainerCallback):
    """Callback and context: a signal finishes the step, writes a checkpoint and ends the training.

    Ctrl-C, a spot instance that is taken away and a Slurm job that runs out of time all come some seconds before the
    end. Several processes agree on the step.

    Args:
        run: folder of the run, for the command that resumes it.
        on_message: called with a sentence for the screen.
    """

    def __init__(self, run: Path, on_message: Callable[[str], None]) -> None:
        self.run, self.on_message = run, on_message
        self._received: int | None = None
        self._received_at = 0.0
        self._reason: SevpeftError | None = None
        self._saves_next = False
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()
        self._bound = False

    def __enter__(self) -> SignalHandler:
        # Python hands signals to the main thread only; a program that trains in another has to see to them itself.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` leaves SIGHUP
                    self._handlers[number] = signal.signal(number, self._on_signal)
            # `accelerate launch` always sets it for its processes.
            self._bound = "ACCELERATE_MIXED_PRECISION" in os.environ
            if self._bound:
                _end_with_parent(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bound:
            _end_with_parent(0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def stop_with(self, reason: SevpeftError) -> None:
        """Ends the training with this error after the present step, once its checkpoint is written."""
        self._reason = reason

    def save_soon(self) -> None:
        """Has a checkpoint written after the present step."""
        self._saves_next = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._agreed(args):
            self._reason = self._reason or self._interruption()
        if self._reason is not None or self._saves_next:
            control.should_save, self._saves_next = True, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._reason is not None:
            raise self._reason

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # What chooses the best checkpoint is not cut off.
        if args.metric_for_best_model is None and self._agreed(args):
            raise self._interruption()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of the data loader, which has inherited this handler
            raise SystemExit(128 + number)
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = number, now
            self.on_message("finishing this step and writing a checkpoint; a second Ctrl-C stops at once.")
        elif number == signal.SIGINT and now - self._received_at > _SECONDS_TO_INSIST:
            raise KeyboardInterrupt

    def _agreed(self, args: TrainingArguments) -> bool:
        """Whether any process has received a signal; all have the same answer, in the same step."""
        if args.world_size > 1:
            highest = torch.tensor(self._received or 0, device=args.device)
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
            self._received = int(highest) or None
        return self._received is not None

    def _interruption(self) -> Interrupted:
        number = self._received or signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        return Interrupted(
            f"Stopped by {name}. Resume from the newest checkpoint with: {resume_command(self.run)}", 128 + number
        )


def _end_with_parent(number: int) -> None:
    """Has Linux send this process a signal when its parent ends; 0 for none.

    The launcher of one process (accelerate 1.15) dies of SIGTERM without a word to the training, which would go on
    unseen and hold the GPU.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
