"""The exported chat template gives the very tokens of the training, for every recipe and kind of tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, GenerationConfig

from sevpeft.errors import ModelError
from sevpeft.modeling.chat_template import CHAT_TEMPLATE, generation_config, save_tokenizer
from sevpeft.modeling.prompts import SEVERITY_LINES, Prompt, choose_pad_token
from sevpeft.recipe import load_recipe
from sevpeft.training.train import train
from tests.modeling.test_prompts import CASES, PREFIXES, QUESTIONS, build, byte_level
from tests.models import CHAT_TEMPLATES
from tests.test_recipes import FOLDER, RECIPES, TEMPLATE

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


def differing(prompt: Prompt, folder: Path) -> list[str]:
    """Questions that `apply_chat_template` of the saved tokenizer asks in other tokens than the training."""
    save_tokenizer(prompt, folder)
    saved = AutoTokenizer.from_pretrained(folder)
    named = {"severity": "critical"} if prompt.severity != "none" else {}
    severities, dialects = ([named.get("severity")], [prompt.dialect])
    if prompt.dialect_lexicon:
        named["dialect"] = prompt.dialect
    return [
        question
        for question in ASKED
        if prompt.prompt_ids([question], dialects, severities)[0]
        != saved.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False, **named
        )
    ]


def test_every_recipe_is_asked_in_the_tokens_of_its_training(tmp_path: Path) -> None:
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
        if found := differing(Prompt.build(tokenizer, **settings.model_dump()), tmp_path / path.stem):
            wrong[path.stem] = found
    assert wrong == {}


def test_every_setting_of_a_prompt_travels_with_every_kind_of_tokenizer(tmp_path: Path) -> None:
    wrong, together = [], {key: value for one in SETTINGS[1:-1] for key, value in one.items()}
    tokenizers = {case: chosen.make() for case, chosen in CASES.items()}
    tried = [("plain byte-level", one) for one in SETTINGS]
    tried += [(case, settings) for case in CASES for settings in ({}, {**together, "severity": "predicted"})]
    for number, (case, settings) in enumerate(tried):
        prompt = None
        while prompt is None:
            try:
                prompt = build(tokenizers[case], chat=CASES[case].chat, **settings)
            except ModelError:  # its template has no place for a system message
                settings = {key: value for key, value in settings.items() if key != "system"}
        wrong += [(case, *settings, found) for found in differing(prompt, tmp_path / str(number))]
    assert wrong == []


def test_an_answer_follows_and_a_caller_replaces_the_system_message(tmp_path: Path) -> None:
    prompt = build(byte_level(), system="أنت طبيب.")
    save_tokenizer(prompt, tmp_path)
    asked = [{"role": "user", "content": "ألم"}]
    saved = AutoTokenizer.from_pretrained(tmp_path)
    whole = saved.apply_chat_template([*asked, {"role": "assistant", "content": "لا"}], return_dict=False)
    assert whole == prompt.prompt_ids(["ألم"])[0] + prompt.answer_ids(["لا"])[0]
    other = saved.apply_chat_template([{"role": "system", "content": "أنت ممرض."}, *asked], tokenize=False)
    assert other == "أنت ممرض.\n\nالسؤال: ألم\nالجواب:"
    with pytest.raises(TemplateError, match="single questions"):
        saved.apply_chat_template([*asked, {"role": "assistant", "content": "لا"}, *asked], tokenize=False)


def test_what_a_template_cannot_know_is_asked_for(tmp_path: Path) -> None:
    save_tokenizer(build(byte_level(), severity="predicted"), tmp_path / "severity")
    saved, asked = AutoTokenizer.from_pretrained(tmp_path / "severity"), [{"role": "user", "content": "ألم"}]
    with pytest.raises(TemplateError, match="severity="):
        saved.apply_chat_template(asked)
    for name, line in SEVERITY_LINES.items():
        assert saved.apply_chat_template(asked, severity=name, tokenize=False).startswith(line)
    save_tokenizer(build(byte_level(), dialect_prefixes=PREFIXES, dialect="msa"), tmp_path / "dialect")
    saved = AutoTokenizer.from_pretrained(tmp_path / "dialect")
    assert saved.apply_chat_template(asked, dialect="egyptian", tokenize=False).startswith("[EGYPTIAN] ")
    assert saved.apply_chat_template(asked, dialect="moroccan", tokenize=False).startswith("[MSA] ")


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


def test_a_run_and_its_adapter_end_an_answer_at_the_token_of_the_training(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    base = model_folder("qwen3", chat_template=CHAT_TEMPLATES["qwen3"])
    settings = [f"model.name_or_path={base}", "prompt.chat=true", "data.max_rows=16", "training.max_steps=1"]
    run = train(load_recipe(FOLDER / "quickstart.yaml", settings), tmp_path / "run")
    saved = AutoTokenizer.from_pretrained(run.adapter)
    rendered = saved.apply_chat_template(
        [{"role": "user", "content": "ألم"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered.endswith("<think>\n\n</think>\n\n")
    end = saved.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(run.adapter).eos_token_id == [0, end]
    prompt = build(CASES["plain byte-level"].make())
    assert generation_config(prompt, GenerationConfig()).eos_token_id == [prompt.end_id]
