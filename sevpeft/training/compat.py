"""Every private or undocumented name of torch, transformers, TRL and accelerate that training touches.

Each entry says for which version it was written, and the upstream issue where one was found. tests/training/
test_compat.py fails when a library moves what is used here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import patch_environment
from torch.utils.data import RandomSampler, Sampler
from transformers import PreTrainedModel, TrainerControl, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from trl import SFTTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import FusedCausalLMOutput

from sevpeft.errors import Interrupted

if TYPE_CHECKING:
    from sevpeft.training.checkpoints import ExactResume

IGNORED = -100
# Columns of the vocabulary that are scored at once on a CPU. TRL's 32,768 spill out of its caches, which costs up to
# twice the head's time and eight times its memory. Summed in other tiles, a log-probability changes in its last bit.
CPU_VOCABULARY_TILE = 4096
# Where Triton runs, TRL's own LM head passes over the positions without a label.
_SKIPPED_BY_TRL = ("cuda", "xpu")
# When nearly every position has a label, picking them out costs more than it saves.
_WORTH_SKIPPING_BELOW = 0.9


class LabeledPositions:
    """Calls a model so that only labeled positions reach its LM head on a CPU, as TRL does on GPUs only.

    TRL 1.16 takes log-probabilities from the backbone's output and the head's weight (`FusedCausalLMOutput`). A forward
    hook hands it one row of the labeled positions. Upstream: https://github.com/huggingface/trl/issues/7063 (the same
    for all devices is planned).

    Args:
        model: the causal language model without its adapter's wrapper.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._mask: torch.Tensor | None = None
        model.base_model.register_forward_hook(self._keep)

    def __call__(self, model: Any, inputs: dict[str, Any]) -> FusedCausalLMOutput:
        """Outputs of `model(**inputs)`, with fields of the shape (B, T-1)."""
        labels = inputs["labels"][:, 1:]
        mask = labels != IGNORED
        if labels.device.type in _SKIPPED_BY_TRL or mask.float().mean() > _WORTH_SKIPPING_BELOW:
            outputs: FusedCausalLMOutput = model(**inputs)
            return outputs
        self._mask = mask
        try:
            with _small_vocabulary_tiles():
                outputs = model(**{**inputs, "labels": None}, shift_labels=labels[mask][None])
        finally:
            self._mask = None

        def spread(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)

        fields = {name: spread(getattr(outputs, name)) for name in ("log_probs", "entropy", "is_top1")}
        return replace(outputs, **fields, label_mask=mask)

    def vocabulary(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """(N, V) log-probabilities of the whole vocabulary at the N labeled positions."""
        self._mask = inputs["labels"][:, 1:] != IGNORED
        try:
            return model(**{**inputs, "labels": None, "fused_lm_head": False}).logits[0].float().log_softmax(-1)
        finally:
            self._mask = None

    def _keep(self, module: Any, args: Any, output: Any) -> Any:
        if self._mask is not None:
            output.last_hidden_state = output.last_hidden_state[:, :-1][self._mask][None]
        return output


@contextmanager
def _small_vocabulary_tiles() -> Iterator[None]:
    """TRL 1.16 has no setting for it; backward takes the width that forward used. Upstream issue: none found."""
    stock = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(stock, CPU_VOCABULARY_TILE)
    try:
        yield
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = stock


def mixed_precision_of_recipe(bf16: bool, fp16: bool) -> AbstractContextManager[None]:
    """Hides the launcher's mixed precision from transformers 5.24, which obeys it where the settings say no.

    Upstream: https://github.com/huggingface/transformers/issues/32622 (intended, so that a launcher may decide).
    """
    return patch_environment(ACCELERATE_MIXED_PRECISION="bf16" if bf16 else "fp16" if fp16 else "no")


def forget_compilation_of_launcher() -> None:
    """accelerate 1.15 compiles the model when the launcher says so, whatever SFTConfig says. Issue: none found."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Names of the classes of a model's layers; transformers (5.24) has no public name for it. None found."""
    return list(model._no_split_modules)


def checkpoint_of(args: TrainingArguments, step: int) -> Path:
    """Folder of the checkpoint of a step, as Trainer names it."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


# What Trainer (5.24) and SFTTrainer (TRL 1.16) count between two lines of the log. Checkpoints leave it out, and no
# callback gets it. Upstream issue: none found.


def counted(trainer: SFTTrainer) -> dict[str, Any]:
    """What was counted up to now: tokens, and losses and metrics since the last line of the log."""
    return {
        "tokens": trainer._total_train_tokens,
        "pending_loss": float(trainer._tr_loss),
        "last_logged": trainer._globalstep_last_logged,
        "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
        "severity_sums": trainer.severity_sums.tolist(),
    }


def recount(trainer: SFTTrainer, counts: dict[str, Any]) -> None:
    """Sets what the training loop has just set to nothing to what `counted` gave."""
    trainer._total_train_tokens = counts["tokens"]
    trainer._tr_loss.fill_(counts["pending_loss"])
    trainer._globalstep_last_logged = counts["last_logged"]
    trainer.severity_sums.copy_(torch.tensor(counts.get("severity_sums", 0.0), dtype=torch.float64))
    for name, values in counts["metrics"].items():
        trainer._metrics["train"][name] = list(values)


def pending_loss(trainer: SFTTrainer) -> torch.Tensor:
    """Sum of the losses since the last line of the log, of this process."""
    return trainer._tr_loss.detach().clone()


def logged_loss(trainer: SFTTrainer) -> float:
    """Sum of the losses up to the last line of the log, since this start."""
    return float(trainer._total_loss_scalar)


def uncount_step(trainer: SFTTrainer, loss_before: torch.Tensor, skipped: int) -> None:
    """Takes a skipped step out of the means of the next line of the log, which names how many were skipped."""
    trainer._tr_loss.copy_(loss_before)
    trainer.severity_sums.copy_(trainer.sums_before_step)
    trainer._globalstep_last_logged += 1  # the mean is over the steps since
    metrics = trainer._metrics["train"]
    for name, values in list(metrics.items()):
        metrics[name] = [value for value in values if math.isfinite(value)]
        if not metrics[name]:
            del metrics[name]
    metrics["nonfinite_steps"] = [skipped]


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Draws the order of an epoch from the seed and the epoch, as accelerate does where lengths do not count.

    The library's draws it from PyTorch's own state, which a resumed training gets back after the order was drawn.
    """

    def __init__(self, stock: LengthGroupedSampler, trainer: SFTTrainer) -> None:
        super().__init__(stock.batch_size, lengths=stock.lengths)
        self._trainer = trainer

    def __iter__(self) -> Iterator[int]:
        self.generator = _generator_of_epoch(self._trainer)
        return iter(super().__iter__())


class SortedWithinStepsSampler(Sampler[int]):
    """The random order that accelerate draws, with the rows of each optimizer step from long to short."""

    def __init__(self, lengths: list[int], trainer: SFTTrainer) -> None:
        self.lengths, self._trainer = lengths, trainer

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        args = self._trainer.args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        order = torch.randperm(len(self), generator=_generator_of_epoch(self._trainer)).tolist()
        for start in range(0, len(order), size):
            yield from sorted(order[start : start + size], key=lambda row: -self.lengths[row])


def _generator_of_epoch(trainer: SFTTrainer) -> torch.Generator:
    """As accelerate 1.15 seeds its `SeedableRandomSampler`."""
    args, epoch = trainer.args, int(trainer.state.epoch or 0)
    return torch.Generator().manual_seed((args.seed if args.data_seed is None else args.data_seed) + epoch)


class TrainerWorkarounds(SFTTrainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixin of SeveritySFTTrainer: what Trainer (5.24) and SFTTrainer (TRL 1.16) do otherwise, and no callback can.

    Upstream issues: none found, but for those that are named.
    """

    control: TrainerControl
    exact_resume: ExactResume
    sort_within_steps: bool
    curriculum: Any
    processing_class: Any
    step_batches: list[dict[str, Any]]
    severity_sums: torch.Tensor
    _total_train_tokens: int
    _metrics: dict[str, Any]
    _epoch_ended_at = -1

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; all batches of a step are kept until the next one. A curriculum has its own instead."""
        if self.curriculum is not None:  # no sampler, because a data loader reads ahead, into the next stage
            own = self.curriculum.batches(self.state.global_step)
            epoch_iterator = (batch for _, batch in zip(epoch_iterator, own, strict=True))
        self.step_batches, items = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        self._tokens_before_step, self.sums_before_step = self._total_train_tokens, self.severity_sums.clone()
        return self.step_batches, items

    def uncount_tokens_of_step(self) -> None:
        self._total_train_tokens = self._tokens_before_step
        self.severity_sums.copy_(self.sums_before_step)

    def count_validation(self, **means: float) -> None:
        self._metrics["eval"].update({name: [mean] for name, mean in means.items()})

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Of the step that is about to be taken, over all processes; kept for `StepGuard`."""
        self.gradient_norm = super()._get_grad_norm(*args, **kwargs)
        return self.gradient_norm

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Of all rows: `dataloader_drop_last` is about the batches that are trained on."""
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropping

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Trainer's, or one whose order follows from seed and epoch alone, so that a resumed run sees the same rows."""
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
        over = self.state.global_step >= self.state.max_steps > 0
        return (self.state.num_train_epochs, 0) if over else (epochs, steps)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """At the end of an epoch Trainer comes here twice. It waits for the second time.

        A run that resumes from a checkpoint of the first time would never come to the second.
        """
        step = self.state.global_step
        ends = float(self.state.epoch or 0).is_integer() or step >= self.state.max_steps
        if ends and self._epoch_ended_at != step:
            self._epoch_ended_at = step
        else:
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer validates, then saves. Here it saves first, so that a kill in a long validation loses no step."""
        # Where the validation decides what is saved, it comes first.
        decides = self.args.metric_for_best_model is not None or self.args.save_strategy == SaveStrategy.BEST
        if self.control.should_save and not decides:
            self._save_before_validation()
        try:
            return super()._evaluate(*args, **kwargs)
        except Interrupted:
            if self.state.global_step and not checkpoint_of(self.args, self.state.global_step).exists():
                self._save_before_validation()
            raise

    def _save_before_validation(self) -> None:
        self.exact_resume.evaluation_due = True
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.exact_resume.evaluation_due = False

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Without the tokenizer, which would be up to 33 MB in each checkpoint and is never read."""
        kept, self.processing_class = self.processing_class, None
        try:
            super()._save(*args, **kwargs)
        finally:
            self.processing_class = kept

    def _send_telemetry(self) -> None:
        """Sends nothing; TRL 1.16 tells the Hub the model, the device and how the data was loaded."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none; TRL's would name a folder of this machine."""
