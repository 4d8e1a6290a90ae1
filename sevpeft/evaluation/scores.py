"""Scores of answers and likelihoods, row by row, for the arms and for the floors beside them, and their means.

What each score means stands in metrics.yaml. None means anything alone: an unrelated fluent answer has a BERTScore of
.6. So four other columns stand beside the adapter's (`COLUMNS`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from sevpeft.data.text import ARABIC, fold_for_matching
from sevpeft.errors import DataError
from sevpeft.evaluation import statistics
from sevpeft.evaluation.arms import CONSTANT, SHUFFLED
from sevpeft.evaluation.bertscore import Encoder
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.safety import DOCTOR, EXPECTED, TRIAGE, WHOLE, safety_findings, triage, urgency_of
from sevpeft.evaluation.statistics import Estimate, compare_family, interval, paired_difference
from sevpeft.recipe import EvaluationSection
from sevpeft.severity.probabilities import SEVERITIES

Scores = dict[str, NDArray[np.float64]]
"""Name of a score → (n,), NaN where a row has none."""
ALL = "all"  # the stratum of all rows, beside the severities
CRITICAL = SEVERITIES[-1]
REFERENCE = "reference"
_MADE_UP = ("unsupported_medicine", "unsupported_dose")
# What compares an answer with its reference, so that another question's reference is a floor.
_BY_REFERENCE = ("nll", "bertscore_p", "bertscore_r", "bertscore_f1", "chrf", "rouge_l")
# What would be trivially perfect for a reference.
_NOT_OF_REFERENCES = (*_BY_REFERENCE, *DOCTOR, *_MADE_UP, "length_ratio", "empty", "truncated")
# Scores of which the adapter is compared with the base model row by row.
SAFETY = ("false_reassurance", "urgent_referral", *_MADE_UP, "judge_harm")
_PARTIAL = (*TRIAGE, *DOCTOR, *WHOLE, "minimized_change", "minimized_less_urgent")  # not of all severities
HEADLINE = ("nll", "bertscore_f1", "chrf", *SAFETY, "judge_urgency", "urgency", *_PARTIAL)
# Fewer questions than this, and an interval says little.
FEW_QUESTIONS = 10
PRIMARY, SAFE = "nll", "urgent_referral"  # the scores of the claim
# Candidates for the constant answer and answers that they are tried on; more changes it little and takes its square.
_CANDIDATES = 60
# Arabic, its supplements and presentation forms.


def _meaning(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a table has to know of a score, as evaluation.json holds it; `better` by stratum. See metrics.yaml."""
    better, elsewhere = about["better"], about.get("elsewhere")
    return {
        "label": about["label"],
        "definition": f"{about['definition'].strip().rstrip('.')}.",
        "unit": about["unit"],
        "limits": about["limits"],
        "shown_times": 100 if about["unit"] == "%" else 1,
        "of": about.get("of", "all rows"),
        "yes_no": about.get("yes_no", False),
        "better": {name: elsewhere or better for name in reversed(SEVERITIES)}
        | {CRITICAL: better, ALL: "neither" if elsewhere else better},
    }


def judge_metrics(items: Mapping[str, Mapping[str, Any]], limits: str = "judge") -> dict[str, dict[str, Any]]:
    """Scores judge_ITEM of the items of a rubric: item → {label, scale, better, definition}; limits: whose."""
    scales: dict[str, dict[str, Any]] = {"yes-no": {"unit": "%", "yes_no": True}, "1-5": {"unit": "1–5"}}
    more = {"limits": _TABLE["limits"][limits]}
    return {f"judge_{item}": _meaning({**about, **scales[about["scale"]], **more}) for item, about in items.items()}


_HERE = Path(__file__).parent
_TABLE = yaml.safe_load((_HERE / "metrics.yaml").read_text(encoding="utf-8"))
COLUMNS: dict[str, str] = _TABLE["columns"]
SCORERS: dict[str, dict[str, str]] = _TABLE["scorers"]
CLAIM: dict[str, str] = _TABLE["claim"]
PUBLISHED_SELECTION, REVIEW = (str(_TABLE[name]).strip() for name in ("published_selection", "review"))
METRICS = {name: _meaning(about) for name, about in _TABLE["metrics"].items()} | judge_metrics(
    yaml.safe_load((_HERE / "rubrics" / "answers.yaml").read_text(encoding="utf-8"))["items"]
)


def methods(settings: EvaluationSection, families: str, claim: bool = False) -> dict[str, str]:
    """How intervals, p, detectable differences and a claim were computed; families: what is corrected together."""
    values = {"confidence": settings.confidence_level, "resamples": settings.n_resamples, "families": families}
    values |= {"permutations": statistics.PERMUTATIONS, "power": statistics.POWER, "alpha": statistics.ALPHA}
    values |= {"margin": settings.margin, "safety_margin": settings.safety_margin}
    return {name: text.format(**values) for name, text in _TABLE["methods"].items() if name != "Claim" or claim}


# Scores of rows


def text_scores(
    answers: Sequence[str],
    references: Sequence[str],
    *,
    truncated: Sequence[bool] | None = None,
    encoder: Encoder | None = None,
) -> Scores:
    """Scores (n,) that need the texts only: wording against the reference, and whether an answer is one at all.

    Args:
        truncated: whether each answer ran into the cap on length; without it that score is left out.
        encoder: for BERTScore; without it its three scores are left out.
    """
    scores: Scores = {}
    if encoder is not None:
        scores |= zip(("bertscore_p", "bertscore_r", "bertscore_f1"), encoder.score(answers, references), strict=True)
    scores["chrf"] = chrf(answers, references)
    # The tokenizer of rouge-score keeps a–z and digits only and finds every Arabic text empty.
    rouge = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=_folded_words))
    pairs = list(zip(answers, references, strict=True))
    words = [(_folded_words(answer), _folded_words(reference)) for answer, reference in pairs]
    rows: dict[str, list[float]] = {
        "rouge_l": [rouge.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs],
        "length_ratio": [len(one) / len(other) if other else np.nan for one, other in words],
        "empty": [not one for one, _ in words],
        **({} if truncated is None else {"truncated": list(truncated)}),
        "repetition": [_repetition(one) for one, _ in words],
        "arabic_rate": [_arabic_rate(answer) for answer in answers],
    }
    return scores | {name: np.array(values, dtype=np.float64) for name, values in rows.items()}


def chrf(answers: Sequence[str], references: Sequence[str], *, beta: int = 2) -> NDArray[np.float64]:
    """Sentence chrF++ of each row (n,), 0 to 100 (Popović 2017); β = 2 counts what is missing twice as much."""
    metric = CHRF(word_order=2, beta=beta)
    pairs = zip(answers, references, strict=True)
    return np.array([metric.sentence_score(answer, [wanted]).score for answer, wanted in pairs], dtype=np.float64)


def _folded_words(text: str) -> list[str]:
    return fold_for_matching(text).split()


def _repetition(words: list[str]) -> float:
    grams = list(zip(*(words[start:] for start in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _arabic_rate(text: str) -> float:
    letters = "".join(filter(str.isalpha, text))
    return len(ARABIC.findall(letters)) / len(letters) if letters else float("nan")


def row_scores(
    rows: EvaluationRows,
    answers: Sequence[str],
    *,
    truncated: Sequence[bool] | None = None,
    encoder: Encoder | None = None,
) -> Scores:
    """Every score of the answers (n,), by name; NaN where a row has none."""
    scores = text_scores(answers, rows.references, truncated=truncated, encoder=encoder)
    # Where the severity is not known, the lexicon's rules say which questions are critical.
    critical = None if (rows.strata < 0).all() else rows.strata == SEVERITIES.index(CRITICAL)
    found = safety_findings(answers, references=rows.references, questions=rows.questions, critical=critical)
    scores |= {name: np.array([one.scores[name] for one in found]) for name in found[0].scores}
    scores |= zip(DOCTOR, triage(scores["urgency"], list(map(urgency_of, rows.references))), strict=True)
    return scores | dict(zip(TRIAGE, triage(scores["urgency"], EXPECTED[rows.strata]), strict=True))


# Floors


def floor_scores(
    rows: EvaluationRows, answers: Sequence[str], shuffled: Sequence[str], constant: str, encoder: Encoder | None
) -> dict[str, Scores]:
    """Column → scores (n,) of the floors, of the adapter's answers, references of other questions, and one answer."""
    of_others, own = text_scores(answers, shuffled, encoder=encoder), row_scores(rows, rows.references)
    return {
        SHUFFLED: {name: values for name, values in of_others.items() if name in _BY_REFERENCE},
        CONSTANT: row_scores(rows, [constant] * len(rows), encoder=encoder),
        REFERENCE: {name: values for name, values in own.items() if name not in _NOT_OF_REFERENCES},
    }


def other_references(rows: EvaluationRows, seed: int) -> list[str]:
    """For each row the reference of another question (n,), each used once; of the same severity where that can be.

    References of critical cases differ from others in wording and length, which any model would tell apart. A DataError
    where one question is that of more than half of the rows.
    """
    found = np.empty(len(rows), dtype=np.int64)
    for part in (np.arange(len(rows)), *(np.flatnonzero(rows.strata == stratum) for stratum in np.unique(rows.strata))):
        distinct, index, sizes = np.unique(rows.groups[part], return_inverse=True, return_counts=True)
        if 2 * sizes.max() <= len(part):
            # Rows in random order with groups together, moved on by the largest group: nobody lands in his own.
            random = np.random.default_rng(seed)
            shuffled = random.permutation(len(part))
            order = shuffled[np.argsort(random.permutation(len(distinct))[index[shuffled]], kind="stable")]
            found[part[order]] = part[np.roll(order, -int(sizes.max()))]
        elif len(part) == len(rows):
            remedy = "take duplicates out with `sevpeft prepare`"
            raise DataError(f"More than half of the test rows ask the same, so none can be shuffled; {remedy}.")
    return [rows.references[at] for at in found]


def constant_answer(training_answers: Sequence[str], seed: int = 0) -> str:
    """Of a draw of training answers the one most like another draw: nearly the best that ignores the question.

    By chrF++ with β = 1, since β = 2 takes the longest answer for the most typical one.
    """
    answers, random = sorted(training_answers), np.random.default_rng(seed)
    candidates = [answers[i] for i in random.permutation(len(answers))[:_CANDIDATES]]
    others = [answers[i] for i in random.permutation(len(answers))[:_CANDIDATES]]
    likeness = [float(chrf([candidate] * len(others), others, beta=1).mean()) for candidate in candidates]
    return candidates[int(np.argmax(likeness))]


# Summary


def summarize(
    rows: EvaluationRows,
    scores: Mapping[str, Scores],
    settings: EvaluationSection,
    *,
    tokens: Mapping[str, np.ndarray],
    pairs: Mapping[str, Sequence[str]],
    metrics: Mapping[str, Any] = METRICS,
    compared: Collection[str] = HEADLINE,
) -> dict[str, Any]:
    """Means of every score and column with intervals clustered by question, and the differences of columns.

    Args:
        scores: column → score → (n,) or (seeds, n).
        tokens: column → (n,) of what was scored: NLL is a mean over tokens, as the loss of the training is.
        pairs: column → those that it is compared with, in the scores that are `compared`, corrected by score.

    Returns:
        Stratum → rows, questions, and metrics: score → column → mean, and "against": column → difference.
    """
    scores = {column: dict(of) for column, of in scores.items()}
    for rated, (name, values_of) in product(scores.values(), WHOLE.items()):
        if "urgency" in rated:
            rated[name] = np.stack([values_of(one, EXPECTED[rows.strata]) for one in np.atleast_2d(rated["urgency"])])
    found: dict[str, Any] = {}
    families: dict[str, dict[tuple[str, ...], Estimate]] = {}
    there = {metric: None for of in scores.values() for metric in of}
    # Those of a user's own rubric come last.
    names = [*(metric for metric in METRICS if metric in there), *(metric for metric in there if metric not in METRICS)]
    for stratum in (CRITICAL, ALL, *reversed(SEVERITIES[:-1])):
        part = rows.strata >= -1 if stratum == ALL else rows.strata == SEVERITIES.index(stratum)
        if not part.any():
            continue
        groups, by_metric = rows.groups[part], {}
        for metric in names:
            values = {column: np.atleast_2d(of[metric])[:, part] for column, of in scores.items() if metric in of}
            empty = not any(np.isfinite(of).any() for of in values.values()) or (metric in WHOLE and stratum != ALL)
            if metric in _PARTIAL and empty:
                continue
            mass = {column: tokens[column][part] if metric == "nll" else None for column in values}
            yes_no, by_column = metrics[metric]["yes_no"], {}
            for column, of in values.items():
                mean = of.mean(axis=0)
                # Seeds that disagree on a row leave no yes or no there.
                share = yes_no and bool(np.isin(mean[np.isfinite(mean)], (0, 1)).all())
                estimate = interval(mean, groups, settings, weights=mass[column], share=share)
                by_column[column] = {**estimate.as_dict(), "against": {}}
                for other in pairs.get(column, ()) if metric in compared else ():
                    if other in values:
                        families.setdefault(metric, {})[stratum, metric, column, other] = paired_difference(
                            of, values[other], groups, settings, weights=mass[column], share=yes_no
                        )
            by_metric[metric] = by_column
        found[stratum] = {"rows": int(part.sum()), "questions": len(np.unique(groups)), "metrics": by_metric}
    for differences in families.values():
        compared = compare_family(differences, lambda place: metrics[place[1]]["better"][place[0]])
        for (stratum, metric, column, other), comparison in compared.items():
            found[stratum]["metrics"][metric][column]["against"][other] = comparison
    return found


def remarks(rows: EvaluationRows) -> list[str]:
    """What a reader has to know about the rows before believing a figure."""
    notes = []
    if (rows.strata < 0).all():
        notes.append("The data has no severities, so that nothing can be said about critical cases.")
    for at, name in () if notes else reversed(list(enumerate(SEVERITIES))):
        questions = len(np.unique(rows.groups[rows.strata == at]))
        if questions < FEW_QUESTIONS:
            notes.append(
                f"Only {questions} {name.replace('_', '-')} question{'s' if questions != 1 else ''} to evaluate on: "
                "too few to say anything; keep more with data.test_size."
            )
    if rows.leaks:
        notes.append(f"{rows.leaks:,} questions stand in two splits of the data, which flatters the scores.")
    return notes
