"""`sevpeft annotate`: adds the severity to every row and writes the rows to a new file or folder."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from sevpeft.data.columns import free_name, listed
from sevpeft.data.read import PREPARED_ABOUT, PREPARED_ROWS, Consultations, load_consultations
from sevpeft.errors import DataError, UsageError
from sevpeft.recipe import SEVERITY_PRESETS
from sevpeft.runs import check_absent, file_hash, keep_private, plain_disk_errors, whole_folder
from sevpeft.severity.probabilities import (
    PROBABILITY_COLUMNS,
    SEVERITIES,
    check_answers,
    severity_positions,
    severity_probabilities,
)
from sevpeft.severity.settings import AnnotateSettings
from sevpeft.severity.source import EVIDENCE, classify_rows, load_source
from sevpeft.severity.weights import WeightSummary, severity_weights

METHOD, VERSION = "severity_method", "severity_version"
GIVEN = "given"  # the method of a row that keeps the severity of the data
# Columns that every row gets; evidence only if the classifier gives it.
ADDED = (*PROBABILITY_COLUMNS, "severity", METHOD, VERSION, EVIDENCE)
ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Annotation:
    """Summary of the output."""

    output: str
    rows: int
    rejected: dict[str, int]  # reason → rows of the input that are not consultations, and not in OUTPUT
    method: str
    version: str
    counts: dict[str, int]  # severity → rows with this likeliest severity
    mean: dict[str, float]  # severity → mean probability
    weights: WeightSummary  # weights of the preset balanced


def annotate(settings: AnnotateSettings, output: Path) -> Annotation | None:
    """Adds the severity to the rows and writes a file (type by its ending), or a folder if the input is a prepared one.

    Under `accelerate launch` every process classifies its share; the main process writes, and the others return None.
    Raises UsageError for the ending, DataError or WeightError for the rows, and RunError for the disk.
    """
    check_absent(output)
    consultations = load_consultations(settings.data, keep="all")
    if output.suffix not in ENDINGS and (output.suffix or not consultations.provenance):
        raise UsageError(f"End {output.name} in {', '.join(ENDINGS)}; a folder needs a prepared folder as input.")
    kept = _columns(consultations, replace=settings.replace, numbered=not output.suffix)
    classifier = load_source(settings.method, settings.classifier, settings.lexicon, settings.text)
    check_answers(consultations.rows, settings.text or "question")
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        from torch import distributed

        classify_rows(consultations.rows, classifier, rank=rank, processes=processes)
        # gloo also on GPUs, because the processes only wait for each other. One may be much slower than the others.
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
        distributed.barrier()
        distributed.destroy_process_group()  # otherwise its threads sometimes abort a process at exit
        if rank:
            return None
    classified = classify_rows(consultations.rows, classifier)  # from the cache, after several processes
    probabilities = severity_probabilities(classified)
    given = np.full(len(classified), -1)
    if settings.replace == "missing":
        given = severity_positions(consultations.rows, missing=True)
        probabilities[given >= 0] = np.eye(len(SEVERITIES))[given[given >= 0]]
    likeliest = probabilities.argmax(axis=1)
    columns = {name: pa.array(column) for name, column in zip(PROBABILITY_COLUMNS, probabilities.T, strict=True)}
    columns["severity"] = pa.array(SEVERITIES).take(pa.array(likeliest))
    columns[METHOD] = pa.array(np.where(given >= 0, GIVEN, classifier.kind))
    columns[VERSION] = pa.array(np.where(given >= 0, "", classifier.version))
    if EVIDENCE in classified.column_names:
        columns[EVIDENCE] = pa.array(np.where(given >= 0, "", classified[EVIDENCE][:]))
    rows = consultations.rows.select_columns(list(kept)).rename_columns(kept)
    rows = datasets.concatenate_datasets([rows, datasets.Dataset(pa.table(columns))], axis=1)
    weights = WeightSummary.of(severity_weights(probabilities, SEVERITY_PRESETS["balanced"]), likeliest)
    mean = dict(zip(SEVERITIES, probabilities.mean(axis=0).tolist(), strict=True))
    about, by = (str(output), len(rows), consultations.rejected), (classifier.kind, classifier.version)
    annotation = Annotation(*about, *by, weights.severities, mean, weights)
    if output.suffix:
        write_rows(rows, output)
    else:
        _write_folder(rows, output, consultations, annotation)
    return annotation


def _columns(consultations: Consultations, *, replace: bool | str, numbered: bool) -> dict[str, str]:
    """Name in the table → name in OUTPUT, without the columns to replace; `numbered` keeps the row number."""
    read, carried = consultations.columns, consultations.carried
    annotated = any(column in (METHOD, VERSION, EVIDENCE) for column in carried.values())
    own = {name: column for name, column in {**read, **carried}.items() if annotated and column in ADDED}
    severity = {name: column for name, column in read.items() if name in ("severity", *PROBABILITY_COLUMNS)}
    if not replace and (own or severity):
        present = f"{consultations.source} has severity already ({listed({**severity, **own}.values())})"
        missing = "replace=missing for rows without one, or " * ([*severity] == ["severity"] and not own)
        raise DataError(f"{present}: train on it, or add {missing}replace=true for all (labels: severity_given).")
    if replace == "missing" and (own or [*severity] != ["severity"]):
        remedy = "use replace=true" if own or severity else "leave out replace=missing"
        raise DataError(f"{consultations.source} has no column of severities by people to complete; {remedy}.")
    kept = {"row": "row"} if numbered or "row" in consultations.provenance.get("columns", ()) else {}
    for name in consultations.rows.column_names:
        if name != "row" and name not in own:
            new_name = f"{name}_given" if name in severity else carried.get(name, name)
            kept[name] = free_name(new_name, {*ADDED, *kept.values()})
    return kept


def write_rows(rows: datasets.Dataset, output: Path) -> None:
    """Writes a file under a temporary name and moves it into place, readable by its owner only (patient text)."""
    with plain_disk_errors(output, when_full="free some, then run this again", remedy="choose another OUTPUT"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            partial = Path(folder) / output.name
            if output.suffix == ".parquet":
                rows.to_parquet(partial)
            elif output.suffix == ".jsonl":
                rows.to_json(partial, force_ascii=False, double_precision=15)
            else:
                # With the line ends of RFC 4180, a cell that has only a carriage return is quoted too.
                rows.to_csv(partial, sep="," if output.suffix == ".csv" else "\t", lineterminator="\r\n")
            keep_private(partial)
            check_absent(output)
            partial.rename(output)


def _write_folder(rows: datasets.Dataset, output: Path, consultations: Consultations, annotation: Annotation) -> None:
    """Writes a prepared folder with the annotated rows; its other files are those of the input, plus the method."""
    source = Path(consultations.source).expanduser()
    with whole_folder(output) as folder:
        rows.to_parquet(folder / PREPARED_ROWS)
        severity = {name: getattr(annotation, name) for name in ("method", "version", "counts", "mean")}
        severity["input_fingerprint"] = consultations.fingerprint
        changed = {"columns": rows.column_names, "fingerprint": file_hash(folder / PREPARED_ROWS), "severity": severity}
        about = consultations.provenance | changed
        (folder / PREPARED_ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        card = (source / "README.md").read_text(encoding="utf-8").partition("\n## Severity\n")[0]
        card = card.replace(consultations.fingerprint, about["fingerprint"]) + (
            "\n## Severity\n\nThe labels are from a classifier, unless `severity_method` is `given`. Labels by people "
            f"are in `severity_given`. Method `{annotation.method}`, version `{annotation.version}`. Likeliest: "
            + ", ".join(f"{name} in {count:,} rows" for name, count in annotation.counts.items())
        )
        (folder / "README.md").write_text(card + ".\n", encoding="utf-8")
        for name in ("rejected.jsonl", "conflicts.jsonl"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
