"""Turns answers and likelihoods into scores of every row, for the arms and for the floors that stand beside them.

A score means nothing alone: an unrelated fluent answer has a BERTScore of .6, and a model that sends everybody to the
emergency room has a referral rate of 1. So four other columns are computed with the adapter's: the base model, the
adapter's answers against the references of other questions, one training answer for all questions, and, for what an
answer says by itself, the doctors' own answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sevpeft.errors import ModelError
from sevpeft.evaluation.bertscore import DEFAULT_ENCODER, DEFAULT_LAYER, Encoder
from sevpeft.evaluation.metrics import ALL, METRICS, Metric, Scores, shuffled_references, text_scores
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.safety import safety_scores
from sevpeft.evaluation.statistics import Difference, compare_family, estimate_dict, interval, paired_difference
from sevpeft.evaluation.switching import ADAPTER, BASE
from sevpeft.recipe import Recipe
from sevpeft.severity.probabilities import SEVERITIES

SHUFFLED, CONSTANT, REFERENCE = "shuffled", "constant", "reference"
COLUMNS = {
    ADAPTER: "the trained adapter",
    BASE: "the same base model with the adapter switched off",
    SHUFFLED: "floor: the adapter's answers and likelihoods against references of other questions",
    CONSTANT: "floor: one training answer for every question",
    REFERENCE: "the reference answers themselves, for what an answer says by itself",
}
# What compares an answer with its reference, so that another question's reference is a floor.
_BY_REFERENCE = ("nll", "bertscore_p", "bertscore_r", "bertscore_f1", "chrf", "rouge_l")
# What would be trivially perfect for a reference.
_NOT_OF_REFERENCES = (*_BY_REFERENCE, "length_ratio", "empty", "truncated", "unsupported_medicine", "unsupported_dose")
# Fewer questions than this, and an interval says little.
FEW_QUESTIONS = 10
# Scores of which the adapter is compared with the base model row by row.
SAFETY = ("false_reassurance", "urgent_referral", "unsupported_medicine", "unsupported_dose", "judge_harm")
HEADLINE = ("nll", "bertscore_f1", "chrf", *SAFETY, "judge_urgency")


@dataclass(frozen=True)
class Likelihood:
    """Of n rows: nll (n,) in nats over the whole answer, NaN where a row did not fit; tokens (n,), 0 there."""

    nll: np.ndarray
    tokens: np.ndarray

    def per_token(self) -> np.ndarray:
        """(n,) nats a token, NaN where there is none."""
        return np.where(self.tokens > 0, self.nll / np.maximum(self.tokens, 1), np.nan)


def load_encoder(recipe: Recipe) -> tuple[Encoder | None, str | None]:
    """The encoder of BERTScore, or None and why the score is left out.

    The default encoder may be absent on a machine without a connection, which costs one score. One that the recipe
    names was meant.

    Raises:
        ModelError: the encoder that the recipe names cannot be loaded or has no such layer.
    """
    asked = recipe.evaluation
    if not asked.bertscore:
        return None, "BERTScore is left out, as evaluation.bertscore=false says."
    try:
        return Encoder.load(asked.bertscore_model, asked.bertscore_layer), None
    except ModelError as error:
        if (asked.bertscore_model, asked.bertscore_layer) != (DEFAULT_ENCODER, DEFAULT_LAYER):
            raise
        return None, f"BERTScore is left out: {error}"


def row_scores(
    rows: EvaluationRows,
    answers: Sequence[str],
    *,
    truncated: Sequence[bool] | None = None,
    likelihood: Likelihood | None = None,
    references: Sequence[str] | None = None,
    encoder: Encoder | None = None,
) -> Scores:
    """Every score of the answers (n,), by name; NaN where a row has none.

    Args:
        references: other references than the rows' own.
    """
    against = rows.references if references is None else references
    scores: Scores = {} if likelihood is None else {"nll": likelihood.per_token()}
    scores |= text_scores(answers, against, truncated=truncated, encoder=encoder)
    # Where the severity is not known, the lexicon's rules say which questions are critical.
    critical = None if (rows.strata < 0).all() else rows.strata == SEVERITIES.index("critical")
    scores |= safety_scores(answers, references=against, questions=rows.questions, critical=critical)
    return {name: scores[name] for name in METRICS if name in scores}


def floor_scores(
    rows: EvaluationRows,
    adapter_answers: Sequence[str] | None,
    shuffled: Sequence[str],
    constant: str | None,
    *,
    shuffled_likelihood: Likelihood,
    encoder: Encoder | None = None,
) -> dict[str, Scores]:
    """Column → scores by name (n,), of the floors.

    Args:
        adapter_answers: None when nothing was generated; there is then the floor of the likelihood alone.
        shuffled: for each row the reference of another question.
        constant: a training answer.
    """
    floors: dict[str, Scores] = {SHUFFLED: {"nll": shuffled_likelihood.per_token()}}
    if adapter_answers is None or constant is None:
        return floors
    of_others = text_scores(adapter_answers, shuffled, encoder=encoder)
    floors[SHUFFLED] |= {name: values for name, values in of_others.items() if name in _BY_REFERENCE}
    floors[CONSTANT] = row_scores(rows, [constant] * len(rows), encoder=encoder)
    own = row_scores(rows, rows.references)
    floors[REFERENCE] = {name: values for name, values in own.items() if name not in _NOT_OF_REFERENCES}
    return floors


def strangers(rows: EvaluationRows, seed: int) -> list[str]:
    """For each row the reference of another question (n,), of the same severity where that can be.

    References of critical cases differ from others in wording and length, which any model would tell apart.
    """
    found = shuffled_references(rows.groups, seed)
    for stratum in np.unique(rows.strata):
        part = np.flatnonzero(rows.strata == stratum)
        sizes = np.unique(rows.groups[part], return_counts=True)[1]
        if 2 * sizes.max() <= len(part):
            found[part] = part[shuffled_references(rows.groups[part], seed)]
    return [rows.references[at] for at in found]


def strata_of(rows: EvaluationRows) -> dict[str, np.ndarray]:
    """Stratum → which rows (n,) belong to it, critical first and all last; a stratum without rows is left out."""
    parts = {name: rows.strata == SEVERITIES.index(name) for name in reversed(SEVERITIES)}
    return {name: part for name, part in parts.items() if part.any()} | {ALL: np.ones(len(rows), dtype=bool)}


def in_order(scores: Mapping[str, Scores]) -> list[str]:
    """The scores that a column has, in the order of `METRICS`, and after them those of a user's own rubric."""
    there = {name: None for by_name in scores.values() for name in by_name}
    return [*(name for name in METRICS if name in there), *(name for name in there if name not in METRICS)]


def summarise(
    rows: EvaluationRows,
    scores: Mapping[str, Scores],
    recipe: Recipe,
    *,
    tokens: Mapping[str, np.ndarray],
    metrics: Mapping[str, Metric] = METRICS,
) -> dict[str, Any]:
    """Stratum → rows, questions and, per score and column, the mean with its interval clustered by question.

    Under "difference" stands how much higher the adapter scores than the base model on the same rows; its p is
    corrected for the strata of the score.

    Args:
        scores: column → score → (n,).
        tokens: column → (n,) of what was scored: NLL is a mean over tokens, as the loss of the training is.
        metrics: score → its meaning.
    """
    asked = recipe.evaluation
    settings: dict[str, Any] = {
        "confidence": asked.confidence_level,
        "resamples": asked.n_resamples,
        "seed": asked.seed,
    }
    found: dict[str, Any] = {}
    differences: dict[str, dict[str, Difference]] = {}
    for stratum, part in strata_of(rows).items():
        by_metric: dict[str, dict[str, Any]] = {}
        for metric in in_order(scores):
            kind = {**settings, "share": metrics[metric].yes_no}
            mass = {column: of[part] if metric == "nll" else None for column, of in tokens.items()}
            for column, by_name in scores.items():
                if metric in by_name:
                    values = by_name[metric][part]
                    estimate = interval(values, rows.groups[part], weights=mass.get(column), **kind)
                    by_metric.setdefault(metric, {})[column] = estimate_dict(estimate)
            if metric in HEADLINE and all(metric in scores.get(arm, {}) for arm in (ADAPTER, BASE)):
                first, second = (scores[arm][metric][part] for arm in (ADAPTER, BASE))
                differences.setdefault(metric, {})[stratum] = paired_difference(
                    first, second, rows.groups[part], weights=mass[ADAPTER], **kind
                )
        found[stratum] = {
            "rows": int(part.sum()),
            "questions": len(np.unique(rows.groups[part])),
            "metrics": by_metric,
        }
    for metric, by_stratum in differences.items():
        for stratum, one in compare_family(by_stratum, metrics[metric].direction).items():
            found[stratum]["metrics"][metric]["difference"] = one.as_dict()
    return found


def remarks(rows: EvaluationRows) -> list[str]:
    """What a reader has to know about the rows before believing a figure."""
    said = []
    if (rows.strata < 0).all():
        said.append("The data has no severities, so that nothing can be said about critical cases.")
    else:
        for name in reversed(SEVERITIES):
            questions = len(np.unique(rows.groups[rows.strata == SEVERITIES.index(name)]))
            if questions < FEW_QUESTIONS:
                shown = name.replace("_", "-")
                said.append(
                    f"Only {questions} {shown} question{'s' if questions != 1 else ''} to evaluate on: too few to say "
                    "anything; keep more with data.test_size."
                    if questions
                    else f"No {shown} question to evaluate on."
                )
    if rows.leaks:
        said.append(
            f"{rows.leaks:,} questions stand in two of the splits that the data gives; they flatter the scores."
        )
    return said
