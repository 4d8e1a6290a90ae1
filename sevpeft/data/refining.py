"""From rows as they were read to cleaned and masked ones, each with the reason why it is to be rejected, if any.

The slow part of preparing, on as many processes as there are cores. What was done to a row stands beside it as numbers,
so that the counts are sums over the table and the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from sevpeft.data.cleaning import Cleaning, clean, fold_for_matching
from sevpeft.data.masking import mask
from sevpeft.data.rejection import reject
from sevpeft.data.splits import question_key

_SWITCHES = tuple(switch.name for switch in fields(Cleaning))


def refined_rows(
    rows: datasets.Dataset,
    *,
    cleaning: Cleaning,
    masks: Collection[str],
    allow: Collection[str],
    cache_file: Path,
    num_proc: int | None,
) -> datasets.Dataset:
    """Return for every row, in order: `question` and `answer` cleaned and masked, `reason` ("" where it is kept),
    `answer_key` (64 bits, equal where the folded answers are), `changed_SWITCH` (bool) and `masked_KIND` (count).
    """
    kinds = {"question": "string", "answer": "string", "reason": "string", "answer_key": "uint64"}
    kinds |= {f"changed_{switch}": "bool" for switch in _SWITCHES} | {f"masked_{kind}": "int32" for kind in masks}
    return rows.select_columns(["question", "answer"]).map(
        _refine,
        batched=True,
        features=datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()}),
        fn_kwargs={"cleaning": cleaning, "masks": tuple(masks), "allow": tuple(allow)},
        cache_file_name=str(cache_file),
        load_from_cache_file=False,
        num_proc=num_proc,
        desc="Cleaning",
    )


def cleaned_counts(refined: datasets.Dataset) -> dict[str, int]:
    """Return switch of the cleaning -> number of rows whose question or answer it changed."""
    return {switch: _sum_and_rows(refined, f"changed_{switch}")[1] for switch in _SWITCHES}


def masked_counts(refined: datasets.Dataset, masks: Collection[str]) -> dict[str, dict[str, int]]:
    """Return kind -> number of masks put in place, and of the rows in which they stand."""
    return {kind: dict(zip(("masks", "rows"), _sum_and_rows(refined, f"masked_{kind}"), strict=True)) for kind in masks}


def _refine(
    batch: dict[str, list[str]], cleaning: Cleaning, masks: tuple[str, ...], allow: tuple[str, ...]
) -> dict[str, Any]:
    size = len(batch["question"])
    numbers = {f"changed_{switch}": np.zeros(size, bool) for switch in _SWITCHES}
    numbers |= {f"masked_{kind}": np.zeros(size, np.int32) for kind in masks}
    texts: dict[str, list[str]] = {"question": [], "answer": []}
    for column, done in texts.items():
        for index, text in enumerate(batch[column]):
            text, switches = clean(text, cleaning)
            for switch in switches:
                numbers[f"changed_{switch}"][index] = True
            text, found = mask(text, masks)
            for kind, count in found.items():
                numbers[f"masked_{kind}"][index] += count
            done.append(text)
    reasons = [reject(question, answer, allow) or "" for question, answer in zip(*texts.values(), strict=True)]
    keys = np.array([question_key(fold_for_matching(answer), 0) for answer in texts["answer"]], np.uint64)
    return {**texts, "reason": reasons, "answer_key": keys, **numbers}


def _sum_and_rows(refined: datasets.Dataset, column: str) -> tuple[int, int]:
    total = rows = 0
    for batch in refined.select_columns([column]).with_format("arrow").iter(batch_size=100_000):
        total += pc.sum(batch[column]).as_py() or 0
        rows += pc.sum(pc.greater(pc.cast(batch[column], "int32"), 0)).as_py() or 0
    return total, rows
