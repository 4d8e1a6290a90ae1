"""Trainings in child processes that tests can kill; the processes start fast.

They are forked from the tests' process, which has the libraries: to load them takes longer than these small trainings.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("fork")
_WRITING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def start(
    function: Callable[..., Any], *arguments: Any, processes: int = 1, variables: Mapping[str, str] | None = None
) -> list[Any]:
    """Starts the function in so many processes, which see each other as those of a launcher do.

    Args:
        arguments: of the function, and after them the folder that tables are kept in.
        variables: of the environment, as a launcher sets them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        several = {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        environment = {name: str(value) for name, value in several.items()} if processes > 1 else {}
        environment |= variables or {}
        process = CONTEXT.Process(target=_run, args=(function, arguments, environment))
        process.start()
        started.append(process)
    return started


def exit_codes(processes: list[Any]) -> list[int]:
    """Waits for their ends; a signal that ended one is negative."""
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "still at work after two minutes"
    return [process.exitcode for process in processes]


def message_of(process: Any, cache: Path) -> str:
    """The sentence that it ended with."""
    return (cache / f"message-{process.pid}").read_text(encoding="utf-8")


def look_up_once() -> None:
    """What libraries compile, load or hash anew at each saving, in each trainer, report and data set."""
    import httpcore2
    import jinja2
    import typer.main
    from accelerate.utils import imports
    from datasets.fingerprint import Hasher

    from sevpeft import runs
    from sevpeft.severity.rules import Rules

    for place, name in (
        (httpcore2, "default_ssl_context"),
        (imports, "_is_package_available"),
        (typer.main, "get_command"),
        (runs, "_commit"),
    ):
        setattr(place, name, functools.cache(getattr(place, name)))
    compiled, loaded, hashed = jinja2.Environment.compile, Rules.__init__, Hasher.hash
    codes: dict[Any, Any] = {}
    of_package: dict[str, Any] = {}
    of_word = functools.cache(hashed)

    def code_of(self: Any, source: Any, *names: Any, **more: Any) -> Any:
        set_up = (self.autoescape, self.trim_blocks, self.lstrip_blocks, *self.filters, *self.extensions, *self.globals)
        key = (source, names, *more.items(), type(self), *set_up)
        if key not in codes:
            codes[key] = compiled(self, source, *names, **more)
        return codes[key]

    def load_once(self: Rules, path: Any = None) -> None:
        if path or not of_package:
            loaded(self, path)
        if not path:
            of_package.update(of_package or vars(self))
            vars(self).update(of_package)

    jinja2.Environment.compile = code_of  # type: ignore[method-assign]
    Rules.__init__ = load_once  # type: ignore[method-assign]
    Hasher.hash = staticmethod(lambda value: (of_word if type(value) is str else hashed)(value))


def forget_processes() -> None:
    """Of trainings in the tests' process, after a fork."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    import torch

    from sevpeft.cli.application import quiet_libraries
    from sevpeft.errors import SevpeftError

    forget_processes()
    quiet_libraries()
    os.environ.update(environment, SEVPEFT_CACHE=arguments[-1])
    torch.set_num_threads(1)
    look_up_once()
    try:
        function(*arguments[:-1])
    except SevpeftError as error:
        Path(arguments[-1], f"message-{os.getpid()}").write_text(str(error), encoding="utf-8")
        sys.exit(error.exit_code)


def command_in_child(words: list[str], output: str, hang_up: Any) -> None:
    """The command line, with the file or terminal `output` for all that it reads and prints; hang_up: for SIGHUP."""
    from sevpeft.cli import main

    signal.signal(signal.SIGHUP, hang_up)
    os.closerange(3, 1 << 12)  # the other end of a terminal among them, which would not close
    os.setsid()  # of a terminal that is opened next, this process is then the one that hears of its end
    handle = os.open(output, os.O_RDWR)
    for number in range(3):
        os.dup2(handle, number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # as Python makes them, not where tests capture them
        stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["sevpeft", *words]
    main()


def train_in_child(recipe: Path, settings: list[str], folder: Path, kill_at: int | None) -> None:
    """Trains, or goes on; where the folder is written to for the `kill_at`-th time, SIGKILL comes just before."""
    from sevpeft.recipe import load_recipe
    from sevpeft.training.train import train

    count = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event in _WRITING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT)
        if writes and str(arguments[0]).startswith(str(folder)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        sys.addaudithook(look)
    train(load_recipe(recipe, settings), folder, resume=(folder / "recipe.yaml").exists())
