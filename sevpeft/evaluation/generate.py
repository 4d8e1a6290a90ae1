"""Generated answers of a loaded model, and the likelihood that it gives to reference answers.

The prompt is that of the training. A row's answer depends on its batch by rounding only, which changes no greedy answer
in float32. Padding is masked; a model that does not support that answers one question at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sevpeft.data.columns import trained_turns
from sevpeft.errors import ModelError
from sevpeft.modeling import likelihood
from sevpeft.modeling.loading import learned_positions
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe.schema import GenerationSection

# Padding tokens of a batch per token of an answer. Measured on a CPU, where a step mostly reads the weights: a step of
# another batch costs as much as reading 32 tokens.
_PADDING = 32
# Tokens of the long prompt, the short prompt and the answer in `batching_problem`.
_LONG, _SHORT, _STEPS = 24, 9, 3
# Root mean squares over a vocabulary vary little. Measured in three precisions: harmless shapes differ by up to 1.6
# yardsticks, and the weakest fault by 17.
_YARDSTICKS = 4.0
# Cache: bare model → result of `batching`. An adapter changes each token by itself, so it needs no measurement.
_batching_of: WeakIdKeyDictionary = WeakIdKeyDictionary()
_LISTS = ("ids", "questions", "references", "dialects", "turns", "severities")  # columns of the rows


@dataclass(frozen=True)
class EvaluationRows:
    """Rows to evaluate on, n of them. They are joined to other tables by id, never by position.

    Attributes:
        strata: (n,) int64, position in SEVERITIES of the most probable severity, -1 if unknown.
        groups: (n,) int64, equal for rows with the same question, which are no independent evidence.
        fingerprint: hash of the bytes of the source.
        leaks: questions that are in two splits of the data.
        severities, severities_by: severities (n,) in the prompts, and their source; None without them.
    """

    ids: list[str]
    questions: list[str]
    references: list[str]
    dialects: list[str | None] | None  # None if the data has no dialect column
    strata: np.ndarray
    groups: np.ndarray
    source: str
    fingerprint: str
    leaks: int = 0
    turns: list[str] | None = None  # as in the table; None if all rows are single exchanges
    severities: list[str | None] | None = None
    severities_by: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: Sequence[int] | np.ndarray) -> EvaluationRows:
        """The rows at these positions, in their order."""
        positions = np.asarray(positions, dtype=np.int64)
        lists = {name: getattr(self, name) for name in _LISTS}
        taken: dict[str, Any] = {name: values and [values[i] for i in positions] for name, values in lists.items()}
        return replace(self, strata=self.strata[positions], groups=self.groups[positions], **taken)

    @classmethod
    def joined(cls, parts: Sequence[EvaluationRows]) -> EvaluationRows:
        """The rows of several folds, one after the other; no question is in two folds."""
        columns = {name: [getattr(one, name) for one in parts] for name in _LISTS}
        lists: dict[str, Any] = {name: None if None in of else [*chain(*of)] for name, of in columns.items()}
        starts = np.cumsum([0, *(1 + one.groups.max() for one in parts)])
        groups = np.concatenate([one.groups + start for one, start in zip(parts, starts, strict=False)])
        return replace(parts[0], strata=np.concatenate([one.strata for one in parts]), groups=groups, **lists)

    def limited(self, number: int | None, seed: int = 0) -> EvaluationRows:
        """A seeded random sample of at most `number` rows, in the rows' order; a larger one contains a smaller one."""
        if number is None or number >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:number]))

    def content_hash(self) -> str:
        """SHA-256 of the questions and answers, independent of the order of the rows."""
        unknown = [None] * len(self)
        more = [self.turns] if self.turns else []
        rows = sorted(zip(self.ids, self.questions, self.references, self.dialects or unknown, *more, strict=True))
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def generate(
    model: PreTrainedModel,
    prompt: Prompt,
    rows: EvaluationRows,
    settings: GenerationSection,
    on_slow: Callable[[str], None],
    *,
    references: Mapping[str, Sequence[str]] | None = None,
    max_length: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Answers the rows' questions, longest first.

    Args:
        model: in evaluation mode. Its own generation_config.json is ignored, because its penalties and limits would
            differ between arms.
        on_slow: called with one sentence if questions cannot share a batch.
        references: name → (n,) texts, of which `reference_nll` would give the likelihood with this `max_length`. Where
            the model allows it and the prompt is the same, the prompt is read once for them and the answer.

    Yields:
        A batch of {id, prediction, token_ids (with the end token), truncated (no end token), lost_words (words of the
        question that did not fit the context), nll (name → {nll, tokens}, without those not measured)}, not in the
        order of the rows. A RunError if a single row does not fit the GPU's memory.
    """
    size, most = settings.per_device_eval_batch_size, settings.max_new_tokens
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompts, lost = fitting_prompts(rows, prompt, context, [most] * len(rows))
    if not all(prompts):
        problem = f"leaves no room for a question in the model's {context:,} positions"
        raise ModelError(f"generation.max_new_tokens={most} {problem}; lower it.")
    likelihood.bare(model).generation_config = GenerationConfig()
    by_length = False
    if min(size, len(rows)) > 1:
        by_length, problem = batching(model, prompt.end_id)
        if problem:
            size = 1
            on_slow(f"Questions are answered one at a time, which is slower: {problem}.")
    scored = {name: prompt.answer_ids(texts) for name, texts in (references or {}).items()}
    room = min(filter(None, (max_length, learned_positions(model.config))), default=float("inf"))

    def compute(batch: list[int]) -> tuple[list[list[int]], list[dict[str, Any]]]:
        nll, more = [dict[str, Any]() for _ in batch], dict[str, Any]()
        if by_length and len(batch) > 1 and min(len(prompts[i]) for i in batch) > 1:
            states = likelihood.read_by_length(model, [prompts[i] for i in batch])
            for name, of in scored.items():
                fit = [n for n, i in enumerate(batch) if not lost[i] and len(prompts[i]) + len(of[i]) <= room]
                found = likelihood.nll_after(model, states, [(n, prompts[batch[n]], of[batch[n]]) for n in fit])
                for n, (nats, _) in zip(fit, found, strict=True):
                    nll[n][name] = {"nll": nats, "tokens": len(of[batch[n]])}
            more["cache"] = likelihood.cache_of(model, states)
        return answer_tokens(model, prompt, {rows.ids[i]: prompts[i] for i in batch}, settings, **more), nll

    for batch, found in likelihood.run_batches(
        range(len(rows)),
        list(map(len, prompts)),
        compute,
        size=lambda _: size,
        padding=likelihood.KEPT if by_length else _PADDING * most,
        remedy="lower generation.max_new_tokens",
    ):
        yield [
            {
                "id": rows.ids[i],
                "prediction": prompt.decode(answer),
                "token_ids": answer,
                "truncated": answer[-1:] != [prompt.end_id],
                "lost_words": lost[i],
                "nll": nll,
            }
            for i, answer, nll in zip(batch, *found, strict=True)
        ]


def fitting_prompts(
    rows: EvaluationRows, prompt: Prompt, limit: int | None, answer_lengths: Sequence[int]
) -> tuple[list[list[int]], list[int]]:
    """Prompt tokens (n,) of the rows, and the words (n,) that each question lost to fit, as in the training.

    `limit`: maximum of prompt tokens plus `answer_lengths` (n,). If the answer leaves no room, the prompt is empty.
    """
    columns = zip(rows.questions, rows.references, rows.turns or [""] * len(rows), strict=True)
    last = [list(trained_turns(*row))[-1] for row in columns]  # the last question, and the exchanges before it
    questions, earlier = [turn[0] for turn in last], [turn[3] for turn in last]
    prompts, lost = list(prompt.prompt_ids(questions, rows.dialects, rows.severities, earlier)), [0] * len(rows)
    for i, length in enumerate(answer_lengths):
        if limit is not None and len(prompts[i]) + length > limit:
            dialect, severity = (column[i] if column else None for column in (rows.dialects, rows.severities))
            shorter = prompt.shortened(limit - length, questions[i], dialect, severity, earlier[i])
            prompts[i], lost[i] = shorter or ([], 0)
    return prompts, lost


@torch.no_grad()
def answer_tokens(
    model: PreTrainedModel,
    prompt: Prompt,
    prompts: dict[str, list[int]],
    settings: GenerationSection,
    **more: Any,
) -> list[list[int]]:
    """Tokens of the answers, with their end token. `prompts`: row id → tokens; `more`: passed to `model.generate`."""
    longest = max(map(len, prompts.values()))
    # Padded with a token of the row itself, because a repetition penalty applies to masked tokens too.
    padded = [row[:1] * (longest - len(row)) + row for row in prompts.values()]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts.values()]
    most, warpers = settings.max_new_tokens, LogitsProcessorList()
    if settings.do_sample:
        warpers.append(TemperatureLogitsWarper(settings.temperature))
        warpers += [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        warpers += [TopPLogitsWarper(settings.top_p), SeededDraw(list(prompts), settings.seed, most)]
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        logits_processor=warpers,
        # Greedy, because `SeededDraw` draws the token and leaves no other.
        generation_config=_config(prompt.end_id, most, repetition_penalty=settings.repetition_penalty),
        **more,
    )
    # Tokens after a row's end token are padding, until the last row of the batch ends.
    return [
        answer[: answer.index(prompt.end_id) + 1] if prompt.end_id in answer else answer
        for answer in output[:, longest:].tolist()
    ]


class SeededDraw(LogitsProcessor):
    """Draws one token for every row by its probability, and masks all others.

    Transformers samples a batch from one random stream, so that a row's answer depends on its neighbors. Here each row
    has a stream seeded with its id, and gets the first token whose cumulative probability exceeds the next number.
    """

    def __init__(self, ids: list[str], seed: int, steps: int) -> None:
        seeds = [[seed, *hashlib.sha256(identity.encode()).digest()] for identity in ids]
        self.uniform = torch.from_numpy(np.stack([np.random.default_rng(one).random(steps) for one in seeds]))
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        drawn = self.uniform[:, self.step, None].to(scores.device) * cumulative[:, -1:]
        self.step += 1
        chosen = torch.searchsorted(cumulative, drawn, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def reference_nll(
    model: PreTrainedModel, prompt: Prompt, rows: EvaluationRows, *, max_length: int | None
) -> Iterator[list[dict[str, Any]]]:
    """Negative log-likelihood of every row's reference answer, given its question, as in the validation of a training.

    `max_length`: as in training; only questions are shortened to it.

    Yields:
        A batch of {id, nll (nats of the answer with its end token), tokens}. Rows whose answer leaves no room for the
        question come first, with None and 0. A RunError if a single row does not fit the GPU's memory.
    """
    answers = prompt.answer_ids(rows.references)
    limit = min(filter(None, (max_length, learned_positions(model.config))), default=None)
    prompts, _ = fitting_prompts(rows, prompt, limit, [len(answer) for answer in answers])
    if unfit := [identity for identity, ids in zip(rows.ids, prompts, strict=True) if not ids]:
        yield [{"id": identity, "nll": None, "tokens": 0} for identity in unfit]
    fit, remedy = [i for i, ids in enumerate(prompts) if ids], "lower training.max_length in another run"
    for batch, found in likelihood.nll_of_pairs(model, [(prompts[i], answers[i]) for i in fit], remedy):
        values = zip((fit[n] for n in batch), found, strict=True)
        yield [{"id": rows.ids[i], "nll": nats, "tokens": len(answers[i])} for i, (nats, _) in values]


def batching(model: PreTrainedModel, end_id: int) -> tuple[bool, str]:
    """Whether prompts can be read by length, and the reason why questions cannot share a batch, or ""."""
    if (base := likelihood.bare(model)) not in _batching_of:
        by_length = False
        # Convolutions and recurrent states are in caches of other kinds; a model's own code may not know `cache`.
        with suppress(AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            by_length = not batching_problem(model, end_id, by_length=True)
        _batching_of[base] = by_length, "" if by_length else batching_problem(model, end_id)
    return tuple(_batching_of[base])


@torch.no_grad()
def batching_problem(model: PreTrainedModel, end_id: int, *, by_length: bool = False) -> str:
    """The reason why questions cannot share a batch of this model, or "". Measured, because a list of models would age.

    Rounding in bfloat16 changes log-probabilities by a nat between harmless shapes, so no fixed tolerance works.

    - Leaks: the other row and the tokens under the mask are exchanged, in the same shape. The scores must be equal to
      the bit. Mixtures of experts round differently with other tokens in the batch, so theirs may differ by rounding.
    - Positions: a padded row is compared with the row alone. The yardstick is the difference between the row alone,
      answered step by step with a cache, and the row read at once with padding on the right (not attended to).
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(vocabulary // 2, (2, _LONG), generator=generator)
    short = torch.randint(vocabulary // 2, (_SHORT,), generator=generator)
    answer = torch.randint(vocabulary // 2, (_STEPS,), generator=generator)
    answer += answer == end_id  # replaces the end token

    def scores(*others: torch.Tensor, filling: torch.Tensor = short[:0]) -> torch.Tensor:
        """Log-probabilities (1 or 2, steps, V) of the short row; all rows are forced to the same answer.

        The first are those of step after step, the second those of an answer read at once after prompts read by length.
        """
        ids = torch.stack([*others, torch.cat([filling, short])])
        mask = torch.ones_like(ids)
        mask[-1, : len(filling)] = 0
        prompts = [*(other.tolist() for other in others), short.tolist()]
        more, after = dict[str, Any](), list[torch.Tensor]()
        if by_length and others:
            states = likelihood.read_by_length(model, prompts, int([*filling, 0][-1]))
            cache = likelihood.cache_of(model, states, [*range(len(prompts))])
            after = [*likelihood.answer_logits(model, prompts, [answer.tolist()] * len(prompts), cache)[0][-_STEPS:]]
            more["cache"] = likelihood.cache_of(model, states)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            prefix_allowed_tokens_fn=lambda _, seen: [int(answer[len(seen) - ids.shape[1]])],
            # output_logits: as the model returns them, before the answer is forced.
            generation_config=_config(end_id, _STEPS, output_logits=True, return_dict_in_generate=True),
            **more,
        )
        logits = torch.stack([*(step[-1] for step in output.logits), *after])
        return torch.log_softmax(logits.float(), dim=-1).reshape(-1, _STEPS, vocabulary)

    # Filled with tokens of the row itself: other tokens can overflow in float16.
    fillings = short[:1].repeat(_LONG - _SHORT), short.flip(0).repeat(2)[: _LONG - _SHORT]
    alone, padded = scores(), scores(first, filling=fillings[0])
    leak, shift = _rms(padded - scores(second, filling=fillings[1])), _rms(padded - alone)
    beside = [scores(other[:_SHORT]) for other in (first, second, first.flip(0))]
    rounding = max(_rms(beside[0] - other) for other in beside[1:])
    ids = torch.cat([short, answer[:-1], fillings[0]])[None].to(model.device)
    mask = (torch.arange(ids.shape[1], device=model.device) < _SHORT + _STEPS - 1)[None].long()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, _SHORT - 1 :][:_STEPS].float()
    yardstick = max(_rms(torch.log_softmax(logits, dim=-1) - alone), torch.finfo(model.dtype).eps * _rms(logits))
    allowed = _YARDSTICKS * yardstick
    # The comparisons are false for NaN, so that NaN is a problem.
    if not rounding <= allowed:
        return f"another row in the batch changes log-probabilities by {rounding:.2g} nats"
    if shift <= allowed and (leak == 0 or (rounding > 0 and leak <= allowed)):
        return ""
    return f"padding changes log-probabilities by {max(leak, shift):.2g} nats, rounding by {allowed:.1g} at most"


def _rms(values: torch.Tensor) -> float:
    return float(values.pow(2).mean().sqrt())


def _config(end_id: int, max_new_tokens: int, **more: Any) -> GenerationConfig:
    """Settings of greedy generation. The end token is also the padding: tokens after a row's end token are dropped."""
    fixed = {"do_sample": False, "num_beams": 1, "use_cache": True, "eos_token_id": end_id, "pad_token_id": end_id}
    return GenerationConfig(max_new_tokens=max_new_tokens, **fixed, **more)
