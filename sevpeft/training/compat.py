"""Every private or undocumented name of torch, transformers, TRL and accelerate that training uses.

Each entry names the version that it was written for, and the upstream issue if one was found.
tests/training/test_compat.py fails when a library changes what is used here.
"""

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

IGNORED = -100
# Columns of the vocabulary that a CPU scores at once. TRL's 32,768 do not fit its caches: the LM head then takes up to
# twice the time and eight times the memory. Another tile size changes the last bit of a log-probability.
CPU_VOCABULARY_TILE = 4096
# On these devices TRL's own LM head skips positions without a label (Triton).
_SKIPPED_BY_TRL = ("cuda", "xpu")
# With a higher share of labeled positions, selecting them costs more than it saves.
_WORTH_SKIPPING_BELOW = 0.9


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives an attribute another value for the duration of a block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class LabeledPositions:
    """Calls a model so that only labeled positions reach its LM head on a CPU; TRL does so on GPUs only.

    TRL 1.16 computes log-probabilities from the backbone's output and the head's weight (`FusedCausalLMOutput`). A
    forward hook reduces that output to one row of the labeled positions. Upstream:
    https://github.com/huggingface/trl/issues/7063 (planned for all devices).

    `model`: the causal language model without its adapter's wrapper.
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
        # TRL 1.16 has no setting for the tile; backward uses the width of forward. Upstream issue: none found.
        tile = min(trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, CPU_VOCABULARY_TILE)
        with replaced(self, "_mask", mask), replaced(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", tile):
            outputs = model(**{**inputs, "labels": None}, shift_labels=labels[mask][None])

        def spread(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)

        fields = {name: spread(getattr(outputs, name)) for name in ("log_probs", "entropy", "is_top1")}
        return replace(outputs, **fields, label_mask=mask)

    def vocabulary(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """(N, V) log-probabilities of the whole vocabulary at the N labeled positions."""
        with replaced(self, "_mask", inputs["labels"][:, 1:] != IGNORED):
            return model(**{**inputs, "labels": None, "fused_lm_head": False}).logits[0].float().log_softmax(-1)

    def _keep(self, module: Any, args: Any, output: Any) -> Any:
        if self._mask is not None:
            output.last_hidden_state = output.last_hidden_state[:, :-1][self._mask][None]
        return output


def mixed_precision_of_recipe(bf16: bool, fp16: bool) -> AbstractContextManager[None]:
    """Overrides the launcher's mixed precision, which transformers 5.24 applies even if the settings say no.

    Upstream: https://github.com/huggingface/transformers/issues/32622 (intended, so that a launcher may decide).
    """
    return patch_environment(ACCELERATE_MIXED_PRECISION="bf16" if bf16 else "fp16" if fp16 else "no")


def forget_compilation_of_launcher() -> None:
    """accelerate 1.15 compiles the model if the launcher asks for it, despite SFTConfig. Issue: none found."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Class names of a model's layers; transformers 5.24 has no public name for them. Issue: none found."""
    return list(model._no_split_modules)


def checkpoint_of(args: TrainingArguments, step: int) -> Path:
    """Folder of the checkpoint of a step, as Trainer names it."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


# What Trainer (5.24) and SFTTrainer (TRL 1.16) sum up between two log lines is not in their checkpoints, and callbacks
# do not get it. Upstream issue: none found.


def counted(trainer: SFTTrainer) -> dict[str, Any]:
    """Tokens of the training, and the losses and metrics since the last log line."""
    return {
        "tokens": trainer._total_train_tokens,
        "pending_loss": float(trainer._tr_loss),
        "last_logged": trainer._globalstep_last_logged,
        "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
        "severity_sums": trainer.severity_sums.tolist(),
    }


def recount(trainer: SFTTrainer, counts: dict[str, Any]) -> None:
    """Restores the result of `counted`, after the training loop has reset it."""
    trainer._total_train_tokens = counts["tokens"]
    trainer._tr_loss.fill_(counts["pending_loss"])
    trainer._globalstep_last_logged = counts["last_logged"]
    trainer.severity_sums.copy_(torch.tensor(counts.get("severity_sums", 0.0), dtype=torch.float64))
    for name, values in counts["metrics"].items():
        trainer._metrics["train"][name] = list(values)


def pending_loss(trainer: SFTTrainer) -> torch.Tensor:
    """Sum of this process's losses since the last log line."""
    return trainer._tr_loss.detach().clone()


def logged_loss(trainer: SFTTrainer) -> float:
    """Sum of the losses from this start to the last log line."""
    return float(trainer._total_loss_scalar)


def uncount_step(trainer: SFTTrainer, loss_before: torch.Tensor, skipped: int) -> None:
    """Removes a skipped step from the means of the next log line, which states how many steps were skipped."""
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
    """Draws the order of an epoch from the seed and the epoch, as accelerate does without length grouping.

    The library draws it from PyTorch's global state, which a resumed training restores too late.
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
    """Seeded as accelerate 1.15 seeds its `SeedableRandomSampler`."""
    args, epoch = trainer.args, int(trainer.state.epoch or 0)
    return torch.Generator().manual_seed((args.seed if args.data_seed is None else args.data_seed) + epoch)


class TrainerWorkarounds(SFTTrainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixin of SeveritySFTTrainer: changes to Trainer (5.24) and SFTTrainer (TRL 1.16) that no callback can make.

    Upstream issues: none found.
    """

    control: TrainerControl
    _total_train_tokens: int
    _epoch_ended_at = -1

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's batches of a step, or the curriculum's; they are kept until the next step."""
        if self.curriculum is not None:  # a sampler cannot do it: a data loader reads ahead, into the next stage
            batches = self.curriculum.batches(self.state.global_step)
            epoch_iterator = (batch for _, batch in zip(epoch_iterator, batches, strict=True))
        self.step_batches, items = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        self._tokens_before_step, self.sums_before_step = self._total_train_tokens, self.severity_sums.clone()
        return self.step_batches, items

    def uncount_tokens_of_step(self) -> None:
        self._total_train_tokens = self._tokens_before_step
        self.severity_sums.copy_(self.sums_before_step)

    def count_validation(self, **means: float) -> None:
        self._metrics["eval"].update({name: [mean] for name, mean in means.items()})

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Gradient norm of the coming step over all processes, kept for `StepGuard`."""
        self.gradient_norm = super()._get_grad_norm(*args, **kwargs)
        return self.gradient_norm

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Loads all rows; `dataloader_drop_last` is meant for training batches."""
        with replaced(self.args, "dataloader_drop_last", False):
            return super().get_eval_dataloader(eval_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """A sampler whose order depends on seed and epoch only, so that a resumed run sees the same rows."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return SeededLengthGroupedSampler(sampler, self)
        if self.sort_within_steps and isinstance(sampler, RandomSampler):
            return SortedWithinStepsSampler([len(ids) for ids in self.train_dataset["input_ids"]], self)
        return sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Epochs and steps that are done; all epochs if the run was killed after its last step.

        Transformers 5.24 compares with max_steps only after a step, so such a run would train one step more.
        """
        epochs, steps = super()._init_training_state(*args, **kwargs)
        complete = self.state.global_step >= self.state.max_steps > 0
        return (self.state.num_train_epochs, 0) if complete else (epochs, steps)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Trainer calls this twice at the end of an epoch. Only the second call has an effect here.

        A run that resumed from a checkpoint of the first call would never make the second.
        """
        step = self.state.global_step
        ends = float(self.state.epoch or 0).is_integer() or step >= self.state.max_steps
        if ends and self._epoch_ended_at != step:
            self._epoch_ended_at = step
        else:
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Saves before the validation, Trainer after it: a kill during a long validation then loses no step."""
        # A validation that decides what is saved must come first.
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
        with replaced(self.exact_resume, "evaluation_due", True):
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Saves without the tokenizer, which is up to 33 MB and never read from a checkpoint."""
        with replaced(self, "processing_class", None):
            super()._save(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """Sends nothing. TRL 1.16 reports the model, the device and the kind of data to the Hub."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none. TRL's card would name a folder of this machine."""
