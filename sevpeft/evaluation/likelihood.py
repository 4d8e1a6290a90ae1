"""Turns reference answers into their negative log-likelihood under a model: the most sensitive score, without decoding.

The rows are encoded by the training's own function, so that the figure is the validation loss of the training, row by
row. Only positions from the first answer token of a batch on are scored: the vocabulary is the large part of the work.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sevpeft.errors import DataError, RunError
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.modeling.prompts import Prompt
from sevpeft.training.encoding import IGNORED, encode_rows


def reference_nll(
    model: PreTrainedModel,
    prompt: Prompt,
    rows: EvaluationRows,
    *,
    max_length: int | None,
    batch_size: int,
    references: list[str] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of every row's reference answer, given its question.

    Args:
        max_length: as in training; a question is shortened to it, an answer never.
        references: (n,) other answers to score instead, such as shuffled ones.
        on_batch: told the number of rows after every batch.

    Returns:
        nll (n,) float64, nats summed over the answer and the token that ends it; NaN for a row whose answer leaves no
        room for its question. tokens (n,) int64, 0 for such a row.

    Raises:
        RunError: one row alone does not fit the GPU's memory.
    """
    nll, tokens = np.full(len(rows), np.nan), np.zeros(len(rows), dtype=np.int64)
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        try:
            encoded, _ = encode_rows(
                rows.as_dataset(references), prompt, max_length, strata=None, cache_file=Path(scratch) / "rows.arrow"
            )
        except DataError:
            return nll, tokens  # no row fits
        read = encoded[:]
    order = sorted(range(len(read["labels"])), key=lambda i: -len(read["labels"][i]))
    was_training = model.training
    model.eval()
    size = batch_size
    try:
        while order:
            batch = order[:size]
            try:
                sums = _batch_nll(model, [read["input_ids"][i] for i in batch], [read["labels"][i] for i in batch])
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise RunError(
                        "The GPU's memory is full with a single row; lower training.max_length in another run, or "
                        "evaluate on a GPU with more memory. Finished rows are kept."
                    ) from error
                size = max(1, len(batch) // 2)
                torch.cuda.empty_cache()
                continue
            order = order[len(batch) :]
            for i, total in zip(batch, sums, strict=True):
                at = read["source_index"][i]
                nll[at], tokens[at] = total, sum(label != IGNORED for label in read["labels"][i])
            if on_batch is not None:
                on_batch(len(batch))
    finally:
        model.train(was_training)
    return nll, tokens


@torch.no_grad()
def _batch_nll(model: PreTrainedModel, input_ids: list[list[int]], labels: list[list[int]]) -> list[float]:
    longest = max(map(len, input_ids))
    # Padded on the right, where a causal model does not look back from.
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in input_ids], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in input_ids], device=model.device)
    wanted = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels], device=model.device)
    first = min(next(at for at, label in enumerate(row) if label != IGNORED) for row in labels) - 1
    logits, offset = _logits_from(model, first, input_ids=ids, attention_mask=mask, use_cache=False)
    sums = []
    for row, targets in zip(logits, wanted, strict=True):
        at = torch.nonzero(targets != IGNORED).squeeze(1)
        # One row at a time: in float32 the scores of a whole batch over the vocabulary would be gigabytes.
        scores = row[at - 1 - offset].float()
        sums.append(float(torch.nn.functional.cross_entropy(scores, targets[at], reduction="sum")))
    return sums


def _logits_from(model: PreTrainedModel, first: int, **inputs: Any) -> tuple[torch.Tensor, int]:
    """Logits of the positions from `first` on, where the model can leave the others out, and the first position."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return model(**inputs).logits, 0
    positions = torch.arange(first, inputs["input_ids"].shape[1], device=model.device)
    return model(**inputs, logits_to_keep=positions).logits, first
