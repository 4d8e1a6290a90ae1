"""The verbs train, plan, init, recipes and doctor. Heavy imports are inside the functions, so that --help is fast."""

import importlib.metadata
import math
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from sevpeft.cli.application import AsJson, Vram, Words, app, check_early, is_main_process, quiet_libraries
from sevpeft.console import LABEL_WIDTH, Screen, print_json, print_labeled, print_text
from sevpeft.errors import ModelError, UnknownModelError, UsageError, first_sentence
from sevpeft.runs import PACKAGES, check_absent, check_output, write_atomically

# A line of `doctor`: name, text, command that mends a fault (or ""), whether the fault prevents training.
Finding = tuple[str, str, str, bool]
RecipeFile = Annotated[Path, typer.Argument(help="YAML file, or a name of `sevpeft recipes`")]
# init: share of the training rows that max_length leaves whole; its multiple and its minimum in tokens.
_SHARE, _STEP, _SHORTEST = 0.99, 64, 128
_TEMPLATE, _SCHEMA = Path(__file__).with_name("recipe.yaml.jinja"), Path("recipe.schema.json")


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Words = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; default: a new one in runs/")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
) -> None:
    """Train a recipe's adapter.

    Example: sevpeft train recipes/qwen2.5-0.5b.yaml data.path=consultations.csv training.num_train_epochs=1
    """
    from sevpeft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if resume and output is None:
        raise UsageError("--resume needs --output RUN, the folder of the run to continue.")
    if output and is_main_process():
        check_output(output.expanduser(), resume=resume)
    check_early(loaded)
    console = Screen(quiet=not is_main_process())
    with console.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.sharing.card import write_card
        from sevpeft.training.train import train as train_recipe
    from sevpeft.training.screen import run_summary

    run = train_recipe(loaded, output, resume=resume, console=console)
    if is_main_process():
        write_card(run)
        console.print(run_summary(run))
        again = shlex.quote(str(run.folder))
        console.print(f"Next: sevpeft evaluate {again}, or sevpeft chat {again}", soft_wrap=True)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Words = None,
    vram: Vram = None,
    rows: Annotated[int, typer.Option(min=0, help="Also show this many training rows of each severity.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the rows (20) as a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a recipe's data, weights and memory without training; exit code 1 if it does not fit --vram.

    Example: sevpeft plan recipes/llama-2-7b.yaml data.path=consultations.csv severity.source=rules --vram 12
    """
    from sevpeft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if html and (html.suffix != ".html" or not html.parent.is_dir()):
        raise UsageError(f"--html={html} must be a file that ends in .html, in a folder that exists.")
    check_early(loaded, "plan")
    with Screen(stderr=True).status(f"Reading {recipe} and its data"):
        quiet_libraries()
        from sevpeft.training.plan import plan as plan_of
        from sevpeft.training.plan import training_rows
        from sevpeft.training.screen import show_machine, show_plan

        found = plan_of(loaded, vram=vram)
        shown = training_rows(loaded, rows or 20) if rows or html else []
    if rows or html:  # the report's libraries take time to load
        from sevpeft.evaluation.report.page import rows_text
    if html:
        write_atomically(html, rows_text(shown, "rows.html.jinja", **vars(found)))
    if as_json:
        print_json(found.as_dict() | ({"training_rows": shown} if shown else {}))
    else:
        show_plan(found, Screen())
        show_machine(loaded, Screen())
        print_text(f"Rows: {html} (contains patients' text)\n" if html else rows_text(shown) if rows else "", end="")
    if vram is not None and found.fitting is None:
        why = f"Whether it fits in {vram:g} GB is not known: {found.memory_unknown}"
        raise ModelError(f"{why} The numbers may also stand in the recipe, as about.config.")
    if found.fitting is not None and not found.fitting.fits:
        raise typer.Exit(1)


@app.command()
def init(
    model: Annotated[str, typer.Option(help="Hub id or folder of the base model")],
    data: Annotated[str, typer.Option(help="File, folder, pattern or Hub data set")],
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


@app.command()
def recipes(
    place: Annotated[Path | None, typer.Argument(metavar="FOLDER", help="Of recipes; with --copy the new file")] = None,
    copy: Annotated[str | None, typer.Option(metavar="NAME", help="Copy it, to edit.")] = None,
    vram: Vram = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the shipped recipes, copy one, or print the JSON Schema of a recipe for an editor.

    Example: sevpeft recipes --vram 12
    """
    from sevpeft.recipe import recipe_schema
    from sevpeft.recipe.load import recipe_file, text_of

    if schema:
        print_json(recipe_schema())
    elif copy is not None:
        source = recipe_file(copy)
        check_absent(file := place or Path(source.name))
        text = re.sub(r"(?<=schema=)\S+", lambda found: str((source.parent / found[0]).resolve()), text_of(source))
        named = f"recipes/{copy.removesuffix('.yaml')}.yaml"  # in the command of its third line
        write_atomically(file, text.replace(named, shlex.quote(str(file))), shared=True)
        print_text(f"Wrote {file}. Next: {shlex.join(['sevpeft', 'plan', str(file)])}")
    else:
        found = list_recipes(place, vram)
        print_json(found) if as_json else Screen().print(recipes_table(found))


def list_recipes(folder: Path | None = None, vram: float | None = None) -> list[dict[str, Any]]:
    """The recipes of a folder (default: the shipped ones) that fit a GPU of `vram` GB; smallest base model first."""
    from sevpeft.recipe.load import load_recipe, shipped_recipes

    files = shipped_recipes() if folder is None else {str(path): path for path in sorted(folder.glob("*.yaml"))}
    if not files:
        raise UsageError(f"There are no recipes in {folder}; name another folder, or none for the shipped ones.")
    any_model = {"base-model": ["model.name_or_path=MODEL"]}  # this recipe leaves the model to the command line
    loaded = [(name, load_recipe(path, any_model.get(path.stem, []))) for name, path in files.items()]
    return [
        {
            "recipe": name,
            "model": recipe.model.name_or_path,
            "adapter": "QLoRA" if recipe.quantization.quantized() else "LoRA",
            **recipe.about.model_dump(include={"parameters", "license", "gated", "vram_gib"}),
        }
        for name, recipe in sorted(loaded, key=lambda pair: pair[1].about.parameter_count() or 0)
        if vram is None or (recipe.about.vram_gib or 0) <= vram
    ]


def recipes_table(recipes: list[dict[str, Any]]) -> Table:
    """The list as a table that fits 80 columns."""
    columns = [Column(name, overflow="fold", no_wrap=name == "recipe") for name in ("recipe", "size", "GPU", "license")]
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in recipes:
        memory = f"{row['vram_gib']:g} GB" if row["vram_gib"] else "CPU" if row["parameters"] else "see plan"
        terms = f"{row['license'] or 'not stated'}{' (gated)' if row['gated'] else ''}"
        table.add_row(row["recipe"], row["parameters"] or "", memory, terms)
    return table


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: libraries, disks, GPU, and the largest recipe that it can train, without any network.

    Each fault is shown with the command that mends it. Exit code 1 where no training can run.

    Example: sevpeft doctor
    """
    found, keys, console = list[Finding](), ("name", "text", "remedy", "fatal"), Screen()
    with Screen(stderr=True).status("Looking at this machine"):
        try:
            found += _findings()
        except Exception as error:  # a broken library may raise anything
            found.append(("Other checks", f"failed: {first_sentence(error)}", "pip install -e .", True))
    ready = not any(fatal for *_, fatal in found)
    if as_json:
        print_json({"ready": ready, "findings": [dict(zip(keys, one, strict=True)) for one in found]})
        raise typer.Exit(not ready)
    for name, text, remedy, fatal in found:
        mark, style = ("✗", "red") if fatal else ("!", "yellow") if remedy else ("✓", "")
        print_labeled(console, f"{mark} {name}", text, style)
        if remedy:
            console.print(Text(f"{'':{LABEL_WIDTH}}{remedy}", style="bold"), soft_wrap=True)
    console.print("This machine can train." if ready else "No training can run here before ✗ is mended.")
    raise typer.Exit(not ready)


def _findings() -> Iterator[Finding]:
    """The lines of `doctor`. A library may be absent or broken, so each is imported where it is checked."""
    from packaging.requirements import Requirement

    with suppress(Exception):  # it imports some of the libraries that are checked below
        quiet_libraries()
    versions, broken = dict[str, str](), False
    for one in map(Requirement, importlib.metadata.requires("sevpeft") or ()):
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            version = versions[one.name] = importlib.metadata.version(one.name)
            if one.name in PACKAGES and not broken:
                importlib.import_module(one.name)
            if not one.specifier.contains(version, prereleases=True):
                yield one.name, f"{version}; tested is {one.specifier}", f"pip install '{one}'", False
        except Exception as error:
            needed = one.name != "bitsandbytes"
            text, broken = f"is absent or broken: {first_sentence(error)}", broken or needed
            yield one.name, text, f"pip install --force-reinstall '{one}'", needed
    shown = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    yield "Versions", f"Python {platform.python_version()}, {shown}, and {len(versions)} in all", "", False
    if broken:
        return  # the checks below need these libraries

    import torch
    from huggingface_hub import constants, get_token

    from sevpeft.modeling.loading import LARGEST_QUANTIZED_ON_CPU, choose_precision, why_no_gpu
    from sevpeft.recipe import Recipe
    from sevpeft.recipe.schema import AboutSection
    from sevpeft.training.resolve import device_memory

    importlib.import_module("sevpeft.training.train")
    for name, folder, remedy in (
        ("Disk", ".", "cd FOLDER_ON_ANOTHER_DISK"),
        ("Hub cache", constants.HF_HUB_CACHE, "export HF_HOME=FOLDER_ON_ANOTHER_DISK"),
        ("Own cache", os.environ.get("SEVPEFT_CACHE") or "~/.cache/sevpeft", "export SEVPEFT_CACHE=FOLDER"),
    ):
        path = Path(folder).expanduser().resolve()
        place = next(one for one in (path, *path.parents) if one.exists())
        free, closed = shutil.disk_usage(place).free / 2**30, not (place.is_dir() and os.access(place, os.W_OK))
        remedy = remedy if closed or free < 10 else ""
        yield name, f"{path}: {free:.1f} GiB free{', not writable' * closed}", remedy, closed or free < 1
    yield "Hub login", "yes" if get_token() else "no; models behind a gate need one: hf auth login", "", False
    text = f"none, so the CPU trains: {why_no_gpu(Recipe())}"
    if cuda := torch.cuda.is_available():
        gpu, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
        text = f"{count} × {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    unused = not cuda and (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi"))
    yield "GPU", text, "nvidia-smi && pip install --force-reinstall torch" if unused else "", False
    yield "Computes in", str(choose_precision(Recipe()).dtype).removeprefix("torch."), "", False
    try:
        blocks = importlib.import_module("bitsandbytes.functional")
        numbers = torch.linspace(-1, 1, 4096, device="cuda" if cuda else "cpu")
        off = (blocks.dequantize_4bit(*blocks.quantize_4bit(numbers, quant_type="nf4")) - numbers).abs().max()
        problem = "" if off < 0.2 else f"numbers are off by {off:.2f}"
    except Exception as failure:
        problem = first_sentence(failure)
    text = f"recipes with load_in_4bit cannot run: {problem}" if problem else "bitsandbytes works"
    yield "4 bit", text, "pip install --force-reinstall bitsandbytes" if problem else "", False
    gib = device_memory(Recipe()) / 2**30
    # On a CPU a larger one takes hours for an epoch.
    most = float("inf") if cuda else LARGEST_QUANTIZED_ON_CPU
    sizes = {one["recipe"]: one["parameters"] for one in list_recipes(None, gib * (1.15 if cuda else 1))}
    name = [one for one, size in sizes.items() if 0 < (AboutSection(parameters=size).parameter_count() or 0) < most][-1]
    yield "Can train", f"up to {name} ({sizes[name]}) in {gib:.1f} GiB; `sevpeft plan RECIPE` says more", "", False
