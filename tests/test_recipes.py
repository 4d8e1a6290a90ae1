"""Every recipe: read, listed, and trained from one end to the other on a small model of its real architecture."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoConfig, PreTrainedTokenizerFast
from trl.trainer.utils import add_fused_lm_head

from sevpeft.cli.training import list_recipes, recipes_table
from sevpeft.errors import RecipeError
from sevpeft.modeling.adapters import lora_config
from sevpeft.modeling.memory import MemoryPlan, usable
from sevpeft.recipe import Recipe, load_recipe, recipe_schema
from sevpeft.recipe.load import read_yaml
from sevpeft.sharing.card import write_card
from sevpeft.training.compat import CPU_VOCABULARY_TILE
from sevpeft.training.train import train
from tests.conftest import Cli
from tests.models import ARCHITECTURES, CHAT_TEMPLATES, build_model

FOLDER = Path(__file__).parent.parent / "recipes"
UNNAMED = FOLDER / "base-model.yaml"  # its model stands in the command
RECIPES = sorted({*FOLDER.glob("*.yaml")} - {UNNAMED})

NAMED = ["model.name_or_path=x/y"]

# The kind of chat template that each recipe with prompt.chat meets. For Cohere's and Jais' own, ChatML stands in.
TEMPLATE = {
    "acegpt-v2-8b-chat": "llama-3",
    "allam-7b-instruct": "mistral",
    "command-r7b-arabic": "chatml",
    "falcon-h1-7b-instruct": "chatml",
    "fanar-1-9b-instruct": "gemma",
    "gemma-3-12b-it": "gemma",
    "gemma-3-4b-it": "gemma",
    "jais-2-8b-chat": "chatml",
    "lfm2-350m": "chatml",
    "lfm2-700m": "chatml",
    "llama-3.1-70b-instruct": "llama-3",
    "llama-3.1-8b-instruct": "llama-3",
    "med42-v2-70b": "llama-3",
    "med42-v2-8b": "llama-3",
    "medgemma-27b-text-it": "gemma",
    "medgemma-4b-it": "gemma",
    "mistral-7b-instruct-v0.2": "mistral",
    "qwen2.5-3b-instruct": "chatml",
    "qwen2.5-72b-instruct": "chatml",
    "qwen2.5-7b-instruct": "chatml",
    "qwen3-0.6b": "qwen3",
    "qwen3-14b": "qwen3",
    "qwen3-4b": "qwen3",
    "qwen3-8b": "qwen3",
    "silma-9b-instruct": "gemma",
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


def architecture_of(recipe: Recipe) -> str:
    """model_type of the recipe's base model; that of the toy is llama."""
    return str(recipe.about.config["model_type"]) if recipe.about.config else "llama"


def setup_of(path: Path) -> tuple[str, ...]:
    """What can make a training fail or not: equal setups run the same code, on models of other sizes."""
    recipe = load_recipe(path)
    settings = (
        recipe.model.attn_implementation,
        recipe.quantization.model_dump(),
        recipe.lora.settings(),
        recipe.prompt.model_dump(),
        recipe.training.settings().get("packing"),
    )
    return architecture_of(recipe), TEMPLATE.get(path.stem, "none"), json.dumps(settings, sort_keys=True)


# One recipe of every setup is trained; the others have nothing that it has not.
TRAINED = sorted({setup_of(path): path for path in reversed(RECIPES)}.values())


def test_every_recipe_is_trained_or_stands_beside_one_that_is() -> None:
    assert {setup_of(path) for path in RECIPES} == {setup_of(path) for path in TRAINED}
    assert {path.stem for path in RECIPES if load_recipe(path).prompt.chat} == set(TEMPLATE)


def test_a_recipe_begins_with_what_it_is_what_it_needs_and_its_command_and_reads_back_equal(tmp_path: Path) -> None:
    wrong = []
    for path in (UNNAMED, *RECIPES, *(FOLDER / "as-published").glob("*.yaml")):
        what, needs, command = path.read_text(encoding="utf-8").splitlines()[:3]
        recipe, copy = load_recipe(path, NAMED if path == UNNAMED else []), tmp_path / path.name
        copy.write_text(recipe.to_yaml(), encoding="utf-8")
        fine = what.startswith("# ") and needs.startswith("# Needs ") and load_recipe(copy) == recipe
        fine &= (
            f"sevpeft train recipes/{path.relative_to(FOLDER)}" in command
            and ("Gated: " in needs) == recipe.about.gated
        )
        wrong += [] if fine else [path.name]
    assert wrong == []


# Sizes that others have published to the last parameter; those of SILMA and GPT2-Small-Arabic are the sizes of
# Gemma-2-9B and GPT-2, on which they are built.
PUBLISHED = {
    "allam-7b-instruct": 7_000_559_616,
    "bloomz-560m": 559_214_592,
    "gemma-3-12b-it": 12_187_325_040,
    "gemma-3-4b-it": 4_300_079_472,
    "gpt2-medium": 354_823_168,
    "gpt2-small-arabic": 124_439_808,
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "medgemma-27b-text-it": 27_009_002_240,
    "medgemma-4b-it": 4_300_079_472,
    "mistral-7b-instruct-v0.2": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-3b-instruct": 3_085_938_688,
    "qwen2.5-72b-instruct": 72_706_203_648,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-14b": 14_768_307_200,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "silma-9b-instruct": 9_241_705_984,
}


PLANS: dict[str, MemoryPlan] = {}
# Those of one architecture on one worker, as recipes with equal numbers share a plan.
SIZED = [
    pytest.param(path, id=path.stem, marks=pytest.mark.xdist_group(f"plans of {architecture_of(load_recipe(path))}"))
    for path in RECIPES
    if path.stem != "quickstart"
]


@pytest.mark.parametrize("path", SIZED)
def test_the_numbers_of_the_base_model_give_its_size_and_its_gpu(path: Path) -> None:
    recipe = load_recipe(path, ["training.gradient_checkpointing=true"])  # as `auto` chooses where memory is short
    about = recipe.about
    assert about.parameters is not None and about.config is not None and about.vram_gib is not None
    settings = [recipe.quantization.model_dump(), recipe.lora.settings(), recipe.training.settings()]
    key = json.dumps([about.config, *settings, recipe.model.attn_implementation], sort_keys=True)
    if key not in PLANS:
        config = AutoConfig.for_model(**about.config)
        PLANS[key] = MemoryPlan(recipe, config, on_gpu=True, vocabulary_tile=CPU_VOCABULARY_TILE)
    plan = PLANS[key]
    count = plan.parameters.base
    digits, unit = about.parameters[:-1], {"M": 10**6, "B": 10**9}[about.parameters[-1]]
    decimals = len(digits.partition(".")[2])
    assert f"{count / unit:.{decimals}f}" == digits
    assert PUBLISHED.get(path.stem, count) == count
    assert plan.parameters.quantized > count / 4 or not recipe.quantization.quantized()
    assert f" {about.vram_gib:g} GB" in path.read_text(encoding="utf-8").splitlines()[1]
    assert sum(plan.budget().values()) <= usable(about.vram_gib)


def test_a_recipe_places_its_adapter_in_every_layer_of_the_text_model_and_nowhere_else() -> None:
    recipes = {path.stem: load_recipe(path) for path in RECIPES}
    setups = {(architecture_of(one), str(one.lora.settings())): name for name, one in recipes.items()}
    for (architecture, _), name in setups.items():
        model = build_model(architecture)
        names = get_peft_model(model, lora_config(recipes[name], model)).targeted_module_names
        layers = {match.group(1) for each in names if (match := re.search(r"\.(?:layers|h)\.(\d+)\.", each))}
        assert layers == {str(layer) for layer in range(model.config.get_text_config().num_hidden_layers)}, name
        assert not [each for each in names if re.search("vision|projector|lm_head|embed", each)], name


def test_trl_scores_with_the_scale_and_the_caps_of_each_architecture() -> None:
    ids = torch.arange(8, 40)[None]
    for architecture in ARCHITECTURES:
        model = build_model(architecture)
        with torch.no_grad():
            expected = torch.log_softmax(model(input_ids=ids).logits[:, :-1].double(), dim=-1)
            add_fused_lm_head(model)
            scored = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        expected = expected.gather(-1, ids[:, 1:, None])[..., 0]
        assert torch.allclose(scored.double(), expected, rtol=1e-5), architecture


def test_the_recipes_of_the_paper_have_its_hyperparameters() -> None:
    expected = dict(
        max_length=512,
        global_batch_size=8,  # 1 × 8 there; the loss does not depend on the split
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        warmup_steps=0,
        num_train_epochs=3,
        max_grad_norm=1.0,
    )
    for name in sorted(PAPER):
        recipe = load_recipe(FOLDER / f"{name}.yaml")
        assert recipe.quantization.load_in_4bit and recipe.quantization.bnb_4bit_quant_type == "nf4", name
        lora, training = recipe.lora.settings(), recipe.training.settings()
        assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"], lora["bias"]) == (16, 32, 0.05, "none"), name
        assert recipe.severity.coefficients() == (0.5, 1.0, 1.5) and recipe.severity.reduction == "examples", name
        assert {key: training[key] for key in expected} == expected, name


def test_the_curriculum_has_the_published_stages_and_says_that_its_budget_is_another() -> None:
    recipe = load_recipe(FOLDER / "curriculum-aragpt2-base.yaml")
    curriculum = recipe.curriculum
    assert (curriculum.kind, curriculum.difficulty, curriculum.order) == ("cumulative", "severity", "easy_first")
    assert curriculum.learning_rates == [2e-5, 1e-5, 8e-6] and curriculum.epochs_per_stage == 3 and curriculum.restart
    assert recipe.severity.control == "uniform" and recipe.lora.target_modules == ["c_attn", "c_proj"]


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_a_recipe_trains_an_adapter_that_peft_loads(
    path: Path,
    tmp_path: Path,
    model_folder: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    asked = load_recipe(path)
    architecture = architecture_of(asked)
    base = model_folder(architecture, chat_template=CHAT_TEMPLATES.get(TEMPLATE.get(path.stem, "none")))
    # The split that `auto` chooses for a model is tests/training/test_batch_split.py's.
    small = ["data.max_rows=16", "training.max_steps=1", "training.global_batch_size=4", "training.max_length=200"]
    small += [f"training.per_device_{kind}_batch_size=4" for kind in ("train", "eval")]
    small += ["training.gradient_accumulation_steps=1", "training.gradient_checkpointing=true"]
    if asked.curriculum.epochs_per_stage is not None:  # which gives the number of steps
        small += ["training.max_steps=-1", "curriculum.epochs_per_stage=1", "data.max_rows=40"]
    recipe = load_recipe(path, [f"model.name_or_path={base}", *small])
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
    assert model.get_base_model().config.model_type == architecture
    assert any(parameter.abs().max() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)
    metrics = run.metrics()
    assert metrics["after"]["loss"] != metrics["before"]["loss"]
    assert torch.isfinite(torch.tensor(list(metrics["after"].values()))).all()
    assert (metrics["model"]["bits"] == 4) == asked.quantization.load_in_4bit


def test_the_list_shows_every_recipe_by_its_name_within_80_columns() -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(recipes_table(list_recipes()))
    shown = console.export_text()
    listed = {line.split()[0] for line in shown.splitlines() if line[:1] not in ("", " ")} - {"recipe"}
    assert listed == {path.relative_to(FOLDER).as_posix()[:-5] for path in FOLDER.glob("**/*.yaml")}
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80


def test_a_name_stands_for_what_is_here_and_else_for_a_recipe_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "as-published/al-atlas", "qwen2.5-0.5b"):
        file = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
        assert load_recipe(name) == load_recipe(file) and load_recipe(name).name == file.stem
    (tmp_path / "quickstart.yaml").write_text("training: {seed: 7}", encoding="utf-8")
    for name in ("quickstart", "quickstart.yaml"):
        assert load_recipe(name).training.seed == 7, "the user's own one"
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(RecipeError, match="directory"):
        load_recipe("quickstart")
    assert load_recipe("base-model", NAMED).model.name_or_path == "x/y"


def test_a_copy_names_itself_in_its_command_and_overwrites_nothing(
    sevpeft_: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    for words, file in (([], "al-atlas.yaml"), (["kept/one.yaml"], "kept/one.yaml"), (["my own.yaml"], "my own.yaml")):
        code, out, _ = sevpeft_("recipes", "--copy", "as-published/al-atlas", *words)
        text = Path(file).read_text(encoding="utf-8")
        assert code == 0 and load_recipe(file) == load_recipe("as-published/al-atlas")
        assert Path(re.search(r"\$schema=(.*)", text)[1]).is_file()  # type: ignore[index]
        assert f"sevpeft train {shlex.quote(file)}" in text and f"plan {shlex.quote(file)}" in out
    Path("al-atlas.yaml").write_text("mine", encoding="utf-8")
    code, _, err = sevpeft_("recipes", "--copy", "as-published/al-atlas")
    assert code == 1 and "exists already" in err and Path("al-atlas.yaml").read_text(encoding="utf-8") == "mine"


def test_the_package_has_every_room_and_the_recipes() -> None:
    text = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"(sevpeft[\w.]*)"', text.partition("packages = [")[2].partition("]")[0])
    rooms = {path.parent.relative_to(FOLDER.parent) for path in (FOLDER.parent / "sevpeft").rglob("*.py")}
    assert listed == sorted({"sevpeft.recipes", *(".".join(room.parts) for room in rooms)})


def test_the_list_can_be_cut_to_a_gpu() -> None:
    assert len(list_recipes(FOLDER)) == len(RECIPES) + 1
    fitting = {Path(row["recipe"]).stem: row["vram_gib"] for row in list_recipes(FOLDER, 12)}
    assert "llama-3.1-8b" in fitting and "quickstart" in fitting and "qwen3-14b" not in fitting
    assert all((gb or 0) <= 12 for gb in fitting.values())


def test_a_recipe_names_the_schema_that_an_editor_checks_it_with() -> None:
    """After a change of a setting: sevpeft recipes --schema > recipes/recipe.schema.json"""
    assert json.loads((FOLDER / "recipe.schema.json").read_text(encoding="utf-8")) == recipe_schema()
    validator = pytest.importorskip("jsonschema").Draft202012Validator(recipe_schema())
    wrong = []
    for path in FOLDER.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"^# yaml-language-server: \$schema=(.*)$", text, re.MULTILINE)
        there = [(path.parent / name).resolve() == (FOLDER / "recipe.schema.json").resolve() for name in named]
        complete = path.stem == "base-model" or validator.is_valid(read_yaml(text, ""))  # whose model the command names
        wrong += [] if there == [True] and complete else [path.name]
    assert wrong == []
