"""Every command in a README works as it is written there, on a small model and few rows."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sevpeft.cli import main
from sevpeft.recipe import load_recipe

ROOT = Path(__file__).parent.parent
READMES = [
    *(ROOT / name for name in ("README.md", "recipes/README.md", "accelerate_configs/README.md", "tests/README.md")),
    *sorted((ROOT / "sevpeft").glob("*/README.md")),
]
# Shorter, for the same verbs and settings.
SHORTER = {
    "base,ce,mild,balanced,strong,1-1-2,shuffled,constant": "ce,1-1-2,shuffled",
    "base,ce,mild,balanced,strong,shuffled": "base,ce,shuffled",
    "0,1,2": "0",
}
COLUMNS = ["question", "answer", "severity"]
SMALL = (
    "about: {license: apache-2.0, base_model: Qwen/Qwen2.5-0.5B}\ndata: {max_rows: 48}\n"
    "training: {max_steps: 1, max_length: 160, eval_strategy: 'no', use_cpu: true}\n"
    "generation: {max_new_tokens: 2}\nevaluation: {bertscore: false, n_resamples: 100}\n"
)


def commands(path: Path) -> list[str]:
    """Lines of the sh blocks, continued ones joined, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the recipes, of which the one that is trained has a toy for its model, and consultations."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "recipes" / "qwen2.5-0.5b.yaml").write_text(SMALL, encoding="utf-8")
    loop = "severity: {control: uniform}\nas_published: {unnormalized: true}\n"
    (tmp_path / "recipes" / "as-published" / "al-atlas.yaml").write_text(SMALL + loop, encoding="utf-8")
    lines = (ROOT / "sevpeft" / "data" / "samples" / "consultations.jsonl").read_text(encoding="utf-8").splitlines()
    for name, columns in (
        *((f"{name}.csv", ["question", "answer"]) for name in ("consultations", "english")),
        ("labeled.csv", [*COLUMNS, "source"]),
        ("forum.csv", ["question", "answer"]),
    ):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(
                {**json.loads(line), "source": index % 3}
                for index, line in enumerate(
                    lines[:120:4] if name == "labeled.csv" else lines[120:140] if name == "forum.csv" else lines[:120]
                )
            )
    asked = {"question": "Which organ pumps blood?", "options": ["the heart", "the liver"], "answer_index": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(asked) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_the_commands_of_all_readmes_in_their_order(
    checkout: Path, quick_fits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[list[str]] = []
    # Runs that other READMEs speak of, as the first one's commands make them.
    ready = ["sevpeft train recipes/qwen2.5-0.5b.yaml data.path=builtin:consultations --output RUN"]
    for command in [*commands(READMES[0]), *ready, *(one for path in READMES[1:] for one in commands(path))]:
        line, _, target = command.partition(" > ")
        # Folds train every arm twice; they are test_compare.py's.
        words = [SHORTER.get(word, word) for word in shlex.split(line.replace(" --folds 2", ""))]
        words += ["--seeds", "0"] if words[1] == "compare" and "--seeds" not in words else []
        without_extra = words[1:2] == ["choices"] and importlib.util.find_spec("lm_eval") is None
        if words[0] != "sevpeft" or words in done or without_extra:
            continue
        if words[1] == "prepare" and done:
            shutil.rmtree(words[3])
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code in (0, None), command
        assert not target or target.endswith(".json")
        done.append(words)
    first = ["prepare", "annotate", "train", "evaluate", "compare", "report"]
    assert [words[1] for words in done[: len(first)]] == first
    assert (checkout / "runs" / "mine" / "adapter" / "adapter_model.safetensors").is_file()
    assert list((checkout / "comparison").glob("*.html"))


def test_launches_name_files_and_settings_that_exist() -> None:
    wrong = []
    for path in READMES:
        for command in commands(path):
            words = shlex.split(command.partition("&& ")[2] or command)
            if words[0] == "accelerate":
                config = words[words.index("--config_file") + 1]
                position = words.index("sevpeft") + 2
                settings = [word for word in words[position + 1 :] if re.match(r"[\w.]+=", word)]
                load_recipe(ROOT / words[position], settings)
                wrong += [] if (ROOT / config).is_file() else [command]
            elif words[:2] == ["python", "-m"]:
                wrong += [] if importlib.util.find_spec(words[2]) else [command]
    assert wrong == []


def test_the_readme_is_one_page_and_its_links_lead_somewhere() -> None:
    wrong = []
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            if not (path.parent / link).exists():
                wrong.append((path.name, link))
        if len(text.splitlines()) > 150:
            wrong.append((str(path), "more than 150 lines"))
    assert wrong == []


def test_the_table_of_recipes_is_the_folder() -> None:
    listed = set(re.findall(r"\]\(([\w.-]+\.yaml)\)", (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in (ROOT / "recipes").glob("*.yaml")}
