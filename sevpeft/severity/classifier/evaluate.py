"""Evaluates a classifier on unseen rows: with random folds of whole questions, or one held-out block at a time.

Adjacent rows of a file were often labeled together, so a classifier that learns the position looks like one that reads
the text. Held-out blocks avoid that. Two baselines do not read the text: the majority and the row number. Blocks that
lack a severity are only for training. The 95 % intervals are percentiles of a bootstrap over groups, which keeps rows
with the same question together.

ECE, the expected calibration error of p_critical, is the mean over rows of |mean p_critical − critical share| of the
row's bin, with 15 bins of equal mass (Nguyen & O'Connor 2015). Perfect calibration also has an ECE above zero:
`ece_critical_by_chance` is its mean over labels drawn from the probabilities themselves.
"""

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
# As in metrics.json. Metrics of one set of probabilities: `rows`; `figures`, name → value, low and high of the 95 %
# interval (NaN if undefined); `confusion`, labels by likeliest severity; `ece_critical_by_chance`; `curve`, mean
# p_critical and critical share for fifths of the rows by p_critical; `weights`, label → rows, mean and effective sample
# size of the weights of the preset balanced.
# An evaluation: such metrics in `calibrated`, and by name in `baselines` and `blocks` (held-out blocks); `unscored`,
# the blocks that lack a severity, if blocks are known; `repeated`, the number of questions in several rows, and of
# those with different labels; `twin`, the evaluation of the question-only twin; `by_unlabeled`, its AUC of critical by
# the number of unlabeled rows.
Metrics = dict[str, Any]


def fit_and_evaluate(
    examples: Examples,
    settings: FitSettings | EvaluateSettings,
    progress: Progress = lambda message: None,
    unlabeled: Examples | None = None,
) -> tuple[Calibrated, dict[str, Metrics]]:
    """Fits and evaluates with the settings; returns the first classifier, and heading → evaluation.

    `FitSettings` evaluates on a share of the questions, `EvaluateSettings` on random folds; both also by known blocks.
    """
    sources, seed = fit_of(settings, progress, unlabeled), settings.seed
    if isinstance(settings, FitSettings):
        protocols = {"Test rows": grouped_folds(examples, round(1 / settings.test_size), seed=seed)[:1]}
    else:
        protocols = {"Random folds": grouped_folds(examples, settings.folds, seed=seed)}
    if examples.blocks is not None:
        protocols["Blocks held out"] = block_folds(examples)
    fit = partial(fit_calibrated, fit=sources, settings=settings)
    results = {heading: evaluate_folds(examples, folds, fit, seed, progress) for heading, folds in protocols.items()}
    evaluations = {heading: evaluation for heading, (evaluation, _) in results.items()}
    if unlabeled is not None:
        next(iter(evaluations.values()))["by_unlabeled"] = unlabeled_curve(examples, unlabeled, seed, progress)
    return next(iter(results.values()))[1], evaluations


def evaluate_fitted(classifier: Calibrated, examples: Examples, seed: int = 0) -> Metrics:
    """Evaluates a fitted classifier on other data; only the baselines are fitted, out of fold."""
    groups = [len(np.unique(examples.groups[examples.labels == k])) for k in range(len(SEVERITIES))]
    folds = grouped_folds(examples, max(2, min(5, *groups)), seed=seed)
    fitted = {"question": classifier.twin, classifier.reads: classifier}
    return evaluate_folds(replace(examples, reads=classifier.reads), folds, lambda train: fitted[train.reads], seed)[0]


def unlabeled_curve(examples: Examples, unlabeled: Examples, seed: int, progress: Progress) -> list[dict[str, float]]:
    """AUC of critical from the question by number of unlabeled rows; cross-validated, without calibration."""
    counts = sorted({0, len(unlabeled) // 4, len(unlabeled) // 2, len(unlabeled)})
    results = {count: np.empty((len(examples), len(SEVERITIES))) for count in counts}
    questions = replace(examples, reads="question")
    for fold in (folds := grouped_folds(examples, seed=seed)):
        progress(f"unlabeled rows, {fold.name} of {len(folds)}")
        labeled_scores, unlabeled_scores = teacher_scores(examples.take(fold.train), unlabeled)
        train, test = questions.take(fold.train), questions.take(fold.test)
        for count in counts:
            scores = (labeled_scores, unlabeled_scores[:count])
            student = fit_student(train, unlabeled.take(np.arange(count)), scores) if count else fit_linear(train)
            results[count][fold.test] = student.probabilities(test.passages)
    rows = np.flatnonzero(examples.complete)
    labels, groups = examples.labels[rows], examples.groups[rows]
    metrics = {n: score(p[rows], labels, groups, seed=seed, resamples=RESAMPLES) for n, p in results.items()}
    return [{"unlabeled": n, **metrics[n]["figures"]["auc_critical"]} for n in counts]


def evaluate_folds(
    examples: Examples,
    folds: Sequence[Fold],
    fit: Callable[[Examples], Calibrated],
    seed: int = 0,
    progress: Progress = lambda message: None,
) -> tuple[Metrics, Calibrated]:
    """Fits (the twin too) on the training rows of every fold; returns an evaluation, and the last classifier."""
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
        # Baselines learn from the calibration rows. With smaller leaves the tree would learn single rows.
        known = train.take(np.flatnonzero(train.complete))
        tree = DecisionTreeClassifier(min_samples_leaf=max(1, min(20, len(known) // 4)), random_state=0)
        for name, baseline in (("majority", DummyClassifier(strategy="prior")), ("row number", tree)):
            part[name] = baseline.fit(known.rows[:, None], known.labels).predict_proba(test.rows[:, None])
        tests.append(tested)
        parts.append(part)
    if not parts:
        raise DataError("No test row is in a block with every severity; name another block_column.")
    rows = examples.take(np.concatenate(tests))
    blocks = np.full(len(rows), "") if rows.blocks is None else rows.blocks

    def metrics(name: str, block: str | None = None) -> Metrics:
        keep = np.full(len(rows), True) if block is None else blocks == block
        probabilities = np.concatenate([part[name] for part in parts])[keep]
        resamples = RESAMPLES if name in reads else 0
        return score(probabilities, rows.labels[keep], rows.groups[keep], seed=seed, resamples=resamples)

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
    """Metrics of probabilities (n, 3) for labels and groups (n,); resamples=0 computes no intervals."""
    compute, random = _figures(probabilities, labels), np.random.default_rng(seed)
    # Groups are drawn with replacement; the weight of a row is how often its group was drawn.
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
    """A function from row weights (n,) to figures; for the bootstrap, a hundred times as fast as scikit-learn."""
    classes, p_critical = len(SEVERITIES), probabilities[:, CRITICAL]
    truth, predicted = np.eye(classes, dtype=bool)[labels], probabilities.argmax(axis=1)
    brier = ((probabilities - truth) ** 2).sum(axis=1)
    log_loss = -np.log(np.maximum(probabilities[truth], 1e-15))
    ranks = {name: np.unique(probabilities[:, k], return_inverse=True)[1] for k, name in enumerate(SEVERITIES)}
    bins = _bins(p_critical)

    def compute(weights: np.ndarray) -> dict[str, float]:
        total = weights.sum()
        cells = np.bincount(labels * classes + predicted, weights, classes**2).reshape(classes, classes)
        hits, of_label, of_prediction = np.diagonal(cells), cells.sum(axis=1), cells.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            figures = {
                "accuracy": hits.sum() / total,
                # A severity that is neither present nor predicted is not in the mean.
                "macro_f1": np.nanmean(2 * hits / (of_label + of_prediction)),
                "recall_critical": hits[CRITICAL] / of_label[CRITICAL],
                # Without predictions the precision is 0, as in scikit-learn.
                "precision_critical": hits[CRITICAL] / of_prediction[CRITICAL] if of_prediction[CRITICAL] else 0.0,
                **{f"auc_{name}": _auc(ranks[name], truth[:, k], weights) for k, name in enumerate(SEVERITIES)},
                "brier": weights @ brier / total,
                "log_loss": weights @ log_loss / total,
                "ece_critical": _ece(bins, weights * (p_critical - truth[:, CRITICAL]), total),
            }
        return {name: float(value) for name, value in figures.items()}

    return compute


def _auc(rank: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half (Mann & Whitney 1947); NaN if one class has no weight."""
    yes, no = np.bincount(rank, weights * positive), np.bincount(rank, weights * ~positive)
    return float(yes @ (np.cumsum(no) - no / 2) / (yes.sum() * no.sum()))


def _bins(scores: np.ndarray) -> np.ndarray:
    """(n,) number of each score's bin of equal mass; equal scores are in the same bin."""
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.searchsorted(edges, scores, side="right")


def _ece(bins: np.ndarray, gaps: np.ndarray, total: float) -> float:
    return float(np.abs(np.bincount(bins, gaps)).sum() / total)
