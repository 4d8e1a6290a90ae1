"""Model cards of an adapter and of a merged model (templates/*.jinja), and the commands that serve them.

A figure on a card is one that was measured. No row of the data, no path and no name of a person or machine is quoted:
a card is published.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template, UndefinedError

from sevpeft.errors import RunError
from sevpeft.evaluation.statistics import estimate_text
from sevpeft.modeling.adapters import public_name, read_adapter_config
from sevpeft.modeling.loading import Precision, quantization_config
from sevpeft.modeling.prompts import SEVERITY_LINES, Prompt
from sevpeft.recipe import Recipe, load_recipe
from sevpeft.runs import Run, write_atomically
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.source import ORACLE

_TEMPLATES = Path(__file__).parent / "templates"
_TAGS = ["lora", "sft", "trl", "medical", "arabic", "severity-weighted-loss"]
# As the Hub writes them; every other license is `other` with a name.
_HUB_LICENSES = {"apache-2.0", "mit", "cc-by-nc-4.0", "bigscience-bloom-rail-1.0"}
_HUB_LICENSES |= {"gemma", "llama2", "llama3", "llama3.1"}
_UNKNOWN_LICENSES = {None, "none stated", "see its page"}
# The ranks that vLLM has kernels for (0.10 and later, `--max-lora-rank`).
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def write_card(run: Run) -> Path:
    """Writes RUN/adapter/README.md and returns its path."""
    path = run.adapter / "README.md"
    write_atomically(path, adapter_card(run), shared=True)
    return path


def adapter_card(run: Run) -> str:
    """The card of a run's adapter; raises RunError where the run lacks what it is written from."""
    recipe = load_recipe(run.folder / "recipe.yaml")
    try:
        model = run.metrics()["model"]
        config = quantization_config(recipe, Precision(getattr(torch, model["dtype"]), bf16=False, fp16=False))
        settings = {} if config is None else config.to_diff_dict()
        keys = [key for key in recipe.quantization.model_dump() if key in settings]
        header = {"library_name": "peft", "quantization": ", ".join(f"{key}={settings[key]!r}" for key in keys)}
        return _filled_in("adapter.md.jinja", run, recipe, public_name(model["name_or_path"]), **header)
    except (ValueError, KeyError, TypeError, UndefinedError) as error:
        files = f"metrics.json or environment.json of {run.folder}"
        raise RunError(f"{files} is damaged or incomplete; copy it back, or finish the run first.") from error


def write_merged_card(run: Run, recipe: Recipe, merged: dict[str, Any], folder: Path) -> Path:
    """Writes FOLDER/README.md from the figures of `Merged.as_dict` and returns its path."""
    base, license_ = public_name(merged["base"]), recipe.about.license
    if base != merged["base"] or license_ in _UNKNOWN_LICENSES:  # a folder may hold any license
        license_ = None
    name = str(license_).lower().replace(" ", "-") if license_ and license_ not in _HUB_LICENSES else None
    command, reason = adapter_command(base if "/" in base else "BASE", "RUN/adapter", read_adapter_config(run.adapter))
    text = _filled_in(
        "merged.md.jinja",
        run,
        recipe,
        base,
        library_name="transformers",
        base_model_relation="finetune" if "/" in base else None,
        license="other" if name else license_,
        license_name=name,
        merged=merged,
        base_license=license_,
        adapter_command=command,
        why_no_adapter=reason,
        asking=asking(recipe),
        conversion=conversion_commands("OUTPUT", merged["dtype"]),
    )
    path = folder / "README.md"
    write_atomically(path, text, shared=True)
    return path


def note_figures(run: Run, **figures: dict[str, Any]) -> None:
    """Puts figures into the run's metrics, and into its card where nobody has edited that."""
    card = run.adapter / "README.md"
    with suppress(OSError):  # a run that may only be read is merged all the same
        untouched = card.is_file() and card.read_text(encoding="utf-8") == adapter_card(run)
        run.update_metrics(**figures)
        if untouched:
            write_card(run)


def choices_text(figures: dict[str, Any]) -> str:
    """What `choices` returns as Markdown, for the card and the screen."""
    template = Template((_TEMPLATES / "choices.md.jinja").read_text(encoding="utf-8"))
    return template.render(figures, estimate_text=estimate_text)


def distance(found: dict[str, Any]) -> str:
    """A `Difference` in words."""
    return f"KL {found['kl']:.2g} nats per token, {found['equal_next_tokens']:.1%} equal next tokens"


def _filled_in(template: str, run: Run, recipe: Recipe, base: str, **more: Any) -> str:
    header = {key: more.pop(key, None) for key in ("library_name", "base_model_relation", "license", "license_name")}
    base_model = base if "/" in base else None
    data = ModelCardData(language="ar", pipeline_tag="text-generation", base_model=base_model, tags=_TAGS, **header)
    shown = recipe.model_dump()
    for section, key in (("model", "name_or_path"), ("data", "path"), ("training", "init_adapter")):
        if shown[section].get(key):
            shown[section][key] = public_name(shown[section][key])
    if mix := shown["data"]["mix"]:
        mix["sources"] = {name: public_name(path) for name, path in mix["sources"].items()}
    shown["prompt"]["examples"] = None  # they may be rows of the data
    facts = {
        **run.metrics(),
        **more,
        "base": base,
        "recipe": recipe,
        "environment": run.environment(),
        "severities": SEVERITIES,
        "recipe_text": Recipe.model_validate(shown).to_yaml().strip(),
        "distance": distance,
        "oracle": ORACLE,
        "choices_text": choices_text,
        "severity_lines": [line.strip() for line in SEVERITY_LINES.values()],
    }
    about_run = Template((_TEMPLATES / "run.md.jinja").read_text(encoding="utf-8")).render(facts)
    path = str(_TEMPLATES / template)
    return str(ModelCard.from_template(data, template_path=path, **facts, about_run=about_run))


# How a merged model is served: the commands for llama.cpp, Ollama and vLLM, and the prompt that each asks with.


def modelfile(prompt: Prompt, recipe: Recipe) -> str:
    """Ollama's Modelfile for what `conversion_commands` quantize, which asks with the prompt of the training."""
    # llama.cpp puts the token that begins a text there itself.
    # A placeholder is no English question, examples may be rows of the data, and Ollama predicts no severity.
    prompt = replace(prompt, english_template=None, english_cue=None, severity="none", examples=())
    text = prompt.text("{{ .Prompt }}").removeprefix(prompt.tokenizer.bos_token or "\0")
    generation = recipe.generation
    return (
        "FROM ./model-q4_k_m.gguf\n"
        f'TEMPLATE """{text}"""\n'
        f'PARAMETER stop "{prompt.tokenizer.convert_ids_to_tokens(prompt.end_id)}"\n'
        f"PARAMETER temperature {generation.temperature if generation.do_sample else 0:g}\n"
        f"PARAMETER num_predict {generation.max_new_tokens}\n"
    )


def conversion_commands(folder: str, dtype: str) -> list[str]:
    """Commands that convert a folder of weights in `dtype` for llama.cpp and Ollama, to be run where llama.cpp is."""
    here = shlex.quote(folder)
    return [
        f"python convert_hf_to_gguf.py {here} --outfile {here}/model.gguf --outtype {_OUTTYPES[dtype]}",
        f"llama-quantize {here}/model.gguf {here}/model-q4_k_m.gguf Q4_K_M",
        f"ollama create severity -f {here}/Modelfile",
    ]


def adapter_command(base: str, adapter: str, config: dict[str, Any]) -> tuple[str | None, str]:
    """(command, "") that serves the adapter by vLLM, or (None, reason) where vLLM would refuse or misread it.

    Patterns of rank or alpha it misreads in silence: it takes one scale for all layers (vllm/lora/lora_weights.py).
    """
    settings = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "rank_pattern", "alpha_pattern")
    used = [f"lora.{name}" for name in settings if config.get(name)]
    used += ["lora.bias"] if config.get("bias", "none") != "none" else []
    used += [f"lora.r={config['r']}"] if config["r"] > RANKS[-1] else []
    if used:
        return None, f"vLLM does not read {', '.join(used)} of an adapter: serve the merged model"
    rank = next(known for known in RANKS if known >= config["r"])
    modules = f"severity={shlex.quote(adapter)}"
    return f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules {modules} --max-lora-rank {rank}", ""


def asking(recipe: Recipe) -> str:
    """How a question has to be put to a server, in one sentence."""
    if not recipe.prompt.chat:
        return "Ask at /v1/completions with the prompt of the card, and stop at the token that ends an answer."
    system = ", with the system message of the recipe" if recipe.prompt.system else ""
    return (
        f"Ask at /v1/chat/completions{system}; where the chat template knows thinking, send "
        '"chat_template_kwargs": {"enable_thinking": false}.'
    )
