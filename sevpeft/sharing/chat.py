"""Turns a run folder into somebody to ask: one question, one answer, with the very prompt of the training.

Every question stands alone, because the adapter was trained on single consultations; what was asked before is not
part of the prompt.
"""

from __future__ import annotations

import torch

from sevpeft.errors import RunError
from sevpeft.modeling.loading import choose_precision, load_config, load_model, load_tokenizer, uses_gpu
from sevpeft.modeling.prompts import Prompt
from sevpeft.modeling.saved_adapters import attach_adapter
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run


class Chat:
    """A trained adapter on its base model, ready to answer.

    Args:
        run: a finished run.

    Raises:
        RunError: the run has no adapter.
        ModelError: its base model cannot be loaded, or is not the one that the adapter was trained on.
    """

    def __init__(self, run: Run) -> None:
        if not (run.adapter / "adapter_model.safetensors").exists():
            raise RunError(
                f"There is no adapter in {run.folder} yet; finish the run with `sevpeft train` and --resume, or name "
                "another one."
            )
        recipe = load_recipe(run.folder / "recipe.yaml")
        self.tokenizer = load_tokenizer(recipe, load_config(recipe))
        self.prompt = Prompt.build(self.tokenizer, **recipe.prompt.model_dump())
        base = load_model(recipe, choose_precision(recipe))
        if uses_gpu(recipe) and not recipe.quantization.quantised():
            base = base.to("cuda")
        self.model = attach_adapter(base, run.adapter, recipe)

    @torch.no_grad()
    def answer(self, question: str, max_new_tokens: int = 128) -> str:
        """Answer to a question, greedy, of at most `max_new_tokens` tokens."""
        ids = torch.tensor(self.prompt.prompt_ids([question]), device=self.model.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.prompt.end_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        text: str = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip()
