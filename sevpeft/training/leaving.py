"""Turns a signal, or trouble that was found in a step, into a checkpoint and an orderly end.

Ctrl-C, a spot instance that is taken away and a Slurm job that runs out of time all say so some seconds before: the
step is finished, a checkpoint written, and the command to go on is told. Several processes agree on the step.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sevpeft.errors import Interrupted, SevpeftError
from sevpeft.training.launch import launcher_is_parent

# SIGHUP comes when a terminal closes, SIGUSR1 from `sbatch --signal=USR1@120`; Windows has neither.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
_PR_SET_PDEATHSIG = 1
# A launcher passes on the signal that its process has had already; only a second wish after that is meant as one.
_SECONDS_TO_INSIST = 2.0


def command_to_go_on(run: Path) -> str:
    """The words that continue a run, for a shell."""
    folder = shlex.quote(str(run))
    return f"sevpeft train {shlex.quote(str(run / 'recipe.yaml'))} --output {folder} --resume"


class Leaving(TrainerCallback):
    """Callback and context: inside it signals are heard, and the training leaves after a checkpoint.

    Args:
        run: folder of the run, for the command to go on.
        tell: says a sentence on the screen.
    """

    def __init__(self, run: Path, tell: Callable[[str], None]) -> None:
        self.run, self.tell = run, tell
        self._heard: int | None = None
        self._heard_at = 0.0
        self._reason: SevpeftError | None = None
        self._saves_next = False
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()
        self._bound = False

    def __enter__(self) -> Leaving:
        # Python hands signals to the main thread only; a program that trains in another has to see to them itself.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` leaves SIGHUP
                    self._handlers[number] = signal.signal(number, self._hear)
            self._bound = launcher_is_parent()
            if self._bound:
                _end_with_parent(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bound:
            _end_with_parent(0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def leave(self, reason: SevpeftError) -> None:
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

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of the data loader, which has inherited this handler
            raise SystemExit(128 + number)
        now = time.monotonic()
        if self._heard is None:
            self._heard, self._heard_at = number, now
            self.tell("finishing this step and writing a checkpoint; a second Ctrl-C leaves at once.")
        elif number == signal.SIGINT and now - self._heard_at > _SECONDS_TO_INSIST:
            raise KeyboardInterrupt

    def _agreed(self, args: TrainingArguments) -> bool:
        """Whether any process has heard a signal; all have the same answer, in the same step."""
        if args.world_size > 1:
            highest = torch.tensor(self._heard or 0, device=args.device)
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
            self._heard = int(highest) or None
        return self._heard is not None

    def _interruption(self) -> Interrupted:
        number = self._heard or signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        return Interrupted(
            f"Stopped by {name}. Go on from the newest checkpoint with: {command_to_go_on(self.run)}", 128 + number
        )


def _end_with_parent(number: int) -> None:
    """Has Linux send this process a signal when its parent ends; 0 for none.

    The launcher of one process (accelerate 1.15) dies of SIGTERM without a word to the training, which would go on
    unseen and hold the GPU.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
