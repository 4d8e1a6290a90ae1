"""One prompt for training and generation: the same tokens up to the answer, one end token after it, for every kind
of tokenizer and chat template; and nothing that a patient typed acts as a control token."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sevpeft.data.read import load_consultations
from sevpeft.data.text import dialect_of
from sevpeft.errors import ModelError, RecipeError
from sevpeft.modeling.prompts import Prompt, choose_pad_token
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.training.data import encode_rows
from tests.models import CHAT_TEMPLATES, SENTENCES, build_tokenizer

QUESTIONS = [*SENTENCES[:3], "وش الحل؟ 39.5°C", "سطر أول\nسطر ثان"]
ROLES = ("user", "assistant")
ANSWERS = ["راجع طبيب القلب اليوم", "أعطه سوائل كثيرة", "اذهب إلى الطوارئ الآن ولا تنتظر", "لا", "أولاً.\nثانيًا."]

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def byte_level(template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def llama_3_like() -> PreTrainedTokenizerFast:
    """Control tokens in the vocabulary that have no role in the configuration, as Llama 3 has them."""
    backend = Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str())
    names = ("begin_of_text", "eot_id", "start_header_id", "end_header_id", "finetune_right_pad_id")
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATES["llama-3"],
    )


def sentencepiece(blank: str, template: str | None = None, *, appends_eos: bool = False) -> PreTrainedTokenizerFast:
    """As SentencePiece models arrive: the blank before a text comes from the normalizer (Llama 2, Mistral v0.2), from
    the pre-tokenizer (newer conversions) or, with Gemma, from nowhere."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if blank == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
    elif blank == "pre_tokenizer":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence(to_text)
    control = ["<unk>", "<s>", "</s>"] + (["<start_of_turn>", "<end_of_turn>"] if blank == "nowhere" else [])
    backend.train_from_iterator(
        [part for sentence in SENTENCES for part in (sentence, *sentence.split())],
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=[*control, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
        ),
    )
    # The byte pieces are ordinary ones.
    backend = Tokenizer.from_str(_with_special_only(backend, control))
    end = " </s>" if appends_eos else ""
    backend.post_processor = processors.TemplateProcessing(
        single=f"<s> $A{end}",
        special_tokens=[("<s>", backend.token_to_id("<s>")), ("</s>", backend.token_to_id("</s>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def _with_special_only(backend: Tokenizer, control: list[str]) -> str:
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in control]
    return json.dumps(state)


@dataclass
class Case:
    """A tokenizer, and whether its chat template is used."""

    make: Callable[[], PreTrainedTokenizerFast]
    chat: bool


CASES = {
    "plain byte-level": Case(byte_level, False),
    "plain llama-3": Case(llama_3_like, False),
    "plain llama-2": Case(lambda: sentencepiece("normalizer"), False),
    "plain metaspace": Case(lambda: sentencepiece("pre_tokenizer"), False),
    "plain gemma": Case(lambda: sentencepiece("nowhere"), False),
    **{f"chat {name}": Case(lambda text=text: byte_level(text), True) for name, text in CHAT_TEMPLATES.items()},
    "chat llama-3": Case(llama_3_like, True),
    "chat llama-2": Case(lambda: sentencepiece("normalizer", LLAMA_2), True),
    "chat metaspace": Case(lambda: sentencepiece("pre_tokenizer", LLAMA_2), True),
    "chat gemma": Case(lambda: sentencepiece("nowhere", CHAT_TEMPLATES["gemma"]), True),
}


def build(tokenizer: PreTrainedTokenizerFast, **settings: object) -> Prompt:
    return Prompt.build(tokenizer, **{**Recipe().prompt.model_dump(), **settings})


@pytest.fixture(scope="module")
def prompts() -> dict[str, Prompt]:
    """One of each case."""
    made = {}
    for name, chosen in CASES.items():
        tokenizer = chosen.make()
        choose_pad_token(tokenizer, len(tokenizer))
        made[name] = build(tokenizer, chat=chosen.chat)
    return made


def whole_text(prompt: Prompt, question: str, answer: str) -> str:
    """Question and answer as one text, written down by hand (plain) or by the tokenizer's own template (chat)."""
    if not prompt.chat:
        return f"السؤال: {question}\nالجواب: {answer}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return prompt.tokenizer.apply_chat_template(messages, tokenize=False)


def encoded(prompt: Prompt, questions: list[str], answers: list[str], folder: Path, **columns: list) -> list[dict]:
    rows = Dataset.from_dict({"question": questions, "answer": answers, **columns})
    folder.mkdir(exist_ok=True)
    return list(encode_rows(rows, prompt, None, strata=None, cache_file=folder / "rows.arrow")[0])


def test_training_and_generation_begin_with_the_same_tokens_and_the_end_is_labeled(
    prompts: dict[str, Prompt], tmp_path: Path
) -> None:
    for name, prompt in prompts.items():
        end = prompt.end_id
        control = prompt.control.findall(" ".join(prompt.tokenizer.get_vocab()))
        control_ids = set(prompt.tokenizer.convert_tokens_to_ids(control))
        assert end in control_ids, name
        for question, row in zip(QUESTIONS, encoded(prompt, QUESTIONS, ANSWERS, tmp_path / name), strict=True):
            expected = prompt.prompt_ids([question])[0]
            unlabeled = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
            assert unlabeled == expected == row["input_ids"][: len(expected)], name
            labeled = [label for label in row["labels"] if label != -100]
            assert labeled[-1] == end == row["input_ids"][-1], name
            assert not control_ids & set(labeled[:-1]) and labeled == row["input_ids"][-len(labeled) :], name


def test_the_tokens_are_the_text_and_no_blank_is_added_or_lost(prompts: dict[str, Prompt]) -> None:
    for name, prompt in prompts.items():
        bos = prompt.tokenizer.bos_token or ""
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
            ids = prompt.prompt_ids([question])[0] + prompt.answer_ids([answer])[0][:-1]
            text = whole_text(prompt, question, answer)
            # The first word after BOS gets a blank of its own, which these tokenizers put there on purpose.
            decoded = prompt.tokenizer.decode(ids).replace(f"{bos} ", bos) if bos else prompt.tokenizer.decode(ids)
            assert (("" if prompt.chat else bos) + text).startswith(decoded) and decoded.endswith(answer), name
            if "level" in name or "chat" in name:
                whole = prompt.tokenizer(text, add_special_tokens=False)["input_ids"]
                if not name.endswith("llama-2"):  # its pieces after "[/INST]" depend on what the text before was
                    assert whole[: len(ids)] == ids, name
                assert prompt.tokenizer.decode(whole).startswith(prompt.tokenizer.decode(ids)), name


def test_a_prompt_begins_with_one_bos_where_the_model_has_one_and_holds_no_end(prompts: dict[str, Prompt]) -> None:
    for name, prompt in prompts.items():
        bos = prompt.tokenizer.bos_token_id
        for ids in prompt.prompt_ids(QUESTIONS):
            assert ids.count(bos) == (bos is not None) and (bos is None or ids[0] == bos), name
            assert prompt.tokenizer.eos_token_id not in ids, name


def test_the_end_token_is_the_one_of_the_template() -> None:
    ends = {
        "chat llama-3": "<|eot_id|>",
        "chat gemma": "<end_of_turn>",
        "chat llama-2": "</s>",
        "chat qwen3": "<|im_end|>",
        "chat chatml": "<|im_end|>",
        "chat mistral": "<|endoftext|>",
        "plain llama-3": "<|endoftext|>",
        "plain gemma": "</s>",
    }
    for name, end in ends.items():
        prompt = build(CASES[name].make(), chat=CASES[name].chat)
        assert prompt.tokenizer.convert_ids_to_tokens(prompt.end_id) == end, name


def test_a_template_that_ends_a_turn_with_words_falls_back_to_the_end_of_text() -> None:
    for name in ("chat llama-3", "chat llama-2"):
        tokenizer = CASES[name].make()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
        prompt = build(tokenizer, chat=True)
        assert prompt.end_id == tokenizer.eos_token_id and prompt.text(QUESTIONS[0]).endswith("assistant:")


def test_the_blank_belongs_to_the_answer_of_a_byte_level_tokenizer() -> None:
    prompt = build(byte_level(), chat=False)
    assert prompt.text("ألم").endswith("الجواب:") and prompt.before_answer == " "
    assert prompt.tokenizer.decode(prompt.answer_ids(["راجع"])[0][:-1]) == " راجع"


def test_a_sentencepiece_answer_begins_with_one_blank() -> None:
    for blank in ("normalizer", "pre_tokenizer", "nowhere"):
        for template in (None, LLAMA_2):
            prompt = build(sentencepiece(blank, template), chat=template is not None)
            pieces = "".join(prompt.tokenizer.convert_ids_to_tokens(prompt.answer_ids(["راجع طبيب القلب"])[0]))
            assert pieces == "▁راجع▁طبيب▁القلب</s>", (blank, template)


def test_a_tokenizer_that_ends_every_text_itself_does_not_end_the_prompt(tmp_path: Path) -> None:
    tokenizer = sentencepiece("normalizer", appends_eos=True)
    assert tokenizer("ألم")["input_ids"][-1] == tokenizer.eos_token_id
    prompt = build(tokenizer)
    for row in encoded(prompt, QUESTIONS, ANSWERS, tmp_path):
        assert row["input_ids"].count(tokenizer.eos_token_id) == 1 and row["input_ids"][-1] == tokenizer.eos_token_id
        assert row["input_ids"][0] == tokenizer.bos_token_id
    plain = build(sentencepiece("normalizer"))
    assert prompt.prompt_ids(QUESTIONS) == plain.prompt_ids(QUESTIONS)


def test_qwen3_does_not_think() -> None:
    prompt = build(byte_level(CHAT_TEMPLATES["qwen3"]), chat=True)
    assert prompt.text("ألم").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and prompt.before_answer == ""


def test_control_tokens_that_a_patient_typed_are_words_at_most(prompts: dict[str, Prompt]) -> None:
    for name, prompt in prompts.items():
        typed = [token for token in prompt.tokenizer.get_vocab() if prompt.control.fullmatch(token)]
        assert len(typed) >= 3, name
        evil = "ألم " + "".join(typed) + " في " + " ".join(typed) + " الصدر"
        clean = prompt.prompt_ids(["ألم في الصدر"])[0]
        count = {index: clean.count(index) for index in prompt.tokenizer.convert_tokens_to_ids(typed)}
        ids = prompt.prompt_ids([evil])[0]
        assert {index: ids.count(index) for index in count} == count, name
        answer = prompt.answer_ids([evil])[0]
        assert [index for index in answer if index in count] == [prompt.end_id] == answer[-1:], name


def test_a_mark_inside_a_control_token_does_not_bring_it_back() -> None:
    prompt = build(byte_level(), strip_marks=True)
    assert "<|endoftext|>" not in prompt.text("ألم <|endـof\u200btext|> ألم")
    assert prompt.answer_ids(["لا <|end\u064eoftext|> نعم"])[0].count(prompt.end_id) == 1


def test_marks_are_stripped_from_question_and_answer_only_when_asked() -> None:
    marked, plain = "مُنذُ ٣ أيّـــام", "منذ 3 أيام"
    kept, stripped = build(byte_level()), build(byte_level(), strip_marks=True)
    assert marked in kept.text(marked) and plain in stripped.text(marked)
    assert stripped.prompt_ids([marked]) == kept.prompt_ids([plain])
    assert stripped.answer_ids([marked]) == kept.answer_ids([plain]) != kept.answer_ids([marked])


PREFIXES = {"msa": "[MSA] ", "egyptian": "[EGYPTIAN] "}


EARLIER = [("عندي صداع", "منذ متى؟"), ("منذ </s> يومين <|im_end|>", "هل عندك حرارة؟")]


def test_earlier_turns_are_rendered_by_the_chat_template(prompts: dict[str, Prompt]) -> None:
    wrong = []
    for name, prompt in prompts.items():
        if not prompt.chat:
            with pytest.raises(ModelError, match=r"prompt\.chat=true"):
                prompt.prompt_ids(["نعم"], earlier=[EARLIER])
            continue
        turns = [{"role": role, "content": text} for one in EARLIER for role, text in zip(ROLES, one, strict=True)]
        turns = [{**turn, "content": prompt.control.sub(" ", turn["content"]).strip()} for turn in turns]
        expected = prompt.tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": "نعم"}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        alone, after = prompt.prompt_ids(["نعم", "نعم"], earlier=[[], EARLIER])
        whole = prompt.tokenizer(expected, add_special_tokens=False)["input_ids"]
        # What a patient typed ends no turn, so that there are as many ends as turns.
        ends = after.count(prompt.end_id) - alone.count(prompt.end_id)
        wrong += [] if (after, alone) == (whole, prompt.prompt_ids(["نعم"])[0]) and ends <= len(turns) else [name]
    assert wrong == []


def test_a_question_in_english_gets_the_english_words_where_there_are_some(prompts: dict[str, Prompt]) -> None:
    tokenizer = prompts["plain byte-level"].tokenizer
    english = {"english_template": "Question: {question}\n{answer_cue}", "english_cue": "Answer:"}
    made, plain = build(tokenizer, **english), build(tokenizer)
    for question in ("Is aspirin 100 mg safe?", "هل aspirin 100 mg آمن مع أدوية الضغط؟", "123", "Qu'est-ce que c'est?"):
        latin = question[0] in "IQ"
        assert made.text(question) == (f"Question: {question}\nAnswer:" if latin else plain.text(question))
        assert plain.text(question) == f"السؤال: {question}\nالجواب:"
    with pytest.raises(ModelError, match=r"prompt\.chat"):
        build(prompts["chat chatml"].tokenizer, chat=True, english_cue="Answer:")


def test_the_prefix_of_a_row_is_that_of_its_dialect_or_the_default(tmp_path: Path) -> None:
    prompt = build(byte_level(), dialect_prefixes=PREFIXES, dialect="msa")
    assert prompt.text("ألم", "egyptian").startswith("[EGYPTIAN] السؤال: ألم")
    for dialect in (None, "", "msa", "moroccan"):
        assert prompt.text("ألم", dialect).startswith("[MSA] السؤال: ألم")
    rows = encoded(prompt, ["ألم"] * 3, ["لا"] * 3, tmp_path, dialect=["egyptian", None, "moroccan"])
    for row, dialect in zip(rows, ("egyptian", "msa", "msa"), strict=True):
        expected = prompt.prompt_ids(["ألم"], [dialect])[0]
        assert row["input_ids"][: len(expected)] == expected
    assert build(byte_level()).text("ألم", "egyptian").startswith("السؤال")


def test_prefixes_that_would_not_be_used_are_refused() -> None:
    for dialect in (None, "gulf"):
        with pytest.raises(ModelError, match=r"prompt\.dialect is .*one of msa, egyptian"):
            build(byte_level(), dialect_prefixes=PREFIXES, dialect=dialect)
    for key in ("dialect", "dialect_lexicon"):
        with pytest.raises(RecipeError, match=rf"prompt\.{key}.*dialect_prefixes"):
            recipe_from_values({"prompt": {key: "builtin"}})


def test_a_dialect_that_no_column_names_is_told_by_the_words_of_the_question() -> None:
    egyptian, unknown = "عايز اعرف ايه السبب", "ألم"
    settings = {"dialect_prefixes": PREFIXES, "dialect": "msa"}
    plain, by_words = build(byte_level(), **settings), build(byte_level(), **settings, dialect_lexicon="builtin")
    chat = build(byte_level(CHAT_TEMPLATES["chatml"]), chat=True, **settings, dialect_lexicon="builtin")
    for question, given, expected in ((egyptian, None, "EGYPTIAN"), (egyptian, "msa", "MSA"), (unknown, "", "MSA")):
        assert by_words.text(question, given) == f"[{expected}] السؤال: {question}\nالجواب:"
        assert f"[{expected}] {question}<|im_end|>" in chat.text(question, given)
    assert plain.text(egyptian).startswith("[MSA] ")
    named = {row["question"]: row["dialect"] for row in load_consultations("builtin:consultations").rows}
    found = [(dialect_of(question), dialect) for question, dialect in named.items()]
    correct = [one == dialect for one, dialect in found if one is not None]
    # As the README says.
    assert sum(correct) / len(correct) > 0.95 and len(correct) / len(found) > 0.65


def test_a_system_message_stands_where_the_format_has_it() -> None:
    system = "أنت طبيب"
    assert build(byte_level(), system=system).text("ألم").startswith("أنت طبيب\n\nالسؤال: ألم")
    chatml = build(byte_level(CHAT_TEMPLATES["chatml"]), chat=True, system=system).text("ألم")
    assert chatml.startswith("<|im_start|>system\nأنت طبيب<|im_end|>\n<|im_start|>user\nألم<|im_end|>")
    assert "<<SYS>>\nأنت طبيب\n" in build(sentencepiece("normalizer", LLAMA_2), chat=True, system=system).text("ألم")


def test_a_template_that_takes_no_system_message_says_so() -> None:
    for name in ("gemma", "mistral"):
        with pytest.raises(ModelError, match=r"refuses the conversation .*; set prompt\.system=null\."):
            build(sentencepiece("nowhere", CHAT_TEMPLATES[name]), chat=True, system="أنت طبيب")


def test_a_template_that_loses_text_in_silence_is_refused() -> None:
    whole = "message['content']"

    def chatml(of_user: str, of_assistant: str = whole, of_system: str = whole) -> str:
        other = f"{of_system} if message.role == 'system' else {of_assistant}"
        content = f"{of_user} if message.role == 'user' else {other}"
        return CHAT_TEMPLATES["chatml"].replace("{{ message['content'] }}", f"{{{{ {content} }}}}")

    of_parts = (  # as processors of pictures want it; of a string this loop sees the letters
        "{% for message in messages %}<|im_start|>{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    )
    losing = {
        "no question": (chatml("''"), "question"),
        "typed content": (of_parts, "question"),
        "300 letters": (chatml("message['content'][:300]"), "question"),
        "first line": (chatml("message['content'].split('\n')[0]"), "question"),
        "all but the first word": (chatml("message['content'].split()[1:] | join(' ')"), "question"),
        "only the answer": ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", "question"),
        "no answer": (chatml(whole, "''"), "answer"),
        "no system": (chatml(whole, of_system="''"), "system message"),
        "half of system": (chatml(whole, of_system="message['content'][:5]"), "system message"),
    }
    for name, (template, lost) in losing.items():
        with pytest.raises(ModelError, match=f"{lost}.* set prompt") as refused:
            build(byte_level(template), chat=True, system="أنت طبيب" if lost == "system message" else None)
        assert ("prompt.system=null" in str(refused.value)) == (lost == "system message"), name
    for harmless in ("message['content'] | trim", "message['content'] | upper", "message['content'] | indent(2)"):
        build(byte_level(chatml(harmless)), chat=True, system=" أنت\nطبيب ")


def test_a_tokenizer_that_knows_no_arabic_is_refused() -> None:
    """It makes <unk> of every question: of words, of letters, or nothing where its normalizer takes them out."""
    latin = {letter: number for number, letter in enumerate(["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz: "])}
    words = Tokenizer(models.WordLevel(latin, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = Tokenizer(models.BPE(latin, [], unk_token="<unk>"))
    fused = Tokenizer(models.BPE(latin, [], unk_token="<unk>", fuse_unk=True))
    emptied = Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str())
    emptied.normalizer = normalizers.Replace(Regex("[\u0600-\u06ff]"), "")
    for name, backend in {"words": words, "letters": letters, "fused": fused, "emptied": emptied}.items():
        eos = "<|endoftext|>" if name == "emptied" else "</s>"
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>")
        with pytest.raises(ModelError, match="Arabic"):
            build(tokenizer)


def test_a_tokenizer_without_a_template_or_an_end_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no chat template; set prompt\.chat=false"):
        build(byte_level(), chat=True)
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        build(tokenizer)
    with pytest.raises(ModelError, match="EOS"):
        choose_pad_token(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())), 100)


def test_placeholders_that_a_patient_typed_stay_as_they_are() -> None:
    assert "{answer_cue} {question}" in build(byte_level()).text("{answer_cue} {question}")


# Severity and examples

EXAMPLES = [{"question": "عندي زكام<|im_end|></s>", "answer": "اشرب السوائل"}, {"question": "حكة", "answer": "مرطب"}]


def test_the_severity_stands_before_the_question_in_training_and_generation(
    prompts: dict[str, Prompt], tmp_path: Path
) -> None:
    for name, plain in prompts.items():
        prompt = build(plain.tokenizer, chat=plain.chat, severity="predicted")
        line = "درجة الخطورة: حرجة\n"
        severe = ["critical"] * len(QUESTIONS)
        rows = encoded(prompt, QUESTIONS, ANSWERS, tmp_path / name, prompt_severity=severe)
        starts, ends = prompt.prompt_ids(QUESTIONS, severities=severe), prompt.answer_ids(ANSWERS)
        for question, row, start, end in zip(QUESTIONS, rows, starts, ends, strict=True):
            whole = plain.text(f"{line}{question}" if plain.chat else question)
            assert prompt.text(question, severity="critical") == (whole if plain.chat else line + whole), name
            assert row["input_ids"] == start + end and row["labels"].count(-100) == len(start), name
        with pytest.raises(ModelError, match=r"prompt\.severity=predicted"):
            prompt.prompt_ids(QUESTIONS)


def test_examples_are_whole_exchanges_before_the_question_without_control_tokens(prompts: dict[str, Prompt]) -> None:
    for name, plain in prompts.items():
        prompt = build(
            plain.tokenizer, chat=plain.chat, examples=EXAMPLES, system="أنت طبيب" if not plain.chat else None
        )
        cleaned = [plain._cleaned(one["question"]) for one in EXAMPLES]
        if plain.chat:
            turns = [("user", cleaned[0]), ("assistant", "اشرب السوائل"), ("user", cleaned[1]), ("assistant", "مرطب")]
            expected = plain.tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in (*turns, ("user", QUESTIONS[0]))],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        else:
            one, other = (f"السؤال: {question}\nالجواب: " for question in cleaned)
            expected = f"أنت طبيب\n\n{one}اشرب السوائل\n\n{other}مرطب\n\nالسؤال: {QUESTIONS[0]}\nالجواب:"
        assert prompt.text(QUESTIONS[0]) == expected, name
        assert (prompt.before_answer, prompt.end_id) == (plain.before_answer, plain.end_id), name


def test_a_template_that_forgets_earlier_turns_takes_no_examples() -> None:
    last = CHAT_TEMPLATES["chatml"].replace("in messages %}", "in messages[-2:] %}", 1)
    with pytest.raises(ModelError, match=r"examples.*prompt\.examples=null"):
        build(byte_level(last), chat=True, examples=EXAMPLES)


# The pad token


def without_pad(*added: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def test_a_model_keeps_its_own_pad_token() -> None:
    tokenizer = build_tokenizer()
    assert choose_pad_token(tokenizer, len(tokenizer)) == "<|pad|>" == tokenizer.pad_token
    tokenizer.pad_token = "<|im_start|>"  # of a name that we do not know; <|pad|> stands ready
    assert choose_pad_token(tokenizer, len(tokenizer)) == "<|im_start|>" == tokenizer.pad_token


def test_a_reserved_pad_token_comes_before_the_end_of_text() -> None:
    for reserved in ("<|finetune_right_pad_id|>", "<pad>", "[PAD]"):
        tokenizer = without_pad(reserved)
        assert choose_pad_token(tokenizer, len(tokenizer)) == reserved == tokenizer.pad_token
    tokenizer = without_pad("<|padding|>")
    assert choose_pad_token(tokenizer, len(tokenizer)) == "<|pad|>"  # the tokenizer's, first in the list


def test_a_pad_token_beyond_the_embedding_is_passed_over() -> None:
    tokenizer = without_pad("<pad>")
    tokenizer.pad_token = "<pad>"
    rows = tokenizer.pad_token_id
    chosen = choose_pad_token(tokenizer, rows)
    assert chosen != "<pad>" and tokenizer.pad_token_id < rows


def test_without_a_pad_token_the_end_of_text_pads_and_no_token_is_added(tmp_path: Path) -> None:
    # With an unknown token, every name has an id: that of <unk>.
    tokenizer = sentencepiece("normalizer")
    size = len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>") == tokenizer.unk_token_id
    assert choose_pad_token(tokenizer, size) == "</s>" and tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    assert len(tokenizer) == size == len(AutoTokenizer.from_pretrained(tmp_path))


def with_tokens(*tokens: str, special: bool, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(template)
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens], special_tokens=special)
    return tokenizer


def test_ids_beyond_the_embedding_are_refused_where_any_text_can_reach_them() -> None:
    size, ends_otherwise = len(byte_level()), CHAT_TEMPLATES["chatml"].replace("im_end", "stop")
    picture, word, stop = "<image_soft_token>", "دوخة", "<|stop|>"
    cases: dict[str, tuple[PreTrainedTokenizerFast, int, bool, bool]] = {
        "as many": (byte_level(), size, False, True),
        "padded": (byte_level(), size + 128, False, True),
        "vocabulary": (byte_level(), size - 1, False, False),
        "word": (with_tokens(word, special=False), size, False, False),
        "picture, as Gemma 3": (with_tokens(picture, special=True), size, False, True),
        "picture, not flagged": (with_tokens(picture, special=False), size, False, True),
        "template": (with_tokens(stop, special=True, template=ends_otherwise), size, True, False),
        "template, not used": (with_tokens(stop, special=True, template=ends_otherwise), size, False, True),
    }
    wrong = []
    for name, (tokenizer, rows, chat, fits) in cases.items():
        try:
            prompt = build(tokenizer, vocabulary_size=rows, chat=chat)
            ids = prompt.prompt_ids([f"ألم {picture} {stop} شديد"])[0] + prompt.answer_ids([picture])[0]
            wrong += [] if fits and max(ids) < rows else [(name, max(ids))]
        except ModelError as error:
            wrong += [(name, str(error))] if fits or f"{rows:,} rows" not in str(error) else []
    assert wrong == []


def test_an_end_of_turn_that_nothing_flags_as_special_ends_the_answer_and_no_patient_types_it() -> None:
    """An ordinary added token, a piece of the vocabulary, or mere text: then the end of text follows, as before."""
    renamed = CHAT_TEMPLATES["chatml"].replace("im_", "turn_")
    state = json.loads(build_tokenizer().backend_tokenizer.to_str())
    for first, second in (("<", "|"), ("<|", ">")):
        state["model"]["merges"].insert(0, [first, second])
        state["model"]["vocab"][first + second] = len(state["model"]["vocab"])
    as_piece = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATES["chatml"].replace("<|im_end|>", "<|>"),
    )
    cases = {
        "added": (with_tokens("<|turn_start|>", "<|turn_end|>", special=False, template=renamed), "<|turn_end|>", True),
        "vocabulary": (as_piece, "<|>", True),
        "text": (byte_level(renamed), "<|turn_end|>", False),
    }
    for name, (tokenizer, end, is_token) in cases.items():
        prompt = build(tokenizer, chat=True)
        last = tokenizer.convert_ids_to_tokens(prompt.end_id)
        assert last == (end if is_token else "<|endoftext|>"), name
        typed = f"ألم {end} في الصدر"
        assert prompt.prompt_ids([typed]) == prompt.prompt_ids(["ألم   في الصدر"]), name
        begins = prompt.prompt_ids(["ألم <|turn_start|> في الصدر"]) == prompt.prompt_ids(["ألم   في الصدر"])
        assert begins == (name == "added"), name
        answer = prompt.answer_ids([typed])[0]
        assert answer.count(prompt.end_id) == 1 and answer[-1] == prompt.end_id, name
        assert prompt.decode(answer) == "ألم   في الصدر", name
        shown = build(tokenizer, chat=True, examples=[{"question": typed, "answer": end + "لا"}])
        assert shown.examples == [{"question": "ألم   في الصدر", "answer": "لا"}], name


DATED = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'x' }} " + CHAT_TEMPLATES["chatml"]


def test_a_template_that_writes_todays_date_is_given_the_same_day_always() -> None:
    tokenizer = byte_level(DATED)
    prompt = build(tokenizer, chat=True)
    assert prompt.text("ألم").startswith("26 Jul 2024 <|im_start|>user") and tokenizer.chat_template == DATED
    assert build(tokenizer, chat=True, date="2026-02-03").text("ألم").startswith("03 Feb 2026 <|im_start|>")
    undated = byte_level(CHAT_TEMPLATES["chatml"])
    assert build(undated, chat=True).tokenizer is undated
    for day in ("today", "2026-02-31", "2026-13-01"):
        with pytest.raises(RecipeError, match=r"prompt\.date"):
            recipe_from_values({"prompt": {"date": day}})


def test_a_fingerprint_is_of_tokens_text_and_end_and_of_nothing_else() -> None:
    def printed(change: Callable[[dict], object] = lambda state: None, template: str | None = None, **how: Any) -> str:
        state = json.loads(build_tokenizer().backend_tokenizer.to_str())
        change(state)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=how.pop("eos", "<|endoftext|>")
        )
        tokenizer.chat_template = template or CHAT_TEMPLATES["chatml"]
        return build(tokenizer, **how).fingerprint()

    def swap(state: dict) -> None:
        vocabulary, (one, other) = state["model"]["vocab"], "øù"  # bytes that no text has
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    chatml = CHAT_TEMPLATES["chatml"]
    plain = printed()
    different = {
        "merge": printed(lambda state: state["model"]["merges"].pop(0)),
        "ids": printed(swap),
        "normalizer": printed(lambda state: state.update(normalizer={"type": "Lowercase"})),
        "end": printed(eos="<|pad|>"),
        "cue": printed(answer_cue="الرد:"),
        "chat": printed(chat=True),
        "chat with words": printed(chat=True, template="كن موجزا. " + chatml),
        "chat of several turns": printed(
            chat=True,
            template=chatml.replace("<|im_end|>\n{% endfor", "<|im_end|>\n{{ '' if loop.last else ' ' }}{% endfor"),
        ),
        "system": printed(chat=True, system="أنت طبيب"),
        "date": printed(chat=True, template=DATED),
        "another date": printed(chat=True, template=DATED, date="2026-02-03"),
    }
    prints = [plain, *different.values()]
    assert [name for name, of in different.items() if prints.count(of) > 1] == []
    equal = [printed(template=DATED), printed(lambda state: state.update(truncation=None))]
    assert {plain} == {*equal} and printed(chat=True) == printed(chat=True, template=chatml + "{# a remark #}")
