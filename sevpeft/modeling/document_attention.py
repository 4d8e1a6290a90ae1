"""Makes PyTorch's attention look only at pairs of tokens within one packed document: fewer operations, same result.

Rows without padding put all documents of a batch behind one another. transformers masks the pairs of tokens of
different documents, but PyTorch computes them all the same, so that attention costs the square of the whole batch.
FlashAttention has kernels for it on some GPUs; this works everywhere that `sdpa` does.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Of each mask, first and last position of its documents, and whether each is plainly causal. All layers share a mask.
_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def attend_within_documents() -> None:
    """Lets every model of this process with `sdpa` attention compute each document of a packed row alone."""
    ALL_ATTENTION_FUNCTIONS.register("sdpa", _attention)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa_attention_forward`, once for each document of the mask (1, 1, T, T)."""
    parts = [] if attention_mask is None or kwargs.get("position_bias") is not None else _documents(attention_mask)
    if attention_mask is None or len(parts) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for begin, end, causal in parts:
        inside = slice(begin, end)
        mask = None if causal else attention_mask[..., inside, inside]
        states = (tensor[:, :, inside] for tensor in (query, key, value))
        outputs.append(sdpa_attention_forward(module, *states, mask, **kwargs)[0])
    return torch.cat(outputs, 1), None


def _documents(mask: torch.Tensor) -> list[tuple[int, int, bool]]:
    """Begin, end and whether it is plainly causal, of each block of a boolean mask; empty where there are no blocks."""
    # A compiled graph, and tensors without numbers (of the memory plan), have no blocks to look for.
    if torch.compiler.is_compiling() or type(mask) is not torch.Tensor or mask.is_meta:
        return []
    if mask.dtype != torch.bool or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return []
    if mask not in _found:
        _found[mask] = _find_documents(mask[0, 0])
    found: list[tuple[int, int, bool]] = _found[mask]
    return found


def _find_documents(mask: torch.Tensor) -> list[tuple[int, int, bool]]:
    # A document begins where a token does not see the one before it.
    begins = (~mask.diagonal(-1)).nonzero().flatten() + 1
    bounds = [0, *begins.tolist(), len(mask)]
    documents, seen = [], 0
    for begin, end in pairwise(bounds):
        block = mask[begin:end, begin:end]
        count = int(block.sum())
        seen += count
        documents.append((begin, end, bool(torch.equal(block, torch.ones_like(block).tril()))))
    # A mask that lets documents see one another is left as it is.
    return documents if seen == int(mask.sum()) else []
