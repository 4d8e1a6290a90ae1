"""What stands beside a question while a classifier is fitted and not when it is used: specialty, doctor's answer.

They tell more about severity than the label of one annotator does, so the n-grams first learn to foretell them (ridge
regression), and the foretold values help to learn the label: learning using privileged information (Vapnik & Vashist
2009). The values are foretold for every training row without its group, or they would look better than they will be.
All of it is linear in the n-grams, so that it adds up to one matrix of weights and the questions alone are asked later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sevpeft.data.text import fold_for_matching

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MOST_CATEGORIES = 64
"""A column of at most so many values is a category; another is text."""
TOPICS = 60
"""Dimensions that a column of text is reduced to (latent semantic analysis)."""
RIDGE = 2.0
MOST_ROWS = 3000
"""Rows that the regression is fitted on: its time grows with the cube."""


def side_values(columns: Mapping[str, Sequence[str]], seed: int = 0) -> np.ndarray | None:
    """The columns as centred numbers (n, k): categories one-hot, text by its topics; None where they say nothing."""
    parts = []
    for column in columns.values():
        texts = [fold_for_matching(text) for text in column]
        names, index = np.unique(texts, return_inverse=True)
        if len(names) <= MOST_CATEGORIES:
            parts.append(np.eye(len(names))[index])
        else:
            parts += _topics(texts, seed)
    if not parts:
        return None
    values = np.hstack(parts)
    values = values - values.mean(axis=0)
    return values if np.abs(values).max() > 1e-9 else None


def foretold(
    rows: csr_matrix, columns: Mapping[str, Sequence[str]], groups: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray] | None:
    """What n-grams foretell of the columns.

    Args:
        rows: (n, features) of the questions.
        columns: name → (n,) text.
        groups: (n,), equal where two rows ask the same.
        seed: of the topics and, above `MOST_ROWS` rows, of the choice.

    Returns:
        (n, k) values foretold for each row without its group, their mean square over rows summing to one, and
        (features, k) weights that foretell them for any other row; None where the columns say nothing.
    """
    count = rows.shape[0]
    chosen = np.arange(count)
    if count > MOST_ROWS:
        chosen = np.sort(np.random.default_rng(seed).choice(count, MOST_ROWS, replace=False))
    values = side_values({name: [column[i] for i in chosen] for name, column in columns.items()}, seed)
    if values is None:
        return None
    own = rows[chosen]
    # Ridge regression in its dual form: there are far more n-grams than rows.
    inverse = np.linalg.inv((own @ own.T).toarray() + RIDGE * np.eye(len(chosen)))
    dual = inverse @ values
    weights = np.asarray(own.T @ dual)
    said = np.asarray(rows @ weights)
    said[chosen] = values - _errors_without_group(inverse, dual, groups[chosen])
    scale = np.sqrt((said**2).sum(axis=1).mean())
    return (said / scale, weights / scale) if scale > 1e-12 else None


def _errors_without_group(inverse: np.ndarray, dual: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Errors of every row when its group is left out, from the one inverse of all rows (Allen's PRESS, by blocks)."""
    errors = dual / np.diagonal(inverse)[:, None]
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    for group in np.flatnonzero(sizes > 1).tolist():
        together = np.flatnonzero(index == group)
        errors[together] = np.linalg.solve(inverse[np.ix_(together, together)], dual[together])
    return errors


def _topics(texts: Sequence[str], seed: int) -> list[np.ndarray]:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    weighting = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=3, sublinear_tf=True)
    try:
        counted = weighting.fit_transform(texts)
    except ValueError:  # scikit-learn's word for an empty vocabulary
        return []
    size = min(TOPICS, min(counted.shape) - 1)
    return [TruncatedSVD(size, random_state=seed).fit_transform(counted)] if size > 0 else []
