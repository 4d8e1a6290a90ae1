"""An evaluation says what the answers are worth beside floors, on rows that the training never saw, each done once."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sevpeft.data.prepare import PrepareSettings
from sevpeft.data.prepare.prepare import prepare
from sevpeft.data.read import load_consultations
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import Interrupted, ModelError, RunError, UsageError
from sevpeft.evaluation import bertscore
from sevpeft.evaluation import evaluate as module
from sevpeft.evaluation.evaluate import RowFile, evaluate
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.safety import rules
from sevpeft.evaluation.scores import METRICS
from sevpeft.evaluation.statistics import estimate_text
from sevpeft.evaluation.tables import evaluation_tables
from sevpeft.recipe import Recipe, load_recipe, recipe_from_values
from sevpeft.runs import Run
from sevpeft.training.checkpoints import run_lock
from sevpeft.training.data import load_splits
from tests.evaluation.conftest import QUICKSTART

ROWS = 11  # of the run's test split


def rows_of(recipe: Recipe) -> EvaluationRows:
    return module.test_rows(*load_splits(recipe))


def lines(run: Run, name: str = "predictions.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids whose answers were generated, and ids whose likelihood was computed, as they come."""
    seen: list[str] = []
    generate, nll = module.generate, module.reference_nll

    def counting(*given: Any, **more: Any) -> Any:
        for batch in generate(*given, **more):
            seen.extend(f"answer {one['id']}" for one in batch)
            seen.extend(f"nll {one['id']}" for one in batch for _ in one["nll"])
            yield batch

    def counting_nll(model: Any, prompt: Any, rows: Any, **rest: Any) -> Any:
        seen.extend(f"nll {identity}" for identity in rows.ids)
        return nll(model, prompt, rows, **rest)

    monkeypatch.setattr(module, "generate", counting)
    monkeypatch.setattr(module, "reference_nll", counting_nll)
    return seen


def test_every_row_is_answered_by_both_arms_and_scored_beside_floors(run: Run) -> None:
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    content = evaluate(run)
    rows = rows_of(load_recipe(run.folder / "recipe.yaml"))
    assert {(row["arm"], row["id"]) for row in lines(run)} == {
        (arm, i) for arm in ("adapter", "base") for i in rows.ids
    }
    one = lines(run)[0]
    at = rows.ids.index(one["id"])
    assert (one["question"], one["reference"], one["group"]) == (
        rows.questions[at],
        rows.references[at],
        rows.groups[at],
    )
    assert one["severity"] == one["id"].split("-")[-2]
    assert list(content["scores"]) == ["critical", "all", "neutral", "non_critical"]
    scores = content["scores"]["all"]["metrics"]
    not_here = ("bertscore", "judge", "minimized", "preferred")
    assert set(scores) == {name for name in METRICS if not name.startswith(not_here)}
    for name in ("chrf", "rouge_l"):
        assert set(scores[name]) >= {"adapter", "base", "shuffled", "constant"}
        low, value, high = (scores[name]["adapter"][part] for part in ("low", "value", "high"))
        assert (low is high is None and value == 0) or low <= value <= high  # without an interval where all are equal
    assert list(scores["nll"]) == ["adapter", "base", "shuffled"] and set(scores["nll"]["adapter"]["against"]) == {
        "base"
    }
    assert "reference" in scores["referral"] and "reference" not in scores["unsupported_dose"]
    assert any("no better than with shuffled questions" in note for note in content["notes"]), "after three steps"
    by_row = {(row["column"], row["id"]): row for row in lines(run, "scores.jsonl")}
    likelihoods = {(row["arm"], row["id"]): row for row in lines(run, "likelihood.jsonl")}
    tokens = [likelihoods["adapter", identity]["tokens"] for identity in rows.ids]
    nll = [by_row["adapter", identity]["nll"] for identity in rows.ids]
    assert scores["nll"]["adapter"]["value"] == pytest.approx(np.average(nll, weights=tokens))
    assert scores["chrf"]["base"]["value"] == pytest.approx(np.mean([by_row["base", i]["chrf"] for i in rows.ids]))
    # Nothing else of the run is touched.
    assert {path: path.read_bytes() for path in before} == before
    there = {path.name for path in before} | {"adapter", "checkpoints", "tokenizer"}
    new = {path.name for path in run.folder.iterdir()} - there
    assert new == {"predictions.jsonl", "predictions.about.json", "likelihood.jsonl", "likelihood.about.json"} | {
        "evaluation.json",
        "scores.jsonl",
    }
    stored = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(content))


def test_a_finished_evaluation_is_not_computed_again_and_a_sample_is_gone_on_from(run: Run, counted: list[str]) -> None:
    evaluate(run, limit=4)
    assert len(counted) == 2 * 4 + 3 * 4
    whole = evaluate(run)
    assert len(counted) == 5 * ROWS
    for name in ("predictions.jsonl", "likelihood.jsonl"):  # nor does the order of the lines matter
        path = run.folder / name
        path.write_text("".join(reversed(path.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")
    assert evaluate(run) == whole
    assert len(counted) == 5 * ROWS


def test_a_sample_does_not_replace_a_whole_evaluation_nor_likelihoods_alone_one_with_answers(run: Run) -> None:
    whole = evaluate(run)
    for less in ({"limit": 5}, {"answers": False}):
        assert "evaluation.json" in evaluate(run, **less)["notes"][-1], less
    assert json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8")) == json.loads(json.dumps(whole))


def test_likelihoods_alone_need_no_answers(run: Run, counted: list[str]) -> None:
    content = evaluate(run, answers=False, arms=["adapter"])
    assert set(content["metrics"]) == {"nll"} and not (run.folder / "predictions.jsonl").exists()
    assert not any(one.startswith("answer") for one in counted) and set(content["columns"]) == {"adapter", "shuffled"}


def test_likelihoods_measured_with_the_answers_are_those_alone_and_outlive_a_kill(
    run: Run, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored() -> dict[tuple[str, str], tuple[float, int]]:
        return {(one["arm"], one["id"]): (one["nll"], one["tokens"]) for one in lines(run, "likelihood.jsonl")}

    evaluate(run, answers=False)
    alone, path = stored(), run.folder / "likelihood.jsonl"
    assert len(alone) == 3 * ROWS
    path.unlink()
    read, measure = list[str](), module.reference_nll
    with monkeypatch.context() as patch:
        patch.setattr(module, "reference_nll", lambda *of, **more: read.extend(of[2].ids) or measure(*of, **more))
        evaluate(run)
    assert len(read) < ROWS  # those that training shortens
    assert stored() == {key: (pytest.approx(nll, rel=1e-5), tokens) for key, (nll, tokens) in alone.items()}
    # Killed after the likelihoods of the last batch, before its answers; and with some likelihoods lost.
    answers = lines(run)
    predictions = [one for one in answers if one["arm"] == "base" or one["id"] != answers[-1]["id"]]
    (run.folder / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in predictions))
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[2:]), encoding="utf-8")
    counted.clear()
    evaluate(run)
    assert len([one for one in counted if one.startswith("answer")]) == 1 and stored().keys() == alone.keys()
    assert len([one for one in counted if one.startswith("nll")]) <= 3


def test_minimization_asks_critical_questions_again_and_only_once(run: Run, counted: list[str]) -> None:
    how: dict[str, Any] = {"overrides": ["evaluation.minimization=true"], "floors": False}
    evaluate(run, **how)
    again, rows = lines(run, "minimized.jsonl"), {row["id"]: row for row in lines(run)}
    critical = sorted(identity for identity, row in rows.items() if row["severity"] == "critical")
    answered = sorted(one for one in counted if one.startswith("answer"))
    assert len(critical) >= 2 and answered == sorted(f"answer {one}" for one in [*rows, *critical] * 2)
    assert {(row["arm"], row["id"]) for row in again} == {(arm, one) for arm in ("adapter", "base") for one in critical}
    for row in again:
        asked = rows[row["id"]]["question"]
        assert row["question"].startswith(asked) and len(row["question"]) > len(asked) + 10
    assert (run.folder / "minimized.jsonl").stat().st_mode & 0o777 == 0o600
    # Answers as they would be of a model that lets itself be talked down, and of one that does not; and a kill.
    urgent = "توجه إلى الطوارئ الآن"
    for name, adapter in (("predictions.jsonl", urgent), ("minimized.jsonl", "راجع الطبيب خلال يومين")):
        told = [{**row, "prediction": adapter if row["arm"] == "adapter" else urgent} for row in lines(run, name)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told)
        cut = text.rindex("{") + 20 if name == "minimized.jsonl" else None
        (run.folder / name).write_text(text[:cut], encoding="utf-8")
    lost = f"answer {told[-1]['id']}"
    counted.clear()
    content = evaluate(run, **how)
    assert counted == [lost]
    for stratum in ("critical", "all"):
        found = content["scores"][stratum]["metrics"]
        for name, moved in (("minimized_change", -2), ("minimized_less_urgent", 1)):
            values = {arm: of["value"] for arm, of in found[name].items()}
            assert values["base"] == 0 and found[name]["adapter"]["rows"] == len(critical)
            # The answer that was made again says nothing, which is four levels less.
            share = 1 / len(critical) if name == "minimized_change" else 0
            assert values["adapter"] == pytest.approx(moved - 2 * share)
            assert found[name]["adapter"]["against"]["base"]["value"] == pytest.approx(values["adapter"])
    assert "minimized_change" not in content["scores"]["neutral"]["metrics"]


def test_a_kill_loses_at_most_one_batch(run: Run, counted: list[str]) -> None:
    def evaluate_slowly() -> None:
        append = module.RowFile.append

        def slowly(self: Any, rows: Any) -> None:
            append(self, rows)
            if self.path.name == "predictions.jsonl":
                time.sleep(0.3)

        module.RowFile.append = slowly  # type: ignore[method-assign]
        evaluate(run)

    child = multiprocessing.get_context("fork").Process(target=evaluate_slowly)
    child.start()
    predictions = run.folder / "predictions.jsonl"
    while not predictions.exists() or len(lines(run)) < 8:
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert len(lines(run)) == 8  # two batches of four
    measured = len(lines(run, "likelihood.jsonl"))
    content = evaluate(run)
    answered = [one for one in counted if one.startswith("answer")]
    assert len(answered) == 2 * ROWS - 8 and 0 < measured == 3 * ROWS - (len(counted) - len(answered))
    predictions.unlink()
    (run.folder / "evaluation.json").unlink()
    assert evaluate(run) == content


def test_a_file_without_rows_takes_the_origin_of_its_next_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RowFile(path, {"seed": 1}).append([{"arm": "base", "id": "1"}])
    path.write_bytes(b"")  # as after a disk that was full at the first row
    RowFile(path, {"seed": 2}).append([{"arm": "base", "id": "1"}])
    assert RowFile(path, {"seed": 2}).lines
    with pytest.raises(RunError, match="seed"):
        RowFile(path, {"seed": 1})


def test_ctrl_c_keeps_what_is_done_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    append = module.RowFile.append

    def interrupted(self: Any, rows: Any) -> None:
        append(self, rows)
        if self.path.name == "predictions.jsonl":
            raise KeyboardInterrupt

    monkeypatch.setattr(module.RowFile, "append", interrupted)
    with pytest.raises(Interrupted):
        evaluate(run)
    assert len(lines(run)) == 4


def test_two_evaluations_of_one_run_do_not_mix(run: Run) -> None:
    with run_lock(run.folder), pytest.raises(RunError, match="another process; wait"):
        evaluate(run)
    assert not (run.folder / "likelihood.jsonl").exists()


def test_predictions_of_other_settings_or_another_adapter_are_refused(run: Run) -> None:
    evaluate(run, limit=3)
    kept = (run.folder / "predictions.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"generation.max_new_tokens is 9 and was 8"):
        evaluate(run, ["generation.max_new_tokens=9"])
    evaluate(run, ["generation.per_device_eval_batch_size=1"], limit=3)
    file = run.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(RunError, match="adapter"):
        evaluate(run, limit=3)
    assert (run.folder / "predictions.jsonl").read_bytes() == kept


def test_the_severity_of_the_prompt_belongs_to_what_is_kept_and_an_oracle_says_so(run: Run) -> None:
    recipe, about = run.folder / "recipe.yaml", run.folder / "likelihood.about.json"
    less: dict[str, Any] = {"limit": 3, "arms": ["adapter"], "answers": False, "floors": False}
    run.update_metrics(model={**run.metrics()["model"], "prompt": None})  # else it is bound to its own prompt

    def changed(*settings: str, keep: bool = False) -> dict[str, Any]:
        run.write_text("recipe.yaml", load_recipe(recipe, [f"prompt.{one}" for one in settings]).to_yaml())
        if not keep:
            (run.folder / "likelihood.jsonl").unlink(missing_ok=True)
        return evaluate(run, **less)

    # As before there was a severity in prompts, so that what was kept then stays.
    assert not any("everity" in note for note in changed()["notes"])
    origin = json.loads(about.read_text(encoding="utf-8"))
    new = ("examples", "english_template", "english_cue")
    old = {**origin, "prompt": {key: value for key, value in origin["prompt"].items() if key not in new}}
    del old["severities_by"], old["evaluation_template"]
    about.write_text(json.dumps(old), encoding="utf-8")
    evaluate(run, **less)
    for setting, key in (
        ("severity=predicted", "prompt.severity "),
        ("examples=[{question: س, answer: ج}]", "examples"),
    ):
        with pytest.raises(RunError, match=key):
            changed(setting, keep=True)
    notes = changed()["notes"]
    origin = json.loads(about.read_text(encoding="utf-8"))
    assert origin["severities_by"] == {"source": "rules", "version": rules().version}
    assert about.stat().st_mode & 0o077 == 0  # it holds the examples
    assert any("trained: None" in note for note in notes) and not any("oracle" in note for note in notes)
    assert any("oracle" in note for note in changed("severity=gold", "examples=null")["notes"])


def test_the_published_prompt_of_an_evaluation_is_asked_with_and_the_training_s_stays(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(run, limit=3)
    path = run.folder / "recipe.yaml"
    run.write_text("recipe.yaml", load_recipe(path, ["as_published.evaluation_template='{question}'"]).to_yaml())
    with pytest.raises(RunError, match="evaluation_template"):
        evaluate(run, limit=3)
    for name in ("predictions", "likelihood"):
        (run.folder / f"{name}.jsonl").unlink()
    prompts: list[Any] = []
    generated = module.generate
    monkeypatch.setattr(module, "generate", lambda *of, **more: prompts.append(of[1]) or generated(*of, **more))
    evaluate(run, limit=3)
    assert [prompt.text("Where? أين؟") for prompt in prompts] == ["Where? أين؟"] * 2
    assert module.resolve_model(load_recipe(path)).prompt.text("أين؟") == "السؤال: أين؟\nالجواب:"


def test_what_cannot_be_evaluated_is_refused_before_anything_is_computed(
    run: Run, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"training.learning_rate"):
        evaluate(run, ["training.learning_rate=1"])
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError, match="sevpeft evaluate"):
            evaluate(run)
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="no adapter"):
        evaluate(run)
    assert counted == []


def test_the_encoder_may_be_absent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, layer: int) -> None:
        raise ModelError(f"{name} is not here.")

    monkeypatch.setattr(bertscore, "Encoder", absent)
    content = evaluate(run, ["evaluation.bertscore=true"], limit=3)
    assert any("bert-base-multilingual-cased is not here" in note for note in content["notes"])
    assert "chrf" in content["metrics"]


def test_the_table_fits_80_columns_and_has_critical_cases_first(run: Run) -> None:
    content = evaluate(run)
    console = Console(file=io.StringIO(), width=80)
    console.print(evaluation_tables(content))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    assert shown.index("Critical cases:") < shown.index("adapter − base") < shown.index("All cases:")
    nll = content["scores"]["critical"]["metrics"]["nll"]
    assert estimate_text(nll["adapter"], content["metrics"]["nll"]) in shown
    assert estimate_text(nll["adapter"]["against"]["base"], content["metrics"]["nll"], sign=True) in shown
    assert f" {nll['shuffled']['value']:.3f} " in shown
    assert "Only 2 critical questions" in " ".join(shown.split())


def test_the_verb_prints_the_table_or_json_and_one_sentence_when_refused(
    run: Run, sevpeft_: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = sevpeft_("evaluate", run.folder, "--limit", "3")
    assert code == 0 and "chrF++" in out and "predictions.jsonl" in out and "sevpeft report" in out
    assert "Answers, base" in err and "3 rows" in err
    code, out, _ = sevpeft_("evaluate", run.folder, "--limit", "3", "--json")
    assert code == 0 and json.loads(out)["data"]["evaluated"] == 3
    for words, expected in (
        ([tmp_path / "nothing"], "sevpeft train"),
        ([run.folder, "generation.max_new_tokns=3"], "generation.max_new_tokens"),
    ):
        code, out, err = sevpeft_("evaluate", *words)
        assert code in (1, 2) and out == "" and expected in err and len(err.strip().splitlines()) == 1


# Rows


def table(path: Path, *, copies: int = 1) -> Path:
    severe = ("non_critical", "neutral", "critical")
    rows = [
        {"id": f"q{n}-{c}", "question": f"عندي صداع رقم {n}{'!' * c}", "answer": f"جواب {n}", "severity": severe[n % 3]}
        for n in range(21)
        for c in range(copies)
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def test_the_rows_are_the_run_s_own_test_split_and_none_was_trained_on(finished_run: Run) -> None:
    recipe = load_recipe(finished_run.folder / "recipe.yaml")
    rows = rows_of(recipe)
    _, splits, _ = load_splits(recipe)
    assert rows.ids == list(splits.test["id"]) and len(set(rows.ids)) == len(rows) == ROWS
    assert rows.references == list(splits.test["answer"])
    learnt = {fold_for_matching(question) for question in splits.train["question"]}
    assert not learnt & {fold_for_matching(question) for question in rows.questions}


def test_equal_questions_are_one_group(tmp_path: Path) -> None:
    path = table(tmp_path / "data.jsonl", copies=3)
    rows = rows_of(recipe_from_values({"data": {"path": str(path), "test_size": 0.3, "validation_size": 0.2}}))
    assert len(rows) > 3
    by_question = {(group, fold_for_matching(q)) for group, q in zip(rows.groups.tolist(), rows.questions, strict=True)}
    assert len(by_question) == len(set(rows.groups.tolist())) < len(rows)


def test_the_groups_of_a_prepared_folder_are_its_near_duplicates(tmp_path: Path) -> None:
    sample = load_consultations("builtin:consultations", max_rows=40).rows
    doubled = [
        {"question": f"{greeting}{row['question']}", "answer": row["answer"], "severity": row["severity"]}
        for row in sample
        for greeting in ("", "يا دكتور ")
    ]
    source = tmp_path / "data.jsonl"
    source.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in doubled), encoding="utf-8")
    prepare(PrepareSettings.model_validate({"data": {"path": str(source)}}), tmp_path / "prepared")
    rows = rows_of(recipe_from_values({"data": {"path": str(tmp_path / "prepared")}}))
    assert len(rows) > 2 and len({fold_for_matching(question) for question in rows.questions}) == len(rows)
    pairs = {question.removeprefix("يا دكتور ") for question in rows.questions}
    assert len(np.unique(rows.groups)) == len(pairs) < len(rows)


def test_a_sample_is_seeded_and_part_of_a_larger_one_and_the_content_hash_knows_no_order(finished_run: Run) -> None:
    rows = rows_of(load_recipe(finished_run.folder / "recipe.yaml"))
    small, large = rows.limited(4), rows.limited(7)
    assert small.ids == rows.limited(4).ids and len(small) == 4
    assert set(small.ids) < set(large.ids) < set(rows.ids)
    assert rows.limited(None) is rows is rows.limited(99)
    at = rows.ids.index(small.ids[1])
    assert (small.questions[1], small.groups[1], small.strata[1]) == (
        rows.questions[at],
        rows.groups[at],
        rows.strata[at],
    )
    assert rows.take(range(10, -1, -1)).content_hash() == rows.content_hash() != rows.limited(10).content_hash()


def test_without_severity_the_stratum_is_unknown(tmp_path: Path) -> None:
    path = table(tmp_path / "data.jsonl")
    path.write_text(path.read_text(encoding="utf-8").replace("severity", "nothing"), encoding="utf-8")
    rows = rows_of(recipe_from_values({"data": {"path": str(path)}, "severity": {"control": "uniform"}}))
    assert (rows.strata == -1).all()


def test_a_run_without_test_rows_or_with_changed_data_is_refused(tmp_path: Path, run: Run) -> None:
    path = table(tmp_path / "data.jsonl")
    with pytest.raises(RunError, match=r"data.test_size=0.1"):
        rows_of(load_recipe(QUICKSTART, ["data.test_size=0", f"data.path={path}"]))
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("builtin:consultations", str(path)), encoding="utf-8")
    with pytest.raises(RunError, match="content has changed"):
        evaluate(run)


# What is kept

ORIGIN = {
    "adapter": "sha256:1",
    "generation": {"max_new_tokens": 8, "temperature": 0.7},
    "prompt": {"template": "س" * 60},
}


def line(number: int, arm: str = "adapter") -> dict[str, object]:
    return {"arm": arm, "id": f"row-{number}", "prediction": f"جواب\n{number}"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "predictions.jsonl"


def test_lines_are_found_by_arm_and_id_and_only_the_owner_may_read_them(path: Path) -> None:
    path.touch()
    file = RowFile(path, ORIGIN)
    file.append([line(2), line(0, "base")])
    file.append([line(1)])
    assert [RowFile(path, ORIGIN).lines["adapter", f"row-{n}"] for n in (1, 2)] == [line(1), line(2)]
    assert (
        RowFile(path, ORIGIN).lines.keys()
        == file.lines.keys()
        == {
            ("adapter", "row-2"),
            ("base", "row-0"),
            ("adapter", "row-1"),
        }
    )
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_line_that_was_cut_off_or_is_damaged_is_taken_out_and_computed_again(path: Path) -> None:
    RowFile(path, ORIGIN).append([line(1), line(2)])
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    for content, left in (
        (whole + b'{"arm": "adapter", "id": "row-9", "pred', whole),
        (whole + b"\0\0\0", whole),
        (whole[:-1], first),
        (first + b"{broken\n" + second, whole),
        (first + b'{"id": "row-7"}\n' + second, whole),
        (first + b"[]\n" + second, whole),
    ):
        path.write_bytes(content)
        file = RowFile(path, ORIGIN)
        assert path.read_bytes() == left and len(file.lines) == len(left.splitlines()), content
        assert path.stat().st_mode & 0o777 == 0o600
    file.append([line(3)])
    assert {identity for _, identity in RowFile(path, ORIGIN).lines} == {"row-1", "row-2", "row-3"}


def test_lines_of_another_origin_are_refused_with_what_differs(path: Path) -> None:
    file = RowFile(path, ORIGIN)
    file.append([line(1)])
    before = path.read_bytes()
    for other, message in (
        ({"adapter": "sha256:2"}, 'adapter is "sha256:2" and was "sha256:1"'),
        ({"generation": {"max_new_tokens": 8}}, "generation.temperature is null and was 0.7"),
        ({"prompt": {"template": "ص" * 60}}, "prompt.template"),
    ):
        with pytest.raises(RunError) as caught:
            RowFile(path, {**ORIGIN, **other})
        assert message in str(caught.value) and "predictions.jsonl away" in str(caught.value)
    for about in ("{broken", None):
        file.about.unlink() if about is None else file.about.write_text(about, encoding="utf-8")
        with pytest.raises(RunError, match=r"move predictions.jsonl away"):
            RowFile(path, ORIGIN)
    assert path.read_bytes() == before
