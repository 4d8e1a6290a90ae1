"""Chat with a trained adapter: one question, one answer, with the prompt of the training.

Every question stands alone, because the adapter was trained on single consultations.
"""

from __future__ import annotations

import torch

from sevpeft.evaluation.arms import check_adapter
from sevpeft.modeling.adapters import attach_adapter
from sevpeft.modeling.loading import load_for_inference, resolve_model
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.source import load_source


class Chat:
    """The adapter of a finished run on its base model, ready to answer; raises RunError or ModelError."""

    def __init__(self, run: Run) -> None:
        check_adapter(run)
        recipe = load_recipe(run.folder / "recipe.yaml")
        predicted, folder = recipe.prompt.severity == "predicted", recipe.severity.classifier
        self.classifier = load_source(None, folder, text="question") if predicted else None
        self.prompt = resolve_model(recipe).prompt
        self.model = attach_adapter(load_for_inference(recipe), run.adapter, recipe)

    @torch.no_grad()
    def answer(self, question: str, max_new_tokens: int = 128) -> str:
        """Answer to a question, greedy, of at most `max_new_tokens` tokens."""
        named = [SEVERITIES[self.classifier.probabilities([question]).argmax()]] if self.classifier else None
        ids = torch.tensor(self.prompt.prompt_ids([question], severities=named), device=self.model.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.prompt.end_id,
            pad_token_id=self.prompt.tokenizer.pad_token_id,
        )
        text: str = self.prompt.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip()
