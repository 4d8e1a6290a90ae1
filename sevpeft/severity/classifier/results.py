"""What judging came to, evaluations or a transfer, as JSON, pictures and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevpeft.runs import write_atomically
from sevpeft.severity.classifier.crossvalidation import Evaluation
from sevpeft.severity.classifier.plots import draw, draw_tradeoff
from sevpeft.severity.classifier.report import as_json, render
from sevpeft.severity.classifier.transfer import Transfer, render_transfer

METRICS = "metrics.json"


@dataclass(frozen=True)
class Result:
    """Evaluations by heading, or a transfer."""

    evaluations: dict[str, Evaluation]
    transfer: Transfer | None = None

    def content(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """For metrics.json and --json: what is known `about` it, and every figure."""
        if self.transfer is not None:
            return {**about, "transfer": as_json(self.transfer)}
        return {**about, "evaluations": as_json(self.evaluations)}

    def write(self, folder: Path, content: Mapping[str, Any]) -> None:
        """Writes metrics.json and the pictures into a folder that is there."""
        write_atomically(folder / METRICS, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        if self.transfer is None:
            draw(self.evaluations, folder)
        else:
            draw_tradeoff(self.transfer.curve, self.transfer.share, f"{self.transfer.column} = 1", folder)

    def render(self) -> list[Any]:
        """To be printed one after the other, in at most 80 columns."""
        if self.transfer is not None:
            return render_transfer(self.transfer)
        return [part for evaluation in self.evaluations.values() for part in render(evaluation)]
