"""Models of real shapes with random weights, trained for a few steps to see what they take.

Nothing is downloaded: the numbers of a recipe (`about.config`) say what the model looks like, and its matrices are made
one by one on the device, quantised at once where the recipe says so, so that a 14B model never stands there whole.
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
from transformers.quantizers.base import get_keys_to_not_convert
from trl import SFTTrainer

from sevpeft.modeling.adapters import lora_config
from sevpeft.modeling.compat import disable_cpu_avx512_repack
from sevpeft.modeling.loading import Precision, quantization_config
from sevpeft.modeling.memory import GIB
from sevpeft.recipe import Recipe
from sevpeft.training.resolve import memory_plan, sft_config
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.models import build_tokenizer

WARM_UP, STEPS = 3, 8
# File that the table of a run is written to; unset, it is printed (pytest -s).
TABLE = "SEVPEFT_GPU_TABLE"
HEADER = "| shape | adapter | planned, GiB | allocated, GiB | planned/allocated | tokens/s against stock TRL |"


def random_base(recipe: Recipe, precision: Precision, device: str) -> PreTrainedModel:
    """The recipe's base model with normal weights of standard deviation .02, in its formats, on a device."""
    config = AutoConfig.for_model(**(recipe.about.config or {}))
    quantisation = quantization_config(recipe, precision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=precision.dtype)
        if quantisation is not None:
            model = replace_with_bnb_linear(
                model, modules_to_not_convert=get_keys_to_not_convert(model), quantization_config=quantisation
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


def full_rows(recipe: Recipe, count: int) -> Dataset:
    """Rows of `max_length` tokens, all but the first labelled: the worst batch, which is what is planned."""
    length = recipe.training.settings()["max_length"]
    vocabulary = (recipe.about.config or {})["vocab_size"]
    ids = torch.randint(4, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": [[-100, *row[1:]] for row in ids],
            "token_weights": [[0.0, *[1.0] * (length - 1)] for _ in ids],
        }
    )


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


def train_steps(recipe: Recipe, precision: Precision, device: str, *, stock: bool = False) -> Taken:
    """Trains the recipe's adapter on a model with random weights, by our trainer or by TRL's."""
    model = random_base(recipe, precision, device)
    with tempfile.TemporaryDirectory() as folder:
        args = sft_config(recipe, precision, Path(folder))
        rows = full_rows(recipe, args.per_device_train_batch_size * args.gradient_accumulation_steps * 2)
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
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        tokens = batch * recipe.training.settings()["max_length"] * (STEPS - WARM_UP)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        scaled = trainer.accelerator.scaler is not None
    return Taken(allocated, tokens / max(clock.seconds, 1e-9), [float(loss) for loss in losses], saved, scaled)


def planned_bytes(recipe: Recipe, *, on_gpu: bool = True) -> int:
    """By the plan, without its allowance for what no allocator counts."""
    items = memory_plan(recipe, on_gpu=on_gpu)[0].budget().items
    return sum(size for name, size in items.items() if not name.startswith("CUDA context"))


def table_line(name: str, adapter: str, planned: int, ours: Taken, stock: Taken) -> str:
    ratio = ours.tokens_per_second / stock.tokens_per_second
    return (
        f"| {name} | {adapter} | {planned / GIB:.2f} | {ours.allocated / GIB:.2f} | "
        f"{planned / max(ours.allocated, 1):.3f} | {ratio:.2f} |"
    )


def write_table(device: str, lines: list[str]) -> None:
    """Writes the Markdown table to the file that SEVPEFT_GPU_TABLE names, or prints it."""
    text = "\n".join([f"On {device}:", "", HEADER, "|---|---|--:|--:|--:|--:|", *lines]) + "\n"
    if TABLE in os.environ:
        Path(os.environ[TABLE]).write_text(text, encoding="utf-8")
    else:
        print(f"\n{text}")
