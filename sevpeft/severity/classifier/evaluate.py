"""Evaluation of a classifier on rows that it did not see: random folds of whole questions, or one block at a time.

Rows that stand together in a file were often labeled together, so that a classifier which learns the place looks like
one that reads the text. Holding out whole blocks avoids that. Beside every figure stand two baselines that read no
text, the majority and the number of the row. Blocks that lack a severity are trained on and not scored. The 95 %
intervals are percentiles of a bootstrap over groups: rows that ask the same are drawn together.

ECE, the expected calibration error of p_critical, is the mean over rows of |mean p_critical − critical share| of the
row's bin, the bins being 15 of equal mass (Nguyen & O'Connor 2015). Perfect calibration has an ECE above zero too:
`ece_critical_by_chance` is its mean over labels drawn from the very probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from sevpeft.errors import DataError
from sevpeft.recipe import SEVERITY_PRESETS
from sevpeft.severity.classifier.calibrate import Calibrated, fit_calibrated, fit_of
from sevpeft.severity.classifier.examples import Examples, Fold, block_folds, grouped_folds
from sevpeft.severity.classifier.linear import fit_linear, fit_student, teacher_scores
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.settings import EvaluateSettings, FitSettings
from sevpeft.severity.weights import WeightSummary, severity_weights

CRITICAL = SEVERITIES.index("critical")
BINS, CURVE, RESAMPLES = 15, 5, 1000
Progress = Callable[[str], None]
# As in metrics.json. Of one set of probabilities: `rows`; `figures`, name → value, low and high of the 95 % interval
# (NaN where not defined); `confusion`, rows the labels, columns the likeliest severity; `ece_critical_by_chance`;
# `curve`, mean p_critical and critical share of fifths of the rows by p_critical; `weights`, severity by label → what
# weights of the preset balanced are there: mean, and effective sample size.
# Of an evaluation: such metrics under `calibrated`, and by name under `baselines` (an accuracy alone flatters) and
# `blocks` (each held-out block); `unscored`, the blocks that lack a severity, if known; `repeated`, how many questions
# stand there more than once, and how many of these have several labels; `twin`, the evaluation of the question-only
# twin; `by_unlabeled`, its AUC of critical by the number of unlabeled rows.
Metrics = dict[str, Any]


def fit_and_evaluate(
    examples: Examples,
    settings: FitSettings | EvaluateSettings,
    progress: Progress = lambda message: None,
    unlabeled: Examples | None = None,
) -> tuple[Calibrated, dict[str, Metrics]]:
    """Evaluates a way of fitting; returns the first classifier and heading → evaluation.

    With `FitSettings` on a share of the questions, else on random folds; where blocks are known, also by blocks.
    """
    sources, seed = fit_of(settings, progress, unlabeled), settings.seed
    if isinstance(settings, FitSettings):
        protocols = {"Test rows": grouped_folds(examples, round(1 / settings.test_size), seed=seed)[:1]}
    else:
        protocols = {"Random folds": grouped_folds(examples, settings.folds, seed=seed)}
    if examples.blocks is not None:
        protocols["Blocks held out"] = block_folds(examples)
    fit = partial(fit_calibrated, fit=sources, settings=settings)
    found = {heading: evaluate_folds(examples, folds, fit, seed, progress) for heading, folds in protocols.items()}
    evaluations = {heading: evaluation for heading, (evaluation, _) in found.items()}
    if unlabeled is not None:
        next(iter(evaluations.values()))["by_unlabeled"] = unlabeled_curve(examples, unlabeled, seed, progress)
    return next(iter(found.values()))[1], evaluations


def evaluate_fitted(classifier: Calibrated, examples: Examples, seed: int = 0) -> Metrics:
    """Evaluates a fitted classifier on data that it was not fitted on; only the baselines are fitted, out of fold."""
    groups = [len(np.unique(examples.groups[examples.labels == k])) for k in range(len(SEVERITIES))]
    folds = grouped_folds(examples, max(2, min(5, *groups)), seed=seed)
    fitted = {"question": classifier.twin, classifier.reads: classifier}
    return evaluate_folds(replace(examples, reads=classifier.reads), folds, lambda train: fitted[train.reads], seed)[0]


def unlabeled_curve(examples: Examples, unlabeled: Examples, seed: int, progress: Progress) -> list[dict[str, float]]:
    """AUC of critical of the question alone with no, a quarter, half and all of the unlabeled rows, before calibration.

    Cross-validated on the labeled rows; the teacher of a fold has not seen its test rows.
    """
    counts = sorted({0, len(unlabeled) // 4, len(unlabeled) // 2, len(unlabeled)})
    found = {count: np.empty((len(examples), len(SEVERITIES))) for count in counts}
    questions = replace(examples, reads="question")
    for fold in (folds := grouped_folds(examples, seed=seed)):
        progress(f"unlabeled rows, {fold.name} of {len(folds)}")
        own, theirs = teacher_scores(examples.take(fold.train), unlabeled)
        train, asked = questions.take(fold.train), questions.take(fold.test).passages
        for count in counts:
            some = unlabeled.take(np.arange(count))
            student = fit_student(train, some, (own, theirs[:count])) if count else fit_linear(train)
            found[count][fold.test] = student.probabilities(asked)
    rows = np.flatnonzero(examples.complete)
    labels, groups = examples.labels[rows], examples.groups[rows]
    scores = {n: score(p[rows], labels, groups, seed=seed, resamples=RESAMPLES) for n, p in found.items()}
    return [{"unlabeled": n, **scores[n]["figures"]["auc_critical"]} for n in counts]


def evaluate_folds(
    examples: Examples,
    folds: Sequence[Fold],
    fit: Callable[[Examples], Calibrated],
    seed: int = 0,
    progress: Progress = lambda message: None,
) -> tuple[Metrics, Calibrated]:
    """Fits on the training rows of every fold; returns an evaluation of all test rows, and the last classifier.

    If it is to read answers, its question-only twin is fitted and evaluated too.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.tree import DecisionTreeClassifier

    from sevpeft.data.prepare.duplicates import conflicting_groups

    scored, tests, parts = examples.complete, [], []
    reads, fitted = dict.fromkeys(("question", examples.reads)), dict[str, Calibrated]()  # twin first
    for number, fold in enumerate(folds, start=1):
        progress(f"{fold.name} ({number} of {len(folds)})")
        if not len(tested := fold.test[scored[fold.test]]):
            continue
        train, test = examples.take(fold.train), examples.take(tested)
        fitted = {text: fit(replace(train, reads=text)) for text in reads}
        part = {text: one.probabilities(test.questions, test.answers) for text, one in fitted.items()}
        # Baselines learn from the rows that calibrate. With fewer rows in a leaf the tree would learn single rows.
        known = train.take(np.flatnonzero(train.complete))
        tree = DecisionTreeClassifier(min_samples_leaf=max(1, min(20, len(known) // 4)), random_state=0)
        for name, baseline in (("majority", DummyClassifier(strategy="prior")), ("row number", tree)):
            part[name] = baseline.fit(known.rows[:, None], known.labels).predict_proba(test.rows[:, None])
        tests.append(tested)
        parts.append(part)
    if not parts:
        raise DataError("No row to test on is in a block with every severity; name another block_column.")
    rows = examples.take(np.concatenate(tests))
    blocks = np.full(len(rows), "") if rows.blocks is None else rows.blocks

    def metrics(name: str, block: str | None = None) -> Metrics:
        keep = np.full(len(rows), True) if block is None else blocks == block
        found, resamples = np.concatenate([part[name] for part in parts])[keep], RESAMPLES * (name in reads)
        return score(found, rows.labels[keep], rows.groups[keep], seed=seed, resamples=resamples)

    def of(text: str) -> Metrics:
        held_out = {fold.name: metrics(text, fold.name) for fold in folds if fold.name in blocks}
        return {"calibrated": metrics(text), "blocks": held_out}

    conflicts = conflicting_groups(examples.groups, examples.labels)
    evaluation = {
        "reads": examples.reads,
        "repeated": [int((np.bincount(examples.groups) > 1).sum()), len(conflicts)],
        **of(examples.reads),
        "baselines": {name: metrics(name) for name in ("majority", "row number")},
        "unscored": None if examples.blocks is None else sorted(set(examples.blocks[~scored].tolist())),
    }
    twin, whole = (fitted[text] for text in ("question", examples.reads))
    if whole is twin:
        return evaluation, twin
    return evaluation | {"twin": of("question")}, Calibrated(whole.sources, whole.calibration, whole.reads, twin)


def score(
    probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, seed: int = 0, resamples: int
) -> Metrics:
    """Figures of probabilities (n, 3) for labels and groups (n,) of rows; without resamples there are no intervals."""
    compute, random = _figures(probabilities, labels), np.random.default_rng(seed)
    # Groups are drawn with replacement, as many as there are; the weight of a row is how often its group was drawn.
    _, index = np.unique(groups, return_inverse=True)
    chance = np.full(index.max() + 1, 1 / (index.max() + 1))
    drawn = [compute(random.multinomial(len(chance), chance)[index]) for _ in range(resamples)]
    count, classes, p_critical = len(labels), len(SEVERITIES), probabilities[:, CRITICAL]
    cells = np.bincount(labels * classes + probabilities.argmax(axis=1), minlength=classes**2)
    bins = _bins(p_critical)
    by_chance = [_ece(bins, p_critical - (random.random(count) < p_critical), count) for _ in range(200)]
    figures = {}
    for name, value in compute(np.ones(count)).items():
        values = [one[name] for one in drawn if np.isfinite(one[name])]
        low, high = np.percentile(values, [2.5, 97.5]).tolist() if values else (np.nan, np.nan)
        figures[name] = {"value": value, "low": low, "high": high}
    weights, parts = severity_weights(probabilities, SEVERITY_PRESETS["balanced"]), {}
    for k, name in enumerate(SEVERITIES):
        if len(own := weights[labels == k]):
            of = WeightSummary.of(own, None)
            parts[name] = {"rows": len(own), "mean": of.mean, "effective": of.effective_sample_size}
    fifths = np.array_split(np.argsort(p_critical, kind="stable"), CURVE)
    return {
        "rows": count,
        "figures": figures,
        "weights": parts,
        "curve": [[p_critical[part].mean(), (labels[part] == CRITICAL).mean()] for part in fifths if len(part)],
        "confusion": cells.reshape(classes, classes).tolist(),
        "ece_critical_by_chance": float(np.mean(by_chance)),
    }


def _figures(probabilities: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """A function from weights (n,) of the rows to figures, a hundred times as fast as scikit-learn: for a bootstrap."""
    classes, p_critical = len(SEVERITIES), probabilities[:, CRITICAL]
    truth, predicted = np.eye(classes, dtype=bool)[labels], probabilities.argmax(axis=1)
    brier = ((probabilities - truth) ** 2).sum(axis=1)
    log_loss = -np.log(np.maximum(probabilities[truth], 1e-15))
    ranks = {name: np.unique(probabilities[:, k], return_inverse=True)[1] for k, name in enumerate(SEVERITIES)}
    bins = _bins(p_critical)

    def compute(weights: np.ndarray) -> dict[str, float]:
        total = weights.sum()
        cells = np.bincount(labels * classes + predicted, weights, classes**2).reshape(classes, classes)
        hits, actual, called = np.diagonal(cells), cells.sum(axis=1), cells.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            figures = {
                "accuracy": hits.sum() / total,
                # A severity that is neither there nor predicted does not enter the mean.
                "macro_f1": np.nanmean(2 * hits / (actual + called)),
                "recall_critical": hits[CRITICAL] / actual[CRITICAL],
                # None predicted is a precision of 0, as scikit-learn has it: silence must not look like care.
                "precision_critical": hits[CRITICAL] / called[CRITICAL] if called[CRITICAL] else 0.0,
                **{f"auc_{name}": _auc(ranks[name], truth[:, k], weights) for k, name in enumerate(SEVERITIES)},
                "brier": weights @ brier / total,
                "log_loss": weights @ log_loss / total,
                "ece_critical": _ece(bins, weights * (p_critical - truth[:, CRITICAL]), total),
            }
        return {name: float(value) for name, value in figures.items()}

    return compute


def _auc(rank: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half (Mann & Whitney 1947); NaN where one side has no weight."""
    yes, no = np.bincount(rank, weights * positive), np.bincount(rank, weights * ~positive)
    return float(yes @ (np.cumsum(no) - no / 2) / (yes.sum() * no.sum()))


def _bins(scores: np.ndarray) -> np.ndarray:
    """(n,) number of the bin of equal mass that a score belongs to; rows of one score stay in one bin."""
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.searchsorted(edges, scores, side="right")


def _ece(bins: np.ndarray, gaps: np.ndarray, total: float) -> float:
    return float(np.abs(np.bincount(bins, gaps)).sum() / total)
