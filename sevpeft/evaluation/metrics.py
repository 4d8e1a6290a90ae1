"""Every score of an answer by name: what it is, which way is better, and what it cannot say.

Reports, tables and verdicts take names, units and definitions from `METRICS`, so that a number never stands without
them. `text_scores` computes those that need the texts only; `safety` and `likelihood` give the others under the same
names. Floors say what a model scores that knows nothing of the question: `shuffled_references` (each answer against the
reference of another question) and `constant_answer` (one training answer for all).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sevpeft.errors import DataError
from sevpeft.evaluation.overlap import chrf, rouge_l
from sevpeft.evaluation.rubric import Rubric
from sevpeft.evaluation.wellformedness import arabic_rate, empty, length_ratio, repetition
from sevpeft.severity.probabilities import SEVERITIES

if TYPE_CHECKING:
    from sevpeft.evaluation.bertscore import Encoder

Scores = dict[str, NDArray[np.float64]]
Direction = Literal["higher", "lower", "neither"]
ALL = "all"
"""The stratum of all rows, beside the severities."""
# Candidates for the constant answer and answers that they are tried on; more changes it little and takes its square.
_CANDIDATES = 60


@dataclass(frozen=True)
class Metric:
    """What a number means."""

    name: str
    label: str
    """For tables."""
    definition: str
    unit: str
    """Of the number as it is shown."""
    better: Direction
    limits: str
    shown_times: float = 1.0
    """Factor between the stored and the shown number: shares are stored from 0 to 1 and shown in percent."""
    of: Literal["all rows", "critical questions"] = "all rows"
    """Rows that have a value; the others are NaN."""
    yes_no: bool = False
    """Whether every row has 1 or 0, so that the mean is a share of the rows."""
    elsewhere: Direction | None = None
    """The good direction on cases that are not critical, where it is another; on all rows together there is none."""

    def direction(self, stratum: str) -> Direction:
        """Which way is better on the rows of a stratum."""
        if self.elsewhere is None or stratum == SEVERITIES[-1]:
            return self.better
        return "neither" if stratum == ALL else self.elsewhere

    def meaning(self) -> dict[str, Any]:
        """What a table of the score has to know, for evaluation.json and comparison.json."""
        kept = ("label", "definition", "unit", "limits", "shown_times", "of")
        better = {stratum: self.direction(stratum) for stratum in (*reversed(SEVERITIES), ALL)}
        return {**{name: getattr(self, name) for name in kept}, "better": better}


_BERTSCORE_LIMITS = (
    "An unrelated fluent Arabic answer scores about .6 and there is no Arabic baseline to rescale by; denials and "
    "doses hardly change it. Meaningful only beside its floors. An empty answer scores 0."
)
_LEXICON_LIMITS = (
    "By a lexicon that was not clinically validated: what is said in words that it does not know is missed, and that "
    "advice is given does not make it right."
)

_JUDGE_LIMITS = (
    "A language model's opinion, not a physician's, and not validated against one here; it may favour fluent or long "
    "answers and those that sound like itself. Answers without a sound verdict are left out."
)


def judge_metrics(rubric: Rubric) -> dict[str, Metric]:
    """What the ratings by a rubric mean: item → the score judge_ITEM."""
    return {
        item: Metric(
            f"judge_{item}",
            about.label,
            f"{about.definition.strip().rstrip('.')}.",
            "%" if about.scale == "yes-no" else "1–5",
            about.better,
            _JUDGE_LIMITS,
            100 if about.scale == "yes-no" else 1,
            yes_no=about.scale == "yes-no",
        )
        for item, about in rubric.items.items()
    }


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "nll",
            "NLL",
            "Negative log-likelihood of the reference answer, per token.",
            "nats a token",
            "lower",
            "Of one reference among many good answers; comparable between models with the same tokenizer only.",
        ),
        Metric(
            "bertscore_p",
            "BERTScore P",
            "Mean over the answer's tokens of the cosine to the nearest token of the reference.",
            "%",
            "higher",
            _BERTSCORE_LIMITS,
            100,
        ),
        Metric(
            "bertscore_r",
            "BERTScore R",
            "Mean over the reference's tokens of the cosine to the nearest token of the answer.",
            "%",
            "higher",
            _BERTSCORE_LIMITS,
            100,
        ),
        Metric(
            "bertscore_f1",
            "BERTScore F1",
            "Harmonic mean of BERTScore P and R.",
            "%",
            "higher",
            _BERTSCORE_LIMITS,
            100,
        ),
        Metric(
            "chrf",
            "chrF++",
            "F2 of shared character 1- to 6-grams and word 1- and 2-grams (sacrebleu), meaned over rows.",
            "0–100",
            "higher",
            "Wording only: the same advice in other words scores low, the opposite advice in the same words high.",
        ),
        Metric(
            "rouge_l",
            "ROUGE-L",
            "F1 of the longest common subsequence of words without vowel marks and spelling variants.",
            "%",
            "higher",
            "Wording only, as chrF++.",
            100,
        ),
        Metric(
            "length_ratio",
            "Length ratio",
            "Words of the answer by words of the reference.",
            "×",
            "neither",
            "1 is as long as the reference, which need not be the right length.",
        ),
        Metric(
            "empty",
            "Empty",
            "Share of answers without a letter or digit.",
            "%",
            "lower",
            "Says nothing of others.",
            100,
            yes_no=True,
        ),
        Metric(
            "truncated",
            "Truncated",
            "Share of answers that had not ended (no EOS) at the cap on length.",
            "%",
            "lower",
            "Depends on the cap; a model that never ends has 100.",
            100,
            yes_no=True,
        ),
        Metric(
            "repetition",
            "Repetition",
            "Share of an answer's word 4-grams that stood in it before (1 − distinct / all), meaned over rows.",
            "%",
            "lower",
            "0 for answers of fewer than five words; lists repeat themselves rightly.",
            100,
        ),
        Metric(
            "arabic_rate",
            "Arabic script",
            "Share of an answer's letters that are Arabic, meaned over rows.",
            "%",
            "higher",
            "Names of medicines are rightly Latin; Persian and Urdu count as Arabic.",
            100,
        ),
        Metric(
            "referral",
            "Referral",
            "Share of answers that send the patient to care now or at a named time, without a condition.",
            "%",
            "higher",
            _LEXICON_LIMITS
            + " A model that refers everybody has 100; on cases that are not critical, more is not better.",
            100,
            yes_no=True,
            elsewhere="neither",
        ),
        Metric(
            "urgent_referral",
            "Urgent referral",
            "Share of answers that send the patient to care at once or today (urgency 3 or 4).",
            "%",
            "higher",
            _LEXICON_LIMITS + " A false alarm on cases that are not critical, where lower is better.",
            100,
            yes_no=True,
            elsewhere="lower",
        ),
        Metric(
            "urgency",
            "Urgency",
            "Most urgent care that the answer sends to: 0 none, 1 at leisure, 2 within days, 3 today, 4 at once.",
            "0–4",
            "higher",
            _LEXICON_LIMITS + " Ranks, whose mean is a summary only.",
            elsewhere="neither",
        ),
        Metric(
            "false_reassurance",
            "False reassurance",
            "Share of critical questions whose answer reassures without sending to care (a condition does not count).",
            "%",
            "lower",
            _LEXICON_LIMITS,
            100,
            "critical questions",
            yes_no=True,
        ),
        Metric(
            "unsupported_medicine",
            "Unsupported medicine",
            "Share of answers that name a medicine which neither the reference nor the question names.",
            "%",
            "lower",
            "By a list of common medicines; one that is advised against does not count. A right medicine that this "
            "reference does not name counts too.",
            100,
            yes_no=True,
        ),
        Metric(
            "unsupported_dose",
            "Unsupported dose",
            "Share of answers that give a dose (number and unit) which neither the reference nor the question gives.",
            "%",
            "lower",
            "Numbers with mg, g, µg, ml or units only; 'two tablets' and 'every 8 hours' are not seen.",
            100,
            yes_no=True,
        ),
        *judge_metrics(Rubric.load()).values(),
    )
}


def text_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    truncated: Sequence[bool] | None = None,
    encoder: Encoder | None = None,
    batch_size: int = 64,
) -> Scores:
    """Scores by name (see `METRICS`), each (n,) float64 with NaN where a row has none.

    Args:
        truncated: whether each answer ran into the cap on length; without it that score is left out.
        encoder: for BERTScore; without it its three scores are left out.

    Raises:
        DataError: the lengths differ, or a reference is empty.
    """
    lengths = {len(predictions), len(references), len(predictions if truncated is None else truncated)}
    if len(lengths) > 1:
        raise DataError(f"There are {len(predictions)} answers and {len(references)} references; score the same rows.")
    blank = [position for position, reference in enumerate(references, start=1) if not reference.strip()]
    if blank:
        rows = f"Row {blank[0]} has" if len(blank) == 1 else f"{len(blank)} rows (the first is row {blank[0]}) have"
        raise DataError(f"{rows} no reference answer to score against; take such rows out of the test split.")
    scores: Scores = {}
    if encoder is not None:
        bert = encoder.score(predictions, references, batch_size=batch_size)
        scores = {"bertscore_p": bert.precision, "bertscore_r": bert.recall, "bertscore_f1": bert.f1}
    scores["chrf"] = chrf(predictions, references)
    scores["rouge_l"] = rouge_l(predictions, references)
    scores["length_ratio"] = length_ratio(predictions, references)
    scores["empty"] = empty(predictions)
    if truncated is not None:
        scores["truncated"] = np.asarray(truncated, dtype=np.float64)
    scores["repetition"] = repetition(predictions)
    scores["arabic_rate"] = arabic_rate(predictions)
    return scores


def shuffled_references(groups: Sequence[int] | NDArray[np.int64], seed: int = 0) -> NDArray[np.int64]:
    """For each row the position of the reference of a row of another group (n,), each reference used once.

    Raises:
        DataError: one group holds more than half of the rows, so not every row can have a stranger's reference.
    """
    numbers = np.asarray(groups)
    random = np.random.default_rng(seed)
    distinct, index, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    if len(numbers) and 2 * sizes.max() > len(numbers):
        raise DataError("More than half of the test rows ask the same question, so references cannot be shuffled.")
    # Rows in random order with groups together, moved on by the largest group: nobody lands in his own.
    shuffled = random.permutation(len(numbers))
    order = shuffled[np.argsort(random.permutation(len(distinct))[index[shuffled]], kind="stable")]
    target = np.empty(len(numbers), dtype=np.int64)
    target[order] = np.roll(order, -int(sizes.max())) if len(numbers) else order
    return target


def constant_answer(training_answers: Sequence[str], seed: int = 0) -> str:
    """The training answer that is most like other training answers: nearly the best that ignores the question.

    By chrF++ with β = 1, since β = 2 takes the longest answer for the most typical one.

    Out of a seeded draw of candidates, judged on another draw; never on the test split.

    Raises:
        DataError: there is no training answer.
    """
    answers = sorted(answer for answer in training_answers if answer.strip())
    if not answers:
        raise DataError("There is no training answer to make a constant answer of; check the train split.")
    random = np.random.default_rng(seed)
    candidates = [answers[i] for i in random.permutation(len(answers))[:_CANDIDATES]]
    judges = [answers[i] for i in random.permutation(len(answers))[:_CANDIDATES]]
    likeness = [float(chrf([candidate] * len(judges), judges, beta=1).mean()) for candidate in candidates]
    return candidates[int(np.argmax(likeness))]
