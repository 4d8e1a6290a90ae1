"""Blinded review by people: a sheet of pairs of answers to rate, and the ratings that come back in it.

The sheet (XLSX, and one HTML file) shows a question and two answers, A and B, in random order and on random sides. It
names no arm, id or severity: what unblinds it is review-key.json, which stays in the folder of the comparison.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
from openpyxl.worksheet.datavalidation import DataValidation

from sevpeft.console import visible
from sevpeft.data.columns import as_text, listed
from sevpeft.data.files import open_files
from sevpeft.errors import DataError, RunError, UsageError
from sevpeft.evaluation import scores as scoring
from sevpeft.evaluation.arms import ARMS, CE, WEIGHTED
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.judge import PACKAGE_RUBRIC, Rubric
from sevpeft.evaluation.report.cases import cases, direction
from sevpeft.evaluation.report.page import REVIEWED, page_of, render, stored_object
from sevpeft.evaluation.safety import quadratic_kappa
from sevpeft.evaluation.statistics import Floats, estimate_text, interval
from sevpeft.recipe import EvaluationSection, load_recipe
from sevpeft.runs import Run, whole_folder, write_atomically
from sevpeft.severity.probabilities import SEVERITIES

SHEET, KEY = "review", "review-key.json"
# Scale → the words of its drop-down list, and their numbers; "better" tells the share of A.
_SCALES = {"1-5": {f"{of}": float(of) for of in range(1, 6)}, "yes-no": {"yes": 1.0, "no": 0.0}}
_SCALES |= {"better": {"A": 1.0, "equal": 0.5, "B": 0.0}}
_WIDTHS = {"code": 14, "question": 50, "A": 60, "B": 60}


def settings_of(folder: Path, overrides: Sequence[str]) -> EvaluationSection:
    """How a run, or the runs of a comparison, were evaluated, with overrides of the section evaluation."""
    if wrong := [one.split("=")[0] for one in overrides if not one.startswith("evaluation.")]:
        raise UsageError(f"{wrong[0]} changes nothing here; report takes keys of evaluation only.")
    return load_recipe([*folder.glob("*/recipe.yaml"), folder / "recipe.yaml"][0], overrides).evaluation


def write_review(folder: Path, count: int, arms: str, settings: EvaluationSection) -> list[str]:
    """Writes a sheet of at most `count` pairs of answers of two arms ("ARM,ARM"), and its key; returns what to say."""
    page = page_of(folder)
    by_arm, likely = page["answers"], [CE, page["facts"].get("Comparison", {}).get("chosen"), *WEIGHTED]
    two = arms.split(",") if arms else [arm for arm in dict.fromkeys([*likely, *by_arm]) if arm in by_arm][:2]
    if len(set(two)) != 2 or set(two) - set(by_arm):
        raise RunError(f"A review needs the answers of two arms; of {', '.join(by_arm) or 'none'} name two in --arms.")
    if (folder / KEY).exists():
        raise RunError(f"{folder} has a review already; move {SHEET} and {KEY} away, which belong together.")
    items = Rubric.load(Path((settings.judge and settings.judge.rubric) or PACKAGE_RUBRIC)).model_dump()["items"]
    shown = cases({arm: by_arm[arm] for arm in two}, count, settings.seed)[0]
    pairs = [[(arm, by_arm[arm][case["identity"]]) for arm in two] for case in shown]
    drawing = random.Random(f"{settings.seed} {json.dumps(pairs, sort_keys=True)}")  # so that each review has own codes
    key, rows, columns = dict[str, dict[str, Any]](), list[list[str]](), _columns(items)
    for pair in drawing.sample(pairs, len(pairs)):
        (arm, line), (_, other) = drawing.sample(pair, 2)
        code = "".join(drawing.choices("BCDFGHKLMNPRSTVW", k=10))  # of which no spreadsheet makes a number
        key[code] = {name: line.get(name) for name in ("id", "severity", "question")} | {"A": arm}
        rows.append([code, line["question"], line["prediction"], other["prediction"]])
    with whole_folder(folder / SHEET) as partial:
        about = {"rows": rows, "columns": columns, "scales": _SCALES, "how": scoring.REVIEW, "direction": direction}
        (partial / f"{SHEET}.html").write_text(render("review.html.jinja", **about), encoding="utf-8")
        _workbook(rows, columns).save(partial / f"{SHEET}.xlsx")
        write_atomically(folder / KEY, json.dumps({"arms": two, "items": items, "rows": key}, ensure_ascii=False))
    holds = f"{len(rows):,} pairs, as XLSX and HTML; holds what patients wrote"
    return [f"Review: {folder / SHEET} ({holds})", f"Key: {folder / KEY} (unblinds; keep it from the raters)"]


def read_review(folder: Path, settings: EvaluationSection) -> dict[str, Any]:
    """Ratings by arm and severity, who was preferred, and the κ of two raters; writes them to review.json as well."""
    notes, files = list[str](), np.atleast_1d(settings.judge.file or []).tolist() if settings.judge else []
    if not 1 <= len(files) <= 2:
        raise UsageError("Name the sheet that was filled in, evaluation.judge.file=FILE; of two raters [FILE,FILE].")
    key = stored_object(folder / KEY, ("arms", "items", "rows"))
    if not key:
        raise RunError(f"There is no {KEY} in {folder}; name the folder for which --review wrote the sheet.")
    (codes, known), arms, columns = zip(*key["rows"].items(), strict=True), key["arms"], _columns(key["items"])
    metrics = {"preferred": scoring.METRICS["preferred"], **scoring.judge_metrics(key["items"], "review")}
    of_sides = np.stack([_ratings(Path(one).expanduser(), columns, codes, notes) for one in files], axis=1)
    first_is_a = np.array([row["A"] == arms[0] for row in known])[:, None]
    rated = np.where(first_is_a, of_sides, of_sides[::-1])  # (arms, raters, n, scores)
    means = np.ma.masked_invalid(rated).mean(axis=1).filled(np.nan).transpose(0, 2, 1)
    scores = {arm: dict(zip(metrics, of, strict=True)) for arm, of in zip(arms, means, strict=True)}
    strata = np.array([SEVERITIES.index(row["severity"]) if row["severity"] else -1 for row in known])
    questions, pairs, agreement = [row["question"] for row in known], {arms[1]: (arms[0],)}, {}
    groups = np.unique(questions, return_inverse=True)[1]
    rows = EvaluationRows([*codes], questions, questions, None, strata, groups, KEY, "")
    for at, name in enumerate(metrics) if len(files) == 2 else ():
        one, other = np.concatenate(rated, axis=1)[..., at]  # of each rater, for both answers of a pair
        agreement[name] = interval(quadratic_kappa(one, other), np.tile(groups, 2), settings).as_dict()
        kappa = estimate_text(agreement[name], scoring.METRICS["triage_kappa"])
        notes.append(f"Agreement of the raters (quadratic κ), {metrics[name]['label']}: {kappa}")
    content = {
        "pair": " − ".join(reversed(arms)),
        "columns": {arm: ARMS.get(arm, "an arm of the review") for arm in arms},
        "scores": scoring.summarize(rows, scores, settings, tokens={}, pairs=pairs, metrics=metrics, compared=metrics),
        **{"metrics": metrics, "agreement": agreement, "notes": notes},
        "methods": scoring.methods(settings, "the strata of one score together"),
    }
    Run(folder).write_json(REVIEWED, content)
    return content


def _columns(items: dict[str, dict[str, str]]) -> dict[str, tuple[str, str]]:
    """Column of ratings → its scale and what is asked."""
    rated = {f"{side} {name}": (of["scale"], of["asks"].strip()) for side in "AB" for name, of in items.items()}
    return {"better": ("better", "Which of the two is the better answer for this patient?"), **rated}


def _ratings(path: Path, columns: Mapping[str, tuple[str, str]], codes: Sequence[str], notes: list[str]) -> Floats:
    """Of A and B the numbers (2, n, scores), first the share of being better; NaN without one. The notes count them."""
    scales = [{"": np.nan} | {word.lower(): of for word, of in _SCALES[scale].items()} for scale, _ in columns.values()]
    table, found, names = open_files([path], None, {}), dict[str, list[float]](), ("code", *columns)
    if missing := [name for name in names if name not in table.names]:
        raise DataError(f"{path.name} has no column {listed(missing)}; take a sheet that `report --review` wrote.")
    for number, cells in table.read(table.names):
        place = table.place(number)
        code, *words = (as_text(cells.get(name), name, place).strip().lower().removesuffix(".0") for name in names)
        if (code := code.upper()) in found:
            raise DataError(f"{place}: the code {code} stands twice; take one of the rows out.")
        if code not in codes:  # what is asked, or of another sheet
            continue
        if wrong := [name for name, word, of in zip(columns, words, scales, strict=True) if word not in of]:
            choices = ", ".join(_SCALES[columns[wrong[0]][0]])
            raise DataError(f"{place}: '{wrong[0]}' is none of {choices}; correct it, or empty the cell.")
        found[code] = [of[word] for word, of in zip(words, scales, strict=True)]
    rated = np.array([found.get(code, [np.nan] * len(columns)) for code in codes])
    whole, some = (int(test(np.isfinite(rated), axis=1).sum()) for test in (np.all, np.any))
    if not some:
        raise DataError(f"{path.name} holds no rating of this review; fill in its own sheet, and run this again.")
    gone, rest = len(codes) - len(found), len(found) - some
    notes.append(f"{path.name}: {whole} pairs rated, {some - whole} in part, {rest} not, {gone} rows gone.")
    (of_a, of_b), share = np.split(rated[:, 1:], 2, axis=1), rated[:, :1]
    return np.stack([np.hstack([share, of_a]), np.hstack([1 - share, of_b])])


def _workbook(rows: Iterable[Sequence[str]], columns: Mapping[str, tuple[str, str]]) -> openpyxl.Workbook:
    sheet = (book := openpyxl.Workbook()).active
    sheet.title, sheet.freeze_panes, sheet.sheet_view.rightToLeft = SHEET, "B2", True
    asked = ["Confidential: what patients wrote", scoring.REVIEW, "", "", *(asks for _, asks in columns.values())]
    for line in ([*_WIDTHS, *columns, "comment"], asked, *rows):
        sheet.append([visible(text)[:32_000] for text in line])  # Excel allows 32,767
    for heading, *cells in sheet.columns:
        letter, (scale, _) = heading.column_letter, columns.get(heading.value, ("", ""))
        sheet.column_dimensions[letter].width = _WIDTHS.get(heading.value, 25)
        for cell in (heading, *cells):
            cell.alignment = openpyxl.styles.Alignment(wrap_text=True, vertical="top")
            if cell.value:  # a text that begins with = is no formula, nor when somebody edits it
                cell.data_type, cell.quotePrefix = "s", True
        if scale:
            valid = DataValidation("list", f'"{",".join(_SCALES[scale])}"', showErrorMessage=True)
            valid.add(f"{letter}3:{letter}{sheet.max_row}")
            sheet.add_data_validation(valid)
    return book
