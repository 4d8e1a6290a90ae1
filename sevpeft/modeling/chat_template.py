"""The prompt of a training as the chat template of its tokenizer, so that other programs send the same tokens.

transformers, vLLM and llama.cpp render it from `[{"role": "user", "content": question}]`. A system message of the
caller replaces the recipe's. What no template can find out is a variable of it: `severity`, and the question's
`dialect`, which is the recipe's `prompt.dialect` where none is given.
"""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig

from sevpeft.data.text import DIGITS, strip_marks
from sevpeft.errors import ModelError
from sevpeft.modeling.prompts import SEVERITY_LINES, Prompt
from sevpeft.runs import keep_private

CHAT_TEMPLATE = "chat_template.jinja"
# Dozens at most have a role; Gemma's vocabulary has thousands more that are reserved and stand in no text.
_MOST_CONTROL_TOKENS = 300
_PROBES = ("عندي صداع", "ألم  في الصدر\nمنذ ٣ أيّام", "Is aspirin safe?")
_MARKS = "".join(map(chr, (code for code in range(0x10000) if not strip_marks(chr(code)))))
_ONE_QUESTION = "This model was trained on single questions: send one user message, after a system message at most."
_NO_SEVERITY = "This model was trained with the severity in its prompt: give severity=, one of " + ", ".join(
    SEVERITY_LINES
)


def chat_template(prompt: Prompt) -> str:
    """Jinja template that makes of a question the very tokens of `prompt.prompt_ids`; ModelError where none does."""
    # After a first token some tokenizers put no blank before the text, which they do at its beginning.
    for blank in ("", " "):
        template = _for_chat(prompt) if prompt.chat else _for_plain(prompt, blank)
        if all(_same_ids(prompt, template, question) for question in _PROBES):
            return template
    name = prompt.tokenizer.name_or_path
    raise ModelError(f"The prompt cannot be written as a chat template for {name}; simplify the prompt section.")


def save_tokenizer(prompt: Prompt, folder: Path) -> None:
    """Writes the tokenizer with the prompt of the training as its chat template; without one where none is faithful."""
    tokenizer = copy.copy(prompt.tokenizer)
    tokenizer.chat_template = None  # the base model's own would be taken for the prompt of the training
    (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    with suppress(ModelError):
        tokenizer.chat_template = chat_template(prompt)
    tokenizer.save_pretrained(folder)
    if prompt.examples and tokenizer.chat_template:  # they may be rows of the data
        keep_private(folder / CHAT_TEMPLATE)


def generation_config(prompt: Prompt, theirs: GenerationConfig) -> GenerationConfig:
    """Settings that end an answer at the token of the training; of the base model's own only what ends a text.

    Its others are for other prompts, and some published ones contradict themselves.
    """
    ends = [] if theirs.eos_token_id is None else np.atleast_1d(theirs.eos_token_id).tolist()
    ends, pad = [*dict.fromkeys([*ends, prompt.end_id])], prompt.tokenizer.pad_token_id
    return GenerationConfig(bos_token_id=theirs.bos_token_id, eos_token_id=ends, pad_token_id=pad)


def _same_ids(prompt: Prompt, template: str, question: str) -> bool:
    named = {"severity": next(iter(SEVERITY_LINES))} if prompt.severity != "none" else {}
    # Without it the words of the question would decide, which only `Prompt` can find out.
    named |= {"dialect": prompt.dialect} if prompt.dialect else {}
    asked: Any = [{"role": "user", "content": question}]
    try:
        ids = prompt.tokenizer.apply_chat_template(
            asked, chat_template=template, add_generation_prompt=True, return_dict=False, **named
        )
    except TemplateError:
        return False
    return bool(ids == prompt.prompt_ids([question], [named.get("dialect")], [named.get("severity")])[0])


def _text(text: Any) -> str:
    """A Jinja literal of a text, or of plain values."""
    return json.dumps(text, ensure_ascii=False)


def _cleaned(prompt: Prompt) -> str:
    """Sets `question` to what `Prompt` makes of it, `prefix` and `line` to what stands before it."""
    parts: list[str] = []
    if prompt.strip_marks:
        digits = "".join(map(chr, DIGITS))
        parts += [
            f"{{%- for mark in {_text(_MARKS)} -%}}{{%- set ns.text = ns.text.replace(mark, '') -%}}{{%- endfor -%}}",
            f"{{%- for digit in {_text(digits)} -%}}",
            "{%- set ns.text = ns.text.replace(digit, (loop.index0 % 10) | string) -%}{%- endfor -%}",
        ]
    control = sorted(filter(prompt.control.fullmatch, prompt.tokenizer.get_vocab()), key=lambda one: (-len(one), one))
    if len(control) > _MOST_CONTROL_TOKENS:
        control = list(dict.fromkeys(prompt.tokenizer.all_special_tokens))
    parts += [
        f"{{%- for token in {_text(control)} -%}}{{%- set ns.text = ns.text.replace(token, ' ') -%}}{{%- endfor -%}}",
        "{%- set question = ns.text | trim -%}",
    ]
    prefixes = prompt.dialect_prefixes or {}
    default = _text(prefixes.get(prompt.dialect or "", ""))
    if prefixes:
        default = f"{_text(prefixes)}.get(dialect | default(''), {default})"
    parts += [f"{{%- set prefix = {default} -%}}", "{%- set line = '' -%}"]
    if prompt.severity != "none":
        parts += [
            f"{{%- if severity is not defined -%}}{{{{ raise_exception({_text(_NO_SEVERITY)}) }}}}{{%- endif -%}}",
            f"{{%- set line = {_text(SEVERITY_LINES)}[severity] -%}}",
        ]
    return "".join(parts)


def _for_plain(prompt: Prompt, blank: str) -> str:
    tokenizer = prompt.tokenizer
    whole, alone = (tokenizer(_PROBES[0], add_special_tokens=added)["input_ids"] for added in (True, False))
    # What the tokenizer itself puts before a text; what it puts after one, `prompt_ids` takes away.
    first = next((n for n in range(len(whole)) if whole[n : n + len(alone)] == alone), 0)
    begin = "".join(tokenizer.convert_ids_to_tokens(whole[:first]))
    ways = [(prompt.template, prompt.answer_cue)]
    if prompt.english_template or prompt.english_cue:
        ways += [(prompt.english_template or prompt.template, prompt.english_cue or prompt.answer_cue)]
    bodies = []
    for template, cue in ways:
        template = template.replace("{answer_cue}", cue)
        shown = [f"{template.replace('{question}', one['question'])} {one['answer']}\n\n" for one in prompt.examples]
        asked = " ~ question ~ ".join(map(_text, template.split("{question}")))
        bodies.append(f"{{{{- prefix ~ system ~ {_text(''.join(shown))} ~ line ~ {asked} -}}}}")
    body = bodies[0]
    if len(bodies) > 1:
        body = (
            "{%- set letters = namespace(all=0, latin=0) -%}{%- for letter in question -%}{%- if letter.isalpha() -%}"
            "{%- set letters.all = letters.all + 1 -%}{%- if letter.isascii() -%}"
            "{%- set letters.latin = letters.latin + 1 -%}{%- endif -%}{%- endif -%}{%- endfor -%}"
            f"{{%- if 2 * letters.latin > letters.all -%}}{bodies[1]}{{%- else -%}}{body}{{%- endif -%}}"
        )
    end = tokenizer.convert_ids_to_tokens(prompt.end_id)
    return (
        f"{{%- set system = {_text(f'{prompt.system}{chr(10) * 2}' if prompt.system else '')} -%}}"
        "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] ~ '\\n\\n' -%}"
        "{%- set messages = messages[1:] -%}{%- endif -%}"
        "{%- if messages | length not in (1, 2) or messages[0]['role'] != 'user' or messages[-1]['role'] != "
        "('user', 'assistant')[(messages | length) - 1] -%}"
        f"{{{{ raise_exception({_text(_ONE_QUESTION)}) }}}}{{%- endif -%}}"
        "{%- set ns = namespace(text=messages[0]['content']) -%}"
        f"{_cleaned(prompt)}{{{{- {_text(begin + blank)} -}}}}{body}"
        f"{{%- if messages[1] -%}}{{{{- ' ' ~ messages[1]['content'] | trim ~ {_text(end)} -}}}}{{%- endif -%}}"
    )


def _for_chat(prompt: Prompt) -> str:
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    turns = (("user", "question"), ("assistant", "answer"))
    shown = [{"role": role, "content": one[key]} for one in prompt.examples for role, key in turns]
    return (
        "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}"
        f"{{%- set first = {_text(system)} -%}}{{%- if messages[0]['role'] == 'system' -%}}"
        "{%- set first = [messages[0]] -%}{%- set messages = messages[1:] -%}{%- endif -%}"
        "{%- if messages and messages[-1]['role'] == 'user' and messages[-1]['content'] is string -%}"
        f"{{%- set ns = namespace(text=messages[-1]['content']) -%}}{_cleaned(prompt)}"
        "{%- set messages = messages[:-1] + [{'role': 'user', 'content': prefix ~ line ~ question}] -%}{%- endif -%}"
        f"{{%- set messages = first + {_text(shown)} + messages -%}}"
        # A blank line after a block tag would be taken away.
        f"{{{{- '' }}}}{prompt.tokenizer.get_chat_template()}"
    )
