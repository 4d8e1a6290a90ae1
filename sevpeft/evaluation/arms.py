"""The arms of a controlled experiment: recipes that differ in the severity weights, or in another use of severity.

A gain over plain cross-entropy proves nothing about severity, so beside the presets stand controls: the same weights
shuffled over the consultations (the same spread without the information) and their mean for all (the same step size).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sevpeft.data.files import check_source
from sevpeft.errors import RunError, UsageError
from sevpeft.recipe import SEVERITY_PRESETS, Recipe, load_recipe
from sevpeft.runs import Run, check_one_process, check_run

# The base model is an arm of a run, beside its adapter, and of an experiment.
BASE, ADAPTER = "base", "adapter"
CE, OWN, SHUFFLED, CONSTANT = "ce", "own", "shuffled", "constant"
CE_EXTRA, EXTRA = "ce_extra", 1.12  # its steps by those of plain CE: as many more as a late phase takes
PROMPT, OVERSAMPLED = "prompt", "oversampled"
# Arms that have the weights of another one.
CONTROLS = (SHUFFLED, CONSTANT, OVERSAMPLED)
# Other ways to a gain than weights in the loss; the chosen weights are compared with them.
COMPETITORS = (OVERSAMPLED, PROMPT, CE_EXTRA)
# Arm → a setting of the recipe's curriculum, which is cumulative where the recipe has none; the first is compared most.
CURRICULA = {
    "curriculum": "order=easy_first",
    **{"curriculum_reverse": "order=hard_first", "curriculum_shuffled": "order=shuffled"},
    **{"disjoint": "kind=disjoint", "competence": "kind=competence", "icft": "kind=icft"},
}
# Arms that a claim can be about, and of each the control that has its weights, whichever arm is chosen.
WEIGHTED = (*SEVERITY_PRESETS, OWN)
TWINS = {f"{SHUFFLED}-{arm}": arm for arm in WEIGHTED}
ARMS = {
    BASE: "the base model, not trained",
    CE: "plain cross-entropy: weight 1 for every consultation, through the same code",
    CE_EXTRA: f"plain cross-entropy with {EXTRA - 1:.0%} more steps",
    **{
        name: f"severity weights {', '.join(f'{weight:g}' for weight in weights)} (non-critical, neutral, critical)"
        for name, weights in SEVERITY_PRESETS.items()
    },
    OWN: "the recipe's own severity.weights",
    SHUFFLED: "control: the weights shuffled over the consultations",
    **{twin: f"control: the weights of {arm}, shuffled over the consultations" for twin, arm in TWINS.items()},
    CONSTANT: "control: the mean weight for every consultation",
    OVERSAMPLED: "competitor: rows drawn in proportion to the weights, each with weight 1",
    PROMPT: "competitor: weight 1, and the predicted severity in the prompt, in training and test",
    **{name: f"weight 1, and the recipe's curriculum with {setting}" for name, setting in CURRICULA.items()},
}


# `--vary ladder`: how is done here what a recipe may do as published, in the order of the steps.
LADDER = "ladder"
_PLAIN = (
    *("severity.reduction=tokens", "as_published.unnormalized=false", "as_published.no_end_token=false"),
    *("as_published.labels=answer", "severity.control=uniform", "curriculum.kind=none"),
    *("as_published.evaluation_template=null", "generation.do_sample=false"),
)
# Seeds are --seeds; the others change the tokens of the test's answers, and so what a likelihood is of.
_NOT_VARIED = ("training.seed", "model.name_or_path", "model.revision", "training.max_length", "prompt.strip_marks")


def parse_arms(text: str) -> tuple[str, ...]:
    """The arms of a comma-separated list; a UsageError where one is unknown or none of them is trained."""
    arms = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UsageError(f"There is no arm called {unknown[0]}; --arms takes {', '.join(ARMS)}, separated by commas.")
    if not set(arms) - {BASE}:
        raise UsageError("--arms names nothing to train; add ce or balanced.")
    return arms


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of a comma-separated list; a UsageError where one is no number, or one alone may be a count."""
    words = [part.strip() for part in text.split(",") if part.strip()]
    seeds = tuple(int(word) for word in words if word.isascii() and word.isdigit() and int(word) < 2**32)
    if not words or len(set(seeds)) < len(words):
        raise UsageError(f"--seeds is {text!r}; write different whole numbers separated by commas, such as 0,1,2.")
    if len(seeds) == 1 and 2 <= seeds[0] <= 20 and "," not in text:
        several = ",".join(map(str, range(seeds[0])))
        raise UsageError(f"--seeds {text}: so many, or one? Write --seeds {several}, or --seeds {text}, with a comma.")
    return seeds


def parse_vary(text: str, path: Path, overrides: Sequence[str]) -> tuple[str, dict[str, list[str]]]:
    """The key of KEY=VALUE,VALUE…, and its values: what each is called as an arm → its settings.

    Of `LADDER` the arms are plain training and, one step after another, what the recipe does otherwise.
    Commas within brackets part no values. A UsageError where no two differ, or the key may not differ between arms.
    """
    if text == LADDER:
        given = load_recipe(path, overrides)
        undone = [one for one in _PLAIN if load_recipe(path, [*overrides, one]) != given]
        if not undone:
            raise UsageError("--vary ladder: the recipe does nothing as published; see its section as_published.")
        names = ["ours", *(one.split("=")[0].removeprefix("as_published.") for one in undone)]
        return LADDER, {name: undone[number:] for number, name in enumerate(names)}
    key, _, values = text.partition("=")
    if key in _NOT_VARIED:
        raise UsageError(f"--vary {key}: the arms could not be compared by seeds and tokens; vary another key.")
    words = [word.strip() for word in re.split(r",(?![^\[{]*[\]}])", values) if word.strip()]
    named = {re.sub(r"[^\w.+-]+", "_", word).strip("_."): f"{key}={word}" for word in words}
    if len(named) < max(len(words), 2) or not all(named) or BASE in named:
        example = "training.learning_rate=1e-4,2e-4"
        raise UsageError(f"--vary is {text!r}; write a key and at least two different values, such as {example}.")
    return key, {name: [setting] for name, setting in named.items()}


def arm_of(path: Path, overrides: Sequence[str], arm: str, seed: int, controlled: str) -> tuple[Recipe, str]:
    """The recipe of an arm, that of `sevpeft train` with the same settings, and the name of its run.

    `controlled`: the arm whose weights a control has; its run is called shuffled-balanced-0, others balanced-0.
    """
    given, settings = load_recipe(path, overrides), [f"training.seed={seed}"]
    weights = controlled if arm in CONTROLS else TWINS.get(arm, arm)
    if weights in SEVERITY_PRESETS:
        settings.append(f"severity.weights={weights}")
        if given.severity.source == "weight":  # presets weigh by severity columns
            settings += ["severity.source=columns", "severity.weight_column=weight"]
    if arm in (CE, CE_EXTRA, *CONTROLS, *TWINS, *CURRICULA):
        settings.append(f"severity.control={arm if arm in CONTROLS else SHUFFLED if arm in TWINS else 'uniform'}")
    if arm == CE_EXTRA:
        own = given.training.settings()
        longer = "max_steps" if (own.get("max_steps") or -1) > 0 else "num_train_epochs"
        more = EXTRA * own[longer]
        settings.append(f"training.{longer}={math.ceil(more) if longer == 'max_steps' else round(more, 6)}")
    if arm == PROMPT:
        settings += ["severity.control=uniform", "prompt.severity=predicted"]
    if arm in CURRICULA:
        kind = ["curriculum.kind=cumulative"] * (given.curriculum.kind == "none")
        settings += [*kind, f"curriculum.{CURRICULA[arm]}"]
    elif given.curriculum.kind != "none":
        settings.append("curriculum.kind=none")
    name = f"{arm}-{controlled}-{seed}" if arm in CONTROLS else f"{arm}-{seed}"
    return load_recipe(path, [*overrides, *settings]), name


def check_arms(recipe: Recipe, arms: Sequence[str], output: Path) -> None:
    """Raises UsageError where arms would differ in more than weights or not at all, RunError where output is a run."""
    if (output / "recipe.yaml").exists():
        raise RunError(f"{output} holds a run; give --output a folder of its own.")
    if recipe.evaluation.judge and not recipe.evaluation.judge.url:
        raise UsageError("evaluation.judge.file is for `sevpeft report`, after the comparison; leave it out here.")
    if not arms:  # but values of a setting, in which they may differ
        return
    weights, training = recipe.severity.weights, recipe.training.settings()
    if recipe.severity.control != "none":
        raise UsageError("The arms set severity.control themselves; leave it out.")
    # Each would give every arm another number of steps, or another batch.
    if recipe.curriculum.epochs_per_stage is not None and set(CURRICULA) & set(arms):
        raise UsageError("With curriculum.epochs_per_stage arms would differ in their steps; leave it out.")
    for key in ("load_best_model_at_end", "auto_find_batch_size"):
        if training.get(key):
            raise UsageError(f"With training.{key} more than the weights would differ between arms; leave it out.")
    missing = {twin: arm for twin, arm in TWINS.items() if arm not in arms}
    missing |= {arm: SHUFFLED for arm in WEIGHTED if not {SHUFFLED, f"{SHUFFLED}-{arm}"} & {*arms}}
    missing |= dict.fromkeys((*WEIGHTED, CE_EXTRA), CE) if CE not in arms else {}
    if lone := [arm for arm in arms if arm in missing]:
        raise UsageError(f"The arm {lone[0]} stands without {missing[lone[0]]}; add that to --arms, or use --vary.")
    competing = [arm for arm in (OVERSAMPLED, PROMPT) if arm in arms]
    if competing and training.get("packing") and (training.get("max_steps") or -1) < 1:
        raise UsageError(f"With training.packing the arm {competing[0]} has other steps; set training.max_steps.")
    if PROMPT in arms and recipe.prompt.severity != "none":
        raise UsageError("The arm prompt sets prompt.severity itself; leave that out, or the arm.")
    if OWN in arms and isinstance(weights, str) and weights in arms and recipe.severity.source != "weight":
        raise UsageError(f"The recipe's own weights are {weights}, which is an arm already; drop one.")


def differences(stored: Any, now: Any, path: str = "") -> list[str]:
    """What differs between two nested mappings, as `key is this and was that`; long values by name alone."""
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        keys = sorted({**stored, **now})
        return [
            found for key in keys for found in differences(stored.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        ]
    if stored == now:
        return []
    before, after = (json.dumps(value, ensure_ascii=False) for value in (stored, now))
    return [f"{path} is {after} and was {before}" if max(len(before), len(after)) <= 40 else f"{path} is another"]


def check_adapter(run: Run) -> None:
    """Raises RunError when a run has no adapter yet."""
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise RunError(f"There is no adapter in {run.folder} yet; finish the run with `sevpeft train` and --resume.")


def opened_recipe(run: Run | Path | str, overrides: Sequence[str], verb: str, *sections: str) -> tuple[Run, Recipe]:
    """A finished run and its recipe, with overrides of these sections; raises what is refused before rows are read."""
    check_one_process(verb)
    run = run if isinstance(run, Run) else Run(Path(run).expanduser())
    check_run(run.folder)
    if wrong := [one.split("=")[0] for one in overrides if one.split(".")[0] not in sections]:
        raise UsageError(f"{wrong[0]} changes nothing here; {verb} takes keys of {' and '.join(sections)} only.")
    recipe = load_recipe(run.folder / "recipe.yaml", overrides)
    check_adapter(run)
    check_source(recipe.data)
    return run, recipe
