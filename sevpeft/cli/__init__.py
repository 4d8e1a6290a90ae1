"""The verbs of the command line; importing a module of verbs adds them to the app."""

from sevpeft.cli import data, evaluation, sharing, training  # noqa: F401
from sevpeft.cli.application import main

__all__ = ["main"]
