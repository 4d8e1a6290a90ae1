"""Multiple choice: zero-shot accuracy of a run's base model and of its adapter, by lm-evaluation-harness.

`text` compares the likelihoods of whole answers after a question without its options (as arXiv 2501.09825). `letter`
compares those of letters after a question with its options. `…_norm` divides a log-likelihood by the option's
characters. The harness makes the prompts and scores; this module checks rows, sizes batches and computes intervals.
"""

import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from rich.console import Console

from sevpeft.console import Screen, row_progress
from sevpeft.data.read import look_for_hub
from sevpeft.data.split import question_key, question_keys
from sevpeft.data.text import ARABIC, fold_for_matching
from sevpeft.errors import DataError, SevpeftError, UsageError, first_sentence
from sevpeft.evaluation.arms import ADAPTER, BASE
from sevpeft.evaluation.evaluate import open_run
from sevpeft.evaluation.generate import batching
from sevpeft.evaluation.scores import methods
from sevpeft.evaluation.statistics import compare_family, interval, paired_difference
from sevpeft.modeling.adapters import attach_adapter
from sevpeft.modeling.likelihood import nll_of_pairs, nll_of_shared
from sevpeft.modeling.loading import load_for_inference, resolve_model
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import EvaluationSection
from sevpeft.runs import Run, json_lines

TASKS = Path(__file__).parent / "tasks"  # prompts for the harness; sets/ holds the addresses of published sets
Json = dict[str, Any]
Questions = dict[str, tuple[dict[int, Json], Json]]  # name → rows by number from 1, and facts about them
Accuracy = dict[tuple[str, str], np.ndarray]  # (name, score) → (n,) 1 for a right answer, else 0


def choices(
    run: Run | Path | str,
    tasks: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    limit: int | None = None,
    console: Console | None = None,
) -> Json:
    """Scores a run's base model and adapter on multiple-choice questions; returns the section of metrics.json.

    Args:
        tasks: JSONL files of {question, options, answer_index, optional context}, or names of published sets.
        overrides: KEY=VALUE of the section evaluation.
        limit: size of a seeded sample of each task; a larger sample contains a smaller one.
    """
    console = console or Screen(quiet=True)
    if find_spec("lm_eval") is None:
        raise SevpeftError('Multiple choice needs lm-evaluation-harness: run pip install -e ".[choices]".')
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings quote rows
    if len({Path(task).stem for task in tasks}) < len(tasks):
        raise UsageError("--tasks has two entries of the same name; leave one out, or rename its file.")
    with console.status("Looking for the questions"):
        run, recipe, _, splits, _ = open_run(run, overrides, "choices", "evaluation")
        trained = set(question_keys(splits.train).tolist())
        questions: Questions = {Path(task).stem: _checked(task, _read(task), trained, limit) for task in tasks}
    with console.status(f"Loading {recipe.model.name_or_path}"):
        prompt, model, cut = resolve_model(recipe, run).prompt, load_for_inference(recipe), set[str]()
    # The base model first: some adapters (lora.bias=all) change its weights when they are attached.
    accuracy = {BASE: _accuracy(model, prompt, questions, console, BASE, cut)}
    model = attach_adapter(model, run.adapter, recipe)
    accuracy[ADAPTER] = _accuracy(model, prompt, questions, console, ADAPTER, cut)
    return {
        **_compared(questions, accuracy, recipe.evaluation),
        **{"limit": limit, "cut": len(cut), "chat": prompt.chat, "harness": importlib.metadata.version("lm_eval")},
        "methods": methods(recipe.evaluation, "all scores of one table together"),
    }


def _read(task: str) -> dict[int, Json]:
    """Rows of a JSONL file or of a published set, by their number from 1."""
    from lm_eval.utils import apply_template

    if Path(task).is_file():
        return dict(json_lines(Path(task).read_text(encoding="utf-8", errors="replace").split("\n"), task))
    sets = {path.stem: path for path in sorted((TASKS / "sets").iterdir())}
    if task not in sets:
        raise UsageError(f"{task} is neither a file nor a published set; the sets are {', '.join(sets)}.")
    about = yaml.safe_load(sets[task].read_text(encoding="utf-8"))
    look_for_hub()
    try:
        parts = [datasets.load_dataset(name=name, **about["dataset"]) for name in about.get("names", [None])]
        rows = [json.loads(apply_template(about["row"], row)) for part in parts for row in part]
    except Exception as error:  # datasets and fsspec raise many kinds
        reason = f"{type(error).__name__}: {first_sentence(error)}"
        raise DataError(f"The rows of {task} could not be loaded ({reason}); give them as a JSONL file.") from error
    return dict(enumerate(rows, start=1))


def _checked(task: str, rows: dict[int, Json], trained: set[int], limit: int | None) -> tuple[dict[int, Json], Json]:
    kept, left_out, seen = dict[int, Json](), dict[str, list[int]](), dict[Any, int]()
    for number, cells in rows.items():
        row = {column: cells.get(column) for column in ("question", "context", "options", "answer_index")}
        if fault := _fault(number, row, trained, seen):
            left_out.setdefault(fault, []).append(number)
        else:
            kept[number] = row
    if not kept:
        faults = ", ".join(f"{len(numbers):,} with {fault}" for fault, numbers in left_out.items()) or "it is empty"
        raise DataError(f"{task} has no valid row ({faults}); correct the file.")
    # Sampled by number, so that a file and its translation give the same sample.
    kept = {n: kept[n] for n in sorted(sorted(kept, key=lambda number: question_key(str(number), 0))[:limit])}
    arabic = sum(bool(ARABIC.search(row["question"])) for row in kept.values())
    counts = np.array([len(row["options"]) for row in kept.values()])
    about = {"rows": len(kept), "options": [int(counts.min()), int(counts.max())], "chance": float((1 / counts).mean())}
    return kept, {**about, "language": "ar" if 2 * arabic > len(kept) else "en", "left_out": left_out, "scores": {}}


def _fault(number: int, row: Json, trained: set[int], seen: dict[Any, int]) -> str:
    """The fault of a row, or "". The harness would silently count most of these rows as wrong answers."""
    question, context, options, answer = row.values()
    texts = [question, *options, context or "-"] if isinstance(options, list) else [None]
    if not all(isinstance(text, str) and text.strip() and "\ufffd" not in text for text in texts):
        return "a question, option or context that is no text in UTF-8"
    folded = fold_for_matching(question)
    faults = {
        "fewer than 2 or more than 26 options": not 2 <= len(options) <= 26,
        "equal options": len({" ".join(option.split()) for option in options}) < len(options),
        "an answer_index that is no option's": type(answer) is not int or not 0 <= answer < len(options),
        "a question of the training rows": question_key(folded, 0) in trained,
    }
    if present := [fault for fault, holds in faults.items() if holds]:
        return present[0]
    # Last, so that a correct copy of a faulty row is kept.
    repeated = seen.setdefault((folded, context, frozenset(options)), number) != number
    return "a repeated question" if repeated else ""


def _accuracy(model: Any, prompt: Prompt, questions: Questions, console: Console, arm: str, cut: set[str]) -> Accuracy:
    """Right answers of a loaded model, by the harness; prompts that do not fit the context are added to `cut`.

    The harness's own batches have a fixed number of rows and logits at all positions, which take gigabytes with a
    large vocabulary. Here batches are sized by tokens, with logits at the options only.
    """
    import lm_eval.api as harness
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            cut.update(text for (text, _), *ids in requests if sum(map(len, ids)) > self.max_length + 1)
            whole = [((*context, *option)[-self.max_length - 1 :], len(option)) for _, context, option in requests]
            pairs, found = [(ids[:-length], ids[-length:]) for ids, length in whole], np.zeros((len(whole), 2))
            measure = nll_of_shared if batching(self.model, prompt.end_id)[0] else nll_of_pairs
            with row_progress(console, f"Options, {arm}", len(pairs)) as done:
                for numbers, values in measure(self.model, pairs, "use a larger one"):
                    found[numbers] = values
                    done(len(numbers))
            return [(-nats, not missed) for nats, missed in found.tolist()]

    harness.task.tqdm = harness.model.tqdm = lambda prompts, **_: prompts  # no option turns these bars off
    tasks = {}
    for (name, (rows, about)), scoring in product(questions.items(), ("text", "letter")):
        config = yaml.safe_load((TASKS / f"{scoring}_{about['language']}.yaml").read_text(encoding="utf-8"))
        letters = config.pop("letters", "")  # passed as a column, which is faster than a template
        data = datasets.Dataset.from_list([{**row, "letters": letters[: len(row["options"])]} for row in rows.values()])
        config |= {"task": f"{name}, {scoring}", "custom_dataset": lambda data=data, **_: {"test": data}}
        tasks[config["task"]] = harness.task.ConfigurableTask(config=config)
    # In bfloat16 different logits can give equal log-probabilities, and the first of equal options wins.
    settings = {"softmax_dtype": "float32", "enable_thinking": False, "batch_size": "auto"}
    samples = evaluate(
        lm=Model(model, "causal", tokenizer=prompt.tokenizer, **settings),
        task_dict={"tasks": tasks, "groups": {}},
        bootstrap_iters=0,
        apply_chat_template=prompt.chat,
        system_instruction=prompt.system if prompt.chat else None,
    )["samples"]
    return {
        (name, scoring + norm): np.array([line[f"acc{norm}"] for line in samples[f"{name}, {scoring}"]])
        for name, scoring, norm in product(questions, ("text", "letter"), ("", "_norm"))
    }


def _compared(questions: Questions, accuracy: Mapping[str, Accuracy], settings: EvaluationSection) -> Json:
    """Scores of each name, adapter − base, and Arabic − English for two files with the same answers."""
    tasks, languages, changes = {name: about for name, (_, about) in questions.items()}, Json(), {}
    for name, score in accuracy[BASE]:
        by_arm = {arm: right[name, score] for arm, right in accuracy.items()}
        groups = np.arange(len(by_arm[BASE]))  # every row is its own question
        means = {arm: interval(right, groups, settings, share=True).as_dict() for arm, right in by_arm.items()}
        tasks[name]["scores"][score] = means
        changes[name, score] = paired_difference(by_arm[ADAPTER], by_arm[BASE], groups, settings, share=True)
    for (name, score), difference in compare_family(changes, lambda _: "higher").items():
        tasks[name]["scores"][score]["difference"] = difference
    arabic, english = ([name for name in tasks if tasks[name]["language"] == one] for one in ("ar", "en"))
    for first, second in product(arabic, english):
        one, two = questions[first][0], questions[second][0]
        both = sorted(one.keys() & two.keys())
        if not both or any(one[number]["answer_index"] != two[number]["answer_index"] for number in both):
            continue
        at, to, groups = np.isin(list(one), both), np.isin(list(two), both), np.arange(len(both))
        for arm, score in product(accuracy, tasks[first]["scores"]):
            right = accuracy[arm]
            pair = paired_difference(right[first, score][at], right[second, score][to], groups, settings, share=True)
            languages.setdefault(f"{first} − {second}", {}).setdefault(score, {})[arm] = pair.as_dict()
    return {"tasks": tasks, "languages": languages}
