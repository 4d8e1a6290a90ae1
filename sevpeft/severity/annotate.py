"""The job of `sevpeft annotate`: rows keep all they had and gain their severity, in a new file or folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from sevpeft.data.files import free_name, listed
from sevpeft.data.read import PREPARED_ABOUT, PREPARED_ROWS, Consultations, load_consultations
from sevpeft.errors import DataError, UsageError
from sevpeft.recipe import SEVERITY_PRESETS, DataSection, Section
from sevpeft.runs import check_absent, file_hash, plain_disk_errors, whole_folder
from sevpeft.severity.probabilities import PROBABILITY_COLUMNS, SEVERITIES, severity_probabilities, sharpened
from sevpeft.severity.source import EVIDENCE, judged, load_source
from sevpeft.severity.weights import WeightSummary, severity_weights

METHOD, VERSION = "severity_method", "severity_version"
# What is added to every row; evidence where the classifier gives it.
ADDED = (*PROBABILITY_COLUMNS, "severity", METHOD, VERSION, EVIDENCE)
ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")


class AnnotateSettings(Section):
    """What is annotated, and by what."""

    data: DataSection = Field(default_factory=DataSection)
    """The consultations."""
    method: Literal["rules", "linear", "rules+linear", "transformer"] | None = None
    """Kind of the classifier; unset, that of `classifier`."""
    classifier: str | None = None
    """Folder that `sevpeft classifier fit` made; rules work without one."""
    lexicon: str | None = None
    """Lexicon file of the rules, if not the package's own."""
    temperature: float = Field(default=1.0, gt=0)
    """Contrast of the probabilities: below 1 sharpens, above 1 flattens, 1 changes nothing."""
    replace: bool = False
    """Annotate rows that have severity already; what people gave is kept as severity_given."""

    @model_validator(mode="after")
    def _has_one_classifier(self) -> AnnotateSettings:
        if self.classifier is None and self.method != "rules":
            raise ValueError("needs method=rules, or classifier=FOLDER (made by `sevpeft classifier fit DATA FOLDER`)")
        if self.classifier is not None and self.lexicon is not None:
            raise ValueError("has lexicon and classifier, which has a lexicon of its own; remove one")
        return self


@dataclass(frozen=True)
class Annotation:
    """What was written."""

    output: str
    rows: int
    rejected: dict[str, int]
    """Reason → rows of the input that are no consultation and are not in OUTPUT."""
    method: str
    version: str
    """Of the classifier, and the temperature if it is not 1."""
    counts: dict[str, int]
    """Severity → rows of which it is the likeliest."""
    mean: dict[str, float]
    """Severity → mean probability."""
    weights: WeightSummary
    """Of the preset balanced."""


def annotate(settings: AnnotateSettings, output: Path) -> Annotation | None:
    """Judge the rows and write them to `output`: a file by its ending, a folder where the input is a prepared one.

    Under `accelerate launch` every process judges its share, and the main process writes.

    Returns:
        What was written; None on processes other than the main one.

    Raises:
        UsageError: the ending is none that is written.
        DataError: the rows cannot be read, or have severity and may not be replaced.
        RunError: `output` exists, or the disk refuses.
    """
    check_absent(output)
    endings = ", ".join(ENDINGS)
    if output.suffix not in (*ENDINGS, ""):
        raise UsageError(f"{output.name} has an ending that is not written; end it in {endings}.")
    consultations = load_consultations(settings.data, keep="all")
    if not output.suffix and not consultations.provenance:
        raise UsageError(f"{output.name}: only what `sevpeft prepare` made becomes a folder; end a file in {endings}.")
    kept = _columns(consultations, replace=settings.replace, numbered=not output.suffix)
    classifier = load_source(settings.method, settings.classifier, settings.lexicon)
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        judged(consultations.rows, classifier, rank=rank, processes=processes)
        _wait_for_all()
        if rank:
            return None
    found = judged(consultations.rows, classifier)
    probabilities = sharpened(severity_probabilities(found), settings.temperature)
    likeliest = probabilities.argmax(axis=1)
    version = classifier.version
    if settings.temperature != 1:
        version += f", temperature {settings.temperature:g}"
    columns = {name: pa.array(column) for name, column in zip(PROBABILITY_COLUMNS, probabilities.T, strict=True)}
    columns["severity"] = pa.array(SEVERITIES).take(pa.array(likeliest))
    columns |= {METHOD: pa.repeat(classifier.kind, len(found)), VERSION: pa.repeat(version, len(found))}
    if EVIDENCE in found.column_names:
        columns[EVIDENCE] = found.with_format("arrow")[:][EVIDENCE]
    rows = consultations.rows.select_columns(list(kept)).rename_columns(kept)
    rows = datasets.concatenate_datasets([rows, datasets.Dataset(pa.table(columns))], axis=1)
    annotation = Annotation(
        output=str(output),
        rows=len(rows),
        rejected=consultations.rejected,
        method=classifier.kind,
        version=version,
        counts=dict(zip(SEVERITIES, np.bincount(likeliest, minlength=len(SEVERITIES)).tolist(), strict=True)),
        mean=dict(zip(SEVERITIES, probabilities.mean(axis=0).tolist(), strict=True)),
        weights=WeightSummary.of(severity_weights(probabilities, SEVERITY_PRESETS["balanced"]), likeliest),
    )
    if output.suffix:
        _write_file(rows, output)
    else:
        _write_folder(rows, output, consultations, annotation)
    return annotation


def _columns(consultations: Consultations, *, replace: bool, numbered: bool) -> dict[str, str]:
    """Name in the table → name in OUTPUT; `numbered`: OUTPUT says of every row its number in the first input.

    Raises:
        DataError: the input has severity already, and `replace` is False.
    """
    read, carried = consultations.columns, consultations.carried
    annotated = any(column in (METHOD, VERSION, EVIDENCE) for column in carried.values())
    own = {name: column for name, column in {**read, **carried}.items() if annotated and column in ADDED}
    severity = {name: column for name, column in read.items() if name in ("severity", *PROBABILITY_COLUMNS)}
    if not replace and (own or severity):
        there = listed({**severity, **own}.values())
        raise DataError(
            f"{consultations.source} has severity already ({there}): add replace=true to annotate it anew (what people "
            "gave is kept, as severity_given), or train on it as it is."
        )
    kept = {"row": "row"} if numbered or "row" in consultations.provenance.get("columns", ()) else {}
    for name in consultations.rows.column_names:
        if name != "row" and name not in own:
            wanted = f"{name}_given" if name in severity else carried.get(name, name)
            kept[name] = free_name(wanted, {*ADDED, *kept.values()})
    return kept


def _wait_for_all() -> None:
    """Until every process has judged its share; where one fails, the launcher ends the others."""
    from torch import distributed

    # gloo on a GPU machine too: nothing is computed together. The processes need not be equally fast.
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    distributed.barrier()
    # A process that ends while gloo's threads live is now and then aborted.
    distributed.destroy_process_group()


def _write_file(rows: datasets.Dataset, output: Path) -> None:
    """Write a file under a temporary name and move it into place, for its owner alone: it holds patient text."""
    with plain_disk_errors(output, when_full="free some, then run this again", remedy="choose another OUTPUT"):
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                if output.suffix == ".parquet":
                    rows.to_parquet(stream)
                elif output.suffix == ".jsonl":
                    rows.to_json(stream, force_ascii=False, double_precision=15)
                else:
                    # The line ends of RFC 4180: only with them is a cell quoted that holds a carriage return alone.
                    rows.to_csv(stream, sep="," if output.suffix == ".csv" else "\t", lineterminator="\r\n")
                stream.flush()
                os.fsync(stream.fileno())
            check_absent(output)
            os.rename(partial, output)
        finally:
            Path(partial).unlink(missing_ok=True)


def _write_folder(rows: datasets.Dataset, output: Path, consultations: Consultations, annotation: Annotation) -> None:
    """Write a prepared folder again, with what the input's own files say of its rows and how they were annotated."""
    source = Path(consultations.source).expanduser()
    severity = {name: getattr(annotation, name) for name in ("method", "version", "counts", "mean")}
    with whole_folder(output) as folder:
        rows.to_parquet(folder / PREPARED_ROWS)
        about = consultations.provenance | {
            "columns": rows.column_names,
            "fingerprint": file_hash(folder / PREPARED_ROWS),
            "severity": {**severity, "input_fingerprint": consultations.fingerprint},
        }
        (folder / PREPARED_ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        card = (source / "README.md").read_text(encoding="utf-8").partition("\n## Severity\n")[0]
        counts = ", ".join(f"{name} {count:,}" for name, count in annotation.counts.items())
        (folder / "README.md").write_text(
            card.replace(consultations.fingerprint, about["fingerprint"])
            + "\n## Severity\n\nGiven by a classifier, not by people (`severity_given`, where they did): method "
            + f"`{annotation.method}`, version `{annotation.version}`. Likeliest severity: {counts} rows.\n",
            encoding="utf-8",
        )
        for name in ("rejected.jsonl", "conflicts.jsonl"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
