"""Curricula: which rows each optimizer step takes, in stages.

A step has as many rows as in a plain training, all of one stage. A stage with too few rows repeats them. The rows
follow from seed, recipe, step and checkpoint, so a run resumes exactly inside and between stages.

Published: cumulative stages by severity, with more steps than their baseline (arXiv 2604.06365), disjoint ones (IMSA
2026), square-root competence (Platanios et al., arXiv 1903.09848). Equal budgets and the other settings are ours.

Of ICFT (arXiv 2502.00832) only `L = L_consistency + L_task + L_finetune` and the words "dual-stage memory coordination"
are public. This is our interpretation. Stages are disjoint. Later stages replay a share of earlier rows: the last rows
before the stage (short-term memory), and rows whose loss was high at two measurements or more (long-term memory).
L_task is the weighted loss of a stage's own rows, L_finetune that of replayed rows. L_consistency is the KL divergence
of answer tokens from the adapter at the end of the previous stage.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torch.nn.functional import kl_div
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from sevpeft.data.read import Consultations
from sevpeft.errors import DataError, RecipeError
from sevpeft.recipe import CurriculumSection
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.source import Severity
from sevpeft.training.compat import IGNORED, checkpoint_of, replaced

MEASURED = {"severity", "length", "loss"}  # values of curriculum.difficulty that are no column
# Competence: share of the rows that the first step draws from (c₀), and share of the steps until all rows are used (T).
_LEAST, _DURATION = 0.01, 0.5
# Memories: rows of the short-term one; quantile above which a loss is high, and how many times it must be.
_RECENT, _HIGH, _REPEATED = 128, 0.75, 2
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples modulo 1 are evenly spread, so each step replays its share
_FROZEN = "previous_stage.safetensors"  # in a checkpoint


def difficulty_of(
    settings: CurriculumSection, table: Consultations, severity: Severity | None, places: list, lengths: list
) -> list[np.ndarray]:
    """(n,) difficulty of each part's rows, which are at `places` (n,); placeholders until the loss is measured."""
    column = settings.difficulty
    if column in MEASURED:
        strata = [np.full(len(part), -1) if severity is None else severity.strata[part] for part in places]
        if settings.kind != "none" and column == "severity" and min(map(np.min, strata)) < 0:
            problem = "The data cannot be ordered by severity: there are rows without one"
            raise DataError(f"{problem}; write curriculum.difficulty=length, or severity.source=rules.")
        return {"length": lengths, "severity": strata}.get(column, [np.arange(len(part)) for part in places])
    names = {given: own for own, given in {**table.columns, **table.carried}.items()}
    cells = pd.Series(table.rows[names[column]][:] if column in names else [None])
    values = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=float)
    if not (finite := np.isfinite(values)).all():
        where = f"has no number in row {table.rows[int(finite.argmin())]['row']}" if column in names else "is no column"
        raise DataError(f"The data cannot be ordered by {column}: it {where}; write another curriculum.difficulty.")
    return [values[part] for part in places]


@dataclass(frozen=True)
class Stage:
    """Optimizer steps from `begin` to `end` (exclusive), with rows of `pool` (positions of training rows)."""

    name: str
    pool: np.ndarray
    begin: int
    end: int
    learning_rate: float


class Curriculum(TrainerCallback):
    """Callback that selects the rows of each step, starts the stages, and measures what the model forgets.

    `difficulty`: (n,) of the training rows and of the held-out rows, larger for harder rows. Checkpoints hold `counts`,
    the measurements, and `frozen`, the previous stage's adapter. Raises RecipeError: a stage has no rows or no steps.
    """

    trainer: Any  # SeveritySFTTrainer, which sets it

    def __init__(
        self, settings: CurriculumSection, rows: int, difficulty: Iterable[np.ndarray], args: TrainingArguments
    ) -> None:
        self.settings, self.rows, self.args = settings, rows, args
        self.drawn, self.frozen = list[np.ndarray](), dict[str, torch.Tensor]()
        self.counts: dict[str, Any] = {"losses": [], "high": [], "long_term": [], "held_out": []}
        self.seed = args.seed if args.data_seed is None else args.data_seed
        # Rows of a pass on all processes, of an epoch and of a step, as Trainer counts them.
        self.of_pass = args.train_batch_size * args.world_size
        self.of_epoch = rows - rows % self.of_pass * args.dataloader_drop_last
        self.of_step = self.of_pass * args.gradient_accumulation_steps
        self.steps_of_epoch = max(1, math.ceil(self.of_epoch / self.of_step))
        self.steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.steps_of_epoch)
        args.learning_rate = (settings.learning_rates or [args.learning_rate])[0]
        self._plan(*difficulty)
        args.max_steps = self.steps = self.stages[-1].end

    def rows_until(self, step: int) -> int:
        """Rows that the steps before this one take, as in a plain training: an epoch's last step may be short."""
        epochs, steps = divmod(step, self.steps_of_epoch)
        return epochs * self.of_epoch + min(steps * self.of_step, self.of_epoch)

    def competence(self, step: int) -> float:
        """Share of the rows, the easiest first, that a step draws from (Platanios et al., eq. 7 with p = 2)."""
        return min(1.0, math.sqrt(step / (_DURATION * self.steps) * (1 - _LEAST**2) + _LEAST**2))

    def _plan(self, difficulty: np.ndarray, held_out: np.ndarray) -> None:
        """Sets `stages`, `classes` (their names by difficulty), and `held_out` (the class of each held-out row)."""
        settings, generator = self.settings, np.random.default_rng(self.seed)
        by_severity, sign = settings.difficulty == "severity", -1 if settings.order == "hard_first" else 1
        count = len(settings.shares or settings.learning_rates or SEVERITIES)
        values, known = sign * difficulty, np.arange(count) if by_severity else np.unique(difficulty)
        # Highest difficulty of each stage: a stage for each value, or equally many rows in each stage.
        limits = np.quantile(values, np.arange(1, count + 1) / count, method="inverted_cdf")
        limits = (np.sort(sign * known) if len(known) == count else limits)[:-1]
        names = SEVERITIES if by_severity else [f"{settings.difficulty} {n + 1} of {count}" for n in range(count)]
        names, rates = list(names[::sign]), settings.learning_rates or [self.args.learning_rate] * count
        self.classes, self.held_out, self.stages = names, np.searchsorted(limits, sign * held_out), list[Stage]()
        if settings.order == "shuffled":
            values, names = generator.permutation(values), [f"shuffled {n + 1} of {count}" for n in range(count)]
        if settings.kind == "competence":
            easiest = np.lexsort((generator.random(self.rows), values))  # ties in random order
            self.stages.append(Stage("competence", easiest, 0, self.steps, self.args.learning_rate))
            self.classes, self.held_out = [], np.zeros(0, dtype=int)
            return
        classes, cumulative, begin = np.searchsorted(limits, values), settings.kind == "cumulative", 0
        for number, (name, rate) in enumerate(zip(names, rates, strict=True)):
            pool = np.flatnonzero(classes <= number if cumulative else classes == number)
            end = round(sum((settings.shares or [1 / count] * count)[: number + 1]) * self.steps)
            if settings.epochs_per_stage is not None:
                end = begin + math.ceil(settings.epochs_per_stage * len(pool) / self.of_step)
            if end == begin or not (classes == number).any():
                what = f"none of the {self.steps:,} steps" if end == begin else "no rows of its own"
                raise RecipeError(f"Stage {number + 1} has {what}; change curriculum.difficulty or curriculum.shares.")
            name = f"{names[0]} to {name}" if cumulative and number else name
            self.stages.append(Stage(name, pool, begin, end, rate))
            begin = end

    def _draw(self, number: int) -> np.ndarray:
        """Rows of all steps of a stage, in their order."""
        stage, generator = self.stages[number], np.random.default_rng([self.seed, number])
        sizes = np.diff([self.rows_until(step) for step in range(stage.begin, stage.end + 1)])
        if self.settings.kind == "competence":
            allowed = [math.ceil(self.competence(step) * self.rows) for step in range(stage.end)]
            drawn = [generator.choice(max(most, n), n, replace=False) for most, n in zip(allowed, sizes, strict=True)]
            return stage.pool[np.concatenate(drawn)]
        rows, pools, source = np.zeros(sizes.sum(), dtype=int), [stage.pool], np.zeros(sizes.sum(), dtype=int)
        if self.settings.kind == "icft" and number:
            recent = np.unique(np.concatenate(self.drawn)[-_RECENT:])
            pools = [recent, np.array(self.counts["long_term"][number] or recent), stage.pool]
            shares = np.cumsum([self.settings.short_term, self.settings.long_term])
            source = np.searchsorted(shares, np.arange(len(rows)) * _GOLDEN % 1, side="right")
        for place, pool in enumerate(pools):  # a pool repeats a row only after all its rows
            count = (source == place).sum()
            passes = [generator.permutation(pool) for _ in range(count // len(pool) + 1)]
            rows[source == place] = np.concatenate(passes)[:count]
        return rows

    def batches(self, step: int) -> Iterator[dict[str, Any]]:
        """Batches of this process in a step, as many and as large as in a plain training."""
        self._begin(step)
        trainer, size = self.trainer, self.args.train_batch_size
        rows = np.concatenate(self.drawn)[self.rows_until(step) : self.rows_until(step + 1)].tolist()
        if trainer.sort_within_steps:
            rows.sort(key=lambda row: -len(trainer.train_dataset[row]["input_ids"]))
        for start in range(0, len(rows), self.of_pass):
            part = rows[start : start + self.of_pass]
            if self.args.world_size > 1:  # as in accelerate, every process has a full batch
                part = np.resize(part, self.of_pass).tolist()
            own = part[self.args.process_index * size :][:size]
            yield trainer.data_collator([trainer.train_dataset[row] for row in own])

    def _begin(self, step: int) -> None:
        """Draws the rows of the stages up to that of a step. At the start of a stage, measures and resets first."""
        settings, counts, trainer = self.settings, self.counts, self.trainer
        number = sum(step >= stage.end for stage in self.stages[:-1])  # of its stage; after all steps of the last one
        if settings.difficulty == "loss" and not self.drawn:
            if not counts["losses"]:
                measured = map(self._measure, (trainer.train_dataset, trainer.eval_dataset))
                counts["losses"] = [(nll / tokens).tolist() for nll, tokens in measured]
            planned = self.stages
            self._plan(*map(np.array, counts["losses"]))
            # Ties change the number of rows of a stage; with epochs_per_stage the steps must stay those of max_steps.
            pairs = zip(planned, self.stages, strict=True)
            self.stages = [replace(new, begin=old.begin, end=old.end) for old, new in pairs]
        ends = [stage.end for stage in self.stages]
        if step in ends and len(counts["held_out"]) <= ends.index(step) and len(self.held_out):
            sums = [np.bincount(self.held_out, of, len(self.classes)) for of in self._measure(trainer.eval_dataset)]
            counts["held_out"].append([nll / tokens if tokens else None for nll, tokens in zip(*sums, strict=True)])
        if step in ends[:-1]:
            if settings.restart:
                trainer.optimizer.state.clear()  # moments and step counts; the scheduler sets the learning rate
            if settings.kind == "icft" and settings.consistency:
                trained = ((name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad)
                self.frozen = {name: weight.detach().clone() for name, weight in trained}
        if settings.kind == "icft" and len(counts["long_term"]) == number:
            seen = np.concatenate([stage.pool for stage in self.stages[:number] or self.stages])
            nll, tokens = self._measure(trainer.train_dataset.select(seen))
            losses = nll / tokens
            high = np.bincount(seen[losses >= np.quantile(losses, _HIGH)], minlength=self.rows)
            counts["high"] = (high + (counts["high"] or 0)).tolist()
            counts["long_term"].append([row for row in seen.tolist() if number and counts["high"][row] >= _REPEATED])
        while len(self.drawn) <= number:
            self.drawn.append(self._draw(len(self.drawn)))

    def _measure(self, rows: Any) -> np.ndarray:
        """(2, n) negative log-likelihood, unweighted, and answer tokens of each row, with the present adapter."""
        trainer, numbers = self.trainer, np.arange(len(rows))
        numbered = rows.select_columns(["input_ids", "labels"]).add_column("severity", numbers)
        with replaced(trainer, "strata", len(rows)):
            trainer.evaluation_loop(trainer.get_eval_dataloader(numbered), "Measuring", prediction_loss_only=True)
        return np.asarray(trainer._validation[:, [0, 3]].T)

    def drift(self, inputs: dict[str, Any]) -> Any:
        """Consistency term (B, T-1) of a batch at its answer tokens; 0 in the first stage."""
        if not self.frozen:
            return 0.0
        model, vocabulary = self.trainer.model, self.trainer._labeled_positions.vocabulary
        model.eval()  # no dropout
        with torch.no_grad():
            before = vocabulary(lambda **inputs: functional_call(model, self.frozen, (), inputs), inputs)
        divergence = kl_div(vocabulary(model.train(), inputs), before, reduction="none", log_target=True).sum(-1)
        mask = inputs["labels"][:, 1:] != IGNORED
        return self.settings.consistency * divergence.new_zeros(mask.shape).masked_scatter(mask, divergence)

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json: the stages, and the loss on the held-out rows of each class after every stage."""
        losses = zip(self.classes, zip(*self.counts["held_out"], strict=True), strict=False)
        stages = [
            {"name": one.name, "rows": len(one.pool), "steps": one.end - one.begin, "learning_rate": one.learning_rate}
            for one in self.stages
        ]
        return {"stages": stages, "held_out": {name: after for name, after in losses if None not in after}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if (frozen := checkpoint_of(args, state.global_step) / _FROZEN).is_file():
            self.frozen = load_file(frozen, device=str(args.device))
        if not (restart := self.settings.restart) and not self.settings.learning_rates:
            return
        factors = list[float]()  # of the learning rate at each step
        for stage in self.stages:
            first, steps = (stage.begin, stage.end - stage.begin) if restart else (0, self.steps)
            optimizer, warmup = torch.optim.SGD([torch.zeros(1)], lr=stage.learning_rate), args.get_warmup_steps(steps)
            own: Any = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, args.lr_scheduler_kwargs)
            share, schedule = stage.learning_rate / args.learning_rate, own.lr_lambdas[0]
            factors += [share * schedule(step - first) for step in range(stage.begin, stage.end)]
        scheduler = self.trainer.lr_scheduler
        scheduler.lr_lambdas = [lambda step: factors[step] if step < len(factors) else 0.0] * len(scheduler.lr_lambdas)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # What is measured after a stage may take long, and a kill there must lose no step.
        control.should_save |= any(stage.end == state.global_step for stage in self.stages)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.frozen and args.should_save:
            save_file(self.frozen, checkpoint_of(args, state.global_step) / _FROZEN)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begin(state.global_step)
