"""Memory plan: the bytes that training an adapter needs, item by item, without weights, data or GPU.

Weights, adapter, gradients and optimizer state are counted on the real modules. Activations are measured by a forward
and backward pass on fake tensors, for the worst batch: every row has max_length tokens. Only one layer of each kind
runs; this is exact because identical layers store the same. The LM head and DoRA's dequantization run in kernels
without fake tensors, and are added by formula.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sevpeft.errors import ModelError, RecipeError, UnknownModelError, first_sentence
from sevpeft.modeling import compat
from sevpeft.modeling.adapters import add_empty_adapter, lora_config
from sevpeft.modeling.loading import check_form, dtype_of_cpu, load_config
from sevpeft.recipe import AUTO, Recipe, recipe_from_values

GIB = 2**30
# Block sizes of bitsandbytes: weights that share a scale, and scales that share one under double quantization.
_BLOCK, _NESTED_BLOCK = 64, 256
# Memory of the CUDA runtime, cuBLAS and the kernels, and the allocator's share of loss by fragmentation. Both are
# estimates; `tests/gpu` compares the sum with a real GPU.
CUDA_CONTEXT = round(0.6 * GIB)
FRAGMENTATION = 0.05
# Bytes of optimizer state per trainable parameter, by a part of the name in training.optim; default: AdamW's 8.
_STATE_BYTES = {"adamw_8bit": 2.03, "bnb_8bit": 2.03, "lion_8bit": 1.02, "lion": 4, "adafactor": 0.1, "sgd": 0}
# Bytes per scored position and column in TRL's LM head without Triton, in addition to the tile itself: logits twice,
# log p, p, the gradient and two of its terms in float32, and a mask (1.16, `_backward_tile`).
_HEAD_WITHOUT_TRITON = 7 * 4 + 1
LARGEST_BATCH = 1024
# Rows of the batch of fake tensors: a prime that no model has as a dimension, so the sizes that it divides scale with
# the rows.
_ROWS = 10_007


def base_config(recipe: Recipe) -> tuple[PretrainedConfig, str]:
    """The model's config, else about.config of the recipe, and the name of the source; raises UnknownModelError."""
    try:
        config = load_config(recipe)
    except ModelError as error:
        if recipe.about.config is None:
            raise UnknownModelError(str(error)) from error
        with _planning("about.config of the recipe"):
            return AutoConfig.for_model(**recipe.about.config), "the recipe"
    check_form(recipe, config)
    return config, "its config.json"


@contextmanager
def _planning(what: str) -> Iterator[None]:
    """Translates errors that the model code raises for a foreign config or for fake tensors."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise UnknownModelError(f"The memory of {what} cannot be planned ({first_sentence(error)}).") from error


# Modules that all-linear includes but that must not have an adapter. Routers choose experts. Kernels of a Mamba layer
# read the weights directly, so an adapter would have no effect (PEFT 0.21 refuses some of them, for some models).
_ROUTERS, _READ_BY_KERNELS = re.compile(r"router|(shared_expert_)?gate"), ("out_proj", "x_proj", "dt_proj")


def text_targets(name: str, config: PretrainedConfig) -> str | list[str]:
    """lora.target_modules for a model's text layers, all-linear if equivalent. Raises UnknownModelError."""
    with _planning(name), compat.on_meta_device():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        parts, decoder = dict(model.named_modules()), model.get_decoder()
        text, others, text_parts = set[str](), set[str](), set(decoder.modules())
    for path, part in parts.items():
        if isinstance(part, torch.nn.Linear | Conv1D) and part is not model.get_output_embeddings():
            (text if part in text_parts else others).add(path.rpartition(".")[2])
    unfit = {*filter(_ROUTERS.fullmatch, text), *(_READ_BY_KERNELS if any("conv1d" in path for path in parts) else ())}
    targets = sorted(text - unfit)
    if others & {*targets}:  # such as a vision tower
        return rf"{re.escape(next(path for path in parts if parts[path] is decoder))}\..*\.({'|'.join(targets)})"
    return targets if others or text & unfit else "all-linear"


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a base model and its adapter.

    Attributes:
        embedding, head: of the two vocabulary matrices; both counts are of the same matrix if they are tied.
        targets: last name of an adapted module → number of such modules.
    """

    quantized: int
    unquantized: int
    trainable: int
    embedding: int
    head: int
    tied: bool
    targets: dict[str, int]

    @property
    def base(self) -> int:
        return self.quantized + self.unquantized


class MemoryPlan:
    """Memory of training the recipe's adapter. A batch size of `auto` counts as 1.

    Args:
        config: config of the base model.
        on_gpu: True for a CUDA GPU in bfloat16 (float16 needs the same), False for a CPU in its compute dtype.
        vocabulary_tile: columns of the LM head that a CPU scores at once.

    Raises ModelError: PEFT refuses the adapter, or a named module does not exist. UnknownModelError: the model does not
    run on fake tensors, or training.max_length is null.
    """

    def __init__(self, recipe: Recipe, config: PretrainedConfig, *, on_gpu: bool, vocabulary_tile: int) -> None:
        self.config, self.on_gpu, self.vocabulary_tile = config, on_gpu, vocabulary_tile
        dtype, attention = recipe.model.dtype, recipe.model.attn_implementation
        self.dtype = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if on_gpu else dtype_of_cpu(recipe)
        self._fake, self._trace = compat.FakeTensorMode(allow_non_fake_inputs=True), cache(self._run)
        with _planning(recipe.model.name_or_path):
            with compat.on_meta_device():
                base = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=self.dtype, **({"attn_implementation": attention} if attention else {})
                )
            embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
            modules = base.modules() if recipe.quantization.quantized() else []
            weights = [module.weight for module in modules if type(module) in (torch.nn.Linear, Conv1D)]
            matrices = {id(weight): weight.numel() for weight in weights if weight is not head}
            quantized, total = sum(matrices.values()), base.num_parameters()
            lora, settings = lora_config(recipe, base), recipe.lora.settings()
            self._layers = config.get_text_config().num_hidden_layers
            # A setting that contains a layer number makes layers of one kind different.
            names = [[value] for key, value in settings.items() if re.search("modules|parameters|pattern|layer", key)]
            by_number = re.search(r"[.\[(|]\d|\\d", str(names))
            kept = _one_of_each_kind(base, self._layers, alike=not by_number)
        self._times = torch.tensor([times for _, times in kept])
        with compat.on_meta_device():
            self._model = add_empty_adapter(base, lora)
        count = _adapter_counts(self._model, matrices)
        for layer, times in kept:
            count.update({key: (times - 1) * number for key, number in _adapter_counts(layer, matrices).items()})
            layer.register_forward_pre_hook(self._mark)
            layer.register_forward_hook(self._mark)
        trainable, self._adapted = count.pop("trainable"), count.pop("adapted")
        vocabulary, targets = (embedding.numel(), head.numel(), embedding is head), dict(sorted(count.items()))
        self.parameters = Parameters(quantized, total - quantized, trainable, *vocabulary, targets)
        self._model.enable_input_require_grads()
        compat.move_shapes_to_cpu(self._model, self._fake)  # so that autocast and attention choose as on a real device
        with self._fake:
            for weight in self._model.parameters():
                if weight.requires_grad:
                    weight.grad = torch.zeros_like(weight)
        self._follow(recipe)

    def _follow(self, recipe: Recipe) -> None:
        self.recipe, self._training = recipe, recipe.training.settings()
        self.batch, self.eval_batch, self.length = (
            1 if self._training[key] == AUTO else self._training[key]
            for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "max_length")
        )
        if self.length is None:
            raise UnknownModelError("training.max_length=null does not limit a row; write a number of tokens.")
        if self._training["eval_strategy"] == "no":
            self.eval_batch = 0
        self.checkpointing = self._training.get("gradient_checkpointing") is not False
        # Raises now if the model does not run on fake tensors.
        self._peak(self.batch, self._training.get("gradient_checkpointing") is True)

    def with_recipe(self, recipe: Recipe) -> MemoryPlan:
        """The same base model and device under another recipe."""
        return plan_for(recipe, self.config, on_gpu=self.on_gpu, vocabulary_tile=self.vocabulary_tile)

    def budget(
        self, batch: int | None = None, checkpointing: bool | None = None, eval_batch: int | None = None
    ) -> dict[str, int]:
        """Bytes by item for these batch sizes, with rows of training.max_length; None takes the recipe's value."""
        batch = self.batch if batch is None else batch
        eval_batch = self.eval_batch if eval_batch is None else eval_batch
        peak = self._peak(batch, self.checkpointing if checkpointing is None else checkpointing)
        # With equally many rows a validation step needs less than a training step, which also stores activations.
        if eval_batch > batch:
            peak = max(peak, self._peak(eval_batch, False, training=False))
        count, optim = self.parameters, str(self._training.get("optim") or "adamw_torch")
        state = next((size for name, size in _STATE_BYTES.items() if name in optim), 8)
        # Bytes per weight: in 8 bit with one scale per row of a matrix, in 4 bit with one per block.
        quantized = 1 + 4 / self.config.get_text_config().hidden_size
        if not self.recipe.quantization.load_in_8bit:
            double = self.recipe.quantization.bnb_4bit_use_double_quant
            quantized = 1 / 2 + (1 + 4 / _NESTED_BLOCK if double else 4) / _BLOCK
        items = {
            "base model, quantized": round(count.quantized * quantized),
            f"base model, {self.dtype.itemsize * 8} bit": count.unquantized * self.dtype.itemsize,
            "adapter": count.trainable * 4,
            "gradients": count.trainable * 4,
            "optimizer state": round(count.trainable * state),
            "activations": peak,
        }
        if self.on_gpu:
            items["CUDA context, fragmentation"] = CUDA_CONTEXT + round(FRAGMENTATION * sum(items.values()))
        return {name: size for name, size in items.items() if size}

    @property
    def total(self) -> int:
        """Bytes of the whole budget."""
        return sum(self.budget().values())

    def total_of_batch(self, batch: int, checkpointing: bool | None = None) -> int:
        """Bytes with `batch` rows in a training batch and no larger validation batch."""
        return sum(self.budget(batch, checkpointing, eval_batch=0).values())

    def total_of_validation(self, batch: int, checkpointing: bool | None = None) -> int:
        """Bytes with `batch` rows in a validation batch and one in a training batch."""
        return sum(self.budget(1, checkpointing, eval_batch=batch).values())

    def largest_batch(self, available: int) -> int:
        """The largest training batch that fits in `available` bytes: 0 to 1,024 rows."""
        return bisect_right(range(1, LARGEST_BATCH + 1), available, key=self.total_of_batch)

    def _peak(self, batch: int, checkpointing: bool, *, training: bool = True) -> int:
        """Peak bytes of a step beyond weights and gradients: in the LM head or in a layer."""
        kwargs, text = self._training.get("gradient_checkpointing_kwargs") or {}, self.config.get_text_config()
        # The LM head (TRL 1.16): a tile of logits, and per scored position the hidden state, its float32 gradient and
        # 8 float32 values.
        rows = batch * (self.length - 1)
        columns = compat.LOGPROB_CHUNK_SIZE if self.on_gpu else min(compat.LOGPROB_CHUNK_SIZE, self.vocabulary_tile)
        head = rows * (text.hidden_size * (self.dtype.itemsize + 4) + 8 * 4)
        head += min(rows, compat.TOKEN_CHUNK_SIZE) * columns * self.dtype.itemsize
        if not self.on_gpu:
            head += min(rows, compat.TOKEN_CHUNK_SIZE) * min(columns, text.vocab_size) * _HEAD_WITHOUT_TRITON
        held = 0
        if self.recipe.quantization.quantized() and self.recipe.lora.settings().get("use_dora") and training:
            # DoRA stores dequantized matrices for the gradient: of all layers, or of the one that is recomputed.
            held = self._adapted * self.dtype.itemsize
        attention = 0
        if kwargs.get("selective"):  # checkpointing that stores attention outputs
            heads = text.num_attention_heads
            width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
            attention = self._layers * batch * self.length * width * self.dtype.itemsize

        def highest(checkpointing: bool) -> float:
            trace = self._trace(self.length, checkpointing, training)
            *within, kept = (trace @ torch.tensor([1, batch])).tolist()
            if checkpointing:
                return attention + max(max(within) + held / self._layers, kept + head)
            return held + max(*within, kept + head)

        peak = highest(checkpointing)
        if checkpointing and (every := int(kwargs.get("every_n_layers", 1))) > 1:  # the other layers store everything
            peak = peak / every + highest(False) * (1 - 1 / every)
        return round(peak)

    def _mark(self, *_: Any) -> None:
        """Records trace length and live bytes, before and after a layer."""
        self._marks.append((len(self._counted.trace), [*self._counted.now]))

    def _run(self, length: int, checkpointing: bool, training: bool) -> torch.Tensor:
        """Runs a step up to the LM head and back. Gradients exist already, as with gradient accumulation.

        Returns (n + 1, 2) bytes beyond weights and gradients, fixed and per row: after each of n allocations, and last
        what the forward pass stores.
        """
        half = self.dtype == torch.bfloat16 or (self.on_gpu and self.dtype != torch.float32)  # mixed precision
        model, base = self._model.train(training), self._model.get_base_model()
        if checkpointing and training:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()
        held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self._counted = compat.LiveBytes(held, _ROWS, self._fake)
        self._marks: list[tuple[int, list[int]]] = []
        with _planning(base.config.model_type), self._fake, self._counted, torch.set_grad_enabled(training):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                ids = torch.zeros(_ROWS, length, dtype=torch.long)
                output = base.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                scored = torch.zeros(_ROWS * (length - 1), dtype=torch.long)
                hidden = output.last_hidden_state
                loss = hidden.reshape(-1, hidden.shape[-1]).index_select(0, scored).sum()
                del ids, output, hidden, scored
            self._mark()
            if training:
                loss.backward()
        (start, _), *_, (_, kept) = self._marks
        trace = torch.tensor([*self._counted.trace, kept])
        if training:  # adds the stored bytes of the layers that did not run
            marks = torch.tensor([now for _, now in self._marks])
            trace[start:] += (self._times - 1) @ (marks[1:-1:2] - marks[:-1:2])
        return trace


# Cache of this process: a comparison trains one model many times, and advice tries many settings on one.
_PLANS: dict[str, MemoryPlan] = {}


def plan_for(recipe: Recipe, config: PretrainedConfig, *, on_gpu: bool, vocabulary_tile: int) -> MemoryPlan:
    """A `MemoryPlan` that shares measurements with earlier ones of the same model, adapter and device."""
    values = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    model = (recipe.model.dtype, recipe.model.attn_implementation, on_gpu, vocabulary_tile)
    key = str([values, model, recipe.quantization, recipe.lora])
    if key not in _PLANS:
        _PLANS[key] = MemoryPlan(recipe, config, on_gpu=on_gpu, vocabulary_tile=vocabulary_tile)
    plan = copy.copy(_PLANS[key])
    plan._follow(recipe)
    return plan


def _one_of_each_kind(base: PreTrainedModel, count: int, *, alike: bool) -> list[tuple[torch.nn.Module, int]]:
    """Removes all layers of a model but the last of each kind, because memory peaks in the last layer.

    Keeps all layers if the adapter is not `alike` in all layers of a kind. Returns the kept layers, each with the
    number of layers, out of `count`, that it represents.
    """
    decoder = base.get_decoder()
    layers = next(part for part in decoder.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count)
    types = getattr(decoder.config, "layer_types", None) or [""] * count
    kinds = [
        (types[number], alike or number, *((name, weight.shape) for name, weight in layer.named_parameters()))
        for number, layer in enumerate(layers)
    ]
    kept = sorted({kind: number for number, kind in enumerate(kinds)}.values())
    represented = [(layers[number], kinds.count(kinds[number])) for number in kept]
    for number in reversed(range(count)):
        if number not in kept:
            del layers[number]
    decoder.config.num_hidden_layers = len(kept)
    if "layer_types" in vars(decoder.config):  # Falcon-H1 derives them from the number of layers
        decoder.config.layer_types = [types[number] for number in kept]
    return represented


def _adapter_counts(module: torch.nn.Module, matrices: dict[int, int]) -> Counter[str]:
    """Trainable parameters, parameters of adapted quantized matrices, and the number of adapted modules by name."""
    count = Counter(trainable=sum(weight.numel() for weight in module.parameters() if weight.requires_grad), adapted=0)
    for name, part in module.named_modules():
        if isinstance(part, LoraLayer):
            count[name.rsplit(".", 1)[-1]] += 1
            count["adapted"] += matrices.get(id(getattr(part.get_base_layer(), "weight", None)), 0)
    return count


# Advice from a plan: GPUs that are large enough, settings that save memory, and the duration of an epoch.

GPUS = (8, 12, 16, 24, 48, 80)
# A GPU sold as 16 GB has 14.6 to 16 GiB, and a desktop uses some.
USABLE = 0.95
# Dense bfloat16 peak of an RTX 4090, and the share of a GPU's peak that QLoRA reaches (LLaMA-Factory's published
# 2,295 tokens/s for Llama-2-7B on an A100 are 30 % of 312 TFLOP/s with recomputation counted).
TFLOPS, EFFICIENCY = 165.0, 0.30
_SHORTEST_LENGTH, _SHORTENED = 128, "questions are shortened, long answers refused"


@dataclass(frozen=True)
class Gpu:
    """A GPU size in GB, whether the recipe fits, and the largest batch with rows of max_length that fits."""

    gb: int
    fits: bool
    largest_batch: int


@dataclass(frozen=True)
class Change:
    """Settings (KEY=VALUE) that save memory, their cost, and the total bytes with all changes up to this one."""

    settings: tuple[str, ...]
    effect: str
    total: int
    fits: bool


def usable(gb: float) -> int:
    """Bytes that training may use of a GPU sold as `gb` GB."""
    return round(gb * USABLE * GIB)


def verdicts(plan: MemoryPlan) -> list[Gpu]:
    total = plan.total
    return [Gpu(gb, total <= usable(gb), plan.largest_batch(usable(gb))) for gb in GPUS]


def _fewer_rows(plan: MemoryPlan, available: int) -> dict[str, Any]:
    """The largest divisor of the batch size that fits, with gradient accumulation: rows per step stay the same."""
    training = plan.recipe.training.settings()
    rows, validated = training["per_device_train_batch_size"], training["per_device_eval_batch_size"]
    divisors = [count for count in range(1, max(rows, 2)) if rows % count == 0]
    fewer = divisors[max(0, bisect_right(divisors, available, key=plan.total_of_batch) - 1)]
    settings = {
        "training.per_device_train_batch_size": fewer,
        "training.gradient_accumulation_steps": training["gradient_accumulation_steps"] * rows // fewer,
    }
    if training["eval_strategy"] != "no" and validated > fewer:  # the larger of the two batches sets the peak
        settings["training.per_device_eval_batch_size"] = fewer
    return settings


# Settings and their cost: first those that give the same adapter, then those that round more, then those that lose
# text.
_SAVINGS: tuple[tuple[dict[str, Any] | Callable[[MemoryPlan, int], dict[str, Any]], str], ...] = (
    ({"training.gradient_checkpointing": True}, "the same adapter, about a third slower"),
    ({"training.per_device_eval_batch_size": 1}, "the same adapter, slower validation"),
    (_fewer_rows, "the same adapter, slower"),
    ({"training.optim": "paged_adamw_8bit"}, "optimizer state in 8 bit, moved out when memory is short"),
    ({"quantization.load_in_4bit": True}, "QLoRA: the frozen base model in 4 bit"),
    *[(lambda plan, _: {"training.max_length": max(plan.length // 2, _SHORTEST_LENGTH)}, _SHORTENED)] * 8,
)


def changes(plan: MemoryPlan, gb: float) -> list[Change]:
    """Settings to change, one after the other, until the plan fits; each must save at least 1 %."""
    available, before, advised = usable(gb), plan.total, list[Change]()
    for settings, effect in _SAVINGS * 2:  # a setting may save memory only after a larger item has shrunk
        if before <= available:
            break
        settings = settings(plan, available) if callable(settings) else settings
        values = plan.recipe.model_dump()
        for key, value in settings.items():
            section, name = key.split(".")
            values[section][name] = value
        try:
            tried = plan.with_recipe(recipe_from_values(values))
        except RecipeError:  # such as 4 bit and 8 bit together, or `orthogonal` in 4 bit
            continue
        total = tried.total
        if total <= 0.99 * before:
            plan, before = tried, total
            words = tuple(f"{key}={str(value).lower()}" for key, value in settings.items())
            advised.append(Change(words, effect, total, total <= available))
    return advised


def epoch_seconds(plan: MemoryPlan, tokens: int, labeled: int, rows: int) -> float:
    """Seconds for one epoch of `rows` rows with `tokens` tokens, `labeled` of them in answers.

    Assumes EFFICIENCY times TFLOPS. A frozen matrix of n parameters costs 2n operations per token forward, 2n backward,
    and 2n more for checkpointing; an adapter's matrix costs 6n. The head runs on answer tokens only, twice. Attention
    over the mean length costs 4 operations per pair of tokens and hidden dimension; the causal mask halves that.
    """
    count, text = plan.parameters, plan.config.get_text_config()
    passes = 3 if plan.checkpointing else 2
    blocks = count.base - count.embedding - (0 if count.tied else count.head)
    operations = 2.0 * passes * blocks * tokens
    operations += 6.0 * count.head * labeled + 6.0 * count.trainable * tokens
    operations += 2.0 * passes * (tokens / max(rows, 1)) * text.hidden_size * text.num_hidden_layers * tokens
    return operations / (TFLOPS * 1e12 * EFFICIENCY)
