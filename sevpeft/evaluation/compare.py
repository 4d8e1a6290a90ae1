"""Trains every arm of a recipe with every seed, evaluates the runs and compares them.

A finished run is skipped, an interrupted one resumed, and one that another process has locked is left to it. So the
same command, started once on each GPU, shares the work, and each start gives the whole table. The weights of the
verdict and of the controls are chosen on validation; the test split chooses nothing.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.console import Console

from sevpeft.console import Screen
from sevpeft.errors import Interrupted, RunError
from sevpeft.evaluation.arms import (
    ADAPTER,
    ARMS,
    BASE,
    BASE_ARM,
    CE,
    CONTROLS,
    LOCKS,
    OWN,
    WEIGHTED,
    Experiment,
    experiments,
)
from sevpeft.evaluation.comparison import (
    CRITICAL,
    PRIMARY,
    add_comparisons,
    check_test_split,
    choose,
    compare_scores,
    verdict_of,
)
from sevpeft.evaluation.evaluate import EVALUATION, LIKELIHOOD, SCORES, evaluate, test_rows
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import METRICS, Scores
from sevpeft.evaluation.statistics import methods
from sevpeft.recipe import EvaluationSection
from sevpeft.runs import Run, file_hash, json_lines, plain_disk_errors, write_atomically
from sevpeft.training.train import train

COMPARISON = "comparison.json"
DEFAULT_ARMS = tuple(arm for arm in ARMS if arm != OWN)
# Weights of the controls where no weighted arm is compared.
_DEFAULT_CONTROLLED = "balanced"


@dataclass(frozen=True)
class _Unit:
    """One run to train and evaluate; `with_base` if the base model's scores are to stand in it too."""

    experiment: Experiment
    rows: EvaluationRows
    arm: str
    seed: int
    controlled: str
    with_base: bool

    @property
    def run(self) -> Run:
        return self.experiment.run_of(self.arm, self.seed, self.controlled)

    @property
    def place(self) -> str:
        """RECIPE/ARM-SEED, below the folder of the comparison."""
        return self.run.folder.relative_to(self.experiment.folder.parent).as_posix()

    @property
    def columns(self) -> dict[str, str]:
        """Column of the run's scores → arm."""
        return {ADAPTER: self.arm, **({BASE: BASE_ARM} if self.with_base else {})}

    def evaluation(self) -> dict[str, Any]:
        """Content of evaluation.json; empty when it is absent or damaged, so that it is made again."""
        try:
            return dict(json.loads((self.run.folder / EVALUATION).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def evaluated(self, answers: bool) -> bool:
        """Whether the run's evaluation is whole, and of this adapter, these rows and these settings."""
        stored = self.evaluation()
        generation = {**self.experiment.recipe.generation.model_dump(), "backend": "transformers"}
        return (
            stored.get("adapter") == file_hash(self.run.adapter / "adapter_model.safetensors")
            and stored.get("data", {}).get("content") == self.rows.content_hash()
            and stored["data"].get("evaluated") == len(self.rows)
            and set(self.columns) <= set(stored.get("columns", ()))
            and (not answers or ("chrf" in stored.get("metrics", ()) and stored.get("generation") == generation))
            and (self.run.folder / SCORES).is_file()
        )


def compare(
    recipes: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    output: Path,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    answers: bool = True,
    console: Console | None = None,
    on_trained: Callable[[Run], object] | None = None,
) -> dict[str, Any]:
    """Does what is not done yet; writes comparison.json and returns its content.

    Args:
        overrides: KEY=VALUE for all recipes.
        output: folder of the comparison, whose runs stand in OUTPUT/RECIPE/ARM-SEED.
        answers: generate and score answers; without, the likelihood alone is compared.
        on_trained: called with every run that was trained here.

    Raises:
        SevpeftError: in one plain sentence; finished runs and rows are kept.
    """
    arms = [arm for arm in ARMS if arm in arms]  # in the order of the table
    screen = console or Screen(quiet=True)
    found = {one.recipe.name: one for one in experiments(recipes, overrides, arms, output)}
    rows = {}
    for name, one in found.items():
        # As plain CE, which reads the same rows and needs no severity; `check_test_split` names what is missing.
        rows[name] = test_rows(one.recipe_of(CE, seeds[0], _DEFAULT_CONTROLLED))
        check_test_split(rows[name], name)
    to_train = [arm for arm in arms if arm != BASE_ARM]
    first = (to_train[0], seeds[0]) if BASE_ARM in arms else None

    def units(name: str, of: Sequence[str], controlled: str = "") -> list[_Unit]:
        of_seeds = [(arm, seed) for seed in seeds for arm in to_train if arm in of]
        return [_Unit(found[name], rows[name], *one, controlled, with_base=one == first) for one in of_seeds]

    finish = partial(_finish, answers=answers, console=screen, on_trained=on_trained)
    try:
        finish([unit for name in found for unit in units(name, [arm for arm in arms if arm not in CONTROLS])])
        validation = {name: _validation(units(name, WEIGHTED)) for name in found}
        chosen = {name: choose(losses) for name, losses in validation.items()}
        controlled = {name: chosen[name] or _DEFAULT_CONTROLLED for name in found}
        finish([unit for name in found for unit in units(name, CONTROLS, controlled[name])])
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(
            "Interrupted; finished runs and rows are kept, and the same command goes on from them.",
            getattr(error, "exit_code", 130),
        ) from error
    with screen.status("Comparing"):
        compared, contents = {}, {}
        for name, one in found.items():
            finished = units(name, to_train, controlled[name])
            _check_equal(finished)
            tokens, scores = _read_scores(finished)
            in_order = {arm: scores[arm] for arm in arms}
            compared[name] = compare_scores(rows[name], tokens, in_order, one.recipe.evaluation, chosen[name])
            contents[name] = {
                "model": one.recipe.model.name_or_path,
                "data": {"source": rows[name].source, "rows": len(rows[name]), "content": rows[name].content_hash()},
                "chosen": chosen[name],
                "controls_of": controlled[name] if set(arms) & set(CONTROLS) else None,
                "validation": {
                    arm: {"mean": float(np.mean(losses)), "per_seed": losses}
                    for arm, losses in validation[name].items()
                },
                "runs": {arm: [unit.place for unit in finished if arm in unit.columns.values()] for arm in arms},
                "notes": list(dict.fromkeys(note for unit in finished for note in unit.evaluation()["notes"])),
            }
        add_comparisons(compared)
        for name, of in compared.items():
            verdict, power = verdict_of(of.scores, of.chosen, len(seeds))
            contents[name] |= {"verdict": verdict, "power": power, "scores": of.scores}
        content = _content(arms, seeds, contents, one.recipe.evaluation)
        write_atomically(output / COMPARISON, json.dumps(content, ensure_ascii=False, indent=2) + "\n", shared=True)
    return content


def _content(
    arms: Sequence[str], seeds: Sequence[int], recipes: dict[str, dict[str, Any]], settings: EvaluationSection
) -> dict[str, Any]:
    metrics = {metric for one in recipes.values() for metric in one["scores"][CRITICAL]["metrics"]}
    verdicts = [f"{name}: " * (len(recipes) > 1) + one["verdict"] for name, one in recipes.items()]
    families = "the verdict's comparisons together, over all recipes, and for all others of a score and recipe together"
    return {
        "arms": {arm: ARMS[arm] for arm in arms},
        "seeds": list(seeds),
        "primary": {"metric": PRIMARY, "stratum": CRITICAL},
        "metrics": {name: METRICS[name].meaning() for name in METRICS if name in metrics},
        "methods": methods(settings, families),
        "verdict": " ".join(verdicts),
        "recipes": recipes,
    }


def _finish(
    units: Sequence[_Unit], *, answers: bool, console: Console, on_trained: Callable[[Run], object] | None
) -> None:
    """Finishes the runs: first those that no other process has locked, then the others, once they are free."""
    for timeout in (0, -1):
        for number, unit in enumerate(units, start=1):
            locks, place = unit.experiment.folder / LOCKS, f"{unit.place} ({number} of {len(units)})"
            with plain_disk_errors(locks):
                locks.mkdir(parents=True, exist_ok=True)
            lock = FileLock(locks / unit.run.folder.name, timeout=timeout)  # a kill releases it
            try:
                with console.status(f"{place}: waiting for the process that works on it"):
                    lock.acquire()
            except Timeout:
                continue
            try:
                _train_and_evaluate(unit, place, answers, console, on_trained)
            finally:
                lock.release()


def _train_and_evaluate(
    unit: _Unit, place: str, answers: bool, console: Console, on_trained: Callable[[Run], object] | None
) -> None:
    """As far as that is not done."""
    run = unit.run
    recipe = unit.experiment.recipe_of(unit.arm, unit.seed, unit.controlled)
    state = unit.experiment.state_of(run, recipe)
    if state == "finished" and unit.evaluated(answers):
        return
    console.rule(place)
    if state != "finished":
        train(recipe, run.folder, resume=state == "started", console=console)
        if on_trained is not None:
            on_trained(run)
        gc.collect()  # a trainer refers to itself, and the next model needs the room
        torch.cuda.empty_cache()
    # The base model is loaded anew: kept beside the next training it would hold the memory twice.
    evaluate(run, arms=tuple(unit.columns), answers=answers, floors=unit.with_base, console=console)
    torch.cuda.empty_cache()


def _validation(units: Sequence[_Unit]) -> dict[str, list[float]]:
    """Arm → validation NLL of critical cases of each seed, as the training measured it at its end."""
    losses: dict[str, list[float]] = {}
    for unit in units:
        after = unit.run.metrics()["after"]
        if f"loss_{CRITICAL}" not in after:
            raise RunError(
                f"The validation split of {unit.experiment.recipe.name} has no critical case to choose the weights by; "
                "raise data.validation_size, and give another --output."
            )
        losses.setdefault(unit.arm, []).append(float(after[f"loss_{CRITICAL}"]))
    return losses


def _check_equal(units: Sequence[_Unit]) -> None:
    """Raises RunError when runs differ in base weights, rows or steps, whatever their settings are."""
    found = []
    for unit in units:
        metrics = unit.run.metrics()
        found.append(
            {
                "base weights": metrics["model"].get("fingerprint"),
                "steps": metrics["training"]["steps"],
                "training rows": metrics["weights"]["consultations"],
                "rows": metrics["data"]["rows"],
            }
        )
        if differing := [name for name, value in found[-1].items() if value != found[0][name]]:
            raise RunError(
                f"{unit.run.folder} was not trained as {units[0].run.folder} was (other {', '.join(differing)}), so "
                "they cannot be compared; move the wrong one away and run this again."
            )


def _read_scores(units: Sequence[_Unit]) -> tuple[np.ndarray, dict[str, Scores]]:
    """Tokens (n,) of the references, and arm → metric → (seeds, n), in the order of the rows."""
    by_arm: dict[str, list[Scores]] = {}
    tokens = []
    for unit in units:
        tokens.append(_column(unit.run.folder / LIKELIHOOD, "arm", ADAPTER, unit.rows)["tokens"])
        if not np.array_equal(tokens[0], tokens[-1]):
            raise RunError(f"{unit.run.folder} counted other tokens in the references than {units[0].run.folder}.")
        for column, arm in unit.columns.items():
            by_arm.setdefault(arm, []).append(_column(unit.run.folder / SCORES, "column", column, unit.rows))
    return tokens[0], {
        arm: {name: np.stack([of[name] for of in seeds]) for name in METRICS if all(name in of for of in seeds)}
        for arm, seeds in by_arm.items()
    }


def _column(path: Path, key: str, name: str, rows: EvaluationRows) -> Scores:
    """Number → (n,) of the lines whose `key` is `name`; joined with the rows by id, never by position."""
    with path.open(encoding="utf-8") as file:
        lines = {line["id"]: line for _, line in json_lines(file, str(path)) if line[key] == name}
    if lines.keys() != set(rows.ids):
        raise RunError(f"{path} holds scores of other rows; move it away and run this again, which makes it anew.")
    numbers = [field for field in lines[rows.ids[0]] if field not in (key, "id")]
    return {
        field: np.array([np.nan if lines[one][field] is None else lines[one][field] for one in rows.ids], dtype=float)
        for field in numbers
    }
