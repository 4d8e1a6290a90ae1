"""From answers and references to how much of their wording is shared: chrF++ and ROUGE-L, row by row.

chrF++ is sacrebleu's (characters to 6, words to 2, β = 2; Popović 2017) and needs no word boundaries, which suits
Arabic's glued particles. ROUGE-L is rouge-score's longest common subsequence (Lin 2004); that package's own tokenizer
keeps a–z and digits only and would find every Arabic text empty, so it is given the folded words of
`fold_for_matching`. Both are 0 where one side is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from sevpeft.data.text import fold_for_matching


def chrf(predictions: Sequence[str], references: Sequence[str], *, beta: int = 2) -> NDArray[np.float64]:
    """Sentence chrF++ of each row (n,), 0 to 100; β = 2 counts what is missing twice as much as what is too much."""
    metric = CHRF(word_order=2, beta=beta)
    pairs = zip(predictions, references, strict=True)
    return np.array([metric.sentence_score(said, [wanted]).score for said, wanted in pairs], dtype=np.float64)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """F1 of the longest common subsequence of folded words of each row (n,), 0 to 1."""
    scorer = _rouge()
    pairs = zip(predictions, references, strict=True)
    return np.array([scorer.score(wanted, said)["rougeL"].fmeasure for said, wanted in pairs], dtype=np.float64)


class _FoldedWords:
    """What rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return fold_for_matching(text).split()


@cache
def _rouge() -> Any:
    return RougeScorer(["rougeL"], tokenizer=_FoldedWords())
