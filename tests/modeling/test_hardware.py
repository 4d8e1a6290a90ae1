"""A machine that cannot do what a recipe asks says why, and each reason has its own remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary

from sevpeft.errors import ModelError
from sevpeft.modeling import hardware
from sevpeft.modeling.hardware import refuse_missing_bitsandbytes, why_no_gpu
from sevpeft.modeling.loading import choose_precision, load_model, refuse_hopeless_start
from sevpeft.recipe import Recipe, recipe_from_values

ROOT = Path(__file__).parent.parent.parent
BIG = {"model": {"name_or_path": "some/model"}, "about": {"parameters": "8B"}, "quantization": {"load_in_4bit": True}}


def recipe_with(**sections: dict[str, Any]) -> Recipe:
    return recipe_from_values(sections)


def machine(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    cuda: str | None,
    driver: bool,
    visible: str | None = None,
) -> None:
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hardware, "DRIVER", tmp_path if driver else tmp_path / "none")


@pytest.mark.parametrize(
    ("there", "reason", "remedy"),
    [
        ({"cuda": None, "driver": False}, "this machine shows none", "run it where `nvidia-smi` lists a GPU"),
        ({"cuda": "13.0", "driver": False}, "this machine shows none", "run it where `nvidia-smi` lists a GPU"),
        ({"cuda": None, "driver": True}, "is built for CPUs, although the machine has", "install the CUDA build"),
        ({"cuda": "13.0", "driver": True}, "built for CUDA 13.0 and finds no GPU", "update the driver"),
        ({"cuda": "13.0", "driver": True, "visible": "0"}, "built for CUDA 13.0 and finds no GPU", "update the driver"),
        ({"cuda": "13.0", "driver": True, "visible": ""}, "CUDA_VISIBLE_DEVICES='' hides every GPU", "unset it"),
        ({"cuda": "13.0", "driver": True, "visible": "-1"}, "CUDA_VISIBLE_DEVICES='-1' hides every GPU", "unset it"),
    ],
)
def test_each_reason_for_no_gpu_has_its_remedy(
    there: dict[str, Any], reason: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, tmp_path, **there)
    text = why_no_gpu(recipe_with())
    assert reason in text and remedy in text and "\n" not in text
    for action in (
        lambda: refuse_hopeless_start(recipe_from_values(BIG)),
        lambda: choose_precision(recipe_with(training={"fp16": True})),
    ):
        with pytest.raises(ModelError, match="needs a CUDA GPU") as caught:
            action()
        assert text in str(caught.value)


def test_a_program_of_that_name_is_a_sign_of_a_driver_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path, cuda=None, driver=False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "install the CUDA build" in why_no_gpu(recipe_with())


def test_who_asked_for_the_cpu_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path, cuda="13.0", driver=True)
    assert "training.use_cpu=true asks for the CPU" in why_no_gpu(recipe_with(training={"use_cpu": True}))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert "the launcher asks for the CPU" in why_no_gpu(recipe_with())


# Number formats


@pytest.mark.parametrize(
    ("sections", "setting"),
    [
        ({"training": {"bf16": True}}, "training.bf16=true"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype=bfloat16"),
        (
            {"quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}},
            "quantization.bnb_4bit_compute_dtype=bfloat16",
        ),
    ],
)
def test_bfloat16_that_the_gpu_does_not_compute_in_is_one_sentence(
    sections: dict[str, Any], setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(hardware.lib, "compiled_with_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ModelError) as caught:
        choose_precision(recipe_with(**sections))
    assert str(caught.value) == (
        f"{setting}, but Tesla T4 does not compute in bfloat16; leave it out and float16 is used."
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision(recipe_with(**sections)).dtype == torch.bfloat16


def test_a_compute_dtype_without_quantisation_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    found = choose_precision(recipe_with(quantization={"bnb_4bit_compute_dtype": "bfloat16"}))
    assert (found.dtype, found.fp16) == (torch.float16, True)


# bitsandbytes


def needing() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"quantization": {"load_in_4bit": True}}, "quantization.load_in_4bit=true"),
        ({"quantization": {"load_in_8bit": True}}, "quantization.load_in_8bit=true"),
        *(
            ({"training": {"optim": optim}}, f"training.optim={optim}")
            for optim in ("paged_adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix")
        ),
    ]


@pytest.mark.parametrize(("sections", "setting"), needing())
def test_bitsandbytes_without_its_library_is_refused_where_it_is_needed(
    sections: dict[str, Any], setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_missing_bitsandbytes(recipe_with(**sections))
    monkeypatch.setattr(hardware, "lib", ErrorHandlerMockBNBNativeLibrary("gone"))
    with pytest.raises(ModelError) as caught:
        choose_precision(recipe_with(**sections))
    text = str(caught.value)
    assert text.startswith(f"{setting} needs the compiled library of bitsandbytes") and text.endswith(".")
    assert "python -m bitsandbytes" in text and "pip install --force-reinstall bitsandbytes" in text


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_8bit", "adafactor", "sgd", "rmsprop"])
def test_what_does_without_bitsandbytes_is_not_refused(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "lib", ErrorHandlerMockBNBNativeLibrary("gone"))
    refuse_missing_bitsandbytes(recipe_with(training={"optim": optim}))


def test_a_library_for_cpus_is_not_enough_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware.lib, "compiled_with_cuda", False, raising=False)
    with pytest.raises(ModelError, match="the one that is loaded computes on CPUs only"):
        refuse_missing_bitsandbytes(recipe_with(quantization={"load_in_4bit": True}))


def test_a_bitsandbytes_whose_file_is_gone_is_noticed_by_the_command(tmp_path: Path) -> None:
    package = Path(bitsandbytes.__file__).parent
    copy = tmp_path / "bitsandbytes"
    copy.mkdir()
    for entry in package.iterdir():
        if not entry.name.startswith("libbitsandbytes"):
            (copy / entry.name).symlink_to(entry)
    for file in package.glob("*.py"):  # the folder of the package is where its first file really lies
        (copy / file.name).unlink()
        (copy / file.name).write_bytes(file.read_bytes())
    words = ["train", "recipes/quickstart.yaml", "quantization.load_in_4bit=true", "--output", str(tmp_path / "run")]
    said = subprocess.run(
        [sys.executable, "-m", "sevpeft", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1 and not (tmp_path / "run").exists()
    assert "quantization.load_in_4bit=true needs the compiled library of bitsandbytes" in said.stderr + said.stdout
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize(("architecture", "refused"), [("falcon_h1", True), ("lfm2", False), ("llama", False)])
def test_a_kernel_that_cannot_read_packed_weights_is_refused_where_it_would_be_used(
    architecture: str, refused: bool, model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"name_or_path": str(model_folder(architecture))}
    recipe = recipe_with(model=name, quantization={"load_in_4bit": True})
    float32 = choose_precision(recipe)
    load_model(recipe, float32)
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    if refused:
        with pytest.raises(ModelError, match=r"kernel of mamba_ssm here, .* run `pip uninstall mamba-ssm`"):
            load_model(recipe, float32)
    else:
        load_model(recipe, float32)
    load_model(recipe_with(model=name), float32)
