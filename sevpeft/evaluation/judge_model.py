"""Asks a judge that this process runs itself: an instruction-tuned model from a folder or the Hub, greedy, batched.

It is loaded when the first answer is to be judged and freed afterwards; nothing leaves the machine.
"""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console

from sevpeft.errors import ModelError
from sevpeft.evaluation.generation import GenerationSettings, context_length, generate
from sevpeft.evaluation.judge_endpoint import OnReply
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.modeling.loading import choose_precision, load_config, load_model, load_tokenizer, uses_gpu
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import JudgeSection, ModelSection, QuantizationSection, Recipe


class LocalJudge:
    """A model of this process.

    Args:
        recipe: says on which device and in which precision.
        settings: with model.

    Raises:
        ModelError: there is no such model, or it has no chat template.
    """

    def __init__(self, recipe: Recipe, settings: JudgeSection, console: Console) -> None:
        assert settings.model is not None
        self.settings, self.console = settings, console
        judge = ModelSection(name_or_path=settings.model)
        self.recipe = recipe.model_copy(update={"model": judge, "quantization": QuantizationSection()})
        self.config = load_config(self.recipe)
        tokenizer = load_tokenizer(self.recipe, self.config)
        if not tokenizer.chat_template:
            raise ModelError(
                f"{settings.model} has no chat template, so it cannot judge; name an instruction-tuned model in "
                "evaluation.judge.model."
            )
        self.prompt = Prompt.build(tokenizer, chat=True, template="{question}", answer_cue="")

    def ask(self, asked: dict[str, str], on_reply: OnReply) -> None:
        """Asks for every prompt.

        Args:
            asked: key → prompt.
            on_reply: told the key and the reply after every batch; None where the prompt is too long for the model.

        Raises:
            ModelError: the model cannot be loaded.
            RunError: one prompt alone does not fit the GPU's memory.
        """
        room = context_length(self.config)
        if room is not None:
            room -= self.settings.max_tokens
            lengths = map(len, self.prompt.prompt_ids(list(asked.values())))
            # Half a question would be rated as if it were the whole one.
            too_long = [key for key, length in zip(asked, lengths, strict=True) if length > room]
            for key in too_long:
                on_reply(key, None)
            asked = {key: prompt for key, prompt in asked.items() if key not in too_long}
        if not asked:
            return
        with self.console.status(f"Loading the judge, {self.settings.model}"):
            model = load_model(self.recipe, choose_precision(self.recipe))
            if uses_gpu(self.recipe):
                model = model.to("cuda")
        texts = list(asked.values())
        rows = EvaluationRows(
            ids=list(asked),
            questions=texts,
            references=texts,
            dialects=None,
            strata=np.full(len(texts), -1),
            groups=np.arange(len(texts)),
            source="",
            fingerprint="",
        )
        settings = GenerationSettings(
            max_new_tokens=self.settings.max_tokens, per_device_eval_batch_size=self.settings.concurrency
        )
        try:
            for batch in generate(model, self.prompt, rows, settings, on_slow=self.console.print):
                for one in batch:
                    on_reply(one.id, one.text)
        finally:
            del model
            torch.cuda.empty_cache()
