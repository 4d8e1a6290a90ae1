"""Blinded review by people: writes a sheet of pairs of answers, and reads the ratings from it.

The sheet (XLSX, and one HTML file) shows a question and two answers, A and B, in random order and on random sides. It
has no arm, id or severity. review-key.json unblinds it, and stays in the folder of the comparison.
"""

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
from sevpeft.evaluation.report.page import REVIEWED, cases, direction, page_of, render, stored_object
from sevpeft.evaluation.safety import quadratic_kappa
from sevpeft.evaluation.statistics import Floats, estimate_text, interval
from sevpeft.recipe import EvaluationSection, load_recipe
from sevpeft.runs import Run, file_hash, whole_folder, write_atomically
from sevpeft.severity.probabilities import SEVERITIES

SHEET, KEY = "review", "review-key.json"
# Scale → the words of its drop-down list → number; for "better", the number is the share of A.
_SCALES = {"1-5": {f"{of}": float(of) for of in range(1, 6)}, "yes-no": {"yes": 1.0, "no": 0.0}}
_SCALES |= {"better": {"A": 1.0, "equal": 0.5, "B": 0.0}}
# What an Arabic keyboard or a check box writes for them.
_ALSO = dict(zip("١٢٣٤٥۱۲۳۴۵", "12345" * 2, strict=True)) | {"نعم": "yes", "لا": "no", "true": "yes", "false": "no"}
_WIDTHS = {"code": 14, "question": 50, "A": 60, "B": 60}


def settings_of(folder: Path, overrides: Sequence[str]) -> EvaluationSection:
    """The section evaluation of a run, or of the runs of a comparison, with overrides."""
    if wrong := [one.split("=")[0] for one in overrides if not one.startswith("evaluation.")]:
        raise UsageError(f"{wrong[0]} has no effect here; report takes keys of evaluation only.")
    return load_recipe([*folder.glob("*/recipe.yaml"), folder / "recipe.yaml"][0], overrides).evaluation


def write_review(folder: Path, count: int, arms: str, settings: EvaluationSection) -> list[str]:
    """Writes a sheet of at most `count` pairs of answers of two arms ("ARM,ARM"), and its key; returns screen lines."""
    page = page_of(folder)
    by_arm, likely = page["answers"], [CE, page["facts"].get("Comparison", {}).get("chosen"), *WEIGHTED]
    two = arms.split(",") if arms else [arm for arm in dict.fromkeys([*likely, *by_arm]) if arm in by_arm][:2]
    if len(set(two)) != 2 or set(two) - set(by_arm):
        raise RunError(f"A review needs the answers of two arms; name two in --arms, of {', '.join(by_arm) or 'none'}.")
    if (folder / KEY).exists():
        raise RunError(f"{folder} has a review already; move both {SHEET} and {KEY} away.")
    items = Rubric.load(Path((settings.judge and settings.judge.rubric) or PACKAGE_RUBRIC)).model_dump()["items"]
    shown = cases({arm: by_arm[arm] for arm in two}, count, settings.seed)[0]
    pairs = [[(arm, by_arm[arm][case["identity"]]) for arm in two] for case in shown]
    drawing = random.Random(f"{settings.seed} {json.dumps(pairs, sort_keys=True)}")  # each review has its own codes
    key, rows, columns = dict[str, dict[str, Any]](), list[list[str]](), _columns(items)
    for pair in drawing.sample(pairs, len(pairs)):
        (arm, line), (_, other) = drawing.sample(pair, 2)
        code = "".join(drawing.choices("BCDFGHKLMNPRSTVW", k=10))  # letters that a spreadsheet cannot read as a number
        key[code] = {name: line.get(name) for name in ("id", "severity", "question")} | {"A": arm}
        rows.append([code, line["question"], line["prediction"], other["prediction"]])
    with whole_folder(folder / SHEET) as partial:
        about = {"rows": rows, "columns": columns, "scales": _SCALES, "how": scoring.REVIEW, "direction": direction}
        (partial / f"{SHEET}.html").write_text(render("review.html.jinja", **about), encoding="utf-8")
        _workbook(rows, columns).save(partial / f"{SHEET}.xlsx")
        write_atomically(folder / KEY, json.dumps({"arms": two, "items": items, "rows": key}, ensure_ascii=False))
    holds = f"{len(rows):,} pairs, as XLSX and HTML; contains patients' text"
    return [f"Review: {folder / SHEET} ({holds})", f"Key: {folder / KEY} (unblinds; keep it from the raters)"]


def read_review(folder: Path, settings: EvaluationSection) -> dict[str, Any]:
    """Ratings by arm and severity, the win rate, and the κ of two raters; writes them to review.json too."""
    notes, files = list[str](), np.atleast_1d(settings.judge.file or []).tolist() if settings.judge else []
    if not 1 <= len(files) <= 2:
        raise UsageError("Name the rated sheet, evaluation.judge.file=FILE; for two raters, [FILE,FILE].")
    key = stored_object(folder / KEY, ("arms", "items", "rows"))
    if not key:
        raise RunError(f"There is no {KEY} in {folder}; name the folder in which --review wrote the sheet.")
    (codes, known), arms, columns = zip(*key["rows"].items(), strict=True), key["arms"], _columns(key["items"])
    metrics = {"preferred": scoring.METRICS["preferred"], **scoring.judge_metrics(key["items"], "review")}
    paths = [Path(file).expanduser() for file in files]
    by_side = np.stack([_ratings(path, columns, key["rows"], notes) for path in paths], axis=1)
    if len({file_hash(path) for path in paths}) < len(paths):  # would agree perfectly
        raise UsageError("The files of evaluation.judge.file are the same one; name the sheets of two raters.")
    first_is_a = np.array([row["A"] == arms[0] for row in known])[:, None]
    rated = np.where(first_is_a, by_side, by_side[::-1])  # (arms, raters, n, scores)
    means = np.ma.masked_invalid(rated).mean(axis=1).filled(np.nan).transpose(0, 2, 1)
    scores = {arm: dict(zip(metrics, values, strict=True)) for arm, values in zip(arms, means, strict=True)}
    strata = np.array([SEVERITIES.index(row["severity"]) if row["severity"] else -1 for row in known])
    questions, pairs, agreement = [row["question"] for row in known], {arms[1]: (arms[0],)}, {}
    groups = np.unique(questions, return_inverse=True)[1]
    rows = EvaluationRows([*codes], questions, questions, None, strata, groups, KEY, "")
    for at, name in enumerate(metrics) if len(files) == 2 else ():
        one, other = np.concatenate(rated, axis=1)[..., at]  # one rater each, with both answers of all pairs
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
    """Column of ratings → its scale and question."""
    rated = {f"{side} {name}": (item["scale"], item["asks"].strip()) for side in "AB" for name, item in items.items()}
    return {"better": ("better", "Which of the two is the better answer for this patient?"), **rated}


def _ratings(path: Path, columns: Mapping[str, tuple[str, str]], codes: Mapping[str, Any], notes: list[str]) -> Floats:
    """Ratings of A and B (2, n, scores), first the share of "better"; NaN for empty cells. Adds counts to `notes`."""
    scales = [{"": np.nan} | {word.lower(): of for word, of in _SCALES[scale].items()} for scale, _ in columns.values()]
    table, by_code, names = open_files([path], None, {}), dict[str, list[float]](), ("code", *columns)
    if missing := [name for name in names if name not in table.names]:
        raise DataError(f"{path.name} has no column {listed(missing)}; use a sheet that `report --review` wrote.")
    for number, cells in table.read(table.names):
        place = table.place(number)
        texts = (as_text(cells.get(name), name, place).strip().lower().removesuffix(".0") for name in names)
        code, *words = (_ALSO.get(text, text) for text in texts)
        if (code := code.upper()) in by_code:
            raise DataError(f"{place}: the code {code} is in two rows; delete one of them.")
        if code not in codes:  # the row of instructions, or a row of another sheet
            continue
        question = as_text(cells.get("question"), "question", place)  # absent from the CSV of the page
        if question and question.split() != visible(codes[code]["question"])[:32_000].split():
            raise DataError(f"{place}: this is not the question of the code {code}; sort or move whole rows only.")
        if wrong := [name for name, word, scale in zip(columns, words, scales, strict=True) if word not in scale]:
            choices = ", ".join(_SCALES[columns[wrong[0]][0]])
            raise DataError(f"{place}: '{wrong[0]}' is none of {choices}; correct it, or empty the cell.")
        by_code[code] = [scale[word] for word, scale in zip(words, scales, strict=True)]
    rated = np.array([by_code.get(code, [np.nan] * len(columns)) for code in codes])
    whole, some = (int(test(np.isfinite(rated), axis=1).sum()) for test in (np.all, np.any))
    if not some:
        raise DataError(f"{path.name} has no rating of this review; fill in its own sheet, and run this again.")
    absent, rest = len(codes) - len(by_code), len(by_code) - some
    notes.append(f"{path.name}: {whole} pairs rated, {some - whole} in part, {rest} not, {absent} rows missing.")
    (of_a, of_b), share = np.split(rated[:, 1:], 2, axis=1), rated[:, :1]
    return np.stack([np.hstack([share, of_a]), np.hstack([1 - share, of_b])])


def _workbook(rows: Iterable[Sequence[str]], columns: Mapping[str, tuple[str, str]]) -> openpyxl.Workbook:
    sheet = (book := openpyxl.Workbook()).active
    sheet.title, sheet.freeze_panes, sheet.sheet_view.rightToLeft = SHEET, "B2", True
    questions = [asks for _, asks in columns.values()]
    instructions = ["Confidential: patients' text", scoring.REVIEW, "", "", *questions]
    for line in ([*_WIDTHS, *columns, "comment"], instructions, *rows):
        sheet.append([visible(text)[:32_000] for text in line])  # Excel allows 32,767
    for heading, *cells in sheet.columns:
        letter, (scale, _) = heading.column_letter, columns.get(heading.value, ("", ""))
        sheet.column_dimensions[letter].width = _WIDTHS.get(heading.value, 25)
        for cell in (heading, *cells):
            cell.alignment = openpyxl.styles.Alignment(wrap_text=True, vertical="top")
            if cell.value:  # stays text if it begins with =, also after an edit in the spreadsheet
                cell.data_type, cell.quotePrefix = "s", True
        if scale:
            valid = DataValidation("list", f'"{",".join(_SCALES[scale])}"', showErrorMessage=True)
            valid.add(f"{letter}3:{letter}{sheet.max_row}")
            sheet.add_data_validation(valid)
    return book
