"""A run folder: what a training leaves behind, written so that a kill at any moment leaves no half file.

RUN/ holds recipe.yaml, environment.json, metrics.json, log.jsonl, tokenizer/, adapter/ and checkpoints/. Files are
written under a temporary name and moved into place; an existing run is continued or refused, never overwritten.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sevpeft import __version__
from sevpeft.errors import DataError, RunError, SevpeftError, UsageError

SAMPLES = "samples.jsonl"  # in a run with training.generate_samples
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class Run:
    """Paths of one run folder."""

    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def tokenizer(self) -> Path:  # the base model's, as the training found it
        return self.folder / "tokenizer"

    @property
    def finished(self) -> bool:
        return (self.adapter / "adapter_model.safetensors").exists() and "after" in self.metrics()

    def metrics(self) -> dict[str, Any]:
        return self.read_json("metrics.json")

    def read_json(self, name: str) -> dict[str, Any]:
        """Contents of a JSON file; empty while there is none."""
        path = self.folder / name
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.folder / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n", shared=True)

    def write_text(self, name: str, text: str, *, shared: bool = True) -> None:
        write_atomically(self.folder / name, text, shared=shared)

    def update_metrics(self, **parts: Any) -> None:
        self.write_json("metrics.json", {**self.metrics(), **parts})

    def append_log(self, entry: dict[str, Any]) -> None:
        """Adds one line to log.jsonl and hands it to the operating system; what is not finite becomes null."""
        valid = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(valid, ensure_ascii=False, allow_nan=False) + "\n")

    def keep_log(self, lines: int) -> None:
        """Cuts log.jsonl back to so many lines."""
        path = self.folder / "log.jsonl"
        if path.exists():
            with path.open(encoding="utf-8") as log:  # str.splitlines would also split at U+2028 inside a text
                kept = "".join(islice(log, lines))
            write_atomically(path, kept, shared=True)


def default_output(recipe_name: str) -> Path:
    """runs/NAME-DATE-TIME: a new folder for every start, so that the README's command can be repeated."""
    return Path("runs") / f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_output(folder: Path, *, resume: bool) -> None:
    """Raises RunError for an output folder that cannot be used, before anything slow happens."""
    with plain_disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise RunError(f"{folder} is a file; give --output a folder that does not exist yet.")
        is_run = (folder / "recipe.yaml").exists()
        if resume and not is_run:
            raise RunError(f"There is no run in {folder} to resume; leave --resume out to start one.")
        if not resume and is_run:
            raise RunError(f"{folder} holds a run already; continue it with --resume, or choose another --output.")
        if not resume and folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} exists and is not empty; choose an --output folder that does not exist yet.")
        parent = folder
        while not parent.exists():
            parent = parent.parent
        # Rights do not say it: for root everything is writable, a read-only disk and /proc included.
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=".sevpeft-"))


def check_run(folder: Path) -> None:
    """Raises RunError when a folder holds no run."""
    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"There is no run in {folder}; name a folder that `sevpeft train` made, as runs/NAME-DATE.")


def check_one_process(verb: str) -> None:
    """Raises UsageError where a launcher started several processes, which would all write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{verb} runs as one process; start `sevpeft {verb}` itself, without a launcher.")


@contextmanager
def new_run(run: Run) -> Iterator[None]:
    """Makes the folder of a run, and takes it away again when the run fails before it has a recipe to resume from."""
    with plain_disk_errors(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not (run.folder / "recipe.yaml").exists():
            shutil.rmtree(run.folder, ignore_errors=True)
        raise


def keep_private(path: Path) -> None:
    """Leaves a file, or a folder and all in it, to its owner alone, whatever the umask: for what patients wrote."""
    for folder, _, files in os.walk(path):
        os.chmod(folder, 0o700)
        for name in files:
            os.chmod(os.path.join(folder, name), 0o600)
    if not path.is_dir():
        os.chmod(path, 0o600)


def write_atomically(path: Path, text: str, *, shared: bool = False) -> None:
    """Writes a text file under a temporary name beside its place and moves it there.

    Its owner alone may read it, also while it is half written, unless it is `shared`: settings, figures and cards that
    hold nothing of patients and go with an adapter.
    """
    with plain_disk_errors(path, when_full="free some, then run this again"):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if shared:
                os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def plain_disk_errors(
    path: Path,
    *,
    when_full: str = "free some, then go on with --resume, or in a comparison with the same command (finished "
    "checkpoints are kept)",
    remedy: str = "choose another --output",
) -> Iterator[None]:
    """Turns a full disk, a missing permission or a path that cannot be into one sentence."""
    try:
        yield
    except SevpeftError:
        raise
    except Exception as error:
        if _disk_is_full(error):
            raise RunError(f"No space is left for {path}; {when_full}.") from error
        if isinstance(error, OSError) and error.errno and error.strerror:
            raise RunError(f"{path} cannot be written: {os.strerror(error.errno)}; {remedy}.") from error
        raise


def _disk_is_full(error: Exception) -> bool:
    """Also as the libraries say it: safetensors and Arrow in words of their own, torch.save by a wrong position."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # `ulimit -f`
        return True
    says = r"(?s)No space left|[Qq]uota exceeded|File too large|os error (28|122|27)\b|inline_container.*\bpos"
    return bool(re.search(says, str(error)))


def describe_environment() -> dict[str, Any]:
    """Versions, platform and commit, for environment.json. No user name, host name or path: a card may quote it."""
    versions = dict.fromkeys(PACKAGES, "not installed")
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # a training in float32 needs no bitsandbytes
            versions[package] = importlib.metadata.version(package)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"sevpeft": __version__, **versions},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the checkout that sevpeft is imported from, with a mark when it was changed; None if it is installed."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():  # in a virtual environment, git would describe the repository around it
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_hash(path: Path) -> str:
    """ "sha256:..." of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def json_lines(lines: Iterable[str], label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of every line with the line's number, from 1; empty lines are left out.

    Raises DataError: a line holds none; with its number, and without what it says.
    """
    for number, line in enumerate(lines, start=1):
        line = line.strip(" \t\r\n\ufeff")
        # Files put one after the other keep their byte order marks, in the middle of a line if it was not ended.
        for part in re.split("(?<=})\ufeff(?={)", line) if "\ufeff" in line else filter(None, [line]):
            try:
                content = json.loads(part)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{label}, line {number} {json_problem(error)}.") from None
            if not isinstance(content, dict):
                raise DataError(f"{label}, line {number} is not a JSON object with named values.")
            yield number, content


def json_problem(error: ValueError | RecursionError) -> str:
    """Why Python's parser refused a text, as the end of a sentence; it never quotes the text."""
    if isinstance(error, RecursionError):
        return "nests lists or objects too deep: flatten them"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error.msg})"
    return "holds a number of thousands of digits: put it in quotes"


def cache_folder(kind: str) -> Path:
    """The folder `kind` under SEVPEFT_CACHE (~/.cache/sevpeft), made for its owner alone: it holds patients' text."""
    folder = Path(os.environ.get("SEVPEFT_CACHE") or "~/.cache/sevpeft").expanduser() / kind
    with plain_disk_errors(folder, **CACHE_REMEDY):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    return folder


CACHE_REMEDY = {
    "when_full": "free some, or set SEVPEFT_CACHE to a folder on another disk",
    "remedy": "set SEVPEFT_CACHE to another folder",
}
_LOCK = ".building"


@contextmanager
def whole_folder(
    output: Path,
    *,
    shared: bool = False,
    when_full: str = "free some, then run this again",
    remedy: str = "choose another OUTPUT",
) -> Iterator[Path]:
    """A new folder, mode 0700, which becomes `output` when the block ends without an error.

    It is built beside its place under a hidden name. A failure takes it away. What a kill leaves behind is taken away
    when the same folder is made the next time: whoever builds one holds a lock on it. One that holds nothing of
    patients is `shared`, as the umask says. RunError: `output` exists, or the disk refuses.
    """
    output = Path(os.path.abspath(output))
    with plain_disk_errors(output, when_full=when_full, remedy=remedy):
        check_absent(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in output.parent.glob(f".{glob.escape(output.name)}.*/{_LOCK}"):
            with suppress(Timeout, OSError), FileLock(abandoned, timeout=0):
                shutil.rmtree(abandoned.parent, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        try:
            with FileLock(partial / _LOCK):
                yield partial
                check_absent(output)
                (partial / _LOCK).unlink()
                if shared:
                    for path in (partial, *partial.rglob("*")):
                        path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
                else:
                    keep_private(partial)
                partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_absent(output: Path) -> None:
    """Raises RunError where something stands at `output`: nothing is overwritten."""
    if os.path.lexists(output):
        raise RunError(f"{output} exists already; choose an OUTPUT that does not exist yet, or remove it first.")


def signal_at_end_of_parent(number: int) -> None:
    """Has Linux send this process a signal when its parent ends; 0 for none."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG of <linux/prctl.h>


def end_launcher() -> None:
    """Ends `accelerate launch` of one process on Linux, which would print a traceback of its own for a Ctrl-C."""
    with suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
        if b"launch" in words and os.environ.get("WORLD_SIZE", "1") == "1":
            os.kill(os.getppid(), signal.SIGTERM)


_parent: int | None = None


@contextmanager
def workers_end_with_this_process() -> Iterator[None]:
    """Every process that is forked in this block is killed when this one ends (on Linux).

    A pool whose parent is killed waits for work for ever, with patients' text and the lock on a half-built folder.
    """
    global _parent
    if sys.platform == "linux":
        _end_forks_with_parent()
        _parent = os.getpid()
    try:
        yield
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # a pool that is broken off lets TimeoutError through
            raise KeyboardInterrupt from None
        if "abruptly died" in str(error):  # datasets 5.2
            raise RunError("A worker was killed, probably because memory ran out; lower num_proc.") from error
        raise
    finally:
        _parent = None


@functools.cache
def _end_forks_with_parent() -> None:
    def set_signal() -> None:
        if _parent is not None:
            signal_at_end_of_parent(signal.SIGKILL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent alone speaks, and ends them
            if os.getppid() != _parent:  # it ended before the signal was set
                os._exit(1)

    os.register_at_fork(after_in_child=set_signal)
