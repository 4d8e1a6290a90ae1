"""Holds the arms of a comparison on one loaded base model: the base model itself, and adapters that are switched.

Nothing is reloaded between arms, with one exception that is found out by asking: some ways to start an adapter (OLoRA,
PiSSA) move a part of the base weights into it when it is attached, and what then stands below it is no longer the base
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sevpeft.errors import RunError
from sevpeft.evaluation.generation import GenerationSettings, Prediction, answering_as, generate
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.modeling.loading import choose_precision, load_config, load_model, load_tokenizer, uses_gpu
from sevpeft.modeling.prompts import Prompt
from sevpeft.modeling.saved_adapters import attach_adapter
from sevpeft.recipe import Recipe
from sevpeft.runs import Run
from sevpeft.training.data import prompt_of

Speaker = Callable[[EvaluationRows, Callable[[int], None]], Iterator[list[Prediction]]]

BASE, ADAPTER = "base", "adapter"


def check_adapter(run: Run) -> None:
    """Raises RunError when a run has no adapter yet."""
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise RunError(
            f"There is no adapter in {run.folder} yet; finish the run with `sevpeft train` and --resume, or name "
            "another one."
        )


class AdapterSwitch:
    """A base model with the adapters that stand on it.

    Args:
        recipe: names the base model and the prompt, the same for all arms.
        adapters: name of an arm → folder of its adapter; the base model is the arm `BASE`.

    Raises:
        ModelError: tokenizer or base model cannot be loaded.
    """

    def __init__(self, recipe: Recipe, adapters: Mapping[str, Path]) -> None:
        self.recipe = recipe
        self.adapters = dict(adapters)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(recipe, load_config(recipe))
        self.prompt: Prompt = prompt_of(recipe, self.tokenizer)
        self._model: PreTrainedModel | PeftModel | None = None
        self._altered_by: str | None = None

    @contextmanager
    def answering(self, arm: str) -> Iterator[PreTrainedModel]:
        """The model that speaks for an arm, in evaluation mode.

        Raises:
            ModelError: the adapter is damaged or does not fit the base model.
        """
        if self._model is None or self._altered_by not in (None, arm):
            self._model, self._altered_by = _load(self.recipe), None
        if arm == BASE and not isinstance(self._model, PeftModel):
            yield self._model
            return
        if arm != BASE and (not isinstance(self._model, PeftModel) or arm not in self._model.peft_config):
            self._attach(arm)
        with answering_as(self._model, None if arm == BASE else arm) as model:
            yield model

    @contextmanager
    def speaking(
        self, arm: str, settings: GenerationSettings, on_slow: Callable[[str], None] | None = None
    ) -> Iterator[Speaker]:
        """A function (rows, on_batch) → batches of predictions that answers as an arm; on_slow as in `generate`."""
        with self.answering(arm) as model:
            yield lambda rows, on_batch: generate(
                model, self.prompt, rows, settings, on_batch=on_batch, on_slow=on_slow
            )

    def forget(self) -> None:
        """Frees the memory of the model; it is loaded again when an arm is asked for."""
        self._model, self._altered_by = None, None
        torch.cuda.empty_cache()

    def _attach(self, arm: str) -> None:
        folder = self.adapters[arm]
        model = self._model
        assert model is not None
        if isinstance(model, PeftModel):
            with answering_as(model, None):
                before, again = _scores(model), _scores(model)
        else:
            before, again = _scores(model), _scores(model)
        self._model = None  # an adapter that is refused leaves it changed
        self._model = attach_adapter(model, folder, self.recipe, arm)
        with answering_as(self._model, None):
            shift = (_scores(self._model) - before).abs().max()
        # The same call again: equal to the bit, but for what the device's own kernels vary by.
        if not shift <= (again - before).abs().max():
            self._altered_by = arm


def _load(recipe: Recipe) -> PreTrainedModel:
    model = load_model(recipe, choose_precision(recipe))
    if uses_gpu(recipe) and not recipe.quantization.quantised():
        model = model.to("cuda")
    return model.eval()


@torch.no_grad()
def _scores(model: PreTrainedModel) -> torch.Tensor:
    """Log-probabilities (T, V) of a fixed text."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)
