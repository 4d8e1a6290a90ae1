"""A model that mixes packed documents is refused with its own reason; in others each document is computed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sevpeft.errors import ModelError
from sevpeft.modeling import packing
from sevpeft.modeling.loading import Precision, load_model
from sevpeft.modeling.packing import check_packing, documents_stay_apart, set_up_attention
from sevpeft.recipe import recipe_from_values
from tests.models import build_model

# Architectures that no recipe uses, at the smallest sizes; each mixed documents in silence in some release.
MORE = {
    "opt": dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96, word_embed_proj_dim=48),
    "mpt": dict(d_model=48, n_layers=2, n_heads=4, max_seq_len=256),
    "xglm": dict(d_model=48, num_layers=2, attention_heads=4, ffn_dim=96, max_position_embeddings=256),
    "gpt_oss": dict(hidden_size=48, intermediate_size=48, num_hidden_layers=2, head_dim=16, num_local_experts=4),
    "falcon": dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
    "mixtral": dict(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
}
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def model_with(architecture: str, attention: str | None = None) -> PreTrainedModel:
    """With the attention that the architecture takes by itself, or another."""
    if architecture in MORE:
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, vocab_size=512, **MORE[architecture])
        return AutoModelForCausalLM.from_config(config)
    model = build_model(architecture)
    if attention:
        model.set_attn_implementation(attention)
    return model


def test_each_architecture_is_judged_alike_in_every_precision() -> None:
    """Falcon was mixed up to transformers 5.23; 5.24 hands its positions to the mask."""
    apart = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "cohere2", "jais2", "falcon")
    expected = {
        **dict.fromkeys((*apart, "mixtral"), True),
        **dict.fromkeys(("bloom", "opt", "mpt", "xglm", "gpt_oss", "lfm2", "falcon_h1"), False),
    }
    wrong = [
        (architecture, dtype, reason)
        for architecture, right in expected.items()
        for dtype in PRECISIONS
        for found, reason in [documents_stay_apart(model_with(architecture).to(dtype))]
        if found is not right
    ]
    assert wrong == []


def test_eager_attention_keeps_documents_apart_too() -> None:
    for architecture in ("gpt2", "llama", "qwen2"):
        model = model_with(architecture, "eager")
        assert documents_stay_apart(model) == (True, "")
        check_packing(model, "training.packing")


def judged(model: PreTrainedModel, hook: Callable[[PreTrainedModel], None]) -> list[bool]:
    """Whether documents stay apart in each precision, once something was hooked into the model."""
    hook(model)
    return [documents_stay_apart(model.to(dtype))[0] for dtype in PRECISIONS]


def test_rounding_that_depends_on_shape_or_content_is_no_contamination() -> None:
    """As in a large model in bfloat16, where two harmless shapes differ by more than a nat, and of experts.

    The first noise is made from the number of tokens and the place of each in the row, so it is the same in one shape.
    The second is that of experts: the number of tokens that one gets changes the rounding, also of a document that
    comes first.
    """

    def by_shape(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(output.shape[1])
        return output + torch.randn(output.shape, generator=generator).to(output.dtype)

    def by_content(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(output.float().sum().abs() * 1e6))
        return output + 0.01 * torch.randn(output.shape, generator=generator).to(output.dtype)

    for noise in (by_shape, by_content):
        assert judged(model_with("llama"), lambda m, n=noise: m.lm_head.register_forward_hook(n)) == [True] * 3


def test_a_leak_of_one_token_and_other_positions_are_found_out() -> None:
    """A convolution of width two without its kernel; and a second document that is not read as it would be alone."""

    def leak(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * torch.nn.functional.pad(output[:, :-1], (0, 0, 1, 0))

    def count_on(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.arange(inputs[0].shape[-1])[None],)

    assert not any(judged(model_with("llama"), lambda m: m.get_input_embeddings().register_forward_hook(leak)))
    assert not any(judged(model_with("gpt2"), lambda m: m.transformer.wpe.register_forward_pre_hook(count_on)))


def test_a_model_that_mixes_documents_is_refused_with_the_size_of_the_harm() -> None:
    model = model_with("bloom", "eager")
    apart, reason = documents_stay_apart(model)
    assert not apart and "nats" in reason
    for setting in ("training.packing", "training.padding_free"):
        with pytest.raises(ModelError) as caught:
            check_packing(model, setting)
        text = str(caught.value)
        assert text.startswith(f"{setting}=true") and "bloom" in text and reason in text
    with pytest.raises(ModelError, match=r"lfm2 .*causal_conv1d"):
        check_packing(model_with("lfm2"), "training.packing")


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_asking_leaves_the_model_as_it_was(architecture: str) -> None:
    model = model_with(architecture).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, recording = torch.get_rng_state(), []
    model.register_forward_pre_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    documents_stay_apart(model)
    assert recording and not any(recording)
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_does_not_look_like_contamination() -> None:
    model = build_model("gpt2").train()
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    assert documents_stay_apart(model)[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_answers_and_its_gradients_stay_right(model_folder: Callable[..., Path], bits: int) -> None:
    recipe = recipe_from_values(
        {"model": {"name_or_path": str(model_folder("llama"))}, "quantization": {f"load_in_{bits}bit": True}}
    )

    def gradient(check_first: bool) -> torch.Tensor:
        model = load_model(recipe, Precision(torch.float32, bf16=False, fp16=False))
        if check_first:
            assert documents_stay_apart(model)[0]
        embedding = model.get_input_embeddings()
        embedding.requires_grad_(True)
        ids = torch.arange(4, 40)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    checked, fresh = gradient(check_first=True), gradient(check_first=False)
    assert float(fresh.abs().max()) > 0
    assert torch.equal(checked, fresh)


# Attention within documents gives what attention over all masked pairs gives, and computes fewer pairs.

DOCUMENTS = [list(range(10, 10 + length)) for length in (7, 1, 30, 12)]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bool]]]:
    """Tokens and whether there was a mask, of each call of PyTorch's attention."""
    seen: list[tuple[int, bool]] = []

    def counted(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[2], mask is not None))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(packing, "sdpa_attention_forward", counted)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    set_up_attention()
    yield seen
    ALL_ATTENTION_FUNCTIONS.register("sdpa", before)


def logits(model: Any, documents: list[list[int]], **options: Any) -> torch.Tensor:
    batch = DataCollatorForLanguageModeling(pad_token_id=0, **options)([{"input_ids": ids} for ids in documents])
    return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "mistral"])
def test_each_document_of_a_row_is_computed_alone(architecture: str, shapes: list[tuple[int, bool]]) -> None:
    """The windows of gemma3 and mistral are shorter than a document there, so that a part of the mask is needed."""
    model = build_model(architecture).eval()
    model.set_attn_implementation("sdpa")
    packed = logits(model, DOCUMENTS, padding_free=True)
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "it builds a plan for every new length"
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
