"""Translations are kept where no check speaks against them, and no text is translated twice."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sevpeft.errors import DataError, Interrupted, ModelError, RunError, UsageError
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.modeling.loading import resolve_model
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import recipe_from_values
from sevpeft.severity.settings import TranslateSettings
from sevpeft.sharing import translate as translating
from sevpeft.sharing.translate import by_vllm, fault, numbers, translate
from tests.conftest import Cli

TEXTS = {
    "I have had a headache for 3 days": "عندي صداع منذ ٣ أيام",
    "See a doctor within 24 hours": "راجع طبيبا خلال 24 ساعة",
    "My MRI is normal": "صورة الرنين MRI طبيعية",
    "Drink water": "اشرب الماء",
    "Take 500 mg twice": "خذ ٥٠٠ ملغ مرتين",
    "Take 5 mg": "خذ 50 ملغ",
}
ROWS = [
    ("I have had a headache for 3 days", "See a doctor within 24 hours"),
    ("My MRI is normal", "Drink water"),
    ("Drink water", "Take 500 mg twice"),
    ("Drink water", "Take 5 mg"),
]


def settings(path: Path, **values: Any) -> TranslateSettings:
    return TranslateSettings.model_validate({"model": "org/model", "data": {"path": str(path)}, **values})


@pytest.fixture
def english(tmp_path: Path) -> Path:
    lines = [
        {"question": asked, "answer": answered, "severity": "critical", "split": "test", "page": number}
        for number, (asked, answered) in enumerate(ROWS)
    ]
    path = tmp_path / "english.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that a model was asked for, which translates by TEXTS. With "" before them it is interrupted."""
    seen: list[str] = []

    def translations(_: Any, rows: EvaluationRows, __: Any) -> Iterator[list[dict[str, Any]]]:
        for identity, question in zip(rows.ids, rows.questions, strict=True):
            instruction, _, text = question.partition("\n\n")
            assert "Arabic" in instruction
            seen.append(text)
            yield [{"id": identity, "prediction": TEXTS[text], "truncated": False, "lost_words": 0, "token_ids": []}]
            if len(seen) == 3 and seen[0] == "":
                raise KeyboardInterrupt

    monkeypatch.setattr(translating, "translations", translations)
    return seen


def test_what_is_kept_has_the_numbers_the_script_and_the_length_of_its_original() -> None:
    fine = {"truncated": False, "lost_words": 0}
    to_arabic, to_english = "ar", "en"
    wrong = []
    for original, text, how, expected in (
        ("a headache for 3 days", "صداع منذ ٣ أيام", to_arabic, ""),
        ("a headache for 3 days", "صداع منذ 3 أيام، β", to_arabic, ""),
        ("a headache for 3 days", "صداع منذ 3 days", to_arabic, "residual script"),
        ("a headache for 3 days", "صداع منذ 3 天", to_arabic, "residual script"),
        ("a headache for 3 days", "صداع منذ 4 أيام", to_arabic, "other numbers"),
        ("a headache for 3 days", "صداع منذ أيام", to_arabic, "other numbers"),
        ("1,500 or 2.5 mg", "٢٫٥ أو ١٬٥٠٠ ملغ", to_arabic, ""),
        ("a headache", "", to_arabic, "empty"),
        ("a headache", "صداع " * 10, to_arabic, "other length"),
        ("عندي صداع منذ ٣ أيام", "A headache for 3 days", to_english, ""),
        ("عندي صداع منذ ٣ أيام", "A صداع for 3 days", to_english, "residual script"),
    ):
        found = fault(original, {"prediction": text, **fine}, how)
        wrong += [] if found == expected else [(text, found)]
    assert wrong == []
    assert fault("x", {"prediction": "س", "truncated": True, "lost_words": 0}, to_arabic) == "cut off"
    assert fault("x", {"prediction": "س", "truncated": False, "lost_words": 2}, to_arabic) == "too long"
    assert numbers("١٢٣ 1,000 3,5 2.50") == [2.5, 3, 5, 123, 1000]


def test_sound_rows_say_which_model_made_them_and_the_others_why_they_are_none(
    english: Path, asked: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "arabic.jsonl"
    with english.open("a", encoding="utf-8") as file:
        file.write('\n{"question": "What now?", "answer": ""}')
    done = translate(settings(english), output)
    assert done == {
        "rows": 2,
        "rate": 0.5,
        "rejected": {"residual script": 1, "other numbers": 1, "empty answer": 1},
    }
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(row["question"], row["answer"]) for row in rows] == [
        (TEXTS[asked], TEXTS[answered]) for asked, answered in (ROWS[0], ROWS[2])
    ]
    assert {(row["severity"], row["split"], row["translated_by"]) for row in rows} == {
        ("critical", "test", "org/model")
    }
    assert [row["page"] for row in rows] == ["0", "2"]
    rejected = [json.loads(line) for line in (tmp_path / "arabic.rejected.jsonl").read_text("utf-8").splitlines()]
    assert [(row["row"], row["reason"]) for row in rejected] == [(2, "residual script"), (4, "other numbers")]
    assert rejected[0]["question"] == ROWS[1][0] and rejected[0]["translation"]["question"] == TEXTS[ROWS[1][0]]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["arabic.jsonl", "arabic.rejected.jsonl", "english.jsonl"]
    assert all((tmp_path / name).stat().st_mode & 0o077 == 0 for name in files[:2])


def test_the_same_command_goes_on_after_a_kill_and_translates_nothing_twice(
    english: Path, asked: list[str], tmp_path: Path
) -> None:
    output, whole = tmp_path / "arabic.csv", tmp_path / "whole.csv"
    translate(settings(english), whole)
    every = len(asked)
    asked.append("")
    del asked[:-1]
    with pytest.raises(Interrupted):
        translate(settings(english), output)
    assert not output.exists() and (tmp_path / "arabic.translations.jsonl").stat().st_mode & 0o077 == 0
    asked.clear()
    with pytest.raises(RunError, match=r"arabic\.translations\.jsonl"):
        translate(settings(english, model="another"), output)
    translate(settings(english), output)
    assert len(asked) == every - 2 == 4 and output.read_bytes() == whole.read_bytes()


def test_what_cannot_be_translated_is_one_sentence(
    english: Path, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for output, error in (("arabic.txt", UsageError), ("english.jsonl", RunError)):
        with pytest.raises(error, match=output):
            translate(settings(english), tmp_path / output)
    assert asked == []
    monkeypatch.setitem(TEXTS, "Drink water", "water")
    english.write_text(json.dumps({"question": "Drink water", "answer": "Drink water"}), encoding="utf-8")
    with pytest.raises(DataError, match=r"residual script.*arabic\.rejected\.jsonl"):
        translate(settings(english), tmp_path / "arabic.jsonl")
    assert not (tmp_path / "arabic.jsonl").exists() and (tmp_path / "arabic.rejected.jsonl").exists()


def test_the_toy_answers_nonsense_which_is_rejected(english: Path, sevpeft_: Cli, tmp_path: Path) -> None:
    for more, part in (
        (["model=builtin:tiny", "max_new_tokens=3"], "arabic.rejected.jsonl"),
        ([], "model=ID"),
        (["model=builtin:tiny", "to=fr"], "to"),
    ):
        code, _, err = sevpeft_("translate", english, tmp_path / "arabic.jsonl", *more)
        assert code in (1, 2) and part in err, more
    reasons = [
        json.loads(line)["reason"] for line in (tmp_path / "arabic.rejected.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(reasons) == 4 and set(reasons) <= {"cut off", "empty", "residual script", "other numbers"}


def test_vllm_gets_the_same_prompts_and_its_answers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from_values({"prompt": {"template": "{question}\n"}, "generation": {"max_new_tokens": 7}})
    base = resolve_model(recipe)
    prompt: Prompt = base.prompt
    given: dict[str, Any] = {}

    class LLM:
        def __init__(self, name: str, **how: Any) -> None:
            given.update(how)

        def generate(self, asked: list[dict[str, Any]], how: dict[str, Any], use_tqdm: bool) -> list[Any]:
            given.update(asked=asked, how=how)
            ends = ("stop", "length")
            texts = [types.SimpleNamespace(text=f" {n} ", finish_reason=ends[n % 2]) for n in range(len(asked))]
            return [types.SimpleNamespace(outputs=[text]) for text in texts]

    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    none = np.zeros(3, dtype=np.int64)
    rows = EvaluationRows(["a", "b", "c"], ["x", "y", "كلمة " * 99], [""] * 3, None, none, none, "", "")
    list(by_vllm(base, prompt, rows))
    assert given["max_model_len"] == base.config.max_position_embeddings, "vLLM refuses more"
    monkeypatch.setattr(translating, "_POSITIONS_OF_VLLM", 7)
    with pytest.raises(ModelError, match="max_new_tokens=7"):
        list(by_vllm(base, prompt, rows))
    monkeypatch.setattr(translating, "_POSITIONS_OF_VLLM", 40)
    batches = list(by_vllm(base, prompt, rows))
    assert given["load_format"] == "safetensors" and given["how"]["stop_token_ids"] == [prompt.end_id]
    assert [one["prompt_token_ids"] for one in given["asked"][:2]] == prompt.prompt_ids(["x", "y"])
    found = [(line["id"], line["prediction"], line["truncated"], line["lost_words"] > 0) for line in batches[0]]
    assert found == [("a", "0", False, False), ("b", "1", True, False), ("c", "2", False, True)] and len(batches) == 1
