"""A classifier that reads answers knows more, is never asked about a question alone, and teaches one that can be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from sevpeft.errors import DataError, SevpeftError, WeightError
from sevpeft.recipe import settings_from
from sevpeft.recipe.schema import SeveritySection
from sevpeft.severity.classifier import calibrate, evaluate
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration, fit_calibrated, fit_of
from sevpeft.severity.classifier.evaluate import evaluate_fitted, fit_and_evaluate, unlabeled_curve
from sevpeft.severity.classifier.examples import Examples, load_unlabeled
from sevpeft.severity.classifier.linear import ANSWER, LinearClassifier, fit_linear, fit_student, teacher_scores
from sevpeft.severity.classifier.store import ABOUT, load_classifier, write_classifier
from sevpeft.severity.probabilities import SEVERITIES, severity_probabilities
from sevpeft.severity.rules import Rules
from sevpeft.severity.settings import EvaluateSettings, FitSettings
from sevpeft.severity.source import classify_rows, load_source, prompt_severity, severity_of

from .conftest import consultations

SILENT = (None, "", "  ", "…", "؟؟!", "🙂")


@pytest.fixture(scope="module")
def both() -> Calibrated:
    rows = consultations()
    twin = Calibrated([fit_linear(replace(rows, reads="question"))], Calibration((1.2,)))
    return Calibrated([fit_linear(rows)], Calibration((1.1,)), "both", twin)


@pytest.fixture
def folder(tmp_path: Path, both: Calibrated) -> Path:
    (tmp_path / "made").mkdir()
    write_classifier(both, tmp_path / "made", {})
    return tmp_path / "made"


def table(rows: Examples, answers: list[str] | None = None) -> Dataset:
    return Dataset.from_dict({"question": rows.questions, "answer": answers or rows.answers, "row": rows.rows})


def test_question_and_answer_are_features_of_their_own(both: Calibrated) -> None:
    rows, linear = consultations(), both.sources[0]
    one, swapped = ("عندي كحه", "عليك طوارئ"), ("عليك طوارئ", "عندي كحه")
    assert linear.probabilities([one]).argmax() == 2
    assert abs(linear.probabilities([swapped])[0, 2] - linear.probabilities([one])[0, 2]) > 0.2
    assert any(word.startswith(ANSWER) for word in linear.vocabulary)
    for reads in ("question", "answer"):
        alone = fit_linear(replace(rows, reads=reads))
        assert not any(word.startswith(ANSWER) for word in alone.vocabulary)
    for block in linear.blocks:  # a long question leaves as much room for its answer as a short one
        lengths = np.sqrt(block.transform(["عندي كحه", "عندي كحه منذ يومين مع حراره"]).power(2).sum(axis=1))
        np.testing.assert_allclose(lengths, 1)


def test_a_question_without_an_answer_is_never_read_by_what_has_read_answers(both: Calibrated, folder: Path) -> None:
    rows = consultations(20, seed=3)
    assert rows.answers is not None
    for classifier in (both, load_classifier(folder), load_source(None, str(folder))):
        alone, whole = both.twin.probabilities(rows.questions), both.probabilities(rows.questions, rows.answers)
        assert np.abs(alone - whole).max(axis=1).min() > 1e-3
        np.testing.assert_array_equal(classifier.probabilities(rows.questions), alone)
        for silent in SILENT:
            answers = [silent if n % 3 else answer for n, answer in enumerate(rows.answers)]
            found = classifier.probabilities(rows.questions, answers)
            np.testing.assert_array_equal(found, np.where((np.arange(20) % 3 > 0)[:, None], alone, whole))
    # Without the twin, and below it, there is no way either.
    bare = Calibrated(both.sources, both.calibration, "both")
    for answers in (None, [*rows.answers[:-1], "…"]):
        with pytest.raises(WeightError, match="twin"):
            bare.probabilities(rows.questions, answers)
    with pytest.raises(ValueError, match="zip"):
        both.sources[0].probabilities(rows.questions)
    with pytest.raises(DataError, match="name the folder"):
        load_classifier(folder / "both")


def test_prompts_name_what_the_twin_says_though_every_row_has_its_answer(both: Calibrated, folder: Path) -> None:
    rows = consultations(60, seed=3)
    assert rows.answers is not None
    alone = both.twin.probabilities(rows.questions)
    named, origin = prompt_severity(table(rows), "predicted", str(folder))
    assert named == np.array(SEVERITIES)[alone.argmax(axis=1)].tolist()
    assert named != np.array(SEVERITIES)[both.probabilities(rows.questions, rows.answers).argmax(axis=1)].tolist()
    assert origin["version"] == both.twin.version
    assert load_source(None, str(folder), text="question").version == both.twin.version, "as chat loads it"


def test_weights_read_both_or_what_the_recipe_says(both: Calibrated, folder: Path) -> None:
    rows = consultations(40, seed=3)
    assert rows.answers is not None

    def found(text: Any = None, data: Dataset | None = None) -> np.ndarray:
        data = table(rows) if data is None else data
        how = SeveritySection(source="linear", classifier=str(folder), text=text)
        return severity_of(data, how).probabilities

    whole = both.probabilities(rows.questions, rows.answers)
    np.testing.assert_allclose(found(), whole, rtol=1e-12)
    np.testing.assert_allclose(found("both"), whole, rtol=1e-12)
    np.testing.assert_allclose(found("question"), both.twin.probabilities(rows.questions), rtol=1e-12)
    silent = table(rows, ["…", *rows.answers[1:]])
    np.testing.assert_allclose(found(None, silent)[0], both.twin.probabilities(rows.questions[:1])[0], rtol=1e-12)
    with pytest.raises(WeightError, match=r"Row 1: .*text=question"):
        found("both", silent)
    with pytest.raises(WeightError, match="text=answer"):
        found("answer")


def test_rules_read_what_they_are_told_to_and_the_question_unless_told() -> None:
    rows = Dataset.from_dict(
        {"question": ["عندي كحه", "عندي نزيف شديد"], "answer": ["هذا نزيف شديد", "…"], "row": [1, 2]}
    )
    rules = Rules()
    question, answer = rules.probabilities(rows["question"]), rules.probabilities(rows["answer"])
    np.testing.assert_array_equal(severity_of(rows, SeveritySection(source="rules")).probabilities, question)
    found = severity_probabilities(classify_rows(rows, load_source("rules", None, text="both")))
    assert found[0, 2] > question[0, 2] + 0.2
    np.testing.assert_allclose(found[1], question[1])
    found = severity_probabilities(classify_rows(rows.select([0]), load_source("rules", None, text="answer")))
    np.testing.assert_allclose(found, answer[:1], rtol=1e-6)


def test_a_folder_holds_both_and_what_an_older_version_wrote_reads_questions(both: Calibrated, folder: Path) -> None:
    rows, loaded = consultations(20, seed=3), load_classifier(folder)
    assert (loaded.version, loaded.twin.version, loaded.reads) == (both.version, both.twin.version, "both")
    np.testing.assert_array_equal(
        loaded.probabilities(rows.questions, rows.answers), both.probabilities(rows.questions, rows.answers)
    )
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    of_both = json.loads((folder / "both" / ABOUT).read_text(encoding="utf-8"))
    other = Calibrated(both.sources, Calibration((0.9,)), "both")
    described = {**of_both, "version": other.version, "calibration": {"weights": [0.9], "bias": [0, 0, 0]}}
    for damaged in ({**of_both, "reads": "answer"}, described):
        (folder / "both" / ABOUT).write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(DataError, match="fit it again"):
            load_classifier(folder)
    (folder / "both" / ABOUT).unlink()
    with pytest.raises(DataError):
        load_classifier(folder)
    older = {name: value for name, value in about.items() if name not in ("reads", "whole")}
    (folder / ABOUT).write_text(json.dumps(older), encoding="utf-8")
    assert (load_classifier(folder).version, load_classifier(folder).reads) == (both.twin.version, "question")
    with pytest.raises(WeightError, match="text=both"):
        load_source(None, str(folder), text="both")


def test_both_are_evaluated_on_the_same_rows_with_the_weights_that_they_give(few_resamples: None) -> None:
    classifier, evaluations = fit_and_evaluate(consultations(120), EvaluateSettings(folds=2))
    found = evaluations["Random folds"]
    whole, twin = found["calibrated"], found["twin"]["calibrated"]
    assert (found["reads"], classifier.reads, classifier.twin.reads) == ("both", "both", "question")
    assert whole["figures"]["auc_critical"]["value"] > 0.95 > 0.8 > twin["figures"]["auc_critical"]["value"]
    assert whole["rows"] == twin["rows"] == 120
    spread = [one["critical"]["mean"] - one["non_critical"]["mean"] for one in (whole["weights"], twin["weights"])]
    assert spread[0] > 2 * spread[1] > 0
    assert sum(one["rows"] for one in whole["weights"].values()) == 120
    assert all(0 < one["effective"] <= one["rows"] for one in whole["weights"].values())
    means, shares = zip(*whole["curve"], strict=True)
    assert sorted(means) == list(means) and shares[-1] > 0.8 and shares[0] == 0
    again = evaluate_fitted(classifier, consultations(90, seed=5))
    assert again["calibrated"]["figures"]["auc_critical"]["value"] > 0.95
    assert again["twin"]["calibrated"]["figures"]["auc_critical"]["value"] < 0.85


def test_weights_by_label_are_the_sum_done_by_hand() -> None:
    probabilities, labels = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0, 0.5]]), np.array([0, 2, 2, 2])
    found = evaluate.score(probabilities, labels, np.arange(4), resamples=0)["weights"]
    assert found["non_critical"] == {"rows": 1, "mean": 0.5, "effective": 1.0} and "neutral" not in found
    assert found["critical"]["mean"] == pytest.approx(3.5 / 3)
    assert found["critical"]["effective"] == pytest.approx(3.5**2 / (1 + 1.5**2 + 1))


def test_a_teacher_that_reads_answers_makes_a_better_student_of_the_question() -> None:
    rows, unlabeled, asked = consultations(90), consultations(240, seed=1), consultations(300, seed=2)

    def auc(reads: Any, taught_by: Examples | None = None) -> float:
        (linear,) = fit_of(FitSettings(), unlabeled=taught_by)(replace(rows, reads=reads))
        found = linear.probabilities(replace(asked, reads=reads).passages)
        return evaluate.score(found, asked.labels, asked.groups, resamples=0)["figures"]["auc_critical"]["value"]

    taught = auc("question", unlabeled)
    assert taught > auc("question") + 0.02
    blind = replace(unlabeled, answers=np.random.default_rng(0).permutation(unlabeled.answers).tolist())
    assert auc("question", blind) < taught - 0.02, "it is the answers that teach"
    assert auc("both", unlabeled) > 0.95, "what reads both still reads the answer"


def test_no_fold_is_scored_by_what_was_taught_on_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, unlabeled, seen = consultations(90), consultations(40, seed=1), []

    def watched(examples: Examples, unlabeled: Examples) -> Any:
        seen.append(examples.questions)
        return np.eye(3)[examples.labels], np.random.default_rng(0).normal(size=(len(unlabeled), 3))

    for module in (calibrate, evaluate):
        monkeypatch.setattr(module, "teacher_scores", watched)
    found = unlabeled_curve(rows, unlabeled, 0, lambda message: None)
    assert [one["unlabeled"] for one in found] == [0, 10, 20, 40] and all(0 < one["value"] < 1 for one in found)
    assert len(seen) == 5 and all(len(of_fold) == pytest.approx(72, abs=3) for of_fold in seen)
    seen.clear()
    fit_calibrated(replace(rows, reads="question"), fit_of(FitSettings(), unlabeled=unlabeled), FitSettings())
    assert [len(of_fold) < 90 for of_fold in seen] == [True] * 5 + [False]
    assert {question for of_fold in seen[:5] for question in of_fold} == set(rows.questions)


def test_the_teacher_scores_labeled_rows_out_of_fold_and_the_student_learns_from_them_and_the_labels() -> None:
    rows, unlabeled = consultations(90), consultations(60, seed=1)
    own, theirs = teacher_scores(rows, unlabeled)
    np.testing.assert_array_equal(theirs, fit_linear(rows).logits(unlabeled.passages))
    assert np.abs(own - fit_linear(rows).logits(rows.passages)).max() > 0.1
    taught = fit_student(rows, unlabeled, (own, theirs))
    flipped = replace(rows, labels=(rows.labels + 1) % 3)
    assert taught.version != fit_student(flipped, unlabeled, (own, theirs)).version
    one_block = replace(flipped, blocks=np.where(rows.labels == 2, "ward", "forum"))  # each lacks a severity
    assert one_block.complete.all(), "and all count where none is complete"


def test_a_classifier_of_both_adds_what_the_student_says_at_the_spread_that_it_has_itself() -> None:
    rows, unlabeled = consultations(60), consultations(40, seed=1)
    student = fit_student(rows, unlabeled, teacher_scores(rows, unlabeled))
    opposite = LinearClassifier(student.vocabulary, student.idf, -student.coef, -student.intercept)
    with_it, against = (fit_linear(rows, one, unlabeled).logits(unlabeled.passages) for one in (student, opposite))
    said = student.logits(unlabeled.questions)
    own = (with_it + against) / 2  # what stands there without the student
    np.testing.assert_allclose((with_it - against) / 2, said * own.std() / said.std(), rtol=1e-6)


def test_unlabeled_rows_repeat_no_labeled_question_nor_each_other_and_have_an_answer(tmp_path: Path) -> None:
    labeled = consultations(30)
    new = "طفلي عمره سنتان يعاني من حكة شديدة في الجلد منذ شهرين ولا ينام الليل"
    rows = [
        {"question": labeled.questions[0], "answer": "نفس السؤال"},
        {"question": f"{labeled.questions[1]} !", "answer": "نفس السؤال"},
        {"question": new, "answer": "مرهم"},
        {"question": f"{new} ابدا", "answer": "مرهم"},
        {"question": "سؤال اخر عن دواء الضغط", "answer": "…"},
        {"question": "متى موعد تطعيم الشهر الرابع", "answer": "غدا"},
    ]
    path = tmp_path / "forum.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    settings = settings_from(FitSettings, [f"unlabeled={path}"])
    (read,), found = load_unlabeled(settings, labeled)
    assert found is not None and len(read.rows) == 6
    assert sorted(found.questions) == sorted([new, rows[5]["question"]]) and found.reads == "both"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows[:2]), encoding="utf-8")
    with pytest.raises(DataError, match="unlabeled="):
        load_unlabeled(settings, labeled)
    assert load_unlabeled(FitSettings(), labeled) == ([], None)


def test_what_would_read_answers_in_secret_is_refused(tmp_path: Path) -> None:
    rows, wrong = consultations(30), []
    assert rows.answers is not None
    leaky = [{"question": f"{q}\n{a}", "answer": a} for q, a in zip(rows.questions, rows.answers, strict=True)]
    path = tmp_path / "leaky.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in leaky), encoding="utf-8")
    for words, remedy in (
        ([f"unlabeled={path}"], "data.question_column"),
        ([f"unlabeled={path}", "text=question"], "text=both"),
        ([f"unlabeled={path}", "text=answer"], "text=both"),
        ([f"unlabeled={path}", "kind=rules"], "kind=linear"),
    ):
        try:
            load_unlabeled(settings_from(FitSettings, words), rows)
            wrong.append(words)
        except SevpeftError as error:
            if remedy not in str(error) or any(answer in str(error) for answer in rows.answers):
                wrong.append(words)
    assert wrong == []
