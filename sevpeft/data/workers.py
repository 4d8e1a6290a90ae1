"""Worker processes that end with the one that started them, however that one ends.

A pool whose parent is killed waits for work for ever: it would hold memory, patient text and the lock on a half-built
folder. Linux tells a child of its parent's death, if the child asks for it; elsewhere the workers have to be ended by
hand after a kill.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_parent: int | None = None


@contextlib.contextmanager
def workers_end_with_this_process() -> Iterator[None]:
    """Every process that is forked in this block is killed when this one ends."""
    global _parent
    if sys.platform != "linux":
        yield
        return
    _ask_at_every_fork()
    _parent = os.getpid()
    try:
        yield
    finally:
        _parent = None


@functools.cache
def _ask_at_every_fork() -> None:
    libc = ctypes.CDLL(None)

    def ask() -> None:
        if _parent is None:
            return
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _parent:  # it ended before it was asked about
            os._exit(1)

    os.register_at_fork(after_in_child=ask)
