"""Weighted training rows and validation rows, made from a recipe and the prompt of a base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from sevpeft.data.files import FILE_COLUMN, TURNS, trained_turns
from sevpeft.data.mix import SOURCE, draw, with_mixed, with_sources
from sevpeft.data.read import PREPARED_ABOUT, Consultations, load_consultations
from sevpeft.data.split import SIDES, Splits, question_key, question_keys, split_rows
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError, WeightError
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import AsPublishedSection, Recipe
from sevpeft.runs import workers_end_with_this_process
from sevpeft.severity.probabilities import has_severity
from sevpeft.severity.source import Severity, prompt_severity, severity_of
from sevpeft.severity.weights import WeightSummary, oversample, severity_weights
from sevpeft.training.compat import IGNORED
from sevpeft.training.curriculum import difficulty_of

# Below this, progress bars of the single steps flash by and only hide what matters.
ROWS_WORTH_A_BAR = 20_000
# A question shortened to less than this says nothing any more; a question that is shorter by nature is kept whole.
FEWEST_QUESTION_WORDS = 4
# Column of the severity that a row's prompt names.
PROMPT_SEVERITY = "prompt_severity"
# From tokens of consultations to names of their rows.
NameRows = Callable[[Sequence[Sequence[int]]], list[str]]


@dataclass(frozen=True)
class Prepared:
    """Rows ready for `SeveritySFTTrainer`, the counts of how they came about, and what the training rows are called."""

    train: Dataset
    validation: Dataset
    weights: WeightSummary
    summary: dict[str, Any]
    row_names: NameRows
    difficulty: np.ndarray | None  # (n,) of the training rows, larger for harder ones


def prepare(recipe: Recipe, prompt: Prompt, scratch: Path) -> Prepared:
    """Everything up to the trainer; `scratch` holds memory-mapped Arrow files, to be removed after training."""
    table, splits, severity = load_splits(recipe)
    settings, mix = recipe.training.settings(), dict[str, Any]()
    pool = splits.train if splits.mixed is None else datasets.concatenate_datasets([splits.train, splits.mixed])
    # Plain cross-entropy needs no severity of further sources.
    weighing = severity if severity is not None and len(severity.probabilities) == len(table.rows) else None
    encoded, reports = {}, {}
    if len(table.rows) >= ROWS_WORTH_A_BAR:
        datasets.enable_progress_bars()

    def choose(found: Dataset) -> np.ndarray:
        names = np.array([name or "" for name in pool[SOURCE]] if SOURCE in pool.column_names else [""] * len(pool))
        chosen, counts = draw(lengths_of(found), names[source_index(found)], recipe.data)
        mix.update(counts)
        return chosen

    with workers_end_with_this_process():
        for name, rows, known in (("train", pool, weighing), ("validation", splits.validation, severity)):
            encoded[name], reports[name] = encode_rows(
                rows,
                prompt,
                settings["max_length"],
                strata=None if known is None else known.strata[source_index(rows)],
                cache_file=scratch / f"{name}.arrow",
                num_proc=settings.get("dataset_num_proc"),
                choose=choose if recipe.data.mix and name == "train" else None,
                published=recipe.as_published if name == "train" else AsPublishedSection(),
            )
        kept = source_index(pool)[source_index(encoded["train"])]
        if weighing is not None and recipe.severity.control == "oversampled":
            drawn = oversample(weigh(recipe, weighing, kept, control="none")[0], settings["seed"])
            encoded["train"], kept = encoded["train"].select(drawn), kept[drawn]
        weights, summary = weigh(recipe, weighing, kept)
        if TURN_WEIGHT in encoded["train"].column_names:
            weights = weights * np.asarray(encoded["train"][TURN_WEIGHT])
        weights = weights * (settings["global_batch_size"] if recipe.as_published.unnormalized else 1)
        train = add_token_weights(
            encoded["train"], weights, recipe.severity.reduction, cache_file=scratch / "weighted.arrow"
        ).select_columns(["input_ids", "labels", "token_weights"])
        if settings.get("packing"):
            train = pack_rows(train, settings["max_length"], cache_file=scratch / "packed.arrow")
    datasets.disable_progress_bars()
    about = summary_of(table, splits, severity, reports)
    if mix:
        about["mix"], about["rows"]["train"] = mix, len(kept)
    # Longest first: batches then need little padding, and too little memory shows at once.
    longest_first = np.argsort(-lengths_of(encoded["validation"]), kind="stable")
    return Prepared(
        train=train,
        validation=encoded["validation"].select(longest_first).select_columns(["input_ids", "labels", "severity"]),
        weights=summary,
        summary=about,
        row_names=row_names(encoded["train"], pool),
        difficulty=difficulty_of(recipe.curriculum, table, weighing, kept, lengths_of(encoded["train"])),
    )


def load_splits(recipe: Recipe) -> tuple[Consultations, Splits, Severity | None]:
    """The table, its parts, and the severity of its rows: None where there is none, for plain cross-entropy."""
    data, weighting = recipe.data, recipe.severity
    keep = ["group"] if (Path(data.path).expanduser() / PREPARED_ABOUT).is_file() else []
    keep += [weighting.weight_column] if weighting.source == "weight" else []
    keep += filter(None, [recipe.curriculum.difficulty_column])
    table = load_consultations(data, keep=keep or "mapped")
    own, table = table.rows, with_sources(table, data, keep or "mapped")
    severity, plain = None, weighting.control == "uniform" and weighting.source == "columns"
    plain &= recipe.curriculum.kind == "none" or recipe.curriculum.difficulty != "severity"
    if not plain or has_severity(own):
        names = {column: name for name, column in (table.columns | table.carried).items()}
        severity = severity_of(
            own if plain else table.rows,
            source=weighting.source,
            classifier=weighting.classifier,
            temperature=weighting.temperature,
            weight_column=names.get(weighting.weight_column, weighting.weight_column),
        )
    strata = None if severity is None else severity.strata[: len(own)]
    rows = own.add_column("source_index", np.arange(len(own)))
    keys = None
    if "group" in rows.column_names:  # of near-duplicate questions, where `sevpeft prepare` has found them
        # Hashed, because what is carved from the train rows is taken in the order of these numbers.
        keys = np.asarray([question_key(group, data.seed) for group in rows["group"]], dtype=np.uint64)
    named_by = None
    if recipe.prompt.severity != "none":
        named, named_by = prompt_severity(table.rows, recipe.prompt.severity, weighting.classifier)
        rows = rows.add_column(PROMPT_SEVERITY, named[: len(own)])
        table = replace(table, rows=table.rows.add_column(PROMPT_SEVERITY, named))
    splits = with_mixed(split_rows(rows, data, strata=strata, keys=keys), table.rows, len(own))
    # Prompts hold the examples' answers: they can be neither trained nor evaluated on.
    shown = [question_key(fold_for_matching(one.question), 0) for one in recipe.prompt.examples or ()]
    for name in (*SIDES, "mixed") if shown else ():
        if (part := getattr(splits, name)) is not None:
            others = np.flatnonzero(~np.isin(question_keys(part), np.array(shown, dtype=np.uint64)))
            splits = splits._replace(**{name: part.select(others)})
    return table, splits._replace(prompt_severity=named_by), severity


def lengths_of(rows: Dataset) -> np.ndarray:
    """(n,) tokens of each encoded row, from Arrow's offsets."""
    tables = rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([pc.list_value_length(table["input_ids"]).to_numpy() for table in tables])


def summary_of(
    table: Consultations, splits: Splits, severity: Severity | None, encoding: dict[str, Any]
) -> dict[str, Any]:
    """What a run's metrics.json says about its data."""
    return {
        "source": table.source,
        "fingerprint": table.fingerprint,
        "prepared": table.provenance or None,
        "columns": table.columns,
        "rejected": table.rejected,
        "severity": None if severity is None else severity.origin,
        "split_by": splits.by,
        "questions_in_two_splits": splits.leaks,
        "rows": {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        "encoding": encoding,
        **({"prompt_severity": splits.prompt_severity} if splits.prompt_severity else {}),
    }


def weigh(
    recipe: Recipe, severity: Severity | None, kept: np.ndarray, control: Any = None
) -> tuple[np.ndarray, WeightSummary]:
    """Weights (n,) of the training rows that were kept, and what they amount to; under the recipe's own control."""
    if severity is None:
        return np.ones(len(kept)), WeightSummary.of(np.ones(len(kept)), None)
    weighting = recipe.severity
    ready = severity.weights
    weights = severity_weights(
        severity.probabilities[kept] if ready is None else ready[kept, None],
        weighting.coefficients() if ready is None else (1.0,),
        normalize=weighting.normalize,
        control=control or weighting.control,
        seed=recipe.training.settings()["seed"],
    )
    return weights, WeightSummary.of(weights, severity.strata[kept])


def source_index(rows: Dataset) -> np.ndarray:
    """(n,) position of every row in the table that it was taken from."""
    return np.asarray(rows.with_format("numpy")["source_index"][:])


# From rows to tokens.

_COUNTS = ("lost_words", "length", "answer_length")
# What a conversation's messages say of an answer's weight, a factor beside the severity's.
TURN_WEIGHT = "turn_weight"
_FEATURES = Features(
    {
        **{name: List(Value("int32")) for name in ("input_ids", "labels")},
        **{"severity": Value("int8"), "source_index": Value("int64")},
        **{name: Value("int32") for name in _COUNTS},
        TURN_WEIGHT: Value("float64"),
    }
)


def encode_rows(
    rows: Dataset,
    prompt: Prompt,
    max_length: int | None,
    *,
    strata: np.ndarray | None,
    cache_file: Path,
    num_proc: int | None = None,
    choose: Callable[[Dataset], np.ndarray] | None = None,
    published: AsPublishedSection = AsPublishedSection(),  # noqa: B008  (frozen)
) -> tuple[Dataset, dict[str, int]]:
    """Tokenizes a split.

    Args:
        rows: columns question, answer and, optionally, dialect, turns and prompt_severity. prompt: as in generation.
        max_length: tokens of prompt and answer together; None for no limit.
        strata: (n,) position in SEVERITIES of every row; None when severity is not known (then -1).
        cache_file: Arrow file of the result. num_proc: processes, as in `datasets.Dataset.map`.
        choose: gives the positions of the encoded rows to keep, of which alone the counts then are.
        published: what of a published loop is done otherwise, in tokens and labels.

    Returns:
        Dataset with input_ids, labels, severity, source_index (row of `rows`) and, where rows have turns, turn_weight;
        and what became of the split, lengths in tokens, losses in words of the question.

    Raises:
        DataError: no row is left.
    """
    strata = np.full(len(rows), -1, dtype=np.int8) if strata is None else strata
    encoded = rows.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=_FEATURES,
        fn_kwargs={"prompt": prompt, "max_length": max_length, "strata": strata, "published": published},
        cache_file_name=str(cache_file),
        load_from_cache_file=False,
        num_proc=num_proc,
        desc="Encoding",
    )
    known = rows[TURNS] if TURNS in rows.column_names else None
    answers = len(rows) if known is None else sum(1 for turns in known for _ in trained_turns("", "", turns))
    if len(encoded) == 0:
        raise DataError(
            f"None of {len(rows)} consultations fits training.max_length={max_length} with its answer; raise it."
        )
    refused = answers - len(encoded)
    if choose is not None:
        encoded = encoded.select(choose(encoded))
    counts = encoded.select_columns(list(_COUNTS)).with_format("numpy")[:]
    lengths, lost = counts["length"], counts["lost_words"]
    report = {
        "rows": len(encoded),
        "refused": refused,
        "shortened": int((lost > 0).sum()),
        "lost_words": int(lost.sum()),
        "most_lost_words": int(lost.max()),
        "median_length": int(np.median(lengths)),
        "longest": int(lengths.max()),
        "answer_tokens": int(counts["answer_length"].sum()),
    }
    return encoded.remove_columns([*_COUNTS, *[TURN_WEIGHT] * (known is None)]), report


def _encode_batch(
    batch: dict[str, Any], indices: list[int], prompt: Prompt, max_length: int | None, strata: Any, published: Any
) -> dict[str, list[Any]]:
    unknown = [None] * len(indices)
    texts = zip(batch["question"], batch["answer"], batch.get(TURNS) or unknown, strict=True)
    known = zip(batch.get("dialect") or unknown, batch.get(PROMPT_SEVERITY) or unknown, strict=True)
    # Each answer of a conversation is a row of its own, whose prompt is the one that generation would have there.
    turns = [
        (index, *of, *turn)
        for index, of, text in zip(indices, known, texts, strict=True)
        for turn in trained_turns(*text)
    ]
    asked, earlier = [turn[3] for turn in turns], [turn[6] for turn in turns]
    prompts = prompt.prompt_ids(asked, [turn[1] for turn in turns], [turn[2] for turn in turns], earlier)
    answers = prompt.answer_ids([turn[4] for turn in turns])
    rows = []
    for turn, prompt_ids, answer in zip(turns, prompts, answers, strict=True):
        index, dialect, severity, question, _, weight, before = turn
        answer, lost = answer[: -1 if published.no_end_token else None], 0
        if max_length is not None and len(prompt_ids) + len(answer) > max_length:
            shorter = shortened_prompt(question, dialect, prompt, max_length - len(answer), severity, before)
            if shorter is None:
                continue
            prompt_ids, lost = shorter
        ids, labels = prompt_ids + answer, [IGNORED] * len(prompt_ids) + answer
        if published.labels == "all":
            # No attention mask: padding sees padding, which in the notebook it does not. An answer never sees any.
            ids += [prompt.end_id] * ((max_length or 0) - len(ids))
        if published.labels != "answer":
            labels = [IGNORED, *ids[1:]]  # nothing predicts the first token
        rows.append((ids, labels, int(strata[index]), index, lost, len(ids), len(answer), weight))
    return {name: [row[number] for row in rows] for number, name in enumerate(_FEATURES)}


def shortened_prompt(
    question: str,
    dialect: str | None,
    prompt: Prompt,
    room: int,
    severity: str | None = None,
    earlier: Sequence[Sequence[str]] = (),
) -> tuple[list[int], int] | None:
    """The longest prompt of at most `room` tokens, and the words that it lacks.

    A conversation loses its earliest exchanges first, then the question its last words.
    """
    lost = 0
    for number, exchange in enumerate(earlier, start=1):
        lost += sum(len(text.split()) for text in exchange)
        shorter = prompt.prompt_ids([question], [dialect], [severity], [earlier[number:]])[0]
        if len(shorter) <= room:
            return shorter, lost
    words = question.split()
    kept, ids = 0, None
    low, high = min(FEWEST_QUESTION_WORDS, len(words)), len(words) - 1
    while low <= high:
        middle = (low + high) // 2
        candidate = prompt.prompt_ids([" ".join(words[:middle])], [dialect], [severity])[0]
        if len(candidate) <= room:
            kept, ids, low = middle, candidate, middle + 1
        else:
            high = middle - 1
    return None if ids is None else (ids, lost + len(words) - kept)


# Weights of tokens, and what is made of them.


def add_token_weights(encoded: Dataset, weights: np.ndarray, reduction: str, *, cache_file: Path) -> Dataset:
    """Adds `token_weights`, one float per token, zero wherever the label is ignored.

    With reduction "tokens" every answer token of consultation i carries w_i, and the batch loss is divided by the
    number of answer tokens. With "examples" it carries w_i / L_i, L_i being the length of its answer, and the loss is
    divided by the number of consultations: the paper's (1/L) Σ_t w · (−log P) (arXiv 2604.06346, eq. 3).

    Args:
        encoded: result of `encode_rows`.
        weights: (n,) weight of each row of `encoded`, in its order.
    """
    if len(weights) != len(encoded):
        raise WeightError(f"There are {len(weights)} severity weights for {len(encoded)} consultations.")

    def weigh_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[np.ndarray]]:
        rows = [np.asarray(labels) != IGNORED for labels in batch["labels"]]
        each = [row.sum() if reduction == "examples" else 1 for row in rows]
        return {
            "token_weights": [row * (w / count) for row, w, count in zip(rows, weights[indices], each, strict=True)]
        }

    return encoded.map(
        weigh_batch,
        batched=True,
        with_indices=True,
        features=Features({**encoded.features, "token_weights": List(Value("float32"))}),
        cache_file_name=str(cache_file),
        load_from_cache_file=False,
        desc="Weighting",
    )


def check_weights(dataset: Dataset) -> None:
    """Reads all token weights once, in Arrow, so that a bad one stops the run before its first step.

    Raises:
        WeightError: weights absent, of another number than the tokens, not finite, negative, or all zero.
    """
    missing = [name for name in ("input_ids", "labels", "token_weights") if name not in dataset.column_names]
    if missing:
        raise WeightError(
            f"The training data has no {', '.join(missing)}. Weights are never taken as 1 in silence: give "
            "token_weights, all ones for plain cross-entropy."
        )
    highest = 0.0
    for table in dataset.select_columns(["token_weights", "labels"]).with_format("arrow").iter(batch_size=2000):
        column = table["token_weights"].combine_chunks()
        values = pc.list_flatten(column).cast("float64")
        lengths = [pc.list_value_length(part) for part in (column, table["labels"].combine_chunks())]
        if column.null_count or values.null_count or not pc.all(pc.is_finite(values)).as_py():
            raise WeightError("The training data has token_weights that are missing or not finite.")
        if not pc.all(pc.equal(*lengths)).as_py():
            raise WeightError("A row of the training data has another number of token_weights than of tokens.")
        if len(values) and pc.min(values).as_py() < 0:
            raise WeightError("The training data has negative token_weights.")
        highest = max(highest, pc.max(values).as_py() or 0.0)
    if not highest:
        raise WeightError("All token_weights of the training data are zero, so nothing would be learned.")


def pack_rows(encoded: Dataset, max_length: int, *, cache_file: Path) -> Dataset:
    """Packs rows into blocks of at most `max_length` tokens with TRL's best-fit-decreasing packer."""
    return pack_dataset(
        encoded.select_columns(["input_ids", "labels", "token_weights"]),
        seq_length=max_length,
        strategy="bfd",
        map_kwargs={"cache_file_name": str(cache_file), "load_from_cache_file": False, "desc": "Packing"},
    )


def row_names(encoded: Dataset, rows: Dataset) -> NameRows:
    """Names rows by their number in the data, never by what they say.

    Args:
        encoded: `input_ids` and `source_index`, the position in `rows`, of each training row.
        rows: the split that was encoded, with `row`, its number in the input, and `file` where there are several.
    """

    def name(position: int) -> str:
        row = rows[position]
        place = row.get(FILE_COLUMN) or row.get(SOURCE)
        return f"row {row['row']}{f' of {place}' if place else ''}"

    def names(documents: Sequence[Sequence[int]]) -> list[str]:
        """Of the rows with exactly these tokens, in the order of the data; equal rows are all named."""
        wanted = {tuple(document) for document in documents}
        fits = np.isin(lengths_of(encoded), [len(document) for document in wanted])
        fitting = encoded.select(np.flatnonzero(fits))
        return [name(row["source_index"]) for row in fitting if tuple(row["input_ids"]) in wanted]

    return names


# Batches.


@dataclass
class SeverityCollator(DataCollatorForLanguageModeling):
    """Collates rows of `input_ids, labels, token_weights` (training) or `input_ids, labels, severity` (validation).

    Returns what TRL's collator returns, and `token_weights` (float32, the shape of `labels`) and `severity` (int64,
    one number per row) where the rows have them.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call(examples)
        if "token_weights" in examples[0]:
            rows = [torch.tensor(example["token_weights"], dtype=torch.float32) for example in examples]
            output["token_weights"] = pad(
                [torch.cat(rows)] if self.padding_free else rows,
                padding_value=0.0,
                padding_side="right",
                pad_to_multiple_of=self.pad_to_multiple_of,
            )
        if "severity" in examples[0]:
            output["severity"] = torch.tensor([example["severity"] for example in examples], dtype=torch.long)
        return output


def rows_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The consultations of a batch, padded, padding-free or packed, as the collator takes them."""
    columns = [name for name in batch if name in ("input_ids", "labels", "token_weights")]
    if "attention_mask" in batch:
        masks = enumerate(batch["attention_mask"].bool())
        rows = [{name: batch[name][number][mask].tolist() for name in columns} for number, mask in masks]
    else:
        begins = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        parts = list(pairwise([*begins, batch["input_ids"].shape[1]]))
        # Padding at the end has position 0 too; a consultation has a prompt and an answer.
        rows = [{name: batch[name][0, a:b].tolist() for name in columns} for a, b in parts if b - a > 1]
    if "severity" in batch:
        rows = [{**row, "severity": severity} for row, severity in zip(rows, batch["severity"].tolist(), strict=False)]
    return rows


def answer_starts(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) of which only the first of every answer is kept, so that counting labels counts answers.

    The first position of a row is never predicted and, packed, every document begins with an ignored label.
    """
    starts = labels != IGNORED
    starts[:, 0] = False
    starts[:, 1:] &= labels[:, :-1] == IGNORED
    return labels.masked_fill(~starts, IGNORED)
