"""The command line itself: one app for all verbs, and a refusal as one plain sentence with an exit code."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import time
import traceback
from types import TracebackType
from typing import Any

import typer
from typer.exceptions import TyperException

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
    """Runs the command line; a refusal is one plain sentence, and SEVPEFT_DEBUG=1 shows where it came from."""
    # Read when huggingface_hub is imported; several libraries tell it what they are used for.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    _guard_output()
    try:
        _refuse_absent_scratch()
        # Typer's own handling would draw a box around an error and say nothing about Ctrl-C, for which it returns 130.
        code = app(standalone_mode=False)
        lost = output_error()
        if lost is not None and lost.errno != errno.EPIPE:  # whoever closes a pipe, as `head` does, knows it
            _say(f"The output is incomplete: {lost.strerror}.")
        if lost is not None and ("--json" in sys.argv or set(sys.argv[1:2]) & _PRINTING_VERBS):
            code = code or 1
    except (SevpeftError, TyperException, OSError) as error:
        if os.environ.get("SEVPEFT_DEBUG"):
            raise
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


class _Output(io.FileIO):
    """Standard output or error that never fails: work must not be lost because a terminal or a pipe is gone.

    Everything that is printed passes here: print, rich, logging, warnings, tqdm and the flush when Python ends.

    Attributes:
        error: the first error of a write that was given up; each later write is tried, as a disk may have space again.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written = super().write(left)
                if written is None:  # a terminal that another program has set to non-blocking
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            self.error = self.error or error
        return size


def _guard_output() -> None:
    """Puts `_Output` under stdout and stderr; what was closed from the start becomes /dev/null.

    Without that, the next file that is opened would take the number of the closed one, and libraries write into it.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        elif name != "stdin" and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            guarded = io.TextIOWrapper(
                _Output(stream.fileno(), "w", closefd=False),
                encoding=stream.encoding,
                errors="replace",  # a screen that is not UTF-8 gets a question mark for each bar
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, guarded)


def output_error() -> OSError | None:
    """Why something that was printed to stdout has not arrived; None where all has."""
    sys.stdout.flush()
    return getattr(getattr(sys.stdout, "buffer", None), "error", None)


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
