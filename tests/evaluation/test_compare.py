"""A comparison trains every arm on the same rows and steps, does nothing twice, and shares its work."""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

from sevpeft.cli import main
from sevpeft.errors import Interrupted, ModelError, RunError, SevpeftError, UsageError
from sevpeft.evaluation import compare as module
from sevpeft.evaluation.arms import parse_arms, parse_seeds
from sevpeft.evaluation.compare import Comparison
from sevpeft.evaluation.scores import SAFETY
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.training.train import train
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.conftest import build_model, build_tokenizer
from tests.evaluation.conftest import QUICKSTART
from tests.training.children import exit_codes, start

ARMS, SEEDS = ("base", "ce", "balanced", "shuffled"), (0, 1)
RUNS = ["ce-0", "balanced-0", "ce-1", "balanced-1", "shuffled-balanced-0", "shuffled-balanced-1"]


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


def comparison(settings: list[str], output: Path, **other: Any) -> Comparison:
    asked: dict[str, Any] = {"arms": ARMS, "seeds": SEEDS, "answers": False, **other}
    return Comparison([QUICKSTART], settings, output=output, **asked)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    output = tmp_path_factory.mktemp("compared") / "out"
    one = comparison(settings, output)
    one.run()
    assert one.trained == 6
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
    found = content["recipes"]["quickstart"]
    assert list(content["arms"]) == list(ARMS) and content["seeds"] == [0, 1]
    assert {path.name for path in (finished / "quickstart").iterdir() if path.name[0] != "."} == {
        *RUNS,
        "common-recipe.yaml",
    }
    assert found["runs"]["shuffled"] == ["quickstart/shuffled-balanced-0", "quickstart/shuffled-balanced-1"]
    assert list(found["scores"]) == ["critical", "all", "neutral", "non_critical"]
    for scores in found["scores"].values():
        assert list(scores["metrics"]["nll"]) == list(ARMS)
        balanced = scores["metrics"]["nll"]["balanced"]
        assert set(balanced["against"]) == {"ce", "shuffled"} and len(balanced["against"]["ce"]["per_seed"]) == 2
        for reference, difference in balanced["against"].items():
            other = scores["metrics"]["nll"][reference]["value"]
            assert difference["value"] == pytest.approx(balanced["value"] - other)
    assert found["chosen"] == found["controls_of"] == "balanced" and found["verdict"].startswith("balanced ")
    assert content["verdict"] == found["verdict"] and "raise data.test_size" in found["power"]
    losses = [Run(finished / "quickstart" / f"balanced-{seed}").metrics()["after"]["loss_critical"] for seed in SEEDS]
    assert found["validation"]["balanced"]["per_seed"] == losses


def test_an_arm_is_what_sevpeft_train_makes_and_differs_in_its_weights_only(
    finished: Path, settings: list[str], tmp_path: Path
) -> None:
    alone = train(load_recipe(QUICKSTART, [*settings, "training.seed=1"]), tmp_path / "alone")
    assert_same_bits(alone.folder, finished / "quickstart" / "balanced-1")
    recipes = {name: load_recipe(finished / "quickstart" / name / "recipe.yaml").model_dump() for name in RUNS}
    for name, recipe in recipes.items():
        assert recipe["severity"].pop("control") == (
            "uniform" if name[:2] == "ce" else "shuffled" if name[:8] == "shuffled" else "none"
        )
        assert recipe["training"].pop("seed") == int(name[-1]) and recipe["data"]["seed"] == 0
        assert recipe == recipes["ce-0"]
    summaries = [Run(finished / "quickstart" / name).metrics() for name in RUNS]
    assert len({json.dumps([one["training"]["steps"], one["data"]]) for one in summaries}) == 1
    spread = {name: one["weights"]["coefficient_of_variation"] for name, one in zip(RUNS, summaries, strict=True)}
    assert spread["ce-0"] == 0 and 0.1 < spread["balanced-0"] == pytest.approx(spread["shuffled-balanced-0"])


def test_weights_of_one_are_plain_cross_entropy(finished: Path, settings: list[str], tmp_path: Path) -> None:
    ones = [*settings, "severity.weights={non_critical: 1, neutral: 1, critical: 1}"]
    content = comparison(ones, tmp_path / "out", arms=("own",), seeds=(0,)).run()
    assert_same_bits(finished / "quickstart/ce-0", tmp_path / "out/quickstart/own-0")
    assert content["verdict"] == "No verdict: the arms hold neither plain CE nor shuffled weights."


def test_floors_are_scored_once_and_not_for_every_run(finished: Path) -> None:
    columns = {name: list(stored(finished / "quickstart" / name, "evaluation.json")["columns"]) for name in RUNS}
    assert columns == {name: ["adapter"] for name in RUNS} | {"ce-0": ["adapter", "base", "shuffled"]}


def test_what_is_done_is_not_done_again(output: Path, settings: list[str], trained: list[str]) -> None:
    before = stored(output)
    again = comparison(settings, output)
    assert again.run() == before == stored(output) and trained == [] and again.trained == 0
    more = comparison(settings, output, arms=("ce", "balanced"), seeds=(0, 1, 2)).run()
    assert trained == [f"{verb} {run}" for run in ("ce-2", "balanced-2") for verb in ("train", "evaluate")]
    assert more["seeds"] == [0, 1, 2] and stored(output) == more
    # Less does not replace more.
    comparison(settings, output, arms=("ce", "balanced")).run()
    assert stored(output) == more


def test_answers_are_added_to_what_was_compared_by_likelihood(
    output: Path, settings: list[str], trained: list[str]
) -> None:
    content = comparison(settings, output, answers=True).run()
    assert trained == [f"evaluate {run}" for run in RUNS]
    found = content["recipes"]["quickstart"]["scores"]["all"]["metrics"]
    assert set(found) == {"nll", "chrf", *SAFETY} - {"judge_harm"} and set(found["chrf"]) == set(ARMS)
    nll = stored(output)["recipes"]["quickstart"]["scores"]["all"]["metrics"]["nll"]
    del trained[:]
    assert comparison(settings, output, answers=True).run() == content and trained == []
    assert nll == found["nll"]


def test_rows_are_joined_by_id_and_never_by_place(output: Path, settings: list[str]) -> None:
    before = stored(output)
    for name in ("scores.jsonl", "likelihood.jsonl"):
        path = output / "quickstart" / "balanced-1" / name
        path.write_text("".join(reversed(path.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")
    assert comparison(settings, output).run() == before


def test_an_interrupted_comparison_goes_on_where_it_was(
    finished: Path, output: Path, settings: list[str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = SeveritySFTTrainer.training_step, iter(range(100))

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == 2:  # in the last step of the run
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SeveritySFTTrainer, "training_step", interrupted)
    for name in ("balanced-0", "ce-1"):
        shutil.rmtree(output / "quickstart" / name)
    arms = ("base", "ce", "balanced")
    with pytest.raises(Interrupted, match="the same command goes on from them"):
        comparison(settings, output, arms=arms).run()
    assert trained == ["train balanced-0"]
    # One that was killed before it was a run at all.
    (output / "quickstart/ce-1").mkdir()
    (output / "quickstart/ce-1/environment.json").write_text("{", encoding="utf-8")
    comparison(settings, output).run()
    assert trained[1:] == ["resume balanced-0", "evaluate balanced-0", "train ce-1", "evaluate ce-1"]
    resumed = Run(output / "quickstart/balanced-0").metrics()["training"]["resumed_from"]
    assert resumed == "checkpoint-2"
    for name in ("balanced-0", "ce-1"):
        assert_same_bits(finished / "quickstart" / name, output / "quickstart" / name)
    assert stored(output) == stored(finished)


def test_a_kill_between_the_last_step_and_the_adapter_costs_no_step_more(
    finished: Path, output: Path, settings: list[str], trained: list[str]
) -> None:
    shutil.rmtree(output / "quickstart/balanced-1/adapter")
    comparison(settings, output).run()
    assert trained[0] == "resume balanced-1"
    assert Run(output / "quickstart/balanced-1").metrics()["training"]["steps"] == 3
    assert_same_bits(finished / "quickstart/balanced-1", output / "quickstart/balanced-1")


def test_a_run_that_another_process_holds_is_left_to_it(
    output: Path, settings: list[str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ce-0", "ce-1"):
        (output / "quickstart" / name / "scores.jsonl").unlink()
    held = FileLock(output / "quickstart/.locks/ce-0")
    held.acquire()
    monkeypatch.setattr(module.time, "sleep", lambda _: held.release())
    comparison(settings, output).run()
    assert trained == ["evaluate ce-1", "evaluate ce-0"]


def compare_elsewhere(settings: list[str], output: Path) -> None:
    there = comparison(settings, output, arms=("ce", "balanced"), seeds=(0,))
    found = {"content": there.run(), "trained": there.trained}
    output.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")


def test_two_processes_share_the_runs(finished: Path, settings: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    others = start(compare_elsewhere, settings, output, str(tmp_path / "cache"))
    while others[0].is_alive() and not (output / "quickstart/.locks/ce-0").exists():
        time.sleep(0.05)
    said = io.StringIO()
    here = comparison(settings, output, arms=("ce", "balanced"), seeds=(0,), console=Console(file=said))
    content = here.run()
    assert exit_codes(others) == [0]
    there = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert here.trained + there["trained"] == 2
    assert "ce-0 (1 of 2): another process is at work on it." in said.getvalue()
    assert there["content"] == content == stored(output)
    for name in RUNS[:2]:
        assert_same_bits(finished / "quickstart" / name, output / "quickstart" / name)


def test_controls_have_the_weights_that_validation_chose_unless_told(
    output: Path, settings: list[str], trained: list[str]
) -> None:
    arms = ("ce", "balanced", "strong", "shuffled")
    run = Run(output / "quickstart" / "balanced-0")
    after = run.metrics()["after"]
    run.update_metrics(after={**after, "loss_critical": after["loss_critical"] + 1})
    content = comparison(settings, output, arms=arms, seeds=(0,)).run()["recipes"]["quickstart"]
    assert content["chosen"] == content["controls_of"] == "strong"
    assert [line for line in trained if line.startswith("train")] == ["train strong-0", "train shuffled-strong-0"]
    content = comparison(settings, output, arms=arms, seeds=(0,), controls_of="balanced").run()["recipes"]["quickstart"]
    assert content["runs"]["shuffled"] == ["quickstart/shuffled-balanced-0"]
    assert any("validation chose strong: its own controls come with" in note for note in content["notes"])


def test_several_recipes_give_one_table(output: Path, settings: list[str], tmp_path: Path, trained: list[str]) -> None:
    other = tmp_path / "other.yaml"
    shutil.copy(QUICKSTART, other)
    shutil.copytree(output / "quickstart", output / "other")
    asked: dict[str, Any] = {"arms": ("ce", "balanced"), "seeds": (0,), "answers": False}
    content = Comparison([QUICKSTART, other], settings, output=output, **asked).run()
    assert list(content["recipes"]) == ["quickstart", "other"] and content["verdict"].count(": balanced ") == 2
    assert trained == []
    with pytest.raises(UsageError, match="Two recipes are called quickstart"):
        Comparison([QUICKSTART, QUICKSTART], settings, output=output, **asked)


def test_a_recipe_that_was_refused_can_be_corrected(
    settings: list[str], tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise ModelError("no such layers")

    monkeypatch.setattr(module, "train", refused)
    wrong = [*settings, "lora.target_modules=[q_prj]"]
    with pytest.raises(ModelError):
        comparison(wrong, tmp_path / "out").run()
    corrected: dict[str, Any] = {"arms": ("ce",), "seeds": (0,), "output": tmp_path / "out"}
    with (
        FileLock(tmp_path / "out" / "quickstart" / ".locks" / "ce-0"),
        pytest.raises(RunError, match="another recipe: lora"),
    ):
        Comparison([QUICKSTART], settings, **corrected)
    Comparison([QUICKSTART], settings, **corrected)
    assert "all-linear" in (tmp_path / "out" / "quickstart" / "common-recipe.yaml").read_text(encoding="utf-8")
    (tmp_path / "out" / "quickstart" / "ce-0").mkdir()
    with pytest.raises(RunError, match="another recipe: lora"):
        Comparison([QUICKSTART], wrong, **corrected)


def test_another_comparison_is_not_mixed_in(output: Path, settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"another recipe: training.learning_rate is 0.5 and was 0.002. Compare with"):
        comparison([*settings, "training.learning_rate=0.5"], output)
    with pytest.raises(RunError, match="holds a run; give --output a folder of its own"):
        comparison(settings, output / "quickstart" / "ce-0")
    (tmp_path / "full" / "quickstart").mkdir(parents=True)
    (tmp_path / "full" / "quickstart" / "thesis.txt").touch()
    with pytest.raises(RunError, match="holds something else than a comparison"):
        comparison(settings, tmp_path / "full")
    (output / "quickstart" / "common-recipe.yaml").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="cannot be read, so its runs belong to nothing"):
        comparison(settings, output)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("recipe.yaml", "training: [", "is damaged, so it can be neither continued nor read"),
        ("recipe.yaml", None, "is damaged, so it can be neither continued nor read"),
        ("metrics.json", '{"after": ', "is damaged, so it can be neither continued nor read"),
        ("scores.jsonl", "{", r"scores.jsonl is damaged; move it away and run this again"),
        ("scores.jsonl", "", r"not of the same rows"),
        ("adapter/adapter_model.safetensors", "cut", r"was made from something else: adapter is another"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_kept(
    output: Path, settings: list[str], file: str, content: str | None, expected: str, trained: list[str]
) -> None:
    path = output / "quickstart" / "balanced-1" / file
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    with pytest.raises(Exception, match=expected) as refused:
        comparison(settings, output).run()
    assert isinstance(refused.value, SevpeftError) and not any(line.startswith("train") for line in trained)


def test_a_run_that_is_moved_away_is_trained_anew_alone(output: Path, settings: list[str], trained: list[str]) -> None:
    before = stored(output)
    shutil.rmtree(output / "quickstart" / "balanced-1")
    assert comparison(settings, output).run() == before
    assert trained == ["train balanced-1", "evaluate balanced-1"]


def test_a_run_of_another_recipe_is_not_taken_for_the_arm(output: Path, settings: list[str]) -> None:
    folder = output / "quickstart"
    shutil.copy(folder / "ce-1" / "recipe.yaml", folder / "balanced-1" / "recipe.yaml")
    with pytest.raises(
        RunError, match=r"balanced-1 was trained by another recipe: severity.control is \"none\" and was"
    ):
        comparison(settings, output).run()


def test_runs_of_other_steps_are_not_compared(output: Path, settings: list[str]) -> None:
    run = Run(output / "quickstart" / "ce-1")
    run.update_metrics(training={**run.metrics()["training"], "steps": 2})
    with pytest.raises(RunError, match=r"ce-1 was not trained as .*ce-0 was \(other steps\)"):
        comparison(settings, output).run()


def test_arms_and_seeds_are_read_or_refused() -> None:
    assert parse_arms("base, ce ,balanced") == ("base", "ce", "balanced") and parse_seeds("0,7") == (0, 7)
    for text, expected in (("ce,blanced", "no arm called blanced"), ("ce,ce", "stands twice"), ("base", "nothing to")):
        with pytest.raises(UsageError, match=expected):
            parse_arms(text)
    for text, expected in (("0,x", "whole numbers"), ("", "whole"), ("-1", "whole"), ("1,1", "A seed stands twice")):
        with pytest.raises(UsageError, match=expected):
            parse_seeds(text)


def test_recipes_whose_arms_would_differ_in_more_than_weights_are_refused(settings: list[str], tmp_path: Path) -> None:
    for override, expected in (
        ("severity.control=shuffled", "trains a control itself"),
        ("training.load_best_model_at_end=true", "another number of steps"),
    ):
        with pytest.raises(UsageError, match=expected):
            comparison([*settings, override], tmp_path / "out")
    with pytest.raises(UsageError, match="are balanced, which is an arm already"):
        comparison(settings, tmp_path / "out", arms=("own", "balanced"))
    data = tmp_path / "data.csv"
    data.write_text("question,answer\n" + "".join(f"سؤال {n},جواب {n}\n" for n in range(40)), encoding="utf-8")
    with pytest.raises(RunError, match="has no severity, so that the arms would have nothing to weight by"):
        comparison([*settings, f"data.path={data}"], tmp_path / "out")
    with pytest.raises(RunError, match="too few to compare arms on"):
        comparison([*settings, "data.max_rows=20"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_the_verb_prints_verdict_and_table_and_one_sentence_when_refused(
    output: Path, settings: list[str], sevpeft_: Callable[..., tuple[int, str, str]]
) -> None:
    words = ["compare", QUICKSTART, *settings, "--output", output, "--nll-only", "--seeds", "0,1", "--arms"]
    code, out, _ = sevpeft_(*words, "base,ce,balanced,shuffled")
    assert code == 0 and out.index("balanced ") < out.index("\ncritical: ") < out.index("\nall: 11 rows")
    assert max(map(len, out.splitlines()[:-2])) <= 80
    assert out.splitlines()[-1] == f"Next: sevpeft report {output}"
    for more, expected in (
        (["ce,blanced"], "There is no arm called blanced"),
        (["ce", "--seeds", "a"], "write whole numbers"),
        (["ce", "--controls-of", "ce"], "--controls-of is 'ce'"),
        (["ce", "training.max_steps=4"], "training.max_steps is 4 and was 3"),
    ):
        code, out, err = sevpeft_(*words, *more)
        assert code in (1, 2) and out == "" and expected in err and len(err.strip().splitlines()) == 1
