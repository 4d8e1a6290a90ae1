"""What can go wrong, as one plain sentence and an exit code.

Every refusal that a user can meet is one of these classes; the command line prints its text without a traceback and
leaves with `exit_code`. A text names the setting, the reason and the remedy, and never quotes a consultation: rows are
named by their number, because errors are copied into tickets.
"""

import re


class SevpeftError(Exception):
    """Refused or failed: the command was understood, but what it met does not allow it."""

    exit_code = 1


class UsageError(SevpeftError):
    """Wrong usage: the command or the recipe has to be written differently."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe cannot be read or holds keys or values that do not exist. May list several mistakes, one a line."""


class DataError(SevpeftError):
    """The consultations cannot be read, or lack what the recipe asks of them."""


class WeightError(SevpeftError, ValueError):
    """Severity probabilities or weights are absent, not finite, negative, or do not form a distribution."""


class ModelError(SevpeftError):
    """The base model, its tokenizer or its adapter cannot be loaded, or cannot do what the recipe asks."""


class UnknownModelError(ModelError):
    """The base model's numbers are not at hand, or say too little, so that nothing can be planned on them."""


class RunError(SevpeftError):
    """The run folder exists already, cannot be written, or does not fit what is asked of it."""


class Interrupted(SevpeftError):
    """Ctrl-C or another signal, in a place where there is more to say than that; leaves with 128 + its number."""

    def __init__(self, sentence: str, exit_code: int = 130) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def first_sentence(error: BaseException, longest: int = 200) -> str:
    """What a library's error says, on one line and without the advice to programmers that follows.

    Never for errors about consultations: they may quote one.
    """
    text = re.split(r"(?<=[\w)`'\"])[.!] ", " ".join(str(error).split()) + " ", maxsplit=1)[0].strip().rstrip(".")
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"
