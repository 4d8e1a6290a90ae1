"""Turns the tokens of a consultation back into the name of the row that it came from, for a sentence about it.

A batch holds tokens only: rows are shuffled, packed and cut on their way there. So the encoded rows are searched for
equal tokens, which costs a second and happens only when something has gone wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from sevpeft.data.files import FILE_COLUMN


class RowNames:
    """Names rows by their number in the data, never by what they say.

    Args:
        encoded: `input_ids` and `source_index`, the position in `rows`, of each training row.
        rows: the split that was encoded, with `row`, its number in the input, and `file` where there are several.
    """

    def __init__(self, encoded: Dataset, rows: Dataset) -> None:
        self._encoded = encoded.select_columns(["input_ids", "source_index"])
        self._rows = rows.select_columns([name for name in ("row", FILE_COLUMN) if name in rows.column_names])

    def __call__(self, documents: Sequence[Sequence[int]]) -> list[str]:
        """Names of the rows with exactly these tokens, in the order of the data; equal rows are all named."""
        wanted = {tuple(document) for document in documents}
        lengths = list({len(document) for document in wanted})
        found: list[int] = []
        for table in self._encoded.with_format("arrow").iter(batch_size=10_000):
            column = table["input_ids"].combine_chunks()
            fitting = np.flatnonzero(np.isin(pc.list_value_length(column).to_numpy(zero_copy_only=False), lengths))
            positions = table["source_index"].to_numpy()
            found += [int(positions[index]) for index in fitting if tuple(column[index].as_py()) in wanted]
        return [self._name(index) for index in found]

    def _name(self, index: int) -> str:
        row = self._rows[index]
        return f"row {row['row']}{f' of {row[FILE_COLUMN]}' if FILE_COLUMN in row else ''}"
