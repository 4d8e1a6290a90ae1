"""From the counts of a preparation to the data card that stands in its folder: Markdown with the Hub's YAML header.

No row is quoted, no path and no person's name: a card is the first thing that is shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import yaml

from sevpeft.data.splits import SIDES

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def data_card(about: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Return the card for what dataset.json says; `reasons` describes every reason of a rejection."""
    rows, duplicates, splits, settings = (about[part] for part in ("rows", "duplicates", "splits", "settings"))
    parts = [
        f"---\n{yaml.safe_dump(_header(rows['kept']), sort_keys=False, allow_unicode=True)}---",
        "# Medical consultations, prepared with sevpeft",
        f"{rows['read']} rows of {_public(about['input']['source'])} were read and {rows['kept']} kept by "
        f"`sevpeft prepare` {about['sevpeft']}. They are texts of patients: **masking finds patterns and is no "
        "guarantee of anonymity**. Have a person read them before they leave your hands, and keep to the licence "
        "of their source, which this card does not know.",
        "Not a medical device: what the answers advise was not checked.",
    ]
    if about["warnings"]:
        parts += ["## Warnings", "\n".join(f"- {warning}" for warning in about["warnings"])]
    parts += ["## Splits", _split_table(splits), _how_split(splits, settings)]
    parts += ["## Rejected rows", "Each with its reason, and with all that was read, in `rejected.jsonl`."]
    parts += [
        _table(("reason", "rows", "meaning"), ((r, n, reasons.get(r, "")) for r, n in rows["rejected"].items()))
        if rows["rejected"]
        else "None."
    ]
    parts += ["## Cleaning", "Rows whose question or answer a step changed."]
    parts += [
        _table(
            ("step", "setting", "rows"),
            ((step, _said(settings["cleaning"].get(step)), count) for step, count in about["cleaned"].items()),
        )
    ]
    parts += ["## Masks"]
    parts += [
        _table(
            ("kind", "masks", "in rows"),
            ((kind, found["masks"], found["rows"]) for kind, found in about["masked"].items()),
        )
        if about["masked"]
        else "None was asked for."
    ]
    parts += ["## Duplicates", _said_duplicates(duplicates, settings)]
    parts += ["## Files and columns", _FILES, "Columns: " + ", ".join(f"`{name}`" for name in about["columns"]) + "."]
    parts += [
        "Input: " + about["input"]["fingerprint"] + "  \nThis data set: " + about["fingerprint"],
        "Trained on with `sevpeft train RECIPE data.path=FOLDER`; the run then carries this fingerprint.",
    ]
    return "\n\n".join(parts) + "\n"


_FILES = """\
- `consultations.parquet`: the rows, with the near-duplicate `group` and the `split` of each; `row` is its number in
  the input.
- `rejected.jsonl`: what was taken out. `conflicts.jsonl`: groups of near-duplicates with several severities.
- `dataset.json`: settings, counts and fingerprints."""


def _header(kept: int) -> dict[str, Any]:
    size = next((name for most, name in _SIZES if kept < most), "1M<n<10M")
    return {
        "language": ["ar"],
        "task_categories": ["text-generation", "question-answering"],
        "tags": ["medical", "consultations", "sevpeft"],
        "size_categories": [size],
        # Without this the Hub would take the rejected rows for data as well.
        "configs": [{"config_name": "default", "data_files": "consultations.parquet"}],
    }


def _public(source: str) -> str:
    """A name without the folders in which somebody keeps it."""
    name = source if source.startswith("builtin:") or source.endswith(" on the Hub") else PurePath(source).name
    return f"`{name}`"


def _split_table(splits: Mapping[str, Any]) -> str:
    lines: list[tuple[Any, ...]] = [
        (severity, *(counts[side] for side in SIDES), sum(counts.values()))
        for severity, counts in splits["severity"].items()
    ]
    lines.append(("all", *(splits["rows"][side] for side in SIDES), sum(splits["rows"].values())))
    return _table(("severity", *SIDES, "all"), lines)


def _how_split(splits: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    held = splits.get("held_out")
    how = {
        "random": f"At random by group, stratified by severity where there is one, with seed {settings['seed']}.",
        "column split": "As the input's own column says; a side that it lacks was drawn from its training rows.",
    }.get(splits["by"], "")
    if held:
        newest = "in order, the newest or highest to the test" if held["ordered"] else "drawn by the seed"
        how = f"By whole values of the column `{held['column']}`, {newest}:\n\n"
        how += "\n".join(f"- {side}: {held['values'][side]}" for side in SIDES)
        how += "\n"
        if held["validation_from_train"]:
            how += "\nThe validation was drawn from the training rows, by group."
    return (
        f"{how} No near-duplicate stands on two sides; {splits['crossed']} rows were taken out to that end, "
        "from train before validation and never from the test."
    ).lstrip()


def _said_duplicates(duplicates: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    near = (
        f"questions whose four-letter shingles have a Jaccard similarity of {duplicates['threshold']} or more"
        if duplicates["threshold"] < 1
        else "not looked for"
    )
    dropped = {
        "none": "Repeated rows were kept.",
        "exact": "Of rows with equal question, answer and severity the first was kept.",
        "near": "Of each group the first row was kept.",
    }[settings["drop_duplicates"]]
    return _table(
        ("", "number"),
        [
            ("rows with a question that stood before", duplicates["equal_questions"]),
            (f"further near-duplicates: {near}", duplicates["near_questions"]),
            ("groups of the same or nearly the same question", duplicates["groups"]),
            ("rows in the largest group", duplicates["largest_group"]),
            ("groups with several severities", duplicates["conflicting_groups"]),
            ("equal questions with several severities", duplicates["conflicting_equal_questions"]),
        ],
    ) + (f"\n\n{dropped}")


def _said(setting: Any) -> str:
    return {True: "on", False: "off"}.get(setting, str(setting)) if isinstance(setting, bool) else str(setting)


def _table(head: Iterable[Any], lines: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    cells = [head, ["---"] * len(head), *(list(line) for line in lines)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in cells)
