"""Several sources of training rows, in shares of a budget of tokens that stays the same whatever the shares are."""

from __future__ import annotations

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

FIRST = "data.path"  # what the first source is called; the others have their names in `data.mix.sources`
SOURCE = "mix_source"  # column that says of which source a row is, "" of the first; people's files have a `source`


def with_sources(table: Consultations, data: TrainingDataSection, keep: Keep) -> Consultations:
    """The table of `data.path` with the rows of the further sources behind its own; without a mix as it is.

    Of a source with a split column only the train rows are taken. A DataError names the source that is wrong.
    """
    if data.mix is None:
        return table
    tables, parts = [table], [table.rows.add_column(SOURCE, [""] * len(table.rows))]
    for name, path in data.mix.sources.items():
        own = TrainingDataSection(path=path, max_rows=data.max_rows, loss_on=data.loss_on)
        try:
            found = load_consultations(own, keep=keep)
            sides = given_sides(found.rows, own)
        except DataError as error:
            raise DataError(f"data.mix.sources.{name}: {error}") from None
        rows = found.rows if sides is None else found.rows.select(np.flatnonzero(sides == TRAIN))
        tables.append(found)
        parts.append(rows.add_column(SOURCE, [name] * len(rows)))
    return replace(
        table,
        rows=datasets.concatenate_datasets(parts),
        rejected=dict(sum((Counter(one.rejected) for one in tables), Counter[str]())),
        # Sorted, so that one of the Hub, which holds times, comes first.
        fingerprint="+".join(sorted(one.fingerprint for one in tables)),
        source=f"{table.source} mixed with {', '.join(data.mix.sources)}",
    )


def draw(
    lengths: NDArray[np.int32], source: NDArray[np.str_], data: TrainingDataSection
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """Positions of the rows to train on, ascending, with repetitions; and share, rows and tokens of each source.

    A source's rows come in a seeded order until its share of the tokens is met as nearly as whole rows can; one that
    is too small begins anew. So a larger share holds the rows of a smaller one. `lengths` (n,) are tokens of prompt and
    answer, `source` (n,) names.
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
            raise DataError(f"data.mix finds no row of {name} that fits its share; bring others, or raise mix.tokens.")
        drawn.append(part)
        tokens, distinct = int(lengths[part].sum()), len(np.unique(part))
        counts[name] = {"share": share, "rows": len(part), "distinct_rows": distinct, "tokens": tokens}
    return np.sort(np.concatenate(drawn)), counts
