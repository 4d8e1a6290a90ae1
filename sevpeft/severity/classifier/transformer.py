"""A severity classifier on an Arabic encoder, fine-tuned with transformers' Trainer and stored as safetensors.

Rare severities count as much as frequent ones, by the weights of the loss. Training stops when a part of the rows that
shares no question with the others gets no better, and the best epoch is kept. LoRA adapters are merged in the end, so
that what was evaluated is what is stored.

transformers fills weights that a checkpoint lacks with random numbers, and makes up an empty tokenizer where there is
none, both in silence. Both are errors here. Only safetensors are read, and no code from the Hub runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sevpeft.data.read import look_for_hub
from sevpeft.errors import ModelError, first_sentence
from sevpeft.runs import plain_disk_errors
from sevpeft.severity.classifier.examples import Examples, hold_out
from sevpeft.severity.classifier.settings import EncoderSection
from sevpeft.severity.probabilities import SEVERITIES

LABELS = dict(enumerate(SEVERITIES))
BATCH_SIZE = 32
VALIDATION_SHARE = 0.2
# Counts up when the same weights would be made to say something else.
CODE_VERSION = 1
_LEARNING_RATE = {"full": 2e-5, "lora": 3e-4}


class TransformerClassifier:
    """A fitted encoder with its tokenizer.

    Attributes:
        max_length: tokens of a question; the rest of a longer one is not read. Stored as the tokenizer's
            model_max_length.
        batch_size: questions of a forward pass; the padding, and with it the last digits, depends on it.
        shortened: questions that were cut since it was made.
        version: hash of weights, tokenizer and `max_length`.
    """

    kind = "transformer"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
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
        precision = _half_precision()
        autocast = torch.autocast("cuda", dtype=precision) if precision is not None else nullcontext()
        with torch.inference_mode(), autocast:
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                rows = {name: [values[i] for i in part] for name, values in inputs.items()}
                logits = self.model(**self.tokenizer.pad(rows, return_tensors="pt").to(self.device)).logits
                result[part] = torch.softmax(logits.double(), dim=-1).cpu().numpy()
        return result

    def save(self, folder: Path) -> None:
        """Writes weights, configuration and tokenizer into a folder."""
        self.tokenizer.model_max_length = self.max_length
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path) -> TransformerClassifier:
        """What `save` wrote, in float32; whoever calls it compares the version, which covers every weight."""
        model, tokenizer, _ = _load(str(folder))
        return cls(model, tokenizer, tokenizer.model_max_length)


def load_encoder(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder in float32 under a random head of three labels, to be fine-tuned, and its tokenizer.

    Args:
        name: Hub id or folder. A head of other labels is replaced.

    Raises:
        ModelError: it cannot be loaded, or lacks weights or a tokenizer.
    """
    labels = {label: position for position, label in LABELS.items()}
    model, tokenizer, absent = _load(name, num_labels=len(LABELS), id2label=LABELS, label2id=labels)
    prefix = f"{model.base_model_prefix}."
    absent = [key for key in absent if key.startswith(prefix) and not key.startswith(f"{prefix}pooler.")]
    if absent:
        raise ModelError(
            f"{name} lacks {len(absent)} of the weights that its config.json names, such as {absent[0]}, and they "
            "would be random numbers; fetch it again, or name another encoder."
        )
    return model, tokenizer


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """Tokens of the longest input: `wanted`, within what the encoder has positions for."""
    positions = getattr(model.config, "max_position_embeddings", wanted)
    # RoBERTa and its kin begin to count positions after the pad token.
    if "roberta" in model.config.model_type or model.config.model_type == "camembert":
        positions -= (model.config.pad_token_id or 0) + 1
    return int(min(wanted, positions, tokenizer.model_max_length))


def fit_transformer(
    examples: Examples,
    settings: EncoderSection,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> TransformerClassifier:
    """Fine-tunes an encoder; the same call gives the same weights, bit for bit on a CPU.

    Raises:
        DataError: a severity has too few questions to train and to validate on.
        ModelError: the encoder cannot be loaded, or the loss is not a number.
    """
    fold = hold_out(examples, VALIDATION_SHARE, seed=seed)
    labels = examples.labels
    progress(f"loading {settings.name_or_path}")
    # Before the head is made, whose weights are drawn.
    transformers.set_seed(seed)
    model, tokenizer = load_encoder(settings.name_or_path)
    max_length = longest_input(model, tokenizer, settings.max_length)
    tokens = tokenizer(examples.questions, truncation=True, max_length=max_length)["input_ids"]
    if settings.lora_r is not None:
        model = _with_lora(model, settings.lora_r)
    half = _half_precision()
    with (
        tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch,
        plain_disk_errors(Path(scratch).parent, when_full="free some, or set TMPDIR to a folder on another disk"),
    ):
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=scratch,
                seed=seed,
                num_train_epochs=settings.num_train_epochs,
                learning_rate=settings.learning_rate or _LEARNING_RATE["lora" if settings.lora_r else "full"],
                per_device_train_batch_size=settings.per_device_train_batch_size,
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
                metric_for_best_model="eval_loss",
                greater_is_better=False,
                disable_tqdm=True,
                report_to="none",
                dataloader_pin_memory=False,
            ),
            train_dataset=[{"input_ids": tokens[i], "labels": int(labels[i])} for i in fold.train],
            eval_dataset=[{"input_ids": tokens[i], "labels": int(labels[i])} for i in fold.test],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_loss_func=weighted_loss(class_weights(labels[fold.train])),
            callbacks=[transformers.EarlyStoppingCallback(settings.early_stopping_patience), _Progress(progress)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        best = trainer.state.best_metric
    if best is None or not np.isfinite(best):
        raise ModelError("The loss of the encoder is not a number; lower encoder.learning_rate.")
    fitted = trainer.accelerator.unwrap_model(trainer.model)
    if settings.lora_r is not None:
        fitted = fitted.merge_and_unload()
    return TransformerClassifier(fitted, tokenizer, max_length)


def class_weights(labels: np.ndarray) -> torch.Tensor:
    """(3,) float32: n / (3 · n_k), so that every severity has the same part in the loss; their mean over rows is 1."""
    weights = len(labels) / (len(SEVERITIES) * np.bincount(labels, minlength=len(SEVERITIES)))
    return torch.tensor(weights, dtype=torch.float32)


def weighted_loss(weights: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Σ_i w[y_i] · −log p_i[y_i] / n for a batch of n rows, as the transformers.Trainer calls it.

    Unlike the weighted mean of torch, it does not divide by the weights of the batch: a batch that holds one critical
    row would then count it as much as a batch that holds ten.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits.float()
        total = cross_entropy(logits, labels, weight=weights.to(logits.device), reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


class _Progress(transformers.TrainerCallback):
    def __init__(self, show: Callable[[str], None]) -> None:
        self.show = show

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.show(f"step {state.global_step} of at most {state.max_steps}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.show(f"epoch {state.epoch:g}: validation loss {metrics['eval_loss']:.3f}")


def _load(name: str, **head: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A model, its tokenizer, and the names of weights that the checkpoint lacks or has in another shape."""
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    if not folder.is_dir():
        look_for_hub()
    try:
        model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the callers decide which names may differ
            **head,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a library raises on files that others wrote
        raise ModelError(f"The encoder {name} cannot be loaded ({first_sentence(error)}); name another one.") from error
    if (
        tokenizer.pad_token_id is None
        or not len(tokenizer.all_special_tokens) < len(tokenizer) <= model.config.vocab_size
    ):
        raise ModelError(f"{name} has no tokenizer, or that of another kind of model; name another encoder.")
    absent = [*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])]
    return model, tokenizer, sorted(absent)


def _with_lora(model: PreTrainedModel, r: int) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    inside = f"{model.base_model_prefix}."
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(inside) and "pooler" not in name
    ]
    # A head and a pooler may have come with random weights, which no adapter of low rank would make up for.
    whole = [name for name, child in model.named_children() if f"{name}." != inside and list(child.parameters())]
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
    content: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    if tokenizer.is_fast:
        # Truncation and padding are those of the last call.
        content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    digest.update(json.dumps(content, sort_keys=True).encode())
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
