"""Runs as a training leaves them, with adapters whose weights are drawn, so that every variant takes no training."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from sevpeft.modeling.adapters import lora_config, sort_target_modules
from sevpeft.modeling.loading import Precision, load_model
from sevpeft.recipe import Recipe, recipe_from_values
from sevpeft.runs import Run
from sevpeft.sharing import merge
from tests.models import save_model

FLOAT32 = Precision(torch.float32, bf16=False, fp16=False)
# gemma3's vision tower and what PEFT cannot adapt of a Mamba are left alone, as in the recipes.
TARGETS: dict[str, dict[str, Any]] = {
    "gemma3": {"target_modules": r".*language_model.*(q_proj|o_proj|down_proj)"},
    "falcon_h1": {"exclude_modules": ["out_proj", "conv1d"]},
}
METRICS = {
    "data": {
        "fingerprint": "sha256:0",
        "split_by": "column split",
        "questions_in_two_splits": 0,
        "rejected": {},
        "encoding": {
            "train": {"rows": 30, "answer_tokens": 900, "shortened": 0, "refused": 0},
            "validation": {"rows": 10, "answer_tokens": 300, "shortened": 0, "refused": 0},
        },
    },
    "weights": {
        **{"consultations": 30, "minimum": 0.5, "maximum": 1.5, "mean": 1.0, "effective_sample_size": 25.0},
        "severities": {"non_critical": 10, "neutral": 10, "critical": 10},
    },
    "training": {"steps": 4, "epochs": 1.0},
    "before": {"loss": 5.0},
    "after": {"loss": 4.0},
}


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On which models are compared; a merging that went wrong shows on each of them."""
    monkeypatch.setattr(merge, "CONSULTATIONS", 4)


@pytest.fixture(autouse=True, scope="module")
def _rows_once() -> Iterator[None]:
    """Of the bundled consultations: each merging would read and split them anew."""
    load, known = merge.load_splits, dict[str, Any]()

    def load_once(recipe: Recipe) -> Any:
        if recipe.data.path != "builtin:consultations":
            return load(recipe)
        key = recipe.data.model_dump_json() + recipe.severity.model_dump_json() + recipe.prompt.model_dump_json()
        if key not in known:
            known[key] = load(recipe)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "load_splits", load_once)
        yield


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a base model and a finished run on it, made once for each of the arguments."""

    @functools.cache
    def make(architecture: str, size: float, chat_template: str | None, sections_as_json: str) -> Path:
        place, sections = tmp_path_factory.mktemp("made"), json.loads(sections_as_json)
        folder = save_model(place / f"tiny-{architecture}", architecture, chat_template)
        lora = {"r": 4, "lora_alpha": 8} | TARGETS.get(architecture, {}) | sections.pop("lora", {})
        short = {"max_length": 160}  # rows of some 400 tokens by the small tokenizer
        values = {"model": {"name_or_path": str(folder)}, "lora": lora, "training": short, **sections}
        recipe = recipe_from_values(values)
        base = load_model(recipe, FLOAT32)
        torch.manual_seed(7)
        model = get_peft_model(base, lora_config(recipe, base))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * size)
        run = Run(place / "run")
        run.folder.mkdir()
        model.save_pretrained(run.adapter)
        sort_target_modules(run.adapter)
        run.write_text("recipe.yaml", recipe.to_yaml())
        bits = next((bits for bits in (4, 8) if getattr(recipe.quantization, f"load_in_{bits}bit")), None)
        about = {
            **{"name_or_path": str(folder), "model_type": base.config.model_type, "dtype": "float32", "bits": bits},
            **{"parameters": 1000, "trainable_parameters": 100},
        }
        run.write_json("metrics.json", {"model": about, **METRICS})
        environment = {
            "versions": {"peft": "0.21.2"},
            "seed": 0,
            "processes": 1,
            "device": "cpu",
            "python": "3.11",
            "commit": None,
        }
        run.write_json("environment.json", environment)
        return place

    return make


@pytest.fixture
def made_run(tmp_path: Path, _made: Callable[..., Path]) -> Callable[..., Run]:
    """Makes a finished run on a small model; every trainable weight is moved by about `size`."""

    def make(
        architecture: str = "llama",
        size: float = 0.05,
        name: str = "run",
        chat_template: str | None = None,
        **sections: Any,
    ) -> Run:
        place = _made(architecture, size, chat_template, json.dumps(sections))
        model, run = f"tiny-{architecture}", Run(tmp_path / name)
        shutil.copytree(place / model, tmp_path / model, dirs_exist_ok=True)
        shutil.copytree(place / "run", run.folder)
        for path in (run.folder / "recipe.yaml", run.folder / "metrics.json", run.adapter / "adapter_config.json"):
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(str(place / model), str(tmp_path / model)), encoding="utf-8")
        return run

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder with safetensors."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
