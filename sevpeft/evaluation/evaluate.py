"""Turns a run into evidence: likelihoods and answers on its own test split, their scores, floors and intervals.

What is slow is kept row by row and never done twice; the scores are computed from it anew each time. Everything that
can be refused is refused before the model is loaded. Of the run's own files none is changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sevpeft.console import Screen
from sevpeft.errors import Interrupted, RunError, UsageError
from sevpeft.evaluation.generation import context_length, fitting_prompts
from sevpeft.evaluation.judging import Judging
from sevpeft.evaluation.metrics import METRICS, Scores, constant_answer
from sevpeft.evaluation.predictions import only_one_at_a_time
from sevpeft.evaluation.row_work import Backend, RowWork
from sevpeft.evaluation.rows import EvaluationRows, refuse_other_data, test_rows, training_answers
from sevpeft.evaluation.safety import lexicon_versions
from sevpeft.evaluation.scoring import (
    COLUMNS,
    CONSTANT,
    SHUFFLED,
    floor_scores,
    in_order,
    load_encoder,
    remarks,
    row_scores,
    summarise,
)
from sevpeft.evaluation.statistics import methods
from sevpeft.evaluation.switching import ADAPTER, BASE, check_adapter
from sevpeft.evaluation.vllm_engine import check_vllm
from sevpeft.modeling.loading import load_config, load_tokenizer
from sevpeft.recipe import Recipe, load_recipe
from sevpeft.runs import Run, check_run, write_atomically
from sevpeft.training.preparation import prompt_of

EVALUATION, SCORES = "evaluation.json", "scores.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """What was found out.

    Attributes:
        content: of evaluation.json.
        rows: that were evaluated, n of them.
        scores: column (adapter, base, shuffled, constant, reference) → score → (n,), NaN where a row has none.
        tokens: (n,) of the reference answers, 0 for a row that does not fit training.max_length.
    """

    content: dict[str, Any]
    rows: EvaluationRows
    scores: dict[str, Scores]
    tokens: np.ndarray


def run_recipe(run: Run, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run, with other settings of generation and evaluation where they are given.

    Raises:
        RunError: the folder holds no run.
        UsageError: an override changes what was trained.
    """
    check_run(run.folder)
    for override in overrides:
        if not override.startswith(("generation.", "evaluation.")):
            raise UsageError(
                f"{override.split('=')[0]} belongs to the training, which is over; evaluate takes generation.… and "
                "evaluation.… only."
            )
    return load_recipe(run.folder / "recipe.yaml", overrides)


def evaluate(
    run: Run,
    overrides: Sequence[str] = (),
    *,
    backend: Backend = "transformers",
    limit: int | None = None,
    arms: Sequence[str] = (ADAPTER, BASE),
    answers: bool = True,
    split: str = "test",
    floors: bool = True,
    console: Console | None = None,
) -> Evaluation:
    """Evaluates a run and writes predictions.jsonl, likelihood.jsonl, scores.jsonl and evaluation.json into it.

    Args:
        overrides: KEY=VALUE of the sections generation and evaluation.
        limit: a seeded sample of so many rows; a later evaluation of all rows goes on from it.
        arms: ADAPTER and BASE, or one of them.
        answers: generate and score answers; without, the likelihood alone is computed, in a fraction of the time.
        split: "test", or "validation" for what may still be chosen on; its files stand in RUN/validation/.
        floors: score the floors too; a comparison shows them once, not for every arm and seed.
        console: where progress is shown.

    Raises:
        SevpeftError: in one plain sentence; finished work is kept.
    """
    console = console or Screen(quiet=True)
    floors = floors and ADAPTER in arms
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("evaluate runs as one process; start it without accelerate, as `sevpeft evaluate RUN`.")
    recipe = run_recipe(run, overrides)
    check_adapter(run)
    adapters = {arm: run.adapter for arm in arms if arm != BASE}
    if backend == "vllm" and answers:
        check_vllm(recipe, adapters)
    every = test_rows(recipe, split)
    refuse_other_data(every, run)
    rows = every.limited(limit)
    _refuse_too_few(rows, every, limit)
    if answers:
        _refuse_no_room(recipe, rows)
    encoder, missing_encoder = load_encoder(recipe) if answers else (None, None)
    asked = recipe.evaluation.judge
    judging = Judging(recipe, asked, console) if asked and answers else None
    folder = run.folder if split == "test" else run.folder / split
    folder.mkdir(exist_ok=True)
    work = RowWork(run, recipe, every, rows, folder, backend, adapters, console)
    with only_one_at_a_time(folder):
        try:
            likelihood = {arm: work.likelihood(arm) for arm in (*arms, *([SHUFFLED] if floors else []))}
            said = {arm: work.answers(arm) for arm in arms} if answers else {}
            constant = constant_answer(training_answers(recipe)) if answers and floors else None
            judged = None
            if judging is not None:
                work.forget()
                to_judge = {arm: [row["prediction"] for row in lines] for arm, lines in said.items()}
                if constant is not None and BASE in arms:
                    to_judge[CONSTANT] = [constant] * len(rows)
                judged = judging.judge(rows, to_judge, folder, work.answer_origin)
        except KeyboardInterrupt as error:
            raise Interrupted("Interrupted; finished rows are kept, and the same command goes on from them.") from error
        with console.status("Scoring"):
            scores: dict[str, Scores] = {}
            for arm in arms:
                scores[arm] = {"nll": likelihood[arm].per_token()}
                if answers:
                    texts, truncated = [row["prediction"] for row in said[arm]], [row["truncated"] for row in said[arm]]
                    scores[arm] = row_scores(
                        rows,
                        texts,
                        truncated=truncated,
                        likelihood=likelihood[arm],
                        encoder=encoder,
                    )
            if floors:
                scores |= floor_scores(
                    rows,
                    [row["prediction"] for row in said[ADAPTER]] if answers else None,
                    [work.shuffled[identity] for identity in rows.ids],
                    constant,
                    shuffled_likelihood=likelihood[SHUFFLED],
                    encoder=encoder,
                )
            for column, by_name in judged.scores.items() if judged else ():
                scores[column] |= by_name
            meanings = METRICS | (judging.metrics if judging else {})
            tokens = {name: found.tokens for name, found in likelihood.items()}
            notes = [*remarks(rows), *([missing_encoder] if missing_encoder else []), *_notes(tokens[arms[0]], said)]
            notes += judged.notes if judged else []
            content = {
                **work.about(),
                "split": split,
                "scores": summarise(rows, scores, recipe, tokens=tokens, metrics=meanings),
                "columns": {name: text for name, text in COLUMNS.items() if name in scores},
                "metrics": {name: meanings[name].meaning() for name in in_order(scores)},
                "methods": methods(recipe.evaluation, "the strata of one score together"),
                "lexicons": lexicon_versions() if answers else {},
                **({"judge": judged.about} if judged else {}),
                "notes": notes,
            }
        _write(folder, content, rows, scores)
    return Evaluation(content, rows, scores, tokens[arms[0]])


def _notes(tokens: np.ndarray, said: dict[str, list[dict[str, Any]]]) -> list[str]:
    notes = []
    if unfit := int((tokens == 0).sum()):
        notes.append(
            f"{unfit:,} row{'s have' if unfit > 1 else ' has'} no NLL, because the answer leaves no room for a "
            "question in training.max_length."
        )
    lost = max((sum(row["lost_words"] > 0 for row in lines) for lines in said.values()), default=0)
    if lost:
        notes.append(f"{lost:,} question{'s were' if lost > 1 else ' was'} shortened to fit the model's context.")
    return notes


def _refuse_no_room(recipe: Recipe, rows: EvaluationRows) -> None:
    config = load_config(recipe)
    prompt = prompt_of(recipe, load_tokenizer(recipe, config))
    fitting_prompts(rows, prompt, context_length(config), recipe.generation.max_new_tokens)


def _refuse_too_few(rows: EvaluationRows, every: EvaluationRows, limit: int | None) -> None:
    questions = len(np.unique(rows.groups))
    if questions < 2:
        remedy = "raise --limit" if limit is not None and limit < len(every) else "train with a larger data.test_size"
        raise RunError(
            f"There {'is 1 question' if questions == 1 else 'are no questions'} to evaluate on, and one shows nothing; "
            f"{remedy}."
        )


def _write(folder: Path, content: dict[str, Any], rows: EvaluationRows, scores: dict[str, Scores]) -> None:
    """evaluation.json and scores.jsonl; more is not replaced by less, a whole evaluation not by a sample."""
    run = Run(folder)
    before = _before(folder / EVALUATION)
    if before.get("data", {}).get("evaluated", 0) > len(rows) or set(before.get("metrics", ())) > set(
        content["metrics"]
    ):
        content["notes"].append(f"{EVALUATION} is kept as it was, because it holds more than this.")
        return
    lines = [
        {"column": column, "id": identity}
        | {name: float(values[at]) if np.isfinite(values[at]) else None for name, values in by_name.items()}
        for column, by_name in scores.items()
        for at, identity in enumerate(rows.ids)
    ]
    write_atomically(folder / SCORES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    run.write_json(EVALUATION, content)


def _before(path: Path) -> dict[str, Any]:
    """An evaluation that is there already; empty when there is none that can be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
