"""Which prompts may share a batch: measured on the loaded model, not read from a list of names, which would age.

Prompts of different lengths are padded on the left. Most architectures hide the padding behind the attention mask;
where one does not, a question gets another answer in another batch, and no error is raised.

No fixed tolerance can decide: rounding of a real model in bfloat16 moves log-probabilities by a nat between two
harmless shapes. Two measurements do:

- Leaks: exchange the other row and the tokens under the mask, in the same shape. The scores must be equal to the bit;
  with experts, which round differently with other tokens in the call, within rounding. An exchange without padding
  shows which of the two a model is.
- Positions: a padded row against the row alone. The yardstick is the row alone, answered step by step with a cache,
  against the row read at once with padding on the right, where a causal model does not look.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

Together = Literal["any", "one length", "none"]

_LONG, _SHORT, _STEPS = 24, 9, 3
# Root mean squares over a vocabulary vary little. Measured in three precisions: harmless shapes differ by up to 1.6
# yardsticks, and the weakest fault by 17.
_YARDSTICKS = 4.0


def possible_batches(model: PreTrainedModel, pad_id: int, end_id: int) -> tuple[Together, str]:
    """Which prompts may share a batch, and why not all.

    Args:
        model: causal language model, with or without an adapter, on its device, in evaluation mode.
        pad_id: token that is padded with; the attention mask is 0 there.
        end_id: token that ends an answer.

    Returns:
        "any", "one length" (padding is not hidden) or "none" (rows change each other), and the reason in words.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(vocabulary // 2, (2, _LONG), generator=generator)
    short = torch.randint(vocabulary // 2, (_SHORT,), generator=generator)
    answer = torch.randint(vocabulary // 2, (_STEPS,), generator=generator)
    answer += answer == end_id  # it would end the answer
    # Tokens of the row itself: in float16 others can overflow.
    fillings = torch.full((_LONG - _SHORT,), pad_id), short.flip(0).repeat(2)[: _LONG - _SHORT]

    def padded(other: torch.Tensor, filling: torch.Tensor) -> torch.Tensor:
        return _stepwise(model, torch.stack([other, torch.cat([filling, short])]), answer, pad_id, end_id)

    def beside(other: torch.Tensor) -> torch.Tensor:
        return _stepwise(model, torch.stack([other[:_SHORT], short]), answer, pad_id, end_id)

    alone = _stepwise(model, short[None], answer, pad_id, end_id)
    text = torch.cat([short, answer[:-1]])
    at_once, scale = _at_once(model, text, fillings[0])
    allowed = _YARDSTICKS * max(_rms(at_once - alone), torch.finfo(model.dtype).eps * scale)

    scores = padded(first, fillings[0])
    leak, shift = _rms(scores - padded(second, fillings[1])), _rms(scores - alone)
    if leak == 0 and shift <= allowed:
        return "any", ""
    scores = beside(first)
    row_leak = max(_rms(scores - beside(other)) for other in (second, first.flip(0)))
    # Written so that NaN passes nowhere.
    if not (row_leak <= allowed and _rms(scores - alone) <= allowed):
        return "none", f"another row beside it changes log-probabilities by {max(row_leak, leak):.2g} nats"
    if row_leak > 0 and leak <= allowed and shift <= allowed:
        return "any", ""
    reason = f"padding changes log-probabilities by {max(leak, shift):.2g} nats, and rounding by {allowed:.1g} at most"
    return "one length", reason


def _rms(values: torch.Tensor) -> float:
    return float(values.pow(2).mean().sqrt())


@torch.no_grad()
def _stepwise(
    model: PreTrainedModel, ids: torch.Tensor, answer: torch.Tensor, pad_id: int, end_id: int
) -> torch.Tensor:
    """Log-probabilities (steps, V) with which the last row gives the answer, which all rows are made to give."""
    mask = torch.ones_like(ids)
    if ids.shape[1] == _LONG:
        mask[-1, : _LONG - _SHORT] = 0
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        prefix_allowed_tokens_fn=lambda _, seen: [int(answer[len(seen) - ids.shape[1]])],
        generation_config=GenerationConfig(
            max_new_tokens=_STEPS,
            do_sample=False,
            use_cache=True,
            eos_token_id=end_id,
            pad_token_id=pad_id,
            output_logits=True,  # as the model gives them, before the answer is forced
            return_dict_in_generate=True,
        ),
    )
    return torch.stack([torch.log_softmax(step[-1].float(), dim=-1) for step in output.logits])


@torch.no_grad()
def _at_once(model: PreTrainedModel, text: torch.Tensor, filling: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The same log-probabilities from one call, with filling on the right, and the size of the logits."""
    ids = torch.cat([text, filling])[None]
    mask = torch.ones_like(ids)
    mask[:, len(text) :] = 0
    output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    logits = output.logits[0, _SHORT - 1 : len(text)].float()
    return torch.log_softmax(logits, dim=-1), _rms(logits)
