"""Cuts a model to its upper layers: what the lower ones make of known rows is computed once.

Where only the upper layers have an adapter, the lower ones give the same states in every step, as they have no dropout.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel


class KnownStates(torch.nn.Module):
    """In place of the token embeddings: ids (B, T) of known rows, padded on either side → their states (B, T, H)."""

    def __init__(self, states: dict[tuple[int, ...], torch.Tensor], pad: int) -> None:
        super().__init__()
        self.states, self.pad = states, pad

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first = next(iter(self.states.values()))
        found = torch.zeros(*ids.shape, first.shape[-1], dtype=first.dtype)
        for number, row in enumerate(ids.tolist()):
            begin, end = 0, len(row)
            while row[begin] == self.pad:
                begin += 1
            while end and tuple(row[begin:end]) not in self.states and row[end - 1] == self.pad:
                end -= 1  # a row may end in the pad token itself, where that is the end of a text
            found[number, begin:end] = self.states[tuple(row[begin:end])]
        return found.to(ids.device)


@torch.no_grad()
def keep_upper_layers(
    model: PreTrainedModel, rows: Iterable[Sequence[int]], count: int, pad: int, kept: Path | None = None
) -> None:
    """Leaves the last `count` layers of a causal language model, for these rows of token ids alone.

    `kept`: a safetensors file that has the states of these very rows, or gets them.
    """
    text, states, rows = model.base_model, dict[tuple[int, ...], torch.Tensor](), [*dict.fromkeys(map(tuple, rows))]
    cut = len(text.layers) - count
    if kept and kept.exists():
        found = load_file(kept)
        states = {ids: found[f"{number:06}"] for number, ids in enumerate(rows)}
    captured: list[torch.Tensor] = []
    hook = text.layers[cut].register_forward_pre_hook(
        lambda module, args, kwargs: captured.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model.eval()
    for ids in rows:
        if ids not in states:
            text(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
            states[ids] = captured.pop()[0].cpu()
    hook.remove()
    if kept and not kept.exists():
        partial = kept.with_name(f"{kept.name}.{os.getpid()}")
        save_file({f"{number:06}": states[ids].contiguous() for number, ids in enumerate(rows)}, partial)
        partial.replace(kept)  # two processes may both have made it
    text.layers = text.layers[cut:]
    text.embed_tokens = KnownStates(states, pad)
    config = model.config.get_text_config()
    config.num_hidden_layers, config.tie_word_embeddings, config.use_cache = count, False, False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[cut:]
