"""Multiple choice: zero-shot accuracy of a run's base model and of its adapter, by lm-evaluation-harness.

It shows what fine-tuning made a model forget. Prompts and scores are the harness's; here rows are checked, batches are
filled, and intervals computed. Of a file, `text` compares the likelihoods of whole answers after a question without its
options (arXiv 2501.09825 scores answers so), `letter` those of letters after a question with them. `…_norm` divides a
log-likelihood by the characters of the option.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel

from sevpeft.console import Screen, row_progress
from sevpeft.data.read import look_for_hub
from sevpeft.data.split import question_key, question_keys
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError, SevpeftError, UsageError, first_sentence
from sevpeft.evaluation.arms import ADAPTER, BASE, check_adapter
from sevpeft.evaluation.generate import likelihood_batches
from sevpeft.evaluation.scores import ARABIC, methods
from sevpeft.evaluation.statistics import Estimate, compare_family, interval, paired_difference
from sevpeft.evaluation.tables import CHOICES, stored_choices
from sevpeft.modeling.adapters import attach_adapter
from sevpeft.modeling.loading import choose_precision, load_for_inference, resolve_model
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run, check_one_process, check_run, file_hash, json_lines
from sevpeft.training.checkpoints import check_same_data, run_lock
from sevpeft.training.data import load_splits

TASKS = Path(__file__).parent / "tasks"
_LETTERS = 26  # the most options that can be named
# Folders of the harness that are read first.
_OF_MEDICINE = ["mmlu/default", "mmlu/continuation", "medqa", "medmcqa", "pubmedqa"]
_OF_MEDICINE += ["arabic_leaderboard_complete/arabic_leaderboard_arabic_mmlu"]
Json = dict[str, Any]
Numbered = tuple[int, Json]
LeftOut = dict[str, list[int]]  # fault → numbers of rows
Accuracy = dict[tuple[str, str], np.ndarray]  # (name, score) → (n,) 1 for a right answer, else 0


class _Source(NamedTuple):
    """Rows, and the tasks of the harness that ask them, with positions of the documents that are asked (None: all)."""

    name: str
    scoring: str  # of a file text or letter, else task
    tasks: list[tuple[Any, list[int] | None]]
    rows: list[Numbered]
    left_out: LeftOut
    language: str | None = None  # of a file


def choices(
    run: Run | Path | str,
    tasks: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    limit: int | None = None,
    console: Console | None = None,
) -> Json:
    """Asks a run's base model and its adapter questions with options; writes and returns RUN/choices.json.

    Args:
        run: of `train`, or its folder.
        tasks: JSONL files of {question, options, answer_index, and perhaps context and id}, or names of tasks that the
            harness or the folder tasks/ knows.
        overrides: KEY=VALUE of the section evaluation.
        limit: a seeded sample of so many rows of each task; a larger one contains a smaller one.
    """
    check_one_process("choices")
    console = console or Screen(quiet=True)
    run = run if isinstance(run, Run) else Run(Path(run).expanduser())
    check_run(run.folder)
    if find_spec("lm_eval") is None:
        raise SevpeftError('Multiple choice needs lm-evaluation-harness: run pip install -e ".[choices]".')
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings quote rows
    if wrong := [one.split("=")[0] for one in overrides if not one.startswith("evaluation.")]:
        raise UsageError(f"{wrong[0]} changes nothing in multiple choice; choices takes evaluation.… only.")
    recipe = load_recipe(run.folder / "recipe.yaml", overrides)
    check_adapter(run)
    with console.status("Looking for the tasks"):
        files = {task: _read(Path(task)) for task in tasks if Path(task).is_file()}
        table, splits, _ = load_splits(recipe)
        check_same_data(table.fingerprint, table.source, run)
        trained = set(question_keys(splits.train).tolist())
        sources = [one for task, rows in files.items() for one in _of_file(Path(task).stem, rows, trained, limit)]
        sources += _of_names([task for task in tasks if task not in files], trained, limit)
    for source in sources:
        if not source.rows:
            raise DataError(" ".join([f"{source.name} has no row that can be asked; mend it.", *_notes(source)]))
    names = [task.task_name for source in sources for task, _ in source.tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--tasks asks {twice[0]!r} twice; leave one out, or rename its file.")
    with run_lock(run.folder):
        with console.status(f"Loading {recipe.model.name_or_path}"):
            prompt = resolve_model(recipe).prompt
            model = _language_model(load_for_inference(recipe), prompt, console)
        # The base model first: some adapters (lora.bias=all) change its weights when they are attached.
        accuracy = {BASE: _ask(model, sources, prompt)}
        model._model, model.arm = attach_adapter(model.model, run.adapter, recipe), ADAPTER
        accuracy[ADAPTER] = _ask(model, sources, prompt)
        compared, languages = _compared(sources, accuracy, recipe.evaluation)
        content = {
            "adapter": file_hash(run.adapter / "adapter_model.safetensors"),
            **{name: getattr(recipe, name).model_dump() for name in ("model", "quantization", "evaluation")},
            "dtype": str(choose_precision(recipe).dtype).removeprefix("torch."),
            "prompt": {"chat": prompt.chat, "system": prompt.system if prompt.chat else None},
            "harness": {"version": importlib.metadata.version("lm_eval"), "num_fewshot": 0, "softmax": "float32"},
            "limit": limit,
            "tasks": compared,
            "languages": languages,
            "methods": methods(recipe.evaluation, "all scores of one table together"),
            "notes": [note for source in sources if source.scoring != "letter" for note in _notes(source)],
        }
        if model.cut:
            content["notes"].append(f"Cut at the beginning to fit the model's context: {len(model.cut):,} questions.")
        if limit is not None and stored_choices(run).get("limit", limit) is None:
            content["notes"].append(f"{CHOICES} is kept as it was: a sample does not replace all rows.")
        else:
            run.write_json(CHOICES, content)
    return content


# Rows


def _read(path: Path) -> list[Numbered]:
    try:
        return list(json_lines(path.read_text(encoding="utf-8").split("\n"), str(path)))
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; convert it, for example with iconv.") from None


def _fault(row: Json, trained: set[int], seen: set[Any]) -> str | None:
    """Why a row cannot be asked. The harness would count most of these as wrong answers, in silence."""
    options, answer = row.get("options"), row.get("answer_index")
    texts: list[Any] = [row.get("question"), *options] if isinstance(options, list) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return "a question or an option that is no text"
    if not 3 <= len(texts) <= _LETTERS + 1:
        return f"fewer than 2 or more than {_LETTERS} options"
    if len({" ".join(option.split()) for option in texts[1:]}) < len(texts) - 1:
        return "equal options"
    if type(answer) is not int or not 0 <= answer < len(texts) - 1:
        return "an answer_index that is no option's"
    if {question_key(fold_for_matching(text), 0) for text in row.get("texts", texts[:1])} & trained:
        return "a question of the training rows"
    same, before = (fold_for_matching(texts[0]), str(row.get("context")), frozenset(texts[1:])), len(seen)
    seen.add(same)
    return "a repeated question" if len(seen) == before else None


def _kept(rows: Iterable[Numbered], trained: set[int], limit: int | None, left_out: LeftOut) -> list[Numbered]:
    """The rows that can be asked, at most `limit`; the numbers of the others go into `left_out`."""
    kept, seen = [], set[Any]()
    for number, row in rows:
        if fault := _fault(row, trained, seen):
            left_out.setdefault(fault, []).append(number)
        else:
            kept.append((number, row))
    if limit is not None:  # by id, so that a file and its translation give the same sample
        kept = sorted(kept, key=lambda one: question_key(str(one[1].get("id") or one[0]), 0))[:limit]
    return sorted(kept, key=lambda one: one[0])


def _of_file(name: str, rows: list[Numbered], trained: set[int], limit: int | None) -> list[_Source]:
    from lm_eval.api.task import ConfigurableTask

    left_out: LeftOut = {}
    columns = ("question", "options", "answer_index", "context", "id")
    rows = _kept([(n, {c: row.get(c) for c in columns}) for n, row in rows], trained, limit, left_out)
    language = "ar" if 2 * sum(bool(ARABIC.search(row["question"])) for _, row in rows) > len(rows) else "en"
    sources = [_Source(name, scoring, [], rows, left_out, language) for scoring in ("text", "letter")]
    data = [{c: row[c] for c in columns[:3]} | {"context": str(row["context"] or "")} for _, row in rows]
    for source in sources if rows else ():
        config = yaml.safe_load((TASKS / f"{source.scoring}_{language}.yaml").read_text(encoding="utf-8"))
        config |= {"task": f"{name}, {source.scoring}", "custom_dataset": lambda **_: {"test": Dataset.from_list(data)}}
        source.tasks.append((ConfigurableTask(config=config), None))
    return sources


def _of_names(names: Sequence[str], trained: set[int], limit: int | None) -> list[_Source]:
    """Named tasks with the harness's own prompts; the rows of a group are pooled."""
    from lm_eval import tasks as of_harness

    if not names:
        return []
    of_medicine = [Path(of_harness.__file__).parent / folder for folder in _OF_MEDICINE]
    manager = of_harness.TaskManager(include_path=[TASKS, *of_medicine], include_defaults=False)
    if any(name not in manager.task_index for name in names):
        manager = of_harness.TaskManager(include_path=TASKS)  # all 14,000, which takes many seconds
    sources = []
    for name in names:
        # The manager would take a path too, and a YAML file may name code to run.
        if name not in manager.task_index:
            raise UsageError(f"There is no file and no task {name!r}; `lm-eval ls tasks` lists the harness's tasks.")
        look_for_hub()
        try:
            tasks = manager.load([name])["tasks"].values()
        except Exception as error:  # whatever datasets, fsspec and the functions of a task raise
            reason = f"{type(error).__name__}: {first_sentence(error)}"
            raise DataError(f"The rows of {name} could not be loaded ({reason}); give them as a JSONL file.") from error
        source = _Source(name, "task", [], [], {})
        for task in tasks:
            if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or task.multiple_target:
                raise UsageError(f"{task.task_name} does not ask for one of several options; name another task.")
            task.set_config("num_fewshot", 0)
            rows = [(number, _row(task, document)) for number, document in enumerate(task.eval_docs, start=1)]
            if kept := _kept(rows, trained, limit, source.left_out):
                source.tasks.append((task, [number - 1 for number, _ in kept]))
                source.rows.extend(kept)
        sources.append(source)
    return sources


def _row(task: Any, document: Json) -> Json:
    """A document of the harness as a row of a file: its question is the prompt, and `texts` are all that it holds."""
    options, answer = list(task.doc_to_choice(document)), task.doc_to_target(document)
    if isinstance(answer, str):
        answer = options.index(answer) if answer in options else -1
    texts = [text for text in document.values() if isinstance(text, str)]
    return {"question": task.doc_to_text(document), "options": options, "answer_index": answer, "texts": texts}


def _notes(source: _Source) -> list[str]:
    """What was left out, by number of row, and whether questions differ in their number of options."""
    notes = []
    for fault, numbers in source.left_out.items():
        some = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
        notes.append(f"{source.name}: {len(numbers):,} rows left out, with {fault} (row {some}).")
    if len(counts := {len(row["options"]) for _, row in source.rows}) > 1:
        notes.append(f"{source.name}: rows have {min(counts)} to {max(counts)} options.")
    return notes


# Scores


def _language_model(base: PreTrainedModel, prompt: Prompt, console: Console) -> Any:
    """The harness's class around a loaded model, but with batches by tokens, and logits only where options stand.

    Its own batches have a fixed number of rows and logits at all positions: gigabytes for 250,000 tokens of vocabulary.
    `cut` collects prompts that do not fit the context: the harness cuts their beginning off.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        arm, keep, cut = BASE, 0, set[str]()

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with row_progress(console, f"Options, {self.arm}", len(requests)) as self.done:
                return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            # The harness reads options of one token, such as letters, off one forward pass, so they stay together.
            together: dict[tuple[int, ...], list[int]] = {}
            for at, ((text, _), context, option) in enumerate(requests):
                together.setdefault((*context, *option[:-1]), []).append(at)
                self.cut |= {text} if len(context) + len(option) > self.max_length + 1 else set()
            groups: list[list[int]] = list(together.values())
            answers: list[Any] = [None] * len(requests)

            def compute(batch: list[int]) -> list[tuple[int, Any]]:
                places = [at for group in batch for at in groups[group]]
                chunk = [requests[at] for at in places]
                lengths = [min(len(context) + len(option) - 1, self.max_length) for _, context, option in chunk]
                starts = [length - len(option) for length, (_, _, option) in zip(lengths, chunk, strict=True)]
                self.keep, self.batch_size_per_gpu = max(lengths) - min(starts), len(chunk)
                return list(zip(places, HFLM._loglikelihood_tokens(self, chunk, disable_tqdm=True), strict=True))

            sizes, remedy = [len(tokens) + 1 for tokens in together], "leave the rows with the longest questions out"
            for _batch, found in likelihood_batches(self.model, range(len(groups)), sizes, compute, remedy):
                for at, answer in found:
                    answers[at] = answer
                self.done(len(found))
            return answers

        def _model_call(self, inps: torch.Tensor, **_: Any) -> torch.Tensor:
            # The harness counts positions from the last one, so that the first ones may be left out.
            with torch.no_grad():
                return self.model(input_ids=inps, logits_to_keep=self.keep).logits

    # In bfloat16 log-probabilities would be equal where logits differ, and the first of equal options is taken.
    settings = {"softmax_dtype": "float32", "enable_thinking": False, "backend": "causal"}
    return Model(base, tokenizer=prompt.tokenizer, **settings)


def _ask(model: Any, sources: Sequence[_Source], prompt: Prompt) -> Accuracy:
    from lm_eval.api import task as of_harness
    from lm_eval.evaluator import evaluate
    from tqdm import tqdm

    of_harness.tqdm = partial(tqdm, disable=True)  # its bar over prompts has no other switch
    tasks = [pair for source in sources for pair in source.tasks]
    found = evaluate(
        lm=model,
        task_dict={"tasks": {task.task_name: task for task, _ in tasks}, "groups": {}},
        samples={task.task_name: positions for task, positions in tasks if positions},
        bootstrap_iters=0,
        apply_chat_template=prompt.chat,
        system_instruction=prompt.system if prompt.chat else None,
    )["samples"]
    accuracy = {}
    for source in sources:
        lines = [line for task, _ in source.tasks for line in found[task.task_name]]
        for name in ("acc", "acc_norm"):
            if all(name in line for line in lines):
                of = np.array([line[name] for line in lines])
                accuracy[source.name, source.scoring + name.removeprefix("acc")] = of
    return accuracy


def _compared(sources: Sequence[_Source], accuracy: Mapping[str, Accuracy], settings: Any) -> tuple[Json, list[Json]]:
    """Of each name its rows, chance and scores with adapter − base; and Arabic − English of rows with the same ids."""
    tasks: dict[str, Json] = {}
    changes: dict[Any, Estimate] = {}
    between: dict[Any, Estimate] = {}
    for source in sources:
        counts = np.array([len(row["options"]) for _, row in source.rows])
        about: Json = {"rows": len(counts), "language": source.language, "left_out": source.left_out, "scores": {}}
        about |= {"options": [int(counts.min()), int(counts.max())], "chance": float((1 / counts).mean())}
        scores = tasks.setdefault(source.name, about)["scores"]
        groups = np.array([fold_for_matching(row["question"]) for _, row in source.rows])
        for score in (source.scoring, f"{source.scoring}_norm"):
            of = {arm: by[source.name, score] for arm, by in accuracy.items() if (source.name, score) in by}
            if not of:  # not every task has the normalized score
                continue
            scores[score] = {arm: interval(one, groups, settings, share=True).as_dict() for arm, one in of.items()}
            changes[source.name, score] = paired_difference(of[ADAPTER], of[BASE], groups, settings, share=True)
            for other in (one for one in sources if (one.language, one.scoring) == ("en", source.scoring)):
                ids = {str(row["id"]): at for at, (_, row) in enumerate(other.rows) if row["id"] is not None}
                at = [n for n, (_, row) in enumerate(source.rows) if source.language == "ar" and str(row["id"]) in ids]
                to = [ids[str(source.rows[n][1]["id"])] for n in at]
                for arm in of if at else ():
                    pair = of[arm][at], accuracy[arm][other.name, score][to], groups[at]
                    between[source.name, other.name, score, arm] = paired_difference(*pair, settings, share=True)
    for (name, score), found in compare_family(changes, lambda _: "higher").items():
        tasks[name]["scores"][score]["difference"] = found
    pairs: dict[Any, Json] = {}
    for (name, other, score, arm), found in compare_family(between, lambda _: "neither").items():
        about = {"arabic": name, "english": other, "rows": found["rows"], "scores": {}}
        pairs.setdefault((name, other), about)["scores"].setdefault(score, {})[arm] = found
    return tasks, list(pairs.values())
