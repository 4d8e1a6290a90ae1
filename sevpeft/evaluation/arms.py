"""The arms of a controlled experiment: recipes that differ in the severity weights alone, and base model and adapter.

A gain over plain cross-entropy proves nothing about severity, so beside the presets stand controls: the same weights
shuffled over the consultations (the same spread without the information) and their mean for all (the same step size).
What could make rows, steps or prompts differ between arms is refused here, before anything is trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sevpeft.errors import RunError, SevpeftError, UsageError
from sevpeft.modeling.loading import load_config, load_for_inference, load_tokenizer
from sevpeft.modeling.saved_adapters import attach_adapter
from sevpeft.recipe import SEVERITY_PRESETS, Recipe, load_recipe
from sevpeft.runs import Run
from sevpeft.training.checkpoints import as_started
from sevpeft.training.data import prompt_of

# Arms of one run.
BASE, ADAPTER = "base", "adapter"
# Arms of an experiment.
BASE_ARM, CE, OWN = "base", "ce", "own"
CONTROLS = ("shuffled", "constant")
# Arms that a verdict can be about.
WEIGHTED = (*SEVERITY_PRESETS, OWN)
ARMS = {
    BASE_ARM: "the base model, not trained",
    CE: "plain cross-entropy: weight 1 for every consultation, through the same code",
    **{
        name: f"severity weights {', '.join(f'{weight:g}' for weight in weights)} (non-critical, neutral, critical)"
        for name, weights in SEVERITY_PRESETS.items()
    },
    OWN: "the recipe's own severity.weights",
    "shuffled": "control: the weights shuffled over the consultations",
    "constant": "control: the mean weight for every consultation",
}
LOCKS = ".locks"
# What a kill can leave in a run folder before its recipe is written.
_BEFORE_THE_RECIPE = {"environment.json", "metrics.json", "log.jsonl", "checkpoints"}


def parse_arms(text: str) -> tuple[str, ...]:
    """The arms of a comma-separated list.

    Raises:
        UsageError: one is unknown, or none of them is trained.
    """
    arms = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UsageError(f"There is no arm called {unknown[0]}; --arms takes {', '.join(ARMS)}, separated by commas.")
    if not set(arms) - {BASE_ARM}:
        raise UsageError("--arms names nothing to train; add ce or balanced.")
    return arms


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of a comma-separated list.

    Raises:
        UsageError: one is no number from 0 to 2³² − 1, or stands twice, which would give the same adapter twice.
    """
    words = [part.strip() for part in text.split(",") if part.strip()]
    seeds = tuple(int(word) for word in words if word.isascii() and word.isdigit() and int(word) < 2**32)
    if not words or len(set(seeds)) < len(words):
        raise UsageError(f"--seeds is {text!r}; write different whole numbers separated by commas, such as 0,1,2.")
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

    def state_of(self, run: Run, recipe: Recipe) -> str:
        """ "absent", "started" or "finished".

        Raises:
            RunError: the folder is damaged, or its run was trained by another recipe.
        """
        damaged = RunError(
            f"{run.folder} is damaged, so it can be neither continued nor read; move it away and run this again, which "
            "trains that run anew and keeps the others."
        )
        if not (run.folder / "recipe.yaml").exists():
            found = {path.name for path in run.folder.iterdir()} if run.folder.is_dir() else set()
            if any(name not in _BEFORE_THE_RECIPE and not name.startswith(".") for name in found):
                raise damaged
            # A training that was killed before it wrote its recipe; nothing in it can be continued.
            shutil.rmtree(run.folder, ignore_errors=True)
            return "absent"
        try:
            stored, finished = load_recipe(run.folder / "recipe.yaml"), run.finished
        except (SevpeftError, ValueError, OSError, TypeError):
            raise damaged from None
        if changed := differences(stored.model_dump(), as_started(recipe, run).model_dump()):
            raise RunError(
                f"{run.folder} was trained by another recipe: {'; '.join(changed)}. Compare with the same settings, or "
                "give another --output."
            )
        return "finished" if finished else "started"


def experiments(paths: Sequence[Path], overrides: Sequence[str], arms: Sequence[str], output: Path) -> list[Experiment]:
    """The experiments of several recipes, each in a folder of its name.

    Raises:
        UsageError: a recipe cannot be compared, two have one name, or an arm is another under a second name.
        RunError: the output folder is a run.
    """
    if (output / "recipe.yaml").exists():
        raise RunError(f"{output} holds a run; give --output a folder of its own.")
    found = [Experiment.of(path, overrides, output) for path in paths]
    names = [experiment.recipe.name for experiment in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"Two recipes are called {twice}, which is the name of their folder; rename one.")
    for experiment in found:
        weights = experiment.recipe.severity.weights
        if OWN in arms and isinstance(weights, str) and weights in arms:
            raise UsageError(f"The own weights of {experiment.path} are {weights}, which is an arm already; drop one.")
    return found


def differences(stored: Any, now: Any) -> list[str]:
    """What differs between two nested mappings, as `key is this and was that`; long values by name alone."""
    return sorted(_differences(stored, now, ""))


def _differences(stored: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        for key in {**stored, **now}:
            yield from _differences(stored.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif stored != now:
        shown = [json.dumps(value, ensure_ascii=False) for value in (stored, now)]
        short = all(len(text) <= 40 for text in shown)
        yield f"{path} is {shown[1]} and was {shown[0]}" if short else f"{path} is another"


# Base model and adapter


def check_adapter(run: Run) -> None:
    """Raises RunError when a run has no adapter yet."""
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise RunError(
            f"There is no adapter in {run.folder} yet; finish the run with `sevpeft train` and --resume, or name "
            "another one."
        )


class AdapterSwitch:
    """A base model and a run's adapter on it, which is switched on and off without loading anything again.

    With one exception, which is measured: some ways to start an adapter (OLoRA, PiSSA) move a part of the base weights
    into it when it is attached, so that what stands below it is no longer the base model.

    Args:
        recipe: names the base model and the prompt.
        adapter: folder of the adapter.

    Raises:
        ModelError: tokenizer or base model cannot be loaded.
    """

    def __init__(self, recipe: Recipe, adapter: Path) -> None:
        self.recipe, self.adapter = recipe, adapter
        self.prompt = prompt_of(recipe, load_tokenizer(recipe, load_config(recipe)))
        self._model: PreTrainedModel | PeftModel | None = None
        self._base_changed = False

    @contextmanager
    def activate(self, arm: str) -> Iterator[PreTrainedModel]:
        """The model of an arm (BASE or ADAPTER), in evaluation mode.

        Raises:
            ModelError: the adapter is damaged or does not fit the base model.
        """
        if self._model is None or (arm == BASE and self._base_changed):
            self._model, self._base_changed = load_for_inference(self.recipe), False
        if arm != BASE and not isinstance(self._model, PeftModel):
            self._model = self._attached(self._model)
        if arm == BASE and isinstance(self._model, PeftModel):
            with self._model.disable_adapter():
                yield self._model
        else:
            yield self._model

    def _attached(self, base: PreTrainedModel) -> PeftModel:
        before, again = _scores(base), _scores(base)
        self._model = None  # an adapter that is refused leaves the base model changed
        model = attach_adapter(base, self.adapter, self.recipe)
        with model.disable_adapter():
            shift = (_scores(model) - before).abs().max()
        # The same call again: equal to the bit, but for what the device's own kernels vary by.
        self._base_changed = not shift <= (again - before).abs().max()
        return model


@torch.no_grad()
def _scores(model: PreTrainedModel) -> torch.Tensor:
    """Log-probabilities (T, V) of a fixed text."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)
