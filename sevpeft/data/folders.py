"""A folder of results that appears whole or not at all; for its owner alone unless it is shared.

It is built beside its place under a hidden name and moved there in the end. A failure takes it away; what a kill
leaves behind is taken away when the same folder is made the next time: whoever builds one holds a lock on it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sevpeft.errors import RunError
from sevpeft.runs import keep_private, plain_disk_errors

_LOCK = ".building"


@contextlib.contextmanager
def whole_folder(
    output: Path,
    *,
    shared: bool = False,
    when_full: str = "free some, then run this again",
    remedy: str = "choose another OUTPUT",
) -> Iterator[Path]:
    """Yield a new folder, mode 0700, which becomes `output` when the block ends without an error.

    Args:
        shared: open it as the umask says at the end, because it holds nothing of patients.
        when_full: remedy of a full disk. remedy: of one that refuses.

    Raises:
        RunError: `output` exists, before the block or at its end, or the disk refuses.
    """
    output = Path(os.path.abspath(output))
    with plain_disk_errors(output, when_full=when_full, remedy=remedy):
        refuse_existing(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        lock = FileLock(partial / _LOCK)
        try:
            with lock:
                yield partial
                refuse_existing(output)
                (partial / _LOCK).unlink()
                if shared:
                    _open_to_all(partial)
                else:
                    keep_private(partial)
                partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(output: Path) -> None:
    """Raise RunError where something stands at `output`: nothing is overwritten."""
    if os.path.lexists(output):
        raise RunError(f"{output} exists already; choose an OUTPUT that does not exist yet, or remove it first.")


def _remove_abandoned(output: Path) -> None:
    for lock in output.parent.glob(f".{output.name}.*/{_LOCK}"):
        with contextlib.suppress(Timeout, OSError), FileLock(lock, timeout=0):
            shutil.rmtree(lock.parent, ignore_errors=True)


def _open_to_all(folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
