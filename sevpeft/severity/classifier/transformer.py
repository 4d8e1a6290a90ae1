"""A severity classifier on an Arabic encoder: fine-tuned with transformers' Trainer, stored as safetensors, no pickle.

Rare severities count as much as frequent ones, by the weights of the loss or by repeating their rows. Training stops
when a part of the rows that shares no question with the others gets no better, and the best epoch is kept. LoRA
adapters are merged in the end: the stored folder then stands for itself, and what was judged is what is stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from sevpeft.errors import DataError, ModelError
from sevpeft.runs import plain_disk_errors, write_atomically
from sevpeft.severity.classifier.crossvalidation import hold_out
from sevpeft.severity.classifier.encoder import load_encoder, load_fitted, longest_input
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.probabilities import SEVERITIES

DEFAULT_ENCODER = "CAMeL-Lab/bert-base-arabic-camelbert-mix"
SETTINGS = "severity.json"
MAX_LENGTH = 256
"""Tokens: of real questions, fewer than one in a hundred is longer; of those the end is not read."""
BATCH_SIZE = 32

# Counts up when the same weights would be made to say something else.
CODE_VERSION = 1
VALIDATION_SHARE = 0.2
_LEARNING_RATE = {"full": 2e-5, "lora": 3e-4}

Balance = Literal["weights", "resampling", "none"]


class TransformerClassifier:
    """A fitted encoder with its tokenizer.

    Attributes:
        max_length: tokens from which on a question is cut.
        batch_size: questions judged at a time; the padding, and with it the last digits, depends on it.
        shortened: questions that were cut since it was made.
        version: hash of weights, tokenizer and `max_length`.
    """

    kind = "transformer"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int = MAX_LENGTH
    ) -> None:
        self.max_length = longest_input(model, tokenizer, max_length)
        self.batch_size = BATCH_SIZE
        self.shortened = 0
        self.version = _version(model, tokenizer, self.max_length)
        self.tokenizer = tokenizer
        self.device = _device()
        self.model = model.to(self.device).eval()

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        """(n, 3), each row summing to one, in the order of `SEVERITIES`; without dropout, and in any order the same."""
        result = np.empty((len(questions), len(SEVERITIES)))
        if not len(questions):
            return result
        inputs = self.tokenizer(list(questions), truncation=True, max_length=self.max_length, return_length=True)
        lengths = np.array(inputs.pop("length"))
        full = np.flatnonzero(lengths == self.max_length)
        if len(full):
            whole = self.tokenizer([questions[i] for i in full.tolist()], truncation=False, verbose=False)["input_ids"]
            self.shortened += sum(len(ids) > self.max_length for ids in whole)
        # Questions of one length stand together, so that little is padded.
        order = np.argsort(-lengths, kind="stable")
        names = list(inputs)
        precision = _half_precision()
        autocast = torch.autocast("cuda", dtype=precision) if precision is not None else nullcontext()
        with torch.inference_mode(), autocast:
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                batch = self.tokenizer.pad(
                    {name: [inputs[name][i] for i in part] for name in names}, return_tensors="pt"
                )
                logits = self.model(**batch.to(self.device)).logits
                result[part] = torch.softmax(logits.double(), dim=-1).cpu().numpy()
        if not np.isfinite(result).all():
            raise ModelError("The transformer gives no numbers: its weights are broken; fit it again.")
        return result


def fit_transformer(
    questions: Sequence[str],
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    seed: int = 0,
    encoder: str = DEFAULT_ENCODER,
    balance: Balance = "weights",
    lora_r: int | None = None,
    num_train_epochs: float = 6,
    learning_rate: float | None = None,
    per_device_train_batch_size: int = 16,
    early_stopping_patience: int = 2,
    max_length: int = MAX_LENGTH,
    progress: Callable[[str], None] = lambda said: None,
) -> TransformerClassifier:
    """Fine-tunes an encoder; the same call gives the same weights, bit for bit on a CPU.

    Args:
        questions, labels, groups: (n,) texts, positions in `SEVERITIES`, and numbers, equal where two ask the same.
        encoder: Hub id or folder.
        balance: "weights" weights the loss (`class_weights`), "resampling" repeats rows of rarer severities until all
            have as many as the most frequent one, "none" leaves the shares as they are.
        lora_r: rank of LoRA adapters on all linear layers; None trains all weights.
        learning_rate: None for 2e-5, or 3e-4 with LoRA.
        early_stopping_patience: epochs without a better validation loss after which to stop.
        progress: is told what is being done.

    Raises:
        DataError: a severity has too few questions to train and to validate on.
        ModelError: the encoder cannot be loaded, or the training came to nothing.
    """
    labels = np.asarray(labels, dtype=np.int64)
    examples = Examples(list(questions), labels, np.asarray(groups), np.arange(len(labels)))
    fold = hold_out(examples, VALIDATION_SHARE, seed=seed)
    if not all(count for count in examples.take(fold.train).counts().values()):
        raise DataError("A severity has no question left to train on: bring more rows of every severity.")
    progress(f"loading {encoder}")
    # Before the head is made, whose weights are drawn.
    set_seed(seed)
    model, tokenizer = load_encoder(encoder)
    max_length = longest_input(model, tokenizer, max_length)
    tokens = tokenizer(examples.questions, truncation=True, max_length=max_length)["input_ids"]
    train = _resampled(labels, fold.train, seed) if balance == "resampling" else fold.train
    weights = class_weights(labels[fold.train]) if balance == "weights" else torch.ones(len(SEVERITIES))
    judged = class_weights(labels[fold.test]) if balance != "none" else torch.ones(len(SEVERITIES))
    if lora_r is not None:
        model = _with_lora(model, lora_r)
    half = _half_precision()
    with (
        tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch,
        plain_disk_errors(Path(scratch).parent, when_full="free some, or set TMPDIR to a folder on another disk"),
    ):
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                seed=seed,
                num_train_epochs=num_train_epochs,
                learning_rate=learning_rate or _LEARNING_RATE["full" if lora_r is None else "lora"],
                per_device_train_batch_size=per_device_train_batch_size,
                per_device_eval_batch_size=BATCH_SIZE,
                train_sampling_strategy="group_by_length",
                weight_decay=0.01,
                warmup_steps=0.1,
                bf16=half is torch.bfloat16,
                fp16=half is torch.float16,
                use_cpu=_device().type == "cpu",
                eval_strategy="epoch",
                save_strategy="epoch",
                logging_strategy="epoch",
                save_only_model=True,
                save_total_limit=1,
                load_best_model_at_end=True,
                metric_for_best_model="eval_severity_loss",
                greater_is_better=False,
                disable_tqdm=True,
                report_to="none",
                dataloader_pin_memory=False,
            ),
            train_dataset=[{"input_ids": tokens[i], "labels": int(labels[i])} for i in train],
            eval_dataset=[{"input_ids": tokens[i], "labels": int(labels[i])} for i in fold.test],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_loss_func=WeightedLoss(weights),
            compute_metrics=lambda predicted: {"severity_loss": _validation_loss(predicted, judged)},
            callbacks=[EarlyStoppingCallback(early_stopping_patience), _Telling(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        best = trainer.state.best_metric
    if best is None or not np.isfinite(best):
        raise ModelError("The training came to nothing, its loss is not a number; lower the learning rate.")
    fitted = trainer.accelerator.unwrap_model(trainer.model)
    if lora_r is not None:
        fitted = fitted.merge_and_unload()
    return TransformerClassifier(fitted, tokenizer, max_length)


def class_weights(labels: np.ndarray) -> torch.Tensor:
    """(3,) float32: n / (3 · n_k), so that every severity has the same part in the loss; their mean over rows is 1.

    A severity without a row has the weight 0: there is nothing to weight.
    """
    counts = np.bincount(labels, minlength=len(SEVERITIES))
    weights = np.divide(len(labels), len(SEVERITIES) * counts, out=np.zeros(len(SEVERITIES)), where=counts > 0)
    return torch.tensor(weights, dtype=torch.float32)


class WeightedLoss:
    """Σ_i w[y_i] · −log p_i[y_i] / n for a batch of n rows.

    Unlike the weighted mean of torch, it does not divide by the weights of the batch: a batch that holds one critical
    row would then count it as much as a batch that holds ten.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        weights = self.weights.to(outputs.logits.device)
        total = cross_entropy(outputs.logits.float(), labels, weight=weights, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def write_transformer(classifier: TransformerClassifier, folder: Path) -> None:
    """Writes weights, configuration, tokenizer and settings into a folder that does not exist yet."""
    folder.mkdir(parents=True)
    with plain_disk_errors(folder, when_full="free some, then run this again", remedy="choose another folder"):
        classifier.model.save_pretrained(folder)
        classifier.tokenizer.save_pretrained(folder)
    write_atomically(folder / SETTINGS, json.dumps({"max_length": classifier.max_length}) + "\n")


def read_transformer(folder: Path) -> TransformerClassifier:
    """What `write_transformer` wrote.

    Raises:
        ModelError: it is not there, damaged, without a fitted head, or its labels stand in another order.
    """
    try:
        max_length = int(json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["max_length"])
        if max_length < 1:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(
            f"{folder} holds no severity classifier of a transformer ({SETTINGS} is absent or damaged); fit one with "
            "`sevpeft classifier fit DATA FOLDER --kind transformer`."
        ) from None
    model, tokenizer = load_fitted(folder)
    return TransformerClassifier(model, tokenizer, max_length)


class _Telling(TrainerCallback):
    """Tells how far the training is."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell(f"step {state.global_step} of at most {state.max_steps}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.tell(f"epoch {state.epoch:g}: validation loss {metrics['eval_severity_loss']:.3f}")


def _validation_loss(predicted: EvalPrediction, weights: torch.Tensor) -> float:
    """The loss of `WeightedLoss` over the whole validation part, whatever its batches were."""
    scores = torch.as_tensor(predicted.predictions).double()
    loss = cross_entropy(scores, torch.as_tensor(predicted.label_ids), weight=weights.double(), reduction="sum")
    return float(loss) / len(scores)


def _resampled(labels: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """The positions, those of rarer severities again and again until every severity has as many as the largest."""
    random = np.random.default_rng(seed)
    by_class = [positions[labels[positions] == k] for k in range(len(SEVERITIES))]
    most = max(map(len, by_class))
    repeated = []
    for own in by_class:
        whole, rest = divmod(most, len(own))
        repeated += [np.tile(own, whole), random.choice(own, rest, replace=False)]
    return np.sort(np.concatenate(repeated))


def _with_lora(model: PreTrainedModel, r: int) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    inside = f"{model.base_model_prefix}."
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(inside) and "pooler" not in name
    ]
    # A head and a pooler may have come with random weights, which no adapter of low rank would make up for.
    whole = [
        name for name, module in model.named_children() if name != model.base_model_prefix and list(module.parameters())
    ]
    whole += [name for name, _ in model.named_modules() if name == f"{inside}pooler"]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=r,
        lora_alpha=2 * r,
        lora_dropout=0.05,
        target_modules=linear,
        modules_to_save=whole,
    )
    return get_peft_model(model, config)


def _version(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    digest = hashlib.sha256(json.dumps([CODE_VERSION, max_length, model.config.model_type]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    read: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    if tokenizer.is_fast:
        read = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two say what was read last, not what the tokenizer is.
        read |= {"truncation": None, "padding": None}
    digest.update(json.dumps(read, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def _device() -> torch.device:
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if forced or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _half_precision() -> torch.dtype | None:
    """What a GPU computes in; None on a CPU, which computes in float32."""
    if _device().type == "cpu":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
