"""Computes with the model what is missing of a run's likelihoods and answers, and hands out all of them by row.

Both are kept in files that only grow (`predictions`), so that the model is not even loaded when nothing is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from sevpeft.evaluation.generation import GenerationSettings, Prediction
from sevpeft.evaluation.likelihood import reference_nll
from sevpeft.evaluation.predictions import LIKELIHOOD, PREDICTIONS, RowFile
from sevpeft.evaluation.progress import RowProgress
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.scoring import SHUFFLED, Likelihood, strangers
from sevpeft.evaluation.switching import ADAPTER, AdapterSwitch
from sevpeft.evaluation.vllm_engine import VllmEngine
from sevpeft.modeling.loading import choose_precision, load_config, load_tokenizer
from sevpeft.recipe import Recipe
from sevpeft.runs import Run, file_hash
from sevpeft.training.data import prompt_of
from sevpeft.training.progress import say

Backend = Literal["transformers", "vllm"]
# Likelihoods are kept after so many rows.
_AT_ONCE = 128


class RowWork:
    """The row-wise work of one evaluation.

    Args:
        every: rows of the split; what is kept belongs to them.
        rows: those of them that are evaluated.
        folder: where the files stand.
        adapters: arm → folder of its adapter.

    Raises:
        RunError: files that stand there were made from something else.
    """

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        every: EvaluationRows,
        rows: EvaluationRows,
        folder: Path,
        backend: Backend,
        adapters: dict[str, Path],
        console: Console,
    ) -> None:
        self.recipe, self.rows, self.every, self.backend, self.console = recipe, rows, every, backend, console
        self.adapters = adapters
        self.max_length = recipe.training.settings()["max_length"]
        self.settings = GenerationSettings(**recipe.generation.model_dump())
        # Shuffled among all rows, so that a limited evaluation has the same floor.
        self.shuffled = dict(zip(every.ids, strangers(every, recipe.evaluation.seed), strict=True))
        generation = {**recipe.generation.model_dump(), "backend": backend}
        del generation["per_device_eval_batch_size"]  # answers do not depend on it
        origin: dict[str, Any] = {
            "adapter": file_hash(run.adapter / "adapter_model.safetensors"),
            "model": recipe.model.model_dump(),
            "quantization": recipe.quantization.model_dump(),
            "dtype": str(choose_precision(recipe).dtype).removeprefix("torch."),
            "data": {"source": every.source, "rows": len(every), "content": every.content_hash()},
            "prompt": recipe.prompt.model_dump(),
        }
        self.origin = origin
        self.answer_origin = {**origin, "generation": generation}
        self.predictions = RowFile(folder / PREDICTIONS, self.answer_origin, ("prediction", "truncated", "lost_words"))
        shuffling = {"max_length": self.max_length, "evaluation": {"seed": recipe.evaluation.seed}}
        self.likelihoods = RowFile(folder / LIKELIHOOD, {**origin, **shuffling}, ("nll", "tokens"))
        self._switch: AdapterSwitch | None = None
        self._engine: VllmEngine | None = None

    def likelihood(self, arm: str) -> Likelihood:
        """Of an arm, or under the name SHUFFLED of the adapter with the references of other questions."""
        missing = self.likelihoods.missing(arm, self.rows.ids)
        speaker = ADAPTER if arm == SHUFFLED else arm
        if missing:
            switch = self._switched()
            progress = RowProgress(self.console, f"NLL, {arm}", len(missing))
            with progress, switch.answering(speaker) as model:
                for start in range(0, len(missing), _AT_ONCE):
                    part = self.rows.take(missing[start : start + _AT_ONCE])
                    nll, tokens = reference_nll(
                        model,
                        switch.prompt,
                        part,
                        max_length=self.max_length,
                        references=[self.shuffled[identity] for identity in part.ids] if arm == SHUFFLED else None,
                        on_batch=progress,
                    )
                    self.likelihoods.append(
                        [
                            {"arm": arm, "id": identity, "nll": float(sums) if count else None, "tokens": int(count)}
                            for identity, sums, count in zip(part.ids, nll, tokens, strict=True)
                        ]
                    )
        kept = self.likelihoods.rows(arm)
        found = [kept[identity] for identity in self.rows.ids]
        return Likelihood(
            np.array([np.nan if row["nll"] is None else row["nll"] for row in found]),
            np.array([row["tokens"] for row in found], dtype=np.int64),
        )

    def answers(self, arm: str) -> list[dict[str, Any]]:
        """Lines of predictions.jsonl, in the order of the rows."""
        missing = self.predictions.missing(arm, self.rows.ids)
        if missing:
            part = self.rows.take(missing)
            place = {identity: at for at, identity in enumerate(part.ids)}
            with RowProgress(self.console, f"Answers, {arm}", len(missing)) as progress, self._speaking(arm) as speak:
                for batch in speak(part, progress):
                    self.predictions.append([_line(arm, one, part, place[one.id]) for one in batch])
        kept = self.predictions.rows(arm)
        return [kept[identity] for identity in self.rows.ids]

    def about(self) -> dict[str, Any]:
        """What evaluation.json says about where its figures come from."""
        rows = self.rows
        data = {**self.origin["data"], "fingerprint": rows.fingerprint, "evaluated": len(rows), "leaks": rows.leaks}
        settings = {
            "generation": {**self.recipe.generation.model_dump(), "backend": self.backend},
            "evaluation": self.recipe.evaluation.model_dump(),
        }
        return {**self.origin, "data": data, **settings}

    def forget(self) -> None:
        """Frees the memory of the model, for another one that judges."""
        if self._switch is not None:
            self._switch.forget()
        self._engine = None

    def _switched(self) -> AdapterSwitch:
        if self._switch is None:
            with self.console.status(f"Loading {self.recipe.model.name_or_path}"):
                self._switch = AdapterSwitch(self.recipe, self.adapters)
        return self._switch

    def _speaking(self, arm: str) -> AbstractContextManager[Callable[..., Any]]:
        if self.backend == "vllm":
            if self._engine is None:
                if self._switch is not None:
                    self._switch.forget()  # the engine wants the memory for itself
                prompt = prompt_of(self.recipe, load_tokenizer(self.recipe, load_config(self.recipe)))
                self._engine = VllmEngine(self.recipe, prompt, self.adapters, self.settings)
            return self._engine.speaking(arm)
        return self._switched().speaking(arm, self.settings, lambda text: say(self.console, "Batches", text))


def _line(arm: str, one: Prediction, rows: EvaluationRows, at: int) -> dict[str, Any]:
    return {
        "arm": arm,
        "id": one.id,
        "question": rows.questions[at],
        "reference": rows.references[at],
        "prediction": one.text,
        "severity": rows.severity(at),
        "group": int(rows.groups[at]),
        "tokens": one.tokens,
        "truncated": one.truncated,
        "lost_words": one.lost_words,
    }
