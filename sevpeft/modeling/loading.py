"""Loading of the base model: precision, configuration, tokenizer and weights, quantized or not.

Only safetensors weights are read and no code from the Hub is run. Both rules are passed to transformers explicitly,
because a hospital's machine should not depend on a library's default.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sevpeft.data.read import look_for_hub
from sevpeft.errors import ModelError, loading_errors
from sevpeft.modeling.compat import (
    cpu_requested,
    disable_cpu_avx512_repack,
    fsdp_requested,
    knows_quantization,
    on_meta_device,
    weights_are_sharded,
    zero3,
)
from sevpeft.modeling.packing import attend_within_documents
from sevpeft.modeling.prompts import choose_pad_token
from sevpeft.modeling.tiny import TINY, tiny_model_folder
from sevpeft.recipe import Recipe

# A model of this size takes about a second for one step on two cores in 4 bit; a larger one takes hours per epoch.
LARGEST_QUANTIZED_ON_CPU = 1_500_000_000
# Where the driver of NVIDIA lists its devices while it is loaded.
DRIVER = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class Precision:
    """Number formats of a run: `dtype` of the frozen weights, and which mixed precision the trainer uses."""

    dtype: torch.dtype
    bf16: bool
    fp16: bool


def uses_gpu(recipe: Recipe) -> bool:
    """Whether the run computes on a CUDA device (one is there, and neither recipe nor launcher asks for the CPU)."""
    return torch.cuda.is_available() and not recipe.training.settings().get("use_cpu") and not cpu_requested()


def choose_precision(recipe: Recipe, dtype_before: str | None = None) -> Precision:
    """Number formats for this recipe on this machine: by capability, so that the same command gives the same adapter.

    Args:
        dtype_before: of the run that is resumed, where the recipe leaves it open.

    Raises:
        ModelError: float16 training asked for on a CPU, or bfloat16 on a GPU that does not compute in it.
    """
    settings, quantization, gpu = recipe.training.settings(), recipe.quantization, uses_gpu(recipe)
    bf16, fp16 = settings.get("bf16"), settings.get("fp16")
    native_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if fp16 and not gpu:
        raise ModelError(f"training.fp16=true needs a CUDA GPU, and {why_no_gpu(recipe)}; without fp16 a CPU is used.")
    if gpu and not native_bf16:  # PyTorch would emulate it, many times slower
        for setting, asked in {
            "training.bf16": bf16,
            "model.dtype": recipe.model.dtype == "bfloat16",
            "quantization.bnb_4bit_compute_dtype": quantization.load_in_4bit
            and quantization.bnb_4bit_compute_dtype == "bfloat16",
        }.items():
            if asked:
                raise ModelError(
                    f"{setting} asks for bfloat16, in which {torch.cuda.get_device_name()} does not compute; leave it "
                    "out and float16 is used."
                )
    wanted = dtype_before if recipe.model.dtype == "auto" and dtype_before else recipe.model.dtype
    if wanted != "auto":
        dtype = getattr(torch, wanted)
    elif bf16 or fp16:
        dtype = torch.bfloat16 if bf16 else torch.float16
    elif gpu:
        dtype = torch.bfloat16 if native_bf16 else torch.float16
    else:
        dtype = dtype_of_cpu()
    if bf16 is None and fp16 is None:
        bf16, fp16 = dtype == torch.bfloat16, gpu and dtype == torch.float16
    return Precision(dtype, bf16=bool(bf16), fp16=bool(fp16))


def dtype_of_cpu() -> torch.dtype:
    """bfloat16 where the processor multiplies matrices in it (AMX), else float32.

    One matrix product on 2 cores with AMX: 2,025 GFLOP/s in bfloat16, 287 in float32; with AVX2 alone, 10 and 50.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # absent before PyTorch 2.10
    return torch.bfloat16 if capabilities.get("amx_bf16") else torch.float32


def why_no_gpu(recipe: Recipe) -> str:
    """Why a run of this recipe has no GPU and what to do, as two clauses that end a sentence.

    A PyTorch for CPUs, a driver that is too old and a variable that hides the GPU look alike to a program.
    """
    if recipe.training.settings().get("use_cpu") or cpu_requested():
        return "the recipe or the launcher asks for the CPU; leave training.use_cpu and --cpu out"
    if not DRIVER.exists() and shutil.which("nvidia-smi") is None:
        return "this machine shows none; run it where `nvidia-smi` lists a GPU"
    if not (built_for := torch.version.cuda or torch.version.hip):
        page = "https://pytorch.org/get-started/locally"
        return f"this PyTorch ({torch.__version__}) is built for CPUs; install the CUDA build as {page} says"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} may hide it from this process; unset it, or write the number of one"
    return (
        f"PyTorch, built for CUDA {built_for}, finds none behind the driver; see what `nvidia-smi` says, update the "
        "driver, or install the build of PyTorch for an older CUDA"
    )


def quantization_config(recipe: Recipe, precision: Precision) -> BitsAndBytesConfig | None:
    """bitsandbytes settings of the recipe, with `auto` resolved; None when nothing is quantized.

    Raises:
        ModelError: quantized weights in a form that the engine of this launch cannot divide.
    """
    asked = recipe.quantization
    if asked.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not asked.load_in_4bit:
        return None
    compute = asked.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=asked.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=asked.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=precision.dtype if compute == "auto" else getattr(torch, compute),
        bnb_4bit_quant_storage=_quant_storage(asked.bnb_4bit_quant_storage, precision),
    )


def _quant_storage(asked: str, precision: Precision) -> torch.dtype:
    """Type in which 4-bit weights are stored.

    FSDP and ZeRO-3 divide parameters of a floating type only and cast those of a layer to the one that is computed in:
    whole bytes would stay on every GPU, and another floating type would be rounded into garbage.
    """
    if not weights_are_sharded():
        return torch.uint8 if asked == "auto" else getattr(torch, asked)
    needed = torch.bfloat16 if precision.bf16 else torch.float16 if precision.fp16 else precision.dtype
    if asked not in ("auto", str(needed).removeprefix("torch.")):
        raise ModelError(
            f"quantization.bnb_4bit_quant_storage={asked} does not work where FSDP or ZeRO-3 divides the weights, "
            f"which are {str(needed).removeprefix('torch.')} here; write auto, or leave it out."
        )
    return needed


def load_config(recipe: Recipe) -> PretrainedConfig:
    """Configuration of the base model, from a folder, the Hub or `builtin:tiny`.

    Raises:
        ModelError: it cannot be read, or its files are quantized in a way that transformers would ignore.
    """
    name = resolved_name(recipe)
    if not Path(name).is_dir():
        look_for_hub()
    with _errors(recipe):
        config = AutoConfig.from_pretrained(name, **_origin(recipe))
        method = _own_quantization(config).get("quant_method")
        # transformers warns, on a screen that is quiet here, and loads bare numbers as if they were weights.
        if method is not None and not knows_quantization(_own_quantization(config)):
            raise ModelError(
                f"{recipe.model.name_or_path} is quantized by {method!r}, which transformers does not know and takes "
                "for unquantized; name the model before it was quantized."
            )
    return config


def check_form(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raises ModelError where bitsandbytes wrote the files in another form than the recipe's; theirs would be taken."""
    own, asked = _own_quantization(config), recipe.quantization
    keys = ["load_in_4bit", "load_in_8bit"] if own.get("load_in_4bit") or own.get("load_in_8bit") else []
    if own.get("load_in_4bit"):
        keys += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant"]
    other = [f"quantization.{key}={own[key]}" for key in keys if key in own and own[key] != getattr(asked, key)]
    if other:
        raise ModelError(
            f"The files of {recipe.model.name_or_path} are quantized in another form than the recipe asks for; set "
            f"{' '.join(other).lower()}, or name the model before it was quantized."
        )


def load_tokenizer(recipe: Recipe, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Tokenizer of the base model, with a pad token that lies within the vocabulary.

    Raises:
        ModelError: it cannot be read, or it knows no words (transformers makes up an empty one without files).
    """
    with _errors(recipe):
        tokenizer = AutoTokenizer.from_pretrained(resolved_name(recipe), **_origin(recipe))
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"{recipe.model.name_or_path} has no tokenizer that can be read; put its tokenizer.json there."
        )
    choose_pad_token(tokenizer, config.get_text_config().vocab_size)
    return tokenizer


def load_model(recipe: Recipe, precision: Precision | None, device_index: int = 0) -> PreTrainedModel:
    """The base model: on the device of this process if the recipe quantizes it, else on the CPU.

    Args:
        precision: None for the weights as they are stored, not quantized.
        device_index: of the CUDA device of this process.

    Raises:
        ModelError: folder without config or with pickle weights only, id not reachable, attention not supported,
            weights damaged or missing.
    """
    attend_within_documents()
    load_config(recipe)  # for its checks
    dtype = precision.dtype if precision else "auto"
    arguments: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **_origin(recipe)}
    if recipe.model.attn_implementation:
        arguments["attn_implementation"] = recipe.model.attn_implementation
    quantization = quantization_config(recipe, precision) if precision else None
    if quantization is not None:
        arguments["quantization_config"] = quantization
        if not zero3():  # transformers refuses a device_map there
            # FSDP moves one layer after the other to the GPU and keeps its part, so that the whole need not fit there.
            on_gpu = uses_gpu(recipe) and not fsdp_requested()
            arguments["device_map"] = {"": device_index if on_gpu else "cpu"}
    with _errors(recipe):
        model, loading = AutoModelForCausalLM.from_pretrained(
            resolved_name(recipe), output_loading_info=True, **arguments
        )
    if absent := sorted(loading["missing_keys"]):
        # transformers fills them with random numbers and goes on; the adapter would be trained on noise.
        raise ModelError(
            f"{recipe.model.name_or_path} lacks {len(absent)} of the weights that its config.json asks for, such as "
            f"{absent[0]}; fetch it again, or name a model that is complete."
        )
    _check_scales(recipe.model.name_or_path, model, loading["unexpected_keys"])
    model.config.use_cache = False
    disable_cpu_avx512_repack(model)
    return model


def load_for_inference(recipe: Recipe) -> PreTrainedModel:
    """The base model as it was trained on, in evaluation mode, on the device of this process."""
    model = load_model(recipe, choose_precision(recipe))
    if uses_gpu(recipe) and not recipe.quantization.quantised():
        model = model.to("cuda")
    return model.eval()


def _check_scales(name: str, model: torch.nn.Module, unexpected: Iterable[str]) -> None:
    """Raises ModelError where the files hold scales of weights, and nothing multiplies the weights by them.

    NVIDIA's ModelOpt describes them in hf_quant_config.json, which transformers (5.24) does not read.
    """
    weights = {key for key, _ in model.named_parameters()}
    for key in unexpected:
        module, _, last = key.rpartition(".")
        if "scale" in last and f"{module}.weight" in weights:
            raise ModelError(
                f"{name} is quantized, as {key} shows, and its config.json does not say how; name the model before it "
                "was quantized."
            )


def check_hopeless_start(recipe: Recipe) -> None:
    """Raises ModelError for a 4- or 8-bit model on a CPU whose size says that it was meant for a GPU.

    The size is the recipe's own statement where there is one, so that nothing is downloaded only to be refused; a
    folder's model is counted.
    """
    if uses_gpu(recipe) or not recipe.quantization.quantised():
        return
    name = recipe.model.name_or_path
    local = name == TINY or Path(name).expanduser().is_dir()
    stated = None if local else recipe.about.parameter_count()
    parameters = count_parameters(load_config(recipe)) if stated is None else stated
    if parameters > LARGEST_QUANTIZED_ON_CPU:
        raise ModelError(
            f"{name} has {parameters / 1e9:.1f} billion parameters in "
            f"{4 if recipe.quantization.load_in_4bit else 8} bit, which needs a CUDA GPU, and {why_no_gpu(recipe)}, or "
            "try the recipe here with model.name_or_path=builtin:tiny."
        )


def count_parameters(config: PretrainedConfig) -> int:
    """Number of parameters of the model that a configuration describes, without allocating it."""
    with on_meta_device():
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def resolved_name(recipe: Recipe) -> str:
    """Folder or Hub id of the base model; `builtin:tiny` is made if it is not there yet."""
    name = recipe.model.name_or_path
    return str(tiny_model_folder()) if name == TINY else os.path.expanduser(name)


def _origin(recipe: Recipe) -> dict[str, Any]:
    revision = recipe.model.revision
    return {"trust_remote_code": recipe.model.trust_remote_code, **({"revision": revision} if revision else {})}


def _errors(recipe: Recipe) -> AbstractContextManager[None]:
    model = recipe.model
    return loading_errors(
        model.name_or_path,
        setting="model.name_or_path",
        revision=model.revision,
        attention=model.attn_implementation,
        trust_setting="model.trust_remote_code",
    )


def _own_quantization(config: PretrainedConfig) -> dict[str, Any]:
    """quantization_config of config.json, where transformers looks for it; empty where it is none."""
    parts = (config, config.get_text_config(decoder=True))
    found = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), None)
    return found if isinstance(found, dict) else {}
