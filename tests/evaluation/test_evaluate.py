"""An evaluation says what the answers are worth beside floors, and never does a row twice."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sevpeft.cli import main
from sevpeft.errors import Interrupted, ModelError, RunError, UsageError
from sevpeft.evaluation import row_work, scoring
from sevpeft.evaluation.evaluate import evaluate
from sevpeft.evaluation.metrics import METRICS
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.table import evaluation_tables
from sevpeft.runs import Run


def lines(run: Run, name: str = "predictions.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids whose answers were generated, and ids whose likelihood was computed, as they come."""
    from sevpeft.evaluation import switching

    seen: list[str] = []
    generate, nll = switching.generate, row_work.reference_nll

    def counting(model: Any, prompt: Any, rows: Any, settings: Any, **rest: Any) -> Any:
        for batch in generate(model, prompt, rows, settings, **rest):
            seen.extend(f"answer {one.id}" for one in batch)
            yield batch

    def counting_nll(model: Any, prompt: Any, rows: Any, **rest: Any) -> Any:
        seen.extend(f"nll {identity}" for identity in rows.ids)
        return nll(model, prompt, rows, **rest)

    monkeypatch.setattr(switching, "generate", counting)
    monkeypatch.setattr(row_work, "reference_nll", counting_nll)
    return seen


def test_every_row_is_answered_by_both_arms_and_scored_beside_floors(run: Run) -> None:
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    found = evaluate(run)
    assert {(row["arm"], row["id"]) for row in lines(run)} == {
        (a, i) for a in ("adapter", "base") for i in found.rows.ids
    }
    one = lines(run)[0]
    at = found.rows.ids.index(one["id"])
    assert (one["question"], one["reference"]) == (found.rows.questions[at], found.rows.references[at])
    assert (one["severity"], one["group"]) == (found.rows.severity(at), found.rows.groups[at])
    assert list(found.content["scores"]) == ["critical", "neutral", "non_critical", "all"]
    scores = found.content["scores"]["all"]["metrics"]
    assert set(scores) == {name for name in METRICS if not name.startswith(("bertscore", "judge"))}
    for name in ("chrf", "rouge_l"):
        assert set(scores[name]) >= {"adapter", "base", "shuffled", "constant"}
        low, value, high = (scores[name]["adapter"][part] for part in ("low", "value", "high"))
        assert (low is high is None and value == 0) or low <= value <= high  # without an interval where all are equal
    assert set(scores["nll"]) == {"adapter", "base", "shuffled", "difference"}
    assert "reference" in scores["referral"] and "reference" not in scores["unsupported_dose"]
    nll = found.scores["adapter"]["nll"]
    assert scores["nll"]["adapter"]["value"] == pytest.approx(np.average(nll, weights=found.tokens))
    # Nothing else of the run is touched.
    assert {path: path.read_bytes() for path in before} == before
    new = {path.name for path in run.folder.iterdir()} - {path.name for path in before} - {"adapter", "checkpoints"}
    assert new == {"predictions.jsonl", "predictions.about.json", "likelihood.jsonl", "likelihood.about.json"} | {
        "evaluation.json",
        "scores.jsonl",
    }
    stored = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(found.content))
    by_row = {(row["column"], row["id"]): row for row in lines(run, "scores.jsonl")}
    assert by_row["base", found.rows.ids[3]]["chrf"] == found.scores["base"]["chrf"][3]


def test_the_shuffled_reference_is_of_another_question_and_of_the_same_severity_where_that_can_be() -> None:
    groups, strata = np.array([0, 0, 1, 2, 3, 4, 5, 5]), np.array([2, 2, 2, 2, 1, 1, 0, 0])
    names = [f"جواب {n}" for n in range(8)]
    rows = EvaluationRows(names, names, names, None, strata, groups, "test", "")
    for seed in range(5):
        of = [names.index(text) for text in scoring.strangers(rows, seed)]
        assert all(groups[at] != groups[n] for n, at in enumerate(of))
        assert all(strata[at] == strata[n] for n, at in enumerate(of) if n < 6)


def test_a_finished_evaluation_is_not_computed_again_and_a_sample_is_gone_on_from(run: Run, counted: list[str]) -> None:
    evaluate(run, limit=4)
    sample = list(counted)
    assert len(sample) == 2 * 4 + 3 * 4
    whole = evaluate(run)
    assert len(counted) == 5 * len(whole.rows)
    assert evaluate(run).content == whole.content
    assert len(counted) == 5 * len(whole.rows)


def test_the_order_of_the_lines_does_not_matter(run: Run, tmp_path: Path) -> None:
    first = evaluate(run)
    for name in ("predictions.jsonl", "likelihood.jsonl"):
        path = run.folder / name
        path.write_text("".join(reversed(path.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")
    assert evaluate(run).content == first.content


def test_a_sample_does_not_replace_a_whole_evaluation_nor_likelihoods_alone_one_with_answers(run: Run) -> None:
    whole = evaluate(run).content
    assert "is kept as it was" in evaluate(run, limit=5).content["notes"][-1]
    assert "is kept as it was" in evaluate(run, answers=False).content["notes"][-1]
    assert json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8")) == json.loads(json.dumps(whole))


def test_likelihoods_alone_need_no_answers(run: Run, counted: list[str]) -> None:
    found = evaluate(run, answers=False, arms=["adapter"])
    assert set(found.content["metrics"]) == {"nll"} and not (run.folder / "predictions.jsonl").exists()
    assert not any(one.startswith("answer") for one in counted) and set(found.scores) == {"adapter", "shuffled"}


def test_the_validation_split_has_files_of_its_own(run: Run) -> None:
    found = evaluate(run, answers=False, split="validation")
    assert (run.folder / "validation" / "evaluation.json").exists() and not (run.folder / "evaluation.json").exists()
    losses = run.metrics()["after"]
    assert found.content["scores"]["all"]["metrics"]["nll"]["adapter"]["value"] == pytest.approx(
        losses["loss"], rel=1e-5
    )


def test_a_kill_loses_at_most_one_batch(run: Run, counted: list[str]) -> None:
    def evaluate_slowly() -> None:
        append = row_work.RowFile.append

        def slowly(self: Any, rows: Any) -> None:
            append(self, rows)
            time.sleep(0.3)

        row_work.RowFile.append = slowly  # type: ignore[method-assign]
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
    found = evaluate(run)
    answered = [one for one in counted if one.startswith("answer")]
    assert len(answered) == 2 * len(found.rows) - 8 and not any(one.startswith("nll") for one in counted)
    predictions.unlink()
    (run.folder / "evaluation.json").unlink()
    assert evaluate(run).content == found.content


def test_ctrl_c_keeps_what_is_done_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    append = row_work.RowFile.append

    def interrupted(self: Any, rows: Any) -> None:
        append(self, rows)
        if self.path.name == "predictions.jsonl":
            raise KeyboardInterrupt

    monkeypatch.setattr(row_work.RowFile, "append", interrupted)
    with pytest.raises(Interrupted, match="finished rows are kept"):
        evaluate(run)
    assert len(lines(run)) == 4
    assert not (run.folder / ".evaluating").exists()


def test_predictions_of_other_settings_or_another_adapter_are_refused(run: Run) -> None:
    evaluate(run, limit=3)
    kept = (run.folder / "predictions.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"generation.max_new_tokens is 9 and was 8"):
        evaluate(run, ["generation.max_new_tokens=9"])
    evaluate(run, ["generation.per_device_eval_batch_size=1"], limit=3)
    file = run.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(RunError, match="was made from something else: adapter is another"):
        evaluate(run, limit=3)
    assert (run.folder / "predictions.jsonl").read_bytes() == kept


def test_an_override_of_the_training_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match=r"training.learning_rate belongs to the training, which is over"):
        evaluate(run, ["training.learning_rate=1"])


def test_a_run_without_an_adapter_or_with_too_few_rows_is_refused(run: Run) -> None:
    with pytest.raises(RunError, match="There is 1 question to evaluate on, and one shows nothing; raise --limit"):
        evaluate(run, limit=1)
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="no adapter"):
        evaluate(run)


def test_several_processes_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="evaluate runs as one process"):
        evaluate(run)


def test_the_default_encoder_may_be_absent_and_one_that_was_named_may_not(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str, layer: int) -> None:
        raise ModelError(f"The BERTScore encoder {name} is not here.")

    monkeypatch.setattr(scoring.Encoder, "load", absent)
    found = evaluate(run, ["evaluation.bertscore=true"], limit=3)
    assert any("BERTScore is left out: The BERTScore encoder" in note for note in found.content["notes"])
    assert "chrf" in found.content["metrics"]
    with pytest.raises(ModelError, match="my-encoder is not here"):
        evaluate(run, ["evaluation.bertscore=true", "evaluation.bertscore_model=my-encoder"], limit=3)


def test_the_table_fits_80_columns_and_has_critical_cases_first(run: Run) -> None:
    content = evaluate(run).content
    console = Console(file=io.StringIO(), width=80)
    console.print(evaluation_tables(content))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    assert shown.index("critical:") < shown.index("neutral:") < shown.index("non-critical:") < shown.index("all:")
    nll = content["scores"]["critical"]["metrics"]["nll"]
    assert f"{nll['adapter']['value']:.2f} [{nll['adapter']['low']:.2f}, {nll['adapter']['high']:.2f}]" in shown
    assert f"{nll['shuffled']['value']:.2f}" in shown
    assert "Only 2 critical questions to evaluate on: too few" in " ".join(shown.split())


@pytest.fixture
def sevpeft_(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sevpeft", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        said = capfd.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return command


def test_the_verb_prints_the_table_or_json_and_one_sentence_when_refused(
    run: Run, sevpeft_: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, _ = sevpeft_("evaluate", run.folder, "--limit", "3")
    assert code == 0 and "chrF++" in out and "Answers:" in out
    code, out, _ = sevpeft_("evaluate", run.folder, "--limit", "3", "--json")
    assert code == 0 and json.loads(out)["data"]["evaluated"] == 3
    for words, expected in (
        ([tmp_path / "nothing"], "There is no run in"),
        ([run.folder, "generation.max_new_tokns=3"], "write generation.max_new_tokens"),
        ([run.folder, "--backend", "vllm"], "vLLM is not installed"),
    ):
        code, out, err = sevpeft_("evaluate", *words)
        assert code in (1, 2) and out == "" and expected in err and len(err.strip().splitlines()) == 1
