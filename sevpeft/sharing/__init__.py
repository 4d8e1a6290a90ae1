"""Sharing: model cards, chat, a merged model that other programs serve, and an adapter on the Hub."""

from __future__ import annotations

from pydantic import Field

from sevpeft.recipe import Section


class PushSettings(Section):
    """How an adapter is put on the Hub."""

    private: bool | None = None
    """true: only you and those you admit can read a new repository; unset, as your account has it."""
    base_model: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id of the base model, where the run's is a folder; unset, about.base_model of the recipe."""
    license: str | None = Field(default=None, min_length=2)
    """License of the base model, once you have read it; unset, about.license of the recipe."""
    examples: bool = False
    """Publishes the consultations of prompt.examples, which stand in the chat template."""
    parent_commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{7,40}$")
    """Commit on the Hub that you have looked at: the adapter is put on top of it."""
