"""The toy model comes out the same every time, knows the training part only, and is made once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sevpeft.data.read import load_consultations
from sevpeft.modeling import tiny
from sevpeft.modeling.tiny import make_tiny_model, tiny_model_folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy that was made while the random numbers stood elsewhere."""
    folder = tmp_path_factory.mktemp("toy") / "toy"
    torch.manual_seed(5)
    random.seed(5)
    make_tiny_model(folder, steps=2)
    return folder


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_two_makings_give_the_same_bytes_and_leave_no_trace(toy: Path, tmp_path: Path, two_threads: None) -> None:
    torch.manual_seed(6)
    random.seed(6)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    make_tiny_model(tmp_path / "other", steps=2)
    assert torch.equal(states[0], torch.get_rng_state()) and torch.get_num_threads() == 2
    assert np.array_equal(states[1], np.random.get_state()[1]) and states[2] == random.getstate()
    one, two = files(toy), files(tmp_path / "other")
    assert one == two and {"model.safetensors", "config.json", "tokenizer.json"} <= one.keys()


def test_threads_and_random_numbers_are_given_back_when_making_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    def fail(*_: object) -> None:
        torch.rand(3)
        raise RuntimeError("no")

    monkeypatch.setattr(tiny, "_pretrain", fail)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        make_tiny_model(tmp_path / "toy")
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == 2


def test_only_the_training_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = load_consultations("builtin:consultations")

    def mark(row: dict[str, str]) -> dict[str, str]:
        return {name: f"{row[name]} {row['split']}mark" for name in ("question", "answer")}

    marked = real.rows.map(mark, load_from_cache_file=False, keep_in_memory=True)
    monkeypatch.setattr(tiny, "load_consultations", lambda _: type(real)(marked, {}, {}, "", ""))
    read: list[str] = []
    tokenizer, pretrain = tiny._tokenizer, tiny._pretrain

    def spy(texts: list[str]) -> object:
        read.extend(texts)
        return tokenizer(texts)

    def spy_too(made: object, texts: list[str], steps: int) -> object:
        read.extend(texts)
        return pretrain(made, texts, steps)

    monkeypatch.setattr(tiny, "_tokenizer", spy)
    monkeypatch.setattr(tiny, "_pretrain", spy_too)
    make_tiny_model(tmp_path / "toy", steps=1)
    assert len(read) == 2 * 2 * 300 and all(text.endswith(" trainmark") for text in read)


def test_the_toy_is_a_model_with_a_tokenizer_that_fits_it(toy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy)
    tokenizer = AutoTokenizer.from_pretrained(toy)
    assert len(tokenizer) == model.config.vocab_size == tiny.VOCABULARY
    assert tokenizer.eos_token_id == model.config.eos_token_id != tokenizer.pad_token_id == model.config.pad_token_id
    text = "عندي صداع 39.5°C منذ يومين 😷"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(0.8e6, rel=0.1)


# The folder in the cache


@pytest.fixture
def makings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Empty cache, and a maker that takes its time and is counted."""
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        threading.Event().wait(0.2)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(tiny, "make_tiny_model", make)
    return made


def test_the_folder_is_used_again(makings: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model_folder()
    assert "toy" in capsys.readouterr().err and folder.name == f"tiny-{tiny.VERSION}"
    assert tiny_model_folder() == folder and len(makings) == 1
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert {path.name for path in folder.parent.iterdir()} <= {folder.name, f"{folder.name}.lock"}


def test_several_at_once_make_it_once_and_none_sees_half_of_it(makings: list[Path]) -> None:
    complete: list[bool] = []

    def make() -> None:
        complete.append((tiny_model_folder() / "model.safetensors").read_bytes() == b"weights")

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert complete == [True] * 4 and len(makings) == 1


def test_a_failed_making_leaves_nothing_that_looks_like_a_model(
    makings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Callable[[Path], None] = tiny.make_tiny_model

    def fail(folder: Path) -> None:
        counted(folder)
        raise RuntimeError("no")

    monkeypatch.setattr(tiny, "make_tiny_model", fail)
    with pytest.raises(RuntimeError):
        tiny_model_folder()
    monkeypatch.setattr(tiny, "make_tiny_model", counted)
    assert (tiny_model_folder() / "model.safetensors").exists() and len(makings) == 2
