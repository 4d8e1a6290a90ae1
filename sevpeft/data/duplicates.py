"""From questions to groups of those that are the same or nearly so, in time that grows with the rows, not their square.

A question is the set of its four-letter shingles, folded. Questions whose sets have a Jaccard similarity of at least
the threshold are near-duplicates. MinHash (Broder 1997, here `rensa`'s) with locality-sensitive hashing finds pairs
that may be; each is then compared set with set, so that a group holds no pair of which the hash was merely hopeful.
Groups are the connected components: a question may be in one with another that it resembles only through a third.

Letters find again what words lose: a typo, a prefix, a dropped preposition.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import rensa
from datasets.utils import tqdm
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from sevpeft.data.cleaning import fold_for_matching
from sevpeft.data.splits import question_key
from sevpeft.errors import DataError

# Of 600 real questions, median 25 words, .7 finds again 94 % with one word replaced, 92 % with two typos, 85 % with a
# greeting before them and 67 % with eight words after them. .6 finds 98, 96, 92 and 83 %, but also takes short
# questions of one mould for one ("What are the symptoms of ...": 420 of 2,000 instead of 122); .8 85, 83, 65 and 28 %.
THRESHOLD = 0.7
LOWEST_THRESHOLD = 0.5

_SHINGLE = 4
_PERMUTATIONS = 512
_MOST_MISSED = 0.02  # share of the pairs exactly at the threshold that no band shows
_NEIGHBOURS = 16  # rows of one bucket with which a row is compared, beside the bucket's first
_PAIRS_AT_ONCE = 50_000
_SETS_AT_ONCE = 2_000
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64
)  # odd, as multipliers modulo 2 ** 64 have to be
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SMALL = 2_000  # rows below which starting processes takes longer than the work

_FEATURES = datasets.Features(
    {
        "key": datasets.Value("uint64"),
        "shingles": datasets.Value("large_binary"),
    }
)


@dataclass(frozen=True)
class Groups:
    """Which rows ask the same, or nearly so.

    Attributes:
        numbers: (n,) int64, group of every row, from 0 in the order in which the rows bring them.
        questions: (n,) int64, likewise for the exactly equal folded questions, which groups are made of.
        keys: (n,) uint64, equal within a group; in the order that the seed sets, whatever order the rows have.
        exact: rows whose folded question stood before. near: distinct questions that joined another's group.
        largest: rows of the largest group. threshold: Jaccard similarity from which on two are near-duplicates.
    """

    numbers: NDArray[np.int64]
    questions: NDArray[np.int64]
    keys: NDArray[np.uint64]
    exact: int
    near: int
    largest: int
    threshold: float

    @property
    def count(self) -> int:
        """Number of groups."""
        return int(self.numbers.max()) + 1 if len(self.numbers) else 0


def duplicate_groups(
    rows: datasets.Dataset,
    *,
    threshold: float = THRESHOLD,
    seed: int = 0,
    num_proc: int | None = None,
    scratch: Path | None = None,
) -> Groups:
    """Group the rows (with `question`) by exact and near-duplicate question; the same for any `num_proc`.

    `threshold` 1 groups equal folded questions only. `scratch` is a folder for memory-mapped files.

    Raises:
        DataError: the threshold is no similarity that is searched for.
    """
    if not LOWEST_THRESHOLD <= threshold <= 1:
        raise DataError(
            f"A similarity of {threshold} does not make near-duplicates: give {LOWEST_THRESHOLD} to 1, "
            "where 1 means equal questions only."
        )
    if not len(rows):
        none = np.zeros(0, np.int64)
        return Groups(none, none, np.zeros(0, np.uint64), 0, 0, 0, threshold)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="shingles-") as folder:
        cut = rows.select_columns(["question"]).map(
            _cut,
            batched=True,
            remove_columns=["question"],
            features=_FEATURES,
            fn_kwargs={"seed": seed},
            cache_file_name=str(Path(folder) / "shingles.arrow"),
            load_from_cache_file=False,
            num_proc=num_proc if num_proc and num_proc > 1 and len(rows) >= _SMALL else None,
            desc="Folding questions",
        )
        keys = np.concatenate([batch["key"].to_numpy() for batch in _arrow(cut, "key")])
        questions, first = _numbered(keys)
        component = np.arange(len(first))
        if threshold < 1:
            component = _components(cut, first, threshold, seed)
        del cut
    numbers, _ = _numbered(component[questions])
    smallest = np.full(numbers.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, numbers, keys)
    groups = len(smallest)
    return Groups(
        numbers,
        questions,
        smallest[numbers],
        exact=len(keys) - len(first),
        near=len(first) - groups,
        largest=int(np.bincount(numbers).max()),
        threshold=threshold,
    )


def conflicting_groups(groups: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of the groups (n,) whose rows have several labels (n,); a label below 0 is none."""
    labelled = labels >= 0
    pairs = np.unique(np.stack([groups[labelled], labels[labelled]], axis=1), axis=0)
    numbers, kinds = np.unique(pairs[:, 0], return_counts=True)
    return numbers[kinds > 1]


def bands_for(threshold: float) -> tuple[int, int]:
    """Return (bands, permutations in a band): as selective as can be while few pairs at the threshold are missed.

    Two sets of similarity s agree in all r permutations of one of b bands with probability 1 - (1 - s ** r) ** b.
    """
    fitting = [r for r in range(1, 33) if (1 - threshold**r) ** (_PERMUTATIONS // r) <= _MOST_MISSED]
    return _PERMUTATIONS // max(fitting), max(fitting)


def shingles(texts: list[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hashed four-letter shingles of folded texts, one text after the other, and where each one begins.

    The second array has one number more than there are texts. Shingles that a text repeats are repeated.
    """
    padded = [text.ljust(_SHINGLE) for text in texts]
    letters = np.frombuffer("\n".join(padded).encode("utf-32-le"), np.uint32).astype(np.uint64)
    windows = len(letters) - _SHINGLE + 1
    hashed = np.zeros(windows, np.uint64)
    for place, factor in enumerate(_FACTORS):
        hashed += letters[place : place + windows] * factor
    hashed ^= hashed >> np.uint64(29)
    hashed *= _MIX
    hashed ^= hashed >> np.uint64(32)
    lengths = np.array([len(text) for text in padded])
    ends = np.cumsum(lengths - _SHINGLE + 1)
    # Between two texts lie as many windows that reach from one into the next.
    within = np.arange(ends[-1]) + np.repeat(np.arange(len(texts)) * _SHINGLE, lengths - _SHINGLE + 1)
    return hashed[within], np.concatenate([[0], ends])


def _cut(batch: dict[str, list[Any]], seed: int) -> dict[str, Any]:
    folded = [fold_for_matching(question) for question in batch["question"]]
    hashed, begins = shingles(folded)
    sets = [np.unique(one) for one in np.split((hashed >> np.uint64(33)).astype(np.int32), begins[1:-1])]
    return {
        "key": np.array([question_key(text, seed) for text in folded], np.uint64),
        "shingles": [one.tobytes() for one in sets],
    }


def _buckets(
    members: NDArray[np.int32], begins: NDArray[np.int64], bands: tuple[int, int], seed: int
) -> NDArray[np.uint32]:
    """Return the bucket (n, bands) of every set in every band.

    Not to be called in a forked process: rensa's threads do not survive the fork, and the call would wait for them.
    """
    factors = np.random.default_rng(seed).integers(2**63, size=bands[1], dtype=np.uint64) | np.uint64(1)
    buckets = np.empty((len(begins) - 1, bands[0]), np.uint32)
    for at in tqdm(range(0, len(buckets), _SETS_AT_ONCE), "Comparing questions", unit_scale=_SETS_AT_ONCE, delay=2):
        some = begins[at : at + _SETS_AT_ONCE + 1]
        tokens = members[some[0] : some[-1]].astype(np.uint64) * _MIX
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            tokens, (some - some[0]).astype(np.uint64), bands[0] * bands[1], seed
        )
        signatures = np.array(matrix.to_rows(), np.uint64).reshape(-1, *bands)
        # A bucket's number is a hash of its band; two bands that share one by accident are told apart by the sets.
        buckets[at : at + _SETS_AT_ONCE] = (signatures * factors).sum(axis=2, dtype=np.uint64) >> np.uint64(32)
    return buckets


def _arrow(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    return rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000)


def _numbered(values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return every value's number in order of first appearance, and where each number appears first."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[inverse], first[order]


def _sets_of(cut: datasets.Dataset, wanted: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the wanted rows' shingles, one set after the other, and where each set begins, with the end last."""
    parts, lengths, at = [], [], 0
    for batch in _arrow(cut, "shingles"):
        cells = batch["shingles"].combine_chunks().filter(wanted[at : at + len(batch)])
        at += len(batch)
        offsets = np.frombuffer(cells.buffers()[1], np.int64)[cells.offset : cells.offset + len(cells) + 1]
        data = np.frombuffer(cells.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
        parts.append(data.copy().view(np.int32))
        lengths.append(np.diff(offsets) // 4)
    return np.concatenate(parts), np.concatenate([[0], np.cumsum(np.concatenate(lengths))])


def _components(cut: datasets.Dataset, first: NDArray[np.int64], threshold: float, seed: int) -> NDArray[np.int64]:
    """Return the component of every distinct question, `first` saying which row of `cut` stands for it."""
    wanted = np.zeros(len(cut), bool)
    wanted[first] = True
    members, begins = _sets_of(cut, wanted)
    sizes = np.diff(begins)
    sets = sparse.csr_array((np.ones(len(members), np.bool_), members, begins), shape=(len(first), 2**31 - 1))
    bands = bands_for(threshold)
    buckets = _buckets(members, begins, bands, seed)
    component = np.arange(len(first))
    for band in range(bands[0]):
        for left, right in _met(buckets[:, band]):
            may = component[left] != component[right]
            may &= np.minimum(sizes[left], sizes[right]) >= threshold * np.maximum(sizes[left], sizes[right])
            left, right = left[may], right[may]
            alike = np.zeros(len(left), bool)
            for at in range(0, len(left), _PAIRS_AT_ONCE):
                part = slice(at, at + _PAIRS_AT_ONCE)
                alike[part] = _similarity(sets, sizes, left[part], right[part]) >= threshold
            if alike.any():
                component = _joined(component, left[alike], right[alike])
    return component


def _met(buckets: NDArray[np.uint32]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the pairs that share a bucket: each with the bucket's first, then with those that follow it.

    All pairs would be a square in a bucket that half of the rows share, as a template's rows do.
    """
    order = np.argsort(buckets, kind="stable")
    ordered = buckets[order]
    repeats = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    begins = np.maximum.accumulate(np.where(np.isin(np.arange(len(order)), repeats), 0, np.arange(len(order))))
    yield order[begins[repeats]], order[repeats]
    for step in range(1, _NEIGHBOURS + 1):
        repeats = np.flatnonzero(ordered[step:] == ordered[:-step])
        # A pair with the bucket's first was seen.
        repeats = repeats[begins[repeats] != repeats]
        if not len(repeats):
            return
        yield order[repeats], order[repeats + step]


def _similarity(
    sets: sparse.csr_array, sizes: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the Jaccard similarity (pairs,) of the sets of `left` and `right` (pairs,)."""
    shared = np.diff(sets[left].multiply(sets[right]).tocsr().indptr)
    return np.asarray(shared / (sizes[left] + sizes[right] - shared))


def _joined(component: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    edges = (np.ones(len(left), np.bool_), (component[left], component[right]))
    count = int(component.max()) + 1
    _, merged = connected_components(sparse.coo_array(edges, shape=(count, count)), directed=False)
    return merged[component].astype(np.int64)
