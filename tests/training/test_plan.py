"""A plan is what the training then does: the same rows, the same weights, the same number of steps."""

from __future__ import annotations

import html
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import Gemma3TextConfig, GPT2Config

from sevpeft.data.read import load_consultations
from sevpeft.errors import DataError, ModelError, UnknownModelError
from sevpeft.evaluation.report.page import rows_text
from sevpeft.modeling.loading import learned_positions, resolve_model
from sevpeft.recipe import load_recipe
from sevpeft.severity.source import EVIDENCE
from sevpeft.training import plan as module
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import prepare
from sevpeft.training.plan import plan, training_rows
from sevpeft.training.screen import show_plan
from sevpeft.training.train import train
from tests.models import build_tokenizer

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def _memory_is_planned_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes seconds, and changes nothing of data, weights and steps."""

    def unknown(recipe: object, vram: object) -> None:
        raise UnknownModelError("no numbers")

    monkeypatch.setattr(module, "fitting", unknown)


def shown(found: object) -> str:
    console = Console(file=io.StringIO(), width=80)
    show_plan(found, console)  # type: ignore[arg-type]
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_training_takes_the_planned_steps_on_the_planned_weights(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = [f"model.name_or_path={model_folder()}", "training.max_length=160"]
    for number, settings in enumerate(
        (
            ["data.max_rows=24", "training.gradient_accumulation_steps=4", "training.num_train_epochs=2"],
            ["data.max_rows=24", "training.packing=true", "training.num_train_epochs=1"],
            ["data.max_rows=27", "training.dataloader_drop_last=true", "training.per_device_train_batch_size=4"],
        )
    ):
        recipe = load_recipe(QUICKSTART, [*base, *settings])
        found = plan(recipe)
        metrics = train(recipe, tmp_path / f"run-{number}").metrics()
        assert found.steps == metrics["training"]["steps"], settings
        assert json.loads(json.dumps(found.as_dict()["weights"])) == metrics["weights"]
        assert json.loads(json.dumps(found.data)) == metrics["data"]
        assert found.unknown is None


def test_the_rows_that_are_shown_are_those_of_the_trainer(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer, folder = build_tokenizer(), model_folder()
    base = [f"model.name_or_path={folder}", "data.max_rows=36", "training.max_length=150", "severity.weights=strong"]
    for settings in (["severity.source=rules"], ["training.packing=true", "severity.normalize=mean"]):
        recipe = load_recipe(QUICKSTART, [*base, *settings])
        rows = training_rows(recipe, 3)
        prepared = prepare(recipe, resolve_model(recipe).prompt, tmp_path)
        trained = {
            tuple(row["input_ids"]): (row["labels"], row["token_weights"])
            for block in prepared.train
            for row in documents(block)
        }
        assert [row["severity"] for row in rows][::3] == ["critical", "neutral", "non_critical"]
        for row in rows:
            prompt, answer = row["pieces"]
            text = prompt["text"] + answer["text"]
            ids = next(ids for ids in trained if tokenizer.decode(ids) == text)
            labels, weights = trained[ids]
            assert (prompt["learned"], answer["learned"]) == (False, True)
            assert answer["tokens"] == sum(label != IGNORED for label in labels)
            assert prompt["tokens"] + answer["tokens"] == len(ids) and answer["text"].endswith(tokenizer.eos_token)
            assert row["weight"] == max(weights)
            if row["lost_words"]:
                question = prompt["text"].partition(": ")[2].partition("\nالجواب")[0]
                assert f"{question} {row['cut']}".split() == question_of(row["row"]).split()
        assert any(row["lost_words"] for row in rows)
        assert all(row["words"] for row in rows[:3]) == ("severity.source=rules" in settings)
    text = rows_text(rows)
    assert text.count("⟦") == text.count("⟧") == 9
    assert all(f"⟦{row['pieces'][1]['text']}⟧" in text and f"{row['cut']}\n" in text for row in rows)
    page = rows_text(rows, "rows.html.jinja", **vars(plan(recipe)))
    assert page.count('<mark class="learned">') == 9 + 1 and "Confidential" in page and "src=" not in page
    assert all(html.escape(row["pieces"][1]["text"], quote=False) in page for row in rows)


def documents(block: dict[str, Any]) -> list[dict[str, Any]]:
    ends = [*itertools.accumulate(block.get("seq_lengths") or [len(block["input_ids"])])]
    return [
        {name: block[name][start:end] for name in ("input_ids", "labels", "token_weights")}
        for start, end in itertools.pairwise([0, *ends])
    ]


def question_of(row: int) -> str:
    return str(next(one["question"] for one in load_consultations("builtin:consultations").rows if one["row"] == row))


def test_a_row_says_where_its_weight_is_from(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    same = {"answer": "راجع الطوارئ", "severity": "critical", EVIDENCE: "critical: نزيف"}
    rows = [{"question": f"عندي نزيف شديد منذ {n} ايام", **same} for n in range(20)]
    data = tmp_path / "annotated.jsonl"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    base = [f"model.name_or_path={model_folder()}", f"data.path={data}", "training.max_length=100"]
    found = training_rows(load_recipe(QUICKSTART, base), 1)
    names = ("words", "probabilities", "weight")
    assert [[row[name] for name in names] for row in found] == [[same[EVIDENCE], [0, 0, 1], 1.5]]
    (row,) = training_rows(load_recipe(QUICKSTART, [*base, "severity.reduction=examples"]), 1)
    assert row["weight"] == pytest.approx(1.5, rel=1e-5), "of the consultation, not of a token"
    data.write_text("question,answer\n" + "\n".join(f"سؤال {n} عن شيء,جواب" for n in range(20)), encoding="utf-8")
    data.rename(tmp_path / "plain.csv")
    plain = [base[0], f"data.path={tmp_path / 'plain.csv'}", "severity.control=uniform"]
    (row,) = training_rows(load_recipe(QUICKSTART, plain), 1)
    assert (row["severity"], row["probabilities"], row["words"], row["weight"]) == ("unknown", [], None, 1.0)
    with pytest.raises(UnknownModelError, match="nobody/has-this"):
        training_rows(load_recipe(QUICKSTART, ["model.name_or_path=nobody/has-this"]), 1)


def test_without_the_tokenizer_data_and_weights_are_still_planned() -> None:
    recipe = load_recipe(QUICKSTART, ["model.name_or_path=nobody/has-this"])
    found = plan(recipe)
    assert found.data["encoding"] == {} and found.data["rows"]["train"] == 300
    assert found.weights.effective_sample_size == pytest.approx(300 * 6 / 7)
    assert "nobody/has-this" in str(found.unknown)
    assert found.steps == 114
    assert plan(load_recipe(QUICKSTART, ["model.name_or_path=nobody/has-this", "training.packing=true"])).steps is None


def test_what_training_would_refuse_of_the_adapter_is_refused_by_the_plan(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    recipe = load_recipe(QUICKSTART, [f"model.name_or_path={model_folder()}", "lora.target_modules=[q_prj]"])
    with pytest.raises(ModelError, match=r"q_prj.*q_proj"):
        plan(recipe)


def test_with_everything_at_hand_memory_and_time_are_planned_too(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    base = [f"model.name_or_path={model_folder()}", "data.max_rows=30", "training.max_length=192"]
    base += ["training.gradient_checkpointing=false"]  # else a small GPU computes more
    recipe = load_recipe(QUICKSTART, base)
    found, small = plan(recipe, vram=8), plan(recipe, vram=0.1)
    assert found.fitting is not None and small.fitting is not None and found.epoch_seconds and found.tokens
    assert found.fitting.fits and not small.fitting.fits and found.memory_unknown is None
    assert "fits in 8 GB" in shown(found) and f"an epoch of {found.tokens:,} tokens" in shown(found)


def test_a_prompt_that_training_would_refuse_is_refused(model_folder: Callable[..., Path]) -> None:
    recipe = load_recipe(QUICKSTART, [f"model.name_or_path={model_folder()}", "prompt.chat=true"])
    with pytest.raises(ModelError, match=r"chat.template"):
        plan(recipe)


def test_memory_that_cannot_be_planned_is_told_with_the_reason(model_folder: Callable[..., Path]) -> None:
    found = plan(load_recipe(QUICKSTART, [f"model.name_or_path={model_folder()}"]))
    assert found.memory_unknown == found.as_dict()["memory_unknown"] == "no numbers"
    assert "Unknown           memory and GPUs: no numbers" in shown(found)


def test_a_row_longer_than_the_table_of_positions_is_refused(model_folder: Callable[..., Path]) -> None:
    words = [f"model.name_or_path={model_folder('gpt2')}"]
    with pytest.raises(DataError, match=r"training\.max_length=256\.$"):
        plan(load_recipe(QUICKSTART, words))
    assert plan(load_recipe(QUICKSTART, [*words, "training.max_length=256"])).tokens


def test_a_row_beyond_the_positions_of_the_pretraining_is_named(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("qwen2")
    words = [f"model.name_or_path={folder}", "training.max_length=512"]
    found, small = (plan(load_recipe(QUICKSTART, [*words, *more])) for more in ([], ["training.max_length=256"]))
    assert found.data["pretrained_positions"] == 256 < found.data["encoding"]["train"]["longest"]
    assert "training.max_length=256" in " ".join(shown(found).split())
    assert "pretrained_positions" not in small.data and "training.max_length" not in shown(small)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
    (folder / "config.json").write_text(json.dumps(config | scaled), encoding="utf-8")
    assert "pretrained_positions" not in plan(load_recipe(QUICKSTART, words)).data


def test_positions_of_the_pretraining_are_known_for_every_kind_of_layer() -> None:
    both = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
    mixed = both | {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    for rope, positions in ((both, 256), (mixed, None)):
        config = Gemma3TextConfig(rope_parameters=rope, max_position_embeddings=256)
        assert (learned_positions(config), learned_positions(config, rotary=True)) == (None, positions)
    assert learned_positions(GPT2Config(n_positions=256), rotary=True) is None


def test_without_the_tokenizer_memory_is_planned_and_time_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    config = "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, vocab_size: 512}"
    words = ["model.name_or_path=nobody/has-this", f"about.config={config}", "training.max_length=100"]
    found = plan(load_recipe(QUICKSTART, words))
    assert found.fitting is not None and found.tokens is None and found.epoch_seconds is None
    assert "nobody/has-this" in str(found.unknown) and "Time" not in shown(found)


def test_the_screen_shows_the_weights_and_warns_when_they_are_all_the_same(model_folder: Callable[..., Path]) -> None:
    base = [f"model.name_or_path={model_folder()}"]
    text = shown(plan(load_recipe(QUICKSTART, base)))
    assert "effective sample size 257 of 300 (86%)" in text and text.count("█") > 30 and "Warning" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    same = ["severity.weights={non_critical: 1, neutral: 1, critical: 1.01}"]
    assert "severity.temperature=" in " ".join(shown(plan(load_recipe(QUICKSTART, base + same))).split())
    plain = shown(plan(load_recipe(QUICKSTART, [*base, "severity.control=uniform"])))
    assert "plain cross-entropy" in plain and "Warning" not in plain
