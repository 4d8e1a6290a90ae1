"""Every recipe: read, listed, and trained from one end to the other on a small model of its real architecture."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import PreTrainedTokenizerFast

from sevpeft.recipe import load_recipe
from sevpeft.recipe.listing import list_recipes, recipes_table
from sevpeft.sharing.card import write_card
from sevpeft.training.run import train
from tests.conftest import CHAT_TEMPLATES

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

ARCHITECTURE = {
    "al-atlas-0.5b": "qwen2",
    "aragpt2-base": "gpt2",
    "aragpt2-medium": "gpt2",
    "bloomz-560m": "bloom",
    "dialect-ar-gpt-2021": "gpt2",
    "gpt2-medium": "gpt2",
    "gpt2-small-arabic": "gpt2",
    "lfm2-350m": "lfm2",
    "lfm2-700m": "lfm2",
    "llama-2-7b": "llama",
    "mistral-7b-instruct-v0.2": "mistral",
    "quickstart": "llama",
    "qwen2.5-0.5b": "qwen2",
    "qwen3-0.6b": "qwen3",
}

# The ten models of the paper, whose loss is a mean over answers of means over tokens.
PAPER = {
    "al-atlas-0.5b",
    "aragpt2-base",
    "aragpt2-medium",
    "bloomz-560m",
    "dialect-ar-gpt-2021",
    "gpt2-small-arabic",
    "lfm2-350m",
    "lfm2-700m",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
}


def test_every_recipe_has_an_architecture_here() -> None:
    assert {path.stem for path in RECIPES} == set(ARCHITECTURE)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_what_it_is_what_it_needs_and_its_command(path: Path) -> None:
    what, needs, command = path.read_text(encoding="utf-8").splitlines()[:3]
    assert what.startswith("# ")
    assert needs.startswith("# Needs ")
    assert re.search(rf"sevpeft train recipes/{re.escape(path.name)}", command)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_reads_back_equal_from_its_own_dump(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / path.name
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in PAPER], ids=lambda path: path.stem)
def test_a_recipe_of_the_paper_has_its_hyperparameters(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.quantization.load_in_4bit and recipe.quantization.bnb_4bit_quant_type == "nf4"
    lora, training = recipe.lora.settings(), recipe.training.settings()
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"], lora["bias"]) == (16, 32, 0.05, "none")
    assert recipe.severity.coefficients() == (0.5, 1.0, 1.5)
    assert recipe.severity.reduction == "examples"
    expected = dict(
        max_length=512,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        warmup_steps=0,
        num_train_epochs=3,
        max_grad_norm=1.0,
    )
    assert {name: training[name] for name in expected} == expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_an_adapter_that_peft_loads(
    path: Path,
    tmp_path: Path,
    model_folder: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    asked = load_recipe(path)
    base = model_folder(ARCHITECTURE[path.stem], chat_template=CHAT_TEMPLATES.get(path.stem))
    small = [f"model.name_or_path={base}", "data.max_rows=60", "training.max_steps=2", "training.max_length=200"]
    recipe = load_recipe(path, small)
    run = train(recipe, tmp_path / "run")
    write_card(run)

    assert {entry.name for entry in run.folder.iterdir()} >= {
        "recipe.yaml",
        "environment.json",
        "metrics.json",
        "log.jsonl",
        "adapter",
        "checkpoints",
    }
    assert {entry.name for entry in run.adapter.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "README.md",
    }
    assert not [entry for entry in run.adapter.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".pkl")]
    model = AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    assert model.get_base_model().config.model_type == ARCHITECTURE[path.stem]
    assert any(parameter.abs().max() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)
    metrics = run.metrics()
    assert metrics["after"]["loss"] != metrics["before"]["loss"]
    assert torch.isfinite(torch.tensor(list(metrics["after"].values()))).all()
    assert (metrics["model"]["bits"] == 4) == asked.quantization.load_in_4bit


def test_the_list_shows_every_recipe_within_80_columns() -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(recipes_table(list_recipes(FOLDER)))
    shown = console.export_text()
    assert all(path.name in shown for path in RECIPES)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
