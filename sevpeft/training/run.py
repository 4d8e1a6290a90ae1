"""Turns a recipe into a run folder with a trained adapter: the main job, from top to bottom.

Whatever can be refused is refused before the run folder is made; from then on everything is written so that a kill
leaves a run that `--resume` continues.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from transformers import PrinterCallback

from sevpeft.console import Screen
from sevpeft.errors import Interrupted, RunError, first_sentence
from sevpeft.modeling.adapters import (
    cast_adapter_to_compute_dtype,
    lora_config,
    sort_target_modules,
    trainable_parameters,
)
from sevpeft.modeling.loading import (
    check_form,
    check_hopeless_start,
    choose_precision,
    load_config,
    load_model,
    load_tokenizer,
    resolved_name,
    uses_gpu,
)
from sevpeft.modeling.saved_adapters import base_commit, base_fingerprint, check_base_weights
from sevpeft.recipe import Recipe
from sevpeft.runs import Run, check_output, default_output, describe_environment, new_run, plain_disk_errors
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.announcement import announce_batch, announce_data
from sevpeft.training.checkpoints import files_to_resume, remove_unfinished
from sevpeft.training.claim import claimed
from sevpeft.training.fitting import choose_layout, memory_is_full, refuse_what_cannot_fit, split_here
from sevpeft.training.initialisation import make_plain, refuse_start, start_adapter
from sevpeft.training.launch import check_launch, refuse_absent_deepspeed
from sevpeft.training.leaving import Leaving, command_to_go_on
from sevpeft.training.optimizer import loraplus_settings, refuse_optimizer
from sevpeft.training.preparation import Prepared, lengths_of, prepare, prompt_of
from sevpeft.training.progress import RunProgress, keep_tensorboard_in, say
from sevpeft.training.resuming import as_started, checkpoint_to_go_on_from, refuse_other_data, refuse_other_recipe
from sevpeft.training.settings import plain_refusals, refuse_no_batch, sft_config
from sevpeft.training.sharding import (
    engine_of,
    refuse_incomplete_adapter,
    refuse_other_processes,
    refuse_what_cannot_be_sharded,
)
from sevpeft.training.trainer import SeveritySFTTrainer


def train(recipe: Recipe, output: Path | None, *, resume: bool = False, console: Console | None = None) -> Run:
    """Trains the recipe's adapter.

    Args:
        recipe: resolved recipe.
        output: run folder; None for a new one under runs/.
        resume: continue the run that is in `output`.
        console: where progress is shown; on the main process only.

    Returns:
        The finished run.

    Raises:
        SevpeftError: in one plain sentence, whatever is refused or fails in a foreseeable way.
    """
    refuse_absent_deepspeed()
    # Without being told so, accelerate sets up a single process where it finds no GPU.
    try:
        state = PartialState(cpu=not uses_gpu(recipe))
    except (ValueError, ImportError, RuntimeError) as error:
        raise RunError(
            f"The processes of this launch cannot find one another ({first_sentence(error)}); start it with "
            "`accelerate launch`, or unset what the cluster has set (RANK, WORLD_SIZE, PMI_SIZE …) for one process."
        ) from error
    check_launch(state)
    console = console if console is not None and state.is_main_process else Screen(quiet=True)
    # transformers would expand a ~ for the checkpoints alone.
    folder = _same_on_all_processes((output or default_output(recipe.name)).expanduser())
    with claimed(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            check_output(folder, resume=resume)
        return _train(recipe, Run(folder), state, console, resume=resume)


def _train(recipe: Recipe, run: Run, state: PartialState, console: Console, *, resume: bool) -> Run:
    folder = run.folder
    if resume:
        recipe = as_started(recipe, run)
        refuse_other_recipe(recipe, run)
        if run.finished:
            console.print(f"The run in {folder} is finished; nothing is left to do.", soft_wrap=True)
            return run

    precision = choose_precision(recipe, run.metrics()["model"]["dtype"] if resume else None)
    asked, recipe = recipe, split_here(recipe)
    arguments = sft_config(recipe, precision, run.checkpoints)
    refuse_what_cannot_be_sharded(recipe, arguments)
    check_hopeless_start(recipe)
    refuse_what_cannot_fit(recipe)
    refuse_start(recipe)
    with state.main_process_first():
        config = load_config(recipe)
    check_form(recipe, config)
    tokenizer = load_tokenizer(recipe, config)
    prompt = prompt_of(recipe, tokenizer)
    say(console, "Base model", f"{recipe.model.name_or_path} ({config.model_type})")
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        with (
            state.main_process_first(),
            plain_disk_errors(
                Path(scratch).parent,
                when_full="free some, or set TMPDIR to a folder on another disk",
                remedy="set TMPDIR to another folder",
            ),
        ):
            prepared = prepare(recipe, prompt, Path(scratch))
        if resume:
            refuse_other_data(prepared.summary["fingerprint"], prepared.summary["source"], run)
        announce_data(prepared.summary, prepared.weights, recipe, console)
        model = load_model(recipe, precision, state.local_process_index)
        if resume:
            check_base_weights(recipe, run)
        recipe = choose_layout(asked, recipe, model, lengths_of(prepared.validation))
        arguments = sft_config(recipe, precision, run.checkpoints)
        announce_batch(recipe, console)
        adapter = lora_config(recipe, model)
        refuse_optimizer(arguments, model)
        refuse_no_batch(arguments, len(prepared.train))
        progress = RunProgress(run, console)
        leaving = Leaving(run.folder, lambda sentence: say(console, "Stopping", sentence, style="yellow"))
        with new_run(run) if state.is_main_process and not resume else nullcontext():
            with plain_refusals():
                trainer = SeveritySFTTrainer(
                    model=model,
                    args=arguments,
                    train_dataset=prepared.train,
                    eval_dataset=prepared.validation,
                    processing_class=tokenizer,
                    peft_config=adapter,
                    reduction=recipe.severity.reduction,
                    loraplus=loraplus_settings(recipe),
                    stopping=recipe.stopping,
                    leaving=leaving,
                    name_rows=prepared.row_names,
                    tell=lambda sentence: say(console, "Warning", sentence, style="yellow"),
                    callbacks=[progress, leaving],
                )
            trainer.sort_within_steps = not (arguments.padding_free or arguments.packing)
            trainer.accept_smaller_batches = bool(recipe.training.settings().get("auto_find_batch_size"))
            trainer.on_smaller_batch = lambda sentence: say(console, "Memory", f"full; {sentence}", style="yellow")
            trainer.remove_callback(PrinterCallback)
            keep_tensorboard_in(run, trainer.callback_handler.callbacks)
            if not resume:
                start_adapter(trainer, recipe, run)
            if state.is_main_process and not resume:
                _write_origin(run, recipe, prepared, trainer)
        state.wait_for_everyone()
        try:
            with progress, leaving, plain_disk_errors(folder):
                _train_and_measure(trainer, recipe, run, console, resume=resume)
        except BaseException as error:
            if state.is_main_process:
                remove_unfinished(run)
            if should_reduce_batch_size(error):
                raise memory_is_full(recipe, run.folder) from error
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"Interrupted. Go on with: {command_to_go_on(folder)}") from error
            raise
    # A process that exits while gloo's threads live is now and then aborted, after all its work is done.
    state.wait_for_everyone()
    state.destroy_process_group()
    return run


def _train_and_measure(
    trainer: SeveritySFTTrainer, recipe: Recipe, run: Run, console: Console, *, resume: bool
) -> None:
    checkpoint: str | None = None
    if resume:
        refuse_other_processes(trainer.accelerator, run.environment())
        required = files_to_resume(trainer.accelerator)
        found = checkpoint_to_go_on_from(run, console, required) if trainer.is_world_process_zero() else None
        trainer.accelerator.wait_for_everyone()
        checkpoint = _same_on_all_processes(str(found) if found else None)
        start_adapter(trainer, recipe, run, checkpoint)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    before = next(entry for entry in trainer.state.log_history if entry["step"] == 0 and "eval_loss" in entry)
    after = _validation_of_last_step(trainer) or trainer.evaluate()
    _save_adapter(trainer, run)
    if trainer.is_world_process_zero():
        run.update_metrics(
            training={
                "steps": trainer.state.global_step,
                "epochs": trainer.state.epoch,
                "train_loss": result.metrics["train_loss"],
                "nonfinite_steps": trainer.nonfinite_steps,
                "seconds": round(trainer.seconds, 1),
                "resumed_from": Path(checkpoint).name if checkpoint else None,
                **_peak_memory(),
            },
            before=_losses(before),
            after=_losses(after),
        )


def _validation_of_last_step(trainer: SeveritySFTTrainer) -> dict[str, float] | None:
    """The figures of the model as it is now, where the training took them already."""
    if trainer.args.load_best_model_at_end:
        return None
    step = trainer.state.global_step
    return next((entry for entry in trainer.state.log_history if entry["step"] == step and "eval_loss" in entry), None)


def _save_adapter(trainer: SeveritySFTTrainer, run: Run) -> None:
    """Writes the adapter beside its place and moves it there whole."""
    unfinished = run.unfinished_adapter
    trainer.save_model(str(unfinished))
    if trainer.is_world_process_zero():
        refuse_incomplete_adapter(unfinished, trainer.model)
        # A pickle of the training arguments; the recipe says the same and can be read.
        (unfinished / "training_args.bin").unlink(missing_ok=True)
        make_plain(trainer, run, unfinished)
        if trainer.args.bf16:
            cast_adapter_to_compute_dtype(unfinished, trainer.model.peft_config[trainer.model.active_adapter])
        sort_target_modules(unfinished)
        shutil.rmtree(run.adapter, ignore_errors=True)
        unfinished.replace(run.adapter)
    trainer.accelerator.wait_for_everyone()


def _write_origin(run: Run, recipe: Recipe, prepared: Prepared, trainer: SeveritySFTTrainer) -> None:
    """recipe.yaml, environment.json and the first part of metrics.json."""
    trainable, total = trainable_parameters(trainer.model)
    arguments = trainer.args
    run.write_json(
        "environment.json",
        {
            **describe_environment(),
            "device": torch.cuda.get_device_name() if arguments.device.type == "cuda" else arguments.device.type,
            "processes": arguments.world_size,
            "engine": engine_of(trainer.accelerator),
            "seed": arguments.seed,
            "data_fingerprint": prepared.summary["fingerprint"],
        },
    )
    base = trainer.model.get_base_model()
    run.update_metrics(
        model={
            "name_or_path": recipe.model.name_or_path,
            "resolved": resolved_name(recipe),
            "commit": base_commit(recipe),
            "fingerprint": base_fingerprint(recipe),
            "model_type": base.config.model_type,
            "parameters": total - trainable,
            "trainable_parameters": trainable,
            "dtype": str(base.dtype).removeprefix("torch."),
            "bits": next((bits for bits in (4, 8) if getattr(base, f"is_loaded_in_{bits}bit", False)), None),
            "attention": base.config._attn_implementation,
        },
        data=prepared.summary,
        weights=prepared.weights.as_dict(),
    )
    # Last, because it is what makes the folder a run that can be resumed.
    run.write_text("recipe.yaml", recipe.to_yaml())


def _losses(metrics: dict[str, float]) -> dict[str, float]:
    """Validation loss in nats per answer token, overall and per severity."""
    names = ("loss", *(f"loss_{severity}" for severity in SEVERITIES))
    return {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}


def _peak_memory() -> dict[str, float]:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}
    return {"resident_gib": round(psutil.Process().memory_info().rss / 2**30, 3)}


def _same_on_all_processes(value: Any) -> Any:
    """What the main process has, on every process."""
    return broadcast_object_list([value])[0]
