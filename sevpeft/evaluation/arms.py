"""The arms of a controlled experiment: recipes that differ in the severity weights, or in another use of severity.

A gain over plain cross-entropy alone proves nothing about severity. So the weights have two controls: the same weights
shuffled over the consultations (same spread, no information) and their mean for all rows (same step size).
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from sevpeft.data.files import check_source
from sevpeft.data.split import question_keys
from sevpeft.errors import RunError, UsageError
from sevpeft.recipe import SEVERITY_PRESETS, Recipe, load_recipe
from sevpeft.runs import Run, check_one_process, check_run
from sevpeft.severity.probabilities import SEVERITIES

# The columns of one run are its base model and its adapter; in an experiment the base model is an arm.
BASE, ADAPTER = "base", "adapter"
CE, OWN, SHUFFLED, CONSTANT = "ce", "own", "shuffled", "constant"
CE_EXTRA, EXTRA = "ce_extra", 1.12  # ratio of its steps to those of plain CE; a late critical phase takes 12 % more
PROMPT, OVERSAMPLED = "prompt", "oversampled"
# Arms with the weights of the chosen arm.
CONTROLS = (SHUFFLED, CONSTANT, OVERSAMPLED)
# Alternatives to weights in the loss; each is compared with the chosen weights.
COMPETITORS = (OVERSAMPLED, PROMPT, CE_EXTRA)
# Arm → a setting of the recipe's curriculum (cumulative if the recipe has none). The first is compared with the others.
CURRICULA = {
    "curriculum": "order=easy_first",
    "curriculum_reverse": "order=hard_first",
    "curriculum_shuffled": "order=shuffled",
    "disjoint": "kind=disjoint",
    "competence": "kind=competence",
    "icft": "kind=icft",
}
# Arms that a claim can be about, and for each one a control with its weights, whichever arm is chosen.
WEIGHTED = (*SEVERITY_PRESETS, OWN)
TWINS = {f"{SHUFFLED}-{arm}": arm for arm in WEIGHTED}
# Arms that are not trained: the chosen weights answer the questions that a router picks, plain CE the others. The
# router of `routed` reads questions; that of `routed-gold`, an oracle, knows the severities.
ROUTED, ROUTED_GOLD, ROUTED_SHARE = "routed", "routed-gold", 0.2
ROUTED_SHUFFLED = f"{SHUFFLED}-{ROUTED}"
COMPOSED = (ROUTED, ROUTED_SHUFFLED, ROUTED_GOLD)
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
    ROUTED: f"the chosen weights for the {ROUTED_SHARE:.0%} of questions that a router finds most critical, else ce",
    ROUTED_SHUFFLED: "control: the shuffled weights for the same questions, else ce",
    ROUTED_GOLD: "oracle: the chosen weights for critical questions by their true severity, else ce",
    **{name: f"weight 1, and the recipe's curriculum with {setting}" for name, setting in CURRICULA.items()},
}
# `--vary ladder`: settings that undo one deviation of a recipe in as-published each, in the order of the steps.
LADDER = "ladder"
_PLAIN = (
    *("severity.reduction=tokens", "as_published.unnormalized=false", "as_published.no_end_token=false"),
    *("as_published.labels=answer", "severity.control=uniform", "curriculum.kind=none"),
    *("as_published.evaluation_template=null", "generation.do_sample=false"),
)
# --seeds sets the seed. The others change the tokens of the test answers, so their likelihoods are not comparable.
_NOT_VARIED = ("training.seed", "model.name_or_path", "model.revision", "training.max_length", "prompt.strip_marks")


def parse_arms(text: str) -> tuple[str, ...]:
    """The arms of a comma-separated list; a UsageError for an unknown arm, or if no arm is trained."""
    arms = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UsageError(f"Unknown arm {unknown[0]}; --arms takes {', '.join(ARMS)}, separated by commas.")
    if not set(arms) - {BASE, *COMPOSED}:
        raise UsageError("--arms names no arm to train; add ce or balanced.")
    return arms


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of a comma-separated list; a UsageError for anything else, or one number that may be a count."""
    words = [part.strip() for part in text.split(",") if part.strip()]
    seeds = tuple(int(word) for word in words if word.isascii() and word.isdigit() and int(word) < 2**32)
    if not words or len(set(seeds)) < len(words):
        raise UsageError(f"--seeds is {text!r}; write different whole numbers separated by commas, such as 0,1,2.")
    if len(seeds) == 1 and 2 <= seeds[0] <= 20 and "," not in text:
        several = ",".join(map(str, range(seeds[0])))
        raise UsageError(f"--seeds {text}: a count or a seed? Write --seeds {several}, or --seeds {text}, with comma.")
    return seeds


def parse_vary(text: str, path: Path, overrides: Sequence[str]) -> tuple[str, dict[str, list[str]]]:
    """The key of KEY=VALUE,VALUE…, and a mapping: name of an arm → its settings.

    With `LADDER` the first arm is plain training, and each further arm adds one deviation of the recipe.
    Commas within brackets do not separate values. A UsageError for fewer than two values, or a key that cannot vary.
    """
    if text == LADDER:
        recipe = load_recipe(path, overrides)
        undo = [setting for setting in _PLAIN if load_recipe(path, [*overrides, setting]) != recipe]
        if not undo:
            raise UsageError("--vary ladder: the recipe does not deviate; set keys of its section as_published.")
        names = ["ours", *(setting.split("=")[0].removeprefix("as_published.") for setting in undo)]
        return LADDER, {name: undo[number:] for number, name in enumerate(names)}
    key, _, values = text.partition("=")
    if key in _NOT_VARIED:
        raise UsageError(f"--vary {key}: its values cannot be compared by seeds and tokens; vary another key.")
    words = [word.strip() for word in re.split(r",(?![^\[{]*[\]}])", values) if word.strip()]
    arms = {re.sub(r"[^\w.+-]+", "_", word).strip("_."): [f"{key}={word}"] for word in words}
    if len(arms) < max(len(words), 2) or not all(arms) or BASE in arms:
        example = "training.learning_rate=1e-4,2e-4"
        raise UsageError(f"--vary is {text!r}; write a key and at least two different values, such as {example}.")
    return key, arms


def arm_of(path: Path, overrides: Sequence[str], arm: str, seed: int, controlled: str) -> tuple[Recipe, str]:
    """The recipe of an arm, equal to that of `sevpeft train` with the same settings, and the name of its run.

    `controlled`: the arm whose weights a control takes. A control's run is shuffled-balanced-0, others are balanced-0.
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


def references_of(arm: str, chosen: str | None = None) -> tuple[str, ...]:
    """The arms that an arm is compared with, plain CE first. No pair twice: shuffled − CE, and not CE − shuffled.

    Competitors are compared with the chosen weights too, outside the claim.
    """
    if arm in COMPOSED:
        return (CE, ROUTED_SHUFFLED, *([chosen] if chosen else [])) if arm == ROUTED else (CE,)
    if arm in CURRICULA:
        return (CE, *(other for other in CURRICULA if arm == "curriculum" != other))
    if arm in COMPETITORS and chosen:
        return (CE, SHUFFLED, chosen)
    twin = (f"{SHUFFLED}-{arm}",) if arm in WEIGHTED else ()
    return () if arm == CE else (CE,) if arm in (BASE, SHUFFLED, *TWINS) else (CE, SHUFFLED, *twin)


def check_arms(recipe: Recipe, arms: Sequence[str], output: Path) -> None:
    """Checks that arms differ in one thing only: raises UsageError if not, and RunError if output is a run."""
    if (output / "recipe.yaml").exists():
        raise RunError(f"{output} holds a run; give --output another folder.")
    if recipe.evaluation.judge and not recipe.evaluation.judge.url:
        raise UsageError("evaluation.judge.file is for `sevpeft report`, after the comparison; leave it out here.")
    if not arms:  # the values of --vary may differ in any key
        return
    training = recipe.training.settings()
    if recipe.severity.control != "none":
        raise UsageError("The arms set severity.control; leave it out.")
    # These give each arm its own number of steps, or its own batch size.
    if recipe.curriculum.epochs_per_stage is not None and set(CURRICULA) & set(arms):
        raise UsageError("With curriculum.epochs_per_stage the arms differ in their steps; leave it out.")
    for key in ("load_best_model_at_end", "auto_find_batch_size"):
        if training.get(key):
            raise UsageError(f"With training.{key} the arms differ in more than the weights; leave it out.")
    missing = {twin: arm for twin, arm in TWINS.items() if arm not in arms}
    missing |= {arm: SHUFFLED for arm in WEIGHTED if not {SHUFFLED, f"{SHUFFLED}-{arm}"} & {*arms}}
    missing |= {} if {*WEIGHTED} & {*arms} else dict.fromkeys(COMPOSED, "balanced")
    missing |= {} if SHUFFLED in arms else {ROUTED_SHUFFLED: SHUFFLED}
    missing |= {} if ROUTED_SHUFFLED in arms else {ROUTED: ROUTED_SHUFFLED}
    missing |= {} if CE in arms else dict.fromkeys((*WEIGHTED, *COMPOSED, CE_EXTRA), CE)
    if lone := [arm for arm in arms if arm in missing]:
        raise UsageError(f"The arm {lone[0]} needs the arm {missing[lone[0]]}; add that to --arms, or use --vary.")
    competing = [arm for arm in (OVERSAMPLED, PROMPT) if arm in arms]
    if competing and training.get("packing") and (training.get("max_steps") or -1) < 1:
        raise UsageError(f"With training.packing the arm {competing[0]} differs in steps; set training.max_steps.")
    if PROMPT in arms and recipe.prompt.severity != "none":
        raise UsageError("The arm prompt sets prompt.severity; leave out that key, or the arm.")


def routed_questions(train: datasets.Dataset, labels: np.ndarray, questions: Sequence[str]) -> np.ndarray:
    """(n,) bool: the `ROUTED_SHARE` of the questions that a router finds most critical.

    The router is a linear classifier of the training questions, fitted without their answers: at answer time there is
    none. It has not seen the test questions. `labels`: (rows of train,) position in SEVERITIES, -1 if unknown. Raises
    RunError: a severity is missing in the training rows.
    """
    from sevpeft.severity.classifier.examples import Examples
    from sevpeft.severity.classifier.linear import fit_linear

    known = np.flatnonzero(labels >= 0)
    if len(np.unique(labels[known])) < len(SEVERITIES):
        raise RunError(f"The arm {ROUTED} needs training rows of every severity; add such rows, or leave it out.")
    rows = train.select(known)
    router = fit_linear(Examples(rows["question"][:], labels[known], question_keys(rows), known))
    most_critical = np.argsort(-router.probabilities(questions)[:, -1], kind="stable")
    routed = np.zeros(len(questions), dtype=bool)
    routed[most_critical[: round(ROUTED_SHARE * len(questions))]] = True
    return routed


def check_adapter(run: Run) -> None:
    """Raises RunError if a run has no adapter yet."""
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise RunError(f"There is no adapter in {run.folder} yet; finish the run with `sevpeft train` and --resume.")


def opened_recipe(run: Run | Path | str, overrides: Sequence[str], verb: str, *sections: str) -> tuple[Run, Recipe]:
    """A finished run and its recipe, with overrides of these sections. All checks before rows are read are here."""
    check_one_process(verb)
    run = run if isinstance(run, Run) else Run(Path(run).expanduser())
    check_run(run.folder)
    if wrong := [one.split("=")[0] for one in overrides if one.split(".")[0] not in sections]:
        raise UsageError(f"{wrong[0]} has no effect here; {verb} takes keys of {' and '.join(sections)} only.")
    recipe = load_recipe(run.folder / "recipe.yaml", overrides)
    check_adapter(run)
    check_source(recipe.data)
    return run, recipe
