"""Tokenizes prompts and answers, identically for training and generation: both call `prompt_ids`.

Base models use a plain template. Instruct models use the chat template of their tokenizer. A probe conversation shows
which text that template writes around an answer, and which token ends it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from sevpeft.data.text import dialect_of, strip_marks
from sevpeft.errors import ModelError
from sevpeft.severity.probabilities import SEVERITIES

# A question is not shortened below this length; one that is shorter already is kept whole.
FEWEST_QUESTION_WORDS = 4
# The line before the question that names its severity.
_WORDS = ("غير حرجة", "متوسطة", "حرجة")
SEVERITY_LINES = {name: f"درجة الخطورة: {word}\n" for name, word in zip(SEVERITIES, _WORDS, strict=True)}
_PROBE = "جواب"
# Of equal length: a tokenizer without Arabic gives both the same tokens.
_QUESTIONS = ("سؤال", "طلبي")
_LONG_QUESTION = "\n".join(["بداية", *["وسط"] * 500, "نهاية"])
# Markers that templates write between turns: `<|im_end|>`, `</s>`, `[/INST]`.
_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
# Texts of the fingerprint: dialects, marks, digits, Latin letters, blanks, lines. Other texts, other fingerprints.
_ROWS = (
    "السلام عليكم دكتور، عندي صداع شديد من امبارح ومش قادر انام، وضغطي 150/95",
    "ابني عمره سنتين وحرارته ٣٩٫٥ منذ يومين ولا يأكل، أعطيته بارَاسيتامُول 250 mg كلّ ٦ ساعات",
    "  وش الحل؟؟ أحس بضيق في التـــنفس\n\nوألم بالصدر لما أطلع الدرج 🙂 (Is it COVID-19?)\t",
    "شو يعني الكرياتينين 1.8 والسكر التراكمي HbA1c %7؟ واخا نشرب metformin؟ راجع الطبيب فورًا إن أُغمي عليك؛ لا تنتظر!",
)


@dataclass(frozen=True)
class Prompt:
    """Prompt format of one tokenizer and one recipe's section `prompt`, made by `build`.

    Attributes:
        before_answer: blank or text between prompt and answer. end_id: token that ends an answer. date: for templates.
        control_tokens: of the tokenizer and the chat template, the longest first; `control` matches any of them.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    template: str
    answer_cue: str
    english_template: str | None = None
    english_cue: str | None = None
    system: str | None = None
    dialect_prefixes: dict[str, str] | None = None
    dialect: str | None = None
    dialect_lexicon: str | None = None
    strip_marks: bool = False
    severity: str = "none"
    examples: Sequence[dict[str, str]] = ()
    date: str = ""
    before_answer: str = ""
    end_id: int = -1
    control_tokens: Sequence[str] = ()
    control: re.Pattern[str] = re.compile(r"(?!)")

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int | None = None, **settings: Any) -> Prompt:
        """The prompt format for a tokenizer, an embedding with `vocabulary_size` rows, and the section's settings.

        Raises ModelError: the chat template is absent or loses text, or the tokenizer has no Arabic, no end token, or
        ids without an embedding row.
        """
        added, vocabulary = tokenizer.added_tokens_decoder.items(), tokenizer.get_vocab()
        size = vocabulary_size or max(vocabulary.values()) + 1
        # Includes tokens without a role in the tokenizer (Llama 3's `<|eot_id|>`), or without an embedding row.
        control = {one.content for n, one in added if one.special or n >= size} | {*tokenizer.all_special_tokens}
        prompt = cls(_with_fixed_date(tokenizer, settings.get("date")), **settings)._without(control)
        prefixes = prompt.dialect_prefixes
        if prompt.chat and (prompt.english_template or prompt.english_cue):
            raise ModelError("prompt.english_template and english_cue need prompt.chat=false; set it or remove them.")
        if prefixes and prompt.dialect not in prefixes:
            raise ModelError(f"prompt.dialect is {prompt.dialect!r}; write one of {', '.join(prefixes)}.")
        one, other = tokenizer(list(_QUESTIONS), add_special_tokens=False)["input_ids"]
        if one == other:
            name = tokenizer.name_or_path
            raise ModelError(f"{name} gives two Arabic questions the same tokens; name a model that knows Arabic.")
        if prompt.chat:
            before_answer, end_id, written = prompt._chat_frame()
            prompt = prompt._without(control | written)
        else:
            # The space belongs to the answer: byte-level BPE merges it with the first word. At the end of the prompt it
            # would be tokenized differently.
            before_answer, end_id = "" if prompt._begins_with_a_blank() else " ", tokenizer.eos_token_id
        if end_id is None:
            raise ModelError(f"{tokenizer.name_or_path} has no end-of-sequence token; add an eos_token.")
        prompt = replace(prompt, before_answer=before_answer, end_id=end_id)
        # Text models may lack rows for image tokens (Gemma 3's `<image_soft_token>`), which no text contains.
        used = {*prompt._probed([_PROBE])[0], end_id}
        beyond = [one for one, n in vocabulary.items() if n >= size and (n in used or not _MARKER.fullmatch(one))]
        if beyond:
            problem = f"has tokens beyond the {size:,} rows of the embedding, such as {beyond[0]!r}"
            raise ModelError(f"{tokenizer.name_or_path} {problem}; copy tokenizer and weights from one source.")
        return prompt

    def fingerprint(self) -> str:
        """`sha256:…` of fixed texts as prompt ids and as answer ids, of the end token, and of the vocabulary."""
        parts = [self._probed(_ROWS), self.answer_ids(_ROWS), self.end_id, sorted(self.tokenizer.get_vocab().items())]
        return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer's tokens without the end token, which may not be flagged as special."""
        return str(self.tokenizer.decode([one for one in ids if one != self.end_id], skip_special_tokens=True)).strip()

    def text(
        self, question: str, dialect: str | None = None, severity: str | None = None, earlier: Sequence[Any] = ()
    ) -> str:
        """The prompt up to the answer, as text. `earlier`: previous exchanges, as (question, answer).

        Raises ModelError if the prompt needs a severity and none is given, or earlier exchanges need a chat template.
        """
        question, line, prefixes = self._cleaned(question), "", self.dialect_prefixes or {}
        dialect = dialect or (dialect_of(question) if self.dialect_lexicon else None)
        prefix = prefixes.get(dialect or "", prefixes.get(self.dialect or "", ""))
        if self.severity != "none":
            if severity is None:
                raise ModelError("The prompt needs a severity, unknown here; train with prompt.severity=predicted.")
            line = SEVERITY_LINES[severity]
        if self.chat:
            messages = []
            for exchange in earlier:
                for role, text in zip(("user", "assistant"), exchange, strict=True):
                    messages.append({"role": role, "content": self._cleaned(text)})
            messages.append({"role": "user", "content": prefix + line + question})
            return self._render(messages, add_generation_prompt=True)
        if earlier:
            raise ModelError("The data has conversations of several turns; set prompt.chat=true, or split them.")
        system = f"{self.system}\n\n" if self.system else ""
        template, cue = self.template, self.answer_cue
        letters = [letter for letter in question if letter.isalpha()]
        if 2 * sum(letter.isascii() for letter in letters) > len(letters):
            template, cue = self.english_template or template, self.english_cue or cue
        template = template.replace("{answer_cue}", cue)
        shown = [f"{template.replace('{question}', one['question'])} {one['answer']}\n\n" for one in self.examples]
        return prefix + system + "".join(shown) + line + template.replace("{question}", question)

    def prompt_ids(
        self,
        questions: Sequence[str],
        dialects: Sequence[str | None] | None = None,
        severities: Sequence[str | None] | None = None,
        earlier: Sequence[Sequence[Sequence[str]]] | None = None,
    ) -> list[list[int]]:
        """Token ids of the prompts, special tokens included, no padding, not shortened."""
        unknown = [None] * len(questions)
        rows = zip(questions, dialects or unknown, severities or unknown, earlier or [()] * len(questions), strict=True)
        texts = [self.text(*row) for row in rows]
        ids = self.tokenizer(texts, add_special_tokens=not self.chat)["input_ids"]
        # Some tokenizers append EOS to every text; after a prompt it would end the answer before it begins.
        eos = self.tokenizer.eos_token_id
        return [row[:-1] if not self.chat and len(row) > 1 and row[-1] == eos else row for row in ids]

    def shortened(
        self, room: int, question: str, dialect: str | None, severity: str | None, earlier: Sequence[Sequence[str]]
    ) -> tuple[list[int], int] | None:
        """The longest prompt of at most `room` tokens, and the number of removed words; None if too little remains.

        Removes the earliest exchanges of a conversation first, then the last words of the question.
        """
        words = question.split()
        fewest = min(FEWEST_QUESTION_WORDS, len(words))
        shorter: list[tuple[str, Sequence[Sequence[str]]]] = [(question, earlier[n + 1 :]) for n in range(len(earlier))]
        shorter += [(" ".join(words[:kept]), ()) for kept in range(len(words) - 1, fewest - 1, -1)]

        def ids(number: int) -> list[int]:
            return self.prompt_ids([shorter[number][0]], [dialect], [severity], [shorter[number][1]])[0]

        first = bisect_left(range(len(shorter)), True, key=lambda number: len(ids(number)) <= room)
        if first == len(shorter):
            return None
        kept, rest = shorter[first]
        texts = [question, *(text for exchange in earlier[: len(earlier) - len(rest)] for text in exchange)]
        return ids(first), sum(len(text.split()) for text in texts) - len(kept.split())

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of the answers, each with the end token (`end_id`)."""
        texts = [self.before_answer + self._cleaned(answer) for answer in answers]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*row, self.end_id] for row in ids]

    def _cleaned(self, text: str) -> str:
        """Removes control tokens from a text: a post that contains `</s>` must not end the answer."""
        # Marks are removed first: removing one from the inside of a control token would restore the token.
        return self.control.sub(" ", strip_marks(text) if self.strip_marks else text).strip()

    def _without(self, control: Iterable[str]) -> Prompt:
        """A copy of the prompt format that removes these tokens from every text."""
        tokens = sorted(control, key=lambda token: (-len(token), token))
        prompt = replace(self, control=re.compile("|".join(map(re.escape, tokens)) or r"(?!)"), control_tokens=tokens)
        shown = [{key: prompt._cleaned(text) for key, text in one.items()} for one in prompt.examples or ()]
        return replace(prompt, examples=shown)

    def _probed(self, questions: Sequence[str]) -> list[list[int]]:
        """Prompt ids of each question alone and, if the template allows it, after an earlier exchange."""
        severity, ids = None if self.severity == "none" else SEVERITIES[0], list[list[int]]()
        for question in questions:
            for earlier in ((), [(question, _PROBE)]) if self.chat else ((),):
                with suppress(TemplateError):
                    ids += self.prompt_ids([question], None, [severity], [earlier])
        return ids

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        turns = [("user", "question"), ("assistant", "answer")]
        shown = [{"role": role, "content": one[key]} for one in self.examples for role, key in turns]
        system = [{"role": "system", "content": self.system}] if self.system else []
        # Qwen3's template reads enable_thinking, others ignore it: the answer starts at once.
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "enable_thinking": False}
        return str(self.tokenizer.apply_chat_template([*system, *shown, *messages], tokenize=False, **options))

    def _begins_with_a_blank(self) -> bool:
        """Whether the tokenizer itself adds a blank before every text, as most SentencePiece models do."""
        ids = self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        return bool(self.tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁"))

    def _chat_frame(self) -> tuple[str, int | None, set[str]]:
        """Reads from the chat template: the text before an answer, the end token, and other markers of turns."""
        name = f"The chat template of {self.tokenizer.name_or_path}"
        if not self.tokenizer.chat_template:
            raise ModelError(f"{self.tokenizer.name_or_path} has no chat template; set prompt.chat=false.")
        user = {"role": "user", "content": _LONG_QUESTION}
        try:
            prompt = self._render([user], add_generation_prompt=True)
            whole = self._render([user, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False)
        except TemplateError as error:
            remedy = "prompt.system=null" if self.system else "prompt.chat=false"
            raise ModelError(f"{name} refuses the conversation ({error}); set {remedy}.") from error
        parts = [("question", _LONG_QUESTION), ("answer", _PROBE), ("system message", self.system or "")]
        remedies = {"system message": "prompt.system=null", "examples": "prompt.examples=null"}
        for key, text in (*parts, *(("examples", text) for one in self.examples for text in one.values())):
            # Templates trim and merge blanks.
            if "".join(text.split()) not in "".join((whole if key == "answer" else prompt).split()):
                remedy = remedies.get(key, "prompt.chat=false")
                raise ModelError(f"{name} drops the {key} or a part of it; set {remedy}.")
        before, _, after = whole.rpartition(_PROBE)
        # Templates differ in the blanks between prompt and answer. If the two renderings differ in more than that,
        # nothing is added: at generation the model sees only the generation prompt.
        before_answer = before[len(prompt) :] if before.startswith(prompt) else ""
        if self._begins_with_a_blank():
            before_answer = before_answer.removeprefix(" ")
        # A template may end a turn with a token that is not flagged as special, or with plain text.
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        matches = sorted((*self.control.finditer(after), *_MARKER.finditer(after)), key=re.Match.start)
        ends = [match.group() for match in matches]
        written = {marker for marker in _MARKER.findall(whole) if marker in added} | set(ends[:1])
        for end in ends:
            ids = self.tokenizer(end, add_special_tokens=False)["input_ids"]
            if self.tokenizer.convert_ids_to_tokens(ids[-1:]) == [end]:
                return before_answer, self.tokenizer.convert_tokens_to_ids(end), written
        return before_answer, self.tokenizer.eos_token_id, written


def _with_fixed_date(tokenizer: PreTrainedTokenizerBase, day: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer whose chat template gets `day` as today's date; transformers has no setting for it."""
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not day or not template or "strftime_now" not in template:
        return tokenizer
    formats = re.findall(r"""strftime_now\(\s*(["'])(.*?)\1""", template)
    texts = {one: date.fromisoformat(day).strftime(one) for _, one in formats}
    # A macro overrides the global function in other programs as well.
    macro = f"{{%- macro strftime_now(format) -%}}{{{{- {json.dumps(texts)}[format] -}}}}{{%- endmacro %}}{{{{- '' }}}}"
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = macro + template
    return tokenizer


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> str:
    """Sets and returns `tokenizer.pad_token`: the tokenizer's own, a reserved token, or EOS.

    EOS is safe because labels and attention mask are written explicitly and never derived from the pad id. A token
    beyond `vocabulary_size`, the rows of the embedding, would crash on a GPU.
    """
    reserved = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|endoftext|>")
    # Looked up in the vocabulary itself: `convert_tokens_to_ids` returns the id of <unk> for an absent token.
    vocabulary = tokenizer.get_vocab()
    for token in (tokenizer.pad_token, *reserved, tokenizer.eos_token):
        if token is not None and vocabulary.get(token, vocabulary_size) < vocabulary_size:
            tokenizer.pad_token = token
            return token
    raise ModelError(f"The tokenizer of {tokenizer.name_or_path} has no pad or EOS token in the vocabulary; add one.")
