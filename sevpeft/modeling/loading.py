"""Loads the base model: precision, config, tokenizer and weights, quantized or not.

Only safetensors weights are read, and no code from the Hub runs unless the recipe sets model.trust_remote_code.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sevpeft.console import print_text
from sevpeft.data.read import look_for_hub
from sevpeft.errors import ModelError, loading_errors
from sevpeft.modeling import compat
from sevpeft.modeling.packing import set_up_attention
from sevpeft.modeling.prompts import Prompt, choose_pad_token
from sevpeft.modeling.tiny import TINY, tiny_model_folder
from sevpeft.recipe import Recipe
from sevpeft.runs import Run

# Parameters. In 4 bit on two cores, one step of this size takes about a second; a larger model takes hours per epoch.
LARGEST_QUANTIZED_ON_CPU = 1_500_000_000


@dataclass(frozen=True)
class Precision:
    """Precision of a run: `dtype` of the frozen weights, and the trainer's mixed precision."""

    dtype: torch.dtype
    bf16: bool
    fp16: bool


@dataclass(frozen=True)
class ResolvedModel:
    """A recipe's base model without its weights; training, plan, evaluation, chat and merge start from it."""

    recipe: Recipe
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt


def resolve_model(recipe: Recipe, run: Run | None = None) -> ResolvedModel:
    """Loads and checks config, tokenizer and prompt of the recipe's base model; raises ModelError.

    If tokenizer or template have changed since `run` was trained, uses the run's copy and prints a notice to stderr.
    """
    config = load_config(recipe)
    check_form(recipe, config)

    def resolved(folder: Path | None = None) -> ResolvedModel:
        tokenizer = load_tokenizer(recipe, config, folder)
        prompt = Prompt.build(tokenizer, config.get_text_config().vocab_size, **recipe.prompt.model_dump())
        return ResolvedModel(recipe, config, tokenizer, prompt)

    fingerprint = run.metrics().get("model", {}).get("prompt") if run else None
    if run is None or fingerprint is None:
        return resolved()
    changed = f"The tokenizer or chat template of {recipe.model.name_or_path} has changed since the training"
    for folder in (None, run.tokenizer):
        with suppress(ModelError):
            model = resolved(folder)
            if model.prompt.fingerprint() == fingerprint:
                if folder and os.environ.get("RANK", "0") == "0":
                    print_text(f"{changed}; the copy in {folder} is used.", stderr=True)
                return model
    raise ModelError(f"{changed}, or the run's section prompt; restore them, or the copy in {run.tokenizer}.")


def learned_positions(config: PretrainedConfig, *, rotary: bool = False) -> int | None:
    """Number of learned positions; with `rotary`, of unscaled rotary ones in the pretraining. None for others."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}  # of the model, or of each kind of layer
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)} - {None}
    return getattr(text, "max_position_embeddings", None) if (kinds == {"default"} if rotary else not rope) else None


def uses_gpu(recipe: Recipe) -> bool:
    """Whether the run computes on a CUDA device: one exists, and neither recipe nor launcher requests the CPU."""
    return torch.cuda.is_available() and not recipe.training.settings().get("use_cpu") and not compat.cpu_requested()


def choose_precision(recipe: Recipe, dtype_before: str | None = None) -> Precision:
    """Precision of this recipe on this machine: by capability, so that the same command gives the same adapter.

    `dtype_before`: dtype of the run that is resumed; it replaces model.dtype=auto.
    """
    settings, quantization, gpu = recipe.training.settings(), recipe.quantization, uses_gpu(recipe)
    bf16, fp16 = settings.get("bf16"), settings.get("fp16")
    native_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if fp16 and not gpu:
        raise ModelError(f"training.fp16=true needs a CUDA GPU: {why_no_gpu(recipe)}, or leave training.fp16 out.")
    compute = quantization.bnb_4bit_compute_dtype if quantization.load_in_4bit else None
    if gpu and not native_bf16 and (bf16 or "bfloat16" in (recipe.model.dtype, compute)):
        # PyTorch would emulate bfloat16, many times slower.
        remedy = "leave training.bf16, model.dtype and quantization.bnb_4bit_compute_dtype out to use float16"
        raise ModelError(f"{torch.cuda.get_device_name()} does not compute in bfloat16; {remedy}.")
    wanted = dtype_before if recipe.model.dtype == "auto" and dtype_before else recipe.model.dtype
    if wanted != "auto":
        dtype = getattr(torch, wanted)
    elif bf16 or fp16:
        dtype = torch.bfloat16 if bf16 else torch.float16
    else:
        dtype = (torch.bfloat16 if native_bf16 else torch.float16) if gpu else dtype_of_cpu(recipe)
    if bf16 is None and fp16 is None:
        bf16, fp16 = dtype == torch.bfloat16, gpu and dtype == torch.float16
    return Precision(dtype, bf16=bool(bf16), fp16=bool(fp16))


def dtype_of_cpu(recipe: Recipe) -> torch.dtype:
    """bfloat16 if the processor has bfloat16 matrix instructions (AMX, AVX512-BF16), else float32; the toy: float32.

    GFLOP/s on 2 cores in bfloat16 and float32: AMX 2,025 and 287, AVX512-BF16 420 and 170, AVX2 10 and 50.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # absent before PyTorch 2.10
    native = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if native and recipe.model.name_or_path != TINY else torch.float32


def why_no_gpu(recipe: Recipe) -> str:
    """Why a run of this recipe has no GPU, and the remedy, as two clauses that end a sentence."""
    if recipe.training.settings().get("use_cpu") or compat.cpu_requested():
        return "the recipe or the launcher requests the CPU; leave training.use_cpu and --cpu out"
    if torch.version.cuda is None and torch.version.hip is None:
        version = torch.__version__
        return f"this PyTorch ({version}) is built for CPUs; install one for GPUs (pytorch.org/get-started/locally)"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return "CUDA_VISIBLE_DEVICES may hide it from this process; unset it, or set it to the number of a GPU"
    return "PyTorch finds none; run this where `nvidia-smi` lists a GPU, with a driver that supports PyTorch's CUDA"


def quantization_config(recipe: Recipe, precision: Precision) -> BitsAndBytesConfig | None:
    """The recipe's bitsandbytes settings with `auto` resolved; None without quantization."""
    settings = recipe.quantization
    if not settings.load_in_4bit:
        return BitsAndBytesConfig(load_in_8bit=True) if settings.load_in_8bit else None
    compute = settings.bnb_4bit_compute_dtype
    storage: str = settings.bnb_4bit_quant_storage
    if compat.weights_are_sharded():
        # FSDP and ZeRO-3 shard only floating-point parameters and cast them to the compute dtype. uint8 storage would
        # stay whole on every GPU, and the cast would corrupt another floating-point storage.
        computed = torch.bfloat16 if precision.bf16 else torch.float16 if precision.fp16 else precision.dtype
        needed = str(computed).removeprefix("torch.")
        if storage not in ("auto", needed):
            key = "quantization.bnb_4bit_quant_storage"
            raise ModelError(f"{key}={storage} does not work with sharded weights in {needed}; write auto.")
        storage = needed
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=precision.dtype if compute == "auto" else getattr(torch, compute),
        bnb_4bit_quant_storage=torch.uint8 if storage == "auto" else getattr(torch, storage),
    )


def load_config(recipe: Recipe) -> PretrainedConfig:
    """Loads the config of the base model from a folder, the Hub or `builtin:tiny`; raises ModelError."""
    folder, name = Path(resolved_name(recipe)), recipe.model.name_or_path
    if not folder.is_dir():
        look_for_hub()
    elif (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{name} is an adapter; name its base model, and continue with training.init_adapter={name}.")
    config: PretrainedConfig = _from_pretrained(AutoConfig, recipe)
    # An encoder would load as well, but attends to the tokens that it learns to predict.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")  # its own code
    if encoder or not causal or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is a {config.model_type} model, which cannot generate text; name a causal model.")
    own = _own_quantization(config)
    # transformers only logs a warning, and loads the quantized values as if they were weights.
    if own.get("quant_method") is not None and not compat.knows_quantization(own):
        raise _quantized_by_others(recipe, f"by {own['quant_method']!r}, which transformers does not know")
    return config


def _quantized_by_others(recipe: Recipe, how: str) -> ModelError:
    return ModelError(f"{recipe.model.name_or_path} is quantized {how}; name the unquantized model.")


def check_form(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raises ModelError if the stored bitsandbytes settings differ from the recipe's; the stored ones would win."""
    own, wanted = _own_quantization(config), recipe.quantization
    keys = ["load_in_4bit", "load_in_8bit"] if own.get("load_in_4bit") or own.get("load_in_8bit") else []
    if own.get("load_in_4bit"):
        keys += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant"]
    if other := [f"quantization.{key}={own[key]}" for key in keys if key in own and own[key] != getattr(wanted, key)]:
        raise _quantized_by_others(recipe, f"with other settings than the recipe's; set {' '.join(other).lower()}")


def load_tokenizer(recipe: Recipe, config: PretrainedConfig, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the base model, or of `folder`, and sets its pad token; raises ModelError."""
    source = recipe.model.model_copy(update={"name_or_path": str(folder)} if folder else {})
    tokenizer = _from_pretrained(AutoTokenizer, recipe.model_copy(update={"model": source}))
    # Without tokenizer files transformers returns an empty tokenizer.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"{recipe.model.name_or_path} has no tokenizer that can be read; add its tokenizer.json.")
    choose_pad_token(tokenizer, config.get_text_config().vocab_size)
    return tokenizer


def load_model(recipe: Recipe, precision: Precision | None, device_index: int = 0) -> PreTrainedModel:
    """Loads the base model: on CUDA device `device_index` if it is quantized, else on the CPU.

    `precision`: None loads the weights as stored, without quantization.

    Raises ModelError: no config, only pickled weights, an unreachable id, or damaged or missing weights.
    """
    set_up_attention()
    load_config(recipe)  # raises for unsuitable models
    arguments: dict[str, Any] = {"dtype": precision.dtype if precision else "auto", "use_safetensors": True}
    if recipe.model.attn_implementation:
        arguments["attn_implementation"] = recipe.model.attn_implementation
    quantization = quantization_config(recipe, precision) if precision else None
    if quantization is not None:
        arguments["quantization_config"] = quantization
        if not compat.zero3():  # transformers refuses a device_map under ZeRO-3
            # FSDP moves one layer after the other to the GPU and keeps its shard, so the whole model need not fit.
            on_gpu = uses_gpu(recipe) and not compat.fsdp_requested()
            arguments["device_map"] = {"": device_index if on_gpu else "cpu"}
    model, loading = _from_pretrained(AutoModelForCausalLM, recipe, output_loading_info=True, **arguments)
    name = recipe.model.name_or_path
    if getattr(model, "peft_config", None):  # a Hub repository with both configs: base and adapter load as one model
        raise ModelError(f"{name} holds an adapter; name its base model.")
    if absent := sorted(loading["missing_keys"]):
        # transformers initializes them at random; the adapter would be trained on noise.
        raise ModelError(f"{name} lacks {len(absent)} weights of its config, such as {absent[0]}; download it again.")
    # NVIDIA's ModelOpt describes scales in hf_quant_config.json, which transformers (5.24) does not read. The weights
    # would be used without their scales.
    weights = {key for key, _ in model.named_parameters()}
    for key in loading["unexpected_keys"]:
        module, _, last = key.rpartition(".")
        if "scale" in last and f"{module}.weight" in weights:
            raise _quantized_by_others(recipe, f"in a form that its config.json does not describe ({key})")
    model.config.use_cache = False
    compat.disable_cpu_avx512_repack(model)
    return model


def load_for_inference(recipe: Recipe) -> PreTrainedModel:
    """Loads the base model as in training, in evaluation mode, on the device of this process."""
    model = load_model(recipe, choose_precision(recipe)).eval()
    compat.copy_last_states(model)
    return model.to("cuda") if uses_gpu(recipe) and not recipe.quantization.quantized() else model


def check_hopeless_start(recipe: Recipe) -> None:
    """Raises ModelError for a 4- or 8-bit model that is too large for training on a CPU."""
    if uses_gpu(recipe) or not recipe.quantization.quantized():
        return
    parameters = recipe.about.parameter_count()  # from the recipe, so that a refusal downloads nothing
    if parameters is None:
        config = load_config(recipe)
        with compat.on_meta_device():
            parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if parameters > LARGEST_QUANTIZED_ON_CPU:
        size = f"{recipe.model.name_or_path} has {parameters / 1e9:.1f} billion quantized parameters"
        raise ModelError(f"{size} and needs a CUDA GPU: {why_no_gpu(recipe)}, or try model.name_or_path=builtin:tiny.")


def resolved_name(recipe: Recipe) -> str:
    """Folder or Hub id of the base model; builds `builtin:tiny` if it does not exist yet."""
    name = recipe.model.name_or_path
    return str(tiny_model_folder()) if name == TINY else os.path.expanduser(name)


def _from_pretrained(kind: Any, recipe: Recipe, **arguments: Any) -> Any:
    """Loads config, tokenizer or model of the recipe; translates every library error to ModelError."""
    model, name = recipe.model, "model.name_or_path"
    arguments |= {"revision": model.revision} if model.revision else {}
    with loading_errors(model.name_or_path, setting=name, revision=model.revision, attention=model.attn_implementation):
        return kind.from_pretrained(resolved_name(recipe), trust_remote_code=model.trust_remote_code, **arguments)


def _own_quantization(config: PretrainedConfig) -> dict[str, Any]:
    """quantization_config of config.json, from the two places that transformers reads; empty if there is none."""
    for part in (config, config.get_text_config(decoder=True)):
        if quantization := getattr(part, "quantization_config", None):
            return quantization if isinstance(quantization, dict) else {}
    return {}
