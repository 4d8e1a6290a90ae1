"""Measures how far one model's answers are from another's, on bundled consultations and never on the user's.

A merged model must answer as base + adapter did. What rounding does to it is compared with what the adapter does: the
Kullback-Leibler divergence between the two predictions of every answer token, beside the one between adapter and base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sevpeft.data.sources import load_consultations
from sevpeft.modeling.prompts import Prompt

CONSULTATIONS = 8
# Of what the adapter does, in divergence, which grows with the square of a small change: at a tenth, a third of the
# adapter's effect would be noise. In float32 nothing is rounded that could be seen, so that more is a mistake.
LARGEST_SHARE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
# Two ways to add the same float32 numbers differ by about 1e-5 in a logit, so by 1e-10 nats.
ROUNDING_OF_FLOAT32 = 1e-8


@dataclass(frozen=True)
class Text:
    """Token ids of one consultation, and where its answer begins."""

    ids: list[int]
    answer: int


@dataclass(frozen=True)
class Difference:
    """Between the predictions P of one model and Q of another, over the answer tokens of all consultations.

    Attributes:
        kl: mean over tokens of KL(P‖Q), in nats.
        largest_logit_difference: over all tokens and the vocabulary.
        equal_next_tokens: share of the tokens at which both find the same one likeliest.
        tokens: answer tokens that were compared.
    """

    kl: float
    largest_logit_difference: float
    equal_next_tokens: float
    tokens: int


def bundled_texts(prompt: Prompt, context: int | None) -> list[Text]:
    """Bundled consultations as the model was trained to read them, cut to its context."""
    rows = load_consultations("builtin:consultations").rows
    chosen = rows.select(range(0, len(rows), len(rows) // CONSULTATIONS)).select(range(CONSULTATIONS))
    texts = []
    asked, answered = prompt.prompt_ids(chosen["question"][:]), prompt.answer_ids(chosen["answer"][:])
    for question, answer in zip(asked, answered, strict=True):
        # Cut from the front, so that there is always an answer to predict.
        ids = [*question, *answer][-(context or len(question) + len(answer)) :]
        texts.append(Text(ids, max(1, len(ids) - len(answer))))
    return texts


@torch.no_grad()
def answer_logits(
    model: PreTrainedModel, texts: Sequence[Text], on_text: Callable[[], None] = lambda: None
) -> list[torch.Tensor]:
    """Logits (answer tokens, vocabulary) of every text, in the model's own precision, on the CPU.

    One text at a time: padding would be a difference of its own.
    """
    found = []
    for text in texts:
        ids = torch.tensor([text.ids], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, text.answer - 1 : -1]
        found.append(logits.cpu().clone())
        on_text()
    return found


def difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> Difference:
    """How the second model's logits differ from the first one's, both as `answer_logits` gives them."""
    kl, largest, equal, tokens = 0.0, 0.0, 0, 0
    for ours, theirs in zip(first, second, strict=True):
        # In float64, because what is looked for can be smaller than float32's rounding of a logarithm.
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (ours, theirs))
        kl += float((p.exp() * (p - q)).sum(dim=-1).clamp(min=0).sum())
        largest = max(largest, float((ours.double() - theirs.double()).abs().max()))
        equal += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
        tokens += len(ours)
    return Difference(kl / tokens, largest, equal / tokens, tokens)


def keeps_the_adapter(rounding: Difference, effect: Difference, dtype: torch.dtype) -> bool:
    """Whether what lies between adapter and merged model is small beside what lies between adapter and base.

    Args:
        dtype: of the merged weights.
    """
    noise = ROUNDING_OF_FLOAT32 if dtype == torch.float32 else 0.0
    return rounding.kl <= LARGEST_SHARE[dtype] * effect.kl + noise
