"""The severity-weighted loss and the validation loss per severity.

The loss stays TRL's. SFTTrainer's `compute_loss` calls the model and reads `log_probs` (B, T-1) from what it returns.
Here it gets a callable that returns the same outputs with log-probabilities multiplied by `token_weights`.
Normalization, accumulation, several processes and metrics are TRL's own. With all weights one the result is stock SFT
to the bit; on a CPU, for vocabularies over 4,096, up to rounding (`CPU_VOCABULARY_TILE` in compat.py).

Validation loss is a sum over tokens, per severity, not a mean of batch means, which would change with the batch size.
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
from torch.utils.data import RandomSampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy
from trl import SFTConfig, SFTTrainer
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.utils import FusedCausalLMOutput

from sevpeft.errors import Interrupted, RunError, WeightError
from sevpeft.modeling.compat import disable_cpu_avx512_repack
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.checkpoints import ExactResume, checkpoint_of
from sevpeft.training.compat import LabeledPositions, SeededLengthGroupedSampler, SortedWithinStepsSampler
from sevpeft.training.data import SeverityCollator, answer_starts, check_weights, parts_of, rows_of
from sevpeft.training.distributed import set_up_engine

# With any other value the weights would be bypassed, or the loss would depend on the number of processes.
_ONLY = {
    "loss_type": "nll",
    "label_smoothing_factor": 0,
    "use_liger_kernel": False,
    "average_tokens_across_devices": True,
}


class SeveritySFTTrainer(SFTTrainer):
    """SFTTrainer with a weight on every answer token, whose checkpoints resume exactly (`ExactResume`).

    Args:
        model, args, eval_dataset, processing_class, peft_config, ...: as in SFTTrainer. `eval_dataset` holds
            `input_ids`, `labels` and optionally `severity` (position in SEVERITIES, -1 for unknown).
        train_dataset: holds `input_ids`, `labels` (-100 on the prompt), `token_weights` (floats, one per token) and,
            when packed, `seq_lengths`.
        reduction: what the weighted sum of a (global, accumulated) batch is divided by: "tokens", the number of
            answer tokens, as in TRL; or "examples", the number of answers (the weights then carry 1/L_i).
        loraplus: settings of LoRA+ (`loraplus_settings`); none for one learning rate.
        sort_within_steps: take the rows of a step by length, so that padding is little; each step keeps its rows.
        split_on_oom: compute a batch that does not fit in memory in parts, which is the same step; on one process only.
        on_message: gets a label and a sentence for the screen.

    Raises:
        WeightError: of `check_weights`. ValueError: a setting of `args` that would bypass the weights.
    """

    control: TrainerControl
    _total_train_tokens: int
    _epoch_ended_at = -1

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        train_dataset: Dataset,
        *,
        reduction: str = "tokens",
        loraplus: dict[str, float] | None = None,
        sort_within_steps: bool = False,
        split_on_oom: bool = False,
        on_message: Callable[[str, str], None] = lambda label, sentence: None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        for name, only in _ONLY.items():
            if getattr(args, name) != only:
                raise ValueError(f"{name}={getattr(args, name)} would bypass the severity weights; leave it out.")
        check_weights(train_dataset)
        self.reduction, self.loraplus = reduction, loraplus
        self.sort_within_steps, self.split_on_oom, self.on_message = sort_within_steps, split_on_oom, on_message
        # Consultations that are computed at once, where a whole batch did not fit in memory.
        self.most_rows: dict[str, int | None] = {"train": None, "eval": None}
        self.step_batches: list[dict[str, Any]] = []
        self.exact_resume = ExactResume(self)
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args.remove_unused_columns = False  # token_weights and severity are no arguments of the model
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("selective"):
            # TRL 1.16 does this to the PeftModel, whose wrapper transformers 5.24 goes past.
            enable_selective_activation_checkpointing(model)
        # ExactResume first, so that a checkpoint is sealed before another callback ends the training.
        kwargs["callbacks"] = [self.exact_resume, *callbacks]
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
        self._labeled_positions = LabeledPositions(self.causal_lm())

    def causal_lm(self) -> PreTrainedModel:
        """The model without its adapter's wrapper."""
        return self.model.get_base_model()

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

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if self.reduction == "examples":
            batch_samples = [{"labels": answer_starts(batch["labels"])} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop, with loss (nats per answer token), per-severity loss and accuracy from sums over tokens."""
        # Rows are severities and "unknown"; columns are negative log-likelihood, correct tokens, entropy, tokens.
        self._validation = torch.zeros(len(SEVERITIES) + 1, 4, dtype=torch.float64)
        # A data loader draws a random number; the training after it must draw those that it would have drawn without.
        with torch.random.fork_rng(devices=[]):
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

    # What no callback can do.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.loraplus and self.optimizer is None:
            optimizer_cls, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            arguments |= {"loraplus_weight_decay": self.args.weight_decay, **self.loraplus}
            self.optimizer: Any = create_loraplus_optimizer(self.model, optimizer_cls, **arguments)
            # Groups that stay empty (no adapted embedding, say) are of no use, and not every optimizer bears them.
            self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
        return super().create_optimizer(model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; all batches of a step are kept until the next one."""
        self.step_batches, items = super().get_batch_samples(*args, **kwargs)
        self._tokens_before_step = self._total_train_tokens
        return self.step_batches, items

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Of the step that is about to be taken, over all processes; kept for `StepGuard`."""
        self.gradient_norm = super()._get_grad_norm(*args, **kwargs)
        return self.gradient_norm

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        step = super().training_step

        def undo() -> list[dict[str, Any]]:
            # The backward pass may have broken off half-way, so the gradient of the step begins anew.
            model.zero_grad()
            self._total_train_tokens = self._tokens_before_step
            return list(takewhile(lambda batch: batch is not inputs, self.step_batches))

        losses = self._in_parts("train", inputs, lambda part: step(model, part, num_items_in_batch), undo)
        return sum(losses[1:], losses[0])

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        step, before = super().prediction_step, self._validation.clone()

        def undo() -> list[dict[str, Any]]:
            self._validation.copy_(before)
            return []

        return self._in_parts("eval", inputs, lambda part: step(model, part, *args, **kwargs), undo)[-1]

    def _in_parts(
        self, kind: str, batch: dict[str, Any], take: Callable[[Any], Any], undo: Callable[[], list[dict[str, Any]]]
    ) -> list[Any]:
        """Results of `take` on the parts of a batch that fit in memory; their losses have the same sum.

        `undo` takes back what a failure has left, and returns the batches that have to be taken again before this one.
        """
        batches = [batch]
        while True:
            try:
                most = self.most_rows[kind]
                return [[take(part) for part in parts_of(one, most, self.data_collator)] for one in batches][-1]
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                half = min(len(rows_of(batch)), most or len(rows_of(batch))) // 2
                if not (half and self.split_on_oom):
                    if kind == "train":
                        raise
                    size = f"training.per_device_eval_batch_size (now {self.args.per_device_eval_batch_size})"
                    raise RunError(f"The memory is too small for validation; lower {size}.") from error
            self.most_rows[kind] = half
            clear_device_cache(garbage_collection=True)
            what = "validation" if kind == "eval" else "the same step"
            self.on_message("Memory", f"full; {what} continues with {half} rows at once")
            batches = [*undo(), batch]

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

    def _send_telemetry(self) -> None:
        """Sends nothing; TRL 1.16 tells the Hub the model, the device and how the data was loaded."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none; TRL's would name a folder of this machine."""
