"""Fixtures of many tests. The libraries are loaded inside them, as the process that hands out tests needs none."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Workers share the cores, and threads that wait for one another's work turn in circles meanwhile.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bitsandbytes compiles functions as it is imported, which loads TorchInductor for three seconds; none is used here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest

from sevpeft.cli import main

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Cli = Callable[..., tuple[int, str, str]]

# Shared fixtures that take seconds to make. The tests that use one stay on one worker, so that it is made once.
_SLOW_TO_MAKE = ("finished_run", "finished", "pages", "trained", "fitted")

# Modules whose tests share what the first of them makes: runs of children, or traced memory plans.
_TOGETHER = ("test_killed", "test_distributed", "test_memory")


def pytest_itemcollected(item: pytest.Item) -> None:
    used = [name for name in _SLOW_TO_MAKE if name in getattr(item, "fixturenames", ())]
    if used or item.path.stem in _TOGETHER:
        group = "finished_run" if "finished_run" in used[:1] else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """Every training ends in a collection of garbage, which need not look at libraries and tests each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> Iterator[None]:
    """Nor at what the tests before have left behind: more libraries, and what is made once."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _signals_arrive() -> None:
    """Also where the tests run in the background of a script or under nohup, which switch some off for all children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_repeatable() -> None:
    import torch
    import transformers

    from tests.training.children import look_up_once

    torch.set_num_threads(1)
    torch.cpu.get_capabilities = dict  # float32 on whatever processor, in children too
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    look_up_once()


@pytest.fixture(autouse=True, scope="session")
def _toy_of_few_steps(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`builtin:tiny` with one layer and little training: what it is and answers matters in test_tiny.py alone."""
    from transformers import LlamaConfig

    from sevpeft.modeling import tiny

    def one_layer(**numbers: Any) -> Any:
        return LlamaConfig(**{**numbers, "num_hidden_layers": 1})

    folder = tmp_path_factory.getbasetemp() / "sevpeft-cache" / "models" / f"tiny-{tiny.VERSION}"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEVPEFT_CACHE", str(tmp_path_factory.getbasetemp() / "sevpeft-cache"))
        patch.setattr(tiny, "LlamaConfig", one_layer)
        tiny.make_tiny_model(folder, steps=20)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables of one test must not answer another one; the toy model is made once for all."""
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path_factory.getbasetemp() / "sevpeft-cache"))
    # `datasets` puts a copy in the place of os.environ when it maps with several processes, and rich goes on reading
    # the old one: a later test that sets COLUMNS would not be heard.
    monkeypatch.setattr(os, "environ", os.environ)
    yield


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the constant answer of an evaluation, each of which is compared with as many."""
    if scores := sys.modules.get("sevpeft.evaluation.scores"):
        monkeypatch.setattr(scores, "_CANDIDATES", 4)


@pytest.fixture
def quick_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers are fitted on two folds wherever more are made of their rows, and intervals have 20 draws."""
    from sevpeft.severity.classifier import calibrate, evaluate, linear
    from sevpeft.severity.classifier.examples import grouped_folds

    monkeypatch.setattr(evaluate, "RESAMPLES", 20)
    for module in (calibrate, evaluate, linear):
        monkeypatch.setattr(module, "grouped_folds", lambda examples, folds=2, **how: grouped_folds(examples, 2, **how))


@pytest.fixture
def sevpeft_(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs the command line in this process, in an empty folder: exit code, what it printed, what it complained of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sevpeft", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err + out and isinstance(left.value.code, int)
        return left.value.code, out, err

    return run


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from tests.models import build_tokenizer

    return build_tokenizer()


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with a small model of an architecture and its tokenizer, as a user would have it."""
    from tests.models import save_model

    def make(architecture: str = "llama", chat_template: str | None = None) -> Path:
        return save_model(tmp_path / f"tiny-{architecture}", architecture, chat_template)

    return make
