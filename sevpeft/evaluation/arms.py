"""Turns one recipe into the arms of a controlled experiment: recipes that differ in the severity weights alone.

A gain over plain cross-entropy proves nothing about severity, so beside the presets stand controls: the same weights
shuffled over the consultations (the same spread without the information) and their mean for all (the same step size).
What could make rows, steps or prompts differ between arms is refused here, before anything is trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from sevpeft.errors import RunError, SevpeftError, UsageError
from sevpeft.evaluation.predictions import differences
from sevpeft.recipe import SEVERITY_PRESETS, Recipe, load_recipe
from sevpeft.runs import Run, plain_disk_errors, write_atomically
from sevpeft.training.checkpoints import as_started

BASE_ARM, CE, OWN = "base", "ce", "own"
CONTROLS = ("shuffled", "constant")
# Arms that a verdict can be about.
WEIGHTED = (*SEVERITY_PRESETS, OWN)
ARMS = {
    BASE_ARM: "the base model, not trained",
    CE: "plain cross-entropy: weight 1 for every consultation, through the same code",
    **{
        name: "severity weights "
        + ", ".join(f"{weight:g}" for weight in weights)
        + " (non-critical, neutral, critical)"
        for name, weights in SEVERITY_PRESETS.items()
    },
    OWN: "the recipe's own severity.weights",
    "shuffled": "control: the weights shuffled over the consultations",
    "constant": "control: the mean weight for every consultation",
}
DEFAULT_ARMS = "base,ce,mild,balanced,strong,shuffled,constant"
COMMON_RECIPE = "common-recipe.yaml"
LOCKS = ".locks"
# What a kill can leave in a run folder before its recipe is written.
_BEFORE_THE_RECIPE = {"environment.json", "metrics.json", "log.jsonl", "checkpoints"}


def parse_arms(text: str) -> tuple[str, ...]:
    """The arms of a comma-separated list.

    Raises:
        UsageError: one is unknown or stands twice, or none of them is trained.
    """
    arms = tuple(part.strip() for part in text.split(",") if part.strip())
    for arm in arms:
        if arm not in ARMS:
            raise UsageError(f"There is no arm called {arm}; --arms takes {', '.join(ARMS)}, separated by commas.")
        if arms.count(arm) > 1:
            raise UsageError(f"The arm {arm} stands twice in --arms; name it once.")
    if not set(arms) - {BASE_ARM}:
        raise UsageError(f"--arms names nothing to train; the default is {DEFAULT_ARMS}.")
    return arms


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of a comma-separated list.

    Raises:
        UsageError: one is no number from 0 to 2³² − 1, or stands twice.
    """
    words = [part.strip() for part in text.split(",") if part.strip()]
    if not words or not all(word.isascii() and word.isdigit() and int(word) < 2**32 for word in words):
        raise UsageError(f"--seeds is {text!r}; write whole numbers separated by commas, such as 0,1,2.")
    seeds = tuple(int(word) for word in words)
    if len(set(seeds)) < len(seeds):
        raise UsageError(
            f"A seed stands twice in --seeds {text}; the same seed gives the same adapter, so name others."
        )
    return seeds


@dataclass(frozen=True)
class Experiment:
    """The arms of one recipe.

    Attributes:
        folder: where its runs stand.
        recipe: what all arms share, as it was given.
    """

    path: Path
    overrides: tuple[str, ...]
    folder: Path
    recipe: Recipe

    @classmethod
    def of(cls, path: Path, overrides: Sequence[str], output: Path) -> Experiment:
        """Raises RecipeError or UsageError: the recipe is wrong, or its arms could not be compared."""
        recipe = load_recipe(path, overrides)
        if recipe.severity.control != "none":
            raise UsageError(
                f"{path} trains a control itself (severity.control={recipe.severity.control}), and the arms set that; "
                "leave it out, or set severity.control=none."
            )
        training = recipe.training.settings()
        for key, why in (
            ("load_best_model_at_end", "would give every arm another number of steps"),
            ("auto_find_batch_size", "may give every arm another batch size"),
        ):
            if training.get(key):
                raise UsageError(f"training.{key} {why}, so that more than the weights would differ; leave it out.")
        return cls(path, tuple(overrides), output / recipe.name, recipe)

    def recipe_of(self, arm: str, seed: int, controlled: str) -> Recipe:
        """The recipe of an arm, the one that `sevpeft train` takes with the same settings.

        Args:
            controlled: whose weights the controls shuffle or average.
        """
        settings = [f"training.seed={seed}"]
        weights = controlled if arm in CONTROLS else arm
        if weights in SEVERITY_PRESETS:
            settings.append(f"severity.weights={weights}")
        if arm == CE:
            settings.append("severity.control=uniform")
        elif arm in CONTROLS:
            settings.append(f"severity.control={arm}")
        return load_recipe(self.path, [*self.overrides, *settings])

    def run_of(self, arm: str, seed: int, controlled: str) -> Run:
        """Where the run of an arm stands: balanced-0, and shuffled-balanced-0 for a control of balanced."""
        name = f"{arm}-{controlled}-{seed}" if arm in CONTROLS else f"{arm}-{seed}"
        return Run(self.folder / name)

    def claim_folder(self) -> None:
        """Makes the folder, or raises RunError when it holds another comparison."""
        common = self.folder / COMMON_RECIPE
        with plain_disk_errors(self.folder):
            if (self.folder.parent / "recipe.yaml").exists():
                raise RunError(f"{self.folder.parent} holds a run; give --output a folder of its own.")
            if common.exists() and not self._abandoned():
                self._refuse_other_recipe(common)
                return
            if not common.exists() and self.folder.exists() and any(self.folder.iterdir()):
                raise RunError(
                    f"{self.folder} holds something else than a comparison; give --output a folder that does not exist "
                    "yet."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(common, self.recipe.to_yaml(), shared=True)

    def _abandoned(self) -> bool:
        """Whether no run was begun before its recipe was refused, so that a corrected one may have the folder."""
        if {path.name for path in self.folder.iterdir()} - {COMMON_RECIPE, LOCKS}:
            return False
        for path in (self.folder / LOCKS).glob("*"):
            try:
                with FileLock(path, timeout=0):
                    continue
            except Timeout:  # another process is about to begin
                return False
        return True

    def state_of(self, run: Run, recipe: Recipe) -> str:
        """ "absent", "started" or "finished".

        Raises:
            RunError: the folder is damaged, or its run was trained by another recipe.
        """
        if not (run.folder / "recipe.yaml").exists():
            return self._absent(run)
        try:
            stored = load_recipe(run.folder / "recipe.yaml")
            finished = run.finished
        except (SevpeftError, ValueError, OSError, TypeError):
            raise RunError(_damaged(run)) from None
        if changed := sorted(differences(stored.model_dump(), as_started(recipe, run).model_dump())):
            raise RunError(
                f"{run.folder} was trained by another recipe: {'; '.join(changed)}. Compare with the same settings, or "
                "give another --output."
            )
        return "finished" if finished else "started"

    def _absent(self, run: Run) -> str:
        found = {path.name for path in run.folder.iterdir()} if run.folder.is_dir() else set()
        if any(name not in _BEFORE_THE_RECIPE and not name.startswith(".") for name in found):
            raise RunError(_damaged(run))
        # A training that was killed before it wrote its recipe; nothing in it can be continued.
        shutil.rmtree(run.folder, ignore_errors=True)
        return "absent"

    def _refuse_other_recipe(self, common: Path) -> None:
        try:
            stored = yaml.safe_load(common.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            stored = None
        if not isinstance(stored, dict):
            raise RunError(f"{common} cannot be read, so its runs belong to nothing; give another --output.")
        changed = sorted(differences(stored, yaml.safe_load(self.recipe.to_yaml())))
        if changed:
            raise RunError(
                f"{self.folder} holds the comparison of another recipe: {'; '.join(changed)}. Compare with the same "
                "settings, or give another --output."
            )


def experiments(paths: Sequence[Path], overrides: Sequence[str], arms: Sequence[str], output: Path) -> list[Experiment]:
    """The experiments of several recipes, each in a folder of its name.

    Raises:
        UsageError: a recipe cannot be compared, two have one name, or an arm is another under a second name.
    """
    found = [Experiment.of(path, overrides, output) for path in paths]
    names = [experiment.recipe.name for experiment in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"Two recipes are called {twice}, which is the name of their folder; rename one.")
    for experiment in found:
        weights = experiment.recipe.severity.weights
        if OWN in arms and isinstance(weights, str) and weights in arms:
            raise UsageError(f"The own weights of {experiment.path} are {weights}, which is an arm already; drop one.")
    return found


def _damaged(run: Run) -> str:
    return (
        f"{run.folder} is damaged, so it can be neither continued nor read; move it away and run this again, which "
        "trains that run anew and keeps the others."
    )
