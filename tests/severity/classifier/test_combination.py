"""Rules and linear together: the better source gets the weight, and a useless one does no harm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sevpeft.errors import DataError
from sevpeft.severity.classifier.calibration import Calibrated, Temperature, fit_log_linear, log_linear
from sevpeft.severity.classifier.combination import WEIGHTS, CombinedClassifier, FitCombined
from sevpeft.severity.classifier.crossvalidation import fit_calibrated, grouped_folds
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.classifier.linear import fit_linear
from sevpeft.severity.classifier.storage import load_classifier, new_folder, write_classifier
from sevpeft.severity.lexicon import COLUMNS
from sevpeft.severity.rules import Rules

from .conftest import WORDS, build_examples

LEVELS = ("non_critical", "neutral", "critical")


@pytest.fixture
def lexicon(tmp_path: Path) -> Path:
    rows = [f"{word}\t{LEVELS[k]}\tsign\t\tH\t" for k, words in WORDS.items() for word in words]
    path = tmp_path / "own.tsv"
    path.write_text("\n".join(["\t".join(COLUMNS), *rows]), encoding="utf-8")
    return path


@pytest.fixture
def unrelated(tmp_path: Path) -> Path:
    path = tmp_path / "unrelated.tsv"
    path.write_text("\t".join(COLUMNS) + "\nدكتور\tcritical\tsign\t\tH\t\n", encoding="utf-8")
    return path


@pytest.fixture
def combined(lexicon: Path) -> CombinedClassifier:
    return FitCombined(Rules.load(lexicon))(build_examples(120))


def test_weights_that_were_planted_are_found() -> None:
    random = np.random.default_rng(0)
    sources = [random.dirichlet([1, 1, 1], 20_000) for _ in range(3)]
    planted, bias = (0.8, 0.0, 1.5), (0.0, 0.5, -0.7)
    right = log_linear(sources, planted, bias)
    labels = (random.random((20_000, 1)) > right.cumsum(axis=1)).sum(axis=1).clip(max=2)
    weights, found = fit_log_linear(sources, labels)
    np.testing.assert_allclose(weights, planted, atol=0.05)
    np.testing.assert_allclose(found, bias, atol=0.06)


def test_rules_that_know_get_weight_and_rules_that_do_not_get_none(lexicon: Path, unrelated: Path) -> None:
    examples = build_examples(240)
    useful, useless = (FitCombined(Rules.load(path))(examples).weights for path in (lexicon, unrelated))
    assert useful[0] > 0.3
    assert useless[0] < 0.2 and useless[1] > 0.5


def test_knowing_rules_help_where_rows_are_few(lexicon: Path) -> None:
    few, judged = build_examples(60), build_examples(300, seed=5)
    both = FitCombined(Rules.load(lexicon))(few)
    scores = [c.probabilities(judged.questions) for c in (both, both.linear)]
    right = [p[np.arange(300), judged.labels] for p in scores]
    assert np.log(right[0]).mean() > np.log(right[1]).mean() + 0.05


def test_the_linear_part_is_weighed_by_rows_it_did_not_see(lexicon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    from sevpeft.severity.classifier import combination

    fitted = combination.fit_linear

    def watched(examples: Examples, seed: int) -> object:
        asked.append(set(examples.questions))
        return fitted(examples, seed)

    monkeypatch.setattr(combination, "fit_linear", watched)
    examples = build_examples(100)
    FitCombined(Rules.load(lexicon))(examples)
    assert [len(rows) for rows in asked] == [80, 80, 80, 80, 80, 100]
    asked.clear()
    fit_calibrated(examples, FitCombined(Rules.load(lexicon)))
    assert [len(rows) for rows in asked] == [80, 80, 80, 80, 80, 100], "fitted again for its calibration"


def test_no_row_weighs_the_pool_that_calibrates_by_it(lexicon: Path) -> None:
    examples, rules = build_examples(100), Rules.load(lexicon)
    whole, unseen = FitCombined(rules).cross_fitted(examples)
    assert whole.version == FitCombined(rules)(examples).version
    folds = grouped_folds(examples)
    linear = np.empty((100, 3))
    for fold in folds:
        asked = [examples.questions[i] for i in fold.test]
        linear[fold.test] = fit_linear(examples.take(fold.train)).probabilities(asked)
    sources = [rules.probabilities(examples.questions), linear]
    for fold in folds:
        weights, bias = fit_log_linear([s[fold.train] for s in sources], examples.labels[fold.train])
        np.testing.assert_allclose(unseen[fold.test], log_linear([s[fold.test] for s in sources], weights, bias))


def test_the_evidence_is_that_of_the_rules(combined: CombinedClassifier) -> None:
    assert combined.evidence("عندي نزيف") == "critical: نزيف"


def test_saved_and_loaded_it_is_the_same(tmp_path: Path, lexicon: Path, combined: CombinedClassifier) -> None:
    calibrated = Calibrated(combined, Temperature(1.1))
    with new_folder(tmp_path / "both") as folder:
        write_classifier(calibrated, folder, training={}, lexicon=lexicon)
    loaded = load_classifier(tmp_path / "both")
    assert (loaded.kind, loaded.version) == ("rules+linear", calibrated.version)
    questions = build_examples(50, seed=3).questions
    np.testing.assert_allclose(loaded.probabilities(questions), calibrated.probabilities(questions), rtol=0, atol=1e-12)
    content = json.loads((tmp_path / "both" / WEIGHTS).read_text(encoding="utf-8"))
    assert content["weights"].keys() == {"rules", "linear"}


def test_a_lexicon_that_changed_meanwhile_is_refused(
    tmp_path: Path, lexicon: Path, combined: CombinedClassifier
) -> None:
    lexicon.write_text(lexicon.read_text(encoding="utf-8") + "\nدوخه\tneutral\tsign\t\tH\t", encoding="utf-8")
    with pytest.raises(DataError, match="changed while"), new_folder(tmp_path / "both") as folder:
        write_classifier(Calibrated(combined, Temperature()), folder, training={}, lexicon=lexicon)
    assert not (tmp_path / "both").exists()


def test_blocks_reach_the_linear_part_of_the_combination(lexicon: Path) -> None:
    examples = build_examples(120)
    names = np.where(np.arange(120) < 60, "one", "two")
    blocked = replace(examples, blocks=names)
    rules = Rules.load(lexicon)
    assert FitCombined(rules)(blocked).linear.version != FitCombined(rules)(examples).linear.version
