"""Questions of invented words whose severity shows in some of them, so that a right classifier finds it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sevpeft.severity.classifier.examples import Examples

WORDS = {
    0: ["شعر", "حبوب", "فيتامين", "بشره", "وزن"],
    1: ["حراره", "كحه", "التهاب", "مغص", "قيء"],
    2: ["نزيف", "اغماء", "تشنج", "جلطه", "اختناق"],
}
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
        said = label if random.random() > noise else random.integers(3)
        words = [*random.choice(FILLERS, 5), *random.choice(WORDS[int(said)], 2), f"رقم{random.integers(10**9)}"]
        questions.append(" ".join(random.permutation(words)))
    return Examples(questions, labels.astype(np.int64), np.arange(count), np.arange(1, count + 1))


@pytest.fixture
def examples() -> Examples:
    return build_examples()


@pytest.fixture
def blocks() -> Callable[[Examples, int], Examples]:
    """Deals examples into blocks of equal size, in the order of the rows."""

    def deal(examples: Examples, count: int) -> Examples:
        names = np.array([f"block{number * count // len(examples)}" for number in range(len(examples))])
        return Examples(examples.questions, examples.labels, examples.groups, examples.rows, names)

    return deal
