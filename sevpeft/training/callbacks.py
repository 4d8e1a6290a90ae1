"""Callbacks: progress on the screen and in log.jsonl, cost, samples, signals that end a run, bad steps."""

from __future__ import annotations

import importlib
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import psutil
import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sevpeft.console import SECONDS_BETWEEN_LINES, print_labeled
from sevpeft.errors import Interrupted, RunError, SevpeftError
from sevpeft.recipe import Recipe, StoppingSection
from sevpeft.runs import SAMPLES, Run, end_launcher, json_lines, signal_at_end_of_parent
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.compat import IGNORED, pending_loss, uncount_step

if TYPE_CHECKING:
    from sevpeft.modeling.prompts import Prompt
    from sevpeft.training.trainer import SeveritySFTTrainer


class RunProgress(TrainerCallback):
    """Callback that writes log.jsonl, on the main process, shows a bar or a line every 15 seconds, and counts the cost.

    `console`: where the screen is; quiet on the other processes.

    `counts` are seconds of steps, memory and energy of this process over all starts; `cost` that of all in the end.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        width = 20 if console.width >= 90 else 6  # so that nothing is cut in 60 columns
        columns = (TextColumn("Training"), BarColumn(bar_width=width), MofNCompleteColumn(), TimeRemainingColumn())
        text = TextColumn("{task.fields[text]}")
        self.bar = Progress(*columns, text, console=console, transient=True, disable=not console.is_terminal)
        self.text, self.validated = "", 0
        self.last_tokens: tuple[float, float] | None = None
        self.counts, self.cost = {"step_seconds": 0.0}, dict[str, float]()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = self.last_line = self.last_count = self.last_step = time.monotonic()
        self.first_step = state.global_step
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, text="")
        self.energy = energy_counters(args)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.step_began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step, text=self.text)
        now = self.last_step = time.monotonic()
        self.counts["step_seconds"] += now - self.step_began
        if control.should_save or now - self.last_count > SECONDS_BETWEEN_LINES:  # counters begin again within an hour
            self._count(args)
        if self.bar.disable and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            pace = (now - self.started) / (state.global_step - self.first_step)  # seconds a step, since this start
            left = timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
            done = f"step {state.global_step:,}/{state.max_steps:,}"
            print_labeled(self.console, "Training", f"{done}, {left} left  {self.text}")

    def on_prediction_step(self, *_: Any, eval_dataloader: Any, **__: Any) -> None:
        now, rows, self.validated = time.monotonic(), len(eval_dataloader.dataset), self.validated + 1
        share = self.validated / len(eval_dataloader)
        left = timedelta(seconds=round((now - self.last_step) * (1 / share - 1)))
        done = f"validating {round(share * rows):,}/{rows:,}, {left} left"
        self.bar.update(self.task, text=done)
        if self.bar.disable and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            print_labeled(self.console, "Training", done)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.validated, self.last_step = 0, time.monotonic()

    def _count(self, args: TrainingArguments) -> None:
        before, self.energy, self.last_count = self.energy, energy_counters(args), time.monotonic()
        for name, now in self.energy.items():  # what began again at 0 says nothing of these seconds
            self.counts[name] = self.counts.get(name, 0.0) + max(0.0, now - before.get(name, now))
        name, held = memory_held(args)
        self.counts[name] = max(self.counts.get(name, 0.0), held)

    def on_train_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        self._count(args)
        of_all: list[dict[str, float]] = gather_object([self.counts])
        for name in self.counts if args.process_index == 0 else ():
            self.cost[name] = round((sum if "watt" in name else max)(of.get(name, 0.0) for of in of_all), 3)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if state.is_world_process_zero:
            self.run.append_log({"step": state.global_step, "time": round(time.time(), 1), **logs})
        if "loss" in logs:
            now, tokens = time.monotonic(), logs["num_tokens"]
            before, self.last_tokens = self.last_tokens, (now, tokens)
            speed = f"  {(tokens - before[1]) / max(now - before[0], 1e-9):,.0f} tokens/s" if before else ""
            self.text = f"loss {logs['loss']:.3f}{speed}  {memory_held(args)[1]:.1f} GiB"


def memory_held(args: TrainingArguments) -> tuple[str, float]:
    """Name in metrics.json and GiB: what the GPU, or this process of the computer's memory, has held at most."""
    if args.device.type == "cuda":
        return "peak_gpu_gib", torch.cuda.max_memory_allocated(args.device) / 2**30
    with suppress(ImportError):  # Windows tells the present alone
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return "peak_cpu_gib", most / 2 ** (30 if sys.platform == "darwin" else 20)
    return "cpu_gib", psutil.Process().memory_info().rss / 2**30


def energy_counters(args: TrainingArguments) -> dict[str, float]:
    """Watt-hours on the counters of the GPU (NVML) and, once a machine, the processors (RAPL), whatever runs there."""
    found = dict[str, float]()
    with suppress(OSError, ValueError):  # often readable by root alone
        for at in Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj") if args.local_process_index == 0 else ():
            if at.with_name("name").read_text().startswith("package"):
                found["cpu_watt_hours"] = found.get("cpu_watt_hours", 0.0) + int(at.read_text()) / 3.6e9
    with suppress(Exception):  # no GPU, no pynvml, or no counter: before Volta, or on a part of a GPU (MIG)
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(args.device).uuid}")
        found["gpu_watt_hours"] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 3.6e6
    return found


class Samples(TrainerCallback):
    """Callback that answers the same validation questions at each validation, greedily, one by one, drawing no number.

    RUN/samples.jsonl is for the owner alone. Lines of a step that is validated again after a resume are replaced.
    """

    def __init__(self, trainer: SeveritySFTTrainer, run: Run, recipe: Recipe, prompt: Prompt) -> None:
        self.trainer, self.run, self.prompt, rows = trainer, run, prompt, trainer.eval_dataset
        self.most, end = recipe.generation.max_new_tokens, prompt.end_id
        drawn = np.random.default_rng(0).permutation(len(rows))
        strata = np.asarray(rows["severity"])[drawn]
        in_turn = np.lexsort((-strata, pd.Series(strata).groupby(strata).cumcount()))  # critical first
        self.rows = rows.select(drawn[in_turn][: recipe.training.generate_samples])
        ends = {"eos_token_id": end, "pad_token_id": end, "use_cache": True, "do_sample": False, "num_beams": 1}
        self.config = GenerationConfig(**ends, repetition_penalty=recipe.generation.repetition_penalty)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        # Every process answers, because the others would wait for as long; the first one writes.
        model, lines = self.trainer.causal_lm(), list[dict[str, Any]]()
        training, own, path = model.training, model.generation_config, self.run.folder / SAMPLES
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        model.eval().generation_config = GenerationConfig()  # its own would fill in what self.config leaves open
        try:
            for number, row in enumerate(self.rows):
                start = next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
                self.config.max_new_tokens = max(1, min(self.most, context - start))
                asked = torch.tensor([row["input_ids"][:start]], device=model.device)
                said = model.generate(asked, attention_mask=torch.ones_like(asked), generation_config=self.config)[0]
                said = said[start:].tolist()
                texts = {"prompt": row["input_ids"][:start], "reference": row["labels"][start:], "prediction": said}
                line: dict[str, Any] = {name: self.prompt.decode(ids) for name, ids in texts.items()}
                line |= {"step": state.global_step, "number": number, "severity": [*SEVERITIES, None][row["severity"]]}
                lines.append({**line, "truncated": said[-1] != self.prompt.end_id})
        finally:
            model.train(training).generation_config = own
        if state.is_world_process_zero:
            kept = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
            lines = [one for _, one in json_lines(kept, SAMPLES) if one["step"] < state.global_step] + lines
            text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines)
            self.run.write_text(SAMPLES, text, shared=False)


# SIGHUP comes when a terminal closes, SIGUSR1 from `sbatch --signal=USR1@120`; Windows has neither.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
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

    `run`: folder, for the command that resumes it. `on_message`: called with a sentence for the screen.

    Attributes:
        reason: error that ends the training after the present step, once its checkpoint is written.
    """

    def __init__(self, run: Path, on_message: Callable[[str], None]) -> None:
        self.run, self.on_message = run, on_message
        self._received: int | None = None
        self.reason: SevpeftError | None = None
        self._handlers: dict[int, Any] = {}
        self._received_at, self._process = 0.0, os.getpid()

    def __enter__(self) -> SignalHandler:
        # Python hands signals to the main thread only; a program that trains in another has to see to them itself.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` leaves SIGHUP
                    self._handlers[number] = signal.signal(number, self._on_signal)
            # The launcher of one process (accelerate 1.15) dies of SIGTERM without a word to the training, which would
            # go on unseen and hold the GPU. It always sets this variable.
            if "ACCELERATE_MIXED_PRECISION" in os.environ:
                signal_at_end_of_parent(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handlers and "ACCELERATE_MIXED_PRECISION" in os.environ:
            signal_at_end_of_parent(0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._agreed(args):
            self.reason = self.reason or self._interruption()
        if self.reason is not None:
            control.should_save = True

    def on_save(self, *_: Any, **__: Any) -> None:
        if self.reason is not None:
            raise self.reason

    def on_prediction_step(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        # What chooses the best checkpoint is not cut off.
        if args.metric_for_best_model is None and self._agreed(args):
            raise self._interruption()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of the data loader, which has inherited this handler
            raise SystemExit(128 + number)
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = number, now
            end_launcher()
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
        return Interrupted(f"Stopped by {name}. Resume with: {resume_command(self.run)}", 128 + number)


_REMEDY = "start another run with a lower training.learning_rate, or without training.fp16."


class StepGuard(TrainerCallback):
    """Callback that skips steps whose loss or gradient is not finite, and ends a training that has many of them.

    One NaN in a gradient would make every number of the adapter NaN. With a float16 GradScaler infinite gradients are
    normal, and the scaler skips them; only the loss counts there.

    Args:
        trainer: it is added to, after `signals`, which end the training with a checkpoint.
        stopping: when to give up; as in a recipe.

    Attributes:
        counts: how many steps were bad; part of each checkpoint.
    """

    def __init__(self, trainer: SeveritySFTTrainer, stopping: StoppingSection, signals: SignalHandler) -> None:
        self.trainer, self.stopping, self.signals = trainer, stopping, signals
        self.counts = {"nonfinite": 0, "nonfinite_in_a_row": 0}

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: dict[str, float], **_: Any) -> None:
        if state.global_step == 0 and not math.isfinite(metrics.get("eval_loss", 0.0)):
            remedy = "set model.dtype=bfloat16 or float32, or model.attn_implementation=eager, or fetch the model again"
            raise RunError(f"The first validation loss is not finite; {remedy}.")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._loss_before = pending_loss(self.trainer)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        accelerator, model = self.trainer.accelerator, self.trainer.model
        loss = float(accelerator.reduce((pending_loss(self.trainer) - self._loss_before).double(), "mean"))
        scaled, norm = accelerator.scaler is not None, self.trainer.gradient_norm
        if math.isfinite(loss) and (scaled or norm is None or math.isfinite(float(norm))):  # DeepSpeed may have none
            self.counts["nonfinite_in_a_row"] = 0
            return
        self.counts["nonfinite"] += 1
        self.counts["nonfinite_in_a_row"] += 1
        uncount_step(self.trainer, self._loss_before, self.counts["nonfinite"])
        what = f"{'gradient' if math.isfinite(loss) else 'loss'} of step {state.global_step + 1:,}"
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Its engine has taken the step already.
            raise RunError(f"The {what} is not finite; {_REMEDY}")
        if not scaled:  # a GradScaler leaves the step out itself, and lowers its scale
            for parameter in model.parameters():
                parameter.grad = None
        self.signals.on_message(f"the {what} is not finite; the step is skipped.")
        if self.counts["nonfinite_in_a_row"] >= self.stopping.nonfinite_patience:
            kept = f"checkpoint-{state.global_step + 1} holds the adapter as it was before them; {_REMEDY}"
            in_a_row = self.counts["nonfinite_in_a_row"]
            self.signals.reason = RunError(f"The {what} is not finite, as in {in_a_row} steps in a row. {kept}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.counts["nonfinite"]:
            raise RunError(f"None of the {state.global_step:,} steps was finite, so nothing was trained; {_REMEDY}")
