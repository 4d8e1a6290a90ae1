"""A severity classifier on character and word n-grams: logistic regression over TF-IDF, fitted in seconds on one core.

The n-grams are parts of words, and light stems with pairs of them (see `ngrams`). Where the rows come in blocks that
were labelled under different conditions, each block gets an intercept of its own while fitting, so that the words need
not explain it, and blocks that lack a severity count little. Answers and specialties help to fit (see `privileged`).

A fitted classifier is three arrays and a list of n-grams, and is stored as such (safetensors and JSON, no pickle);
fresh or loaded it goes through the same code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sevpeft.errors import DataError
from sevpeft.runs import plain_disk_errors, write_atomically
from sevpeft.severity.classifier.examples import Examples, complete_rows
from sevpeft.severity.classifier.ngrams import FEATURES, even, features, views_of
from sevpeft.severity.classifier.privileged import foretold
from sevpeft.severity.probabilities import SEVERITIES

ARRAYS, VOCABULARY = "linear.safetensors", "vocabulary.json"

C = 1.0
"""Inverse of the penalty, as scikit-learn has it."""
BLOCK_SCALE = 3.0
"""Of the columns that say the block: the larger, the less their intercepts are penalised."""
INCOMPLETE_WEIGHT = 0.1
"""Of rows in blocks that lack a severity: what their annotators called critical, others may not."""
MAX_FEATURES = 200_000


class LinearClassifier:
    """Fitted weights of n-grams.

    Attributes:
        vocabulary: n-grams, the position being the column.
        idf: (features,) inverse document frequencies.
        coef, intercept: (3, features) and (3,), in the order of `SEVERITIES`.
        version: hash of all of them.
    """

    kind = "linear"

    def __init__(self, vocabulary: Sequence[str], idf: np.ndarray, coef: np.ndarray, intercept: np.ndarray) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vocabulary = list(vocabulary)
        # In C order: safetensors writes the memory of an array as it lies, and scikit-learn leaves `coef_` transposed.
        self.idf, self.coef, self.intercept = (np.ascontiguousarray(a, dtype="<f8") for a in (idf, coef, intercept))
        self._weighting = TfidfVectorizer(analyzer=features, sublinear_tf=True, norm=None, vocabulary=self.vocabulary)
        self._weighting.idf_ = self.idf
        self._views = views_of(self.vocabulary)
        digest = hashlib.sha256(json.dumps([FEATURES, self.vocabulary]).encode())
        for array in (self.idf, self.coef, self.intercept):
            digest.update(array.tobytes())
        self.version = digest.hexdigest()[:12]

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        """(n, 3), each row summing to one; a question without a known n-gram gets what the intercept says."""
        from scipy.special import softmax

        if not len(questions):
            return np.empty((0, len(SEVERITIES)))
        rows = even(self._weighting.transform(questions), self._views)
        result: np.ndarray = softmax(rows @ self.coef.T + self.intercept, axis=1)
        return result


def fit_linear(examples: Examples, seed: int = 0, *, max_features: int = MAX_FEATURES) -> LinearClassifier:
    """Fits to examples that have every severity; with blocks, it gets the mean intercept of those that have it too.

    The seed draws what is too much for exact sums: the topics of answers, and rows where there are very many.

    Raises:
        DataError: the questions share no n-gram that stands in two of them.
    """
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    weighting = TfidfVectorizer(analyzer=features, sublinear_tf=True, norm=None, min_df=2, max_features=max_features)
    try:
        counted = weighting.fit_transform(examples.questions)
    except ValueError:  # scikit-learn's word for an empty vocabulary
        raise DataError(
            "No word or part of one stands in two of the training questions, so nothing can be learnt: bring more rows."
        ) from None
    vocabulary = weighting.get_feature_names_out().tolist()
    rows = even(counted, views_of(vocabulary))
    complete = complete_rows(examples.labels, examples.blocks)
    blocks = examples.blocks if complete.any() else None
    side = foretold(rows, examples.side, examples.groups, seed) if examples.side else None
    which = np.empty((len(examples), 0))
    if blocks is not None:
        _, index = np.unique(blocks, return_inverse=True)
        which = np.eye(index.max() + 1)[index] * BLOCK_SCALE
    columns = [rows, csr_matrix(which), *([] if side is None else [csr_matrix(side[0])])]
    weights = np.where(complete, 1.0, INCOMPLETE_WEIGHT) if blocks is not None else None
    fitted = LogisticRegression(C=C, max_iter=1000).fit(hstack(columns).tocsr(), examples.labels, weights)

    ends = np.cumsum([rows.shape[1], which.shape[1]])
    coef, own, foretelling = np.split(fitted.coef_, ends, axis=1)
    intercept = fitted.intercept_ + (own @ which[complete].mean(axis=0) if blocks is not None else 0.0)
    if side is not None:
        coef = coef + foretelling @ side[1].T
    return LinearClassifier(vocabulary, weighting.idf_, coef, intercept)


def write_linear(classifier: LinearClassifier, folder: Path) -> list[Path]:
    """Writes its two files into a folder, and returns them."""
    from safetensors.numpy import save

    arrays, vocabulary = folder / ARRAYS, folder / VOCABULARY
    with plain_disk_errors(arrays, when_full="free some, then run this again"):
        arrays.write_bytes(save({"idf": classifier.idf, "coef": classifier.coef, "intercept": classifier.intercept}))
    content = {"features": FEATURES, "vocabulary": classifier.vocabulary}
    write_atomically(vocabulary, json.dumps(content, ensure_ascii=False) + "\n")
    return [arrays, vocabulary]


def read_linear(folder: Path) -> LinearClassifier:
    """What `write_linear` wrote; raises DataError when it is absent, damaged or of another version."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    damaged = DataError(f"The linear classifier in {folder} is damaged or incomplete: fit it again.")
    try:
        arrays = load_file(folder / ARRAYS)
        content: dict[str, Any] = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        version, vocabulary = content["features"], content["vocabulary"]
        idf, coef, intercept = arrays["idf"], arrays["coef"], arrays["intercept"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        raise damaged from None
    if version != FEATURES:
        raise DataError(
            f"The linear classifier in {folder} counts n-grams in a way (version {version}) that this version of "
            "sevpeft does not: fit it again."
        )
    size, classes = len(vocabulary), len(SEVERITIES)
    fits = idf.shape == (size,) and coef.shape == (classes, size) and intercept.shape == (classes,)
    if not fits or not size or not all(np.isfinite(array).all() for array in (idf, coef, intercept)) or idf.min() <= 0:
        raise damaged
    return LinearClassifier(vocabulary, idf, coef, intercept)
