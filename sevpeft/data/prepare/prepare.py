"""Prepares raw consultations for training, and counts all changes.

Steps: clean → mask → reject → duplicates → split → write. Texts stay in memory-mapped Arrow tables; only numbers are in
memory. The folder appears as a whole or not at all. Every row is kept, or written to rejected.jsonl with its reason.
"""

from __future__ import annotations

import heapq
import json
import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from operator import itemgetter
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from huggingface_hub import DatasetCard, DatasetCardData
from numpy.typing import NDArray

import sevpeft
from sevpeft.console import visible
from sevpeft.data import columns as naming
from sevpeft.data.columns import PROBABILITIES, SUM_TOLERANCE, as_text, free_name, free_names, listed
from sevpeft.data.prepare import Cleaning, PrepareSettings
from sevpeft.data.prepare.clean import clean
from sevpeft.data.prepare.duplicates import Ints, conflicting_groups, duplicate_groups
from sevpeft.data.prepare.mask import mask
from sevpeft.data.prepare.reject import reject
from sevpeft.data.read import PREPARED_ABOUT, PREPARED_ROWS, Consultations, load_consultations
from sevpeft.data.split import SIDES, Sides, crossing, draw_sides, given_sides, hold_out, question_key
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError
from sevpeft.runs import check_absent, file_hash, whole_folder, workers_end_with_this_process

# Reasons of the reader -> reasons in rejected.jsonl.
_UNREADABLE = {
    **{"empty question": "empty", "empty answer": "empty", naming.BROKEN: "encoding_damage"},
    **{naming.NOT_TEXT: "not_text", naming.NO_NUMBER: "not_a_number", naming.NO_CONVERSATION: "no_conversation"},
    **{naming.SEVERAL_TURNS: "several_turns", naming.CELL_COUNT: "wrong_cell_count"},
}
_OF_INPUT = ("source", "fingerprint", "columns", "carried", "provenance", "files")
_SMALL = 2_000  # rows below which starting processes takes longer than the work
# Cleaned and masked texts; "" or the reason to reject; hash of the folded answer; steps and masks that changed the row.
_TEXT, _NUMBER = datasets.Value("string"), datasets.Value("int64")
_REFINED = datasets.Features(question=_TEXT, answer=_TEXT, reason=_TEXT, answer_key=_NUMBER, steps=datasets.List(_TEXT))


def prepare(settings: PrepareSettings, output: Path) -> dict[str, Any]:
    """Writes the folder `output`, which must not exist; returns the content of its dataset.json.

    Raises DataError if the rows cannot be read or split, or none is left; RunError if the folder cannot be written.
    """
    check_absent(output)
    table = load_consultations(settings.data, keep="all")
    column = None if settings.split_by is None else _column(table, settings.split_by)  # before anything slow
    with workers_end_with_this_process(), whole_folder(output) as folder, TemporaryDirectory(dir=folder) as scratch:
        about = _prepare(table, settings, column, folder, Path(scratch))
        about["warnings"] = _warnings(about)
        (folder / PREPARED_ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        # The card quotes no row and no path, because it is shared first.
        source, template = about["input"]["source"], str(Path(__file__).with_name("card.md"))
        source = source if source.endswith(" on the Hub") else PurePath(source).name  # without the user's folders
        card = DatasetCard.from_template(DatasetCardData(), template, **about, source=source, sides=SIDES)
        (folder / "README.md").write_text(visible(str(card)), encoding="utf-8")
    return about


def _column(table: Consultations, requested: str) -> str:
    """The column of `table.rows` with the `requested` name in the input, or else in the table."""
    own = {column: name for name, column in (table.columns | table.carried).items()}
    name = own.get(requested, requested)
    if name not in table.rows.column_names:
        raise DataError(f"There is no column '{requested}' to split by: there are {listed([*own, 'row'])}.")
    if name in ("question", "answer", "id"):
        raise DataError(f"Column '{requested}' is the {name}: split by a column with the time or source of each row.")
    return name


def _prepare(
    table: Consultations, settings: PrepareSettings, column: str | None, folder: Path, scratch: Path
) -> dict[str, Any]:
    rows = table.rows
    refined = _refined(rows, settings, scratch)
    reasons = np.array(refined["reason"][:], object)
    left = np.flatnonzero(reasons == "")
    if not len(left):
        counts = Counter(reasons.tolist())
        hint = next((f"; allow=[{name}] would keep some" for name in counts if name != "empty"), "")
        listing = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise DataError(f"None of {len(reasons)} rows is left ({listing}){hint}.")
    batches = refined.select_columns(["question"]).select(left).iter(batch_size=1000)
    questions = (question for batch in batches for question in batch["question"])
    groups = duplicate_groups(questions, threshold=settings.near_duplicates, seed=settings.data.seed)
    codes, names = _labels(rows)
    in_input = np.array(rows["row"][:])[left]
    conflicts = _write_conflicts(folder / "conflicts.jsonl", in_input, groups.numbers, codes[left], names)
    # Rows with different severities are not exact duplicates: neither is known to be the right one.
    present = [name for name in PROBABILITIES if name in rows.column_names]
    written = [np.array(rows[name][:], np.float64).view(np.int64) for name in present]
    exact = [groups.questions, *(of_rows[left] for of_rows in (np.array(refined["answer_key"][:]), codes, *written))]
    same = {"none": [left], "near": [groups.numbers], "exact": exact}[settings.drop_duplicates]
    given = None if column or settings.resplit else given_sides(rows.select(left), settings.data)
    # Of equal rows the one on the strictest side stays, so that a given test keeps its rows.
    order = np.arange(len(left)) if given is None else np.argsort(-given, kind="stable")
    first = np.sort(order[np.unique(np.stack(same, axis=1)[order], axis=0, return_index=True)[1]])
    reasons[np.delete(left, first)] = "near_duplicate" if settings.drop_duplicates == "near" else "duplicate"
    stay = left[first]
    splits = dict[str, Any](by="random")
    if column is not None:
        cells = [as_text(cell, column, "") for cell in rows.select(stay)[column]]
        given, held = hold_out(cells, str(settings.split_by), settings.data)
        splits = {"by": f"column {settings.split_by}", "held_out": held}
    elif given is not None:
        given, splits = given[first], {"by": "column split"}
    strata = None if names is None else codes[stay]
    chosen = draw_sides(groups.keys[first], settings.data, strata=strata, given=given)
    crossed = crossing(chosen, groups.numbers[first])
    for side in set(chosen.tolist()) - set(chosen[~crossed].tolist()):
        raise DataError(f"All {SIDES[side]} rows have a near-duplicate on another side: set split_by or resplit=true.")
    reasons[stay[crossed]] = "crosses_split"
    sides, group_of = np.full(len(reasons), -1, np.int8), np.full(len(reasons), -1, np.int64)
    sides[stay[~crossed]], group_of[left] = chosen[~crossed], groups.numbers
    others = rows.remove_columns("split") if splits["by"] == "column split" else rows
    columns = _write_kept(folder / PREPARED_ROWS, others, refined, sides, group_of)
    rejected = _write_rejected(folder / "rejected.jsonl", table, reasons)

    def of_sides(some: Sides) -> dict[str, int]:
        return {name: int((some == side).sum()) for side, name in enumerate(SIDES)}

    named = dict(enumerate(names)) | {-1: "none"} if names else {}
    by_label = {name: of_sides(sides[codes == code]) for code, name in named.items()}
    times, in_rows = Counter[str](), Counter[str]()
    for batch in refined.select_columns(["steps"]).iter(batch_size=1000):
        times.update(step for steps in batch["steps"] for step in steps)
        in_rows.update(step for steps in batch["steps"] for step in set(steps))
    distinct, together = (int(numbers.max()) + 1 for numbers in (groups.questions, groups.numbers))
    return {
        "sevpeft": sevpeft.__version__,
        "fingerprint": file_hash(folder / PREPARED_ROWS),
        "columns": columns,
        "input": {name: getattr(table, name) for name in _OF_INPUT},
        "settings": settings.model_dump(exclude={"data": {"path"}}),
        "rows": {
            "read": len(reasons) + sum(table.rejected.values()),
            "kept": int((sides >= 0).sum()),
            "rejected": dict(sorted(rejected.items(), key=lambda pair: (-pair[1], pair[0]))),
        },
        "cleaned": {switch: in_rows[switch] for switch in Cleaning.model_fields},
        "masked": {kind: {"masks": times[kind], "rows": in_rows[kind]} for kind, on in settings.masking if on},
        "duplicates": {
            "threshold": settings.near_duplicates,
            "groups": together,
            "equal_questions": len(left) - distinct,
            "near_questions": distinct - together,
            "largest_group": int(np.bincount(groups.numbers).max()),
            "conflicting_groups": conflicts,
            "conflicting_equal_questions": len(conflicting_groups(groups.questions, codes[left])),
        },
        "splits": {
            **splits,
            "crossed": int(crossed.sum()),
            "rows": of_sides(sides),
            "severity": {name: counts for name, counts in by_label.items() if any(counts.values())},
            "labeled": names is not None,
        },
    }


def _refined(rows: datasets.Dataset, settings: PrepareSettings, scratch: Path) -> datasets.Dataset:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_proc = (settings.num_proc or cores) if len(rows) >= _SMALL else 1
    texts, refine = rows.select_columns(["question", "answer"]), partial(_refine, settings=settings)
    written = {"cache_file_name": str(scratch / "refined.arrow"), "load_from_cache_file": False, "features": _REFINED}
    return texts.map(refine, batched=True, num_proc=num_proc if num_proc > 1 else None, desc="Cleaning", **written)


def _refine(batch: dict[str, list[str]], settings: PrepareSettings) -> dict[str, list[Any]]:
    masks = [kind for kind, on in settings.masking if on]
    done = []
    for pair in zip(batch["question"], batch["answer"], strict=True):
        texts, steps = [], list[str]()
        for text in pair:
            text, switches = clean(text, settings.cleaning)
            text, counts = mask(text, masks)
            texts.append(text)
            steps += [*switches, *Counter(counts).elements()]
        reason = reject(texts[0], texts[1], settings.allow) or ""
        done.append((*texts, reason, question_key(fold_for_matching(texts[1]), 0) - 2**63, steps))
    return {name: list(column) for name, column in zip(_REFINED, zip(*done, strict=True), strict=True)}


def _labels(rows: datasets.Dataset) -> tuple[Ints, list[str] | None]:
    """Codes (n,) of the likeliest of three probabilities, or of the severity column, -1 for none or invalid; and names.

    The names are as first written, or None if they are so many or so long that they may be text of patients.
    """
    if set(PROBABILITIES) <= set(rows.column_names):  # a training, too, reads these first
        probabilities = np.stack([np.array(rows[name][:], np.float64) for name in PROBABILITIES], axis=1)
        whole = (probabilities >= 0).all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1) <= SUM_TOLERANCE)
        return np.where(whole, probabilities.argmax(axis=1), -1), [name.removeprefix("p_") for name in PROBABILITIES]
    if "severity" not in rows.column_names:
        return np.full(len(rows), -1, np.int64), []
    written = [(cell or "").strip() for cell in rows["severity"][:]]
    folded = {cell: fold_for_matching(cell) or cell for cell in dict.fromkeys(written) if cell}
    names: dict[str, str] = {}
    for cell, fold in folded.items():
        names.setdefault(fold, cell)
    number = {fold: index for index, fold in enumerate(names)}
    codes = np.array([number[folded[cell]] if cell else -1 for cell in written], np.int64)
    few = len(names) <= 20 and all(len(name) <= 40 for name in names.values())
    return codes, list(names.values()) if few else None


def _write_kept(file: Path, rows: datasets.Dataset, refined: datasets.Dataset, sides: Sides, groups: Ints) -> list[str]:
    """Writes the rows whose side (n,) is not -1, with `group` (n,) and `split`; returns the column names."""
    ours = ("id", "question", "answer", "row")
    new = free_names([name for name in rows.column_names if name not in ours], {"group", "split"})
    others = rows.select_columns(["id", *new, "row"]).rename_columns(new)
    whole = datasets.concatenate_datasets([others, refined.select_columns(["question", "answer"])], axis=1)
    whole = whole.add_column("group", groups).add_column("split", [SIDES[side] for side in sides])
    names = ["id", "question", "answer", *new.values(), "row", "group", "split"]
    whole.select_columns(names).select(np.flatnonzero(sides >= 0)).to_parquet(str(file), batch_size=10_000)
    return names


def _write_rejected(file: Path, table: Consultations, reasons: NDArray[np.object_]) -> Counter[str]:
    """Writes the rows with a reason (n,) and those that the reader rejected, in order, with the input's names."""
    counts = Counter[str]()
    own = table.columns | table.carried
    if table.columns["question"] == table.columns["answer"] or own.pop(naming.INPUT, ""):
        own |= {"question": "question", "answer": "answer"}
    names = {name: free_name(column, {"row", "reason"}) for name, column in own.items()}
    out = np.flatnonzero(reasons != "")
    rejected = (
        {"row": row["row"], "reason": reasons[index]} | {new: row[name] for name, new in names.items()}
        for index, row in zip(out, table.rows.select(out), strict=True)
    )
    # Half of an emoji cannot be written in UTF-8; the escape with a backslash is valid JSON.
    with (
        table.rejected_rows.open(encoding="utf-8") as unreadable,
        file.open("w", encoding="utf-8", errors="backslashreplace") as lines,
    ):
        by_reader = (row | {"reason": _UNREADABLE[row["reason"]]} for row in map(json.loads, unreadable))
        for row in heapq.merge(by_reader, rejected, key=itemgetter("row")):
            counts[row["reason"]] += 1
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return counts


def _write_conflicts(file: Path, rows: Ints, groups: Ints, codes: Ints, names: list[str] | None) -> int:
    """Writes and counts the groups whose rows (m,) have several labels; without labels if `names` is None."""
    conflicts = conflicting_groups(groups, codes)
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    with file.open("w", encoding="utf-8") as lines:
        for group in conflicts.tolist():
            entry: dict[str, Any] = {"group": group, "rows": rows[members[group]].tolist()}
            if names is not None:
                entry["severities"] = [names[code] if code >= 0 else "" for code in codes[members[group]]]
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return len(conflicts)


def _warnings(about: Mapping[str, Any]) -> list[str]:
    rows, duplicates, splits = about["rows"], about["duplicates"], about["splits"]
    largest, conflicts, crossed = duplicates["largest_group"], duplicates["conflicting_groups"], splits["crossed"]
    unlabeled, held = sum(splits["severity"].get("none", {}).values()), splits.get("held_out", {})
    chained, empty = largest > max(50, 0.01 * rows["kept"]), held.get("rows_without_value")
    carved = held.get("validation_from_train")
    checks = [
        (2 * rows["kept"] < rows["read"], f"Only {rows['kept']} of {rows['read']} rows are left."),
        (conflicts, f"{conflicts} groups of near-duplicates have several severities, listed in conflicts.jsonl."),
        (chained, f"The largest group of near-duplicates, maybe a chain, has {largest} rows: try near_duplicates=0.8."),
        (crossed, f"{crossed} rows were removed because a near-duplicate is in the validation or test."),
        (carved, "There are too few values to hold out a validation: it was drawn from the training rows."),
        (empty, f"{empty} rows have no value to hold out by; they are trained on."),
        (not splits["labeled"], "The severity column has too many different values for labels: no strata were made."),
        (unlabeled, f"{unlabeled} of the kept rows have no severity, or probabilities that do not sum to 1."),
    ]
    for reason, count in rows["rejected"].items():
        checks.append((10 * count > rows["read"], f"{count} of {rows['read']} rows are {reason}: see rejected.jsonl."))
    for name, counts in splits["severity"].items():
        absent = [side for side, count in counts.items() if not count and splits["rows"][side]]
        checks.append((absent and name != "none", f"No row of severity {name} is in {' and '.join(absent)}."))
    return [message for applies, message in checks if applies]
