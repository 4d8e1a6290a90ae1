"""Evaluation of a run on its own test split: likelihoods, answers, scores, floors and intervals.

What is slow is kept row by row and never done twice; the scores are computed from it anew each time. What can be
refused is refused before the model is loaded. Of the run's own files none is changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from transformers import PreTrainedModel

from sevpeft.console import Screen, print_labeled, row_progress
from sevpeft.data.read import Consultations, load_consultations
from sevpeft.data.split import question_keys
from sevpeft.errors import Interrupted, RunError, UsageError
from sevpeft.evaluation.arms import ADAPTER, BASE, AdapterSwitch, check_adapter, differences
from sevpeft.evaluation.generate import EvaluationRows, Prediction, generate, reference_nll
from sevpeft.evaluation.judge import JUDGEMENTS, Judge
from sevpeft.evaluation.safety import lexicon_versions
from sevpeft.evaluation.scores import (
    COLUMNS,
    CONSTANT,
    METRICS,
    SHUFFLED,
    Scores,
    constant_answer,
    floor_scores,
    in_order,
    load_encoder,
    other_references,
    remarks,
    row_scores,
    summarize,
)
from sevpeft.evaluation.statistics import methods
from sevpeft.modeling.loading import choose_precision
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe, load_recipe
from sevpeft.runs import Run, check_run, file_hash, keep_private, plain_disk_errors, write_atomically
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.data import load_splits, source_index

EVALUATION, SCORES = "evaluation.json", "scores.jsonl"
PREDICTIONS, LIKELIHOOD = "predictions.jsonl", "likelihood.jsonl"


def evaluate(
    run: Run | Path | str,
    overrides: Sequence[str] = (),
    *,
    limit: int | None = None,
    arms: Sequence[str] = (ADAPTER, BASE),
    answers: bool = True,
    floors: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates a run; writes predictions.jsonl, likelihood.jsonl, scores.jsonl and evaluation.json into it.

    Args:
        run: of `train`, or its folder.
        overrides: KEY=VALUE of the sections generation and evaluation.
        limit: a seeded sample of so many rows; a later evaluation of all rows goes on from it.
        arms: ADAPTER and BASE, or one of them.
        answers: generate and score answers; without, the likelihood alone is computed, in a fraction of the time.
        floors: score the floors too; a comparison shows them once, not for every arm and seed.
        console: where progress is shown.

    Returns:
        The content of evaluation.json.

    Raises:
        SevpeftError: in one plain sentence; finished work is kept.
    """
    console = console or Screen(quiet=True)
    run = run if isinstance(run, Run) else Run(Path(run).expanduser())
    floors = floors and ADAPTER in arms
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("evaluate runs as one process; start it without accelerate, as `sevpeft evaluate RUN`.")
    recipe = run_recipe(run, overrides)
    check_adapter(run)
    every = test_rows(recipe)
    check_same_data(every, run)
    rows = every.limited(limit)
    if len(np.unique(rows.groups)) < 2:
        remedy = "raise --limit" if len(rows) < len(every) else "train with a larger data.test_size"
        raise RunError(f"There are not two questions to evaluate on, and one shows nothing; {remedy}.")
    asked = recipe.evaluation
    encoder, missing_encoder = load_encoder(asked) if answers else (None, None)
    judge = Judge(asked.judge) if asked.judge and answers else None
    lock = FileLock(run.folder / ".evaluating", timeout=0)
    with plain_disk_errors(run.folder, remedy="evaluate a run that you may write to"):
        try:
            lock.acquire()
        except Timeout:
            raise RunError(f"{run.folder} is being evaluated by another process; wait for it.") from None
    try:
        work = _RowWork(run, recipe, every, rows, console)
        likelihood = {arm: work.likelihood(arm) for arm in (*arms, *([SHUFFLED] if floors else []))}
        lines = {arm: work.answers(arm) for arm in arms} if answers else {}
        texts = {arm: [line["prediction"] for line in of_arm] for arm, of_arm in lines.items()}
        constant = constant_answer(training_answers(recipe)) if answers and floors else None
        judged: dict[str, Scores] = {}
        judge_notes: list[str] = []
        if judge is not None:
            origin = {**work.answer_origin, "judge": judge.about}
            kept = RowFile(run.folder / JUDGEMENTS, origin, ("digest", "ratings", "reason"))
            with_floor = {CONSTANT: [constant] * len(rows)} if constant is not None and BASE in arms else {}
            judged, about_judge, judge_notes = judge.rate(
                rows, {**texts, **with_floor}, kept.lines, kept.append, console
            )
    except KeyboardInterrupt as error:
        raise Interrupted("Interrupted; finished rows are kept, and the same command goes on from them.") from error
    finally:
        (run.folder / ".evaluating").unlink(missing_ok=True)
        lock.release()
    with console.status("Scoring"):
        scores: dict[str, Scores] = {arm: {"nll": likelihood[arm][0]} for arm in arms}
        for arm, of_arm in lines.items():
            truncated = [line["truncated"] for line in of_arm]
            scores[arm] |= row_scores(rows, texts[arm], truncated=truncated, encoder=encoder)
        if floors:
            shuffled = [work.shuffled[identity] for identity in rows.ids]
            scores[SHUFFLED] = {"nll": likelihood[SHUFFLED][0]}
            if constant is not None:
                for column, by_name in floor_scores(rows, texts[ADAPTER], shuffled, constant, encoder).items():
                    scores[column] = scores.get(column, {}) | by_name
        for column, by_name in judged.items():
            scores[column] |= by_name
        meanings = METRICS | (judge.metrics if judge else {})
        tokens = {name: of_arm for name, (_, of_arm) in likelihood.items()}
        content = {
            **work.about(),
            "split": "test",
            "scores": summarize(rows, scores, asked, tokens=tokens, metrics=meanings),
            "columns": {name: text for name, text in COLUMNS.items() if name in scores},
            "metrics": {name: meanings[name].meaning() for name in in_order(scores)},
            "methods": methods(asked, "the strata of one score together"),
            "lexicons": lexicon_versions() if answers else {},
            **({"judge": about_judge} if judge else {}),
            "notes": [
                *remarks(rows),
                *([missing_encoder] if missing_encoder else []),
                *_losses(tokens[arms[0]], lines),
                *judge_notes,
            ],
        }
        _write(run, content, rows, scores)
    return content


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


# Rows


def test_rows(recipe: Recipe, split: str = "test") -> EvaluationRows:
    """Rows of the test split of a run with this recipe, or of its validation split.

    Raises:
        RunError: the run kept no test rows.
        SevpeftError: the data cannot be read any more.
    """
    table, splits, severity = load_splits(recipe)
    rows = splits.test if split == "test" else splits.validation
    if len(rows) == 0:
        raise RunError(
            "The run kept no rows for the test (data.test_size=0), and rows that were trained on prove nothing; train "
            "again with data.test_size=0.1, or with a split column that names test rows."
        )
    taken = source_index(rows)
    read = rows.select_columns([name for name in ("id", "question", "answer", "dialect") if name in rows.features])[:]
    return EvaluationRows(
        ids=[str(identity) for identity in read["id"]],
        questions=list(read["question"]),
        references=list(read["answer"]),
        dialects=[name or None for name in read["dialect"]] if "dialect" in read else None,
        strata=np.full(len(rows), -1) if severity is None else np.asarray(severity.strata[taken], dtype=np.int64),
        groups=np.unique(_groups(recipe, table)[taken], return_inverse=True)[1].astype(np.int64),
        source=table.source,
        fingerprint=table.fingerprint,
        leaks=splits.leaks,
    )


def _groups(recipe: Recipe, table: Consultations) -> np.ndarray:
    """(n,) groups of the table's rows: near-duplicates where `sevpeft prepare` found them, else equal questions."""
    if not table.provenance:
        return question_keys(table.rows)
    again = load_consultations(recipe.data.path, max_rows=recipe.data.max_rows, keep=("group",))
    number = dict(zip(again.rows["row"], again.rows["group"], strict=True))
    return np.asarray([int(number[row]) for row in table.rows["row"]], dtype=np.int64)


def training_answers(recipe: Recipe, most: int = 10_000) -> list[str]:
    """A seeded sample of the answers that the run was trained on, for floors that may not see the test."""
    _, splits, _ = load_splits(recipe)
    chosen = np.random.default_rng(0).permutation(len(splits.train))[:most]
    return list(splits.train.select(np.sort(chosen))["answer"])


def check_same_data(rows: EvaluationRows, run: Run) -> None:
    """Raises RunError when the data's content is not that of the training: the test rows would be others."""
    stored = run.environment().get("data_fingerprint")
    if stored and rows.fingerprint != stored and rows.fingerprint.startswith("sha256:"):
        raise RunError(
            f"{rows.source} is not the data that {run.folder} was trained on: its content has changed, so that the "
            "test rows would be others; bring that content back."
        )


# Work that is kept


class RowFile:
    """Lines {"arm": …, "id": …, …} of one origin in a file that only grows, so that a kill costs one batch.

    Beside `predictions.jsonl` stands `predictions.about.json`, which says from which adapter, rows, prompt and settings
    the lines come.

    Args:
        path: of the .jsonl file, which need not exist.
        origin: what the lines depend on, as nested plain values.
        fields: that every line has beside arm and id.

    Attributes:
        lines: (arm, id) → line.

    Raises:
        RunError: the lines that are there have another origin or none.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any], fields: Collection[str] = ()) -> None:
        self.path = path
        self.about = path.with_suffix(".about.json")
        self.lines: dict[tuple[str, str], dict[str, Any]] = {}
        # Read back as it was written, or 1 and 1.0, tuples and lists would differ.
        self._origin: dict[str, Any] = json.loads(json.dumps(origin, ensure_ascii=False))
        if path.exists() and path.stat().st_size:
            self._check_origin()
            self._read(fields)

    def of(self, arm: str, ids: Iterable[str]) -> list[dict[str, Any]]:
        """The lines of an arm, in the order of the ids."""
        return [self.lines[arm, identity] for identity in ids]

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Adds lines and hands them to the operating system in one piece."""
        with plain_disk_errors(self.path, when_full="free some, then run this again (finished answers are kept)"):
            if not self.about.exists() or not self.path.exists():
                write_atomically(self.about, json.dumps(self._origin, ensure_ascii=False, indent=2) + "\n")
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "ab") as file:
                keep_private(self.path)  # an earlier version or a copy may have left it open to others
                file.write(text.encode())
        for line in lines:
            self.lines.setdefault((line["arm"], line["id"]), line)

    def _check_origin(self) -> None:
        try:
            stored = json.loads(self.about.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise RunError(
                f"{self.path} does not say what it was made from, because {self.about.name} is missing or damaged; "
                f"move {self.path.name} away to start anew."
            ) from None
        if changed := differences(stored, self._origin):
            raise RunError(
                f"{self.path} was made from something else: {'; '.join(changed)}. Evaluate with the same, or move "
                f"{self.path.name} away to start anew."
            )

    def _read(self, fields: Collection[str]) -> None:
        """Takes lines that were cut off by a kill or are damaged out of the file, so that they are computed again."""
        lines, valid = self.path.read_bytes().splitlines(keepends=True), []
        for text in lines:
            try:
                line = json.loads(text)
                if text.endswith(b"\n") and all(name in line for name in fields):
                    self.lines.setdefault((str(line["arm"]), str(line["id"])), line)
                    valid.append(text)
            except (ValueError, KeyError, TypeError):
                continue
        if len(valid) < len(lines):
            write_atomically(self.path, b"".join(valid).decode())


class _RowWork:
    """Likelihoods and answers of one evaluation: what is missing is computed, what is there is read.

    Args:
        every: rows of the split; what is kept belongs to them.
        rows: those of them that are evaluated.

    Raises:
        RunError: files that stand in the run were made from something else.
    """

    def __init__(self, run: Run, recipe: Recipe, every: EvaluationRows, rows: EvaluationRows, console: Console) -> None:
        self.recipe, self.rows, self.console = recipe, rows, console
        self.max_length = recipe.training.settings()["max_length"]
        # Shuffled among all rows, so that a limited evaluation has the same floor.
        self.shuffled = dict(zip(every.ids, other_references(every, recipe.evaluation.seed), strict=True))
        self.generation = {**recipe.generation.model_dump(), "backend": "transformers"}
        self.origin: dict[str, Any] = {
            "adapter": file_hash(run.adapter / "adapter_model.safetensors"),
            "model": recipe.model.model_dump(),
            "quantization": recipe.quantization.model_dump(),
            "dtype": str(choose_precision(recipe).dtype).removeprefix("torch."),
            "data": {"source": every.source, "rows": len(every), "content": every.content_hash()},
            "prompt": recipe.prompt.model_dump(),
        }
        # Answers do not depend on how many are given at once.
        generation = {key: value for key, value in self.generation.items() if key != "per_device_eval_batch_size"}
        self.answer_origin = {**self.origin, "generation": generation}
        fields = ("prediction", "truncated", "lost_words")
        self.predictions = RowFile(run.folder / PREDICTIONS, self.answer_origin, fields)
        shuffling = {"max_length": self.max_length, "evaluation": {"seed": recipe.evaluation.seed}}
        self.likelihoods = RowFile(run.folder / LIKELIHOOD, {**self.origin, **shuffling}, ("nll", "tokens"))
        self._adapter = run.adapter
        self._switch: AdapterSwitch | None = None

    def likelihood(self, arm: str) -> tuple[np.ndarray, np.ndarray]:
        """Nats a token of the reference answers (n,), NaN where a row does not fit, and their tokens (n,), 0 there.

        Args:
            arm: or SHUFFLED, for the adapter with the references of other questions.
        """
        rows = self._missing(self.likelihoods, arm)
        if arm == SHUFFLED:
            rows = replace(rows, references=[self.shuffled[identity] for identity in rows.ids])
        if len(rows):
            with self._model(ADAPTER if arm == SHUFFLED else arm, f"NLL, {arm}", rows) as (model, prompt, done):
                for batch in reference_nll(model, prompt, rows, max_length=self.max_length):
                    self.likelihoods.append(
                        [
                            {"arm": arm, "id": rows.ids[at], "nll": nll if count else None, "tokens": count}
                            for at, nll, count in zip(*batch, strict=True)
                        ]
                    )
                    done(len(batch[0]))
        found = self.likelihoods.of(arm, self.rows.ids)
        tokens = np.array([line["tokens"] for line in found], dtype=np.int64)
        nats = np.array([np.nan if line["nll"] is None else line["nll"] for line in found])
        return nats / np.maximum(tokens, 1), tokens

    def answers(self, arm: str) -> list[dict[str, Any]]:
        """Lines of predictions.jsonl, in the order of the rows."""
        rows = self._missing(self.predictions, arm)
        if len(rows):
            place = {identity: at for at, identity in enumerate(rows.ids)}

            def on_slow(text: str) -> None:
                print_labeled(self.console, "Batches", text)

            with self._model(arm, f"Answers, {arm}", rows) as (model, prompt, done):
                for batch in generate(model, prompt, rows, self.recipe.generation, on_slow):
                    self.predictions.append([_line(arm, one, rows, place[one.id]) for one in batch])
                    done(len(batch))
        return self.predictions.of(arm, self.rows.ids)

    def about(self) -> dict[str, Any]:
        """What evaluation.json says about where its figures come from."""
        rows = self.rows
        data = {**self.origin["data"], "fingerprint": rows.fingerprint, "evaluated": len(rows), "leaks": rows.leaks}
        settings = {"generation": self.generation, "evaluation": self.recipe.evaluation.model_dump()}
        return {**self.origin, "data": data, **settings}

    def _missing(self, file: RowFile, arm: str) -> EvaluationRows:
        return self.rows.take([at for at, identity in enumerate(self.rows.ids) if (arm, identity) not in file.lines])

    @contextmanager
    def _model(
        self, arm: str, label: str, rows: EvaluationRows
    ) -> Iterator[tuple[PreTrainedModel, Prompt, Callable[[int], None]]]:
        """The model of an arm, its prompt, and a function that counts rows that are done."""
        if self._switch is None:
            self._switch = AdapterSwitch(self.recipe, self._adapter)
        with ExitStack() as stack:
            with self.console.status(f"Loading {self.recipe.model.name_or_path}"):
                model = stack.enter_context(self._switch.activate(arm))
            yield model, self._switch.prompt, stack.enter_context(row_progress(self.console, label, len(rows)))


def _line(arm: str, one: Prediction, rows: EvaluationRows, at: int) -> dict[str, Any]:
    stratum = int(rows.strata[at])
    return {
        "arm": arm,
        "id": one.id,
        "question": rows.questions[at],
        "reference": rows.references[at],
        "prediction": one.text,
        "severity": SEVERITIES[stratum] if stratum >= 0 else None,
        "group": int(rows.groups[at]),
        "tokens": len(one.token_ids),
        "truncated": one.truncated,
        "lost_words": one.lost_words,
    }


def _losses(tokens: np.ndarray, lines: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Notes on rows that did not fit."""
    notes = []
    if unfit := int((tokens == 0).sum()):
        notes.append(f"No NLL: {unfit:,} rows, whose answer leaves no room for a question in training.max_length.")
    lost = max((sum(line["lost_words"] > 0 for line in of_arm) for of_arm in lines.values()), default=0)
    if lost:
        notes.append(f"Shortened to fit the model's context: {lost:,} questions.")
    return notes


def _write(run: Run, content: dict[str, Any], rows: EvaluationRows, scores: dict[str, Scores]) -> None:
    """evaluation.json and scores.jsonl; more is not replaced by less, a whole evaluation not by a sample."""
    try:
        before = dict(json.loads((run.folder / EVALUATION).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        before = {}
    more_rows = before.get("data", {}).get("evaluated", 0) > len(rows)
    if more_rows or set(before.get("metrics", ())) > set(content["metrics"]):
        content["notes"].append(f"{EVALUATION} is kept as it was, because it holds more than this.")
        return
    lines = [
        {"column": column, "id": identity}
        | {name: float(values[at]) if np.isfinite(values[at]) else None for name, values in by_name.items()}
        for column, by_name in scores.items()
        for at, identity in enumerate(rows.ids)
    ]
    write_atomically(run.folder / SCORES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    run.write_json(EVALUATION, content)
