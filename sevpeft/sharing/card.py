"""Turns a finished run folder into the model card that travels with its adapter.

Written from the run's own files, so that a figure on the card is one that was measured. No row of the data, no path
and no name of a person or machine is quoted: a card is published.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from sevpeft.modeling.loading import Precision, quantization_config
from sevpeft.recipe import Recipe, load_recipe
from sevpeft.runs import Run, write_atomically
from sevpeft.severity.probabilities import SEVERITIES

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

A LoRA adapter for `{{ base }}`, trained with [sevpeft](https://pypi.org/project/sevpeft/) on Arabic medical
consultations with a loss that is weighted by severity.

> **Not a medical device.** The adapter continues text. It has not been tested on patients, it can be wrong in ways that
> harm, and no advice of it may reach a patient without a clinician who has read it.

## Training data

{{ data }}

## Severity weights

{{ weights }}

## Validation loss

Nats per answer token, unweighted, on {{ validation_rows }} held-out consultations; lower is better. A lower loss is not
a better answer, and nothing here was compared with a run without severity weights (`severity.control: uniform`) or
with shuffled ones (`severity.control: shuffled`).

{{ losses }}

## Use

```python
{{ use }}
```

{{ prompt }}

## How it was made

{{ made }}

The whole recipe:

```yaml
{{ recipe }}
```
"""


def write_card(run: Run) -> Path:
    """Writes RUN/adapter/README.md and returns its path."""
    path = run.adapter / "README.md"
    write_atomically(path, card_text(run), shared=True)
    return path


def card_text(run: Run) -> str:
    recipe = load_recipe(run.folder / "recipe.yaml")
    metrics, environment = run.metrics(), run.environment()
    base = public_name(metrics["model"]["name_or_path"])
    data = ModelCardData(
        language="ar",
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=base if "/" in base else None,
        tags=["lora", "sft", "trl", "medical", "arabic", "severity-weighted-loss"],
    )
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=f"{base.split('/')[-1]}: severity-weighted adapter",
        base=base,
        data=data_lines(metrics),
        weights=weights_lines(recipe, metrics["weights"]),
        validation_rows=f"{metrics['data']['encoding']['validation']['rows']:,}",
        losses=losses_table(metrics),
        use=_use_lines(recipe, metrics["model"]),
        prompt="\n\n".join([*_unquantized_lines(metrics), prompt_lines(recipe)]),
        made=made_lines(metrics, environment),
        recipe=without_paths(recipe).to_yaml().strip(),
    )
    return str(card)


def note_unquantized_base(run: Run, **figures: dict[str, Any]) -> None:
    """Puts the distance over the unquantized base into the run, and into its card where nobody has edited that."""
    card = run.adapter / "README.md"
    with suppress(OSError):  # a run that may only be read is merged all the same
        untouched = card.is_file() and card.read_text(encoding="utf-8") == card_text(run)
        run.update_metrics(unquantized_base=figures)
        if untouched:
            write_card(run)


def distance(found: dict[str, Any]) -> str:
    """A `Difference` in words."""
    return f"KL {found['kl']:.2g} nats per token, {found['equal_next_tokens']:.1%} equal next tokens"


def _use_lines(recipe: Recipe, model: dict[str, Any]) -> str:
    """Python that loads the adapter, on a quantized base where it was trained on one."""
    config = quantization_config(recipe, Precision(getattr(torch, model["dtype"]), bf16=False, fp16=False))
    loaded, classes = '"ADAPTER"', "AutoTokenizer"
    if config is not None:
        known = config.to_diff_dict()
        settings = ", ".join(f"{key}={known[key]!r}" for key in recipe.quantization.model_dump() if key in known)
        arguments = ('"ADAPTER"', f'dtype="{model["dtype"]}"', f"quantization_config=BitsAndBytesConfig({settings})")
        loaded = "\n" + "".join(f"    {argument},\n" for argument in arguments)
        classes += ", BitsAndBytesConfig"
    return (
        f"from peft import AutoPeftModelForCausalLM\nfrom transformers import {classes}\n\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({loaded})\n"
        'tokenizer = AutoTokenizer.from_pretrained("ADAPTER")'
    )


def _unquantized_lines(metrics: dict[str, Any]) -> list[str]:
    bits, measured = metrics["model"].get("bits"), metrics.get("unquantized_base")
    if not bits:
        return []
    how_far = (
        f"measured: {distance(measured['gap'])}, where the adapter itself is worth {measured['effect']['kl']:.2g}"
        if measured
        else "how far off was not measured"
    )
    return [
        f"It was trained on the base in {bits} bit. Over the unquantized base, as vLLM loads it, it is another model "
        f"({how_far}). `sevpeft merge` makes a plain model of the weights that were trained on."
    ]


def data_lines(metrics: dict[str, Any]) -> str:
    data, weights = metrics["data"], metrics["weights"]
    train = data["encoding"]["train"]
    counts = ", ".join(f"{count:,} {name}" for name, count in reversed(weights["severities"].items()))
    lines = [
        f"- {weights['consultations']:,} consultations ({counts or 'severity not known'}), "
        f"{train['answer_tokens']:,} answer tokens; fingerprint `{data['fingerprint']}`",
        f"- split by {data['split_by']}; questions that stand in two splits: {data['questions_in_two_splits']:,}",
        f"- questions shortened to fit: {train['shortened']:,}; "
        f"rows refused because their answer did not: {train['refused']:,}",
    ]
    lines += [f"- rows rejected ({reason}): {count:,}" for reason, count in data["rejected"].items()]
    return "\n".join(lines)


def weights_lines(recipe: Recipe, weights: dict[str, Any]) -> str:
    alpha, beta, gamma = recipe.severity.coefficients()
    control = recipe.severity.control
    lines = [
        f"- w = {alpha:g} · p_non_critical + {beta:g} · p_neutral + {gamma:g} · p_critical, "
        f"normalize: {recipe.severity.normalize}, reduction: {recipe.severity.reduction}",
        f"- from {weights['minimum']:.3f} to {weights['maximum']:.3f}, mean {weights['mean']:.3f}, "
        f"effective sample size {weights['effective_sample_size']:,.0f} of {weights['consultations']:,}",
    ]
    if control != "none":
        lines.append(f"- **control run**: {control} weights, so severity did not steer this adapter")
    return "\n".join(lines)


def losses_table(metrics: dict[str, Any]) -> str:
    rows = ["| severity | before | after |", "|---|---|---|"]
    for key, label in [("loss", "all"), *((f"loss_{name}", name) for name in reversed(SEVERITIES))]:
        if key in metrics["after"]:
            rows.append(f"| {label} | {metrics['before'][key]:.4f} | {metrics['after'][key]:.4f} |")
    return "\n".join(rows)


def prompt_lines(recipe: Recipe) -> str:
    if recipe.prompt.chat:
        return "Ask it through the tokenizer's chat template (`enable_thinking=False` where the template knows it)."
    text = recipe.prompt.template.replace("{answer_cue}", recipe.prompt.answer_cue)
    system = f"{recipe.prompt.system}\n\n" if recipe.prompt.system else ""
    return f"Ask it with exactly this prompt, nothing after the last character:\n\n```text\n{system}{text}\n```"


def made_lines(metrics: dict[str, Any], environment: dict[str, Any]) -> str:
    model, training = metrics["model"], metrics["training"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    bits = f", base in {model['bits']} bit" if model["bits"] else ""
    return "\n".join(
        [
            f"- {model['trainable_parameters']:,} trainable parameters on {model['parameters']:,}, "
            f"{model['dtype']}{bits}",
            *_base_lines(model),
            f"- {training['steps']:,} steps, {training['epochs']:.3g} epochs, seed {environment['seed']}, "
            f"{environment['processes']} process{'es' * (environment['processes'] > 1)} on {environment['device']}",
            f"- {versions}, Python {environment['python']}, commit {environment['commit'] or 'unknown'}",
        ]
    )


def _base_lines(model: dict[str, Any]) -> list[str]:
    """Which weights the adapter belongs to: others of the same shapes would take it and answer worse."""
    if not model.get("fingerprint"):
        return []
    commit = f"revision {model['commit']}, " if model.get("commit") else ""
    return [f"- base weights: {commit}fingerprint `{model['fingerprint']}`"]


def public_name(name: str) -> str:
    """A Hub id as it is; of a local folder only its last part, since a path can name a person or a hospital."""
    return Path(name).name if Path(name).expanduser().exists() else name


def without_paths(recipe: Recipe) -> Recipe:
    content = recipe.model_dump()
    for section, key in (("model", "name_or_path"), ("data", "path")):
        content[section][key] = public_name(content[section][key])
    return Recipe.model_validate(content)
