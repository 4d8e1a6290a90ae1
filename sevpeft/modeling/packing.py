"""Finds out whether a model keeps packed documents apart, by measuring it.

Packing puts several consultations into one row and relies on the model to build its attention mask from
`position_ids`. Some architectures do not (ALiBi models, convolutions without their kernel), and nothing complains:
one patient's question then flows into another's answer. A list of names would age, so the model is measured.

No tolerance is a constant: rounding of real weights in bfloat16 is a thousand times that of a toy in float32.
Contamination is measured in one shape, where only the neighbor differs; positions against the rounding that other
harmless shapes cause in the same document.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sevpeft.errors import ModelError, first_sentence

# How many times the measured noise a difference must be before it counts. Harmless ones were at most as large as the
# noise itself (Gemma-3-270M, three precisions).
_ABOVE_NOISE = 4


def documents_stay_apart(model: PreTrainedModel, length: int = 24) -> tuple[bool, str]:
    """Whether two packed documents are scored as if each were alone.

    Args:
        model: causal language model, in any precision, on its device.
        length: tokens of the document; its neighbors have four times as many, so that its positions are far apart.

    Returns:
        (True, "") or (False, reason in words).
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    # The upper half may hold special tokens and padding of the matrix.
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
        # A causal model cannot look ahead, so what follows a document changes its scores by rounding at most. That is
        # not always nothing: a mixture of experts multiplies the tokens of both documents in one matrix.
        before, before_other = packed(document, neighbor)[:length], packed(document, other)[:length]
        alone = _logits(model, {"input_ids": torch.tensor([document])})
    except (ImportError, ValueError, RuntimeError, TypeError) as error:
        return False, f"the model does not accept packed rows ({first_sentence(error)})"
    finally:
        model.train(was_training)
    if not torch.isfinite(after).all():
        return False, f"its scores are not finite in {str(model.dtype).removeprefix('torch.')}"
    noise = max(_largest(after, repeated), _largest(before, before_other))
    leak = _largest(after, after_other)
    if leak > _ABOVE_NOISE * noise:
        return False, f"log-probabilities of a document change by {leak:.2g} nats with the one packed before it"
    # A mean, because the largest of many roundings is itself a matter of chance.
    unit = float(alone.abs().max()) * torch.finfo(model.dtype).eps
    rounding = max(_mean(before, alone), unit)
    shift = _mean(after, alone)
    if shift > _ABOVE_NOISE * rounding:
        return False, (
            f"log-probabilities of a document change by {shift:.2g} nats in the mean when it is packed behind another, "
            f"and by {rounding:.2g} in front of it"
        )
    return True, ""


def check_packing(model: PreTrainedModel, setting: str) -> None:
    """Raises ModelError when `setting` (training.packing or training.padding_free) would mix documents."""
    apart, reason = documents_stay_apart(model)
    if not apart:
        raise ModelError(
            f"{setting}=true is refused for {model.config.model_type} with {model.config._attn_implementation} "
            f"attention: {reason}. Leave it out; rows are then padded to the longest of their batch."
        )


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((torch.log_softmax(one, -1) - torch.log_softmax(other, -1)).abs().max())


def _mean(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((torch.log_softmax(one, -1) - torch.log_softmax(other, -1)).abs().mean())


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """Logits (T, V) at every position, in float32."""
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    return model(**inputs, use_cache=False).logits[0].float()
