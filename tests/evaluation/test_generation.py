"""An answer is what the model says to the question alone: no batch, no padding, no other row changes a token of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from sevpeft.errors import ModelError, RunError
from sevpeft.evaluation import generation
from sevpeft.evaluation.generation import (
    GenerationSettings,
    Prediction,
    SeededDraw,
    answering_as,
    generate,
    next_batch,
)
from sevpeft.evaluation.padding import possible_batches
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import recipe_from_values
from tests.conftest import SENTENCES, build_model

GREEDY = GenerationSettings(max_new_tokens=20, per_device_eval_batch_size=4)
SAMPLED = GenerationSettings(max_new_tokens=12, per_device_eval_batch_size=4, do_sample=True, temperature=1.5, seed=3)


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


def adapted(model: torch.nn.Module, seed: int = 1, name: str = "adapter") -> peft.PeftModel:
    """The model with an adapter that changes what it says."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5, lora_alpha=64
    )
    return peft.get_peft_model(model, config, adapter_name=name).eval()


def said(model: torch.nn.Module, prompt: Prompt, settings: GenerationSettings = GREEDY, rows: EvaluationRows = ROWS):
    return {one.id: one for batch in generate(model, prompt, rows, settings) for one in batch}


def alone(model: torch.nn.Module, prompt: Prompt, question: str, steps: int) -> list[int]:
    """The greedy continuation, token by token, without padding and without a cache."""
    ids, answer = prompt.prompt_ids([question])[0], []
    while len(answer) < steps and answer[-1:] != [prompt.end_id]:
        with torch.no_grad():
            answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "qwen3", "mistral", "bloom", "lfm2"])
def test_a_batched_answer_is_the_answer_alone_token_for_token(architecture: str, prompt: Prompt) -> None:
    model = adapted(build_model(architecture))
    together = said(model, prompt)
    assert len(together) == len(ROWS)
    for identity, question in zip(ROWS.ids, ROWS.questions, strict=True):
        assert list(together[identity].token_ids) == alone(model, prompt, question, GREEDY.max_new_tokens)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_may_share_a_batch_is_measured_in_every_precision(dtype: torch.dtype) -> None:
    harmless = ("gpt2", "bloom", "lfm2", "llama", "gemma2", "gemma3_text", "falcon_h1")
    table = {name: (functools.partial(build_model, name), "any") for name in harmless}
    # Their scores change by rounding with what else is in the call.
    table["qwen3_moe"] = functools.partial(experts, "qwen3_moe", num_experts=8, moe_intermediate_size=32), "any"
    table["mixtral"] = functools.partial(experts, "mixtral", num_local_experts=4), "any"
    table["rwkv"] = rwkv, "none"
    for name in ("gpt2", "llama", "lfm2"):
        table[f"{name}, mask"] = lambda name=name: without(build_model(name), "attention_mask"), "one length"
    table["gpt2, positions"] = lambda: without(build_model("gpt2"), "position_ids"), "one length"
    # Rotary positions are relative: a shift of all of them is rounding.
    table["llama, positions"] = lambda: without(build_model("llama"), "position_ids"), "any"
    found = {name: possible_batches(make().to(dtype), 1, 0) for name, (make, _) in table.items()}
    assert {name: together for name, (together, _) in found.items()} == {
        name: right for name, (_, right) in table.items()
    }
    assert all(bool(reason) == (together != "any") for together, reason in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_as_large_as_a_real_model_s_is_no_fault(dtype: torch.dtype) -> None:
    # The head of a trained model gives logits of tens, so that one step of rounding is a tenth of a nat and more.
    model = build_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    model = model.to(dtype)
    assert possible_batches(model, 1, 0) == ("any", "")
    assert possible_batches(without(model, "attention_mask"), 1, 0)[0] == "one length"


def test_a_leak_that_is_smaller_than_rounding_is_found() -> None:
    model = build_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    model = model.to(torch.bfloat16)
    forward = model.forward

    @functools.wraps(forward)
    def leaking(*args: object, **given: torch.Tensor) -> object:
        output, mask = forward(*args, **given), given.get("attention_mask")
        if mask is not None and mask[-1, 0] == 0:  # one score of 512 is larger by what stands under the mask
            output.logits[-1, :, int(given["input_ids"][-1, 0])] *= 1.02
        return output

    model.forward = leaking
    assert possible_batches(model, 1, 0)[0] == "one length"


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (lambda: without(build_model("gpt2"), "attention_mask", "position_ids"), "in batches of one prompt length"),
        (rwkv, "one at a time"),
    ],
)
def test_a_model_that_cannot_answer_all_lengths_together_says_so_and_answers_right(
    make: Callable[[], torch.nn.Module], how: str, prompt: Prompt
) -> None:
    model, lines = make(), []
    together = {one.id: one for batch in generate(model, prompt, ROWS, GREEDY, on_slow=lines.append) for one in batch}
    assert together == said(model, prompt, dataclasses.replace(GREEDY, per_device_eval_batch_size=1))
    assert len(lines) == 1 and how in lines[0]
    lines.clear()
    list(generate(build_model("gpt2"), prompt, ROWS, GREEDY, on_slow=lines.append))
    assert not lines


def test_batches_are_what_may_be_answered_together() -> None:
    lengths = [7, 7, 7, 5, 5]
    assert next_batch([0, 1, 2, 3, 4], lengths, 4, "any", 100) == [0, 1, 2, 3]
    assert next_batch([0, 1, 2, 3, 4], lengths, 2, "one length", 100) == [0, 1]
    assert next_batch([2, 3, 4], lengths, 2, "one length", 100) == [2]
    assert next_batch([2, 3, 4], lengths, 2, "none", 100) == [2]
    # One long question does not make all others read as much padding.
    assert next_batch([0, 1, 2, 3, 4], lengths, 5, "any", 3) == [0, 1, 2, 3]
    assert next_batch([0, 1, 2, 3, 4], lengths, 5, "any", 0) == [0, 1, 2]


def test_the_longest_question_is_answered_first(prompt: Prompt) -> None:
    first = next(generate(build_model("gpt2"), prompt, ROWS, dataclasses.replace(GREEDY, per_device_eval_batch_size=1)))
    assert [one.id for one in first] == [f"row-{len(ROWS) - 1}"]


def test_an_answer_ends_with_the_prompt_s_end_token_and_else_counts_as_truncated(prompt: Prompt) -> None:
    model = build_model("gpt2")
    free = said(model, prompt)
    assert all(one.truncated and one.tokens == 20 for one in free.values())
    end = free["row-0"].token_ids[5]
    ended = said(model, dataclasses.replace(prompt, end_id=end))
    for identity, one in ended.items():
        whole = free[identity].token_ids
        assert one.truncated == (end not in whole)
        assert one.token_ids == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert not ended["row-0"].truncated


def test_the_base_model_answers_with_the_adapter_switched_off_and_adapters_are_switched(prompt: Prompt) -> None:
    model = adapted(build_model("llama"))
    torch.manual_seed(9)
    model.add_adapter(
        "other", peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    )
    answers = {}
    for arm in (None, "adapter", "other", None):
        with answering_as(model, arm) as speaker:
            answers.setdefault(arm, []).append(said(speaker, prompt))
    assert answers[None][0] == answers[None][1] == said(build_model("llama"), prompt)
    assert answers["adapter"][0] == said(adapted(build_model("llama")), prompt)
    assert answers["adapter"][0] != answers[None][0] != answers["other"][0] != answers["adapter"][0]


def test_dropout_is_off_while_answering_and_the_model_is_left_as_it_was(prompt: Prompt) -> None:
    model = adapted(build_model("gpt2"))
    expected = said(model, prompt)
    model.train()
    assert said(model, prompt) == expected
    assert model.training


def test_the_model_s_own_generation_settings_stay_outside(prompt: Prompt) -> None:
    model = build_model("qwen2")
    expected = said(model, prompt)
    first = expected["row-0"].token_ids[0]
    model.generation_config.update(
        repetition_penalty=9.0, no_repeat_ngram_size=1, do_sample=True, top_k=1, num_beams=2, suppress_tokens=[first]
    )
    theirs = model.generation_config
    assert said(model, prompt) == expected
    assert model.generation_config is theirs


def test_a_repetition_penalty_is_used_and_padding_is_nothing_that_was_said(prompt: Prompt) -> None:
    model = build_model("qwen2")
    free = said(model, prompt)
    # Padded with what the model wants to say, which would be penalised in the rows that are padded.
    wanted = free["row-8"].token_ids[0]
    tokenizer = copy.deepcopy(prompt.tokenizer)
    tokenizer.pad_token_id = wanted
    padded = dataclasses.replace(prompt, tokenizer=tokenizer)
    penalised = dataclasses.replace(GREEDY, repetition_penalty=50.0)
    together = said(model, padded, penalised)
    assert together == said(model, padded, dataclasses.replace(penalised, per_device_eval_batch_size=1))
    assert together["row-8"].token_ids[0] == wanted and together != free


def test_a_sampled_answer_belongs_to_its_row_and_seed_and_not_to_its_batch(prompt: Prompt) -> None:
    model = build_model("gpt2")
    expected = said(model, prompt, SAMPLED)
    for size in (1, 3, 16):
        assert said(model, prompt, dataclasses.replace(SAMPLED, per_device_eval_batch_size=size)) == expected
    assert said(model, prompt, SAMPLED, ROWS.take([5, 2])) == {i: expected[i] for i in ("row-5", "row-2")}
    other = said(model, prompt, dataclasses.replace(SAMPLED, seed=4))
    assert all(other[identity].token_ids != expected[identity].token_ids for identity in expected)
    assert expected != said(model, prompt, dataclasses.replace(SAMPLED, do_sample=False))


def test_a_token_is_drawn_as_often_as_it_is_probable() -> None:
    share = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = 20_000
    scores = share.log().expand(draws, 4)
    drawn = SeededDraw([f"row-{n}" for n in range(draws)], 0, 2)
    for _ in range(2):
        chosen = drawn(torch.zeros((draws, 1)), scores).argmax(dim=-1)
        found = torch.bincount(chosen, minlength=4) / draws
        assert torch.allclose(found, share, atol=0.012) and found[1] == 0


def test_top_k_of_one_is_greedy(prompt: Prompt) -> None:
    model = build_model("gpt2")
    greedy = {identity: one.token_ids[:12] for identity, one in said(model, prompt).items()}
    sharp = said(model, prompt, dataclasses.replace(SAMPLED, top_k=1))
    nucleus = said(model, prompt, dataclasses.replace(SAMPLED, top_p=1e-6))
    assert {i: one.token_ids for i, one in sharp.items()} == greedy == {i: one.token_ids for i, one in nucleus.items()}


def test_a_question_that_does_not_fit_the_context_loses_its_last_words_and_says_so(prompt: Prompt) -> None:
    rows = rows_of(["صداع " * 300, "صداع"])
    settings = dataclasses.replace(GREEDY, max_new_tokens=100)
    answers = said(build_model("gpt2"), prompt, settings, rows)
    assert answers["row-0"].lost_words > 0 and answers["row-1"].lost_words == 0
    with pytest.raises(ModelError, match="max_new_tokens=250 leaves no room for a question in the 256 positions"):
        said(build_model("gpt2"), prompt, dataclasses.replace(GREEDY, max_new_tokens=250), rows)


def test_a_full_gpu_makes_batches_smaller_until_a_single_row_does_not_fit(
    prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("gpt2")
    expected, generate, largest = said(model, prompt), model.generate, 2
    monkeypatch.setattr(generation, "possible_batches", lambda *_: ("any", ""))

    def small(**asked: torch.Tensor) -> object:
        if len(asked["input_ids"]) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**asked)

    monkeypatch.setattr(model, "generate", small)
    assert said(model, prompt) == expected
    largest = 0
    with pytest.raises(RunError, match="full with a single question"):
        said(model, prompt)


def test_the_progress_is_told_batch_by_batch(prompt: Prompt) -> None:
    told: list[int] = []
    batches = list(generate(build_model("gpt2"), prompt, ROWS, GREEDY, on_batch=told.append))
    assert told == [4, 4, 2] == [len(batch) for batch in batches]


def test_an_adapter_s_answers_are_lazy_so_that_each_batch_can_be_kept(prompt: Prompt) -> None:
    batches = generate(build_model("gpt2"), prompt, ROWS, GREEDY)
    assert isinstance(batches, Iterator)
    assert isinstance(next(batches)[0], Prediction)


def test_the_settings_are_the_recipe_s_section() -> None:
    section = recipe_from_values({"generation": {"max_new_tokens": 7, "do_sample": True}}).generation
    settings = GenerationSettings(**section.model_dump())
    assert settings == GenerationSettings(max_new_tokens=7, do_sample=True)
    assert GenerationSettings() == GenerationSettings(**recipe_from_values({}).generation.model_dump())
