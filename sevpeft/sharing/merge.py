"""Merging of a run's adapter into its base model, measured against the model that was trained.

An adapter belongs to the weights that it was trained on. For a run in 4 or 8 bit these are the dequantized weights, and
the unquantized ones are another base: both are merged and measured, and the nearer one is written. What was written is
read again and compared before the folder gets its name.
"""

from __future__ import annotations

import gc
import warnings
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from rich.console import Console
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sevpeft.console import Screen, print_labeled, row_progress
from sevpeft.errors import ModelError, UsageError
from sevpeft.evaluation.arms import check_adapter
from sevpeft.evaluation.generate import context_length
from sevpeft.modeling.loading import Precision, count_parameters, load_config, load_model, load_tokenizer
from sevpeft.modeling.saved_adapters import WEIGHTS, attach_adapter
from sevpeft.recipe import QuantizationSection, Recipe, load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.card import note_unquantized_base
from sevpeft.sharing.fidelity import Difference, Text, answer_logits, difference, texts_of
from sevpeft.sharing.merged_card import check_card_sources, write_merged_card
from sevpeft.sharing.merged_folder import (
    checksums,
    merged_folder,
    read_back,
    refuse_output,
    refuse_without_room,
    stored_dtype,
    write_model,
)
from sevpeft.sharing.serving import modelfile
from sevpeft.training.data import prompt_of

UNQUANTIZED, DEQUANTIZED = "unquantized", "dequantized"


@dataclass(frozen=True)
class Merged:
    """What was merged, and how far it is from the model that was trained.

    Attributes:
        base: the base model, as the recipe names it.
        weights: of the base that the adapter was merged into, "unquantized" or "dequantized".
        dtype: of the written weights.
        bits: of the base that the adapter was trained on; None where it was not quantized.
        parameters: of the merged model.
        matrices: weights that the adapter changed by adding to them.
        rows: what the models were compared on.
        effect: between the trained model and its base alone, the yardstick.
        gaps: between the trained model and the merged one, for each base that was tried; that of `weights` is of the
            model as it was read back from the folder.
        bytes: of the folder.
    """

    base: str
    weights: str
    dtype: str
    bits: int | None
    parameters: int
    matrices: int
    rows: str
    effect: Difference
    gaps: dict[str, Difference]
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(
    run: Run,
    output: Path,
    *,
    base: str = "auto",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    console: Console | None = None,
) -> Merged:
    """Merges the adapter of a finished run into its base model and writes it to a folder.

    Args:
        output: folder that does not exist yet, or is empty.
        base: weights to merge into: unquantized, dequantized, or auto for those that come nearer to what was trained.
        dtype: auto (as the base is stored; bfloat16 for a quantized run that does not say), bfloat16, float16, float32.
        max_shard_size: of one safetensors file, as 5GB.
        console: where progress is shown.

    Raises:
        SevpeftError: in one plain sentence; nothing is left behind.
    """
    console = console or Screen(quiet=True)
    recipe = load_recipe(run.folder / "recipe.yaml")
    check_adapter(run)
    check_card_sources(run)
    refuse_output(output)
    about = run.metrics()["model"]
    bits, precision = about["bits"], Precision(getattr(torch, about["dtype"]), bf16=False, fp16=False)
    plain = recipe.model_copy(update={"quantization": QuantizationSection()})
    config = load_config(plain)
    bases = _bases(recipe, config, bits, base)
    chosen = stored_dtype(plain, config, bool(bits)) if dtype == "auto" else getattr(torch, dtype)
    parameters = count_parameters(config)
    packed_bytes = parameters * (bits or 0) // 8
    refuse_without_room(output, config, parameters, chosen, (run.adapter / WEIGHTS).stat().st_size + packed_bytes)
    tokenizer = load_tokenizer(plain, config)
    prompt = prompt_of(plain, tokenizer)
    texts, rows = texts_of(recipe, prompt, context_length(config))
    name, number_format = recipe.model.name_or_path, str(chosen).removeprefix("torch.")
    size = f"{config.model_type}, {parameters:,} parameters"
    print_labeled(console, "Base model", f"{name} ({size}), merged in {number_format}")
    print_labeled(console, "Compared on", f"{len(texts)} {rows}")

    trained, effect, packed = _as_trained(run, recipe, precision, texts, console)
    if DEQUANTIZED not in bases:
        packed = None  # the same weights are loaded once more
    gaps: dict[str, Difference] = {}
    for weights in bases:
        model = None  # beside the next one it may not fit
        model, matrices = _merged(run, plain, weights, chosen, packed, console)
        if len(bases) > 1:
            gaps[weights] = difference(trained, _answers(model, texts, f"{weights.capitalize()} base", console))
    if base == "auto" and gaps and (nearest := min(gaps, key=lambda each: gaps[each].kl)) != weights:
        weights, model = nearest, None
        model, matrices = _merged(run, plain, weights, chosen, packed, console)
    del packed
    sums = checksums(model)
    with merged_folder(output) as folder:
        with console.status(f"Writing {output}"):
            write_model(model, tokenizer, prompt, plain, config, folder, max_shard_size)
        del model
        gc.collect()  # the model that is read back would stand beside it
        with console.status("Reading it back"):
            again = read_back(folder, plain, sums)
        gaps[weights] = difference(trained, _answers(again, texts, "Read back", console))
        _check_gap(gaps[weights], effect, weights, bits, chosen, base)
        result = Merged(
            base=name,
            weights=weights,
            dtype=number_format,
            bits=bits,
            parameters=again.num_parameters(),
            matrices=matrices,
            rows=rows,
            effect=effect,
            gaps=gaps,
            bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        )
        (folder / "Modelfile").write_text(modelfile(prompt, recipe), encoding="utf-8")
        write_merged_card(run, recipe, result.as_dict(), folder)
    if bits and UNQUANTIZED in gaps:
        note_unquantized_base(run, gap=asdict(gaps[UNQUANTIZED]), effect=asdict(effect))
    return result


def merge_in_place(model: PeftModel) -> tuple[PreTrainedModel, int]:
    """The base model with the adapter in its weights, and the number of matrices that it was added to.

    Each matrix is added in float32 and rounded once. PEFT (0.21, `merge(safe_merge=True)`) rounds the product BA to the
    base's precision and adds in it, which rounds twice, and computes DoRA's norms in it.

    Raises:
        ModelError: a sum is not a finite number.
    """
    _untie_adapted_embedding(model)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    with warnings.catch_warnings():
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
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(_not_finite("the embedding")) from error
    return merged, len(layers)


def _bases(recipe: Recipe, config: PretrainedConfig, bits: int | None, asked: str) -> list[str]:
    """Weights to try, the one that is asked for last."""
    name = recipe.model.name_or_path
    if _stored_quantized(config):
        if bits is None:
            raise ModelError(
                f"{name} is stored in a quantization that cannot be undone here; use the adapter on it without merging."
            )
        bases = [DEQUANTIZED]
    else:
        bases = [UNQUANTIZED, DEQUANTIZED] if bits else [UNQUANTIZED]
    if asked not in ("auto", *bases):
        why = "its base was not quantized" if asked == DEQUANTIZED else f"{name} is stored quantized"
        raise UsageError(f"--base {asked} does not exist for this run, because {why}; write --base {bases[-1]}.")
    return sorted(bases, key=asked.__eq__)


def _stored_quantized(config: PretrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _as_trained(
    run: Run, recipe: Recipe, precision: Precision, texts: list[Text], console: Console
) -> tuple[list[torch.Tensor], Difference, PreTrainedModel]:
    """Answers of base + adapter as they were trained, what the adapter does there, and that base."""
    with console.status("Loading the base model as it was trained on"):
        model = load_model(recipe, precision).eval()
    # Before the adapter is there: some starts (OLoRA, PiSSA) and trained biases change the base itself.
    alone = _answers(model, texts, "Base alone", console)
    model = attach_adapter(model, run.adapter, recipe)
    trained = _answers(model, texts, "Base + adapter", console)
    effect = difference(trained, alone)
    if not effect.kl < float("inf"):
        number_format = str(precision.dtype).removeprefix("torch.")
        raise ModelError(
            f"Base + adapter answers with numbers that are not finite in {number_format}, the precision of its "
            "training, so its weights are broken; copy base model and adapter again."
        )
    return trained, effect, model.unload()


def _merged(
    run: Run,
    recipe: Recipe,
    weights: str,
    dtype: torch.dtype,
    packed: PreTrainedModel | None,
    console: Console,
) -> tuple[PreTrainedModel, int]:
    """The adapter merged into the unquantized weights of the recipe's base, or into those of the quantized model."""
    gc.collect()
    config = load_config(recipe)
    with console.status(f"Merging into the {weights} base model"):
        if _stored_quantized(config):
            del config.quantization_config
            trust = recipe.model.trust_remote_code
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust).eval()
        else:
            model = load_model(recipe, Precision(dtype, bf16=False, fp16=False)).eval()
        if weights == DEQUANTIZED:
            assert packed is not None
            _dequantize_into(model, packed)
        model = attach_adapter(model, run.adapter, recipe)
        _refuse_bias_without_place(model, recipe.model.name_or_path)
        return merge_in_place(model)


@torch.no_grad()
def _dequantize_into(model: PreTrainedModel, packed: PreTrainedModel) -> None:
    """Gives a plain model the weights that the quantized one computes with.

    `PreTrainedModel.dequantize` would leave buffers in the precision of the training, and GPT-2's matrices transposed.
    """
    own = model.state_dict()
    for place, module in packed.named_modules():
        for key, value in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            name = f"{place}.{key}" if place else key
            if name not in own:
                continue
            if key == "weight":
                value = dequantize_module_weight(module)
                if isinstance(model.get_submodule(place), Conv1D) and not isinstance(module, Conv1D):
                    value = value.T
            own[name].copy_(value)
    model.generation_config = packed.generation_config


def _refuse_bias_without_place(model: PeftModel, name: str) -> None:
    for place, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and any(layer.lora_bias.values()) and layer.get_base_layer().bias is None:
            raise ModelError(
                f"The adapter was trained with lora.lora_bias=true, and {name} has no bias at {place.split('.')[-1]} "
                "to merge it into; use it as an adapter, or train it without lora_bias."
            )


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


def _check_gap(
    gap: Difference, effect: Difference, weights: str, bits: int | None, dtype: torch.dtype, base: str
) -> None:
    """Raises ModelError where merging changes the answers by more than the whole adapter does."""
    if gap.kl <= effect.kl:
        return
    number_format = str(dtype).removeprefix("torch.")
    remedies = [f"use it as an adapter on the base in {bits} bit" if bits else "use it as an adapter"]
    if dtype != torch.float32:
        remedies.insert(0, "merge with --dtype float32")
    if base == UNQUANTIZED and bits:
        remedies.insert(0, "leave --base unquantized out")
    raise ModelError(
        f"Merged into the {weights} weights in {number_format}, the model is {gap.kl:.2g} nats per token from what was "
        f"trained, and the adapter itself is worth {effect.kl:.2g}, so nothing is kept; {', or '.join(remedies)}."
    )


def _answers(model: PreTrainedModel, texts: list[Text], label: str, console: Console) -> list[torch.Tensor]:
    with row_progress(console, label, len(texts)) as done:
        return answer_logits(model, texts, done)


def _not_finite(name: str) -> str:
    return (
        f"The merged weight of {name.removeprefix('base_model.model.')} is not a finite number, so nothing is kept: "
        "the adapter is broken, or float16 is too narrow for it; try --dtype bfloat16 or float32."
    )
