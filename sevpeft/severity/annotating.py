"""From consultations and a classifier to the same consultations with their severity, in parts that survive a kill.

What is computed is kept beside OUTPUT, in `.OUTPUT.annotating/`, one small file for so many rows; whoever gives the
same command again goes on with the next part. Parts are dealt out to the processes of a launch. When all are there, the
main process writes rows and parts as one file or folder, moves it into place, and takes the parts away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sevpeft.data.read import Consultations
from sevpeft.errors import ModelError
from sevpeft.recipe import SEVERITY_PRESETS
from sevpeft.runs import check_absent
from sevpeft.severity.annotated_files import (
    EVIDENCE,
    METHOD,
    VERSION,
    Plan,
    Target,
    joined,
    plan_columns,
    target_of,
    write_file,
    write_folder,
)
from sevpeft.severity.dealing import Processes, available_cores, in_workers
from sevpeft.severity.probabilities import PROBABILITY_COLUMNS, SEVERITIES, SeverityClassifier, sharpened
from sevpeft.severity.unfinished import Unfinished
from sevpeft.severity.weighting import WeightSummary, severity_weights

ROWS_OF_PART = {"transformer": 1024}
"""Rows that a kill can cost: about a minute of a transformer on two cores, less than a second of anything else."""
# Few enough that the cores have like shares of a file of 20,000 rows.
_ROWS_OF_PART = 2_500
# Counts up when a part or the state is written differently.
_FORMAT = 1


@dataclass(frozen=True)
class Annotation:
    """What was written.

    Attributes:
        rows: of OUTPUT.
        rejected: reason → rows of the input that are no consultation and are not in OUTPUT.
        method, version, temperature: of the classifier, and what sharpened its probabilities.
        counts, mean: severity → rows of which it is the likeliest, and its mean probability.
        weights: of the preset balanced.
        given, replaced: as `Plan` has them.
        continued: rows that an earlier try had finished.
        shortened: questions of which the classifier did not read the end.
    """

    output: str
    rows: int
    rejected: dict[str, int]
    method: str
    version: str
    temperature: float
    counts: dict[str, int]
    mean: dict[str, float]
    weights: WeightSummary
    given: dict[str, str]
    replaced: list[str]
    continued: int = 0
    shortened: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Annotation:
        return cls(**{**content, "weights": WeightSummary(**content["weights"])})


@dataclass(frozen=True)
class Job:
    """One annotation: what is annotated, by what, and where to."""

    consultations: Consultations
    classifier: SeverityClassifier
    output: Path
    temperature: float = 1.0
    replace: bool = False
    processes: Processes = field(default_factory=Processes)

    @property
    def rows(self) -> int:
        return len(self.consultations.rows)

    @property
    def rows_of_part(self) -> int:
        return ROWS_OF_PART.get(self.classifier.kind, _ROWS_OF_PART)

    @property
    def parts(self) -> list[slice]:
        size = self.rows_of_part
        return [slice(start, min(start + size, self.rows)) for start in range(0, self.rows, size)]

    @property
    def version(self) -> str:
        """Of the probabilities: the classifier's, and how they were sharpened."""
        return self.classifier.version + ("" if self.temperature == 1 else f", temperature {self.temperature:g}")

    def settings(self) -> dict[str, Any]:
        """What the parts depend on, for people as the key of each says it."""
        return {
            "format": _FORMAT,
            "input": self.consultations.fingerprint,
            "columns of the input": self.consultations.rows._fingerprint,
            "rows": self.rows,
            "method": self.classifier.kind,
            "classifier": self.classifier.version,
            "temperature": self.temperature,
            "batch size": getattr(_uncalibrated(self.classifier), "batch_size", None),
            "rows of a part": self.rows_of_part,
        }


def annotate(
    job: Job,
    *,
    tell: Callable[[str], None] = lambda said: None,
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> Annotation | None:
    """Do a job, or what an earlier try has left of it.

    Args:
        tell: is told, on the main process, what else happens than expected.
        progress: is told how many rows of how many are judged, by all processes.

    Returns:
        What was written; None on processes other than the main one.

    Raises:
        UsageError: OUTPUT's ending is none that is written.
        DataError: the input has severity and may not be replaced.
        RunError: OUTPUT exists, parts of another command are in the way, or the disk refuses.
        ModelError: the classifier gives no probabilities.
        WeightError: the temperature is no positive number.
    """
    target = target_of(job.output)
    sharpened(np.full((1, len(SEVERITIES)), 1 / 3), job.temperature)
    processes, work = job.processes, Unfinished(job.output)
    with contextlib.ExitStack() as stack:
        with processes.together(), work.plainly():
            # By all, and before the main process changes anything.
            finished = work.finished(job.settings())
            if finished is None:
                work.remove_empty()
                check_absent(work.output)
        if finished is not None:
            if processes.main:
                tell(f"{job.output} was finished by an earlier try.")
                work.remove()
            return Annotation.from_dict(finished) if processes.main else None
        with processes.together():
            plan = plan_columns(job.consultations, replace=job.replace, folder=target.ending == "folder")
            if processes.main:
                stack.enter_context(work.opened(job.settings()))
        continued = 0
        with processes.together(), work.plainly():
            if processes.main:
                continued = sum(
                    rows.stop - rows.start for number, rows in enumerate(job.parts) if _has(work, number, rows)
                )
                if continued:
                    tell(f"Going on where an earlier try ended: {continued:,} of {job.rows:,} rows are judged.")
        with processes.together(), work.plainly():
            _judge_parts(job, work, progress)
        annotation: Annotation | None = None
        with processes.together(), work.plainly():
            if processes.main:
                annotation = _write_whole(job, work, target, plan, continued)
        return annotation


def _judge_parts(job: Job, work: Unfinished, progress: Callable[[int, int], None]) -> None:
    missing = [n for n in job.processes.part_of(len(job.parts)) if not _has(work, n, job.parts[n])]
    progress(min(work.count() * job.rows_of_part, job.rows), job.rows)
    # Rules are Python that one core runs; the others have threads of their own. A launch has its processes already.
    workers = available_cores() if job.classifier.kind == "rules" and job.processes.count == 1 else 1
    for number, part in zip(missing, in_workers(_judged_part, job, missing, workers), strict=True):
        work.write(number, part)
        progress(min(work.count() * job.rows_of_part, job.rows), job.rows)


def _judged_part(job: Job, number: int) -> pa.Table:
    questions = job.consultations.rows.select_columns(["question"]).with_format("arrow")
    return _judged(job, questions[job.parts[number]]["question"].to_pylist())


def _has(work: Unfinished, number: int, rows: slice) -> bool:
    return work.has(number, rows.stop - rows.start)


def _judged(job: Job, questions: list[str]) -> pa.Table:
    """The columns that are computed for some rows, and in the table's metadata how many questions were cut."""
    inner = _uncalibrated(job.classifier)
    before = getattr(inner, "shortened", 0)
    evidence: list[str] | None = None
    if hasattr(inner, "explained"):
        # Both at once, because finding them is what takes the time.
        probabilities, evidence = inner.explained(questions)
        calibration = getattr(job.classifier, "calibration", None)
        probabilities = probabilities if calibration is None else calibration.apply(probabilities)
    else:
        probabilities = job.classifier.probabilities(questions)
        if hasattr(inner, "evidence"):
            evidence = [inner.evidence(question) for question in questions]
    probabilities = np.asarray(probabilities, dtype=np.float64)
    right = probabilities.shape == (len(questions), len(SEVERITIES)) and np.isfinite(probabilities).all()
    if not right or (probabilities < 0).any() or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-6:
        raise ModelError(f"The {job.classifier.kind} classifier gives no probabilities; fit it again.")
    probabilities = sharpened(probabilities, job.temperature)
    columns: dict[str, Any] = {name: probabilities[:, i] for i, name in enumerate(PROBABILITY_COLUMNS)}
    if evidence is not None:
        columns[EVIDENCE] = pa.array(evidence, pa.string())
    shortened = getattr(inner, "shortened", 0) - before
    return pa.table(columns).replace_schema_metadata({"shortened": str(shortened)})


def _uncalibrated(classifier: SeverityClassifier) -> Any:
    return getattr(classifier, "classifier", classifier)


def _write_whole(job: Job, work: Unfinished, target: Target, plan: Plan, continued: int) -> Annotation:
    probabilities, shortened = _all_probabilities(job, work)
    likeliest = probabilities.argmax(axis=1)
    annotation = Annotation(
        output=str(job.output),
        rows=job.rows,
        rejected=job.consultations.rejected,
        method=job.classifier.kind,
        version=job.version,
        temperature=job.temperature,
        counts=_by_severity(np.bincount(likeliest, minlength=len(SEVERITIES))),
        mean=_by_severity(probabilities.mean(axis=0)),
        weights=WeightSummary.of(severity_weights(probabilities, SEVERITY_PRESETS["balanced"]), likeliest),
        given=plan.given,
        replaced=list(plan.replaced),
        continued=continued,
        shortened=shortened,
    )
    with work.whole() as path:
        tables = joined(job.consultations, plan, _computed(job, work))
        if target.ending == "folder":
            path.mkdir(mode=0o700)
            write_folder(path, job.consultations, tables, _record(annotation, job.classifier.version))
        else:
            write_file(path, target, tables)
    work.finish(job.settings(), annotation.as_dict())
    return annotation


def _all_probabilities(job: Job, work: Unfinished) -> tuple[np.ndarray, int]:
    """(n, 3), which is the one thing that is held in memory for all rows, and how many questions were cut."""
    probabilities = np.empty((job.rows, len(SEVERITIES)))
    shortened = 0
    for number, part in enumerate(job.parts):
        table = work.read(number)
        probabilities[part] = _probabilities(table)
        shortened += int(table.schema.metadata[b"shortened"])
    return probabilities, shortened


def _computed(job: Job, work: Unfinished) -> Iterator[pa.Table]:
    """The added columns, in order, several parts at a time where they are small."""
    together = max(1, _ROWS_OF_PART // job.rows_of_part)
    names = pa.array(SEVERITIES)
    for first in range(0, len(job.parts), together):
        numbers = range(first, min(first + together, len(job.parts)))
        read = pa.concat_tables([work.read(n).replace_schema_metadata(None) for n in numbers])
        columns = {name: read[name] for name in PROBABILITY_COLUMNS}
        columns["severity"] = names.take(pa.array(_probabilities(read).argmax(axis=1)))
        columns[METHOD] = pa.repeat(job.classifier.kind, len(read))
        columns[VERSION] = pa.repeat(job.version, len(read))
        if EVIDENCE in read.column_names:
            columns[EVIDENCE] = read[EVIDENCE]
        yield pa.table(columns)


def _probabilities(table: pa.Table) -> np.ndarray:
    return np.stack([table[name].to_numpy() for name in PROBABILITY_COLUMNS], axis=1)


def _by_severity(values: np.ndarray) -> dict[str, Any]:
    return dict(zip(SEVERITIES, values.tolist(), strict=True))


def _record(annotation: Annotation, version: str) -> dict[str, Any]:
    """What a folder says of how its rows were annotated."""
    return {
        "method": annotation.method,
        "version": version,
        "temperature": annotation.temperature,
        "counts": annotation.counts,
        "mean": annotation.mean,
        "given": annotation.given,
    }
