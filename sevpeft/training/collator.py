"""Turns encoded rows into one batch: TRL's own collation, plus `token_weights` laid out exactly like `labels`.

TRL's collator drops columns that it does not know, in silence; a weight must never be lost or shifted that way, so
the weights are padded by the same function and to the same shape as the labels, and an absent one is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from sevpeft.errors import WeightError


@dataclass
class SeverityCollator(DataCollatorForLanguageModeling):
    """Collates rows of `input_ids, labels, token_weights` (training) or `input_ids, labels, severity` (validation).

    Returns what TRL's collator returns, and `token_weights` (float32, the shape of `labels`) and `severity` (int64,
    one number per row) where the rows have them.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call(examples)
        weighted = ["token_weights" in example for example in examples]
        if any(weighted):
            if not all(weighted):
                raise WeightError("Some rows of a batch have token_weights and some have none.")
            output["token_weights"] = self._laid_out_like_labels(examples)
        if "severity" in examples[0]:
            output["severity"] = torch.tensor([example["severity"] for example in examples], dtype=torch.long)
        return output

    def _laid_out_like_labels(self, examples: list[dict[str, Any]]) -> torch.Tensor:
        rows = []
        for example in examples:
            if len(example["token_weights"]) != len(example["input_ids"]):
                raise WeightError(
                    f"A row has {len(example['token_weights'])} token_weights for {len(example['input_ids'])} tokens."
                )
            rows.append(torch.tensor(example["token_weights"], dtype=torch.float32))
        if self.padding_free:
            rows = [torch.cat(rows)]
        padded: torch.Tensor = pad(
            rows, padding_value=0.0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )
        return padded
