"""From the name of a kind of classifier to a function that fits it, and from that to its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sevpeft.data.read import Consultations
from sevpeft.severity.classifier.calibration import Calibrated
from sevpeft.severity.classifier.crossvalidation import (
    FOLDS,
    Evaluation,
    Fit,
    block_folds,
    evaluated,
    grouped_folds,
    hold_out,
    in_blocks,
    out_of_fold,
)
from sevpeft.severity.classifier.examples import Examples, complete_rows

CALIBRATIONS = {
    "linear": "temperature",
    "rules+linear": "temperature",
    # Neither has the shares of the data: the rules know none, and the transformer's loss weights the classes.
    "rules": "bias_corrected",
    "transformer": "bias_corrected",
}


TRANSFORMER_SHARE = 0.2
"""Of the rows, to calibrate a transformer on: fitting it six times costs too much."""


@dataclass(frozen=True)
class Way:
    """How a classifier is fitted.

    Attributes:
        kind: "rules", "linear", "rules+linear" or "transformer".
        calibration: "temperature", "bias_corrected" or "isotonic"; None for the kind's own (`CALIBRATIONS`).
        calibration_share: share of the rows outside the test that calibrate and do not train; 0 for all of them, each
            by a fit that did not see it; None for the kind's own: 0, of the transformer `TRANSFORMER_SHARE`.
        seed: of the splits, the fit and the shuffling.
        lexicon: of the rules; None for the package's.
        encoder: of the transformer, a Hub id or a folder; None for its default.
        options: further settings of the transformer.
    """

    kind: str
    calibration: str | None = None
    calibration_share: float | None = None
    seed: int = 0
    lexicon: Path | None = None
    encoder: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """For `out_of_fold`. Only what is fitted in seconds is fitted on shuffled labels too."""
        return {
            "calibration": self.method,
            "calibration_share": self.share,
            "seed": self.seed,
            "shuffled": self.kind == "linear",
        }

    @property
    def method(self) -> str:
        """Of calibration."""
        return self.calibration or CALIBRATIONS[self.kind]

    @property
    def share(self) -> float | None:
        """Of the rows, that calibrate and do not train; None where all do, out of folds."""
        if self.calibration_share is None:
            return TRANSFORMER_SHARE if self.kind == "transformer" else None
        return self.calibration_share or None


def fit_of(way: Way, progress: Callable[[str], None] = lambda said: None) -> Fit:
    """The function that fits one classifier, not calibrated. The rules learn nothing; their lexicon is read once."""
    if way.kind == "linear":
        from sevpeft.severity.classifier.linear import fit_linear

        return fit_linear
    if way.kind in ("rules", "rules+linear"):
        from sevpeft.severity.classifier.combination import FitCombined
        from sevpeft.severity.rules import Rules

        rules = Rules.load(way.lexicon)
        if way.kind == "rules":
            return lambda examples, seed: rules
        return FitCombined(rules)
    from sevpeft.severity.classifier.transformer import fit_transformer

    chosen = way.options | ({"encoder": way.encoder} if way.encoder else {})
    return lambda examples, seed: fit_transformer(
        examples.questions, examples.labels, examples.groups, seed=seed, progress=progress, **chosen
    )


def fit_and_judge(
    examples: Examples,
    way: Way,
    *,
    test_share: float = 0.2,
    judge_blocks: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda said: None,
) -> tuple[Calibrated, Evaluation]:
    """Fits and calibrates on rows that share no question with those it is judged on; returns what was judged.

    Where blocks are known, only rows of `judge_blocks` (None for all) that have every severity are judged: the shares
    of the others are no aim.
    """
    fold = hold_out(examples, test_share, seed=way.seed)
    judged = complete_rows(examples.labels, examples.blocks) & in_blocks(examples, judge_blocks)
    result = out_of_fold(examples, [fold], fit_of(way, progress), judged=judged, progress=progress, **way.settings)
    name = "test rows of its own, dealt by question"
    if result.examples.blocks is not None:
        name += f", in {', '.join(block[:20] for block in sorted(set(result.examples.blocks.tolist()))[:6])}"
    return result.last, evaluated(result, name, seed=way.seed)


def cross_validate(
    examples: Examples,
    way: Way,
    *,
    folds: int = FOLDS,
    judge_blocks: Sequence[str] | None = None,
    train_blocks: Sequence[str] | None = None,
    random_grouped: bool = True,
    progress: Callable[[str], None] = lambda said: None,
) -> dict[str, Evaluation]:
    """Both protocols, "random-grouped" and, where the examples have blocks, "block-held-out": protocol → evaluation."""
    fit, found = fit_of(way, progress), {}
    judged = None
    if examples.blocks is not None:
        examples = within(examples, judge_blocks, train_blocks)
        judged = in_blocks(examples, judge_blocks)
    if random_grouped:
        parts = grouped_folds(examples, folds=folds, seed=way.seed)
        result = out_of_fold(examples, parts, fit, judged=judged, progress=progress, **way.settings)
        name = f"{folds} random folds, dealt by question"
        found["random-grouped"] = evaluated(result, name, seed=way.seed)
    if examples.blocks is not None:
        parts = block_folds(examples, judge_blocks, train_blocks)
        result = out_of_fold(examples, parts, fit, progress=progress, **way.settings)
        found["block-held-out"] = evaluated(result, "blocks held out one at a time", seed=way.seed)
    return found


def within(examples: Examples, judge_blocks: Sequence[str] | None, train_blocks: Sequence[str] | None) -> Examples:
    """The rows of the blocks that are judged or trained on; all where nothing is said about training."""
    if examples.blocks is None or train_blocks is None:
        return examples
    wanted = in_blocks(examples, train_blocks) | in_blocks(examples, judge_blocks or train_blocks)
    return examples.take(np.flatnonzero(wanted))


def training_record(consultations: Consultations, examples: Examples, way: Way) -> dict[str, Any]:
    """What a classifier's folder says of the rows it was made of. No text of a row and no path."""
    record: dict[str, Any] = {
        "fingerprints": sorted(fingerprints(consultations)),
        "rows": len(examples),
        "questions": len(np.unique(examples.groups)),
        "labels": examples.counts(),
        "calibration": way.method,
        "calibration_on": calibration_on(way),
        "seed": way.seed,
    }
    if way.kind == "transformer":
        record["encoder"] = Path(way.encoder).name if way.encoder and Path(way.encoder).exists() else way.encoder
        record["options"] = way.options
    return record


def calibration_on(way: Way) -> str:
    """Which rows calibrated it: "folds" (all, each by a fit that did not see it), or a share of their own."""
    return "folds" if way.share is None else f"a share of {way.share:g}"


def fingerprints(consultations: Consultations) -> set[str]:
    """Of the data and of whatever it was prepared from."""

    def inside(content: Any) -> set[str]:
        if isinstance(content, dict):
            parts = [inside(value) for value in content.values()]
            own = {value for key, value in content.items() if "fingerprint" in key and isinstance(value, str)}
            return own.union(*parts)
        if isinstance(content, list):
            return set().union(*(inside(value) for value in content))
        return set()

    return {consultations.fingerprint} | inside(consultations.provenance) | inside(consultations.files)
