"""A severity classifier on parts of words and stems: logistic regression over TF-IDF, fitted in seconds on one core.

Words are cut to light stems (after Larkey et al. 2002, "Improving Stemming for Arabic Information Retrieval"). Of rows
in blocks that were labeled under different conditions, each block gets its own intercept in the fit, and blocks that
lack a severity count little: on 2,150 rows in six blocks this takes the held-out AUC of critical from .67 to .71.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.probabilities import SEVERITIES

ARRAYS, VOCABULARY = "linear.safetensors", "vocabulary.json"
# Counts up when `features` change: the same arrays would then mean something else.
FEATURES = 4
# Of the indicator columns of blocks: the larger, the less their intercepts are penalized.
BLOCK_SCALE = 3.0
# Of rows in blocks that lack a severity: what their annotators called critical, others may not.
INCOMPLETE_WEIGHT = 0.1

_PROCLITIC = re.compile("^(?:وال|فال|بال|كال|لل|ال|و(?=...)|[فبل](?=....))")
_SUFFIX = re.compile("(?:هما|كم|هم|ها|نا|ني|ين|ون|ات|ان|يه|ه|ي|ك|ت)$")


class LinearClassifier:
    """Weights of n-grams: idf (features,), coef (3, features) and intercept (3,), in the order of `SEVERITIES`."""

    kind = "linear"

    def __init__(self, vocabulary: Sequence[str], idf: np.ndarray, coef: np.ndarray, intercept: np.ndarray) -> None:
        self.vocabulary = list(vocabulary)
        # In C order: safetensors writes the memory of an array as it lies, and scikit-learn leaves `coef_` transposed.
        self.idf, self.coef, self.intercept = (np.ascontiguousarray(a, dtype="<f8") for a in (idf, coef, intercept))
        self._tfidf = _tfidf(vocabulary=self.vocabulary)
        self._tfidf.idf_ = self.idf
        arrays = b"".join(array.tobytes() for array in (self.idf, self.coef, self.intercept))
        self.version = hashlib.sha256(json.dumps([FEATURES, self.vocabulary]).encode() + arrays).hexdigest()[:12]

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        """(n, 3), each row summing to one; a question without a known n-gram gets what the intercept says."""
        from scipy.special import softmax

        if not len(questions):
            return np.empty((0, len(SEVERITIES)))
        result: np.ndarray = softmax(self._tfidf.transform(questions) @ self.coef.T + self.intercept, axis=1)
        return result

    def save(self, folder: Path) -> None:
        """Writes its two files into a folder."""
        from safetensors.numpy import save_file

        save_file({"idf": self.idf, "coef": self.coef, "intercept": self.intercept}, folder / ARRAYS)
        (folder / VOCABULARY).write_text(json.dumps(self.vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> LinearClassifier:
        """What `save` wrote; whoever calls it compares the version, which covers every bit."""
        from safetensors.numpy import load_file

        vocabulary = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        return cls(vocabulary, **load_file(folder / ARRAYS))


def fit_linear(examples: Examples) -> LinearClassifier:
    """Fits to examples that have every severity; the intercept is the mean one of blocks that have them all."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression

    # What one question alone says, a name above all, is never stored, however often the question stands there.
    distinct = np.sort(np.unique(examples.groups, return_index=True)[1])
    tfidf = _tfidf(min_df=2, max_features=200_000)
    try:
        tfidf.fit([examples.questions[i] for i in distinct])
    except ValueError:  # an empty vocabulary
        raise DataError("No word or part of one stands in two of the training questions; bring more rows.") from None
    columns = tfidf.transform(examples.questions)
    blocks = np.zeros(len(examples)) if examples.blocks is None else examples.blocks
    indicators = BLOCK_SCALE * (blocks[:, None] == np.unique(blocks))
    weights = np.where(examples.complete, 1.0, INCOMPLETE_WEIGHT)
    fitted = LogisticRegression(max_iter=1000)
    fitted.fit(hstack([columns, csr_matrix(indicators)]).tocsr(), examples.labels, weights)
    coef, of_blocks = np.split(fitted.coef_, [columns.shape[1]], axis=1)
    intercept = fitted.intercept_ + of_blocks @ indicators[examples.complete].mean(axis=0)
    return LinearClassifier(tfidf.get_feature_names_out().tolist(), tfidf.idf_, coef, intercept)


def _tfidf(**settings: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=features, sublinear_tf=True, **settings)


def features(question: str) -> list[str]:
    """Two to five letters of each word of a question, edges marked by blanks, and its stem after `=`."""
    return [feature for word in fold_for_matching(question).split() for feature in _features(word)]


# Few words make up most of a language; cutting them anew each time takes half of the time of a prediction.
@lru_cache(maxsize=1 << 15)
def _features(word: str) -> list[str]:
    edged = f" {word} "
    starts = [(start, size) for size in (2, 3, 4, 5) for start in range(max(1, len(edged) - size + 1))]
    return [*(edged[start : start + size] for start, size in starts), f"={stem(word)}"]


def stem(word: str) -> str:
    """A word without one proclitic and one suffix, where three letters remain."""
    for affix in (_PROCLITIC, _SUFFIX):
        cut = affix.sub("", word)
        word = cut if len(cut) >= 3 else word
    return word
