"""The severity-weighted loss and the validation loss per severity.

The loss is TRL's. SFTTrainer's `compute_loss` calls the model and reads `log_probs` (B, T-1) from its outputs. Here it
gets a callable that returns the same outputs with log-probabilities multiplied by `token_weights`. Normalization,
accumulation, several processes and metrics are TRL's own. With all weights 1 the result is TRL's SFT to the bit; on a
CPU, for vocabularies over 4,096, up to rounding (`CPU_VOCABULARY_TILE` in compat.py).

Validation loss is a sum over tokens per severity. A mean of batch means would depend on the batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.utils import FusedCausalLMOutput

from sevpeft.errors import RunError, WeightError
from sevpeft.modeling.compat import disable_cpu_avx512_repack
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.checkpoints import ExactResume
from sevpeft.training.compat import LabeledPositions, TrainerWorkarounds
from sevpeft.training.curriculum import Curriculum
from sevpeft.training.data import TOKEN_SEVERITY, SeverityCollator, answer_starts, check_weights, rows_of
from sevpeft.training.distributed import set_up_engine

Batch = dict[str, Any]
# With any other value the weights would be bypassed, or the loss would depend on the number of processes.
_ONLY = {
    "loss_type": "nll",
    "label_smoothing_factor": 0,
    "use_liger_kernel": False,
    "average_tokens_across_devices": True,
}


class SeveritySFTTrainer(TrainerWorkarounds, SFTTrainer):
    """SFTTrainer with a weight on every answer token, whose checkpoints resume exactly (`ExactResume`).

    Args:
        model, args, eval_dataset, processing_class, peft_config, ...: as in SFTTrainer. `eval_dataset` holds
            `input_ids`, `labels` and optionally `severity` (position in SEVERITIES, -1 for unknown).
        train_dataset: holds `input_ids`, `labels` (-100 on the prompt), `token_weights` (floats, one per token),
            optionally `TOKEN_SEVERITY` and, when packed, `seq_lengths`.
        reduction: what the weighted sum of a (global, accumulated) batch is divided by: "tokens", the number of
            answer tokens, as in TRL; or "examples", the number of answers (the weights then carry 1/L_i).
        loraplus: settings of LoRA+ (`loraplus_settings`); None for one learning rate.
        sort_within_steps: order the rows of a step by length, for less padding; each step keeps its rows.
        curriculum: selects the rows of each step.
        split_on_oom: compute a batch that does not fit in memory in parts, for the same step; on one process only.
        on_message: called with a sentence for the screen.

    Raises WeightError: as `check_weights`. ValueError: a setting of `args` would bypass the weights.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        train_dataset: Dataset,
        *,
        reduction: str = "tokens",
        loraplus: dict[str, float] | None = None,
        sort_within_steps: bool = False,
        curriculum: Curriculum | None = None,
        split_on_oom: bool = False,
        on_message: Callable[[str], None] = lambda sentence: None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        for name, only in _ONLY.items():
            if getattr(args, name) != only:
                raise ValueError(f"{name}={getattr(args, name)} would bypass the severity weights; leave it out.")
        check_weights(train_dataset)
        self.reduction, self.loraplus = reduction, loraplus
        self.sort_within_steps, self.curriculum = sort_within_steps, curriculum
        self.exact_resume = ExactResume(self)
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args.remove_unused_columns = False  # the model does not take token_weights and severity
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("selective"):
            # TRL 1.16 does this on the PeftModel, a wrapper that transformers 5.24 bypasses.
            enable_selective_activation_checkpointing(model)
        # ExactResume before callbacks that end the training, so that the checkpoint has its manifest.
        kwargs["callbacks"] = [self.exact_resume, *callbacks]
        if curriculum is not None:  # before ExactResume, because it adds a file to the checkpoint
            curriculum.trainer, kwargs["callbacks"] = self, [curriculum, *kwargs["callbacks"]]
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        # Negative log-likelihood and answer tokens of each severity since the last log line, on this process.
        self.severity_sums = torch.zeros(2, len(SEVERITIES) + 1, dtype=torch.float64, device=args.device)
        # TRL's constructor refuses a custom collator for padding-free batches, so it is replaced here.
        collator: Any = self.data_collator
        self.data_collator: Any = SeverityCollator(
            **{field.name: getattr(collator, field.name) for field in dataclasses.fields(collator)}
        )
        self.parts = SplitOnOom(args, self.data_collator, split_on_oom, on_message)
        # TRL divides by the number of labels only if the model's forward takes loss arguments, which are not used here.
        # Without that number, accumulation would average means of unequal batches.
        self.model_accepts_loss_kwargs = True
        set_up_engine(self.accelerator, self.model)
        disable_cpu_avx512_repack(self.model)
        self._labeled_positions = LabeledPositions(self.causal_lm())

    def causal_lm(self) -> PreTrainedModel:
        """The model without its adapter's wrapper."""
        return self.model.get_base_model()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        weights = inputs.pop("token_weights", None)
        strata, token_strata = inputs.pop("severity", None), inputs.pop(TOKEN_SEVERITY, None)
        training = self.model.training
        if training and weights is None:
            raise WeightError("A training batch has no token_weights; the collator was replaced.")

        def weighted_model(**kwargs: Any) -> FusedCausalLMOutput:
            outputs = self._labeled_positions(model, kwargs)
            if training:
                if token_strata is not None:  # summed on the device, without waiting for it
                    sums = torch.stack([-outputs.log_probs.detach(), outputs.label_mask]).double().flatten(1)
                    self.severity_sums.index_add_(1, token_strata[:, 1:].flatten() % len(self.severity_sums[0]), sums)
                drift = self.curriculum.drift(kwargs) if self.curriculum else 0.0
                return dataclasses.replace(outputs, log_probs=outputs.log_probs * weights[:, 1:] - drift)
            self._add_to_validation(outputs, kwargs, strata)
            return outputs

        return super().compute_loss(
            weighted_model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if self.reduction == "examples":
            batch_samples = [{"labels": answer_starts(batch["labels"])} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to training lines the loss of each severity: nats per answer token, unweighted."""
        if "loss" in logs:
            sums = self.accelerator.reduce(self.severity_sums, "sum").T.tolist()
            logs |= {f"loss_{name}": nll / count for name, (nll, count) in zip(SEVERITIES, sums, strict=False) if count}
            self.severity_sums.zero_()
        super().log(logs, *args, **kwargs)

    strata = len(SEVERITIES) + 1  # of validation, with "unknown"; a curriculum measures each row as a stratum

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop; loss (nats per answer token), loss per severity and accuracy are from sums over tokens."""
        # Rows are strata; columns are negative log-likelihood, correct tokens, entropy, tokens.
        self._validation = torch.zeros(self.strata, 4, dtype=torch.float64)
        # A data loader draws a random number. The training must draw the same numbers with and without a validation.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, correct, entropy, tokens = self._validation.sum(0).tolist()
        if tokens and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = nll / tokens
            for name, (part, _, _, count) in zip(SEVERITIES, self._validation.tolist(), strict=False):
                if count:
                    output.metrics[f"{metric_key_prefix}_loss_{name}"] = part / count
            self.count_validation(mean_token_accuracy=correct / tokens, entropy=entropy / tokens)
        return output

    def _add_to_validation(
        self, outputs: FusedCausalLMOutput, inputs: dict[str, Any], strata: torch.Tensor | None
    ) -> None:
        mask = outputs.label_mask
        if "position_ids" in inputs and "attention_mask" not in inputs:
            rows = (inputs["position_ids"] == 0).cumsum(-1)[:, 1:] - 1
        else:
            rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        # Padding at the end of a padding-free row also has position 0; its mask is 0.
        count = int(rows.max()) + 1 if strata is None else len(strata)
        rows = rows.clamp(max=count - 1)
        fields = torch.stack([-outputs.log_probs, outputs.is_top1.float(), outputs.entropy, mask.float()])
        sums = fields.new_zeros(4, count, dtype=torch.float64)
        sums.index_add_(1, rows.reshape(-1), fields.double().flatten(1))
        if strata is None:
            strata = torch.full((count,), -1, device=mask.device)
        # gather_for_metrics drops rows that the sampler repeated to fill the last batch of several processes.
        sums, strata = self.accelerator.gather_for_metrics((sums.T.contiguous(), strata))
        self._validation.index_add_(0, strata.cpu() % len(self._validation), sums.cpu())

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.loraplus and self.optimizer is None:
            optimizer_cls, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            arguments |= {"loraplus_weight_decay": self.args.weight_decay, **self.loraplus}
            self.optimizer: Any = create_loraplus_optimizer(self.model, optimizer_cls, **arguments)
            # Some optimizers reject empty groups, for example that of embeddings without an adapter.
            self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
        return super().create_optimizer(model)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        step = super().training_step

        def undo() -> list[dict[str, Any]]:
            # The backward pass may have stopped half-way, so the step starts again without gradients.
            model.zero_grad()
            self.uncount_tokens_of_step()
            return list(takewhile(lambda batch: batch is not inputs, self.step_batches))

        losses = self.parts.compute("train", inputs, lambda part: step(model, part, num_items_in_batch), undo)
        return sum(losses[1:], losses[0])

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        step, before = super().prediction_step, self._validation.clone()

        def undo() -> list[dict[str, Any]]:
            self._validation.copy_(before)
            return []

        return self.parts.compute("eval", inputs, lambda part: step(model, part, *args, **kwargs), undo)[-1]


class SplitOnOom:
    """Out of memory: halves the number of consultations that are computed at once each time they do not fit in memory.

    Args:
        collate: makes a batch of rows. enabled: if False, an out-of-memory error is raised again.
        on_message: called with a sentence for the screen.
    """

    def __init__(self, args: SFTConfig, collate: Callable, enabled: bool, on_message: Callable) -> None:
        self.args, self.collate, self.enabled, self.on_message = args, collate, enabled, on_message
        # Consultations that are computed at once, in training and in validation; None for whole batches.
        self.most_rows: dict[str, int | None] = {"train": None, "eval": None}

    def compute(self, kind: str, batch: Batch, take: Callable[[Batch], Any], undo: Callable[[], list[Batch]]) -> list:
        """Results of `take` on parts of a batch that fit in memory; their losses sum to that of the batch.

        `undo`: reverts what a failed attempt has changed; returns the batches to compute again before this one.

        Raises RunError: a single validation row does not fit. RuntimeError: the library's own, in training.
        """
        batches = [batch]
        while True:
            try:
                for one in batches:
                    results = [take(part) for part in self.parts_of(one, self.most_rows[kind])]
                return results
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                rows = len(rows_of(batch))
                half = min(rows, self.most_rows[kind] or rows) // 2
                if not (half and self.enabled):
                    if kind == "train":
                        raise
                    size = f"training.per_device_eval_batch_size (now {self.args.per_device_eval_batch_size})"
                    setting = size if half else "training.max_length"  # one row alone does not fit
                    raise RunError(f"The memory is full in validation; lower {setting}.") from error
            self.most_rows[kind] = half
            clear_device_cache(garbage_collection=True)
            what = "validation" if kind == "eval" else "the same step"
            self.on_message(f"The memory is full; {what} continues with {half} rows at once.")
            batches = [*undo(), batch]

    def parts_of(self, batch: Batch, most: int | None) -> list[Batch]:
        """The batch in parts of at most `most` consultations; None leaves it whole."""
        rows = rows_of(batch) if most else []
        if not most or len(rows) <= most:
            return [batch]
        return [self.collate(rows[start : start + most]) for start in range(0, len(rows), most)]
