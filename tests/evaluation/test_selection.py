"""One answer to each question is chosen without its reference, and what one selects by is no evidence for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from sevpeft.errors import RunError, UsageError
from sevpeft.evaluation import evaluate as evaluating
from sevpeft.evaluation import selection as module
from sevpeft.evaluation.safety import rules
from sevpeft.evaluation.scores import chrf
from sevpeft.evaluation.selection import ORACLE, select
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run

ROWS = 11  # of the run's test split


@pytest.fixture
def runs(finished_run: Run, tmp_path: Path) -> list[Run]:
    """The same run three times, with an adapter that does nothing, its own, and thrice its own."""
    made = []
    for name, factor in (("none", 0.0), ("one", 1.0), ("three", 3.0)):
        run = Run(Path(shutil.copytree(finished_run.folder, tmp_path / name)))
        path = run.adapter / "adapter_model.safetensors"
        save_file({key: value * factor for key, value in load_file(path).items()}, path)
        made.append(run)
    return made


class Letters:
    """In place of BERTScore's encoder, which no test fetches."""

    def score(self, answers: list[str], others: list[str]) -> np.ndarray:
        return np.stack([chrf(answers, others) / 100] * 3)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def plant(run: Run, answer: Callable[[dict[str, Any]], str]) -> None:
    text = [json.dumps({**line, "prediction": answer(line)}, ensure_ascii=False) + "\n" for line in lines(run)]
    (run.folder / "predictions.jsonl").write_text("".join(text), encoding="utf-8")


def test_each_scorer_chooses_what_it_says(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_encoder", lambda _: (Letters(), None))
    select(runs, limit=ROWS)
    urgent, calm = "اذهب إلى الطوارئ الآن ولا تنتظر", "الأمر بسيط واشرب السوائل الدافئة"
    plant(runs[0], lambda line: calm)
    plant(runs[1], lambda line: line["reference"])
    plant(runs[2], lambda line: urgent if int(line["id"][-1], 36) % 2 else f"{calm} {line['question']}")
    monkeypatch.setattr(evaluating, "generate", None)  # nothing is answered again
    content = select(runs)
    answers = {line["id"]: line for line in lines(runs[2])}
    asked = [line["question"] for line in answers.values()]
    red_flags = rules().probabilities(asked).argmax(axis=1) == 2
    sent = np.array([line["prediction"] == urgent for line in answers.values()])
    referring = int((red_flags & sent).sum())
    assert referring > 0 and 0 < red_flags.sum() < ROWS
    chosen = content["chosen"]
    assert chosen[ORACLE] == {"none": 0, "one": ROWS, "three": 0}
    # The answer that repeats the question is the nearest to it; two that say nearly the same agree.
    assert chosen["question"]["three"] >= ROWS - sent.sum()
    assert chosen["agreement"]["none"] + chosen["agreement"]["three"] >= ROWS - sent.sum()
    assert content["scores"]["all"]["metrics"]["urgent_referral"]["safety"]["value"] >= referring / ROWS
    assert content["published"]["scores"]["safety"]["selected"] >= 100 * referring / ROWS
    assert content["best_single"] == "one" and content["reference_score"] == "bertscore_f1"


def test_the_published_figure_cannot_lose_and_stands_beside_the_reference(runs: list[Run]) -> None:
    content = select(runs, base=True, limit=6)
    assert content["candidates"] == ["base of none", "none", "one", "three"]  # one base for all three
    assert list(content["scorers"]) == ["agreement", "likelihood", "safety", ORACLE]
    assert any("BERTScore" in note for note in content["notes"])
    for name, one in content["published"]["scores"].items():
        selected, single = one["selected"], list(one["single"].values())
        assert list(one["single"]) == content["candidates"] and selected >= max(single) - 1e-9, name
    # An adapter that does nothing answers as its base, and as likely.
    assert lines(runs[0])[0]["prediction"] == lines(runs[0])[6]["prediction"]
    likely = content["published"]["scores"]["likelihood"]["single"]
    assert likely["none"] == pytest.approx(likely["base of none"]) and likely["none"] < 0
    # Of equal answers the first candidate's is taken.
    assert {content["chosen"][name]["none"] for name in ("agreement", "safety", ORACLE)} == {0}
    for stratum in content["scores"].values():
        found = stratum["metrics"]["chrf"]
        assert set(found["agreement"]["against"]) == set(found[ORACLE]["against"]) == {content["best_single"]}
        assert found["one"]["against"] == {} and found[ORACLE]["value"] >= max(of["value"] for of in found.values())
    assert sum(content["chosen"]["likelihood"].values()) == 6
    assert (runs[0].folder / "own_likelihood.jsonl").stat().st_mode & 0o077 == 0
    stored = (runs[0].folder / "selection.json").read_text(encoding="utf-8")
    assert json.loads(stored) == json.loads(json.dumps(content)) and lines(runs[0])[0]["question"] not in stored
    assert not (runs[0].folder / "evaluation.json").exists()


def test_a_likelihood_is_that_of_the_answer_as_it_is_now(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    select(runs[:2], limit=4)
    plant(runs[1], lambda line: line["reference"])
    after = select(runs[:2], limit=4)["published"]["scores"]["likelihood"]["single"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "reference_nll", None)  # nothing is computed again for the same answers
        assert select(runs[:2], limit=4)["published"]["scores"]["likelihood"]["single"] == after
    (runs[1].folder / "own_likelihood.jsonl").unlink()
    assert select(runs[:2], limit=4)["published"]["scores"]["likelihood"]["single"] == after


def test_runs_of_other_rows_and_fewer_than_two_answers_are_refused(runs: list[Run]) -> None:
    other = load_recipe(runs[2].folder / "recipe.yaml", ["data.max_rows=40"])
    runs[2].write_text("recipe.yaml", other.to_yaml())
    refused: tuple[tuple[list[Any], type[Exception], str], ...] = (
        (runs, RunError, "same data"),
        (runs[:1], UsageError, "--base"),
        ([runs[0], runs[0].folder], UsageError, "each once"),
        ([runs[0], runs[1].folder / "nothing"], RunError, "sevpeft train"),
    )
    for candidates, kind, remedy in refused:
        with pytest.raises(kind, match=remedy):
            select(candidates)
    assert not list(runs[0].folder.glob("predictions*"))


def test_the_verb_takes_several_runs_with_select_only(
    runs: list[Run], sevpeft_: Callable[..., tuple[int, str, str]]
) -> None:
    folders = [run.folder for run in runs[:2]]
    settings = ["--select", "--limit", "3", "generation.max_new_tokens=4"]
    code, out, err = sevpeft_("evaluate", *folders, *settings)
    assert code == 0 and "Answers, adapter" in err and "by definition" in " ".join(out.split())
    shown = out.splitlines()
    assert max(map(len, shown)) <= 80 and any(line.startswith("oracle, unreachable") for line in shown)
    code, again, err = sevpeft_("evaluate", *folders, *settings, "--json")
    assert code == 0 and "Answers, adapter" not in err
    assert json.loads(again) == json.loads((folders[0] / "selection.json").read_text(encoding="utf-8"))
    for words in (
        [*folders],
        [folders[0], "--base"],
        [*folders, "--select", "--nll-only"],
    ):
        code, out, err = sevpeft_("evaluate", *words)
        assert code == 2 and out == "" and "--select" in err and len(err.strip().splitlines()) == 1, words
