"""Turns the `model` and `quantization` sections into a tokenizer and a frozen base model on this machine.

Only safetensors weights are read and no code from the Hub is run: both rules are passed to transformers explicitly,
because a hospital's machine should not depend on a library's default. Precision follows the device: bfloat16 where
the GPU or CPU has matrix units for it, float16 on older GPUs, float32 on other CPUs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
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
from sevpeft.errors import ModelError, SevpeftError, first_sentence
from sevpeft.modeling.document_attention import attend_within_documents
from sevpeft.modeling.hardware import (
    dtype_of_cpu,
    refuse_bfloat16,
    refuse_kernel_on_packed_weights,
    refuse_missing_bitsandbytes,
    why_no_gpu,
)
from sevpeft.modeling.prompts import choose_pad_token
from sevpeft.modeling.quantization import check_method, check_scales
from sevpeft.modeling.sharding import fsdp_asked, on_paper, weights_are_sharded, zero3
from sevpeft.modeling.tiny import TINY, tiny_model_folder
from sevpeft.recipe import Recipe

# A model of this size takes about a second for one step on two cores in 4 bit; a larger one takes hours per epoch.
LARGEST_4BIT_ON_CPU = 1_500_000_000


@dataclass(frozen=True)
class Precision:
    """Number formats of a run: `dtype` of the frozen weights, and which mixed precision the trainer uses."""

    dtype: torch.dtype
    bf16: bool
    fp16: bool


def uses_gpu(recipe: Recipe) -> bool:
    """Whether the run computes on a CUDA device (one is there, and neither recipe nor launcher asks for the CPU)."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.cuda.is_available() and not recipe.training.settings().get("use_cpu") and not forced


def choose_precision(recipe: Recipe, dtype_before: str | None = None) -> Precision:
    """Number formats for this recipe on this machine.

    Args:
        dtype_before: of the run that is resumed, where the recipe leaves it open.

    Raises:
        ModelError: float16 training asked for on a CPU, or bfloat16 on a GPU that does not compute in it; bitsandbytes
            asked for and not there.
    """
    refuse_missing_bitsandbytes(recipe)
    gpu = uses_gpu(recipe)
    settings = recipe.training.settings()
    asked_bf16, asked_fp16 = settings.get("bf16"), settings.get("fp16")
    native_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked_fp16 and not gpu:
        raise ModelError(
            f"training.fp16=true needs a CUDA GPU, and {why_no_gpu(recipe)}; without fp16 a CPU run uses float32."
        )
    if gpu and not native_bf16:
        compute = recipe.quantization.load_in_4bit and recipe.quantization.bnb_4bit_compute_dtype
        for setting, asked in (
            ("training.bf16=true", asked_bf16),
            ("model.dtype=bfloat16", recipe.model.dtype == "bfloat16"),
            ("quantization.bnb_4bit_compute_dtype=bfloat16", compute == "bfloat16"),
        ):
            if asked:
                refuse_bfloat16(setting)
    half = torch.bfloat16 if native_bf16 else torch.float16
    wanted = dtype_before if recipe.model.dtype == "auto" and dtype_before else recipe.model.dtype
    if wanted != "auto":
        dtype = getattr(torch, wanted)
    elif asked_bf16:
        dtype = torch.bfloat16
    elif asked_fp16:
        dtype = torch.float16
    else:
        dtype = half if gpu else dtype_of_cpu()
    if asked_bf16 is None and asked_fp16 is None:
        return Precision(dtype, bf16=dtype == torch.bfloat16, fp16=gpu and dtype == torch.float16)
    return Precision(dtype, bf16=bool(asked_bf16), fp16=bool(asked_fp16))


def quantization_config(recipe: Recipe, precision: Precision) -> BitsAndBytesConfig | None:
    """bitsandbytes settings of the recipe, with `auto` resolved; None when nothing is quantised.

    Raises:
        ModelError: packed weights in a form that the engine of this launch cannot divide.
    """
    asked = recipe.quantization
    if asked.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not asked.load_in_4bit:
        return None
    compute = asked.bnb_4bit_compute_dtype
    compute_dtype = precision.dtype if compute == "auto" else getattr(torch, compute)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=asked.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=asked.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=_quant_storage(asked.bnb_4bit_quant_storage, precision),
    )


def _quant_storage(asked: str, precision: Precision) -> torch.dtype:
    """Type that packed 4-bit weights pose as.

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
    """Configuration of the base model, from a folder, the Hub or `builtin:tiny`."""
    name = resolved_name(recipe)
    if not Path(name).is_dir():
        look_for_hub()
    with _plain_errors(recipe):
        config = AutoConfig.from_pretrained(name, **_origin(recipe))
        check_method(recipe.model.name_or_path, config)
    return config


def load_tokenizer(recipe: Recipe, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Tokenizer of the base model, with a pad token that lies within the vocabulary.

    Raises:
        ModelError: it cannot be read, or it knows no words (transformers makes up an empty one without files).
    """
    with _plain_errors(recipe):
        tokenizer = AutoTokenizer.from_pretrained(resolved_name(recipe), **_origin(recipe))
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(_no_tokenizer(recipe.model.name_or_path))
    choose_pad_token(tokenizer, config.get_text_config().vocab_size)
    return tokenizer


def load_model(recipe: Recipe, precision: Precision, device_index: int = 0) -> PreTrainedModel:
    """The base model, quantised if the recipe says so, on the device of this process.

    Args:
        device_index: of the CUDA device of this process; a quantised model is placed there while it is read.

    Raises:
        ModelError: folder without config or with pickle weights only, id not reachable, attention not supported,
            weights damaged or missing.
    """
    attend_within_documents()
    config = load_config(recipe)
    quantization = quantization_config(recipe, precision)
    arguments: dict[str, Any] = {
        "dtype": precision.dtype,
        "use_safetensors": True,
        "output_loading_info": True,
        **_origin(recipe),
    }
    if recipe.model.attn_implementation:
        arguments["attn_implementation"] = recipe.model.attn_implementation
    if quantization is not None:
        with _plain_errors(recipe), torch.device("meta"):
            modules = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        refuse_kernel_on_packed_weights(modules, recipe.model.name_or_path)
        arguments["quantization_config"] = quantization
        if not zero3():  # transformers refuses a device_map there
            # FSDP moves one layer after the other to the GPU and keeps its part, so that the whole need not fit there.
            on_gpu = uses_gpu(recipe) and not fsdp_asked()
            arguments["device_map"] = {"": device_index if on_gpu else "cpu"}
    name = resolved_name(recipe)
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        if pickled:
            raise ModelError(
                f"{name} holds its weights as pickle files only, which can run code when they are read; convert it "
                "once, where that is no danger, with model.save_pretrained(FOLDER), which writes safetensors."
            )
        raise ModelError(f"{name} holds no *.safetensors weights; copy them there, or name another folder.")
    with _plain_errors(recipe):
        model, loading = AutoModelForCausalLM.from_pretrained(name, **arguments)
    absent = sorted(loading["missing_keys"])
    if absent:
        # transformers fills them with random numbers and goes on; the adapter would be trained on noise.
        raise ModelError(
            f"{recipe.model.name_or_path} lacks {len(absent)} of the weights that its config.json asks for, such as "
            f"{absent[0]}; fetch it again, or name a model that is complete."
        )
    check_scales(recipe.model.name_or_path, model, loading["unexpected_keys"])
    model.config.use_cache = False
    keep_4bit_weights_as_they_are(model)
    return model


def keep_4bit_weights_as_they_are(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU.

    On CPUs with AVX512-BF16 the first forward without gradients (any evaluation) repacks them, and every later
    gradient and merge is wrong without an error (bitsandbytes 0.50.2, `Linear4bit.forward`); this switch prevents it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (not an attribute of nn.Module)


def refuse_hopeless_start(recipe: Recipe) -> None:
    """Refuses a 4- or 8-bit model on a CPU when its size says that it was meant for a GPU.

    The size is the recipe's own statement where the model is still the recipe's, so that nothing is downloaded only
    to be refused; a folder's model is counted.
    """
    if uses_gpu(recipe) or not recipe.quantization.quantised():
        return
    name = recipe.model.name_or_path
    local = name == TINY or Path(os.path.expanduser(name)).is_dir()
    stated = None if local else recipe.about.parameter_count()
    parameters = count_parameters(load_config(recipe)) if stated is None else stated
    if parameters > LARGEST_4BIT_ON_CPU:
        raise ModelError(
            f"{name} has {parameters / 1e9:.1f} billion parameters in "
            f"{4 if recipe.quantization.load_in_4bit else 8} bit, which needs a CUDA GPU, and {why_no_gpu(recipe)}, or "
            "try the recipe here with model.name_or_path=builtin:tiny."
        )


def count_parameters(config: PretrainedConfig) -> int:
    """Number of parameters of the model that a configuration describes, without allocating it."""
    with on_paper():
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def resolved_name(recipe: Recipe) -> str:
    """Folder or Hub id of the base model; `builtin:tiny` is made if it is not there yet."""
    name = recipe.model.name_or_path
    return str(tiny_model_folder()) if name == TINY else os.path.expanduser(name)


def _origin(recipe: Recipe) -> dict[str, Any]:
    revision = recipe.model.revision
    return {"trust_remote_code": recipe.model.trust_remote_code, **({"revision": revision} if revision else {})}


class _plain_errors:
    """Turns what transformers and the Hub raise while loading into one sentence."""

    def __init__(self, recipe: Recipe) -> None:
        self.name = recipe.model.name_or_path
        self.revision = recipe.model.revision
        self.attention = recipe.model.attn_implementation

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # Whatever a library raises on files that others wrote, the Exception of `tokenizers` included.
        if not isinstance(error, Exception) or isinstance(error, SevpeftError):
            return
        raise ModelError(self._sentence(error)) from error

    def _sentence(self, error: BaseException) -> str:
        causes = list(_causes(error))
        folder = Path(os.path.expanduser(self.name))
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            return (
                f"{self.name} is gated: accept its licence at https://huggingface.co/{self.name} with your account, "
                "then run `hf auth login` here."
            )
        if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
            return f"{self.name} has no revision {self.revision!r}; correct model.revision or leave it out."
        if folder.is_dir() and not (folder / "config.json").exists():
            return (
                f"{self.name} is a folder without config.json, so it holds no transformers model; name one that does."
            )
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            return (
                f"There is no model {self.name} on the Hub and no folder of that name here; correct "
                "model.name_or_path or, if it is private, run `hf auth login`."
            )
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason or "custom code" in reason:
            return (
                f"{self.name} wants to run code of its own, which is off; read that code, then set "
                "model.trust_remote_code=true."
            )
        if isinstance(error, torch.OutOfMemoryError):
            return (
                f"{self.name} does not fit in the free memory of the GPU; set quantization.load_in_4bit=true, close "
                "what else uses the GPU, or choose a smaller model."
            )
        if isinstance(error, SafetensorError):
            return f"{self.name} has damaged weights ({first_sentence(error)}); fetch or copy them again."
        if "ignore_mismatched_sizes" in reason:
            return (
                f"{self.name} has weights of other shapes than its config.json says; fetch both again, from one place."
            )
        if "backend tokenizer" in reason:
            return _no_tokenizer(self.name)
        if self.attention and re.search("attn_implementation|attention implementation|FlashAttention", reason):
            return (
                f"model.attn_implementation={self.attention} does not work for {self.name} here "
                f"({first_sentence(error)}); write eager, or leave it out."
            )
        if not folder.exists() and isinstance(error, OSError):
            return (
                f"{self.name} is no folder here and could not be fetched from the Hub; check the name in "
                "model.name_or_path and the connection, or name a folder that holds the model."
            )
        return (
            f"{self.name} could not be loaded ({first_sentence(error)}); fetch it again, or name another causal "
            "language model."
        )


def _no_tokenizer(name: str) -> str:
    return f"{name} has no tokenizer that can be read; put its tokenizer.json and tokenizer_config.json there."


def _causes(error: BaseException | None) -> Any:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
