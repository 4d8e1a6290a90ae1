"""The main job on a pretrained base model, in the number formats that people train in, by the real commands.

    SEVPEFT_REAL_MODEL=FOLDER pytest -n 0 tests/real

FOLDER holds a transformers model with its tokenizer, such as Gemma-3-270M. Its weights round as weights do: with random
ones, two harmless batch shapes give the same bits and no guard that is too strict would show. The rows are the bundled
consultations. About ten minutes on two cores. Training in bfloat16 is left out on a processor without AMX or
AVX512-BF16, which takes minutes for one step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sevpeft.modeling.loading import choose_precision
from sevpeft.modeling.packing import documents_stay_apart
from sevpeft.recipe import recipe_from_values

MODEL = os.environ.get("SEVPEFT_REAL_MODEL", "")
if not Path(MODEL).is_dir() or not MODEL:
    pytest.skip("SEVPEFT_REAL_MODEL names no folder of a pretrained model", allow_module_level=True)

ROOT = Path(__file__).parents[2]
FORMATS = {
    "float32": ("model.dtype=float32", "quantization.load_in_4bit=false"),
    "bfloat16": ("model.dtype=bfloat16", "quantization.load_in_4bit=false"),
    "4 bit": ("model.dtype=float32", "quantization.load_in_4bit=true"),
}
BFLOAT16 = choose_precision(recipe_from_values({"model": {"name_or_path": MODEL}})).dtype == torch.bfloat16
if not BFLOAT16:
    del FORMATS["bfloat16"]
RECIPE = [
    *("recipes/qwen2.5-0.5b.yaml", f"model.name_or_path={MODEL}", "data.path=builtin:consultations"),
    *("data.max_rows=80", "training.max_steps=4", "training.logging_steps=1", "training.save_steps=1"),
    *("training.save_strategy=steps", "training.save_total_limit=4", "lora.lora_dropout=0.1"),
]


def sevpeft(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sevpeft", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "COLUMNS": "200"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in log_of(run) if "loss" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, settings in FORMATS.items():
        made[name] = folder / name.replace(" ", "")
        sevpeft("train", *RECIPE, *settings, "--output", made[name])
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_documents_stay_apart_in_each_precision(dtype: torch.dtype) -> None:
    assert documents_stay_apart(AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)) == (True, "")


def test_each_format_trains_without_padding_and_its_choices_are_written_down(runs: dict[str, Path]) -> None:
    for name, run in runs.items():
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
        assert "padding_free: true" in recipe and "auto\n" not in recipe.split("training:")[1], name
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["after"]["loss"] < metrics["before"]["loss"], name


@pytest.mark.skipif("bfloat16" not in FORMATS, reason="this processor multiplies no bfloat16")
def test_bfloat16_trains_what_float32_trains(runs: dict[str, Path]) -> None:
    exact, rounded = losses_of(runs["float32"]), losses_of(runs["bfloat16"])
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_the_loss_does_not_depend_on_the_split(runs: dict[str, Path], tmp_path: Path) -> None:
    """One row after the other with recomputation, padded, against all at once without either."""
    other = ("training.per_device_train_batch_size=1", "training.gradient_checkpointing=true")
    sevpeft("train", *RECIPE, *FORMATS["float32"], *other, "training.padding_free=false", "--output", tmp_path / "run")
    # Dropout draws other numbers for other shapes; before the first update the losses differ by little else.
    first, last = losses_of(tmp_path / "run"), losses_of(runs["float32"])
    assert first == pytest.approx(last, rel=0.01)
    assert log_of(tmp_path / "run")[0]["eval_loss"] == pytest.approx(log_of(runs["float32"])[0]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_killed_run_gives_the_same_adapter(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    arguments = ["train", *RECIPE, *FORMATS[name], "--output", str(run)]
    started = subprocess.Popen([sys.executable, "-m", "sevpeft", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (run / "checkpoints" / "checkpoint-2" / "manifest.json").is_file():
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    sevpeft(*arguments, "--resume")
    whole, resumed = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (runs[name], run))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", list(FORMATS))
def test_questions_are_answered_together(runs: dict[str, Path], name: str) -> None:
    screen = sevpeft("evaluate", runs[name], "--limit", "6", "generation.max_new_tokens=6")
    assert "slower" not in screen and "one at a time" not in screen
    answers = [json.loads(line) for line in next(runs[name].glob("**/predictions.jsonl")).open(encoding="utf-8")]
    assert len(answers) >= 12


def test_a_4_bit_run_is_merged_into_what_was_trained(runs: dict[str, Path], tmp_path: Path) -> None:
    printed = sevpeft("merge", runs["4 bit"], tmp_path / "merged", "--json")
    figures, _ = json.JSONDecoder().raw_decode(printed[printed.index("{") :])
    gaps = {name: gap["kl"] for name, gap in figures["gaps"].items()}
    assert gaps["dequantized"] < 0.01 < gaps["unquantized"]
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
