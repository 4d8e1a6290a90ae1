"""Judges a way of fitting by rows it did not see: dealt out at random by question, or one block at a time.

Within a file, rows that stand together were often written and labelled together, and a classifier that learns the
place looks like one that reads the text. So there are two protocols. *Random-grouped* folds keep duplicates of a
question on one side. *Block-held-out* folds hold a whole block back, its duplicates elsewhere and its share in the
calibration included. Beside either stand baselines that read no text: the majority, the number of the row, and the
same fit on shuffled labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np

from sevpeft.errors import DataError
from sevpeft.severity.classifier.baselines import by_row_number, majority
from sevpeft.severity.classifier.calibration import FITS, Calibrated
from sevpeft.severity.classifier.examples import Examples, complete_rows
from sevpeft.severity.classifier.judging import Judgement, judge
from sevpeft.severity.probabilities import SEVERITIES, SeverityClassifier

Fit = Callable[[Examples, int], SeverityClassifier]
"""From training rows and a seed to a classifier that is not calibrated yet."""


@runtime_checkable
class CrossFitting(Protocol):
    """A `Fit` that has out-of-fold probabilities anyway, and need not be repeated for them."""

    def cross_fitted(self, examples: Examples, seed: int) -> tuple[SeverityClassifier, np.ndarray]:
        """Fitted to all examples, and (n, 3) probabilities of each from a fit without its group."""


FOLDS = 5
_SHUFFLED_SHARE = 0.2


@dataclass(frozen=True)
class Fold:
    """Positions of the rows to train on and of those to judge."""

    name: str
    train: np.ndarray
    test: np.ndarray
    dropped: int = 0
    """Rows left out of training because the judged ones ask the same."""


@dataclass(frozen=True)
class OutOfFold:
    """Probabilities (n, 3) of rows that were judged, each by a fit that did not see them.

    Attributes:
        examples: the judged rows.
        raw, calibrated: before and after calibration.
        baselines: name → probabilities of something that reads no text.
        folds: name of the fold of every judged row.
        dropped: rows left out of training because a judged one asks the same.
        last: the classifier of the last fold.
    """

    examples: Examples
    raw: np.ndarray
    calibrated: np.ndarray
    baselines: dict[str, np.ndarray]
    folds: np.ndarray
    dropped: int
    last: Calibrated


@dataclass(frozen=True)
class Evaluation:
    """Judgements of one protocol. There is none without baselines: an accuracy alone flatters.

    Attributes:
        protocol: how the judged rows were held back, for people.
        calibrated, raw: the classifier after and before calibration.
        baselines: name → judgement.
        blocks: name → judgement of that block's rows alone; empty where blocks are not known.
        dropped: rows left out of training because a judged one asks the same.
    """

    protocol: str
    calibrated: Judgement
    raw: Judgement
    baselines: dict[str, Judgement]
    blocks: dict[str, Judgement] = field(default_factory=dict)
    dropped: int = 0

    def __post_init__(self) -> None:
        if not self.baselines:
            raise ValueError("an evaluation without a baseline is not one")


def grouped_folds(examples: Examples, *, folds: int = FOLDS, seed: int = 0) -> list[Fold]:
    """Folds of whole groups, the severities in proportion.

    Raises:
        DataError: a severity has fewer groups than there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    check_groups(examples, folds)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = splitter.split(np.zeros(len(examples)), examples.labels, examples.groups)
    return [Fold(f"fold {number}", train, test) for number, (train, test) in enumerate(parts, start=1)]


def block_folds(
    examples: Examples, judge_blocks: Sequence[str] | None = None, train_blocks: Sequence[str] | None = None
) -> list[Fold]:
    """One fold for each block that is judged; rows elsewhere that ask what a judged row asks are not trained on.

    Args:
        examples: with blocks.
        judge_blocks: blocks to hold out, by name or by an unmistakable beginning of it; None for all.
        train_blocks: blocks that may be trained on, likewise; None for all.

    Raises:
        DataError: an unknown block, only one block, or a block to judge (or what is left to train on) lacks a severity.
    """
    if examples.blocks is None:
        raise ValueError("examples without blocks")
    may_train = in_blocks(examples, train_blocks)
    folds = []
    for name in blocks_named(examples, judge_blocks):
        inside = examples.blocks == name
        _refuse_missing(examples.labels[inside], f"Block {name}", "leave it out with --judge-blocks")
        same = np.isin(examples.groups, examples.groups[inside])
        train = np.flatnonzero(may_train & ~inside & ~same)
        if not len(train):
            raise DataError(f"Without block {name} there is nothing to train on: name more blocks, or another column.")
        _refuse_missing(examples.labels[train], f"Without block {name}, the training data", "train on more blocks")
        folds.append(Fold(name, train, np.flatnonzero(inside), int((may_train & ~inside & same).sum())))
    return folds


def blocks_named(examples: Examples, wanted: Sequence[str] | None) -> list[str]:
    """Whole names of the blocks that are `wanted`, by name or by an unmistakable beginning; all where it is None."""
    names = sorted(set([] if examples.blocks is None else examples.blocks.tolist()))
    return names if wanted is None else [_block(name, names) for name in wanted]


def in_blocks(examples: Examples, wanted: Sequence[str] | None) -> np.ndarray:
    """(n,) bool: which rows are in the blocks that are `wanted`, all where it is None."""
    if examples.blocks is None or wanted is None:
        return np.ones(len(examples), dtype=bool)
    return np.isin(examples.blocks, blocks_named(examples, wanted))


def hold_out(examples: Examples, share: float, *, seed: int = 0) -> Fold:
    """One fold: about `share` of the groups for judging (or calibrating), the severities in proportion."""
    return grouped_folds(examples, folds=max(2, round(1 / share)), seed=seed)[0]


def out_of_fold(
    examples: Examples,
    folds: Sequence[Fold],
    fit: Fit,
    *,
    calibration: str = "temperature",
    calibration_share: float | None = None,
    seed: int = 0,
    shuffled: bool = True,
    judged: np.ndarray | None = None,
    progress: Callable[[str], None] = lambda said: None,
) -> OutOfFold:
    """Fit, calibrate and predict every fold.

    Args:
        examples: all rows.
        folds: of `grouped_folds`, `block_folds` or `hold_out`.
        fit: makes a classifier of training rows.
        calibration: a method of `FITS`, fitted within the training rows.
        calibration_share: share of them that calibrates and does not train; None for all, out of folds.
        seed: of the inner split, the fit and the shuffling.
        shuffled: whether to fit once more on shuffled labels, for a baseline.
        judged: (n,) bool, rows that are judged; None for all.
        progress: is told what is being done.
    """
    tests, raws, calibrateds, names = [], [], [], []
    baselines: dict[str, list[np.ndarray]] = {}
    last: Calibrated | None = None
    for number, fold in enumerate(folds, start=1):
        progress(f"{fold.name} ({number} of {len(folds)})")
        test = fold.test if judged is None else fold.test[judged[fold.test]]
        if not len(test):
            continue
        train, asked = examples.take(fold.train), examples.take(test)
        last = fit_calibrated(train, fit, calibration=calibration, share=calibration_share, seed=seed)
        raw = last.classifier.probabilities(asked.questions)
        tests.append(test)
        raws.append(raw)
        calibrateds.append(last.calibration.apply(raw))
        names += [fold.name] * len(test)
        baselines.setdefault("majority", []).append(majority(train, len(test)))
        baselines.setdefault("row number", []).append(by_row_number(train, asked))
        if shuffled:
            order = np.random.default_rng([seed, number]).permutation(len(train))
            wrong = replace(train, labels=train.labels[order])
            # Chance needs no careful calibration, and six fits would make the baseline the dearest part.
            mixed = fit_calibrated(wrong, fit, calibration=calibration, share=_SHUFFLED_SHARE, seed=seed, checked=False)
            baselines.setdefault("shuffled", []).append(mixed.probabilities(asked.questions))
    if last is None:
        raise DataError("No row is left to judge: name other blocks.")
    return OutOfFold(
        examples=examples.take(np.concatenate(tests)),
        raw=np.concatenate(raws),
        calibrated=np.concatenate(calibrateds),
        baselines={name: np.concatenate(parts) for name, parts in baselines.items()},
        folds=np.array(names),
        dropped=sum(fold.dropped for fold in folds),
        last=last,
    )


def fit_calibrated(
    train: Examples,
    fit: Fit,
    *,
    calibration: str = "temperature",
    share: float | None = None,
    seed: int = 0,
    checked: bool = True,
) -> Calibrated:
    """A classifier, calibrated by probabilities of rows from fits that saw neither them nor their groups.

    Without a `share` every row is in one of `FOLDS` such parts, and the classifier itself is fitted on all rows
    (scikit-learn's CalibratedClassifierCV(ensemble=False)): six fits, and no row is lost to calibration. With one,
    that share of the groups calibrates and does not train.

    Rows of blocks that lack a severity do not calibrate: their shares are not those of other rows.
    """
    if share is None:
        fitted, unseen = _cross_fitted(train, fit, seed)
        held = np.arange(len(train))
    else:
        part = hold_out(train, share, seed=seed) if checked else _unchecked(train, share, seed)
        fitted, held = fit(train.take(part.train), seed), part.test
        unseen = fitted.probabilities([train.questions[i] for i in held])
    complete = complete_rows(train.labels, train.blocks)[held]
    rows = complete if complete.any() else ~complete
    return Calibrated(fitted, FITS[calibration](unseen[rows], train.labels[held[rows]]))


def _cross_fitted(train: Examples, fit: Fit, seed: int) -> tuple[SeverityClassifier, np.ndarray]:
    if isinstance(fit, CrossFitting):
        return fit.cross_fitted(train, seed)
    unseen = np.empty((len(train), len(SEVERITIES)))
    for part in grouped_folds(train, seed=seed):
        fitted = fit(train.take(part.train), seed)
        unseen[part.test] = fitted.probabilities([train.questions[i] for i in part.test])
    return fit(train, seed), unseen


def evaluated(result: OutOfFold, protocol: str, *, seed: int = 0) -> Evaluation:
    """Judges what was predicted out of fold, and each block alone where blocks are known."""
    examples = result.examples
    blocks = {}
    if examples.blocks is not None:
        for name in sorted(set(examples.blocks.tolist())):
            inside = examples.blocks == name
            part = examples.take(np.flatnonzero(inside))
            blocks[name] = judge(result.calibrated[inside], part.labels, part.groups, seed=seed, curve=False)
    return Evaluation(
        protocol=protocol,
        calibrated=judge(result.calibrated, examples.labels, examples.groups, seed=seed),
        raw=judge(result.raw, examples.labels, examples.groups, seed=seed, curve=False),
        baselines={
            name: judge(probabilities, examples.labels, examples.groups, seed=seed, curve=False)
            for name, probabilities in result.baselines.items()
        },
        blocks=blocks,
        dropped=result.dropped,
    )


def evaluate_elsewhere(classifier: Calibrated, examples: Examples, *, seed: int = 0) -> Evaluation:
    """Judges a finished classifier on data it was not fitted on, beside baselines that are fitted on that data."""
    raw = classifier.classifier.probabilities(examples.questions)
    shares = np.bincount(examples.labels, minlength=len(SEVERITIES)) / len(examples)
    baselines = {
        "majority": np.tile(shares, (len(examples), 1)),
        "row number": _row_number_out_of_fold(examples, seed),
    }
    result = OutOfFold(
        examples, raw, classifier.calibration.apply(raw), baselines, np.full(len(examples), "all"), 0, classifier
    )
    return evaluated(result, "data it was not fitted on", seed=seed)


def check_groups(examples: Examples, folds: int) -> None:
    """Raises DataError when a severity has fewer groups than there are folds."""
    _refuse_missing(examples.labels, "The data", "bring rows of every severity")
    for position, name in enumerate(SEVERITIES):
        groups = len(np.unique(examples.groups[examples.labels == position]))
        if groups < folds:
            raise DataError(
                f"{name} stands on {groups} distinct question{'s' * (groups != 1)}, fewer than the {folds} parts the "
                "data is dealt into: bring more of them; `classifier fit` needs fewer parts with a larger --test-size."
            )


def _row_number_out_of_fold(examples: Examples, seed: int) -> np.ndarray:
    groups = [len(np.unique(examples.groups[examples.labels == i])) for i in range(len(SEVERITIES))]
    folds = grouped_folds(examples, folds=max(2, min(FOLDS, *groups)), seed=seed)
    probabilities = np.empty((len(examples), len(SEVERITIES)))
    for fold in folds:
        probabilities[fold.test] = by_row_number(examples.take(fold.train), examples.take(fold.test))
    return probabilities


def _unchecked(train: Examples, share: float, seed: int) -> Fold:
    """Of shuffled labels, of which a group may have several: dealt by group alone."""
    groups = np.random.default_rng(seed).permutation(np.unique(train.groups))
    held = np.isin(train.groups, groups[: max(1, round(share * len(groups)))])
    return Fold("shuffled", np.flatnonzero(~held), np.flatnonzero(held))


def _block(wanted: str, names: Sequence[str]) -> str:
    found = [name for name in names if name == wanted] or [name for name in names if name.startswith(wanted)]
    if len(found) != 1:
        there = ", ".join(name for name in names if len(name) <= 40)
        raise DataError(f"'{wanted}' is {'no' if not found else 'the beginning of more than one'} block: use {there}.")
    return found[0]


def _refuse_missing(labels: np.ndarray, what: str, remedy: str) -> None:
    missing = [name for i, name in enumerate(SEVERITIES) if not (labels == i).any()]
    if missing:
        raise DataError(f"{what} has no {' and no '.join(missing)} row, so it cannot be used for this: {remedy}.")
