"""Turns a fresh adapter into the one that `lora.init_lora_weights` asks for, where that takes more than PEFT's own
constructor, and what such a start did to the base model back into a plain adapter.

EVA reads training rows, LoftQ the weights of the base model before they were quantised. PiSSA and OLoRA move a part of
the base weights into the adapter: what is trained then belongs to another base model, which every reader would have to
make again (vLLM and llama.cpp do not, and PiSSA's fast variant comes out otherwise each time). So their first state is
kept, and the finished adapter is saved as the difference to it, for the plain base model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import HfHubHTTPError
from peft import get_eva_state_dict, initialize_lora_eva_weights, replace_lora_weights_loftq
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers.utils import cached_file

from sevpeft.errors import ModelError, RunError, first_sentence
from sevpeft.modeling.adapters import cast_trained
from sevpeft.modeling.compat import requested_engine
from sevpeft.modeling.loading import resolved_name, uses_gpu
from sevpeft.recipe import Recipe
from sevpeft.recipe.combinations import CHANGING_THE_BASE
from sevpeft.runs import Run
from sevpeft.training.trainer import IGNORED, SeveritySFTTrainer

INITIAL = "initial"
WEIGHTS = "adapter_model.safetensors"
# EVA looks at batches until its directions stay; where they do not by then, they never will.
MOST_EVA_BATCHES = 1000
# Two starts from the same weights on two kinds of hardware differ by rounding.
_SAME_START = 1e-3


def refuse_start(recipe: Recipe) -> None:
    """Raises ModelError where the start cannot be made on this machine or in this launch."""
    start = recipe.lora.init_lora_weights
    if not isinstance(start, str) or not start.startswith((*CHANGING_THE_BASE, "eva", "loftq")):
        return
    engine = requested_engine()
    if engine:
        raise ModelError(
            f"lora.init_lora_weights={start} needs the whole model in every process, and {engine} cuts it into parts; "
            "use true or gaussian, or launch without it."
        )
    if start == "loftq" and not uses_gpu(recipe):
        raise ModelError(
            "lora.init_lora_weights=loftq is computed by PEFT on a CUDA GPU only, and this run has none; use true."
        )


def start_adapter(trainer: SeveritySFTTrainer, recipe: Recipe, run: Run, checkpoint: str | None = None) -> None:
    """Puts the adapter of a trainer that has not begun into its first state.

    Random numbers of the training are not touched, so that a resumed run goes on as the whole one.

    Args:
        checkpoint: that will be loaded afterwards; an adapter that is not begun anew only gets its shape.

    Raises:
        ModelError: EVA finds too few answer tokens or does not settle; the weights for LoftQ are not at hand.
        RunError: PiSSA or OLoRA came out otherwise than when the run was begun.
    """
    start = recipe.lora.init_lora_weights
    if start == "eva":
        _start_from_rows(trainer, checkpoint)
    elif start == "loftq" and checkpoint is None:
        _start_from_quantisation_error(trainer, recipe)
    elif isinstance(start, str) and start.startswith(CHANGING_THE_BASE):
        _keep_first_state(trainer, run, checkpoint)


def make_plain(trainer: SeveritySFTTrainer, run: Run, folder: Path) -> None:
    """Writes the adapter in `folder` anew for the plain base model, where its start has changed that one."""
    model = trainer.model
    start = model.peft_config[model.active_adapter].init_lora_weights
    if isinstance(start, str) and start.startswith(CHANGING_THE_BASE):
        model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(run.checkpoints / INITIAL))


def _start_from_rows(trainer: SeveritySFTTrainer, checkpoint: str | None) -> None:
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
    """Name of a module → (rank, features) directions in which its inputs vary; an error, to be told everywhere."""
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


def _start_from_quantisation_error(trainer: SeveritySFTTrainer, recipe: Recipe) -> None:
    revision = {"revision": recipe.model.revision} if recipe.model.revision else {}
    try:
        config = cached_file(resolved_name(recipe), "config.json", **revision)
        replace_lora_weights_loftq(trainer.model, model_path=str(Path(config).parent))
    except (OSError, ValueError, SafetensorError, KeyError, HfHubHTTPError) as error:
        raise ModelError(
            f"lora.init_lora_weights=loftq does not find the whole weights of {recipe.model.name_or_path} "
            f"({first_sentence(error)}); use true."
        ) from error
    cast_trained(trainer.model)


def _keep_first_state(trainer: SeveritySFTTrainer, run: Run, checkpoint: str | None) -> None:
    kept = run.checkpoints / INITIAL
    if trainer.accelerator.is_main_process:
        if checkpoint is None:
            trainer.model.save_pretrained(str(kept))
        elif not _same_start(trainer, kept / WEIGHTS):
            raise RunError(
                f"{run.folder} was begun on other hardware or libraries, where lora.init_lora_weights divided the base "
                "weights otherwise; resume it there, or start another run."
            )
    trainer.accelerator.wait_for_everyone()


def _same_start(trainer: SeveritySFTTrainer, file: Path) -> bool:
    """Whether the products B·A, which were taken from the base weights, are those that were kept."""
    try:
        kept = load_file(file)
    except (OSError, SafetensorError):
        return False
    now = {name.replace(f".{trainer.model.active_adapter}.", "."): p for name, p in trainer.model.named_parameters()}
    for name, a in kept.items():
        if "lora_A" in name:
            there = kept[name.replace("lora_A", "lora_B")] @ a
            here = (now[name.replace("lora_A", "lora_B")] @ now[name]).detach().cpu()
            if not torch.allclose(there, here, rtol=0, atol=_SAME_START * float(there.abs().max())):
                return False
    return True
