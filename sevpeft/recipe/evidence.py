"""The sections of a recipe that say how a trained adapter is questioned and how its answers are judged.

They change nothing of the training, so that `sevpeft evaluate RUN generation.max_new_tokens=64` may set them anew.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from sevpeft.recipe.rules import JUDGE_KEY
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
    per_device_eval_batch_size: int = Field(default=64, ge=1)
    """Questions answered at once; it changes the speed and the memory, not the answers."""
    seed: int = Field(default=0, ge=0)
    """Seed of the drawing; every question has random numbers of its own, whatever batch it is in."""


class JudgeSection(Section):
    """A language model at an OpenAI-compatible URL that rates the answers by a rubric.

    The key of an endpoint is read from SEVPEFT_JUDGE_API_KEY of the environment and from nowhere else: a recipe that
    could name the variable could send any secret of the environment to any host.
    """

    model: str | None = Field(default=None, min_length=1)
    """Name by which the endpoint knows the model."""
    url: str | None = None
    """Base URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; all answers are sent there."""
    rubric: str | None = Field(default=None, min_length=1)
    """YAML file of another rubric than the one that comes with sevpeft."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds that the endpoint has for one reply."""
    concurrency: int = Field(default=4, ge=1, le=256)
    """Requests under way at once."""
    max_tokens: int = Field(default=512, ge=16)
    """Longest reply, in tokens; a model that thinks before it answers needs several thousand."""

    @field_validator("url")
    @classmethod
    def _plain_base_url(cls, url: str | None) -> str | None:
        # The value is never repeated: it may hold a password.
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            sound = False
        if not sound or any(character.isspace() for character in url):
            raise ValueError("is no URL; write one such as http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError(
                f"holds more than host and path; leave user, password and parameters out, and put the key into the "
                f"environment variable {JUDGE_KEY}"
            )
        return url.rstrip("/")

    @model_validator(mode="after")
    def _judges(self) -> JudgeSection:
        if self.url and not self.model:
            raise ValueError("names a url and no model; add evaluation.judge.model, the name that the endpoint knows")
        if not self.url:
            raise ValueError("names no judge; add evaluation.judge.url and evaluation.judge.model, or leave it out")
        return self


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
    judge: JudgeSection | None = None
    """A language model that rates the answers by a rubric; null, the default, asks none and sends nothing."""
