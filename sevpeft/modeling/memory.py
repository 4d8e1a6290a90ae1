"""How many bytes a training of a recipe's adapter holds, item by item, without weights, data or GPU.

Weights, adapter, gradients and optimizer state are counted on the real modules. What a step needs on top is found by
running the real forward and backward pass on tensors without numbers, for the worst batch: every row max_length long.
One or two layers are run; the others are extrapolated, which is exact because identical layers store the same. The LM
head and the dequantization for DoRA run in kernels that such tensors do not have, and are added by formula.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from sevpeft.errors import ModelError, UnknownModelError, first_sentence
from sevpeft.modeling.adapters import add_empty_adapter, named_config
from sevpeft.modeling.compat import (
    TOKEN_CHUNK_SIZE,
    FakeTensorMode,
    LiveBytes,
    logprob_chunk_size,
    make_fake,
    on_meta_device,
    selective_checkpointing_kwargs,
)
from sevpeft.modeling.loading import check_form, dtype_of_cpu, load_config
from sevpeft.recipe import AUTO, Recipe

GIB = 2**30
# Blocks of bitsandbytes: numbers that share an absolute maximum, and maxima that share one with double quantization.
_BLOCK, _NESTED_BLOCK = 64, 256
# What the CUDA runtime, cuBLAS and the loaded kernels take, and what the allocator loses between blocks. Allowances,
# not measurements; `tests/gpu` compares the sum with a real GPU.
CUDA_CONTEXT = round(0.6 * GIB)
FRAGMENTATION = 0.05
# Bytes of optimizer state for each trainable number, by the name that training.optim gives; AdamW's for all others.
_STATE_BYTES = (
    (r"(paged_)?adamw_8bit|adamw_bnb_8bit", 2.03),
    (r"(paged_)?lion_8bit", 1.02),
    (r"(paged_)?lion_32bit|rmsprop|adagrad", 4),
    (r"adafactor", 0.1),
    (r"sgd", 0),
    (r".*", 8.0),
)
# Bytes of a scored position and column in TRL's LM head where Triton does not run, beside the tile itself: logits
# twice, log p, p, the gradient and two of its terms in float32, and a mask (1.16, `_backward_tile`).
_HEAD_WITHOUT_TRITON = 7 * 4 + 1
LARGEST_BATCH = 1024
# The name of a layer's parameter: `where` the layers are, the layer's number, and the rest.
_LAYER = re.compile(r"(?P<where>.*?)\.(?P<number>\d+)\.(?P<rest>.+)")


class BaseConfig(NamedTuple):
    """Configuration of a base model and where it comes from: "its config.json" or "the recipe"."""

    config: PretrainedConfig
    origin: str


def base_config(recipe: Recipe) -> BaseConfig:
    """The model's own configuration where it is at hand, else the numbers that the recipe keeps.

    Raises:
        UnknownModelError: neither is there, or they describe no model.
    """
    numbers = recipe.about.config
    try:
        config = load_config(recipe)
    except ModelError as error:
        if numbers is None:
            raise UnknownModelError(str(error)) from error
        with _planning("about.config of the recipe"):
            return BaseConfig(AutoConfig.for_model(**numbers), "the recipe")
    check_form(recipe, config)
    return BaseConfig(config, "its config.json")


@contextmanager
def _planning(what: str) -> Iterator[None]:
    """Turns whatever the code of a model raises on numbers of others, or without any, into UnknownModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise UnknownModelError(f"The memory of {what} cannot be planned ({first_sentence(error)}).") from error


@dataclass(frozen=True)
class Setting:
    """A forward pass over a batch of the longest rows, and a backward pass where it trains."""

    batch: int
    length: int
    checkpointing: bool
    selective: bool = False
    """Checkpointing that keeps the outputs of attention."""
    every_n_layers: int = 1
    """Of so many layers one is checkpointed."""
    training: bool = True

    @classmethod
    def of(cls, recipe: Recipe) -> Setting:
        """What is still `auto` counts as the split that needs the least memory.

        Raises UnknownModelError: the recipe sets no length that a row can have at most.
        """
        settings = recipe.training.settings()
        if settings["max_length"] is None:
            raise UnknownModelError("training.max_length=null leaves open how long a row is; write a number of tokens.")
        batch, how = settings["per_device_train_batch_size"], settings.get("gradient_checkpointing_kwargs") or {}
        return cls(
            batch=1 if batch == AUTO else batch,
            length=settings["max_length"],
            checkpointing=settings.get("gradient_checkpointing") is not False,
            selective=bool(how.get("selective")),
            every_n_layers=int(how.get("every_n_layers", 1)),
        )


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model: of the base in all, quantized and not, and of the adapter."""

    quantized: int
    unquantized: int
    trainable: int
    embedding: int
    """Of the table that tokens are looked up in."""
    head: int
    """Of the matrix that scores the vocabulary; the same numbers as `embedding` where the two are tied."""
    tied: bool
    targets: dict[str, int]
    """Last name of an adapted module → how many there are."""

    @property
    def base(self) -> int:
        return self.quantized + self.unquantized

    @property
    def blocks(self) -> int:
        """All but embedding and head: what every token is multiplied with."""
        return self.base - self.embedding - (0 if self.tied else self.head)


@dataclass(frozen=True)
class Budget:
    """Bytes by item, in the order in which they are shown."""

    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())


class MemoryPlan:
    """What a training of the recipe's adapter holds in memory.

    Args:
        config: of the base model.
        on_gpu: a CUDA GPU in bfloat16 (float16 needs the same); else a CPU, in the format that it computes in.
        vocabulary_tile: columns of the LM head that a CPU scores at once.
    """

    def __init__(self, recipe: Recipe, config: PretrainedConfig, *, on_gpu: bool, vocabulary_tile: int) -> None:
        self.recipe, self.config, self.on_gpu = recipe, config, on_gpu
        self.vocabulary_tile = vocabulary_tile
        asked = recipe.model.dtype
        self.dtype = getattr(torch, asked) if asked != "auto" else torch.bfloat16 if on_gpu else dtype_of_cpu()
        self.setting = Setting.of(recipe)
        self._dry_runs: dict[tuple[int, ...], DryRun] = {}
        self._traces: dict[tuple[tuple[int, ...], Setting], torch.Tensor] = {}

    def with_recipe(self, recipe: Recipe) -> MemoryPlan:
        """The same base model and device under another recipe; what was run is shared where the model is the same."""
        if any(getattr(recipe, name) != getattr(self.recipe, name) for name in ("model", "quantization", "lora")):
            return MemoryPlan(recipe, self.config, on_gpu=self.on_gpu, vocabulary_tile=self.vocabulary_tile)
        plan = copy.copy(self)
        plan.recipe, plan.setting = recipe, Setting.of(recipe)
        return plan

    @cached_property
    def parameters(self) -> Parameters:
        count = self._extrapolated(self._layers_are_alike, lambda layers: self._dry_run(layers).count)
        run = self._dry_run(self._few_layers)
        targets = {name.removeprefix("on "): round(n) for name, n in sorted(count.items()) if name.startswith("on ")}
        return Parameters(
            quantized=round(count.get("quantized", 0)),
            unquantized=round(count["unquantized"]),
            trainable=round(count["trainable"]),
            embedding=run.embedding,
            head=run.head,
            tied=run.tied,
            targets=targets,
        )

    def budget(self, setting: Setting | None = None, eval_batch: int | None = None) -> Budget:
        """Bytes of the recipe's own setting, or of another one.

        Args:
            eval_batch: rows of a validation pass; None for the recipe's own.
        """
        setting, training = setting or self.setting, self.recipe.training.settings()
        if eval_batch is None:
            asked = training["per_device_eval_batch_size"] if training["eval_strategy"] != "no" else 0
            eval_batch = 1 if asked == AUTO else asked
        peak = self._peak(setting)
        # With as many rows it would need less: a training step does all that a validation step does, and keeps more.
        if eval_batch > setting.batch:
            peak = max(peak, self._peak(Setting(eval_batch, setting.length, False, training=False)))
        count, tile = self.parameters, self._head_bytes(setting)[0]
        items = {
            "base model, quantized": self._quantized_bytes(),
            f"base model, {self.dtype.itemsize * 8} bit": count.unquantized * self.dtype.itemsize,
            "adapter": count.trainable * 4,
            "gradients": count.trainable * 4,
            "optimizer state": round(count.trainable * state_bytes(str(training.get("optim") or "adamw_torch"))),
            "activations": peak - tile,
            "logits tile": tile,
        }
        if self.on_gpu:
            items["CUDA context, fragmentation"] = CUDA_CONTEXT + round(FRAGMENTATION * sum(items.values()))
        return Budget({name: size for name, size in items.items() if size})

    def total_of_batch(self, batch: int, checkpointing: bool | None = None) -> int:
        """Bytes with a batch of the recipe's length; validation is taken to have no more rows.

        Args:
            checkpointing: None for the recipe's own.
        """
        way = self.setting.checkpointing if checkpointing is None else checkpointing
        return self.budget(replace(self.setting, batch=batch, checkpointing=way), eval_batch=0).total

    def total_of_validation(self, batch: int) -> int:
        """Bytes while so many rows of the recipe's length are validated."""
        return self.budget(Setting(batch, self.setting.length, False, training=False), eval_batch=0).total

    def largest_batch(self, available: int) -> int:
        """The most rows of the recipe's length that fit in so many bytes; 0 when none does, at most 1,024."""
        return bisect_right(range(1, LARGEST_BATCH + 1), available, key=self.total_of_batch)

    def _quantized_bytes(self) -> int:
        asked, numbers = self.recipe.quantization, self.parameters.quantized
        if asked.load_in_8bit:
            return round(numbers * (1 + 4 / self.config.get_text_config().hidden_size))
        maxima = numbers / _BLOCK
        scales = maxima * (1 + 4 / _NESTED_BLOCK) if asked.bnb_4bit_use_double_quant else maxima * 4
        return round(numbers / 2 + scales)

    def _head_bytes(self, setting: Setting) -> tuple[int, int]:
        """Of the LM head's tile of logits, and of all that the head holds at its highest (TRL 1.16)."""
        rows, text = setting.batch * (setting.length - 1), self.config.get_text_config()
        columns = logprob_chunk_size() if self.on_gpu else min(logprob_chunk_size(), self.vocabulary_tile)
        tile = min(rows, TOKEN_CHUNK_SIZE) * columns * self.dtype.itemsize
        # Hidden states of the scored positions, their gradient in float32, and 8 figures for each.
        beside = rows * (text.hidden_size * (self.dtype.itemsize + 4) + 8 * 4)
        if not self.on_gpu:
            beside += min(rows, TOKEN_CHUNK_SIZE) * min(columns, text.vocab_size) * _HEAD_WITHOUT_TRITON
        return tile, tile + beside

    def _peak(self, setting: Setting) -> int:
        """Bytes of a step beyond weights and gradients, at its highest: in the LM head or in a layer."""
        alike = self._layers_are_alike and setting.every_n_layers == 1

        def figures(layers: tuple[int, ...]) -> dict[str, float]:
            trace = self._trace(layers, setting)
            return {"kept": float(trace[-1]), "layer": float(trace.max())}

        found = self._extrapolated(alike, figures)
        kept, layer = found["kept"], found["layer"]
        if self.recipe.quantization.quantised() and self.recipe.lora.settings().get("use_dora") and setting.training:
            # DoRA holds the dequantized matrices for the gradient: of all layers, or of the one that is run again.
            count = self._extrapolated(self._layers_are_alike, lambda layers: self._dry_run(layers).count)
            held = count["adapted"] * self.dtype.itemsize
            kept += 0 if setting.checkpointing else held
            layer += held / (len(layer_kinds(self.config)) if setting.checkpointing else 1)
        return round(max(layer, kept + self._head_bytes(setting)[1]))

    @cached_property
    def _few_layers(self) -> tuple[int, ...]:
        return extension(self.config, alike=self._layers_are_alike)[0]

    def _extrapolated(
        self, alike: bool, figures_of: Callable[[tuple[int, ...]], Mapping[str, float]]
    ) -> dict[str, float]:
        """Figures of the whole model from a few of its layers: a + b·n for n layers, with a b for each kind."""
        few, more = extension(self.config, alike=alike)
        first = figures_of(few)
        whole = dict(first)
        for layers, times in more:
            for name, value in figures_of((*layers, *few)).items():
                whole[name] = whole.get(name, 0) + times * (value - first.get(name, 0))
        return whole

    @cached_property
    def _layers_are_alike(self) -> bool:
        """Whether all layers of a kind have the same weights and adapter, so that a few can stand for the rest."""
        lora = self.recipe.lora.settings()
        settings = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
        named = [lora.get(setting) or () for setting in (*settings, "target_parameters")]
        names = [name for each in named for name in ([each] if isinstance(each, str) else each)]
        if lora.get("layers_to_transform") is not None or lora.get("layer_replication"):
            return False
        if any(re.search(r"[.\\\[]", name) and re.search(r"\d|\\d", name) for name in names):  # a layer by its number
            return False
        with _planning(self.recipe.model.name_or_path), on_meta_device():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config))
        kinds = layer_kinds(self.config)
        shapes: dict[tuple[str, int], set[tuple[str, torch.Size]]] = {}
        for name, parameter in model.named_parameters():
            if layer := _LAYER.match(name):
                key = layer["where"], int(layer["number"])
                shapes.setdefault(key, set()).add((layer["rest"], parameter.shape))
        first: dict[tuple[str, str], set[tuple[str, torch.Size]]] = {}
        return all(
            first.setdefault((where, kinds[number] if number < len(kinds) else ""), found) == found
            for (where, number), found in shapes.items()
        )

    def _dry_run(self, layers: tuple[int, ...]) -> DryRun:
        if layers not in self._dry_runs:
            half = self.dtype == torch.bfloat16 or (self.on_gpu and self.dtype != torch.float32)
            self._dry_runs[layers] = DryRun(self.recipe, self.config, self.dtype, layers, autocast=half)
        return self._dry_runs[layers]

    def _trace(self, layers: tuple[int, ...], setting: Setting) -> torch.Tensor:
        """Of two other batches, as each allocation is a + b·rows; for one row a little too much, as it copies less."""
        key = layers, setting
        if key not in self._traces:
            ends = () if setting.batch in (2, LARGEST_BATCH) else (2, LARGEST_BATCH)
            found = [self._trace(layers, replace(setting, batch=batch)) for batch in ends]
            if found and len(found[0]) == len(found[1]):
                self._traces[key] = torch.lerp(found[0], found[1], (setting.batch - 2) / (LARGEST_BATCH - 2))
            else:
                self._traces[key] = self._dry_run(layers).trace(setting)
        return self._traces[key]


class DryRun:
    """A base model of some layers with its adapter, of tensors without numbers that pose as a CPU's.

    Args:
        dtype: of the base model; adapters are float32, as the trainer keeps them.
        layers: numbers of those that it shall have.
        autocast: whether the step runs in mixed precision, in bfloat16.

    Raises:
        ModelError: PEFT refuses the combination, or a module that is named does not exist.
        UnknownModelError: transformers cannot make such a model on this machine.
    """

    def __init__(
        self, recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, layers: tuple[int, ...], *, autocast: bool
    ) -> None:
        self._autocast, self._fake = autocast, FakeTensorMode()
        attention, name = recipe.model.attn_implementation, recipe.model.name_or_path
        with _planning(name), on_meta_device():
            base = AutoModelForCausalLM.from_config(
                _with_layers(config, layers), dtype=dtype, **({"attn_implementation": attention} if attention else {})
            )
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        self.embedding, self.head = embedding.weight.numel(), head.weight.numel()
        self.tied = embedding.weight is head.weight
        quantized = recipe.quantization.quantised()
        matrices = {
            id(module.weight): module.weight.numel()
            for module in base.modules()
            if quantized and type(module) in (torch.nn.Linear, Conv1D) and module is not head
        }
        with on_meta_device():
            self._model = add_empty_adapter(base, named_config(recipe, base))
        self.count: Counter[str] = Counter()
        for parameter in self._model.parameters():
            frozen = "quantized" if id(parameter) in matrices else "unquantized"
            self.count["trainable" if parameter.requires_grad else frozen] += parameter.numel()
        for name in self._model.targeted_module_names:
            self.count[f"on {name.rsplit('.', 1)[-1]}"] += 1
            layer = base.get_submodule(name).get_base_layer()
            self.count["adapted"] += matrices.get(id(getattr(layer, "weight", None)), 0)
        self._model.enable_input_require_grads()
        with self._fake:
            make_fake(self._model)
            for parameter in self._model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)

    def trace(self, setting: Setting) -> torch.Tensor:
        """Runs a step up to the LM head and back. Gradients count as already there, as with accumulation they are.

        Returns:
            (n + 1,) bytes beyond weights and gradients after each allocation; last, those that forward keeps.

        Raises:
            UnknownModelError: the model asks for numbers, as one with experts may.
        """
        model, base = self._model.train(setting.training), self._model.get_base_model()
        if setting.checkpointing and setting.training:
            how = selective_checkpointing_kwargs() if setting.selective else {"use_reentrant": False}
            every = {"every_n_layers": setting.every_n_layers} if setting.every_n_layers > 1 else {}
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how, **every)
        else:
            base.gradient_checkpointing_disable()
        held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self._autocast)
        with (
            _planning(base.config.model_type),
            self._fake,
            LiveBytes(held) as counted,
            torch.set_grad_enabled(setting.training),
        ):
            with autocast:
                ids = torch.zeros(setting.batch, setting.length, dtype=torch.long)
                output = base.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                scored = torch.zeros(setting.batch * (setting.length - 1), dtype=torch.long)
                hidden = output.last_hidden_state
                loss = hidden.reshape(-1, hidden.shape[-1]).index_select(0, scored).sum()
                del ids, output, hidden, scored
            kept = counted.now
            if setting.training:
                loss.backward()
        return torch.tensor([*counted.trace, kept], dtype=torch.float64)


def state_bytes(optim: str) -> float:
    """Bytes of optimizer state for a trainable number."""
    return next(size for pattern, size in _STATE_BYTES if re.fullmatch(pattern, optim))


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """One name for each layer, such as full_attention or conv."""
    text = config.get_text_config()
    return list(getattr(text, "layer_types", None) or ["layer"] * int(text.num_hidden_layers))


def extension(config: PretrainedConfig, *, alike: bool) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], int]]]:
    """From which few layers all can be told: its last ones, and some to put before them, with how often these come.

    The last ones stay, because a step is at its highest in one of them, with what all before it keep. Where the layers
    of a kind are not `alike`, it is all of them.
    """
    kinds = layer_kinds(config)
    last = {kind: layer for layer, kind in enumerate(kinds)}
    start = min(last.values()) if alike else 0
    return tuple(range(start, len(kinds))), [((kinds.index(kind),), n) for kind, n in Counter(kinds[:start]).items()]


def _with_layers(config: PretrainedConfig, layers: tuple[int, ...]) -> PretrainedConfig:
    """The configuration with some of its layers only."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = len(layers)
    if kinds and "layer_types" in vars(text):  # Falcon-H1's follow from the number of layers
        text.layer_types = [kinds[layer] for layer in layers]
    return config
