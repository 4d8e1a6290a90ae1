"""Curricula: which rows each optimizer step takes, fixed before training by seed and recipe alone.

One Trainer goes through all stages. A step has rows of one stage only; a stage with fewer rows than its steps take
passes over them again, in another order. Everything else about a stage follows from the number of the step, so that a
run resumes inside, at and between stages as any other does.

Published: cumulative stages by severity, with more steps than their baseline (arXiv 2604.06365), disjoint ones (IMSA
2026), square-root competence (Platanios et al., arXiv 1903.09848). Equal budgets and the other settings are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer_utils import SaveStrategy

from sevpeft.data.read import Consultations
from sevpeft.errors import DataError, RecipeError
from sevpeft.recipe import CurriculumSection
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.source import Severity

if TYPE_CHECKING:
    from sevpeft.training.trainer import SeveritySFTTrainer


def column_of_numbers(table: Consultations, column: str) -> np.ndarray:
    """(n,) numbers of a column that `load_consultations` kept; DataError where it is absent or holds another thing."""
    names = {given: own for own, given in {**table.columns, **table.carried}.items()}
    if column not in names:
        raise DataError(f"The data has no column {column}; write another curriculum.difficulty_column.")
    values = pd.to_numeric(pd.Series(table.rows[names[column]][:]), errors="coerce").to_numpy(dtype=float)
    if not (finite := np.isfinite(values)).all():
        row = table.rows[int(finite.argmin())]["row"]
        raise DataError(f"Row {row}: {column} is no number; correct it, or write another curriculum.difficulty_column.")
    return values


def difficulty_of(
    settings: CurriculumSection, table: Consultations, severity: Severity | None, kept: np.ndarray, lengths: np.ndarray
) -> np.ndarray | None:
    """(n,) difficulty of the rows at the positions `kept` (n,), of so many tokens; None where the trainer finds it."""
    if settings.kind == "none" or settings.difficulty == "loss":
        return None
    if settings.difficulty_column is not None:
        return column_of_numbers(table, settings.difficulty_column)[kept]
    return lengths if severity is None or settings.difficulty == "length" else severity.strata[kept]


@dataclass(frozen=True)
class Stage:
    """Optimizer steps from `begin` up to, without, `end`, with rows of `pool` (positions of training rows)."""

    name: str
    pool: np.ndarray
    begin: int
    end: int
    learning_rate: float


class Curriculum(TrainerCallback):
    """Callback that plans the steps of all stages, and validates and saves at the end of each.

    Args:
        rows: of the training. difficulty: (rows,), larger for harder ones; None for the base model's loss, which is
            measured at the start. args: of the trainer; `max_steps` and the first `learning_rate` are set in it.

    Attributes:
        counts: the measured losses; part of each checkpoint, because a resumed run has another adapter by then.

    Raises:
        DataError: a stage has no rows. RecipeError: it has no steps.
    """

    trainer: SeveritySFTTrainer

    def __init__(
        self, settings: CurriculumSection, rows: int, difficulty: np.ndarray | None, args: TrainingArguments
    ) -> None:
        self.settings, self.rows, self.args, self.counts = settings, rows, args, dict[str, Any]()
        self.seed = args.seed if args.data_seed is None else args.data_seed
        # As Trainer counts: batches are cut first, then grouped, and the last step of an epoch may be short.
        self.of_pass = args.train_batch_size * args.world_size
        self.of_step = self.of_pass * args.gradient_accumulation_steps
        passes = (math.floor if args.dataloader_drop_last else math.ceil)(rows / self.of_pass)
        self.of_epoch = max(1, math.ceil(passes / args.gradient_accumulation_steps))  # steps
        self.steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.of_epoch)
        args.learning_rate = (settings.learning_rates or [args.learning_rate])[0]
        self._plan(np.arange(rows) if difficulty is None else difficulty)
        args.max_steps = self.steps = self.stages[-1].end

    def rows_until(self, step: int) -> int:
        """Rows that the steps before this one take: those of a plain training."""
        epochs, steps = divmod(step, self.of_epoch)
        return epochs * self.rows + min(steps * self.of_step, self.rows)

    def competence(self, step: int) -> float:
        """Share of the rows, the easiest, that a step is drawn from (Platanios et al., eq. 7 with p = 2)."""
        least, duration = self.settings.initial_competence**2, self.settings.competence_duration * self.steps
        return math.sqrt(step / duration * (1 - least) + least) if step < duration else 1.0

    def _plan(self, difficulty: np.ndarray) -> None:
        """Sets `stages`, and `order`, the rows of all steps."""
        settings, count, generator = self.settings, self.settings.stages, np.random.default_rng(self.seed)
        sign = -1 if settings.order == "hard_first" else 1
        values = np.arange(count) if settings.difficulty == "severity" else np.unique(difficulty)
        names = [f"{settings.difficulty} {number + 1} of {count}" for number in range(count)[::sign]]
        if settings.order == "shuffled":
            difficulty = generator.permutation(difficulty)
            names = [f"shuffled {number + 1} of {count}" for number in range(count)]
        elif settings.difficulty == "severity":
            names = list(SEVERITIES[::sign])
        easiest = np.lexsort((generator.random(self.rows), sign * difficulty))  # equal ones in random order
        if settings.kind == "competence":
            self.stages = [Stage("competence", easiest, 0, self.steps, self.args.learning_rate)]
        elif len(values) == count and settings.difficulty != "loss":
            self._plan_stages(np.searchsorted(np.sort(sign * values), sign * difficulty), names)
        else:
            self._plan_stages(np.argsort(easiest) * count // self.rows, names)
        self.order = np.concatenate([self._drawn(number, stage) for number, stage in enumerate(self.stages)])

    def _plan_stages(self, classes: np.ndarray, names: list[str]) -> None:
        """Args: classes: (rows,) the first stage that has the row."""
        settings, cumulative, begin = self.settings, self.settings.kind == "cumulative", 0
        shares, rates = (given or [1] * len(names) for given in (settings.shares, settings.learning_rates))
        self.stages = []
        for number, name in enumerate(names):
            pool = np.flatnonzero(classes <= number if cumulative else classes == number)
            if settings.epochs_per_stage is None:
                end = round(sum(shares[: number + 1]) / sum(shares) * self.steps)
            else:
                end, rows = begin, self.rows_until(begin) + settings.epochs_per_stage * len(pool)
                while self.rows_until(end) < rows:
                    end += 1
            if not (classes == number).any():
                remedy = "write another curriculum.difficulty, or fewer curriculum.stages"
                raise DataError(f"Stage {number + 1} of the curriculum ({name}) has no training rows; {remedy}.")
            if end == begin:
                remedy = "raise training.num_train_epochs, or its share in curriculum.shares"
                raise RecipeError(f"Stage {number + 1} of the curriculum has none of the {self.steps} steps; {remedy}.")
            rate = rates[number] if settings.learning_rates else self.args.learning_rate
            name = f"{names[0]} to {name}" if cumulative and number else name
            self.stages.append(Stage(name, pool, begin, end, rate))
            begin = end

    def _drawn(self, number: int, stage: Stage) -> np.ndarray:
        """Rows of the steps of a stage; of the last one up to the end of an epoch."""
        generator, end = np.random.default_rng([self.seed, number]), stage.end
        if stage is self.stages[-1]:
            end = math.ceil(end / self.of_epoch) * self.of_epoch
        rows = np.diff([self.rows_until(step) for step in range(stage.begin, end + 1)])
        if self.settings.kind == "competence":
            allowed = [math.ceil(self.competence(step) * self.rows) for step in range(end)]
            drawn = [generator.choice(max(most, n), n, replace=False) for most, n in zip(allowed, rows, strict=True)]
            return stage.pool[np.concatenate(drawn)]
        passes = [generator.permutation(stage.pool) for _ in range(math.ceil(rows.sum() / len(stage.pool)))]
        return np.concatenate(passes)[: rows.sum()]

    def epoch(self, number: int) -> list[int]:
        """Rows of an epoch, as many as a plain training has in one, in their order."""
        rows = self.order[number * self.rows :][: self.rows]
        if self.args.world_size > 1 and not self.args.dataloader_drop_last:
            # accelerate would fill the last batches with the epoch's first rows, of another stage.
            last = rows[(self.of_epoch - 1) * self.of_step :]
            rows = np.concatenate([rows, np.resize(last, -self.rows % self.of_pass)])
        return [int(row) for row in rows]

    def rate(self) -> Callable[[int], float] | None:
        """Step → factor of the learning rate; None for that of the plain schedule."""
        args, restart = self.args, self.settings.restart
        if not restart and not self.settings.learning_rates:
            return None

        def schedule(rate: float, steps: int) -> Callable[[int], float]:
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
            found: Any = get_scheduler(
                args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
            )
            return lambda step: rate / args.learning_rate * found.lr_lambdas[0](step)

        if not restart:
            own = [schedule(stage.learning_rate, self.steps) for stage in self.stages]
            return lambda step: own[self.stage_at(step)](step)
        own = [schedule(stage.learning_rate, stage.end - stage.begin) for stage in self.stages]
        return lambda step: own[self.stage_at(step)](step - self.stages[self.stage_at(step)].begin)

    def stage_at(self, step: int) -> int:
        """Position of the stage of a step; of the last one after it."""
        return sum(step >= stage.end for stage in self.stages[:-1])

    def is_new(self, step: int) -> bool:
        """Whether a step has other rows than those before it, with whose losses its own cannot be compared."""
        if self.settings.kind == "competence":
            return self.competence(step) < 1
        return step in [stage.begin for stage in self.stages[1:]]

    def logged(self, step: int) -> dict[str, float]:
        """What a line of the log says after so many steps."""
        if self.settings.kind == "competence":
            return {"competence": self.competence(step)}
        return {"stage": self.stage_at(step - 1) + 1}

    def as_dict(self, validation: Callable[[int], dict[str, float]] = lambda step: {}) -> dict[str, Any]:
        """For metrics.json: the stages, each with the losses by severity after it, which say what was forgotten."""
        budget = "matched" if self.settings.epochs_per_stage is None else "epochs_per_stage"
        stages = [
            {"name": stage.name, "rows": len(stage.pool), "steps": stage.end - stage.begin}
            | {"learning_rate": stage.learning_rate, "validation": validation(stage.end)}
            for stage in self.stages
        ]
        return {"budget": budget, "stages": stages}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.settings.difficulty == "loss":
            if not self.counts:  # which ExactResume has taken from the checkpoint
                self.counts["losses"] = self.trainer.losses_of_rows().tolist()
            self._plan(np.array(self.counts["losses"]))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.settings.restart and self.is_new(state.global_step):
            self.trainer.optimizer.state.clear()  # moments and counts; the scheduler sets the learning rate

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in [stage.end for stage in self.stages[:-1]]:
            control.should_evaluate |= self.trainer.eval_dataset is not None
            control.should_save |= args.save_strategy != SaveStrategy.NO
