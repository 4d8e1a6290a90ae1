"""Packed rows: checks that a model keeps documents apart, and computes their attention fast.

Packing relies on the model to build its attention mask from `position_ids`; otherwise one patient's question silently
enters another's answer. No tolerance is constant: bfloat16 rounding of real weights is a thousand times the float32
rounding of a toy. Contamination is measured in one shape, where only the neighbor differs. Positions are compared with
the rounding that harmless changes of shape cause in the same document.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import BatchEncoding, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sevpeft.errors import ModelError, first_sentence

# A difference counts from this multiple of the measured noise. Harmless differences were at most as large as the noise
# (Gemma-3-270M, three precisions).
_ABOVE_NOISE = 4
# Cache: mask → result of `_documents`. All layers share one mask.
_documents_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def documents_stay_apart(model: PreTrainedModel, length: int = 24) -> tuple[bool, str]:
    """Whether two packed documents get the same scores as alone, and the reason if not.

    `length`: tokens of the document. Its neighbors are four times as long, so that positions differ much.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    # The upper half may hold special tokens and padding of the embedding.
    tokens = torch.randint(vocabulary // 2, (9 * length,), generator=generator)
    document, neighbor, other = (part.tolist() for part in tokens.split([length, 4 * length, 4 * length]))
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)

    def packed(*documents: list[int]) -> torch.Tensor:
        return _logits(model, collate([{"input_ids": ids} for ids in documents]))

    was_training = model.training
    model.eval()
    try:
        after, after_other = packed(neighbor, document)[-length:], packed(other, document)[-length:]
        repeated = packed(neighbor, document)[-length:]
        # In a causal model, what follows a document changes its scores only by rounding. A mixture of experts does
        # round differently: it multiplies the tokens of both documents in one matrix.
        before, before_other = packed(document, neighbor)[:length], packed(document, other)[:length]
        alone = _logits(model, {"input_ids": torch.tensor([document])})
    except (ImportError, ValueError, RuntimeError, TypeError) as error:
        return False, f"the model does not accept packed rows ({first_sentence(error)})"
    finally:
        model.train(was_training)
    if not torch.isfinite(after).all():
        return False, f"its scores are not finite in {str(model.dtype).removeprefix('torch.')}"
    noise = max(_shift(after, repeated).max(), _shift(before, before_other).max())
    leak = _shift(after, after_other).max()
    if leak > _ABOVE_NOISE * noise:
        return False, f"log-probabilities of a document change by {leak:.2g} nats with the one packed before it"
    # The mean, because the largest of many rounding errors varies by chance.
    unit = alone.abs().max() * torch.finfo(model.dtype).eps
    rounding, shift = max(_shift(before, alone).mean(), unit), _shift(after, alone).mean()
    if shift > _ABOVE_NOISE * rounding:
        change = f"change by {shift:.2g} nats on average behind another document, and by {rounding:.2g} before one"
        return False, f"log-probabilities of a document {change}"
    return True, ""


def check_packing(model: PreTrainedModel, setting: str) -> None:
    """Raises ModelError if `setting` (training.packing or training.padding_free) would mix documents."""
    apart, reason = documents_stay_apart(model)
    if not apart:
        raise ModelError(f"{setting}=true is refused for {model.config.model_type} ({reason}); leave it out.")


def _shift(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Absolute differences (T, V) of log-probabilities, in nats."""
    return (torch.log_softmax(one, -1) - torch.log_softmax(other, -1)).abs()


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """Logits (T, V) at every position, in float32."""
    batch = {name: value for name, value in batch.items() if name != "labels"}
    return model(**BatchEncoding(batch).to(model.device), use_cache=False).logits[0].float()


def set_up_attention() -> None:
    """Makes `sdpa` attention of this process fast for rows of many lengths, packed or not.

    On a CPU, each document of a packed row is computed alone. transformers masks token pairs of different documents but
    still computes them: the cost is quadratic in the whole batch. On a GPU, more calls would cost more than they save.
    """
    ALL_ATTENTION_FUNCTIONS.register("sdpa", _attention)
    # PyTorch (2.11) prefers cuDNN on Hopper and Blackwell, which builds a plan for every new row length (B200: 1 s,
    # https://github.com/modelscope/FunASR/issues/3704). Upstream's fix is opt-in: pytorch/pytorch#155958.
    torch.backends.cuda.enable_cudnn_sdp(False)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa_attention_forward`, once per document of the mask (1, 1, T, T)."""
    parts = [] if query.is_cuda or kwargs.get("position_bias") is not None else _documents(attention_mask)
    if attention_mask is None or len(parts) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for begin, end, causal in parts:
        inside = slice(begin, end)
        mask = None if causal else attention_mask[..., inside, inside]
        states = (tensor[:, :, inside] for tensor in (query, key, value))
        outputs.append(sdpa_attention_forward(module, *states, mask, **kwargs)[0])
    return torch.cat(outputs, 1), None


def _documents(mask: torch.Tensor | None) -> list[tuple[int, int, bool]]:
    """Begin, end and whether it is fully causal, of each block of a boolean mask; empty if there are no blocks."""
    # Compiled graphs and fake tensors (of the memory plan) have no values to search.
    if mask is None or torch.compiler.is_compiling() or type(mask) is not torch.Tensor or mask.is_meta:
        return []
    if mask.dtype != torch.bool or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return []
    if mask not in _documents_of:
        whole, visible, blocks = mask[0, 0], 0, []
        # A document begins where a token does not see its predecessor.
        begins = (~whole.diagonal(-1)).nonzero().flatten() + 1
        for begin, end in pairwise([0, *begins.tolist(), len(whole)]):
            block = whole[begin:end, begin:end]
            visible += int(block.sum())
            blocks.append((begin, end, bool(torch.equal(block, torch.ones_like(block).tril()))))
        # A mask that lets documents see one another is not split.
        _documents_of[mask] = blocks if visible == int(whole.sum()) else []
    return list(_documents_of[mask])
