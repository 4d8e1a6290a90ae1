"""Trains the adapter of a recipe: resolve, data, model, trainer, train, save.

Whatever can be refused is refused before the run folder is made. From then on a kill leaves a run that `--resume`
continues.
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

from sevpeft.console import Screen, print_labeled
from sevpeft.errors import Interrupted, RunError, first_sentence
from sevpeft.modeling.adapters import (
    cast_adapter_to_compute_dtype,
    lora_config,
    sort_target_modules,
    trainable_parameters,
)
from sevpeft.modeling.loading import load_model, resolved_name, uses_gpu
from sevpeft.modeling.saved_adapters import base_commit, base_fingerprint, check_base_weights
from sevpeft.recipe import Recipe
from sevpeft.runs import Run, check_output, default_output, describe_environment, new_run, plain_disk_errors
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.callbacks import RunProgress, SignalHandler, keep_tensorboard_in, resume_command
from sevpeft.training.checkpoints import (
    as_started,
    check_same_data,
    check_same_recipe,
    files_to_resume,
    remove_incomplete,
    resume_checkpoint,
    run_lock,
)
from sevpeft.training.data import Prepared, lengths_of, prepare
from sevpeft.training.distributed import (
    check_adapter_is_complete,
    check_deepspeed,
    check_engine,
    check_same_processes,
    engine_of,
)
from sevpeft.training.eva import initialize_from_rows
from sevpeft.training.plan import memory_is_full
from sevpeft.training.resolve import ResolvedRun, check_one_batch, loraplus_settings, resolve, settings_errors
from sevpeft.training.screen import show_batch, show_data
from sevpeft.training.trainer import SeveritySFTTrainer


def train(
    recipe: Recipe, output: Path | str | None = None, *, resume: bool = False, console: Console | None = None
) -> Run:
    """Trains the adapter of a recipe.

    Args:
        recipe: of `load_recipe`.
        output: run folder; None for a new one under runs/.
        resume: continue the run that is in `output`.
        console: where progress is shown, on the main process only; None shows nothing.

    Returns:
        The finished run.

    Raises:
        SevpeftError: in one plain sentence, whatever is refused or fails in a foreseeable way.
    """
    state = _start_processes(recipe)
    console = console if console is not None and state.is_main_process else Screen(quiet=True)
    # transformers would expand a ~ for the checkpoints alone.
    run = Run(_same_on_all_processes(Path(output or default_output(recipe.name)).expanduser()))
    with run_lock(run.folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            check_output(run.folder, resume=resume)
        if resume:
            recipe = as_started(recipe, run)
            check_same_recipe(recipe, run)
        if resume and run.finished:
            console.print(f"The run in {run.folder} is finished; nothing is left to do.", soft_wrap=True)
        else:
            dtype = run.metrics()["model"]["dtype"] if resume else None
            resolved = resolve(recipe, run.checkpoints, dtype_before=dtype)
            with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
                _train(resolved, run, state, console, Path(scratch), resume=resume)
    # A process that exits while gloo's threads live is now and then aborted, after all its work is done.
    state.wait_for_everyone()
    state.destroy_process_group()
    return run


def _train(
    resolved: ResolvedRun, run: Run, state: PartialState, console: Console, scratch: Path, *, resume: bool
) -> None:
    recipe = resolved.recipe
    print_labeled(console, "Base model", f"{recipe.model.name_or_path} ({resolved.config.model_type})")

    # data: weighted training rows, validation rows
    with state.main_process_first(), _scratch_errors(scratch):
        rows = prepare(recipe, resolved.prompt, scratch)
    if resume:
        check_same_data(rows.summary["fingerprint"], rows.summary["source"], run)
    show_data(rows.summary, rows.weights, recipe, console)

    # model: the frozen base, and how its rows are laid out
    model = load_model(recipe, resolved.precision, state.local_process_index)
    if resume:
        check_base_weights(recipe, run)
    resolved = resolved.with_layout(model, lengths_of(rows.validation))
    recipe = resolved.recipe
    check_one_batch(resolved.arguments, len(rows.train))
    show_batch(recipe, state.num_processes, console)

    # trainer
    progress = RunProgress(run, console)
    signals = SignalHandler(run.folder, lambda sentence: print_labeled(console, "Stopping", sentence, style="yellow"))
    with new_run(run) if state.is_main_process and not resume else nullcontext():
        with settings_errors():
            trainer = SeveritySFTTrainer(
                model=model,
                args=resolved.arguments,
                train_dataset=rows.train,
                eval_dataset=rows.validation,
                processing_class=resolved.tokenizer,
                peft_config=lora_config(recipe, model),
                reduction=recipe.severity.reduction,
                loraplus=loraplus_settings(recipe),
                stopping=recipe.stopping,
                signals=signals,
                name_rows=rows.row_names,
                on_message=lambda label, sentence: print_labeled(console, label, sentence, style="yellow"),
                sort_within_steps=not (resolved.arguments.padding_free or resolved.arguments.packing),
                split_on_oom=bool(recipe.training.settings().get("auto_find_batch_size")),
                callbacks=[progress, signals],
            )
        trainer.remove_callback(PrinterCallback)
        keep_tensorboard_in(run, trainer.callback_handler.callbacks)
        if recipe.lora.init_lora_weights == "eva" and not resume:
            initialize_from_rows(trainer)
        if state.is_main_process and not resume:
            _write_origin(run, recipe, rows, trainer)
    state.wait_for_everyone()

    # train, validate, save
    try:
        with progress, signals, plain_disk_errors(run.folder):
            checkpoint = _load_checkpoint(trainer, recipe, run, console) if resume else None
            result = trainer.train(resume_from_checkpoint=checkpoint)
            after = _validation_of_last_step(trainer) or trainer.evaluate()
            _save_adapter(trainer, run)
    except BaseException as error:
        if state.is_main_process:
            remove_incomplete(run)
        if should_reduce_batch_size(error):
            raise memory_is_full(recipe, run.folder) from error
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"Interrupted. Resume with: {resume_command(run.folder)}") from error
        raise
    if trainer.is_world_process_zero():
        _write_results(trainer, run, result.metrics["train_loss"], after, checkpoint)


def _start_processes(recipe: Recipe) -> PartialState:
    check_deepspeed()
    # Unless told so, accelerate sets up a single process where it finds no GPU.
    try:
        state = PartialState(cpu=not uses_gpu(recipe))
    except (ValueError, ImportError, RuntimeError) as error:
        raise RunError(
            f"The processes of this launch cannot find one another ({first_sentence(error)}); start it with "
            "`accelerate launch`, or unset what the cluster has set (RANK, WORLD_SIZE, PMI_SIZE …) for one process."
        ) from error
    check_engine(state)
    return state


def _scratch_errors(scratch: Path) -> Any:
    return plain_disk_errors(
        scratch.parent,
        when_full="free some, or set TMPDIR to a folder on another disk",
        remedy="set TMPDIR to another folder",
    )


def _load_checkpoint(trainer: SeveritySFTTrainer, recipe: Recipe, run: Run, console: Console) -> str | None:
    """Path of the newest valid checkpoint, the same on all processes; None starts anew."""
    check_same_processes(trainer.accelerator, run.environment())
    required = files_to_resume(trainer.accelerator)
    found = resume_checkpoint(run, console, required) if trainer.is_world_process_zero() else None
    trainer.accelerator.wait_for_everyone()
    checkpoint: str | None = _same_on_all_processes(str(found) if found else None)
    if recipe.lora.init_lora_weights == "eva":
        initialize_from_rows(trainer, checkpoint)
    return checkpoint


def _validation_of_last_step(trainer: SeveritySFTTrainer) -> dict[str, float] | None:
    """Figures of the model as it is now, where the training has measured them."""
    if trainer.args.load_best_model_at_end:
        return None
    step = trainer.state.global_step
    return next((entry for entry in trainer.state.log_history if entry["step"] == step and "eval_loss" in entry), None)


def _save_adapter(trainer: SeveritySFTTrainer, run: Run) -> None:
    """Writes the adapter beside its place and moves it there whole."""
    folder = run.unfinished_adapter
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        check_adapter_is_complete(folder, trainer.model)
        # A pickle of the training arguments; the recipe says the same and can be read.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if trainer.args.bf16:
            cast_adapter_to_compute_dtype(folder, trainer.model.peft_config[trainer.model.active_adapter])
        sort_target_modules(folder)
        shutil.rmtree(run.adapter, ignore_errors=True)
        folder.replace(run.adapter)
    trainer.accelerator.wait_for_everyone()


def _write_origin(run: Run, recipe: Recipe, rows: Prepared, trainer: SeveritySFTTrainer) -> None:
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
            "data_fingerprint": rows.summary["fingerprint"],
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
        data=rows.summary,
        weights=rows.weights.as_dict(),
    )
    # Last, because it is what makes the folder a run that can be resumed.
    run.write_text("recipe.yaml", recipe.to_yaml())


def _write_results(
    trainer: SeveritySFTTrainer, run: Run, train_loss: float, after: dict[str, float], checkpoint: str | None
) -> None:
    before = next(entry for entry in trainer.state.log_history if entry["step"] == 0 and "eval_loss" in entry)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        memory = {"peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}
    else:
        memory = {"resident_gib": round(psutil.Process().memory_info().rss / 2**30, 3)}
    run.update_metrics(
        training={
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "train_loss": train_loss,
            "nonfinite_steps": trainer.nonfinite_steps,
            "seconds": round(trainer.seconds, 1),
            "resumed_from": Path(checkpoint).name if checkpoint else None,
            **memory,
        },
        before=_losses(before),
        after=_losses(after),
    )


def _losses(metrics: dict[str, float]) -> dict[str, float]:
    """Validation loss in nats per answer token, overall and per severity."""
    names = ("loss", *(f"loss_{severity}" for severity in SEVERITIES))
    return {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}


def _same_on_all_processes(value: Any) -> Any:
    """What the main process has, on every process."""
    return broadcast_object_list([value])[0]
