"""The severity-weighted loss and the validation loss per severity.

The loss stays TRL's. SFTTrainer's `compute_loss` calls the model and reads `log_probs` (B, T-1) from what it returns.
Here it gets a callable that returns the same outputs with log-probabilities multiplied by `token_weights`.
Normalization, accumulation, several processes and metrics are TRL's own. With all weights one the result is stock SFT
to the bit; on a CPU, for vocabularies over 4,096, up to rounding (`CPU_VOCABULARY_TILE` in compat.py).

Validation loss is a sum over tokens, per severity, not a mean of batch means, which would change with the batch size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.utils import FusedCausalLMOutput

from sevpeft.errors import WeightError
from sevpeft.modeling.compat import disable_cpu_avx512_repack
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.compat import IGNORED, LabeledPositions
from sevpeft.training.data import SeverityCollator
from sevpeft.training.distributed import check_engine_of_model, set_up_engine
from sevpeft.training.resolve import loraplus_optimizer
from sevpeft.training.robust_trainer import RobustSFTTrainer


class SeveritySFTTrainer(RobustSFTTrainer):
    """SFTTrainer with a weight on every answer token.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks, ...: as in SFTTrainer;
            stopping, signals, name_rows, on_message, sort_within_steps, split_on_oom: as in RobustSFTTrainer.
            `train_dataset` holds `input_ids`, `labels` (-100 on the prompt), `token_weights` (floats, one per token)
            and, when packed, `seq_lengths`; `eval_dataset` holds `input_ids`, `labels` and optionally `severity`
            (position in SEVERITIES, -1 for unknown).
        reduction: what the weighted sum of a (global, accumulated) batch is divided by: "tokens", the number of
            answer tokens, as in TRL; or "examples", the number of answers (the weights then carry 1/L_i).
        loraplus: settings of LoRA+ (`loraplus_settings`); None for one learning rate.

    Raises:
        WeightError: weights absent, not finite, negative, or all zero.
        ValueError: a setting of `args` that would bypass the weights.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        train_dataset: Dataset,
        *,
        reduction: str = "tokens",
        loraplus: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if reduction not in ("tokens", "examples"):
            raise ValueError(f"reduction is {reduction!r}; it can be tokens or examples.")
        _check_bypasses(args)
        _check_weights(train_dataset)
        self.reduction = reduction
        self.loraplus = loraplus
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("selective"):
            # TRL 1.16 does this to the PeftModel, whose wrapper transformers 5.24 goes past.
            enable_selective_activation_checkpointing(model)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)

        # A custom collator is refused by TRL's constructor when padding-free, so it takes the default's place here.
        collator: Any = self.data_collator
        self.data_collator: Any = SeverityCollator(
            **{field.name: getattr(collator, field.name) for field in dataclasses.fields(collator)}
        )
        # TRL divides by the count of labels only for models whose forward takes loss arguments; ours never depends
        # on that forward, and without the count accumulation would average means of unequal batches.
        self.model_accepts_loss_kwargs = True
        set_up_engine(self.accelerator, self.model)
        disable_cpu_avx512_repack(self.model)
        self._labeled_positions = LabeledPositions(self._causal_lm())

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = getattr(self, "_signature_columns")  # noqa: B009 (TRL leaves it untyped)
        self._signature_columns: Any = list(dict.fromkeys([*columns, "token_weights", "severity"]))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.loraplus and getattr(self, "optimizer", None) is None:
            self.optimizer: Any = loraplus_optimizer(self.model if model is None else model, self.args, self.loraplus)
        return super().create_optimizer(model)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if self.reduction == "examples":
            batch_samples = [{"labels": _answer_starts(batch["labels"])} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        weights = inputs.pop("token_weights", None)
        strata = inputs.pop("severity", None)
        training = self.model.training
        if training and weights is None:
            raise WeightError("A training batch arrived without token_weights; the collator was replaced.")

        def weighted_model(**kwargs: Any) -> FusedCausalLMOutput:
            outputs = self._labeled_positions(model, kwargs)
            if training:
                return dataclasses.replace(outputs, log_probs=outputs.log_probs * weights[:, 1:])
            self._add_to_validation(outputs, kwargs, strata)
            return outputs

        return super().compute_loss(
            weighted_model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _causal_lm(self) -> PreTrainedModel:
        model = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        check_engine_of_model(self.accelerator, model)
        return super().training_step(model, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop, with loss (nats per answer token), per-severity loss and accuracy from sums over tokens."""
        # Rows are severities and "unknown"; columns are negative log-likelihood, correct tokens, entropy, tokens.
        self._validation = torch.zeros(len(SEVERITIES) + 1, 4, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, correct, entropy, tokens = self._validation.sum(0).tolist()
        if tokens and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = nll / tokens
            for name, (part, _, _, count) in zip(SEVERITIES, self._validation.tolist(), strict=False):
                if count:
                    output.metrics[f"{metric_key_prefix}_loss_{name}"] = part / count
            self._metrics["eval"]["mean_token_accuracy"] = [correct / tokens]
            self._metrics["eval"]["entropy"] = [entropy / tokens]
        return output

    def _add_to_validation(
        self, outputs: FusedCausalLMOutput, inputs: dict[str, Any], strata: torch.Tensor | None
    ) -> None:
        mask = outputs.label_mask
        if "position_ids" in inputs and "attention_mask" not in inputs:
            rows = (inputs["position_ids"] == 0).cumsum(-1)[:, 1:] - 1
        else:
            rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        # Padding at the end of a row without padding has position 0 too, and counts nothing.
        count = int(rows.max()) + 1 if strata is None else len(strata)
        rows = rows.clamp(max=count - 1)
        fields = torch.stack([-outputs.log_probs, outputs.is_top1.float(), outputs.entropy, mask.float()])
        sums = fields.new_zeros(4, count, dtype=torch.float64)
        sums.index_add_(1, rows.reshape(-1), fields.double().flatten(1))
        if strata is None:
            strata = torch.full((count,), -1, device=mask.device)
        # gather_for_metrics drops the rows that the sampler repeated to fill the last batch of several processes.
        sums, strata = self.accelerator.gather_for_metrics((sums.T.contiguous(), strata))
        self._validation.index_add_(0, strata.cpu() % len(self._validation), sums.cpu())


def _answer_starts(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) of which only the first of every answer is kept, so that counting labels counts answers.

    The first position of a row is never predicted and, packed, every document begins with an ignored label.
    """
    labels = labels.clone()
    labels[:, 0] = IGNORED
    continued = torch.zeros_like(labels, dtype=torch.bool)
    continued[:, 1:] = labels[:, :-1] != IGNORED
    return labels.masked_fill(continued, IGNORED)


def _check_bypasses(args: SFTConfig) -> None:
    reasons = {
        "loss_type": (args.loss_type != "nll", "exponentiates the log-probabilities that carry the weights"),
        "label_smoothing_factor": (args.label_smoothing_factor > 0, "takes the loss from the full logits, unweighted"),
        "use_liger_kernel": (args.use_liger_kernel, "replaces the forward that the weights are applied to"),
        "average_tokens_across_devices": (
            not args.average_tokens_across_devices,
            "makes the loss depend on the number of processes when it is off",
        ),
    }
    for name, (bypasses, reason) in reasons.items():
        if bypasses:
            raise ValueError(f"{name}={getattr(args, name)} is refused: it {reason}. Leave it at its default.")


def _check_weights(dataset: Dataset) -> None:
    """Reads all token weights once, in Arrow, so that a bad one stops the run before its first step."""
    if not isinstance(dataset, Dataset):
        raise WeightError("SeveritySFTTrainer needs a map-style datasets.Dataset, so that all weights can be checked.")
    missing = [name for name in ("input_ids", "labels", "token_weights") if name not in dataset.column_names]
    if missing:
        raise WeightError(
            f"The training data has no {', '.join(missing)}; it has {', '.join(dataset.column_names)}. "
            "Weights are never taken as 1 in silence: give token_weights, all ones for plain cross-entropy."
        )
    positive = False
    for table in dataset.select_columns(["token_weights"]).with_format("arrow").iter(batch_size=2000):
        column = table["token_weights"].combine_chunks()
        values = pc.list_flatten(column).cast("float64")
        if column.null_count or values.null_count or not pc.all(pc.is_finite(values)).as_py():
            raise WeightError("The training data has token_weights that are missing or not finite.")
        lowest, highest = pc.min_max(values).as_py().values()
        if lowest is not None and lowest < 0:
            raise WeightError("The training data has negative token_weights.")
        positive = positive or bool(highest)
    if not positive:
        raise WeightError("All token_weights of the training data are zero, so nothing would be learned.")
