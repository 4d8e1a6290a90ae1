"""The command line: one app for all verbs; an error is one plain sentence and an exit code."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_origin

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from sevpeft import __version__
from sevpeft.console import guard_output, output_error, print_text
from sevpeft.errors import SevpeftError, UnknownModelError, UsageError
from sevpeft.runs import end_launcher

if TYPE_CHECKING:
    from pydantic import BaseModel

    from sevpeft.recipe import Recipe

_SECONDS_FOR_FIRST_PROCESS = 3.0
# The result of these verbs is their output; other verbs write files, and print the result with --json.
_PRINTING_VERBS = {"chat", "init", "plan", "recipes"}

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turns Arabic medical consultations into a small LoRA adapter trained to care most about the severe cases. "
    "`sevpeft --version` prints the version.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


# Arguments and options that several verbs take.
Words = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, such as data.max_rows=90")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Vram = Annotated[float | None, typer.Option(min=1, max=1e5, help="Memory of the target GPU in GB.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run", show_default=False)]


def main() -> None:
    """Runs the command line; an error is one plain sentence, and SEVPEFT_DEBUG=1 shows its traceback."""
    # huggingface_hub reads this at import; several libraries report their use through it.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Spins of a waiting OpenMP thread before it sleeps. libgomp's default of 300,000 makes generation 2.8 times slower
    # beside another busy program, and no faster alone (Gemma-3-270M, 2 cores).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # Full garbage collections, which find nothing: those during imports take 2 of 9 s, that at the exit 1 s.
    gc.set_threshold(*gc.get_threshold()[:2], 1000)
    guard_output()
    signal.signal(signal.SIGINT, _interrupt)
    if sys.argv[1:] == ["--version"]:
        print_text(f"sevpeft {__version__}")
        sys.exit(0)
    try:
        scratch = os.environ.get("TMPDIR")
        if scratch and not os.path.isdir(scratch):  # Python would silently write patients' text to another folder
            raise UsageError(f"TMPDIR={scratch} is not a folder; create it, or unset TMPDIR.")
        # Typer's own handling draws a box around errors, and returns 130 for Ctrl-C without a message.
        code = app(standalone_mode=False)
        lost = output_error()
        if lost is not None and lost.errno != errno.EPIPE:  # a closed pipe is no error: `head` closes it
            _print_error(f"The output is incomplete: {lost.strerror}.")
        if lost is not None and ("--json" in sys.argv or set(sys.argv[1:2]) & _PRINTING_VERBS):
            code = code or 1
    except (SevpeftError, TyperException, OSError) as error:
        if os.environ.get("SEVPEFT_DEBUG"):
            raise
        if str(error):  # empty without a verb, where typer has printed the help
            _print_error(_message(error))
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        code = 130
    finally:
        gc.freeze()
        # Last, because typer sets its own. `print_text` escapes control characters: the last line may quote data.
        sys.excepthook = lambda *error: print_text("".join(traceback.format_exception(*error)), stderr=True, end="")
    if code == 130:
        _print_error("Interrupted.")
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(number: int, frame: Any) -> None:
    """Handles Ctrl-C. The launcher ends at once: it waits .25 s for this process, which may be loading a library."""
    end_launcher()
    signal.default_int_handler(number, frame)


def keys_help(schema: type[BaseModel], *, without: Collection[str] = (), above: str = "") -> str:
    """The keys of a settings class as help text: values, default and the first sentence of each docstring.

    Args:
        without: keys that an argument of the verb sets, such as data.path, or that the verb does not use.
        above: prefix of the keys, such as "data.".
    """
    entries = []
    for name, field in schema.model_fields.items():
        key, default = f"{above}{name}", field.get_default(call_default_factory=True)
        if key in without:
            continue
        if hasattr(field.annotation, "model_fields"):
            entries.append(keys_help(cast(Any, field.annotation), without=without, above=f"{key}."))
            continue
        shown = default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)
        sentence = re.split(r"(?<=\.)\s", field.description or "", maxsplit=1)[0]
        width = min(shutil.get_terminal_size().columns, 100)
        text = f"{key}={_values(field.annotation)} (default: {shown})"
        entries += [text, textwrap.fill(" ".join(sentence.split()), width, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(entries)


def _values(kind: Any) -> str:
    """The values that a type accepts, for help: true|false, the choices of a Literal, TEXT."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is Annotated:
        return _values(get_args(kind)[0])
    if hasattr(kind, "model_fields"):
        return f"{{{', '.join(kind.model_fields)}}}"
    if get_origin(kind) in (list, tuple):
        return f"[{_values(get_args(kind)[0])},...]"
    if get_origin(kind) is dict:
        return "{NAME: VALUE}"
    if get_args(kind):
        return "|".join(dict.fromkeys(map(_values, get_args(kind))))
    names = {bool: "true|false", str: "TEXT", int: "NUMBER", float: "NUMBER", NoneType: "null"}
    return names.get(kind) or kind.__name__.upper()


def command_with_keys(settings: str, *, without: Collection[str] = ()) -> type[TyperCommand]:
    """A command whose --help ends with the keys of its settings class, named "module:Class" and imported only then."""

    class Command(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            module, _, name = settings.partition(":")
            print_text(f"KEY=VALUE:\n{keys_help(getattr(importlib.import_module(module), name), without=without)}")

    return Command


def _message(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'The output'}: {error.strerror or error}."
    if isinstance(error, SevpeftError):
        return str(error)
    message = str(error.format_message()) if isinstance(error, TyperException) else str(error)
    option, verb = getattr(error, "option_name", ""), getattr(getattr(error, "ctx", None), "info_name", None)
    with_recipe, near = verb in ("train", "plan", "compare", "evaluate"), getattr(error, "possibilities", None)
    if option and with_recipe and {*(near or ())} <= {"--help"}:
        return f"No such option: {option}; {_as_setting(option)}."
    return f"{message}{'' if message.endswith(('.', '?')) else '.'} See `sevpeft --help`."


def _as_setting(option: str) -> str:
    """The setting for an option that other programs have, such as --epochs 3."""
    from sevpeft.recipe import Recipe
    from sevpeft.recipe.messages import unknown_key

    name, given = option.lstrip("-").replace("-", "_"), re.search(f"\0{option}[\0=]([^-\0][^\0]*)", "\0".join(sys.argv))
    found = {"model": "write model.name_or_path", "data": "write data.path", "seed": "write training.seed"}.get(name)
    key = re.search(r"write ([\w.]+)", found := found or unknown_key((name,), Recipe))
    value = shlex.quote(given[1]) if given else "VALUE"
    return f"settings are KEY=VALUE: write {key[1]}={value}" if key else f"it {found}"


def check_early(recipe: Recipe, verb: str = "train") -> None:
    """Checks files, columns, folders and trackers before torch is loaded, which takes seconds."""
    from sevpeft.data.files import check_source

    severity, training = recipe.severity, recipe.training
    by_columns = severity.source == "columns" and severity.control != "uniform" and verb != "compare"
    check_source(recipe.data, needs_severity=by_columns)
    if verb == "plan":
        return
    folder = severity.classifier and os.path.abspath(os.path.expanduser(severity.classifier))
    named = {"model.name_or_path": recipe.model.name_or_path, "training.init_adapter": training.init_adapter}
    for key, name in {**named, "severity.classifier": folder}.items():
        is_id = re.fullmatch(r"builtin:tiny|\w[\w.-]*(/[\w.-]+)?", name or "none")
        if not is_id and not Path(name or "").expanduser().exists():
            raise UnknownModelError(f"{key}={name} is neither a folder nor a Hub id; correct it.")
    trackers = [training.report_to] if isinstance(training.report_to, str) else training.report_to or []
    files = [Path(name).expanduser() for name in ("wandb", "~/.config/wandb", "~/.netrc", "~/_netrc")]
    for tracker in {*trackers} - {"none", "all"}:
        package = {"azure_ml": "azureml", "flyte": "flytekit"}.get(tracker, tracker)
        if not find_spec(package) and not find_spec(f"{package}X"):
            raise UsageError(f"training.report_to={tracker} needs a package: pip install {package}; or leave it out.")
        # wandb itself would fail after the model is loaded. Other ways to log in are left to it.
        if tracker == "wandb" and "WANDB_" not in str(os.environ) and not any(file.exists() for file in files):
            raise UsageError("training.report_to=wandb: no login was found; run `wandb login`, or `wandb offline`.")


def quiet_libraries(*, models: bool = True) -> None:
    """Hides warnings and progress bars of the libraries; their errors are still shown. models: load PyTorch first."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
    if models:
        import sevpeft.modeling  # noqa: F401 (loads bitsandbytes faster than PEFT does)
    import datasets
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # It retries a failed request five times and logs each.
    huggingface_hub.logging.set_verbosity_error()


def is_main_process() -> bool:
    return os.environ.get("WORLD_SIZE", "1") in ("", "0", "1") or os.environ.get("RANK", "0") == "0"


def _print_error(message: str) -> None:
    if not is_main_process():
        # The launcher ends all processes after the first error, so an error of all is printed once.
        time.sleep(_SECONDS_FOR_FIRST_PROCESS)
        message = f"Process {os.environ['RANK']}: {message}"
    print_text(message, stderr=True)
