"""Prompt and answer as tokens, the same for training and generation.

Both call the same `prompt_ids`, so that the two prompts are the same tokens up to the answer. A plain template suits
base models; instruct models use the chat template of their own tokenizer, from which the text around the answer and the
token that ends it are read off once, on a probe conversation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from sevpeft.data.text import strip_marks
from sevpeft.errors import ModelError

_PROBE = "جواب"
# Of one length, so that a tokenizer that knows no Arabic makes the same tokens of both.
_QUESTIONS = ("سؤال", "طلبي")
_LONG_QUESTION = "\n".join(["بداية", *["وسط"] * 500, "نهاية"])


@dataclass(frozen=True)
class Prompt:
    """Prompt of one tokenizer and one recipe.

    Attributes:
        before_answer: blank or text between prompt and answer, read off the tokenizer.
        end_id: token that ends an answer.
        control: matches every control token of the tokenizer.
        The others: as in the recipe's section `prompt`.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    template: str
    answer_cue: str
    system: str | None = None
    dialect_prefixes: dict[str, str] | None = None
    dialect: str | None = None
    strip_marks: bool = False
    before_answer: str = ""
    end_id: int = -1
    control: re.Pattern[str] = re.compile(r"(?!)")

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Prompt:
        """The prompt for a tokenizer.

        Args:
            settings: of the recipe's section `prompt`.

        Raises:
            ModelError: no chat template, one that takes no system message or loses text, a tokenizer that knows no
                Arabic or has no end-of-sequence token, a `dialect` without a prefix, prefixes beside a chat template.
        """
        prompt = cls(tokenizer, **settings)
        prefixes, chat = prompt.dialect_prefixes, prompt.chat
        if prefixes and chat:
            raise ModelError(
                "prompt.dialect_prefixes stand before a plain prompt, and prompt.chat=true uses the chat template "
                "instead; leave one of them out."
            )
        if prefixes and prompt.dialect not in prefixes:
            raise ModelError(
                f"prompt.dialect is {prompt.dialect!r}, but prompt.dialect_prefixes knows {', '.join(prefixes)}; "
                "name one of them for the rows without a dialect."
            )
        # Those included that have no role in the tokenizer (Llama 3's `<|eot_id|>`); the longest first.
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        control = sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
        prompt = replace(prompt, control=re.compile("|".join(map(re.escape, control)) or r"(?!)"))
        one, other = tokenizer(list(_QUESTIONS), add_special_tokens=False)["input_ids"]
        if one == other:
            raise ModelError(
                f"The tokenizer of {tokenizer.name_or_path} makes the same tokens of two different Arabic questions; "
                "name a base model that knows Arabic."
            )
        before_answer, end_id = prompt._chat_frame() if chat else prompt._plain_frame()
        return replace(prompt, before_answer=before_answer, end_id=end_id)

    def text(self, question: str, dialect: str | None = None) -> str:
        """The prompt up to the answer, as text."""
        question = self._cleaned(question)
        if self.chat:
            return self._render([{"role": "user", "content": question}], add_generation_prompt=True)
        body = self.template.replace("{answer_cue}", self.answer_cue).replace("{question}", question)
        opening = f"{self.system}\n\n" if self.system else ""
        return self._prefix(dialect) + opening + body

    def prompt_ids(self, questions: Sequence[str], dialects: Sequence[str | None] | None = None) -> list[list[int]]:
        """Token ids of the prompts, special tokens included, no padding, not shortened."""
        known = dialects or [None] * len(questions)
        texts = [self.text(question, dialect) for question, dialect in zip(questions, known, strict=True)]
        ids = self.tokenizer(texts, add_special_tokens=not self.chat)["input_ids"]
        # Some tokenizers are set to end every text with EOS; after a prompt it would end the answer before it begins.
        eos = self.tokenizer.eos_token_id
        return [row[:-1] if not self.chat and len(row) > 1 and row[-1] == eos else row for row in ids]

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of the answers, each closed by the token that ends a turn (`end_id`)."""
        texts = [self.before_answer + self._cleaned(answer) for answer in answers]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*row, self.end_id] for row in ids]

    def _cleaned(self, text: str) -> str:
        """The text without the tokenizer's own control tokens: a post that holds `</s>` must not end the answer."""
        # Marks go first: one inside a control token hides it, and taking it out afterwards would make the token.
        return self.control.sub(" ", strip_marks(text) if self.strip_marks else text).strip()

    def _prefix(self, dialect: str | None) -> str:
        if not self.dialect_prefixes:
            return ""
        return self.dialect_prefixes.get(dialect or "", self.dialect_prefixes[self.dialect or ""])

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if self.system:
            messages = [{"role": "system", "content": self.system}, *messages]
        # enable_thinking is read by Qwen3's template and ignored by the others: an answer starts at once.
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )
        assert isinstance(rendered, str)
        return rendered

    def _plain_frame(self) -> tuple[str, int]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ModelError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no end-of-sequence token, so an answer could not "
                "be ended; add eos_token to its tokenizer_config.json."
            )
        # The space belongs to the answer: byte-level BPE merges it with the first word, and a prompt that ended with
        # it would be cut into other tokens.
        return ("" if self._begins_with_a_blank() else " "), eos

    def _begins_with_a_blank(self) -> bool:
        """Whether the tokenizer puts a blank before every text itself, as most SentencePiece models do."""
        ids = self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        first: str = self.tokenizer.convert_ids_to_tokens(ids)[0]
        return first.startswith("▁")

    def _chat_frame(self) -> tuple[str, int]:
        name = self.tokenizer.name_or_path
        if not self.tokenizer.chat_template:
            raise ModelError(f"{name} has no chat template; set prompt.chat=false to use prompt.template.")
        user = {"role": "user", "content": "سؤال"}
        try:
            prompt = self._render([user], add_generation_prompt=True)
            whole = self._render([user, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False)
        except TemplateError as error:
            remedy = "set prompt.system=null" if self.system else "set prompt.chat=false"
            raise ModelError(f"The chat template of {name} refuses the conversation ({error}); {remedy}.") from error
        for key, text, rendered in (
            ("question", _LONG_QUESTION, self.text(_LONG_QUESTION)),
            ("answer", _PROBE, whole),
            ("system message", self.system or "", prompt),
        ):
            if _letters(text) not in _letters(rendered):
                remedy = "prompt.system=null" if text == self.system else "prompt.chat=false"
                raise ModelError(f"The chat template of {name} leaves out the {key}, or a part of it; set {remedy}.")
        before, _, after = whole.rpartition(_PROBE)
        # Templates differ in the blanks between cue and answer; where the two renderings differ in more than that,
        # the generation prompt is what the model will see, so nothing is added to it.
        before_answer = before[len(prompt) :] if before.startswith(prompt) else ""
        if self._begins_with_a_blank():
            before_answer = before_answer.removeprefix(" ")
        end = self.control.search(after)
        end_id = self.tokenizer.convert_tokens_to_ids(end.group()) if end else self.tokenizer.eos_token_id
        if end_id is None:
            raise ModelError(f"The chat template of {name} ends a turn without a special token, and it has no EOS.")
        return before_answer, end_id


def _letters(text: str) -> str:
    """The text without blanks, which templates trim and fold."""
    return "".join(text.split())


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> str:
    """Gives the tokenizer a pad token without adding one to the vocabulary, and returns it.

    A pad token of its own if the model has one (or a reserved one of a known name), else EOS: that is safe here
    because labels and attention mask are written explicitly and never derived from the pad id.

    Args:
        tokenizer: changed in place (`pad_token`).
        vocabulary_size: rows of the embedding; a token beyond them would be a crash on a GPU.
    """
    reserved = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|endoftext|>")
    # Asked of the vocabulary itself: `convert_tokens_to_ids` gives the id of <unk> for a token that is not there.
    vocabulary = tokenizer.get_vocab()
    for token in (tokenizer.pad_token, *reserved, tokenizer.eos_token):
        if token is not None and vocabulary.get(token, vocabulary_size) < vocabulary_size:
            tokenizer.pad_token = token
            return token
    raise ModelError(f"The tokenizer of {tokenizer.name_or_path} has no pad and no EOS token within the vocabulary.")
