"""Mixes several sources of training rows by shares of one token budget, which is the same for all shares."""

from collections import Counter
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from sevpeft.data.read import Consultations, Keep, load_consultations
from sevpeft.data.split import TRAIN, given_sides
from sevpeft.errors import DataError
from sevpeft.recipe import TrainingDataSection

FIRST = "data.path"  # name of the first source; `data.mix.sources` names the others
SOURCE = "mix_source"  # column with the source of a row, "" for the first; users' files may have a column `source`


def with_sources(table: Consultations, data: TrainingDataSection, keep: Keep) -> Consultations:
    """The table of `data.path` with the rows of the other sources appended; unchanged without a mix.

    A source with a split column gives its train rows only. Raises DataError with the name of the source at fault.
    """
    if data.mix is None:
        return table
    tables, parts = [table], [table.rows.add_column(SOURCE, [""] * len(table.rows))]
    for name, path in data.mix.sources.items():
        own = TrainingDataSection(path=path, max_rows=data.max_rows, loss_on=data.loss_on)
        try:
            source = load_consultations(own, keep=keep)
            sides = given_sides(source.rows, own)
        except DataError as error:
            raise DataError(f"data.mix.sources.{name}: {error}") from None
        rows = source.rows if sides is None else source.rows.select(np.flatnonzero(sides == TRAIN))
        tables.append(source)
        parts.append(rows.add_column(SOURCE, [name] * len(rows)))
    return replace(
        table,
        rows=datasets.concatenate_datasets(parts),
        rejected=dict(sum((Counter(each.rejected) for each in tables), Counter[str]())),
        # Sorted: the fingerprint of a Hub data set, which holds times, comes first.
        fingerprint="+".join(sorted(each.fingerprint for each in tables)),
        source=f"{table.source} mixed with {', '.join(data.mix.sources)}",
    )


def draw(
    lengths: NDArray[np.int32], source: NDArray[np.str_], data: TrainingDataSection
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """Positions of the rows to train on, ascending and maybe repeated, and the share, rows and tokens of each source.

    Rows of a source are taken in a seeded order until they are closest to its share of the tokens. A source that is too
    small is repeated. A larger share contains the rows of a smaller one. `lengths` (n,): tokens of prompt and answer;
    `source` (n,): names.
    """
    assert data.mix is not None
    budget = data.mix.tokens or int(lengths[source == ""].sum())
    drawn, counts = [], dict[str, Any]()
    percentages = data.mix.ratios.split("-")
    for number, (name, percent) in enumerate(zip([FIRST, *data.mix.sources], percentages, strict=True)):
        own, share = np.flatnonzero(source == (name if number else "")), float(percent) / 100
        order = own[np.random.default_rng([data.seed, number]).permutation(len(own))]
        sums = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
        times, rest = divmod(share * budget, sums[-1]) if sums[-1] else (0, 0)
        part = np.concatenate([np.repeat(own, int(times)), order[: np.abs(sums - rest).argmin()]])
        if share and not len(part):
            raise DataError(f"No row of {name} fits its share of data.mix; add shorter rows, or raise data.mix.tokens.")
        drawn.append(part)
        tokens, distinct = int(lengths[part].sum()), len(np.unique(part))
        counts[name] = {"share": share, "rows": len(part), "distinct_rows": distinct, "tokens": tokens}
    return np.sort(np.concatenate(drawn)), counts
