"""Checkpoints of a run: complete state, a manifest with checksums, checks before a resume, and the run lock."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator, DistributedType
from filelock import FileLock, Timeout
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from sevpeft.errors import RunError
from sevpeft.recipe import AUTO, Recipe, load_recipe
from sevpeft.runs import Run, cache_folder, differences, file_hash, write_atomically
from sevpeft.training.compat import checkpoint_of, counted, logged_loss, recount
from sevpeft.training.distributed import check_engine_of_model
from sevpeft.training.resolve import CHOSEN_WITH, with_training

if TYPE_CHECKING:
    from sevpeft.training.trainer import SeveritySFTTrainer

UNFINISHED_ADAPTER = ".adapter.unfinished"
MANIFEST = "manifest.json"


class ExactResume(TrainerCallback):
    """Callback that completes each checkpoint, so that a resumed run equals an uninterrupted one.

    The libraries do not save what is summed up between two log lines. Each process adds its sums, and the dict `counts`
    of every callback that has one. Then the manifest is written, and the oldest checkpoints are removed.
    """

    def __init__(self, trainer: SeveritySFTTrainer) -> None:
        self.trainer = trainer
        self.evaluation_due = False  # whether the validation of the present step has yet to run
        self._before = {"seconds": 0.0, "loss_sum": 0.0}
        self._started = time.monotonic()

    def totals(self) -> dict[str, float]:
        """Seconds, and the sum of the losses up to the last log line, over all starts of the run."""
        seconds = round(self._before["seconds"] + time.monotonic() - self._started, 1)
        return {"seconds": seconds, "loss_sum": self._before["loss_sum"] + logged_loss(self.trainer)}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Trainer would remove an older checkpoint before the new one has its manifest.
        self._limit, args.save_total_limit = args.save_total_limit, None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        check_engine_of_model(self.trainer.accelerator, self.trainer.model_wrapped)
        self._started = time.monotonic()
        counts = _counts_file(args, state.global_step) if state.global_step else None
        saved = json.loads(counts.read_text(encoding="utf-8")) if counts else {}
        # The training loop validates at the start, not evaluate(): after that, accelerate takes the model as prepared,
        # and several processes would train without exchanging gradients.
        args.eval_on_start = saved.get("evaluation_due", True) and self.trainer.eval_dataset is not None
        if not saved:
            return
        recount(self.trainer, saved["trainer"])
        self.trainer.parts.most_rows["train"] = saved["most_rows"]
        self._before = saved["totals"]
        for name, callback in self._counting().items():
            callback.counts.update(saved["callbacks"].get(name, {}))
        if args.load_best_model_at_end and state.best_global_step:
            # The stored path is wrong if the run was moved. A damaged checkpoint must not become the adapter.
            best = checkpoint_of(args, state.best_global_step)
            damage = checkpoint_damage(best, files_to_resume(self.trainer.accelerator)) if best.is_dir() else "is gone"
            if damage is not None:
                remedy = "restore it from a copy, or start another run"
                raise RunError(f"{best}, the best of this run, {damage}; {remedy}.")
            state.best_model_checkpoint = str(best)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        counts = {
            "trainer": counted(self.trainer),
            "most_rows": self.trainer.parts.most_rows["train"],
            "totals": self.totals(),
            "callbacks": {name: callback.counts for name, callback in self._counting().items()},
            "evaluation_due": self.evaluation_due,
        }
        write_atomically(_counts_file(args, state.global_step), json.dumps(counts) + "\n", shared=True)
        self.trainer.accelerator.wait_for_everyone()  # each process writes a part
        if args.should_save:
            seal(checkpoint_of(args, state.global_step))
            best = state.best_model_checkpoint
            rotate_checkpoints(args.output_dir, save_total_limit=self._limit, best_model_checkpoint=best)

    def _counting(self) -> dict[str, Any]:
        callbacks = self.trainer.callback_handler.callbacks
        return {type(callback).__name__: callback for callback in callbacks if hasattr(callback, "counts")}


def _counts_file(args: TrainingArguments, step: int) -> Path:
    return checkpoint_of(args, step) / f"counts_{args.process_index}.json"


def files_to_resume(accelerator: Accelerator) -> list[str]:
    """Patterns of the files that an exact resume needs.

    Transformers 5.24 skips the optimizer, the scheduler, the scaler or the random state if its file is absent.
    """
    processes, kind = accelerator.num_processes, accelerator.distributed_type
    ranks = range(processes)
    names = [SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, TRAINER_STATE_NAME, *(f"counts_{rank}.json" for rank in ranks)]
    names += [f"rng_state_{rank}.pth" for rank in ranks] if processes > 1 else ["rng_state.pth"]
    if kind is DistributedType.DEEPSPEED:
        sharded = accelerator.state.deepspeed_plugin.zero_stage > 0
        return names + [f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks if sharded]
    names += [SCHEDULER_NAME, OPTIMIZER_NAME_BIN if kind is DistributedType.FSDP else OPTIMIZER_NAME]
    return names if accelerator.scaler is None else [*names, SCALER_NAME]


def seal(checkpoint: Path) -> None:
    """Writes the manifest of a checkpoint, its last file."""
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_atomically(checkpoint / MANIFEST, json.dumps({"files": files}, indent=2) + "\n", shared=True)


def checkpoint_damage(checkpoint: Path, required: Sequence[str]) -> str | None:
    """What is wrong with a checkpoint, whose manifest must list the `required` files; None if it is valid."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for pattern in required:
            if not any(fnmatch(name, pattern) for name in listed):
                return f"has no {pattern} in its {MANIFEST}"
        for name, written in listed.items():
            file = checkpoint / name
            if not file.is_file() or file.stat().st_size != written["bytes"] or file_hash(file) != written["sha256"]:
                return f"holds a missing or damaged {name}"
    except FileNotFoundError:
        return "is incomplete"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"has a damaged {MANIFEST}"
    return None


def resume_checkpoint(run: Run, required: Sequence[str], on_message: Callable[[str], None]) -> Path | None:
    """The newest valid checkpoint; None if the training starts from the beginning.

    Damaged newer ones are reported and removed: the training writes them again, under the same names. log.jsonl is cut
    to the lines that it had when the checkpoint was written.
    """
    newest, lines = None, 0
    for checkpoint in _checkpoints(run):
        damage = checkpoint_damage(checkpoint, required)
        if damage is None:
            newest = checkpoint
            lines = len(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history)
            break
        on_message(f"{checkpoint.name} {damage}; the previous checkpoint is used, or the training starts again.")
        shutil.rmtree(checkpoint, ignore_errors=True)
    remove_incomplete(run)
    run.keep_log(lines)
    return newest


def remove_of_finished(run: Run, recipe: Recipe) -> None:
    """Removes the checkpoints of a finished run, unless the recipe sets how many are kept."""
    for checkpoint in _checkpoints(run) if run.finished and recipe.training.save_total_limit == AUTO else ():
        shutil.rmtree(checkpoint, ignore_errors=True)


def remove_incomplete(run: Run) -> None:
    """Removes what a kill or a full disk left incomplete, to free the disk."""
    for checkpoint in _checkpoints(run):
        if not (checkpoint / MANIFEST).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(run.folder / UNFINISHED_ADAPTER, ignore_errors=True)


def _checkpoints(run: Run) -> list[Path]:
    """All checkpoints, the newest first."""
    steps = {path: path.name.rpartition("-")[2] for path in run.checkpoints.glob("checkpoint-*")}
    return sorted((path for path in steps if steps[path].isdigit()), key=lambda path: -int(steps[path]))


def as_started(recipe: Recipe, run: Run) -> Recipe:
    """The recipe with the values that the run chose at its start in place of each `auto`."""
    stored = load_recipe(run.folder / "recipe.yaml").training.settings()
    now = recipe.training.settings()
    open_keys = [key for key, value in now.items() if value == AUTO]
    if not open_keys:
        return recipe
    unset = [key for key in CHOSEN_WITH if now.get(key) is None]
    return with_training(recipe, **{key: stored[key] for key in (*open_keys, *unset) if key in stored})


def check_same_recipe(recipe: Recipe, run: Run) -> None:
    """Raises RunError with every setting that differs from the run's, with both values."""
    stored = load_recipe(run.folder / "recipe.yaml")
    if changed := differences(stored.model_dump(), recipe.model_dump()):
        what = f"The recipe differs from that of {run.folder}: {'; '.join(changed)}"
        raise RunError(f"{what}; resume with its own recipe.yaml, or start another run.")


def check_same_data(fingerprint: str, source: str, run: Run) -> None:
    """Raises RunError when the data has changed since the run was started."""
    # The fingerprint of a Hub data set depends on times of this machine's cache, so it may differ for the same data.
    if fingerprint != run.read_json("environment.json").get("data_fingerprint") and fingerprint.startswith("sha256:"):
        what = f"{source} is not the data that {run.folder} was started with: its content has changed"
        raise RunError(f"{what}; restore it, or start another run.")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Locks a run folder, which need not exist yet. Raises RunError when another process of this machine holds it."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    try:
        with FileLock(cache_folder("locks") / f"{digest}.lock", timeout=0):
            yield
    except Timeout:
        problem = f"{folder} is being written by another process"
        raise RunError(f"{problem}; wait until it ends, or choose another --output.") from None
