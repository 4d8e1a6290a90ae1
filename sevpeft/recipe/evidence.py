"""The sections of a recipe that say how a trained adapter is questioned and how its answers are judged.

They change nothing of the training, so that `sevpeft evaluate RUN generation.max_new_tokens=64` may set them anew.
"""

from __future__ import annotations

from pydantic import Field

from sevpeft.recipe.sections import Section


class GenerationSection(Section):
    """How answers are generated, the same for every arm; named as in transformers' GenerationConfig."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Longest answer, in tokens; one that reaches it without an end counts as truncated."""
    do_sample: bool = False
    """Draws every token by its probability instead of taking the most probable one."""
    temperature: float = Field(default=0.7, gt=0)
    """Contrast of the probabilities that are drawn from; used with do_sample."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draws from the most probable tokens that make up so much probability; used with do_sample."""
    top_k: int = Field(default=0, ge=0)
    """Draws from so many most probable tokens, 0 from all; used with do_sample."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Makes tokens that stand in the text already less probable when above 1."""
    per_device_eval_batch_size: int = Field(default=32, ge=1)
    """Questions answered at once; it changes the speed and the memory, not the answers."""
    seed: int = Field(default=0, ge=0)
    """Seed of the drawing; every question has random numbers of its own, whatever batch it is in."""


class EvaluationSection(Section):
    """How answers are judged."""

    bertscore: bool = True
    """Computes BERTScore, which needs an encoder."""
    bertscore_model: str = Field(default="bert-base-multilingual-cased", min_length=1)
    """Encoder of BERTScore: Hub id or folder."""
    bertscore_layer: int = Field(default=9, ge=1)
    """Layer of the encoder whose vectors are compared."""
    n_resamples: int = Field(default=2000, ge=100)
    """Bootstrap samples behind an interval."""
    confidence_level: float = Field(default=0.95, gt=0, lt=1)
    """Coverage of the intervals."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap and of the shuffled references."""
