"""Finds out whether a model keeps packed documents apart, by asking it.

Packing puts several consultations into one row and relies on the model to build its attention mask from
`position_ids`. Some architectures do not (ALiBi models, convolutions without their kernel), and nothing complains:
one patient's question then flows into another's answer. A list of names would age, so two documents are scored packed
and alone, and the first one is exchanged under the second.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sevpeft.errors import ModelError, first_sentence

# Scores of the same document in another batch differ by rounding; contamination was measured at .3 to 1.3 nats.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def documents_stay_apart(model: PreTrainedModel, length: int = 24) -> tuple[bool, str]:
    """Whether two packed documents are scored as if each were alone.

    Args:
        model: causal language model, in any precision, on its device.
        length: tokens of each of the two documents.

    Returns:
        (True, "") or (False, reason in words).
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocabulary // 2, (3, length), generator=generator).tolist()
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    was_training = model.training
    model.eval()
    try:
        packed = _scores(model, collate([{"input_ids": first}, {"input_ids": second}]))
        exchanged = _scores(model, collate([{"input_ids": other}, {"input_ids": second}]))
        alone = _scores(model, {"input_ids": torch.tensor([second])})
    except (ImportError, ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        return False, f"the model does not accept packed rows ({first_sentence(error)})"
    finally:
        model.train(was_training)
    leak = float((packed[length:] - exchanged[length:]).abs().max())
    shift = float((packed[length:] - alone).abs().max())
    tolerance = ROUNDING.get(model.dtype, ROUNDING[torch.bfloat16])
    if leak > tolerance or shift > tolerance:
        return False, (
            f"log-probabilities of a document change by {max(leak, shift):.2g} nats when another is packed before it"
        )
    return True, ""


def refuse_contaminated_packing(model: PreTrainedModel, setting: str) -> None:
    """Raises ModelError when `setting` (training.packing or training.padding_free) would mix documents."""
    apart, reason = documents_stay_apart(model)
    if not apart:
        raise ModelError(
            f"{setting}=true is refused for {model.config.model_type} with {model.config._attn_implementation} "
            f"attention: {reason}. Leave it out; rows are then padded to the longest of their batch."
        )


@torch.no_grad()
def _scores(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """Full log-probability rows (T, V) at every position, in float32."""
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    return torch.log_softmax(model(**inputs, use_cache=False).logits[0].float(), dim=-1)
