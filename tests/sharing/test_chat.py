"""An adapter answers with the prompt that it was trained with, and a card says what it is."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from sevpeft.errors import ModelError, RunError, UsageError
from sevpeft.modeling import adapters
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.card import write_card
from sevpeft.sharing.chat import EMERGENCY, Chat
from sevpeft.training.train import train
from tests.models import CHAT_TEMPLATES

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"


@pytest.fixture
def run(tmp_path: Path, model_folder: Callable[..., Path]) -> Run:
    settings = [f"model.name_or_path={model_folder('llama')}", "data.max_rows=60", "training.max_steps=2"]
    return train(load_recipe(QUICKSTART, settings), tmp_path / "run")


def greedy(chat: Chat, ids: list[int], most: int) -> str:
    """What the model says token by token, without a cache and without `generate`."""
    tokens: list[int] = []
    while len(tokens) < most and tokens[-1:] != [chat.prompt.end_id]:
        with torch.no_grad():
            tokens.append(int(chat.model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].argmax()))
    return str(chat.prompt.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def test_an_answer_is_the_greedy_continuation_of_the_training_prompt(made_run: Callable[..., Run]) -> None:
    chat, question = Chat(made_run(size=0.5), ["generation.max_new_tokens=12"]), "عندي صداع"
    ids = chat.prompt.prompt_ids([question])[0]
    expected = greedy(chat, ids, 12)
    with chat.model.disable_adapter():
        base = greedy(chat, ids, 12)
    *parts, whole = chat.stream(question)
    assert whole == expected != base
    assert len(parts) > 2 and all(map(str.startswith, parts[1:], parts))
    assert [*chat.stream(question, adapter=False)][-1] == base
    assert [*chat.stream(question)][-1] == expected, "the adapter is on again"


def test_earlier_exchanges_precede_a_question_as_the_training_has_them(
    made_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, question = [("عندي سعال", "اشرب ماء"), ("وماذا بعد؟", "راجع الطبيب")], "عندي صداع"
    for name, template in (("plain", None), ("chatml", CHAT_TEMPLATES["chatml"])):
        run = made_run(name=name, chat_template=template, prompt={"chat": bool(template)})
        chat, seen = Chat(run, ["generation.max_new_tokens=4"]), []
        monkeypatch.setattr(chat.model, "generate", lambda seen=seen, **of: seen.append(of["input_ids"]) or seen[-1])
        [*chat.stream(question, before)]
        if template:
            expected = chat.prompt.prompt_ids([question], earlier=[before])[0]
        else:
            expected = []
            for earlier_question, answer in before:
                expected += chat.prompt.prompt_ids([earlier_question])[0] + chat.prompt.answer_ids([answer])[0]
            expected += chat.prompt.prompt_ids([question])[0]
        assert seen[0][0].tolist() == expected, name
        # 256 positions: the first exchanges give way, an answer of its own never does.
        long = [("سؤال طويل " * 12, "جواب طويل " * 12)] * 2
        kept = chat.fitting(question, [*long, *before])
        assert 0 < len(kept) < 4 and kept[-1] == before[-1], name
        long_one, bytes_ = "س " * 10_000, "عندي \udcff صداع"
        for wrong, remedy in ((long_one, "10,000 words"), ("  ", "empty"), ("؟!", "empty"), (bytes_, "UTF-8")):
            with pytest.raises(UsageError, match=remedy):
                [*chat.stream(wrong)]


def test_an_answer_longer_than_the_context_names_its_setting(made_run: Callable[..., Run]) -> None:
    with pytest.raises(UsageError, match=r"lower generation\.max_new_tokens"):
        Chat(made_run(), ["generation.max_new_tokens=100000"]).fitting("عندي صداع")


def test_a_closed_answer_stops_the_model_and_the_next_one_begins(made_run: Callable[..., Run]) -> None:
    chat, tokens = Chat(made_run(), ["generation.max_new_tokens=200"]), []
    chat.prompt = replace(chat.prompt, end_id=chat.prompt.tokenizer.convert_tokens_to_ids("<|im_start|>"))
    handle = chat.model.get_output_embeddings().register_forward_hook(lambda *_: tokens.append(1))
    for _ in chat.stream("عندي صداع"):
        break
    chat._one_at_a_time.submit(int).result(timeout=10)  # its turn comes after the answer
    assert 0 < len(tokens) < 100
    tokens.clear()
    for _ in chat.stream("عندي صداع"):
        chat.ended.set()
    assert 0 < len(tokens) < 100 and [*chat.stream("عندي صداع")] == [], "the program ends"
    chat.ended.clear()
    handle.remove()
    error = torch.OutOfMemoryError("full")
    chat.model.generate = lambda **_: (_ for _ in ()).throw(error)
    with pytest.raises(RunError, match="memory"):
        [*chat.stream("عندي صداع")]


def test_a_red_flag_brings_the_notice_whatever_the_classifier_thinks(made_run: Callable[..., Run]) -> None:
    chat = Chat(made_run())
    rows = (
        ("الم شديد في الصدر وضيق تنفس", True, "critical", "ضيق تنفس"),
        ("بفكر انهي حياتي", True, "critical", None),
        ("ما عندي ضيق تنفس بس كحة خفيفة", False, "negated", "ضيق تنفس"),
        ("عندي زكام خفيف", False, "non_critical", None),
    )
    never = np.array([[0.98, 0.01, 0.01]])
    for source in (chat.source, SimpleNamespace(probabilities=lambda questions: never)):
        chat.source = source
        for question, urgent, kind, words in rows:
            found = chat.severity(question)
            assert found.notice.startswith(EMERGENCY) == urgent, question
            assert kind in found.words and (words is None or words in " ".join(found.words[kind])), found.words
    assert "تبق وحدك" in chat.severity(rows[1][0]).notice
    assert found.name == "non_critical" and found.probabilities["critical"] == 0.01


def test_an_adapter_alone_answers_as_its_run_does_by_the_template_in_its_tokenizer(
    made_run: Callable[..., Run],
    sevpeft_: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = made_run(chat_template=CHAT_TEMPLATES["chatml"], prompt={"chat": True}, size=0.5)
    alone, settings = tmp_path / "alone", ["generation.max_new_tokens=8"]
    shutil.copytree(run.adapter, alone)
    shutil.copyfile(run.folder / "recipe.yaml", alone / "recipe.yaml")  # as it is pushed
    with pytest.raises(ModelError, match="tokenizer"):
        Chat(alone)
    tokenizer = Chat(run).prompt.tokenizer
    tokenizer.save_pretrained(alone)
    calls: list[Any] = []
    monkeypatch.setattr(adapters, "look_for_hub", lambda: None)
    monkeypatch.setattr(adapters, "snapshot_download", lambda *of, **how: calls.append((*of, how)) or str(alone))
    expected = [*Chat(run, settings).stream("عندي صداع")][-1]
    for source in (alone, "someone/adapter"):
        assert [*Chat(source, settings).stream("عندي صداع")][-1] == expected
    (name, how), *more = calls
    assert (name, more) == ("someone/adapter", []) and not any(
        "bin" in one or "py" in one for one in how["allow_patterns"]
    )
    # A template that knows single questions, as of a plain prompt: the exchanges stand before, one after the other.
    many = Chat(alone)
    single = "{% if messages | length > 2 %}{{ raise_exception('one') }}{% endif %}" + CHAT_TEMPLATES["chatml"]
    many.prompt.tokenizer.chat_template = single
    ids_before, now = (many.prompt.prompt_ids([one])[0] for one in ("عندي سعال", "عندي صداع"))
    expected_ids = [*ids_before, *many.prompt.answer_ids(["اشرب ماء"])[0], *now]
    assert many._prompt_ids("عندي صداع", [("عندي سعال", "اشرب ماء")]) == expected_ids
    tokenizer.chat_template = None
    shutil.rmtree(alone)
    shutil.copytree(run.adapter, alone)
    tokenizer.save_pretrained(alone)
    with pytest.raises(ModelError, match="chat template"):
        Chat(alone)
    for words, status, part in ((["training.max_steps=3"], 2, "generation"), ([], 1, "runs/NAME-DATE")):
        code, _, err = sevpeft_("chat", run.folder if words else "nowhere", *words)
        assert (code, err.count("\n")) == (status, 1) and part in err


def test_a_classifier_is_asked_about_questions_alone_and_may_be_gone_where_no_prompt_needs_it(
    made_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("sevpeft.sharing.chat.load_source", lambda *of, **how: calls.append((*of, how)) or "it")
    severity = {"source": "linear", "classifier": str(tmp_path / "classifier")}
    run = made_run(severity=severity)
    Chat(run)
    (tmp_path / "classifier").mkdir()
    Chat(run)
    assert calls == [(None, None, {"text": "question"}), (None, severity["classifier"], {"text": "question"})]


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation_on_a_terminal(
    made_run: Callable[..., Run], sevpeft_: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def stream(self: Chat, question: str, earlier: Any = (), *, adapter: bool = True) -> Iterator[str]:
        calls.append((question, [*earlier], adapter))
        yield "ج"
        if question == "توقف":
            raise KeyboardInterrupt
        yield f"جواب {question}"

    monkeypatch.setattr(Chat, "stream", stream)
    run = made_run()
    typed = ["عندي صداع", "", "/base", "/base y", "/severity", "/severity ضيق تنفس شديد"]
    typed += ["توقف", "ومتى؟", "/what", "/reset", "x"]
    monkeypatch.setattr("sys.stdin", Keyboard("\n".join(typed)))
    code, out, err = sevpeft_("chat", run.folder)
    first = ("عندي صداع", "جواب عندي صداع")
    assert code == 0 and "جواب ومتى؟" in out
    assert calls == [
        (first[0], [], True),
        (first[0], [], False),
        ("y", [first], False),
        ("توقف", [first], True),
        ("ومتى؟", [first], True),
        ("x", [], True),
    ]
    assert "empty" in err and "Stopped" in err and err.count("/reset") == 2 and "critical: ضيق تنفس" in out
    assert max(map(len, err.splitlines())) <= 80
    # From a pipe every line stands alone, a slash is a letter, and an empty line ends nothing.
    calls.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n\n/base\nضيق تنفس شديد\n"))
    code, out, err = sevpeft_("chat", run.folder)
    assert code == 0 and out == "جواب a\n\nجواب /base\n\nجواب ضيق تنفس شديد\n\n"
    assert [earlier for _, earlier, _ in calls] == [[], [], []] and EMERGENCY in err
    # The others are answered, and the exit code tells a script that one was not.
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n…\nb\n"))
    code, out, err = sevpeft_("chat", run.folder)
    assert (code, out) == (1, "جواب a\n\nجواب b\n\n") and "empty" in err
    code, out, err = sevpeft_("chat", run.folder, "--question", "ضيق تنفس شديد")
    assert (code, out) == (0, "جواب ضيق تنفس شديد\n") and EMERGENCY in err
    assert sevpeft_("chat", run.folder, "--question", " ")[:2] == (2, "")


def test_the_severity_is_predicted_when_the_question_comes_and_an_oracle_cannot_be_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def card_of(severity: str, *more: str) -> str:
        settings = [f"prompt.severity={severity}", *more]
        run.write_text("recipe.yaml", load_recipe(run.folder / "recipe.yaml", settings).to_yaml())
        run.update_metrics(model={**run.metrics()["model"], "prompt": None})  # as if it was trained so
        return write_card(run).read_text(encoding="utf-8")

    assert "as published" in card_of("none", "as_published.labels=all") and "oracle" not in card_of("none")
    card = card_of("predicted", "as_published.labels=answer")
    assert "as published" not in card
    assert card.count("{severity}") == 2 and "`درجة الخطورة: حرجة`" in card and "oracle" not in card
    chat, seen = Chat(run), []
    monkeypatch.setattr(chat.model, "generate", lambda **of: seen.append(of["input_ids"][0]) or of["input_ids"])
    for question in ("عندي ألم شديد في الصدر مع ضيق تنفس وفقدت الوعي", "عندي زكام خفيف"):
        [*chat.stream(question)]
    severe, mild = (chat.prompt.tokenizer.decode(ids).split("\n")[0] for ids in seen)
    assert severe == "درجة الخطورة: حرجة" != mild and mild.startswith("درجة الخطورة: ")
    assert "oracle" in card_of("gold")
    with pytest.raises(ModelError, match=r"prompt\.severity=predicted"):
        [*Chat(run).stream("عندي زكام")]


def test_the_card_is_read_by_the_hub_and_holds_the_measured_figures(run: Run) -> None:
    card = ModelCard.load(write_card(run))
    assert card.data.library_name == "peft" and card.data.language == "ar"
    assert "Not a medical device" in card.text and "control run" not in card.text
    metrics = run.metrics()
    losses = " | ".join(f"{metrics[when]['loss_critical']:.4f}" for when in ("before", "after"))
    assert f"| critical | {losses} |" in card.text and metrics["data"]["fingerprint"] in card.text
    assert "normalize: none, reduction: tokens" in card.text and str(run.folder.parent) not in card.text
    recipe = run.folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("control: none", "control: shuffled"), encoding="utf-8")
    assert "control run" in write_card(run).read_text(encoding="utf-8")
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="no adapter"):
        Chat(run)
