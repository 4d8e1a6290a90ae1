"""Scores of answers and likelihoods, row by row, for the arms and for the floors that stand beside them, and a table.

What each score means stands in metrics.yaml. A score means nothing alone: an unrelated fluent answer has a BERTScore of
.6, and a model that sends everybody to the emergency room has a referral rate of 1. So four other columns are computed
with the adapter's: the base model, the adapter's answers against the references of other questions, one training answer
for all questions, and, for what an answer says by itself, the doctors' own answers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from sevpeft.console import p_text
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError, ModelError
from sevpeft.evaluation.arms import ADAPTER, BASE
from sevpeft.evaluation.bertscore import Encoder
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.safety import safety_scores
from sevpeft.evaluation.statistics import (
    ARROWS,
    Difference,
    Direction,
    compare_family,
    estimate_dict,
    estimate_text,
    interval,
    paired_difference,
)
from sevpeft.recipe import EvaluationSection
from sevpeft.severity.probabilities import SEVERITIES

Scores = dict[str, NDArray[np.float64]]
"""Name of a score → (n,), NaN where a row has none."""
ALL = "all"
"""The stratum of all rows, beside the severities."""
CRITICAL = SEVERITIES[-1]
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
# Scores of which the adapter is compared with the base model row by row.
SAFETY = ("false_reassurance", "urgent_referral", "unsupported_medicine", "unsupported_dose", "judge_harm")
HEADLINE = ("nll", "bertscore_f1", "chrf", *SAFETY, "judge_urgency")
# Fewer questions than this, and an interval says little.
FEW_QUESTIONS = 10
# Candidates for the constant answer and answers that they are tried on; more changes it little and takes its square.
_CANDIDATES = 60
# Arabic, its supplements and presentation forms.
_ARABIC = ((0x0600, 0x06FF), (0x0750, 0x077F), (0x0870, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF))


@dataclass(frozen=True)
class Metric:
    """What a number means; the fields are explained in metrics.yaml."""

    name: str
    label: str
    definition: str
    unit: str
    better: Direction
    limits: str
    of: Literal["all rows", "critical questions"] = "all rows"
    yes_no: bool = False
    elsewhere: Direction | None = None

    @property
    def shown_times(self) -> int:
        """Factor between the stored and the shown number."""
        return 100 if self.unit == "%" else 1

    def direction(self, stratum: str) -> Direction:
        """Which way is better on the rows of a stratum."""
        if self.elsewhere is None or stratum == CRITICAL:
            return self.better
        return "neither" if stratum == ALL else self.elsewhere

    def meaning(self) -> dict[str, Any]:
        """What a table of the score has to know, for evaluation.json and comparison.json."""
        kept = ("label", "definition", "unit", "limits", "shown_times", "of")
        better = {stratum: self.direction(stratum) for stratum in (*reversed(SEVERITIES), ALL)}
        return {**{name: getattr(self, name) for name in kept}, "better": better}


def _read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8")))


def judge_metrics(items: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    """Scores judge_ITEM of the items of a rubric: item → {label, scale, better, definition}."""
    metrics = {}
    for item, about in items.items():
        name, yes_no = f"judge_{item}", about["scale"] == "yes-no"
        definition = f"{about['definition'].strip().rstrip('.')}."
        unit = "%" if yes_no else "1–5"
        metrics[name] = Metric(name, about["label"], definition, unit, about["better"], _JUDGED, yes_no=yes_no)
    return metrics


_TABLE = _read("metrics.yaml")
_JUDGED = _TABLE["limits"]["judge"]
METRICS: dict[str, Metric] = {
    **{name: Metric(name, **about) for name, about in _TABLE["metrics"].items()},
    **judge_metrics(_read("rubrics/answers.yaml")["items"]),
}


# Scores of rows


def load_encoder(asked: EvaluationSection) -> tuple[Encoder | None, str | None]:
    """The encoder of BERTScore, or None and why the score is left out.

    The default encoder may be absent on a machine without a connection, which costs one score. One that the recipe
    names was meant.

    Raises:
        ModelError: the encoder that the recipe names cannot be loaded or has no such layer.
    """
    if not asked.bertscore:
        return None, "BERTScore is left out, as evaluation.bertscore=false says."
    try:
        return Encoder(asked.bertscore_model, asked.bertscore_layer), None
    except ModelError as error:
        default = EvaluationSection()
        if (asked.bertscore_model, asked.bertscore_layer) != (default.bertscore_model, default.bertscore_layer):
            raise
        return None, f"BERTScore is left out: {error}"


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
    # The package's own tokenizer keeps a–z and digits only and would find every Arabic text empty.
    rouge = RougeScorer(["rougeL"], tokenizer=_FoldedWords())
    pairs = list(zip(answers, references, strict=True))
    words = [(_words(answer), _words(reference)) for answer, reference in pairs]
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


class _FoldedWords:
    """What rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


def _words(text: str) -> list[str]:
    return fold_for_matching(text).split()


def _repetition(words: list[str]) -> float:
    grams = list(zip(*(words[start:] for start in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _arabic_rate(text: str) -> float:
    letters = [ord(sign) for sign in text if unicodedata.category(sign).startswith("L")]
    arabic = sum(any(low <= letter <= high for low, high in _ARABIC) for letter in letters)
    return arabic / len(letters) if letters else float("nan")


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
    return scores | safety_scores(answers, references=rows.references, questions=rows.questions, critical=critical)


# Floors


def floor_scores(
    rows: EvaluationRows, answers: Sequence[str], shuffled: Sequence[str], constant: str, encoder: Encoder | None
) -> dict[str, Scores]:
    """Column → scores by name (n,), of the floors.

    Args:
        answers: of the adapter.
        shuffled: for each row the reference of another question.
        constant: a training answer.
    """
    of_others, own = text_scores(answers, shuffled, encoder=encoder), row_scores(rows, rows.references)
    return {
        SHUFFLED: {name: values for name, values in of_others.items() if name in _BY_REFERENCE},
        CONSTANT: row_scores(rows, [constant] * len(rows), encoder=encoder),
        REFERENCE: {name: values for name, values in own.items() if name not in _NOT_OF_REFERENCES},
    }


def other_references(rows: EvaluationRows, seed: int) -> list[str]:
    """For each row the reference of another question (n,), of the same severity where that can be.

    References of critical cases differ from others in wording and length, which any model would tell apart.

    Raises:
        DataError: one question is that of more than half of the rows.
    """
    found = shuffled_references(rows.groups, seed)
    for stratum in np.unique(rows.strata):
        part = np.flatnonzero(rows.strata == stratum)
        if 2 * np.unique(rows.groups[part], return_counts=True)[1].max() <= len(part):
            found[part] = part[shuffled_references(rows.groups[part], seed)]
    return [rows.references[at] for at in found]


def shuffled_references(groups: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """For each row the position of a row of another group (n,), each used once."""
    random = np.random.default_rng(seed)
    distinct, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if 2 * sizes.max() > len(groups):
        raise DataError(
            "More than half of the test rows ask the same question, so references cannot be shuffled; take duplicates "
            "out of the data, with `sevpeft prepare`."
        )
    # Rows in random order with groups together, moved on by the largest group: nobody lands in his own.
    shuffled = random.permutation(len(groups))
    order = shuffled[np.argsort(random.permutation(len(distinct))[index[shuffled]], kind="stable")]
    target = np.empty(len(groups), dtype=np.int64)
    target[order] = np.roll(order, -int(sizes.max()))
    return target


def constant_answer(training_answers: Sequence[str], seed: int = 0) -> str:
    """The training answer that is most like other training answers: nearly the best that ignores the question.

    Out of a seeded draw of candidates, compared with another draw, never with the test split. By chrF++ with β = 1,
    since β = 2 takes the longest answer for the most typical one.
    """
    answers, random = sorted(training_answers), np.random.default_rng(seed)
    candidates = [answers[i] for i in random.permutation(len(answers))[:_CANDIDATES]]
    others = [answers[i] for i in random.permutation(len(answers))[:_CANDIDATES]]
    likeness = [float(chrf([candidate] * len(others), others, beta=1).mean()) for candidate in candidates]
    return candidates[int(np.argmax(likeness))]


# Summary


def strata_of(rows: EvaluationRows) -> dict[str, np.ndarray]:
    """Stratum → which rows (n,) belong to it, critical first and all last; a stratum without rows is left out."""
    parts = {name: rows.strata == SEVERITIES.index(name) for name in reversed(SEVERITIES)}
    return {name: part for name, part in parts.items() if part.any()} | {ALL: np.ones(len(rows), dtype=bool)}


def in_order(scores: Mapping[str, Scores]) -> list[str]:
    """The scores that a column has, in the order of `METRICS`, and after them those of a user's own rubric."""
    there = {name: None for by_name in scores.values() for name in by_name}
    return [*(name for name in METRICS if name in there), *(name for name in there if name not in METRICS)]


def summarize(
    rows: EvaluationRows,
    scores: Mapping[str, Scores],
    asked: EvaluationSection,
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
    settings: dict[str, Any] = {
        "confidence": asked.confidence_level,
        "resamples": asked.n_resamples,
        "seed": asked.seed,
    }
    found: dict[str, Any] = {}
    differences: dict[str, dict[str, Difference]] = {}
    for stratum, part in strata_of(rows).items():
        groups = rows.groups[part]
        by_metric: dict[str, dict[str, Any]] = {}
        for metric in in_order(scores):
            kind = {**settings, "share": metrics[metric].yes_no}
            mass = {column: of[part] if metric == "nll" else None for column, of in tokens.items()}
            values = {column: by_name[metric][part] for column, by_name in scores.items() if metric in by_name}
            by_metric[metric] = {
                column: estimate_dict(interval(one, groups, weights=mass.get(column), **kind))
                for column, one in values.items()
            }
            if metric in HEADLINE and {ADAPTER, BASE} <= values.keys():
                differences.setdefault(metric, {})[stratum] = paired_difference(
                    values[ADAPTER], values[BASE], groups, weights=mass[ADAPTER], **kind
                )
        found[stratum] = {"rows": int(part.sum()), "questions": len(np.unique(groups)), "metrics": by_metric}
    for metric, by_stratum in differences.items():
        for stratum, difference in compare_family(by_stratum, metrics[metric].direction).items():
            found[stratum]["metrics"][metric]["difference"] = difference.as_dict()
    return found


def remarks(rows: EvaluationRows) -> list[str]:
    """What a reader has to know about the rows before believing a figure."""
    notes = []
    if (rows.strata < 0).all():
        notes.append("The data has no severities, so that nothing can be said about critical cases.")
    for name in () if notes else reversed(SEVERITIES):
        questions = len(np.unique(rows.groups[rows.strata == SEVERITIES.index(name)]))
        if questions < FEW_QUESTIONS:
            notes.append(
                f"Only {questions} {name.replace('_', '-')} question{'s' if questions != 1 else ''} to evaluate on: "
                "too few to say anything; keep more with data.test_size."
            )
    if rows.leaks:
        notes.append(f"{rows.leaks:,} questions stand in two splits of the data, which flatters the scores.")
    return notes


# Table

# Column of the table → its heading; the first two are measured, with intervals, the others are for orientation.
_MEASURED = {ADAPTER: "adapter", BASE: "base model"}
_FLOORS = {SHUFFLED: "shuf.", CONSTANT: "const.", REFERENCE: "doctor"}


def evaluation_tables(content: Mapping[str, Any]) -> Group:
    """The contents of evaluation.json in 80 columns: one table a stratum, what the columns mean, and the notes."""
    parts: list[RenderableType] = []
    for stratum, found in content["scores"].items():
        heading = f"{stratum.replace('_', '-')}: {found['rows']:,} rows, {found['questions']:,} questions"
        parts += [Text(), Text(heading, style="bold"), _table(content, stratum, found["metrics"])]
        differences = []
        for metric, by_column in found["metrics"].items():
            difference, about = by_column.get("difference"), content["metrics"][metric]
            if difference and difference["value"] is not None:
                size = estimate_text(difference, about, sign=True)
                unit = " points" if about["unit"] == "%" else ""
                p = p_text(difference["p"], difference["p_at_most"])
                differences.append(f"{about['label']} {size}{unit}, p {p} ({difference['outcome']})")
        if differences:
            parts.append(Text(f"adapter − base model: {'; '.join(differences)}", style="dim"))
    floors = [(heading, content["columns"][name]) for name, heading in _FLOORS.items() if name in content["columns"]]
    parts += [Text(), *(Text(f"{name}: {text}", style="dim") for name, text in (*content["methods"].items(), *floors))]
    return Group(*parts, *(Text(note, style="yellow") for note in content["notes"]))


def _table(content: Mapping[str, Any], stratum: str, scores: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("score", overflow="fold", max_width=19)
    columns = {name: heading for name, heading in (_MEASURED | _FLOORS).items() if name in content["columns"]}
    for name, heading in columns.items():
        table.add_column(heading, justify="right", no_wrap=True, style="dim" if name in _FLOORS else "")
    for metric, found in scores.items():
        if stratum not in (CRITICAL, ALL) and metric not in HEADLINE:
            continue
        about = content["metrics"][metric]
        label = f"{about['label']}{' %' if about['unit'] == '%' else ''} {ARROWS[about['better'][stratum]]}".strip()
        # For want of room three figures of nats too, and no intervals of floors.
        short, alone = {**about, "unit": ""}, {"low": None, "high": None}
        there = {name: found[name] | (alone if name in _FLOORS else {}) for name in columns if name in found}
        table.add_row(label, *(estimate_text(there[name], short) if name in there else "" for name in columns))
    return table
