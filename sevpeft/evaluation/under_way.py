"""Turns prompts into the tokens of their answers: a batch that rows leave when they have ended, and others then join.

Questions and answers differ in length by a factor of ten. A fixed batch would wait for its longest answer and read as
much padding as its shortest question lacks; here prompts are read beside prompts of about their length, and go on
together with whatever is under way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel

from sevpeft.evaluation.answer_cache import joined, roomy_cache, without_columns

# After so many tokens rows leave and join.
_STRIDE = 8


class AnswersUnderWay:
    """Rows of which the answer has begun.

    Args:
        choosing: how tokens are chosen, from the rows and from how many tokens each has said; greedily if it adds
            nothing.
        max_new_tokens: of every answer.
        repetition_penalty: as transformers' GenerationConfig has it.

    Attributes:
        rows: in the order of the batch; `sequences` (B, T), `mask` (B, T) and `said` have the same order.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        end_id: int,
        max_new_tokens: int,
        choosing: Callable[[list[int], list[int]], LogitsProcessorList],
        repetition_penalty: float = 1.0,
    ) -> None:
        self.model, self.pad_id, self.end_id, self.max_new_tokens = model, pad_id, end_id, max_new_tokens
        self.choosing, self.repetition_penalty = choosing, repetition_penalty
        self.rows: list[int] = []
        self.said: list[list[int]] = []
        self.cache: Cache | None = None
        self.sequences = self.mask = torch.empty((0, 0), dtype=torch.long, device=model.device)

    def __len__(self) -> int:
        return len(self.rows)

    def anew(self) -> AnswersUnderWay:
        """With the same settings, and no row."""
        return AnswersUnderWay(
            self.model,
            pad_id=self.pad_id,
            end_id=self.end_id,
            max_new_tokens=self.max_new_tokens,
            choosing=self.choosing,
            repetition_penalty=self.repetition_penalty,
        )

    def join(self, rows: list[int], prompts: list[list[int]]) -> dict[int, list[int]]:
        """Reads prompts and says the first token of each; returns the answers that ended with it, by row."""
        new = self.anew()
        longest, device = max(map(len, prompts)), self.model.device
        new.rows, new.said, new.cache = list(rows), [[] for _ in rows], roomy_cache(self.model)
        new.sequences = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in prompts], device=device)
        new.mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
        ended = new._say(1)
        if not len(self):
            self.sequences, self.mask, self.cache = new.sequences, new.mask, new.cache
        elif len(new):
            assert self.cache is not None and new.cache is not None
            length = max(self.mask.shape[1], new.mask.shape[1])
            self.cache = joined(self.cache, new.cache, length - 1)  # the last token has not been read yet
            self.sequences = _stacked(self.sequences, new.sequences, length, self.pad_id)
            self.mask = _stacked(self.mask, new.mask, length, 0)
        self.rows += new.rows
        self.said += new.said
        return ended

    def advance(self) -> dict[int, list[int]]:
        """Says some tokens more; returns the answers that have ended, by row, with the end token where it came."""
        return self._say(min(_STRIDE, self.max_new_tokens - max(map(len, self.said)))) if self.rows else {}

    @torch.no_grad()
    def _say(self, steps: int) -> dict[int, list[int]]:
        output = self.model.generate(
            input_ids=self.sequences,
            attention_mask=self.mask,
            past_key_values=self.cache,
            logits_processor=self.choosing(self.rows, [len(tokens) for tokens in self.said]),
            generation_config=GenerationConfig(
                max_new_tokens=steps,
                do_sample=False,  # a processor draws, so that the drawing belongs to the row
                num_beams=1,
                repetition_penalty=self.repetition_penalty,
                use_cache=True,
                eos_token_id=self.end_id,
                pad_token_id=self.pad_id,
                return_dict_in_generate=True,
            ),
        )
        new = output.sequences[:, self.sequences.shape[1] :]
        for tokens, more in zip(self.said, new.tolist(), strict=True):
            # After its end a row is padded until the last of the batch has ended.
            tokens += more[: more.index(self.end_id) + 1] if self.end_id in more else more
        self.sequences = output.sequences
        self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=1)
        self.cache = output.past_key_values if isinstance(output.past_key_values, Cache) else None
        return self._take_ended()

    def _take_ended(self) -> dict[int, list[int]]:
        over = [tokens[-1:] == [self.end_id] or len(tokens) == self.max_new_tokens for tokens in self.said]
        ended = {row: tokens for row, tokens, is_over in zip(self.rows, self.said, over, strict=True) if is_over}
        if ended:
            going = [n for n, is_over in enumerate(over) if not is_over]
            self.rows, self.said = [self.rows[n] for n in going], [self.said[n] for n in going]
            chosen = torch.tensor(going, dtype=torch.long, device=self.mask.device)
            self.sequences, self.mask = self.sequences[chosen], self.mask[chosen]
            self.cache = _of_rows(self.cache, chosen) if going else None
            # The longest may have left, and all the others be padded for it.
            spare = int(self.mask.argmax(dim=1).min()) if going else 0
            if spare and self.cache is not None and without_columns(self.cache, spare):
                self.sequences, self.mask = self.sequences[:, spare:], self.mask[:, spare:]
        return ended


def _of_rows(cache: Cache | None, chosen: torch.Tensor) -> Cache | None:
    """The cache of the chosen rows; None, which means that the texts are read again, where it cannot be divided."""
    if cache is None or not all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
        return None
    cache.batch_select_indices(chosen)
    return cache


def _stacked(first: torch.Tensor, second: torch.Tensor, length: int, filling: int) -> torch.Tensor:
    """(B + C, length) of (B, ·) and (C, ·), filled up on the left."""
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (length - part.shape[1], 0), value=filling) for part in (first, second)])
