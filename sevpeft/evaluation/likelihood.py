"""Negative log-likelihood of reference answers under a model: the most sensitive score, without decoding.

The rows are encoded by the training's own function, so that the figure is the validation loss of the training, row by
row. Rows of about one length share a batch, and only labeled positions reach the head.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from sevpeft.errors import DataError, RunError
from sevpeft.evaluation.generation import next_batch
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.modeling.prompts import Prompt
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import encode_rows

# A batch holds so many tokens, with its padding: enough to keep a GPU busy when nothing is kept for a backward pass.
_TOKENS = 4096
# And so many logits, which take 1 GB in float32.
_LOGITS = 2**28
# And so many tokens of padding: one more batch reads the weights once more, which costs about as much.
_PADDING = 128


def reference_nll(
    model: PreTrainedModel,
    prompt: Prompt,
    rows: EvaluationRows,
    *,
    max_length: int | None,
    references: list[str] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of every row's reference answer, given its question.

    Args:
        max_length: as in training; a question is shortened to it, an answer never.
        references: (n,) other answers to score instead, such as shuffled ones.
        on_batch: gets the number of rows after every batch.

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
    # Longest first, so that a lack of memory shows at once.
    lengths = [len(row) for row in read["labels"]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    was_training = model.training
    model.eval()
    room = min(_TOKENS, _LOGITS // model.config.get_text_config().vocab_size)
    try:
        while order:
            batch = next_batch(order, lengths, room // lengths[order[0]], "any", _PADDING)
            try:
                sums = _batch_nll(model, [read["input_ids"][i] for i in batch], [read["labels"][i] for i in batch])
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise RunError(
                        "The GPU's memory is full with a single row; lower training.max_length in another run, or "
                        "evaluate on a GPU with more memory. Finished rows are kept."
                    ) from error
                sums = None
            if sums is None:  # out here nothing holds the memory any more
                room = len(batch) // 2 * lengths[order[0]]
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
    at = (wanted[:, 1:] != IGNORED).nonzero(as_tuple=True)
    head = model.get_output_embeddings()
    # The model itself scales or caps what the head returns, so its own forward is used, with fewer positions.
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][at][None], *inputs[1:]))
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    finally:
        handle.remove()
    sums = torch.zeros(len(ids), dtype=torch.float64, device=model.device)
    for part in torch.arange(len(logits), device=model.device).split(256):
        # In float32 all scores at once would be twice the memory of a model in half precision.
        losses = torch.nn.functional.cross_entropy(
            logits[part].float(), wanted[:, 1:][at][part], reduction="none"
        ).double()
        sums.index_add_(0, at[0][part], losses)
    return sums.tolist()
