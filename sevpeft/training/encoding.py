"""Turns consultations into `input_ids, labels, token_weights`: what the trainer reads, and a count of what was lost.

Labels are written here, explicitly: the prompt is -100, the answer and the token that ends it are not. TRL would cut
a long row at its end, which is the answer; here the question is shortened first, word by word from its end, and a row
is refused only when its answer leaves no room for a question.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from trl import pack_dataset

from sevpeft.errors import DataError
from sevpeft.modeling.prompts import Prompt

IGNORED = -100
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
        labelled = np.asarray(labels) != IGNORED
        weight = weights[index] / labelled.sum() if per_example else weights[index]
        columns.append(np.where(labelled, weight, 0.0).astype(np.float32).tolist())
    return {"token_weights": columns}
