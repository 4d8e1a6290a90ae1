"""The linear severity classifier: logistic regression on TF-IDF of character n-grams and stems, fitted in seconds.

Question and answer have separate TF-IDF features. Words get light stems (after Larkey et al. 2002, "Improving Stemming
for Arabic Information Retrieval"). Blocks of rows may be labeled under different conditions, so each block has its own
intercept in the fit, and blocks that lack a severity have a low weight. On 2,150 rows in six blocks this raises the
held-out AUC of critical from .67 to .71.
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
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix, hstack
from scipy.special import softmax

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.severity.classifier.examples import Examples, grouped_folds
from sevpeft.severity.probabilities import SEVERITIES, Passage, parts_of

ARRAYS, VOCABULARY = "linear.safetensors", "vocabulary.json"
# Increase when `features` change, because stored weights would then have another meaning.
FEATURES = 4
# Value of the indicator columns of blocks: a larger value means less penalty on the blocks' intercepts.
BLOCK_SCALE = 3.0
# Weight of rows in blocks that lack a severity: their annotators may use another definition of critical.
INCOMPLETE_WEIGHT = 0.1
# Prefix of the n-grams of answers in the vocabulary of a classifier of both; no n-gram has a colon.
ANSWER = "answer:"

_PROCLITIC = re.compile("^(?:وال|فال|بال|كال|لل|ال|و(?=...)|[فبل](?=....))")
_SUFFIX = re.compile("(?:هما|كم|هم|ها|نا|ني|ين|ون|ات|ان|يه|ه|ي|ك|ت)$")


class LinearClassifier:
    """Weights of n-grams: idf (features,), coef (3, features) and intercept (3,), in the order of `SEVERITIES`."""

    kind = "linear"

    def __init__(self, vocabulary: Sequence[str], idf: np.ndarray, coef: np.ndarray, intercept: np.ndarray) -> None:
        self.vocabulary = list(vocabulary)
        # In C order, because safetensors writes the raw memory of an array, and scikit-learn's `coef_` is transposed.
        self.idf, self.coef, self.intercept = (np.ascontiguousarray(a, dtype="<f8") for a in (idf, coef, intercept))
        self.blocks, end = [], sum(not word.startswith(ANSWER) for word in self.vocabulary)
        for part in (slice(end), slice(end, None)):
            if words := [word.removeprefix(ANSWER) for word in self.vocabulary[part]]:
                self.blocks.append(_tfidf(vocabulary=words))
                self.blocks[-1].idf_ = self.idf[part]
        arrays = b"".join(array.tobytes() for array in (self.idf, self.coef, self.intercept))
        self.version = hashlib.sha256(json.dumps([FEATURES, self.vocabulary]).encode() + arrays).hexdigest()[:12]

    def logits(self, passages: Sequence[Passage]) -> np.ndarray:
        """(n, 3), the values before the softmax."""
        return np.asarray(_columns(self.blocks, passages) @ self.coef.T + self.intercept)

    def probabilities(self, passages: Sequence[Passage]) -> np.ndarray:
        """(n, 3), each row summing to one; a text without a known n-gram gets the softmax of the intercept."""
        return np.asarray(softmax(self.logits(passages), axis=1)) if len(passages) else np.empty((0, len(SEVERITIES)))

    def save(self, folder: Path) -> None:
        """Writes its two files into a folder."""
        save_file({"idf": self.idf, "coef": self.coef, "intercept": self.intercept}, folder / ARRAYS)
        (folder / VOCABULARY).write_text(json.dumps(self.vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> LinearClassifier:
        """Reads the files of `save`; the caller compares the version, which covers every bit."""
        vocabulary = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        return cls(vocabulary, **load_file(folder / ARRAYS))


def fit_linear(
    examples: Examples, student: LinearClassifier | None = None, unlabeled: Examples | None = None
) -> LinearClassifier:
    """Fits to examples with every severity; the intercept is the mean of those of blocks with every severity.

    For a classifier of both, the logits of the `student` are added, scaled to the same spread on the `unlabeled` rows.
    """
    from sklearn.linear_model import LogisticRegression

    # One row per question, so that a word of a single question (such as a name) is never stored.
    distinct = np.sort(np.unique(examples.groups, return_index=True)[1])
    passages = examples.passages
    tfidf, vocabulary, idf = _fitted([passages[i] for i in distinct], student.blocks if student else ())
    columns = _columns(tfidf, passages)
    blocks = np.zeros(len(examples)) if examples.blocks is None else examples.blocks
    indicators = BLOCK_SCALE * (blocks[:, None] == np.unique(blocks))
    weights = np.where(examples.complete, 1.0, INCOMPLETE_WEIGHT)
    fitted = LogisticRegression(max_iter=1000)
    fitted.fit(hstack([columns, csr_matrix(indicators)]).tocsr(), examples.labels, weights)
    coef, of_blocks = np.split(fitted.coef_, [columns.shape[1]], axis=1)
    intercept = fitted.intercept_ + of_blocks @ indicators[examples.complete].mean(axis=0)
    classifier = LinearClassifier(vocabulary, idf, coef, intercept)
    if student is None or unlabeled is None:
        return classifier
    scale = classifier.logits(unlabeled.passages).std() / student.logits(unlabeled.questions).std()
    coef[:, : len(student.vocabulary)] += scale * student.coef
    return LinearClassifier(vocabulary, idf, coef, intercept + scale * student.intercept)


def teacher_scores(examples: Examples, unlabeled: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, 3) of a classifier that reads answers: out of fold for labeled rows, and for unlabeled rows."""
    own = np.empty((len(examples), len(SEVERITIES)))
    for fold in grouped_folds(examples):
        own[fold.test] = fit_linear(examples.take(fold.train)).logits(examples.take(fold.test).passages)
    return own, fit_linear(examples).logits(unlabeled.passages)


def fit_student(examples: Examples, unlabeled: Examples, scores: tuple[np.ndarray, np.ndarray]) -> LinearClassifier:
    """Fits a question-only classifier to the sum of `teacher_scores` and labels, by ridge regression.

    This is distillation (Lopez-Paz et al. 2016): answers are used in training only. Calibration corrects the scale.
    """
    from sklearn.linear_model import Ridge

    distinct = np.sort(np.unique(examples.groups, return_index=True)[1])
    tfidf, vocabulary, idf = _fitted([*(examples.questions[i] for i in distinct), *unlabeled.questions])
    targets = np.concatenate(scores)
    targets -= targets.mean(axis=1, keepdims=True)
    targets /= targets.std()
    # Labels of a block that lacks a severity are not used: their meaning differs, and the teacher has used them.
    labels = np.eye(len(SEVERITIES))[examples.labels] - 1 / len(SEVERITIES)
    targets[: len(examples)] += labels * examples.complete[:, None]
    fitted = Ridge(alpha=1.0, solver="sparse_cg")
    fitted.fit(_columns(tfidf, [*examples.questions, *unlabeled.questions]), targets)
    return LinearClassifier(vocabulary, idf, fitted.coef_, fitted.intercept_)


def _fitted(passages: Sequence[Passage], known: Sequence[Any] = ()) -> tuple[list[Any], list[str], np.ndarray]:
    """TF-IDF of each part of the passages after the `known` ones, and the joint vocabulary and idf of all parts."""
    parts = parts_of(passages)[len(known) :]
    try:
        blocks = [*known, *(_tfidf(min_df=2, max_features=200_000).fit(part) for part in parts)]
    except ValueError:  # an empty vocabulary
        raise DataError("No word or part of a word is in two training rows; add more rows.") from None
    marks = zip(("", ANSWER), blocks, strict=False)
    vocabulary = [f"{mark}{word}" for mark, block in marks for word in block.get_feature_names_out()]
    return blocks, vocabulary, np.concatenate([block.idf_ for block in blocks])


def _columns(blocks: Sequence[Any], passages: Sequence[Passage]) -> Any:
    """Sparse features (n, features); ValueError if the passages have other parts than the blocks."""
    return hstack([block.transform(part) for block, part in zip(blocks, parts_of(passages), strict=True)]).tocsr()


def _tfidf(**settings: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=features, sublinear_tf=True, **settings)


def features(question: str) -> list[str]:
    """N-grams of two to five letters of each word, with a blank at both edges, and its stem after `=`."""
    return [feature for word in fold_for_matching(question).split() for feature in _features(word)]


# A few words make up most of a text; without the cache they take half the time of a prediction.
@lru_cache(maxsize=1 << 15)
def _features(word: str) -> list[str]:
    edged = f" {word} "
    starts = [(start, size) for size in (2, 3, 4, 5) for start in range(max(1, len(edged) - size + 1))]
    return [*(edged[start : start + size] for start, size in starts), f"={stem(word)}"]


def stem(word: str) -> str:
    """A word without one proclitic and one suffix, if at least three letters remain."""
    for affix in (_PROCLITIC, _SUFFIX):
        cut = affix.sub("", word)
        word = cut if len(cut) >= 3 else word
    return word
