"""Answers the same prompts with a vLLM engine, whose LoRA adapter is named per request; where vLLM is installed.

The prompts are the training's token ids, the answers end with the training's end token alone, and the texts are
decoded here, so that a prediction means the same whichever engine wrote it. vLLM's kernels round differently: answers
of the two backends are not mixed in one file.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sevpeft.errors import ModelError, RunError, first_sentence
from sevpeft.evaluation.generation import (
    GenerationSettings,
    Prediction,
    context_length,
    fitting_prompts,
    prediction,
    row_seed,
)
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.switching import BASE, Speaker
from sevpeft.modeling.loading import choose_precision, load_config, resolved_name
from sevpeft.modeling.prompts import Prompt
from sevpeft.modeling.saved_adapters import check_base_weights
from sevpeft.recipe import Recipe
from sevpeft.runs import Run

# The engine batches by itself; so many rows are handed over and kept at once.
ROWS_AT_ONCE = 256
# What vLLM allows as max_lora_rank.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def check_vllm(recipe: Recipe, adapters: dict[str, Path]) -> None:
    """Refuses what the engine cannot do, before anything slow happens.

    Raises:
        RunError: vLLM is not installed.
        ModelError: the adapter holds more than the low-rank matrices that the engine reads.
    """
    if importlib.util.find_spec("vllm") is None:
        raise RunError(
            "vLLM is not installed here; leave --backend vllm out, or install it in an environment of its own "
            "(pip install vllm), because it pins other versions of torch and transformers."
        )
    if recipe.quantization.quantised():
        raise ModelError(
            "--backend vllm loads the base model unquantised, and this run was trained on a quantised one, so that its "
            "answers would be another model's; leave --backend vllm out."
        )
    for folder in adapters.values():
        config = _adapter_config(folder)
        for setting in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices"):
            if config.get(setting):
                raise ModelError(
                    f"The adapter in {folder} uses lora.{setting}, which vLLM does not read; leave --backend vllm out."
                )
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
            raise ModelError(
                f"The adapter in {folder} was started with {start}, which changes the base model as well, and vLLM "
                "would not know it; leave --backend vllm out."
            )


class VllmEngine:
    """A vLLM engine with the recipe's base model.

    Args:
        prompt: of the run; its token ids are what the engine is given.
        adapters: name of an arm → folder of its adapter.

    Raises:
        ModelError: the engine refuses the model, the machine has too little memory for it, or its weights are not those
            that an adapter was trained on.
    """

    def __init__(self, recipe: Recipe, prompt: Prompt, adapters: dict[str, Path], settings: GenerationSettings) -> None:
        import vllm
        from vllm.lora.request import LoRARequest

        self.prompt = prompt
        self.settings = settings
        self._params: Callable[..., Any] = vllm.SamplingParams
        self._requests = {
            arm: LoRARequest(arm, number, str(folder)) for number, (arm, folder) in enumerate(adapters.items(), start=1)
        }
        rank = max((int(_adapter_config(folder).get("r", 8)) for folder in adapters.values()), default=8)
        self.context = context_length(load_config(recipe))
        try:
            self._engine = vllm.LLM(
                model=resolved_name(recipe),
                revision=recipe.model.revision,
                trust_remote_code=recipe.model.trust_remote_code,
                dtype=str(choose_precision(recipe).dtype).removeprefix("torch."),
                enable_lora=bool(adapters),
                max_lora_rank=next((known for known in _RANKS if known >= rank), rank),
                max_loras=max(1, len(adapters)),
                generation_config="vllm",  # never the model's own penalties and limits
                seed=settings.seed,
            )
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise ModelError(
                f"vLLM refuses {recipe.model.name_or_path} ({first_sentence(error)}); leave --backend vllm out."
            ) from error
        for folder in adapters.values():
            check_base_weights(recipe, Run(folder.parent))

    @contextmanager
    def speaking(self, arm: str) -> Iterator[Speaker]:
        """A function (rows, on_batch) → batches of predictions that answers as an arm."""
        yield lambda rows, on_batch: self.generate(arm, rows, on_batch=on_batch)

    def generate(
        self, arm: str, rows: EvaluationRows, *, on_batch: Callable[[int], None] | None = None
    ) -> Iterator[list[Prediction]]:
        """Answers the rows' questions as an arm; see `generation.generate`."""
        settings = self.settings
        prompts, lost = fitting_prompts(rows, self.prompt, self.context, settings.max_new_tokens)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = range(start, min(start + ROWS_AT_ONCE, len(rows)))
            outputs = self._engine.generate(
                [{"prompt_token_ids": prompts[i]} for i in chunk],
                [self._sampling(rows.ids[i]) for i in chunk],
                lora_request=None if arm == BASE else self._requests[arm],
                use_tqdm=False,
            )
            done = [
                prediction(rows.ids[i], list(out.outputs[0].token_ids), self.prompt, lost[i])
                for i, out in zip(chunk, outputs, strict=True)
            ]
            if on_batch is not None:
                on_batch(len(done))
            yield done

    def _sampling(self, identity: str) -> Any:
        settings = self.settings
        drawing: dict[str, Any] = {"temperature": 0.0}
        if settings.do_sample:
            drawing = {
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k or -1,
                "seed": row_seed(identity, settings.seed) % 2**31,
            }
        return self._params(
            max_tokens=settings.max_new_tokens,
            repetition_penalty=settings.repetition_penalty,
            ignore_eos=True,  # one end for both backends: the training's
            stop_token_ids=[self.prompt.end_id],
            detokenize=False,
            **drawing,
        )


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise ModelError(
            f"{folder} has no adapter_config.json that can be read; train the run again, or copy the file back."
        ) from None
