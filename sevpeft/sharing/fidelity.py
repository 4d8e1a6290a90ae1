"""Distance between the answers of two models, on the run's own validation rows.

A merged model must answer as the model that was trained. The distance is the Kullback-Leibler divergence between the
two predictions of every answer token. The yardstick is measured too: what the adapter itself does to its base.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from sevpeft.data.read import load_consultations
from sevpeft.errors import SevpeftError
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import encode_rows, load_splits

CONSULTATIONS = 8


@dataclass(frozen=True)
class Text:
    """Token ids of one consultation, and where its answer begins."""

    ids: list[int]
    answer: int


@dataclass(frozen=True)
class Difference:
    """Between the predictions P of one model and Q of another, over the answer tokens of all consultations.

    Attributes:
        kl: mean over tokens of KL(P‖Q), in nats; infinite where a model answers with numbers that are not finite.
        largest_logit_difference: over all tokens and the vocabulary.
        equal_next_tokens: share of the tokens at which both find the same one likeliest.
        tokens: answer tokens that were compared.
    """

    kl: float
    largest_logit_difference: float
    equal_next_tokens: float
    tokens: int


def texts_of(recipe: Recipe, prompt: Prompt, context: int | None) -> tuple[list[Text], str]:
    """Consultations as the model was trained to read them, and what they are.

    They are validation rows of the run, or bundled consultations where the run's data cannot be read here.
    """
    try:
        _, splits, _ = load_splits(recipe)
        own = splits.validation if len(splits.validation) else splits.train
        return _encoded(own, recipe, prompt, context), "rows of the run's data"
    except SevpeftError:
        rows = load_consultations("builtin:consultations").rows
        return _encoded(rows, recipe, prompt, context), "bundled consultations, as the run's data cannot be read here"


def _encoded(rows: Dataset, recipe: Recipe, prompt: Prompt, context: int | None) -> list[Text]:
    spread = np.linspace(0, len(rows) - 1, min(CONSULTATIONS, len(rows))).astype(int)
    limits = [limit for limit in (recipe.training.settings()["max_length"], context) if limit]
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        encoded, _ = encode_rows(
            rows.select(spread),
            prompt,
            min(limits, default=None),
            strata=None,
            cache_file=Path(scratch) / "rows.arrow",
        )
        return [
            Text(row["input_ids"], next(at for at, label in enumerate(row["labels"]) if label != IGNORED))
            for row in encoded
        ]


@torch.no_grad()
def answer_logits(
    model: PreTrainedModel, texts: Sequence[Text], on_text: Callable[[int], None] = lambda _: None
) -> list[torch.Tensor]:
    """Logits (answer tokens, vocabulary) of every text, in the model's own precision, on the CPU.

    One text at a time: padding would be a difference of its own.
    """
    found = []
    for text in texts:
        ids = torch.tensor([text.ids], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, text.answer - 1 : -1]
        found.append(logits.cpu().clone())
        on_text(1)
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
    return Difference(math.inf if math.isnan(kl) else kl / tokens, largest, equal / tokens, tokens)
