"""How far p_critical carries over to a column of yes and no that is not a severity, such as "needs first aid"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sevpeft.errors import DataError
from sevpeft.severity.classifier.calibration import Calibrated
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.classifier.judging import CRITICAL, Estimate, Threshold, judge_positive
from sevpeft.severity.classifier.report import interval, tradeoff_table

if TYPE_CHECKING:
    from rich.table import Table

_FOLDS, _LEAF = 5, 20


@dataclass(frozen=True)
class Transfer:
    """Ranking by p_critical, and by the number of the row, for rows that have `positive` 1 or 0.

    Attributes:
        column: its name.
        rows, positives: how many rows, and how many of them have a 1.
        auc: of p_critical.
        auc_row_number: of a tree on the row number, by grouped cross-validation on the same rows.
        curve: precision and recall over thresholds of p_critical.
    """

    column: str
    rows: int
    positives: int
    auc: Estimate
    auc_row_number: Estimate
    curve: list[Threshold]

    @property
    def share(self) -> float:
        """Of rows with a 1, which is the precision of calling all of them."""
        return self.positives / self.rows


def transfer(
    classifier: Calibrated, examples: Examples, positive: np.ndarray, column: str, *, seed: int = 0
) -> Transfer:
    """Judges p_critical by `positive` (n,) bool.

    Raises:
        DataError: too few distinct questions on one side for the baseline's folds.
    """
    scores = classifier.probabilities(examples.questions)[:, CRITICAL]
    auc, curve = judge_positive(scores, positive, examples.groups, seed=seed)
    by_row = _by_row_number(examples, positive, seed)
    baseline, _ = judge_positive(by_row, positive, examples.groups, seed=seed)
    return Transfer(column, len(examples), int(positive.sum()), auc, baseline, curve)


def render_transfer(found: Transfer) -> list[Any]:
    """Lines and a table of at most 80 columns."""
    table: Table = tradeoff_table(found.curve, f"{found.column} = 1")
    return [
        f"Judged on {found.rows:,} rows, {found.positives:,} ({found.share:.1%}) with {found.column} = 1",
        "",
        f"  AUC of p_critical           {interval(found.auc)}",
        f"  AUC of the row number alone {interval(found.auc_row_number)}",
        "",
        table,
    ]


def _by_row_number(examples: Examples, positive: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.tree import DecisionTreeClassifier

    fewest = min(len(np.unique(examples.groups[positive])), len(np.unique(examples.groups[~positive])))
    if fewest < _FOLDS:
        raise DataError(
            f"Only {fewest} distinct questions are on one side of the column: at least {_FOLDS} are needed."
        )
    numbers = examples.rows[:, None]
    scores = np.empty(len(positive))
    leaf = max(1, min(_LEAF, len(positive) // 8))
    for train, test in StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed).split(
        numbers, positive, examples.groups
    ):
        tree = DecisionTreeClassifier(min_samples_leaf=leaf, random_state=0).fit(numbers[train], positive[train])
        # A fold may hold all rows of one side.
        scores[test] = tree.predict_proba(numbers[test])[:, -1] if len(tree.classes_) == 2 else float(tree.classes_[0])
    return scores
