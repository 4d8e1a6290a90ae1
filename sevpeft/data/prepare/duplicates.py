"""Groups equal and near-duplicate questions in linear time.

Near-duplicates have sets of folded four-letter shingles with a Jaccard similarity of at least the threshold. MinHash
(Broder 1997, by `rensa`) finds candidate pairs; each is compared. Groups are the connected components of the pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import rensa
from datasets.utils import tqdm
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from sevpeft.data.split import question_key
from sevpeft.data.text import fold_for_matching

_SHINGLE = 4
_PERMUTATIONS = 512
_NEIGHBORS = 16  # rows of a bucket that a row is compared with, beside the first one
_PAIRS_AT_ONCE, _SETS_AT_ONCE = 50_000, 2_000
# Multipliers modulo 2 ** 64 must be odd.
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
Ints = NDArray[np.int64]


class Groups(NamedTuple):
    """The group of each row (n,); numbers count from 0 in order of first appearance."""

    numbers: Ints  # group of every row
    questions: Ints  # the same for equal folded questions
    keys: NDArray[np.uint64]  # equal within a group; their order depends on the seed, not on the rows' order


def duplicate_groups(questions: Iterable[str], *, threshold: float, seed: int) -> Groups:
    """Groups of equal and, with a `threshold` below 1, near-duplicate questions (n,), n at least 1."""
    keys, sets, seen = [], [], set()
    for question in questions:
        folded = fold_for_matching(question)
        keys.append(question_key(folded, seed))
        if threshold < 1 and keys[-1] not in seen:
            seen.add(keys[-1])
            sets.append(shingles(folded))
    key = np.array(keys, np.uint64)
    numbers = _numbered(key)
    component = np.arange(numbers.max() + 1)
    if threshold < 1:
        component = _components(np.concatenate(sets), np.cumsum([0, *map(len, sets)]), threshold, seed)
    groups = _numbered(component[numbers])
    smallest = np.full(groups.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, groups, key)
    return Groups(groups, numbers, smallest[groups])


def conflicting_groups(groups: Ints, labels: Ints) -> Ints:
    """The numbers of those groups (n,) whose rows have several labels (n,); a label below 0 is ignored."""
    labeled = labels >= 0
    pairs = np.unique(np.stack([groups[labeled], labels[labeled]], axis=1), axis=0)
    numbers, kinds = np.unique(pairs[:, 0], return_counts=True)
    return numbers[kinds > 1]


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, permutations per band): the most selective that lose at most 2 % of pairs at the threshold."""
    # Two sets of similarity s agree in all r permutations of one of b bands with probability 1 - (1 - s ** r) ** b.
    rows = max(r for r in range(1, 33) if (1 - threshold**r) ** (_PERMUTATIONS // r) <= 0.02)
    return _PERMUTATIONS // rows, rows


def shingles(folded: str) -> NDArray[np.int32]:
    """The distinct hashed four-letter shingles (s,) of a folded text."""
    letters = np.frombuffer(folded.ljust(_SHINGLE).encode("utf-32-le"), np.uint32).astype(np.uint64)
    hashed = np.lib.stride_tricks.sliding_window_view(letters, _SHINGLE) @ _FACTORS
    hashed ^= hashed >> np.uint64(29)
    hashed *= _MIX
    return np.unique((hashed >> np.uint64(33)).astype(np.int32))


def _numbered(values: NDArray[Any]) -> Ints:
    """The number of every value in order of first appearance."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _components(members: NDArray[np.int32], begins: Ints, threshold: float, seed: int) -> Ints:
    """The component of every distinct question i, whose shingles are members[begins[i] : begins[i + 1]]."""
    count, sizes = len(begins) - 1, np.diff(begins)
    sets = sparse.csr_array((np.ones(len(members), np.bool_), members, begins), shape=(count, 2**31 - 1))
    component = np.arange(count)
    for band in _buckets(members, begins, bands_for(threshold), seed).T:
        for left, right in _pairs(band):
            candidate = component[left] != component[right]
            candidate &= np.minimum(sizes[left], sizes[right]) >= threshold * np.maximum(sizes[left], sizes[right])
            left, right = left[candidate], right[candidate]
            alike = np.zeros(len(left), bool)
            for at in range(0, len(left), _PAIRS_AT_ONCE):
                part = slice(at, at + _PAIRS_AT_ONCE)
                shared = np.diff(sets[left[part]].multiply(sets[right[part]]).tocsr().indptr)
                alike[part] = shared >= threshold * (sizes[left[part]] + sizes[right[part]] - shared)
            if alike.any():
                edges = (np.ones(alike.sum(), np.bool_), (component[left[alike]], component[right[alike]]))
                _, merged = connected_components(sparse.coo_array(edges, shape=(count, count)), directed=False)
                component = merged[component].astype(np.int64)
    return component


def _buckets(members: NDArray[np.int32], begins: Ints, bands: tuple[int, int], seed: int) -> NDArray[np.uint32]:
    """The bucket (n, bands) of every set in every band. Not for forked processes: rensa's threads do not survive."""
    factors = np.random.default_rng(seed).integers(2**63, size=bands[1], dtype=np.uint64) | np.uint64(1)
    buckets = np.empty((len(begins) - 1, bands[0]), np.uint32)
    for at in tqdm(range(0, len(buckets), _SETS_AT_ONCE), "Comparing questions", unit_scale=_SETS_AT_ONCE, delay=2):
        some = begins[at : at + _SETS_AT_ONCE + 1]
        tokens = members[some[0] : some[-1]].astype(np.uint64) * _MIX
        starts = (some - some[0]).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(tokens, starts, bands[0] * bands[1], seed)
        signatures = np.array(matrix.to_rows(), np.uint64).reshape(-1, *bands)
        # A bucket's number is a hash of its band. Comparing the sets resolves collisions.
        buckets[at : at + _SETS_AT_ONCE] = (signatures * factors).sum(axis=2, dtype=np.uint64) >> np.uint64(32)
    return buckets


def _pairs(buckets: NDArray[np.uint32]) -> Iterator[tuple[Ints, Ints]]:
    """Pairs within a bucket: each row with the first one, then with the next ones. All pairs would be quadratic."""
    ordered = buckets[order := np.argsort(buckets, kind="stable")]
    begins = np.searchsorted(ordered, ordered)
    repeats = np.flatnonzero(begins != np.arange(len(order)))
    yield order[begins[repeats]], order[repeats]
    for step in range(1, _NEIGHBORS + 1):
        repeats = np.flatnonzero(ordered[step:] == ordered[:-step])
        repeats = repeats[begins[repeats] != repeats]  # pairs with the first one are done
        if not len(repeats):
            return
        yield order[repeats], order[repeats + step]
