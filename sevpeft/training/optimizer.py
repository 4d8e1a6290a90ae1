"""Turns the LoRA+ settings of a recipe into the optimiser of a training: the one of `training.optim`, with the matrices
B of the adapter in groups of their own that learn faster (arXiv 2402.12354).

PEFT sorts the parameters; class and arguments of the optimiser are the trainer's, so that paged 8-bit ones work too.
The trainer builds optimiser and schedule inside its loop; here both are tried before there is a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler

from sevpeft.errors import RecipeError, first_sentence
from sevpeft.modeling.compat import requested_engine
from sevpeft.recipe import Recipe


def loraplus_settings(recipe: Recipe) -> dict[str, float] | None:
    """Arguments of PEFT's `create_loraplus_optimizer` that the recipe sets; None without LoRA+.

    Raises:
        RecipeError: the training is sharded, where the optimiser is not built from these groups.
    """
    names = ("loraplus_lr_ratio", "loraplus_lr_embedding")
    found = {name: getattr(recipe.lora, name) for name in names if getattr(recipe.lora, name) is not None}
    engine = requested_engine()
    if found and engine:
        raise RecipeError(
            f"lora.loraplus_lr_ratio does not reach the optimiser that {engine} builds; leave it out, or train on one "
            "GPU or with several whole copies of the model (accelerate_configs without fsdp or deepspeed)."
        )
    return found or None


def refuse_optimizer(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Raises RecipeError for an optimiser or a schedule that the trainer could not build.

    Args:
        model: the base model; GaLore and its kin look for their modules in it.
    """
    optim, schedule = (str(getattr(name, "value", name)) for name in (args.optim, args.lr_scheduler_type))
    with _refused(f"training.optim={optim}", "write another one, such as adamw_torch"):
        optimizer_cls, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
    with _refused("training.optim_args or an adam_… setting", "correct it, or leave it out"):
        groups_of_its_own = {"params", "model", "optimizer_dict"} & set(arguments)
        if not groups_of_its_own:
            optimizer_cls([torch.nn.Parameter(torch.zeros(1))], **arguments)
    with _refused(f"training.lr_scheduler_type={schedule}", "correct training.lr_scheduler_kwargs, or write linear"):
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )


@contextmanager
def _refused(setting: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a library raises that is absent, or is given what it does not take
        raise RecipeError(f"{setting} is refused ({first_sentence(error)}); {remedy}.") from error


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
