"""Trains every arm of a recipe with every seed, evaluates the runs, compares them and tests the claim.

A finished run is skipped, an interrupted one is resumed, and a run that another process has locked is left to it. So
the same command, started once on each GPU, shares the work, and each process returns the whole table.

The claim (report/claim.py) is fixed before any test row is read: its weights are chosen on validation. All other
comparisons of a score are corrected together, by Holm. With folds, models that never saw a row test it: each arm is
trained with each seed once without each fold, and the scores of the folds are joined.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from transformers import TrainerCallback

from sevpeft.console import Screen, number_text, print_labeled
from sevpeft.errors import RunError, SevpeftError, UsageError
from sevpeft.evaluation import scores as scoring
from sevpeft.evaluation.arms import (
    ADAPTER,
    ARMS,
    BASE,
    CE,
    CE_EXTRA,
    COMPOSED,
    CONSTANT,
    CONTROLS,
    LADDER,
    OWN,
    PROMPT,
    ROUTED,
    ROUTED_GOLD,
    ROUTED_SHUFFLED,
    SHUFFLED,
    WEIGHTED,
    arm_of,
    check_arms,
    parse_vary,
    references_of,
    routed_questions,
)
from sevpeft.evaluation.evaluate import EVALUATION, LIKELIHOOD, SCORES, evaluate, finished_rows_are_kept, test_rows
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.judge import Judge
from sevpeft.evaluation.report.claim import Evidence, can_show, claim_of, verdict_of
from sevpeft.evaluation.scores import ALL, CRITICAL, METRICS, PRIMARY, Scores
from sevpeft.evaluation.tables import COMPARISON
from sevpeft.recipe import SEVERITY_PRESETS, Recipe, load_recipe
from sevpeft.runs import Run, check_one_process, file_hash, json_lines, plain_disk_errors, write_atomically
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.checkpoints import as_started, check_same_data, check_same_recipe
from sevpeft.training.data import load_splits, source_index
from sevpeft.training.plan import steps_of
from sevpeft.training.resolve import resolve_split
from sevpeft.training.train import train

DEFAULT_ARMS = (BASE, CE, "mild", "balanced", "strong", SHUFFLED, CONSTANT)
_STEPS_OF_PACE = 6  # measured steps of the first training; its first step is slower


@dataclass(frozen=True)
class _Unit:
    """One run to train and evaluate."""

    arm: str
    seed: int
    fold: str  # "" without folds
    rows: EvaluationRows
    trained_on: int  # rows
    recipe: Recipe
    run: Run
    columns: dict[str, str]  # column of the run's scores → arm


def compare(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    output: Path,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    folds: int | None = None,
    answers: bool = True,
    vary: str | None = None,
    console: Console | None = None,
    on_trained: Callable[[Run], object] | None = None,
) -> dict[str, Any]:
    """Trains and evaluates the missing runs; writes comparison.json and returns its content.

    Args:
        output: folder of the comparison, with its runs in OUTPUT/ARM-SEED, which are kept after a SevpeftError.
        folds: parts of all rows, each the test of the runs OUTPUT/ARM-SEED-foldN; by default the recipe's test is used.
        answers: generate and score answers; False compares the likelihood alone.
        vary: KEY=VALUE,VALUE…: an arm for each value, compared with the first; or LADDER: each with the previous one.
        on_trained: called with every run that this process trained.
    """
    check_one_process("compare")
    screen, path = console or Screen(quiet=True), Path(recipe)
    key, values = parse_vary(vary, path, overrides) if vary else ("", {})
    varied = {arm: " ".join(settings) or "the recipe" for arm, settings in values.items()}
    meanings = {BASE: ARMS[BASE], **varied} if vary else ARMS
    arms = [arm for arm in meanings if arm in arms or arm in values]  # in the order of the table
    to_train = [arm for arm in arms if arm not in (BASE, *COMPOSED)]
    weighted = [arm for arm in arms if arm in WEIGHTED]
    given = load_recipe(path, overrides)
    ready = given.severity.source == "weight"
    default_controlled = OWN if ready else "balanced"  # controls have its weights if no weighted arm is compared
    if folds is not None and folds < 2:
        raise UsageError(f"--folds is {folds}; write 2 or more, or leave it out for the recipe's own test split.")
    places = [f"{number}/{folds}" for number in range(1, folds + 1)] if folds else [""]

    @cache  # units are listed several times
    def recipe_of(arm: str, seed: int, fold: str, controlled: str = "") -> tuple[Recipe, str]:
        own, ending = ([*overrides, f"data.fold={fold}"], f"-fold{fold.split('/')[0]}") if fold else (overrides, "")
        if vary:
            seeded = [f"{section}.seed={seed}" for section in ("training", "generation")[: 1 + (key == LADDER)]]
            return load_recipe(path, [*own, *values[arm], *seeded]), f"{arm}-{seed}{ending}"
        recipe, name = arm_of(path, own, arm, seed, controlled)
        return recipe, f"{name}{ending}"

    check_arms(given, () if vary else arms, output)
    metrics = METRICS | (Judge(given.evaluation.judge).metrics if given.evaluation.judge else {})
    # Read as plain CE, which has the rows of all arms and needs no severity; `check_test_split` checks the severity.
    reading = to_train if vary or given.data.mix else [CE]
    routing = bool({ROUTED, ROUTED_SHUFFLED} & {*arms})
    by_fold = {fold: same_rows(key, [recipe_of(arm, seeds[0], fold)[0] for arm in reading], routing) for fold in places}
    rows = EvaluationRows.joined([fold_rows for fold_rows, *_ in by_fold.values()])
    needing = {*SEVERITY_PRESETS, *COMPOSED}  # arms that need severities, even with ready-made weights
    stratum = ALL if vary or (ready and rows.strata.max() < 0 and not needing & {*arms}) else CRITICAL
    if stratum == CRITICAL:
        check_test_split(rows, folds)
        if weighted and not all(validates for _, _, validates, _ in by_fold.values()):
            raise RunError(
                "The validation rows have no critical case to choose weights by; raise data.validation_size."
            )

    equal: dict[str, str] = {}

    def units(selected: Sequence[str], controlled: str = "") -> list[_Unit]:
        listed, twins = [], dict[str, tuple[str, Recipe, Run]]()
        equal.clear()  # the choice of weights can change which arms are equal
        for seed, arm, fold in product(seeds, (arm for arm in to_train if arm in selected), places):
            columns, (own, name) = {ADAPTER: arm}, recipe_of(arm, seed, fold, controlled)
            if BASE in arms and (arm, seed) == (to_train[0], seeds[0]):  # the first run has the base model's scores
                columns[BASE] = BASE
            # Equal settings train the same to the bit, so one run is enough for both arms.
            weights = {"weights": own.severity.coefficients()} if own.severity.source != "weight" else {}
            key = str([fold, own.model_dump(exclude={"about"}) | {"severity": own.severity.model_dump() | weights}])
            twin, own, run = twins.setdefault(key, (arm, own, Run(output / name)))
            if twin != arm:
                equal[arm] = f"{arm} trains the same as {twin}, to the bit, and is not trained"
            listed.append(_Unit(arm, seed, fold, *by_fold[fold][:2], own, run, columns))
        return listed

    planned = units(to_train, default_controlled)
    todo = [unit for unit in planned if not (unit.run.adapter / "adapter_model.safetensors").is_file()]
    todo = list({unit.run.folder: unit for unit in todo}.values())
    steps = [steps_of(unit.trained_on, resolve_split(unit.recipe, None, 0).training.settings()) for unit in todo]
    pace = _Pace(sum(steps) / (steps or [1])[0], screen)
    if todo:
        # Packing and a mix change the number of rows, by how much is known only when they are encoded.
        known = given.training.settings().get("max_steps", 0) > 0 or not (given.data.mix or given.training.packing)
        count = f", about {sum(steps):,} steps in all" if known else ""
        to_do = f"{len(todo)} of {len(planned)} to train{count}: {', '.join(to_train)}"
        print_labeled(screen, "Runs", "; ".join([to_do, f"seeds {', '.join(map(str, seeds))}", *equal.values()]))
    critical = rows.strata == SEVERITIES.index(CRITICAL)
    if todo and stratum == CRITICAL:
        print_labeled(screen, "Can show", can_show(rows.groups[critical], len(seeds)))

    def finish(wanted: list[_Unit], before: int = 0) -> None:
        """Finishes the runs: first those that no other process has locked, then the others when they are free."""
        locks = output / ".locks"
        with plain_disk_errors(locks):
            locks.mkdir(parents=True, exist_ok=True)
        for timeout in (0, -1):
            for number, unit in enumerate(wanted, start=before + 1):
                name = unit.run.folder.name
                left = timedelta(seconds=round(float(np.mean(pace.runs or [0])) * (len(planned) - number + 1)))
                place = f"{name} ({number} of {len(planned)}){f', {left} left for all' if pace.runs else ''}"
                lock = FileLock(locks / name, timeout=timeout)  # a kill releases it
                try:
                    with screen.status(f"{place}: waiting for the process that works on it"):
                        lock.acquire()
                except Timeout:
                    continue
                try:
                    _train_and_evaluate(unit, place, answers, screen, pace, on_trained)
                finally:
                    screen.quiet = pace.quiet
                    lock.release()

    with finished_rows_are_kept():
        finish(units([arm for arm in arms if vary or arm not in CONTROLS]))
        validation = _validation(units(arms if vary else [CE, *weighted] if weighted else []), stratum)
        chosen = None if vary else choose(validation, given.evaluation.margin)
        controls = units([] if vary else CONTROLS, chosen or default_controlled)
        finish(controls, len(planned) - len(controls))
    with screen.status("Comparing"):
        finished = units(to_train, chosen or default_controlled)
        taken = {unit.arm: f"{unit.arm} {unit.run.metrics()['training']['steps']:,}" for unit in finished}
        _check_equal(finished, ("base weights",) if vary else ("base weights", "tokenizer", "steps", "rows"))
        tokens, scores = _read_scores(finished)
        routes = np.concatenate([of_fold for *_, of_fold in by_fold.values()])
        routed = {ROUTED: routes, ROUTED_SHUFFLED: routes, ROUTED_GOLD: critical}
        for arm in (arm for arm in COMPOSED if arm in arms):
            special = scores[SHUFFLED if arm == ROUTED_SHUFFLED else str(chosen)]
            scores[arm] = {name: np.where(routed[arm], of, scores[CE][name]) for name, of in special.items()}
        scores = {arm: scores[arm] for arm in arms}
        pairs: dict[str, Sequence[str]]
        if key == LADDER:
            pairs = {arm: [before] for before, arm in pairwise(arms)}
        elif vary:
            pairs = {arm: to_train[: arm != to_train[0]] for arm in arms}
        else:
            pairs = {arm: references_of(arm, chosen) for arm in arms}
        of_arms = dict.fromkeys(arms, tokens)
        summary = scoring.summarize(rows, scores, given.evaluation, tokens=of_arms, pairs=pairs, metrics=metrics)
        dialects = np.array([name or "" for name in rows.dialects or ()])
        evidence, claim = Evidence(rows, scores, tokens, given.evaluation), None
        verdict, power = "No claim: it is about weights and critical cases.", ""
        if vary:
            losses = ", ".join(f"{arm} {number_text(one['mean'], 4)}" for arm, one in validation.items())
            other = "each with the previous one" if key == LADDER else f"with {to_train[0]}"
            verdict = f"{key}, validation NLL: {losses}. The tables compare {other} on the test."
        elif chosen and stratum == CRITICAL:
            claim = claim_of(evidence, ROUTED if ROUTED in arms else chosen)
            verdict, power = verdict_of(claim, len(seeds))
        all_notes = ((one.run.folder.name, note) for one in finished for note in one.run.read_json(EVALUATION)["notes"])
        notes = {note.replace("The adapter", f"The adapter of {name}") for name, note in all_notes}
        notes -= {note for one in finished for note in scoring.remarks(one.rows)}  # about the few rows of a fold
        content = {
            "model": given.model.name_or_path,
            "data": {"source": rows.source, "rows": len(rows), "content": rows.content_hash()},
            **({"vary": key} if vary else {}),
            "columns": {arm: meanings[arm] for arm in arms},
            "seeds": list(seeds),
            "folds": folds or 1,
            "primary": {"metric": PRIMARY, "stratum": stratum},
            "metrics": {name: metrics[name] for name in summary[ALL]["metrics"]},
            "methods": scoring.methods(given.evaluation, "all of a score", claim is not None),
            "verdict": verdict,
            "power": power,
            "claim": claim,
            "plane": evidence.against_ce({CRITICAL: critical, "others": (rows.strata >= 0) & ~critical}),
            "dialects": evidence.against_ce({str(one): dialects == one for one in np.unique(dialects) if one}),
            "chosen": chosen,
            "controls_of": (chosen or default_controlled) if not vary and set(arms) & set(CONTROLS) else None,
            "validation": validation,
            "runs": {
                arm: [unit.run.folder.name for unit in finished if arm in unit.columns.values()]
                for arm in arms
                if arm not in COMPOSED
            },
            "notes": [
                *scoring.remarks(rows),
                *sorted(notes),
                *(f"{sentence}." for sentence in equal.values()),
                *([f"Steps: {', '.join(taken.values())}."] if vary or {PROMPT, CE_EXTRA} & {*arms} else []),
            ],
            "scores": summary,
        }
        write_atomically(output / COMPARISON, json.dumps(content, ensure_ascii=False, indent=2) + "\n", shared=True)
    return content


def state_of(run: Run, recipe: Recipe) -> str:
    """ "absent", "started" or "finished"; a RunError if it is damaged, or was trained by another recipe."""
    if not (run.folder / "recipe.yaml").exists() and not run.adapter.exists():
        # A training that was killed before it wrote its recipe cannot be resumed.
        shutil.rmtree(run.folder, ignore_errors=True)
        return "absent"
    try:
        recipe, finished = as_started(recipe, run), run.finished
    except (SevpeftError, ValueError):
        raise RunError(f"{run.folder} is damaged; move it away and run this again, which trains it again.") from None
    check_same_recipe(recipe, run)
    return "finished" if finished else "started"


def _train_and_evaluate(
    unit: _Unit, place: str, answers: bool, console: Console, pace: _Pace, on_trained: Callable[[Run], object] | None
) -> None:
    """Trains and evaluates a run, unless both are done for this adapter, these rows and these settings."""
    state = state_of(unit.run, unit.recipe)
    if state == "finished":
        check_same_data(unit.rows.fingerprint, unit.rows.source, unit.run)  # its severities may have changed
        stored = unit.run.read_json(EVALUATION)
        if (
            stored.get("adapter") == file_hash(unit.run.adapter / "adapter_model.safetensors")
            and stored["data"]["content"] == unit.rows.content_hash()
            and stored["data"]["evaluated"] == len(unit.rows)
            and all(stored[name] == getattr(unit.recipe, name).model_dump() for name in ("generation", "evaluation"))
            and unit.columns.keys() <= stored["columns"].keys()
            and (not answers or "chrf" in stored["metrics"])
            and (unit.run.folder / SCORES).is_file()
        ):
            return
    console.rule(place)
    started = time.monotonic()
    if state != "finished":
        console.quiet, pace.first = pace.quiet or not pace.first, False  # the first run prints data, weights and batch
        train(unit.recipe, unit.run.folder, resume=state == "started", console=console, callbacks=[pace])
        if on_trained is not None:
            on_trained(unit.run)
        gc.collect()  # a trainer has reference cycles, and the next model needs its memory
        torch.cuda.empty_cache()
    # The base model is loaded again for each run: keeping it during a training would take the memory twice.
    evaluate(unit.run, arms=tuple(unit.columns), answers=answers, floors=BASE in unit.columns, console=console)
    pace.runs.append(time.monotonic() - started)
    torch.cuda.empty_cache()


class _Pace(TrainerCallback):
    """Prints once, after some steps, how long all training will take: `share` times the first run."""

    def __init__(self, share: float, screen: Console) -> None:
        self.share, self.screen, self.times = share, screen, list[float]()
        self.runs, self.first, self.quiet = list[float](), True, screen.quiet  # runs: seconds of each

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.screen.quiet = self.quiet

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and len(self.times) < _STEPS_OF_PACE:
            self.times.clear()  # a shorter run before it was evaluated in between
        self.times.append(time.monotonic())
        if len(self.times) == _STEPS_OF_PACE:
            step = (self.times[-1] - self.times[0]) / (_STEPS_OF_PACE - 1)
            whole = str(timedelta(seconds=round(step * state.max_steps * self.share)))
            print_labeled(self.screen, "Time", f"{step:.3g} s a step, {whole} for all training; evaluation is extra")


def _validation(units: Sequence[_Unit], stratum: str) -> dict[str, dict[str, Any]]:
    """Arm → validation NLL of critical or of all cases: mean, per_run, and the means of other severities."""
    by_arm: dict[str, list[dict[str, float]]] = {}
    name = "loss" if stratum == ALL else f"loss_{CRITICAL}"
    for unit in units:
        by_arm.setdefault(unit.arm, []).append(unit.run.metrics()["after"])
        if name not in by_arm[unit.arm][-1]:
            raise RunError("The validation split has no critical case; raise data.validation_size and change --output.")
    validation = {}
    for arm, runs in by_arm.items():
        means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0] if all(key in run for run in runs)}
        validation[arm] = {"mean": means.pop(name), "per_run": [run[name] for run in runs], "others": means}
        means.pop("loss", None)
    return validation


def _check_equal(units: Sequence[_Unit], names: Sequence[str]) -> None:
    """Raises RunError if runs of a fold differ in `names` (base weights, rows or steps), whatever their settings."""
    firsts: dict[str, tuple[Path, dict[str, Any]]] = {}
    for unit in units:
        metrics = unit.run.metrics()
        facts = {
            "base weights": metrics["model"].get("fingerprint"),
            "tokenizer": metrics["model"].get("prompt"),
            "steps": metrics["training"]["steps"],
            "rows": (metrics["data"]["rows"], metrics["weights"]["consultations"]),
        }
        origin, first = firsts.setdefault(unit.fold, (unit.run.folder, facts))
        if unit.arm in (PROMPT, CE_EXTRA):  # with the severity in its prompt, a row may not fit
            facts |= {name: first[name] for name in ("tokenizer", "steps", "rows")}
        if differing := [name for name in names if facts[name] != first[name]]:
            others = f"{origin} was (other {', '.join(differing)})"
            raise RunError(f"{unit.run.folder} was not trained as {others}; move the wrong one away, and run again.")


def _read_scores(units: Sequence[_Unit]) -> tuple[np.ndarray, dict[str, Scores]]:
    """Tokens (n,) of the references, and arm → metric → (seeds, n), in the order of the rows, fold after fold."""
    by_arm: dict[str, dict[int, list[Scores]]] = {}
    tokens: dict[str, np.ndarray] = {}
    for unit in units:
        own = _column(unit.run.folder / LIKELIHOOD, "arm", ADAPTER, unit.rows)["tokens"]
        first = tokens.setdefault(unit.fold, own)
        both = (first > 0) & (own > 0)  # with a severity in its prompt, a row may not fit
        if not np.array_equal(first[both], own[both]):
            raise RunError(f"{unit.run.folder} counted other tokens in the references than {units[0].run.folder}.")
        for column, arm in unit.columns.items():
            scores = _column(unit.run.folder / SCORES, "column", column, unit.rows)
            by_arm.setdefault(arm, {}).setdefault(unit.seed, []).append(scores)
    # Only scores that every arm has can be compared.
    parts = [part for seeds in by_arm.values() for folds in seeds.values() for part in folds]
    shared = [name for name in scoring.HEADLINE if all(name in part for part in parts)]
    return np.concatenate([*tokens.values()]), {
        arm: {
            name: np.stack([np.concatenate([fold[name] for fold in folds]) for folds in seeds.values()])
            for name in shared
        }
        for arm, seeds in by_arm.items()
    }


def _column(path: Path, key: str, name: str, rows: EvaluationRows) -> Scores:
    """Field → (n,) of the lines whose `key` is `name`; joined with the rows by id, never by position."""
    with path.open(encoding="utf-8") as file:
        lines = {line["id"]: line for _, line in json_lines(file, str(path)) if line[key] == name}
    if lines.keys() != set(rows.ids):
        raise RunError(f"{path} has scores of other rows; move it away and run this again, which writes it again.")
    # null becomes NaN.
    fields = lines[rows.ids[0]].keys() - {key, "id"}
    return {field: np.array([lines[identity][field] for identity in rows.ids], dtype=float) for field in fields}


def choose(validation: Mapping[str, Mapping[str, Any]], margin: float) -> str | None:
    """The weighted arm with the lowest cost, or None: validation NLL of critical cases + losses above the margin.

    `validation`: the result of `_validation`. A loss is that of another severity against plain CE.
    """
    plain = validation.get(CE, {}).get("others", {})

    def cost(arm: str) -> float:
        losses = (loss - plain.get(name, loss) - margin for name, loss in validation[arm]["others"].items())
        return float(validation[arm]["mean"]) + sum(max(0.0, loss) for loss in losses)

    return min((arm for arm in validation if arm in WEIGHTED), key=cost, default=None)


def same_rows(key: str, recipes: Sequence[Recipe], routing: bool) -> tuple[EvaluationRows, int, bool, np.ndarray]:
    """The test rows of all recipes, the number of training rows, whether the validation has critical cases, and routes.

    `routing`: with routes (n,), whether the router picks each test row; else none is picked. A UsageError if the key in
    which the recipes differ changes the test rows.
    """
    loaded = [load_splits(recipe) for recipe in recipes]
    tests = [test_rows(*data) for data in loaded]
    if len({rows.content_hash() for rows in tests}) > 1:
        raise UsageError(f"--vary {key} changes the test rows, which all arms must share; vary another key.")
    _, splits, severity = loaded[0]
    validated = [] if severity is None else severity.strata[source_index(splits.validation)]
    routes = np.zeros(len(tests[0]), dtype=bool)
    if routing and severity is not None:
        routes = routed_questions(splits.train, severity.strata[source_index(splits.train)], tests[0].questions)
    return tests[0], len(splits.train), SEVERITIES.index(CRITICAL) in validated, routes


def check_test_split(rows: EvaluationRows, folds: int | None = None) -> None:
    """Raises RunError if the test rows have too few critical cases for any result, before the first training."""
    if (rows.strata < 0).all():
        remedy = "set severity.source=rules, or compare ready-made weights with --arms base,ce,own,shuffled,constant"
        raise RunError(f"The data has no severity; add severity columns, {remedy}.")
    questions = len(np.unique(rows.groups[rows.strata == SEVERITIES.index(CRITICAL)]))
    if folds and questions < folds:
        raise RunError(f"The data has {questions} critical questions for --folds {folds}; write fewer folds.")
    if questions < 2:
        raise RunError(f"The test split has {questions} critical questions, too few; raise data.test_size.")
