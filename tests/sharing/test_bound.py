"""A run is bound to its tokenizer and chat template: where the base's have changed, its own copy speaks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sevpeft.errors import ModelError, RunError
from sevpeft.evaluation.evaluate import evaluate
from sevpeft.modeling.loading import resolve_model
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.chat import Chat
from sevpeft.sharing.merge import merge
from sevpeft.training.train import train
from tests.evaluation.conftest import QUICKSTART
from tests.modeling.test_prompts import DATED, with_tokens
from tests.models import build_model
from tests.training.test_train import SPLIT

MESSAGES = [{"role": "user", "content": "عندي صداع"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained on a base model whose template writes the date and whose end of turn nothing flags as special."""
    folder = tmp_path_factory.mktemp("base")
    build_model("llama", vocab_size=640).save_pretrained(folder)
    template = DATED.replace("im_", "turn_")
    with_tokens("<|turn_start|>", "<|turn_end|>", special=False, template=template).save_pretrained(folder)
    words = [f"model.name_or_path={folder}", "data.max_rows=60", "training.max_steps=2", "training.max_length=256"]
    words += ["prompt.chat=true", "training.eval_strategy=no", "evaluation.n_resamples=100", *SPLIT]
    return train(load_recipe(QUICKSTART, words), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of it, with a base of its own, which is damaged by each test."""
    run, recipe = Run(Path(shutil.copytree(trained.folder, tmp_path / "run"))), trained.folder / "recipe.yaml"
    base = shutil.copytree(load_recipe(recipe).model.name_or_path, tmp_path / "base")
    text = recipe.read_text(encoding="utf-8").replace(load_recipe(recipe).model.name_or_path, str(base))
    (run.folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return run


def _another_template(base: Path) -> None:
    (base / "chat_template.jinja").write_text("كن موجزا. " + DATED.replace("im_", "turn_"), encoding="utf-8")


def _no_template(base: Path) -> None:
    (base / "chat_template.jinja").unlink()


def _other_ids(base: Path) -> None:
    path = base / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    one, other = list(vocabulary)[400:402]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(state), encoding="utf-8")


def _no_tokenizer(base: Path) -> None:
    for path in base.glob("token*"):
        path.unlink()


CHANGES = (_another_template, _no_template, _other_ids, _no_tokenizer)


def recipe_of(run: Run) -> Any:
    return load_recipe(run.folder / "recipe.yaml")


def base_of(run: Run) -> Path:
    return Path(recipe_of(run).model.name_or_path)


def test_the_fingerprint_and_a_copy_of_the_tokenizer_are_stored(trained: Run) -> None:
    prompt = resolve_model(recipe_of(trained)).prompt
    assert trained.metrics()["model"]["prompt"] == prompt.fingerprint()
    assert prompt.tokenizer.convert_ids_to_tokens(prompt.end_id) == "<|turn_end|>"
    copies = [folder / "tokenizer.json" for folder in (trained.tokenizer, trained.adapter)]
    assert copies[0].read_bytes() == copies[1].read_bytes()
    assert recipe_of(trained).prompt.date == "2024-07-26"


def test_a_changed_base_is_named_and_the_runs_own_copy_used(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    expected, base = resolve_model(recipe_of(run), run).prompt, base_of(run)
    assert capfd.readouterr().err == ""
    kept = shutil.copytree(base, base.parent / "kept")
    for change in CHANGES:
        change(base)
        prompt = resolve_model(recipe_of(run), run).prompt
        err = capfd.readouterr().err
        assert f"chat template of {base} has changed" in err and str(run.tokenizer) in err, change.__name__
        assert prompt.fingerprint() == expected.fingerprint() and prompt.end_id == expected.end_id, change.__name__
        shutil.rmtree(base)
        shutil.copytree(kept, base)
    _another_template(base)
    shutil.rmtree(run.tokenizer)
    with pytest.raises(ModelError, match=r"restore .*tokenizer"):
        resolve_model(recipe_of(run), run)


def test_every_verb_goes_on_with_the_copy(run: Run, trained: Run, tmp_path: Path, capfd: Any) -> None:
    figures: Callable[[Run], Any] = lambda of: evaluate(of, limit=4, arms=["adapter"], answers=False)["scores"]["all"]  # noqa: E731
    before = figures(Run(Path(shutil.copytree(run.folder, tmp_path / "before"))))
    _another_template(base_of(run))
    assert figures(run)["metrics"]["nll"] == before["metrics"]["nll"]
    ids = Chat(run).prompt.prompt_ids(["عندي صداع"])[0]
    merge(run, tmp_path / "merged")
    for folder in (run.adapter, tmp_path / "merged"):
        saved = AutoTokenizer.from_pretrained(folder)
        assert saved.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False) == ids, folder
        assert saved.decode(ids).startswith("26 Jul 2024 <|turn_start|>user"), folder
    capfd.readouterr()
    # A run that was killed before its first checkpoint, and one that was killed when its adapter was written.
    killed = Run(Path(shutil.copytree(run.folder, tmp_path / "killed")))
    shutil.rmtree(killed.adapter)
    train(recipe_of(killed), killed.folder, resume=True)
    assert "has changed since the training" in capfd.readouterr().err
    for name in ("adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"):
        assert (killed.adapter / name).read_bytes() == (trained.adapter / name).read_bytes(), name


def test_cached_likelihoods_are_those_of_one_tokenizer(run: Run) -> None:
    evaluate(run, limit=4, arms=["adapter"], answers=False)
    metrics = run.metrics()
    run.update_metrics(model={**metrics["model"], "prompt": "sha256:of-others"})
    with pytest.raises(RunError, match=r"likelihood\.jsonl .*tokens_of_prompt"):
        evaluate(run, limit=4, arms=["adapter"], answers=False)
    run.update_metrics(model={name: of for name, of in metrics["model"].items() if name != "prompt"})
    with pytest.raises(RunError, match="tokens_of_prompt"):
        evaluate(run, limit=4, arms=["adapter"], answers=False)


def test_a_run_from_before_there_were_fingerprints_uses_its_base_as_it_is(run: Run, capfd: Any) -> None:
    model = run.metrics()["model"]
    run.update_metrics(model={name: of for name, of in model.items() if name != "prompt"})
    shutil.rmtree(run.tokenizer)
    _another_template(base_of(run))
    assert resolve_model(recipe_of(run), run).prompt.text("ألم").startswith("كن موجزا. ")
    assert capfd.readouterr().err == ""
