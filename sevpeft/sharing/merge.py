"""Turns a run's adapter and its base model into one model that needs no PEFT, and proves that it is the same.

The base is loaded in the precision it is stored in and never quantised: adding to 4-bit weights quantises them anew and
moves the logits some thirty times as far. What was merged is written, read again and compared with base + adapter
before the folder gets its name.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sevpeft.console import Screen
from sevpeft.errors import ModelError, RunError, SevpeftError
from sevpeft.evaluation.generation import context_length
from sevpeft.evaluation.switching import check_adapter
from sevpeft.modeling.loading import (
    LARGEST_4BIT_ON_CPU,
    Precision,
    choose_precision,
    count_parameters,
    load_config,
    load_model,
    load_tokenizer,
    uses_gpu,
)
from sevpeft.modeling.packing import ROUNDING
from sevpeft.modeling.saved_adapters import WEIGHTS, attach_adapter
from sevpeft.recipe import Recipe, load_recipe
from sevpeft.recipe.sections import QuantizationSection
from sevpeft.runs import Run
from sevpeft.sharing.fidelity import Difference, Text, answer_logits, bundled_texts, difference, keeps_the_adapter
from sevpeft.sharing.merged_card import write_merged_card
from sevpeft.sharing.merged_folder import (
    merged_folder,
    refuse_output,
    refuse_without_room,
    stored_dtype,
    write_model,
)
from sevpeft.sharing.serving import modelfile
from sevpeft.training.preparation import prompt_of
from sevpeft.training.progress import say


@dataclass(frozen=True)
class Merged:
    """What was merged and how it was checked.

    Attributes:
        base: the base model, as the recipe names it.
        dtype: of the written weights.
        parameters: of the merged model.
        matrices: weights that the adapter changed by adding to them.
        rounding: between base + adapter and the model that was read back from the folder.
        effect: between base + adapter and the base alone, the yardstick.
        quantised: between the quantised base + adapter that was trained and the merged model; None for a run on an
            unquantised base, or where it cannot be loaded here.
        bits: of the quantised base that the adapter was trained on.
        bytes: of the folder.
    """

    base: str
    dtype: str
    parameters: int
    matrices: int
    rounding: Difference
    effect: Difference
    quantised: Difference | None
    bits: int | None
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(
    run: Run, output: Path, *, dtype: str = "auto", max_shard_size: str = "5GB", console: Console | None = None
) -> Merged:
    """Merges the adapter of a finished run into its base model and writes it to a folder.

    Args:
        output: folder that does not exist yet, or is empty.
        dtype: auto (as the base is stored; bfloat16 for a quantised run that does not say), bfloat16, float16, float32.
        max_shard_size: of one safetensors file, as 5GB.
        console: where progress is shown.

    Raises:
        SevpeftError: in one plain sentence; nothing is left behind.
    """
    console = console or Screen(quiet=True)
    recipe = load_recipe(run.folder / "recipe.yaml")
    check_adapter(run)
    _refuse_what_the_card_lacks(run)
    refuse_output(output)
    _refuse_what_cannot_be_merged(run, recipe)
    plain = recipe.model_copy(update={"quantization": QuantizationSection()})
    config = load_config(plain)
    chosen = stored_dtype(plain, config, recipe.quantization.quantised()) if dtype == "auto" else getattr(torch, dtype)
    parameters = count_parameters(config)
    refuse_without_room(output, config, parameters, chosen, (run.adapter / WEIGHTS).stat().st_size)
    tokenizer = load_tokenizer(plain, config)
    prompt = prompt_of(plain, tokenizer)
    texts = bundled_texts(prompt, context_length(config))
    name, numbers = recipe.model.name_or_path, str(chosen).removeprefix("torch.")

    trained = _logits_as_trained(run, recipe, parameters, texts, console)
    say(console, "Base model", f"{name} ({config.model_type}, {parameters:,} parameters), unquantised, {numbers}")
    with console.status("Loading the base model"):
        model = load_model(plain, Precision(chosen, bf16=False, fp16=False)).eval()
    base = _answers(model, texts, "Base alone", console)
    model = attach_adapter(model, run.adapter, plain)
    _refuse_bias_without_place(model, name)
    adapter = _answers(model, texts, "Base + adapter", console)
    effect = difference(adapter, base)
    del base
    model, matrices = merge_in_place(model, console)
    _refuse_no_numbers(adapter, chosen)
    merged = _answers(model, texts, "Merged", console)
    _refuse_another_model(difference(adapter, merged), effect, chosen)
    with merged_folder(output) as folder:
        with console.status(f"Writing {output}"):
            write_model(model, tokenizer, prompt, plain, config, folder, max_shard_size)
        del model
        gc.collect()  # the model that is read back would stand beside it
        with console.status("Reading it back"):
            again = read_back(folder, plain)
        found = _answers(again, texts, "Read back", console)
        _refuse_another_model(difference(adapter, found), effect, chosen)
        if difference(merged, found).largest_logit_difference > ROUNDING[chosen]:
            raise ModelError(
                f"What was written to {output} does not answer as what was merged, so it is not kept; please report "
                f"this for the model type {config.model_type}."
            )
        result = Merged(
            base=name,
            dtype=numbers,
            parameters=again.num_parameters(),
            matrices=matrices,
            rounding=difference(adapter, found),
            effect=effect,
            quantised=None if trained is None else difference(trained, found),
            bits=next((b for b in (4, 8) if getattr(recipe.quantization, f"load_in_{b}bit")), None),
            bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        )
        (folder / "Modelfile").write_text(modelfile(prompt, recipe), encoding="utf-8")
        write_merged_card(run, recipe, result.as_dict(), folder)
    return result


def merge_in_place(model: PeftModel, console: Console | None = None) -> tuple[PreTrainedModel, int]:
    """The base model with the adapter in its weights, and the number of matrices that it was added to.

    Each matrix is added in float32 and rounded once. PEFT (0.21, `merge(safe_merge=True)`) rounds the product BA to the
    base's precision and adds in it, which rounds twice, and computes DoRA's norms in it.

    Raises:
        ModelError: a sum is not a finite number.
    """
    _untie_adapted_embedding(model)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    with _bar(console or Screen(quiet=True), "Merging", len(layers)) as step, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "already merged", of all that were merged here
        for name, layer in layers:
            base = layer.get_base_layer()
            own = {key: value.dtype for key, value in base.named_parameters(recurse=False)}
            for value in base.parameters(recurse=False):
                value.data = value.data.float()
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise ModelError(_not_finite(name)) from error
            for key, value in base.named_parameters(recurse=False):
                value.data = value.data.to(own[key])
                if not torch.isfinite(value.data).all():
                    raise ModelError(_not_finite(name))
            step()
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(_not_finite("the embedding")) from error
    return merged, len(layers)


def read_back(folder: Path, recipe: Recipe) -> PreTrainedModel:
    """The written model, loaded as anyone will load it.

    Raises:
        ModelError: it lacks weights, or has some that do not belong to it.
    """
    attention = recipe.model.attn_implementation
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=recipe.model.trust_remote_code,
        output_loading_info=True,
        **({"attn_implementation": attention} if attention else {}),
    )
    strange = sorted([*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]])
    if strange:
        raise ModelError(
            f"What was written cannot be read back whole ({len(strange)} weights, such as {strange[0]}), so it is not "
            f"kept; please report this for the model type {model.config.model_type}."
        )
    return model.eval()


def _refuse_what_cannot_be_merged(run: Run, recipe: Recipe) -> None:
    if recipe.quantization.quantised() and recipe.lora.init_lora_weights == "loftq":
        raise ModelError(
            f"The adapter in {run.adapter} was started with loftq, so it holds what the quantised base model had lost, "
            "and merging it into the unquantised one would add that twice; use it as an adapter on the base in 4 bit."
        )


def _refuse_bias_without_place(model: PeftModel, name: str) -> None:
    for place, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and any(layer.lora_bias.values()) and layer.get_base_layer().bias is None:
            raise ModelError(
                f"The adapter was trained with lora.lora_bias=true, and {name} has no bias at {place.split('.')[-1]} "
                "to merge it into; use it as an adapter, or train it without lora_bias."
            )


def _refuse_no_numbers(adapter: list[torch.Tensor], dtype: torch.dtype) -> None:
    if not all(bool(torch.isfinite(logits).all()) for logits in adapter):
        raise ModelError(
            f"Base + adapter answers in {str(dtype).removeprefix('torch.')} with numbers that are not finite, so there "
            "is nothing that a merged model could be compared with; try --dtype bfloat16 or float32."
        )


def _refuse_what_the_card_lacks(run: Run) -> None:
    """Raises RunError now and not when all is merged."""
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


def _untie_adapted_embedding(model: PeftModel) -> None:
    """Gives the head a matrix of its own where only the embedding has an adapter: added to both, it would move both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not isinstance(embedding, LoraLayer):
        return
    base = embedding.get_base_layer()
    if head.weight is base.weight:
        base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        model.get_base_model().config.get_text_config().tie_word_embeddings = False
        model.get_base_model().config.tie_word_embeddings = False


def _refuse_another_model(rounding: Difference, effect: Difference, dtype: torch.dtype) -> None:
    if keeps_the_adapter(rounding, effect, dtype):
        return
    found = (
        f"the merged model is {rounding.kl:.2g} nats per token from base + adapter, and the base alone {effect.kl:.2g}"
    )
    if dtype == torch.float32:
        raise ModelError(f"Merging lost the adapter ({found}), so nothing is kept; use it as an adapter instead.")
    raise ModelError(
        f"Rounding to {str(dtype).removeprefix('torch.')} takes the adapter away ({found}), so nothing is kept; merge "
        "with --dtype float32, or use it as an adapter."
    )


def _logits_as_trained(
    run: Run, recipe: Recipe, parameters: int, texts: list[Text], console: Console
) -> list[torch.Tensor] | None:
    """Answers of the quantised base + adapter; None where nothing was quantised or it would take hours here."""
    if not recipe.quantization.quantised():
        return None
    if not uses_gpu(recipe) and parameters > LARGEST_4BIT_ON_CPU:
        say(console, "Quantised base", "not compared with, because this machine shows no GPU to load it on")
        return None
    try:
        with console.status("Loading the quantised base model, as it was trained on"):
            model = load_model(recipe, choose_precision(recipe)).eval()
            model = attach_adapter(model, run.adapter, recipe)
    except SevpeftError as error:
        say(console, "Quantised base", f"not compared with: {error}", style="yellow")
        return None
    found = _answers(model, texts, "As trained", console)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return found


def _answers(model: PreTrainedModel, texts: list[Text], label: str, console: Console) -> list[torch.Tensor]:
    started = time.monotonic()
    with _bar(console, f"Asking: {label.lower()}", len(texts)) as step:
        found = answer_logits(model, texts, step)
    say(console, label, f"asked {len(texts)} bundled questions, {time.monotonic() - started:.0f} s")
    return found


@contextmanager
def _bar(console: Console, label: str, total: int) -> Iterator[Any]:
    columns = (TextColumn(label), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _not_finite(name: str) -> str:
    return (
        f"The merged weight of {name.removeprefix('base_model.model.')} is not a finite number, so nothing is kept: "
        "the adapter is broken, or float16 is too narrow for it; try --dtype bfloat16 or float32."
    )
