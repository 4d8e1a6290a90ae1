"""A run answers with the prompt that it was trained with, and a card says what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from sevpeft.errors import ModelError, RunError
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.card import write_card
from sevpeft.sharing.chat import Chat
from sevpeft.training.train import train

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"


@pytest.fixture
def run(tmp_path: Path, model_folder: Callable[..., Path]) -> Run:
    settings = [f"model.name_or_path={model_folder('llama')}", "data.max_rows=60", "training.max_steps=2"]
    return train(load_recipe(QUICKSTART, settings), tmp_path / "run")


def test_an_answer_is_the_greedy_continuation_of_the_training_prompt(run: Run) -> None:
    chat = Chat(run)
    ids = chat.prompt.prompt_ids(["عندي صداع"])[0]
    expected: list[int] = []
    with torch.no_grad():
        while len(expected) < 12:
            logits = chat.model(input_ids=torch.tensor([ids + expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
            if expected[-1] == chat.prompt.end_id:
                break
        with chat.model.disable_adapter():
            base = chat.model(input_ids=torch.tensor([ids + expected])).logits[0, -1]
    assert not torch.equal(logits, base), "it depends on the adapter"
    text = chat.prompt.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert chat.answer("عندي صداع", max_new_tokens=12) == text


def test_the_severity_is_predicted_when_the_question_comes_and_an_oracle_cannot_be_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def card_of(asked: str, *more: str) -> str:
        settings = [f"prompt.severity={asked}", *more]
        run.write_text("recipe.yaml", load_recipe(run.folder / "recipe.yaml", settings).to_yaml())
        return write_card(run).read_text(encoding="utf-8")

    assert "as published" in card_of("none", "as_published.labels=all") and "oracle" not in card_of("none")
    card = card_of("predicted", "as_published.labels=answer")
    assert "as published" not in card
    assert card.count("{severity}") == 2 and "`درجة الخطورة: حرجة`" in card and "oracle" not in card
    chat, seen = Chat(run), []
    monkeypatch.setattr(chat.model, "generate", lambda **of: seen.append(of["input_ids"][0]) or of["input_ids"])
    for question in ("عندي ألم شديد في الصدر مع ضيق تنفس وفقدت الوعي", "عندي زكام خفيف"):
        chat.answer(question)
    severe, mild = (chat.prompt.tokenizer.decode(ids).split("\n")[0] for ids in seen)
    assert severe == "درجة الخطورة: حرجة" != mild and mild.startswith("درجة الخطورة: ")
    assert "oracle" in card_of("gold")
    with pytest.raises(ModelError, match=r"prompt\.severity=predicted"):
        Chat(run).answer("عندي زكام")


def test_the_card_is_read_by_the_hub_and_holds_the_measured_figures(run: Run) -> None:
    card = ModelCard.load(write_card(run))
    assert card.data.library_name == "peft" and card.data.language == "ar"
    assert "Not a medical device" in card.text and "control run" not in card.text
    metrics = run.metrics()
    losses = " | ".join(f"{metrics[when]['loss_critical']:.4f}" for when in ("before", "after"))
    assert f"| critical | {losses} |" in card.text and metrics["data"]["fingerprint"] in card.text
    assert "normalize: none, reduction: tokens" in card.text and str(run.folder.parent) not in card.text
    recipe = run.folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("control: none", "control: shuffled"), encoding="utf-8")
    assert "control run" in write_card(run).read_text(encoding="utf-8")
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="no adapter"):
        Chat(run)
