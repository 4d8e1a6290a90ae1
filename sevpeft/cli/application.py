"""The command line: one app for all verbs; an error is one plain sentence and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from types import TracebackType

import typer
from typer.exceptions import TyperException

from sevpeft.console import guard_output, output_error, print_text
from sevpeft.errors import SevpeftError, UsageError

_SECONDS_FOR_THE_FIRST = 3.0
# Their result is what they print; that of the others is in files, unless --json asks for it on stdout.
_PRINTING_VERBS = {"chat", "plan", "recipes"}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turns Arabic medical consultations into a small LoRA adapter trained to care most about the severe cases.",
)


def main() -> None:
    """Runs the command line; an error is one plain sentence, and SEVPEFT_DEBUG=1 shows its traceback."""
    # Read when huggingface_hub is imported; several libraries tell it what they are used for.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    guard_output()
    try:
        _check_scratch()
        # Typer's own handling would draw a box around an error and say nothing about Ctrl-C, for which it returns 130.
        code = app(standalone_mode=False)
        lost = output_error()
        if lost is not None and lost.errno != errno.EPIPE:  # whoever closes a pipe, as `head` does, knows it
            _print_error(f"The output is incomplete: {lost.strerror}.")
        if lost is not None and ("--json" in sys.argv or set(sys.argv[1:2]) & _PRINTING_VERBS):
            code = code or 1
    except (SevpeftError, TyperException, OSError) as error:
        if os.environ.get("SEVPEFT_DEBUG"):
            raise
        if str(error):  # without a verb, typer has shown the help already and has nothing to add
            _print_error(_message(error))
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.excepthook = _show_traceback  # not before: typer puts its own there
    if code == 130:
        _print_error("Interrupted.")
    sys.exit(code if isinstance(code, int) else 0)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but through `print_text`: its last line may quote data of others."""
    print_text("".join(traceback.format_exception(kind, error, trace)), stderr=True, end="")


def _message(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'The output'}: {error.strerror or error}."
    if isinstance(error, SevpeftError):
        return str(error)
    message = str(error.format_message()) if isinstance(error, TyperException) else str(error)
    return f"{message}{'' if message.endswith(('.', '?')) else '.'} See `sevpeft --help`."


def quiet_libraries() -> None:
    """Hides warnings and progress bars of the libraries; their errors are still shown."""
    import logging
    import warnings

    # Set before the import of bitsandbytes, which logs while it is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")

    import datasets
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # It repeats each failed request five times and logs every try.
    huggingface_hub.logging.set_verbosity_error()


def _check_scratch() -> None:
    """Python would take another folder in silence, and patients' text would lie there for the length of a run."""
    asked = os.environ.get("TMPDIR")
    if asked and not os.path.isdir(asked):
        raise UsageError(f"TMPDIR={asked} is no folder; make it, or unset TMPDIR.")


def is_main_process() -> bool:
    return not _is_one_of_several() or os.environ.get("RANK", "0") == "0"


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def refuse_several_processes(verb: str, instead: str = "") -> None:
    """Raises UsageError where a launcher started several processes, which would all write the same files.

    Args:
        instead: what uses several GPUs all the same.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise UsageError(f"{verb} is the work of one process, and {count} run; start `sevpeft {verb}` itself{instead}.")


def _print_error(message: str) -> None:
    if not is_main_process():
        # An error of all processes is printed by the first; the launcher then ends the others before they repeat it.
        time.sleep(_SECONDS_FOR_THE_FIRST)
        message = f"Process {os.environ['RANK']}: {message}"
    print_text(message, stderr=True)
