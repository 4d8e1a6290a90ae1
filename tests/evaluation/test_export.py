"""Tables and figures of a comparison for a paper, which hold nothing of a patient and overwrite nothing."""

from __future__ import annotations

import csv
import json
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sevpeft.errors import RunError, UsageError
from sevpeft.evaluation.report import export as module
from sevpeft.evaluation.report.export import export
from sevpeft.evaluation.scores import METRICS
from tests.evaluation.test_report import write_comparison, write_run

FIGURES = {"curves-validation", "curves-validation-critical", "forest-dialect", "forest-severity"}


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    return write_comparison(tmp_path / "cmp")


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which take a second to draw."""
    monkeypatch.setattr(module, "_draw", lambda *_: [])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("without_figures")
def test_tables_hold_what_was_compared_with_every_seed(comparison: Path, tmp_path: Path) -> None:
    export(comparison, csv=tmp_path / "out")
    tables = {path.stem: table(path) for path in (tmp_path / "out").glob("*.csv")}
    assert set(tables) == {"claim", "scores", "differences", "per_seed", "dialects", "curves"}
    assert [row["shown"] for row in tables["claim"]] == ["true", "true", "false"]
    assert [float(row["by_rows_value"]) for row in tables["claim"]] == pytest.approx([-0.06, -0.06, 0.01])
    key = {"severity": "critical", "score": "nll", "arm": "balanced", "reference": "ce"}
    difference = next(row for row in tables["differences"] if row.items() >= key.items())
    assert [float(difference[name]) for name in ("value", "low", "high", "p")] == pytest.approx(
        [-0.05, -0.15, 0.05, 0.004]
    )
    assert {**key, "seed": "0", "value": "-0.05"} in tables["per_seed"] and len(tables["per_seed"]) == 6
    assert [(row["dialect"], row["arm"]) for row in tables["dialects"]][:2] == [
        ("egyptian", "balanced"),
        ("egyptian", "shuffled"),
    ]
    # log.jsonl of each arm, at its two validations.
    curve = [(row["arm"], row["step"], row["value"]) for row in tables["curves"] if row["series"] == "validation"]
    assert curve == [
        (arm, step, value) for arm in ("ce", "balanced", "shuffled") for step, value in (("0", "5"), ("1", "4"))
    ]


@pytest.mark.usefixtures("without_figures")
def test_tables_for_latex_say_in_the_caption_how_they_came(comparison: Path, tmp_path: Path) -> None:
    export(comparison, latex=tmp_path / "out")
    tables = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.tex")}
    assert set(tables) == {"claim", "scores", "differences", "per_seed", "dialects"}
    for name, text in tables.items():
        assert text.count("\\toprule") == text.count("\\bottomrule") == 1, name
        caption = text.split("\\caption{")[1].split("\\begin{tabular}")[0]
        # The interval of a one-sided test at 5 % has 90 %, whatever evaluation.confidence_level is.
        interval = "90\\% intervals" if name == "claim" else "Interval: 90\\% of questions"
        assert "Seeds 0" in caption and interval in caption and ("Interval:" in caption) == (name != "claim"), name
        columns = len(re.findall("l", re.search(r"tabular}{(l+)}", text)[1]))  # type: ignore[index]
        rows = [row for row in text.splitlines() if row.endswith(r"\\")]
        assert {row.count(" & ") + 1 for row in rows} == {columns} and len(rows) > 1, name
    assert "Test: 9 permutations" in tables["differences"]
    assert "critical & NLL & ce & $-$0.050 [$-$0.150, 0.050] & 0 & .010 & yes & $-$0.060" in tables["claim"]
    assert "non-critical & NLL & ce & +0.020 [$-$0.080, 0.120] & 0.01 & .300 & no" in tables["claim"]
    assert r"= the = a\_b & balanced" in tables["dialects"]


@pytest.mark.usefixtures("without_figures")
def test_a_latex_table_has_one_unit_for_difference_margin_and_detectable_difference(
    comparison: Path, tmp_path: Path
) -> None:
    content = json.loads((comparison / "comparison.json").read_text(encoding="utf-8"))
    content["metrics"]["urgent_referral"] = METRICS["urgent_referral"]
    referral = {"value": -0.02, "low": -0.04, "high": 0.0, "rows": 4, "p": 0.2, "per_seed": [-0.02]}
    referral |= {"p_at_most": False, "detectable": 0.03, "reference": "ce"}
    safety = {"metric": "urgent_referral", "stratum": "critical", "margin": 0.05, "shown": False, **referral}
    content["claim"]["parts"].append(safety)
    arms = {"balanced": {**referral, "against": {"ce": referral}}}
    content["scores"]["critical"]["metrics"]["urgent_referral"] = arms
    (comparison / "comparison.json").write_text(json.dumps(content), encoding="utf-8")
    export(comparison, latex=tmp_path / "out")
    claim, differences = ((tmp_path / "out" / f"{name}.tex").read_text("utf-8") for name in ("claim", "differences"))
    assert "$-$2.00 [$-$4.00, 0.00] & 5 & " in claim
    assert "$-$2.00 [$-$4.00, 0.00] & .200 & 3.00 " in differences


def test_figures_are_svg_and_pdf_and_nothing_is_of_a_patient(comparison: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outputs = {"csv": tmp_path / "csv", "latex": tmp_path / "tex"}
    assert export(comparison, **outputs) == [
        f"Export: {path} (contains no patients' text)" for path in outputs.values()
    ]
    for output in outputs.values():
        assert {path.stem for path in output.glob("*.svg")} == {path.stem for path in output.glob("*.pdf")} == FIGURES
        assert all(path.read_bytes()[:5] == b"%PDF-" for path in output.glob("*.pdf"))
        assert all("<svg" in path.read_text(encoding="utf-8")[:2000] for path in output.glob("*.svg"))
        for path in (path for path in output.iterdir() if path.suffix != ".pdf"):
            assert not re.search(r"[\u0620-\u064a]", path.read_bytes().decode(errors="ignore")), path
            assert str(tmp_path) not in path.read_bytes().decode(errors="ignore"), path
        assert stat.S_IMODE(output.stat().st_mode) & 0o077  # unlike the report, they may be shown


def test_without_matplotlib_the_tables_are_written_and_the_rest_is_named(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert ".[figures]" in export(comparison, csv=tmp_path / "out")[0]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".csv"}


def test_nothing_is_overwritten_and_nothing_half_written(comparison: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="there exists already"):
        export(comparison, csv=tmp_path / "new", latex=tmp_path / "there")
    with pytest.raises(UsageError, match="two folders"):
        export(comparison, csv=tmp_path / "new", latex=tmp_path / "new")
    with pytest.raises(RunError, match="no comparison"):
        export(write_run(tmp_path / "run"), csv=tmp_path / "new")
    content = json.loads((comparison / "comparison.json").read_text())
    (comparison / "comparison.json").write_text(json.dumps({**content, "runs": None}))
    with pytest.raises(AttributeError):
        export(comparison, csv=tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cmp", "run", "there"]


@pytest.mark.usefixtures("without_figures")
def test_the_verb_says_where_the_export_is_and_refuses_a_folder_that_exists(
    comparison: Path, tmp_path: Path, sevpeft_: Callable[..., tuple[int, str, str]]
) -> None:
    words: list[Any] = ["report", comparison, "--csv", tmp_path / "out"]
    code, out, _ = sevpeft_(*words)
    assert code == 0 and out.splitlines()[-1] == f"Export: {tmp_path / 'out'} (contains no patients' text)"
    code, out, err = sevpeft_(*words)
    assert code == 1 and "exists already" in err and len(err.strip().splitlines()) == 1
