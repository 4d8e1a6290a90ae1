"""A model is asked whether it keeps packed documents apart; one that does not is refused with its own reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from sevpeft.errors import ModelError
from sevpeft.modeling.loading import Precision, load_model
from sevpeft.modeling.packing import documents_stay_apart, refuse_contaminated_packing
from sevpeft.recipe import recipe_from_values
from tests.conftest import build_model


def model_with(architecture: str, attention: str = "sdpa") -> PreTrainedModel:
    model = build_model(architecture)
    model.set_attn_implementation(attention)
    assert architecture == "bloom" or model.config._attn_implementation == attention
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_models_that_read_position_ids_keep_documents_apart(architecture: str, attention: str) -> None:
    model = model_with(architecture, attention)
    assert documents_stay_apart(model) == (True, "")
    refuse_contaminated_packing(model, "training.packing")


@pytest.mark.parametrize("setting", ["training.packing", "training.padding_free"])
def test_a_model_that_mixes_documents_is_refused_with_the_size_of_the_harm(setting: str) -> None:
    model = model_with("bloom", "eager")
    apart, reason = documents_stay_apart(model)
    assert not apart and "nats when another is packed before it" in reason
    with pytest.raises(ModelError) as caught:
        refuse_contaminated_packing(model, setting)
    assert str(caught.value) == (
        f"{setting}=true is refused for bloom with eager attention: {reason}. "
        "Leave it out; rows are then padded to the longest of their batch."
    )


def test_a_model_that_raises_is_refused_with_what_it_said() -> None:
    with pytest.raises(
        ModelError, match=r"refused for lfm2 .* does not accept packed rows \(.*causal_conv1d"
    ) as caught:
        refuse_contaminated_packing(model_with("lfm2"), "training.packing")
    assert "\n" not in str(caught.value) and "nats" not in str(caught.value)


def test_a_document_that_sees_only_the_last_token_before_it_is_found_out() -> None:
    """A convolution of width two, as it would be if it went through without its kernel."""
    model = model_with("llama")

    def leak(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * output.roll(1, dims=1)

    model.get_input_embeddings().register_forward_hook(leak)
    assert not documents_stay_apart(model)[0]


def test_a_document_that_is_scored_at_other_positions_is_found_out() -> None:
    """Nothing leaks, but the second document of a row is not read as it would be alone."""
    model = model_with("gpt2")

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
