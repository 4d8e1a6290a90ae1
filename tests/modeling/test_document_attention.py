"""Attention within documents gives what attention over all masked pairs gives, and computes fewer pairs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sevpeft.modeling import document_attention
from sevpeft.modeling.document_attention import attend_within_documents
from tests.conftest import build_model

DOCUMENTS = [list(range(10, 10 + length)) for length in (7, 1, 30, 12)]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bool]]]:
    """Tokens and whether there was a mask, of each call of PyTorch's attention."""
    seen: list[tuple[int, bool]] = []

    def counted(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[2], mask is not None))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(document_attention, "sdpa_attention_forward", counted)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    attend_within_documents()
    yield seen
    ALL_ATTENTION_FUNCTIONS.register("sdpa", before)


def logits(model: Any, documents: list[list[int]], **options: Any) -> torch.Tensor:
    batch = DataCollatorForLanguageModeling(pad_token_id=0, **options)([{"input_ids": ids} for ids in documents])
    return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "qwen3", "mistral"])
def test_each_document_of_a_row_is_computed_alone(architecture: str, shapes: list[tuple[int, bool]]) -> None:
    """The windows of gemma3 and mistral are shorter than a document there, so that a part of the mask is needed."""
    model = build_model(architecture).eval()
    model.set_attn_implementation("sdpa")
    packed = logits(model, DOCUMENTS, padding_free=True)
    assert {length for length, _ in shapes} == {len(ids) for ids in DOCUMENTS}
    alone = torch.cat([logits(model, [ids]) for ids in DOCUMENTS], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    packed.sum().backward()
    assert all(torch.isfinite(one.grad).all() for one in model.parameters() if one.grad is not None)


def test_other_masks_go_to_pytorch_as_they_are(shapes: list[tuple[int, bool]]) -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, 2, 6, 4) for _ in range(3)]
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    halves = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool()
    seeing_back = halves & causal
    seeing_back[5, 0] = True  # of the second document into the first
    expected = {
        "causal": (causal, [(6, True)]),
        "documents": (halves & causal, [(3, False), (3, False)]),
        "both ways": (halves, [(3, True), (3, True)]),
        "seeing back": (seeing_back, [(6, True)]),
        "added": ((halves & causal).float().log(), [(6, True)]),
        "none": (None, [(6, False)]),
        "two rows": (torch.stack([halves & causal] * 2)[:, None], [(6, True)]),
    }
    module = SimpleNamespace(is_causal=True)
    found = {}
    for name, (mask, _) in expected.items():
        shapes.clear()
        four = mask if mask is None or mask.dim() == 4 else mask[None, None]
        inputs = [one.expand(len(four) if four is not None else 1, -1, -1, -1) for one in states]
        output = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *inputs, four)[0]
        torch.testing.assert_close(output, sdpa_attention_forward(module, *inputs, four)[0])
        found[name] = list(shapes)
    assert found == {name: calls for name, (_, calls) in expected.items()}


def test_tensors_without_numbers_are_let_through(shapes: list[tuple[int, bool]]) -> None:
    """The memory plan runs a step with fake tensors, also in a process that has loaded a model."""
    module = SimpleNamespace(is_causal=True)
    for context in (torch.device("meta"), FakeTensorMode()):
        with context:
            mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
            ALL_ATTENTION_FUNCTIONS["sdpa"](module, *[torch.empty(1, 2, 6, 4) for _ in range(3)], mask)
    assert shapes == [(6, True), (6, True)]
