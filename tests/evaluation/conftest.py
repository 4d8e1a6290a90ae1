"""One small finished run for all tests of the room; a test that writes into it takes a copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sevpeft.evaluation import generate
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.training.train import train
from tests.models import build_model, build_tokenizer

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny Llama, trained for three steps: 60 rows, 11 of them for the test."""
    folder = tmp_path_factory.mktemp("model")
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    settings = [
        f"model.name_or_path={folder}",
        "data.max_rows=60",
        "training.max_steps=3",
        "training.max_length=256",
        "generation.max_new_tokens=8",
        "generation.per_device_eval_batch_size=4",
        "evaluation.bertscore=false",
        "evaluation.n_resamples=100",
    ]
    return train(load_recipe(QUICKSTART, settings), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(autouse=True, scope="module")
def _batching_measured_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of models that differ in their weights alone; what is measured is test_generate.py's."""
    measure, known = generate.batching_problem, dict[Any, str]()

    def measure_once(model: Any, end_id: int, **how: bool) -> str:
        key = (type(model), str(model.config), model.dtype, end_id, *how)
        if key not in known:
            known[key] = measure(model, end_id, **how)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_generate":
            patch.setattr(generate, "batching_problem", measure_once)
        yield


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """A copy of it, to be written into."""
    return Run(Path(shutil.copytree(finished_run.folder, tmp_path / "run")))
