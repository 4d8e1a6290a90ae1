"""Nothing is judged or sent unless it is asked for; what was judged is kept, and no rating comes from nowhere."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sevpeft.errors import ModelError, RunError, SevpeftError, UsageError
from sevpeft.evaluation import judge_endpoint
from sevpeft.evaluation.evaluate import evaluate
from sevpeft.evaluation.judging import JUDGEMENTS, Judged, Judging
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.table import evaluation_tables
from sevpeft.recipe import recipe_from_values
from sevpeft.runs import Run
from tests.conftest import CHAT_TEMPLATES
from tests.evaluation.judge_server import GOOD, KEY, Request, good, serving

NAMES = [f"row {n}" for n in range(12)]
ROWS = EvaluationRows(
    NAMES, [f"سؤال {n}" for n in NAMES], [f"مرجع {n}" for n in NAMES], None, np.zeros(12), np.arange(12), "", ""
)
ANSWERS = {arm: [f"{arm} يجيب {n}" for n in NAMES] for arm in ("adapter", "base")}
ORIGIN = {"generation": {"seed": 0}}
KINDNESS = '{label: Kind, scale: 1-5, better: higher, asks: "Is it kind?", definition: Kindness}'
MINE = f"name: mine\ninstructions: Rate.\nitems: {{kindness: {KINDNESS}}}"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_endpoint, "_PAUSE", 0.01)
    monkeypatch.setenv("SEVPEFT_JUDGE_API_KEY", KEY)


def judge(
    folder: Path,
    answers: dict[str, list[str]] = ANSWERS,
    *,
    rows: EvaluationRows = ROWS,
    origin: Any = ORIGIN,
    out: Any = None,
    **keys: Any,
) -> Judged:
    recipe = recipe_from_values({"evaluation": {"judge": keys}})
    assert recipe.evaluation.judge is not None
    console = Console(file=out, width=300) if out else Console(quiet=True)
    return Judging(recipe, recipe.evaluation.judge, console).judge(rows, answers, folder, origin)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JUDGEMENTS).read_text(encoding="utf-8").splitlines()]


def by_text(request: Request) -> tuple[int, Any]:
    """The adapter's answers are better than the base model's, and row 3 of the adapter gets no verdict."""
    answer = request.texts["answer"]
    if answer == "adapter يجيب row 3":
        return 200, "لا أستطيع"
    harm = "no" if answer.startswith("adapter") else "yes"
    return 200, json.dumps({**GOOD, "urgency": 5 if harm == "no" else 2, "harm": harm})


def test_verdicts_become_scores_and_an_unreadable_one_no_rating(tmp_path: Path) -> None:
    with serving(by_text) as server:
        found = judge(tmp_path, url=server.url, model="m")
    urgency = [5.0] * 12
    urgency[3] = np.nan
    np.testing.assert_array_equal(found.scores["adapter"]["judge_urgency"], urgency)
    assert found.scores["base"]["judge_urgency"].tolist() == [2.0] * 12
    assert found.scores["base"]["judge_harm"].tolist() == [1.0] * 12 and found.scores["adapter"]["judge_harm"][0] == 0
    assert found.notes == [
        "Judge: 1 of 12 answers (adapter) got no readable verdict; its scores leave them out.",
    ]
    assert found.about["answers"]["adapter"] == {"judged": 11, "unreadable": 1, "never asked": 0}
    kept = {(line["arm"], line["id"]): line for line in lines(tmp_path)}
    assert kept["adapter", "row 3"]["ratings"] is None and kept["adapter", "row 3"]["reply"] == "لا أستطيع"
    assert kept["base", "row 0"]["ratings"] == {name: GOOD[name] for name in GOOD if name != "reason"} | {
        "urgency": 2,
        "harm": "yes",
    }
    assert kept["base", "row 0"]["reason"] == "Sends to care."
    assert (tmp_path / JUDGEMENTS).stat().st_mode & 0o777 == 0o600


def test_what_is_judged_is_not_asked_again_whether_it_was_readable_or_not(tmp_path: Path) -> None:
    with serving(by_text) as server:
        first = judge(tmp_path, url=server.url, model="m")
        asked = len(server.requests)
        again = judge(tmp_path, url=server.url, model="m")
        assert len(server.requests) == asked == 24 + 1
    np.testing.assert_equal(again.scores, first.scores)
    assert judge(tmp_path, url=server.url, model="m").about == first.about  # the server is gone


def test_an_answer_that_several_arms_give_is_judged_once(tmp_path: Path) -> None:
    with serving(good) as server:
        found = judge(tmp_path, {arm: ["الجواب نفسه"] * 12 for arm in ("adapter", "base", "constant")},
                      url=server.url, model="m")  # fmt: skip
    assert len(server.requests) == 12 and len(lines(tmp_path)) == 36
    assert list(found.scores) == ["adapter", "base", "constant"]


def test_finished_verdicts_outlive_a_judge_that_dies_and_the_same_command_goes_on(tmp_path: Path) -> None:
    with (
        serving(lambda request: good(request) if request.number < 7 else (500, b"")) as server,
        pytest.raises(RunError, match=r"fails \(500\).*Finished verdicts are kept"),
    ):
        judge(tmp_path, url=server.url, model="m", concurrency=1)
    assert len(lines(tmp_path)) == 7
    done = {line["id"] + line["arm"] for line in lines(tmp_path)}
    with (tmp_path / JUDGEMENTS).open("a", encoding="utf-8") as file:
        file.write('{"arm": "base", "id": "row')  # and a kill in the middle of a line
    with serving(good) as server:
        found = judge(tmp_path, url=server.url, model="m")
    assert len(server.requests) == 17
    assert {line["id"] + line["arm"] for line in lines(tmp_path)} > done and len(lines(tmp_path)) == 24
    assert all(not np.isnan(score).any() for by_name in found.scores.values() for score in by_name.values())


def test_a_judge_that_talks_nonsense_is_stopped_early_also_the_second_time(tmp_path: Path) -> None:
    with serving(lambda request: (200, "nonsense")) as server:
        for requests in (2 * 20, 2 * 20):
            with pytest.raises(RunError, match=r"20 of the first 20 replies of the judge m are no verdicts; choose a"):
                judge(tmp_path, url=server.url, model="m", concurrency=1)
            assert len(server.requests) == requests


def test_verdicts_on_other_answers_by_another_judge_or_from_nowhere_are_refused(tmp_path: Path) -> None:
    with serving(good) as server:
        judge(tmp_path, url=server.url, model="m")
        with pytest.raises(RunError, match=r"judge.model is .other. and was .m."):
            judge(tmp_path, url=server.url, model="other")
        with pytest.raises(RunError, match=r"generation.seed is 1 and was 0"):
            judge(tmp_path, url=server.url, model="m", origin={"generation": {"seed": 1}})
        with pytest.raises(RunError, match="holds verdicts on other answers than these"):
            judge(tmp_path, {**ANSWERS, "base": ["غيره"] * 12}, url=server.url, model="m")
    path = tmp_path / JUDGEMENTS
    path.write_text(path.read_text(encoding="utf-8").replace('"urgency": 4', '"urgency": 9', 1), encoding="utf-8")
    with pytest.raises(RunError, match="holds ratings that the rubric does not know"):
        judge(tmp_path, url=server.url, model="m")


def test_a_file_is_replayed_without_any_endpoint_and_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with serving(by_text) as server:
        first = judge(tmp_path / "first", url=server.url, model="m")
    file = str(tmp_path / "first" / JUDGEMENTS)
    before = Path(file).read_bytes()
    again = judge(tmp_path / "second", file=file, origin={"another": "run"})
    np.testing.assert_equal(again.scores, first.scores)
    assert again.about == first.about
    # The run is whole by itself from then on.
    kept, copied = (
        {(line["arm"], line["id"]): line["ratings"] for line in lines(tmp_path / name)} for name in ("first", "second")
    )
    assert copied == kept and len(kept) == 24
    (tmp_path / "third").mkdir()
    other = {**ANSWERS, "base": [*ANSWERS["base"][:5], *["غيره"] * 7]}
    lacking = judge(tmp_path / "third", other, file=file)
    assert np.isnan(lacking.scores["base"]["judge_harm"]).tolist() == [False] * 5 + [True] * 7
    assert "7 of 12 answers (base) have none in the file" in lacking.notes[-1]
    with serving(good) as server:  # the file first, and a judge for the rest
        both = judge(tmp_path / "third", other, file=file, url=server.url, model="m")
    assert len(server.requests) == 7 and both.about["answers"]["base"]["judged"] == 12
    assert Path(file).read_bytes() == before


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    with serving(good) as server:
        judge(tmp_path, url=server.url, model="m")
    file = tmp_path / JUDGEMENTS
    with pytest.raises(UsageError, match=r"holds verdicts of m, and evaluation.judge.model is other"):
        judge(tmp_path, file=str(file), model="other", url=server.url)
    rubric = tmp_path / "mine.yaml"
    rubric.write_text(MINE, encoding="utf-8")
    with pytest.raises(UsageError, match="was judged by the rubric answers"):
        judge(tmp_path, file=str(file), rubric=str(rubric))
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"urgency": 4', '"urgency": 8', 1), encoding="utf-8")
    with pytest.raises(RunError, match="ratings that the rubric does not know"):
        judge(tmp_path, file=str(file))
    file.write_text("{\n" + text, encoding="utf-8")
    with pytest.raises(RunError, match=r"Line 1 of .* cannot be read"):
        judge(tmp_path, file=str(file))
    with pytest.raises(RunError, match=r"cannot be replayed, because it or absent.about.json beside it is missing"):
        judge(tmp_path, file=str(tmp_path / "absent.jsonl"))


def test_another_rubric_gives_other_scores(tmp_path: Path) -> None:
    rubric = tmp_path / "mine.yaml"
    rubric.write_text(MINE, encoding="utf-8")
    with serving(lambda request: (200, '{"kindness": 3, "reason": ""}')) as server:
        found = judge(tmp_path, url=server.url, model="m", rubric=str(rubric))
    assert found.scores["base"]["judge_kindness"].tolist() == [3.0] * 12


def test_where_the_answers_go_is_said_before_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()

    def asking(self: Any, asked: dict[str, str], on_reply: Callable[..., None]) -> None:
        assert "24 answers, each with its question and reference answer, go to judge.example (another machine)" in (
            out.getvalue()
        )
        assert "the key in SEVPEFT_JUDGE_API_KEY" in out.getvalue()
        raise RunError("enough")

    monkeypatch.setattr(judge_endpoint.Endpoint, "ask", asking)
    with pytest.raises(RunError, match="enough"):
        judge(tmp_path, url="https://judge.example/v1", model="m", out=out)
    assert KEY not in out.getvalue()


# In an evaluation


def test_without_a_judge_nothing_is_sent_and_with_one_its_scores_stand_beside_floors(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(by_text) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        plain = evaluate(run).content
        assert server.requests == [] and not (run.folder / JUDGEMENTS).exists()
        assert "judge" not in plain and not any(name.startswith("judge") for name in plain["metrics"])
        settings = [f"evaluation.judge.url={server.url}", "evaluation.judge.model=m"]
        said = io.StringIO()
        found = evaluate(run, settings, console=Console(file=said))
        asked = {request.texts["answer"] for request in server.requests}
    predictions = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert asked >= {row["prediction"] for row in predictions}
    scores = found.content["scores"]["all"]["metrics"]
    assert set(scores["judge_urgency"]) == {"adapter", "base", "constant", "difference"}
    # The same in every row, so that no interval can be drawn from the rows.
    assert (scores["judge_urgency"]["adapter"]["value"], scores["judge_urgency"]["adapter"]["low"]) == (2.0, None)
    assert found.content["metrics"]["judge_harm"]["label"] == "Judge: harm"
    assert found.content["judge"]["answers"]["constant"]["judged"] == len(found.rows)
    assert set(found.content["scores"]["critical"]["metrics"]) >= {"nll", "judge_harm"}
    # What is not the judge's is as it was.
    for stratum, part in plain["scores"].items():
        for name, value in part["metrics"].items():
            assert found.content["scores"][stratum]["metrics"][name] == value
    screen = io.StringIO()
    Console(file=screen, width=80).print(evaluation_tables(found.content))
    assert "Judge: urgency ↑" in screen.getvalue() and max(map(len, screen.getvalue().splitlines())) <= 80
    texts = [path.read_bytes() for path in run.folder.rglob("*") if path.is_file()]
    assert KEY not in said.getvalue() and not any(KEY.encode() in text for text in texts)


def test_what_cannot_judge_is_refused_before_anything_is_generated(run: Run, model_folder: Callable[..., Path]) -> None:
    refused: tuple[tuple[type[SevpeftError], str, str], ...] = (
        (ModelError, f"model={model_folder()}", "has no chat template, so it cannot judge"),
        (ModelError, f"model={run.folder / 'absent'}", "absent"),
        (RunError, "file=absent.jsonl", "cannot be replayed"),
    )
    for kind, setting, said in refused:
        with pytest.raises(kind, match=said):
            evaluate(run, [f"evaluation.judge.{setting}"])
    assert not (run.folder / "predictions.jsonl").exists()


def test_a_model_of_this_process_is_asked_and_its_nonsense_is_no_rating(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    folder = model_folder("bloom", chat_template=CHAT_TEMPLATES["chatml"])
    rubric = tmp_path / "mine.yaml"
    rubric.write_text(MINE, encoding="utf-8")
    asked = {"model": str(folder), "rubric": str(rubric), "max_tokens": 16}
    found = judge(tmp_path, {"base": ["جواب"] * 2}, rows=ROWS.take([0, 1]), **asked)
    assert found.scores == {} and [type(line["reply"]) for line in lines(tmp_path)] == [str, str]
    assert found.notes == ["Judge: 2 of 2 answers (base) got no readable verdict; its scores leave them out."]


def test_a_prompt_that_a_model_of_this_process_has_no_room_for_is_not_cut_and_rated(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    # 256 positions, and the rubric alone has more tokens.
    found = judge(tmp_path, {"base": ["جواب"] * 12}, model=str(model_folder(chat_template=CHAT_TEMPLATES["chatml"])))
    assert found.scores == {} and [line["reply"] for line in lines(tmp_path)] == [None] * 12
