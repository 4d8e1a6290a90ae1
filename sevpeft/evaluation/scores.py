"""Scores of answers and likelihoods by row, for arms and floors, and their means.

metrics.yaml defines the scores. No score means anything alone: an unrelated fluent answer has a BERTScore of .6. So
tables show four other columns beside the adapter's (`COLUMNS`).
"""

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
"""Name of a score → (n,), NaN for rows without a value."""
ALL = "all"  # the stratum of all rows, beside the severities
CRITICAL = SEVERITIES[-1]
REFERENCE = "reference"
_UNSUPPORTED = ("unsupported_medicine", "unsupported_dose")
# Scores against the reference. The reference of another question gives their floor.
_BY_REFERENCE = ("nll", "bertscore_p", "bertscore_r", "bertscore_f1", "chrf", "rouge_l")
# Scores that are trivially perfect for a reference.
_NOT_OF_REFERENCES = (*_BY_REFERENCE, *DOCTOR, *_UNSUPPORTED, "length_ratio", "empty", "truncated")
# Scores that are compared between columns (HEADLINE), and the safety scores among them.
SAFETY = ("false_reassurance", "urgent_referral", *_UNSUPPORTED, "judge_harm")
_PARTIAL = (*TRIAGE, *DOCTOR, *WHOLE, "minimized_change", "minimized_less_urgent")  # not for all severities
HEADLINE = ("nll", "bertscore_f1", "chrf", *SAFETY, "judge_urgency", "urgency", *_PARTIAL)
FEW_QUESTIONS = 10  # with fewer, intervals are too wide to be useful
PRIMARY, SAFE = "nll", "urgent_referral"  # the scores of the claim
_CANDIDATES = 60  # for the constant answer; the cost grows with the square, and more candidates change it little


def _meaning(about: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a score in evaluation.json, from its entry in metrics.yaml; `better` is by stratum."""
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
    """Entries of the scores judge_ITEM. `items`: of a rubric; `limits`: name of their limits in metrics.yaml."""
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
    """Descriptions of intervals, p, detectable differences and a claim. `families`: what is corrected together."""
    values = {"confidence": settings.confidence_level, "resamples": settings.n_resamples, "families": families}
    values |= {"permutations": statistics.PERMUTATIONS, "power": statistics.POWER, "alpha": statistics.ALPHA}
    values |= settings.model_dump(include={"margin", "safety_margin"})
    return {name: text.format(**values) for name, text in _TABLE["methods"].items() if name != "Claim" or claim}


def text_scores(answers: Sequence[str], references: Sequence[str], encoder: Encoder | None = None) -> Scores:
    """Scores (n,) that need the texts only: wording against the reference (BERTScore by `encoder`), and form."""
    scores: Scores = {}
    if encoder is not None:
        scores |= zip(("bertscore_p", "bertscore_r", "bertscore_f1"), encoder.score(answers, references), strict=True)
    scores["chrf"] = chrf(answers, references)
    # The default tokenizer of rouge-score drops all characters except a–z and digits, and so all Arabic text.
    rouge = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=_folded_words))
    pairs = list(zip(answers, references, strict=True))
    words = [(_folded_words(answer), _folded_words(reference)) for answer, reference in pairs]
    rows: dict[str, list[float]] = {
        "rouge_l": [rouge.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs],
        "length_ratio": [len(own) / len(other) if other else np.nan for own, other in words],
        "empty": [not own for own, _ in words],
        "repetition": [_repetition(own) for own, _ in words],
        "arabic_rate": [_arabic_rate(answer) for answer in answers],
    }
    return scores | {name: np.array(values, dtype=np.float64) for name, values in rows.items()}


def chrf(answers: Sequence[str], references: Sequence[str], *, beta: int = 2) -> NDArray[np.float64]:
    """Sentence chrF++ of each row (n,), 0 to 100 (Popović 2017); β = 2 weighs recall twice as much as precision."""
    metric = CHRF(word_order=2, beta=beta)
    pairs = zip(answers, references, strict=True)
    return np.array([metric.sentence_score(answer, [reference]).score for answer, reference in pairs], dtype=np.float64)


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
    """Every score of the answers (n,), by name; NaN for rows without a value.

    `truncated`: whether each answer reached the maximum length; `encoder`: of BERTScore. Without them, no such score.
    """
    scores = text_scores(answers, rows.references, encoder)
    scores |= {} if truncated is None else {"truncated": np.array(truncated, dtype=np.float64)}
    # For data without severities, the severity rules decide which questions are critical.
    critical = None if (rows.strata < 0).all() else rows.strata == SEVERITIES.index(CRITICAL)
    findings = safety_findings(answers, references=rows.references, questions=rows.questions, critical=critical)
    scores |= {name: np.array([finding.scores[name] for finding in findings]) for name in findings[0].scores}
    scores |= zip(DOCTOR, triage(scores["urgency"], list(map(urgency_of, rows.references))), strict=True)
    return scores | dict(zip(TRIAGE, triage(scores["urgency"], EXPECTED[rows.strata]), strict=True))


def floor_scores(
    rows: EvaluationRows, answers: Sequence[str], shuffled: Sequence[str], constant: str, encoder: Encoder | None
) -> dict[str, Scores]:
    """Column → scores (n,): answers against `shuffled` references, one `constant` answer, and the references."""
    of_others, own = text_scores(answers, shuffled, encoder), row_scores(rows, rows.references)
    return {
        SHUFFLED: {name: values for name, values in of_others.items() if name in _BY_REFERENCE},
        CONSTANT: row_scores(rows, [constant] * len(rows), encoder=encoder),
        REFERENCE: {name: values for name, values in own.items() if name not in _NOT_OF_REFERENCES},
    }


def other_references(rows: EvaluationRows, seed: int) -> list[str]:
    """The reference of another question for each row (n,), each used once, of the same severity if possible.

    References of critical cases differ from others in wording and length, which any model would notice. A DataError if
    more than half of the rows have the same question.
    """
    other = np.empty(len(rows), dtype=np.int64)
    for part in (np.arange(len(rows)), *(np.flatnonzero(rows.strata == stratum) for stratum in np.unique(rows.strata))):
        distinct, index, sizes = np.unique(rows.groups[part], return_inverse=True, return_counts=True)
        if 2 * sizes.max() <= len(part):
            # Random order with groups together, shifted by the size of the largest group: no row stays in its group.
            random = np.random.default_rng(seed)
            shuffled = random.permutation(len(part))
            order = shuffled[np.argsort(random.permutation(len(distinct))[index[shuffled]], kind="stable")]
            other[part[order]] = part[np.roll(order, -int(sizes.max()))]
        elif len(part) == len(rows):
            remedy = "remove duplicates with `sevpeft prepare`"
            raise DataError(f"More than half of the test rows have the same question, so no shuffle exists; {remedy}.")
    return [rows.references[at] for at in other]


def constant_answer(training_answers: Sequence[str], seed: int = 0) -> str:
    """The most typical of a sample of training answers: nearly the best answer that ignores the question.

    Typical by mean chrF++ to a second sample, with β = 1, because β = 2 prefers the longest answer.
    """
    answers, random = sorted(training_answers), np.random.default_rng(seed)
    candidates = [answers[i] for i in random.permutation(len(answers))[:_CANDIDATES]]
    others = [answers[i] for i in random.permutation(len(answers))[:_CANDIDATES]]
    return max(candidates, key=lambda candidate: chrf([candidate] * len(others), others, beta=1).mean())


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
    """Means of every score and column with intervals clustered by question, and differences between columns.

    Args:
        scores: column → score → (n,) or (seeds, n).
        tokens: column → tokens (n,) of the references: NLL is a mean over tokens, like the training loss.
        pairs: column → columns it is compared with, in the scores in `compared`. Each score is corrected separately.

    Returns:
        Stratum → rows, questions, and metrics: score → column → mean, and "against": column → difference.
    """
    scores = {column: dict(by_name) for column, by_name in scores.items()}
    for column, (name, figure) in product(scores.values(), WHOLE.items()):
        if "urgency" in column:
            column[name] = np.stack([figure(row, EXPECTED[rows.strata]) for row in np.atleast_2d(column["urgency"])])
    summary: dict[str, Any] = {}
    families: dict[str, dict[tuple[str, ...], Estimate]] = {}
    present = {metric: None for by_name in scores.values() for metric in by_name}
    names = sorted(present, key=lambda metric: list(METRICS).index(metric) if metric in METRICS else len(METRICS))
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
            for column, of_seeds in values.items():
                mean = of_seeds.mean(axis=0)
                # If seeds disagree on a row, its mean is neither 0 nor 1.
                share = yes_no and bool(np.isin(mean[np.isfinite(mean)], (0, 1)).all())
                estimate = interval(mean, groups, settings, weights=mass[column], share=share)
                by_column[column] = {**estimate.as_dict(), "against": {}}
                for other in pairs.get(column, ()) if metric in compared else ():
                    if other in values:
                        families.setdefault(metric, {})[stratum, metric, column, other] = paired_difference(
                            of_seeds, values[other], groups, settings, weights=mass[column], share=yes_no
                        )
            by_metric[metric] = by_column
        summary[stratum] = {"rows": int(part.sum()), "questions": len(np.unique(groups)), "metrics": by_metric}
    for differences in families.values():
        corrected = compare_family(differences, lambda place: metrics[place[1]]["better"][place[0]])
        for (stratum, metric, column, other), difference in corrected.items():
            summary[stratum]["metrics"][metric][column]["against"][other] = difference
    return summary


def remarks(rows: EvaluationRows) -> list[str]:
    """Warnings about the rows that every reader of the figures needs."""
    notes = []
    if (rows.strata < 0).all():
        notes.append("The data has no severities, so critical cases cannot be evaluated.")
    for at, name in () if notes else reversed(list(enumerate(SEVERITIES))):
        questions = len(np.unique(rows.groups[rows.strata == at]))
        if questions < FEW_QUESTIONS:
            number = f"{questions} {name.replace('_', '-')} question{'s' if questions != 1 else ''}"
            notes.append(f"Only {number} to evaluate on, too few for any conclusion; keep more with data.test_size.")
    if rows.leaks:
        notes.append(f"{rows.leaks:,} questions are in two splits of the data, which makes the scores too good.")
    return notes
