"""Models of real shapes with random weights, trained for a few steps to see what they take.

Nothing is downloaded: the numbers of a recipe (`about.config`) say what the model looks like, and its matrices are made
one by one on the device, quantized at once where the recipe says so, so that a 14B model never stands there whole.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from transformers.integrations import replace_with_bnb_linear
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.base import get_keys_to_not_convert
from trl import SFTTrainer

from sevpeft.modeling.adapters import lora_config
from sevpeft.modeling.compat import disable_cpu_avx512_repack
from sevpeft.modeling.loading import Precision, quantization_config
from sevpeft.modeling.memory import GIB
from sevpeft.modeling.packing import set_up_attention
from sevpeft.recipe import Recipe
from sevpeft.training.resolve import choose_layout, memory_plan, resolve_split, sft_config, split_here
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.models import build_tokenizer

WARM_UP, STEPS = 3, 8
# File that the table of a run is written to; unset, it is printed (pytest -s).
TABLE = "SEVPEFT_GPU_TABLE"
HEADER = "| shape | adapter | planned, GiB | allocated, GiB | planned/allocated | TRL, GiB | tokens/s | against TRL |"


def random_base(recipe: Recipe, precision: Precision, device: str) -> PreTrainedModel:
    """The recipe's base model with normal weights of standard deviation .02, in its formats, on a device."""
    config = AutoConfig.for_model(**(recipe.about.config or {}))
    quantization_of_base = quantization_config(recipe, precision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=precision.dtype)
        if quantization_of_base is not None:
            model = replace_with_bnb_linear(
                model, modules_to_not_convert=get_keys_to_not_convert(model), quantization_config=quantization_of_base
            )
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = _made(module, name, parameter, precision.dtype, device)
                module._parameters[name] = made[id(parameter)]
        if module._buffers:
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "meta":
                    module._buffers[name] = torch.empty_like(buffer, device=device)
            model._init_weights(module)  # frequencies of rotary positions, which no file holds
    model.is_loaded_in_4bit = recipe.quantization.load_in_4bit
    model.is_loaded_in_8bit = recipe.quantization.load_in_8bit
    model.config.use_cache = False
    disable_cpu_avx512_repack(model)
    return model


def _made(
    module: torch.nn.Module, name: str, parameter: torch.nn.Parameter, dtype: torch.dtype, device: str
) -> torch.nn.Parameter:
    if isinstance(module, Linear4bit) and name == "weight":
        whole = torch.randn(module.out_features, module.in_features, dtype=dtype, device=device) * 0.02
        old = module.weight
        packed = Params4bit(
            whole,
            requires_grad=False,
            quant_type=old.quant_type,
            compress_statistics=old.compress_statistics,
            quant_storage=old.quant_storage,
            module=module,
        )
        return packed.to(device)
    if isinstance(module, Linear8bitLt) and name == "weight":
        whole = torch.randn(module.out_features, module.in_features, dtype=torch.float16, device=device) * 0.02
        return Int8Params(whole, requires_grad=False, has_fp16_weights=False).to(device)
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    values = values.fill_(1.0) if parameter.ndim == 1 and name == "weight" else values.normal_(std=0.02)
    return torch.nn.Parameter(values, requires_grad=False)


def rows_of(recipe: Recipe, lengths: list[int], labeled: float = 1.0) -> Dataset:
    """Rows of random tokens, of which a share at the end is labeled; the first token never is."""
    vocabulary, generator = (recipe.about.config or {})["vocab_size"], torch.Generator().manual_seed(0)
    ids = [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    both = [(max(1, round(len(row) * (1 - labeled))), row) for row in ids]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": [[-100] * start + row[start:] for start, row in both],
            "token_weights": [[0.0] * start + [1.0] * (len(row) - start) for start, row in both],
        }
    )


def full_rows(recipe: Recipe, count: int) -> Dataset:
    """Rows of `max_length` tokens, all but the first labeled: the worst batch, which is what is planned."""
    return rows_of(recipe, [recipe.training.settings()["max_length"]] * count)


def rows_like_consultations(recipe: Recipe, count: int) -> Dataset:
    """Rows of some 90 tokens, of which half is the answer, up to four times as long and as short."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.6).exp().mul(75).round().clamp(16, 512)
    return rows_of(recipe, drawn.int().tolist(), labeled=0.5)


class _Clock(TrainerCallback):
    """Seconds from the end of the warm-up to the last step."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == WARM_UP:
            self.began = time.perf_counter()
        self.seconds = time.perf_counter() - self.began


@dataclass(frozen=True)
class Taken:
    """What a training of a few steps took: bytes at the peak (0 on a CPU), tokens a second, losses, saved bytes."""

    allocated: int
    tokens_per_second: float
    losses: list[float]
    saved: int
    scaled: bool


def train_steps(
    recipe: Recipe, precision: Precision, device: str, *, stock: bool = False, as_shipped: bool = False
) -> Taken:
    """Trains the recipe's adapter on a model with random weights, by our trainer or by TRL's.

    Args:
        as_shipped: on rows like consultations, with the batch split and layout that a training here would choose; by
            TRL's trainer one row at a time, with gradient checkpointing, which is TRL's default.
    """
    set_up_attention()
    if stock:  # as it is without this project
        ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_attention_forward)
        torch.backends.cuda.enable_cudnn_sdp(True)
    model = random_base(recipe, precision, device)
    if as_shipped:
        one_by_one = resolve_split(recipe, None, 0)
        recipe = one_by_one if stock else choose_layout(recipe, split_here(recipe), model, 512)
    with tempfile.TemporaryDirectory() as folder:
        args = sft_config(recipe, precision, Path(folder))
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        rows = rows_like_consultations(recipe, batch * STEPS) if as_shipped else full_rows(recipe, batch * 2)
        mean = sum(map(len, rows["input_ids"])) / len(rows)
        args.max_steps, args.logging_steps, args.save_strategy, args.eval_strategy = STEPS, 1, "no", "no"
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        clock = _Clock()
        trainer = (SFTTrainer if stock else SeveritySFTTrainer)(
            model=model,
            args=args,
            train_dataset=rows.remove_columns("token_weights") if stock else rows,
            processing_class=build_tokenizer(),
            peft_config=lora_config(recipe, model),
            callbacks=[clock],
        )
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        allocated = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        trainer.save_model(folder)
        saved = (Path(folder) / "adapter_model.safetensors").stat().st_size
        tokens = batch * mean * (STEPS - WARM_UP)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        scaled = trainer.accelerator.scaler is not None
    return Taken(allocated, tokens / max(clock.seconds, 1e-9), [float(loss) for loss in losses], saved, scaled)


def planned_bytes(recipe: Recipe, *, on_gpu: bool = True) -> int:
    """By the plan, without its allowance for what no allocator counts."""
    items = memory_plan(recipe, on_gpu=on_gpu)[0].budget()
    return sum(size for name, size in items.items() if not name.startswith("CUDA context"))


def table_line(name: str, adapter: str, planned: int, ours: Taken, stock: Taken) -> str:
    plan, ratio = (f"{planned / GIB:.2f}", f"{planned / max(ours.allocated, 1):.3f}") if planned else ("–", "–")
    memory = f"{plan} | {ours.allocated / GIB:.2f} | {ratio}"
    speed = f"{ours.tokens_per_second:,.0f} | {ours.tokens_per_second / stock.tokens_per_second:.2f}"
    return f"| {name} | {adapter} | {memory} | {stock.allocated / GIB:.2f} | {speed} |"


def write_table(device: str, lines: list[str]) -> None:
    """Writes the Markdown table to the file that SEVPEFT_GPU_TABLE names, or prints it."""
    text = "\n".join([f"On {device}:", "", HEADER, "|---|---|--:|--:|--:|--:|--:|--:|", *lines]) + "\n"
    if TABLE in os.environ:
        Path(os.environ[TABLE]).write_text(text, encoding="utf-8")
    else:
        print(f"\n{text}")
