"""What a classifier is judged beside: guesses that read no text, made of the training rows alone.

A file whose rows were labelled in the order they stand in gives a high accuracy to whatever learns the place, so the
number of the row is a baseline as the majority is.
"""

from __future__ import annotations

import numpy as np

from sevpeft.severity.classifier.examples import Examples, complete_rows
from sevpeft.severity.probabilities import SEVERITIES

# Fewer rows in a leaf would let the tree on the row number learn single rows.
_LEAF = 20


def majority(train: Examples, count: int) -> np.ndarray:
    """(count, 3): the shares of the training rows for every judged one."""
    # Of the rows whose shares count for the classifier too: a majority that only odd blocks have is too easy to beat.
    complete = complete_rows(train.labels, train.blocks)
    labels = train.labels[complete] if complete.any() else train.labels
    return np.tile(np.bincount(labels, minlength=len(SEVERITIES)) / len(labels), (count, 1))


def by_row_number(train: Examples, test: Examples) -> np.ndarray:
    """(n, 3) for the rows of `test`, from a tree on nothing but the number of the row."""
    from sklearn.tree import DecisionTreeClassifier

    leaf = max(1, min(_LEAF, len(train) // 4))
    tree = DecisionTreeClassifier(min_samples_leaf=leaf, random_state=0).fit(train.rows[:, None], train.labels)
    probabilities = np.zeros((len(test), len(SEVERITIES)))
    probabilities[:, tree.classes_] = tree.predict_proba(test.rows[:, None])
    return probabilities
