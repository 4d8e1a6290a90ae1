"""Several sources of training rows, in shares of a budget of tokens that stays the same whatever the shares are."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from sevpeft.data.read import Consultations, Keep, load_consultations
from sevpeft.data.split import TRAIN, Splits, given_sides, question_keys
from sevpeft.errors import DataError
from sevpeft.recipe import TrainingDataSection

FIRST = "data.path"  # what the first source is called; the others have their names in `data.mix.sources`
SOURCE = "mix_source"  # column of the rows of these others; not `source`, which people's files have


def with_sources(table: Consultations, data: TrainingDataSection, keep: Keep) -> Consultations:
    """The table of `data.path` with the rows of the further sources behind its own; without a mix as it is.

    Of a source with a split column only the train rows are taken. A DataError names the source that is wrong.
    """
    if data.mix is None:
        return table
    parts, fingerprints, rejected = [table.rows], [table.fingerprint], Counter(table.rejected)
    for name, path in data.mix.sources.items():
        # Columns are recognized by their names.
        own = TrainingDataSection(path=path, max_rows=data.max_rows, loss_on=data.loss_on)
        try:
            found = load_consultations(own, keep=keep)
            sides = given_sides(found.rows, own)
        except DataError as error:
            raise DataError(f"data.mix.sources.{name}: {error}") from None
        rows = found.rows if sides is None else found.rows.select(np.flatnonzero(sides == TRAIN))
        parts.append(rows.add_column(SOURCE, [name] * len(rows)))
        fingerprints.append(found.fingerprint)
        rejected.update(found.rejected)
    rows = datasets.concatenate_datasets(parts)
    kind = "sha256" if all(one.startswith("sha256:") for one in fingerprints) else "hub"  # which holds times, too
    content = hashlib.sha256("".join(fingerprints).encode()).hexdigest()
    source = f"{table.source} mixed with {', '.join(data.mix.sources)}"
    fingerprint = f"{kind}:{content}"
    return replace(table, rows=rows, rejected=dict(rejected), fingerprint=fingerprint, source=source)


def with_mixed(splits: Splits, rows: datasets.Dataset, first: int) -> Splits:
    """The splits with those of `rows` that stand behind the `first` ones and ask no question of validation or test."""
    if len(rows) == first:
        return splits
    others = rows.add_column("source_index", np.arange(len(rows))).select(range(first, len(rows)))
    held_out = np.concatenate([question_keys(part) for part in (splits.validation, splits.test)])
    return splits._replace(mixed=others.select(np.flatnonzero(~np.isin(question_keys(others), held_out))))


def draw(
    lengths: NDArray[np.int32], source: NDArray[np.str_], data: TrainingDataSection
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """Positions of the rows to train on, ascending, with repetitions; and share, rows and tokens of each source.

    A source's rows come in a seeded order until its share of the tokens is met as nearly as whole rows can; one that
    is too small begins anew. So a larger share holds the rows of a smaller one.

    Args:
        lengths: (n,) tokens of prompt and answer. source: (n,) name of the source, "" for the first.
    """
    assert data.mix is not None
    budget = data.mix.tokens or int(lengths[source == ""].sum())
    drawn, counts = [], dict[str, Any]()
    for number, (name, share) in enumerate(zip([FIRST, *data.mix.sources], data.mix.shares(), strict=True)):
        own = np.flatnonzero(source == (name if number else ""))
        order = own[np.random.default_rng([data.seed, number]).permutation(len(own))]
        sums = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
        times, rest = divmod(share * budget, sums[-1]) if sums[-1] else (0, 0)
        part = np.concatenate([np.repeat(own, int(times)), order[: np.abs(sums - rest).argmin()]])
        if share and not len(part):
            raise DataError(f"data.mix finds no row of {name} that fits its share; bring others, or raise mix.tokens.")
        drawn.append(part)
        counts[name] = {"share": share, "rows": len(part), "distinct_rows": len(np.unique(part))}
        counts[name]["tokens"] = int(lengths[part].sum())
    return np.sort(np.concatenate(drawn)), counts
