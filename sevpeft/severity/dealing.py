"""Lets the processes of one launch, or the cores of one process, share a piece of work.

None waits for ever for one that failed, and it is said why.

Only short texts are exchanged (by gloo, on a GPU machine too), so that work without torch needs no torch for it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from typing import Any, TypeVar

from sevpeft.errors import RunError, SevpeftError
from sevpeft.runs import workers_end_with_this_process

Shared = TypeVar("Shared")
Done = TypeVar("Done")

# Parts are dealt out evenly, but not every machine is as fast; a process that is gone is noticed at once.
_PATIENCE = timedelta(days=7)


class Processes:
    """This process among those of its launch.

    Attributes:
        number: of this process, from 0.
        count: of all processes.
    """

    def __init__(self, number: int = 0, count: int = 1) -> None:
        self.number = number
        self.count = count

    @classmethod
    def of_launch(cls) -> Processes:
        """As `accelerate launch` or `torchrun` say it; one process where nothing started several."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1:
            from torch import distributed

            if not distributed.is_initialized():
                distributed.init_process_group("gloo", timeout=_PATIENCE)
        return cls(int(os.environ.get("RANK", "0")), count)

    @property
    def main(self) -> bool:
        """Whether this process does what only one may do."""
        return self.number == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that ends for all at once: where one failed, it fails for all, with that one's sentence.

        Raises:
            RunError: another process failed, or is gone.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.count > 1:
            said = self._exchanged(None if failure is None else _sentence(failure))
            others = [sentence for sentence in said if sentence is not None]
            if failure is None and others:
                raise RunError(others[0])
        if failure is not None:
            raise failure

    def part_of(self, total: int) -> range:
        """Which of so many parts this process does: every `count`-th."""
        return range(self.number, total, self.count)

    def leave(self) -> None:
        """Ends the exchange; a process that goes while gloo's threads live is now and then aborted."""
        if self.count > 1:
            from torch import distributed

            distributed.destroy_process_group()

    def _exchanged(self, own: str | None) -> list[str | None]:
        from torch import distributed

        said: list[str | None] = [None] * self.count
        try:
            distributed.all_gather_object(said, own)
        except RuntimeError:
            if own is not None:
                return [own]
            raise RunError(
                "Another process of this launch ended before its work was done; give the same command again, what is "
                "finished is kept."
            ) from None
        return said


def _sentence(error: Exception) -> str:
    """What may be said of a failure elsewhere; of an error of a library its kind alone, for it may quote a row."""
    if isinstance(error, SevpeftError):
        return str(error)
    return f"Another process of this launch failed with {type(error).__name__}; look at what it printed."


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_workers(
    work: Callable[[Shared, int], Done], shared: Shared, numbers: Sequence[int], workers: int
) -> Iterator[Done]:
    """`work(shared, number)` for every number, in their order, by forked processes where several help.

    Args:
        shared: reaches the workers by the fork, so it is neither copied nor pickled.

    Raises:
        RunError: a worker was ended from outside. What `work` raises is raised here.
    """
    workers = min(workers, len(numbers)) if sys.platform == "linux" else 1
    if workers < 2:
        for number in numbers:
            yield work(shared, number)
        return
    with (
        workers_end_with_this_process(),
        ProcessPoolExecutor(workers, get_context("fork"), _share, (work, shared)) as pool,
    ):
        try:
            yield from pool.map(_work, numbers)
        except BrokenProcessPool as error:
            raise RunError(
                "A worker process was ended from outside, perhaps because memory ran out; run the same command again, "
                "and it goes on where it was."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_shared: tuple[Any, Any] | None = None


def _share(work: Any, shared: Any) -> None:
    global _shared
    _shared = work, shared
    # Ctrl-C reaches the whole group; the parent answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(number: int) -> Any:
    assert _shared is not None
    work, shared = _shared
    return work(shared, number)
