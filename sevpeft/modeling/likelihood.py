"""Likelihood of answers after prompts, in batches that fit the memory.

A prompt that several answers follow can be read once: its keys and values are kept for all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from sevpeft.errors import RunError

# Limits of a likelihood batch: tokens with padding, enough for a busy GPU without a backward pass; logits (1 GB in
# float32); and padding, as another batch reads the weights once more.
NLL_TOKENS, NLL_LOGITS, NLL_PADDING = 4096, 2**28, 128
KEPT = 2**14  # tokens, with padding, whose keys and values are kept at once; the limit is for memory
Tokens = Sequence[Sequence[int]]
Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]  # tuples of the tokens of a prompt and of an answer
Found = tuple[list[int], list[list[float]]]  # numbers of pairs, and `batch_nll` of each
States = list[list[torch.Tensor]]  # keys and values of each layer, both (rows, heads, tokens, width)


def run_batches(
    rows: Iterable[int],
    lengths: Sequence[int],
    compute: Callable[[list[int]], Any],
    *,
    size: Callable[[int], int],
    padding: int,
    remedy: str = "",
) -> Iterator[tuple[list[int], Any]]:
    """Batches of rows, the longest first, each with its result; a batch too large for the GPU is halved.

    `size`: maximum rows of a batch whose longest row has this length. `padding`: maximum padding tokens of a batch.
    `remedy`: of the RunError for a single row that is too large; without it, PyTorch's own error is raised.
    """
    order, share = sorted(rows, key=lambda i: -lengths[i]), 1.0
    while order:
        longest, room, count = lengths[order[0]], padding, 1
        most = min(int(size(longest) * share), len(order))
        while count < most and (room := room - (longest - lengths[order[count]])) >= 0:
            count += 1
        try:
            yield order[:count], compute(order[:count])
            order = order[count:]
            continue
        except torch.OutOfMemoryError as error:
            if count == 1 and not remedy:
                raise
            if count == 1:
                problem = "A single row does not fit the GPU's memory"
                raise RunError(f"{problem}; {remedy}. Finished rows are kept.") from error
        share = count / 2 / size(longest)  # outside the except block, because the exception holds the memory
        torch.cuda.empty_cache()


@torch.no_grad()
def read_by_length(model: PreTrainedModel, prompts: Tokens, filling: int = 0) -> States:
    """Keys and values of the prompts without their last tokens, aligned on the right.

    Padding costs as much as a question while prompts are read, and little afterwards: prompts of similar length are
    read together, and all answers are written together. `filling`: token of the padding.
    """
    rows, states = [[*ids[:-1]] for ids in prompts], States()
    widest = max(map(len, rows))

    def read(batch: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        longest = len(rows[batch[0]])
        ids = [rows[i] + [filling] * (longest - len(rows[i])) for i in batch]
        mask = [[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in batch]
        tensors = {"input_ids": ids, "attention_mask": mask}
        # Without a config every layer keeps all tokens, also those outside of a sliding window.
        whole = DynamicCache()
        given = {name: torch.tensor(value, device=model.device) for name, value in tensors.items()}
        bare(model).base_model(**given, cache=whole, use_cache=True)  # without the head
        return [(layer.keys, layer.values) for layer in whole.layers]

    lengths = [len(row) for row in rows]
    for batch, layers in run_batches(
        range(len(rows)), lengths, read, size=lambda longest: max(1, NLL_TOKENS // longest), padding=NLL_PADDING
    ):
        states = states or [
            [part.new_zeros(len(rows), part.shape[1], widest, part.shape[3]) for part in pair] for pair in layers
        ]
        for (number, i), (pair, parts) in product(enumerate(batch), zip(states, layers, strict=True)):
            for whole, part in zip(pair, parts, strict=True):
                whole[i, :, widest - lengths[i] :] = part[number, :, : lengths[i]]
    return states


def cache_of(model: PreTrainedModel, states: States, rows: list[int] | None = None) -> Cache:
    """A cache with copies of the keys and values of some rows, or with those of all, which `states` then loses."""
    cache = DynamicCache(config=bare(model).config.get_text_config(decoder=True))
    for layer, pair in enumerate(states):
        cache.update(*(pair if rows is None else [part[rows] for part in pair]), layer)
        if rows is None:
            pair.clear()
    return cache


def nll_after(
    model: PreTrainedModel, states: States, pairs: Sequence[tuple[int, Sequence[int], Sequence[int]]]
) -> list[list[float]]:
    """`batch_nll` of answers (n,). `pairs`: the row of `states`, its prompt, which was read, and an answer."""
    found, read = np.zeros((len(pairs), 2)), states[0][0].shape[2]

    def compute(batch: list[int]) -> list[list[float]]:
        rows, prompts, answers = zip(*(pairs[n] for n in batch), strict=True)
        return batch_nll(model, prompts, answers, cache_of(model, states, [*rows]))

    for batch, values in run_batches(
        range(len(pairs)),
        [len(answer) for *_, answer in pairs],
        compute,
        size=lambda longest: min(nll_rows(model, longest), max(1, KEPT // (read + longest))),
        padding=NLL_PADDING,
    ):
        found[batch] = values
    return found.tolist()


def nll_of_shared(model: PreTrainedModel, pairs: Pairs, remedy: str) -> Iterator[Found]:
    """`nll_of_pairs` for models that `read_by_length` can read: equal prompts, of two tokens or more, are read once."""
    places = dict[Sequence[int], list[int]]()
    for n, (ids, _) in enumerate(pairs):
        places.setdefault(ids, []).append(n)
    prompts = [*places]

    def compute(batch: list[int]) -> Found:
        states = read_by_length(model, [prompts[i] for i in batch])
        at = [(row, n) for row, i in enumerate(batch) for n in places[prompts[i]]]
        return [n for _, n in at], nll_after(model, states, [(row, *pairs[n]) for row, n in at])

    batches = run_batches(
        range(len(prompts)),
        [*map(len, prompts)],
        compute,
        size=lambda longest: max(1, NLL_TOKENS // longest),
        padding=NLL_TOKENS,
        remedy=remedy,
    )
    return (found for _, found in batches)


def nll_of_pairs(model: PreTrainedModel, pairs: Pairs, remedy: str) -> Iterator[Found]:
    """Batches of pairs of a prompt and an answer: their numbers, and `batch_nll` of each. Errors as `run_batches`."""
    return run_batches(
        range(len(pairs)),
        [len(ids) + len(answer) for ids, answer in pairs],
        lambda batch: batch_nll(model, *zip(*(pairs[n] for n in batch), strict=True)),
        size=lambda longest: nll_rows(model, longest),
        padding=NLL_PADDING,
        remedy=remedy,
    )


def nll_rows(model: PreTrainedModel, longest: int) -> int:
    """Maximum rows of a likelihood batch whose longest row has so many tokens."""
    return max(1, min(NLL_TOKENS, NLL_LOGITS // model.config.get_text_config().vocab_size) // longest)


def batch_nll(model: Any, prompts: Tokens, answers: Tokens, cache: Cache | None = None) -> list[list[float]]:
    """Nats of each answer, and its tokens that are not the likeliest (n, 2). `cache`: see `answer_logits`."""
    logits, row_of = answer_logits(model, prompts, answers, cache)
    labels = torch.tensor([*chain(*answers)], device=model.device)
    sums = torch.zeros(len(answers), 2, dtype=torch.float64, device=model.device)
    # In parts: in half precision, a float32 copy of all logits would take twice their memory.
    for part in torch.arange(len(logits), device=model.device).split(256):
        losses = torch.nn.functional.cross_entropy(logits[part].float(), labels[part], reduction="none")
        missed = logits[part].argmax(dim=-1) != labels[part]
        sums.index_add_(0, row_of[part], torch.stack([losses, missed], dim=-1).double())
    return sums.tolist()


@torch.no_grad()
def answer_logits(
    model: PreTrainedModel, prompts: Tokens, answers: Tokens, cache: Cache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens of all answers, V) before each token of the answers, and the row of each.

    `cache`: of the prompts without their last tokens. Without it, rows of the same input are read once: the options of
    one token, such as letters, after a prompt.
    """
    read = 0 if cache is None else cache.get_seq_length()
    starts = [ids[-1:] if read else ids for ids in prompts]
    rows = [(*ids, *answer[:-1]) for ids, answer in zip(starts, answers, strict=True)]
    inputs = rows if read else [*dict.fromkeys(rows)]
    before = [[0] * (read + 1 - len(ids)) + [1] * (len(ids) - 1) for ids in prompts] if read else [[]] * len(inputs)
    longest = max(map(len, rows))
    # Padded on the right, where a causal model does not attend to padding.
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in inputs], device=model.device)
    masks = [seen + [1] * len(row) + [0] * (longest - len(row)) for seen, row in zip(before, inputs, strict=True)]
    mask = torch.tensor(masks, device=model.device)
    more: dict[str, Any] = {"cache": cache, "use_cache": True} if read else {"use_cache": False}
    if read and "position_ids" in inspect.signature(bare(model).forward).parameters:
        more["position_ids"] = (mask.cumsum(-1) - 1)[:, read:]
    # Positions whose next token belongs to the answer.
    row_of = torch.tensor([n for n, answer in enumerate(answers) for _ in answer], device=model.device)
    at = [len(start) + n - 1 for start, answer in zip(starts, answers, strict=True) for n in range(len(answer))]
    place = {row: n for n, row in enumerate(inputs)}
    input_of = row_of if read else torch.tensor([place[row] for row in rows], device=model.device)[row_of]
    positions = (input_of, torch.tensor(at, device=model.device))
    # Some models scale or cap the head's output in their forward. So the forward is used, with fewer positions.
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][positions][None], *inputs[1:]))
    try:
        return model(input_ids=ids, attention_mask=mask, **more).logits[0], row_of
    finally:
        handle.remove()


def bare(model: Any) -> Any:
    """The model without its adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
