"""Finds out which questions a model can answer together and still say what it says to each alone, by asking it.

Questions of different lengths are answered together by padding the shorter ones on the left. Most architectures hide
the padding behind the attention mask; where one does not, the same question gets another answer in another batch and
nothing complains. A list of names would age, so prompts are continued together and alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

from sevpeft.modeling.packing import ROUNDING

Together = Literal["any", "one length", "none"]

_LONG, _SHORT, _STEPS = 24, 9, 3


def answered_together(model: PreTrainedModel, pad_id: int, end_id: int) -> Together:
    """Which prompts may share a batch: any, those of one length (padding is not hidden), or none.

    Args:
        model: causal language model, with or without an adapter, on its device.
        pad_id: token that is padded with; the attention mask is 0 there.
        end_id: token that ends an answer; it is not drawn here.
    """
    tolerance = ROUNDING.get(model.dtype, ROUNDING[torch.bfloat16])
    if neighbour_shift(model, pad_id, end_id, _LONG) <= tolerance:
        return "any"
    return "one length" if neighbour_shift(model, pad_id, end_id, _SHORT) <= tolerance else "none"


def neighbour_shift(model: PreTrainedModel, pad_id: int, end_id: int, length: int) -> float:
    """Largest change, in nats, of a log-probability in the first steps of an answer to a prompt of 9 tokens, when one
    of `length` tokens is answered with it."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    other = torch.randint(vocabulary // 2, (length,), generator=generator)
    short = torch.randint(vocabulary // 2, (_SHORT,), generator=generator)
    padding = torch.full((length - _SHORT,), pad_id)
    mask = torch.ones((2, length), dtype=torch.long)
    mask[1, : length - _SHORT] = 0
    together, said = _steps(model, torch.stack([other, torch.cat([padding, short])]), mask, pad_id, end_id)
    alone, said_alone = _steps(model, short[None], torch.ones((1, _SHORT), dtype=torch.long), pad_id, end_id)
    shift = 0.0
    for step in range(_STEPS):
        shift = max(shift, float((together[step][1] - alone[step][0]).abs().max()))
        if said[1, step] != said_alone[0, step]:
            break  # from here on two different texts would be compared
    return shift


@torch.no_grad()
def _steps(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, pad_id: int, end_id: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Log-probabilities (B, V) of every step and the tokens (B, steps) that were taken."""
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=_STEPS,
            min_new_tokens=_STEPS,
            do_sample=False,
            use_cache=True,
            eos_token_id=end_id,
            pad_token_id=pad_id,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    return [torch.log_softmax(step.float(), dim=-1) for step in output.logits], output.sequences[:, ids.shape[1] :]
