"""The options that say how a severity classifier is fitted and judged, and which of them go together."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sevpeft.errors import UsageError

if TYPE_CHECKING:
    from sevpeft.severity.classifier.fitting import Way


class Kind(str, Enum):
    linear = "linear"
    transformer = "transformer"
    rules = "rules"
    combined = "rules+linear"


class Method(str, Enum):
    temperature = "temperature"
    bias_corrected = "bias_corrected"
    isotonic = "isotonic"


Calibrate = Annotated[
    Method | None,
    typer.Option(
        "--calibration",
        help="By default temperature for linear and rules+linear, bias_corrected for rules and transformer.",
        show_default=False,
    ),
]
CalibrationSize = Annotated[
    float | None,
    typer.Option(
        "--calibration-size",
        help="Share of the training rows that calibrates and does not train. 0: all calibrate, each by a fit without "
        "it (the default; 0.2 for the transformer, where it takes six trainings).",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the splits, the fit and the intervals.")]
Balance = Annotated[
    str, typer.Option("--balance", help="Of the transformer's severities: weights, resampling or none.")
]
LoraR = Annotated[
    int | None,
    typer.Option("--lora-r", min=1, help="Train LoRA adapters of this rank on the encoder.", show_default=False),
]
Epochs = Annotated[float, typer.Option("--num-train-epochs", min=0.1, help="Of the transformer, at most.")]
Lexicon = Annotated[
    Path | None, typer.Option("--lexicon", help="Of the rules; by default the package's.", show_default=False)
]
Encoder = Annotated[
    str | None,
    typer.Option("--encoder", help="Of the transformer: Hub id or folder; by default CAMeLBERT.", show_default=False),
]
BlockColumn = Annotated[
    str | None,
    typer.Option("--block-column", help="Column of blocks (source, year) to hold out in turn.", show_default=False),
]
JudgeBlocks = Annotated[
    str | None, typer.Option("--judge-blocks", help="Blocks to judge, such as D,F; by default all.", show_default=False)
]
TrainBlocks = Annotated[
    str | None,
    typer.Option("--train-blocks", help="Blocks that may be trained on; by default all.", show_default=False),
]


def way_of(
    kind: Kind,
    calibration: Method | None,
    calibration_size: float | None,
    seed: int,
    lexicon: Path | None,
    encoder: str | None,
    options: dict[str, Any],
) -> Way:
    """The way of fitting that the options ask for; UsageError where they do not go together."""
    from sevpeft.severity.classifier.fitting import Way

    if lexicon is not None and kind not in (Kind.rules, Kind.combined):
        raise UsageError("--lexicon is for --kind rules and rules+linear.")
    if encoder is not None and kind is not Kind.transformer:
        raise UsageError("--encoder is for --kind transformer.")
    if options["balance"] not in ("weights", "resampling", "none"):
        raise UsageError("--balance is weights, resampling or none.")
    if calibration_size and not 0.05 <= calibration_size <= 0.5:
        raise UsageError("--calibration-size is 0, or a share from 0.05 to 0.5.")
    own = options if kind is Kind.transformer else {}
    return Way(kind.value, calibration and calibration.value, calibration_size, seed, lexicon, encoder, own)


def block_names(blocks: str | None, block_column: str | None) -> list[str] | None:
    """The blocks that an option lists, None for all."""
    if blocks is None:
        return None
    if block_column is None:
        raise UsageError("--judge-blocks and --train-blocks need --block-column, the column that names the blocks.")
    names = list(dict.fromkeys(name.strip() for name in blocks.split(",") if name.strip()))
    if not names:
        raise UsageError("--judge-blocks and --train-blocks take names of blocks, parted by commas.")
    return names
