"""The transformer severity classifier: an Arabic encoder, fine-tuned with transformers' Trainer.

There is no early stopping, because it would need rows of the training data; calibration corrects overconfidence.
transformers silently initializes missing weights at random, and silently makes an empty tokenizer if there is none.
Both are errors here. Only safetensors are read, and no code from the Hub runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import parse_flag_from_env
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sevpeft.data.read import look_for_hub
from sevpeft.errors import ModelError, loading_errors
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.probabilities import SEVERITIES, Passage, parts_of
from sevpeft.severity.settings import EncoderSection

LABELS = dict(enumerate(SEVERITIES))
FOLDER = "transformer"
# Increase when the same weights would give other probabilities.
CODE_VERSION = 1


class TransformerClassifier:
    """A fitted encoder with its tokenizer; the tokenizer's model_max_length is the number of tokens it reads."""

    kind = "transformer"
    batch_size = 32

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        settings = [CODE_VERSION, tokenizer.model_max_length, model.config.model_type]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        # The tokenizer stores truncation and padding of its last call, so they are not part of the version.
        content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        digest.update(json.dumps(content, sort_keys=True).encode())
        self.version, self.tokenizer = digest.hexdigest()[:12], tokenizer
        self.device, self.precision = _device()
        self.model = model.to(self.device).eval()

    def probabilities(self, passages: Sequence[Passage]) -> np.ndarray:
        """(n, 3), each row summing to one, in the order of `SEVERITIES`; the order of passages does not matter."""
        result = np.empty((len(passages), len(SEVERITIES)))
        if not len(passages):
            return result
        inputs = self.tokenizer(*parts_of(passages), truncation=True)  # truncates the longer part of a pair
        # Sorted by length, to reduce padding.
        order = np.argsort([-len(ids) for ids in inputs["input_ids"]], kind="stable")
        half = self.precision != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self.precision, enabled=half):
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                rows = {name: [values[i] for i in part] for name, values in inputs.items()}
                logits = self.model(**self.tokenizer.pad(rows, return_tensors="pt").to(self.device)).logits
                result[part] = torch.softmax(logits.double(), dim=-1).cpu().numpy()
        return result

    def save(self, folder: Path) -> None:
        """Writes weights, configuration and tokenizer into the subfolder `FOLDER`."""
        self.model.save_pretrained(folder / FOLDER)
        self.tokenizer.save_pretrained(folder / FOLDER)

    @classmethod
    def load(cls, folder: Path) -> TransformerClassifier:
        """Reads the files of `save`, in float32; the caller compares the version, which covers every weight."""
        model, tokenizer, _ = _load(str(folder / FOLDER))
        return cls(model, tokenizer)


def fit_transformer(
    examples: Examples, settings: EncoderSection, *, seed: int, progress: Callable[[str], None]
) -> TransformerClassifier:
    """Fine-tunes an encoder; reproducible, bit for bit on a CPU.

    Raises ModelError if it cannot be loaded, if weights or the tokenizer are missing, or if the loss is not finite.
    """
    name = settings.name_or_path
    progress(f"loading {name}")
    # Before loading, which initializes the head at random and replaces a head with other labels.
    transformers.set_seed(seed)
    model, tokenizer, absent = _load(name, num_labels=len(LABELS), id2label=LABELS)
    encoder = f"{model.base_model_prefix}."
    if random := [key for key in absent if key.startswith(encoder) and not key.startswith(f"{encoder}pooler.")]:
        raise ModelError(f"{name} lacks {len(random)} of its encoder's weights ({random[0]} …); name another encoder.")
    # RoBERTa and related models do not use the first two positions.
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 10**6) - 2)
    tokenizer.model_max_length = min(settings.max_length, longest)
    device, precision = _device()
    inputs = dict(tokenizer(*parts_of(examples.passages), truncation=True)) | {"labels": examples.labels.tolist()}
    rows = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]

    class Progress(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(f"step {state.global_step} of {state.max_steps}")

    compute = {"bf16": precision is torch.bfloat16, "fp16": precision is torch.float16, "use_cpu": device.type == "cpu"}
    fixed = {"train_sampling_strategy": "group_by_length", "weight_decay": 0.01, "warmup_steps": 0.1}
    chosen = settings.model_dump(exclude={"name_or_path", "max_length"})
    quiet = {"save_strategy": "no", "logging_nan_inf_filter": False, "disable_tqdm": True, "report_to": "none"}
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(output_dir=scratch, seed=seed, **fixed, **chosen, **compute, **quiet),
            train_dataset=rows,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_loss_func=weighted_loss(examples.labels),
            callbacks=[Progress()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if not np.isfinite(trainer.train().training_loss):
            raise ModelError("The loss of the encoder is NaN or infinite; lower encoder.learning_rate.")
    return TransformerClassifier(trainer.accelerator.unwrap_model(trainer.model), tokenizer)


def weighted_loss(train_labels: np.ndarray) -> Callable[..., torch.Tensor]:
    """A Trainer loss: Σ_i w[y_i] · −log p_i[y_i] / n for a batch of n rows, with w_k = n_train / (3 · n_k)."""
    # torch's weighted mean divides by the weights of the batch, so one critical row would count as much as ten.
    counts = torch.bincount(torch.as_tensor(train_labels), minlength=len(SEVERITIES))
    weights = len(train_labels) / (len(SEVERITIES) * counts)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits.float()
        total = cross_entropy(logits, labels, weight=weights.to(logits.device), reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def _load(name: str, **head: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A model, its tokenizer, and the names of weights that are missing in the checkpoint or have another shape."""
    name = os.path.expanduser(name)
    if not os.path.isdir(name):
        look_for_hub()
    with loading_errors(name, setting="encoder.name_or_path"):
        model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the caller decides which names may differ
            **head,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    special, known = len(tokenizer.all_special_tokens), len(tokenizer)
    if not tokenizer.is_fast or tokenizer.pad_token_id is None or not special < known <= model.config.vocab_size:
        raise ModelError(f"{name} has no fast tokenizer, or one for another model; name another encoder.")
    return model, tokenizer, sorted([*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])])


def _device() -> tuple[torch.device, torch.dtype]:
    """The device of this process (GPU or CPU) and its compute type."""
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), half
