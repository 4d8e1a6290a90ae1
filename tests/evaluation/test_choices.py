"""Multiple choice finds the figures of the harness, and leaves out rows that nobody could answer rightly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sevpeft.errors import DataError, SevpeftError, UsageError
from sevpeft.evaluation import choices as module
from sevpeft.evaluation.choices import TASKS, choices
from sevpeft.evaluation.report.page import write_report
from sevpeft.modeling.adapters import attach_adapter
from sevpeft.modeling.loading import load_for_inference, resolve_model
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.card import write_card
from sevpeft.training.data import load_splits
from tests.models import CHAT_TEMPLATES, SENTENCES

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra [choices]")
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
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[dict[str, Any]]]], None]:
    """Gives rows in the place of data sets of the Hub, by their ids."""

    def put(sets: dict[str, list[dict[str, Any]]]) -> None:
        def load(path: str, **_: Any) -> datasets.DatasetDict:
            rows = datasets.Dataset.from_list(sets[path])
            return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), rows))

        monkeypatch.setattr(datasets, "load_dataset", load)

    return put


@pytest.mark.parametrize("chat", [False, True])
def test_figures_are_those_of_the_harness_own_tasks_and_model(
    run: Run, tmp_path: Path, hub: Any, chat: bool, monkeypatch: pytest.MonkeyPatch
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
    rows = [row for row in questions(48) if len(row["options"]) == 4]
    ours = choices(run, [written(tmp_path / "asked.jsonl", rows)])
    assert ours["prompt"]["chat"] is chat and json.loads((run.folder / "choices.json").read_text()) == ours
    hub(
        {
            "cais/mmlu": [
                {"question": r["question"], "choices": r["options"], "answer": r["answer_index"]} for r in rows
            ],
            "GBaker/MedQA-USMLE-4-options-hf": [
                {"sent1": r["question"], "label": r["answer_index"]}
                | {f"ending{n}": o for n, o in enumerate(r["options"])}
                for r in rows
            ],
        }
    )
    recipe = load_recipe(run.folder / "recipe.yaml")
    base, tokenizer = load_for_inference(recipe), resolve_model(recipe).tokenizer
    folders = [Path(of_harness.__file__).parent / folder for folder in ("mmlu/continuation", "medqa")]
    manager = of_harness.TaskManager(include_path=folders, include_defaults=False)
    tasks = manager.load(["mmlu_anatomy_continuation", "medqa_4options"])["tasks"]
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
        for score, task in (("text", "mmlu_anatomy_continuation"), ("letter", "medqa_4options")):
            for suffix, metric in (("", "acc"), ("_norm", "acc_norm")):
                value = ours["tasks"]["asked"]["scores"][score + suffix][arm]["value"]
                assert value == pytest.approx(theirs[task][f"{metric},none"]), (arm, score, suffix)


def test_likelihoods_do_not_depend_on_the_batches(run: Run) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from rich.console import Console

    recipe = load_recipe(run.folder / "recipe.yaml")
    base, prompt = load_for_inference(recipe), resolve_model(recipe).prompt
    asked = [(row["question"] * (1 + n % 3), f" {o}") for n, row in enumerate(questions()) for o in row["options"]]
    asked += [("the same question", letter) for letter in "abcd"] + [("long " * 400, " end"), (SENTENCES[0], " نعم")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
    model = module._language_model(base, prompt, Console(quiet=True))
    ours, theirs = (
        one.loglikelihood(requests) for one in (model, HFLM(base, tokenizer=prompt.tokenizer, batch_size=1))
    )
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert model.cut == {"long " * 400}


def test_faulty_rows_are_left_out_and_named_by_their_number(run: Run, tmp_path: Path) -> None:
    good = questions(4)
    faulty = {
        "a question or an option that is no text": [
            {"question": " "},
            {"question": None},
            {"options": ["one", ""]},
            {"options": "one, two"},
            {"options": ["one", 2]},
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
    content = choices(run, [written(tmp_path / "asked.jsonl", rows)], ["evaluation.n_resamples=100"])
    assert content["tasks"]["asked"]["left_out"] == expected and content["tasks"]["asked"]["rows"] == len(good)
    assert content["tasks"]["asked"]["options"] == [2, 5]
    assert content["tasks"]["asked"]["chance"] == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5]))
    said = json.dumps(content, ensure_ascii=False)
    assert not any(row["question"] in said for row in good)
    assert trained_question(run) not in said
    # The same question with another context, or with other options, is another one.
    again = [good[0], {**good[0], "context": "pulse"}, {**good[0], "options": ["one", "two"], "answer_index": 0}]
    assert choices(run, [written(tmp_path / "again.jsonl", again)])["tasks"]["again"]["left_out"] == {}
    with pytest.raises(DataError, match="empty"):
        choices(run, [written(tmp_path / "empty.jsonl", rows[4:12])])


def test_arabic_and_english_are_compared_on_the_rows_with_the_same_ids(run: Run, tmp_path: Path) -> None:
    arabic = [{**row, "id": f"q{n}"} for n, row in enumerate(questions(30, " ".join(SENTENCES)))]
    english = [{**row, "id": f"q{n}"} for n, row in reversed(list(enumerate(questions(20))))]
    files = [written(tmp_path / f"{name}.jsonl", rows) for name, rows in (("ar", arabic), ("en", english))]
    content = choices(run, files)
    assert [content["tasks"][name]["language"] for name in ("ar", "en")] == ["ar", "en"]
    (pair,) = content["languages"]
    assert (pair["arabic"], pair["english"], pair["rows"]) == ("ar", "en", 20)
    first = choices(run, [written(tmp_path / "ar.jsonl", arabic[:20])])["tasks"]["ar"]["scores"]
    for score, by in pair["scores"].items():
        for arm, found in by.items():
            second = content["tasks"]["en"]["scores"][score][arm]["value"]
            assert found["value"] == pytest.approx(first[score][arm]["value"] - second), (score, arm)
    # A sample of both is a sample of the same ids.
    assert choices(run, [str(tmp_path / "ar.jsonl"), files[1]], limit=5)["languages"][0]["rows"] == 5


def test_a_sample_does_not_replace_all_rows_nor_an_interrupted_command_anything(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "asked.jsonl", questions(8))
    assert choices(run, [file], limit=3)["tasks"]["asked"]["rows"] == 3
    whole = choices(run, [file])
    stored = (run.folder / "choices.json").read_bytes()
    assert json.loads(stored)["tasks"]["asked"]["rows"] == whole["tasks"]["asked"]["rows"] == 8
    assert "kept as it was" in choices(run, [file], limit=3)["notes"][-1]
    before = {path.name for path in run.folder.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "attach_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        choices(run, [file])
    assert (run.folder / "choices.json").read_bytes() == stored
    assert {path.name for path in run.folder.iterdir()} == before


def test_shipped_tasks_name_the_right_columns(run: Run, hub: Any) -> None:
    rows = questions(48)
    rows = [row for row in rows if len(row["options"]) == 4]
    four = [dict(zip("ABCD", row["options"], strict=True)) for row in rows]
    hub(
        {
            "cais/mmlu": [
                {"question": r["question"], "choices": r["options"], "answer": r["answer_index"]} for r in rows
            ],
            "OALL/Arabic_MMLU": [
                {"question": r["question"], "subject": "anatomy", "answer": "ABCD"[r["answer_index"]]} | options
                for r, options in zip(rows, four, strict=True)
            ],
            "GBaker/MedQA-USMLE-4-options-hf": [
                {"sent1": r["question"], "label": r["answer_index"]}
                | {f"ending{n}": o for n, o in enumerate(r["options"])}
                for r in rows
            ],
            "openlifescienceai/medmcqa": [
                {"question": r["question"], "cop": r["answer_index"]}
                | {f"op{letter.lower()}": o for letter, o in options.items()}
                for r, options in zip(rows, four, strict=True)
            ],
        }
    )
    shipped = [path.stem for path in TASKS.glob("m*.yaml")]
    answers = [row["answer_index"] for row in rows]
    for source in module._of_names(shipped, set(), None):
        assert [row["answer_index"] for _, row in source.rows] == answers * (6 if "mmlu" in source.name else 1), (
            source.name
        )
        letters = [list("ABCD")] if "_en_" in source.name else [list("أبجد")]
        wanted = letters * len(rows) if source.name.endswith("letter") else [row["options"] for row in rows]
        if not source.name.endswith("ar_letter"):
            assert [row["options"] for _, row in source.rows][: len(rows)] == wanted, source.name
        assert all(rows[0]["question"] in source.rows[0][1][key] for key in ("question", "texts")), source.name


def test_a_named_task_leaves_faulty_rows_out_too(run: Run, tmp_path: Path, hub: Any) -> None:
    rows = [row for row in questions(40) if len(row["options"]) == 4]
    asked = [rows[0], {**rows[0], "answer_index": 9}, *rows[1:], {**rows[0], "question": trained_question(run)}]
    hub(
        {
            "GBaker/MedQA-USMLE-4-options-hf": [
                {"sent1": r["question"], "label": r["answer_index"]}
                | {f"ending{n}": o for n, o in enumerate(r["options"])}
                for r in asked
            ]
        }
    )
    content = choices(run, ["medqa_text", written(tmp_path / "asked.jsonl", rows)])["tasks"]
    named, file = content["medqa_text"], content["asked"]
    assert named["left_out"] == {
        "an answer_index that is no option's": [2],
        "a question of the training rows": [len(asked)],
    }
    for suffix in ("", "_norm"):
        for arm in ("base", "adapter"):
            assert named["scores"][f"task{suffix}"][arm] == file["scores"][f"text{suffix}"][arm]


def test_the_screen_report_and_card_show_what_was_measured(run: Run, tmp_path: Path, sevpeft_: Any) -> None:
    write_card(run)
    arabic = [{**row, "id": n} for n, row in enumerate(questions(8, " ".join(SENTENCES)))]
    files = [
        written(tmp_path / "mcq_medical_ar.jsonl", arabic),
        written(tmp_path / "en.jsonl", [{**row, "id": n} for n, row in enumerate(questions(8))]),
    ]
    code, out, err = sevpeft_("choices", run.folder, "--tasks", ",".join(files))
    assert code == 0 and max(map(len, out.splitlines()[:-1])) <= 80, err
    for part in ("mcq_medical_ar: 8 rows", "text_norm", "letter", "Arabic − English", "chance"):
        assert part in out, part
    card, page = run.adapter / "README.md", write_report(run.folder, answers=0).path.read_text(encoding="utf-8")
    assert "## Multiple choice" in card.read_text(encoding="utf-8") and "mcq_medical_ar: 8 rows" in page
    card.write_text("edited", encoding="utf-8")
    code, out, _ = sevpeft_("choices", run.folder, "--tasks", files[0], "--limit", "2", "--json")
    assert code == 0 and json.loads(out)["tasks"]["mcq_medical_ar"]["rows"] == 2
    assert card.read_text(encoding="utf-8") == "edited"
    # Figures of another adapter are none of this one.
    shutil.copy(run.adapter / "adapter_config.json", run.adapter / "adapter_model.safetensors")
    assert "Multiple choice" not in write_report(run.folder, answers=0).path.read_text(encoding="utf-8")


def test_what_cannot_be_asked_is_said_before_the_model_is_loaded(
    run: Run, tmp_path: Path, sevpeft_: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks as of_harness

    monkeypatch.setattr(module, "load_for_inference", lambda _: pytest.fail("the model was loaded"))
    # Without the tasks of other fields, whose list takes half a minute to read.
    few = partial(of_harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(of_harness, "TaskManager", lambda include_path, **_: few(include_path=include_path))
    file, latin = written(tmp_path / "asked.jsonl", questions(4)), tmp_path / "latin.jsonl"
    latin.write_bytes('{"question": "é"}\n'.encode("latin-1"))
    (tmp_path / "other").mkdir()
    wrong: list[tuple[list[str], int, str]] = [
        ([], 2, "--tasks"),
        (["--tasks", "absent.jsonl"], 2, "lm-eval ls tasks"),
        (["--tasks", str(TASKS / "medqa_text.yaml")], 1, "JSON"),
        (["--tasks", "medqa_text"], 1, "JSONL file"),
        (["--tasks", str(latin)], 1, "UTF-8"),
        (["--tasks", written(tmp_path / "other" / "asked.jsonl", questions(4)), "--tasks", file], 2, "rename"),
        (["--tasks", file, "generation.max_new_tokens=4"], 2, "evaluation."),
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
