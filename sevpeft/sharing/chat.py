"""Chat with a trained adapter, for `chat` and `web`: streams answers to the training prompt.

Severity and red flags are computed from the question alone. Earlier exchanges precede a question in the format of the
chat template; with a plain template, as prompts, answers and end tokens of the training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any, NamedTuple

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, StoppingCriteriaList

from sevpeft.errors import ModelError, RunError, UsageError
from sevpeft.evaluation.arms import check_adapter
from sevpeft.evaluation.generate import answer_tokens
from sevpeft.evaluation.safety import rules
from sevpeft.modeling.adapters import ADAPTER_CONFIG, adapter_folder, attach_adapter, read_adapter_config
from sevpeft.modeling.loading import check_form, load_config, load_for_inference, load_tokenizer, resolve_model
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe, load_recipe
from sevpeft.recipe.load import settings_from
from sevpeft.runs import Run, check_run
from sevpeft.severity.probabilities import SEVERITIES, is_answer
from sevpeft.severity.rules import STRENGTH
from sevpeft.severity.source import load_source

EMERGENCY = "قد تكون هذه حالة طارئة: اتصل بالإسعاف أو توجّه إلى أقرب طوارئ الآن، ولا تنتظر جواب هذا البرنامج."
_NOT_ALONE = " إن كنت تفكر في إيذاء نفسك فلا تبق وحدك: اتصل الآن بالإسعاف أو بشخص تثق به."
Exchanges = Sequence[tuple[str, str]]  # (question, answer), the earliest first


class QuestionSeverity(NamedTuple):
    """Severity of a question. `words`: matches of the rules, by level or by the context that discounts them."""

    name: str
    probabilities: dict[str, float]
    words: dict[str, list[str]]
    notice: str  # of an emergency, in Arabic, or ""


class Chat:
    """An adapter (run, folder or Hub id) on its base model. Setting `ended` stops an answer, for the process's end."""

    def __init__(self, source: Run | Path | str, overrides: Sequence[str] = ()) -> None:
        recipe, adapter, self.prompt = _open(str(source.folder if isinstance(source, Run) else source), overrides)
        self.settings, self._one_at_a_time, self.ended = recipe.generation, ThreadPoolExecutor(1), Event()
        classifier = recipe.severity.classifier
        if recipe.prompt.severity != "predicted" and not Path(classifier or "").expanduser().is_dir():
            classifier = None  # absent, and no prompt needs it
        self.source: Any = load_source(None, classifier, text="question")
        base = load_for_inference(recipe)
        base.generation_config = GenerationConfig()  # as in evaluation
        self._context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self.model = attach_adapter(base, adapter, recipe)

    def severity(self, question: str) -> QuestionSeverity:
        """Severity by the run's classifier, else by rules. A stated red flag of the rules always adds the notice."""
        matches, words = rules().matches(question), defaultdict[str, list[str]](list)
        for match in matches:
            words[match.context if match.discounted else match.level].append(match.words)
        chances = dict(zip(SEVERITIES, self.source.probabilities([question])[0].tolist(), strict=True))
        name = max(SEVERITIES, key=chances.__getitem__)
        stated = (match for match in matches if match.level == "critical" and match.evidence >= STRENGTH["M"])
        flags = {match.category for match in stated}
        notice = EMERGENCY if flags or name == "critical" else ""
        return QuestionSeverity(name, chances, dict(words), notice + _NOT_ALONE * ("suicidal" in flags))

    def fitting(self, question: str, earlier: Exchanges = ()) -> Exchanges:
        """The latest exchanges that fit the context with question and answer; UsageError if the question does not."""
        if not is_answer(question):
            raise UsageError("The question is empty; write it in words.")
        if any("\ud800" <= letter <= "\udfff" for letter in question):  # Python's form of bytes that are not UTF-8
            raise UsageError("The question is not UTF-8 text; convert the input, or set the terminal to UTF-8.")
        most = self.settings.max_new_tokens
        for first in range(len(earlier) + 1):
            if not self._context or len(self._prompt_ids(question, earlier[first:])) + most <= self._context:
                return earlier[first:]
        size, room = len(question.split()), f"{self._context:,} tokens beside an answer of {most:,}"
        raise UsageError(f"{size:,} words do not fit {room}; shorten them, or lower generation.max_new_tokens.")

    def stream(self, question: str, earlier: Exchanges = (), *, adapter: bool = True) -> Iterator[str]:
        """Yields the growing answer and finally the whole one. Closing the iterator stops the model.

        Drops exchanges that do not fit the context. With `adapter=False` the base model answers.
        """
        if not adapter and getattr(self.model.peft_config["default"], "bias", "none") != "none":
            raise UsageError("With lora.bias the base model has changed; compare the two with `sevpeft evaluate`.")
        if self.ended.is_set():
            return
        ids = self._prompt_ids(question, self.fitting(question, earlier))
        parts, stop, shown = SimpleQueue[list[int] | None](), Event(), ""
        decode = self.prompt.decode

        def each_token(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            parts.put(input_ids[0, len(ids) :].tolist())
            return torch.tensor([stop.is_set() or self.ended.is_set()], device=input_ids.device)

        def answer() -> list[int]:
            each = StoppingCriteriaList([each_token])
            with nullcontext() if adapter else self.model.disable_adapter():
                return answer_tokens(self.model, self.prompt, {"": ids}, self.settings, stopping_criteria=each)[0]

        future = self._one_at_a_time.submit(answer)
        future.add_done_callback(lambda _: parts.put(None))
        try:
            while (part := parts.get()) is not None:
                text = decode(part)
                if text != shown and text.startswith(shown) and text[-1] != "\ufffd":  # an incomplete character
                    yield (shown := text)
            yield decode(future.result())
        except torch.OutOfMemoryError as error:
            raise RunError("The answer does not fit the GPU's memory; shorten the question.") from error
        finally:
            stop.set()

    def _prompt_ids(self, question: str, earlier: Exchanges) -> list[int]:
        prompt, questions = self.prompt, [*(before for before, _ in earlier), question]
        severities: list[str | None] = [None] * len(questions)
        if prompt.severity == "predicted":
            severities = [SEVERITIES[best] for best in self.source.probabilities(questions).argmax(axis=1)]
        if prompt.chat or not earlier:
            with suppress(TemplateError):  # an exported plain template accepts single questions only
                return prompt.prompt_ids([question], severities=severities[-1:], earlier=[earlier])[0]
        first, *others = prompt.prompt_ids(questions, severities=severities)
        answers = prompt.answer_ids([answer for _, answer in earlier])
        for answer, ids in zip(answers, others, strict=True):
            begin = 1 if ids[0] == prompt.tokenizer.bos_token_id else 0
            first += answer + ids[begin:]
        return first


def _open(source: str, overrides: Sequence[str]) -> tuple[Recipe, Path, Prompt]:
    """Recipe, adapter folder and prompt of a run, or of an adapter without its run."""
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / ADAPTER_CONFIG).is_file():  # a pushed adapter has a recipe.yaml as well
        check_run(folder)
        check_adapter(Run(folder))
        recipe = load_recipe(folder / "recipe.yaml", overrides)
        return recipe, Run(folder).adapter, resolve_model(recipe, Run(folder)).prompt
    adapter = adapter_folder(source, "RUN_OR_REPO")
    config = read_adapter_config(adapter)
    names = {"name_or_path": "base_model_name_or_path", "revision": "revision"}
    given = [f"model.{key}={config[name]}" for key, name in names.items() if config.get(name)]
    recipe = settings_from(Recipe, [*given, "prompt.chat=true", *overrides])
    base = load_config(recipe)
    check_form(recipe, base)
    tokenizer = load_tokenizer(recipe, base, adapter) if (adapter / "tokenizer_config.json").is_file() else None
    if tokenizer is None or not tokenizer.chat_template:
        raise ModelError(f"{source} has no tokenizer with the training prompt as chat template; name the run's folder.")
    prompt = Prompt.build(tokenizer, base.get_text_config().vocab_size, **recipe.prompt.model_dump())
    return recipe, adapter, prompt
