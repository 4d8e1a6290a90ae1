"""Error classes: each has a message of one plain sentence and an exit code.

The command line prints the message without a traceback and exits with `exit_code`. A message names the setting, the
reason and the remedy. It gives a row's number and never quotes a consultation, because users copy errors into tickets.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class SevpeftError(Exception):
    """A valid command cannot be carried out, or has failed."""

    exit_code = 1


class UsageError(SevpeftError):
    """Wrong usage: the command or the recipe has to be changed."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe cannot be read, or a key or value is invalid. The message may have one line for each mistake."""


class DataError(SevpeftError):
    """The consultations cannot be read, or lack something that the recipe needs."""


class WeightError(SevpeftError, ValueError):
    """Severity probabilities or weights are missing, not finite or negative, or do not form a distribution."""


class ModelError(SevpeftError):
    """The base model, tokenizer or adapter cannot be loaded, or does not support a setting of the recipe."""


class UnknownModelError(ModelError):
    """The base model is missing or unreadable, or its config lacks values that the memory plan needs."""


class RunError(SevpeftError):
    """The run folder exists already, cannot be written, or does not match the command."""


class Interrupted(SevpeftError):
    """A signal such as Ctrl-C stopped work that can be resumed. The exit code is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_sentence(error: BaseException, longest: int = 200) -> str:
    """The first sentence of a library's error, on one line. Not for errors about consultations: they may quote one."""
    text = re.split(r"(?<=[\w)`'\"])[.!] ", " ".join(str(error).split()) + " ", maxsplit=1)[0].strip().rstrip(".")
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"


@contextmanager
def loading_errors(
    name: str, *, setting: str, revision: str | None = None, attention: str | None = None
) -> Iterator[None]:
    """Translates errors of transformers, tokenizers, safetensors and the Hub while a model or tokenizer loads.

    `name` is the Hub id or folder as the user wrote it in `setting`. `revision` is that of the Hub, `attention` the
    value of model.attn_implementation. Raises UnknownModelError: one sentence with the remedy.
    """
    try:
        yield
    except SevpeftError:
        raise
    except Exception as error:  # damaged files raise errors of any class; tokenizers raises a bare Exception
        raise UnknownModelError(f"{name} {_problem(name, error, setting, revision, attention)}.") from error


def _problem(name: str, error: Exception, setting: str, revision: str | None, attention: str | None) -> str:
    from huggingface_hub import errors as hub

    folder, reason, short = Path(name).expanduser(), " ".join(str(error).split()), first_sentence(error)
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    kinds = {kind for cause in causes for kind in type(cause).__mro__}
    if hub.GatedRepoError in kinds:
        return f"is gated: accept its license at https://huggingface.co/{name}, then run `hf auth login`"
    if hub.RevisionNotFoundError in kinds:
        return f"has no revision {revision!r}; correct or remove it"
    if folder.is_dir() and not (folder / "config.json").is_file():
        return "is a folder without config.json, so it holds no transformers model; name one that does"
    if kinds & {hub.RepositoryNotFoundError, hub.HFValidationError}:
        return f"is neither a folder nor a model on the Hub; correct {setting}, or log in with `hf auth login`"
    if "trust_remote_code" in reason or "custom code" in reason:
        trusted = setting == "model.name_or_path"  # the code of other models never runs
        remedy = "read the code, then set model.trust_remote_code=true" if trusted else "name another model"
        return f"needs to run code of its own, which is off; {remedy}"
    if type(error).__name__ == "OutOfMemoryError":
        return "does not fit in the free memory of the GPU; set quantization.load_in_4bit=true, or use a smaller model"
    if "ignore_mismatched_sizes" in reason:
        return "has weights whose shapes differ from its config.json; download both again from the same place"
    if "backend tokenizer" in reason:
        return "has no readable tokenizer; add its tokenizer.json and tokenizer_config.json"
    if "safetensors" in reason and re.search("no file named|have a file named", reason):
        return (
            "has no *.safetensors weights, and pickled weights can run code when they are loaded; name a model with "
            "them, or convert it once on an isolated machine with model.save_pretrained(FOLDER)"
        )
    if "bitsandbytes" in reason:
        return f"cannot be quantized here ({short}); run `python -m bitsandbytes` for details, or reinstall it"
    if attention and re.search("attn_implementation|attention implementation|FlashAttention", reason):
        return f"does not work with model.attn_implementation={attention} here ({short}); set eager, or remove it"
    if not folder.exists() and isinstance(error, OSError):
        return f"is not a folder and could not be fetched from the Hub; check {setting} and the connection"
    return f"could not be loaded ({short}); fetch or copy it again, or name another model"
