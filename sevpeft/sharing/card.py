"""The model cards of an adapter and of a merged model, filled in from the run's own files (templates/*.jinja).

A figure on a card is one that was measured. No row of the data, no path and no name of a person or machine is quoted:
a card is published.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template

from sevpeft.errors import RunError
from sevpeft.modeling.loading import Precision, quantization_config
from sevpeft.modeling.saved_adapters import read_adapter_config
from sevpeft.modeling.tiny import TINY
from sevpeft.recipe import Recipe, load_recipe
from sevpeft.runs import Run, write_atomically
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.sharing.serving import adapter_command, asking, conversion_commands

_TEMPLATES = Path(__file__).parent / "templates"
_TAGS = ["lora", "sft", "trl", "medical", "arabic", "severity-weighted-loss"]
# As the Hub writes them; every other license is `other` with a name.
_HUB_LICENSES = {
    *("apache-2.0", "mit", "cc-by-nc-4.0", "bigscience-bloom-rail-1.0"),
    *("llama2", "llama3", "llama3.1", "gemma"),
}
_UNKNOWN_LICENSES = {None, "none stated", "see its page"}


def write_card(run: Run) -> Path:
    """Writes RUN/adapter/README.md and returns its path."""
    path = run.adapter / "README.md"
    write_atomically(path, adapter_card(run), shared=True)
    return path


def adapter_card(run: Run) -> str:
    """The card of a run's adapter."""
    recipe, model = load_recipe(run.folder / "recipe.yaml"), run.metrics()["model"]
    config = quantization_config(recipe, Precision(getattr(torch, model["dtype"]), bf16=False, fp16=False))
    settings = {} if config is None else config.to_diff_dict()
    asked = [key for key in recipe.quantization.model_dump() if key in settings]
    header = {"library_name": "peft", "quantization": ", ".join(f"{key}={settings[key]!r}" for key in asked)}
    return _filled_in("adapter.md.jinja", run, recipe, _public_name(model["name_or_path"]), **header)


def write_merged_card(run: Run, recipe: Recipe, merged: dict[str, Any], folder: Path) -> Path:
    """Writes FOLDER/README.md and returns its path.

    Args:
        merged: figures as of `Merged.as_dict`.
    """
    base = _public_name(merged["base"])
    local = recipe.model.name_or_path != TINY and base != merged["base"]  # a folder may hold any license
    license_ = None if local or recipe.about.license in _UNKNOWN_LICENSES else recipe.about.license
    known = license_ is None or license_ in _HUB_LICENSES
    command, reason = adapter_command(base if "/" in base else "BASE", "RUN/adapter", read_adapter_config(run.adapter))
    text = _filled_in(
        "merged.md.jinja",
        run,
        recipe,
        base,
        library_name="transformers",
        base_model_relation="finetune" if "/" in base else None,
        license=license_ if known else "other",
        license_name=None if known else str(license_).lower().replace(" ", "-"),
        merged=merged,
        base_license=license_,
        adapter_command=command,
        why_no_adapter=reason,
        asking=asking(recipe),
        conversion="\n".join(conversion_commands("OUTPUT", merged["dtype"])),
        before_merging=", before merging",
    )
    path = folder / "README.md"
    write_atomically(path, text, shared=True)
    return path


def check_card_sources(run: Run) -> None:
    """Raises RunError where the run lacks what a card is written from: before merging, which takes long."""
    for name, read, needed in (
        ("metrics.json", run.metrics, {"model", "data", "weights", "training", "after"}),
        ("environment.json", run.environment, {"versions", "seed"}),
    ):
        try:
            whole = needed <= set(read())
        except ValueError:
            whole = False
        if not whole:
            raise RunError(f"{run.folder / name} is damaged or incomplete; copy it back, or finish the run first.")


def note_unquantized_base(run: Run, **figures: dict[str, Any]) -> None:
    """Puts the distance over the unquantized base into the run, and into its card where nobody has edited that."""
    card = run.adapter / "README.md"
    with suppress(OSError):  # a run that may only be read is merged all the same
        untouched = card.is_file() and card.read_text(encoding="utf-8") == adapter_card(run)
        run.update_metrics(unquantized_base=figures)
        if untouched:
            write_card(run)


def distance(found: dict[str, Any]) -> str:
    """A `Difference` in words."""
    return f"KL {found['kl']:.2g} nats per token, {found['equal_next_tokens']:.1%} equal next tokens"


def _filled_in(template: str, run: Run, recipe: Recipe, base: str, **more: Any) -> str:
    header = {
        "language": "ar",
        "pipeline_tag": "text-generation",
        "base_model": base if "/" in base else None,
        "tags": _TAGS,
        **{key: more.pop(key, None) for key in ("library_name", "base_model_relation", "license", "license_name")},
    }
    losses = [("loss", "all"), *((f"loss_{name}", name) for name in reversed(SEVERITIES))]
    facts = {
        **run.metrics(),
        **more,
        "base": base,
        "recipe": recipe,
        "coefficients": recipe.severity.coefficients(),
        "environment": run.environment(),
        "losses": losses,
        "recipe_text": _without_paths(recipe).to_yaml().strip(),
        "distance": distance,
        "prompt": _prompt(recipe),
    }
    about_run = Template((_TEMPLATES / "run.md.jinja").read_text(encoding="utf-8")).render(facts)
    path = str(_TEMPLATES / template)
    return str(ModelCard.from_template(ModelCardData(**header), template_path=path, **facts, about_run=about_run))


def _prompt(recipe: Recipe) -> str:
    if recipe.prompt.chat:
        return "Ask it through the tokenizer's chat template (`enable_thinking=False` where the template knows it)."
    text = recipe.prompt.template.replace("{answer_cue}", recipe.prompt.answer_cue)
    system = f"{recipe.prompt.system}\n\n" if recipe.prompt.system else ""
    return f"Ask it with exactly this prompt, nothing after the last character:\n\n```text\n{system}{text}\n```"


def _public_name(name: str) -> str:
    """A Hub id as it is; of a local folder only its last part, since a path can name a person or a hospital."""
    return Path(name).name if Path(name).expanduser().exists() else name


def _without_paths(recipe: Recipe) -> Recipe:
    content = recipe.model_dump()
    for section, key in (("model", "name_or_path"), ("data", "path")):
        content[section][key] = _public_name(content[section][key])
    return Recipe.model_validate(content)
