"""Exports the training prompt as the tokenizer's chat template, so that other programs send the same tokens.

A template cannot compute them, so `severity` and `dialect` (default: `prompt.dialect`) are its variables.
"""

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig

from sevpeft.data.text import DIGITS, strip_marks
from sevpeft.modeling.prompts import SEVERITY_LINES, Prompt
from sevpeft.runs import keep_private

CHAT_TEMPLATE = "chat_template.jinja"
# Gemma's vocabulary has thousands of reserved tokens that no text contains.
_MOST_CONTROL_TOKENS = 300
_MARKS = (*range(0x900), *range(0x1800, 0x2100), *range(0xFC00, 0xFF00))  # Unicode blocks with marks
_PROBES = ("عندي صداع", "ألم  في الصدر\nمنذ ٣ أيّام", "Is aspirin safe?")


def chat_template(prompt: Prompt) -> str | None:
    """Jinja template that gives the same token ids as `prompt.prompt_ids`; None if no template does."""
    lines = Path(__file__).with_name(CHAT_TEMPLATE).read_text(encoding="utf-8").splitlines()
    # Some tokenizers add a blank at the start of a text, but not after a first special token.
    for blank in ("", " "):
        values = {name: json.dumps(value, ensure_ascii=False) for name, value in _variables(prompt, blank).items()}
        text = "".join([*(f"{{%- set {name} = {value} -%}}" for name, value in values.items()), *lines])
        text += prompt.tokenizer.get_chat_template() if prompt.chat else ""
        if all(_gives_the_ids(text, prompt, question) for question in _PROBES):
            return text
    return None


def save_tokenizer(prompt: Prompt, folder: Path) -> None:
    """Writes the tokenizer with the training prompt as its chat template, or without one if none is exact."""
    tokenizer = copy.copy(prompt.tokenizer)
    (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    # Never the base model's own template: readers would take it for the training prompt.
    tokenizer.chat_template = chat_template(prompt)
    tokenizer.save_pretrained(folder)
    if prompt.examples and tokenizer.chat_template:  # examples may be rows of the data
        keep_private(folder / CHAT_TEMPLATE)


def generation_config(prompt: Prompt, base: GenerationConfig) -> GenerationConfig:
    """End tokens of the base model and of the training; the base model's other settings suit other prompts."""
    ends = [] if base.eos_token_id is None else np.atleast_1d(base.eos_token_id).tolist()
    ends, pad = [*dict.fromkeys([*ends, prompt.end_id])], prompt.tokenizer.pad_token_id
    return GenerationConfig(bos_token_id=base.bos_token_id, eos_token_id=ends, pad_token_id=pad)


def _gives_the_ids(template: str, prompt: Prompt, question: str) -> bool:
    variables = {"severity": next(iter(SEVERITY_LINES))} if prompt.severity != "none" else {}
    variables |= {"dialect": prompt.dialect} if prompt.dialect else {}  # else a lexicon may choose it by the question
    options = {"chat_template": template, "add_generation_prompt": True, "return_dict": False, **variables}
    with suppress(TemplateError):
        ids = prompt.tokenizer.apply_chat_template([{"role": "user", "content": question}], **options)
        return bool(ids == prompt.prompt_ids([question], [variables.get("dialect")], [variables.get("severity")])[0])
    return False


def _variables(prompt: Prompt, blank: str) -> dict[str, Any]:
    """Variables of chat_template.jinja."""
    tokenizer, prefixes = prompt.tokenizer, prompt.dialect_prefixes or {}
    control, template = prompt.control_tokens, str(tokenizer.chat_template or "")
    if len(control) > _MOST_CONTROL_TOKENS:
        control = [one for one in control if one in tokenizer.all_special_tokens or (prompt.chat and one in template)]
    whole, alone = (tokenizer(_PROBES[0], add_special_tokens=added)["input_ids"] for added in (True, False))
    # Number of tokens that the tokenizer adds before a text; `prompt_ids` removes those after it.
    first = next((n for n in range(len(whole)) if whole[n : n + len(alone)] == alone), 0)
    cued = (prompt.template, prompt.answer_cue), (prompt.english_template, prompt.english_cue)
    templates = [(text or prompt.template).replace("{answer_cue}", cue or prompt.answer_cue) for text, cue in cued]
    return {
        "single": not prompt.chat,
        "trained_system": prompt.system or "",
        "examples": list(prompt.examples),
        "marks": [chr(code) for code in _MARKS if not strip_marks(chr(code))] if prompt.strip_marks else [],
        "digits": [chr(code) for code in DIGITS] if prompt.strip_marks else [],
        "control": list(control),
        "lines": SEVERITY_LINES if prompt.severity != "none" else {},
        "prefixes": {"": prefixes.get(prompt.dialect or "", ""), **prefixes},
        "begin": "".join(tokenizer.convert_ids_to_tokens(whole[:first])) + blank,
        "end": tokenizer.convert_ids_to_tokens(prompt.end_id),
        "ways": [text.split("{question}") for text in templates],
    }
