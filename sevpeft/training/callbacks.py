"""Callbacks of the trainer: progress, log.jsonl and cost; sample answers; signal handling; non-finite steps."""

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
from typing import Any

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
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe, StoppingSection
from sevpeft.runs import SAMPLES, Run, end_launcher, json_lines, signal_at_end_of_parent
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.compat import IGNORED, pending_loss, replaced, uncount_step
from sevpeft.training.trainer import SeveritySFTTrainer


class RunProgress(TrainerCallback):
    """Callback that writes log.jsonl on the main process, shows progress, and measures time, memory and energy.

    A terminal shows a bar, other output a line every 15 seconds. `counts`: measurements of this process over all
    starts. `cost`: those of all processes, set at the end.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        width = 20 if console.width >= 90 else 6  # so that nothing is cut in 60 columns
        columns = (TextColumn("Training"), BarColumn(bar_width=width), MofNCompleteColumn(), TimeRemainingColumn())
        text = TextColumn("{task.fields[text]}")
        self.bar = Progress(*columns, text, console=console, transient=True, disable=not console.is_terminal)
        self.text, self.validated, self.loader = "", 0, None
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
        if control.should_save or now - self.last_count > SECONDS_BETWEEN_LINES:  # energy counters overflow
            self._count(args)
        pace = (now - self.started) / max(state.global_step - self.first_step, 1)  # seconds a step, since this start
        left = timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
        self._print_line(f"step {state.global_step:,}/{state.max_steps:,}, {left} left  {self.text}")

    def on_prediction_step(self, *_: Any, eval_dataloader: Any, **__: Any) -> None:
        if eval_dataloader is not self.loader:  # a curriculum also measures rows outside a validation
            self.loader, self.validated = eval_dataloader, 0
        now, rows, self.validated = time.monotonic(), len(eval_dataloader.dataset), self.validated + 1
        share = self.validated / len(eval_dataloader)
        left = timedelta(seconds=round((now - self.last_step) * (1 / share - 1)))
        done = f"validating {round(share * rows):,}/{rows:,}, {left} left"
        self.bar.update(self.task, text=done)
        self._print_line(done)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.loader, self.last_step = None, time.monotonic()

    def _print_line(self, text: str) -> None:
        if self.bar.disable and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print_labeled(self.console, "Training", text)

    def _count(self, args: TrainingArguments) -> None:
        before, self.energy, self.last_count = self.energy, energy_counters(args), time.monotonic()
        for name, now in self.energy.items():  # a counter that has overflowed adds nothing
            self.counts[name] = self.counts.get(name, 0.0) + max(0.0, now - before.get(name, now))
        name, peak = memory_held(args)
        self.counts[name] = max(self.counts.get(name, 0.0), peak)

    def on_train_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        self._count(args)
        all_counts: list[dict[str, float]] = gather_object([self.counts])
        for name in self.counts if args.process_index == 0 else ():
            total = sum if "watt" in name else max
            self.cost[name] = round(total(counts.get(name, 0.0) for counts in all_counts), 3)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if state.is_world_process_zero:
            self.run.append_log({"step": state.global_step, "time": round(time.time(), 1), **logs})
        if "loss" in logs:
            now, tokens = time.monotonic(), logs["num_tokens"]
            before, self.last_tokens = self.last_tokens, (now, tokens)
            speed = f"  {(tokens - before[1]) / max(now - before[0], 1e-9):,.0f} tokens/s" if before else ""
            self.text = f"loss {logs['loss']:.3f}{speed}  {memory_held(args)[1]:.1f} GiB"


def memory_held(args: TrainingArguments) -> tuple[str, float]:
    """Key of metrics.json, and the peak memory in GiB of the GPU, or of this process on a CPU."""
    if args.device.type == "cuda":
        return "peak_gpu_gib", torch.cuda.max_memory_allocated(args.device) / 2**30
    with suppress(ImportError):  # Windows has no peak, only the present memory
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return "peak_cpu_gib", peak / 2 ** (30 if sys.platform == "darwin" else 20)
    return "cpu_gib", psutil.Process().memory_info().rss / 2**30


def energy_counters(args: TrainingArguments) -> dict[str, float]:
    """Watt-hours counted by the GPU (NVML) and, on one process of each machine, by the processors (RAPL)."""
    counters = dict[str, float]()
    with suppress(OSError, ValueError):  # often readable by root only
        packages = Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj")
        for path in packages if args.local_process_index == 0 else ():
            if path.with_name("name").read_text().startswith("package"):
                counters["cpu_watt_hours"] = counters.get("cpu_watt_hours", 0.0) + int(path.read_text()) / 3.6e9
    with suppress(Exception):  # no GPU, no pynvml, or no counter: before Volta, or on a part of a GPU (MIG)
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(args.device).uuid}")
        counters["gpu_watt_hours"] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 3.6e6
    return counters


class Samples(TrainerCallback):
    """Callback that answers the same validation questions at each validation, by greedy decoding, one by one.

    It draws no random number of the training. RUN/samples.jsonl is readable by its owner only. A step that is
    validated again after a resume replaces its lines.
    """

    def __init__(self, trainer: SeveritySFTTrainer, run: Run, recipe: Recipe, prompt: Prompt) -> None:
        self.trainer, self.run, self.prompt, rows = trainer, run, prompt, trainer.eval_dataset
        self.max_new_tokens, end = recipe.generation.max_new_tokens, prompt.end_id
        drawn = np.random.default_rng(0).permutation(len(rows))
        strata = np.asarray(rows["severity"])[drawn]
        alternating = np.lexsort((-strata, pd.Series(strata).groupby(strata).cumcount()))  # critical first
        self.rows = rows.select(drawn[alternating][: recipe.training.generate_samples])
        ends = {"eos_token_id": end, "pad_token_id": end, "use_cache": True, "do_sample": False, "num_beams": 1}
        self.config = GenerationConfig(**ends, repetition_penalty=recipe.generation.repetition_penalty)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        # Every process generates, since the others would have to wait; the first one writes.
        model, lines = self.trainer.causal_lm(), list[dict[str, Any]]()
        training, path = model.training, self.run.folder / SAMPLES
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        model.eval()
        # The model's own config would fill the gaps of self.config.
        with replaced(model, "generation_config", GenerationConfig()):
            for number, row in enumerate(self.rows):
                start = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
                self.config.max_new_tokens = max(1, min(self.max_new_tokens, context - start))
                ids = torch.tensor([row["input_ids"][:start]], device=model.device)
                output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=self.config)
                answer = output[0, start:].tolist()
                texts = {"prompt": row["input_ids"][:start], "reference": row["labels"][start:], "prediction": answer}
                line: dict[str, Any] = {name: self.prompt.decode(ids) for name, ids in texts.items()}
                line |= {"step": state.global_step, "number": number, "severity": [*SEVERITIES, None][row["severity"]]}
                lines.append({**line, "truncated": answer[-1] != self.prompt.end_id})
        model.train(training)
        if state.is_world_process_zero:
            stored = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
            lines = [line for _, line in json_lines(stored, SAMPLES) if line["step"] < state.global_step] + lines
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            self.run.write_text(SAMPLES, text, shared=False)


# SIGHUP is sent when a terminal closes, SIGUSR1 by `sbatch --signal=USR1@120`. Windows has neither.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
# A launcher repeats the signal that its process has received already. A Ctrl-C after this time is the user's second.
_SECONDS_TO_INSIST = 2.0


def resume_command(run: Path) -> str:
    """The shell command that resumes a run."""
    folder = shlex.quote(str(run))
    return f"sevpeft train {shlex.quote(str(run / 'recipe.yaml'))} --output {folder} --resume"


class SignalHandler(TrainerCallback):
    """Callback and context manager: on a signal, finish the step, write a checkpoint and end the training.

    Ctrl-C, spot instances and Slurm send one some seconds before the end. All processes stop after the same step.

    `run`: folder, for the resume command. `on_message`: called with a sentence for the screen. `reason`: the error that
    ends the training once the checkpoint of the present step is written.
    """

    def __init__(self, run: Path, on_message: Callable[[str], None]) -> None:
        self.run, self.on_message = run, on_message
        self._received: int | None = None
        self.reason: SevpeftError | None = None
        self._handlers: dict[int, Any] = {}
        self._received_at, self._process = 0.0, os.getpid()

    def __enter__(self) -> SignalHandler:
        # Python delivers signals to the main thread only. A program that trains in another must handle them itself.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
                    self._handlers[number] = signal.signal(number, self._on_signal)
            # The launcher of one process (accelerate 1.15) ends on SIGTERM without passing it on. The training would
            # then continue and hold the GPU. The launcher always sets this variable.
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
        # A validation that chooses the best checkpoint is completed.
        if args.metric_for_best_model is None and self._agreed(args):
            raise self._interruption()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader worker, which inherits this handler
            raise SystemExit(128 + number)
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = number, now
            end_launcher()
            self.on_message("finishing this step and writing a checkpoint; a second Ctrl-C stops at once.")
        elif number == signal.SIGINT and now - self._received_at > _SECONDS_TO_INSIST:
            raise KeyboardInterrupt

    def _agreed(self, args: TrainingArguments) -> bool:
        """Whether any process has received a signal; the same on all processes in the same step."""
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
    """Callback that skips steps whose loss or gradient is not finite, and stops a training with many of them.

    One NaN in a gradient would make the whole adapter NaN. With a float16 GradScaler infinite gradients are normal and
    the scaler skips them, so only the loss is checked. The callback is added after `signals`, which stops the training
    with a checkpoint. `counts` is part of each checkpoint.
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
        if accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine has taken the step already
            raise RunError(f"The {what} is not finite; {_REMEDY}")
        if not scaled:  # a GradScaler skips the step itself and lowers its scale
            for parameter in model.parameters():
                parameter.grad = None
        self.signals.on_message(f"the {what} is not finite; the step is skipped.")
        if self.counts["nonfinite_in_a_row"] >= self.stopping.nonfinite_patience:
            remedy = f"checkpoint-{state.global_step + 1} holds the adapter from before these steps; {_REMEDY}"
            in_a_row = self.counts["nonfinite_in_a_row"]
            self.signals.reason = RunError(f"The {what} is not finite, as in {in_a_row} steps in a row. {remedy}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.counts["nonfinite"]:
            raise RunError(f"None of the {state.global_step:,} steps was finite, so nothing was trained; {_REMEDY}")
