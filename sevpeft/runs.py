"""Run folders, atomic writes and the processes of a run. A kill at any moment leaves no partial file.

RUN/ holds recipe.yaml, environment.json, metrics.json, log.jsonl, tokenizer/, adapter/ and checkpoints/. Files are
written under a temporary name and moved into place. An existing run is resumed or refused, never overwritten.
"""

import ctypes
import errno
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
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
    def tokenizer(self) -> Path:  # of the base model, as it was when the training started
        return self.folder / "tokenizer"

    @property
    def finished(self) -> bool:
        return (self.adapter / "adapter_model.safetensors").exists() and "after" in self.metrics()

    def metrics(self) -> dict[str, Any]:
        return self.read_json("metrics.json")

    def read_json(self, name: str) -> dict[str, Any]:
        """Content of a JSON file; empty if the file does not exist."""
        path = self.folder / name
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.folder / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n", shared=True)

    def write_text(self, name: str, text: str, *, shared: bool = True) -> None:
        write_atomically(self.folder / name, text, shared=shared)

    def update_metrics(self, **parts: Any) -> None:
        self.write_json("metrics.json", {**self.metrics(), **parts})

    def append_log(self, entry: dict[str, Any]) -> None:
        """Appends one line to log.jsonl; numbers that are not finite become null."""
        valid = json.loads(json.dumps(entry), parse_constant=lambda _: None)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(valid, ensure_ascii=False) + "\n")

    def keep_log(self, lines: int) -> None:
        """Cuts log.jsonl back to its first `lines` lines."""
        path = self.folder / "log.jsonl"
        if path.exists():
            with path.open(encoding="utf-8") as log:  # str.splitlines would also split at U+2028 inside a text
                kept = "".join(islice(log, lines))
            write_atomically(path, kept, shared=True)


def default_output(recipe_name: str) -> Path:
    """runs/NAME-DATE-TIME: a new folder for each start, so that the same command can run again."""
    return Path("runs") / f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_output(folder: Path, *, resume: bool) -> None:
    """Raises RunError if the output folder cannot be used. Called before anything slow."""
    with plain_disk_errors(folder):
        is_run = (folder / "recipe.yaml").exists()
        if resume and not is_run:
            raise RunError(f"There is no run in {folder} to resume; start one without --resume.")
        if not resume and is_run:
            raise RunError(f"{folder} holds a run already; continue it with --resume, or choose another --output.")
        if not resume and folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} exists and is not empty; choose an --output folder that does not exist yet.")
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        # Permissions are not enough: for root, a read-only disk and /proc look writable.
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=".sevpeft-"))


def check_run(folder: Path) -> None:
    """Raises RunError if the folder holds no run."""
    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"There is no run in {folder}; name a folder that `sevpeft train` made, such as runs/NAME-DATE.")


def check_one_process(verb: str) -> None:
    """Raises UsageError if a launcher started several processes: all would write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{verb} runs as one process; start `sevpeft {verb}` itself, without a launcher.")


@contextmanager
def new_run(run: Run) -> Iterator[None]:
    """Makes the folder of a run. Removes it if the run fails before recipe.yaml is written, as it cannot be resumed."""
    with plain_disk_errors(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not (run.folder / "recipe.yaml").exists():
            shutil.rmtree(run.folder, ignore_errors=True)
        raise


def keep_private(path: Path, umask: int = 0o077) -> None:
    """Sets the modes of a file, or a folder with its content: by default for the owner only, for text of patients."""
    for part in (path, *path.rglob("*")):
        part.chmod((0o777 if part.is_dir() else 0o666) & ~umask)


def write_atomically(path: Path, text: str, *, shared: bool = False) -> None:
    """Writes a text file under a temporary name in the same folder, then moves it into place.

    Only its owner may read it, at any moment. `shared` files get the permissions of the umask: settings, figures and
    cards, which hold no text of patients.
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
    when_full: str = "free some, then go on with --resume, or for a comparison with the same command (finished "
    "checkpoints are kept)",
    remedy: str = "choose another --output",
) -> Iterator[None]:
    """Translates a full disk, a missing permission or an invalid path into a RunError of one sentence."""
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
    """Whether an error of Python or a library means a full disk, an exceeded quota or file size limit."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # `ulimit -f`
        return True
    # safetensors and Arrow have their own error classes; torch.save reports a wrong file position.
    pattern = r"(?s)No space left|[Qq]uota exceeded|File too large|os error (28|122|27)\b|inline_container.*\bpos"
    return bool(re.search(pattern, str(error)))


def describe_environment() -> dict[str, Any]:
    """Versions, platform and commit for environment.json. No user name, host name or path, because cards quote it."""
    versions = dict.fromkeys(PACKAGES, "not installed")
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # training in float32 needs no bitsandbytes
            versions[package] = importlib.metadata.version(package)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"sevpeft": __version__, **versions},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the checkout that sevpeft is imported from, with "-dirty" after a change; None if it is installed."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():  # in a virtual environment, git would describe the repository around it
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with suppress(OSError, subprocess.TimeoutExpired):
        described = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=10)
        return described.stdout.strip() or None
    return None


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
    """Yields (line number from 1, JSON object) of each line that is not empty.

    Raises DataError if a line holds no JSON object. The message gives the line's number and quotes nothing.
    """
    for number, line in enumerate(lines, start=1):
        line = line.strip(" \t\r\n\ufeff")
        # Concatenated files keep their byte order marks, in the middle of a line if the last line had no end.
        parts = re.split("(?<=})\ufeff(?={)", line) if "\ufeff" in line else [line]
        for part in filter(None, parts):
            try:
                content = json.loads(part, object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{label}, line {number} {json_problem(error)}.") from None
            if not isinstance(content, dict):
                raise DataError(f"{label}, line {number} is not a JSON object.")
            yield number, content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`: ValueError for a repeated key, of which the parser keeps the last."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("has an object with the same key twice: keep one of them, or rename one")
    return found


def json_problem(error: ValueError | RecursionError) -> str:
    """Why the JSON parser refused a text, as the end of a sentence that does not quote it."""
    if isinstance(error, RecursionError):
        return "nests lists or objects too deep: flatten them"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error.msg})"
    return str(error) if "same key" in str(error) else "holds a number of thousands of digits: put it in quotes"


def cache_folder(kind: str) -> Path:
    """The folder `kind` in SEVPEFT_CACHE (~/.cache/sevpeft). Only its owner may read it: it holds text of patients."""
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
    """Yields a new hidden folder beside `output`, which is renamed to `output` if the block succeeds.

    An error removes the folder. The next call for the same `output` removes what a killed process left: a process
    holds a lock while it builds. The mode is 0700, or that of the umask for a `shared` folder without text of patients.

    Raises RunError if `output` exists or cannot be written.
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
                keep_private(partial, _umask() if shared else 0o077)
                partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_absent(output: Path) -> None:
    """Raises RunError if `output` exists: nothing is overwritten."""
    if os.path.lexists(output):
        raise RunError(f"{output} exists already; choose an OUTPUT that does not exist yet, or remove it first.")


def signal_at_end_of_parent(number: int) -> None:
    """Asks Linux to send this process the signal `number` when its parent ends; 0 for no signal."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG of <linux/prctl.h>


def end_launcher() -> None:
    """Ends `accelerate launch` of one process on Linux; it would print its own traceback after Ctrl-C."""
    with suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
        if b"launch" in words and os.environ.get("WORLD_SIZE", "1") == "1":
            os.kill(os.getppid(), signal.SIGTERM)


_parent: int | None = None


@contextmanager
def workers_end_with_this_process() -> Iterator[None]:
    """On Linux, kills the processes that were forked in this block when this process ends.

    Otherwise a pool whose parent was killed waits forever, with text of patients and the lock of a partial folder.
    """
    global _parent
    if sys.platform == "linux":
        _end_forks_with_parent()
        _parent = os.getpid()
    try:
        yield
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # an interrupted pool raises TimeoutError
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
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; only the parent handles it
            if os.getppid() != _parent:  # the parent ended before the signal was set
                os._exit(1)

    os.register_at_fork(after_in_child=set_signal)


def differences(stored: Any, now: Any, path: str = "") -> list[str]:
    """Differences of two nested mappings, as `key is this and was that`; for long values, `key has changed`."""
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        keys = sorted({**stored, **now})
        nested = (differences(stored.get(key), now.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return [change for changes in nested for change in changes]
    if stored == now:
        return []
    before, after = (json.dumps(value, ensure_ascii=False) for value in (stored, now))
    shown = max(len(before), len(after)) <= 80 and path != "prompt.examples"  # which hold patients' text
    return [f"{path} is {after} and was {before}" if shown else f"{path} has changed"]
