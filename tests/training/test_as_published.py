"""The settings of as_published, each compared with the code of the notebooks; by default all are off."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import AsPublishedSection, Recipe, load_recipe, recipe_from_values
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import Prepared, encode_rows, load_splits, prepare
from tests.conftest import Cli
from tests.models import SENTENCES
from tests.training.test_trainer import batch_loss, make_trainer

LENGTH = 96
RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.fixture
def tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As in the notebooks: padding is the end token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    return tokenizer


@pytest.fixture
def prompt(tokenizer: PreTrainedTokenizerFast) -> Prompt:
    return Prompt.build(tokenizer, **Recipe().prompt.model_dump())


def prepared(
    prompt: Prompt, scratch: Path, *, severity: dict[str, Any] | None = None, **published: Any
) -> tuple[Prepared, list[str]]:
    """The rows, and their texts as the notebooks write them."""
    scratch.mkdir()
    about = [(f"{one} {number}", SENTENCES[number % 5]) for number, one in enumerate(SENTENCES * 3)]
    rows = [{"question": one, "answer": answer, "severity": SEVERITIES[len(one) % 3]} for one, answer in about]
    (scratch / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    values = {"data": {"path": str(scratch / "rows.json")}, "severity": severity or {}, "as_published": published}
    recipe = recipe_from_values({**values, "training": {"max_length": LENGTH, "global_batch_size": 8}})
    texts = [f"السؤال: {row['question']}\nالجواب: {row['answer']}" for row in load_splits(recipe)[1].train]
    return prepare(recipe, prompt, scratch), texts


def test_with_all_off_the_rows_are_ours_and_validation_always_is(prompt: Prompt, tmp_path: Path) -> None:
    plain, _ = prepared(prompt, tmp_path / "plain")
    off = {"no_end_token": False, "labels": "answer", "unnormalized": False, "evaluation_template": "{question}"}
    assert list(prepared(prompt, tmp_path / "off", **off)[0].train) == list(plain.train)
    others = {"no_end_token": True, "labels": "question_and_answer", "unnormalized": True}, {"labels": "all"}
    for number, other in enumerate(others):
        found, _ = prepared(prompt, tmp_path / str(number), **other)
        assert list(found.validation) == list(plain.validation) and list(found.train) != list(plain.train)


def test_the_curriculum_s_notebook_learns_question_and_answer_and_no_end(
    prompt: Prompt, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found, texts = prepared(prompt, tmp_path / "rows", no_end_token=True, labels="question_and_answer")
    alone, _ = prepared(prompt, tmp_path / "alone", no_end_token=True)
    for row, answer_only, text in zip(found.train, alone.train, texts, strict=True):
        encoded = tokenizer(text, truncation=True, padding="max_length", max_length=LENGTH)
        labels = [-100 if token == tokenizer.pad_token_id else token for token in encoded["input_ids"]]
        size = len(row["input_ids"])
        assert row["input_ids"] == encoded["input_ids"][:size] and tokenizer.eos_token_id not in row["input_ids"]
        # The model shifts labels, so that none is there for the first token; and padding has none.
        assert row["labels"] == [IGNORED, *labels[1:size]] and set(labels[size:]) <= {-100}
        start = answer_only["labels"].count(IGNORED)
        assert answer_only["input_ids"] == row["input_ids"] and start > 1
        assert answer_only["labels"] == [IGNORED] * start + row["labels"][start:]
        assert [weight > 0 for weight in row["token_weights"]] == [False] + [True] * (size - 1)


def test_the_weighted_loss_s_notebook_learns_every_position_and_adds_up_the_accumulation(
    prompt: Prompt, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    by_answer = {"reduction": "examples"}
    rows, texts = prepared(prompt, tmp_path / "rows", labels="all", unnormalized=True, severity=by_answer)
    mean, _ = prepared(prompt, tmp_path / "mean", labels="all", severity=by_answer)
    even, _ = prepared(prompt, tmp_path / "even", labels="all", severity={**by_answer, "control": "uniform"})
    batch = rows.train.select(range(8))
    trainer = make_trainer(tmp_path, batch, reduction="examples")
    loss = batch_loss(trainer, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad()
    total = 0.0
    for row, text, ours, one in zip(batch, texts, mean.train, even.train, strict=False):
        encoded = tokenizer(text, truncation=True, padding="max_length", max_length=LENGTH, return_tensors="pt")
        assert row["input_ids"] == encoded["input_ids"][0].tolist() and len(row["input_ids"]) == LENGTH
        weight = ours["token_weights"][1] / one["token_weights"][1]
        labels = encoded["input_ids"].clone()
        step = weight * trainer.model(input_ids=encoded["input_ids"], labels=labels).loss
        step.backward()  # nothing is divided by the number of accumulated batches
        total += step.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6), name
    assert loss.item() == 8 * batch_loss(trainer, mean.train.select(range(8))).item()


def test_a_long_question_is_shortened_and_its_row_is_full(prompt: Prompt, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"question": ["ألم " * 200, "ألم"], "answer": ["راجع طبيبا", "لا"]})
    published = AsPublishedSection(labels="all")
    found, report = encode_rows(rows, prompt, 64, strata=None, cache_file=tmp_path / "x.arrow", published=published)
    assert [len(row["input_ids"]) for row in found] == [64, 64] and report["shortened"] == 1
    answers = prompt.answer_ids(["راجع طبيبا", "لا"])
    assert str(answers[0])[1:-1] in str(found[0]["input_ids"]) and found[0]["input_ids"][-1] == prompt.end_id
    assert report["answer_tokens"] == sum(map(len, answers))  # padding is none


def test_the_recipes_have_the_notebooks_differences() -> None:
    curriculum = load_recipe(RECIPES / "as-published" / "aragpt2-base.yaml")
    weighted = load_recipe(RECIPES / "as-published" / "al-atlas.yaml")
    assert curriculum.as_published.model_dump() == {
        "no_end_token": True,
        "labels": "question_and_answer",
        "unnormalized": False,
        "evaluation_template": "{question}",
    }
    assert weighted.as_published.labels == "all" and weighted.as_published.unnormalized
    assert weighted.severity.coefficients() == (0.5, 1.0, 1.5) and weighted.lora.target_modules == ["q_proj", "v_proj"]
    assert curriculum.curriculum == load_recipe(RECIPES / "curriculum-aragpt2-base.yaml").curriculum
    for recipe, tokens in ((curriculum, 200), (weighted, 50)):
        assert recipe.generation.do_sample and recipe.generation.temperature == 0.7
        assert recipe.generation.max_new_tokens == tokens
        assert recipe.prompt.answer_cue not in recipe.as_published.evaluation_template


def test_the_screen_says_what_is_done_as_published(sevpeft_: Cli) -> None:
    path = str(RECIPES / "as-published" / "al-atlas.yaml")
    code, screen, _ = sevpeft_("plan", path, "data.path=builtin:consultations", "model.name_or_path=builtin:tiny")
    line = next(line for line in screen.splitlines() if line.startswith("As published"))
    assert code == 0 and "labels" in line and "no_end_token" not in screen
