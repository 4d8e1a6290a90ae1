"""A model is asked whether it keeps packed documents apart; one that does not is refused with its own reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sevpeft.errors import ModelError
from sevpeft.modeling.loading import Precision, load_model
from sevpeft.modeling.packing import check_packing, documents_stay_apart
from sevpeft.recipe import recipe_from_values
from tests.conftest import build_model

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


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_rounding_that_depends_on_the_shape_is_no_contamination(dtype: torch.dtype) -> None:
    """As in a large model in bfloat16, where two harmless shapes differ by more than a nat.

    The noise is made from the number of tokens and the place of each in the row, so it is the same in one shape.
    """
    model = model_with("llama").to(dtype)

    def round_by_shape(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(output.shape[1])
        return output + torch.randn(output.shape, generator=generator).to(output.dtype)

    model.lm_head.register_forward_hook(round_by_shape)
    assert documents_stay_apart(model) == (True, "")


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_experts_that_multiply_both_documents_at_once_are_no_contamination(dtype: torch.dtype) -> None:
    """The number of tokens that an expert gets changes the rounding, also of a document that comes first."""
    model = model_with("llama").to(dtype)

    def round_by_content(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(output.float().sum().abs() * 1e6))
        return output + 0.01 * torch.randn(output.shape, generator=generator).to(output.dtype)

    model.lm_head.register_forward_hook(round_by_content)
    assert documents_stay_apart(model) == (True, "")


@pytest.mark.parametrize("setting", ["training.packing", "training.padding_free"])
def test_a_model_that_mixes_documents_is_refused_with_the_size_of_the_harm(setting: str) -> None:
    model = model_with("bloom", "eager")
    apart, reason = documents_stay_apart(model)
    assert not apart and "nats with the one packed before it" in reason
    with pytest.raises(ModelError) as caught:
        check_packing(model, setting)
    assert str(caught.value) == (
        f"{setting}=true is refused for bloom with eager attention: {reason}. "
        "Leave it out; rows are then padded to the longest of their batch."
    )


def test_a_model_that_raises_is_refused_with_what_it_said() -> None:
    with pytest.raises(
        ModelError, match=r"refused for lfm2 .* does not accept packed rows \(.*causal_conv1d"
    ) as caught:
        check_packing(model_with("lfm2"), "training.packing")
    assert "\n" not in str(caught.value) and "nats" not in str(caught.value)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_document_that_sees_only_the_last_token_before_it_is_found_out(dtype: torch.dtype) -> None:
    """A convolution of width two, as it would be if it went through without its kernel."""
    model = model_with("llama").to(dtype)

    def leak(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * torch.nn.functional.pad(output[:, :-1], (0, 0, 1, 0))

    model.get_input_embeddings().register_forward_hook(leak)
    assert not documents_stay_apart(model)[0]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_document_that_is_scored_at_other_positions_is_found_out(dtype: torch.dtype) -> None:
    """Nothing leaks, but the second document of a row is not read as it would be alone."""
    model = model_with("gpt2").to(dtype)

    def count_on(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.arange(inputs[0].shape[-1])[None],)

    model.transformer.wpe.register_forward_pre_hook(count_on)
    assert not documents_stay_apart(model)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "bloom", "lfm2"])
def test_asking_leaves_the_model_as_it_was(architecture: str, training: bool) -> None:
    model = model_with(architecture).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, recording = torch.get_rng_state(), []
    model.register_forward_pre_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    documents_stay_apart(model)
    assert recording and not any(recording)
    assert model.training is training and all(m.training is training for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_does_not_look_like_contamination() -> None:
    model = build_model("gpt2").train()
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    assert documents_stay_apart(model)[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_answers_and_its_gradients_stay_right(model_folder: Callable[..., Path], bits: int) -> None:
    recipe = recipe_from_values(
        {"model": {"name_or_path": str(model_folder("llama"))}, "quantization": {f"load_in_{bits}bit": True}}
    )

    def gradient(ask_first: bool) -> torch.Tensor:
        model = load_model(recipe, Precision(torch.float32, bf16=False, fp16=False))
        if ask_first:
            assert documents_stay_apart(model)[0]
        embedding = model.get_input_embeddings()
        embedding.requires_grad_(True)
        ids = torch.arange(4, 40)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    asked, fresh = gradient(ask_first=True), gradient(ask_first=False)
    assert float(fresh.abs().max()) > 0
    assert torch.equal(asked, fresh)
