"""Model cards of adapters and merged models (templates/*.jinja), and the commands that serve them.

Every figure on a card was measured. A card contains no data row, no path, and no name of a person or machine.
"""

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
from peft.utils import SAFETENSORS_WEIGHTS_NAME

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
# Scores of evaluation.json that a card shows, and their metric types on the Hub.
_SCORES = {"nll": "loss", "bertscore_f1": "bertscore", "chrf": "chrf", "rouge_l": "rouge", "urgent_referral": "rate"}
# Ranks that vLLM has kernels for (0.10 and later, `--max-lora-rank`).
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write_card(run: Run) -> Path:
    """Writes RUN/adapter/README.md and returns its path."""
    path = run.adapter / "README.md"
    write_atomically(path, adapter_card(run), shared=True)
    return path


def adapter_card(run: Run, repo_id: str = "ADAPTER", base: str | None = None, license_: str | None = None) -> str:
    """The card of a run's adapter; `base` and `license_` replace the recipe's. RunError if the run lacks figures."""
    recipe, weights = load_recipe(run.folder / "recipe.yaml"), file_hash(run.adapter / SAFETENSORS_WEIGHTS_NAME)
    try:
        model = run.metrics()["model"]
        if run.metrics().get("adapter", weights) != weights:
            raise RunError(f"{run.adapter} has other weights than its training wrote; restore them, or train again.")
        config = quantization_config(recipe, Precision(getattr(torch, model["dtype"]), bf16=False, fp16=False))
        settings = {} if config is None else config.to_diff_dict()
        keys = [key for key in recipe.quantization.model_dump() if key in settings]
        base = base or base_id(recipe) or public_name(model["name_or_path"])
        more: dict[str, Any] = {"repo_id": repo_id, **_measured(run, weights)}
        more["quantization"] = ", ".join(f"{key}={settings[key]!r}" for key in keys)
        more["served"] = adapter_command(base, repo_id, read_adapter_config(run.adapter))
        return _filled_in("adapter.md.jinja", run, recipe, base, license_ or license_of(recipe), more)
    except (ValueError, KeyError, TypeError, UndefinedError) as error:
        files = f"metrics.json, environment.json or evaluation.json of {run.folder}"
        raise RunError(f"{files} is damaged or incomplete; restore it, or finish the run first.") from error


def write_merged_card(run: Run, recipe: Recipe, merged: dict[str, Any], folder: Path) -> None:
    """Writes FOLDER/README.md from the fields of `Merged`."""
    base = base_id(recipe) or public_name(merged["base"])
    served = adapter_command(base if "/" in base else "BASE", "RUN/adapter", read_adapter_config(run.adapter))
    more = {"merged": merged, "served": served}
    text = _filled_in("merged.md.jinja", run, recipe, base, license_of(recipe), more)
    write_atomically(folder / "README.md", text, shared=True)


def note_figures(run: Run, **figures: dict[str, Any]) -> None:
    """Adds figures to the run's metrics, and to its card unless somebody has edited it."""
    with suppress(OSError, RunError):  # a read-only run is merged all the same
        if figures:
            run.update_metrics(**figures)
        if is_unedited(run.adapter / "README.md"):
            write_card(run)


def is_unedited(card: Path) -> bool:
    """Whether a card is as sevpeft wrote it: the last line holds the hash of the others."""
    whole = card.read_text(encoding="utf-8") if card.is_file() else ""
    return bool(whole) and whole == _signed(whole.rpartition("\n<!-- ")[0])


def _signed(text: str) -> str:
    return f"{text}\n<!-- written by sevpeft: {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def base_id(recipe: Recipe) -> str | None:
    """Hub id of the recipe's base model; None for a folder without about.base_model."""
    name = recipe.model.name_or_path
    return recipe.about.base_model or (name if "/" in name and public_name(name) == name else None)


def license_of(recipe: Recipe) -> str | None:
    """License of the recipe's base model; None if unknown: a folder may hold any model."""
    name, license_ = recipe.model.name_or_path, recipe.about.license
    known = (base_id(recipe) or public_name(name) == name) and license_ != "see its page"
    return license_ if known else None


def public_recipe(recipe: Recipe) -> str:
    """The recipe for publication: without folders, hosts, keys and data rows."""
    shown = recipe.model_dump()
    shown["prompt"]["examples"] = shown["evaluation"]["judge"] = None
    for section in ("model", "data", "severity", "evaluation", "training"):
        shown[section] |= {key: public_name(text) for key, text in shown[section].items() if isinstance(text, str)}
    if mix := shown["data"]["mix"]:
        mix["sources"] = {name: public_name(path) for name, path in mix["sources"].items()}
    return Recipe.model_validate(shown).to_yaml().strip()


def _measured(run: Run, weights: str) -> dict[str, Any]:
    """Test scores of the adapter with this hash, and the verdict of its comparison, as far as they exist."""
    evaluation, figures = run.read_json("evaluation.json"), dict[str, Any]()
    if evaluation.get("adapter") == weights:
        shown = {name: about for name, about in evaluation["metrics"].items() if name in _SCORES}
        figures = {"evaluation": evaluation, "metrics": shown}
    folder = run.folder.resolve()
    comparison = Run(folder.parent).read_json("comparison.json")
    arms = [arm for arm, runs in comparison.get("runs", {}).items() if folder.name in runs]
    return figures | ({"verdict": {**comparison, "arm": arms[0]}} if arms and comparison.get("claim") else {})


def _results(metrics: dict[str, Any], data: str, more: dict[str, Any]) -> list[EvalResult]:
    """Results for the Hub: the validation loss and the test scores of each severity."""
    rows = []
    for key, value in metrics["after"].items():
        stratum = key.removeprefix("loss").strip("_") or "all"
        rows.append(("validation", stratum, "loss", "Validation loss", round(value, 4)))
    for stratum, scores in more.get("evaluation", {}).get("scores", {}).items():
        for score, about in more["metrics"].items():
            if (value := scores["metrics"].get(score, {}).get("adapter", {}).get("value")) is not None:
                rows.append(("test", stratum, _SCORES[score], about["label"], round(value, 4)))
    fixed: dict[str, Any] = {"task_type": "text-generation", "dataset_type": data, "dataset_name": "Consultations"}
    names = ("dataset_split", "dataset_config", "metric_type", "metric_name", "metric_value")
    return [EvalResult(**fixed | dict(zip(names, row, strict=True))) for row in rows]


def choices_text(figures: dict[str, Any]) -> str:
    """The result of `choices` as Markdown, for the card and the screen."""
    return rendered("choices.md.jinja", {**figures, "estimate_text": estimate_text})


def rendered(template: str, facts: dict[str, Any]) -> str:
    return Template((_TEMPLATES / template).read_text(encoding="utf-8")).render(facts)


def distance(gap: dict[str, Any]) -> str:
    """A `Difference` in words."""
    return f"KL {gap['kl']:.2g} nats per token, {gap['equal_next_tokens']:.1%} equal next tokens"


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
    facts |= {f"about_{part}": rendered(f"{part}.md.jinja", facts) for part in ("run", "limits")}
    card = ModelCard.from_template(ModelCardData(**about), template_path=str(_TEMPLATES / template), **facts)
    return _signed(str(card).rstrip() + "\n")


# Serving: the prompt for Ollama, and the command for vLLM.


def modelfile(prompt: Prompt, recipe: Recipe) -> str:
    """Ollama's Modelfile, with the training prompt, for the file that the card's commands write."""
    # The placeholder is not an English question, examples may be data rows, and Ollama predicts no severity.
    prompt = replace(prompt, english_template=None, english_cue=None, severity="none", examples=())
    # llama.cpp adds the BOS token itself.
    text = prompt.text("{{ .Prompt }}").removeprefix(prompt.tokenizer.bos_token or "\0")
    stop = prompt.tokenizer.convert_ids_to_tokens(prompt.end_id)
    return rendered("Modelfile.jinja", {"text": text, "stop": stop, "generation": recipe.generation}) + "\n"


def adapter_command(base: str, adapter: str, config: dict[str, Any]) -> tuple[str | None, str]:
    """(command, "") to serve the adapter with vLLM, or (None, reason) if vLLM would refuse or misread it.

    vLLM silently misreads patterns of rank or alpha: it uses one scale for all layers (vllm/lora/lora_weights.py).
    """
    settings = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "rank_pattern", "alpha_pattern")
    used = [f"lora.{name}" for name in settings if config.get(name)]
    used += ["lora.bias"] if config.get("bias", "none") != "none" else []
    used += [f"lora.r={config['r']}"] if config["r"] > RANKS[-1] else []
    if used:
        return None, f"vLLM does not support {', '.join(used)} of an adapter: serve the merged model"
    rank = next(known for known in RANKS if known >= config["r"])
    modules = f"--enable-lora --lora-modules severity={shlex.quote(adapter)} --max-lora-rank {rank}"
    # By default vLLM uses the base model's own template.
    return f"vllm serve {shlex.quote(base)} {modules} --chat-template {CHAT_TEMPLATE}", ""
