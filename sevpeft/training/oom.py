"""Out of memory: computes a batch that does not fit in parts, for the same optimizer step."""

from collections.abc import Callable
from typing import Any

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from trl import SFTConfig

from sevpeft.errors import RunError
from sevpeft.training.data import rows_of

Batch = dict[str, Any]


class SplitOnOom:
    """Halves the number of consultations that are computed at once each time they do not fit in memory.

    Args:
        collate: makes a batch of rows. enabled: if False, an out-of-memory error is raised again.
        on_message: called with a sentence for the screen.

    Attributes:
        most_rows: consultations that are computed at once, in training and in validation; None for whole batches.
    """

    def __init__(self, args: SFTConfig, collate: Callable, enabled: bool, on_message: Callable) -> None:
        self.args, self.collate, self.enabled, self.on_message = args, collate, enabled, on_message
        self.most_rows: dict[str, int | None] = {"train": None, "eval": None}

    def compute(self, kind: str, batch: Batch, take: Callable[[Batch], Any], undo: Callable[[], list[Batch]]) -> list:
        """Results of `take` on parts of a batch that fit in memory; their losses sum to that of the batch.

        `undo`: reverts what a failed attempt has changed; returns the batches to compute again before this one.

        Raises RunError: a single validation row does not fit. RuntimeError: the library's own, in training.
        """
        batches = [batch]
        while True:
            try:
                for one in batches:
                    results = [take(part) for part in self.parts_of(one, self.most_rows[kind])]
                return results
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                rows = len(rows_of(batch))
                half = min(rows, self.most_rows[kind] or rows) // 2
                if not (half and self.enabled):
                    if kind == "train":
                        raise
                    size = f"training.per_device_eval_batch_size (now {self.args.per_device_eval_batch_size})"
                    setting = size if half else "training.max_length"  # one row alone does not fit
                    raise RunError(f"The memory is full in validation; lower {setting}.") from error
            self.most_rows[kind] = half
            clear_device_cache(garbage_collection=True)
            what = "validation" if kind == "eval" else "the same step"
            self.on_message(f"The memory is full; {what} continues with {half} rows at once.")
            batches = [*undo(), batch]

    def parts_of(self, batch: Batch, most: int | None) -> list[Batch]:
        """The batch in parts of at most `most` consultations; None leaves it whole."""
        rows = rows_of(batch) if most else []
        if not most or len(rows) <= most:
            return [batch]
        return [self.collate(rows[start : start + most]) for start in range(0, len(rows), most)]
