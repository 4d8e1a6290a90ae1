"""Sharing: model cards, chat, web page, translation, merged models, and push to the Hub."""

from pydantic import Field

from sevpeft.recipe import Section


class PushSettings(Section):
    """Settings of a push to the Hub."""

    private: bool | None = None
    """true: only you and people whom you admit can read a new repository; unset: the default of your account."""
    base_model: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id of the base model if the run's is a folder; unset: about.base_model of the recipe."""
    license: str | None = Field(default=None, min_length=2)
    """License of the base model, after you have read it; unset: about.license of the recipe."""
    examples: bool = False
    """Publishes the consultations of prompt.examples, which the chat template contains."""
    parent_commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{7,40}$")
    """Commit on the Hub that you have inspected; the adapter is committed on top of it."""
