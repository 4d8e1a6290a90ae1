"""Checkpoints of a run: exact, sealed with a manifest, verified before a resume, and one training at a time."""

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
from sevpeft.runs import Run, cache_folder, file_hash, write_atomically
from sevpeft.training.compat import checkpoint_of, counted, logged_loss, recount
from sevpeft.training.distributed import check_engine_of_model
from sevpeft.training.resolve import CHOSEN_WITH, with_training

if TYPE_CHECKING:
    from sevpeft.training.trainer import SeveritySFTTrainer

UNFINISHED_ADAPTER = ".adapter.unfinished"
MANIFEST = "manifest.json"


class ExactResume(TrainerCallback):
    """Callback that completes each checkpoint, so that a resumed run equals an uninterrupted one.

    The libraries do not save what was counted since the last line of the log. Each process adds its counts, and those
    of every callback that has `counts`, a dict. Then a manifest seals the checkpoint, and an older one may go.

    Attributes:
        evaluation_due: whether the validation of the present step is still to come.
    """

    def __init__(self, trainer: SeveritySFTTrainer) -> None:
        self.trainer = trainer
        self.evaluation_due = False
        self._before = {"seconds": 0.0, "loss_sum": 0.0}
        self._started = time.monotonic()

    def totals(self) -> dict[str, float]:
        """Of all starts of the run: seconds, and the sum of the losses up to the last line of the log."""
        seconds = round(self._before["seconds"] + time.monotonic() - self._started, 1)
        return {"seconds": seconds, "loss_sum": self._before["loss_sum"] + logged_loss(self.trainer)}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Trainer would remove an older checkpoint before the new one is sealed.
        self._limit, args.save_total_limit = args.save_total_limit, None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        check_engine_of_model(self.trainer.accelerator, self.trainer.model_wrapped)
        self._started = time.monotonic()
        counts = _counts_file(args, state.global_step) if state.global_step else None
        saved = json.loads(counts.read_text(encoding="utf-8")) if counts else {}
        # The training loop itself validates at the start: after evaluate(), accelerate takes the model for one that is
        # ready to train, and several processes would then train without exchanging gradients.
        args.eval_on_start = saved.get("evaluation_due", True) and self.trainer.eval_dataset is not None
        if not saved:
            return
        recount(self.trainer, saved["trainer"])
        self.trainer.parts.most_rows["train"] = saved["most_rows"]
        self._before = saved["totals"]
        for name, callback in self._counting().items():
            callback.counts.update(saved["callbacks"].get(name, {}))
        if args.load_best_model_at_end and state.best_global_step:
            # Its path is another one where the run was moved. A damaged one must not end the run.
            best = checkpoint_of(args, state.best_global_step)
            damage = checkpoint_damage(best, files_to_resume(self.trainer.accelerator)) if best.is_dir() else "is gone"
            if damage is not None:
                raise RunError(f"{best}, the best of this run, {damage}; bring it back from a copy, or start anew.")
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
            rotate_checkpoints(
                output_dir=args.output_dir,
                save_total_limit=self._limit,
                best_model_checkpoint=state.best_model_checkpoint,
            )

    def _counting(self) -> dict[str, Any]:
        callbacks = self.trainer.callback_handler.callbacks
        return {type(callback).__name__: callback for callback in callbacks if hasattr(callback, "counts")}


def _counts_file(args: TrainingArguments, step: int) -> Path:
    return checkpoint_of(args, step) / f"counts_{args.process_index}.json"


def files_to_resume(accelerator: Accelerator) -> list[str]:
    """Names of the files without which a resume would be another training; `*` stands for any text.

    Transformers 5.24 skips the optimizer, the scheduler, the scaler or the random state where its file is absent.
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
    """Writes the manifest of a checkpoint of which every other file is written."""
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_atomically(checkpoint / MANIFEST, json.dumps({"files": files}, indent=2) + "\n", shared=True)


def checkpoint_damage(checkpoint: Path, required: Sequence[str]) -> str | None:
    """What is wrong with a checkpoint, in words that end a sentence; None where it is as it was written.

    `required`: names that its manifest has to list (`files_to_resume`).
    """
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for pattern in required:
            if not any(fnmatch(name, pattern) for name in listed):
                return f"has no {pattern} in its {MANIFEST}"
        for name, written in listed.items():
            file = checkpoint / name
            if not file.is_file() or file.stat().st_size != written["bytes"] or file_hash(file) != written["sha256"]:
                return f"does not hold {name} as it was written"
    except FileNotFoundError:
        return "was cut off while it was written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"has a damaged {MANIFEST}"
    return None


def resume_checkpoint(run: Run, required: Sequence[str], on_message: Callable[[str], None]) -> Path | None:
    """The newest valid checkpoint; None where the training begins again.

    Newer ones are reported and removed, because the training writes them anew, under the same names. log.jsonl is cut
    back to what was in it when that checkpoint was written, since the rest happens again.

    `required`: files that a checkpoint must hold.
    """
    found, lines = None, 0
    for checkpoint in sorted(_checkpoints(run), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        damage = checkpoint_damage(checkpoint, required)
        if damage is None:
            found = checkpoint
            lines = len(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history)
            break
        on_message(f"{checkpoint.name} {damage}; the one before it is used, or the training begins again.")
        shutil.rmtree(checkpoint, ignore_errors=True)
    remove_incomplete(run)
    run.keep_log(lines)
    return found


def remove_of_finished(run: Run, recipe: Recipe) -> None:
    """Takes the checkpoints of a finished run away, unless the recipe says how many are kept."""
    for checkpoint in _checkpoints(run) if run.finished and recipe.training.save_total_limit == AUTO else ():
        shutil.rmtree(checkpoint, ignore_errors=True)


def remove_incomplete(run: Run) -> None:
    """Takes away what a kill or a full disk cut off, because it holds space that may be needed."""
    for checkpoint in _checkpoints(run):
        if not (checkpoint / MANIFEST).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(run.folder / UNFINISHED_ADAPTER, ignore_errors=True)


def _checkpoints(run: Run) -> list[Path]:
    return [path for path in run.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]


def as_started(recipe: Recipe, run: Run) -> Recipe:
    """The recipe with what the run chose at its start in place of each `auto`."""
    stored = load_recipe(run.folder / "recipe.yaml").training.settings()
    now = recipe.training.settings()
    open_keys = [key for key, value in now.items() if value == AUTO]
    if not open_keys:
        return recipe
    unsaid = [key for key in CHOSEN_WITH if now.get(key) is None]
    return with_training(recipe, **{key: stored[key] for key in (*open_keys, *unsaid) if key in stored})


def check_same_recipe(recipe: Recipe, run: Run) -> None:
    """Raises RunError with every setting that differs from the run's, as it was and as it is now."""
    stored, now = load_recipe(run.folder / "recipe.yaml").model_dump(), recipe.model_dump()
    changed = [
        f"{section}.{key}"
        + (f" ({stored[section].get(key)} then, {now[section].get(key)} now)" if key != "examples" else "")
        for section in now
        for key in {**stored[section], **now[section]}
        if stored[section].get(key) != now[section].get(key)
    ]
    if changed:
        what = f"The recipe is not that of {run.folder}, in {', '.join(changed)}"
        raise RunError(f"{what}; resume with its own recipe.yaml, or start another run.")


def check_same_data(fingerprint: str, source: str, run: Run) -> None:
    """Raises RunError when the data is not what the run was started with."""
    # The fingerprint of a Hub data set also holds times of this machine's cache, so it may differ without a reason.
    if fingerprint != run.read_json("environment.json").get("data_fingerprint") and fingerprint.startswith("sha256:"):
        what = f"{source} is not the data that {run.folder} was started with: its content has changed"
        raise RunError(f"{what}; bring that back, or start another run.")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a run folder, there already or not, for this process.

    Raises RunError: another training or evaluation on this machine holds it.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    try:
        with FileLock(cache_folder("locks") / f"{digest}.lock", timeout=0):
            yield
    except Timeout:
        problem = f"{folder} is being written by another process"
        raise RunError(f"{problem}; wait until it ends, or choose another --output.") from None
