"""Questions of invented words whose severity shows in some of them, so that a right classifier finds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sevpeft.severity.classifier import evaluate
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.lexicon import COLUMNS
from sevpeft.severity.probabilities import SEVERITIES

WORDS = {
    0: ["شعر", "حبوب", "فيتامين", "بشره", "وزن"],
    1: ["حراره", "كحه", "التهاب", "مغص", "قيء"],
    2: ["نزيف", "اغماء", "تشنج", "جلطه", "اختناق"],
}
ADVICE = {0: ["كريم", "مرهم"], 1: ["مضاد", "تحليل"], 2: ["طوارئ", "اسعاف"]}
FILLERS = ["عندي", "منذ", "يومين", "اسبوع", "دكتور", "ارجو", "الرد", "ابني", "والدتي", "مع", "شديد", "خفيف"]


def build_examples(
    count: int = 240, *, seed: int = 0, noise: float = 0.2, shares: tuple[float, ...] = (0.4, 0.35, 0.25)
) -> Examples:
    """Every question is distinct, so that every group is one row."""
    random = np.random.default_rng(seed)
    labels = random.choice(3, count, p=shares)
    labels[:12] = np.arange(12) % 3
    questions = []
    for label in labels:
        shown = label if random.random() > noise else random.integers(3)
        words = [*random.choice(FILLERS, 5), *random.choice(WORDS[int(shown)], 2), f"رقم{random.integers(10**9)}"]
        questions.append(" ".join(random.permutation(words)))
    return Examples(questions, labels.astype(np.int64), np.arange(count), np.arange(1, count + 1))


def consultations(count: int = 180, seed: int = 0, noise: float = 0.6) -> Examples:
    """The question tells little, the answer all."""
    examples, random = build_examples(count, seed=seed, noise=noise), np.random.default_rng(seed)
    answers = [f"عليك {random.choice(ADVICE[int(k)])} ثم راجعنا رقم{random.integers(10**9)}" for k in examples.labels]
    return replace(examples, answers=answers, reads="both")


@pytest.fixture
def examples() -> Examples:
    return build_examples()


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of 20 draws, for tests that look at other things."""
    monkeypatch.setattr(evaluate, "RESAMPLES", 20)


@pytest.fixture
def lexicon(tmp_path: Path) -> Path:
    """A lexicon that knows every word whose severity shows."""
    rows = [f"{word}\t{SEVERITIES[k]}\tsign\t\tH\t" for k, words in WORDS.items() for word in words]
    path = tmp_path / "own.tsv"
    path.write_text("\n".join(["\t".join(COLUMNS), *rows]), encoding="utf-8")
    return path
