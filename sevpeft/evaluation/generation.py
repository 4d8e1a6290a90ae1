"""Turns questions into answers of a loaded model: batched, left-padded, and with one cap on the length for every arm.

The prompt is the training's own. A row's answer does not depend on the batch that it is in: padding is hidden behind
the attention mask (an architecture that cannot do that answers prompts of one length together, or each alone), and a
sampled answer draws from random numbers that belong to the row's id. So a resumed or limited evaluation gives the same
answers, to the rounding of the device: in float32 greedy answers are equal token for token, in bfloat16 most are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sevpeft.errors import ModelError, RunError
from sevpeft.evaluation.answer_cache import can_join
from sevpeft.evaluation.padding import Together, answered_together
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.under_way import AnswersUnderWay
from sevpeft.modeling.prompts import Prompt
from sevpeft.training.encoding import shortened_prompt

# Prompts that are read together are at least this part of the longest: padding costs as much as reading does.
_ABOUT_AS_LONG = 0.85
# The part of a batch that must be free before others join, because reading few is slow on a GPU.
_FREE = 0.25


@dataclass(frozen=True)
class GenerationSettings:
    """The recipe's section `generation`, by the names of transformers' GenerationConfig."""

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    per_device_eval_batch_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Prediction:
    """An answer.

    Attributes:
        text: without control tokens.
        token_ids: with the end token, where one came.
        truncated: none came, so that the cap on the length cut the answer off.
        lost_words: of the question, which did not fit the model's context.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    truncated: bool
    lost_words: int = 0

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


def generate(
    model: PreTrainedModel,
    prompt: Prompt,
    rows: EvaluationRows,
    settings: GenerationSettings,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[list[Prediction]]:
    """Answers the rows' questions, longest first, so that a lack of memory shows at once.

    Args:
        model: with the adapter that is to answer, or with none; dropout is off while it answers.
        on_batch: told the number of rows after every batch.

    Yields:
        The predictions that are ready, in an order of its own: join them to the rows by id.

    Raises:
        ModelError: max_new_tokens leave no room for a question.
        RunError: one row alone does not fit the GPU's memory.
    """
    prompts, lost = fitting_prompts(rows, prompt, context_length(model.config), settings.max_new_tokens)
    lengths = [len(ids) for ids in prompts]
    waiting = sorted(range(len(rows)), key=lambda i: (-lengths[i], rows.ids[i]))
    was_training = model.training
    model.eval()
    size = settings.per_device_eval_batch_size
    try:
        with _own_settings(model):
            together: Together = (
                "none" if size == 1 else answered_together(model, prompt.tokenizer.pad_token_id, prompt.end_id)
            )
            if together == "any" and settings.repetition_penalty != 1:
                together = "one length"  # padding would be taken for something that was said
            joining = together == "any" and can_join(model)
            under_way = _nothing_yet(model, prompt, rows.ids, settings)
            while waiting or len(under_way):
                ended: dict[int, list[int]] = {}
                asked = list(under_way.rows)
                full = False
                try:
                    while waiting and (not len(under_way) or joining) and size - len(under_way) >= max(1, _FREE * size):
                        batch = next_batch(waiting, lengths, size - len(under_way), together, joining=joining)
                        asked = [*under_way.rows, *batch]
                        ended |= under_way.join(batch, [prompts[i] for i in batch])
                        waiting = waiting[len(batch) :]
                    ended |= under_way.advance()
                except torch.OutOfMemoryError as error:
                    if len(asked) == 1:
                        raise RunError(
                            "The GPU's memory is full with a single question; lower generation.max_new_tokens, or "
                            "evaluate on a GPU with more memory. Finished answers are kept."
                        ) from error
                    full = True
                if full:  # out here nothing holds the memory any more
                    size = len(asked) // 2
                    waiting = [i for i in [*asked, *waiting] if i not in ended]
                    waiting = sorted(dict.fromkeys(waiting), key=lambda i: (-lengths[i], rows.ids[i]))
                    under_way = under_way.anew()
                    torch.cuda.empty_cache()
                done = [prediction(rows.ids[i], tokens, prompt, lost[i]) for i, tokens in ended.items()]
                if done:
                    if on_batch is not None:
                        on_batch(len(done))
                    yield done
    finally:
        model.train(was_training)


def next_batch(order: list[int], lengths: list[int], size: int, together: Together, *, joining: bool) -> list[int]:
    """The rows to read next, at most `size` from the beginning of the order, which goes from long to short.

    Args:
        joining: others can be read later and join, so that these need not have all lengths.
    """
    if together == "none":
        return order[:1]
    if together == "one length":
        return [i for i in order[:size] if lengths[i] == lengths[order[0]]]
    return [i for i in order[:size] if not joining or lengths[i] >= _ABOUT_AS_LONG * lengths[order[0]]]


def context_length(config: PretrainedConfig) -> int | None:
    """Positions that a model has; None when it is not limited by a number of them."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else None


def fitting_prompts(
    rows: EvaluationRows, prompt: Prompt, context: int | None, max_new_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Prompt tokens of every row, and the words that each question lost to fit into the context.

    Raises:
        ModelError: there is no room for a question.
    """
    prompts = prompt.prompt_ids(rows.questions, rows.dialects)
    lost = [0] * len(prompts)
    for i, ids in enumerate(prompts):
        if context is None or len(ids) + max_new_tokens <= context:
            continue
        dialect = rows.dialects[i] if rows.dialects else None
        shorter = shortened_prompt(rows.questions[i], dialect, prompt, context - max_new_tokens)
        if shorter is None:
            raise ModelError(
                f"generation.max_new_tokens={max_new_tokens} leaves no room for a question in the {context:,} "
                "positions of the model; lower it."
            )
        prompts[i], lost[i] = shorter
    return prompts, lost


@contextmanager
def answering_as(model: PreTrainedModel, adapter: str | None) -> Iterator[PreTrainedModel]:
    """The loaded model with this adapter switched on, or with None as the base model that it stands on.

    Args:
        model: a PeftModel; nothing is loaded or reloaded.
    """
    if adapter is None:
        with model.disable_adapter():
            yield model
    else:
        model.set_adapter(adapter)
        yield model


def prediction(identity: str, answer: list[int], prompt: Prompt, lost_words: int = 0) -> Prediction:
    """The prediction that the tokens of an answer amount to."""
    text = prompt.tokenizer.decode(answer, skip_special_tokens=True).strip()
    return Prediction(identity, text, tuple(answer), answer[-1:] != [prompt.end_id], lost_words)


@contextmanager
def _own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Keeps out the model's own generation_config.json, whose penalties and limits would differ from arm to arm."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    theirs = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = theirs


def _nothing_yet(
    model: PreTrainedModel, prompt: Prompt, ids: list[str], settings: GenerationSettings
) -> AnswersUnderWay:
    return AnswersUnderWay(
        model,
        pad_id=prompt.tokenizer.pad_token_id,
        end_id=prompt.end_id,
        max_new_tokens=settings.max_new_tokens,
        choosing=lambda rows, said: _processors([ids[i] for i in rows], said, settings),
        repetition_penalty=settings.repetition_penalty,
    )


def _processors(ids: list[str], said: list[int], settings: GenerationSettings) -> LogitsProcessorList:
    if not settings.do_sample:
        return LogitsProcessorList()
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return LogitsProcessorList([*warpers, SeededDraw(ids, settings.seed, settings.max_new_tokens, said)])


class SeededDraw(LogitsProcessor):
    """Draws one token for every row by its probability, and leaves nothing else to choose.

    Transformers' own sampling takes the random numbers of a batch from one stream, so that a row's answer would depend
    on its neighbours. Here row i has a stream of its own, seeded with its id, and a token is the first at which the
    cumulated probability passes the row's next uniform number.

    Args:
        ids: of the batch's rows.
        steps: tokens that an answer has at most.
        said: tokens that each row has drawn before.
    """

    def __init__(self, ids: list[str], seed: int, steps: int, said: Sequence[int] | None = None) -> None:
        self.uniform = torch.from_numpy(np.stack([row_stream(identity, seed).random(steps) for identity in ids]))
        self.step = torch.tensor(said or [0] * len(ids))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulated = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        drawn = self.uniform.gather(1, self.step[:, None]).to(scores.device) * cumulated[:, -1:]
        self.step += 1
        chosen = torch.searchsorted(cumulated, drawn, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def row_stream(identity: str, seed: int) -> np.random.Generator:
    """The random numbers of a row: the same in every batch, process and arm, so that arms are compared pairwise."""
    return np.random.default_rng(row_seed(identity, seed))


def row_seed(identity: str, seed: int) -> int:
    """63 bits from a row's id and the seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {identity}".encode(), digest_size=8).digest(), "big") >> 1
