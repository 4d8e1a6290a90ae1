"""Merges a run's adapter into its base model and measures the difference from the trained model.

A run in 4 or 8 bit was trained on dequantized weights, which differ from the unquantized ones. Both are merged and
measured; the closer one is written, reloaded and compared. The distance of two models is the Kullback-Leibler
divergence of their predictions of all answer tokens. The distance from base to base + adapter is the reference.
"""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sevpeft.console import Screen, print_labeled
from sevpeft.data.read import load_consultations
from sevpeft.errors import ModelError, SevpeftError, first_sentence
from sevpeft.evaluation.arms import check_adapter
from sevpeft.modeling.adapters import attach_adapter
from sevpeft.modeling.chat_template import generation_config, save_tokenizer
from sevpeft.modeling.compat import dequantize_module_weight
from sevpeft.modeling.likelihood import answer_logits
from sevpeft.modeling.loading import Precision, load_config, load_model, resolve_model, resolved_name
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import QuantizationSection, Recipe, load_recipe
from sevpeft.runs import Run, whole_folder
from sevpeft.sharing.card import adapter_card, modelfile, note_figures, write_merged_card
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import encode_rows, load_splits

UNQUANTIZED, DEQUANTIZED = "unquantized", "dequantized"
CONSULTATIONS = 8
# Files to copy from the base model: llama.cpp needs the SentencePiece file, vLLM the processor of a multimodal model,
# and everybody the license.
_COPIED = ("tokenizer.model", "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt", "NOTICE")
# Token ids of a consultation, and the position at which its answer begins.
_Text = tuple[list[int], int]


@dataclass(frozen=True)
class Difference:
    """Difference between the predictions P and Q of two models, over all answer tokens.

    Attributes:
        kl: mean over tokens of KL(P‖Q), in nats; infinite if a model gives non-finite logits.
        equal_next_tokens: share of positions at which both models predict the same token.
    """

    kl: float
    largest_logit_difference: float
    equal_next_tokens: float
    tokens: int


@dataclass(frozen=True)
class Merged:
    """Result of a merge, and its distance from the trained model.

    Attributes:
        weights: base weights of the merge, "unquantized" or "dequantized".
        bits: of the base in training; None without quantization.
        matrices, rows: number of weights that the adapter changed, and the source of the compared texts.
        effect: difference between the trained model and its base, the reference.
        gaps: difference between the trained and the merged model, for each base that was tried.
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


def merge(
    run: Run,
    output: Path,
    *,
    base: str = "auto",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    console: Console | None = None,
) -> Merged:
    """Merges the adapter of a finished run into its base model and writes the result to a new folder, atomically.

    Args:
        base: base weights of a quantized run, unquantized or dequantized; auto takes the closer ones.
        dtype: bfloat16, float16, float32, or auto: as stored; bfloat16 if a quantized base does not name its dtype.
        max_shard_size: largest safetensors file, such as 5GB.
    """
    console = console or Screen(quiet=True)
    check_adapter(run)
    adapter_card(run)  # raises for damaged figures, before slow work
    recipe, about = load_recipe(run.folder / "recipe.yaml"), run.metrics()["model"]
    plain = recipe.model_copy(update={"quantization": QuantizationSection()})
    resolved, bits, name = resolve_model(recipe, run), about["bits"], recipe.model.name_or_path
    bases = [UNQUANTIZED, DEQUANTIZED] if bits else [UNQUANTIZED]
    if getattr(resolved.config, "quantization_config", None) is not None:
        if bits is None:
            raise ModelError(f"{name} is stored in a quantization that sevpeft cannot undo; use the adapter on it.")
        bases = [DEQUANTIZED]
    if base not in ("auto", *bases):
        raise ModelError(f"--base {base} does not exist: the run has {' and '.join(bases)} weights; leave it out.")
    with whole_folder(output, shared=not recipe.prompt.examples) as folder:
        texts, rows = sample_texts(recipe, resolved.prompt)
        print_labeled(console, "Base model", f"{name} ({resolved.config.model_type})")
        print_labeled(console, "Compared on", f"{len(texts)} {rows}")
        with console.status("Running base + adapter in the precision of the training"):
            bare = load_model(recipe, Precision(getattr(torch, about["dtype"]), bf16=False, fp16=False)).eval()
            alone = logits_of(bare, texts)  # before attaching: trained biases change the base itself
            adapted = attach_adapter(bare, run.adapter, recipe, keep_float32=True)
            trained = logits_of(adapted, texts)
            effect = difference(trained, alone)
        if not math.isfinite(effect.kl):
            raise ModelError("Base + adapter gives logits that are not finite; copy base and adapter again.")
        # An unquantized base is loaded again for the merge.
        quantized = adapted.unload() if bits else None
        del bare, adapted
        model: Any
        gaps: dict[str, Difference] = {}
        for weights in bases:
            model = None  # free memory for the next one
            with console.status(f"Merging into the {weights} base model"):
                model, matrices = _merged(run, plain, weights, dtype, quantized)
                gaps[weights] = difference(trained, logits_of(model, texts))
        chosen = min(gaps, key=lambda each: gaps[each].kl) if base == "auto" else base
        if chosen != weights:
            model = None
            with console.status(f"Merging into the {chosen} base model"):
                model, matrices = _merged(run, plain, chosen, dtype, quantized)
        del quantized
        number_format = str(model.dtype).removeprefix("torch.")
        with console.status(f"Writing {output} and reloading it"):
            _write_model(model, resolved.prompt, plain, folder, max_shard_size)
            del model
            gc.collect()  # free memory for the reloaded model
            written = plain.model.model_copy(update={"name_or_path": str(folder)})
            reloaded = load_model(plain.model_copy(update={"model": written}), None).eval()
            gaps[chosen] = difference(trained, logits_of(reloaded, texts))
        if gaps[chosen].kl > effect.kl:
            remedy = "" if number_format == "float32" else "merge with --dtype float32, or "
            gap = f"{gaps[chosen].kl:.2g} nats per token from the trained one, more than the adapter ({effect.kl:.2g})"
            raise ModelError(f"Merged in {number_format}, the model is {gap}: {remedy}use it as an adapter.")
        (folder / "Modelfile").write_text(modelfile(resolved.prompt, recipe), encoding="utf-8")
        result = Merged(
            base=name,
            weights=chosen,
            dtype=number_format,
            bits=bits,
            parameters=reloaded.num_parameters(),
            matrices=matrices,
            rows=rows,
            effect=effect,
            gaps=gaps,
            bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        )
        write_merged_card(run, recipe, asdict(result), folder)
    if bits and UNQUANTIZED in gaps:
        note_figures(run, unquantized_base={"gap": asdict(gaps[UNQUANTIZED]), "effect": asdict(effect)})
    return result


def _merged(
    run: Run, recipe: Recipe, weights: str, number_format: str, quantized: PreTrainedModel | None
) -> tuple[PreTrainedModel, int]:
    """Merges the adapter into the unquantized base weights, or into those of the quantized model, dequantized."""
    gc.collect()
    config, dtype = load_config(recipe), None if number_format == "auto" else getattr(torch, number_format)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
        dtype, trust = dtype or config.dtype or torch.bfloat16, recipe.model.trust_remote_code
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust).eval()
    else:
        model = load_model(recipe, Precision(dtype, bf16=False, fp16=False) if dtype else None).eval()
    if weights == DEQUANTIZED and quantized is not None:
        _dequantize_into(model, quantized)
    return merge_in_place(attach_adapter(model, run.adapter, recipe, keep_float32=True))


@torch.no_grad()
def _dequantize_into(model: PreTrainedModel, quantized: PreTrainedModel) -> None:
    """Copies the dequantized weights of a quantized model into an unquantized one.

    `PreTrainedModel.dequantize` would leave buffers in the training precision, and GPT-2's matrices transposed.
    """
    own = model.state_dict()
    for place, module in quantized.named_modules():
        for key, value in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            name = f"{place}.{key}" if place else key
            if name not in own:
                continue
            if key == "weight":
                value = dequantize_module_weight(module)
                if isinstance(model.get_submodule(place), Conv1D) and not isinstance(module, Conv1D):
                    value = value.T
            own[name].copy_(value)
    model.generation_config = quantized.generation_config


def merge_in_place(model: PeftModel) -> tuple[PreTrainedModel, int]:
    """Merges the adapter into the base weights. Returns the base model and the number of changed matrices.

    Each sum is computed in float32 and rounded once. PEFT (0.21, `merge(safe_merge=True)`) rounds twice: the product BA
    and the sum, to the base's precision. https://github.com/huggingface/peft/issues/1388
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, LoraLayer) and head.weight is embedding.get_base_layer().weight:
        # Untie the two: a merge into the shared matrix would change the head as well.
        table = embedding.get_base_layer()
        table.weight = torch.nn.Parameter(table.weight.detach().clone(), requires_grad=False)
        for config in (model.get_base_model().config, model.get_base_model().config.get_text_config()):
            config.tie_word_embeddings = False
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    name = "the embedding"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "already merged", for each layer of the loop
        try:
            for place, layer in layers:
                name, base = place, layer.get_base_layer()
                own = {key: value.dtype for key, value in base.named_parameters(recurse=False)}
                for value in base.parameters(recurse=False):
                    value.data = value.data.float()
                layer.merge(safe_merge=True)
                for key, value in base.named_parameters(recurse=False):
                    value.data = value.data.to(own[key])
                    if not torch.isfinite(value.data).all():
                        raise ValueError(f"its sum is not a finite number in {own[key]}")
            return model.merge_and_unload(safe_merge=True), len(layers)
        except (ValueError, RuntimeError) as error:
            place = name.removeprefix("base_model.model.")
            reason = f"{first_sentence(error)}; try --dtype float32, or use it as an adapter"
            raise ModelError(f"The adapter cannot be merged into {place}: {reason}.") from error


def _write_model(model: PreTrainedModel, prompt: Prompt, recipe: Recipe, folder: Path, max_shard_size: str) -> None:
    """Writes weights, config, generation settings, tokenizer, and small files of the base model."""
    model.config.use_cache = True  # off in training; without a cache generation is quadratic
    model.generation_config = generation_config(prompt, model.generation_config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(prompt, folder)
    source = Path(base := resolved_name(recipe))
    if not source.is_dir():
        with suppress(OSError, HfHubHTTPError, LocalEntryNotFoundError):  # offline and not cached
            source = Path(snapshot_download(base, revision=recipe.model.revision, allow_patterns=list(_COPIED)))
    for name in _COPIED:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def sample_texts(recipe: Recipe, prompt: Prompt) -> tuple[list[_Text], str]:
    """Tokenized validation rows of the run, or bundled consultations if its data cannot be read; and their source."""
    try:
        _, splits, _ = load_splits(recipe)
        rows, source = splits.validation if len(splits.validation) else splits.train, "rows of the run's data"
    except SevpeftError:
        rows = load_consultations("builtin:consultations").rows
        source = "bundled consultations, because the run's data cannot be read"
        prompt = replace(prompt, severity="none")
    rows = rows.select(np.linspace(0, len(rows) - 1, min(CONSULTATIONS, len(rows))).astype(int))
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        limit, cache_file = recipe.training.settings()["max_length"], Path(scratch) / "rows.arrow"
        encoded, _ = encode_rows(rows, prompt, limit, strata=None, cache_file=cache_file)
        return [(row["input_ids"], int(np.argmax(np.array(row["labels"]) != IGNORED))) for row in encoded], source


def logits_of(model: PreTrainedModel, texts: Sequence[_Text]) -> list[torch.Tensor]:
    """Logits (answer tokens, vocabulary) of every text, in the model's precision, on the CPU."""
    # One text at a time, because padding would cause differences.
    return [answer_logits(model, [ids[:answer]], [ids[answer:]])[0].cpu() for ids, answer in texts]


def difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> Difference:
    """Difference between the logits of two models, each from `logits_of`."""
    kl, largest, equal, tokens = 0.0, 0.0, 0, 0
    for ours, theirs in zip(first, second, strict=True):
        # In float64, because differences can be smaller than the float32 rounding of a logarithm.
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (ours, theirs))
        kl += float((p.exp() * (p - q)).sum(dim=-1).clamp(min=0).sum())
        largest = max(largest, float((ours.double() - theirs.double()).abs().max()))
        equal += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
        tokens += len(ours)
    return Difference(math.inf if math.isnan(kl) else kl / tokens, largest, equal / tokens, tokens)
