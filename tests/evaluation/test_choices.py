"""Multiple choice finds the figures of the harness, and leaves out rows that nobody could answer rightly."""

from __future__ import annotations

import csv
import json
import shutil
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sevpeft.errors import DataError, SevpeftError, UsageError
from sevpeft.evaluation import choices as module
from sevpeft.evaluation.choices import TASKS, choices
from sevpeft.evaluation.report.page import write_report
from sevpeft.modeling import likelihood
from sevpeft.modeling.adapters import attach_adapter
from sevpeft.modeling.loading import load_for_inference, resolve_model
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.card import write_card
from sevpeft.training.data import load_splits
from tests.models import CHAT_TEMPLATES, SENTENCES

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra [choices]")
FEW = ["evaluation.n_resamples=100"]
TEXT = "The heart of a child with fever beats faster than the pulse at rest of an adult man who sleeps"


def questions(count: int = 24, text: str = TEXT, **more: Any) -> list[dict[str, Any]]:
    """Rows with two to five options of different lengths, drawn from the words of the text."""
    draw, words = np.random.default_rng(len(text)), text.split()
    rows = []
    for number in range(count):
        options = [
            " ".join(draw.choice(words, draw.integers(1, 4))) + f" {letter}" for letter in "vwxyz"[: 2 + number % 4]
        ]
        asked = f"{' '.join(draw.choice(words, 6))} {number}?"
        rows.append({"question": asked, "options": options, "answer_index": int(draw.integers(len(options))), **more})
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def trained_question(run: Run) -> str:
    return str(load_splits(load_recipe(run.folder / "recipe.yaml"))[1].train[0]["question"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """Rows in the place of data sets of the Hub, by their ids."""
    sets: dict[str, list[dict[str, Any]]] = {}

    def load(path: str, split: str | None = None, **_: Any) -> Any:
        rows = datasets.Dataset.from_list(sets[path])
        return rows if split else datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return sets


def as_published(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of four options as the data sets of the Hub hold them."""
    letters = [dict(zip("abcd", row["options"], strict=True)) for row in rows]
    decisions = ("yes", "no", "maybe")
    return {
        "cais/mmlu": [{"question": r["question"], "choices": r["options"], "answer": r["answer_index"]} for r in rows],
        "OALL/Arabic_MMLU": [
            {"question": r["question"], "answer": "ABCD"[r["answer_index"]]} | {k.upper(): o for k, o in of.items()}
            for r, of in zip(rows, letters, strict=True)
        ],
        "GBaker/MedQA-USMLE-4-options-hf": [
            {"sent1": r["question"], "label": r["answer_index"]} | {f"ending{n}": o for n, o in enumerate(r["options"])}
            for r in rows
        ],
        "openlifescienceai/medmcqa": [
            {"question": r["question"], "cop": r["answer_index"]} | {f"op{k}": o for k, o in of.items()}
            for r, of in zip(rows, letters, strict=True)
        ],
        "bigbio/pubmed_qa": [
            {"QUESTION": r["question"], "CONTEXTS": r["options"], "final_decision": decisions[r["answer_index"] % 3]}
            for r in rows
        ],
    }


@pytest.mark.parametrize("chat", [False, True])
def test_figures_are_those_of_the_harness_own_tasks_and_model(
    run: Run, tmp_path: Path, hub: dict[str, Any], chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import evaluator, simple_evaluate
    from lm_eval import tasks as of_harness
    from lm_eval.models.huggingface import HFLM

    if chat:
        recipe = load_recipe(run.folder / "recipe.yaml")
        folder = Path(shutil.copytree(recipe.model.name_or_path, tmp_path / "chat"))
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES["chatml"], encoding="utf-8")
        run.write_text(
            "recipe.yaml",
            load_recipe(run.folder / "recipe.yaml", ["prompt.chat=true", f"model.name_or_path={folder}"]).to_yaml(),
        )
        run.update_metrics(model={**run.metrics()["model"], "prompt": None})  # as if it was trained so
    rows = [row for row in questions(48) if len(row["options"]) == 4]
    hub |= as_published(rows)
    ours = choices(run, [written(tmp_path / "asked.jsonl", rows), "pubmedqa"], FEW)
    assert ours["chat"] is chat
    recipe = load_recipe(run.folder / "recipe.yaml")
    base, tokenizer = load_for_inference(recipe), resolve_model(recipe).tokenizer
    folders = [Path(of_harness.__file__).parent / folder for folder in ("mmlu/continuation", "medqa", "pubmedqa")]
    manager = of_harness.TaskManager(include_path=folders, include_defaults=False)
    tasks = manager.load(["mmlu_anatomy_continuation", "medqa_4options", "pubmedqa"])["tasks"]
    tasks["mmlu_anatomy_continuation"].config.description = ""  # it names the subject, which a file need not have
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)  # half a minute
    for arm in ("base", "adapter"):
        model = base if arm == "base" else attach_adapter(base, run.adapter, recipe)
        theirs = simple_evaluate(
            HFLM(model, tokenizer=tokenizer, batch_size=3, softmax_dtype="float32", enable_thinking=False),
            tasks=list(tasks.values()),
            task_manager=manager,
            apply_chat_template=chat,
            bootstrap_iters=0,
        )["results"]
        for name, score, task, metric in (
            ("asked", "text", "mmlu_anatomy_continuation", "acc"),
            ("asked", "text_norm", "mmlu_anatomy_continuation", "acc_norm"),
            ("asked", "letter", "medqa_4options", "acc"),
            ("asked", "letter_norm", "medqa_4options", "acc_norm"),
            ("pubmedqa", "text", "pubmedqa", "acc"),
        ):
            value = ours["tasks"][name]["scores"][score][arm]["value"]
            assert value == pytest.approx(theirs[task][f"{metric},none"]), (arm, name, score)


def test_likelihoods_do_not_depend_on_the_batches(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import evaluator
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [(row["question"] * (1 + n % 3), f" {o}") for n, row in enumerate(questions(12)) for o in row["options"]]
    asked += [("the same question", letter) for letter in "abcd"] + [("long " * 400, " end"), (SENTENCES[0], " نعم")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
    rows = [*questions(4), {**questions(5)[4], "question": "long " * 400}]
    evaluate, checked = evaluator.evaluate, 0

    def compared(lm: Any, **settings: Any) -> Any:
        nonlocal checked
        theirs = HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=1).loglikelihood(requests)
        for tokens, shared in product((1, 100, 4096), (True, False)):
            monkeypatch.setattr(likelihood, "NLL_TOKENS", tokens)
            with monkeypatch.context() as patch:
                if not shared:
                    patch.setattr(module, "batching", lambda *_: (False, ""))
                ours = lm.loglikelihood(requests)
            assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4), tokens
            assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs], tokens
            checked += 1
        return evaluate(lm=lm, **settings)

    monkeypatch.setattr(evaluator, "evaluate", compared)
    content = choices(run, [written(tmp_path / "asked.jsonl", rows)], FEW)
    assert checked == 12 and content["cut"] == 3  # one by the requests above, and two prompts of the same row


def test_faulty_rows_are_left_out_and_named_by_their_number(run: Run, tmp_path: Path) -> None:
    good = questions(4)
    faulty = {
        "a question, option or context that is no text in UTF-8": [
            {"question": " "},
            {"question": None},
            {"question": "\ufffd?"},
            {"options": ["one", ""]},
            {"options": "one, two"},
            {"options": ["one", 2]},
            {"context": ["one"]},
        ],
        "fewer than 2 or more than 26 options": [{"options": ["one"]}, {"options": list(map(str, range(27)))}],
        "equal options": [{"options": ["one", " one "]}],
        "an answer_index that is no option's": [{"answer_index": answer} for answer in (-1, 9, "A", None, True, 1.0)],
        "a question of the training rows": [{"question": f"«{trained_question(run)}»!"}],
        "a repeated question": [{}],
    }
    rows, expected = list(good), {}
    for fault, changes in faulty.items():
        expected[fault] = [len(rows) + n for n in range(1, len(changes) + 1)]
        rows += [{**good[0], **change} for change in changes]
    content = choices(run, [written(tmp_path / "asked.jsonl", rows)], FEW)
    about = content["tasks"]["asked"]
    assert about["left_out"] == expected and about["rows"] == len(good) and about["options"] == [2, 5]
    assert about["chance"] == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5]))
    said = json.dumps(content, ensure_ascii=False)
    assert not any(row["question"] in said for row in good)
    assert trained_question(run) not in said
    # The same question with another context, or with other options, is another one.
    again = [good[0], {**good[0], "context": "pulse"}, {**good[0], "options": ["one", "two"], "answer_index": 0}]
    assert choices(run, [written(tmp_path / "again.jsonl", again)], FEW)["tasks"]["again"]["left_out"] == {}
    # A row that repeats a faulty one is not a repetition.
    mended = [{**good[0], "answer_index": 9}, good[0]]
    left_out = choices(run, [written(tmp_path / "mended.jsonl", mended)], FEW)["tasks"]["mended"]["left_out"]
    assert left_out == {"an answer_index that is no option's": [1]}
    with pytest.raises(DataError, match="no valid row"):
        choices(run, [written(tmp_path / "empty.jsonl", rows[4:12])])


def test_arabic_and_english_are_compared_where_lines_have_the_same_answers(run: Run, tmp_path: Path) -> None:
    english = questions(9)
    arabic = [
        {**ours, "answer_index": row["answer_index"]}
        for ours, row in zip(questions(12, " ".join(SENTENCES)), [*english, *questions(12)[9:]], strict=True)
    ]
    english[3]["question"] = ""
    files = [written(tmp_path / f"{name}.jsonl", rows) for name, rows in (("en", english), ("ar", arabic))]
    content = choices(run, files, FEW)
    assert [content["tasks"][name]["language"] for name in ("ar", "en")] == ["ar", "en"]
    assert list(content["languages"]) == ["ar − en"]
    common = written(tmp_path / "common.jsonl", [row for n, row in enumerate(arabic[:9]) if n != 3])
    first = choices(run, [common], FEW)["tasks"]["common"]["scores"]
    for score, by in content["languages"]["ar − en"].items():
        for arm, found in by.items():
            second = content["tasks"]["en"]["scores"][score][arm]["value"]
            assert found["rows"] == 8 and found["value"] == pytest.approx(first[score][arm]["value"] - second), score
    # A sample of both is a sample of the same lines, and other answers show that lines do not belong together.
    english[3]["question"] = "again?"
    files[0] = written(tmp_path / "en.jsonl", english)
    whole = written(tmp_path / "ar.jsonl", arabic[:9])
    assert choices(run, [whole, files[0]], FEW, limit=5)["languages"]["ar − en"]["text"]["base"]["rows"] == 5
    english[7]["answer_index"] = 1 - english[7]["answer_index"] if english[7]["answer_index"] < 2 else 0
    assert choices(run, [whole, written(tmp_path / "en.jsonl", english)], FEW)["languages"] == {}


def test_published_sets_are_read_from_their_columns(
    hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "question": f"\"{row['question']}\" 'x' <é>"} for row in questions(48) if len(row["options"]) == 4]
    hub |= as_published(rows)
    for name, times in (("mmlu_medical_en", 6), ("mmlu_medical_ar", 6), ("medqa", 1), ("medmcqa", 1)):
        assert list(module._read(name).values()) == rows * times, name
    first = module._read("pubmedqa")[1]
    assert first["options"] == ["yes", "no", "maybe"] and first["context"] == "\n".join(rows[0]["options"])
    assert [row["answer_index"] for row in module._read("pubmedqa").values()] == [r["answer_index"] % 3 for r in rows]
    assert {path.stem for path in (TASKS / "sets").iterdir()} - {"medarabench"} <= {
        *("mmlu_medical_en", "mmlu_medical_ar", "medqa", "medmcqa", "pubmedqa")
    }


def test_keys_of_medarabench_become_options_or_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = ["Question Number", "Question", *(f"Option {letter}" for letter in "ABCDEF"), "Correct Answer"]
    header += ["Level", "Medical Specialty", "Group", "umbrella_specialty"]
    keys = {"C": 2, "c": 2, " B ": 1, "E": -1, "AB": -1, "": -1, "أ": -1}
    with (tmp_path / "test.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for number, key in enumerate(keys, start=1):
            writer.writerow([number, f'سؤال {number}، "x"', "one", "0.05", "NA", "four", "", "", key, "Y1", "", "", ""])
        writer.writerow([9, "سؤال", "one", "", "three", "", "", "", "C", "Y1", "", "", ""])
        writer.writerow([10, "سؤال", "one", "", "three", "", "", "", "B", "Y1", "", "", ""])
    load = datasets.load_dataset
    local = {"data_files": {"test": str(tmp_path / "test.csv")}, "cache_dir": str(tmp_path)}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **settings: load(path, **{**settings, **local}))
    read = list(module._read("medarabench").values())
    assert [row["answer_index"] for row in read] == [*keys.values(), 1, -1]
    assert read[0]["options"] == ["one", "0.05", "NA", "four"] and read[-1]["options"] == ["one", "three"]
    assert read[0]["question"] == 'سؤال 1، "x"'


def test_the_screen_report_and_card_show_what_was_measured(run: Run, tmp_path: Path, sevpeft_: Any) -> None:
    write_card(run)
    english = questions(8)
    arabic = [
        {**ours, "answer_index": row["answer_index"]}
        for ours, row in zip(questions(8, " ".join(SENTENCES)), english, strict=True)
    ]
    english[2]["options"] = ["one", "one"]
    files = [written(tmp_path / name, rows) for name, rows in (("mcq_medical_ar.jsonl", arabic), ("en.jsonl", english))]
    code, out, err = sevpeft_("choices", run.folder, "--tasks", ",".join(files), *FEW)
    assert code == 0 and max(map(len, out.splitlines()[:-1])) <= 80, err
    card, page = run.adapter / "README.md", write_report(run.folder, answers=0).path.read_text(encoding="utf-8")
    shown = card.read_text(encoding="utf-8")
    for part in ("mcq_medical_ar: 8 rows", "text_norm", "letter", "chance", "Left out, with equal options: 1 (row 3)"):
        for text in (" ".join(out.split()), shown.replace("**", ""), page):
            assert part in text, part
    assert "## Multiple choice" in shown and "Arabic − English" in out and "Arabic − English" in page
    card.write_text("edited", encoding="utf-8")
    code, out, _ = sevpeft_("choices", run.folder, "--tasks", files[0], "--limit", "2", "--json", *FEW)
    figures = run.metrics()["choices"]
    assert code == 0 and json.loads(out) == figures and figures["tasks"]["mcq_medical_ar"]["rows"] == 2
    assert card.read_text(encoding="utf-8") == "edited"


def test_what_cannot_be_asked_is_said_before_the_model_is_loaded(
    run: Run, tmp_path: Path, sevpeft_: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_for_inference", lambda _: pytest.fail("the model was loaded"))
    file = written(tmp_path / "asked.jsonl", questions(4))
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other" / "asked.jsonl", questions(4))
    wrong: list[tuple[list[str], int, str]] = [
        ([], 2, "--tasks"),
        (["--tasks", "absent.jsonl"], 2, "medarabench, medmcqa"),
        (["--tasks", str(TASKS / "text_en.yaml")], 1, "JSON"),
        (["--tasks", "medqa"], 1, "JSONL file"),
        (["--tasks", f"{file},{other}"], 2, "rename"),
        (["--tasks", file, "generation.max_new_tokens=4"], 2, "evaluation"),
        (["--tasks", file, "--limit", "0"], 2, "limit"),
    ]
    for words, exit_code, remedy in wrong:
        code, out, err = sevpeft_("choices", run.folder, *words)
        assert (code, out) == (exit_code, "") and remedy in err, (words, code, err)
    with monkeypatch.context() as patch, pytest.raises(SevpeftError, match=r"pip install -e .*choices"):
        patch.setattr(module, "find_spec", lambda _: None)
        choices(run, [file])
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="one process"):
        patch.setenv("WORLD_SIZE", "2")
        choices(run, [file])
