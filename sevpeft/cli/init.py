"""The verb init: a commented recipe for a model, its data and a machine, checked as `plan` checks one."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from sevpeft.cli.application import Vram, Words, app, quiet_libraries
from sevpeft.console import Screen, print_text
from sevpeft.errors import ModelError, UnknownModelError

# Share of the training rows that max_length leaves whole; its multiple and its minimum in tokens.
_SHARE, _STEP, _SHORTEST = 0.99, 64, 128
_TEMPLATE, _SCHEMA = Path(__file__).with_name("recipe.yaml.jinja"), Path("recipe.schema.json")


@app.command()
def init(
    model: Annotated[str, typer.Option(help="Hub id or folder of the base model", show_default=False)],
    data: Annotated[str, typer.Option(help="File, folder, pattern or Hub data set", show_default=False)],
    overrides: Words = None,
    vram: Vram = None,
) -> None:
    """Write a commented recipe for a model and its data to stdout: for a GPU of --vram GB, or for this machine.

    Example: sevpeft init --model Qwen/Qwen3-4B --data consultations.csv --vram 12 > mine.yaml
    """
    with Screen(stderr=True).status(f"Reading {model} and {data}"):
        quiet_libraries()
        text = recipe_text({"model.name_or_path": model, "data.path": data}, overrides or [], vram)
    print_text(text, end="")


def recipe_text(chosen: dict[str, Any], words: list[str], vram: float | None) -> str:
    """A recipe as YAML with a comment for each choice.

    Args:
        chosen: settings by key, such as model.name_or_path. words: the user's KEY=VALUE, which win.
        vram: GB of the GPU; None: this machine.

    Raises SevpeftError: the model does not fit, or `plan` refuses the recipe.
    """
    import torch
    from jinja2 import StrictUndefined, Template

    from sevpeft.data.read import load_consultations
    from sevpeft.modeling.loading import choose_precision, load_config, load_tokenizer, uses_gpu
    from sevpeft.modeling.memory import GIB, text_targets, usable
    from sevpeft.recipe import Recipe, load_recipe, settings_from
    from sevpeft.recipe.load import read_yaml, shipped_recipes, write_yaml
    from sevpeft.severity.probabilities import has_severity
    from sevpeft.training.plan import fitting, plan, whole_lengths
    from sevpeft.training.resolve import device_memory, memory_plan, split_here

    named, saved, size, needed = {word.partition("=")[0].strip() for word in words}, dict[str, str](), 0, 0

    def choose(settings: dict[str, Any]) -> Recipe:
        """Adds settings to the recipe, unless the user set them."""
        chosen.update({path: value for path, value in settings.items() if path not in named})
        return settings_from(Recipe, words, chosen)

    labeled = has_severity(load_consultations(choose({}).data).rows)
    recipe = choose({"severity.source": "columns" if labeled else "rules", "severity.weights": "balanced"})
    config = load_config(recipe)
    template = bool(load_tokenizer(recipe, config).chat_template)
    recipe = choose({"prompt.chat": template, "model.dtype": "auto", "quantization.load_in_4bit": False})
    lengths = whole_lengths(recipe)
    half, most = int(lengths[len(lengths) // 2]), int(lengths[math.ceil(_SHARE * len(lengths)) - 1])
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = int(min(max(math.ceil(most / _STEP) * _STEP, _SHORTEST), context))
    recipe = choose({"training.max_length": longest, "training.global_batch_size": 8})
    gb = vram or (torch.cuda.get_device_properties(0).total_memory / GIB if uses_gpu(recipe) else None)
    place, room = (f"{gb:.4g} GB", usable(gb)) if gb else ("this computer", device_memory(recipe))
    try:
        recipe = choose({"lora.target_modules": text_targets(recipe.model.name_or_path, config)})
        if gb:
            recipe = choose({"about.vram_gib": float(f"{gb:.4g}")})
            for change in fitting(recipe, gb)[0].changes:  # memory savings, least harm first
                for path, _, value in (word.partition("=") for word in change.settings):
                    recipe = choose({path: read_yaml(value, "")})
                    saved |= {path: f"so that it fits: {change.effect}"} if path in chosen else {}
        held = fitting(recipe, gb)[1] if gb else memory_plan(recipe, on_gpu=False)[0].with_recipe(split_here(recipe))
        size, needed = held.parameters.base, held.total
    except UnknownModelError as error:
        Screen(stderr=True).print(f"Note: whether it fits is not known: {error}", soft_wrap=True)
    if needed > room:
        much = f"{needed / GIB:.1f} GiB at {recipe.training.max_length} tokens, and {place} has {room / GIB:.1f}"
        raise ModelError(f"The model needs {much}; name a smaller one, or the GB of another GPU with --vram.")
    # As in the shipped recipes: the toy's learning rate and epochs, or those of all real models.
    like = load_recipe(shipped_recipes()["quickstart"]).training if 0 < size < 1e7 else Recipe().training
    recipe = choose({"training.learning_rate": like.learning_rate, "training.num_train_epochs": like.num_train_epochs})
    checked, dtype = plan(recipe, vram=gb), str(choose_precision(recipe).dtype).removeprefix("torch.")
    split = (checked.recipe if gb else split_here(recipe)).training.settings()
    facts = {"recipe": recipe, "data": checked.data, "split": split, "half": half, "most": most, "size": size}
    facts |= {"labeled": labeled, "template": template, "vram": vram, "gpu": gb, "gib": needed / GIB, "place": place}
    facts |= {"yaml": lambda value: write_yaml([value], flow=isinstance(value, dict | list))}
    page = Template(_TEMPLATE.read_text("utf-8"), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return page.render(facts, saved=saved, named=named, dtype=dtype, schema=_SCHEMA)
