"""An answer is what the model says to the question alone: no batch, no padding, no other row changes a token of it.

The likelihood of a reference is the validation loss of the training, row by row.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from sevpeft.errors import ModelError, RunError
from sevpeft.evaluation import generate as module
from sevpeft.evaluation.evaluate import test_rows as rows_of_run
from sevpeft.evaluation.generate import (
    EvaluationRows,
    SeededDraw,
    batching_problem,
    generate,
    reference_nll,
)
from sevpeft.modeling import likelihood
from sevpeft.modeling.adapters import attach_adapter
from sevpeft.modeling.loading import load_for_inference, resolve_model
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import load_recipe
from sevpeft.recipe.schema import GenerationSection
from sevpeft.runs import Run
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import encode_rows, load_splits
from tests.models import SENTENCES, build_model

GREEDY = GenerationSection(max_new_tokens=8, per_device_eval_batch_size=4)
ONE_BY_ONE = {"per_device_eval_batch_size": 1}
SAMPLED = GenerationSection(max_new_tokens=8, per_device_eval_batch_size=4, do_sample=True, temperature=1.5, seed=3)


def rows_of(questions: list[str]) -> EvaluationRows:
    return EvaluationRows(
        ids=[f"row-{n}" for n in range(len(questions))],
        questions=questions,
        references=list(reversed(questions)),
        dialects=None,
        strata=np.arange(len(questions)) % 3,
        groups=np.arange(len(questions)),
        source="test",
        fingerprint="sha256:0",
    )


# Of different lengths, so that every batch is padded.
ROWS = rows_of([*SENTENCES, "صداع", " ".join(SENTENCES[:3])])


@pytest.fixture(scope="module")
def prompt(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    return Prompt.build(tokenizer, chat=False, template="السؤال: {question}\n{answer_cue}", answer_cue="الجواب:")


def adapted(model: torch.nn.Module) -> peft.PeftModel:
    """The model with an adapter that changes what it says."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5, lora_alpha=64
    )
    return peft.get_peft_model(model, config).eval()


def answered(
    model: torch.nn.Module,
    prompt: Prompt,
    settings: GenerationSection = GREEDY,
    rows: EvaluationRows = ROWS,
    **more: Any,
) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for batch in generate(model, prompt, rows, settings, print, **more) for one in batch}


def alone(model: torch.nn.Module, prompt: Prompt, question: str, steps: int) -> list[int]:
    """The greedy continuation, token by token, without padding and without a cache."""
    ids, answer = prompt.prompt_ids([question])[0], []
    while len(answer) < steps and answer[-1:] != [prompt.end_id]:
        with torch.no_grad():
            answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return answer


def without(model: torch.nn.Module, *hidden: str) -> torch.nn.Module:
    """The model with arguments that it is given and does not look at, as an architecture of that kind."""
    forward = model.forward

    @functools.wraps(forward)
    def blind(*args: object, **given: object) -> object:
        return forward(*args, **{name: value for name, value in given.items() if name not in hidden})

    model.forward = blind
    return model


def rwkv() -> torch.nn.Module:
    # In transformers 5.24 a cached step of this architecture depends on the other rows of the batch.
    config = AutoConfig.for_model("rwkv", vocab_size=512, hidden_size=48, num_hidden_layers=2, attention_hidden_size=48)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def experts(name: str, **shape: object) -> torch.nn.Module:
    config = AutoConfig.for_model(
        name, vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_batched_answer_is_the_answer_alone_token_for_token(prompt: Prompt) -> None:
    wrong = []
    for architecture in ("qwen3", "bloom", "lfm2"):
        model = adapted(build_model(architecture))
        together = answered(model, prompt)
        assert together.keys() == set(ROWS.ids)
        for identity, question in zip(ROWS.ids, ROWS.questions, strict=True):
            if together[identity]["token_ids"] != alone(model, prompt, question, GREEDY.max_new_tokens):
                wrong.append((architecture, identity))
    assert wrong == []


def test_prompts_read_by_length_give_the_answers_of_each_prompt_alone(
    prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups of one to three rows, some of them longer than the sliding windows of gemma and cohere."""
    monkeypatch.setattr(likelihood, "NLL_PADDING", 8)
    rows, wrong = rows_of([*ROWS.questions, " ".join(SENTENCES)]), []
    assert max(map(len, prompt.prompt_ids(rows.questions))) > 64
    for architecture in ("gpt2", "bloom", "llama", "gemma2", "gemma3_text", "gemma3", "cohere2"):
        model = adapted(build_model(architecture))
        assert module.batching(model, prompt.end_id) == (True, ""), architecture
        groups: list[int] = []
        handle = model.get_base_model().base_model.register_forward_hook(
            lambda *call, groups=groups: groups.append(len(call[-1][0]))
        )
        settings = GREEDY.model_copy(update={"per_device_eval_batch_size": len(rows)})
        together = answered(model, prompt, settings, rows)
        handle.remove()
        read = groups[: groups.index(len(rows))]
        if sum(read) != len(rows) or len(read) < 3 or max(read) == 1:
            wrong.append((architecture, str(groups)))
        for identity, question in zip(rows.ids, rows.questions, strict=True):
            if together[identity]["token_ids"] != alone(model, prompt, question, GREEDY.max_new_tokens):
                wrong.append((architecture, identity))
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_may_share_a_batch_is_measured_in_every_precision(dtype: torch.dtype) -> None:
    table = {
        name: (functools.partial(build_model, name), "") for name in ("gpt2", "bloom", "lfm2", "gemma2", "falcon_h1")
    }
    # Their scores change by rounding with what else is in the call.
    table["qwen3_moe"] = functools.partial(experts, "qwen3_moe", num_experts=8, moe_intermediate_size=32), ""
    table["mixtral"] = functools.partial(experts, "mixtral", num_local_experts=4), ""
    table["rwkv"] = rwkv, "another row"
    for name in ("gpt2", "llama", "lfm2"):
        table[f"{name}, mask"] = lambda name=name: without(build_model(name), "attention_mask"), "padding"
    table["gpt2, positions"] = lambda: without(build_model("gpt2"), "position_ids"), "padding"
    # Rotary positions are relative: a shift of all of them is rounding.
    table["llama, positions"] = lambda: without(build_model("llama"), "position_ids"), ""
    found = {name: batching_problem(make().to(dtype), 0) for name, (make, _) in table.items()}
    wrong = {name: found[name] for name, (_, right) in table.items() if found[name].startswith(right) != bool(right)}
    assert not {name: of for name, of in wrong.items() if of or table[name][1]}
    # Read by length: not with recurrent states, which are not in a cache of keys and values.
    found = {name: module.batching(build_model(name).to(dtype), 0) for name in ("gpt2", "bloom", "gemma2", "lfm2")}
    assert {name for name, (by_length, _) in found.items() if not by_length} == {"lfm2"}
    assert {problem for _, problem in found.values()} == {""}


def as_trained(dtype: torch.dtype) -> torch.nn.Module:
    """The head of a trained model gives logits of tens, so that one step of rounding is a tenth of a nat and more."""
    model = build_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    return model.to(dtype)


def test_rounding_as_large_as_a_real_model_s_is_no_fault_and_hides_none() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = as_trained(dtype)
        assert batching_problem(model, 0) == "", dtype
        assert batching_problem(without(model, "attention_mask"), 0).startswith("padding"), dtype
    model = as_trained(torch.bfloat16)
    forward = model.forward

    @functools.wraps(forward)
    def leaking(*args: object, **given: torch.Tensor) -> object:
        output, mask = forward(*args, **given), given.get("attention_mask")
        if mask is not None and mask[-1, 0] == 0:  # one score of 512 is larger by what stands under the mask
            output.logits[-1, :, int(given["input_ids"][-1, 0])] *= 1.02
        return output

    model.forward = leaking
    assert batching_problem(model, 0).startswith("padding")


def test_a_model_that_cannot_answer_all_lengths_together_says_so_and_answers_right(prompt: Prompt) -> None:
    lines: list[str] = []
    for make, how in (
        (lambda: without(build_model("gpt2"), "attention_mask", "position_ids"), "one at a time"),
        (rwkv, "one at a time"),
        (lambda: build_model("gpt2"), None),
    ):
        model = make()
        batches = list(generate(model, prompt, ROWS, GREEDY, on_slow=lines.append))
        together = {one["id"]: one for batch in batches for one in batch}
        assert together == answered(model, prompt, GREEDY.model_copy(update=ONE_BY_ONE)), how
        assert [how is not None and how in line for line in lines] == [True] * (how is not None)
        lines.clear()


def test_one_long_question_does_not_make_all_others_read_as_much_padding() -> None:
    def batches(size: int, padding: int) -> list[list[int]]:
        of = likelihood.run_batches(range(5), [5, 7, 7, 5, 7], list, size=lambda _: size, padding=padding, remedy="")
        return [batch for batch, _ in of]

    assert batches(5, 100) == [[1, 2, 4, 0, 3]] and batches(2, 100) == [[1, 2], [4, 0], [3]]
    assert batches(5, 3) == [[1, 2, 4, 0], [3]] and batches(5, 0) == [[1, 2, 4], [0, 3]]


def test_batches_come_one_by_one_with_the_longest_question_first(prompt: Prompt) -> None:
    batches = generate(build_model("gpt2"), prompt, ROWS, GREEDY.model_copy(update=ONE_BY_ONE), print)
    assert isinstance(batches, Iterator)  # so that each can be kept
    assert [one["id"] for one in next(batches)] == [f"row-{len(ROWS) - 1}"]


def test_an_answer_ends_with_the_prompt_s_end_token_and_else_counts_as_truncated(prompt: Prompt) -> None:
    model = build_model("gpt2")
    free = answered(model, prompt)
    assert all(one["truncated"] and len(one["token_ids"]) == 8 for one in free.values())
    end = free["row-0"]["token_ids"][5]
    ended = answered(model, dataclasses.replace(prompt, end_id=end))
    for identity, one in ended.items():
        whole = free[identity]["token_ids"]
        assert one["truncated"] == (end not in whole)
        assert one["token_ids"] == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert not ended["row-0"]["truncated"]


def test_the_model_s_own_generation_settings_stay_outside(prompt: Prompt) -> None:
    model = build_model("qwen2")
    expected = answered(model, prompt)
    first = expected["row-0"]["token_ids"][0]
    model.generation_config.update(
        repetition_penalty=9.0, no_repeat_ngram_size=1, do_sample=True, top_k=1, num_beams=2, suppress_tokens=[first]
    )
    assert answered(model, prompt) == expected


def test_a_repetition_penalty_is_used_and_padding_is_nothing_that_was_said(prompt: Prompt) -> None:
    model = build_model("qwen2")
    free = answered(model, prompt)
    # A pad token that the model wants to say, which would be penalized in the rows that are padded.
    tokenizer = copy.deepcopy(prompt.tokenizer)
    tokenizer.pad_token_id = free["row-8"]["token_ids"][0]
    padded = dataclasses.replace(prompt, tokenizer=tokenizer)
    penalized = GREEDY.model_copy(update={"repetition_penalty": 50.0})
    lines: list[str] = []
    batches = list(generate(model, padded, ROWS, penalized, lines.append))
    together = {one["id"]: one for batch in batches for one in batch}
    assert together == answered(model, padded, penalized.model_copy(update=ONE_BY_ONE)) != free
    assert lines == [] and len(batches) < len(ROWS)


def test_a_sampled_answer_belongs_to_its_row_and_seed_and_not_to_its_batch(prompt: Prompt) -> None:
    model = build_model("gpt2")
    expected = answered(model, prompt, SAMPLED)
    for size in (1, 3):
        assert answered(model, prompt, SAMPLED.model_copy(update={"per_device_eval_batch_size": size})) == expected
    assert answered(model, prompt, SAMPLED, ROWS.take([5, 2])) == {i: expected[i] for i in ("row-5", "row-2")}
    other = answered(model, prompt, SAMPLED.model_copy(update={"seed": 4}))
    assert all(other[identity]["token_ids"] != expected[identity]["token_ids"] for identity in expected)
    greedy = answered(model, prompt, SAMPLED.model_copy(update={"do_sample": False}))
    assert greedy != expected
    for sharp in ({"top_k": 1}, {"top_p": 1e-6}):
        assert answered(model, prompt, SAMPLED.model_copy(update=sharp)) == greedy, sharp


def test_a_token_is_drawn_as_often_as_it_is_probable() -> None:
    share = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = 5_000
    scores = share.log().expand(draws, 4)
    drawn = SeededDraw([f"row-{n}" for n in range(draws)], 0, 2)
    for _ in range(2):
        chosen = drawn(torch.zeros((draws, 1)), scores).argmax(dim=-1)
        found = torch.bincount(chosen, minlength=4) / draws
        assert torch.allclose(found, share, atol=0.025) and found[1] == 0


def test_a_question_that_does_not_fit_the_context_loses_its_last_words_and_says_so(prompt: Prompt) -> None:
    rows = rows_of(["صداع " * 300, "صداع"])
    answers = answered(build_model("gpt2"), prompt, GREEDY.model_copy(update={"max_new_tokens": 100}), rows)
    assert answers["row-0"]["lost_words"] > 0 and answers["row-1"]["lost_words"] == 0
    with pytest.raises(ModelError, match="max_new_tokens=250"):
        answered(build_model("gpt2"), prompt, GREEDY.model_copy(update={"max_new_tokens": 250}), rows)


def test_a_full_gpu_makes_batches_smaller_until_a_single_row_does_not_fit(
    prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("gpt2")
    expected, run, largest = answered(model, prompt), model.generate, 2
    monkeypatch.setattr(module, "batching_problem", lambda *_, **__: "")

    def small(**asked: torch.Tensor) -> object:
        if len(asked["input_ids"]) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(**asked)

    monkeypatch.setattr(model, "generate", small)
    assert answered(model, prompt) == expected
    # Also where the keys and values of all rows leave no memory to read a single one.
    read = likelihood.read_by_length
    filled: list[int] = []

    def reading(of: Any, prompts: list[list[int]], **more: Any) -> Any:
        if len(prompts) > largest:
            filled.append(len(prompts))
            monkeypatch.setattr(type(model.base_model), "forward", full)
        try:
            return read(of, prompts, **more)
        finally:
            monkeypatch.setattr(type(model.base_model), "forward", forward)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    forward = type(model.base_model).forward
    monkeypatch.setattr(likelihood, "read_by_length", reading)
    assert answered(model, prompt) == expected and filled
    largest = 0
    with pytest.raises(RunError, match="max_new_tokens"):
        answered(model, prompt)


# Likelihood


def nll_of(
    model: torch.nn.Module, prompt: Prompt, rows: EvaluationRows, max_length: int | None = 256
) -> tuple[np.ndarray, np.ndarray]:
    """nll (n,) and tokens (n,), in the order of the rows, each of which comes once."""
    lines = [line for batch in reference_nll(model, prompt, rows, max_length=max_length) for line in batch]
    found = {line["id"]: line for line in lines}
    assert len(lines) == len(found) == len(rows)
    nll = np.array([found[identity]["nll"] for identity in rows.ids], dtype=np.float64)
    return nll, np.array([found[identity]["tokens"] for identity in rows.ids])


@pytest.fixture(scope="module")
def trained_prompt(finished_run: Run) -> Prompt:
    recipe = load_recipe(finished_run.folder / "recipe.yaml")
    return resolve_model(recipe).prompt


@pytest.fixture(scope="module")
def validation(finished_run: Run) -> EvaluationRows:
    table, splits, severity = load_splits(load_recipe(finished_run.folder / "recipe.yaml"))
    return rows_of_run(table, splits._replace(test=splits.validation), severity)


def test_the_likelihood_is_the_validation_loss_before_and_after_training(
    finished_run: Run, trained_prompt: Prompt, validation: EvaluationRows
) -> None:
    recipe = load_recipe(finished_run.folder / "recipe.yaml")
    for measured in ("before", "after"):
        model = load_for_inference(recipe)
        if measured == "after":
            model = attach_adapter(model, finished_run.adapter, recipe)
        nll, tokens = nll_of(model, trained_prompt, validation)
        losses = finished_run.metrics()[measured]
        assert nll.sum() / tokens.sum() == pytest.approx(losses["loss"], rel=1e-5)
        for stratum, name in enumerate(SEVERITIES):
            of = validation.strata == stratum
            if of.any():
                assert nll[of].sum() / tokens[of].sum() == pytest.approx(losses[f"loss_{name}"], rel=1e-5)


def test_a_row_has_the_likelihood_of_its_own_tokens_whatever_the_batch(
    trained_prompt: Prompt, validation: EvaluationRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = trained_prompt
    question, answer = prompt.prompt_ids(validation.questions[:1])[0], prompt.answer_ids(validation.references[:1])[0]
    wrong = []
    for architecture in ("gpt2", "bloom", "lfm2", "gemma2", "gemma3", "cohere2"):
        model = build_model(architecture)
        nll, tokens = nll_of(model, prompt, validation)
        with monkeypatch.context() as patch:
            patch.setattr(likelihood, "NLL_TOKENS", 1)
            alone, _ = nll_of(model, prompt, validation)
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=torch.tensor([question + answer])).logits[0], dim=-1)
        expected = -sum(float(scores[len(question) + n - 1, token]) for n, token in enumerate(answer))
        if not np.allclose(nll, alone, rtol=1e-5) or nll[0] != pytest.approx(expected, rel=1e-5):
            wrong.append(architecture)
        assert tokens[0] == len(answer)
    assert wrong == []


def test_only_labeled_positions_reach_the_head_and_rows_of_one_length_share_a_batch(
    trained_prompt: Prompt, validation: EvaluationRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "NLL_TOKENS", 200)
    for architecture in ("gpt2", "gemma3"):
        model, positions, read = build_model(architecture), [], []
        model.get_output_embeddings().register_forward_hook(
            lambda _, inputs, __, p=positions: p.append(inputs[0].shape[1])
        )
        monkeypatch.setattr(model, "forward", watched(model.forward, read))
        _, tokens = nll_of(model, trained_prompt, validation)
        assert sum(positions) == tokens.sum() and len(read) > 1
        # Sorted by question and answer together, so that hardly any padding is read.
        assert sum(mask.numel() for mask in read) < 1.2 * sum(int(mask.sum()) for mask in read)


def watched(forward: Callable[..., object], masks: list[torch.Tensor]) -> Callable[..., object]:
    return lambda **inputs: masks.append(inputs["attention_mask"]) or forward(**inputs)


def test_a_prompt_read_once_gives_the_likelihoods_of_all_references_and_the_same_answer(
    prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beyond sliding windows. Rows that training shortens are left to `reference_nll`."""
    monkeypatch.setattr(likelihood, "NLL_TOKENS", 40)  # several batches of answers
    rows, limit, wrong = rows_of([*ROWS.questions, " ".join(SENTENCES)]), 110, []
    texts = {"reference": rows.references, "question": rows.questions}
    settings = GREEDY.model_copy(update={"per_device_eval_batch_size": len(rows)})
    prompts = prompt.prompt_ids(rows.questions)
    for architecture in ("gpt2", "bloom", "llama", "gemma2", "gemma3_text", "gemma3", "cohere2"):
        model = adapted(build_model(architecture))
        lines = answered(model, prompt, settings, rows, references=texts, max_length=limit)
        plain = answered(model, prompt, settings, rows)
        if any({**lines[identity], "nll": {}} != plain[identity] for identity in rows.ids):
            wrong.append((architecture, "answers"))
        for name, references in texts.items():
            nll, tokens = nll_of(model, prompt, dataclasses.replace(rows, references=references), limit)
            lengths = [*map(len, prompt.answer_ids(references))]
            whole = [len(ids) + length <= limit for ids, length in zip(prompts, lengths, strict=True)]
            found = [lines[identity]["nll"].get(name) for identity in rows.ids]
            assert 0 < sum(whole) < len(rows)
            expected = [{"nll": pytest.approx(a, rel=1e-5), "tokens": b} for a, b in zip(nll, tokens, strict=True)]
            if found != [one if fits else None for one, fits in zip(expected, whole, strict=True)]:
                wrong.append((architecture, name))
    assert wrong == []
    assert not any(line["nll"] for line in answered(build_model("lfm2"), prompt, rows=rows, references=texts).values())


def test_a_row_is_shortened_as_in_training_and_one_that_does_not_fit_has_no_likelihood(
    trained_prompt: Prompt, validation: EvaluationRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    answers = trained_prompt.answer_ids(validation.references)
    lengths = [len(row) for row in answers]
    most = max(lengths) + 10
    scored: dict[tuple[int, ...], int] = {}
    batch_nll = likelihood.batch_nll

    def spying(model: torch.nn.Module, prompts: list[list[int]], of: list[list[int]]) -> list[float]:
        scored.update({(*ids, *answer): len(answer) for ids, answer in zip(prompts, of, strict=True)})
        return batch_nll(model, prompts, of)

    monkeypatch.setattr(likelihood, "batch_nll", spying)
    nll, tokens = nll_of(build_model("gpt2"), trained_prompt, validation, max_length=most)
    assert np.isnan(nll[np.argmax(lengths)]) and tokens[np.argmax(lengths)] == 0 and np.isfinite(nll).any()
    rows = Dataset.from_dict({"question": validation.questions, "answer": validation.references})
    encoded, report = encode_rows(rows, trained_prompt, most, strata=None, cache_file=tmp_path / "rows.arrow")
    assert report["shortened"] and report["refused"]
    assert scored == {tuple(row["input_ids"]): sum(label != IGNORED for label in row["labels"]) for row in encoded}
    assert np.isnan(nll_of(build_model("gpt2"), trained_prompt, validation, max_length=5)[0]).all()
    # A table of learned positions that is shorter than max_length sets the limit.
    short = build_model("gpt2")
    short.config.n_positions = most
    short.transformer.wpe = torch.nn.Embedding(most, 48)
    assert np.array_equal(nll_of(short, trained_prompt, validation)[1], tokens)


def test_a_full_gpu_makes_batches_of_the_likelihood_smaller(
    trained_prompt: Prompt, validation: EvaluationRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, score, largest = build_model("gpt2"), likelihood.batch_nll, 1
    expected, _ = nll_of(model, trained_prompt, validation)

    def small(model: torch.nn.Module, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        if len(prompts) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(model, prompts, answers)

    monkeypatch.setattr(likelihood, "batch_nll", small)
    assert np.allclose(nll_of(model, trained_prompt, validation)[0], expected)
    largest = 0
    with pytest.raises(RunError, match=r"training.max_length"):
        nll_of(model, trained_prompt, validation)
