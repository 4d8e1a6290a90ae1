"""A key-value cache that has room for the next tokens and for other rows, so that no step copies all steps before it.

Transformers' own cache is concatenated anew with every token, in every layer; for a batch of answers on a CPU that
copying is a fifth of the work. What is kept here is the same numbers, in a buffer that is larger than they are.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Tokens of room that are added at a time.
_ROOM = 64


class RoomyLayer(DynamicLayer):
    """A layer of full attention; keys and values (B, heads, T, head size) are views of buffers with more room."""

    _key_room: torch.Tensor
    _value_room: torch.Tensor
    _given: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the states of new tokens and returns those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        before = self.keys.shape[-2]
        now = before + key_states.shape[-2]
        # Whoever chose rows or cut the end has put other tensors here; they are taken over as they are.
        if self.keys is not self._given or now > self._key_room.shape[-2]:
            self._key_room, self._value_room = (_with_room(held, now) for held in (self.keys, self.values))
        self._key_room[..., before:now, :] = key_states
        self._value_room[..., before:now, :] = value_states
        self.keys, self.values = self._key_room[..., :now, :], self._value_room[..., :now, :]
        self._given = self.keys
        return self.keys, self.values


def _with_room(held: torch.Tensor, length: int) -> torch.Tensor:
    buffer = held.new_empty((*held.shape[:-2], length + _ROOM, held.shape[-1]))
    buffer[..., : held.shape[-2], :] = held
    return buffer


def roomy_cache(model: PreTrainedModel) -> Cache | None:
    """The cache that transformers would make for the model, with room in its layers of full attention.

    None where the architecture brings a cache of its own.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not base._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
    return cache


def can_join(model: PreTrainedModel) -> bool:
    """Whether rows can join a batch that is under way: every layer keeps all positions, so that padding is a shift."""
    cache = roomy_cache(model)
    if cache is None:
        return False
    kinds = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
    return kinds == {RoomyLayer}


def joined(first: Cache, second: Cache, length: int) -> Cache:
    """The first cache with the rows of the second after its own, both filled up on the left to `length` positions.

    What is filled in must be hidden by the attention mask. Layer by layer, so that one layer is held twice at most.
    """
    for one, other in zip(first.layers, second.layers, strict=True):
        if one.is_initialized:
            one.keys = _stacked(one.keys, other.keys, length)
            one.values = _stacked(one.values, other.values, length)
        other.reset()
    return first


def without_columns(cache: Cache, columns: int) -> bool:
    """Takes away the first columns, which only hold padding; False where the layers are not such as can be cut."""
    if not all(type(layer) is RoomyLayer for layer in cache.layers):
        return False
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., columns:, :], layer.values[..., columns:, :]
    return True


def _stacked(first: torch.Tensor, second: torch.Tensor, length: int) -> torch.Tensor:
    """(B + C, heads, length, head size)."""
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, 0, length - part.shape[-2], 0)) for part in (first, second)])
