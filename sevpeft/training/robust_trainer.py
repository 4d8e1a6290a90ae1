"""SFTTrainer that resumes exactly, skips steps with a loss or gradient that is not finite, and stops divergence.

The libraries' checkpoint holds adapter, optimizer, schedule and random state. It lacks what was counted since the last
line of the log, so a resumed run would log other values than an uninterrupted one. Each checkpoint gets these counts
and a manifest, and is written before the validation of its step.

One NaN in a gradient makes every number of the adapter NaN. Such a step is skipped and its rows are named. With a
float16 GradScaler infinite gradients are normal and skipped by the scaler; only the loss counts there.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.distributed.tensor import DTensor
from torch.utils.data import RandomSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints
from trl import SFTTrainer

from sevpeft.errors import Interrupted, RunError
from sevpeft.recipe import StoppingSection
from sevpeft.runs import write_atomically
from sevpeft.training.callbacks import SignalHandler
from sevpeft.training.checkpoints import COUNTS, Counts, checkpoint_damage, files_to_resume, seal
from sevpeft.training.compat import SeededLengthGroupedSampler, SortedWithinStepsSampler
from sevpeft.training.data import documents_of

# Steps whose mean loss is looked at, so that one hard batch is no divergence.
WINDOW = 10
_MOST_NAMED = 8

NameRows = Callable[[Sequence[Sequence[int]]], list[str]]


class Divergence:
    """Counts the steps in a row whose mean loss is far above that of the first ones.

    Args:
        ratio: mean loss of WINDOW steps, over that of the first ones, above which it diverges. patience: such steps in
            a row before the training stops; None never stops it.

    Attributes:
        steps: of divergence in a row.
    """

    def __init__(self, ratio: float, patience: int | None) -> None:
        self.ratio, self.patience = ratio, patience
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=WINDOW)
        self.steps = 0

    def add(self, loss: float) -> None:
        """One step's finite loss."""
        if len(self.first) < WINDOW:
            self.first.append(loss)
        self.last.append(loss)
        self.steps = self.steps + 1 if self.now > self.ratio * self.begin and len(self.last) == WINDOW else 0

    @property
    def begin(self) -> float:
        return sum(self.first) / len(self.first)

    @property
    def now(self) -> float:
        return sum(self.last) / len(self.last)

    @property
    def too_long(self) -> bool:
        return self.patience is not None and self.steps >= self.patience


class RobustSFTTrainer(SFTTrainer):
    """SFTTrainer that resumes exactly, skips steps that are not finite and stops a training that diverges.

    Args:
        stopping: when it gives up; as in a recipe.
        signals: what ends the training with a checkpoint; without it an error ends it at once.
        name_rows: from the tokens of consultations to the names of the rows they came from.
        on_message: called with label and sentence, for the screen.
        sort_within_steps: take the rows of a step by length, so that padding is little; each step has the rows that it
            would have without.
        split_on_oom: cut a batch that does not fit in the memory in parts, which change nothing of the loss, instead of
            ending the training; on one process only.
    """

    def __init__(
        self,
        *args: Any,
        stopping: StoppingSection | None = None,
        signals: SignalHandler | None = None,
        name_rows: NameRows | None = None,
        on_message: Callable[[str, str], None] = lambda label, sentence: None,
        sort_within_steps: bool = False,
        split_on_oom: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.stopping = stopping or StoppingSection()
        self.signals, self.on_message = signals, on_message
        self.name_rows: NameRows = name_rows or (lambda documents: [f"{len(documents)} whose numbers are not known"])
        self.sort_within_steps, self.split_on_oom = sort_within_steps, split_on_oom
        self.divergence = Divergence(self.stopping.divergence_ratio, self.stopping.divergence_patience)
        self.nonfinite_steps = self._nonfinite_in_a_row = 0
        self._steps_since_log = self._skipped_since_log = 0
        self._batches: list[dict[str, Any]] = []
        self._losses: list[torch.Tensor] = []
        self._logged_before = torch.zeros(())
        self._resumed = Counts()
        self._at_step_begin: Counts | None = None
        self._evaluation_due = self._epoch_is_over = False
        self._started = time.monotonic()
        self.add_callback(_Recall(self))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As in SFTTrainer, from a checkpoint of this class or from the beginning.

        A first validation is made at the beginning, and after a checkpoint that was written before its own.
        """
        while True:
            self._resumed = Counts.read(resume_from_checkpoint) if resume_from_checkpoint else Counts()
            if self._resumed.cut is not None and self.split_on_oom:
                self._cut_batches(*self._resumed.cut)
            # Taken by the training loop itself: accelerate takes a model that was evaluated first for one that is
            # ready to train, and several processes would then train without exchanging gradients.
            self.args.eval_on_start = self._resumed.evaluation_due and self.eval_dataset is not None
            self._started = time.monotonic()
            try:
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                break
            except RuntimeError as error:
                smaller = self._smaller_cut() if should_reduce_batch_size(error) else None
                if not self.split_on_oom or smaller is None or self._at_step_begin is None:
                    raise
                reason = self._at_step_begin
            resume_from_checkpoint = self._checkpoint_of_last_step(reason, smaller)
        if 0 < self.state.global_step == self.nonfinite_steps:
            raise RunError(
                f"None of the {self.nonfinite_steps:,} steps had a finite loss and gradient, so nothing was trained; "
                f"{self._remedy()}"
            )
        return result

    @property
    def seconds(self) -> float:
        """Spent on the run up to now, whoever spent them."""
        return self._resumed.seconds + time.monotonic() - self._started

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in SFTTrainer, but the training after it draws the random numbers that it would have drawn without.

        A base model whose first validation is not finite is refused.
        """
        devices = [torch.cuda.current_device()] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            except RuntimeError as error:
                size = self.args.per_device_eval_batch_size
                if not should_reduce_batch_size(error):
                    raise
                if not self.split_on_oom or size == 1:
                    raise RunError(
                        "The memory is too small for validation; lower training.per_device_eval_batch_size "
                        f"(now {size}), which changes no figure, then training.max_length."
                    ) from error
                metrics = {}
        if not metrics:
            self._metrics["eval"].clear()
            clear_device_cache(garbage_collection=True)
            self.args.per_device_eval_batch_size = max(1, size // 2)
            smaller = f"validation continues with {self.args.per_device_eval_batch_size} rows at once"
            self.on_message("Memory", f"full; {smaller}")
            return self.evaluate(*args, **kwargs)
        if self.state.global_step == 0 and not math.isfinite(metrics.get("eval_loss", 0.0)):
            raise RunError(
                f"The first validation loss is not finite, {self._reason_at_start()}, then start another run."
            )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in SFTTrainer; means leave out skipped steps, and the last line of a training covers the whole run."""
        if self.nonfinite_steps:
            logs["nonfinite_steps"] = self.nonfinite_steps
        if "loss" in logs:
            taken = self._steps_since_log - self._skipped_since_log
            logs["loss"] = logs["loss"] * self._steps_since_log / taken if taken else math.nan
            self._steps_since_log = self._skipped_since_log = 0
        if "train_loss" in logs:
            taken = self.state.global_step - self.nonfinite_steps
            logs["train_loss"] = logs["train_loss"] * self.state.global_step / taken if taken else math.nan
        if "train_runtime" in logs:
            share = logs["train_runtime"] / max(self.seconds, logs["train_runtime"])
            logs["train_runtime"] = round(self.seconds, 4)
            for name in ("train_samples_per_second", "train_steps_per_second"):
                logs[name] = round(logs[name] * share, 3)
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Of all rows: `dataloader_drop_last` is about the batches that are trained on."""
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropping

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return SeededLengthGroupedSampler(sampler, self)
        if self.sort_within_steps and isinstance(sampler, RandomSampler):
            return SortedWithinStepsSampler([len(ids) for ids in self.train_dataset["input_ids"]], self)
        return sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Epochs and steps that are done; all epochs, where a kill came after the last step.

        Transformers 5.24 looks at max_steps after a step only, so that such a run would train one step more.
        """
        epochs, steps = super()._init_training_state(*args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_global_step:
            # Kept as a path, which is another one where the run was moved or started from another folder.
            best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
            self._check_best()
        over = self.state.global_step >= self.state.max_steps > 0
        return (self.state.num_train_epochs, 0) if over else (epochs, steps)

    def _load_best_model(self) -> None:
        self._check_best()
        super()._load_best_model()

    def _check_best(self) -> None:
        """An adapter that validation has never seen must not end the run in its place."""
        best = Path(self.state.best_model_checkpoint)
        damage = checkpoint_damage(best, files_to_resume(self.accelerator)) if best.is_dir() else "is gone"
        if damage is not None:
            raise RunError(
                f"{best}, the best of this run, {damage}; bring it back from a copy, or start another run with "
                "the same recipe."
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's order is log, validate, save; here a checkpoint does not wait for the validation."""
        last = float(self.state.epoch or 0).is_integer() or self.state.global_step >= self.state.max_steps
        if last and not self._epoch_is_over:
            return  # the epoch's own call follows; after a checkpoint of now, a resumed run would never come to it
        due = self.control.should_evaluate
        by_validation = self.args.metric_for_best_model is not None or self.args.save_strategy == SaveStrategy.BEST
        if due and self.control.should_save and not by_validation:
            self._evaluation_due, self.control.should_evaluate = True, False
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self._evaluation_due, self.control.should_evaluate = False, True
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Interrupted:
            if not due or self._checkpoint.exists():
                raise
            # Cut off in the middle of a validation, with steps behind it that no checkpoint holds.
            self._evaluation_due = True
            self._save_checkpoint(self.model, None)
            raise

    @property
    def _checkpoint(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _send_telemetry(self) -> None:
        """Sends nothing; TRL 1.16 tells the Hub the model, the device and how the data was loaded."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none; TRL's would name a folder of this machine."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # What diverges must not push out the checkpoints from before.
        if self.divergence.steps <= 1:
            self._save_counted(model, self._counts())

    def _save_counted(self, model: Any, counts: Counts) -> None:
        # Trainer takes an older checkpoint away before the new one has its seal.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, None)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            write_atomically(self._checkpoint / COUNTS, json.dumps(asdict(counts)) + "\n", shared=True)
        self.accelerator.wait_for_everyone()  # each process writes a part
        if self.args.should_save:
            seal(self._checkpoint)
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _counts(self) -> Counts:
        return Counts(
            train_tokens=self._total_train_tokens,
            loss_sum=self._total_loss_scalar,
            pending_losses=self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist(),
            last_logged=self._globalstep_last_logged,
            metrics={name: list(values) for name, values in self._metrics["train"].items()},
            seconds=round(self.seconds, 1),
            watched={
                "first": self.divergence.first,
                "last": list(self.divergence.last),
                "diverged": self.divergence.steps,
                "nonfinite": self.nonfinite_steps,
                "nonfinite_in_a_row": self._nonfinite_in_a_row,
                "since_log": [self._steps_since_log, self._skipped_since_log],
            },
            evaluation_due=self._evaluation_due,
            cut=self._resumed.cut,
        )

    def _recall(self) -> None:
        """Sets what the training loop has just set to nothing to what the checkpoint says."""
        counts = self._resumed
        self._total_train_tokens = counts.train_tokens
        self._total_loss_scalar = counts.loss_sum
        if counts.pending_losses:
            self._tr_loss += counts.pending_losses[self.args.process_index]
        self._globalstep_last_logged = counts.last_logged
        self._initial_global_step = 0  # so that the mean loss at the end is that of all steps
        for name, values in counts.metrics.items():
            self._metrics["train"][name] = list(values)
        seen, watched = self.divergence, counts.watched
        seen.first, seen.steps = list(watched.get("first", [])), watched.get("diverged", 0)
        seen.last = deque(watched.get("last", []), maxlen=WINDOW)
        self.nonfinite_steps = watched.get("nonfinite", 0)
        self._nonfinite_in_a_row = watched.get("nonfinite_in_a_row", 0)
        self._steps_since_log, self._skipped_since_log = watched.get("since_log", (0, 0))
        self._batches.clear()
        self._losses.clear()
        done = self.state.global_step >= self.state.max_steps > 0
        if done and any(
            entry["step"] == self.state.global_step and "eval_loss" in entry for entry in self.state.log_history
        ):
            self.model.eval()  # as that validation had left it: SFTTrainer's last line depends on it

    def _remember_step_begin(self) -> None:
        """What a step that runs out of memory in its second batch must not have counted."""
        if self.split_on_oom:
            self._at_step_begin = self._counts()

    def _smaller_cut(self) -> tuple[int, int] | None:
        """The next smaller batch of which so many, whole ones, make the same step; None where it is one row."""
        size, rows = self._train_batch_size, self._train_batch_size * self.args.gradient_accumulation_steps
        smaller = next((part for part in range(size - 1, 0, -1) if rows % part == 0), None)
        return None if smaller is None else (smaller, rows // smaller)

    def _checkpoint_of_last_step(self, counts: Counts, cut: tuple[int, int]) -> str:
        """Keeps what was trained before the step that did not fit, with the cut that is tried next."""
        clear_device_cache(garbage_collection=True)
        self._resumed = Counts(**{**asdict(counts), "cut": cut})
        self._save_counted(self.model, self._resumed)
        self.on_message(
            "Memory",
            f"full; continues from step {self.state.global_step:,} with {cut[1]} batches of {cut[0]} rows a step, "
            "which is the same step",
        )
        return str(self._checkpoint)

    def _cut_batches(self, size: int, accumulation: int) -> None:
        self._train_batch_size = self.args.per_device_train_batch_size = size
        self.args.gradient_accumulation_steps = accumulation

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._batches:
            self._logged_before = self._tr_loss.clone()
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append(inputs)
        self._losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called by Trainer when the gradient of a step is whole and clipped, before the optimizer sees it."""
        norm = super()._get_grad_norm(model, grad_norm)
        loss = self.accelerator.reduce(torch.stack(self._losses).double().sum(), "mean").item()
        gradient = float(norm) if norm is not None else 0.0
        scaler = self.accelerator.scaler is not None
        self._steps_since_log += 1
        if not math.isfinite(loss) or not (scaler or math.isfinite(gradient)):
            self._skip_step(loss, scaled=scaler)
        else:
            self._nonfinite_in_a_row = 0
            self._watch(loss)
        self._batches.clear()
        self._losses.clear()
        return norm

    def _skip_step(self, loss: float, *, scaled: bool) -> None:
        step = self.state.global_step + 1
        self.nonfinite_steps += 1
        self._nonfinite_in_a_row += 1
        self._skipped_since_log += 1
        self._tr_loss.copy_(self._logged_before)
        for name, values in list(self._metrics["train"].items()):
            self._metrics["train"][name] = [value for value in values if math.isfinite(value)]
            if not self._metrics["train"][name]:
                del self._metrics["train"][name]
        what = "gradient" if math.isfinite(loss) else "loss"
        rows = self._rows_behind()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Its engine has taken the step already.
            raise RunError(f"The {what} of step {step:,} is not finite, on {rows}; {self._remedy()}")
        if not scaled:  # a GradScaler leaves the step out itself, and lowers its scale
            for parameter in self.model.parameters():
                parameter.grad = None
        self.on_message("Warning", f"step {step:,} is skipped, because its {what} is not finite; it saw {rows}.")
        if self._nonfinite_in_a_row < self.stopping.nonfinite_patience:
            return
        error = RunError(
            f"{self._nonfinite_in_a_row} steps in a row had a {what} that is not finite, the last of them step "
            f"{step:,}, on {rows}. They changed nothing: checkpoint-{step} holds the adapter as it was before them; "
            f"{self._remedy()}"
        )
        if self.signals is None:
            raise error
        self.signals.stop_with(error)

    def _watch(self, loss: float) -> None:
        divergence = self.divergence
        divergence.add(loss)
        if divergence.steps == 1 and self.signals is not None:
            self.on_message(
                "Warning",
                f"the loss of the last {WINDOW} steps is {divergence.now:.3f}, {divergence.ratio:g} times that of the "
                "first ones or more; a checkpoint is kept of where it is now.",
            )
            self.signals.save_soon()
        if divergence.too_long:
            raise RunError(
                f"The training diverges: for {divergence.steps} steps its loss has been {divergence.ratio:g} times "
                f"that of its first {WINDOW} or more ({divergence.now:.3f} now, {divergence.begin:.3f} then). "
                "Checkpoints up to where that began are kept; start another run with a lower training.learning_rate, "
                "or with training.warmup_steps=0.05."
            )

    def _reason_at_start(self) -> str:
        for name, parameter in self.model.named_parameters():
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter  # its part under FSDP
            if own.itemsize > 1 and not torch.isfinite(own).all():
                return f"because weights are not: {name} holds NaN or infinity; fetch the model again"
        if self.args.fp16 or getattr(self.model, "dtype", None) == torch.float16:
            return "probably because numbers overflow in float16; set model.dtype to bfloat16 or float32"
        return "although the weights are; set model.attn_implementation=eager, or name another base model"

    def _remedy(self) -> str:
        format_ = "bfloat16 or float32 instead of float16" if self.args.fp16 else "a lower training.learning_rate"
        return f"look at those rows, then start another run, with {format_}."

    def _rows_behind(self) -> str:
        """The rows whose own loss is not finite, of all processes; all rows of the step where each alone is fine."""
        alone = [document for batch in self._batches for document in documents_of(batch)]
        # Where the model is in parts, all processes would have to take part in every forward.
        whole = self.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        guilty = [document for document in alone if whole and not self._is_finite(document)]
        found: list[Any] = gather_object([(self.name_rows(guilty), [] if guilty else self.name_rows(alone))])
        names = [name for bad, _ in found for name in bad] or [name for _, all_ in found for name in all_]
        named = ", ".join(names[:_MOST_NAMED])
        return f"{named}{f' and {len(names) - _MOST_NAMED} more' if len(names) > _MOST_NAMED else ''}"

    @torch.no_grad()
    def _is_finite(self, document: Sequence[int]) -> bool:
        """Whether the model, as it is now, gives finite scores on a consultation alone."""
        ids = torch.tensor([document], device=self.args.device)
        with self.compute_loss_context_manager():
            hidden = self._causal_lm().base_model(input_ids=ids, use_cache=False).last_hidden_state
        return bool(torch.isfinite(hidden).all())


class _Recall(TrainerCallback):
    """Where the training loop has begun, and where each of its steps begins."""

    def __init__(self, trainer: RobustSFTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._recall()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._epoch_is_over = False
        self.trainer._remember_step_begin()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._epoch_is_over = True
