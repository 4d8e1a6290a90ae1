"""Turns a finished run and the figures of its merging into the model card of the merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sevpeft.errors import RunError
from sevpeft.modeling.saved_adapters import read_adapter_config
from sevpeft.modeling.tiny import TINY
from sevpeft.recipe import Recipe
from sevpeft.runs import Run, write_atomically
from sevpeft.sharing.card import (
    data_lines,
    distance,
    losses_table,
    made_lines,
    prompt_lines,
    public_name,
    weights_lines,
    without_paths,
)
from sevpeft.sharing.serving import adapter_command, asking, conversion_commands

# As the Hub writes them; every other licence is `other` with a name.
_HUB_LICENCES = {
    *("apache-2.0", "mit", "cc-by-nc-4.0", "bigscience-bloom-rail-1.0"),
    *("llama2", "llama3", "llama3.1", "gemma"),
}
_UNKNOWN_LICENCES = {None, "none stated", "see its page"}

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

`{{ base }}` with a LoRA adapter merged into its weights. The adapter was trained with
[sevpeft](https://pypi.org/project/sevpeft/) on Arabic medical consultations with a loss that is weighted by severity.

> **Not a medical device.** The model continues text. It has not been tested on patients, it can be wrong in ways that
> harm, and no advice of it may reach a patient without a clinician who has read it.

{{ licence }}

## Merging

{{ merging }}

## Training data

{{ data }}

## Severity weights

{{ weights }}

## Validation loss

Nats per answer token, unweighted, on {{ validation_rows }} held-out consultations, before merging; lower is better. A
lower loss is not a better answer.

{{ losses }}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("OUTPUT")
tokenizer = AutoTokenizer.from_pretrained("OUTPUT")
```

{{ prompt }}

With vLLM:

```sh
vllm serve OUTPUT
```

{{ asking }} {{ as_adapter }}

With llama.cpp or Ollama, where llama.cpp knows the architecture. The Modelfile in this folder asks with the prompt of
the training. Quantising changes the model once more, and what it changes was not measured here:

```sh
{{ conversion }}
```

## How it was made

{{ made }}

The whole recipe:

```yaml
{{ recipe }}
```
"""


def check_card_sources(run: Run) -> None:
    """Raises RunError where the run lacks what the card is written from: before merging, which takes long."""
    for name, read, needed in (
        ("metrics.json", run.metrics, ("model", "data", "weights", "training", "after")),
        ("environment.json", run.environment, ("versions", "seed")),
    ):
        try:
            whole = set(needed) <= set(read())
        except ValueError:
            whole = False
        if not whole:
            raise RunError(f"{run.folder / name} is damaged or incomplete; copy it back, or finish the run first.")


def write_merged_card(run: Run, recipe: Recipe, figures: dict[str, Any], folder: Path) -> Path:
    """Writes FOLDER/README.md and returns its path.

    Args:
        figures: as `Merged.as_dict`.
    """
    metrics = run.metrics()
    base = public_name(figures["base"])
    licence = _licence(recipe)
    data = ModelCardData(
        language="ar",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if "/" in base else None,
        base_model_relation="finetune" if "/" in base else None,
        license=licence if licence in _HUB_LICENCES else "other" if licence else None,
        license_name=_slug(licence) if licence and licence not in _HUB_LICENCES else None,
        tags=["lora", "sft", "trl", "medical", "arabic", "severity-weighted-loss"],
    )
    command, reason = adapter_command(base if "/" in base else "BASE", "RUN/adapter", read_adapter_config(run.adapter))
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=f"{base.split('/')[-1]}: severity-weighted, merged",
        base=base,
        licence=f"Licence of the base model: {licence}. It holds for this model too."
        if licence
        else "The licence of the base model is not known here; see its page.",
        merging=merging_lines(figures),
        data=data_lines(metrics),
        weights=weights_lines(recipe, metrics["weights"]),
        validation_rows=f"{metrics['data']['encoding']['validation']['rows']:,}",
        losses=losses_table(metrics),
        prompt=prompt_lines(recipe),
        asking=asking(recipe),
        as_adapter=_as_adapter(command, figures) if command else f"{reason}.",
        conversion="\n".join(conversion_commands("OUTPUT", figures["dtype"])),
        made=made_lines(metrics, run.environment()),
        recipe=without_paths(recipe).to_yaml().strip(),
    )
    path = folder / "README.md"
    write_atomically(path, str(card), shared=True)
    return path


def merging_lines(figures: dict[str, Any]) -> str:
    """The measurements as a list."""
    gaps, bits, weights = figures["gaps"], figures["bits"], figures["weights"]
    base = f"base in {bits} bit" if bits else "base"
    lines = [
        f"- {figures['matrices']:,} weights of the {weights} base in {figures['dtype']}, each added in float32 and "
        "rounded once",
        f"- read back from its files and compared with the model that was trained ({base} + adapter) on "
        f"{figures['effect']['tokens']:,} answer tokens: {distance(gaps[weights])}, largest difference of a logit "
        f"{gaps[weights]['largest_logit_difference']:.2g}",
        f"- for comparison, what the adapter does to the {base}: {distance(figures['effect'])}",
    ]
    if bits:
        lines += [
            f"- merged into the {other} base instead: {distance(gap)}"
            for other, gap in gaps.items()
            if other != weights
        ]
    return "\n".join(lines)


def _as_adapter(command: str, figures: dict[str, Any]) -> str:
    text = f"The adapter alone is served by `{command}`."
    if not figures["bits"] or "unquantized" not in figures["gaps"]:
        return text
    return (
        f"{text} That is over the unquantized base, which it was not trained on: "
        f"{distance(figures['gaps']['unquantized'])}, where the adapter itself is worth {figures['effect']['kl']:.2g}."
    )


def _licence(recipe: Recipe) -> str | None:
    """What the recipe says of its model; nothing of a folder, which may hold any."""
    name, licence = recipe.model.name_or_path, recipe.about.licence
    if licence in _UNKNOWN_LICENCES or (name != TINY and public_name(name) != name):
        return None
    return licence


def _slug(licence: str | None) -> str:
    return (licence or "").lower().replace(" ", "-")
