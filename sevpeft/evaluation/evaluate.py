"""Evaluation of a run on its own test split: likelihoods, answers, scores, floors and intervals.

Likelihoods and answers are slow, so they are stored row by row. The scores are computed from them each time.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from sevpeft.console import Screen, print_labeled, row_progress
from sevpeft.data.columns import TURNS
from sevpeft.data.read import Consultations
from sevpeft.data.split import Splits, question_key, question_keys
from sevpeft.errors import Interrupted, RunError
from sevpeft.evaluation import scores as scoring
from sevpeft.evaluation.arms import ADAPTER, BASE, CONSTANT, SHUFFLED, opened_recipe
from sevpeft.evaluation.bertscore import load_encoder
from sevpeft.evaluation.generate import EvaluationRows, generate, reference_nll
from sevpeft.evaluation.judge import JUDGEMENTS, Judge
from sevpeft.evaluation.safety import MINIMIZING, lexicon_versions, minimized, urgency_of
from sevpeft.evaluation.scores import Scores
from sevpeft.evaluation.statistics import or_none, paired_difference
from sevpeft.modeling.adapters import attach_adapter
from sevpeft.modeling.loading import choose_precision, load_for_inference, resolve_model
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe
from sevpeft.runs import Run, differences, file_hash, keep_private, plain_disk_errors, write_atomically
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.source import ORACLE, Severity
from sevpeft.training.checkpoints import check_same_data, run_lock
from sevpeft.training.data import PROMPT_SEVERITY, load_splits, source_index

EVALUATION, SCORES, MINIMIZED = "evaluation.json", "scores.jsonl", "minimized.jsonl"
PREDICTIONS, LIKELIHOOD, OWN_LIKELIHOOD = "predictions.jsonl", "likelihood.jsonl", "own_likelihood.jsonl"
_ANSWERS_TO_CHOOSE_FROM = 10_000  # for the constant answer


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
        run: the result of `train`, or its folder.
        overrides: KEY=VALUE of the sections generation and evaluation.
        limit: size of a seeded sample of the rows; a later evaluation of all rows reuses its answers.
        arms: ADAPTER and BASE, or one of them.
        answers: generate and score answers; False computes the likelihoods alone, in a fraction of the time.
        floors: score the floors too; a comparison does so for one run only.

    Returns:
        The content of evaluation.json. After a SevpeftError the finished rows are kept.
    """
    console = console or Screen(quiet=True)
    run, recipe, splits, every = opened(run, overrides)
    rows = every.limited(limit)
    settings = recipe.evaluation
    encoder, missing_encoder = load_encoder(settings) if answers else (None, None)
    judge = Judge(settings.judge) if settings.judge and answers else None
    floors = floors and ADAPTER in arms
    verdicts: tuple[dict[str, Scores], list[str]] = ({}, [])
    constant = None
    if answers and floors:
        chosen = np.random.default_rng(0).permutation(len(splits.train))[:_ANSWERS_TO_CHOOSE_FROM]
        constant = scoring.constant_answer(splits.train.select(chosen)["answer"])
    with run_lock(run.folder), finished_rows_are_kept():
        work = RowWork(run, recipe, every, rows, console)
        likelihood: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        lines, minimization = dict[str, list[dict[str, Any]]](), dict[str, Scores]()
        # The base model first: some adapters (lora.bias=all) change its weights when they are attached.
        for arm in (arm for arm in (BASE, ADAPTER) if arm in arms):
            if answers:  # first, because they measure most likelihoods too
                lines[arm] = work.answers(arm, scored=(arm, SHUFFLED) if floors and arm == ADAPTER else (arm,))
                minimization[arm] = work.minimization(arm) if settings.minimization else {}
            likelihood[arm] = work.likelihood(arm)
        if floors:
            likelihood[SHUFFLED] = work.likelihood(SHUFFLED)
        texts = {arm: [line["prediction"] for line in arm_lines] for arm, arm_lines in lines.items()}
        if judge is not None:
            kept = RowFile(run.folder / JUDGEMENTS, {**work.answer_origin, "judge": judge.about})
            with_floor = texts | ({CONSTANT: [constant] * len(rows)} if constant and BASE in arms else {})
            verdicts = judge.rate(rows, with_floor, kept.lines, kept.append, console)
    with console.status("Scoring"):
        columns = [name for name in scoring.COLUMNS if name in likelihood]
        scores: dict[str, Scores] = {name: {"nll": likelihood[name][0]} for name in columns}
        for arm, arm_lines in lines.items():
            truncated = [line["truncated"] for line in arm_lines]
            scores[arm] |= minimization[arm]
            scores[arm] |= scoring.row_scores(rows, texts[arm], truncated=truncated, encoder=encoder)
        if constant is not None:
            shuffled = [work.shuffled[identity] for identity in rows.ids]
            for column, by_name in scoring.floor_scores(rows, texts[ADAPTER], shuffled, constant, encoder).items():
                scores[column] = scores.get(column, {}) | by_name
        for column, by_name in verdicts[0].items():
            scores[column] |= by_name
        metrics = scoring.METRICS | (judge.metrics if judge else {})
        tokens = {column: counts for column, (_, counts) in likelihood.items()}
        summary = scoring.summarize(rows, scores, settings, tokens=tokens, pairs={ADAPTER: (BASE,)}, metrics=metrics)
        unfit = int((tokens[arms[0]] == 0).sum())
        shortened = max((sum(line["lost_words"] > 0 for line in of_arm) for of_arm in lines.values()), default=0)
        notes = [
            *scoring.remarks(rows),
            recipe.prompt.severity == "gold" and ORACLE,
            (by := run.metrics()["data"].get("prompt_severity")) != rows.severities_by
            and f"Severity in prompts: {rows.severities_by}; trained: {by}.",
            floors
            and paired_difference(likelihood[ADAPTER][0], likelihood[SHUFFLED][0], rows.groups, settings).high >= 0
            and "The adapter is no better than with shuffled questions, so its answers do not depend on the question.",
            missing_encoder,
            unfit and f"{unfit:,} rows have no NLL: their answer leaves no room for a question in training.max_length.",
            shortened and f"{shortened:,} questions were shortened to fit the model's context.",
            *verdicts[1],
        ]
        content = {
            **work.origin,
            "data": {**work.origin["data"], "fingerprint": rows.fingerprint, "evaluated": len(rows)},
            **{name: getattr(recipe, name).model_dump() for name in ("generation", "evaluation")},
            "scores": summary,
            "columns": {name: text for name, text in scoring.COLUMNS.items() if name in scores},
            "metrics": {name: metrics[name] for name in summary[scoring.ALL]["metrics"]},
            "methods": scoring.methods(settings, "the strata of one score together"),
            "lexicons": lexicon_versions() if answers else {},
            **({"judge": judge.about} if judge else {}),
            "notes": [note for note in notes if note],
        }
        _write(run, content, rows, scores)
    return content


def opened(run: Run | Path | str, overrides: Sequence[str]) -> tuple[Run, Recipe, Splits, EvaluationRows]:
    """A finished run, its recipe with the overrides, its splits and test rows, after the checks of `evaluate`."""
    run, recipe, table, splits, severity = open_run(run, overrides, "evaluate", "generation", "evaluation")
    return run, recipe, splits, test_rows(table, splits, severity)


def open_run(
    run: Run | Path | str, overrides: Sequence[str], verb: str, *sections: str
) -> tuple[Run, Recipe, Consultations, Splits, Severity | None]:
    """A finished run, its recipe with overrides of these sections, and its data as `load_splits` gives it."""
    run, recipe = opened_recipe(run, overrides, verb, *sections)
    table, splits, severity = load_splits(recipe)
    check_same_data(table.fingerprint, table.source, run)
    return run, recipe, table, splits, severity


def test_rows(table: Consultations, splits: Splits, severity: Severity | None) -> EvaluationRows:
    """Test rows from the result of `load_splits` for a run's recipe; a RunError if there are none."""
    rows = splits.test
    if len(rows) == 0:
        raise RunError("The run kept no test rows; train again with data.test_size=0.1, or test rows in its column.")
    # Prepared data groups near-duplicates; other data groups equal questions.
    groups = rows["group"][:] if table.provenance else question_keys(rows)
    columns = ("id", "question", "answer", "dialect", PROMPT_SEVERITY)
    read = rows.select_columns([name for name in columns if name in rows.features])[:]
    strata = np.full(len(rows), -1) if severity is None else severity.strata[source_index(rows)]
    return EvaluationRows(
        ids=[str(identity) for identity in read["id"]],
        questions=list(read["question"]),
        references=list(read["answer"]),
        dialects=[name or None for name in read["dialect"]] if "dialect" in read else None,
        strata=np.asarray(strata, dtype=np.int64),
        groups=np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64),
        source=table.source,
        fingerprint=table.fingerprint,
        leaks=splits.leaks,
        turns=list(rows[TURNS]) if TURNS in rows.features and any(rows[TURNS]) else None,
        severities=list(read[PROMPT_SEVERITY]) if PROMPT_SEVERITY in read else None,
        severities_by=splits.prompt_severity,
    )


class RowFile:
    """Lines {"arm": …, "id": …, …} of one origin in an append-only file, so that a kill loses one batch at most.

    `predictions.about.json` beside `predictions.jsonl` holds the origin of the lines: adapter, rows, prompt and
    settings, as nested plain values. Lines of another origin are a RunError. `lines`: (arm, id) → the last such line.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        self.path, self.about = path, path.with_suffix(".about.json")
        self.lines: dict[tuple[str, str], dict[str, Any]] = {}
        # Through JSON, as the stored origin: otherwise 1 and 1.0, or tuples and lists, would differ.
        self._origin: dict[str, Any] = json.loads(json.dumps(origin, ensure_ascii=False))
        if not path.exists() or not path.stat().st_size:
            return
        try:
            changed = differences(json.loads(self.about.read_text(encoding="utf-8")), self._origin)
        except (OSError, ValueError):
            changed = [f"{self.about.name} is missing or damaged"]
        if changed:
            remedy = f"Use the same settings, or move {path.name} away to start again"
            raise RunError(f"{path} has lines from other settings: {'; '.join(changed)}. {remedy}.")
        # Incomplete and damaged lines are removed, so that their rows are computed again.
        lines, valid = path.read_bytes().splitlines(keepends=True), []
        for text in lines:
            try:
                line = json.loads(text)
                if text.endswith(b"\n"):
                    self.lines[str(line["arm"]), str(line["id"])] = line
                    valid.append(text)
            except (ValueError, KeyError, TypeError):
                continue
        if len(valid) < len(lines):
            write_atomically(path, b"".join(valid).decode())

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Adds lines with one write to the file."""
        with plain_disk_errors(self.path, when_full="free some, then run this again (finished answers are kept)"):
            if not self.lines or not self.about.exists():  # an empty file may have the origin of earlier settings
                write_atomically(self.about, json.dumps(self._origin, ensure_ascii=False, indent=2) + "\n")
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "ab") as file:
                keep_private(self.path)  # a file from an earlier version, or a copy, may be readable by others
                file.write(text.encode())
        for line in lines:
            self.lines[line["arm"], line["id"]] = line


class RowWork:
    """Likelihoods and answers of one evaluation: stored rows are read, missing rows are computed.

    `every`: all rows of the split, to which the stored files belong; `rows`: those to evaluate.
    """

    def __init__(self, run: Run, recipe: Recipe, every: EvaluationRows, rows: EvaluationRows, console: Console) -> None:
        self.recipe, self.rows, self.console = recipe, rows, console
        self.max_length = recipe.training.settings()["max_length"]
        # Shuffled among all rows, so that a sample gets the same references as the whole split.
        self.shuffled = dict(zip(every.ids, scoring.other_references(every, recipe.evaluation.seed), strict=True))
        self.origin: dict[str, Any] = {
            "adapter": file_hash(run.adapter / "adapter_model.safetensors"),
            "model": recipe.model.model_dump(),
            "quantization": recipe.quantization.model_dump(),
            "dtype": str(choose_precision(recipe).dtype).removeprefix("torch."),
            "data": {"source": every.source, "rows": len(every), "content": every.content_hash()},
            # Unused keys are left out, so that files from before these keys existed stay valid.
            "prompt": recipe.prompt.model_dump(exclude={"date"} if every.severities else {"date", "severity"}),
            **({"tokens_of_prompt": known} if (known := run.metrics()["model"].get("prompt")) else {}),
            "severities_by": every.severities_by,
            "evaluation_template": recipe.as_published.evaluation_template,
        }
        # Answers do not depend on the batch size.
        generation = recipe.generation.model_dump(exclude={"per_device_eval_batch_size"})
        self.answer_origin = {**self.origin, "generation": generation}
        self.predictions = RowFile(run.folder / PREDICTIONS, self.answer_origin)
        shuffling = {"max_length": self.max_length, "evaluation": {"seed": recipe.evaluation.seed}}
        self.likelihoods = RowFile(run.folder / LIKELIHOOD, {**self.origin, **shuffling})
        self._run = run
        self._loaded: tuple[PreTrainedModel, Prompt] | None = None

    def likelihood(self, arm: str, own: Mapping[str, str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Nats per token of the reference answers (n,) and their tokens (n,); NaN and 0 for rows that do not fit.

        SHUFFLED is the adapter with references of other questions. `own`: id → answer in place of the reference.
        """
        answers, file = {identity: question_key(text, 0) for identity, text in (own or {}).items()}, self.likelihoods
        if own:  # the answers may have changed since: a line is valid for its own answer only
            file = RowFile(self._run.folder / OWN_LIKELIHOOD, self.answer_origin)
            file.lines = {key: of for key, of in file.lines.items() if of.get("answer") == answers.get(key[1])}

        def compute(model: PreTrainedModel, prompt: Prompt, rows: EvaluationRows) -> Iterator[list[dict[str, Any]]]:
            rows = replace(rows, references=[own[identity] for identity in rows.ids]) if own else rows
            for batch in reference_nll(model, prompt, rows, max_length=self.max_length):
                yield [line | ({"answer": answers[line["id"]]} if own else {}) for line in batch]

        lines = self._lines(file, self.rows, arm, "NLL", compute)
        tokens = np.array([line["tokens"] for line in lines], dtype=np.int64)
        nats = np.array([line["nll"] for line in lines], dtype=np.float64)  # null becomes NaN
        return nats / np.maximum(tokens, 1), tokens

    def minimization(self, arm: str) -> Scores:
        """Change of urgency if a line plays down a critical question of one turn; answers are in minimized.jsonl."""
        turns, critical = self.rows.turns or [""] * len(self.rows), SEVERITIES.index(scoring.CRITICAL)
        rows = self.rows.take([at for at, of in enumerate(self.rows.strata) if of == critical and not turns[at]])
        questions = list(map(minimized, rows.ids, rows.questions, rows.dialects or [None] * len(rows)))
        file = RowFile(self._run.folder / MINIMIZED, {**self.answer_origin, "lines": file_hash(MINIMIZING)})
        answers = self.answers(arm), self.answers(arm, (file, replace(rows, questions=questions)))
        before, after = ({line["id"]: urgency_of(line["prediction"]) for line in lines} for lines in answers)
        change = np.array([after.get(identity, np.nan) - before[identity] for identity in self.rows.ids])
        return {"minimized_change": change, "minimized_less_urgent": np.where(np.isnan(change), np.nan, change < 0)}

    def answers(
        self, arm: str, other: tuple[RowFile, EvaluationRows] | None = None, *, scored: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Lines of predictions.jsonl in the order of the rows, or lines of another file for its rows.

        `scored`: arms, of the same model, whose missing likelihoods are stored too where that saves time.
        """
        on_slow, (file, rows) = partial(print_labeled, self.console, "Batches"), other or (self.predictions, self.rows)
        names = [SEVERITIES[stratum] if stratum >= 0 else None for stratum in rows.strata]
        columns = (rows.ids, rows.questions, rows.references, names, rows.groups.tolist())
        keys = ("id", "question", "reference", "severity", "group")
        about = {values[0]: dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)}

        def compute(model: PreTrainedModel, prompt: Prompt, rows: EvaluationRows) -> Iterator[list[dict[str, Any]]]:
            missing = [name for name in scored if any((name, one) not in self.likelihoods.lines for one in rows.ids)]
            texts = {name: self._references(name, rows) for name in missing}
            limit, settings = self.max_length, self.recipe.generation
            for batch in generate(model, prompt, rows, settings, on_slow, references=texts, max_length=limit):
                nll = [{"arm": name, "id": line["id"], **of} for line in batch for name, of in line.pop("nll").items()]
                if nll:
                    self.likelihoods.append(nll)
                yield [{**about[line["id"]], **line, "tokens": len(line.pop("token_ids"))} for line in batch]

        return self._lines(file, rows, arm, "Downplay" if other else "Answers", compute)

    def _lines(
        self, file: RowFile, every: EvaluationRows, arm: str, label: str, compute: Callable[..., Iterator[list[Any]]]
    ) -> list[dict[str, Any]]:
        """Lines of an arm in the order of the rows; `compute` gets the model, the prompt and the missing rows."""
        rows = every.take([at for at, identity in enumerate(every.ids) if (arm, identity) not in file.lines])
        rows = replace(rows, references=self._references(arm, rows))
        if len(rows):
            model, prompt = self._model(arm)
            with row_progress(self.console, f"{label}, {arm}", len(rows)) as done:
                for batch in compute(model, prompt, rows):
                    file.append([{"arm": arm, **line} for line in batch])
                    done(len(batch))
        return [file.lines[arm, identity] for identity in every.ids]

    def _references(self, arm: str, rows: EvaluationRows) -> list[str]:
        return [self.shuffled[identity] for identity in rows.ids] if arm == SHUFFLED else rows.references

    def _model(self, arm: str) -> tuple[PreTrainedModel, Prompt]:
        """The model in evaluation mode and the prompt. The adapter is attached at its first use, and stays attached."""
        with self.console.status(f"Loading {self.recipe.model.name_or_path}"):
            if self._loaded is None:
                prompt = resolve_model(self.recipe, self._run).prompt
                if template := self.recipe.as_published.evaluation_template:
                    prompt = replace(prompt, chat=False, template=template, english_template=None)
                self._loaded = load_for_inference(self.recipe), prompt
            model, prompt = self._loaded
            if arm != BASE and not isinstance(model, PeftModel):
                self._loaded = attach_adapter(model, self._run.adapter, self.recipe), prompt
        return self._loaded


@contextmanager
def finished_rows_are_kept() -> Iterator[None]:
    """Adds to an interruption of the block the message that finished work is kept."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        message = "Interrupted; finished runs and rows are kept, and the same command continues from them."
        raise Interrupted(message, getattr(error, "exit_code", 130)) from error


def _write(run: Run, content: dict[str, Any], rows: EvaluationRows, scores: dict[str, Scores]) -> None:
    """Writes evaluation.json and scores.jsonl, unless the stored ones have more rows or more scores."""
    stored = run.read_json(EVALUATION)
    if all(stored.get(name) == content[name] for name in ("adapter", "generation", "evaluation")):
        more_rows = stored["data"]["evaluated"] > len(rows)
        if more_rows or set(stored["metrics"]) > set(content["metrics"]):
            content["notes"].append(f"{EVALUATION} was not replaced, because it has more rows or scores.")
            return
    lines = [
        {"column": column, "id": identity, **{name: or_none(values[at]) for name, values in by_name.items()}}
        for column, by_name in scores.items()
        for at, identity in enumerate(rows.ids)
    ]
    write_atomically(run.folder / SCORES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    run.write_json(EVALUATION, content)
