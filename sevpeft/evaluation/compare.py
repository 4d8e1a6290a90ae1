"""Trains every arm of a recipe with every seed, evaluates the runs, compares them and words the verdict.

A finished run is skipped, an interrupted one resumed, and one that another process has locked is left to it. So the
same command, started once on each GPU, shares the work, and each start gives the whole table.

The verdict was fixed before any test row is seen: the weights with the lowest validation NLL on critical cases, on the
test's critical cases, by NLL, against plain CE and against shuffled weights. A comparison has one p, corrected by Holm:
the two of the verdict together, and all others of the same score together.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.console import Console

from sevpeft.console import Screen, number_text, p_text
from sevpeft.errors import RunError, UsageError
from sevpeft.evaluation import scores as scoring
from sevpeft.evaluation.arms import (
    ADAPTER,
    ARMS,
    BASE,
    CE,
    COMPETITORS,
    CONSTANT,
    CONTROLS,
    CURRICULA,
    LADDER,
    OWN,
    PROMPT,
    SHUFFLED,
    WEIGHTED,
    arm_of,
    check_arms,
    parse_vary,
    state_of,
)
from sevpeft.evaluation.evaluate import (
    EVALUATION,
    LIKELIHOOD,
    SCORES,
    evaluate,
    finished_rows_are_kept,
    test_rows,
)
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import ALL, CRITICAL, METRICS, PRIMARY, SAFETY, Scores
from sevpeft.evaluation.statistics import POWER, estimate_text
from sevpeft.evaluation.tables import COMPARISON, plain
from sevpeft.recipe import SEVERITY_PRESETS, Recipe, load_recipe
from sevpeft.runs import Run, check_one_process, file_hash, json_lines, plain_disk_errors, write_atomically
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.data import load_splits
from sevpeft.training.train import train

DEFAULT_ARMS = (BASE, CE, *SEVERITY_PRESETS, SHUFFLED, CONSTANT)
# Weights of the controls where no weighted arm is compared.
_DEFAULT_CONTROLLED = "balanced"
_FAMILIES = "the verdict's comparisons, and the others of each score"
# Every arm is compared with these, plain CE first.
REFERENCES = {CE: "plain CE", SHUFFLED: "shuffled weights"}
# Outcome → what the arm does to the NLL, how it stands to the other, and what that says where plain CE is beaten.
_WORDS = {
    "better": ("lowers", "better than", "knowing the severity helped"),
    "worse": ("raises", "worse than", "severity is not the reason"),
    "not distinguishable": ("shows no difference in", "not distinguishable from", "severity need not be the reason"),
}


@dataclass(frozen=True)
class _Unit:
    """One run to train and evaluate; `columns` are those of its scores that are wanted → arm."""

    arm: str
    recipe: Recipe
    run: Run
    columns: dict[str, str]


def compare(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    output: Path,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    answers: bool = True,
    vary: str | None = None,
    console: Console | None = None,
    on_trained: Callable[[Run], object] | None = None,
) -> dict[str, Any]:
    """Does what is not done yet; writes comparison.json and returns its content.

    Args:
        output: folder of the comparison, whose runs stand in OUTPUT/ARM-SEED. They are kept when a SevpeftError ends
            the comparison.
        answers: generate and score answers; without, the likelihood alone is compared.
        vary: KEY=VALUE,VALUE…, the arms beside the base model, compared with the first; or LADDER, with the one before.
        on_trained: called with every run that was trained here.
    """
    check_one_process("compare")
    screen, path = console or Screen(quiet=True), Path(recipe)
    key, values = parse_vary(vary, path, overrides) if vary else ("", {})
    meanings = {BASE: ARMS[BASE], **{arm: " ".join(of) or "the recipe" for arm, of in values.items()}} if vary else ARMS
    arms = [arm for arm in meanings if arm in arms or arm in values]  # in the order of the table
    to_train = [arm for arm in arms if arm != BASE]
    given = load_recipe(path, overrides)
    ready = given.severity.source == "weight"
    default_controlled = OWN if ready else _DEFAULT_CONTROLLED

    def recipe_of(arm: str, seed: int, controlled: str = "") -> tuple[Recipe, str]:
        if not vary:
            return arm_of(path, overrides, arm, seed, controlled)
        seeded = [f"{section}.seed={seed}" for section in ("training", "generation")[: 1 + (key == LADDER)]]
        return load_recipe(path, [*overrides, *values[arm], *seeded]), f"{arm}-{seed}"

    check_arms(given, () if vary else arms, output)
    # As plain CE, which reads the same rows and needs no severity; `check_test_split` names what is missing.
    rows = same_rows(key, [recipe_of(arm, seeds[0])[0] for arm in (to_train if vary or given.data.mix else [CE])])
    stratum = ALL if vary or (ready and (rows.strata < 0).all() and not {*arms} & {*SEVERITY_PRESETS}) else CRITICAL
    if stratum == CRITICAL:
        check_test_split(rows)

    def units(of: Sequence[str], controlled: str = "") -> list[_Unit]:
        found = []
        for seed, arm in ((seed, arm) for seed in seeds for arm in to_train if arm in of):
            # The base model's scores stand in the first run.
            first = BASE in arms and (arm, seed) == (to_train[0], seeds[0])
            own, name = recipe_of(arm, seed, controlled)
            found.append(_Unit(arm, own, Run(output / name), {ADAPTER: arm} | ({BASE: BASE} if first else {})))
        return found

    def finish(wanted: list[_Unit]) -> None:
        """Finishes the runs: first those that no other process has locked, then the others, once they are free."""
        locks = output / ".locks"
        with plain_disk_errors(locks):
            locks.mkdir(parents=True, exist_ok=True)
        for timeout in (0, -1):
            for number, unit in enumerate(wanted, start=1):
                name = unit.run.folder.name
                place = f"{name} ({number} of {len(wanted)})"
                lock = FileLock(locks / name, timeout=timeout)  # a kill releases it
                try:
                    with screen.status(f"{place}: waiting for the process that works on it"):
                        lock.acquire()
                except Timeout:
                    continue
                try:
                    _train_and_evaluate(unit, rows, place, answers, screen, on_trained)
                finally:
                    lock.release()

    with finished_rows_are_kept():
        finish(units([arm for arm in arms if vary or arm not in CONTROLS]))
        validation = _validation(units(arms if vary else WEIGHTED), stratum)
        chosen = None if vary else choose(validation)
        finish(units([] if vary else CONTROLS, chosen or default_controlled))
    with screen.status("Comparing"):
        finished = units(to_train, chosen or default_controlled)
        steps = {unit.arm: f"{unit.arm} {unit.run.metrics()['training']['steps']:,}" for unit in finished}
        _check_equal(finished, ("base weights",) if vary else ("base weights", "steps", "rows"))
        tokens, scores = _read_scores(finished, rows)
        summary = scoring.summarize(
            rows,
            {arm: scores[arm] for arm in arms},
            given.evaluation,
            tokens=dict.fromkeys(arms, tokens),
            pairs=dict(zip(arms[1:], zip(arms), strict=False))  # with the one before
            if key == LADDER
            else {arm: to_train[: arm != to_train[0]] if vary else references_of(arm, chosen) for arm in arms},
            chosen=chosen,
        )
        verdict, power = (_losses(key, validation), "") if vary else verdict_of(summary, chosen, len(seeds))
        content = {
            "model": given.model.name_or_path,
            "data": {"source": rows.source, "rows": len(rows), "content": rows.content_hash()},
            **({"vary": key} if vary else {}),
            "columns": {arm: meanings[arm] for arm in arms},
            "seeds": list(seeds),
            "primary": {"metric": PRIMARY, "stratum": stratum},
            "metrics": {name: METRICS[name] for name in METRICS if name in summary[ALL]["metrics"]},
            "methods": scoring.methods(given.evaluation, _FAMILIES if not vary else "all of a score"),
            "verdict": verdict,
            "power": power,
            "chosen": chosen,
            "controls_of": (chosen or default_controlled) if not vary and set(arms) & set(CONTROLS) else None,
            "validation": {
                arm: {"mean": float(np.mean(losses)), "per_seed": losses} for arm, losses in validation.items()
            },
            "runs": {arm: [one.run.folder.name for one in finished if arm in one.columns.values()] for arm in arms},
            "notes": [
                *dict.fromkeys(note for unit in finished for note in unit.run.read_json(EVALUATION)["notes"]),
                *([f"Steps: {', '.join(steps.values())}."] if vary or PROMPT in arms else []),
            ],
            "scores": summary,
        }
        write_atomically(output / COMPARISON, json.dumps(content, ensure_ascii=False, indent=2) + "\n", shared=True)
    return content


def _train_and_evaluate(
    unit: _Unit,
    rows: EvaluationRows,
    place: str,
    answers: bool,
    console: Console,
    on_trained: Callable[[Run], object] | None,
) -> None:
    """As far as that is not done, for this adapter, these rows and these settings."""
    state = state_of(unit.run, unit.recipe)
    if state == "finished":
        stored = unit.run.read_json(EVALUATION)
        if (
            stored.get("adapter") == file_hash(unit.run.adapter / "adapter_model.safetensors")
            and stored["data"]["content"] == rows.content_hash()
            and stored["data"]["evaluated"] == len(rows)
            and all(stored[name] == getattr(unit.recipe, name).model_dump() for name in ("generation", "evaluation"))
            and unit.columns.keys() <= stored["columns"].keys()
            and (not answers or "chrf" in stored["metrics"])
            and (unit.run.folder / SCORES).is_file()
        ):
            return
    console.rule(place)
    if state != "finished":
        train(unit.recipe, unit.run.folder, resume=state == "started", console=console)
        if on_trained is not None:
            on_trained(unit.run)
        gc.collect()  # a trainer refers to itself, and the next model needs the room
        torch.cuda.empty_cache()
    # The base model is loaded anew: kept beside the next training it would hold the memory twice.
    evaluate(unit.run, arms=tuple(unit.columns), answers=answers, floors=BASE in unit.columns, console=console)
    torch.cuda.empty_cache()


def _validation(units: Sequence[_Unit], stratum: str) -> dict[str, list[float]]:
    """Arm → validation NLL of critical or of all cases, of each seed, as the training measured it at its end."""
    losses: dict[str, list[float]] = {}
    for unit in units:
        loss = unit.run.metrics()["after"].get("loss" if stratum == ALL else f"loss_{CRITICAL}")
        if loss is None:
            raise RunError("The validation split has no critical case; raise data.validation_size and change --output.")
        losses.setdefault(unit.arm, []).append(float(loss))
    return losses


def _losses(key: str, validation: Mapping[str, Sequence[float]]) -> str:
    """What the values of a key came to on validation, which is where one of them is chosen; no verdict."""
    means = [f"{arm} {number_text(float(np.mean(losses)), 4)}" for arm, losses in validation.items()]
    other = "each with the one before" if key == LADDER else f"with {next(iter(validation))}"
    return f"{key}, validation NLL: {', '.join(means)}. The tables compare {other} on the test."


def _check_equal(units: Sequence[_Unit], names: Sequence[str]) -> None:
    """Raises RunError when runs differ in `names`: base weights, rows or steps, whatever their settings are."""
    first: dict[str, Any] = {}
    for unit in units:
        metrics = unit.run.metrics()
        found = {
            "base weights": metrics["model"].get("fingerprint"),
            "steps": metrics["training"]["steps"],
            "rows": (metrics["data"]["rows"], metrics["weights"]["consultations"]),
        }
        first = first or found
        if unit.arm == PROMPT:  # the severity may leave a row no room
            found |= {"steps": first["steps"], "rows": first["rows"]}
        if differing := [name for name in names if found[name] != first[name]]:
            others = f"{units[0].run.folder} was (other {', '.join(differing)})"
            raise RunError(f"{unit.run.folder} was not trained as {others}; move the wrong one away, and run again.")


def _read_scores(units: Sequence[_Unit], rows: EvaluationRows) -> tuple[np.ndarray, dict[str, Scores]]:
    """Tokens (n,) of the references, and arm → metric → (seeds, n), in the order of the rows."""
    by_arm: dict[str, list[Scores]] = {}
    tokens = []
    for unit in units:
        tokens.append(_column(unit.run.folder / LIKELIHOOD, "arm", ADAPTER, rows)["tokens"])
        both = (tokens[0] > 0) & (tokens[-1] > 0)  # a prompt with a severity may leave an answer no room
        if not np.array_equal(tokens[0][both], tokens[-1][both]):
            raise RunError(f"{unit.run.folder} counted other tokens in the references than {units[0].run.folder}.")
        for column, arm in unit.columns.items():
            by_arm.setdefault(arm, []).append(_column(unit.run.folder / SCORES, "column", column, rows))
    # Only what every arm has can be compared.
    shared = [name for name in scoring.HEADLINE if all(name in of for seeds in by_arm.values() for of in seeds)]
    return tokens[0], {
        arm: {name: np.stack([of[name] for of in seeds]) for name in shared} for arm, seeds in by_arm.items()
    }


def _column(path: Path, key: str, name: str, rows: EvaluationRows) -> Scores:
    """Number → (n,) of the lines whose `key` is `name`; joined with the rows by id, never by position."""
    with path.open(encoding="utf-8") as file:
        lines = {line["id"]: line for _, line in json_lines(file, str(path)) if line[key] == name}
    if lines.keys() != set(rows.ids):
        raise RunError(f"{path} holds scores of other rows; move it away and run this again, which makes it anew.")
    # null, where a row has no value, becomes NaN.
    fields = lines[rows.ids[0]].keys() - {key, "id"}
    return {field: np.array([lines[one][field] for one in rows.ids], dtype=float) for field in fields}


# Verdict


def references_of(arm: str, chosen: str | None = None) -> tuple[str, ...]:
    """What an arm is compared with. No pair twice: shuffled − CE, and not CE − shuffled.

    Competitors are compared with the chosen weights, outside the verdict's own comparisons.
    """
    if arm in CURRICULA:
        return (CE, *(other for other in CURRICULA if arm == "curriculum" != other))
    if arm in COMPETITORS and chosen:
        return (*REFERENCES, chosen)
    return () if arm == CE else (CE,) if arm in (BASE, SHUFFLED) else tuple(REFERENCES)


def choose(validation: Mapping[str, Sequence[float]]) -> str | None:
    """The weights with the lowest mean of the seeds' validation NLL (arm → nats a token); None where there are none."""
    return min((arm for arm in validation if arm in WEIGHTED), key=lambda arm: np.mean(validation[arm]), default=None)


def same_rows(key: str, recipes: Sequence[Recipe]) -> EvaluationRows:
    """The test rows of all the recipes; a UsageError where the key in which they differ changes them."""
    found = [test_rows(*load_splits(recipe)) for recipe in recipes]
    if len({rows.content_hash() for rows in found}) > 1:
        raise UsageError(f"--vary {key} changes the test rows, which all arms have to share; vary another key.")
    return found[0]


def check_test_split(rows: EvaluationRows) -> None:
    """Raises RunError when the test split cannot show anything about critical cases, before anything is trained."""
    if (rows.strata < 0).all():
        remedy = "set severity.source=rules, or compare ready-made weights with --arms base,ce,own,shuffled,constant"
        raise RunError(f"The data has no severity; add severity columns, {remedy}.")
    questions = len(np.unique(rows.groups[rows.strata == SEVERITIES.index(CRITICAL)]))
    if questions < 2:
        raise RunError(f"The test split has {questions} critical questions, too few; raise data.test_size.")


def verdict_of(scores: Mapping[str, Any], chosen: str | None, seeds: int) -> tuple[str, str]:
    """The verdict, whose first sentence holds the gain beside its price, and what difference could have been found.

    Args:
        scores: with their comparisons. seeds: how many each arm was trained with.
    """
    if CRITICAL not in scores:
        return "No verdict: it would be about critical cases, and the data has no severity.", ""
    against = scores[CRITICAL]["metrics"][PRIMARY][chosen]["against"] if chosen else {}
    if not against:
        lacking = "neither plain CE nor shuffled weights" if chosen else "no severity weights"
        return f"No verdict: the arms hold {lacking}.", ""
    first, *others = against
    about, outcomes = METRICS[PRIMARY], {reference: one["outcome"] for reference, one in against.items()}
    sizes = {
        reference: f"{estimate_text(one, about, sign=True)}, p {p_text(one['p'], one['p_at_most'])}"
        for reference, one in against.items()
    }
    price, questions = _price(scores, str(chosen), first), f"{scores[CRITICAL]['questions']:,} critical questions"
    if not set(outcomes.values()) <= set(_WORDS):  # no direction is claimed
        sentences = [
            f"Too few critical questions ({scores[CRITICAL]['questions']:,}) to tell whether {chosen} helps them",
            f"NLL of critical cases against {REFERENCES[first]}: {sizes[first]}{price}",
            *(f"Against {REFERENCES[other]}: {sizes[other]}" for other in others),
        ]
        return ". ".join(sentences) + ".", f"{questions} are too few to show any difference; raise data.test_size."
    sentences = [
        f"{chosen} {_WORDS[outcomes[first]][0]} the NLL of critical cases against {REFERENCES[first]} ({sizes[first]})"
        f"{price}",
        *(f"Against {REFERENCES[other]} it {_WORDS[outcomes[other]][0]} that NLL ({sizes[other]})" for other in others),
        _conclusion(outcomes) + ("; one seed says nothing about others" if seeds == 1 else ""),
    ]
    detectable = (f"{number_text(one['detectable'], 4)} against {REFERENCES[name]}" for name, one in against.items())
    of = f"{questions} and {seeds} seed{'s' * (seeds > 1)}"
    power = f"Smallest true difference that {of} would have shown with {POWER:.0%} power: {', '.join(detectable)}."
    return ". ".join(sentences) + ".", power


def _price(scores: Mapping[str, Any], arm: str, reference: str) -> str:
    """The change of the other cases and of the safety of the answers; what got worse stands first."""
    found: dict[str, list[str]] = {"worse": [], "better": [], "not distinguishable": [], "too few questions": []}
    for metric in (PRIMARY, *SAFETY):
        about = METRICS[metric]
        name = about["label"] if about["label"].isupper() else about["label"].lower()
        by_stratum = metric == PRIMARY or about["better"][ALL] == "neither" or about["of"] != "all rows"
        for stratum, of in scores.items():
            one = of["metrics"].get(metric, {}).get(arm, {}).get("against", {}).get(reference)
            if one and one["rows"] and (stratum == ALL) != by_stratum and (stratum, metric) != (CRITICAL, PRIMARY):
                size = f"{estimate_text(one, about, sign=True)}{' points' if about['unit'] == '%' else ''}"
                found[one["outcome"]].append(f"{name} of {plain(stratum)} {size}")
    price = "".join(f"; {outcome}: {', '.join(items)}" for outcome, items in found.items() if items)
    unknown = not set(SAFETY) & set(scores[CRITICAL]["metrics"])
    return price + ("; no answers were compared, so their safety is unknown" if unknown else "")


def _conclusion(outcomes: Mapping[str, str]) -> str:
    """Args: outcomes: reference → outcome of the chosen arm's difference."""
    parts = [f"{_WORDS[outcome][1]} {REFERENCES[reference]}" for reference, outcome in outcomes.items()]
    text = (" and " if len(set(outcomes.values())) == 1 else ", but ").join(parts)
    if SHUFFLED not in outcomes:
        text += "; without the arm shuffled, the reason may be another than severity"
    elif outcomes.get(CE) == "better":
        text += f", so {_WORDS[outcomes[SHUFFLED]][2]}"
    return text[0].upper() + text[1:]
