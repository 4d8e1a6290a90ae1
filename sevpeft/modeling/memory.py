"""Memory plan: how many bytes a training of a recipe's adapter holds, item by item, without weights, data or GPU.

Weights, adapter, gradients and optimizer state are counted on the real modules. What a step needs on top is found by
running its forward and backward pass on tensors without numbers, for the worst batch: every row max_length long. One
layer of each kind stands for all of its kind, which is exact because equal layers keep the same. The LM head and the
dequantization for DoRA run in kernels that such tensors do not have, and are added by formula.
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
# Blocks of bitsandbytes: numbers that share an absolute maximum, and maxima that share one with double quantization.
_BLOCK, _NESTED_BLOCK = 64, 256
# What the CUDA runtime, cuBLAS and the loaded kernels take, and what the allocator loses between blocks. Allowances,
# not measurements; `tests/gpu` compares the sum with a real GPU.
CUDA_CONTEXT = round(0.6 * GIB)
FRAGMENTATION = 0.05
# Bytes of optimizer state for each trainable number, by a part of the name that training.optim gives; else AdamW's.
_STATE_BYTES = {"adamw_8bit": 2.03, "bnb_8bit": 2.03, "lion_8bit": 1.02, "lion": 4, "adafactor": 0.1, "sgd": 0}
# Bytes of a scored position and column in TRL's LM head where Triton does not run, beside the tile itself: logits
# twice, log p, p, the gradient and two of its terms in float32, and a mask (1.16, `_backward_tile`).
_HEAD_WITHOUT_TRITON = 7 * 4 + 1
LARGEST_BATCH = 1024
# Rows of the batch that is run without numbers. A prime that no model has as a dimension: what it divides grows with
# the rows, all else does not.
_ROWS = 10_007


def base_config(recipe: Recipe) -> tuple[PretrainedConfig, str]:
    """The model's own configuration where it is at hand, else the numbers that the recipe keeps; and which of the two.

    Raises UnknownModelError where neither is there, or they describe no model.
    """
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
    """Translates what a model's code raises on a config of others, or on tensors without numbers."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise UnknownModelError(f"The memory of {what} cannot be planned ({first_sentence(error)}).") from error


# What all-linear takes and no adapter belongs on: what chooses an expert, and what the kernels of a Mamba layer read
# past its modules, so that an adapter would do nothing (PEFT 0.21 refuses some of these, of some models).
_ROUTERS, _READ_BY_KERNELS = re.compile(r"router|(shared_expert_)?gate"), ("out_proj", "x_proj", "dt_proj")


def text_targets(name: str, config: PretrainedConfig) -> str | list[str]:
    """lora.target_modules of a model's text layers; all-linear where that is the same. Raises UnknownModelError."""
    with _planning(name), compat.on_meta_device():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        parts, decoder = dict(model.named_modules()), model.get_decoder()
        text, others, within = set[str](), set[str](), {*map(id, decoder.modules())}
    for path, part in parts.items():
        if isinstance(part, torch.nn.Linear | Conv1D) and part is not model.get_output_embeddings():
            (text if id(part) in within else others).add(path.rpartition(".")[2])
    unfit = {*filter(_ROUTERS.fullmatch, text), *(_READ_BY_KERNELS if any("conv1d" in path for path in parts) else ())}
    targets = sorted(text - unfit)
    if others & {*targets}:  # such as layers that read pictures
        return rf"{re.escape(next(path for path in parts if parts[path] is decoder))}\..*\.({'|'.join(targets)})"
    return targets if others or text & unfit else "all-linear"


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model: of the base, quantized and not, and of the adapter.

    Attributes:
        embedding, head: of the two matrices of the vocabulary; the same numbers where they are tied.
        targets: last name of an adapted module → how many there are.
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


@dataclass(frozen=True)
class Budget:
    """Bytes by item, in the order in which they are shown."""

    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())


class MemoryPlan:
    """What a training of the recipe's adapter holds in memory. What is still `auto` counts as the smallest split.

    Args:
        config: of the base model.
        on_gpu: a CUDA GPU in bfloat16 (float16 needs the same); else a CPU, in the format that it computes in.
        vocabulary_tile: columns of the LM head that a CPU scores at once.

    Raises:
        ModelError: PEFT refuses the adapter, or a module that is named does not exist.
        UnknownModelError: the model cannot be run without numbers, or no length is set that a row can have at most.
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
            quantized, numbers = sum(matrices.values()), sum(weight.numel() for weight in base.parameters())
            lora, settings = lora_config(recipe, base), recipe.lora.settings()
            self._layers = config.get_text_config().num_hidden_layers
            named = [[found] for key, found in settings.items() if re.search("modules|parameters|pattern|layer", key)]
            by_number = re.search(r"[.\[(|]\d|\\d", str(named))
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
        self.parameters = Parameters(quantized, numbers - quantized, trainable, *vocabulary, targets)
        self._model.enable_input_require_grads()
        compat.move_shapes_to_cpu(self._model, self._fake)  # autocast and attention then choose as they do there
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
            raise UnknownModelError("training.max_length=null leaves open how long a row is; write a number of tokens.")
        if self._training["eval_strategy"] == "no":
            self.eval_batch = 0
        self.checkpointing = self._training.get("gradient_checkpointing") is not False
        # A model that cannot be run is known from the start.
        self._peak(self.batch, self._training.get("gradient_checkpointing") is True)

    def with_recipe(self, recipe: Recipe) -> MemoryPlan:
        """The same base model and device under another recipe."""
        return plan_for(recipe, self.config, on_gpu=self.on_gpu, vocabulary_tile=self.vocabulary_tile)

    def budget(
        self, batch: int | None = None, checkpointing: bool | None = None, eval_batch: int | None = None
    ) -> Budget:
        """Bytes with so many rows of the recipe's length in a training and a validation batch; None: the recipe's."""
        batch = self.batch if batch is None else batch
        eval_batch = self.eval_batch if eval_batch is None else eval_batch
        peak = self._peak(batch, self.checkpointing if checkpointing is None else checkpointing)
        # With as many rows it would need less: a training step does all that a validation step does, and keeps more.
        if eval_batch > batch:
            peak = max(peak, self._peak(eval_batch, False, training=False))
        count, optim = self.parameters, str(self._training.get("optim") or "adamw_torch")
        state = next((size for name, size in _STATE_BYTES.items() if name in optim), 8)
        # In 8 bit a scale for each row of a matrix, in 4 bit one for each block.
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
        return Budget({name: size for name, size in items.items() if size})

    def total_of_batch(self, batch: int, checkpointing: bool | None = None) -> int:
        """Bytes with so many rows in a training batch, and no more in a validation batch."""
        return self.budget(batch, checkpointing, eval_batch=0).total

    def total_of_validation(self, batch: int, checkpointing: bool | None = None) -> int:
        """Bytes with so many rows in a validation batch, and one in a training batch."""
        return self.budget(1, checkpointing, eval_batch=batch).total

    def largest_batch(self, available: int) -> int:
        """The most rows of the recipe's length that fit in so many bytes; 0 when none does, at most 1,024."""
        return bisect_right(range(1, LARGEST_BATCH + 1), available, key=self.total_of_batch)

    def _peak(self, batch: int, checkpointing: bool, *, training: bool = True) -> int:
        """Bytes of a step beyond weights and gradients, at its highest: in the LM head or in a layer."""
        kwargs, text = self._training.get("gradient_checkpointing_kwargs") or {}, self.config.get_text_config()
        # The LM head (TRL 1.16): a tile of logits; of each scored position the hidden state, its gradient in float32
        # and 8 figures.
        rows = batch * (self.length - 1)
        columns = compat.LOGPROB_CHUNK_SIZE if self.on_gpu else min(compat.LOGPROB_CHUNK_SIZE, self.vocabulary_tile)
        head = rows * (text.hidden_size * (self.dtype.itemsize + 4) + 8 * 4)
        head += min(rows, compat.TOKEN_CHUNK_SIZE) * columns * self.dtype.itemsize
        if not self.on_gpu:
            head += min(rows, compat.TOKEN_CHUNK_SIZE) * min(columns, text.vocab_size) * _HEAD_WITHOUT_TRITON
        held = 0
        if self.recipe.quantization.quantized() and self.recipe.lora.settings().get("use_dora") and training:
            # DoRA holds the dequantized matrices for the gradient: of all layers, or of the one that is run again.
            held = self._adapted * self.dtype.itemsize
        attention = 0
        if kwargs.get("selective"):  # checkpointing that keeps what attention gives out
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
        if checkpointing and (every := int(kwargs.get("every_n_layers", 1))) > 1:  # the others keep everything
            peak = peak / every + highest(False) * (1 - 1 / every)
        return round(peak)

    def _mark(self, *_: Any) -> None:
        """Notes, before and after a layer, how long the trace is and what lives then."""
        self._marks.append((len(self._counted.trace), [*self._counted.now]))

    def _run(self, length: int, checkpointing: bool, training: bool) -> torch.Tensor:
        """Runs a step up to the LM head and back. Gradients count as already there, as with accumulation they are.

        Returns:
            (n + 1, 2) bytes beyond weights and gradients after each allocation, and bytes for each row of the batch;
            the last ones are those that forward keeps.
        """
        half = self.dtype == torch.bfloat16 or (self.on_gpu and self.dtype != torch.float32)  # as under mixed precision
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
        if training:  # what a layer keeps, for those that were not run as well
            marks = torch.tensor([now for _, now in self._marks])
            trace[start:] += (self._times - 1) @ (marks[1:-1:2] - marks[:-1:2])
        return trace


# Of this process: a comparison trains one model many times, and advice tries many settings on one.
_PLANS: dict[str, MemoryPlan] = {}


def plan_for(recipe: Recipe, config: PretrainedConfig, *, on_gpu: bool, vocabulary_tile: int) -> MemoryPlan:
    """A `MemoryPlan`; what was run is shared with earlier ones of the same model, adapter and device."""
    numbers = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    model = (recipe.model.dtype, recipe.model.attn_implementation, on_gpu, vocabulary_tile)
    key = str([numbers, model, recipe.quantization, recipe.lora])
    if key not in _PLANS:
        _PLANS[key] = MemoryPlan(recipe, config, on_gpu=on_gpu, vocabulary_tile=vocabulary_tile)
    plan = copy.copy(_PLANS[key])
    plan._follow(recipe)
    return plan


def _one_of_each_kind(base: PreTrainedModel, count: int, *, alike: bool) -> list[tuple[torch.nn.Module, int]]:
    """Takes all layers out of a model but the last of each kind: a step is at its highest in the last one of all.

    All stay where the adapter is not `alike` in all layers of a kind. Returns the layers that are left, each with how
    many of the `count` layers it stands for.
    """
    decoder = base.get_decoder()
    layers = next(part for part in decoder.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count)
    types = getattr(decoder.config, "layer_types", None) or [""] * count
    kinds = [
        (types[number], alike or number, *((name, weight.shape) for name, weight in layer.named_parameters()))
        for number, layer in enumerate(layers)
    ]
    kept = sorted({kind: number for number, kind in enumerate(kinds)}.values())
    found = [(layers[number], kinds.count(kinds[number])) for number in kept]
    for number in reversed(range(count)):
        if number not in kept:
            del layers[number]
    decoder.config.num_hidden_layers = len(kept)
    if "layer_types" in vars(decoder.config):  # Falcon-H1's follow from the number of layers
        decoder.config.layer_types = [types[number] for number in kept]
    return found


def _adapter_counts(module: torch.nn.Module, matrices: dict[int, int]) -> Counter[str]:
    """Trainable numbers, those of adapted quantized matrices, and how often a module of each name is adapted."""
    count = Counter(trainable=sum(weight.numel() for weight in module.parameters() if weight.requires_grad), adapted=0)
    for name, part in module.named_modules():
        if isinstance(part, LoraLayer):
            count[name.rsplit(".", 1)[-1]] += 1
            count["adapted"] += matrices.get(id(getattr(part.get_base_layer(), "weight", None)), 0)
    return count


# What a plan means: on which GPUs a training fits, what to change where it does not, how long an epoch takes.

GPUS = (8, 12, 16, 24, 48, 80)
# A GPU sold as 16 GB shows 14.6 to 16 GiB, and a desktop takes some.
USABLE = 0.95
# Dense bfloat16 peak of an RTX 4090, and the share of a GPU's peak that QLoRA reaches (LLaMA-Factory's published
# 2,295 tokens/s for Llama-2-7B on an A100 are 30 % of 312 TFLOP/s with recomputation counted).
TFLOPS, EFFICIENCY = 165.0, 0.30
_SHORTEST_LENGTH, _SHORTENED = 128, "questions are shortened, long answers refused"


@dataclass(frozen=True)
class Gpu:
    """A GPU of so many GB: whether the recipe fits as it stands, and the largest batch of its max_length that does."""

    gb: int
    fits: bool
    largest_batch: int


@dataclass(frozen=True)
class Change:
    """Settings (KEY=VALUE) that save memory, what they cost, bytes with them and all earlier ones, whether it fits."""

    settings: tuple[str, ...]
    effect: str
    total: int
    fits: bool


def usable(gb: float) -> int:
    """Bytes that a training may take of a GPU sold as so many GB."""
    return round(gb * USABLE * GIB)


def verdicts(plan: MemoryPlan) -> list[Gpu]:
    total = plan.budget().total
    return [Gpu(gb, total <= usable(gb), plan.largest_batch(usable(gb))) for gb in GPUS]


def _fewer_rows(plan: MemoryPlan, available: int) -> dict[str, Any]:
    """The largest divisor of the rows that fits, so that a step keeps its rows."""
    training = plan.recipe.training.settings()
    rows, validated = training["per_device_train_batch_size"], training["per_device_eval_batch_size"]
    divisors = [count for count in range(1, max(rows, 2)) if rows % count == 0]
    fewer = divisors[max(0, bisect_right(divisors, available, key=plan.total_of_batch) - 1)]
    settings = {
        "training.per_device_train_batch_size": fewer,
        "training.gradient_accumulation_steps": training["gradient_accumulation_steps"] * rows // fewer,
    }
    if training["eval_strategy"] != "no" and validated > fewer:  # as long as one of the two is large, so is the memory
        settings["training.per_device_eval_batch_size"] = fewer
    return settings


# Settings and what they cost. First those that train the same adapter, then those that round a little more, then those
# that lose text.
_SAVINGS: tuple[tuple[dict[str, Any] | Callable[[MemoryPlan, int], dict[str, Any]], str], ...] = (
    ({"training.gradient_checkpointing": True}, "the same adapter, about a third slower"),
    ({"training.per_device_eval_batch_size": 1}, "the same adapter, slower validation"),
    (_fewer_rows, "the same adapter, slower"),
    ({"training.optim": "paged_adamw_8bit"}, "optimizer state in 8 bit, moved out when memory is short"),
    ({"quantization.load_in_4bit": True}, "QLoRA: the frozen base model in 4 bit"),
    *[(lambda plan, _: {"training.max_length": max(plan.length // 2, _SHORTEST_LENGTH)}, _SHORTENED)] * 8,
)


def changes(plan: MemoryPlan, gb: float) -> list[Change]:
    """What saves memory, one after the other, until it fits; each is planned anew, and must save a hundredth."""
    available, before, found = usable(gb), plan.budget().total, list[Change]()
    for settings, effect in _SAVINGS * 2:  # what saved nothing beside something larger may do so once that is smaller
        if before <= available:
            break
        settings = settings(plan, available) if callable(settings) else settings
        values = plan.recipe.model_dump()
        for key, value in settings.items():
            section, name = key.split(".")
            values[section][name] = value
        try:
            tried = plan.with_recipe(recipe_from_values(values))
        except RecipeError:  # such as 4 bit beside 8 bit, or `orthogonal` in 4 bit
            continue
        total = tried.budget().total
        if total <= 0.99 * before:
            plan, before = tried, total
            words = tuple(f"{key}={str(value).lower()}" for key, value in settings.items())
            found.append(Change(words, effect, total, total <= available))
    return found


def epoch_seconds(plan: MemoryPlan, tokens: int, labeled: int, rows: int) -> float:
    """Seconds for one pass over so many tokens, of which so many are answers, at TFLOPS and EFFICIENCY.

    A frozen matrix of n numbers costs 2n operations a token forward, 2n backward, and 2n more for checkpointing; an
    adapter's 6n. The head sees answers only and is run twice. Attention over the mean length costs 4 operations for
    each pair and hidden number, half of them hidden by the causal mask.
    """
    count, text = plan.parameters, plan.config.get_text_config()
    passes = 3 if plan.checkpointing else 2
    blocks = count.base - count.embedding - (0 if count.tied else count.head)
    operations = 2.0 * passes * blocks * tokens
    operations += 6.0 * count.head * labeled + 6.0 * count.trainable * tokens
    operations += 2.0 * passes * (tokens / max(rows, 1)) * text.hidden_size * text.num_hidden_layers * tokens
    return operations / (TFLOPS * 1e12 * EFFICIENCY)
