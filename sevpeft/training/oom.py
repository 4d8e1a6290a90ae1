"""Computes a batch that does not fit in memory in parts: the same optimizer step, only slower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from trl import SFTConfig

from sevpeft.errors import RunError
from sevpeft.training.data import rows_of

Batch = dict[str, Any]


class SplitOnOom:
    """Halves the number of consultations that are computed at once, whenever they do not fit.

    Args:
        collate: makes a batch of consultations. enabled: else an out-of-memory error is raised on.
        on_message: gets a label and a sentence for the screen.

    Attributes:
        most_rows: consultations that are computed at once, in training and in validation; None for whole batches.
    """

    def __init__(self, args: SFTConfig, collate: Callable, enabled: bool, on_message: Callable) -> None:
        self.args, self.collate, self.enabled, self.on_message = args, collate, enabled, on_message
        self.most_rows: dict[str, int | None] = {"train": None, "eval": None}

    def compute(self, kind: str, batch: Batch, take: Callable[[Batch], Any], undo: Callable[[], list[Batch]]) -> list:
        """Results of `take` on the parts of a batch that fit; their losses have the same sum.

        `undo`: takes back what a failure has left; returns the batches that must be taken again before this one.

        Raises RunError: a single validation row does not fit. RuntimeError: the library's own, in training.
        """
        batches = [batch]
        while True:
            try:
                return [[take(part) for part in self.parts_of(one, self.most_rows[kind])] for one in batches][-1]
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                rows = len(rows_of(batch))
                half = min(rows, self.most_rows[kind] or rows) // 2
                if not (half and self.enabled):
                    if kind == "train":
                        raise
                    size = f"training.per_device_eval_batch_size (now {self.args.per_device_eval_batch_size})"
                    raise RunError(f"The memory is too small for validation; lower {size}.") from error
            self.most_rows[kind] = half
            clear_device_cache(garbage_collection=True)
            what = "validation" if kind == "eval" else "the same step"
            self.on_message("Memory", f"full; {what} continues with {half} rows at once")
            batches = [*undo(), batch]

    def parts_of(self, batch: Batch, most: int | None) -> list[Batch]:
        """The batch in parts of at most so many consultations; None leaves it whole."""
        rows = rows_of(batch) if most else []
        if not most or len(rows) <= most:
            return [batch]
        return [self.collate(rows[start : start + most]) for start in range(0, len(rows), most)]
