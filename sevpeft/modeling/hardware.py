"""Finds out why this machine computes on no GPU, or not as a recipe asks, and says so with the remedy.

A build of PyTorch for CPUs on a machine with a GPU, a driver that is too old and a variable that hides the GPU all look
alike to a program: `torch.cuda.is_available()` is false. Each has another remedy.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

import torch
from bitsandbytes.cextension import BNBNativeLibrary, ErrorHandlerMockBNBNativeLibrary, lib

from sevpeft.errors import ModelError
from sevpeft.recipe import Recipe

# Where the driver of NVIDIA lists its devices while it is loaded.
DRIVER = Path("/proc/driver/nvidia")
_BY_BITSANDBYTES = re.compile(r".*8bit.*|paged_.*|.*_bnb.*|ademamix.*|lion.*|rmsprop_32bit")
_NOT_BY_BITSANDBYTES = ("adamw_torch_8bit", "galore_adamw_8bit", "galore_adamw_8bit_layerwise")


def dtype_of_cpu() -> torch.dtype:
    """bfloat16 where the processor multiplies matrices in it (AMX), else float32.

    By capability, never by timing, so that the same command gives the same adapter. One matrix product on 2 cores with
    AMX: 2,025 GFLOP/s in bfloat16, 287 in float32; with AVX2 alone, under load, 10 and 50. What a whole step gains
    there has not been measured: `python -m tests.benchmarks.real_model --dtypes` does it.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # absent before PyTorch 2.10
    return torch.bfloat16 if capabilities.get("amx_bf16") else torch.float32


def why_no_gpu(recipe: Recipe) -> str:
    """Why a run of this recipe has no GPU and what to do, as two clauses that end a sentence."""
    if recipe.training.settings().get("use_cpu"):
        return "training.use_cpu=true asks for the CPU; leave it out"
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "the launcher asks for the CPU; start it without --cpu or use_cpu"
    if torch.cuda.is_available():
        return "this run does not use it; leave out what asks for the CPU"
    built_for = torch.version.cuda or torch.version.hip
    if not _driver_is_there():
        return "this machine shows none; run it where `nvidia-smi` lists a GPU"
    if built_for is None:
        return (
            f"this PyTorch ({torch.__version__}) is built for CPUs, although the machine has an NVIDIA driver; install "
            "the CUDA build, with the command that https://pytorch.org/get-started/locally gives"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.fullmatch(r"\s*(\d+|GPU-\S+|MIG-\S+)(\s*,.*)?", visible):
        return (
            f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU from this process; unset it, or write the number of one"
        )
    return (
        f"PyTorch is built for CUDA {built_for} and finds no GPU behind the driver, which may be too old for it or not "
        "reach a GPU; see what `nvidia-smi` says, update the driver, or install the build of PyTorch for an older CUDA"
    )


def refuse_missing_bitsandbytes(recipe: Recipe) -> None:
    """Raises ModelError when the recipe needs bitsandbytes and its compiled library is not loaded.

    bitsandbytes is imported without an error then, and fails at the first matrix.
    """
    optim = str(recipe.training.settings().get("optim") or "")
    asked = next((f"quantization.load_in_{bits}bit=true" for bits in (4, 8) if _loads(recipe, bits)), None)
    if asked is None and _BY_BITSANDBYTES.fullmatch(optim) and optim not in _NOT_BY_BITSANDBYTES:
        asked = f"training.optim={optim}"
    if asked is None:
        return
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        raise ModelError(
            f"{asked} needs the compiled library of bitsandbytes, which could not be loaded here; see what "
            "`python -m bitsandbytes` says, and install it again with `pip install --force-reinstall bitsandbytes`."
        )
    if torch.cuda.is_available() and isinstance(lib, BNBNativeLibrary) and not lib.compiled_with_cuda:
        raise ModelError(
            f"{asked} needs bitsandbytes for GPUs, and the one that is loaded computes on CPUs only; see what "
            "`python -m bitsandbytes` says, and install it again with `pip install --force-reinstall bitsandbytes`."
        )


def refuse_bfloat16(setting: str) -> None:
    """Raises ModelError where the GPU of this process does not compute in bfloat16.

    Args:
        setting: that asks for it, as KEY=VALUE.
    """
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError(
            f"{setting}, but {torch.cuda.get_device_name()} does not compute in bfloat16; leave it out and float16 is "
            "used."
        )


def refuse_kernel_on_packed_weights(model: torch.nn.Module, name: str) -> None:
    """Raises ModelError when the training kernel of mamba_ssm would be given weights that bitsandbytes packs.

    It multiplies with `out_proj.weight` itself (transformers 5.24, Mamba-2 mixers of Falcon-H1, Bamba, Zamba2, …), and
    packed that is a row of bytes of another shape.

    Args:
        model: on whatever device; only its modules are looked at.
    """
    if importlib.util.find_spec("mamba_ssm") is None:
        return
    if any(hasattr(module, "A_log") and hasattr(module, "out_proj") for module in model.modules()):
        raise ModelError(
            f"{name} is trained by the kernel of mamba_ssm here, which cannot read the quantised weights of out_proj; "
            "run `pip uninstall mamba-ssm` (training is slower then), or leave the quantization out."
        )


def _driver_is_there() -> bool:
    return DRIVER.exists() or shutil.which("nvidia-smi") is not None


def _loads(recipe: Recipe, bits: int) -> bool:
    return bool(getattr(recipe.quantization, f"load_in_{bits}bit"))
