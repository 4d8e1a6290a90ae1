"""Keeps two trainings from writing into one run folder, which would mix their logs, checkpoints and adapters.

The lock lies in the cache folder, under the digest of the run's path: a run that is refused leaves no trace where it
would have been. A kill gives it back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sevpeft.errors import RunError
from sevpeft.runs import cache_folder


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds a run folder, there already or not, for this process.

    Raises:
        RunError: another training on this machine holds it.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(cache_folder("locks") / f"{digest}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(
            f"{folder} is being written by another training; wait until it ends, or choose another --output."
        ) from None
    try:
        yield
    finally:
        lock.release()
