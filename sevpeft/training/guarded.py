"""Turns a trainer into one that a bad step cannot ruin: what is not finite changes nothing, what diverges is stopped.

One NaN in a gradient makes every number of the adapter NaN, for good. Here the step is left out, the rows that it came
from are named, and after a few such steps in a row the training ends with the adapter as it was. With a float16
GradScaler an infinite gradient is everyday, and the scaler itself leaves the step out; there only the loss counts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from sevpeft.errors import RunError
from sevpeft.recipe import StoppingSection
from sevpeft.training.leaving import Leaving
from sevpeft.training.resumable import ResumableSFTTrainer

# Steps whose mean loss is looked at, so that one hard batch is no divergence.
WINDOW = 10
_MOST_NAMED = 8

NameRows = Callable[[Sequence[Sequence[int]]], list[str]]


class Divergence:
    """Whether a training has left what it has learnt.

    Args:
        ratio: mean loss of WINDOW steps, over that of the first ones, above which it diverges. patience: such steps in
            a row that are borne; None bears all.

    Attributes:
        steps: in a row that it has diverged for.
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


class GuardedSFTTrainer(ResumableSFTTrainer):
    """ResumableSFTTrainer that watches the loss and the gradient of every step.

    Args:
        stopping: when it gives up; as in a recipe.
        leaving: what ends the training with a checkpoint; without one an error ends it at once.
        name_rows: from the tokens of consultations to the names of the rows they came from.
        tell: says a sentence on the screen.
    """

    def __init__(
        self,
        *args: Any,
        stopping: StoppingSection | None = None,
        leaving: Leaving | None = None,
        name_rows: NameRows | None = None,
        tell: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.stopping = stopping or StoppingSection()
        self.leaving = leaving
        self.name_rows: NameRows = name_rows or (lambda documents: [f"{len(documents)} whose numbers are not known"])
        self.tell = tell or (lambda sentence: None)
        self.divergence = Divergence(self.stopping.divergence_ratio, self.stopping.divergence_patience)
        self.nonfinite_steps = 0
        self._nonfinite_in_a_row = 0
        self._batches: list[dict[str, Any]] = []
        self._losses: list[torch.Tensor] = []
        self._logged_before = torch.zeros(())
        self._steps_since_log = self._left_out_since_log = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in SFTTrainer, but a training in which every step was left out is no training."""
        result = super().train(*args, **kwargs)
        if 0 < self.state.global_step == self.nonfinite_steps:
            raise RunError(
                f"None of the {self.nonfinite_steps:,} steps had a finite loss and gradient, so nothing was trained; "
                f"{self._remedy()}"
            )
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in SFTTrainer; a base model whose first validation is not finite is not worth a step."""
        metrics = super().evaluate(*args, **kwargs)
        if self.state.global_step == 0 and not math.isfinite(metrics.get("eval_loss", 0.0)):
            raise RunError(
                f"The first validation loss is not finite, {self._reason_at_start()}, then start another run."
            )
        return metrics

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._batches:
            self._logged_before = self._tr_loss.clone()
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append(inputs)
        self._losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called by Trainer when the gradient of a step is whole and clipped, before the optimiser sees it."""
        norm = super()._get_grad_norm(model, grad_norm)
        loss = self.accelerator.reduce(torch.stack(self._losses).double().sum(), "mean").item()
        gradient = float(norm) if norm is not None else 0.0
        scaler = self.accelerator.scaler is not None
        self._steps_since_log += 1
        if not math.isfinite(loss) or not (scaler or math.isfinite(gradient)):
            self._leave_out(loss, scaled=scaler)
        else:
            self._nonfinite_in_a_row = 0
            self._watch(loss)
        self._batches.clear()
        self._losses.clear()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in SFTTrainer, with means over the steps that were taken."""
        if self.nonfinite_steps:
            logs["nonfinite_steps"] = self.nonfinite_steps
        if "loss" in logs:
            taken = self._steps_since_log - self._left_out_since_log
            logs["loss"] = logs["loss"] * self._steps_since_log / taken if taken else math.nan
            self._steps_since_log = self._left_out_since_log = 0
        if "train_loss" in logs:
            taken = self.state.global_step - self.nonfinite_steps
            logs["train_loss"] = logs["train_loss"] * self.state.global_step / taken if taken else math.nan
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # What diverges must not push out the checkpoints from before.
        if self.divergence.steps <= 1:
            super()._save_checkpoint(model, trial)

    def _watched(self) -> dict[str, Any]:
        seen = self.divergence
        return {
            "first": seen.first,
            "last": list(seen.last),
            "diverged": seen.steps,
            "nonfinite": self.nonfinite_steps,
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
            "since_log": [self._steps_since_log, self._left_out_since_log],
        }

    def _recall_watched(self, watched: dict[str, Any]) -> None:
        seen = self.divergence
        seen.first, seen.steps = list(watched.get("first", [])), watched.get("diverged", 0)
        seen.last = deque(watched.get("last", []), maxlen=WINDOW)
        self.nonfinite_steps = watched.get("nonfinite", 0)
        self._nonfinite_in_a_row = watched.get("nonfinite_in_a_row", 0)
        self._steps_since_log, self._left_out_since_log = watched.get("since_log", (0, 0))
        self._batches.clear()
        self._losses.clear()

    def _leave_out(self, loss: float, *, scaled: bool) -> None:
        step = self.state.global_step + 1
        self.nonfinite_steps += 1
        self._nonfinite_in_a_row += 1
        self._left_out_since_log += 1
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
        self.tell(f"step {step:,} is left out, because its {what} is not finite; it saw {rows}.")
        if self._nonfinite_in_a_row < self.stopping.nonfinite_patience:
            return
        error = RunError(
            f"{self._nonfinite_in_a_row} steps in a row had a {what} that is not finite, the last of them step "
            f"{step:,}, on {rows}. They changed nothing: checkpoint-{step} holds the adapter as it was before them; "
            f"{self._remedy()}"
        )
        if self.leaving is None:
            raise error
        self.leaving.leave(error)

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

    def _watch(self, loss: float) -> None:
        divergence = self.divergence
        divergence.add(loss)
        if divergence.steps == 1 and self.leaving is not None:
            self.tell(
                f"the loss of the last {WINDOW} steps is {divergence.now:.3f}, {divergence.ratio:g} times that of the "
                "first ones or more; a checkpoint is kept of where it is now."
            )
            self.leaving.save_soon()
        if divergence.too_long:
            raise RunError(
                f"The training diverges: for {divergence.steps} steps its loss has been {divergence.ratio:g} times "
                f"that of its first {WINDOW} or more ({divergence.now:.3f} now, {divergence.begin:.3f} then). "
                "Checkpoints up to where that began are kept; start another run with a lower training.learning_rate, "
                "or with training.warmup_steps=0.05."
            )

    def _rows_behind(self) -> str:
        """The rows whose own loss is not finite, of all processes; all rows of the step where each alone is fine."""
        alone = [document for batch in self._batches for document in self._documents(batch)]
        # Where the model is in parts, all processes would have to take part in every forward.
        whole = self.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        guilty = [document for document in alone if whole and not self._is_finite(document)]
        found: list[Any] = gather_object([(self.name_rows(guilty), [] if guilty else self.name_rows(alone))])
        names = [name for bad, _ in found for name in bad] or [name for _, all_ in found for name in all_]
        named = ", ".join(names[:_MOST_NAMED])
        return f"{named}{f' and {len(names) - _MOST_NAMED} more' if len(names) > _MOST_NAMED else ''}"

    def _documents(self, batch: dict[str, Any]) -> list[list[int]]:
        """Tokens of each consultation of a batch, padded, padding-free or packed."""
        ids = batch["input_ids"]
        if "attention_mask" in batch:
            masks = batch["attention_mask"].bool()
            return [row[mask].tolist() for row, mask in zip(ids, masks, strict=True)]
        begins = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        flat = ids.flatten()
        return [flat[begin:end].tolist() for begin, end in zip(begins, [*begins[1:], len(flat)], strict=True)]

    @torch.no_grad()
    def _is_finite(self, document: Sequence[int]) -> bool:
        """Whether the model, as it is now, gives finite scores on a consultation alone."""
        ids = torch.tensor([document], device=self.args.device)
        with self.compute_loss_context_manager():
            hidden = self._causal_lm().base_model(input_ids=ids, use_cache=False).last_hidden_state
        return bool(torch.isfinite(hidden).all())
