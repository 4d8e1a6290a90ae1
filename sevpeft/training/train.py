"""Trains the adapter of a recipe: resolve, data, model, trainer, train, save.

All checks come before the run folder is made. A run that is killed after that is continued by `--resume`.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from transformers import PrinterCallback

from sevpeft.console import Screen, print_labeled
from sevpeft.errors import Interrupted, RunError, first_sentence
from sevpeft.modeling import adapters
from sevpeft.modeling.chat_template import generation_config, save_tokenizer
from sevpeft.modeling.compat import attention_of, requested_engine
from sevpeft.modeling.loading import load_model, resolved_name, uses_gpu
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe
from sevpeft.runs import Run, check_output, default_output, describe_environment, file_hash, new_run, plain_disk_errors
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training import checkpoints
from sevpeft.training.callbacks import RunProgress, Samples, SignalHandler, StepGuard, resume_command
from sevpeft.training.compat import counted
from sevpeft.training.curriculum import Curriculum
from sevpeft.training.data import Prepared, lengths_of, prepare
from sevpeft.training.distributed import check_adapter_is_complete, check_engine, check_same_processes, engine_of
from sevpeft.training.resolve import ResolvedRun, loraplus_settings, resolve, settings_errors
from sevpeft.training.screen import show_batch, show_curriculum, show_data, show_machine
from sevpeft.training.trainer import SeveritySFTTrainer


def train(
    recipe: Recipe,
    output: Path | str | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
    callbacks: Any = (),
) -> Run:
    """Trains the adapter of a recipe and returns the finished run.

    Args:
        output: run folder; None for a new one under runs/. resume: continue the run in that folder.
        console: shows progress, on the main process only; None for no output. callbacks: for the trainer.

    Raises SevpeftError: with one plain sentence for the user.
    """
    state = _start_processes(recipe)
    console = console if console is not None and state.is_main_process else Screen(quiet=True)
    # transformers would expand a ~ for the checkpoints only.
    run = Run(broadcast_object_list([Path(output or default_output(recipe.name)).expanduser()])[0])
    with checkpoints.run_lock(run.folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            check_output(run.folder, resume=resume)
        if resume:
            recipe = checkpoints.as_started(recipe, run)
            checkpoints.check_same_recipe(recipe, run)
        if resume and run.finished:
            console.print(f"The run in {run.folder} is finished; nothing is left to do.", soft_wrap=True)
        else:
            with console.status("Reading the base model's config, and choosing the batch split"):
                resolved = resolve(recipe, run.checkpoints, resumed=run if resume else None)
            with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
                _train(resolved, run, state, console, Path(scratch), resume=resume, more=callbacks)
        checkpoints.remove_of_finished(run, recipe)
    # A process that exits while gloo's threads run is sometimes aborted, after its work is done.
    state.wait_for_everyone()
    state.destroy_process_group()
    return run


def _train(
    resolved: ResolvedRun, run: Run, state: PartialState, console: Console, scratch: Path, *, resume: bool, more: Any
) -> None:
    recipe = resolved.recipe
    print_labeled(console, "Base model", f"{recipe.model.name_or_path} ({resolved.config.model_type})")
    show_machine(resolved.given, console)  # before the weights are fetched
    init_adapter = recipe.training.init_adapter
    if init_adapter and not resume:
        adapters.init_adapter(recipe)
        print_labeled(console, "Starts from", f"the adapter in {init_adapter}")

    # data: weighted training rows, validation rows
    remedy = "set TMPDIR to a folder on another disk"
    disk = plain_disk_errors(scratch.parent, when_full=remedy, remedy=remedy)
    with state.main_process_first(), disk, console.status("Reading and encoding the data"):
        rows = prepare(recipe, resolved.prompt, scratch, resolved.config)
    if resume:
        checkpoints.check_same_data(rows.summary["fingerprint"], rows.summary["source"], run)
    show_data(rows.summary, rows.weights, recipe, console)

    # model: the frozen base, and the layout of rows that it allows
    with console.status("Loading the base model"):
        model = load_model(recipe, resolved.precision, state.local_process_index)
        if resume:
            adapters.check_base_weights(recipe, run)
        resolved = resolved.with_layout(model, lengths_of(rows.validation)[0])
    recipe = resolved.recipe
    show_batch(recipe, state.num_processes, console)
    curriculum = None
    if recipe.curriculum.kind != "none":
        curriculum = Curriculum(recipe.curriculum, len(rows.train), rows.difficulty, resolved.arguments)
        show_curriculum(curriculum, console)

    def warn(sentence: str) -> None:
        print_labeled(console, "Warning", sentence, style="yellow")

    try:
        # trainer
        progress, signals = RunProgress(run, console), SignalHandler(run.folder, warn)
        with new_run(run) if state.is_main_process and not resume else nullcontext():
            with settings_errors():
                trainer = SeveritySFTTrainer(
                    model=model,
                    args=resolved.arguments,
                    train_dataset=rows.train,
                    eval_dataset=rows.validation,
                    processing_class=resolved.tokenizer,
                    peft_config=adapters.lora_config(recipe, model),
                    reduction=recipe.severity.reduction,
                    loraplus=loraplus_settings(recipe),
                    on_message=warn,
                    sort_within_steps=not (resolved.arguments.padding_free or resolved.arguments.packing),
                    split_on_oom=bool(recipe.training.settings().get("auto_find_batch_size")),
                    curriculum=curriculum,
                    callbacks=[progress, signals, *more],
                )
                if trainer.args.device.type == "cpu":
                    adapters.use_cpu_dropout(trainer.model)
                if requested_engine() is None:  # so that a wrong setting of the optimizer or schedule fails here
                    trainer.create_optimizer_and_scheduler(num_training_steps=1)
            guard = StepGuard(trainer, recipe.stopping, signals)
            trainer.add_callback(guard)
            if recipe.training.generate_samples:
                trainer.add_callback(Samples(trainer, run, recipe, resolved.prompt))
            trainer.remove_callback(PrinterCallback)
            if init_adapter and not resume:
                adapters.init_adapter(recipe, trainer.model, warn)
            if state.is_main_process and not resume:
                _write_origin(run, resolved, rows, trainer)
        state.wait_for_everyone()

        # train, validate, save
        with progress.bar, signals, plain_disk_errors(run.folder):
            checkpoint = _checkpoint(trainer, run, warn) if resume else None
            if init_adapter and resume and checkpoint is None:
                loaded = adapters.init_adapter(recipe, trainer.model)
                if loaded != run.metrics()["model"]["init_adapter"]:
                    raise RunError(f"{init_adapter} is not the adapter that {run.folder} started from; restore it.")
            trainer.train(resume_from_checkpoint=checkpoint)
            # Validation loss of the adapter that is saved.
            if trainer.args.load_best_model_at_end or not _validation(trainer, trainer.state.global_step):
                trainer.evaluate()
            _save_adapter(trainer, run, resolved.prompt)
    except BaseException as error:
        if state.is_main_process:
            checkpoints.remove_incomplete(run)
        if should_reduce_batch_size(error):
            settings = "training.gradient_checkpointing=true, auto_find_batch_size=true or a smaller max_length"
            kept = f"see `sevpeft plan RECIPE --vram GB`. Checkpoints of {run.folder} are kept, for a larger GPU"
            raise RunError(f"The memory is full; start another run with {settings}; {kept}.") from error
        if isinstance(error, KeyboardInterrupt) and (run.folder / "recipe.yaml").exists():
            raise Interrupted(f"Interrupted. Resume with: {resume_command(run.folder)}") from error
        raise
    if state.is_main_process:
        _write_results(trainer, guard, progress.cost, run, checkpoint)


def _start_processes(recipe: Recipe) -> PartialState:
    try:
        # Without this argument accelerate starts a single process on a machine without a GPU.
        state = PartialState(cpu=not uses_gpu(recipe))
    except (ValueError, ImportError, RuntimeError) as error:
        remedy = "use `accelerate launch`, or for one process unset RANK, WORLD_SIZE, PMI_SIZE and similar variables"
        raise RunError(f"The processes cannot start ({first_sentence(error)}); {remedy}.") from error
    check_engine(state)
    return state


def _checkpoint(trainer: SeveritySFTTrainer, run: Run, warn: Any) -> str | None:
    """Path of the newest valid checkpoint, the same on all processes; None to start from the beginning."""
    check_same_processes(trainer.accelerator, run.read_json("environment.json"))
    required = checkpoints.files_to_resume(trainer.accelerator)
    newest = checkpoints.resume_checkpoint(run, required, warn) if trainer.is_world_process_zero() else None
    newest = broadcast_object_list([newest])[0]
    return None if newest is None else str(newest)


def _save_adapter(trainer: SeveritySFTTrainer, run: Run, prompt: Prompt) -> None:
    """Writes the adapter and the prompt of the training to a temporary folder, then moves it into place."""
    folder = run.folder / checkpoints.UNFINISHED_ADAPTER
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        check_adapter_is_complete(folder, trainer.model)
        # A pickle of the training arguments, which the recipe contains.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if trainer.args.bf16:
            adapters.cast_adapter_to_compute_dtype(folder, trainer.model.peft_config[trainer.model.active_adapter])
        adapters.sort_target_modules(folder)
        save_tokenizer(prompt, folder)
        generation_config(prompt, trainer.causal_lm().generation_config).save_pretrained(folder)
        shutil.rmtree(run.adapter, ignore_errors=True)
        folder.replace(run.adapter)
    trainer.accelerator.wait_for_everyone()


def _write_origin(run: Run, resolved: ResolvedRun, rows: Prepared, trainer: SeveritySFTTrainer) -> None:
    """Writes recipe.yaml, environment.json, tokenizer/ and the first part of metrics.json."""
    recipe, arguments = resolved.recipe, trainer.args
    trainable, total = trainer.model.get_nb_trainable_parameters()  # counts of the unquantized model for 4 bit too
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
    base = trainer.causal_lm()
    resolved.tokenizer.save_pretrained(run.tokenizer)
    run.update_metrics(
        model={
            "name_or_path": recipe.model.name_or_path,
            "resolved": resolved_name(recipe),
            "commit": adapters.base_commit(recipe),
            "fingerprint": adapters.base_fingerprint(recipe),
            "prompt": resolved.prompt.fingerprint(),
            "model_type": base.config.model_type,
            "parameters": total - trainable,
            "trainable_parameters": trainable,
            "dtype": str(base.dtype).removeprefix("torch."),
            "bits": next((bits for bits in (4, 8) if getattr(base, f"is_loaded_in_{bits}bit", False)), None),
            "attention": attention_of(base.config),
            **({"init_adapter": adapters.init_adapter(recipe)} if recipe.training.init_adapter else {}),
        },
        data=rows.summary,
        weights=vars(rows.weights),
    )
    # Last, because this file makes the folder a run that can be resumed.
    run.write_text("recipe.yaml", recipe.to_yaml(), shared=not recipe.prompt.examples)


def _write_results(trainer: SeveritySFTTrainer, guard: StepGuard, cost: dict, run: Run, checkpoint: str | None) -> None:
    steps, skipped = trainer.state.global_step, guard.counts["nonfinite"]
    totals, tokens = trainer.exact_resume.totals(), counted(trainer)["tokens"]
    run.update_metrics(
        adapter=file_hash(run.adapter / SAFETENSORS_WEIGHTS_NAME),  # binds the figures to these weights
        training={
            "steps": steps,
            "epochs": trainer.state.epoch,
            "tokens": tokens,
            "train_loss": totals["loss_sum"] / (steps - skipped),
            "nonfinite_steps": skipped,
            "seconds": totals["seconds"],
            "resumed_from": Path(checkpoint).name if checkpoint else None,
            **cost,
            "tokens_per_second": round(tokens / max(cost["step_seconds"], 1e-9), 1),
        },
        before=_validation(trainer, 0),
        after=_validation(trainer, steps),
        **({"curriculum": trainer.curriculum.as_dict()} if trainer.curriculum else {}),
    )


def _validation(trainer: SeveritySFTTrainer, step: int) -> dict[str, float]:
    """Last validation loss at a step, in nats per answer token, overall and per severity; empty without one."""
    names = ("loss", *(f"loss_{severity}" for severity in SEVERITIES))
    entries = [entry for entry in trainer.state.log_history if entry["step"] == step and "eval_loss" in entry]
    return {name: entry[f"eval_{name}"] for entry in entries[-1:] for name in names if f"eval_{name}" in entry}
