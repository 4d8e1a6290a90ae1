"""What can go wrong, as one plain sentence and an exit code.

Every refusal that a user can meet is one of these classes; the command line prints its text without a traceback and
leaves with `exit_code`. A text names the setting, the reason and the remedy, and never quotes a consultation: rows are
named by their number, because errors are copied into tickets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """The base model is not at hand or cannot be read, or its numbers say too little to plan on."""


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


@contextmanager
def loading_errors(
    name: str,
    *,
    setting: str,
    revision: str | None = None,
    attention: str | None = None,
    trust_setting: str | None = None,
) -> Iterator[None]:
    """Translates what transformers, tokenizers, safetensors and the Hub raise while they load a model or tokenizer.

    Args:
        name: Hub id or folder, as the user wrote it. revision: of the Hub.
        setting: where the name is written, such as model.name_or_path. attention: of model.attn_implementation.
        trust_setting: that lets code of the model run; None where none ever runs.

    Raises UnknownModelError: in one sentence, with the remedy.
    """
    try:
        yield
    except SevpeftError:
        raise
    except Exception as error:  # whatever a library raises on files that others wrote; tokenizers a bare Exception
        why = _why_not_loaded(name, error, setting, revision, attention, trust_setting)
        raise UnknownModelError(f"{name} {why}.") from error


def _why_not_loaded(
    name: str, error: Exception, setting: str, revision: str | None, attention: str | None, trust_setting: str | None
) -> str:
    from huggingface_hub import errors as hub

    folder, reason, short = Path(name).expanduser(), " ".join(str(error).split()), first_sentence(error)
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    kinds = {kind for cause in causes for kind in type(cause).__mro__}
    if hub.GatedRepoError in kinds:
        return f"is gated: accept its license at https://huggingface.co/{name}, then run `hf auth login` here"
    if hub.RevisionNotFoundError in kinds:
        return f"has no revision {revision!r}; correct it, or leave it out"
    if folder.is_dir() and not (folder / "config.json").is_file():
        return "is a folder without config.json, so it holds no transformers model; name one that does"
    if kinds & {hub.RepositoryNotFoundError, hub.HFValidationError}:
        return f"is no folder here and no model on the Hub; correct {setting}, or if it is private, run `hf auth login`"
    if "trust_remote_code" in reason or "custom code" in reason:
        remedy = f"read that code, then set {trust_setting}=true" if trust_setting else "name another model"
        return f"wants to run code of its own, which is off; {remedy}"
    if type(error).__name__ == "OutOfMemoryError":
        return "does not fit in the free memory of the GPU; set quantization.load_in_4bit=true, or take a smaller model"
    if "ignore_mismatched_sizes" in reason:
        return "has weights of other shapes than its config.json says; fetch both again, from one place"
    if "backend tokenizer" in reason:
        return "has no tokenizer that can be read; put its tokenizer.json and tokenizer_config.json there"
    if "safetensors" in reason and re.search("no file named|have a file named", reason):
        return (
            "has no *.safetensors weights, and pickled ones can run code when they are read; name a model that has "
            "them, or convert it once, where that is no danger, with model.save_pretrained(FOLDER)"
        )
    if "bitsandbytes" in reason:
        return f"cannot be quantized here ({short}); see what `python -m bitsandbytes` says, or install it again"
    if attention and re.search("attn_implementation|attention implementation|FlashAttention", reason):
        return f"does not work with model.attn_implementation={attention} here ({short}); write eager, or leave it out"
    if not folder.exists() and isinstance(error, OSError):
        return f"is no folder here and could not be fetched from the Hub; check {setting} and the connection"
    return f"could not be loaded ({short}); fetch or copy it again, or name another one"
