"""Model cards of an adapter and of a merged model (templates/*.jinja), and the commands that serve them.

A figure on a card is one that was measured. No row of the data, no path and no name of a person or machine is quoted:
a card is published.
"""

from __future__ import annotations

import hashlib
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template, UndefinedError

from sevpeft.errors import RunError
from sevpeft.evaluation.statistics import estimate_text
from sevpeft.modeling.adapters import public_name, read_adapter_config
from sevpeft.modeling.chat_template import CHAT_TEMPLATE
from sevpeft.modeling.loading import Precision, quantization_config
from sevpeft.modeling.prompts import SEVERITY_LINES, Prompt
from sevpeft.recipe import Recipe, load_recipe
from sevpeft.runs import Run, file_hash, write_atomically
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.source import ORACLE

_TEMPLATES = Path(__file__).parent / "templates"
_TAGS = ["lora", "sft", "trl", "medical", "arabic", "severity-weighted-loss", "arxiv:2604.06346"]
HUB: dict[str, dict[Any, Any]] = yaml.safe_load(Path(__file__).with_name("hub.yaml").read_text(encoding="utf-8"))
# Scores of evaluation.json that a card shows, and what the Hub calls them.
_SCORES = {"nll": "loss", "bertscore_f1": "bertscore", "chrf": "chrf", "rouge_l": "rouge", "urgent_referral": "rate"}
# The ranks that vLLM has kernels for (0.10 and later, `--max-lora-rank`).
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write_card(run: Run) -> Path:
    """Writes RUN/adapter/README.md and returns its path."""
    path = run.adapter / "README.md"
    write_atomically(path, adapter_card(run), shared=True)
    return path


def adapter_card(run: Run, repo_id: str = "ADAPTER", base: str | None = None, license_: str | None = None) -> str:
    """The card of a run's adapter, of a base model with an id and license; RunError where the run lacks figures."""
    recipe = load_recipe(run.folder / "recipe.yaml")
    try:
        model = run.metrics()["model"]
        config = quantization_config(recipe, Precision(getattr(torch, model["dtype"]), bf16=False, fp16=False))
        settings = {} if config is None else config.to_diff_dict()
        keys = [key for key in recipe.quantization.model_dump() if key in settings]
        base = base or base_id(recipe) or public_name(model["name_or_path"])
        more: dict[str, Any] = {"repo_id": repo_id}
        more |= {"quantization": ", ".join(f"{key}={settings[key]!r}" for key in keys)}
        more |= {"served": adapter_command(base, repo_id, read_adapter_config(run.adapter)), **_measured(run)}
        return _filled_in("adapter.md.jinja", run, recipe, base, license_ or license_of(recipe), more)
    except (ValueError, KeyError, TypeError, UndefinedError) as error:
        files = f"metrics.json, environment.json or evaluation.json of {run.folder}"
        raise RunError(f"{files} is damaged or incomplete; copy it back, or finish the run first.") from error


def write_merged_card(run: Run, recipe: Recipe, merged: dict[str, Any], folder: Path) -> Path:
    """Writes FOLDER/README.md from the figures of `Merged.as_dict` and returns its path."""
    base = base_id(recipe) or public_name(merged["base"])
    served = adapter_command(base if "/" in base else "BASE", "RUN/adapter", read_adapter_config(run.adapter))
    more = {"merged": merged, "served": served}
    text = _filled_in("merged.md.jinja", run, recipe, base, license_of(recipe), more)
    path = folder / "README.md"
    write_atomically(path, text, shared=True)
    return path


def note_figures(run: Run, **figures: dict[str, Any]) -> None:
    """Puts figures into the run's metrics, and into its card where nobody has edited that."""
    with suppress(OSError, RunError):  # a run that may only be read is merged all the same
        if figures:
            run.update_metrics(**figures)
        if is_unedited(run.adapter / "README.md"):
            write_card(run)


def is_unedited(card: Path) -> bool:
    """Whether a card is as some version of sevpeft wrote it: its last line holds the hash of the others."""
    whole = card.read_text(encoding="utf-8") if card.is_file() else ""
    return bool(whole) and whole == _signed(whole.rpartition("\n<!-- ")[0])


def _signed(text: str) -> str:
    return f"{text}\n<!-- written by sevpeft: {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def base_id(recipe: Recipe) -> str | None:
    """Hub id of the recipe's base model; None where it is a folder of which about.base_model says none."""
    name = recipe.model.name_or_path
    return recipe.about.base_model or (name if "/" in name and public_name(name) == name else None)


def license_of(recipe: Recipe) -> str | None:
    """License of the recipe's base model; None where it is not known: a folder may hold any model."""
    name, license_ = recipe.model.name_or_path, recipe.about.license
    known = (base_id(recipe) or public_name(name) == name) and license_ != "see its page"
    return license_ if known else None


def public_recipe(recipe: Recipe) -> str:
    """The recipe as it may be published: no folder, host or key of anybody, no row of the data."""
    shown = recipe.model_dump()
    shown["prompt"]["examples"] = shown["evaluation"]["judge"] = None
    for section in ("model", "data", "severity", "evaluation", "training"):
        shown[section] |= {key: public_name(text) for key, text in shown[section].items() if isinstance(text, str)}
    if mix := shown["data"]["mix"]:
        mix["sources"] = {name: public_name(path) for name, path in mix["sources"].items()}
    return Recipe.model_validate(shown).to_yaml().strip()


def _measured(run: Run) -> dict[str, Any]:
    """Test scores of this very adapter, and the verdict of the comparison that it stands in; what there is of both."""
    content, comparison, figures = run.read_json("evaluation.json"), Run(run.folder.resolve().parent), {}
    if content.get("adapter") == file_hash(run.adapter / "adapter_model.safetensors"):
        shown = {name: about for name, about in content["metrics"].items() if name in _SCORES}
        figures = {"evaluation": content, "metrics": shown}
    found = comparison.read_json("comparison.json")
    arms = [arm for arm, runs in found.get("runs", {}).items() if run.folder.resolve().name in runs]
    return figures | ({"verdict": {**found, "arm": arms[0]}} if arms and found.get("claim") else {})


def _results(metrics: dict[str, Any], data: str, more: dict[str, Any]) -> list[EvalResult]:
    """For the Hub: the loss of each severity on validation, and the scores of each on the test."""
    after = {key.removeprefix("loss").strip("_") or "all": value for key, value in metrics["after"].items()}
    found = [("validation", stratum, "loss", "Validation loss", round(value, 4)) for stratum, value in after.items()]
    for stratum, of in more.get("evaluation", {}).get("scores", {}).items():
        for score, about in more["metrics"].items():
            value = of["metrics"].get(score, {}).get("adapter", {}).get("value")
            found += [] if value is None else [("test", stratum, _SCORES[score], about["label"], round(value, 4))]
    fixed: dict[str, Any] = {"task_type": "text-generation", "dataset_type": data, "dataset_name": "Consultations"}
    names = ("dataset_split", "dataset_config", "metric_type", "metric_name", "metric_value")
    return [EvalResult(**fixed | dict(zip(names, about, strict=True))) for about in found]


def choices_text(figures: dict[str, Any]) -> str:
    """What `choices` returns as Markdown, for the card and the screen."""
    return _rendered("choices.md.jinja", {**figures, "estimate_text": estimate_text})


def _rendered(template: str, facts: dict[str, Any]) -> str:
    return Template((_TEMPLATES / template).read_text(encoding="utf-8")).render(facts)


def distance(found: dict[str, Any]) -> str:
    """A `Difference` in words."""
    return f"KL {found['kl']:.2g} nats per token, {found['equal_next_tokens']:.1%} equal next tokens"


def _filled_in(template: str, run: Run, recipe: Recipe, base: str, license_: str | None, more: dict[str, Any]) -> str:
    metrics, terms, merged = run.metrics(), HUB["licenses"].get((license_ or "").lower(), {}), "merged" in more
    hub_data = [recipe.data.path] if str(metrics["data"].get("source")).endswith(" on the Hub") else []
    about: dict[str, Any] = {"language": "ar", "pipeline_tag": "text-generation", "tags": _TAGS}
    about |= {"library_name": "transformers" if merged else "peft", "datasets": hub_data or None}
    about |= {"model_name": f"{base.split('/')[-1]}-severity"}
    if "/" in base:
        about |= {"base_model": base, "base_model_relation": "finetune" if merged else "adapter"}
    if license_:
        about["license"] = terms.get("hub", "other")
    if license_ and "hub" not in terms:
        about |= {"license_name": license_.lower().replace(" ", "-"), "license_link": f"https://huggingface.co/{base}"}
    if not merged:
        about["eval_results"] = _results(metrics, (hub_data or ["private"])[0], more)
    facts = {**metrics, **more, "base": base, "license": license_, "notice": terms.get("notice"), "recipe": recipe}
    facts |= {"environment": run.read_json("environment.json"), "recipe_text": public_recipe(recipe)}
    facts |= {"distance": distance, "choices_text": choices_text, "estimate_text": estimate_text, "oracle": ORACLE}
    facts |= {"severities": SEVERITIES, "severity_lines": [line.strip() for line in SEVERITY_LINES.values()]}
    facts |= {f"about_{part}": _rendered(f"{part}.md.jinja", facts) for part in ("run", "limits")}
    card = ModelCard.from_template(ModelCardData(**about), template_path=str(_TEMPLATES / template), **facts)
    return _signed(str(card).rstrip() + "\n")


# How a merged model is served: the commands for llama.cpp, Ollama and vLLM, and the prompt that each asks with.


def modelfile(prompt: Prompt, recipe: Recipe) -> str:
    """Ollama's Modelfile for what the card's commands quantize, which asks with the prompt of the training."""
    # llama.cpp puts the token that begins a text there itself.
    # A placeholder is no English question, examples may be rows of the data, and Ollama predicts no severity.
    prompt = replace(prompt, english_template=None, english_cue=None, severity="none", examples=())
    text = prompt.text("{{ .Prompt }}").removeprefix(prompt.tokenizer.bos_token or "\0")
    stop = prompt.tokenizer.convert_ids_to_tokens(prompt.end_id)
    return _rendered("Modelfile.jinja", {"text": text, "stop": stop, "generation": recipe.generation}) + "\n"


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
    modules = f"--enable-lora --lora-modules severity={shlex.quote(adapter)} --max-lora-rank {rank}"
    # It would render the base model's own template.
    return f"vllm serve {shlex.quote(base)} {modules} --chat-template {CHAT_TEMPLATE}", ""
