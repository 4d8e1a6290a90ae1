"""Turns questions into answers of a loaded model: batched, left-padded, and with one cap on the length for every arm.

The prompt is the training's own. A row's answer does not depend on the batch that it is in: padding is hidden behind
the attention mask (an architecture that cannot do that answers prompts of one length together, or each alone), and a
sampled answer draws from random numbers that belong to the row's id. So a resumed or limited evaluation gives the same
answers, to the rounding of the device: in float32 greedy answers are equal token for token, in bfloat16 most are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
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
from sevpeft.evaluation.padding import Together, possible_batches
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.modeling.prompts import Prompt
from sevpeft.training.data import shortened_prompt

# Tokens of padding that a batch may hold for every token of an answer: one more batch means that many more steps, and
# measured on a CPU, where a step mostly reads the weights, a step of a batch costs as much as reading 32 tokens.
_PADDING = 32


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
    on_slow: Callable[[str], None] | None = None,
) -> Iterator[list[Prediction]]:
    """Answers the rows' questions, longest first, so that a lack of memory shows at once.

    Args:
        model: with the adapter that is to answer, or with none; dropout is off while it answers.
        on_batch: gets the number of rows after every batch.
        on_slow: gets one sentence where not all prompts may share a batch.

    Yields:
        The predictions of a batch, in an order of its own: join them to the rows by id.

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
    padding = _PADDING * settings.max_new_tokens
    try:
        with _own_settings(model):
            together = _together(model, prompt, settings, on_slow) if min(size, len(rows)) > 1 else "none"
            while waiting:
                batch = next_batch(waiting, lengths, size, together, padding)
                try:
                    answers = _answers(model, prompt, {rows.ids[i]: prompts[i] for i in batch}, settings)
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        raise RunError(
                            "The GPU's memory is full with a single question; lower generation.max_new_tokens, or "
                            "evaluate on a GPU with more memory. Finished answers are kept."
                        ) from error
                    answers = None
                if answers is None:  # out here nothing holds the memory any more
                    size = len(batch) // 2
                    torch.cuda.empty_cache()
                    continue
                waiting = waiting[len(batch) :]
                if on_batch is not None:
                    on_batch(len(batch))
                yield [
                    prediction(rows.ids[i], tokens, prompt, lost[i]) for i, tokens in zip(batch, answers, strict=True)
                ]
    finally:
        model.train(was_training)


def next_batch(order: list[int], lengths: list[int], size: int, together: Together, padding: int) -> list[int]:
    """The rows to answer next, at most `size` from the beginning of the order, which goes from long to short.

    Args:
        padding: tokens of padding that the batch may hold.
    """
    longest, count = lengths[order[0]], 1
    while count < min(size, len(order)) and together != "none":
        padding -= longest - lengths[order[count]]
        if padding < 0 or (together == "one length" and lengths[order[count]] != longest):
            break
        count += 1
    return order[:count]


def _together(
    model: PreTrainedModel, prompt: Prompt, settings: GenerationSettings, on_slow: Callable[[str], None] | None
) -> Together:
    together, reason = possible_batches(model, prompt.tokenizer.pad_token_id, prompt.end_id)
    if together == "any" and settings.repetition_penalty != 1:
        together, reason = "one length", "generation.repetition_penalty would count padding as text"
    if reason and on_slow is not None:
        how = "one at a time" if together == "none" else "in batches of one prompt length"
        on_slow(f"Questions are answered {how}, which is slower: {reason}.")
    return together


@torch.no_grad()
def _answers(
    model: PreTrainedModel, prompt: Prompt, prompts: dict[str, list[int]], settings: GenerationSettings
) -> list[list[int]]:
    """The tokens of the answers, with the end token where it came; prompts are row id → tokens."""
    pad, longest = prompt.tokenizer.pad_token_id, max(map(len, prompts.values()))
    padded = [[pad] * (longest - len(row)) + row for row in prompts.values()]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts.values()]
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        logits_processor=_processors(list(prompts), settings),
        generation_config=GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,  # a processor draws, so that the drawing belongs to the row
            num_beams=1,
            repetition_penalty=settings.repetition_penalty,
            use_cache=True,
            eos_token_id=prompt.end_id,
            pad_token_id=pad,
        ),
    )
    # After its end a row is padded until the last of the batch has ended.
    return [
        answer[: answer.index(prompt.end_id) + 1] if prompt.end_id in answer else answer
        for answer in output[:, longest:].tolist()
    ]


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


def _processors(ids: list[str], settings: GenerationSettings) -> LogitsProcessorList:
    if not settings.do_sample:
        return LogitsProcessorList()
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return LogitsProcessorList([*warpers, SeededDraw(ids, settings.seed, settings.max_new_tokens)])


class SeededDraw(LogitsProcessor):
    """Draws one token for every row by its probability, and leaves nothing else to choose.

    Transformers' own sampling takes the random numbers of a batch from one stream, so that a row's answer would depend
    on its neighbors. Here row i has a stream of its own, seeded with its id, and a token is the first at which the
    cumulated probability passes the row's next uniform number.

    Args:
        ids: of the batch's rows.
        steps: tokens that an answer has at most.
    """

    def __init__(self, ids: list[str], seed: int, steps: int) -> None:
        self.uniform = torch.from_numpy(np.stack([row_stream(identity, seed).random(steps) for identity in ids]))
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulated = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        drawn = self.uniform[:, self.step, None].to(scores.device) * cumulated[:, -1:]
        self.step += 1
        chosen = torch.searchsorted(cumulated, drawn, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def row_stream(identity: str, seed: int) -> np.random.Generator:
    """The random numbers of a row: the same in every batch, process and arm, so that arms are compared pairwise."""
    return np.random.default_rng(row_seed(identity, seed))


def row_seed(identity: str, seed: int) -> int:
    """63 bits from a row's id and the seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {identity}".encode(), digest_size=8).digest(), "big") >> 1
