"""From consultations as they were gathered to a folder that can be trained on, with a count of all that was done.

This is the whole way of one row, read from top to bottom: clean → mask → reject → duplicates → split → write. Rows go
through memory-mapped Arrow, and what is held in memory is numbers: a group, a side, a reason. The folder appears whole
or not at all, and nothing is lost: a row is in consultations.parquet or, with its reason, in rejected.jsonl.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
from numpy.typing import NDArray

import sevpeft
from sevpeft.data.cleaning import Cleaning
from sevpeft.data.datacard import data_card
from sevpeft.data.dividing import (
    Division,
    Labels,
    column_to_split_by,
    divide,
    said_values,
    severity_labels,
    side_counts,
)
from sevpeft.data.duplicates import THRESHOLD, Groups, conflicting_groups, duplicate_groups
from sevpeft.data.folders import refuse_existing, whole_folder
from sevpeft.data.masking import MASKS
from sevpeft.data.prepared_files import write_conflicts, write_rejected, write_rows
from sevpeft.data.refining import cleaned_counts, masked_counts, refined_rows
from sevpeft.data.rejection import REASONS
from sevpeft.data.sources import PREPARED_ABOUT, PREPARED_ROWS, Consultations, file_fingerprint, load_consultations
from sevpeft.data.splits import SIDES
from sevpeft.data.workers import workers_end_with_this_process
from sevpeft.errors import DataError, RunError, UsageError

DropDuplicates = Literal["none", "exact", "near"]

# What can happen to a row here, beside what `rejection` says of its text.
ALL_REASONS = {
    **REASONS,
    "duplicate": "question, answer and severity stand in an earlier row already",
    "near_duplicate": "an earlier row asks nearly the same",
    "crosses_split": "a near-duplicate stands on a stricter side of the split",
}
# Reasons of `columns`, which a reader gives before there is any text to judge.
_UNREADABLE = {"empty question": "empty", "empty answer": "empty", "broken characters": "encoding_damage"}

_CHAINED = 0.01  # share of the rows from which on a group is too large to be one question
_SMALL = 2_000  # rows below which starting processes takes longer than the work


@dataclass(frozen=True)
class Preparation:
    """What is done to the rows."""

    cleaning: Cleaning = field(default_factory=Cleaning)
    """Switches of the cleaning."""
    masks: tuple[str, ...] = tuple(MASKS)
    """Kinds of personal data that are masked."""
    allow: tuple[str, ...] = ()
    """Reasons for which no row is rejected."""
    near_duplicates: float = THRESHOLD
    """Jaccard similarity of two questions from which on they are near-duplicates; 1 for equal ones only."""
    drop_duplicates: DropDuplicates = "exact"
    """Of equal consultations ("exact") or of near-duplicate questions ("near"), keep the first; "none" keeps all."""
    split_by: str | None = None
    """Column whose values are held out whole; unset, rows are split as their own column says, or at random."""
    resplit: bool = False
    """Split anew although the rows say train, validation or test themselves."""
    validation_size: float | int = 0.1
    """Share (between 0 and 1) or number of the rows to validate on."""
    test_size: float | int = 0.1
    """Share or number of the rows kept for the test; 0 keeps none."""
    seed: int = 0
    """Seed of the split and of the search for near-duplicates."""

    def check(self) -> None:
        """Raise UsageError where a setting names what does not exist."""
        for what, names, known in (("reason", self.allow, REASONS), ("mask", self.masks, MASKS)):
            for name in names:
                if name not in known:
                    raise UsageError(f"There is no {what} '{name}': there are {', '.join(known)}.")
        if "empty" in self.allow:
            raise UsageError("The reason 'empty' cannot be allowed: nothing can be learnt from an empty text.")
        if self.drop_duplicates not in get_args(DropDuplicates):
            raise UsageError(f"drop_duplicates={self.drop_duplicates}: give {' or '.join(get_args(DropDuplicates))}.")


def prepare(
    path: str | os.PathLike[str],
    output: Path,
    settings: Preparation | None = None,
    *,
    num_proc: int | None = None,
    **source: Any,
) -> dict[str, Any]:
    """Prepare the consultations that `path` names and write the folder `output`.

    Args:
        path, source: as `load_consultations` takes them, without `keep`.
        num_proc: processes that clean and compare; by default one a core. The result is the same for any number.

    Returns:
        What dataset.json of the folder says.

    Raises:
        DataError: the rows cannot be read, none is left, or they cannot be split as asked.
        UsageError: a setting names a reason, kind or choice that does not exist.
        RunError: `output` exists already or cannot be written.
    """
    settings = settings or Preparation()
    settings.check()
    refuse_existing(output)
    table = load_consultations(path, keep="all", **source)
    if settings.split_by is not None:
        column_to_split_by(table, settings.split_by)  # before anything slow
    if num_proc is None:
        num_proc = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if num_proc == 1 or len(table.rows) < _SMALL:
        num_proc = None
    with workers_end_with_this_process(), whole_folder(output) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        try:
            about = _prepared(table, settings, source, folder, scratch, num_proc)
        except RuntimeError as error:
            if "abruptly died" not in str(error):
                raise
            raise RunError("A process was killed, most likely because memory ran out: use fewer processes.") from error
        shutil.rmtree(scratch)
    return about


def _prepared(
    table: Consultations,
    settings: Preparation,
    source: dict[str, Any],
    folder: Path,
    scratch: Path,
    num_proc: int | None,
) -> dict[str, Any]:
    refined = refined_rows(
        table.rows,
        cleaning=settings.cleaning,
        masks=settings.masks,
        allow=settings.allow,
        cache_file=scratch / "refined.arrow",
        num_proc=num_proc,
    )
    reasons = np.array(refined["reason"][:], object)
    left = np.flatnonzero(reasons == "")
    if not len(left):
        found = _counted(reasons)
        counts = ", ".join(f"{count} {reason}" for reason, count in found.items())
        raise DataError(
            f"None of {len(reasons)} rows is left ({counts}): look at the rows; --allow {next(iter(found))} would keep "
            "those of the first reason."
        )
    groups = duplicate_groups(
        refined.select(left),
        threshold=settings.near_duplicates,
        seed=settings.seed,
        num_proc=num_proc,
        scratch=scratch,
    )
    labels = severity_labels(table.rows)
    numbers = np.asarray(table.rows["row"][:], np.int64)
    conflicts = write_conflicts(
        folder / "conflicts.jsonl", groups.numbers, numbers[left], labels.codes[left], labels.names
    )

    repeated = _repeated(refined, table.rows, left, groups, labels, settings.drop_duplicates)
    reasons[left[repeated]] = "near_duplicate" if settings.drop_duplicates == "near" else "duplicate"
    stay = ~repeated
    division = divide(
        table,
        left[stay],
        groups.numbers[stay],
        groups.keys[stay],
        labels,
        split_by=settings.split_by,
        resplit=settings.resplit,
        split_named=source.get("split_column") is not None,
        validation_size=settings.validation_size,
        test_size=settings.test_size,
        seed=settings.seed,
    )
    reasons[left[stay][division.crossed]] = "crosses_split"

    sides, group_of = np.full(len(reasons), -1, np.int8), np.full(len(reasons), -1, np.int64)
    sides[left[stay]] = np.where(division.crossed, -1, division.sides)
    group_of[left] = groups.numbers
    columns = write_rows(
        folder / PREPARED_ROWS, table.rows, refined, sides, group_of, split_is_used=division.by == "column split"
    )
    unreadable = write_rejected(folder / "rejected.jsonl", table, reasons, _UNREADABLE)

    about: dict[str, Any] = {
        "sevpeft": sevpeft.__version__,
        "fingerprint": file_fingerprint(folder / PREPARED_ROWS),
        "columns": columns,
        "input": {
            "source": table.source,
            "fingerprint": table.fingerprint,
            "columns": table.columns,
            "carried": table.carried,
            "provenance": table.provenance,
            "files": table.files,
        },
        "settings": {**asdict(settings), **{name: value for name, value in source.items() if value is not None}},
        "rows": {
            "read": len(reasons) + sum(unreadable.values()),
            "kept": int((sides >= 0).sum()),
            "rejected": _counted(reasons, unreadable),
        },
        "cleaned": cleaned_counts(refined),
        "masked": masked_counts(refined, settings.masks),
        "duplicates": {
            "threshold": groups.threshold,
            "groups": groups.count,
            "equal_questions": groups.exact,
            "near_questions": groups.near,
            "largest_group": groups.largest,
            "conflicting_groups": conflicts,
            "conflicting_equal_questions": len(conflicting_groups(groups.questions, labels.codes[left])),
        },
        "splits": _split_counts(sides, labels, division, settings),
    }
    about["warnings"] = _warnings(about, len(left), sides, labels)
    (folder / PREPARED_ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(data_card(about, ALL_REASONS), encoding="utf-8")
    return about


def _repeated(
    refined: datasets.Dataset,
    rows: datasets.Dataset,
    left: NDArray[np.int64],
    groups: Groups,
    labels: Labels,
    drop: DropDuplicates,
) -> NDArray[np.bool_]:
    """Return which of the rows `left` (m,) repeat an earlier one.

    Two rows whose severities differ are no repetition: which of them is right, nobody has said.
    """
    if drop == "none":
        return np.zeros(len(left), bool)
    told = [groups.numbers]
    if drop == "exact":
        # From Arrow: the numpy format of `datasets` would make these 64 bits signed.
        answers = refined.select_columns(["answer_key"]).with_format("arrow")[:]["answer_key"].to_numpy()[left]
        told = [groups.questions, answers.view(np.int64), labels.codes[left]]
        for name in ("p_non_critical", "p_neutral", "p_critical"):
            if name in rows.column_names:
                told.append(np.array(rows[name][:], np.float64).view(np.int64)[left])
    _, first = np.unique(np.stack(told, axis=1), axis=0, return_index=True)
    repeated = np.ones(len(left), bool)
    repeated[first] = False
    return repeated


def _counted(reasons: NDArray[np.object_], more: dict[str, int] | None = None) -> dict[str, int]:
    """Return reason -> number of rows, the most frequent first."""
    names, counts = np.unique(reasons[reasons != ""].astype(str), return_counts=True)
    found = dict(zip(names.tolist(), counts.tolist(), strict=True))
    for reason, count in (more or {}).items():
        found[reason] = found.get(reason, 0) + count
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def _split_counts(sides: NDArray[np.int8], labels: Labels, division: Division, settings: Preparation) -> dict[str, Any]:
    by_severity = {}
    if labels.names:
        for code, name in [*enumerate(labels.names), (-1, "none")]:
            if (labels.codes[sides >= 0] == code).any():
                by_severity[name] = side_counts(sides[labels.codes == code])
    counts: dict[str, Any] = {
        "by": division.by,
        "rows": side_counts(sides),
        "severity": by_severity,
        "crossed": int(division.crossed.sum()),
    }
    if division.held is not None:
        held = division.held
        counts["held_out"] = {
            "column": settings.split_by,
            "ordered": held.ordered,
            "values": {name: said_values(held.values[side], held.ordered) for side, name in enumerate(SIDES)},
            "rows_without_value": held.empty,
            "validation_from_train": division.carved,
        }
    return counts


def _warnings(about: dict[str, Any], compared: int, sides: NDArray[np.int8], labels: Labels) -> list[str]:
    rows, duplicates, splits = about["rows"], about["duplicates"], about["splits"]
    said = []
    if 2 * rows["kept"] < rows["read"]:
        said.append(f"Only {rows['kept']} of {rows['read']} rows are left.")
    if duplicates["conflicting_groups"]:
        said.append(
            f"{duplicates['conflicting_groups']} groups of near-duplicate questions have several severities; "
            "their rows are listed in conflicts.jsonl."
        )
    if duplicates["largest_group"] > max(50, _CHAINED * compared):
        said.append(
            f"The largest group of near-duplicates has {duplicates['largest_group']} rows: it may be a chain; "
            "look at it, or raise the similarity of near-duplicates."
        )
    if splits["crossed"]:
        said.append(
            f"{splits['crossed']} rows were taken out because a near-duplicate stands on a stricter side of the split."
        )
    if splits.get("held_out", {}).get("validation_from_train"):
        said.append("There were too few values to hold out a validation; it was drawn from the training rows.")
    if empty := splits.get("held_out", {}).get("rows_without_value"):
        said.append(f"{empty} rows have no value to hold out by; they are trained on.")
    if labels.names is None:
        said.append("The severity column holds too many different values to be labels; the split is not stratified.")
    elif labels.names:
        unlabelled = int((labels.codes[sides >= 0] < 0).sum())
        if unlabelled:
            said.append(f"{unlabelled} of the kept rows have no severity.")
        for name, counts in splits["severity"].items():
            absent = [side for side, count in counts.items() if not count and splits["rows"][side]]
            if absent and name != "none":
                said.append(f"No row of severity {name} is in {' and '.join(absent)}.")
    return said
