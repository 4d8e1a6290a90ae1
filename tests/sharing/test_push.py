"""What is pushed is what was trained and nothing else; the Hub's answers and an interruption are one sentence each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import sevpeft.sharing.push as pushing
from sevpeft.errors import SevpeftError, UsageError
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing import PushSettings
from sevpeft.sharing.card import write_card
from sevpeft.sharing.push import push
from tests.conftest import Cli
from tests.sharing.hub_server import TOKEN, HubServer, Repository, serving

SETTINGS: dict[str, Any] = {"base_model": "org/base", "license": "apache-2.0"}
ID, SECRET = "alice/adapter", "sk-" + "abcd1234" * 4
WORDS = ["base_model=org/base", "license=apache-2.0"]
PATIENT = "أنا من حي الزيتون وعندي سكر منذ عشر سنوات واسمي سعاد"
CLAUSE = "وابنتي ريم من مدرسة النور تسعل كل ليلة"
ADVICE = "راجع الطبيب، أو توجه إلى أقرب قسم طوارئ"  # in the card's own notice too
ANOTHER = "عملت عملية في مستشفى المدينة قبل شهرين مع الدكتور سامي"
EARLIER = "ابنتي ليلى في الصف الثالث وتتقيأ كل صباح منذ اسبوع"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture
def run(made_run: Callable[..., Run], tmp_path: Path) -> Run:
    rows = [
        {"question": f"{PATIENT}، {CLAUSE}. ما العلاج؟ {n}", "answer": f"{ADVICE}، {n}", "severity": "critical"}
        for n in range(40)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = made_run(data={"path": str(data)})
    write_card(run)
    return run


@pytest.fixture
def ready(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose files are collected already, and whose logits are given: for what happens between."""
    recipe = load_recipe(run.folder / "recipe.yaml")
    made = pushing._files(run, recipe, pushing.resolve_model(recipe).prompt, ID, "org/base", "apache-2.0")
    monkeypatch.setattr(pushing, "_files", lambda *_: made)
    monkeypatch.setattr(pushing, "check_contents", lambda *_: None)
    monkeypatch.setattr(pushing, "sample_texts", lambda *_: ([], ""))
    monkeypatch.setattr(pushing, "_logits", lambda *_: [])
    return run


def changed(run: Run, *settings: str) -> None:
    run.write_text("recipe.yaml", load_recipe(run.folder / "recipe.yaml", list(settings)).to_yaml())


def test_only_what_was_trained_leaves_and_comes_back_equal(
    run: Run, hub: HubServer, sevpeft_: Cli, tmp_path: Path
) -> None:
    for name in ("predictions.jsonl", "log.jsonl", "adapter/notes.txt", "adapter/training_args.bin"):
        (run.folder / name).write_text(f"{PATIENT} {SECRET} {run.folder}", encoding="utf-8")
    changed(
        run,
        "severity.source=linear",
        f"severity.classifier={tmp_path}/secret-clf",
        "evaluation.judge={model: m, url: 'http://intern.host/v1'}",
    )
    write_card(run)
    code, out, err = sevpeft_("push", run.folder, ID, *WORDS, "private=true", "--json")
    done = json.loads(out)
    assert code == 0 and TOKEN not in out + err
    repository = hub.repositories[ID]
    oid, files = repository.commits[-1]
    assert len(repository.commits) == 2 and repository.private and repository.tags == {done["tag"]: oid}
    assert done["commit"] == oid and done["answer_tokens"] > 20 and done["sent"]
    assert (
        files.keys() - {".gitattributes"}
        == done["files"].keys()
        == {
            *("README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.yaml"),
            *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
        }
    )
    assert files["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    bodies = hub.received + b"".join(files.values())
    for word in (PATIENT, SECRET, TOKEN, str(tmp_path), str(Path.home()) + "/", "intern.host"):
        assert word.encode() not in bodies and json.dumps(word)[1:-1].encode() not in bodies, word
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name, content in files.items():
        (pulled / name).write_bytes(content)
    assert PeftConfig.from_pretrained(pulled).base_model_name_or_path == "org/base"
    assert AutoTokenizer.from_pretrained(pulled).chat_template and load_recipe(pulled / "recipe.yaml")
    card = ModelCard.load(pulled / "README.md")
    assert (card.data.base_model, card.data.license, card.data.language) == ("org/base", "apache-2.0", "ar")
    assert f'from_pretrained(\n    "{ID}",' in card.text and "الحالات الطارئة" in card.text
    code, out, _ = sevpeft_("push", run.folder, ID, *WORDS)
    assert code == 0 and len(repository.commits) == 2 and "already there" in out and f"tag {done['tag']}" in out
    assert "equal logits on" in out and max(map(len, out.splitlines())) <= 80


def refusal(run: Run, repo_id: str = ID, **settings: Any) -> str:
    with pytest.raises(SevpeftError) as caught:
        push(run, repo_id, PushSettings(**{**SETTINGS, **settings}))
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 300, text
    for word in (TOKEN, SECRET, PATIENT, "Traceback"):
        assert word not in text
    assert isinstance(caught.value, UsageError) == ("REPO_ID" in text)
    return text


def test_what_may_not_leave_stops_before_anything_is_sent(run: Run, hub: HubServer, tmp_path: Path) -> None:
    recipe, card = (run.folder / "recipe.yaml").read_text("utf-8"), run.adapter / "README.md"
    own, weights = card.read_text("utf-8"), run.adapter / "adapter_model.safetensors"
    tensors, wrong = load_file(weights), []
    lines = [
        {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}
        for texts in ((EARLIER, "راجع الطبيب", "ومتى؟", "اليوم"), (ANOTHER, "نعم"))
    ]
    mix, source = f"data.mix={{sources: {{other: {tmp_path}/mix.jsonl}}, ratios: 50-50}}", tmp_path / "mix.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for what, make, remedy in (
        ("key in the card", lambda: card.write_text(f"{own}\nkey {SECRET}"), "secret key"),
        ("token in the card", lambda: card.write_text(f"{own}\n{TOKEN}"), "secret key"),
        ("folder in the card", lambda: card.write_text(f"{own}\nsee {run.folder}"), "folder of this machine"),
        ("patient in the card", lambda: card.write_text(own + PATIENT.replace(" ", "\n")), "sentence of the data"),
        ("patient in the prompt", lambda: changed(run, f"prompt.system={PATIENT}"), "sentence of the data"),
        ("clause in the prompt", lambda: changed(run, f"prompt.system={CLAUSE}"), "sentence of the data"),
        ("folder in the lora", lambda: changed(run, f"prompt.system={tmp_path}/data.jsonl"), "folder of this"),
        ("folder of a mix", lambda: changed(run, mix, f"prompt.system={tmp_path}/mix.jsonl"), "folder of this"),
        ("patient of a mix", lambda: changed(run, mix, f"prompt.system={ANOTHER}"), "sentence of the data"),
        ("earlier turn", lambda: changed(run, mix, f"prompt.system={EARLIER}"), "sentence of the data"),
        ("new key of GitHub", lambda: card.write_text(f"{own}\ngithub_pat_{'11AB_cd3' * 5}"), "secret key"),
        ("key in the weights", lambda: save_file(tensors, weights, {"format": "pt", "x": SECRET}), "secret key"),
        ("examples", lambda: changed(run, "prompt.examples=[{question: صداع, answer: راحة}]"), "examples=true"),
    ):
        make()
        found = refusal(run)
        wrong += [] if remedy in found else [(what, found)]
        card.write_text(own, encoding="utf-8")
        run.write_text("recipe.yaml", recipe)
        save_file(tensors, weights, {"format": "pt"})
    assert wrong == [] and hub.requests == []
    changed(run, "prompt.examples=[{question: صداع, answer: راحة}]")
    assert push(run, ID, PushSettings(**SETTINGS, examples=True), dry_run=True)["files"]["chat_template.jinja"]


def test_every_refusal_is_one_sentence_with_its_remedy(
    ready: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def no_token() -> None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))

    def answers(part: str, status: int) -> Callable[[], None]:
        return lambda: setattr(hub, "play", lambda method, path: status if part in path else None)

    def taken(**files: bytes) -> Callable[[], None]:
        return lambda: hub.repositories.setdefault(ID, Repository()).commit({"model.bin": b"x"}) and None

    wrong = []
    for what, make, settings, remedy in (
        ("malformed", lambda: None, {"repo_id": "no id"}, "NAME/REPOSITORY"),
        ("no owner", lambda: None, {"repo_id": "adapter"}, "NAME/REPOSITORY"),
        ("another's name", lambda: None, {"repo_id": "bob/adapter"}, "alice, clinic"),
        ("offline", offline, {}, "--dry-run"),
        ("no token", no_token, {}, "hf auth login"),
        ("wrong token", lambda: monkeypatch.setenv("HF_TOKEN", "hf_wrong"), {}, "hf auth login"),
        ("no permission", answers("repos/create", 403), {}, "may not write"),
        ("may not commit", answers("/commit/", 403), {}, "may not write"),
        ("name taken", taken(), {}, "parent_commit="),
        ("public", taken(), {"private": True}, "make it private"),
        ("commit meanwhile", answers("/commit/", 412), {}, "newer commit"),
        ("card refused", answers("validate-yaml", 400), {}, "YAML"),
        ("too many", answers("whoami", 429), {}, "same command again"),
        ("Hub down", answers("whoami", 500), {}, "same command again"),
        ("no license", lambda: None, {"license": None}, "license=NAME"),
        ("none stated", lambda: None, {"license": "none stated"}, "ask its owner"),
        ("no derivatives", lambda: None, {"license": "CC-BY-ND-4.0"}, "ask its owner"),
        ("name of the license", lambda: None, {"license": "llama3.1"}, "NAME/Llama-"),
        ("base of nowhere", lambda: None, {"base_model": None}, "base_model=NAME/MODEL"),
    ):
        with monkeypatch.context():
            hub.repositories.clear()
            hub.play = lambda method, path: None
            monkeypatch.setenv("HF_TOKEN", TOKEN)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            make()
            found = refusal(ready, **settings)
            wrong += [] if remedy in found else [(what, found)]
    assert wrong == []


def test_a_cut_push_goes_on_and_a_newer_commit_is_never_covered(
    ready: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, cuts = [], [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/tag/"), ("GET", "/resolve/")]
    for method, part in cuts:
        hub.play = lambda m, path, method=method, part=part: 0 if m == method and part in path else None
        assert "same command again" in refusal(ready)
        done.append(len(hub.repositories[ID].commits))
    hub.play = lambda method, path: None
    assert done == [1, 1, 2, 2]
    assert not push(ready, ID, PushSettings(**SETTINGS))["sent"] and len(hub.large) == 1
    # Somebody edits the card there; and between the look and the commit, once more.
    repository = hub.repositories[ID]
    newer = repository.commit({"README.md": b"edited"})
    assert f"parent_commit={newer[:12]}" in refusal(ready) and repository.commits[-1][0] == newer

    def meanwhile(method: str, path: str) -> None:
        if "/preupload/" in path:
            repository.commit({"other": b"x"})

    hub.play = meanwhile
    assert "newer commit" in refusal(ready, parent_commit=newer[:12])
    assert repository.commits[-1][1]["README.md"] == b"edited"
    hub.play = lambda method, path: None
    push(ready, ID, PushSettings(**SETTINGS, parent_commit=repository.commits[-1][0]))
    assert repository.commits[-1][1]["other"] == b"x" and repository.commits[-1][1]["README.md"] != b"edited"


def test_it_is_not_done_before_bytes_and_logits_are_equal(
    ready: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, pulled, other = Repository.commit, [], {"recipe.yaml": b"{}"}
    with monkeypatch.context() as patch:
        patch.setattr(Repository, "commit", lambda self, of: commit(self, {**of, **(other if len(of) > 1 else {})}))
        assert "recipe.yaml" in refusal(ready)
    monkeypatch.setattr(
        pushing, "_logits", lambda _, at, texts: [torch.tensor(float(pulled.append(at) or len(pulled)))]
    )
    assert "logits" in refusal(ready, "alice/another")
    assert pulled[0] == ready.adapter and ready.folder not in pulled[1].parents


def test_a_dry_run_shows_all_that_would_leave_without_network_or_token(
    run: Run, hub: HubServer, sevpeft_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = sevpeft_("push", run.folder, ID, *WORDS, "--dry-run")
    assert code == 0 and hub.requests == [], err
    assert "Not a medical device" in out and "adapter_model.safetensors (" in out and "Nothing was sent" in out
    code, out, _ = sevpeft_("push", run.folder, ID, *WORDS, "--dry-run", "--json")
    about = json.loads(out)
    assert code == 0 and about["files"]["README.md"] == len(about["card"].encode())
    assert about["files"]["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").stat().st_size
    (run.adapter / "README.md").write_text("---\nlicense: mit\n---\nMy own card.\n", encoding="utf-8")
    assert "My own card." in sevpeft_("push", run.folder, ID, *WORDS, "--dry-run")[1]
    for words, status, remedy in (
        ([ID, *WORDS], 1, "hf auth login"),
        (["no id", *WORDS], 2, "NAME/REPOSITORY"),
        ([ID, "privat=true"], 2, "private"),
        ([ID, "base_model=x", "license=mit"], 2, "base_model"),
    ):
        code, _, err = sevpeft_("push", run.folder, *words)
        assert code == status and remedy in err, words
    metrics = (run.folder / "metrics.json").read_text("utf-8")
    (run.folder / "metrics.json").write_text("{}")
    code, _, err = sevpeft_("push", run.folder, ID, *WORDS, "--dry-run")
    assert code == 1 and "metrics.json" in err
    (run.folder / "metrics.json").write_text(metrics)
    base = Path(load_recipe(run.folder / "recipe.yaml").model.name_or_path)
    base.rename(base.with_name("moved"))
    code, _, err = sevpeft_("push", run.folder, ID, *WORDS, "--dry-run")
    assert code == 1 and "model.name_or_path" in err
