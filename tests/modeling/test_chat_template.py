"""The exported chat template gives the very tokens of the training, for every recipe and kind of tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, GenerationConfig

from sevpeft.errors import ModelError
from sevpeft.modeling.chat_template import CHAT_TEMPLATE, chat_template, generation_config, save_tokenizer
from sevpeft.modeling.prompts import SEVERITY_LINES, Prompt, choose_pad_token
from sevpeft.recipe import load_recipe
from tests.modeling.test_prompts import CASES, DATED, PREFIXES, QUESTIONS, build, byte_level, with_tokens
from tests.models import CHAT_TEMPLATES
from tests.test_recipes import RECIPES, TEMPLATE

ASKED = [*QUESTIONS, " مُنذُ ٣ أيّـــام </s><|im_end|> ألم\n", "Is aspirin 100 mg safe?", "123"]
SETTINGS = (
    {},
    {"system": 'أنت "طبيب" {{ x }}.'},
    {"severity": "predicted"},
    {"examples": [{"question": "ما <b>العلاج</b>؟", "answer": "راحة"}]},
    {"strip_marks": True},
    {"dialect_prefixes": PREFIXES, "dialect": "egyptian"},
    {"english_template": "Question: {question}\n{answer_cue}", "english_cue": "Answer:"},
)


def differing(prompt: Prompt) -> list[str]:
    """Questions that `apply_chat_template` asks in other tokens than the training."""
    named = {"severity": "critical"} if prompt.severity != "none" else {}
    severities, dialects = [named.get("severity")], [prompt.dialect]
    named |= {"dialect": prompt.dialect} if prompt.dialect_lexicon else {}
    how = {"chat_template": chat_template(prompt), "add_generation_prompt": True, "return_dict": False, **named}
    return [
        question
        for question in ASKED
        if prompt.prompt_ids([question], dialects, severities)[0]
        != prompt.tokenizer.apply_chat_template([{"role": "user", "content": question}], **how)
    ]


def test_every_recipe_is_asked_in_the_tokens_of_its_training() -> None:
    plain = {"llama-2-7b": "plain llama-2", "llama-3.1-8b": "plain llama-3", "llama-3.1-70b": "plain llama-3"}
    wrong, done = {}, set()
    for path in RECIPES:
        settings = load_recipe(path).prompt
        case = f"chat {TEMPLATE[path.stem]}" if settings.chat else plain.get(path.stem, "plain byte-level")
        if (key := (case, settings.model_dump_json())) in done:
            continue
        done.add(key)
        tokenizer = CASES[case].make()
        choose_pad_token(tokenizer, len(tokenizer))
        if found := differing(Prompt.build(tokenizer, **settings.model_dump())):
            wrong[path.stem] = found
    assert wrong == {}


def test_every_setting_of_a_prompt_travels_with_every_kind_of_tokenizer() -> None:
    wrong, together = [], {key: value for one in SETTINGS[1:-1] for key, value in one.items()}
    tokenizers = {case: chosen.make() for case, chosen in CASES.items()}
    tried = [("plain byte-level", one) for one in SETTINGS]
    tried += [(case, settings) for case in CASES for settings in ({}, together)]
    for case, settings in tried:
        prompt = None
        while prompt is None:
            try:
                prompt = build(tokenizers[case], chat=CASES[case].chat, **settings)
            except ModelError:  # its template has no place for a system message
                settings = {key: value for key, value in settings.items() if key != "system"}
        wrong += [(case, *settings, found) for found in differing(prompt)]
    assert wrong == []


def test_an_answer_follows_and_a_caller_replaces_the_system_message(tmp_path: Path) -> None:
    prompt = build(byte_level(), system="أنت طبيب.")
    save_tokenizer(prompt, tmp_path)
    messages = [{"role": "user", "content": "ألم"}]
    saved = AutoTokenizer.from_pretrained(tmp_path)
    whole = saved.apply_chat_template([*messages, {"role": "assistant", "content": "لا"}], return_dict=False)
    assert whole == prompt.prompt_ids(["ألم"])[0] + prompt.answer_ids(["لا"])[0]
    other = saved.apply_chat_template([{"role": "system", "content": "أنت ممرض."}, *messages], tokenize=False)
    assert other == "أنت ممرض.\n\nالسؤال: ألم\nالجواب:"
    with pytest.raises(TemplateError, match="single questions"):
        saved.apply_chat_template([*messages, {"role": "assistant", "content": "لا"}, *messages], tokenize=False)


def test_what_a_template_cannot_know_is_asked_for(tmp_path: Path) -> None:
    save_tokenizer(build(byte_level(), severity="predicted"), tmp_path / "severity")
    saved, messages = AutoTokenizer.from_pretrained(tmp_path / "severity"), [{"role": "user", "content": "ألم"}]
    with pytest.raises(TemplateError, match="severity="):
        saved.apply_chat_template(messages)
    for name, line in SEVERITY_LINES.items():
        assert saved.apply_chat_template(messages, severity=name, tokenize=False).startswith(line)
    save_tokenizer(build(byte_level(), dialect_prefixes=PREFIXES, dialect="msa"), tmp_path / "dialect")
    saved = AutoTokenizer.from_pretrained(tmp_path / "dialect")
    assert saved.apply_chat_template(messages, dialect="egyptian", tokenize=False).startswith("[EGYPTIAN] ")
    assert saved.apply_chat_template(messages, dialect="moroccan", tokenize=False).startswith("[MSA] ")


def test_a_prompt_that_no_template_renders_leaves_none_instead_of_another_one(tmp_path: Path) -> None:
    tokenizer = byte_level(CHAT_TEMPLATES["chatml"])
    save_tokenizer(build(tokenizer, chat=True), tmp_path)
    prompt = build(tokenizer, chat=True, system="أنت طبيب.")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    save_tokenizer(prompt, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None


def test_examples_are_their_owners_alone_and_the_tokenizer_of_the_training_stays(tmp_path: Path) -> None:
    before, tokenizer = os.umask(0), byte_level()
    try:
        save_tokenizer(build(tokenizer, examples=[{"question": "سؤال", "answer": "راحة"}]), tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / CHAT_TEMPLATE).stat().st_mode & 0o777 == 0o600 and tokenizer.chat_template is None


def test_an_answer_ends_where_the_base_model_ends_and_where_the_training_did() -> None:
    prompt = build(byte_level(CHAT_TEMPLATES["chatml"]), chat=True)
    end = prompt.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for theirs, ends in ((None, [end]), (0, [0, end]), ([0, 1], [0, 1, end]), (end, [end])):
        assert generation_config(prompt, GenerationConfig(eos_token_id=theirs)).eos_token_id == ends


def test_the_date_and_an_end_that_is_not_special_travel_with_the_template(tmp_path: Path) -> None:
    template = DATED.replace("im_", "turn_")
    tokenizer = with_tokens("<|turn_start|>", "<|turn_end|>", special=False, template=template)
    prompt = build(tokenizer, chat=True, date="2026-02-03", system="أنت طبيب.")
    save_tokenizer(prompt, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "ألم <|turn_end|> شديد"}]
    ids = saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == prompt.prompt_ids([messages[0]["content"]])[0] and saved.decode(ids).startswith("03 Feb 2026 ")
    again = build(saved, chat=True)  # as `sevpeft chat` reads a pushed adapter, on a default day
    assert again.prompt_ids(["ألم"]) == prompt.prompt_ids(["ألم"]) and again.end_id == prompt.end_id
    assert generation_config(prompt, GenerationConfig(eos_token_id=0)).eos_token_id == [0, prompt.end_id]
