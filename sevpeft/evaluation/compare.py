"""Turns recipes into a controlled experiment: trains every arm with every seed, evaluates it, and compares.

Each run is a unit that is skipped when it is done, continued when it was cut off, and left to the other process when
one holds its lock. So the same command, started once on each GPU, shares the work, and each gives the whole table.
The weights of the verdict and of the controls are chosen on validation; the test split chooses nothing.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.console import Console

from sevpeft.console import Screen
from sevpeft.errors import Interrupted, RunError, UsageError
from sevpeft.evaluation.arms import ARMS, BASE_ARM, CE, CONTROLS, LOCKS, WEIGHTED, Experiment, experiments
from sevpeft.evaluation.compared_runs import Unit, read_scores, refuse_unequal, stored_json
from sevpeft.evaluation.comparison import (
    CRITICAL,
    PRIMARY,
    Compared,
    as_dict,
    choose,
    compare_scores,
    correct,
    refuse_too_small,
    verdict_of,
)
from sevpeft.evaluation.evaluate import EVALUATION, evaluate, test_rows
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import METRICS
from sevpeft.evaluation.significance import methods
from sevpeft.runs import Run, plain_disk_errors, write_atomically
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.train import train

COMPARISON = "comparison.json"
# Weights of the controls where no weighted arm is asked for.
_DEFAULT_CONTROLLED = "balanced"
_SECONDS_BETWEEN_LOOKS = 1.0


class Comparison:
    """The work of one `sevpeft compare`.

    Args:
        answers: generate and score answers; without, the likelihood alone is compared.
        controls_of: weighted arm whose weights the controls have; None for the one that validation chooses.
        on_trained: called with every run that was trained here.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        overrides: Sequence[str],
        *,
        arms: Sequence[str],
        seeds: Sequence[int],
        output: Path,
        controls_of: str | None = None,
        answers: bool = True,
        console: Console | None = None,
        on_trained: Callable[[Run], object] | None = None,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "compare runs as one process; start it without accelerate, and once on each GPU to share the work."
            )
        if controls_of is not None and controls_of not in WEIGHTED:
            raise UsageError(f"--controls-of is {controls_of!r}; it can be {', '.join(WEIGHTED)}.")
        # In the table's order, whatever the order on the command line.
        self.arms = tuple(arm for arm in ARMS if arm in arms)
        self.seeds, self.output, self.controls_of, self.answers = tuple(seeds), output, controls_of, answers
        self.console = console or Screen(quiet=True)
        self.on_trained = on_trained
        self.trained = 0
        self.experiments = experiments(paths, overrides, self.arms, output)
        self.rows: dict[str, EvaluationRows] = {}
        for experiment in self.experiments:
            # Plain CE reads the same rows, and data without severities too, which are refused in other words.
            recipe = experiment.recipe_of(CE, self.seeds[0], _DEFAULT_CONTROLLED)
            self.rows[experiment.recipe.name] = rows = test_rows(recipe)
            refuse_too_small(rows, experiment.recipe.name)

    def run(self) -> dict[str, Any]:
        """Does what is not done yet, and returns and writes comparison.json.

        Raises:
            SevpeftError: in one plain sentence; finished runs and rows are kept.
        """
        trained = tuple(arm for arm in self.arms if arm != BASE_ARM)
        free = [arm for arm in trained if arm not in CONTROLS]
        controlled = {}
        try:
            self._work_off([unit for one in self.experiments for unit in self._units(one, free, "", host=trained[0])])
            for one in self.experiments:
                chosen = choose(self._validation(one))
                controlled[one.recipe.name] = self.controls_of or chosen or _DEFAULT_CONTROLLED
            controls = [arm for arm in trained if arm in CONTROLS]
            self._work_off(
                [
                    unit
                    for one in self.experiments
                    for unit in self._units(one, controls, controlled[one.recipe.name], host=trained[0])
                ]
            )
        except (KeyboardInterrupt, Interrupted) as error:
            raise Interrupted(
                "Interrupted; finished runs and rows are kept, and the same command goes on from them.",
                getattr(error, "exit_code", 130),
            ) from error
        with self.console.status("Comparing"):
            content = self._compared(controlled)
            self._write(content)
        return content

    def _units(self, experiment: Experiment, arms: Sequence[str], controlled: str, host: str) -> list[Unit]:
        """Args: host: the arm whose first run also holds the base model's scores."""
        with_base = BASE_ARM in self.arms
        return [
            Unit(experiment, arm, seed, controlled, with_base and arm == host and seed == self.seeds[0])
            for seed in self.seeds
            for arm in arms
        ]

    def _work_off(self, units: Sequence[Unit]) -> None:
        waiting = list(enumerate(units, start=1))
        told: set[int] = set()
        while waiting:
            busy = []
            for number, unit in waiting:
                place = f"{unit.experiment.recipe.name}: {unit.run.folder.name} ({number} of {len(units)})"
                with _claimed(unit) as run_lock:
                    if run_lock:
                        self._finish(unit, place)
                        continue
                busy.append((number, unit))
                if number not in told:
                    self.console.print(f"{place}: another process is at work on it.", soft_wrap=True)
                told.add(number)
            if len(busy) == len(waiting):
                names = ", ".join(unit.run.folder.name for _, unit in busy)
                with self.console.status(f"Waiting for another process, which is at work on {names}"):
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
            waiting = busy

    def _finish(self, unit: Unit, place: str) -> None:
        """Trains and evaluates one run, as far as that is not done."""
        experiment, run = unit.experiment, unit.run
        recipe = experiment.recipe_of(unit.arm, unit.seed, unit.controlled)
        state = experiment.state_of(run, recipe)
        if state == "finished" and unit.evaluated(self.rows[recipe.name], answers=self.answers):
            return
        self.console.rule(place)
        if state != "finished":
            train(recipe, run.folder, resume=state == "started", console=self.console)
            self.trained += 1
            if self.on_trained is not None:
                self.on_trained(run)
            _free_memory()
        # The base model is loaded anew: kept beside the next training it would hold the memory twice.
        evaluate(run, arms=unit.columns, answers=self.answers, floors=unit.with_base, console=self.console)
        torch.cuda.empty_cache()

    def _validation(self, experiment: Experiment) -> dict[str, list[float]]:
        """Weighted arm → validation NLL of critical cases of each seed, as the training measured it at its end."""
        losses: dict[str, list[float]] = {}
        for unit in self._units(experiment, [arm for arm in self.arms if arm in WEIGHTED], "", host=""):
            after = unit.run.metrics().get("after", {})
            if f"loss_{CRITICAL}" not in after:
                raise RunError(
                    f"The validation split of {experiment.recipe.name} has no critical case to choose the weights by; "
                    "raise data.validation_size, and give another --output."
                )
            losses.setdefault(unit.arm, []).append(float(after[f"loss_{CRITICAL}"]))
        return losses

    def _compared(self, controlled: dict[str, str]) -> dict[str, Any]:
        found: dict[str, Compared] = {}
        chosen: dict[str, str | None] = {}
        recipes: dict[str, Any] = {}
        trained = [arm for arm in self.arms if arm != BASE_ARM]
        for one in self.experiments:
            name, rows = one.recipe.name, self.rows[one.recipe.name]
            units = self._units(one, trained, controlled[name], host=trained[0])
            refuse_unequal(units)
            tokens, scores = read_scores(units, rows)
            validation = self._validation(one)
            chosen[name] = choose(validation)
            by_arm = {arm: scores[arm] for arm in self.arms}
            found[name] = compare_scores(rows, tokens, by_arm, one.recipe.evaluation, chosen[name])
            notes = list(
                dict.fromkeys(note for unit in units for note in stored_json(unit.run.folder / EVALUATION)["notes"])
            )
            if set(self.arms) & set(CONTROLS) and chosen[name] not in (None, controlled[name]):
                notes.append(
                    f"The controls have the weights of {controlled[name]}, but validation chose {chosen[name]}: its "
                    f"own controls come with --controls-of {chosen[name]}."
                )
            runs: dict[str, list[str]] = {BASE_ARM: [_place(units[0], self.output)]} if BASE_ARM in self.arms else {}
            for unit in units:
                runs.setdefault(unit.arm, []).append(_place(unit, self.output))
            recipes[name] = {
                "model": one.recipe.model.name_or_path,
                "data": {"source": rows.source, "rows": len(rows), "content": rows.content_hash()},
                "chosen": chosen[name],
                "controls_of": controlled[name] if set(self.arms) & set(CONTROLS) else None,
                "validation": {
                    arm: {"mean": float(np.mean(losses)), "per_seed": losses} for arm, losses in validation.items()
                },
                "runs": runs,
                "notes": notes,
            }
        said: dict[str, str] = {}
        for name, corrected in correct(found).items():
            verdict = verdict_of(corrected)
            said[name] = verdict.verdict
            recipes[name] |= {"verdict": verdict.verdict, "power": verdict.power, "scores": as_dict(corrected)}
        metrics = {metric for compared in found.values() for metric in compared.metrics}
        prefix = len(recipes) > 1
        return {
            "arms": {arm: ARMS[arm] for arm in self.arms},
            "seeds": list(self.seeds),
            "primary": {"metric": PRIMARY, "stratum": CRITICAL},
            "confidence_level": self.experiments[0].recipe.evaluation.confidence_level,
            "severities": list(SEVERITIES),
            "metrics": {name: METRICS[name].meaning() for name in METRICS if name in metrics},
            "methods": methods(
                self.experiments[0].recipe.evaluation,
                "the comparisons of the verdict together, over all recipes, and for all others of one score and recipe "
                "together",
            ),
            "verdict": " ".join(f"{name}: {one}" if prefix else one for name, one in said.items()),
            "recipes": recipes,
        }

    def _write(self, content: dict[str, Any]) -> None:
        """comparison.json, unless what stands there holds the same and more."""
        path = self.output / COMPARISON
        before = stored_json(path)

        def asked(of: dict[str, Any]) -> set[tuple[str, Any]]:
            return {(part, one) for part in ("arms", "seeds", "recipes", "metrics") for one in of.get(part, ())}

        if asked(before) > asked(content):
            self.console.print(f"{path} is kept as it was, because it holds more arms, seeds, recipes or scores.")
            return
        write_atomically(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n", shared=True)


@contextmanager
def _claimed(unit: Unit) -> Iterator[bool]:
    """Whether this process has the run for itself now; a kill gives it back."""
    locks = unit.experiment.folder / LOCKS
    with plain_disk_errors(locks):
        locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / unit.run.folder.name, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _place(unit: Unit, output: Path) -> str:
    return unit.run.folder.relative_to(output).as_posix()


def _free_memory() -> None:
    """A trainer refers to itself, and the next model needs the room."""
    gc.collect()
    torch.cuda.empty_cache()
