"""An answer is what the model says to the question alone: no batch, no padding, no other row changes a token of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from sevpeft.errors import ModelError, RunError
from sevpeft.evaluation import generation, under_way
from sevpeft.evaluation.answer_cache import can_join
from sevpeft.evaluation.generation import (
    GenerationSettings,
    Prediction,
    SeededDraw,
    answering_as,
    generate,
    next_batch,
)
from sevpeft.evaluation.padding import answered_together, neighbour_shift
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.under_way import AnswersUnderWay
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


def test_a_model_that_reads_its_padding_is_found_out_and_answers_prompts_of_one_length_together(prompt: Prompt) -> None:
    model = build_model("gpt2")
    forward = model.forward

    @functools.wraps(forward)
    def blind(*args: object, attention_mask: object = None, position_ids: object = None, **rest: object) -> object:
        return forward(*args, **rest)

    assert answered_together(model, 1, 0) == "any"
    model.forward = blind
    assert answered_together(model, 1, 0) == "one length"
    together = said(model, prompt)
    assert together == said(model, prompt, dataclasses.replace(GREEDY, per_device_eval_batch_size=1))
    for identity, question in zip(ROWS.ids, ROWS.questions, strict=True):
        assert list(together[identity].token_ids) == alone(model, prompt, question, GREEDY.max_new_tokens)


def test_a_model_whose_rows_disturb_each_other_answers_each_alone(prompt: Prompt) -> None:
    # In transformers 5.23 a cached step of this architecture depends on the other rows of the batch.
    config = AutoConfig.for_model("rwkv", vocab_size=512, hidden_size=48, num_hidden_layers=2, attention_hidden_size=48)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert neighbour_shift(model, 1, 0, 24) > 0.1 < neighbour_shift(model, 1, 0, 9)
    assert answered_together(model, 1, 0) == "none"
    assert said(model, prompt) == said(model, prompt, dataclasses.replace(GREEDY, per_device_eval_batch_size=1))


def test_batches_are_what_may_be_answered_together() -> None:
    lengths = [7, 7, 7, 5, 5]
    assert next_batch([0, 1, 2, 3, 4], lengths, 4, "any", joining=False) == [0, 1, 2, 3]
    assert next_batch([0, 1, 2, 3, 4], lengths, 2, "one length", joining=False) == [0, 1]
    assert next_batch([2, 3, 4], lengths, 2, "one length", joining=False) == [2]
    assert next_batch([2, 3, 4], lengths, 2, "none", joining=False) == [2]
    # Where others can join later, a batch is read without much padding.
    assert next_batch([0, 1, 2, 3, 4], lengths, 4, "any", joining=True) == [0, 1, 2]


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


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bloom", "lfm2"])
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_that_have_ended_leave_the_batch_and_the_others_go_on_as_before(
    architecture: str, sampled: bool, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(build_model(architecture))
    settings = dataclasses.replace(SAMPLED if sampled else GREEDY, max_new_tokens=20)
    whole = {identity: one.token_ids for identity, one in said(model, prompt, settings).items()}

    def cut_at(end: int) -> dict[str, tuple[int, ...]]:
        return {i: row[: row.index(end) + 1] if end in row else row for i, row in whole.items()}

    # A token that some rows say early, some late and some never.
    tokens = sorted({token for row in whole.values() for token in row})
    end = max(tokens, key=lambda token: len(set(map(len, cut_at(token).values()))))
    expected, prompt = cut_at(end), dataclasses.replace(prompt, end_id=end)
    sizes: list[int] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **asked: sizes.append(len(asked["input_ids"])) or generate(**asked))
    for stride in (1, 3, 50):
        monkeypatch.setattr(under_way, "_STRIDE", stride)
        assert {i: one.token_ids for i, one in said(model, prompt, settings).items()} == expected
    assert len(set(map(len, expected.values()))) > 1 and len(set(sizes)) > 2


@pytest.mark.parametrize(("architecture", "sampled"), [("gpt2", False), ("qwen3", False), ("bloom", True)])
def test_rows_join_a_batch_that_is_under_way_and_say_what_they_say_alone(
    architecture: str, sampled: bool, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(build_model(architecture))
    settings = dataclasses.replace(SAMPLED if sampled else GREEDY, max_new_tokens=8)
    alone = dataclasses.replace(settings, per_device_eval_batch_size=1)
    longest = ROWS.take([len(ROWS) - 1])
    # The longest question is answered first and ends early, so that the others are padded for nothing.
    end = said(model, prompt, alone, longest)[longest.ids[0]].token_ids[2]
    prompt = dataclasses.replace(prompt, end_id=end)
    expected = said(model, prompt, alone)
    seen: list[tuple[int, int]] = []
    cut: list[int] = []
    join, without_columns = AnswersUnderWay.join, under_way.without_columns

    def joining(self: AnswersUnderWay, rows: list[int], prompts: list[list[int]]) -> dict[int, list[int]]:
        seen.append((len(self), len(rows)))
        return join(self, rows, prompts)

    monkeypatch.setattr(AnswersUnderWay, "join", joining)
    monkeypatch.setattr(under_way, "without_columns", lambda cache, n: cut.append(n) or without_columns(cache, n))
    monkeypatch.setattr(under_way, "_STRIDE", 3)
    assert said(model, prompt, settings) == expected
    assert any(before for before, _ in seen) and all(before + more <= 4 for before, more in seen) and cut


def test_rows_join_only_where_every_layer_keeps_all_positions() -> None:
    joins = {name: can_join(build_model(name)) for name in ("gpt2", "llama", "bloom", "lfm2")}
    assert joins == {"gpt2": True, "llama": True, "bloom": True, "lfm2": False}
    sliding = AutoConfig.for_model(
        "mistral", vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    assert not can_join(AutoModelForCausalLM.from_config(sliding))


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
    monkeypatch.setattr(generation, "answered_together", lambda *_: "any")

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
