"""Trains every arm of a recipe with every seed, evaluates the runs, compares them and words the verdict.

A finished run is skipped, an interrupted one resumed, and one that another process has locked is left to it. So the
same command, started once on each GPU, shares the work, and each start gives the whole table.

The verdict was fixed before any test row is seen: the weights with the lowest validation NLL on critical cases, on the
test's critical cases, by NLL, against plain CE and against shuffled weights. A comparison has one p, corrected by Holm:
the two of the verdict (two for every recipe) together, and all others of the same score and recipe together.
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
from sevpeft.errors import Interrupted, RunError
from sevpeft.evaluation import scores as scoring
from sevpeft.evaluation.arms import ADAPTER, ARMS, BASE, CE, CONTROLS, OWN, SHUFFLED, WEIGHTED, experiments, state_of
from sevpeft.evaluation.evaluate import LIKELIHOOD, SCORES, evaluate, stored_evaluation, test_rows
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import ALL, CRITICAL, METRICS, SAFETY, Scores
from sevpeft.evaluation.statistics import POWER, estimate_text
from sevpeft.evaluation.tables import plain
from sevpeft.recipe import Recipe
from sevpeft.runs import Run, file_hash, json_lines, plain_disk_errors, write_atomically
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.data import load_splits
from sevpeft.training.train import train

COMPARISON = "comparison.json"
DEFAULT_ARMS = tuple(arm for arm in ARMS if arm != OWN)
# Weights of the controls where no weighted arm is compared.
_DEFAULT_CONTROLLED = "balanced"
PRIMARY = "nll"
# Every arm is compared with these, plain CE first.
REFERENCES = {CE: "plain CE", SHUFFLED: "shuffled weights"}
_VERBS = {"better": "lowers", "worse": "raises", "not distinguishable": "shows no difference in"}
_OUTCOMES = {"better": "better than", "worse": "worse than", "not distinguishable": "not distinguishable from"}
_REASONS = {
    "better": ", so knowing the severity helped",
    "not distinguishable": ", so severity need not be the reason",
    "worse": ", so severity is not the reason",
}


@dataclass(frozen=True)
class _Unit:
    """One run to train and evaluate; `columns` are those of its scores that are wanted → arm."""

    arm: str
    recipe: Recipe
    run: Run
    rows: EvaluationRows
    columns: dict[str, str]
    place: str

    def evaluated(self, answers: bool) -> bool:
        """Whether the run's evaluation is whole, and of this adapter, these rows and these settings."""
        stored = stored_evaluation(self.run)
        return (
            stored.get("adapter") == file_hash(self.run.adapter / "adapter_model.safetensors")
            and stored["data"]["content"] == self.rows.content_hash()
            and stored["data"]["evaluated"] == len(self.rows)
            and all(stored[name] == getattr(self.recipe, name).model_dump() for name in ("generation", "evaluation"))
            and self.columns.keys() <= stored["columns"].keys()
            and (not answers or "chrf" in stored["metrics"])
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
        output: folder of the comparison, whose runs stand in OUTPUT/RECIPE/ARM-SEED. They are kept when a SevpeftError
            ends the comparison.
        answers: generate and score answers; without, the likelihood alone is compared.
        on_trained: called with every run that was trained here.
    """
    arms = [arm for arm in ARMS if arm in arms]  # in the order of the table
    screen = console or Screen(quiet=True)
    found = {one.recipe.name: one for one in experiments(recipes, overrides, arms, output)}
    rows = {}
    for name, one in found.items():
        # As plain CE, which reads the same rows and needs no severity; `check_test_split` names what is missing.
        rows[name] = test_rows(*load_splits(one.recipe_of(CE, seeds[0], _DEFAULT_CONTROLLED)))
        check_test_split(rows[name], name)
    to_train = [arm for arm in arms if arm != BASE]

    def units(name: str, of: Sequence[str], controlled: str = "") -> list[_Unit]:
        one = found[name]
        return [
            _Unit(
                arm,
                one.recipe_of(arm, seed, controlled),
                run := one.run_of(arm, seed, controlled),
                rows[name],
                # The base model's scores stand in the first run.
                {ADAPTER: arm} | ({BASE: BASE} if BASE in arms and (arm, seed) == (to_train[0], seeds[0]) else {}),
                f"{name}/{run.folder.name}",
            )
            for seed in seeds
            for arm in to_train
            if arm in of
        ]

    def finish(unit_list: list[_Unit]) -> None:
        """Finishes the runs: first those that no other process has locked, then the others, once they are free."""
        for timeout in (0, -1):
            for number, unit in enumerate(unit_list, start=1):
                place = f"{unit.place} ({number} of {len(unit_list)})"
                locks = unit.run.folder.parent / ".locks"
                with plain_disk_errors(locks):
                    locks.mkdir(parents=True, exist_ok=True)
                lock = FileLock(locks / unit.run.folder.name, timeout=timeout)  # a kill releases it
                try:
                    with screen.status(f"{place}: waiting for the process that works on it"):
                        lock.acquire()
                except Timeout:
                    continue
                try:
                    _train_and_evaluate(unit, place, answers, screen, on_trained)
                finally:
                    lock.release()

    try:
        finish([unit for name in found for unit in units(name, [arm for arm in arms if arm not in CONTROLS])])
        validation = {name: _validation(units(name, WEIGHTED), name) for name in found}
        chosen = {name: choose(losses) for name, losses in validation.items()}
        controlled = {name: chosen[name] or _DEFAULT_CONTROLLED for name in found}
        finish([unit for name in found for unit in units(name, CONTROLS, controlled[name])])
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(
            "Interrupted; finished runs and rows are kept, and the same command goes on from them.",
            getattr(error, "exit_code", 130),
        ) from error
    with screen.status("Comparing"):
        summaries: dict[str, dict[str, Any]] = {}
        contents: dict[str, dict[str, Any]] = {}
        of_arms: dict[Any, Any] = {}
        for name, one in found.items():
            finished = units(name, to_train, controlled[name])
            _check_equal(finished)
            tokens, scores = _read_scores(finished)
            summaries[name], differences = scoring.summarize(
                name,
                rows[name],
                {arm: scores[arm] for arm in arms},
                one.recipe.evaluation,
                tokens=dict.fromkeys(arms, tokens),
                pairs={arm: references_of(arm) for arm in arms},
            )
            of_arms |= differences
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
                "notes": list(
                    dict.fromkeys(note for unit in finished for note in stored_evaluation(unit.run)["notes"])
                ),
            }
        scoring.add_comparisons(summaries, of_arms, lambda place: family_of(place, chosen))
        for name, summary in summaries.items():
            verdict, power = verdict_of(summary, chosen[name], len(seeds))
            contents[name] |= {"verdict": verdict, "power": power, "scores": summary}
        families = "the verdict's comparisons together, over all recipes; all others of a score and recipe together"
        shown = {metric for summary in summaries.values() for metric in summary[CRITICAL]["metrics"]}
        content = {
            "columns": {arm: ARMS[arm] for arm in arms},
            "seeds": list(seeds),
            "primary": {"metric": PRIMARY, "stratum": CRITICAL},
            "metrics": {name: METRICS[name] for name in METRICS if name in shown},
            "methods": scoring.methods(one.recipe.evaluation, families),
            "verdict": " ".join(f"{name}: " * (len(found) > 1) + of["verdict"] for name, of in contents.items()),
            "recipes": contents,
        }
        write_atomically(output / COMPARISON, json.dumps(content, ensure_ascii=False, indent=2) + "\n", shared=True)
    return content


def _train_and_evaluate(
    unit: _Unit, place: str, answers: bool, console: Console, on_trained: Callable[[Run], object] | None
) -> None:
    """As far as that is not done."""
    state = state_of(unit.run, unit.recipe)
    if state == "finished" and unit.evaluated(answers):
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


def _validation(units: Sequence[_Unit], name: str) -> dict[str, list[float]]:
    """Arm → validation NLL of critical cases of each seed, as the training measured it at its end."""
    losses: dict[str, list[float]] = {}
    for unit in units:
        loss = unit.run.metrics()["after"].get(f"loss_{CRITICAL}")
        if loss is None:
            raise RunError(
                f"The validation split of {name} has no critical case to choose the weights by; raise "
                "data.validation_size, and give another --output."
            )
        losses.setdefault(unit.arm, []).append(float(loss))
    return losses


def _check_equal(units: Sequence[_Unit]) -> None:
    """Raises RunError when runs differ in base weights, rows or steps, whatever their settings are."""
    first: dict[str, Any] = {}
    for unit in units:
        metrics = unit.run.metrics()
        found = {
            "base weights": metrics["model"].get("fingerprint"),
            "steps": metrics["training"]["steps"],
            "rows": (metrics["data"]["rows"], metrics["weights"]["consultations"]),
        }
        first = first or found
        if differing := [name for name, value in found.items() if value != first[name]]:
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
    return {
        field: np.array([lines[one][field] for one in rows.ids], dtype=float)
        for field in lines[rows.ids[0]]
        if field not in (key, "id")
    }


# Verdict


def references_of(arm: str) -> tuple[str, ...]:
    """What an arm is compared with. No pair twice: shuffled − CE, and not CE − shuffled."""
    return () if arm == CE else (CE,) if arm in (BASE, SHUFFLED) else tuple(REFERENCES)


def family_of(place: tuple[str, ...], chosen: Mapping[str, str | None]) -> tuple[str, ...]:
    """Equal for comparisons that are corrected together; chosen: recipe → the arm that validation chose."""
    name, stratum, metric, arm, _ = place
    return () if (stratum, metric, arm) == (CRITICAL, PRIMARY, chosen[name]) else (name, metric)


def choose(validation: Mapping[str, Sequence[float]]) -> str | None:
    """The weights with the lowest mean of the seeds' validation NLL (arm → nats a token); None where there are none."""
    return min((arm for arm in validation if arm in WEIGHTED), key=lambda arm: np.mean(validation[arm]), default=None)


def check_test_split(rows: EvaluationRows, name: str) -> None:
    """Raises RunError when the test split cannot show anything about critical cases, before anything is trained."""
    if (rows.strata < 0).all():
        raise RunError(f"The data of {name} has no severity; add severity columns, or set severity.source=rules.")
    questions = len(np.unique(rows.groups[rows.strata == SEVERITIES.index(CRITICAL)]))
    if questions < 2:
        raise RunError(f"The test split of {name} has {questions} critical questions, too few; raise data.test_size.")


def verdict_of(scores: Mapping[str, Any], chosen: str | None, seeds: int) -> tuple[str, str]:
    """The verdict, whose first sentence holds the gain beside its price, and what difference could have been found.

    Args:
        scores: one recipe's, with its comparisons. seeds: how many each arm was trained with.
    """
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
    if not set(outcomes.values()) <= set(_OUTCOMES):
        # No direction is claimed.
        sentences = [
            f"Too few critical questions ({scores[CRITICAL]['questions']:,}) to tell whether {chosen} helps them",
            f"NLL of critical cases against {REFERENCES[first]}: {sizes[first]}{price}",
            *(f"Against {REFERENCES[other]}: {sizes[other]}" for other in others),
        ]
        return ". ".join(sentences) + ".", f"{questions} are too few to show any difference; raise data.test_size."
    sentences = [
        f"{chosen} {_VERBS[outcomes[first]]} the NLL of critical cases against {REFERENCES[first]} ({sizes[first]})"
        f"{price}",
        *(f"Against {REFERENCES[other]} it {_VERBS[outcomes[other]]} that NLL ({sizes[other]})" for other in others),
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
    parts = [f"{_OUTCOMES[outcome]} {REFERENCES[reference]}" for reference, outcome in outcomes.items()]
    text = (" and " if len(set(outcomes.values())) == 1 else ", but ").join(parts)
    if SHUFFLED not in outcomes:
        text += "; without the arm shuffled, the reason may be another than severity"
    elif outcomes.get(CE) == "better":
        text += _REASONS[outcomes[SHUFFLED]]
    return text[0].upper() + text[1:]
