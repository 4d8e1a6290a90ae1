"""A severity classifier on parts of words and stems: logistic regression over TF-IDF, fitted in seconds on one core.

There are two views of the folded text. Parts of words, edges included, see through spelling, clitics and dialect
endings. Words keep what a question says. They are cut to light stems (after Larkey et al. 2002, "Improving Stemming for
Arabic Information Retrieval"), because a few hundred rows hold most words in one form only: on 1,063 labeled questions
the AUC of critical is .773 with stems and .753 with words. Both views of a question have the same length, or the parts
of words, being many more, would drown the words.

Where rows come in blocks that were labeled under different conditions, each block gets its own intercept during the
fit, so that the words need not explain it. Blocks that lack a severity count little.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.severity.classifier.examples import Examples, complete_rows
from sevpeft.severity.probabilities import SEVERITIES

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

ARRAYS, VOCABULARY = "linear.safetensors", "vocabulary.json"
# Counts up when `features` or `scale_views` change: the same arrays would then mean something else.
FEATURES = 3
C = 1.0
"""Inverse of the penalty, as scikit-learn has it."""
BLOCK_SCALE = 3.0
"""Of the indicator columns of blocks: the larger, the less their intercepts are penalized."""
INCOMPLETE_WEIGHT = 0.1
"""Of rows in blocks that lack a severity: what their annotators called critical, others may not."""
MAX_FEATURES = 200_000

CHARACTERS = (2, 3, 4, 5)
_PROCLITIC = re.compile("^(?:وال|فال|بال|كال|لل|ال|و(?=...)|[فبل](?=....))")
_SUFFIX = re.compile("(?:هما|كم|هم|ها|نا|ني|ين|ون|ات|ان|يه|ه|ي|ك|ت)$")
_SHORTEST_STEM = 3
# Starts the name of a stem: folded text has no such sign, so no part of a word is taken for one.
_WORD = "="


class LinearClassifier:
    """Fitted weights of n-grams, stored as three arrays and a list of n-grams; nothing is pickled.

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
        self._tfidf = TfidfVectorizer(analyzer=features, sublinear_tf=True, norm=None, vocabulary=self.vocabulary)
        self._tfidf.idf_ = self.idf
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
        rows = scale_views(self._tfidf.transform(questions), self._views)
        result: np.ndarray = softmax(rows @ self.coef.T + self.intercept, axis=1)
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

        arrays = load_file(folder / ARRAYS)
        vocabulary = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        return cls(vocabulary, arrays["idf"], arrays["coef"], arrays["intercept"])


def fit_linear(examples: Examples) -> LinearClassifier:
    """Fits to examples that have every severity; the intercept is the mean one of blocks that have them all.

    Raises:
        DataError: the questions share no n-gram that stands in two of them.
    """
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    # What one question alone says, a name above all, is never stored, however often the question stands there.
    distinct = np.sort(np.unique(examples.groups, return_index=True)[1])
    tfidf = TfidfVectorizer(analyzer=features, sublinear_tf=True, norm=None, min_df=2, max_features=MAX_FEATURES)
    try:
        tfidf.fit([examples.questions[i] for i in distinct])
    except ValueError:  # an empty vocabulary
        raise DataError("No word or part of one stands in two of the training questions; bring more rows.") from None
    vocabulary = tfidf.get_feature_names_out().tolist()
    rows = scale_views(tfidf.transform(examples.questions), views_of(vocabulary))
    complete = complete_rows(examples.labels, examples.blocks)
    if examples.blocks is None or not complete.any():
        fitted = LogisticRegression(C=C, max_iter=1000).fit(rows, examples.labels)
        return LinearClassifier(vocabulary, tfidf.idf_, fitted.coef_, fitted.intercept_)
    _, index = np.unique(examples.blocks, return_inverse=True)
    indicators = np.eye(index.max() + 1)[index] * BLOCK_SCALE
    columns = hstack([rows, csr_matrix(indicators)]).tocsr()
    weights = np.where(complete, 1.0, INCOMPLETE_WEIGHT)
    fitted = LogisticRegression(C=C, max_iter=1000).fit(columns, examples.labels, weights)
    coef, of_blocks = np.split(fitted.coef_, [rows.shape[1]], axis=1)
    intercept = fitted.intercept_ + of_blocks @ indicators[complete].mean(axis=0)
    return LinearClassifier(vocabulary, tfidf.idf_, coef, intercept)


def features(question: str) -> list[str]:
    """The n-grams of a question: parts of its words, then their stems, marked with `=`."""
    words = fold_for_matching(question).split()
    return [*itertools.chain.from_iterable(map(_characters, words)), *(_WORD + stem(word) for word in words)]


def views_of(vocabulary: Sequence[str]) -> np.ndarray:
    """(features,) int64: 1 for stems, 0 for parts of words."""
    return np.array([name.startswith(_WORD) for name in vocabulary], dtype=np.int64)


def scale_views(rows: csr_matrix, views: np.ndarray) -> csr_matrix:
    """Weighted counts (n, features), none negative, each view of a row scaled to the length √½: both make 1."""
    place = 2 * np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr)) + views[rows.indices]
    squares = np.bincount(place, weights=rows.data**2, minlength=2 * rows.shape[0])
    result = rows.copy()
    result.data = rows.data / np.sqrt(2 * squares)[place]
    return result


# Few words make up most of a language; cutting them anew each time takes half of the time of a prediction.
@functools.lru_cache(maxsize=1 << 15)
def _characters(word: str) -> tuple[str, ...]:
    edged = f" {word} "
    return tuple(edged[start : start + size] for size in CHARACTERS for start in range(max(1, len(edged) - size + 1)))


@functools.lru_cache(maxsize=1 << 15)
def stem(word: str) -> str:
    """A word without one proclitic and one suffix, where three letters remain."""
    for affix in (_PROCLITIC, _SUFFIX):
        cut = affix.sub("", word) if len(word) > _SHORTEST_STEM else word
        word = cut if len(cut) >= _SHORTEST_STEM else word
    return word
