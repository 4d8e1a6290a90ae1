"""What the answers say helps to fit, is never asked for later, and is foretold without the row's own group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from sevpeft.severity.classifier.linear import fit_linear
from sevpeft.severity.classifier.privileged import RIDGE, foretold, side_values

from .conftest import build_examples


def test_values_are_foretold_as_by_fits_without_the_group() -> None:
    random = np.random.default_rng(0)
    rows = csr_matrix(random.random((30, 50)))
    column = [f"تخصص{number % 3}" for number in range(30)]
    groups = np.arange(30)
    groups[7] = groups[21] = groups[3]
    found = foretold(rows, {"specialty": column}, groups)
    assert found is not None
    values = side_values({"specialty": column})
    assert values is not None
    said = np.empty_like(values)
    for group in np.unique(groups):
        held = groups == group
        own = rows[~held].toarray()
        dual = np.linalg.solve(own @ own.T + RIDGE * np.eye(len(own)), values[~held])
        said[held] = rows[held].toarray() @ own.T @ dual
    scale = np.sqrt((said**2).sum(axis=1).mean())
    np.testing.assert_allclose(found[0], said / scale, rtol=1e-8, atol=1e-10)


def test_weights_foretell_other_rows() -> None:
    random = np.random.default_rng(1)
    rows = csr_matrix(random.random((40, 5)))
    column = ["قلب" if number else "جلد" for number in (rows[:, 0].toarray()[:, 0] > 0.5)]
    found = foretold(rows, {"specialty": column}, np.arange(40))
    assert found is not None
    other = np.array([[0.9, 0.5, 0.5, 0.5, 0.5], [0.1, 0.5, 0.5, 0.5, 0.5]])
    first, second = other @ found[1]
    # Categories stand in the order of their names: جلد, قلب.
    assert first[1] > second[1] and first[0] < second[0]


@pytest.mark.parametrize("column", [[""] * 20, ["قلب"] * 20])
def test_a_column_that_says_nothing_is_left_out(column: list[str]) -> None:
    rows = csr_matrix(np.random.default_rng(2).random((20, 5)))
    assert foretold(rows, {"specialty": column}, np.arange(20)) is None


def test_answers_that_tell_help_where_labels_are_noisy_and_are_not_asked_for_later() -> None:
    said, judged = build_examples(150, noise=0.0), build_examples(300, seed=8, noise=0.0)
    random = np.random.default_rng(4)
    advice = {0: "كريم مرطب", 1: "خافض حراره وسوائل", 2: "اذهب الى الطوارئ فورا"}
    answers = [f"{advice[int(label)]} {random.choice(['اليوم', 'غدا', 'دائما'])}" for label in said.labels]
    wrong = np.where(random.random(150) < 0.55, random.integers(0, 3, 150), said.labels)
    noisy = replace(said, labels=wrong)
    scores = {
        name: (fit_linear(e).probabilities(judged.questions).argmax(axis=1) == judged.labels).mean()
        for name, e in {"without": noisy, "with": replace(noisy, side={"answer": answers})}.items()
    }
    assert scores["with"] > scores["without"] + 0.03


def test_many_rows_are_drawn_from_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sevpeft.severity.classifier.privileged.MOST_ROWS", 60)
    examples = build_examples(120)
    column = ["قلب" if label == 2 else "جلد" for label in examples.labels]
    beside = replace(examples, side={"specialty": column})
    one, same, other = (fit_linear(beside, seed).version for seed in (1, 1, 2))
    assert one == same != other
