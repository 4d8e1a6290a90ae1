"""Merging of a run's adapter into its base model, measured against the model that was trained.

An adapter belongs to the weights that it was trained on. For a run in 4 or 8 bit these are the dequantized weights, and
the unquantized ones are another base: both are merged and measured, and the nearer one is written. What was written is
read again and compared before the folder gets its name. The distance of two models is the Kullback-Leibler divergence
between their predictions of every answer token; what the adapter does to its base is the yardstick.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
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
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sevpeft.console import Screen, print_labeled
from sevpeft.data.read import load_consultations
from sevpeft.errors import ModelError, RunError, SevpeftError, UsageError, first_sentence
from sevpeft.evaluation.arms import check_adapter
from sevpeft.modeling.compat import dequantize_module_weight
from sevpeft.modeling.loading import Precision, count_parameters, load_config, load_model, load_tokenizer, resolved_name
from sevpeft.modeling.prompts import Prompt
from sevpeft.modeling.saved_adapters import attach_adapter
from sevpeft.recipe import QuantizationSection, Recipe, load_recipe
from sevpeft.runs import Run, check_absent, whole_folder
from sevpeft.sharing.card import check_card_sources, note_unquantized_base, write_merged_card
from sevpeft.sharing.serving import modelfile
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import encode_rows, load_splits, prompt_of

UNQUANTIZED, DEQUANTIZED = "unquantized", "dequantized"
CONSULTATIONS = 8
# What a model's folder may hold beside weights, config and tokenizer, and what others need: llama.cpp the SentencePiece
# file, vLLM the processor of a model that also sees, everybody the license.
BESIDE = ("tokenizer.model", "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt", "NOTICE")
# Tokenizer, config and card.
_SMALL_FILES = 64 * 2**20


@dataclass(frozen=True)
class Difference:
    """Between the predictions P of one model and Q of another, over the answer tokens of all consultations.

    Attributes:
        kl: mean over tokens of KL(P‖Q), in nats; infinite where a model answers with numbers that are not finite.
        largest_logit_difference: over all tokens and the vocabulary.
        equal_next_tokens: share of the tokens at which both find the same one likeliest.
        tokens: answer tokens that were compared.
    """

    kl: float
    largest_logit_difference: float
    equal_next_tokens: float
    tokens: int


@dataclass(frozen=True)
class Merged:
    """What was merged, and how far it is from the model that was trained."""

    base: str
    """The base model, as the recipe names it."""
    weights: str
    """Of the base that the adapter was merged into, "unquantized" or "dequantized"."""
    dtype: str
    bits: int | None
    """Of the base that the adapter was trained on; None where it was not quantized."""
    parameters: int
    matrices: int
    """Weights that the adapter changed by adding to them."""
    rows: str
    """What the models were compared on."""
    effect: Difference
    """Between the trained model and its base alone, the yardstick."""
    gaps: dict[str, Difference]
    """Between the trained model and the merged one, for each base that was tried; for `weights` as read back."""
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
        output: folder that does not exist yet.
        base: weights to merge into: unquantized, dequantized, or auto for those that come nearer to what was trained.
        dtype: auto (as the base is stored; bfloat16 for a quantized run that does not say), bfloat16, float16, float32.
        max_shard_size: of one safetensors file, as 5GB.
        console: where progress is shown.

    Raises:
        SevpeftError: in one plain sentence; nothing is left behind.
    """
    console = console or Screen(quiet=True)
    check_adapter(run)
    check_card_sources(run)
    recipe, about = load_recipe(run.folder / "recipe.yaml"), run.metrics()["model"]
    plain = recipe.model_copy(update={"quantization": QuantizationSection()})
    config, bits = load_config(plain), about["bits"]
    bases = _bases(recipe, config, bits, base)
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    parameters = count_parameters(config)
    _check_output(output, parameters * (chosen or config.dtype or torch.float32).itemsize + _SMALL_FILES)
    prompt = prompt_of(recipe, load_tokenizer(plain, config))
    texts, rows = _texts(recipe, prompt)
    name = recipe.model.name_or_path
    print_labeled(console, "Base model", f"{name} ({config.model_type}, {parameters:,} parameters)")
    print_labeled(console, "Compared on", f"{len(texts)} {rows}")

    with console.status("Asking base + adapter, as they were trained"):
        trained, effect, quantized = _as_trained(run, recipe, getattr(torch, about["dtype"]), texts)
    if DEQUANTIZED not in bases:
        quantized = None  # the same weights are loaded once more
    gaps: dict[str, Difference] = {}
    model: Any
    for weights in bases:
        model = None  # beside the next one it may not fit
        with console.status(f"Merging into the {weights} base model"):
            model, matrices = _merged(run, plain, weights, chosen, quantized)
            if len(bases) > 1:
                gaps[weights] = difference(trained, answer_logits(model, texts))
    if base == "auto" and gaps and (nearest := min(gaps, key=lambda each: gaps[each].kl)) != weights:
        weights, model = nearest, None
        with console.status(f"Merging into the {weights} base model"):
            model, matrices = _merged(run, plain, weights, chosen, quantized)
    del quantized
    number_format = str(model.dtype).removeprefix("torch.")
    with whole_folder(output, shared=True) as folder, console.status(f"Writing {output} and reading it back"):
        _write_model(model, prompt, plain, folder, max_shard_size)
        del model
        gc.collect()  # the model that is read back would stand beside it
        written = plain.model.model_copy(update={"name_or_path": str(folder)})
        again = load_model(plain.model_copy(update={"model": written}), None).eval()
        gaps[weights] = difference(trained, answer_logits(again, texts))
        _check_gap(gaps[weights], effect, weights, bits, number_format, base)
        (folder / "Modelfile").write_text(modelfile(prompt, recipe), encoding="utf-8")
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
        write_merged_card(run, recipe, result.as_dict(), folder)
    if bits and UNQUANTIZED in gaps:
        note_unquantized_base(run, gap=asdict(gaps[UNQUANTIZED]), effect=asdict(effect))
    return result


def merge_in_place(model: PeftModel) -> tuple[PreTrainedModel, int]:
    """The base model with the adapter in its weights, and the number of matrices that it was added to.

    Each matrix is added in float32 and rounded once. PEFT (0.21, `merge(safe_merge=True)`) rounds the product BA to the
    base's precision and adds in it, which rounds twice: https://github.com/huggingface/peft/issues/1388

    Raises:
        ModelError: a sum is not a finite number, or a bias of the adapter has no place in the base.
    """
    _untie_adapted_embedding(model)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    name = "the embedding"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "already merged", of all that were merged here
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
            raise ModelError(
                f"The adapter cannot be merged into {name.removeprefix('base_model.model.')}, so nothing is kept "
                f"({first_sentence(error)}); try --dtype float32, or use it as an adapter."
            ) from error


def _bases(recipe: Recipe, config: PretrainedConfig, bits: int | None, asked: str) -> list[str]:
    """Weights to try, the one that is asked for last."""
    name, stored = recipe.model.name_or_path, getattr(config, "quantization_config", None) is not None
    if stored and bits is None:
        raise ModelError(
            f"{name} is stored in a quantization that cannot be undone here; use the adapter on it without merging."
        )
    bases = [DEQUANTIZED] if stored else [UNQUANTIZED, DEQUANTIZED] if bits else [UNQUANTIZED]
    if asked not in ("auto", *bases):
        why = "its base was not quantized" if asked == DEQUANTIZED else f"{name} is stored quantized"
        raise UsageError(f"--base {asked} does not exist for this run, because {why}; write --base {bases[-1]}.")
    return sorted(bases, key=asked.__eq__)


def _check_output(output: Path, size: int) -> None:
    """Raises RunError before the long work, where the folder exists, cannot be made, or does not fit onto the disk."""
    check_absent(output)
    parent = next(parent for parent in output.resolve().parents if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=".sevpeft-"))
    except OSError as error:
        raise RunError(f"{output} cannot be written: {error.strerror}; choose another OUTPUT.") from error
    if size > (free := shutil.disk_usage(parent).free):
        raise RunError(
            f"The merged model takes {size / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free at {output}; free some, or "
            "choose an OUTPUT on another disk."
        )


def _as_trained(
    run: Run, recipe: Recipe, dtype: torch.dtype, texts: Sequence[tuple[list[int], int]]
) -> tuple[list[torch.Tensor], Difference, PreTrainedModel]:
    """Answers of base + adapter as they were trained, what the adapter does there, and that base."""
    model = load_model(recipe, Precision(dtype, bf16=False, fp16=False)).eval()
    alone = answer_logits(model, texts)  # before the adapter is there: trained biases change the base itself
    model = attach_adapter(model, run.adapter, recipe)
    trained = answer_logits(model, texts)
    effect = difference(trained, alone)
    if not effect.kl < float("inf"):
        raise ModelError(
            f"Base + adapter answers with numbers that are not finite in {str(dtype).removeprefix('torch.')}, the "
            "precision of its training, so its weights are broken; copy base model and adapter again."
        )
    return trained, effect, model.unload()


def _merged(
    run: Run, recipe: Recipe, weights: str, dtype: torch.dtype | None, quantized: PreTrainedModel | None
) -> tuple[PreTrainedModel, int]:
    """The adapter merged into the unquantized weights of the recipe's base, or into those of the quantized model."""
    gc.collect()
    config = load_config(recipe)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
        dtype, trust = dtype or config.dtype or torch.bfloat16, recipe.model.trust_remote_code
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust).eval()
    else:
        model = load_model(recipe, Precision(dtype, bf16=False, fp16=False) if dtype else None).eval()
    if weights == DEQUANTIZED:
        assert quantized is not None
        _dequantize_into(model, quantized)
    return merge_in_place(attach_adapter(model, run.adapter, recipe))


@torch.no_grad()
def _dequantize_into(model: PreTrainedModel, quantized: PreTrainedModel) -> None:
    """Gives a plain model the weights that the quantized one computes with.

    `PreTrainedModel.dequantize` would leave buffers in the precision of the training, and GPT-2's matrices transposed.
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
    gap: Difference, effect: Difference, weights: str, bits: int | None, number_format: str, base: str
) -> None:
    """Raises ModelError where merging changes the answers by more than the whole adapter does."""
    if gap.kl <= effect.kl:
        return
    remedies = [f"use it as an adapter on the base in {bits} bit" if bits else "use it as an adapter"]
    if number_format != "float32":
        remedies.insert(0, "merge with --dtype float32")
    if base == UNQUANTIZED and bits:
        remedies.insert(0, "leave --base unquantized out")
    raise ModelError(
        f"Merged into the {weights} weights in {number_format}, the model is {gap.kl:.2g} nats per token from what was "
        f"trained, and the adapter itself is worth {effect.kl:.2g}, so nothing is kept; {', or '.join(remedies)}."
    )


def _write_model(model: PreTrainedModel, prompt: Prompt, recipe: Recipe, folder: Path, max_shard_size: str) -> None:
    """Weights, config, generation settings, tokenizer, and the base's own small files."""
    model.config.use_cache = True  # switched off for training; without it generation would be quadratic
    model.generation_config = _generation_config(model.generation_config, prompt)
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        prompt.tokenizer.save_pretrained(folder)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"The merged model cannot be written ({first_sentence(error)}).") from error
    source = Path(name := resolved_name(recipe))
    if not source.is_dir():
        with suppress(OSError, HfHubHTTPError, LocalEntryNotFoundError):  # offline, and not in the cache
            source = Path(snapshot_download(name, revision=recipe.model.revision, allow_patterns=list(BESIDE)))
    for beside in BESIDE:
        if (source / beside).is_file() and not (folder / beside).exists():
            shutil.copyfile(source / beside, folder / beside)


def _generation_config(theirs: GenerationConfig | None, prompt: Prompt) -> GenerationConfig:
    """The base's settings, with the token that ends a trained answer among those that end generation."""
    config = theirs or GenerationConfig()
    ends = config.eos_token_id
    known = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]
    known += [] if prompt.end_id in known else [prompt.end_id]
    config.eos_token_id = known if len(known) > 1 else known[0]
    if config.pad_token_id is None:
        config.pad_token_id = prompt.tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        # Some published settings contradict themselves (a temperature without sampling), and cannot be saved.
        kept = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = GenerationConfig(**kept)
    return config


# How far apart two models are.


def _texts(recipe: Recipe, prompt: Prompt) -> tuple[list[tuple[list[int], int]], str]:
    """Token ids of consultations as the model was trained to read them, where each answer begins, and what they are.

    They are validation rows of the run, or bundled consultations where the run's data cannot be read here.
    """
    try:
        _, splits, _ = load_splits(recipe)
        rows, what = splits.validation if len(splits.validation) else splits.train, "rows of the run's data"
    except SevpeftError:
        rows = load_consultations("builtin:consultations").rows
        what = "bundled consultations, as the run's data cannot be read here"
    rows = rows.select(np.linspace(0, len(rows) - 1, min(CONSULTATIONS, len(rows))).astype(int))
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        limit, cache_file = recipe.training.settings()["max_length"], Path(scratch) / "rows.arrow"
        encoded, _ = encode_rows(rows, prompt, limit, strata=None, cache_file=cache_file)
        labels = [row["labels"] for row in encoded]
        begins = [next(at for at, label in enumerate(row) if label != IGNORED) for row in labels]
        return list(zip(encoded["input_ids"][:], begins, strict=True)), what


@torch.no_grad()
def answer_logits(model: PreTrainedModel, texts: Sequence[tuple[list[int], int]]) -> list[torch.Tensor]:
    """Logits (answer tokens, vocabulary) of every text, in the model's own precision, on the CPU.

    One text at a time: padding would be a difference of its own.
    """
    found = []
    for ids, answer in texts:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, answer - 1 : -1]
        found.append(logits.cpu().clone())
    return found


def difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> Difference:
    """How the second model's logits differ from the first one's, both as `answer_logits` gives them."""
    kl, largest, equal, tokens = 0.0, 0.0, 0, 0
    for ours, theirs in zip(first, second, strict=True):
        # In float64, because what is looked for can be smaller than float32's rounding of a logarithm.
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (ours, theirs))
        kl += float((p.exp() * (p - q)).sum(dim=-1).clamp(min=0).sum())
        largest = max(largest, float((ours.double() - theirs.double()).abs().max()))
        equal += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
        tokens += len(ours)
    return Difference(math.inf if math.isnan(kl) else kl / tokens, largest, equal / tokens, tokens)
