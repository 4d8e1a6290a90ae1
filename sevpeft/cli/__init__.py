"""The verbs of the command line; importing a module of verbs adds them to the app."""

from sevpeft.cli import (  # noqa: F401
    annotating,
    classifying,
    comparing,
    evaluating,
    merging,
    preparing,
    reporting,
    training,
)
from sevpeft.cli.application import main

__all__ = ["main"]
