"""A batch carries every weight at the place of its label, padded or not, and an absent weight is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sevpeft.errors import WeightError
from sevpeft.training.data import SeverityCollator

PAD = 7
ROWS: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3, PAD], "labels": [-100, -100, 3, PAD], "token_weights": [0.0, 0.0, 0.5, 0.5]},
    {"input_ids": [4, 5, PAD], "labels": [-100, 5, PAD], "token_weights": [0.0, 1.5, 1.5]},
    {"input_ids": [6, 8, 9, 1, 2, PAD], "labels": [-100] * 4 + [2, PAD], "token_weights": [0.0] * 4 + [1.0, 1.0]},
]


def collate(rows: list[dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
    return SeverityCollator(pad_token_id=PAD, **options)(rows)


def test_weights_are_padded_like_labels() -> None:
    batch = collate(ROWS)
    weights = batch["token_weights"]
    assert weights.dtype == torch.float32
    assert weights.shape == batch["labels"].shape == batch["input_ids"].shape == (3, 6)
    torch.testing.assert_close(weights[1], torch.tensor([0.0, 1.5, 1.5, 0.0, 0.0, 0.0]))
    assert torch.equal(weights > 0, batch["labels"] != -100)


def test_an_end_token_that_also_pads_stays_labelled_and_attended() -> None:
    batch = collate(ROWS)
    for row, source in enumerate(ROWS):
        end = len(source["input_ids"]) - 1
        assert batch["labels"][row, end] == PAD and batch["attention_mask"][row, end] == 1
        assert (batch["labels"][row, end + 1 :] == -100).all() and not batch["attention_mask"][row, end + 1 :].any()


def test_without_padding_the_weights_lie_end_to_end() -> None:
    batch = collate(ROWS, padding_free=True)
    assert batch["token_weights"].shape == batch["labels"].shape == (1, 13)
    assert batch["token_weights"][0].tolist() == [weight for row in ROWS for weight in row["token_weights"]]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert torch.equal(batch["token_weights"] > 0, batch["labels"] != -100)


def test_packed_blocks_keep_their_weights() -> None:
    blocks = [
        {name: ROWS[0][name] + ROWS[1][name] for name in ROWS[0]} | {"seq_lengths": [4, 3]},
        ROWS[2] | {"seq_lengths": [6]},
    ]
    batch = collate(blocks, padding_free=True)
    alone = collate(ROWS, padding_free=True)
    for name in ("input_ids", "labels", "token_weights", "position_ids"):
        assert torch.equal(batch[name], alone[name]), name


def test_a_multiple_is_padded_to_in_all_columns() -> None:
    batch = collate(ROWS, pad_to_multiple_of=4)
    assert batch["token_weights"].shape == batch["labels"].shape == (3, 8)
    assert not batch["token_weights"][:, 6:].any()


def test_validation_rows_bring_their_severity_instead() -> None:
    rows = [
        {"input_ids": r["input_ids"], "labels": r["labels"], "severity": s}
        for r, s in zip(ROWS, (2, -1, 0), strict=True)
    ]
    batch = collate(rows)
    assert batch["severity"].tolist() == [2, -1, 0] and batch["severity"].dtype == torch.int64
    assert "token_weights" not in batch
    assert collate(rows, padding_free=True)["severity"].tolist() == [2, -1, 0]


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_row_without_weights_among_weighted_ones_is_an_error(absent: int) -> None:
    rows = [dict(row) for row in ROWS]
    del rows[absent]["token_weights"]
    with pytest.raises(WeightError, match="some have none"):
        collate(rows)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0] * 5])
def test_as_many_weights_as_tokens_are_needed(weights: list[float]) -> None:
    with pytest.raises(WeightError, match=f"{len(weights)} token_weights for 4 tokens"):
        collate([ROWS[0] | {"token_weights": weights}, ROWS[1]])
