"""The command line itself: one app for all verbs, and a refusal as one plain sentence with an exit code."""

from __future__ import annotations

import io
import os
import sys
import time
import traceback
from types import TracebackType

import typer
from typer.exceptions import TyperException

from sevpeft.errors import SevpeftError, UsageError

_SECONDS_FOR_THE_FIRST = 3.0

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turns Arabic medical consultations into a small LoRA adapter trained to care most about the severe cases.",
)


def main() -> None:
    """Runs the command line; a refusal is one plain sentence, and SEVPEFT_DEBUG=1 shows where it came from."""
    # Read when torch loads OpenMP: threads that spin while they wait make a busy machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Read when huggingface_hub is imported; several libraries tell it what they are used for.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a screen that is not UTF-8 gets a question mark for each bar
            stream.reconfigure(errors="replace")
    try:
        _refuse_absent_scratch()
        # Typer's own handling would draw a box around an error and say nothing about Ctrl-C, for which it returns 130.
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except (SevpeftError, TyperException, OSError) as error:
        if os.environ.get("SEVPEFT_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):
            # The reader, such as `head`, has had enough; Python would complain once more while it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if str(error):  # without a verb, typer has shown the help already and has nothing to add
            _say(_sentence(error))
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.excepthook = _show_traceback  # not before: typer puts its own there
    if code == 130:
        _say("Interrupted.")
    sys.exit(code if isinstance(code, int) else 0)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but its last line may quote data of others."""
    from sevpeft.console import print_text

    print_text("".join(traceback.format_exception(kind, error, trace)), stderr=True, end="")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'The output'}: {error.strerror or error}."
    if isinstance(error, SevpeftError):
        return str(error)
    said = str(error.format_message()) if isinstance(error, TyperException) else str(error)
    return f"{said}{'' if said.endswith(('.', '?')) else '.'} See `sevpeft --help`."


def quiet_libraries() -> None:
    """Leaves the screen to the verb: errors of the libraries are shown, their advice to programmers is not."""
    import logging
    import warnings

    # Asked for before bitsandbytes is imported, because it speaks while it is.
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
    # It repeats each failed request five times and tells every time; what became of it is said in the end.
    huggingface_hub.logging.set_verbosity_error()


def _refuse_absent_scratch() -> None:
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


def _say(sentence: str) -> None:
    if not is_main_process():
        # What all refuse, the first one says, and the launcher then ends the others before they repeat it.
        time.sleep(_SECONDS_FOR_THE_FIRST)
        sentence = f"Process {os.environ['RANK']}: {sentence}"
    from sevpeft.console import print_text

    print_text(sentence, stderr=True)
