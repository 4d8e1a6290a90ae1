"""EVA (arXiv 2410.07170): starts an adapter from the activations of training rows, with PEFT's implementation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from peft import get_eva_state_dict, initialize_lora_eva_weights
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from sevpeft.errors import ModelError, first_sentence
from sevpeft.modeling.adapters import cast_trained
from sevpeft.modeling.compat import requested_engine
from sevpeft.recipe import Recipe
from sevpeft.training.compat import IGNORED

if TYPE_CHECKING:
    from sevpeft.training.trainer import SeveritySFTTrainer

WEIGHTS = "adapter_model.safetensors"
# EVA looks at batches until its directions stay; where they do not by then, they never will.
MOST_EVA_BATCHES = 1000


def check_eva(recipe: Recipe) -> None:
    """Raises ModelError where FSDP or DeepSpeed divide the model, which EVA needs whole."""
    engine = requested_engine()
    if recipe.lora.init_lora_weights == "eva" and engine:
        raise ModelError(
            f"lora.init_lora_weights=eva needs the whole model in every process, and {engine} cuts it into parts; "
            "use true or gaussian, or launch without it."
        )


def initialize_from_rows(trainer: SeveritySFTTrainer, checkpoint: str | None = None) -> None:
    """Starts the adapter in the directions in which the inputs of its modules vary on training rows.

    Random numbers of the training are not touched, so that a resumed run continues as the whole one.

    Args:
        checkpoint: that will be loaded afterwards; the adapter then only gets its shape.

    Raises:
        ModelError: too few answer tokens, or the directions do not settle.
    """
    model = trainer.model
    with torch.random.fork_rng():
        if checkpoint is not None:
            state = _shape_of(trainer, Path(checkpoint))
        else:
            found = _directions(trainer) if trainer.accelerator.is_main_process else {}
            found = broadcast_object_list([found])[0]
            if isinstance(found, ModelError):
                raise found
            state = found
        initialize_lora_eva_weights(model, eva_state_dict=state)
    cast_trained(model)


def _directions(trainer: SeveritySFTTrainer) -> dict[str, torch.Tensor] | ModelError:
    """Module name → (rank, features) directions in which its inputs vary; or the error, to raise on all processes."""
    config = trainer.model.peft_config[trainer.model.active_adapter]
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    batches = _batches_of_tokens(trainer, round(max(ranks) * config.eva_config.rho), config.eva_config.use_label_mask)
    if not batches:
        return ModelError(
            "lora.init_lora_weights=eva needs a batch with more answer tokens than the highest rank, and all training "
            "rows together have fewer; lower lora.r, or use true."
        )
    backbone = trainer.model.get_base_model().base_model
    looked_at = 0

    def forward(_: Any, inputs: dict[str, torch.Tensor]) -> None:
        nonlocal looked_at
        looked_at += 1
        if looked_at > MOST_EVA_BATCHES:
            raise ModelError(
                f"lora.init_lora_weights=eva has not settled after {MOST_EVA_BATCHES} batches; lower "
                "lora.eva_config.tau or lora.r, or use true."
            )
        given = ("input_ids", "attention_mask", "position_ids")
        with trainer.compute_loss_context_manager():
            backbone(**{name: inputs[name] for name in given if name in inputs}, use_cache=False)

    loader = DataLoader(trainer.train_dataset, batch_sampler=batches, collate_fn=trainer.data_collator)
    try:
        return get_eva_state_dict(
            trainer.model, loader, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False
        )
    except ModelError as error:
        return error
    except (ValueError, RuntimeError) as error:
        return ModelError(
            f"lora.init_lora_weights=eva fails for this model ({first_sentence(error)}); lower lora.r, or use true."
        )


def _batches_of_tokens(trainer: SeveritySFTTrainer, least: int, answers_only: bool) -> list[list[int]]:
    """Row numbers in batches of at least so many tokens each, in an order that `seed` decides."""
    rows = trainer.train_dataset
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trainer.args.seed)).tolist()
    batches: list[list[int]] = []
    batch: list[int] = []
    tokens = 0
    for index, count in zip(order, _token_counts(rows.select(order), answers_only), strict=True):
        batch.append(index)
        tokens += count
        if tokens >= least and len(batch) >= trainer.args.per_device_train_batch_size:
            batches.append(batch)
            batch, tokens = [], 0
    return batches


def _token_counts(rows: Any, answers_only: bool) -> Iterator[int]:
    for part in rows.select_columns(["labels"]).iter(batch_size=1000):
        for labels in part["labels"]:
            yield sum(label != IGNORED for label in labels) if answers_only else len(labels)


def _shape_of(trainer: SeveritySFTTrainer, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The matrices A of a checkpoint as EVA's result, no rows for a module that EVA gave no rank."""
    saved = load_file(checkpoint / WEIGHTS)
    suffix = ".lora_A.weight"
    found = {name.removesuffix(suffix): matrix for name, matrix in saved.items() if name.endswith(suffix)}
    adapted = [name for name, module in trainer.model.named_modules() if hasattr(module, "lora_A")]
    return {name: found.get(name, torch.empty(0, 0)).to(trainer.args.device) for name in adapted}
