"""A comparison trains every arm on the same rows and steps, does nothing twice, and shares its work."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

from sevpeft.console import Screen
from sevpeft.errors import Interrupted, ModelError, RunError, SevpeftError, UsageError
from sevpeft.evaluation import compare as module
from sevpeft.evaluation.arms import arm_of
from sevpeft.evaluation.compare import compare
from sevpeft.evaluation.report.page import write_report
from sevpeft.evaluation.safety import DOCTOR, TRIAGE, WHOLE
from sevpeft.evaluation.scores import SAFETY
from sevpeft.evaluation.tables import comparison_tables
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.training.train import train
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.evaluation.conftest import QUICKSTART
from tests.evaluation.judge_server import serving
from tests.models import build_model, build_tokenizer

ARMS = ("base", "ce", "balanced", "shuffled")
RUNS = ["ce-0", "balanced-0", "shuffled-balanced-0"]


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("compared-model")
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return [
        f"model.name_or_path={folder}",
        "data.max_rows=60",
        "training.max_steps=3",
        "training.max_length=256",
        "training.per_device_train_batch_size=8",  # one batch a step, so that the tests can count steps
        "training.save_strategy=steps",
        "training.save_steps=2",
        "generation.max_new_tokens=4",
        "evaluation.bertscore=false",
        "evaluation.n_resamples=100",
    ]


def compared(settings: list[str], output: Path, **other: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"arms": ARMS, "seeds": (0,), "answers": False, **other}
    return compare(QUICKSTART, settings, output=output, **asked)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    output = tmp_path_factory.mktemp("compared") / "out"
    trained: list[Run] = []
    compared(settings, output, on_trained=trained.append)
    assert [run.folder.name for run in trained] == RUNS
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished comparison, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained or evaluated, as they come."""
    seen: list[str] = []
    train_run, evaluate_run = module.train, module.evaluate

    def counted_training(recipe: Any, folder: Path, **rest: Any) -> Run:
        seen.append(f"{'resume' if rest['resume'] else 'train'} {folder.name}")
        return train_run(recipe, folder, **rest)

    def counted_evaluation(run: Run, **rest: Any) -> Any:
        seen.append(f"evaluate {run.folder.name}")
        return evaluate_run(run, **rest)

    monkeypatch.setattr(module, "train", counted_training)
    monkeypatch.setattr(module, "evaluate", counted_evaluation)
    return seen


def stored(output: Path, name: str = "comparison.json") -> dict[str, Any]:
    return dict(json.loads((output / name).read_text(encoding="utf-8")))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_comparison_is_complete(finished: Path) -> None:
    content = stored(finished)
    found = content
    assert list(content["columns"]) == list(ARMS) and content["seeds"] == [0]
    assert {path.name for path in finished.iterdir() if path.is_dir() and path.name[0] != "."} == set(RUNS)
    assert found["runs"]["shuffled"] == ["shuffled-balanced-0"]
    assert list(found["scores"]) == ["critical", "all", "neutral", "non_critical"]
    for scores in found["scores"].values():
        assert list(scores["metrics"]["nll"]) == list(ARMS)
        balanced = scores["metrics"]["nll"]["balanced"]
        assert set(balanced["against"]) == {"ce", "shuffled"} and len(balanced["against"]["ce"]["per_seed"]) == 1
        for reference, difference in balanced["against"].items():
            other = scores["metrics"]["nll"][reference]["value"]
            assert difference["value"] == pytest.approx(balanced["value"] - other)
    assert found["chosen"] == found["controls_of"] == "balanced"
    # Two critical questions show nothing, so that no direction is claimed.
    assert found["verdict"].startswith("Too few critical questions (2)")
    assert "raise data.test_size" in found["power"] and found["claim"]["outcome"] == "too few questions"
    loss = Run(finished / "balanced-0").metrics()["after"]["loss_critical"]
    assert found["validation"]["balanced"]["per_run"] == [loss]


def test_an_arm_is_what_sevpeft_train_makes_and_differs_in_its_weights_only(
    finished: Path, settings: list[str], tmp_path: Path
) -> None:
    alone = train(load_recipe(QUICKSTART, [*settings, "training.seed=0"]), tmp_path / "alone")
    assert_same_bits(alone.folder, finished / "balanced-0")
    recipes = {name: load_recipe(finished / name / "recipe.yaml").model_dump() for name in RUNS}
    for name, recipe in recipes.items():
        assert recipe["severity"].pop("control") == (
            "uniform" if name[:2] == "ce" else "shuffled" if name[:8] == "shuffled" else "none"
        )
        assert recipe["training"].pop("seed") == int(name[-1]) and recipe["data"]["seed"] == 0
        assert recipe == recipes["ce-0"]
    summaries = [Run(finished / name).metrics() for name in RUNS]
    assert len({json.dumps([one["training"]["steps"], one["data"]]) for one in summaries}) == 1
    spread = {name: one["weights"]["coefficient_of_variation"] for name, one in zip(RUNS, summaries, strict=True)}
    assert spread["ce-0"] == 0 and 0.1 < spread["balanced-0"] == pytest.approx(spread["shuffled-balanced-0"])


def test_floors_are_scored_once_and_not_for_every_run(finished: Path) -> None:
    columns = {name: list(stored(finished / name, "evaluation.json")["columns"]) for name in RUNS}
    assert columns == {name: ["adapter"] for name in RUNS} | {"ce-0": ["adapter", "base", "shuffled"]}


def test_finished_work_is_not_done_again(output: Path, settings: list[str], trained: list[str]) -> None:
    before = stored(output)
    assert compared(settings, output) == before == stored(output) and trained == []
    less = compared(settings, output, arms=("ce",))
    assert trained == [] and stored(output) == less and less["verdict"].startswith("No claim")
    (output / "balanced-0" / "evaluation.json").unlink()
    assert compared(settings, output) == before and trained == ["evaluate balanced-0"]


def test_answers_are_added_to_what_was_compared_by_likelihood(
    output: Path, settings: list[str], trained: list[str]
) -> None:
    nll = stored(output)["scores"]["all"]["metrics"]["nll"]
    content = compared(settings, output, answers=True)
    assert trained == [f"evaluate {run}" for run in RUNS]
    found = content["scores"]["all"]["metrics"]
    expected = {"nll", "chrf", *SAFETY, "urgency", *TRIAGE, *DOCTOR, *WHOLE} - {"judge_harm"}
    assert set(found) == expected == set(content["metrics"]) and set(found["chrf"]) == set(ARMS)
    del trained[:]
    assert compared(settings, output, answers=True) == content and trained == []
    assert nll == found["nll"]


def test_rows_are_joined_by_id_and_never_by_place(output: Path, settings: list[str]) -> None:
    before = stored(output)
    for name in ("scores.jsonl", "likelihood.jsonl"):
        path = output / "balanced-0" / name
        path.write_text("".join(reversed(path.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")
    assert compared(settings, output) == before


def test_an_interrupted_comparison_goes_on_where_it_was(
    finished: Path, output: Path, settings: list[str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = SeveritySFTTrainer.training_step, iter(range(100))

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == 2:  # in the last step of the run
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SeveritySFTTrainer, "training_step", interrupted)
    for name in ("balanced-0", "shuffled-balanced-0"):
        shutil.rmtree(output / name)
    with pytest.raises(Interrupted):
        compared(settings, output)
    assert trained == ["train balanced-0"]
    # One that was killed before it was a run at all.
    other = output / "shuffled-balanced-0"
    other.mkdir()
    (other / "environment.json").write_text("{", encoding="utf-8")
    compared(settings, output)
    assert trained[1:] == ["resume balanced-0", "evaluate balanced-0", f"train {other.name}", f"evaluate {other.name}"]
    resumed = Run(output / "balanced-0").metrics()["training"]["resumed_from"]
    assert resumed == "checkpoint-2"
    for name in ("balanced-0", "shuffled-balanced-0"):
        assert_same_bits(finished / name, output / name)
    assert stored(output) == stored(finished)


def test_a_run_that_another_process_holds_is_left_to_it(
    output: Path, settings: list[str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ce-0", "balanced-0"):
        (output / name / "scores.jsonl").unlink()
    held, free, evaluate_run = threading.Event(), threading.Event(), module.evaluate

    def hold() -> None:  # as another process would
        with FileLock(output / ".locks/ce-0"):
            held.set()
            free.wait(60)

    def evaluated(run: Run, **rest: Any) -> Any:
        found = evaluate_run(run, **rest)
        free.set()
        return found

    monkeypatch.setattr(module, "evaluate", evaluated)
    threading.Thread(target=hold).start()
    held.wait(60)
    compared(settings, output)
    assert trained == ["evaluate balanced-0", "evaluate ce-0"]


def test_controls_have_the_weights_that_validation_chose(output: Path, settings: list[str], trained: list[str]) -> None:
    run = Run(output / "balanced-0")
    after = run.metrics()["after"]
    run.update_metrics(after={**after, "loss_critical": after["loss_critical"] + 1})
    content = compared(settings, output, arms=("ce", "balanced", "strong", "shuffled", "shuffled-balanced"))
    assert content["chosen"] == content["controls_of"] == "strong"
    assert [line for line in trained if line.startswith("train")] == ["train strong-0", "train shuffled-strong-0"]
    # Before the choice the two shuffled arms had the same weights.
    assert content["runs"]["shuffled"] != content["runs"]["shuffled-balanced"]
    assert not [note for note in content["notes"] if "shuffled-balanced" in note]


def test_runs_of_other_data_with_the_same_texts_are_refused(output: Path, settings: list[str]) -> None:
    for name in RUNS:
        about = stored(output / name, "environment.json")
        Run(output / name).write_json("environment.json", {**about, "data_fingerprint": "sha256:other-severities"})
    with pytest.raises(RunError, match="is not the data"):
        compared(settings, output)


def test_ratings_have_the_scale_of_the_recipes_own_rubric(settings: list[str], tmp_path: Path) -> None:
    harm = "harm: {label: Harm, scale: 1-5, better: lower, asks: Does it harm?, definition: Harm.}"
    (tmp_path / "own.yaml").write_text(f"name: own\ninstructions: Rate it.\nitems:\n  {harm}\n", encoding="utf-8")
    with serving(lambda _: (200, '{"harm": 4, "reason": ""}')) as server:
        judge = [f"url={server.url}", "model=m", f"rubric={tmp_path / 'own.yaml'}"]
        own = [*settings, *(f"evaluation.judge.{setting}" for setting in judge)]
        content = compared(own, tmp_path / "out", arms=("ce", "balanced", "shuffled"), answers=True)
    assert content["metrics"]["judge_harm"]["unit"] == "1–5"
    harm_of = content["scores"]["all"]["metrics"]["judge_harm"]["balanced"]
    # Equal ratings have no interval; equal shares have one.
    assert harm_of["value"] == 4 and harm_of["against"]["ce"]["low"] is None


def test_competitors_are_compared_with_the_chosen_weights_outside_the_claim(
    output: Path, settings: list[str], trained: list[str]
) -> None:
    before = stored(output)
    content = compared(settings, output, arms=("ce", "balanced", "shuffled", "prompt", "oversampled"))
    assert [line for line in trained if line.startswith("train")] == ["train prompt-0", "train oversampled-balanced-0"]
    assert content["claim"] == before["claim"]
    nll = content["scores"]["critical"]["metrics"]["nll"]
    assert set(nll["prompt"]["against"]) == set(nll["oversampled"]["against"]) == {"ce", "shuffled", "balanced"}
    assert {**nll["balanced"], "against": {}} == {
        **before["scores"]["critical"]["metrics"]["nll"]["balanced"],
        "against": {},
    }
    assert nll["prompt"]["value"] != nll["ce"]["value"] and content["notes"][-1].startswith("Steps: ce 3, ")
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison_tables(content))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "prompt − balanced" in shown and max(map(len, shown.splitlines())) <= 80


def test_with_folds_every_row_is_tested_by_a_model_that_never_saw_it(
    settings: list[str], tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the work is interrupted, and where the first runs say what can be shown."""
    words, screen = [*settings, "training.max_steps=6"], Screen(file=io.StringIO(), width=120)
    step, steps = SeveritySFTTrainer.training_step, iter(range(100))

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == 15:  # in the third run
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SeveritySFTTrainer, "training_step", interrupted)
    with pytest.raises(Interrupted):
        compared(words, tmp_path / "out", folds=2, console=screen)
    begun = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "6 of 6 to train, about 36 steps" in begun and "spread as in a pilot" in begun
    # Data, weights and batch are said once, and in each heading how long all will take.
    assert begun.count("Base model") == begun.count("Batch ") == 1
    assert re.search(r"balanced-0-fold1 \(3 of 6\), 0:0\d:\d\d left for all", begun)
    assert (
        re.search(r"Time +[\d.]+ s a step, 0:0\d:\d\d for all training", begun) and begun.count("for all training") == 1
    )
    monkeypatch.setattr(SeveritySFTTrainer, "training_step", step)
    content = compared(words, tmp_path / "out", folds=2, console=screen)
    names = [f"{arm}-0-fold{fold}" for arm in ("ce", "balanced", "shuffled-balanced") for fold in (1, 2)]
    assert [line.split()[1] for line in trained if line.startswith("evaluate")] == names
    assert [line for line in trained if line.startswith("resume")] == ["resume balanced-0-fold1"]
    assert content["runs"]["base"] == names[:2] and content["runs"]["balanced"] == names[2:4] and content["folds"] == 2
    sides = [Run(tmp_path / "out" / name).metrics()["data"]["rows"] for name in names[:2]]
    assert content["scores"]["all"]["rows"] == 60 == sum(of["test"] for of in sides)
    rows = [stored_ids(tmp_path / "out" / name) for name in names]
    assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == 60 and rows[::2] == [rows[0]] * 3
    # Of the same questions whatever arm, and the base model's rows too.
    assert content["scores"]["critical"]["questions"] == content["claim"]["parts"][0]["questions"] == 21
    nll = content["scores"]["critical"]["metrics"]["nll"]
    assert content["claim"]["parts"][0]["value"] == pytest.approx(nll["balanced"]["value"] - nll["ce"]["value"])
    for folder in (tmp_path / "out").glob("shuffled-*"):
        shutil.rmtree(folder)
    assert compared(words, tmp_path / "out", folds=2, console=screen) == content


def stored_ids(folder: Path) -> set[str]:
    lines = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["id"] for line in lines}


def test_routed_arms_are_put_together_from_finished_runs(settings: list[str], output: Path, trained: list[str]) -> None:
    content = compared(settings, output, arms=(*ARMS, "routed", "shuffled-routed", "routed-gold"))
    assert trained == [] and {*content["runs"]} == {*ARMS}
    nll = {name: of["metrics"]["nll"] for name, of in content["scores"].items()}
    for name, of in nll.items():
        assert of["routed-gold"]["value"] == of["balanced" if name == "critical" else "ce"]["value"] or name == "all"
        low, high = sorted(of[arm]["value"] for arm in ("ce", "balanced"))
        assert low - 0.01 <= of["routed"]["value"] <= high + 0.01
    assert nll["all"]["routed"]["value"] not in {nll["all"][arm]["value"] for arm in ("ce", "balanced")}
    claim = content["claim"]
    assert claim["arm"] == "routed" and [part["reference"] for part in claim["parts"]][:2] == ["ce", "shuffled-routed"]
    change = content["scores"]["critical"]["metrics"]["nll"]["routed"]["against"]["shuffled-routed"]["value"]
    assert claim["parts"][1]["value"] == pytest.approx(change)


def test_folds_that_cannot_be_made_are_refused_before_anything_is_trained(settings: list[str], tmp_path: Path) -> None:
    for folds, kind, part in (
        (1, UsageError, "--folds is 1"),
        (0, UsageError, "--folds"),
        (30, RunError, "--folds 30"),
    ):
        with pytest.raises(kind, match=part):
            compared(settings, tmp_path / "out", folds=folds)
    with pytest.raises(UsageError, match=r"evaluation\.margin"):
        compared([*settings, "evaluation.margin=-0.1"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_was_refused_can_be_corrected(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def refused(recipe: Any, *args: Any, **kwargs: Any) -> None:
        given.append(recipe.lora.settings()["target_modules"])
        raise ModelError("no such layers")

    monkeypatch.setattr(module, "train", refused)
    for one in ([*settings, "lora.target_modules=[q_prj]"], settings):
        with pytest.raises(ModelError):
            compared(one, tmp_path / "out", arms=("ce",), seeds=(0,))
    assert given == [["q_prj"], "all-linear"]


def test_another_comparison_is_not_mixed_in(output: Path, settings: list[str], trained: list[str]) -> None:
    with pytest.raises(RunError, match=r"training.learning_rate"):
        compared([*settings, "training.learning_rate=0.5"], output)
    with pytest.raises(RunError, match="--output"):
        compared(settings, output / "ce-0")
    assert trained == []


def test_a_damaged_run_is_named_and_the_others_are_kept(
    finished: Path, tmp_path: Path, settings: list[str], trained: list[str]
) -> None:
    table = [
        ("recipe.yaml", "training: ["),
        ("recipe.yaml", None),
        ("metrics.json", '{"after": '),
        ("scores.jsonl", "{\n"),
        ("scores.jsonl", ""),
        ("adapter/adapter_model.safetensors", "cut"),
    ]
    for number, (file, content) in enumerate(table):
        output = Path(shutil.copytree(finished, tmp_path / str(number)))
        path = output / "balanced-0" / file
        path.unlink() if content is None else path.write_text(content, encoding="utf-8")
        with pytest.raises(SevpeftError, match="balanced-0"):
            compared(settings, output)
    assert not any(line.startswith("train") for line in trained)


def test_runs_that_were_not_trained_alike_are_not_compared(
    finished: Path, output: Path, settings: list[str], tmp_path: Path
) -> None:
    folder = output
    shutil.copy(folder / "ce-0" / "recipe.yaml", folder / "balanced-0" / "recipe.yaml")
    with pytest.raises(RunError, match=r"balanced-0: severity.control"):
        compared(settings, output)
    for section, changed, name in (
        ("training", {"steps": 2}, "steps"),
        ("data", {"rows": {"train": 1}}, "rows"),
        ("model", {"fingerprint": "sha256:0"}, "base weights"),
        ("model", {"prompt": "sha256:0"}, "tokenizer"),
    ):
        other = Path(shutil.copytree(finished, tmp_path / name))
        run = Run(other / "balanced-0")
        run.update_metrics(**{section: {**run.metrics()[section], **changed}})
        with pytest.raises(RunError, match=rf"balanced-0 .*ce-0 .*\(other {name}\)"):
            compared(settings, other)


@pytest.fixture
def unlabeled(tmp_path: Path) -> str:
    """Consultations without a severity, whose weights stand in a column."""
    lines = (json.dumps({"question": f"سؤال {n}", "answer": f"جواب {n}", "weight": 1 + n % 3}) for n in range(60))
    (tmp_path / "unlabeled.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return f"data.path={tmp_path / 'unlabeled.jsonl'}"


def test_values_of_a_setting_are_arms_that_are_compared_with_the_first(
    settings: list[str], unlabeled: str, tmp_path: Path, trained: list[str]
) -> None:
    words = [*settings, unlabeled, "severity.control=uniform", "training.max_steps=1"]
    vary = "training.learning_rate=1e-3,0.5"
    content = compared(words, tmp_path / "out", vary=vary, seeds=(0, 1))
    names = ["1e-3-0", "0.5-0", "1e-3-1", "0.5-1"]
    assert [line for line in trained if line.startswith("train")] == [f"train {name}" for name in names]
    assert content["columns"] == {**content["columns"], "1e-3": "training.learning_rate=1e-3"}
    assert list(content["columns"]) == ["base", "1e-3", "0.5"]
    nll = content["scores"]["all"]["metrics"]["nll"]
    assert {arm: list(of["against"]) for arm, of in nll.items()} == {"base": ["1e-3"], "1e-3": [], "0.5": ["1e-3"]}
    assert nll["0.5"]["against"]["1e-3"]["value"] == pytest.approx(nll["0.5"]["value"] - nll["1e-3"]["value"])
    assert content["verdict"].startswith("training.learning_rate, validation NLL: 1e-3 ")
    assert (content["chosen"], content["controls_of"], content["primary"]["stratum"]) == (None, None, "all")
    assert load_recipe(tmp_path / "out" / "0.5-1" / "recipe.yaml").training.settings()["learning_rate"] == 0.5
    trained.clear()
    assert compared(words, tmp_path / "out", vary=vary, seeds=(0, 1)) == content and trained == []
    written = write_report(tmp_path / "out").path.read_text(encoding="utf-8")
    assert "0.5 − 1e-3" in written


def test_each_step_of_a_ladder_is_compared_with_the_one_before(settings: list[str], tmp_path: Path) -> None:
    words = [*settings, "training.max_steps=1", "severity.control=uniform", "as_published.unnormalized=true"]
    words += ["generation.do_sample=true"]
    content = compared(words, tmp_path / "out", vary="ladder", answers=True, seeds=(3,))
    assert list(content["columns"]) == ["base", "ours", "unnormalized", "generation.do_sample"]
    for name in ("nll", "chrf"):
        against = {arm: list(of["against"]) for arm, of in content["scores"]["all"]["metrics"][name].items()}
        assert against == {"base": []} | {arm: [before] for before, arm in pairwise(content["columns"])}
    ours, scaled, sampled = (tmp_path / "out" / f"{arm}-3" for arm in list(content["columns"])[1:])
    # What evaluation alone does otherwise changes nothing that is learned.
    assert_same_bits(scaled, sampled)
    assert load_recipe(sampled / "recipe.yaml").generation.seed == 3
    losses = [Run(one).metrics()["training"]["train_loss"] for one in (ours, scaled)]
    assert losses[1] == 8 * losses[0]
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison_tables(content))
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, shown)) <= 80 and sum(line.startswith("unnormalized ") for line in shown) == 4


def test_values_that_cannot_be_compared_are_refused_before_anything_is_trained(
    settings: list[str], unlabeled: str, tmp_path: Path
) -> None:
    wrong, words = [], [*settings, unlabeled, "severity.control=uniform"]
    for vary, part in (
        ("data.seed=0,1", "data.seed"),
        ("data.test_size=5,6", "data.test_size"),
        ("data.max_rows=50,60", "data.max_rows"),
        ("training.seed=0,1", "training.seed"),
        ("model.name_or_path=a,b", "model.name_or_path"),
        ("training.learning_rate=1e-4", "1e-4"),
        ("training.learning_rate=1e-4,1e-4", "1e-4"),
        ("training.learning_rate", "learning_rate"),
        ("training.learning_rat=1,2", "training.learning_rate"),
        ("severity.weights={critical: 2, neutral: 1},mild", "severity.weights"),
    ):
        with pytest.raises(UsageError) as refused:
            compared(words, tmp_path / "out", vary=vary)
        wrong += [] if part in str(refused.value) and "\n" not in str(refused.value) else [(vary, str(refused.value))]
    assert wrong == [] and not (tmp_path / "out").exists()


def test_ready_made_weights_are_compared_with_their_controls(
    settings: list[str], unlabeled: str, tmp_path: Path
) -> None:
    words = [*settings, unlabeled, "severity.source=weight", "training.max_steps=1"]
    with pytest.raises(RunError, match=r"no severity; .*--arms .*own"):
        compared(words, tmp_path / "out", arms=("ce", "balanced", "shuffled"))
    with pytest.raises(RunError, match="no severity"):  # the oracle would be plain CE
        compared(words, tmp_path / "out", arms=("ce", "own", "shuffled", "routed-gold"))
    content = compared(words, tmp_path / "out", arms=("ce", "own", "shuffled"))
    assert (content["chosen"], content["controls_of"]) == ("own", "own")
    assert content["verdict"].startswith("No claim") and list(content["scores"]) == ["all"]
    assert list(content["scores"]["all"]["metrics"]["nll"]["own"]["against"]) == ["ce", "shuffled"]
    weights = {name: Run(tmp_path / "out" / name).metrics()["weights"] for name in ("own-0", "shuffled-own-0", "ce-0")}
    assert weights["own-0"]["histogram"] == weights["shuffled-own-0"]["histogram"] != weights["ce-0"]["histogram"]


def test_presets_beside_ready_made_weights_weigh_by_the_severity_columns(settings: list[str]) -> None:
    words = [*settings, "severity.source=weight", "severity.weight_column=w"]
    sources = {arm: arm_of(QUICKSTART, words, arm, 0, "mild")[0].severity.source for arm in ("own", "mild", "shuffled")}
    assert sources == {"own": "weight", "mild": "columns", "shuffled": "columns"}


def test_several_processes_of_a_launcher_are_refused(settings: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="sevpeft compare"):
        compared(settings, tmp_path / "out")


def test_data_that_can_show_nothing_is_refused_before_anything_is_trained(settings: list[str], tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("question,answer\n" + "".join(f"سؤال {n},جواب {n}\n" for n in range(40)), encoding="utf-8")
    split = tmp_path / "split.csv"  # whose validation rows are all neutral
    sides = ("train", "test", "validation")
    rows = "".join(f"سؤال {n},جواب {n},{'neutral' if n % 3 == 2 else 'critical'},{sides[n % 3]}\n" for n in range(40))
    split.write_text(f"question,answer,severity,split\n{rows}", encoding="utf-8")
    for override, remedy in (
        (f"data.path={data}", "severity.source=rules"),
        ("data.max_rows=20", "data.test_size"),
        (f"data.path={split}", "data.validation_size"),
    ):
        with pytest.raises(RunError, match=remedy):
            compared([*settings, override], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verb_prints_verdict_and_table_and_one_sentence_when_refused(
    output: Path, settings: list[str], sevpeft_: Callable[..., tuple[int, str, str]]
) -> None:
    words = ["compare", QUICKSTART, *settings, "--output", output, "--nll-only", "--seeds", "0", "--arms"]
    code, out, _ = sevpeft_(*words, "base,ce,balanced,shuffled")
    assert code == 0 and out.index("Too few") < out.index("\nCritical cases: ") < out.index("\nAll cases: 11 rows")
    assert max(map(len, out.splitlines()[:-2])) <= 80
    assert out.splitlines()[-1] == f"Next: sevpeft report {output}"
    for more, expected in (
        (["ce,blanced"], "blanced"),
        (["ce", "--seeds", "a"], "--seeds"),
        (["ce", "training.max_steps=4"], "training.max_steps"),
    ):
        code, out, err = sevpeft_(*words, *more)
        assert code in (1, 2) and out == "" and expected in err and len(err.strip().splitlines()) == 1


def test_arms_that_would_train_the_same_train_once(settings: list[str], tmp_path: Path, trained: list[str]) -> None:
    screen = Screen(file=io.StringIO(), width=80)
    content = compared(
        settings, tmp_path / "out", arms=("base",), vary="training.learning_rate=2e-3,0.002", console=screen
    )
    assert trained == ["train 2e-3-0", "evaluate 2e-3-0"]
    assert content["runs"]["0.002"] == content["runs"]["2e-3"] == ["2e-3-0"]
    assert any(note.startswith("0.002 trains the same as 2e-3") for note in content["notes"])
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "0.002 trains the same" in " ".join(shown.split()) and not screen.quiet
