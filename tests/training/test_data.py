"""A row is prompt and answer; only the answer is labeled and weighted; only the question is shortened."""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from sevpeft.data.prepare import PrepareSettings
from sevpeft.data.prepare.prepare import prepare as prepare_data
from sevpeft.errors import DataError, WeightError
from sevpeft.evaluation.evaluate import test_rows
from sevpeft.evaluation.generate import fitting_prompts
from sevpeft.modeling.prompts import FEWEST_QUESTION_WORDS, Prompt
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
from sevpeft.severity.classifier.linear import fit_linear
from sevpeft.severity.classifier.store import write_classifier
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.rules import Rules
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import (
    SeverityCollator,
    add_token_weights,
    encode_rows,
    load_splits,
    pack_rows,
    prepare,
    rows_of,
    summary_of,
)
from sevpeft.training.trainer import SplitOnOom
from tests.models import CHAT_TEMPLATES, SENTENCES
from tests.severity.classifier.conftest import consultations

ANSWERS = ["راجع طبيب القلب اليوم", "لا", "أعطه سوائل كثيرة واعرضه على طبيب الأطفال إن استمرت الحرارة"]
WORDS = " ".join(SENTENCES).split()
ROLES = ("user", "assistant")
LAST = "سؤال أخير طويل من سبع كلمات هنا"
test_rows.__test__ = False  # type: ignore[attr-defined]  # a function of the package, not a test


@pytest.fixture
def prompt(tokenizer: PreTrainedTokenizerFast) -> Prompt:
    return Prompt.build(tokenizer, **Recipe().prompt.model_dump())


@pytest.fixture
def encode(prompt: Prompt, tmp_path: Path) -> Callable[..., tuple[Dataset, dict[str, int]]]:
    def run(rows: Dataset, max_length: int | None, **options: Any) -> tuple[Dataset, dict[str, int]]:
        settings = {"strata": None, "cache_file": tmp_path / "encoded.arrow", **options}
        return encode_rows(rows, prompt, max_length, **settings)

    return run


def table(questions: list[str], answers: list[str], **columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"question": questions, "answer": answers, **columns})


def many_rows(count: int = 30) -> Dataset:
    """Questions of 1 to 24 words with the three answers in turn."""
    questions = [" ".join(WORDS[i : i + 1 + i % 24]) for i in range(count)]
    return table(questions, [ANSWERS[i % 3] for i in range(count)])


def test_a_row_is_the_prompt_ignored_and_the_answer_labeled(encode: Callable, prompt: Prompt) -> None:
    rows = many_rows()
    encoded, report = encode(rows, None)
    assert encoded.column_names == ["input_ids", "labels", "severity", "source_index", "lost_words", "turn_weight"]
    for row, source in zip(encoded, rows, strict=True):
        asked, answer = prompt.prompt_ids([source["question"]])[0], prompt.answer_ids([source["answer"]])[0]
        assert row["input_ids"] == asked + answer
        assert row["labels"] == [IGNORED] * len(asked) + answer
        assert row["severity"] == -1
    lengths = [len(ids) for ids in encoded["input_ids"]]
    assert report == {
        "rows": 30,
        "refused": 0,
        "shortened": 0,
        "unknown_token_share": 0.0,
        "lost_words": 0,
        "most_lost_words": 0,
        "median_length": int(np.median(lengths)),
        "longest": max(lengths),
        "answer_tokens": sum(label != IGNORED for labels in encoded["labels"] for label in labels),
    }


@pytest.mark.parametrize("max_length", [18, 24, 30, 40])
def test_a_long_row_costs_the_end_of_its_question_word_by_word_and_nothing_more(
    encode: Callable, prompt: Prompt, max_length: int
) -> None:
    rows = many_rows()
    encoded, report = encode(rows, max_length)
    lost = {}
    for row in encoded:
        source = rows[row["source_index"]]
        answer = prompt.answer_ids([source["answer"]])[0]
        assert len(row["input_ids"]) <= max_length
        assert [label for label in row["labels"] if label != IGNORED] == answer == row["input_ids"][-len(answer) :]
        words, asked = source["question"].split(), row["input_ids"][: -len(answer)]
        prompts = prompt.prompt_ids([" ".join(words[:kept]) for kept in range(len(words) + 1)])
        kept = prompts.index(asked)
        lost[row["source_index"]] = len(words) - kept
        assert kept == len(words) or len(prompts[kept + 1]) + len(answer) > max_length
        assert kept >= min(len(words), FEWEST_QUESTION_WORDS)
    refused = set(range(len(rows))) - set(lost)
    for index in refused:
        source = rows[index]
        fewest = " ".join(source["question"].split()[:FEWEST_QUESTION_WORDS])
        assert len(prompt.prompt_ids([fewest])[0] + prompt.answer_ids([source["answer"]])[0]) > max_length
    assert (report["rows"], report["refused"]) == (len(lost), len(refused))
    assert report["lost_words"] == sum(lost.values()) > 0
    assert report["most_lost_words"] == max(lost.values())
    assert report["shortened"] == sum(words > 0 for words in lost.values())


def test_an_answer_that_leaves_no_room_is_refused_and_never_cut(encode: Callable, prompt: Prompt) -> None:
    long = " ".join(ANSWERS * 10)
    rows = table([SENTENCES[0]] * 3, [ANSWERS[0], long, ANSWERS[1]], severity=["a", "b", "c"])
    encoded, report = encode(rows, 80, strata=np.array([2, 1, 0]))
    assert (report["rows"], report["refused"]) == (2, 1)
    assert encoded["source_index"][:] == [0, 2] and encoded["severity"][:] == [2, 0]


def test_a_short_question_is_kept_whole_or_the_row_is_refused(encode: Callable, prompt: Prompt) -> None:
    question, answer = "وش الحل يا دكتور", ANSWERS[2]
    exact = len(prompt.prompt_ids([question])[0] + prompt.answer_ids([answer])[0])
    encoded, report = encode(table([question], [answer]), exact)
    assert len(encoded["input_ids"][0]) == exact and report["lost_words"] == 0
    with pytest.raises(DataError, match=rf"None of 1 answers fits training\.max_length={exact - 1};"):
        encode(table([question], [answer]), exact - 1)


def test_when_nothing_is_left_the_error_says_what_to_raise(encode: Callable) -> None:
    with pytest.raises(DataError, match=r"None of 30 answers fits training\.max_length=3; raise"):
        encode(many_rows(), 3)


def test_two_processes_encode_the_same(encode: Callable, tmp_path: Path) -> None:
    rows, strata = many_rows(), np.arange(30) // 10
    one, report = encode(rows, 22, strata=strata)
    two, other = encode(rows, 22, strata=strata, cache_file=tmp_path / "two.arrow", num_proc=2)
    assert one.to_dict() == two.to_dict() and report == other and report["refused"] > 0
    assert two["severity"][:] == [index // 10 for index in two["source_index"]]


def test_a_process_whose_rows_are_all_refused_does_no_harm(encode: Callable) -> None:
    rows = table([SENTENCES[0]] * 4, [" ".join(ANSWERS * 10)] * 2 + [ANSWERS[0]] * 2)
    encoded, report = encode(rows, 80, num_proc=2)
    assert encoded["source_index"][:] == [2, 3] and report["refused"] == 2


def test_rows_lie_in_a_mapped_file_and_not_in_memory(encode: Callable, tmp_path: Path) -> None:
    encoded, _ = encode(many_rows(), None)
    weighted = add_token_weights(encoded, np.ones(30), "tokens", cache_file=tmp_path / "weighted.arrow")
    packed = pack_rows(weighted, 128, cache_file=tmp_path / "packed.arrow")
    for dataset in (encoded, weighted, packed):
        files = [Path(file["filename"]) for file in dataset.cache_files]
        assert files and all(file.parent == tmp_path and file.stat().st_size for file in files)


def test_an_old_file_of_that_name_does_not_answer_for_new_rows(encode: Callable) -> None:
    first, _ = encode(many_rows(), None)
    kept = first.to_dict()
    second, _ = encode(table([SENTENCES[1]], [ANSWERS[0]]), None)
    assert len(second) == 1 and second.to_dict() != kept


# Weights


@pytest.fixture
def weighted(encode: Callable, tmp_path: Path) -> Callable[..., tuple[Dataset, np.ndarray]]:
    def run(reduction: str) -> tuple[Dataset, np.ndarray]:
        encoded, _ = encode(many_rows(), 30)
        weights = np.linspace(0.25, 1.75, len(encoded))
        return add_token_weights(encoded, weights, reduction, cache_file=tmp_path / "weighted.arrow"), weights

    return run


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
def test_token_weights_are_zero_on_the_prompt_and_follow_the_reduction(weighted: Callable, reduction: str) -> None:
    rows, weights = weighted(reduction)
    assert rows.features["token_weights"].feature.dtype == "float32"
    for row, weight in zip(rows, weights, strict=True):
        labels, found = np.array(row["labels"]), np.array(row["token_weights"])
        assert len(found) == len(row["input_ids"]) and not found[labels == IGNORED].any()
        length = (labels != IGNORED).sum()
        each = weight if reduction == "tokens" else weight / length
        np.testing.assert_allclose(found[labels != IGNORED], each, rtol=1e-6)
        assert found.sum() == pytest.approx(weight * length if reduction == "tokens" else weight, rel=1e-5)


def test_tokens_that_the_tokenizer_does_not_know_are_counted(encode: Callable, prompt: Prompt) -> None:
    rows = many_rows()
    ids = [token for row in encode(rows, None)[0]["input_ids"] for token in row]
    prompt.tokenizer.unk_token = prompt.tokenizer.convert_ids_to_tokens(common := Counter(ids).most_common(1)[0][0])
    assert encode(rows, None)[1]["unknown_token_share"] == pytest.approx(ids.count(common) / len(ids))


def test_as_many_weights_as_rows_are_needed(encode: Callable, tmp_path: Path) -> None:
    encoded, _ = encode(many_rows(), None)
    with pytest.raises(WeightError, match="29 severity weights for 30 consultations"):
        add_token_weights(encoded, np.ones(29), "tokens", cache_file=tmp_path / "weighted.arrow")


def test_a_weight_finds_its_row_beyond_the_first_batch(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2]] * 2500, "labels": [[IGNORED, 2]] * 2500})
    weighted = add_token_weights(rows, np.arange(2500), "tokens", cache_file=tmp_path / "weighted.arrow")
    assert [row[1] for row in weighted["token_weights"]] == list(range(2500))


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
def test_packing_keeps_documents_whole_and_every_weight_at_its_token(
    weighted: Callable, tmp_path: Path, reduction: str
) -> None:
    rows, _ = weighted(reduction)
    rows = rows.remove_columns(["severity", "source_index"])
    packed = pack_rows(rows, 128, cache_file=tmp_path / "packed.arrow")
    assert len(packed) < len(rows) / 2

    def document(ids: list[int], labels: list[int], weights: list[float]) -> tuple:
        return tuple(zip(ids, labels, weights, strict=True))

    found = []
    for block in packed:
        assert len(block["input_ids"]) == len(block["labels"]) == len(block["token_weights"]) <= 128
        assert sum(block["seq_lengths"]) == len(block["input_ids"])
        start = 0
        for length in block["seq_lengths"]:
            part = slice(start, start + length)
            found.append(document(block["input_ids"][part], block["labels"][part], block["token_weights"][part]))
            start += length
    assert sorted(found) == sorted(document(r["input_ids"], r["labels"], r["token_weights"]) for r in rows)


# Batches


PAD = 7
ROWS: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3, PAD], "labels": [-100, -100, 3, PAD], "token_weights": [0.0, 0.0, 0.5, 0.5]},
    {"input_ids": [4, 5, PAD], "labels": [-100, 5, PAD], "token_weights": [0.0, 1.5, 1.5]},
    {"input_ids": [6, 8, 9, 1, 2, PAD], "labels": [-100] * 4 + [2, PAD], "token_weights": [0.0] * 4 + [1.0, 1.0]},
]
BLOCKS = [
    {name: ROWS[0][name] + ROWS[1][name] for name in ROWS[0]} | {"seq_lengths": [4, 3]},
    ROWS[2] | {"seq_lengths": [6]},
]


def collate(rows: list[dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
    return SeverityCollator(pad_token_id=PAD, **options)(rows)


def test_weights_are_padded_like_labels_and_an_end_token_that_also_pads_stays_labeled() -> None:
    for options in ({}, {"pad_to_multiple_of": 4}):
        batch = collate(ROWS, **options)
        weights = batch["token_weights"]
        assert weights.dtype == torch.float32
        assert weights.shape == batch["labels"].shape == batch["input_ids"].shape == (3, 8 if options else 6)
        assert weights[1].tolist() == [0.0, 1.5, 1.5] + [0.0] * (weights.shape[1] - 3)
        assert torch.equal(weights > 0, batch["labels"] != -100)
        for row, source in enumerate(ROWS):
            end = len(source["input_ids"]) - 1
            assert batch["labels"][row, end] == PAD and batch["attention_mask"][row, end] == 1
            assert (batch["labels"][row, end + 1 :] == -100).all() and not batch["attention_mask"][row, end + 1 :].any()


def test_without_padding_and_packed_the_weights_lie_end_to_end() -> None:
    batch = collate(ROWS, padding_free=True)
    assert batch["token_weights"][0].tolist() == [weight for row in ROWS for weight in row["token_weights"]]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert torch.equal(batch["token_weights"] > 0, batch["labels"] != -100)
    packed = collate(BLOCKS, padding_free=True)
    for name in ("input_ids", "labels", "token_weights", "position_ids"):
        assert torch.equal(batch[name], packed[name]), name


def test_a_batch_gives_its_rows_back_and_is_cut_between_them() -> None:
    validation = [{k: v for k, v in row.items() if k != "token_weights"} | {"severity": 1} for row in ROWS]
    assert collate(validation, padding_free=True)["severity"].tolist() == [1, 1, 1]
    for rows, blocks, options in (
        (ROWS, ROWS, {}),
        (ROWS, ROWS, {"padding_free": True}),
        (ROWS, ROWS, {"padding_free": True, "pad_to_multiple_of": 8}),
        (ROWS, BLOCKS, {"padding_free": True}),
        (validation, validation, {}),
        (validation, validation, {"padding_free": True, "pad_to_multiple_of": 8}),
    ):
        batch = collate(blocks, **options)
        assert rows_of(batch) == rows
        split = SplitOnOom(SFTConfig(use_cpu=True), SeverityCollator(pad_token_id=PAD, **options), True, print)
        assert [rows_of(part) for part in split.parts_of(batch, 2)] == [rows[:2], rows[2:]]
        assert split.parts_of(batch, 3) == split.parts_of(batch, None) == [batch]


# Severity in the prompt, examples, and rows drawn by severity


def test_a_prompt_names_what_the_question_lets_predict_or_what_the_data_says(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"question": text, "answer": "جواب", "severity": SEVERITIES[n % 3]} for n, text in enumerate(SENTENCES)]
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    by_rules = dict(zip(SENTENCES, Rules().probabilities(SENTENCES).argmax(axis=1), strict=True))
    own = {row["question"]: row["severity"] for row in rows}

    def named(asked: str, **severity: Any) -> tuple[dict[str, str], Any]:
        values = {"data": {"path": str(data), "test_size": 2, "validation_size": 2}, "severity": severity}
        _, splits, _ = load_splits(recipe_from_values({**values, "prompt": {"severity": asked}}))
        parts = [row for part in splits[:3] for row in part]
        return {row["question"]: row.get("prompt_severity") for row in parts}, splits.prompt_severity

    assert named("none") == (dict.fromkeys(SENTENCES), None)
    assert named("gold") == (own, {"source": "gold"})
    predicted = {text: SEVERITIES[at] for text, at in by_rules.items()}
    assert predicted != own
    for severity in ({}, {"source": "rules"}):
        assert named("predicted", **severity) == (predicted, {"source": "rules", "version": Rules().version})
    with pytest.raises(DataError, match="sevpeft classifier fit"):
        named("predicted", source="linear", classifier=str(tmp_path))
    data.write_text(data.read_text(encoding="utf-8").replace("severity", "other"), encoding="utf-8")
    assert named("predicted", control="uniform")[0] == predicted
    with pytest.raises(WeightError, match=r"prompt\.severity=predicted"):
        named("gold", control="uniform")


def test_weights_read_the_answer_where_the_prompt_names_what_the_question_alone_lets_predict(tmp_path: Path) -> None:
    rows = consultations(60)
    assert rows.answers is not None
    twin = Calibrated([fit_linear(replace(rows, reads="question"))], Calibration())
    both = Calibrated([fit_linear(rows)], Calibration(), "both", twin)
    (folder := tmp_path / "made").mkdir()
    write_classifier(both, folder, {})
    lines = [{"question": q, "answer": a} for q, a in zip(rows.questions, rows.answers, strict=True)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    found = {}
    for text in (None, "both", "question"):
        severity = {"source": "linear", "classifier": str(folder), "text": text}
        values = {"data": {"path": str(data)}, "severity": severity, "prompt": {"severity": "predicted"}}
        _, splits, found[text] = load_splits(recipe_from_values(values))
        assert found[text].origin.get("text") == (None if text == "question" else "both")
        named = {row["question"]: row["prompt_severity"] for part in splits[:3] for row in part}
        likeliest = np.array(SEVERITIES)[twin.probabilities(rows.questions).argmax(axis=1)]
        assert named == dict(zip(rows.questions, likeliest, strict=True)), text
    whole, alone = both.probabilities(rows.questions, rows.answers), twin.probabilities(rows.questions)
    for text, expected in ((None, whole), ("both", whole), ("question", alone)):
        np.testing.assert_allclose(found[text].probabilities, expected, rtol=1e-12)
    assert np.abs(whole - alone).max() > 0.1


def test_a_long_question_is_shortened_but_neither_severity_examples_nor_answer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    examples = [{"question": SENTENCES[0], "answer": ANSWERS[0]}]
    settings = {**Recipe().prompt.model_dump(), "severity": "gold", "examples": examples}
    prompt = Prompt.build(tokenizer, **settings)
    rows = table([" ".join(WORDS)] * 2, ANSWERS[1:], prompt_severity=["neutral", "critical"])
    fixed = len(prompt.prompt_ids([""], severities=["neutral"])[0])
    encoded, report = encode_rows(rows, prompt, fixed + 60, strata=None, cache_file=tmp_path / "rows.arrow")
    assert report["shortened"] == 2 and report["refused"] == 0
    for row, answer, name in zip(encoded, ANSWERS[1:], ("متوسطة", "حرجة"), strict=True):
        text = tokenizer.decode(row["input_ids"][: row["labels"].count(IGNORED)])
        before = f"السؤال: {SENTENCES[0]}\nالجواب: {ANSWERS[0]}\n\nدرجة الخطورة: {name}\nالسؤال: {WORDS[0]}"
        assert text.startswith(before) and text.endswith("\nالجواب:")
        assert [label for label in row["labels"] if label != IGNORED] == prompt.answer_ids([answer])[0]
    with pytest.raises(DataError, match=r"training\.max_length"):
        encode_rows(rows, prompt, fixed, strata=None, cache_file=tmp_path / "none.arrow")


def test_a_question_that_is_an_example_stands_in_no_split() -> None:
    before = load_splits(recipe_from_values({}))[1]
    for name in ("train", "test"):
        shown = [{"question": f"{getattr(before, name)[0]['question']}!", "answer": "لا"}]
        after = load_splits(recipe_from_values({"prompt": {"examples": shown}}))[1]
        for other in ("train", "validation", "test"):
            left = getattr(before, other)["id"][1 if other == name else 0 :]
            assert list(getattr(after, other)["id"]) == list(left), (name, other)


def test_oversampling_draws_as_many_rows_by_their_weight_and_weighs_them_alike(prompt: Prompt, tmp_path: Path) -> None:
    def prepared(name: str, **severity: Any) -> Any:
        (tmp_path / name).mkdir()
        recipe = recipe_from_values({"severity": severity, "data": {"max_rows": 120}})
        return prepare(recipe, prompt, tmp_path / name)

    uniform = prepared("uniform", control="uniform")
    drawn = prepared("drawn", control="oversampled", weights={"non_critical": 0.5, "neutral": 1.0, "critical": 3.0})
    again = prepared("again", control="oversampled", weights={"non_critical": 0.5, "neutral": 1.0, "critical": 3.0})
    equal = prepared("equal", control="oversampled", weights={"non_critical": 2.0, "neutral": 2.0, "critical": 2.0})
    assert list(drawn.train) == list(again.train) and list(equal.train) == list(uniform.train)
    assert len(drawn.train) == len(uniform.train) == drawn.weights.consultations
    assert {weight for row in drawn.train["token_weights"] for weight in row} == {0.0, 1.0}
    counts, before = drawn.weights.severities, uniform.weights.severities
    total = sum(weight * before[name] for name, weight in zip(SEVERITIES, (0.5, 1.0, 3.0), strict=True))
    for name, weight in zip(SEVERITIES, (0.5, 1.0, 3.0), strict=True):
        assert counts[name] == pytest.approx(weight * before[name] / total * len(drawn.train), abs=8), name


# Prepared folders


def conversations(path: Path, **data: Any) -> Recipe:
    """Twenty conversations of three exchanges, whose second answer has the weight .5, and twenty single exchanges."""
    lines = []
    for number in range(20):
        said = [(f"عندي صداع رقم {number}", "منذ متى؟", None), ("منذ يومين", "هل عندك حرارة؟", 0.5)]
        for turns in ([*said, ("نعم قليلة", f"راجع الطبيب {number}", None)], [(f"سؤال {number}", "جواب", None)]):
            messages = []
            for asked, answered, weight in turns:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
                messages[-1] |= {} if weight is None else {"weight": weight}
            lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(lines), encoding="utf-8")
    values = {"data": {"path": str(path), "test_size": 8, **data}, "severity": {"control": "uniform"}}
    return recipe_from_values({**values, "prompt": {"chat": True}, "training": {"max_length": None}})


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> Prompt:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATES["qwen3"]
    return Prompt.build(tokenizer, **{**Recipe().prompt.model_dump(), "chat": True})


def test_each_answer_of_a_conversation_that_is_trained_on_is_a_row_after_its_earlier_turns(
    chat: Prompt, tmp_path: Path
) -> None:
    for loss_on, each, weights in (("last", 1, [1.0]), ("all", 3, [1.0, 0.5, 1.0])):
        recipe = conversations(tmp_path / "x.jsonl", loss_on=loss_on)
        scratch = tmp_path / loss_on
        scratch.mkdir()
        found = prepare(recipe, chat, scratch)
        rows, at = load_splits(recipe)[1].train, 0
        assert found.summary["encoding"]["train"]["refused"] == 0
        for row in rows:
            number = each if row["turns"] else 1
            own = found.train.select(range(at, at + number))
            assert [max(one["token_weights"]) for one in own] == (weights if row["turns"] else [1.0])
            for one in own:
                answer = [label for label in one["labels"] if label != IGNORED]
                assert one["labels"] == [IGNORED] * (len(one["labels"]) - len(answer)) + answer
            assert answer == chat.answer_ids([row["answer"]])[0]
            whole = chat.tokenizer.decode(own[number - 1]["input_ids"])
            assert all(asked in whole for asked in row["question"].split("\n"))
            at += number
        assert at == len(found.train)


def test_a_conversation_that_is_too_long_loses_its_earliest_turns_and_never_its_answer(chat: Prompt) -> None:
    earlier = [[f"سؤال قديم رقم {number}", "جواب قديم"] for number in range(3)]
    turns = json.dumps(
        [*[[*one, 0.0] for one in earlier], ["سؤال أخير طويل من سبع كلمات هنا", "اذهب إلى الطوارئ", 1.0]]
    )
    rows = table(["كل شيء"], ["اذهب إلى الطوارئ"], turns=[turns])
    answer = chat.answer_ids(["اذهب إلى الطوارئ"])[0]
    lengths = [len(chat.prompt_ids([LAST], earlier=[earlier[start:]])[0]) + len(answer) for start in range(4)]
    for limit, dropped in ((lengths[0], 0), (lengths[0] - 1, 1), (lengths[2], 2), (lengths[2] - 1, 3)):
        with tempfile.TemporaryDirectory() as folder:
            encoded, report = encode_rows(rows, chat, limit, strata=None, cache_file=Path(folder) / "x.arrow")
            expected = chat.prompt_ids([LAST], earlier=[earlier[dropped:]])[0] + answer
            assert encoded[0]["input_ids"] == expected and report["lost_words"] == 6 * dropped, limit
    with tempfile.TemporaryDirectory() as folder:
        encoded, report = encode_rows(rows, chat, lengths[3] - 1, strata=None, cache_file=Path(folder) / "x.arrow")
        assert encoded[0]["input_ids"][-len(answer) :] == answer and report["lost_words"] > 18


def test_what_is_evaluated_is_the_last_answer_after_the_true_earlier_turns(chat: Prompt, tmp_path: Path) -> None:
    rows = test_rows(*load_splits(conversations(tmp_path / "x.jsonl", loss_on="all")))
    assert rows.turns is not None and len(rows.turns) == 8
    prompts, _ = fitting_prompts(rows, chat, None, [1] * 8)
    for ids, question, reference, turns in zip(prompts, rows.questions, rows.references, rows.turns, strict=True):
        before = [one[:2] for one in json.loads(turns)[:-1]] if turns else []
        assert ids == chat.prompt_ids([question.split("\n")[-1]], earlier=[before])[0]
        assert not turns or json.loads(turns)[-1][1] == reference


def test_single_exchanges_of_messages_are_the_rows_that_columns_give(chat: Prompt, tmp_path: Path) -> None:
    pairs = [(f"عندي صداع {number}", f"راجع الطبيب {number}") for number in range(20)]
    (tmp_path / "columns.jsonl").write_text(
        "\n".join(json.dumps({"question": asked, "answer": answered}) for asked, answered in pairs), encoding="utf-8"
    )
    rows = [[{"role": role, "content": text} for role, text in zip(ROLES, one, strict=True)] for one in pairs]
    (tmp_path / "messages.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in rows), encoding="utf-8")
    found = []
    for name in ("columns", "messages"):
        (tmp_path / name).mkdir()
        values = {"data": {"path": str(tmp_path / f"{name}.jsonl")}, "severity": {"control": "uniform"}}
        prepared = prepare(recipe_from_values(values), chat, tmp_path / name)
        summary = {
            key: value for key, value in prepared.summary.items() if key not in ("source", "fingerprint", "columns")
        }
        found.append((prepared.train[:], prepared.validation[:], summary, prepared.weights))
    assert found[0] == found[1]


def test_what_is_carved_from_a_prepared_folder_keeps_near_duplicates_together(tmp_path: Path) -> None:
    """Sixty questions in no more than thirty groups of near-duplicates, without a test part."""
    words = ["قلب", "معدة", "ركبة", "عين", "أذن", "كتف", "ظهر", "رقبة", "جلد", "كبد"]
    rows = []
    for number in range(30):
        said = f"{words[number % 10]} " * 4 + f"{words[number // 3 % 10]} {number} " * 5
        for ending in ("اليوم", "امس"):
            question = f"{said} منذ أسبوعين مع ألم وتعب وقلة نوم وفقدان شهية وأريد معرفة السبب {ending}"
            rows.append({"question": question, "answer": f"راجع الطبيب غدا {number} {ending}", "severity": "neutral"})
    file, folder = tmp_path / "rows.jsonl", tmp_path / "prepared"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    settings = {"data": {"path": str(file), "test_size": 0}, "near_duplicates": 0.8, "num_proc": 1}
    prepare_data(PrepareSettings.model_validate(settings), folder)
    sides = {}
    for seed in (0, 1):
        recipe = recipe_from_values({"data": {"path": str(folder), "test_size": 0.2, "seed": seed}})
        table, splits, severity = load_splits(recipe)
        parts = [set(part["group"]) for part in (splits.train, splits.validation, splits.test)]
        assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert 6 <= len(splits.test) <= 12 and sum(map(len, parts)) < len(table.rows) == 60
        sides[seed] = parts[2]
        about = summary_of(table, splits, severity, {})
        assert about["fingerprint"].startswith("sha256:")
        assert about["prepared"]["fingerprint"] == about["fingerprint"]
    assert sides[0] != sides[1]


def test_a_file_has_no_history_and_a_split_column_that_is_none_is_refused() -> None:
    table, splits, severity = load_splits(recipe_from_values({}))
    assert summary_of(table, splits, severity, {})["prepared"] is None
    with pytest.raises(DataError, match=r"data\.split_column"):
        load_splits(recipe_from_values({"data": {"split_column": "specialty"}}))
