"""The likelihood of a reference is the validation loss of the training, row by row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sevpeft.errors import RunError
from sevpeft.evaluation import likelihood
from sevpeft.evaluation import rows as of_rows
from sevpeft.evaluation.likelihood import reference_nll
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.switching import AdapterSwitch
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.severity.probabilities import SEVERITIES
from tests.conftest import build_model


@pytest.fixture(scope="module")
def switch(finished_run: Run) -> AdapterSwitch:
    recipe = load_recipe(finished_run.folder / "recipe.yaml")
    return AdapterSwitch(recipe, {"adapter": finished_run.adapter})


def watched(forward: Callable[..., object], masks: list[torch.Tensor]) -> Callable[..., object]:
    return lambda **inputs: masks.append(inputs["attention_mask"]) or forward(**inputs)


@pytest.fixture(scope="module")
def validation(finished_run: Run) -> EvaluationRows:
    return of_rows.test_rows(load_recipe(finished_run.folder / "recipe.yaml"), "validation")


def test_it_is_the_validation_loss_before_and_after_training(
    finished_run: Run, switch: AdapterSwitch, validation: EvaluationRows
) -> None:
    for arm, measured in (("base", "before"), ("adapter", "after")):
        with switch.answering(arm) as model:
            nll, tokens = reference_nll(model, switch.prompt, validation, max_length=256)
        losses = finished_run.metrics()[measured]
        assert nll.sum() / tokens.sum() == pytest.approx(losses["loss"], rel=1e-5)
        for stratum, name in enumerate(SEVERITIES):
            of = validation.strata == stratum
            if of.any():
                assert nll[of].sum() / tokens[of].sum() == pytest.approx(losses[f"loss_{name}"], rel=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "lfm2", "qwen2", "gemma2", "gemma3", "cohere2"])
def test_a_row_has_the_likelihood_of_its_own_tokens_whatever_the_batch(
    architecture: str, switch: AdapterSwitch, validation: EvaluationRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = build_model(architecture), switch.prompt
    (nll, tokens), sizes = reference_nll(model, prompt, validation, max_length=256), []
    monkeypatch.setattr(likelihood, "_TOKENS", 1)
    alone, _ = reference_nll(model, prompt, validation, max_length=256, on_batch=sizes.append)
    assert np.allclose(nll, alone, rtol=1e-5) and sizes == [1] * len(validation)
    question, answer = prompt.prompt_ids(validation.questions[:1])[0], prompt.answer_ids(validation.references[:1])[0]
    with torch.no_grad():
        scores = torch.log_softmax(model(input_ids=torch.tensor([question + answer])).logits[0], dim=-1)
    expected = -sum(float(scores[len(question) + n - 1, token]) for n, token in enumerate(answer))
    assert nll[0] == pytest.approx(expected, rel=1e-5) and tokens[0] == len(answer)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_only_labeled_positions_reach_the_head_and_rows_of_one_length_share_a_batch(
    architecture: str, switch: AdapterSwitch, validation: EvaluationRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, positions, read = build_model(architecture), [], []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: positions.append(inputs[0].shape[1]))
    monkeypatch.setattr(model, "forward", watched(model.forward, read))
    monkeypatch.setattr(likelihood, "_TOKENS", 200)
    _, tokens = reference_nll(model, switch.prompt, validation, max_length=256)
    assert sum(positions) == tokens.sum() and len(read) > 1
    # Sorted by question and answer together, so that hardly any padding is read.
    assert sum(mask.numel() for mask in read) < 1.2 * sum(int(mask.sum()) for mask in read)


def test_other_references_can_be_scored(switch: AdapterSwitch, validation: EvaluationRows) -> None:
    model = build_model("gpt2")
    turned = list(reversed(validation.references))
    nll, tokens = reference_nll(model, switch.prompt, validation, max_length=256, references=turned)
    own, own_tokens = reference_nll(model, switch.prompt, validation, max_length=256)
    assert tokens.tolist() == own_tokens[::-1].tolist() and not np.allclose(nll, own)


def test_a_row_that_does_not_fit_has_no_likelihood(switch: AdapterSwitch, validation: EvaluationRows) -> None:
    lengths = [len(row) for row in switch.prompt.answer_ids(validation.references)]
    model = build_model("gpt2")
    nll, tokens = reference_nll(model, switch.prompt, validation, max_length=max(lengths) + 10)
    assert np.isnan(nll[np.argmax(lengths)]) and tokens[np.argmax(lengths)] == 0 and np.isfinite(nll).any()
    assert np.isnan(reference_nll(model, switch.prompt, validation, max_length=5)[0]).all()


def test_a_full_gpu_makes_batches_smaller(
    switch: AdapterSwitch, validation: EvaluationRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, score, largest = build_model("gpt2"), likelihood._batch_nll, 1
    expected, _ = reference_nll(model, switch.prompt, validation, max_length=256)

    def small(model: torch.nn.Module, ids: list[list[int]], labels: list[list[int]]) -> list[float]:
        if len(ids) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(model, ids, labels)

    monkeypatch.setattr(likelihood, "_batch_nll", small)
    assert np.allclose(reference_nll(model, switch.prompt, validation, max_length=256)[0], expected)
    largest = 0
    with pytest.raises(RunError, match="full with a single row"):
        reference_nll(model, switch.prompt, validation, max_length=256)
