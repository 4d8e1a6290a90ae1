"""Weighted training rows and validation rows, made from a recipe and the prompt of a base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from sevpeft.data.files import FILE_COLUMN
from sevpeft.data.read import PREPARED_ABOUT, Consultations, Keep, load_consultations
from sevpeft.data.split import Splits, question_key, split_rows
from sevpeft.errors import DataError, WeightError
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import Recipe
from sevpeft.runs import workers_end_with_this_process
from sevpeft.severity.probabilities import has_severity
from sevpeft.severity.source import Severity, severity_of
from sevpeft.severity.weights import WeightSummary, severity_weights
from sevpeft.training.compat import IGNORED

# Below this, progress bars of the single steps flash by and only hide what matters.
ROWS_WORTH_A_BAR = 20_000


@dataclass(frozen=True)
class Prepared:
    """Rows ready for `SeveritySFTTrainer`, the counts of how they came about, and what the training rows are called."""

    train: Dataset
    validation: Dataset
    weights: WeightSummary
    summary: dict[str, Any]
    row_names: RowNames


def load_splits(recipe: Recipe) -> tuple[Consultations, Splits, Severity | None]:
    """Reads the recipe's data and divides it.

    Returns:
        The table, its parts, and the severity of the table's rows, None when there is none and the recipe asks for
        plain cross-entropy.
    """
    data = recipe.data
    keep: Keep = ("group",) if (Path(data.path).expanduser() / PREPARED_ABOUT).is_file() else "mapped"
    table = load_consultations(data, keep=keep)
    asked = recipe.severity
    plain = asked.control == "uniform" and asked.source == "columns" and not has_severity(table.rows)
    severity = None
    if not plain:
        severity = severity_of(
            table.rows, source=asked.source, classifier=asked.classifier, temperature=asked.temperature
        )
    rows = table.rows.add_column("source_index", np.arange(len(table.rows)))
    strata = None if severity is None else severity.strata
    splits = split_rows(rows, data, strata=strata, keys=_groups(rows, data.seed))
    return table, splits, severity


def _groups(rows: Dataset, seed: int) -> np.ndarray | None:
    """(n,) one number for each group of near-duplicate questions, where `sevpeft prepare` has found them.

    Hashed, because what is carved from the train rows is taken in the order of these numbers.
    """
    if "group" not in rows.column_names:
        return None
    return np.asarray([question_key(group, seed) for group in rows["group"]], dtype=np.uint64)


def prompt_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The recipe's prompt for this tokenizer; training and generation both use it."""
    return Prompt.build(tokenizer, **recipe.prompt.model_dump())


def prepare(recipe: Recipe, prompt: Prompt, scratch: Path) -> Prepared:
    """Everything up to the trainer.

    Args:
        prompt: of the base model's tokenizer.
        scratch: folder for memory-mapped Arrow files, to be removed after training.
    """
    table, splits, severity = load_splits(recipe)
    with _bars(len(table.rows)), workers_end_with_this_process():
        return _encode_and_weight(recipe, prompt, scratch, table, splits, severity)


def _encode_and_weight(
    recipe: Recipe,
    prompt: Prompt,
    scratch: Path,
    table: Consultations,
    splits: Splits,
    severity: Severity | None,
) -> Prepared:
    settings = recipe.training.settings()
    max_length, num_proc = settings["max_length"], settings.get("dataset_num_proc")
    encoded, reports = {}, {}
    for name, rows in (("train", splits.train), ("validation", splits.validation)):
        encoded[name], reports[name] = encode_rows(
            rows,
            prompt,
            max_length,
            strata=None if severity is None else severity.strata[source_index(rows)],
            cache_file=scratch / f"{name}.arrow",
            num_proc=num_proc,
        )
    kept = source_index(splits.train)[source_index(encoded["train"])]
    weights, summary = weigh(recipe, severity, kept)
    train = add_token_weights(
        encoded["train"], weights, recipe.severity.reduction, cache_file=scratch / "weighted.arrow"
    )
    train = train.remove_columns(["severity", "source_index"])
    if settings.get("packing"):
        train = pack_rows(train, max_length, cache_file=scratch / "packed.arrow")
    return Prepared(
        train=train,
        validation=_by_length(encoded["validation"]).remove_columns("source_index"),
        weights=summary,
        summary=summary_of(table, splits, severity, {name: report.as_dict() for name, report in reports.items()}),
        row_names=RowNames(encoded["train"], splits.train),
    )


def _by_length(rows: Dataset) -> Dataset:
    """Longest first: batches then need little padding, and too little memory shows at once."""
    return rows.select(np.argsort(-lengths_of(rows), kind="stable"))


def lengths_of(rows: Dataset) -> np.ndarray:
    """(n,) tokens of each encoded row, from Arrow's offsets."""
    tables = rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([pc.list_value_length(table["input_ids"]).to_numpy() for table in tables])


def summary_of(
    table: Consultations, splits: Splits, severity: Severity | None, encoding: dict[str, Any]
) -> dict[str, Any]:
    """What a run's metrics.json says about its data: where it comes from and how many rows went where."""
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
    }


def weigh(recipe: Recipe, severity: Severity | None, kept: np.ndarray) -> tuple[np.ndarray, WeightSummary]:
    """Weights (n,) of the training rows that were kept, and what they amount to."""
    if severity is None:
        ones = np.ones(len(kept))
        return ones, WeightSummary.of(ones, None)
    asked = recipe.severity
    weights = severity_weights(
        severity.probabilities[kept],
        asked.coefficients(),
        normalize=asked.normalize,
        control=asked.control,
        seed=recipe.training.settings()["seed"],
    )
    return weights, WeightSummary.of(weights, severity.strata[kept])


def source_index(rows: Dataset) -> np.ndarray:
    """(n,) position of every row in the table that it was taken from."""
    return np.asarray(rows.with_format("numpy")["source_index"][:])


@contextmanager
def _bars(rows: int) -> Iterator[None]:
    """Progress bars of `datasets` where a step takes long enough to need one."""
    if rows >= ROWS_WORTH_A_BAR:
        datasets.enable_progress_bars()
    try:
        yield
    finally:
        datasets.disable_progress_bars()


# A question shortened to less than this says nothing any more; a question that is shorter by nature is kept whole.
FEWEST_QUESTION_WORDS = 4

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "severity": Value("int8"),
        "source_index": Value("int64"),
        "lost_words": Value("int32"),
        "length": Value("int32"),
        "answer_length": Value("int32"),
    }
)


@dataclass(frozen=True)
class EncodingReport:
    """What encoding did to a split. Lengths are in tokens, losses in words of the question."""

    rows: int
    refused: int
    shortened: int
    lost_words: int
    most_lost_words: int
    median_length: int
    longest: int
    answer_tokens: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def encode_rows(
    rows: Dataset,
    prompt: Prompt,
    max_length: int | None,
    *,
    strata: np.ndarray | None,
    cache_file: Path,
    num_proc: int | None = None,
) -> tuple[Dataset, EncodingReport]:
    """Tokenises a split.

    Args:
        rows: columns question, answer and, optionally, dialect.
        prompt: template shared with generation.
        max_length: tokens of prompt and answer together; None for no limit.
        strata: (n,) position in SEVERITIES of every row; None when severity is not known (then -1).
        cache_file: Arrow file that the result is written to and memory-mapped from.
        num_proc: processes, as in `datasets.Dataset.map`.

    Returns:
        Dataset with input_ids, labels, severity and source_index (row of `rows`), and the report.

    Raises:
        DataError: no row is left.
    """
    if strata is None:
        strata = np.full(len(rows), -1, dtype=np.int8)
    encoded = rows.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=_FEATURES,
        fn_kwargs={"prompt": prompt, "max_length": max_length, "strata": strata},
        cache_file_name=str(cache_file),
        load_from_cache_file=False,
        num_proc=num_proc,
        desc="Encoding",
    )
    if len(encoded) == 0:
        raise DataError(
            f"None of {len(rows)} consultations fits training.max_length={max_length} with its answer; raise it."
        )
    counts = encoded.select_columns(["length", "answer_length", "lost_words"]).with_format("numpy")[:]
    lengths, lost = counts["length"], counts["lost_words"]
    report = EncodingReport(
        rows=len(encoded),
        refused=len(rows) - len(encoded),
        shortened=int((lost > 0).sum()),
        lost_words=int(lost.sum()),
        most_lost_words=int(lost.max()),
        median_length=int(np.median(lengths)),
        longest=int(lengths.max()),
        answer_tokens=int(counts["answer_length"].sum()),
    )
    return encoded.remove_columns(["length", "answer_length", "lost_words"]), report


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
        raise DataError(f"There are {len(weights)} severity weights for {len(encoded)} consultations.")
    return encoded.map(
        _weight_batch,
        batched=True,
        with_indices=True,
        features=Features({**encoded.features, "token_weights": List(Value("float32"))}),
        fn_kwargs={"weights": weights, "per_example": reduction == "examples"},
        cache_file_name=str(cache_file),
        load_from_cache_file=False,
        desc="Weighting",
    )


def pack_rows(encoded: Dataset, max_length: int, *, cache_file: Path) -> Dataset:
    """Packs rows into blocks of at most `max_length` tokens with TRL's best-fit-decreasing packer."""
    columns = ["input_ids", "labels", "token_weights"]
    return pack_dataset(
        encoded.select_columns(columns),
        seq_length=max_length,
        strategy="bfd",
        map_kwargs={"cache_file_name": str(cache_file), "load_from_cache_file": False, "desc": "Packing"},
    )


def _encode_batch(
    batch: dict[str, list[Any]], indices: list[int], prompt: Prompt, max_length: int | None, strata: np.ndarray
) -> dict[str, list[Any]]:
    dialects = batch.get("dialect")
    prompts = prompt.prompt_ids(batch["question"], dialects)
    answers = prompt.answer_ids(batch["answer"])
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for position, (index, prompt_ids, answer_ids) in enumerate(zip(indices, prompts, answers, strict=True)):
        lost = 0
        if max_length is not None and len(prompt_ids) + len(answer_ids) > max_length:
            dialect = dialects[position] if dialects else None
            shorter = shortened_prompt(batch["question"][position], dialect, prompt, max_length - len(answer_ids))
            if shorter is None:
                continue
            prompt_ids, lost = shorter
        columns["input_ids"].append(prompt_ids + answer_ids)
        columns["labels"].append([IGNORED] * len(prompt_ids) + answer_ids)
        columns["severity"].append(int(strata[index]))
        columns["source_index"].append(index)
        columns["lost_words"].append(lost)
        columns["length"].append(len(prompt_ids) + len(answer_ids))
        columns["answer_length"].append(len(answer_ids))
    return columns


def shortened_prompt(question: str, dialect: str | None, prompt: Prompt, room: int) -> tuple[list[int], int] | None:
    """Prompt of the longest beginning of the question, in whole words, that takes at most `room` tokens."""
    words = question.split()
    kept, ids = 0, None
    low, high = min(FEWEST_QUESTION_WORDS, len(words)), len(words) - 1
    while low <= high:
        middle = (low + high) // 2
        candidate = prompt.prompt_ids([" ".join(words[:middle])], [dialect])[0]
        if len(candidate) <= room:
            kept, ids, low = middle, candidate, middle + 1
        else:
            high = middle - 1
    return None if ids is None else (ids, len(words) - kept)


def _weight_batch(
    batch: dict[str, list[Any]], indices: list[int], weights: np.ndarray, per_example: bool
) -> dict[str, list[list[float]]]:
    columns = []
    for index, labels in zip(indices, batch["labels"], strict=True):
        labeled = np.asarray(labels) != IGNORED
        weight = weights[index] / labeled.sum() if per_example else weights[index]
        columns.append(np.where(labeled, weight, 0.0).astype(np.float32).tolist())
    return {"token_weights": columns}


class RowNames:
    """Names rows by their number in the data, never by what they say.

    Args:
        encoded: `input_ids` and `source_index`, the position in `rows`, of each training row.
        rows: the split that was encoded, with `row`, its number in the input, and `file` where there are several.
    """

    def __init__(self, encoded: Dataset, rows: Dataset) -> None:
        self._encoded = encoded.select_columns(["input_ids", "source_index"])
        self._rows = rows.select_columns([name for name in ("row", FILE_COLUMN) if name in rows.column_names])

    def __call__(self, documents: Sequence[Sequence[int]]) -> list[str]:
        """Names of the rows with exactly these tokens, in the order of the data; equal rows are all named."""
        wanted = {tuple(document) for document in documents}
        lengths = list({len(document) for document in wanted})
        found: list[int] = []
        for table in self._encoded.with_format("arrow").iter(batch_size=10_000):
            column = table["input_ids"].combine_chunks()
            fitting = np.flatnonzero(np.isin(pc.list_value_length(column).to_numpy(zero_copy_only=False), lengths))
            positions = table["source_index"].to_numpy()
            found += [int(positions[index]) for index in fitting if tuple(column[index].as_py()) in wanted]
        return [self._name(index) for index in found]

    def _name(self, index: int) -> str:
        row = self._rows[index]
        return f"row {row['row']}{f' of {row[FILE_COLUMN]}' if FILE_COLUMN in row else ''}"


@dataclass
class SeverityCollator(DataCollatorForLanguageModeling):
    """Collates rows of `input_ids, labels, token_weights` (training) or `input_ids, labels, severity` (validation).

    Returns what TRL's collator returns, and `token_weights` (float32, the shape of `labels`) and `severity` (int64,
    one number per row) where the rows have them.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call(examples)
        weighted = ["token_weights" in example for example in examples]
        if any(weighted):
            if not all(weighted):
                raise WeightError("Some rows of a batch have token_weights and some have none.")
            output["token_weights"] = self._laid_out_like_labels(examples)
        if "severity" in examples[0]:
            output["severity"] = torch.tensor([example["severity"] for example in examples], dtype=torch.long)
        return output

    def _laid_out_like_labels(self, examples: list[dict[str, Any]]) -> torch.Tensor:
        rows = []
        for example in examples:
            if len(example["token_weights"]) != len(example["input_ids"]):
                raise WeightError(
                    f"A row has {len(example['token_weights'])} token_weights for {len(example['input_ids'])} tokens."
                )
            rows.append(torch.tensor(example["token_weights"], dtype=torch.float32))
        if self.padding_free:
            rows = [torch.cat(rows)]
        padded: torch.Tensor = pad(
            rows, padding_value=0.0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )
        return padded


def documents_of(batch: dict[str, Any]) -> list[list[int]]:
    """Tokens of each consultation of a batch, padded, padding-free or packed."""
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        masks = batch["attention_mask"].bool()
        return [row[mask].tolist() for row, mask in zip(ids, masks, strict=True)]
    begins = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
    flat = ids.flatten()
    return [flat[begin:end].tolist() for begin, end in zip(begins, [*begins[1:], len(flat)], strict=True)]
