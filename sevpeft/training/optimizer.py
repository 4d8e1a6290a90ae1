"""Turns the LoRA+ settings of a recipe into the optimiser of a training: the one of `training.optim`, with the matrices
B of the adapter in groups of their own that learn faster (arXiv 2402.12354).

PEFT sorts the parameters; class and arguments of the optimiser are the trainer's, so that paged 8-bit ones work too.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments

from sevpeft.errors import RecipeError
from sevpeft.modeling.sharding import engine_asked
from sevpeft.recipe import Recipe


def loraplus_settings(recipe: Recipe) -> dict[str, float] | None:
    """Arguments of PEFT's `create_loraplus_optimizer` that the recipe sets; None without LoRA+.

    Raises:
        RecipeError: the training is sharded, where the optimiser is not built from these groups.
    """
    names = ("loraplus_lr_ratio", "loraplus_lr_embedding")
    found = {name: getattr(recipe.lora, name) for name in names if getattr(recipe.lora, name) is not None}
    engine = engine_asked()
    if found and engine:
        raise RecipeError(
            f"lora.loraplus_lr_ratio does not reach the optimiser that {engine} builds; leave it out, or train on one "
            "GPU or with several whole copies of the model (accelerate_configs without fsdp or deepspeed)."
        )
    return found or None


def loraplus_optimizer(model: PeftModel, args: TrainingArguments, settings: dict[str, float]) -> torch.optim.Optimizer:
    """The optimiser of `args.optim` with LoRA+'s groups; a weight decay of `args` holds for all but biases and norms.

    Args:
        settings: of `loraplus_settings`.
    """
    optimizer_cls, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
    taken: dict[str, Any] = {"loraplus_weight_decay": args.weight_decay, **settings, **arguments}
    optimizer = create_loraplus_optimizer(model, optimizer_cls, **taken)
    # Groups that stay empty (no adapted embedding, say) are of no use, and not every optimiser bears them.
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    return optimizer
