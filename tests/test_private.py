"""What patients wrote is its owner's alone, in every file and whatever the umask; a run's figures may be shared."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sevpeft.data.prepare import PrepareSettings
from sevpeft.data.prepare.prepare import prepare
from sevpeft.data.read import load_consultations
from sevpeft.evaluation.evaluate import evaluate
from sevpeft.evaluation.report.page import write_report
from sevpeft.evaluation.report.review import settings_of, write_review
from sevpeft.recipe import DataSection, load_recipe
from sevpeft.runs import whole_folder
from sevpeft.severity.annotate import ENDINGS, AnnotateSettings, annotate
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
from sevpeft.severity.classifier.examples import labeled_examples
from sevpeft.severity.classifier.linear import fit_linear
from sevpeft.severity.classifier.store import write_classifier
from sevpeft.training.train import train
from tests.evaluation.judge_server import good, serving

ROOT = Path(__file__).parent.parent
QUICKSTART, SAMPLES = ROOT / "recipes" / "quickstart.yaml", ROOT / "sevpeft/data/samples/consultations.jsonl"
NAME, ID = "زنقوط", "patient-"


@pytest.fixture
def consultations(tmp_path: Path) -> Path:
    """60 rows, each with a name and an id; the last one has no answer and is rejected."""
    bundled = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()[:60]]
    rows = [
        {
            "id": f"{ID}{number}",
            "question": f"{row['question']}. أنا {NAME}",
            "answer": row["answer"] if number < 59 else "",
            "label": row["severity"],
        }
        for number, row in enumerate(bundled)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    path.chmod(0o600)
    return path


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def content(path: Path) -> str:
    if path.suffix == ".parquet":
        return str(pq.read_table(path).to_pylist())
    return path.read_bytes().decode(errors="replace")


def of_patients(folder: Path) -> dict[str, str]:
    """File that holds a patient's name or id → its mode."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and any(word in content(path) for word in (NAME, json.dumps(NAME), ID)):
            found[path.relative_to(folder).as_posix()] = f"{path.stat().st_mode & 0o777:o}"
    return found


def test_every_file_with_words_or_ids_of_patients_is_its_owners_alone(
    consultations: Path,
    tmp_path: Path,
    open_umask: None,
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, name in (("SEVPEFT_CACHE", "cache"), ("TMPDIR", "tmp")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    prepare(PrepareSettings.model_validate({"data": {"path": str(consultations)}}), tmp_path / "prepared")
    for path, endings in ((consultations, ENDINGS), (tmp_path / "prepared", ("",))):
        settings = AnnotateSettings(data=DataSection(path=str(path)), method="rules", replace=True)
        for ending in endings:
            annotate(settings, tmp_path / f"annotated{ending}")
    labeled = load_consultations(consultations, keep="all")
    with whole_folder(tmp_path / "classifier") as folder:
        fitted = fit_linear(labeled_examples(labeled))
        write_classifier(Calibrated([fitted], Calibration()), folder, {"rows": 59})
    settings = [
        f"model.name_or_path={model_folder()}",
        f"data.path={consultations}",
        "training.max_steps=1",
        "training.generate_samples=1",
        "training.max_length=256",
        "generation.max_new_tokens=4",
        "evaluation.bertscore=false",
        "evaluation.n_resamples=100",
    ]
    run = train(load_recipe(QUICKSTART, settings), tmp_path / "run")
    with serving(good) as server:
        asked = ["evaluation.judge.model=m", "evaluation.minimization=true"]
        evaluate(run, [f"evaluation.judge.url={server.url}", *asked])
    write_review(run.folder, 5, "", settings_of(run.folder, []))
    write_report(run.folder)
    found = of_patients(tmp_path)
    expected = ("annotated.jsonl", "annotated.csv", "annotated.parquet", "annotated/consultations.parquet")
    expected += ("annotated/rejected.jsonl", "prepared/consultations.parquet", "prepared/rejected.jsonl")
    expected += ("classifier/vocabulary.json", "run/predictions.jsonl", "run/likelihood.jsonl", "run/scores.jsonl")
    expected += ("run/judgements.jsonl", "run/samples.jsonl", "run/report.html", "run/minimized.jsonl")
    expected += ("run/review-key.json", "run/review/review.html")
    assert set(expected) <= found.keys()
    assert {name: mode for name, mode in found.items() if mode != "600"} == {}
    for folder in ("prepared", "annotated", "classifier", "cache/tables"):
        assert f"{(tmp_path / folder).stat().st_mode & 0o777:o}" == "700", folder
    for shared in ("recipe.yaml", "metrics.json", "environment.json"):
        assert f"{(run.folder / shared).stat().st_mode & 0o044:o}" == "44", shared
