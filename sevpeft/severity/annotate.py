"""The job of `sevpeft annotate`: rows keep all they had and gain their severity, in a new file or folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import datasets
import pyarrow as pa

from sevpeft.data.columns import free_name, listed
from sevpeft.data.read import PREPARED_ABOUT, PREPARED_ROWS, Consultations, load_consultations
from sevpeft.errors import DataError, UsageError
from sevpeft.recipe import SEVERITY_PRESETS
from sevpeft.runs import check_absent, file_hash, keep_private, plain_disk_errors, whole_folder
from sevpeft.severity.probabilities import PROBABILITY_COLUMNS, SEVERITIES, check_answers, severity_probabilities
from sevpeft.severity.settings import AnnotateSettings
from sevpeft.severity.source import EVIDENCE, judged, load_source
from sevpeft.severity.weights import WeightSummary, severity_weights

METHOD, VERSION = "severity_method", "severity_version"
# What is added to every row; evidence where the classifier gives it.
ADDED = (*PROBABILITY_COLUMNS, "severity", METHOD, VERSION, EVIDENCE)
ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Annotation:
    """What was written."""

    output: str
    rows: int
    rejected: dict[str, int]  # reason → rows of the input that are no consultation and are not in OUTPUT
    method: str
    version: str
    counts: dict[str, int]  # severity → rows of which it is the likeliest
    mean: dict[str, float]  # severity → mean probability
    weights: WeightSummary  # of the preset balanced


def annotate(settings: AnnotateSettings, output: Path) -> Annotation | None:
    """Adds the severity of the rows and writes them to `output`: a file by its ending, or a folder of a prepared one.

    Under `accelerate launch` every process judges its share; the main process writes, and the others return None.
    Raises UsageError, DataError or RunError where the ending, the rows or the disk do not allow it.
    """
    check_absent(output)
    consultations = load_consultations(settings.data, keep="all")
    if output.suffix not in ENDINGS and (output.suffix or not consultations.provenance):
        raise UsageError(f"End {output.name} in {', '.join(ENDINGS)}; only a prepared folder becomes a folder.")
    kept = _columns(consultations, replace=settings.replace, numbered=not output.suffix)
    classifier = load_source(settings.method, settings.classifier, settings.lexicon, settings.text)
    check_answers(consultations.rows, settings.text or "question")
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        from torch import distributed

        judged(consultations.rows, classifier, rank=rank, processes=processes)
        # gloo on a GPU machine too: nothing is computed together. The processes need not be equally fast.
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
        distributed.barrier()
        distributed.destroy_process_group()  # its threads now and then abort a process that ends
        if rank:
            return None
    found = judged(consultations.rows, classifier)
    probabilities = severity_probabilities(found)
    likeliest = probabilities.argmax(axis=1)
    columns = {name: pa.array(column) for name, column in zip(PROBABILITY_COLUMNS, probabilities.T, strict=True)}
    columns["severity"] = pa.array(SEVERITIES).take(pa.array(likeliest))
    columns |= {METHOD: pa.repeat(classifier.kind, len(found)), VERSION: pa.repeat(classifier.version, len(found))}
    if EVIDENCE in found.column_names:
        columns[EVIDENCE] = found.with_format("arrow")[:][EVIDENCE]
    rows = consultations.rows.select_columns(list(kept)).rename_columns(kept)
    rows = datasets.concatenate_datasets([rows, datasets.Dataset(pa.table(columns))], axis=1)
    weights = WeightSummary.of(severity_weights(probabilities, SEVERITY_PRESETS["balanced"]), likeliest)
    mean = dict(zip(SEVERITIES, probabilities.mean(axis=0).tolist(), strict=True))
    counts, judge = weights.severities, (classifier.kind, classifier.version)
    annotation = Annotation(str(output), len(rows), consultations.rejected, *judge, counts, mean, weights)
    if output.suffix:
        write_rows(rows, output)
    else:
        _write_folder(rows, output, consultations, annotation)
    return annotation


def _columns(consultations: Consultations, *, replace: bool, numbered: bool) -> dict[str, str]:
    """Name in the table → name in OUTPUT; `numbered`: OUTPUT says of every row its number in the first input."""
    read, carried = consultations.columns, consultations.carried
    annotated = any(column in (METHOD, VERSION, EVIDENCE) for column in carried.values())
    own = {name: column for name, column in {**read, **carried}.items() if annotated and column in ADDED}
    severity = {name: column for name, column in read.items() if name in ("severity", *PROBABILITY_COLUMNS)}
    if not replace and (own or severity):
        known = f"{consultations.source} has severity already ({listed({**severity, **own}.values())})"
        raise DataError(f"{known}: train on it, or add replace=true (what people gave stays, as severity_given).")
    kept = {"row": "row"} if numbered or "row" in consultations.provenance.get("columns", ()) else {}
    for name in consultations.rows.column_names:
        if name != "row" and name not in own:
            wanted = f"{name}_given" if name in severity else carried.get(name, name)
            kept[name] = free_name(wanted, {*ADDED, *kept.values()})
    return kept


def write_rows(rows: datasets.Dataset, output: Path) -> None:
    """Writes a file under a temporary name and moves it into place, for its owner alone: it holds patient text."""
    with plain_disk_errors(output, when_full="free some, then run this again", remedy="choose another OUTPUT"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            partial = Path(folder) / output.name
            if output.suffix == ".parquet":
                rows.to_parquet(partial)
            elif output.suffix == ".jsonl":
                rows.to_json(partial, force_ascii=False, double_precision=15)
            else:
                # The line ends of RFC 4180: only with them is a cell quoted that holds a carriage return alone.
                rows.to_csv(partial, sep="," if output.suffix == ".csv" else "\t", lineterminator="\r\n")
            keep_private(partial)
            check_absent(output)
            partial.rename(output)


def _write_folder(rows: datasets.Dataset, output: Path, consultations: Consultations, annotation: Annotation) -> None:
    """Writes a prepared folder again, with what the input's own files say of its rows and how they were annotated."""
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
            "\n## Severity\n\nGiven by a classifier, not by people (`severity_given`, where they did): method "
            f"`{annotation.method}`, version `{annotation.version}`. Likeliest: "
            + ", ".join(f"{name} in {count:,} rows" for name, count in annotation.counts.items())
        )
        (folder / "README.md").write_text(card + ".\n", encoding="utf-8")
        for name in ("rejected.jsonl", "conflicts.jsonl"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
